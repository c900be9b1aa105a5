//! What is around a switch: a broker and guests that do what a test tells them, and nothing on their own.
//!
//! A [`Node`] runs a real switch in a thread of this process and answers it as a broker would. A [`Guest`] is a
//! monitor and a driver at once: it hands its memory in over vhost-user and writes its queues by hand, so that it can
//! also write what no driver would. Nothing is waited for without a limit.

// Each suite uses its part of this.
#![allow(dead_code)]

mod guest;

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use isthmus_engine::lane::Offer;
use isthmus_switch::Switch;
use isthmus_sys::living::Living;
use isthmus_sys::packet;
use isthmus_wire::control::{
    self, ANY_PORT, ANYBODY, Carrier, GuestState, MESSAGE_MAX, Message, Refusal, SocketKind,
};
use isthmus_wire::vsock::{CREDIT_UPDATE, REQUEST, RESPONSE};
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

pub use guest::*;

/// Whoever is not answered for so long is not answered.
pub const SOON: Duration = Duration::from_secs(5);
/// A number that no guest has.
pub const NOBODY: u32 = 77;

/// Ask again and again, until there is an answer or too much time has gone.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < SOON, "{what}: not within {SOON:?}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Memory of this process that is neither a file's nor a guest's, MiB.
pub fn own_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("a line about it");
    let kib: u64 = line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number");
    kib / 1024
}

/// Descriptors that this process has.
pub fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc").count()
}

/// One message as its bytes.
pub fn encoded(request: u32, message: &Message<'_>) -> Vec<u8> {
    let mut buffer = [0; MESSAGE_MAX];
    let len = control::encode(request, message, &mut buffer).expect("a message");
    buffer[..len].to_vec()
}

fn say(socket: &OwnedFd, request: u32, message: &Message<'_>, descriptors: &[BorrowedFd<'_>]) {
    // A switch that is gone hears nothing; the test sees that elsewhere.
    let _ = packet::send(socket.as_fd(), &encoded(request, message), descriptors);
}

fn listen(path: &Path, kind: SocketType, backlog: i32) -> OwnedFd {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
    let socket = socket.expect("a socket");
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).expect("a short path")).expect("a free path");
    rustix::net::listen(&socket, backlog).expect("to listen");
    socket
}

fn connect(path: &Path, kind: SocketType) -> OwnedFd {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
    let socket = socket.expect("a socket");
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).expect("a short path")).expect("a listener");
    socket
}

// ---- the broker

/// A connection that was asked for and not answered.
struct Pending {
    opener: Arc<OwnedFd>,
    request: u32,
    to: u32,
    bell: OwnedFd,
}

#[derive(Default)]
struct Broker {
    homes: HashMap<u32, Arc<OwnedFd>>,
    /// Of each guest, who greeted last.
    newest: HashMap<u32, Arc<OwnedFd>>,
    /// What every question for a connection is answered with: the end of a kernel socket.
    kernel: Option<OwnedFd>,
    /// The ends that were brought to two guests, wherever they are.
    pair: Option<Living>,
    /// Programs' kernel sockets that were shown.
    shown: Vec<OwnedFd>,
    pending: HashMap<u64, Pending>,
    /// What was heard, and through whose door; without greetings and questions.
    heard: Vec<(u32, String)>,
    states: HashMap<u32, (GuestState, String)>,
    connections: u64,
    silent: bool,
    over: bool,
}

#[derive(Default)]
struct Shared {
    broker: Mutex<Broker>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Broker> {
        self.broker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The broker, when it speaks.
    fn speaking(&self) -> MutexGuard<'_, Broker> {
        let silent = |broker: &mut Broker| broker.silent && !broker.over;
        self.changed.wait_while(self.lock(), silent).unwrap_or_else(PoisonError::into_inner)
    }

