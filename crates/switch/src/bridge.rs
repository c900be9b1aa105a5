//! From a guest's socket to a program that is no guest, and back: the switch holds the program's lanes.
//!
//! Bytes from the guest are copied from its packets into the lane; what does not fit waits here, never more than
//! [`WINDOW`], because the guest is told no more. Bytes to the guest are copied from the lane into its buffers.

use std::cell::Cell;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use isthmus_engine::Source;
use isthmus_engine::lane::Ends;
use isthmus_ring::layout::{RESET, TAKES_ALL, TAKES_NOTHING};
use isthmus_ring::{Ring, Seen};
use isthmus_sys::packet;

use crate::vring::{Cursor, Piece};

/// What a guest may have in flight towards a lane, bytes.
pub const WINDOW: u32 = 1 << 20;
/// Messages of one connection that are kept for somebody who takes nothing.
pub const MESSAGES_MAX: usize = 16 << 10;

/// What a record costs at least, as bytes.
const RECORD_COST: usize = 256;

/// The lanes of one connection, and their bell.
pub struct Bridge {
    ends: Ends,
    bell: Bell,
    message: bool,
    /// Bytes from the guest that the lane has not taken.
    waiting: VecDeque<u8>,
    /// Of seqpacket: the bytes of each whole message at the front of `waiting`.
    messages: VecDeque<usize>,
    /// Bytes behind the last whole message.
    begun: usize,
    /// Of the record at the front of the lane: bytes that the guest has.
    shown: usize,
    finish: bool,
    gone: bool,
    /// What was passed on of the other side's will to receive.
    stopped: u32,
}

/// How the program is woken.
pub enum Bell {
    /// One end of a socket pair; the program has the other.
    Socket(OwnedFd),
    /// A connection of the guest's agent to the switch, which rings it when it sees that this was set.
    Guest(Cell<bool>),
}

/// What lies at the front of the lane for the guest.
pub enum Front {
    Nothing,
    /// A run of bytes, and whether a message ends with it.
    Bytes(Piece, bool),
    End,
    /// The program is gone or broke the format.
    Broken,
}

/// What the switch holds of a program that has no socket in a guest: its lanes, or a kernel socket.
pub trait Outside {
    /// The descriptor to wait for, if there is one.
    fn descriptor(&self) -> Option<BorrowedFd<'_>>;
    /// Must a program in a guest be woken? Once, when this says so.
    fn must_ring(&self) -> bool;
    /// Hear the descriptor, and note when the program is gone.
    fn hear(&mut self);
    /// The program closed its side, or died.
    fn gone(&self) -> bool;
    /// Everything the guest sent is with the program.
    fn flushed(&self) -> bool;
    /// Bytes from the guest; `end`: a message ends with them. Returns how many were taken now.
    fn put(&mut self, payload: &mut Cursor<'_>, end: bool) -> Taken;
    /// Move on what waits. Returns how many bytes were taken.
    fn push(&mut self) -> Taken;
    /// The guest sends no more.
    fn finish(&mut self);
    /// The guest receives no more.
    fn stop(&mut self, reset: bool);
    /// What the program still takes, as a lane says it.
    fn takes(&self) -> u32;
    /// The next bytes for the guest. They stay until [`Outside::took`].
    fn front(&mut self) -> Front;
    /// The guest has so many bytes of the front.
    fn took(&mut self, len: usize);
    /// Ask to be woken when there is more. `true`: there is some already.
    fn listen(&mut self) -> bool;
    /// Both directions end.
    fn close(&mut self, reset: bool);
}

/// The lane broke, or the program takes no more: what became of bytes for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// So many bytes are in the lane.
    Bytes(usize),
    Broken,
}

impl Bridge {
    /// `message`: the connection carries whole messages.
    #[must_use]
    pub fn new(ends: Ends, bell: Bell, message: bool) -> Self {
        Self {
            ends,
            bell,
            message,
            waiting: VecDeque::new(),
            messages: VecDeque::new(),
            begun: 0,
            shown: 0,
            finish: false,
            gone: false,
            stopped: TAKES_ALL,
        }
    }

    fn ring(&self, ring: Ring) {
        match (&self.bell, ring) {
            (_, Ring::Quiet) => {}
            // Full: a byte is on its way already. Gone: its end is read elsewhere.
            (Bell::Socket(socket), _) => drop(packet::push(socket.as_fd(), &[0])),
            (Bell::Guest(rings), _) => rings.set(true),
        }
    }

