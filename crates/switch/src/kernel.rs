//! A program's end of a connection of kernel sockets, in the place of a guest that cannot hold it.
//!
//! The broker brings two ends of a Unix stream and keeps neither. The end of a guest's program is ours: what the guest
//! sends is written there, and what the other end writes is sent to the guest. What does not fit waits here, never more
//! than the guest was told it may send.

use std::collections::VecDeque;
use std::io::{Error, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use isthmus_ring::layout::{RESET, TAKES_ALL, TAKES_NOTHING};
use isthmus_sys::packet;

use crate::bridge::{Front, Outside, Taken};
use crate::vring::Cursor;

/// Bytes that are taken from a socket at once.
const READ: usize = 64 << 10;

/// One end of a Unix stream.
pub struct KernelSocket {
    socket: OwnedFd,
    /// Bytes from the guest that the socket has not taken.
    waiting: VecDeque<u8>,
    /// Bytes for the guest, and how many of them it has.
    taken: Vec<u8>,
    shown: usize,
    /// There is nothing to read until the descriptor is heard.
    dry: bool,
    /// The other end sends no more.
    ended: bool,
    /// What the other end takes, as a lane says it.
    takes: u32,
    finish: bool,
    /// Of those that wait, how many are on the guest's account.
    counted: usize,
    /// The descriptor is watched for room as well.
    pub watched: bool,
    /// Its other end may be another guest's here: then the two become one flow, while nothing has passed.
    pub narrow: bool,
}

impl KernelSocket {
    #[must_use]
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            waiting: VecDeque::new(),
            taken: Vec::new(),
            shown: 0,
            dry: false,
            ended: false,
            takes: TAKES_ALL,
            finish: false,
            counted: 0,
            watched: false,
            narrow: false,
        }
    }

    /// For a broker that was started again.
    #[must_use]
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Has nothing passed through it?
    #[must_use]
    pub fn is_untouched(&self) -> bool {
        self.narrow && self.taken.is_empty() && !self.ended && self.takes == TAKES_ALL
    }

    #[must_use]
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Bytes that waited when this was asked before, and that do now.
    pub fn count(&mut self) -> (usize, usize) {
        let now = self.waiting.len();
        (std::mem::replace(&mut self.counted, now), now)
    }

    /// Does something wait for room?
    #[must_use]
    pub fn blocked(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// A write failed, or could not be done now: for good?
    fn note(&mut self, error: &Error) {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::Interrupted => return,
            ErrorKind::BrokenPipe if self.takes == TAKES_ALL => self.takes = TAKES_NOTHING,
            ErrorKind::BrokenPipe => {}
            _ => self.takes = RESET,
        }
        self.waiting.clear();
    }

    fn finish_now(&self) {
        if self.finish && self.waiting.is_empty() {
            packet::shut_send(self.socket.as_fd());
        }
    }
}

