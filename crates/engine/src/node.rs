//! A program's attachment to the broker of its node.
//!
//! One thread per attachment reads the control socket: it hands answers to those who asked, takes
//! connections that come in into their listener's backlog (whatever the program is doing), obeys
//! cuts, and relays bells to descriptors that sit in `select`. When the broker goes away,
//! connections live on; the thread attaches again by itself, leases its ports again and shows the
//! broker the tickets of its connections.

mod agent;
pub mod sockets;
mod spare;

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak, mpsc};
use std::time::{Duration, Instant};

use isthmus_sys::poll::{Flag, Set};
use isthmus_sys::{cpu, packet};
use isthmus_wire::control::{
    self, ANYBODY, Carrier, FEATURE_GUEST, FEATURE_WINDOWS, MESSAGE_MAX, Message, Refusal, SocketKind,
};

use crate::bell::Doorbell;
use crate::connection::{Connection, Info};
use crate::datagram::Datagram;
use crate::error::{Error, Result};
use crate::lane::Offer;
use crate::listener::{Acceptor, Listener, Terms};
use crate::lock;
use crate::outbox::Outbox;
use crate::wait::How;
use crate::window::Lenders;
use sockets::Host;
use spare::Spare;

/// The broker answers at once or after its own time-outs, which are shorter.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// How often a waiting asker looks whether a signal handler wants it to stop.
const SIGNAL_SLICE: Duration = Duration::from_millis(100);
const TOKEN_CONTROL: u64 = 0;
const TOKEN_WAKE: u64 = 1;

/// What the broker said about this program's domain.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    pub domain: u32,
    pub domain_name: String,
    pub node: String,
    pub ring_max: u32,
    pub epoch: u64,
    /// The program is in a guest: the switch carries every lane, in memory that comes with the answer.
    pub guest: bool,
    /// The broker passes windows on.
    pub windows: bool,
}

/// A connection that somebody wants.
#[derive(Clone, Debug)]
pub struct ConnectRequest {
    pub to: String,
    pub port: u32,
    /// A port leased by this program, or 0.
    pub from_port: u32,
    pub kind: SocketKind,
    /// Take this carrier or none.
    pub require: Option<Carrier>,
    pub small: u32,
    pub large: u32,
}

struct Answer {
    packet: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

/// Keeps a [`Node`] attached: every listener and connection holds it, and the node detaches when
/// the last of them and the program's own handle are gone.
pub struct Attachment(Arc<Node>);

impl std::ops::Deref for Attachment {
    type Target = Arc<Node>;

    fn deref(&self) -> &Arc<Node> {
        &self.0
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.0.stop();
    }
}

type Then = Box<dyn FnOnce(Result<Answer>) + Send>;

/// A domain's virtual network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nic {
    /// 48 bits, the first byte on the wire the highest.
    pub nic: u64,
    pub domain: u32,
    pub name: String,
}

pub struct Node {
    door: PathBuf,
    program: String,
    control: Mutex<Option<Arc<OwnedFd>>>,
    /// What a host said while the broker did not read. Locked after the control socket.
    outbox: Mutex<Outbox>,
    identity: Mutex<Identity>,
    slots: Mutex<HashMap<u32, Then>>,
    next_request: AtomicU32,
    acceptors: Mutex<HashMap<(u32, u32), Weak<dyn Acceptor>>>,
    connections: Mutex<HashMap<u64, Weak<Connection>>>,
    lenders: Arc<Lenders>,
    spare: Spare,
    /// Of the guest that this is, if its agent gave it.
    doorbell: OnceLock<Arc<Doorbell>>,
    set: Set,
    wake: Flag,
    stopping: AtomicBool,
    attachment: OnceLock<Weak<Attachment>>,
    host: Option<Arc<dyn Host>>,
    generation: u32,
}

