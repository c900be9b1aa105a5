//! A kernel descriptor that is readable and writable exactly when its owner says so.
//!
//! Programs that sit in `select`, `poll` or `epoll` need a descriptor. Ours is one end of a socket
//! pair that lives in this process alone: a byte from the other end makes it readable, a full
//! queue towards the other end makes it not writable. The engine's thread and every call on the
//! connection keep it in line with the lane.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use isthmus_sys::packet;

use crate::error::{Error, Result};
use crate::lock;

/// More than the smallest send buffer the kernel gives: one push fills it.
const STUFFING: usize = 4096;

pub struct Readiness {
    /// What the program polls.
    shown: OwnedFd,
    /// Our end.
    hidden: OwnedFd,
    state: Mutex<State>,
}

#[derive(Clone, Copy)]
struct State {
    readable: bool,
    writable: bool,
    half_ended: bool,
    ended: bool,
}

impl Readiness {
    /// Neither readable nor writable yet.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new() -> Result<Self> {
        let (shown, hidden) = packet::pair().map_err(Error::os("making a descriptor to poll"))?;
        packet::smallest_send_buffer(shown.as_fd()).map_err(Error::os("making a descriptor to poll"))?;
        let fresh = State { readable: false, writable: true, half_ended: false, ended: false };
        let readiness = Self { shown, hidden, state: Mutex::new(fresh) };
        readiness.set(false, false);
        Ok(readiness)
    }

    /// The descriptor to poll. It carries no data.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.shown.as_raw_fd()
    }

    /// Wait until it is readable.
    pub(crate) fn wait_readable(&self, limit: std::time::Duration) -> io::Result<()> {
        isthmus_sys::poll::wait_readable(self.shown.as_fd(), Some(limit)).map(drop)
    }

    /// Say what the descriptor is ready for.
    pub fn set(&self, readable: bool, writable: bool) {
        self.update(|| (readable, writable));
    }

    /// Nothing more will be received (`EPOLLRDHUP`), or be sent either (`EPOLLHUP`).
    pub(crate) fn hang_up(&self, both: bool) {
        let mut state = lock(&self.state);
        if both && !state.ended {
            state.ended = true;
            packet::shut(self.hidden.as_fd());
        } else if !state.half_ended {
            state.half_ended = true;
            packet::shut_send(self.hidden.as_fd());
        }
    }

    /// Ask `now` what the descriptor is ready for; one asker at a time, so that the last answer
    /// is the newest.
    pub(crate) fn update(&self, now: impl FnOnce() -> (bool, bool)) {
        let mut state = lock(&self.state);
        let (readable, writable) = now();
        if readable != state.readable {
            if readable {
                let _ = packet::push(self.hidden.as_fd(), &[1]);
            } else {
                drain(&self.shown);
            }
        }
        if writable != state.writable {
            if writable {
                drain(&self.hidden);
            } else {
                while packet::push(self.shown.as_fd(), &[0; STUFFING]).is_ok() {}
            }
        }
        (state.readable, state.writable) = (readable, writable);
    }
}

fn drain(end: &OwnedFd) {
    let mut bytes = [0; STUFFING];
    loop {
        match packet::pull(end.as_fd(), &mut bytes) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    #[test]
    fn the_descriptor_follows() {
        let readiness = Readiness::new().expect("descriptors");
        for (readable, writable) in
            [(false, false), (true, false), (true, true), (false, true), (false, false), (true, true)]
        {
            readiness.set(readable, writable);
            for _ in 0..2 {
                let mut fds = [PollFd::new(&readiness.shown, PollFlags::IN | PollFlags::OUT)];
                let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
                poll(&mut fds, Some(&zero)).expect("poll");
                let got = fds[0].revents();
                assert_eq!(got.contains(PollFlags::IN), readable);
                assert_eq!(got.contains(PollFlags::OUT), writable, "asked for {readable} {writable}");
            }
        }
    }
}
