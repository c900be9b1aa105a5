//! The sending end of a lane.

use std::fmt;

use isthmus_wire::record::{ALIGN, Header, Kind, footprint, payload_at, payload_in};

use crate::layout::{
    ARM_DATA, ARM_SPACE, COUNTER_TX_BYTES, COUNTER_TX_MESSAGES, CPU, CREDIT, CREDIT_CHECK, FIN, Geometry,
    Place, RECEIVE_STATE, TAKES_ALL, fin_word,
};
use crate::parts::Source;
use crate::sync::{Ordering, fence};
use crate::{Ring, Store, StoreFailed, View};

/// A stream that sends this share of the small ring at once, or finds it full this often, moves to
/// the large one.
const GROW_SHARE: usize = 4;
const GROW_FULL: u32 = 2;

/// A message that this lane can never carry whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLarge {
    pub len: usize,
    pub limit: usize,
}

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a message of {} bytes; this connection takes {} at most", self.len, self.limit)
    }
}

/// What became of a write.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Payload bytes that are in the lane now.
    pub bytes: usize,
    /// Whether everything is; if not, there is no space and the writer may arm and sleep.
    pub all: bool,
    pub ring: Ring,
}

/// Room for a record that its sender fills in place.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// Here it begins.
    Here(*mut u8),
    /// There is room, where only the lane can write.
    Elsewhere,
    /// Not now: the writer may arm and sleep.
    Full(Ring),
}

/// The sending end. One owner; not for sharing between threads.
pub struct Tx<S, V> {
    store: S,
    view: V,
    geometry: Geometry,
    secret: u64,
    /// Where the next record goes.
    place: Place,
    /// The receiver has consumed up to here, as far as we know.
    credit: u64,
    full: u32,
    /// Bytes of ring that the message wants which did not fit last, 0 if the last one did.
    wanted: usize,
    /// The last arm of the receiver for which the bell was rung.
    rung: u32,
    arm: u32,
    bytes: u64,
    messages: u64,
    finished: bool,
}

impl<S: Store, V: View> Tx<S, V> {
    /// `secret` is shared by the two ends and unknown to everybody whose bytes may be sent here;
    /// its lowest bit is set.
    pub fn new(store: S, view: V, geometry: Geometry, secret: u64) -> Self {
        Self {
            store,
            view,
            geometry,
            secret: secret | 1,
            place: Place::new(geometry),
            credit: 0,
            full: 0,
            wanted: 0,
            rung: 0,
            arm: 0,
            bytes: 0,
            messages: 0,
            finished: false,
        }
    }

    /// Longest message, bytes.
    #[must_use]
    pub fn message_max(&self) -> usize {
        self.geometry.message_max()
    }

    /// What the peer still takes: [`TAKES_ALL`] or why not.
    #[must_use]
    pub fn peer_takes(&self) -> u32 {
        self.view.half(RECEIVE_STATE)
    }

    /// Payload bytes and messages (for streams: records) sent so far.
    #[must_use]
    pub fn totals(&self) -> (u64, u64) {
        (self.bytes, self.messages)
    }

    /// Bytes of ring in use, as far as this end knows.
    #[must_use]
    pub fn in_flight(&mut self) -> usize {
        self.look_for_credit();
        (self.place.position - self.credit) as usize
    }

    /// Put as much of `source` into the lane as fits, as a piece of a byte stream.
    ///
    /// # Errors
    /// The memory behind the lane failed. What was counted as written before is in the lane.
    #[inline]
    pub fn write_stream(&mut self, source: &mut Source<'_>) -> Result<Written, StoreFailed> {
        debug_assert!(!self.finished, "writing after finish");
        let len = source.left();
        let room = self.free().min(self.place.to_end());
        if len == 0
            || len > self.store.chunk()
            || footprint(len, self.store.trailer()) > room
            || self.wants_to_grow(len)
        {
            return self.write_stream_in_pieces(source);
        }
        // Most writes: one record, for which there is room.
        self.put_payload(Kind::Stream, len, source)?;
        let ring = self.look_for_sleeper(Ring::Quiet);
        self.note();
        Ok(Written { bytes: len, all: true, ring })
    }

    fn write_stream_in_pieces(&mut self, source: &mut Source<'_>) -> Result<Written, StoreFailed> {
        let asked = source.left();
        // Whoever waited for room of a certain size has given up.
        self.wanted = 0;
        let mut ring = Ring::Quiet;
        let grew = self.grow_for(asked)?;
        while source.left() > 0 {
            let Some(room) = self.room(source.left()) else { break };
            let len = source.left().min(self.store.chunk()).min(payload_in(room, self.store.trailer()));
            self.put_payload(Kind::Stream, len, source)?;
            ring = self.look_for_sleeper(ring);
        }
        let written = asked - source.left();
        if written > 0 {
            self.note();
        }
        if source.left() > 0 {
            self.full = self.full.saturating_add(1);
        }
        if grew && written == 0 {
            ring = self.look_for_sleeper(ring);
        }
        Ok(Written { bytes: written, all: source.left() == 0, ring })
    }