    /// One program that came through a guest's door.
    fn serve(&self, cid: u32, socket: &Arc<OwnedFd>) {
        let mut buffer = [0; MESSAGE_MAX];
        while let Ok((len @ 1.., descriptors)) = packet::receive(socket.as_fd(), &mut buffer) {
            let (request, message) = control::decode(&buffer[..len]).expect("a message from the switch");
            let mut broker = self.speaking();
            if broker.over {
                return;
            }
            broker.answer(cid, socket, request, &message, &descriptors);
        }
    }
}

impl Broker {
    fn answer(
        &mut self,
        cid: u32,
        socket: &Arc<OwnedFd>,
        request: u32,
        message: &Message<'_>,
        descriptors: &[OwnedFd],
    ) {
        let nobody = Message::Refused { refusal: Refusal::NobodyListens, rule: 0, text: "" };
        match *message {
            Message::Hello { .. } => {
                let ring_max = 1 << 28;
                let (domain_name, node) = ("domain", "node");
                let welcome =
                    Message::Welcome { features: 0, domain: cid, domain_name, node, ring_max, epoch: 1 };
                say(socket, request, &welcome, &[]);
                self.newest.insert(cid, Arc::clone(socket));
            }
            Message::Connect { .. } if self.kernel.is_some() => {
                let end = self.kernel.take().expect("one");
                say(socket, request, &brought(1, true), &[end.as_fd()]);
            }
            Message::ResumeSocket { .. } => {
                self.heard.push((cid, format!("{message:?}")));
                self.shown.extend(descriptors.iter().map(|fd| fd.try_clone().expect("a descriptor")));
                say(socket, request, &Message::Done {}, &[]);
            }
            Message::Bind { port, .. } => {
                say(socket, request, &Message::Bound { port }, &[]);
                if port == ANY_PORT {
                    self.homes.insert(cid, Arc::clone(socket));
                }
            }
            Message::Connect { to, to_port, from_port, kind, small, large, .. } => {
                let to = to.parse().unwrap_or(0);
                let Some(home) = self.homes.get(&to) else { return say(socket, request, &nobody, &[]) };
                self.connections += 1;
                let connection = self.connections;
                let (bell, other) = packet::pair().expect("a pair");
                let from_port = if from_port == 0 { 0x8000_0000 + connection as u32 } else { from_port };
                let incoming = incoming(connection, cid, from_port, to_port, kind, small, large);
                say(home, 0, &incoming, &[descriptors[0].as_fd(), other.as_fd()]);
                let pending = Pending { opener: Arc::clone(socket), request, to, bell };
                self.pending.insert(connection, pending);
            }
            Message::Accept { connection, small, large } => {
                self.heard.push((cid, format!("{message:?}")));
                let Some(Pending { opener, request, to, bell }) = self.pending.remove(&connection) else {
                    return;
                };
                let connected = Message::Connected {
                    connection,
                    secret: 5,
                    to,
                    to_name: "accepter",
                    to_port: 1,
                    from_port: 7,
                    carrier: Carrier::Switch,
                    small,
                    large,
                    why: "",
                    ticket: [0; 32],
                };
                say(&opener, request, &connected, &[descriptors[0].as_fd(), bell.as_fd()]);
            }
            Message::Refuse { connection, .. } => {
                self.heard.push((cid, format!("{message:?}")));
                if let Some(pending) = self.pending.remove(&connection) {
                    say(&pending.opener, pending.request, &nobody, &[]);
                }
            }
            _ => self.heard.push((cid, format!("{message:?}"))),
        }
    }
}

fn incoming(
    connection: u64,
    from: u32,
    from_port: u32,
    port: u32,
    kind: SocketKind,
    small: u32,
    large: u32,
) -> Message<'static> {
    Message::Incoming {
        connection,
        secret: 5,
        from,
        from_name: "opener",
        from_port,
        port,
        partner: ANYBODY,
        kind,
        carrier: Carrier::Switch,
        small,
        large,
        why: "",
        ticket: [0; 32],
    }
}