impl Node {
    /// Attach to the broker behind `door`.
    ///
    /// # Errors
    /// No broker answers there, or it refuses.
    pub fn attach(door: &Path, program: &str) -> Result<Arc<Attachment>> {
        Self::start(door, program, Some(greet(door, program, FEATURE_WINDOWS, ANSWER_LIMIT)?), None)
    }

    /// Start the engine's thread, with a broker or in search of one.
    fn start(
        door: &Path,
        program: &str,
        greeted: Option<(OwnedFd, Identity)>,
        host: Option<Arc<dyn Host>>,
    ) -> Result<Arc<Attachment>> {
        cpu::raise_descriptor_limit();
        let (control, identity) = greeted.unzip();
        let set = Set::new().map_err(Error::os("attaching"))?;
        let wake = Flag::new().map_err(Error::os("attaching"))?;
        if let Some(control) = &control {
            set.add(control.as_fd(), TOKEN_CONTROL).map_err(Error::os("attaching"))?;
        }
        set.add(wake.as_fd(), TOKEN_WAKE).map_err(Error::os("attaching"))?;
        let node = Arc::new(Self {
            door: door.to_owned(),
            program: program.to_owned(),
            control: Mutex::new(control.map(Arc::new)),
            outbox: Mutex::default(),
            identity: Mutex::new(identity.unwrap_or_default()),
            slots: Mutex::default(),
            next_request: AtomicU32::new(1),
            acceptors: Mutex::default(),
            connections: Mutex::default(),
            lenders: Arc::default(),
            spare: Spare::default(),
            doorbell: OnceLock::new(),
            set,
            wake,
            stopping: AtomicBool::new(false),
            attachment: OnceLock::new(),
            host,
            generation: cpu::generation(),
        });
        let attachment = Arc::new(Attachment(Arc::clone(&node)));
        let _ = node.attachment.set(Arc::downgrade(&attachment));
        let agent = node;
        std::thread::Builder::new()
            .name("isthmus".into())
            .spawn(move || agent.run())
            .map_err(Error::os("starting the engine's thread"))?;
        Ok(attachment)
    }

    pub(crate) fn keep(&self) -> Option<Arc<Attachment>> {
        self.attachment.get().and_then(Weak::upgrade)
    }

    #[must_use]
    pub fn identity(&self) -> Identity {
        lock(&self.identity).clone()
    }

    #[must_use]
    pub fn door(&self) -> &Path {
        &self.door
    }

    /// Is a broker attached now?
    #[must_use]
    pub fn attached(&self) -> bool {
        lock(&self.control).is_some()
    }

    /// Was this attachment made by this process, not by its parent?
    #[must_use]
    pub fn ours(&self) -> bool {
        self.generation == cpu::generation() && !self.stopping.load(Ordering::Acquire)
    }