    /// Put `source` into the lane as one message, whole or not at all.
    ///
    /// # Errors
    /// `Err(TooLarge)`: it can never fit. `Ok(Err)`: the memory behind the lane failed. Nothing was
    /// sent in either case.
    pub fn write_message(
        &mut self,
        source: &mut Source<'_>,
    ) -> Result<Result<Written, StoreFailed>, TooLarge> {
        let len = source.left();
        if len > self.message_max() {
            return Err(TooLarge { len, limit: self.message_max() });
        }
        Ok(self.write_fitting_message(len, source))
    }

    fn write_fitting_message(&mut self, len: usize, source: &mut Source<'_>) -> Result<Written, StoreFailed> {
        if let Some(ring) = self.make_room(len)? {
            return Ok(Written { bytes: 0, all: false, ring });
        }
        self.put_payload(Kind::Message, len, source)?;
        let ring = self.look_for_sleeper(Ring::Quiet);
        self.note();
        Ok(Written { bytes: len, all: true, ring })
    }

    /// Make the front of the lane a place for one record of `len` bytes, at most [`Tx::message_max`]. `Some`: there
    /// is no room now.
    fn make_room(&mut self, len: usize) -> Result<Option<Ring>, StoreFailed> {
        debug_assert!(!self.finished, "writing after finish");
        let need = footprint(len, self.store.trailer());
        let grew = self.grow_for(need)?;
        let wanted = self.wanted_for(need);
        if !self.takes(wanted) {
            self.full = self.full.saturating_add(1);
            // A ring that is about to grow need not have that much: it grows when there is some.
            self.wanted = wanted.min(self.place.capacity() - self.space_wanted());
            let ring = if grew { self.look_for_sleeper(Ring::Quiet) } else { Ring::Quiet };
            return Ok(Some(ring));
        }
        self.wanted = 0;
        let to_end = self.place.to_end();
        if need > to_end {
            self.put(Kind::Skip, 0, &mut Source::empty())?;
            self.place.advance(to_end - ALIGN);
        }
        Ok(None)
    }

    /// A place in the lane for the next `len` bytes, of a stream or of one message, which the caller fills and then
    /// sends with [`Tx::commit`]. Whatever is written before that takes the place away again.
    ///
    /// # Errors
    /// `Err(TooLarge)`: there can never be so much room. `Ok(Err)`: the memory behind the lane failed.
    pub fn reserve(&mut self, len: usize) -> Result<Result<Room, StoreFailed>, TooLarge> {
        if len > self.message_max() {
            return Err(TooLarge { len, limit: self.message_max() });
        }
        Ok(self.make_room(len).map(|full| match full {
            Some(ring) => Room::Full(ring),
            None => match self.store.in_place(self.place.at() + payload_at(len), len) {
                Some(place) => Room::Here(place),
                None => Room::Elsewhere,
            },
        }))
    }

    /// Send the `len` bytes that lie where [`Tx::reserve`] said, as a record of this kind.
    ///
    /// # Errors
    /// The memory behind the lane failed. Nothing was sent.
    pub fn commit(&mut self, kind: Kind, len: usize) -> Result<Ring, StoreFailed> {
        self.put_payload(kind, len, &mut Source::empty())?;
        let ring = self.look_for_sleeper(Ring::Quiet);
        self.note();
        Ok(ring)
    }

    /// Could something be written now? If a message did not fit last: could that message? Looks
    /// for credit.
    pub fn has_space(&mut self) -> bool {
        self.takes(self.space_wanted().max(self.wanted))
    }

    /// Would `len` bytes surely fit now, without growing and wherever the ring ends?
    pub fn fits(&mut self, len: usize) -> bool {
        let need = 2 * footprint(len, self.store.trailer());
        if self.free() < need {
            self.look_for_credit();
        }
        self.free() >= need
    }

    /// End this direction: the receiver gets everything sent so far and then the end.
    ///
    /// # Errors
    /// The word could not be written; the peer will learn of the end by other means.
    pub fn finish(&mut self) -> Result<Ring, StoreFailed> {
        self.finished = true;
        self.store.word(FIN, fin_word(self.secret, self.place.position))?;
        Ok(self.look_for_sleeper(Ring::Quiet))
    }

    #[must_use]
    pub fn finished(&self) -> bool {
        self.finished
    }