/// A kernel socket, for the opener or for whoever listens at port 60.
fn brought(connection: u64, opener: bool) -> Message<'static> {
    let (kind, why, ticket) = (SocketKind::Stream, "", [0; 32]);
    if opener {
        let (to, to_name, to_port, from_port) = (50, "accepter", 60, 7);
        return Message::ConnectedSocket { connection, to, to_name, to_port, from_port, why, ticket };
    }
    Message::IncomingSocket {
        connection,
        from: 50,
        from_name: "opener",
        from_port: 7,
        source: "",
        source_port: 0,
        port: 60,
        partner: ANYBODY,
        destination: "",
        kind,
        ahead: 0,
        why,
        ticket,
    }
}

/// A program that is no guest and has connected to one.
pub struct Container {
    pub bell: OwnedFd,
    _offer: Offer,
}

/// A switch and its broker. One at a time in a process, so that what one test makes grow is not another one's fault.
pub struct Node {
    place: PathBuf,
    shared: Arc<Shared>,
    broker: OwnedFd,
    doors: Mutex<Vec<Arc<OwnedFd>>>,
    stop: Arc<AtomicBool>,
    switch: Option<JoinHandle<()>>,
    _alone: MutexGuard<'static, ()>,
}

impl Node {
    pub fn new() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        static NODES: AtomicU32 = AtomicU32::new(0);
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let number = NODES.fetch_add(1, Ordering::Relaxed);
        let place = std::env::temp_dir().join(format!("isthmus-switch-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&place).expect("a directory");
        let path = place.join("switch");
        let listener = listen(&path, SocketType::SEQPACKET, 5);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let switch = std::thread::spawn(move || {
            let mut switch = Switch::new(listener).expect("descriptors");
            switch.run(true, |_| stopped.load(Ordering::Relaxed)).expect("to wait");
        });
        let broker = connect(&path, SocketType::SEQPACKET);
        let shared = Arc::new(Shared::default());
        let (reader, states) = (broker.try_clone().expect("a descriptor"), Arc::clone(&shared));
        std::thread::spawn(move || {
            let mut buffer = [0; MESSAGE_MAX];
            while let Ok((len @ 1.., _)) = packet::receive(reader.as_fd(), &mut buffer) {
                if let Ok((_, Message::GuestState { cid, state, text })) = control::decode(&buffer[..len]) {
                    let mut broker = states.lock();
                    let known = broker.states.entry(cid).or_insert((state, String::new()));
                    known.0 = state;
                    // What was said last, when something was.
                    if !text.is_empty() {
                        known.1 = text.to_owned();
                    }
                }
            }
        });
        let doors = Mutex::default();
        Self { place, shared, broker, doors, stop, switch: Some(switch), _alone: alone }
    }

    /// A guest whose device runs, known to the broker.
    pub fn guest(&self, cid: u32) -> Guest {
        self.guest_behind(cid, 128)
    }

    /// The same, with a door at which only so many may wait.
    pub fn guest_behind(&self, cid: u32, backlog: i32) -> Guest {
        let place = self.place.join(cid.to_string());
        std::fs::create_dir_all(&place).expect("a directory");
        let door = Arc::new(listen(&place.join("door"), SocketType::SEQPACKET, backlog));
        let device = listen(&place.join("vsock"), SocketType::STREAM, 5);
        self.doors.lock().expect("no panic").push(Arc::clone(&door));
        let shared = Arc::clone(&self.shared);
        std::thread::spawn(move || {
            loop {
                if shared.speaking().over {
                    return;
                }
                let Ok(socket) = rustix::net::accept_with(&door, SocketFlags::CLOEXEC) else { return };
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || shared.serve(cid, &Arc::new(socket)));
            }
        });
        let directory = File::open(&place).expect("the directory");
        let hello = Message::Guest { cid, name: "guest" };
        say(&self.broker, 1, &hello, &[device.as_fd(), directory.as_fd()]);
        let mut guest = Guest::new(cid, &place.join("vsock"));
        until("a guest that runs", || {
            let broker = self.shared.lock();
            let runs = broker.states.get(&cid).is_some_and(|state| state.0 == GuestState::Running);
            (runs && broker.homes.contains_key(&cid)).then_some(())
        });
        // Behind this the switch has heard the broker too.
        guest.ping();
        guest
    }

