//! A connection's bell: how a sleeper is woken and how a death is heard.
//!
//! The broker makes a pair of Unix stream sockets for each connection and gives each side one end.
//! A byte means "look again"; the end of the stream means that the peer's process is gone, however
//! it died, because the kernel closes what it held. Each direction has one writer and one reader,
//! and neither can reach the other's queue.
//!
//! Several threads of one process may wait at once, and a byte wakes only one reader. So one
//! waiter leads: it polls the socket, empties it and wakes the others, who look for themselves.
//! A connection that is watched by an event loop has that loop as its permanent leader.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, TryLockError};
use std::time::Duration;

use isthmus_sys::mapping::Mapping;
use isthmus_sys::{packet, poll};

use crate::lock;

/// No sleep is longer, so that even a peer whose kernel swallowed a word cannot hold us for ever.
const SLEEP_LIMIT: Duration = Duration::from_secs(1);
/// A follower looks up this often, because a condition variable cannot be interrupted by a signal.
const FOLLOWER_LIMIT: Duration = Duration::from_millis(100);

/// So many reads empty the bell of any honest peer. One that rings without end must not keep us
/// reading: what is left makes the socket readable again, in its turn.
const EMPTYING_READS: usize = 8;
/// After so many wake-ups a sleeper is told to ask for signals, because a peer that rings without
/// end sees to it that no sleep is ever interrupted.
const WAKES_PER_SIGNAL: u64 = 64;

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// Look again.
    Look,
    /// A signal arrived, or may have.
    Signal,
}

pub struct Bell {
    socket: OwnedFd,
    leader: Mutex<()>,
    /// Somebody else polls and empties the socket: see [`Bell::watched`].
    watched: AtomicBool,
    followers: AtomicU32,
    /// Counts wake-ups; under `turn` it is changed and waited for.
    wakes: AtomicU64,
    turn: Mutex<()>,
    turned: Condvar,
    gone: AtomicBool,
    /// In a guest, where it may be used.
    doorbell: OnceLock<Arc<Doorbell>>,
    /// In a guest, the socket was written: a thread of the kernel has to run before anybody hears it.
    queued: AtomicBool,
}

/// The two ends of a new bell.
///
/// # Errors
/// No descriptors are left.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (one, other) = packet::pair()?;
    // A bell is rung with bytes.
    packet::refuse_descriptors(one.as_fd());
    packet::refuse_descriptors(other.as_fd());
    Ok((one, other))
}

/// A register of a guest's socket device: a store there reaches the switch without a system call.
pub struct Doorbell {
    page: Mapping,
    at: usize,
    value: u16,
}

impl Doorbell {
    /// `registers`: the file of the device's registers; `value` goes to `offset` of it.
    ///
    /// # Errors
    /// The kernel lets nobody map the registers of a device in use (without `iomem=relaxed`).
    pub fn new(registers: BorrowedFd<'_>, offset: u32, value: u16) -> io::Result<Self> {
        let (page, at) = (u64::from(offset) & !0xFFF, (offset & 0xFFF) as usize);
        if at % 2 != 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(Self { page: Mapping::registers(registers, page)?, at, value })
    }

    fn ring(&self) {
        // What was published is seen by whoever this wakes.
        std::sync::atomic::fence(Ordering::SeqCst);
        // SAFETY: within the page that was mapped, and aligned; a register has no other meaning than this.
        unsafe { self.page.base().add(self.at).cast::<u16>().write_volatile(self.value) };
    }
}