    /// Say that this end sleeps until there is space. Look once more ([`Tx::has_space`]) before
    /// sleeping.
    ///
    /// # Errors
    /// The arm could not be written: do not sleep.
    pub fn arm(&mut self) -> Result<(), StoreFailed> {
        self.arm = self.arm.wrapping_add(1).max(1);
        self.store.half(ARM_SPACE, self.arm)?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// This end is awake.
    ///
    /// # Errors
    /// The arm could not be taken back; at worst a bell rings in vain.
    pub fn disarm(&mut self) -> Result<(), StoreFailed> {
        self.store.half(ARM_SPACE, 0)
    }

    /// The processor on which the peer waited last, if it said.
    #[must_use]
    pub fn peer_cpu(&self) -> Option<u32> {
        self.view.half(CPU).checked_sub(1)
    }

    /// A sleeper is worth waking only for so much space: an eighth of the ring, because that is
    /// how much credit the receiver may hold back.
    fn space_wanted(&self) -> usize {
        (self.place.capacity() / crate::layout::CREDIT_SHARE).max(ALIGN)
    }

    /// Are so many bytes of ring free? Looks for credit only if it must.
    fn takes(&mut self, bytes: usize) -> bool {
        if self.free() < bytes {
            self.look_for_credit();
        }
        self.free() >= bytes
    }

    /// Bytes of ring for a record of `need` bytes, which begins anew where the ring ends too soon.
    fn wanted_for(&self, need: usize) -> usize {
        let to_end = self.place.to_end();
        if need > to_end { to_end + need } else { need }
    }

    #[inline]
    fn free(&self) -> usize {
        // `credit <= position` always; what is used may exceed the ring just after it grew.
        let used = usize::try_from(self.place.position - self.credit).unwrap_or(usize::MAX);
        self.place.capacity().saturating_sub(used)
    }

    /// Contiguous room for the next record, worth using for `left` bytes.
    fn room(&mut self, left: usize) -> Option<usize> {
        let to_end = self.place.to_end();
        let worth = footprint(left.min(self.store.chunk()), self.store.trailer())
            .min(to_end)
            .min(self.space_wanted());
        if self.free() < worth {
            self.look_for_credit();
            if self.free() < worth {
                return None;
            }
        }
        Some(self.free().min(to_end))
    }

    /// Read the receiver's credit. A value that cannot be is ignored.
    fn look_for_credit(&mut self) {
        let credit = self.view.word(CREDIT);
        let check = self.view.word(CREDIT_CHECK);
        if credit ^ self.secret == check && credit > self.credit && credit <= self.place.position {
            self.credit = credit;
        }
    }

    /// Do `len` bytes, or the fullness of the small ring, ask for the large one?
    #[inline]
    fn wants_to_grow(&self, len: usize) -> bool {
        let wanted = len > self.geometry.small() / GROW_SHARE || self.full >= GROW_FULL;
        wanted && !self.place.in_large() && self.geometry.large() > self.geometry.small()
    }

    /// Move to the large ring if `len` bytes ask for it, or the small one was full often.
    fn grow_for(&mut self, len: usize) -> Result<bool, StoreFailed> {
        if !self.wants_to_grow(len) || !self.takes(ALIGN) {
            return Ok(false);
        }
        self.store.prepare_large();
        self.put(Kind::Grow, 0, &mut Source::empty())?;
        self.place.grow(self.geometry, 0);
        Ok(true)
    }

    /// A record that carries `len` bytes, and its share of the totals.
    #[inline(always)]
    fn put_payload(&mut self, kind: Kind, len: usize, source: &mut Source<'_>) -> Result<(), StoreFailed> {
        self.put(kind, len, source)?;
        self.bytes += len as u64;
        self.messages += 1;
        Ok(())
    }

    #[inline(always)]
    fn put(&mut self, kind: Kind, len: usize, source: &mut Source<'_>) -> Result<(), StoreFailed> {
        let header = Header { kind, trailer: self.store.trailer(), len: len as u32 };
        let commit = self.secret.wrapping_add(self.place.position);
        self.store.record(self.place.at(), commit, header, source)?;
        self.place.advance(header.footprint());
        Ok(())
    }

    /// Wake the receiver if it sleeps. Call after publishing.
    #[inline]
    fn look_for_sleeper(&mut self, before: Ring) -> Ring {
        fence(Ordering::SeqCst);
        let arm = self.view.half(ARM_DATA);
        if arm == 0 || arm == self.rung {
            return before;
        }
        self.rung = arm;
        Ring::Bell
    }

    /// Count bytes that reached the peer on another way.
    pub fn count(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.note();
    }

    #[inline]
    fn note(&self) {
        self.store.counter(COUNTER_TX_BYTES, self.bytes);
        self.store.counter(COUNTER_TX_MESSAGES, self.messages);
    }

    /// May the peer still receive?
    #[must_use]
    pub fn open(&self) -> bool {
        self.peer_takes() == TAKES_ALL
    }
}
