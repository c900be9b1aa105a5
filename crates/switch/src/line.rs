//! A connection to the broker on which nobody waits: what it has no room for is kept until it has.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use isthmus_sys::packet;
use isthmus_sys::poll::Set;
use isthmus_wire::control::{self, MESSAGE_MAX, Message};

/// Packets that may wait for a broker that does not read.
const QUEUE_MAX: usize = 1024;

/// One connection, non-blocking, and the packets that wait for it.
pub struct Line {
    socket: OwnedFd,
    queue: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
    /// It is watched for room as well.
    watched: bool,
    /// Something could not be said: the two do not know the same any more.
    broken: bool,
}

impl Line {
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, queue: VecDeque::new(), watched: false, broken: false }
    }

    /// Send, or keep it until there is room.
    pub fn send(&mut self, request: u32, message: &Message<'_>, descriptors: &[BorrowedFd<'_>]) {
        let mut packet = [0; MESSAGE_MAX];
        let Ok(len) = control::encode(request, message, &mut packet) else { return };
        let packet = &packet[..len];
        if self.queue.is_empty() {
            match packet::send(self.socket.as_fd(), packet, descriptors) {
                Ok(()) => return,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // It is gone, or our user has as many descriptors under way as the kernel allows one.
                Err(_) => return self.broken = true,
            }
        }
        let kept: io::Result<Vec<_>> = descriptors.iter().map(|fd| fd.try_clone_to_owned()).collect();
        match kept {
            Ok(kept) if self.queue.len() < QUEUE_MAX => self.queue.push_back((packet.to_vec(), kept)),
            _ => self.broken = true,
        }
    }

    /// Send what waits.
    pub fn handle_writable(&mut self) {
        while let Some((packet, descriptors)) = self.queue.front() {
            let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            match packet::send(self.socket.as_fd(), packet, &descriptors) {
                Ok(()) => drop(self.queue.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.broken = true,
            }
        }
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
        let blocked = !self.queue.is_empty();
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