    /// Detach: listeners and pending questions end, connections are cut loose and live on.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.wake.raise();
    }

    // ---- asking

    fn control(&self) -> Result<Arc<OwnedFd>> {
        if self.generation != cpu::generation() {
            return Err(Error::Forked);
        }
        lock(&self.control).clone().ok_or(Error::BrokerLost)
    }

    fn tell(&self, request: u32, message: &Message<'_>, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        if self.host.is_some() {
            return self.post(request, message, descriptors);
        }
        send_how(&*self.control()?, request, message, descriptors, packet::send)
    }

    /// Tell without waiting: a host has programs that must not wait for a broker. What its socket has no room for is
    /// sent once there is some.
    fn post(&self, request: u32, message: &Message<'_>, descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        if self.generation != cpu::generation() {
            return Err(Error::Forked);
        }
        let control = lock(&self.control);
        let control = control.as_ref().ok_or(Error::BrokerLost)?;
        let mut outbox = lock(&self.outbox);
        let waited = outbox.waiting() > 0;
        let keep = |socket: BorrowedFd<'_>, packet: &[u8], descriptors: &[BorrowedFd<'_>]| {
            outbox.send(socket, packet, descriptors)
        };
        send_how(control, request, message, descriptors, keep)?;
        if !waited && outbox.waiting() > 0 {
            let _ = self.set.watch(control.as_fd(), TOKEN_CONTROL, true);
        }
        Ok(())
    }

    /// There is room for what waits. `false`: the broker is gone.
    fn post_more(&self) -> bool {
        let control = lock(&self.control);
        let Some(control) = &*control else { return false };
        let mut outbox = lock(&self.outbox);
        let sent = outbox.flush(control.as_fd());
        if outbox.waiting() == 0 {
            let _ = self.set.watch(control.as_fd(), TOKEN_CONTROL, false);
        }
        sent.is_ok()
    }

    fn ask_then(&self, message: &Message<'_>, descriptors: &[BorrowedFd<'_>], then: Then) {
        let request = self.next_request.fetch_add(1, Ordering::Relaxed).max(1);
        lock(&self.slots).insert(request, then);
        if let Err(error) = self.tell(request, message, descriptors) {
            // Not with the slots locked: it may ask again, or wait for whoever does.
            let then = lock(&self.slots).remove(&request);
            if let Some(then) = then {
                then(Err(error));
            }
        }
    }

    /// Ask without waiting for a broker that does not read; `then` hears whether it was done.
    pub(crate) fn ask_now(
        &self,
        message: &Message<'_>,
        descriptors: &[BorrowedFd<'_>],
        then: Box<dyn FnOnce(bool) + Send>,
    ) {
        let request = self.next_request.fetch_add(1, Ordering::Relaxed).max(1);
        let done = |answer: &Answer| matches!(decode_any(&answer.packet), Ok(Message::Done {}));
        lock(&self.slots)
            .insert(request, Box::new(move |answer| then(answer.is_ok_and(|answer| done(&answer)))));
        let sent = self
            .control()
            .and_then(|control| send_how(&control, request, message, descriptors, packet::send_now));
        if let Err(error) = sent {
            let then = lock(&self.slots).remove(&request);
            if let Some(then) = then {
                then(Err(error));
            }
        }
    }

    /// Say what is not answered, without waiting; `false`: nobody heard it.
    pub(crate) fn say_now(&self, message: &Message<'_>) -> bool {
        let said = self.control().and_then(|control| send_how(&control, 0, message, &[], packet::send_now));
        said.is_ok()
    }

    /// Does the broker pass windows on?
    pub(crate) fn lends_windows(&self) -> bool {
        lock(&self.identity).windows
    }

    fn ask(&self, message: &Message<'_>, how: &How<'_>) -> Result<Answer> {
        let (tx, rx) = mpsc::sync_channel(1);
        self.ask_then(message, &[], Box::new(move |answer| drop(tx.send(answer))));
        wait_for(&rx, how)?
    }

    /// Which domain has this name?
    ///
    /// # Errors
    /// There is none, or no broker answers.
    pub fn resolve(&self, name: &str, how: &How<'_>) -> Result<(u32, String)> {
        let answer = self.ask(&Message::Resolve { name }, how)?;
        match decode(&answer.packet)? {
            Message::Resolved { domain, name } => Ok((domain, name.to_owned())),
            other => Err(unexpected(&other)),
        }
    }

    /// The virtual network card of a domain: by its address, or (`nic` 0) by the domain's name, or (neither) this one's.
    ///
    /// # Errors
    /// There is none, or no broker answers.
    pub fn find_nic(&self, nic: u64, name: &str, how: &How<'_>) -> Result<Nic> {
        found_nic(&self.ask(&Message::FindNic { nic, name }, how)?)
    }

    /// As [`Node::find_nic`], without waiting for the answer.
    pub fn find_nic_then(&self, nic: u64, name: &str, then: Box<dyn FnOnce(Result<Nic>) + Send>) {
        let found = move |answer: Result<Answer>| then(answer.and_then(|answer| found_nic(&answer)));
        self.ask_then(&Message::FindNic { nic, name }, &[], Box::new(found));
    }

    /// What the broker knows of this domain, as JSON.
    ///
    /// # Errors
    /// No broker answers.
    pub fn status(&self, how: &How<'_>) -> Result<String> {
        let mut text = String::new();
        loop {
            let answer = self.ask(&Message::Status { offset: text.len() as u32 }, how)?;
            match decode(&answer.packet)? {
                Message::Report { total, text: piece, .. } => {
                    text.push_str(piece);
                    if piece.is_empty() || text.len() >= total as usize {
                        return Ok(text);
                    }
                }
                other => return Err(unexpected(&other)),
            }
        }
    }

    // ---- ports

    /// Lease a port. An answer that comes when nobody waits for it any more gives the port back.
    fn bind(&self, terms: &Terms, how: &How<'_>) -> Result<u32> {
        let Terms { port, partner, kind, backlog, .. } = *terms;
        let (tx, rx) = mpsc::sync_channel(1);
        let over = Arc::new(Mutex::new(false));
        let (is_over, node) = (Arc::clone(&over), self.attachment.get().cloned());
        let then = move |answer: Result<Answer>| {
            let bound = answer.and_then(|answer| match decode(&answer.packet)? {
                Message::Bound { port } => Ok(port),
                other => Err(unexpected(&other)),
            });
            let is_over = lock(&is_over);
            if !*is_over {
                return drop(tx.send(bound));
            }
            drop(is_over);
            if let (Ok(port), Some(node)) = (bound, node.and_then(|node| node.upgrade())) {
                node.unbind(port, partner);
            }
        };
        self.ask_then(&Message::Bind { port, kind, partner, backlog }, &[], Box::new(then));
        wait_for(&rx, how).unwrap_or_else(|error| {
            *lock(&over) = true;
            // It may have come just now.
            rx.try_recv().unwrap_or(Err(error))
        })
    }

    fn register(&self, port: u32, partner: u32, acceptor: Weak<dyn Acceptor>) {
        lock(&self.acceptors).insert((port, partner), acceptor);
    }

    /// Lease a port and listen on it. `terms.port` 0 lets the broker choose.
    ///
    /// # Errors
    /// The port is taken, or no rule lets anybody reach it.
    pub fn listen(self: &Arc<Self>, mut terms: Terms, how: &How<'_>) -> Result<Arc<Listener>> {
        terms.port = self.bind(&terms, how)?;
        let listener = Arc::new(Listener::new(terms, self)?);
        let acceptor: Arc<dyn Acceptor> = Arc::clone(&listener) as _;
        self.register(terms.port, terms.partner, Arc::downgrade(&acceptor));
        Ok(listener)
    }

    /// A datagram socket, on a leased port (`Some`) or only for sending and what comes back.
    ///
    /// # Errors
    /// As [`Node::listen`].
    pub fn datagram(
        self: &Arc<Self>,
        port: Option<u32>,
        partner: u32,
        rings: (u32, u32),
        how: &How<'_>,
    ) -> Result<Arc<Datagram>> {
        let kind = SocketKind::Datagram;
        let (small, large) = rings;
        let mut terms = Terms { port: 0, partner, kind, backlog: 0, small, large };
        if let Some(port) = port {
            terms.port = port;
            terms.port = self.bind(&terms, how)?;
        }
        let socket = Datagram::new(terms, port.is_some(), self)?;
        if port.is_some() {
            let acceptor: Arc<dyn Acceptor> = Arc::clone(&socket) as _;
            self.register(terms.port, terms.partner, Arc::downgrade(&acceptor));
        }
        Ok(socket)
    }

    /// Finish every connection, as the kernel does for the sockets of a program that ends.
    pub fn finish(&self) {
        if !self.ours() {
            return;
        }
        let held: Vec<_> = lock(&self.connections).values().filter_map(Weak::upgrade).collect();
        for connection in held {
            connection.close();
        }
    }

    pub(crate) fn unbind(&self, port: u32, partner: u32) {
        if !self.ours() {
            return;
        }
        lock(&self.acceptors).remove(&(port, partner));
        self.ask_then(&Message::Unbind { port, partner }, &[], Box::new(drop));
    }

    // ---- connections

    /// Open a connection.
    ///
    /// # Errors
    /// Nobody listens, a rule refuses, a limit is reached, or the time ran out.
    pub fn connect(self: &Arc<Self>, request: &ConnectRequest, how: &How<'_>) -> Result<Arc<Connection>> {
        let (tx, rx) = mpsc::sync_channel(1);
        self.connect_then(request.clone(), Box::new(move |result| drop(tx.send(result))));
        let connection = wait_for(&rx, how)??;
        connection.claim();
        Ok(connection)
    }

    /// As [`Node::connect`], without waiting: `then` is called on the engine's thread, and claims the connection. One
    /// that nobody claims is reset.
    pub fn connect_then(
        self: &Arc<Self>,
        request: ConnectRequest,
        then: Box<dyn FnOnce(Result<Arc<Connection>>) + Send>,
    ) {
        let guest = lock(&self.identity).guest;
        let usual = if guest { Carrier::Switch } else { Carrier::Sealed };
        let carrier = request.require.unwrap_or(usual);
        self.connect_with(request, carrier, true, then);
    }

    fn connect_with(
        self: &Arc<Self>,
        request: ConnectRequest,
        carrier: Carrier,
        may_retry: bool,
        then: Box<dyn FnOnce(Result<Arc<Connection>>) + Send>,
    ) {
        if self.generation != cpu::generation() {
            return then(Err(Error::Forked));
        }
        if lock(&self.identity).guest {
            return self.connect_in_guest(request, carrier, then);
        }
        let shape = (carrier, request.small, request.large);
        // The second try of one connection is no burst.
        let offer = if may_retry {
            self.spare.take(shape)
        } else {
            Offer::new(carrier, request.small, request.large)
        };
        let offer = match offer {
            Ok(offer) => Arc::new(offer),
            Err(error) => return then(Err(error)),
        };
        let node = Arc::downgrade(self);
        let sent = Arc::clone(&offer);
        let to = request.to.clone();
        let message = Message::Connect {
            to: &to,
            to_port: request.port,
            from_port: request.from_port,
            kind: request.kind,
            carrier,
            require: u8::from(request.require.is_some()),
            small: request.small,
            large: request.large,
        };
        let answered = move |answer: Result<Answer>| {
            let Some(node) = node.upgrade() else { return then(Err(Error::Closed)) };
            match answer.and_then(|answer| node.connected(Some(&offer), request.kind, answer)) {
                Err(Error::Refused { refusal: Refusal::UseCarrier, text, .. }) if may_retry => {
                    match Carrier::ALL.iter().copied().find(|c| c.name() == text) {
                        Some(carrier) => node.connect_with(request, carrier, false, then),
                        None => then(Err(Error::BadAnswer(format!("carrier {text:?}")))),
                    }
                }
                result => then(result),
            }
        };
        self.ask_then(&message, &sent.descriptors(), Box::new(answered));
        if may_retry {
            self.spare.prepare(shape);
        }
    }

    /// As [`Node::connect_with`], where the agent of a guest brings the memory.
    fn connect_in_guest(
        self: &Arc<Self>,
        request: ConnectRequest,
        carrier: Carrier,
        then: Box<dyn FnOnce(Result<Arc<Connection>>) + Send>,
    ) {
        let node = Arc::downgrade(self);
        let kind = request.kind;
        let message = Message::Connect {
            to: &request.to,
            to_port: request.port,
            from_port: request.from_port,
            kind,
            carrier,
            require: u8::from(request.require.is_some()),
            small: request.small,
            large: request.large,
        };
        let answered = move |answer: Result<Answer>| {
            let Some(node) = node.upgrade() else { return then(Err(Error::Closed)) };
            then(answer.and_then(|answer| node.connected(None, kind, answer)));
        };
        self.ask_then(&message, &[], Box::new(answered));
    }

    /// `offer`: the memory of this side, unless an agent brings it.
    fn connected(
        self: &Arc<Self>,
        offer: Option<&Offer>,
        kind: SocketKind,
        answer: Answer,
    ) -> Result<Arc<Connection>> {
        let Answer { packet, descriptors } = answer;
        let Message::Connected {
            connection,
            secret,
            to,
            to_name,
            to_port,
            from_port,
            carrier,
            small,
            large,
            why,
            ticket,
        } = decode(&packet)?
        else {
            return Err(Error::BadAnswer("not an answer to connect".into()));
        };
        let own = offer.map_or((small, large), |offer| (offer.small, offer.large));
        let info = Info {
            id: connection,
            kind,
            carrier,
            port: from_port,
            peer: to,
            peer_name: to_name.to_owned(),
            peer_port: to_port,
            why: why.to_owned(),
            opener: true,
            ticket,
            small: own.0,
            large: own.1,
            theirs: (small, large),
        };
        let joined = if offer.is_some_and(|offer| offer.carrier != carrier) {
            Err(Error::BadAnswer("another carrier than was offered".into()))
        } else {
            self.join(offer, info, descriptors, (small, large), secret)
        };
        match &joined {
            Ok(connection) => connection.leave_unclaimed(),
            // For the broker it is open.
            Err(_) => drop(self.tell(0, &Message::Close { connection }, &[])),
        }
        joined
    }

    fn join(
        self: &Arc<Self>,
        offer: Option<&Offer>,
        info: Info,
        descriptors: Vec<OwnedFd>,
        theirs: (u32, u32),
        secret: u64,
    ) -> Result<Arc<Connection>> {
        let Ok([lane, bell]) = <[OwnedFd; 2]>::try_from(descriptors) else {
            return Err(Error::BadAnswer("a connection without its two descriptors".into()));
        };
        let (ends, counters) = match offer {
            Some(offer) => {
                let ends = offer.join(&lane, theirs.0, theirs.1, secret, info.kind)?;
                (ends, Some(offer.counters_descriptor()?))
            }
            None => (crate::lane::join_seat(&lane, theirs.0, theirs.1, secret, info.kind)?, None),
        };
        let connection = Connection::new(info, ends, bell, counters, Some(self));
        if let (None, Some(doorbell)) = (offer, self.doorbell.get()) {
            connection.bell().hang_doorbell(Arc::clone(doorbell));
        }
        lock(&self.connections).insert(connection.info.key(), Arc::downgrade(&connection));
        Ok(connection)
    }

    pub(crate) fn closed(&self, connection: &Connection) {
        let id = connection.info.id;
        let _ = self.set.remove(connection.bell().as_fd());
        if lock(&self.connections).remove(&connection.info.key()).is_some() {
            // Without a broker nobody needs to know: the next one is not told of it, or told that
            // it is over.
            let _ = self.tell(0, &Message::Close { connection: id }, &[]);
        }
    }

    /// Relay this connection's bell to its readiness.
    pub(crate) fn watch(&self, connection: &Connection) {
        let _ = self.set.add(connection.bell().as_fd(), connection.info.key());
    }
}