impl Bell {
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        // If the kernel refused, long waits would end at once and be repeated.
        let _ = packet::allow_waiting(socket.as_fd(), SLEEP_LIMIT);
        Self {
            socket,
            leader: Mutex::new(()),
            watched: AtomicBool::new(false),
            followers: AtomicU32::new(0),
            wakes: AtomicU64::new(0),
            turn: Mutex::new(()),
            turned: Condvar::new(),
            gone: AtomicBool::new(false),
            doorbell: OnceLock::new(),
            queued: AtomicBool::new(false),
        }
    }

    /// Ring by a store instead, from now on. The socket still tells the peer's end.
    pub fn hang_doorbell(&self, doorbell: Arc<Doorbell>) {
        let _ = self.doorbell.set(doorbell);
    }

    /// Wake the peer. A full queue means that it has bells to hear already.
    pub fn ring(&self) {
        if let Some(doorbell) = self.doorbell.get() {
            return doorbell.ring();
        }
        let _ = packet::push(self.socket.as_fd(), &[1]);
        self.queued.store(true, Ordering::Relaxed);
    }

    /// Before spinning in a guest: what was rung leaves it first. The kernel sends what a virtio socket is given from a
    /// thread on the same processor, which a spinning program keeps from running.
    pub fn let_out(&self) {
        if self.queued.swap(false, Ordering::Relaxed) {
            std::thread::yield_now();
        }
    }

    /// Has the peer's process closed its end?
    #[must_use]
    pub fn gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// End both directions: wakes every waiter here and tells the peer.
    pub fn shut(&self) {
        packet::shut(self.socket.as_fd());
        self.gone.store(true, Ordering::Release);
        self.wake_followers();
    }

    /// Take this before arming; a wake-up after it is never missed.
    #[must_use]
    pub fn ticket(&self) -> u64 {
        self.wakes.load(Ordering::Acquire)
    }

    /// Sleep until the bell rings after `ticket`, at most `limit`.
    pub fn wait(&self, ticket: u64, limit: Duration) -> Woken {
        if self.gone() || self.wakes.load(Ordering::Acquire) != ticket {
            return Woken::Look;
        }
        let limit = limit.min(SLEEP_LIMIT);
        if !self.watched.load(Ordering::Acquire) {
            match self.leader.try_lock() {
                Ok(_leading) => {
                    let woken = self.lead(limit);
                    drop(_leading);
                    // Whoever followed must look for itself, and one of them may have to lead.
                    if self.followers.load(Ordering::SeqCst) > 0 {
                        self.wake_followers();
                    }
                    return woken;
                }
                Err(TryLockError::Poisoned(_) | TryLockError::WouldBlock) => {}
            }
        }
        self.follow(ticket, limit)
    }

    /// Sleep on the socket itself.
    fn lead(&self, limit: Duration) -> Woken {
        // One call that waits and takes the bytes is 1 µs cheaper than asking and then taking.
        if limit < SLEEP_LIMIT {
            return match poll::wait_readable(self.socket.as_fd(), Some(limit)) {
                Ok(ready) => {
                    if ready.readable || ready.hung_up {
                        self.empty();
                    }
                    self.woken()
                }
                Err(_) => Woken::Signal,
            };
        }
        match packet::pull_waiting(self.socket.as_fd(), &mut [0; 64]) {
            Ok(0) => self.gone.store(true, Ordering::Release),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Woken::Signal,
            Err(_) => self.gone.store(true, Ordering::Release),
        }
        self.wakes.fetch_add(1, Ordering::AcqRel);
        self.woken()
    }

    fn woken(&self) -> Woken {
        if self.wakes.load(Ordering::Relaxed) % WAKES_PER_SIGNAL == 0 { Woken::Signal } else { Woken::Look }
    }

    fn follow(&self, ticket: u64, limit: Duration) -> Woken {
        self.followers.fetch_add(1, Ordering::SeqCst);
        let guard = lock(&self.turn);
        // The leader may have left between our try and now: then we must not sleep long.
        let led = self.watched.load(Ordering::Acquire) || self.leader.try_lock().is_err();
        let woken = if led && self.wakes.load(Ordering::Acquire) == ticket {
            let waited = self.turned.wait_timeout(guard, limit.min(FOLLOWER_LIMIT));
            let timed_out = waited.map(|(_guard, result)| result.timed_out()).unwrap_or(true);
            if timed_out { Woken::Signal } else { Woken::Look }
        } else {
            Woken::Look
        };
        self.followers.fetch_sub(1, Ordering::SeqCst);
        woken
    }

    /// Let everybody in this process who waits look again.
    pub fn wake_followers(&self) {
        let _turn = lock(&self.turn);
        self.wakes.fetch_add(1, Ordering::AcqRel);
        self.turned.notify_all();
    }

    /// Take all bytes out of the socket and note its end.
    pub fn empty(&self) {
        let mut bytes = [0; 64];
        for _ in 0..EMPTYING_READS {
            match packet::pull(self.socket.as_fd(), &mut bytes) {
                Ok(0) => self.gone.store(true, Ordering::Release),
                Ok(n) if n == bytes.len() => continue,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => self.gone.store(true, Ordering::Release),
            }
            break;
        }
        self.wakes.fetch_add(1, Ordering::AcqRel);
    }

    /// From now on an event loop polls this bell; it calls [`Bell::empty`] and
    /// [`Bell::wake_followers`].
    pub fn watch(&self) {
        self.watched.store(true, Ordering::Release);
        self.wake_followers();
    }

    #[must_use]
    pub fn watched(&self) -> bool {
        self.watched.load(Ordering::Acquire)
    }

    /// Empty the bell without waiting, unless another thread is its leader: is the peer gone?
    pub fn glance(&self) -> bool {
        if self.gone() {
            return true;
        }
        if !self.watched() {
            if let Ok(_leading) = self.leader.try_lock() {
                self.empty();
            }
            if self.followers.load(Ordering::SeqCst) > 0 {
                self.wake_followers();
            }
        }
        self.gone()
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