    /// A broker that takes the place of this one names guests, which nobody runs, and does not listen meanwhile.
    /// How many of them it hears of then.
    pub fn name_guests(&self, cids: std::ops::Range<u32>) -> usize {
        let broker = connect(&self.place.join("switch"), SocketType::SEQPACKET);
        let device = listen(&self.place.join("vsock"), SocketType::STREAM, 5);
        let directory = File::open(&self.place).expect("the directory");
        for cid in cids.clone() {
            let hello = Message::Guest { cid, name: "guest" };
            say(&broker, 1, &hello, &[device.as_fd(), directory.as_fd()]);
        }
        packet::allow_waiting(broker.as_fd(), SOON / 5).expect("a socket");
        let (mut states, mut buffer) = (HashMap::new(), [0; MESSAGE_MAX]);
        let mut done = 0;
        while let Ok((len @ 1.., _)) = packet::receive(broker.as_fd(), &mut buffer) {
            match control::decode(&buffer[..len]) {
                Ok((_, Message::GuestState { cid, state, .. })) => drop(states.insert(cid, state)),
                Ok((_, Message::Done {})) => done += 1,
                _ => {}
            }
            if done == cids.len() && states.len() == cids.len() {
                break;
            }
        }
        states.len().min(done)
    }

    /// The broker hears and says nothing, or goes on where it was.
    pub fn silence(&self, silent: bool) {
        self.shared.lock().silent = silent;
        self.shared.changed.notify_all();
    }

    /// The broker is gone, as far as guests' homes know.
    pub fn hang_up(&self) {
        for (_, home) in self.shared.lock().homes.drain() {
            packet::shut(home.as_fd());
        }
    }

    /// What the broker heard through a guest's door, except greetings and questions.
    pub fn heard(&self, cid: u32) -> Vec<String> {
        let broker = self.shared.lock();
        broker.heard.iter().filter(|heard| heard.0 == cid).map(|heard| heard.1.clone()).collect()
    }

    /// Connections that wait for an answer.
    pub fn pending(&self) -> usize {
        self.shared.lock().pending.len()
    }

    /// Why a guest's device has ended.
    pub fn ended(&self, cid: u32) -> String {
        until("the end of a device", || {
            let broker = self.shared.lock();
            let (state, text) = broker.states.get(&cid)?;
            (*state == GuestState::Waiting).then(|| text.clone())
        })
    }

    /// Does a guest's device run?
    pub fn runs(&self, cid: u32) -> bool {
        self.shared.lock().states.get(&cid).is_some_and(|state| state.0 == GuestState::Running)
    }

    /// Bring a kernel socket to the guest's program that greeted last. Returns the other end.
    pub fn bring(&self, cid: u32, connection: u64, opener: bool) -> OwnedFd {
        let (ours, theirs) = packet::pair().expect("a pair");
        let program = Arc::clone(&self.shared.lock().newest[&cid]);
        say(&program, 0, &brought(connection, opener), &[theirs.as_fd()]);
        ours
    }

    /// Bring the two ends of one connection to two guests' programs, the accepter's first.
    pub fn bring_pair(&self, opener: u32, accepter: u32, connection: u64) {
        let (ours, theirs) = packet::pair().expect("a pair");
        let mut broker = self.shared.lock();
        for (cid, peer, end) in [(accepter, opener, &theirs), (opener, accepter, &ours)] {
            let mut message = brought(connection, cid == opener);
            match &mut message {
                Message::IncomingSocket { from, .. } => *from = peer,
                Message::ConnectedSocket { to, .. } => *to = peer,
                _ => {}
            }
            say(&broker.newest[&cid], 0, &message, &[end.as_fd()]);
        }
        broker.pair = Some(Living::new().expect("descriptors"));
        for (token, end) in [(1, ours), (2, theirs)] {
            broker.pair.as_ref().expect("just made").add(end.as_fd(), token).expect("a socket");
        }
    }

