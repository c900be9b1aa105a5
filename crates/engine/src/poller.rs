//! Many connections in one event loop: one descriptor to watch, a list of those to look at.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use isthmus_sys::cpu;
use isthmus_sys::poll::{Ready, Set};

use crate::connection::Connection;
use crate::error::{Error, Result};
use crate::lock;

pub struct Poller {
    set: Set,
    members: Mutex<HashMap<u64, Weak<Connection>>>,
    next: std::sync::atomic::AtomicU64,
    generation: u32,
}

impl Poller {
    /// # Errors
    /// No descriptors are left.
    pub fn new() -> Result<Self> {
        let set = Set::new().map_err(Error::os("making an event loop"))?;
        Ok(Self {
            set,
            members: Mutex::default(),
            next: std::sync::atomic::AtomicU64::new(1),
            generation: cpu::generation(),
        })
    }

    /// Readable while [`Poller::ready`] has something to say.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.set.as_fd().as_raw_fd()
    }

    /// Watch a connection; returns the token that [`Poller::ready`] will report. From now on it
    /// wakes only through this poller.
    ///
    /// # Errors
    /// The kernel cannot watch it.
    pub fn add(&self, connection: &Arc<Connection>) -> Result<u64> {
        let token = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        lock(&self.members).insert(token, Arc::downgrade(connection));
        connection.bell().watch();
        self.set.add(connection.bell().as_fd(), token).map_err(Error::os("watching a connection"))?;
        Ok(token)
    }

    pub fn remove(&self, token: u64) {
        // A fork's copy shares the kernel's set with its parent.
        if self.generation != cpu::generation() {
            return;
        }
        let member = lock(&self.members).remove(&token);
        if let Some(connection) = member.and_then(|member| member.upgrade()) {
            let _ = self.set.remove(connection.bell().as_fd());
        }
    }

    /// The tokens of connections whose owners should look again. Does not wait.
    ///
    /// # Errors
    /// The kernel refused, which it does not.
    pub fn ready(&self, tokens: &mut Vec<u64>) -> Result<()> {
        let mut events: Vec<(u64, Ready)> = Vec::new();
        self.set.wait(Some(Duration::ZERO), &mut events).map_err(Error::os("asking the event loop"))?;
        for (token, _) in events {
            let member = lock(&self.members).get(&token).and_then(Weak::upgrade);
            let Some(connection) = member else { continue };
            let bell = connection.bell();
            bell.empty();
            bell.wake_followers();
            if bell.gone() {
                // It would be ready for ever.
                let _ = self.set.remove(bell.as_fd());
            }
            tokens.push(token);
        }
        Ok(())
    }
}
