//! Packets for a socket on which nobody waits: what it has no room for is kept until it has.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use isthmus_sys::packet;

/// Packets that may wait for somebody who does not read.
pub const OUTBOX_MAX: usize = 1024;

/// What waits for room in one socket, in order.
#[derive(Default)]
pub struct Outbox(VecDeque<(Vec<u8>, Vec<OwnedFd>)>);

impl Outbox {
    /// Send, or keep it until there is room.
    ///
    /// # Errors
    /// The other side is gone, does not read, or our user has as many descriptors under way as the kernel allows one.
    /// Nothing was sent or kept.
    pub fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        packet: &[u8],
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        if self.0.is_empty() {
            match packet::send_now(socket, packet, descriptors) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
        if self.0.len() >= OUTBOX_MAX {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let kept: io::Result<Vec<_>> = descriptors.iter().map(|fd| fd.try_clone_to_owned()).collect();
        self.0.push_back((packet.to_vec(), kept?));
        Ok(())
    }

    /// Send what waits, as far as there is room.
    ///
    /// # Errors
    /// As [`Outbox::send`]; what waits goes on to wait.
    pub fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        while let Some((packet, descriptors)) = self.0.front() {
            let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            match packet::send_now(socket, packet, &descriptors) {
                Ok(()) => drop(self.0.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// How many packets wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.len()
    }

    /// Whoever they were for is gone.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number_of(packet: &[u8]) -> u32 {
        u32::from_le_bytes(packet.try_into().expect("four bytes"))
    }

    #[test]
    fn what_finds_no_room_comes_later_and_in_order() {
        let (here, there) = packet::pair().expect("a pair");
        let (lent, other) = packet::pair().expect("a pair");
        let mut outbox = Outbox::default();
        let mut sent = 0u32;
        while outbox.waiting() < 10 {
            outbox.send(here.as_fd(), &sent.to_le_bytes(), &[lent.as_fd()]).expect("sent or kept");
            sent += 1;
        }
        drop(lent);
        let mut buffer = [0; 8];
        let mut came = 0;
        while came < sent {
            let (len, descriptors) = packet::receive(there.as_fd(), &mut buffer).expect("a packet");
            assert_eq!((number_of(&buffer[..len]), descriptors.len()), (came, 1));
            came += 1;
            outbox.flush(here.as_fd()).expect("the other side lives");
        }
        assert_eq!(outbox.waiting(), 0);
        assert!(
            isthmus_sys::poll::wait_readable(other.as_fd(), Some(std::time::Duration::ZERO))
                .expect("a state")
                .hung_up
        );
    }

    #[test]
    fn somebody_who_never_reads_is_told_from_one_who_is_slow() {
        let (here, there) = packet::pair().expect("a pair");
        let mut outbox = Outbox::default();
        let error = loop {
            if let Err(error) = outbox.send(here.as_fd(), &[0; 64], &[]) {
                break error;
            }
        };
        assert_eq!((error.kind(), outbox.waiting()), (io::ErrorKind::WouldBlock, OUTBOX_MAX));
        drop(there);
        assert_eq!(outbox.flush(here.as_fd()).expect_err("gone").kind(), io::ErrorKind::BrokenPipe);
        outbox.clear();
        assert_eq!(outbox.waiting(), 0);
    }
}