impl Outside for KernelSocket {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.socket.as_fd())
    }

    fn must_ring(&self) -> bool {
        false
    }

    fn hear(&mut self) {
        self.dry = false;
    }

    fn gone(&self) -> bool {
        self.takes == RESET || self.ended && self.takes != TAKES_ALL
    }

    fn flushed(&self) -> bool {
        self.waiting.is_empty()
    }

    fn put(&mut self, payload: &mut Cursor<'_>, _: bool) -> Taken {
        let mut pieces: Vec<(*const u8, usize)> = Vec::new();
        while let Some((start, len)) = payload.next(usize::MAX) {
            pieces.push((start.cast_const(), len));
        }
        let len = pieces.iter().map(|piece| piece.1).sum();
        self.narrow &= len == 0;
        let mut written = 0;
        if self.takes == TAKES_ALL && self.waiting.is_empty() {
            // SAFETY: the pieces are in a guest's memory, mapped while its packet is handled.
            match unsafe { packet::push_pieces(self.socket.as_fd(), &pieces) } {
                Ok(bytes) => written = bytes,
                Err(error) => self.note(&error),
            }
        }
        if self.takes != TAKES_ALL {
            // It goes nowhere, and its sender is told so.
            return Taken::Bytes(len);
        }
        let mut skip = written;
        for (start, len) in pieces {
            let here = skip.min(len);
            skip -= here;
            // SAFETY: as above; `here` is at most `len`.
            self.waiting.extend(unsafe { std::slice::from_raw_parts(start.add(here), len - here) });
        }
        Taken::Bytes(written)
    }

    fn push(&mut self) -> Taken {
        let mut taken = 0;
        while !self.waiting.is_empty() {
            let (front, _) = self.waiting.as_slices();
            match packet::push(self.socket.as_fd(), front) {
                Ok(bytes) => {
                    self.waiting.drain(..bytes);
                    taken += bytes;
                }
                Err(error) => {
                    let left = self.waiting.len();
                    self.note(&error);
                    // What is thrown away does not wait any more.
                    taken += left - self.waiting.len();
                    break;
                }
            }
        }
        if self.waiting.is_empty() {
            // Nobody's memory is kept for what was taken.
            self.waiting = VecDeque::new();
        }
        self.finish_now();
        Taken::Bytes(taken)
    }

    fn finish(&mut self) {
        self.narrow = false;
        self.finish = true;
        self.finish_now();
    }

    fn stop(&mut self, _: bool) {
        self.narrow = false;
        packet::shut_receive(self.socket.as_fd());
    }

    fn takes(&self) -> u32 {
        self.takes
    }

    fn front(&mut self) -> Front {
        if self.shown == self.taken.len() && !self.dry && !self.ended {
            self.taken.clear();
            self.shown = 0;
            self.taken.reserve(READ);
            match packet::pull_into(self.socket.as_fd(), &mut self.taken) {
                Ok(0) => self.ended = true,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.dry = true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.takes = RESET,
            }
            if self.taken.is_empty() {
                // An idle connection keeps no memory.
                self.taken = Vec::new();
            }
        }
        let left = self.taken.len() - self.shown;
        match self.taken.get_mut(self.shown..) {
            Some(bytes) if left > 0 => Front::Bytes((bytes.as_mut_ptr(), left), false),
            _ if self.takes == RESET => Front::Broken,
            _ if self.ended => Front::End,
            _ => Front::Nothing,
        }
    }

    fn took(&mut self, len: usize) {
        self.shown = (self.shown + len).min(self.taken.len());
    }

    fn listen(&mut self) -> bool {
        false
    }

    /// The other end reads what it has, and then the end.
    fn close(&mut self, _: bool) {
        packet::shut(self.socket.as_fd());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(end: &mut KernelSocket, bytes: &[u8]) -> Taken {
        let piece = [(bytes.as_ptr().cast_mut(), bytes.len())];
        end.put(&mut Cursor::new(&piece), false)
    }

    fn bytes(end: &mut KernelSocket) -> Option<Vec<u8>> {
        match end.front() {
            Front::Bytes((start, len), false) => {
                // SAFETY: a slice of the end's own.
                let bytes = unsafe { std::slice::from_raw_parts(start, len) }.to_vec();
                end.took(len);
                Some(bytes)
            }
            _ => None,
        }
    }

    #[test]
    fn what_does_not_fit_waits_and_goes_on_in_order() {
        let (ours, theirs) = packet::pair().expect("a pair");
        let mut end = KernelSocket::new(ours);
        let sent: Vec<u8> = (0..3 << 20).map(|n: u32| (n >> 8) as u8).collect();
        let Taken::Bytes(mut taken) = put(&mut end, &sent) else { panic!("broken") };
        assert!(taken < sent.len() && end.blocked());
        end.finish();
        let (mut got, mut buffer) = (Vec::new(), vec![0; 100_000]);
        loop {
            match packet::pull(theirs.as_fd(), &mut buffer) {
                Ok(0) => break,
                Ok(n) => got.extend_from_slice(&buffer[..n]),
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            let Taken::Bytes(more) = end.push() else { panic!("broken") };
            taken += more;
        }
        assert_eq!((taken, got.len()), (sent.len(), sent.len()));
        assert!(got == sent);
    }

    #[test]
    fn it_is_not_read_again_before_it_is_heard() {
        let (ours, theirs) = packet::pair().expect("a pair");
        let mut end = KernelSocket::new(ours);
        assert!(matches!(end.front(), Front::Nothing));
        packet::push(theirs.as_fd(), b"one").expect("room");
        assert!(matches!(end.front(), Front::Nothing));
        end.hear();
        assert_eq!(bytes(&mut end).as_deref(), Some(&b"one"[..]));
        packet::shut_send(theirs.as_fd());
        assert!(matches!(end.front(), Front::End));
        assert!(matches!(put(&mut end, b"two"), Taken::Bytes(3)));
        assert!(!end.gone());
    }

    #[test]
    fn who_reads_no_more_takes_nothing_and_holds_nobody_up() {
        let (ours, theirs) = packet::pair().expect("a pair");
        let mut end = KernelSocket::new(ours);
        let sent = vec![7; 1 << 20];
        let Taken::Bytes(first) = put(&mut end, &sent) else { panic!("broken") };
        packet::shut_receive(theirs.as_fd());
        let Taken::Bytes(rest) = end.push() else { panic!("broken") };
        assert_eq!((first + rest, end.takes(), end.blocked()), (sent.len(), TAKES_NOTHING, false));
        assert_eq!(put(&mut end, &sent), Taken::Bytes(sent.len()));
        assert!(!end.gone());
        drop(theirs);
        end.hear();
        // It had not read what it was sent.
        assert!(matches!(end.front(), Front::Broken));
        assert!(end.gone());
    }
}
