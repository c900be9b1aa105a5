//! A datagram socket: one receiver, a lane for each sender.
//!
//! A lane is made when the first message goes to an address and stays until either side closes.
//! Messages of one sender arrive in order; senders are served in turn, and a sender whose lane is
//! full waits alone.

use std::collections::HashMap;
use std::os::fd::{AsFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use isthmus_ring::{Dest, Source};
use isthmus_sys::cpu;
use isthmus_sys::poll::{Flag, Set};
use isthmus_wire::control::{Refusal, SocketKind};

use crate::connection::Connection;
use crate::error::{Error, Result};
use crate::listener::{Acceptor, Terms};
use crate::lock;
use crate::node::{Attachment, ConnectRequest, Node};
use crate::readiness::Readiness;
use crate::wait::How;

/// No sleep is longer; see the bell's limit.
const SLEEP_LIMIT: Duration = Duration::from_secs(1);
/// In the set: a lane was added.
const TOKEN_NEWS: u64 = 0;

pub struct Datagram {
    terms: Terms,
    bound: bool,
    lanes: Mutex<Vec<Arc<Connection>>>,
    by_address: Mutex<HashMap<(String, u32), Arc<Connection>>>,
    /// Where the next look begins.
    turn: AtomicUsize,
    set: Set,
    news: Flag,
    one_sleeper: Mutex<()>,
    readiness: OnceLock<Arc<Readiness>>,
    /// Where `send` goes without an address; decides whether the socket is writable.
    target: Mutex<Option<Arc<Connection>>>,
    closed: AtomicBool,
    node: Weak<Node>,
    _attachment: Option<Arc<Attachment>>,
    me: Weak<Self>,
    generation: u32,
}

/// One received datagram.
#[derive(Clone, Debug)]
pub struct From {
    /// Bytes stored.
    pub stored: usize,
    /// Bytes of the message.
    pub len: usize,
    pub name: String,
    pub domain: u32,
    pub port: u32,
}

impl Datagram {
    pub(crate) fn new(terms: Terms, bound: bool, node: &Arc<Node>) -> Result<Arc<Self>> {
        let set = Set::new().map_err(Error::os("making a datagram socket"))?;
        let news = Flag::new().map_err(Error::os("making a datagram socket"))?;
        set.add(news.as_fd(), TOKEN_NEWS).map_err(Error::os("making a datagram socket"))?;
        Ok(Arc::new_cyclic(|me| Self {
            terms,
            bound,
            lanes: Mutex::default(),
            by_address: Mutex::default(),
            turn: AtomicUsize::new(0),
            set,
            news,
            one_sleeper: Mutex::new(()),
            readiness: OnceLock::new(),
            target: Mutex::new(None),
            closed: AtomicBool::new(false),
            node: Arc::downgrade(node),
            _attachment: node.keep(),
            me: me.clone(),
            generation: cpu::generation(),
        }))
    }

    /// The leased port, 0 if none.
    #[must_use]
    pub fn port(&self) -> u32 {
        if self.bound { self.terms.port } else { 0 }
    }

    /// Lanes open now.
    #[must_use]
    pub fn lanes(&self) -> usize {
        lock(&self.lanes).len()
    }

    /// The connection that carries messages to an address, if there is one.
    #[must_use]
    pub fn lane(&self, to: &str, port: u32) -> Option<Arc<Connection>> {
        lock(&self.by_address).get(&(to.to_owned(), port)).cloned()
    }

    /// Send one message.
    ///
    /// # Errors
    /// Nothing was sent: nobody listens, a rule refuses, the message is too large, the lane is
    /// full and may not be waited for.
    pub fn send_to(&self, source: &mut Source<'_>, to: &str, port: u32, how: &How<'_>) -> Result<()> {
        for attempt in 0..2 {
            let connection = self.open_lane(to, port, how)?;
            let sent = connection.send_message(source, how);
            if self.readiness.get().is_some() && self.is_target(&connection) {
                self.refresh();
            }
            match sent {
                // The peer closed since: ask the broker whether somebody listens there now.
                Err(Error::Pipe { .. } | Error::Reset { .. } | Error::Closed) if attempt == 0 => {
                    self.forget(&connection);
                }
                other => return other,
            }
        }
        Err(Error::Pipe { done: 0 })
    }

    /// Have a lane to this address.
    ///
    /// # Errors
    /// The broker refuses.
    pub fn open_lane(&self, to: &str, port: u32, how: &How<'_>) -> Result<Arc<Connection>> {
        if self.generation != cpu::generation() {
            return Err(Error::Forked);
        }
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::Closed);
        }
        if let Some(connection) = self.lane(to, port) {
            return Ok(connection);
        }
        let node = self.node.upgrade().ok_or(Error::Closed)?;
        let Terms { small, large, .. } = self.terms;
        let request = ConnectRequest {
            to: to.to_owned(),
            port,
            from_port: self.port(),
            kind: SocketKind::Datagram,
            require: None,
            small,
            large,
        };
        let connection = node.connect(&request, how)?;
        self.adopt(Arc::clone(&connection), Some((to.to_owned(), port)));
        Ok(connection)
    }

    fn adopt(&self, connection: Arc<Connection>, asked: Option<(String, u32)>) {
        let address = (connection.info.peer_name.clone(), connection.info.peer_port);
        {
            let mut table = lock(&self.by_address);
            table.entry(address).or_insert_with(|| Arc::clone(&connection));
            if let Some(asked) = asked {
                table.insert(asked, Arc::clone(&connection));
            }
        }
        if self.readiness.get().is_some() {
            self.relay(&connection);
        } else {
            connection.bell().watch();
            let _ = self.set.add(connection.bell().as_fd(), connection.info.key());
        }
        lock(&self.lanes).push(connection);
        self.news.raise();
        self.refresh();
    }

    fn forget(&self, gone: &Arc<Connection>) {
        if self.readiness.get().is_none() {
            let _ = self.set.remove(gone.bell().as_fd());
        }
        lock(&self.by_address).retain(|_, lane| !Arc::ptr_eq(lane, gone));
        lock(&self.lanes).retain(|lane| !Arc::ptr_eq(lane, gone));
        gone.close();
    }

    /// Receive one message from whoever's turn it is.
    ///
    /// # Errors
    /// Nothing was received.
    pub fn receive(&self, dest: &mut Dest<'_>, peek: bool, how: &How<'_>) -> Result<From> {
        loop {
            if self.generation != cpu::generation() {
                return Err(Error::Forked);
            }
            if self.closed.load(Ordering::Acquire) {
                return Err(Error::Closed);
            }
            if let Some(from) = self.try_receive(dest, peek) {
                self.refresh();
                return Ok(from);
            }
            if how.now {
                self.refresh();
                return Err(Error::WouldBlock { done: 0 });
            }
            if how.expired() {
                return Err(Error::TimedOut { done: 0 });
            }
            self.sleep(how)?;
        }
    }

    fn try_receive(&self, dest: &mut Dest<'_>, peek: bool) -> Option<From> {
        let lanes: Vec<_> = lock(&self.lanes).clone();
        let start =
            if peek { self.turn.load(Ordering::Relaxed) } else { self.turn.fetch_add(1, Ordering::Relaxed) };
        for i in 0..lanes.len() {
            let lane = &lanes[start.wrapping_add(i) % lanes.len()];
            let got =
                if peek { lane.peek(dest, &How::at_once()) } else { lane.receive(dest, &How::at_once()) };
            match got {
                Ok((stored, len)) if len > 0 || !lane.at_end() => {
                    let info = &lane.info;
                    let (name, domain, port) = (info.peer_name.clone(), info.peer, info.peer_port);
                    return Some(From { stored, len, name, domain, port });
                }
                Err(Error::WouldBlock { .. }) => {}
                // The sender finished, died or broke its lane: that lane ends, nothing else does.
                Ok(_) | Err(_) => self.forget(lane),
            }
        }
        None
    }

    fn sleep(&self, how: &How<'_>) -> Result<()> {
        let _one = lock(&self.one_sleeper);
        let limit = how.left(SLEEP_LIMIT);
        if let Some(readiness) = self.readiness.get() {
            if readiness.wait_readable(limit).is_err() && how.wants_to_stop() {
                return Err(Error::Interrupted { done: 0 });
            }
            return Ok(());
        }
        let lanes: Vec<_> = lock(&self.lanes).clone();
        for lane in &lanes {
            // Also true of a lane that ended: look at it again.
            if lane.park(true, false).unwrap_or(true) {
                return Ok(());
            }
        }
        let mut events = Vec::new();
        if self.set.wait(Some(limit), &mut events).is_err() {
            return if how.wants_to_stop() { Err(Error::Interrupted { done: 0 }) } else { Ok(()) };
        }
        for (token, _) in events {
            if token == TOKEN_NEWS {
                self.news.lower();
            } else if let Some(lane) = lanes.iter().find(|lane| lane.info.key() == token) {
                lane.bell().empty();
                lane.bell().wake_followers();
                if lane.bell().gone() {
                    let _ = self.set.remove(lane.bell().as_fd());
                }
            }
        }
        Ok(())
    }

    /// A descriptor for `select`: readable while a message waits, writable while `to` (the default
    /// destination) has space.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn readiness(&self) -> Result<RawFd> {
        if let Some(readiness) = self.readiness.get() {
            return Ok(readiness.fd());
        }
        let readiness = Arc::new(Readiness::new()?);
        let fd = readiness.fd();
        let _ = self.readiness.set(readiness);
        for lane in lock(&self.lanes).clone() {
            let _ = self.set.remove(lane.bell().as_fd());
            self.relay(&lane);
        }
        self.refresh();
        Ok(fd)
    }

    fn relay(&self, lane: &Arc<Connection>) {
        lane.own(self.me.clone());
        lane.bell().watch();
        if let Some(node) = self.node.upgrade() {
            node.watch(lane);
        }
    }

    pub(crate) fn refresh(&self) {
        let Some(readiness) = self.readiness.get() else { return };
        readiness.update(|| {
            if self.closed.load(Ordering::Acquire) {
                return (true, true);
            }
            let lanes: Vec<_> = lock(&self.lanes).clone();
            let mut readable = false;
            for lane in &lanes {
                if lane.poll().0 || lane.park(true, false).unwrap_or(true) {
                    readable = true;
                    break;
                }
            }
            let target = lock(&self.target).clone();
            let writable = target.is_none_or(|lane| lane.poll().1 || lane.park(false, true).unwrap_or(true));
            (readable, writable)
        });
    }

    fn is_target(&self, lane: &Arc<Connection>) -> bool {
        lock(&self.target).as_ref().is_some_and(|target| Arc::ptr_eq(target, lane))
    }

    /// Let `lane` decide whether the socket is writable.
    pub fn set_target(&self, lane: Option<Arc<Connection>>) {
        *lock(&self.target) = lane;
        self.refresh();
    }

    /// Give the port back and close every lane. Harmless when repeated.
    pub fn close(&self) {
        // A fork's copy shares the kernel's objects with its parent: touch none of them.
        if self.closed.swap(true, Ordering::AcqRel) || self.generation != cpu::generation() {
            return;
        }
        self.news.raise();
        lock(&self.by_address).clear();
        let lanes: Vec<_> = lock(&self.lanes).drain(..).collect();
        for lane in lanes {
            lane.close();
        }
        if let (true, Some(node)) = (self.bound, self.node.upgrade()) {
            node.unbind(self.terms.port, self.terms.partner);
        }
        self.refresh();
    }
}

impl Acceptor for Datagram {
    fn terms(&self) -> Terms {
        self.terms
    }

    fn room(&self) -> std::result::Result<(), Refusal> {
        if self.closed.load(Ordering::Acquire) { Err(Refusal::NobodyListens) } else { Ok(()) }
    }

    fn incoming(&self, connection: Arc<Connection>) {
        self.adopt(connection, None);
    }
}

impl Drop for Datagram {
    fn drop(&mut self) {
        self.close();
    }
}
