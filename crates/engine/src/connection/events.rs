//! A connection in event loops: parking, readiness, and descriptors for `select`.

use std::os::fd::RawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, Weak};

use isthmus_ring::{Dest, Seen};

use super::{Connection, RxSide, SHUT_RECEIVE};
use crate::datagram::Datagram;
use crate::error::{Error, Result};
use crate::lock;
use crate::readiness::Readiness;
use crate::wait::{Place, spin};

/// A message that is looked at before it is received, or stays.
pub struct Front<'a> {
    connection: &'a Connection,
    side: MutexGuard<'a, RxSide>,
    len: usize,
}

impl Front<'_> {
    /// Bytes of the message.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copy its beginning. The sender may write other bytes meanwhile: believe what was copied.
    pub fn peek(&mut self, beginning: &mut [u8]) -> usize {
        crate::lane::with_dest(beginning, |dest| self.side.rx.peek(dest).0)
    }

    /// Receive it: what does not fit is lost. Returns the bytes stored.
    ///
    /// # Errors
    /// As [`Connection::receive`].
    pub fn take(mut self, dest: &mut Dest<'_>) -> Result<usize> {
        let (got, _, ring) = self.side.rx.read(dest)?;
        self.connection.ring(ring);
        Ok(got)
    }
}

impl Connection {
    /// Before parking in an event loop: arm for data, and for space if `space`.
    ///
    /// `true`: do not park, there is something already.
    ///
    /// # Errors
    /// The lane's memory failed.
    pub fn park(&self, data: bool, space: bool) -> Result<bool> {
        self.check()?;
        let mut ready = self.bell.gone();
        if data {
            let mut side = lock(&self.rx);
            let (quiet, ring) = side.rx.prepare_to_sleep().map_err(|e| self.memory(e))?;
            self.ring(ring);
            ready |= !quiet;
        }
        if space {
            let mut side = lock(&self.tx);
            side.tx.arm().map_err(|e| self.memory(e))?;
            ready |= side.tx.has_space() || !side.tx.open();
        }
        Ok(ready)
    }

    /// Before parking for data in an event loop: spin a little, as the budget allows, then arm.
    ///
    /// `true`: do not park, there is something.
    ///
    /// # Errors
    /// As [`Connection::park`].
    pub fn spin_then_park(&self) -> Result<bool> {
        self.check()?;
        {
            let mut side = lock(&self.rx);
            let ring = side.rx.settle();
            self.ring(ring);
            let RxSide { rx, spin: budget, .. } = &mut *side;
            let peer_cpu = rx.peer_cpu();
            // A record that has begun may be long in coming: only a whole one is something.
            let mut something = |_| !rx.quiet() && !matches!(rx.look(), Ok(Seen::Nothing));
            // In a guest what pays is longer than an event loop's other work may wait.
            let found = if self.in_guest {
                something(true)
            } else {
                spin(crate::Wait::Adaptive, budget, Place::Local, peer_cpu, 0, something)
            };
            if found {
                return Ok(true);
            }
        }
        self.park(true, false)
    }

    /// The message at the front, if there is one; nobody else receives meanwhile. Makes no system call, and so hears of
    /// a peer's death only what somebody else has heard.
    ///
    /// # Errors
    /// [`Error::Closed`]: there will be none any more. Others as [`Connection::receive`].
    #[inline]
    pub fn front_message(&self) -> Result<Option<Front<'_>>> {
        self.check()?;
        let mut side = lock(&self.rx);
        if side.rx.quiet() && !self.bell.gone() {
            return Ok(None);
        }
        match side.rx.look()? {
            Seen::Data(len) => Ok(Some(Front { connection: self, side, len })),
            Seen::End => Err(Error::Closed),
            Seen::Nothing if self.bell.gone() => Err(Error::Closed),
            Seen::Nothing => Ok(None),
        }
    }

    /// Would [`Connection::receive`] return at once? Makes no system call.
    #[inline]
    #[must_use]
    pub fn poll_receive(&self) -> bool {
        let mut side = lock(&self.rx);
        !side.rx.quiet() && matches!(side.rx.look(), Ok(Seen::Data(_)))
    }

    /// Would sending `len` bytes return at once? Makes no system call.
    #[inline]
    #[must_use]
    pub fn poll_send(&self, len: usize) -> bool {
        lock(&self.tx).tx.fits(len)
    }

    /// Is there something to receive (or the end, or an error)? Could something be sent?
    #[must_use]
    pub fn poll(&self) -> (bool, bool) {
        if self.closed() || self.cut.get().is_some() || self.bell.gone() {
            return (true, true);
        }
        let readable = {
            let mut side = lock(&self.rx);
            self.state.load(Ordering::Acquire) & SHUT_RECEIVE != 0
                || !matches!(side.rx.look(), Ok(Seen::Nothing))
        };
        let mut side = lock(&self.tx);
        let writable = side.tx.finished() || !side.tx.open() || side.tx.has_space();
        (readable, writable)
    }

    /// A descriptor for `select` that stays true to the lane from now on.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn readiness(self: &Arc<Self>) -> Result<RawFd> {
        if let Some(readiness) = self.readiness.get() {
            return Ok(readiness.fd());
        }
        self.attach_readiness(Arc::new(Readiness::new()?));
        self.readiness()
    }

    /// As [`Connection::readiness`], with a descriptor that was polled before there was a lane.
    pub fn attach_readiness(self: &Arc<Self>, readiness: Arc<Readiness>) {
        let _ = self.readiness.set(readiness);
        self.bell.watch();
        if let Some(node) = self.node.upgrade() {
            node.watch(self);
        }
        self.refresh();
    }

    pub(crate) fn own(&self, owner: Weak<Datagram>) {
        let _ = self.owner.set(owner);
    }

    /// The bell rang and the engine's thread is its leader.
    pub(crate) fn heard(&self) {
        self.bell.empty();
        self.bell.wake_followers();
        self.refresh();
        if let Some(owner) = self.owner.get().and_then(Weak::upgrade) {
            owner.refresh();
        }
    }

    /// Will nothing more be received?
    #[must_use]
    pub fn at_end(&self) -> bool {
        let gone = self.bell.gone();
        match lock(&self.rx).rx.look() {
            Ok(Seen::Data(_)) => false,
            Ok(Seen::Nothing) => gone,
            Ok(Seen::End) | Err(_) => true,
        }
    }

    /// Bring the kernel descriptor in line with the lane, arming for whatever it is not ready for.
    #[inline]
    pub(crate) fn refresh(&self) {
        if let Some(readiness) = self.readiness.get() {
            self.bring_in_line(readiness);
        }
    }

    #[cold]
    fn bring_in_line(&self, readiness: &Readiness) {
        readiness.update(|| {
            let (readable, writable) = self.poll();
            if readable && writable {
                return (true, true);
            }
            // Arm for what is missing and look again: whatever comes later rings the bell.
            let _ = self.park(!readable, !writable);
            self.poll()
        });
        if self.at_end() {
            let finished = lock(&self.tx).tx.finished();
            readiness.hang_up(finished || self.bell.gone());
        }
    }
}