    /// The program's bell has come to its end.
    pub fn lose(&mut self) {
        self.gone = true;
    }

    fn finish_now(&mut self) {
        if !self.ends.tx.finished() {
            let ring = self.ends.tx.finish().unwrap_or(Ring::Bell);
            self.ring(ring);
        }
    }

    /// Copy from the front of this lane into the other one, as far as that takes it. Returns the bytes, and whether
    /// there may be more that it would take.
    ///
    /// One copy, from one program's memory into the other's. With `sleep` both programs are asked to ring when there is
    /// more to do; without, the caller has to look again by itself ([`Bridge::could_relay`]).
    pub fn relay(&mut self, to: &mut Self, budget: usize, sleep: bool) -> (usize, bool) {
        let mut moved = 0;
        loop {
            let (piece, message) = match self.front() {
                Front::Bytes(piece, message) => (piece, message),
                Front::Nothing if sleep && self.listen() => continue,
                Front::Nothing | Front::Broken => return (moved, false),
                Front::End => {
                    to.finish();
                    return (moved, false);
                }
            };
            if moved >= budget {
                return (moved, true);
            }
            let parts = [(piece.0.cast_const(), piece.1)];
            // SAFETY: the piece lies in memory that is mapped while this lane is; whoever writes it meanwhile gets
            // what it wrote.
            let mut source = unsafe { Source::new(&parts) };
            let tx = &mut to.ends.tx;
            let written = if message {
                tx.write_message(&mut source).ok().and_then(Result::ok)
            } else {
                tx.write_stream(&mut source).ok()
            };
            let Some(written) = written else {
                // It can never be sent, or never again.
                self.gone = true;
                to.gone = true;
                return (moved, false);
            };
            to.ring(written.ring);
            if written.bytes > 0 || written.all {
                self.took(written.bytes);
            }
            // A short record is not for nothing either.
            moved += written.bytes.max(RECORD_COST);
            if !written.all && (!sleep || to.ends.tx.arm().is_err() || !to.ends.tx.has_space()) {
                return (moved, false);
            }
        }
    }

    /// Would [`Bridge::relay`] do something now?
    pub fn could_relay(&mut self, to: &mut Self) -> bool {
        if to.takes_now() != TAKES_ALL && to.takes_now() != self.stopped {
            return true;
        }
        match self.front() {
            Front::Bytes(..) => to.ends.tx.has_space(),
            Front::End => !to.ends.tx.finished(),
            Front::Nothing => self.gone,
            Front::Broken => true,
        }
    }

    /// Has the other side got everything that will ever come from this one, and the end if there was one?
    pub fn drained(&mut self, to: &Self) -> bool {
        match self.front() {
            Front::Bytes(..) => false,
            Front::End => to.ends.tx.finished(),
            Front::Nothing | Front::Broken => self.gone,
        }
    }

    /// What the receiver of the other direction says about this one: it takes nothing more.
    pub fn pass_stop(&mut self, to: &Self) {
        match to.takes_now() {
            TAKES_ALL => {}
            state if self.stopped != state => {
                self.stopped = state;
                self.stop(state == RESET);
            }
            _ => {}
        }
    }

    /// What the program takes; nothing, once it is gone.
    fn takes_now(&self) -> u32 {
        match self.takes() {
            TAKES_ALL if self.gone => RESET,
            takes => takes,
        }
    }
}

