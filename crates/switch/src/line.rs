//! A connection to the broker on which nobody waits: what it has no room for is kept until it has.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use isthmus_engine::outbox::Outbox;
use isthmus_sys::packet;
use isthmus_sys::poll::Set;
use isthmus_wire::control::{self, MESSAGE_MAX, Message};

/// One connection, non-blocking, and the packets that wait for it.
pub struct Line {
    socket: OwnedFd,
    outbox: Outbox,
    /// It is watched for room as well.
    watched: bool,
    /// Something could not be said: the two do not know the same any more.
    broken: bool,
}

impl Line {
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, outbox: Outbox::default(), watched: false, broken: false }
    }

    /// Send, or keep it until there is room.
    pub fn send(&mut self, request: u32, message: &Message<'_>, descriptors: &[BorrowedFd<'_>]) {
        let mut packet = [0; MESSAGE_MAX];
        let Ok(len) = control::encode(request, message, &mut packet) else { return };
        self.broken |= self.outbox.send(self.socket.as_fd(), &packet[..len], descriptors).is_err();
    }

    /// Send what waits.
    pub fn handle_writable(&mut self) {
        self.broken |= self.outbox.flush(self.socket.as_fd()).is_err();
    }

    /// The next packet; `Ok(None)`: none is there now.
    ///
    /// # Errors
    /// The broker is gone.
    pub fn receive(&self) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        let mut buffer = [0; MESSAGE_MAX];
        match packet::receive(self.socket.as_fd(), &mut buffer) {
            Ok((0, _)) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((len, descriptors)) => Ok(Some((buffer[..len].to_vec(), descriptors))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Report also when it can be written again, while something waits for that. `None`: something could
    /// not be said; a broker that does not hear, or not read more than may wait for it, is none.
    pub fn watch(&mut self, set: &Set, token: u64) -> Option<()> {
        if self.broken {
            return None;
        }
        let blocked = self.outbox.waiting() > 0;
        if blocked != self.watched {
            let _ = set.watch(self.socket.as_fd(), token, blocked);
            self.watched = blocked;
        }
        Some(())
    }
}

impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
