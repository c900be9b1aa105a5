//! A [`Transport`] over any connected stream socket: TCP, AF_UNIX, AF_VSOCK.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    net::{RecvFlags, SendFlags, recv, send},
};

use crate::{clock::Clock, error::BenchError, loops::Transport, wait::Wait};

/// A stream socket and how to wait on it.
pub struct FdStream {
    fd: OwnedFd,
    wait: Wait,
    clock: Clock,
    /// Ticks to spin before sleeping; 0 sleeps at once.
    spin: u64,
}

impl FdStream {
    pub fn new(fd: OwnedFd, wait: Wait) -> Self {
        let clock = Clock::start();
        let spin = wait.spin().map_or(u64::MAX, |spin| clock.ticks_in(spin));
        Self { fd, wait, clock, spin }
    }

    /// The same over a duplicate of somebody else's descriptor, who keeps theirs.
    ///
    /// # Errors
    ///
    /// [`BenchError::Transport`] when `fd` is not open.
    pub fn duplicate(fd: RawFd, wait: Wait) -> Result<Self, BenchError> {
        Ok(Self::new(duplicate(fd)?, wait))
    }

    /// `EAGAIN` of a call that should have slept: the caller's descriptor is non-blocking, so sleep here.
    #[cold]
    fn sleep(&self, until: PollFlags) -> io::Result<()> {
        poll(&mut [PollFd::new(&self.fd, until)], None)?;
        Ok(())
    }

    /// Repeat `attempt` as [`Wait`] says until it moves at least one byte.
    #[inline(always)]
    fn wait_for(
        &self,
        until: PollFlags,
        mut attempt: impl FnMut(BorrowedFd<'_>, bool) -> rustix::io::Result<usize>,
    ) -> io::Result<usize> {
        let fd = self.fd.as_fd();
        let mut may_sleep = self.wait == Wait::Block;
        let mut since = None;
        loop {
            match attempt(fd, may_sleep) {
                Ok(moved) => return Ok(moved),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if may_sleep => self.sleep(until)?,
                Err(Errno::AGAIN) if self.wait != Wait::Spin => {
                    let now = self.clock.ticks();
                    may_sleep = now - *since.get_or_insert(now) >= self.spin;
                }
                Err(Errno::AGAIN) => {}
                Err(other) => return Err(other.into()),
            }
        }
    }
}

/// A duplicate of the caller's descriptor.
pub(crate) fn duplicate(fd: RawFd) -> Result<OwnedFd, BenchError> {
    if fd < 0 {
        return Err(BenchError::Transport {
            doing: "duplicating the descriptor",
            source: Errno::BADF.into(),
        });
    }
    // SAFETY: the borrow ends with this statement; a number that is not open makes the call fail with EBADF, and the
    // caller passed the number on purpose, so it is theirs to lend.
    unsafe { BorrowedFd::borrow_raw(fd) }
        .try_clone_to_owned()
        .map_err(BenchError::transport("duplicating the descriptor"))
}

impl Transport for FdStream {
    #[inline]
    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        let mut rest = message;
        while !rest.is_empty() {
            let sent = self.wait_for(PollFlags::OUT, |fd, may_sleep| {
                let flags = if may_sleep { SendFlags::empty() } else { SendFlags::DONTWAIT };
                send(fd, rest, flags | SendFlags::NOSIGNAL)
            })?;
            rest = &rest[sent..];
        }
        Ok(())
    }

    #[inline]
    fn recv_exact(&mut self, message: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < message.len() {
            let got = self.wait_for(PollFlags::IN, |fd, may_sleep| {
                let flags = if may_sleep { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
                recv(fd, &mut message[filled..], flags).map(|(got, _)| got)
            })?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            filled += got;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream};

    use super::*;

    #[test]
    fn a_closed_descriptor_is_an_error_and_not_a_crash() {
        for fd in [-1, 1_000_000] {
            let error = FdStream::duplicate(fd, Wait::Block).err().expect("no such descriptor");
            assert!(error.to_string().starts_with("duplicating the descriptor"), "{error}");
        }
    }

    #[test]
    fn a_non_blocking_descriptor_still_sleeps_when_told_to_block() {
        let (mut left, right) = UnixStream::pair().expect("socketpair");
        right.set_nonblocking(true).expect("non-blocking");
        let mut stream = FdStream::new(right.into(), Wait::Block);
        let sender = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(10));
            left.write_all(b"isthmus").expect("write");
        });
        let mut message = [0; 7];
        stream.recv_exact(&mut message).expect("seven bytes");
        assert_eq!(&message, b"isthmus");
        sender.join().expect("sender");
        assert_eq!(stream.recv_exact(&mut message).expect_err("closed").kind(), io::ErrorKind::UnexpectedEof);
    }
}
