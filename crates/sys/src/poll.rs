//! Waiting for descriptors.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

/// What a descriptor is ready for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ready {
    pub readable: bool,
    pub writable: bool,
    /// The other side is gone.
    pub hung_up: bool,
}

fn timespec(timeout: Option<Duration>) -> Option<Timespec> {
    timeout.map(|t| Timespec {
        tv_sec: i64::try_from(t.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: t.subsec_nanos().into(),
    })
}

/// Wait until `fd` is readable or its other side is gone.
///
/// `None` for the time-out means no limit. `Ok(default)`: the time ran out.
pub fn wait_readable(fd: BorrowedFd<'_>, timeout: Option<Duration>) -> io::Result<Ready> {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN | PollFlags::RDHUP)];
    rustix::event::poll(&mut fds, timespec(timeout).as_ref())?;
    let events = fds[0].revents();
    Ok(Ready {
        readable: events.contains(PollFlags::IN),
        writable: false,
        hung_up: events.intersects(PollFlags::HUP | PollFlags::RDHUP | PollFlags::ERR | PollFlags::NVAL),
    })
}

/// Can something be written here without waiting? In a pipe there is room for a page then.
#[must_use]
pub fn has_room(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::OUT)];
    rustix::event::poll(&mut fds, timespec(Some(Duration::ZERO)).as_ref()).is_ok_and(|ready| ready > 0)
}

/// A counter that a thread of this process sets and another waits for.
pub struct Flag(OwnedFd);

impl Flag {
    pub fn new() -> io::Result<Self> {
        Ok(Self(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub fn raise(&self) {
        // Fails only when it is raised already, 2^64 - 2 times.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub fn lower(&self) {
        let mut value = [0; 8];
        let _ = rustix::io::read(&self.0, &mut value);
    }
}

impl AsFd for Flag {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Add a member to somebody else's event poll, with the events and the data that its owner wants.
pub fn add_member(poll: BorrowedFd<'_>, fd: BorrowedFd<'_>, events: u32, data: u64) -> io::Result<()> {
    Ok(epoll::add(poll, fd, EventData::new_u64(data), EventFlags::from_bits_retain(events))?)
}

/// A set of descriptors to wait for, each with a token.
pub struct Set(OwnedFd);

impl Set {
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// Report `token` while `fd` is readable or hung up.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        Ok(epoll::add(&self.0, fd, EventData::new_u64(token), EventFlags::IN | EventFlags::RDHUP)?)
    }

    /// Report `token` each time `fd` becomes readable, without it being read in between.
    pub fn add_edge(&self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        Ok(epoll::add(&self.0, fd, EventData::new_u64(token), EventFlags::IN | EventFlags::ET)?)
    }

    /// Report `token` while `fd`, which was added before, is readable, hung up or (if `writable`) can be written.
    pub fn watch(&self, fd: BorrowedFd<'_>, token: u64, writable: bool) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::RDHUP;
        let flags = if writable { flags | EventFlags::OUT } else { flags };
        Ok(epoll::modify(&self.0, fd, EventData::new_u64(token), flags)?)
    }

    /// Report `token` each time `fd`, which was added before, becomes readable or (if `writable`) can be written.
    pub fn watch_edge(&self, fd: BorrowedFd<'_>, token: u64, writable: bool) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        let flags = if writable { flags | EventFlags::OUT } else { flags };
        Ok(epoll::modify(&self.0, fd, EventData::new_u64(token), flags)?)
    }

    pub fn remove(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(epoll::delete(&self.0, fd)?)
    }

    /// Wait and append the tokens that are ready; `None` means no limit.
    pub fn wait(&self, timeout: Option<Duration>, ready: &mut Vec<(u64, Ready)>) -> io::Result<()> {
        let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 64];
        let seen = epoll::wait(&self.0, &mut events[..], timespec(timeout).as_ref())?;
        for event in &events[..seen] {
            let (data, flags) = (event.data, event.flags);
            let hung_up = flags.intersects(EventFlags::HUP | EventFlags::RDHUP | EventFlags::ERR);
            let (readable, writable) = (flags.contains(EventFlags::IN), flags.contains(EventFlags::OUT));
            ready.push((data.u64(), Ready { readable, writable, hung_up }));
        }
        Ok(())
    }
}

impl AsFd for Set {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
