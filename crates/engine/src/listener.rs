//! A leased port on which connections arrive.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use isthmus_sys::cpu;
use isthmus_sys::poll::{self, Flag};
use isthmus_wire::control::{Refusal, SocketKind};

use crate::connection::Connection;
use crate::error::{Error, Result};
use crate::lock;
use crate::node::{Attachment, Node};
use crate::wait::How;

/// Where the engine delivers connections that come in on a port.
pub trait Acceptor: Send + Sync {
    /// Kind of socket and ring sizes for this side of a new connection.
    fn terms(&self) -> Terms;
    /// `Err`: not taken, and why.
    ///
    /// # Errors
    /// The backlog is full, or the port was given back.
    fn room(&self) -> std::result::Result<(), Refusal>;
    fn incoming(&self, connection: Arc<Connection>);
}

#[derive(Clone, Copy, Debug)]
pub struct Terms {
    pub port: u32,
    pub partner: u32,
    pub kind: SocketKind,
    /// Connections that may wait; 0 leases the port and refuses them until [`Listener::open`].
    pub backlog: u32,
    pub small: u32,
    pub large: u32,
}

/// A listening socket: connections are complete when they are in its queue.
pub struct Listener {
    terms: Terms,
    backlog: AtomicU32,
    queue: Mutex<VecDeque<Arc<Connection>>>,
    /// Raised while the queue is not empty, or for good when closed.
    waiting: Flag,
    closed: AtomicBool,
    node: Weak<Node>,
    _attachment: Option<Arc<Attachment>>,
    generation: u32,
}

impl Listener {
    pub(crate) fn new(terms: Terms, node: &Arc<Node>) -> Result<Self> {
        let waiting = Flag::new().map_err(Error::os("making a descriptor to poll"))?;
        Ok(Self {
            terms,
            backlog: AtomicU32::new(terms.backlog),
            queue: Mutex::default(),
            waiting,
            closed: AtomicBool::new(false),
            node: Arc::downgrade(node),
            _attachment: node.keep(),
            generation: cpu::generation(),
        })
    }

    /// Take connections from now on, and let so many wait.
    pub fn open(&self, backlog: u32) {
        self.backlog.store(backlog.max(1), Ordering::Release);
    }

    #[must_use]
    pub fn port(&self) -> u32 {
        self.terms.port
    }

    /// Readable while a connection waits.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.waiting().as_raw_fd()
    }

    /// As [`Listener::fd`].
    #[must_use]
    pub fn waiting(&self) -> BorrowedFd<'_> {
        self.waiting.as_fd()
    }

    /// The next connection.
    ///
    /// # Errors
    /// None came in time, or the listener was closed.
    pub fn accept(&self, how: &How<'_>) -> Result<Arc<Connection>> {
        loop {
            if self.generation != cpu::generation() {
                return Err(Error::Forked);
            }
            if self.closed.load(Ordering::Acquire) {
                return Err(Error::Closed);
            }
            {
                let mut queue = lock(&self.queue);
                if let Some(connection) = queue.pop_front() {
                    if queue.is_empty() {
                        self.waiting.lower();
                    }
                    return Ok(connection);
                }
            }
            if how.now {
                return Err(Error::WouldBlock { done: 0 });
            }
            if how.expired() {
                return Err(Error::TimedOut { done: 0 });
            }
            let limit = how.left(Duration::from_secs(3600));
            if poll::wait_readable(self.waiting.as_fd(), Some(limit)).is_err() && how.wants_to_stop() {
                return Err(Error::Interrupted { done: 0 });
            }
        }
    }

    /// Give the port back; connections not yet accepted are closed. Harmless when repeated.
    pub fn close(&self) {
        // A fork's copy shares the kernel's objects with its parent: touch none of them.
        if self.closed.swap(true, Ordering::AcqRel) || self.generation != cpu::generation() {
            return;
        }
        self.waiting.raise();
        let queued: Vec<_> = lock(&self.queue).drain(..).collect();
        drop(queued);
        if let Some(node) = self.node.upgrade() {
            node.unbind(self.terms.port, self.terms.partner);
        }
    }
}

impl Acceptor for Listener {
    fn terms(&self) -> Terms {
        Terms { backlog: self.backlog.load(Ordering::Acquire), ..self.terms }
    }

    fn room(&self) -> std::result::Result<(), Refusal> {
        let backlog = self.backlog.load(Ordering::Acquire);
        if backlog == 0 || self.closed.load(Ordering::Acquire) {
            return Err(Refusal::NobodyListens);
        }
        if lock(&self.queue).len() >= backlog as usize {
            return Err(Refusal::BacklogFull);
        }
        Ok(())
    }

    fn incoming(&self, connection: Arc<Connection>) {
        let mut queue = lock(&self.queue);
        if self.closed.load(Ordering::Acquire) {
            return;
        }
        queue.push_back(connection);
        self.waiting.raise();
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
    }
}