impl Outside for Bridge {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &self.bell {
            Bell::Socket(socket) => Some(socket.as_fd()),
            Bell::Guest(_) => None,
        }
    }

    fn must_ring(&self) -> bool {
        matches!(&self.bell, Bell::Guest(rings) if rings.replace(false))
    }

    fn hear(&mut self) {
        let Bell::Socket(socket) = &self.bell else { return };
        let mut buffer = [0; 64];
        // Not without end: whoever rings all the time is heard again in the next turn.
        for _ in 0..4 {
            match packet::pull(socket.as_fd(), &mut buffer) {
                Ok(0) => return self.gone = true,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(_) => return self.gone = true,
            }
        }
    }

    fn gone(&self) -> bool {
        self.gone
    }

    fn flushed(&self) -> bool {
        self.waiting.is_empty()
    }

    fn put(&mut self, payload: &mut Cursor<'_>, end: bool) -> Taken {
        let mut taken = 0;
        if self.waiting.is_empty() && !self.message {
            let mut parts: Vec<(*const u8, usize)> = Vec::new();
            while let Some((start, len)) = payload.next(usize::MAX) {
                parts.push((start.cast_const(), len));
            }
            // SAFETY: the pieces are in a guest's memory, mapped while its packet is handled.
            let mut source = unsafe { Source::new(&parts) };
            let Ok(written) = self.ends.tx.write_stream(&mut source) else { return Taken::Broken };
            let waiting = &mut self.waiting;
            source.take(source.left(), |start, len| {
                // SAFETY: as above.
                waiting.extend(unsafe { std::slice::from_raw_parts(start, len) });
            });
            self.ring(written.ring);
            taken = written.bytes;
        } else {
            let before = self.waiting.len();
            while let Some((start, len)) = payload.next(usize::MAX) {
                // SAFETY: as above.
                self.waiting.extend(unsafe { std::slice::from_raw_parts(start, len) });
            }
            self.begun += self.waiting.len() - before;
            if self.message && end {
                self.messages.push_back(std::mem::take(&mut self.begun));
            }
            if self.messages.len() > MESSAGES_MAX {
                return Taken::Broken;
            }
        }
        match self.push() {
            Taken::Bytes(more) => Taken::Bytes(taken + more),
            Taken::Broken => Taken::Broken,
        }
    }

    fn push(&mut self) -> Taken {
        let mut taken = 0;
        loop {
            let len = match (self.message, self.messages.front()) {
                (true, Some(len)) => *len,
                (false, _) if !self.waiting.is_empty() => self.waiting.len(),
                _ => break,
            };
            let (front, back) = self.waiting.as_slices();
            let first = front.len().min(len);
            let parts = [(front.as_ptr(), first), (back.as_ptr(), len - first)];
            // SAFETY: both are slices of ours; `len` is at most what waits.
            let mut source = unsafe { Source::new(&parts) };
            let tx = &mut self.ends.tx;
            let written = if self.message {
                tx.write_message(&mut source).ok().and_then(Result::ok)
            } else {
                tx.write_stream(&mut source).ok()
            };
            let Some(written) = written else { return Taken::Broken };
            self.waiting.drain(..written.bytes);
            taken += written.bytes;
            self.ring(written.ring);
            if self.message && written.all {
                self.messages.pop_front();
            }
            if !written.all {
                if self.ends.tx.arm().is_err() {
                    return Taken::Broken;
                }
                if !self.ends.tx.has_space() {
                    break;
                }
            }
        }
        if self.finish && self.waiting.is_empty() {
            self.finish_now();
        }
        Taken::Bytes(taken)
    }

    fn finish(&mut self) {
        self.finish = true;
        if self.waiting.is_empty() {
            self.finish_now();
        }
    }

    fn stop(&mut self, reset: bool) {
        let ring = self.ends.rx.stop(if reset { RESET } else { TAKES_NOTHING }).unwrap_or(Ring::Bell);
        self.ring(ring);
    }

    fn takes(&self) -> u32 {
        self.ends.tx.peer_takes()
    }

    fn front(&mut self) -> Front {
        match self.ends.rx.look() {
            Ok(Seen::Data(_)) => match self.ends.rx.front() {
                Some((at, len)) => {
                    let (at, len) = (at + self.shown, len - self.shown);
                    Front::Bytes((self.ends.view.bytes(at, len).cast_mut(), len), self.message)
                }
                None => Front::Nothing,
            },
            Ok(Seen::Nothing) if self.gone => Front::Broken,
            Ok(Seen::Nothing) => Front::Nothing,
            Ok(Seen::End) => Front::End,
            Err(_) => Front::Broken,
        }
    }

    fn took(&mut self, len: usize) {
        self.shown += len;
        if self.ends.rx.front().is_none_or(|front| front.1 <= self.shown) {
            self.shown = 0;
            let ring = self.ends.rx.skip();
            self.ring(ring);
        }
    }

    fn listen(&mut self) -> bool {
        match self.ends.rx.prepare_to_sleep() {
            Ok((quiet, ring)) => {
                self.ring(ring);
                !quiet
            }
            Err(_) => false,
        }
    }

    fn close(&mut self, reset: bool) {
        self.stop(reset);
        if let Bell::Socket(socket) = &self.bell {
            packet::shut(socket.as_fd());
        }
    }
}