fn found_nic(answer: &Answer) -> Result<Nic> {
    match decode(&answer.packet)? {
        Message::Nic { nic, domain, name } => Ok(Nic { nic, domain, name: name.to_owned() }),
        other => Err(unexpected(&other)),
    }
}

/// Wait for an answer, at most [`ANSWER_LIMIT`] or the caller's deadline.
fn wait_for<T>(rx: &mpsc::Receiver<T>, how: &How<'_>) -> Result<T> {
    let limit = Instant::now() + ANSWER_LIMIT;
    let until = how.deadline.map_or(limit, |at| at.min(limit));
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match rx.recv_timeout(left.min(SIGNAL_SLICE)) {
            Ok(answer) => return Ok(answer),
            Err(mpsc::RecvTimeoutError::Disconnected) => return Err(Error::BrokerLost),
            Err(mpsc::RecvTimeoutError::Timeout) if left.is_zero() => {
                return Err(Error::TimedOut { done: 0 });
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                if how.wants_to_stop() {
                    return Err(Error::Interrupted { done: 0 });
                }
            }
        }
    }
}

fn send(
    control: &OwnedFd,
    request: u32,
    message: &Message<'_>,
    descriptors: &[BorrowedFd<'_>],
) -> Result<()> {
    send_how(control, request, message, descriptors, packet::send)
}

fn send_how(
    control: &OwnedFd,
    request: u32,
    message: &Message<'_>,
    descriptors: &[BorrowedFd<'_>],
    how: impl FnOnce(BorrowedFd<'_>, &[u8], &[BorrowedFd<'_>]) -> std::io::Result<()>,
) -> Result<()> {
    let mut buffer = [0; MESSAGE_MAX];
    let len = control::encode(request, message, &mut buffer).map_err(|e| Error::Os {
        what: "a request that cannot be sent",
        source: std::io::Error::new(std::io::ErrorKind::InvalidInput, e),
    })?;
    how(control.as_fd(), &buffer[..len], descriptors).map_err(|_| Error::BrokerLost)
}

/// Attach, and wait for the welcome.
fn greet(door: &Path, program: &str, features: u32, limit: Duration) -> Result<(OwnedFd, Identity)> {
    greet_waiting(door, program, features, limit, |control| {
        isthmus_sys::poll::wait_readable(control, Some(limit)).is_ok_and(|ready| ready.readable)
    })
}

/// The same, where `answers` waits for the broker.
fn greet_waiting(
    door: &Path,
    program: &str,
    features: u32,
    limit: Duration,
    answers: impl FnOnce(BorrowedFd<'_>) -> bool,
) -> Result<(OwnedFd, Identity)> {
    let no_broker = |source| Error::NoBroker { door: door.display().to_string(), source };
    let control = packet::connect(door, Some(limit)).map_err(no_broker)?;
    // A name too long for the message is cut, not refused.
    let mut end = program.len().min(200);
    while !program.is_char_boundary(end) {
        end -= 1;
    }
    send(&control, 1, &Message::Hello { features, program: &program[..end] }, &[])?;
    if !answers(control.as_fd()) {
        return Err(no_broker(std::io::ErrorKind::TimedOut.into()));
    }
    let mut buffer = [0; MESSAGE_MAX];
    let (len, _) = packet::receive(control.as_fd(), &mut buffer).map_err(no_broker)?;
    if len == 0 {
        return Err(no_broker(std::io::ErrorKind::ConnectionReset.into()));
    }
    match decode(&buffer[..len])? {
        Message::Welcome { features, domain, domain_name, node, ring_max, epoch } => {
            let identity = Identity {
                domain,
                domain_name: domain_name.to_owned(),
                node: node.to_owned(),
                ring_max,
                epoch,
                guest: features & FEATURE_GUEST != 0,
                windows: features & FEATURE_WINDOWS != 0,
            };
            Ok((control, identity))
        }
        other => Err(unexpected(&other)),
    }
}

/// A message that is not a refusal.
fn decode(packet: &[u8]) -> Result<Message<'_>> {
    match decode_any(packet)? {
        Message::Refused { refusal, rule, text } => {
            Err(Error::Refused { refusal, rule, text: text.to_owned() })
        }
        message => Ok(message),
    }
}

fn decode_any(packet: &[u8]) -> Result<Message<'_>> {
    let (_, message) = control::decode(packet).map_err(|e| Error::BadAnswer(e.to_string()))?;
    Ok(message)
}

fn unexpected(message: &Message<'_>) -> Error {
    Error::BadAnswer(format!("an unexpected {:?}", message.name()))
}

/// In [`Terms`]: anybody whom a rule lets in.
pub const PARTNER_ANYBODY: u32 = ANYBODY;