    /// How many of those still exist, once that changes no more.
    pub fn pair_left(&self) -> usize {
        let left = || {
            let broker = self.shared.lock();
            broker.pair.as_ref().map_or(0, |pair| pair.tokens().expect("/proc").len())
        };
        let began = std::time::Instant::now();
        while left() > 0 && began.elapsed() < SOON / 2 {
            std::thread::sleep(Duration::from_millis(1));
        }
        left()
    }

    /// The same for programs of the guest that speak plain `AF_VSOCK`.
    pub fn bring_home(&self, cid: u32, connection: u64) -> OwnedFd {
        let (ours, theirs) = packet::pair().expect("a pair");
        let home = Arc::clone(&self.shared.lock().homes[&cid]);
        say(&home, 0, &brought(connection, false), &[theirs.as_fd()]);
        ours
    }

    /// Answer the next question for a connection with a kernel socket. Returns the other end.
    pub fn answer_with_socket(&self) -> OwnedFd {
        let (ours, theirs) = packet::pair().expect("a pair");
        self.shared.lock().kernel = Some(theirs);
        ours
    }

    /// The kernel sockets that the switch has shown.
    pub fn shown(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.shared.lock().shown)
    }

    /// Tell a guest's program that greeted last.
    pub fn tell_program(&self, cid: u32, message: &Message<'_>) {
        let program = Arc::clone(&self.shared.lock().newest[&cid]);
        say(&program, 0, message, &[]);
    }

    /// A container connects to a guest's program.
    pub fn container(&self, cid: u32, port: u32) -> Container {
        let (small, large) = (32 << 10, 2 << 20);
        let offer = Offer::new(Carrier::Switch, small, large).expect("memory");
        let (bell, other) = packet::pair().expect("a pair");
        let incoming = incoming(99, 50, 1, port, SocketKind::Stream, small, large);
        let home = Arc::clone(&self.shared.lock().homes[&cid]);
        say(&home, 0, &incoming, &[offer.descriptors()[0], other.as_fd()]);
        Container { bell, _offer: offer }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.shared.lock().over = true;
        self.shared.changed.notify_all();
        for door in self.doors.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            packet::shut(door.as_fd());
        }
        // The switch wakes up for this.
        packet::shut(self.broker.as_fd());
        let _ = std::fs::remove_dir_all(&self.place);
        if std::thread::panicking() {
            return;
        }
        let switch = self.switch.take().expect("once");
        until("the end of the switch", || switch.is_finished().then_some(()));
        switch.join().expect("a switch that does not panic");
    }
}

/// A connection between programs of two guests; neither has a receive buffer left.
pub fn open(a: &mut Guest, b: &mut Guest, kind: u16) -> (Link, Link) {
    a.post(1);
    b.post(2);
    let to = a.request(1000, b.cid, 50, kind);
    assert_eq!(b.wait(REQUEST).src_cid, u64::from(a.cid));
    let back = Link { port: 50, peer: a.cid, peer_port: 1000, kind };
    b.sign(&back, RESPONSE);
    assert_eq!(a.wait(RESPONSE).buf_alloc, b.buf_alloc);
    // It was granted nothing while the opener was not told.
    assert_eq!(b.wait(CREDIT_UPDATE).buf_alloc, a.buf_alloc);
    (to, back)
}

/// Keep putting bytes into a socket, until whoever is behind it has gone.
pub fn flood(socket: OwnedFd, bytes: Vec<u8>) {
    std::thread::spawn(move || while rustix::net::send(&socket, &bytes, SendFlags::NOSIGNAL).is_ok() {});
}
