//! The receiving end of a lane.

use std::fmt;

use isthmus_wire::record::{ALIGN, COVERED_MAX, HEADER, Header, HeaderFault, Kind, trailer_at, trailer_word};

use crate::layout::{
    ARM_DATA, ARM_SPACE, COUNTER_RX_BYTES, COUNTER_RX_MESSAGES, CPU, CREDIT, CREDIT_SHARE, FIN, Geometry,
    Place, RECEIVE_STATE, fin_word,
};
use crate::parts::Dest;
use crate::sync::{Ordering, fence};
use crate::{Ring, Store, StoreFailed, View};

/// Records in a row that carry nothing: a sender needs two, to grow and to begin its ring again. A
/// hostile one could otherwise keep its receiver looking for ever.
const IDLE_MAX: u32 = 4;

/// What lies at the front of the lane.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    Nothing,
    /// So many bytes of a stream, or a message of so many bytes.
    Data(usize),
    /// The sender has finished and everything was received.
    End,
}

/// The sender broke the format: the lane is useless from here on, and nothing else is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Header(HeaderFault),
    /// A `Grow` where the lane cannot grow.
    Grow,
    /// A stream record in a message lane or the other way round.
    Kind,
    /// Record after record that carries nothing.
    Idle,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header(fault) => write!(f, "{fault}"),
            Self::Grow => f.write_str("record.kind: this lane cannot grow"),
            Self::Kind => f.write_str("record.kind: a stream piece in a message lane, or the reverse"),
            Self::Idle => f.write_str("record.kind: record after record that carries nothing"),
        }
    }
}

impl std::error::Error for Fault {}

/// How often a large ring is tried to be prepared.
const PREPARE_ATTEMPTS: u32 = 64;

/// A record with payload, found good.
#[derive(Clone, Copy)]
struct Front {
    /// Where the payload not yet received begins in the layout, and its bytes.
    at: usize,
    left: usize,
    /// Bytes of the whole payload and of the whole record.
    len: usize,
    footprint: usize,
}

/// The receiving end. One owner; not for sharing between threads.
pub struct Rx<S, V> {
    store: S,
    view: V,
    geometry: Geometry,
    secret: u64,
    kind: Kind,
    /// Where the record at the front begins.
    place: Place,
    /// The record at the front, once it was found good.
    current: Option<Front>,
    /// Records without payload since the last one that had some.
    idle: u32,
    /// The credit that the sender was last given.
    given: u64,
    rung: u32,
    arm: u32,
    bytes: u64,
    messages: u64,
    prepare: Option<Box<dyn Fn() -> bool + Send>>,
    attempts: u32,
}

impl<S: Store, V: View> Rx<S, V> {
    /// `kind` is [`Kind::Stream`] or [`Kind::Message`]: what this lane carries.
    pub fn new(store: S, view: V, geometry: Geometry, secret: u64, kind: Kind) -> Self {
        Self {
            store,
            view,
            geometry,
            secret: secret | 1,
            kind,
            place: Place::new(geometry),
            current: None,
            idle: 0,
            given: 0,
            rung: 0,
            arm: 0,
            bytes: 0,
            messages: 0,
            prepare: None,
            attempts: 0,
        }
    }

    /// For carriers whose receiver owns the large ring: called when the sender moves there, and now
    /// and then again until it says that the memory is as it should be.
    pub fn on_grow(&mut self, prepare: impl Fn() -> bool + Send + 'static) {
        self.prepare = Some(Box::new(prepare));
    }

    /// Payload bytes and messages received so far.
    #[must_use]
    pub fn totals(&self) -> (u64, u64) {
        (self.bytes, self.messages)
    }

    /// Is there certainly nothing new? One load; the cheap question of a spinning receiver.
    #[inline]
    #[must_use]
    pub fn quiet(&self) -> bool {
        self.current.is_none() && self.view.word(self.place.at()) != self.commit()
    }

    /// Look at the front of the lane.
    ///
    /// # Errors
    /// The sender broke the format. Every later call says so again.
    #[inline(always)]
    pub fn look(&mut self) -> Result<Seen, Fault> {
        loop {
            if let Some(front) = &self.current {
                return Ok(Seen::Data(front.left));
            }
            let at = self.place.at();
            if self.view.word(at) != self.commit() {
                return Ok(self.look_for_the_end());
            }
            let Some(header) = self.header(self.place).map_err(Fault::Header)? else {
                return Ok(Seen::Nothing);
            };
            if header.kind == self.kind && (header.len > 0 || header.kind == Kind::Message) {
                let (at, len) = (at + header.payload_at(), header.len as usize);
                self.current = Some(Front { at, left: len, len, footprint: header.footprint() });
                self.idle = 0;
            } else {
                self.pass(header)?;
            }
        }
    }

    /// The header of the record at `place`, whose commit is there; `None` while not all of it is.
    ///
    /// Where records have trailers, their bytes come in no certain order: what stands beside the
    /// commit may still be what lay there before, and counts only once the trailer is there too.
    /// Bytes that never become a good record are then as if they had not come.
    #[inline(always)]
    fn header(&self, place: Place) -> Result<Option<Header>, HeaderFault> {
        let (at, commit) = (place.at(), self.secret.wrapping_add(place.position));
        let word = self.view.word(at + 8);
        let decoded = Header::decode(word, place.to_end());
        if !self.store.trailer() {
            return match decoded? {
                Header { trailer: true, .. } => Err(HeaderFault::Reserved(1)),
                header => Ok(Some(header)),
            };
        }
        let complete = |header: &Header| {
            let (len, end) = (header.len as usize, trailer_at(header.len as usize));
            let covered = len <= COVERED_MAX;
            let words = covered.then(|| (HEADER..end).step_by(8).map(|word| self.view.word(at + word)));
            header.trailer
                && self.view.word(at + end) == trailer_word(commit, word, words)
                // What lay there may have been a header too, of another kind and as long.
                && (covered || self.view.word(at + 8) == word)
        };
        Ok(decoded.ok().filter(complete))
    }

    #[cold]
    fn look_for_the_end(&self) -> Seen {
        // The end is written after the last record, so a record seen missing and an end at this
        // very position mean that there will be none.
        let ended = self.view.word(FIN) == fin_word(self.secret, self.place.position);
        if ended { Seen::End } else { Seen::Nothing }
    }

    /// Past a record that carries nothing.
    #[cold]
    fn pass(&mut self, header: Header) -> Result<(), Fault> {
        match header.kind {
            Kind::Grow if self.place.in_large() || self.geometry.large() == 0 => return Err(Fault::Grow),
            Kind::Message | Kind::Stream if header.kind != self.kind => return Err(Fault::Kind),
            _ if self.idle >= IDLE_MAX => return Err(Fault::Idle),
            Kind::Grow => self.place.grow(self.geometry, header.footprint()),
            Kind::Skip => self.place.advance(self.place.to_end()),
            Kind::Stream | Kind::Message => self.place.advance(header.footprint()),
        }
        self.idle += 1;
        Ok(())
    }

    /// Receive from the front into `dest`: as much of the stream as there is and fits, or one
    /// message, the rest of which is lost if it does not fit.
    ///
    /// Returns the bytes stored, the bytes of the message (equal for streams) and whether the
    /// sender's bell must be rung. Call after [`Rx::look`] said `Data`.
    ///
    /// # Errors
    /// As [`Rx::look`]; what was received before the fault is kept and returned first.
    #[inline(always)]
    pub fn read(&mut self, dest: &mut Dest<'_>) -> Result<(usize, usize, Ring), Fault> {
        let room = dest.left();
        let mut ring = Ring::Quiet;
        let mut whole = 0;
        while let Some(front) = self.current {
            let len = front.left.min(dest.left());
            self.view.copy_out(front.at, len, dest);
            if self.kind == Kind::Message {
                whole = front.len;
            }
            if len == front.left || self.kind == Kind::Message {
                self.consume(front);
                if self.owes_credit() {
                    ring = self.give_credit(ring);
                }
            } else {
                self.current = Some(Front { at: front.at + len, left: front.left - len, ..front });
            }
            if self.kind == Kind::Message || dest.left() == 0 {
                break;
            }
            // A fault that follows good bytes is reported by the next call.
            if !matches!(self.look(), Ok(Seen::Data(_))) {
                break;
            }
        }
        let got = room - dest.left();
        if self.kind == Kind::Stream {
            self.bytes += got as u64;
            whole = got;
        } else {
            self.bytes += whole as u64;
        }
        self.note();
        Ok((got, whole, ring))
    }

    /// Copy from the front without consuming: what there is of the stream, or one message.
    ///
    /// Returns the bytes stored and the bytes of the message (equal for streams). Call after
    /// [`Rx::look`] said `Data`.
    pub fn peek(&mut self, dest: &mut Dest<'_>) -> (usize, usize) {
        if self.kind == Kind::Message {
            let Some((at, rest)) = self.front() else { return (0, 0) };
            let len = rest.min(dest.left());
            self.view.copy_out(at, len, dest);
            return (len, rest);
        }
        let room = dest.left();
        self.ahead(|at, len| {
            self.view.copy_out(at, len.min(dest.left()), dest);
            dest.left() > 0
        });
        let got = room - dest.left();
        (got, got)
    }

    /// How many bytes of the stream can be read at once, counted up to `limit`. A hostile sender
    /// may make this wrong, and nothing depends on it.
    #[must_use]
    pub fn available(&self, limit: usize) -> usize {
        let mut sum = 0;
        self.ahead(|_, len| {
            sum += len;
            sum < limit
        });
        sum.min(limit)
    }

    /// Show the pieces of the stream, front first, until `visit` says false: where each lies and
    /// how long it is. Stops at whatever is not a piece of a stream; [`Rx::look`] judges that.
    fn ahead(&self, mut visit: impl FnMut(usize, usize) -> bool) {
        let Some(front) = self.current else { return };
        if self.kind != Kind::Stream || !visit(front.at, front.left) {
            return;
        }
        let mut place = self.place;
        place.advance(front.footprint);
        loop {
            // As `look` does, without its consequences.
            let at = place.at();
            let commit = self.secret.wrapping_add(place.position);
            // A full turn would show the front again.
            if place.position - self.place.position >= 2 * place.capacity() as u64
                || self.view.word(at) != commit
            {
                return;
            }
            let Ok(Some(next)) = self.header(place) else { return };
            match next.kind {
                Kind::Stream if !visit(at + next.payload_at(), next.len as usize) => return,
                Kind::Stream => place.advance(next.footprint()),
                Kind::Skip => place.advance(place.to_end()),
                Kind::Grow if !place.in_large() && self.geometry.large() > 0 => {
                    place.grow(self.geometry, next.footprint());
                }
                Kind::Message | Kind::Grow => return,
            }
        }
    }

    /// Where the payload at the front lies: offset in the layout and length. It stays there until
    /// [`Rx::skip`]; the sender may still scribble over it.
    #[must_use]
    pub fn front(&self) -> Option<(usize, usize)> {
        self.current.map(|front| (front.at, front.left))
    }

    /// Consume the record at the front, as after looking at it in place.
    pub fn skip(&mut self) -> Ring {
        let Some(front) = self.current else { return Ring::Quiet };
        self.bytes += front.left as u64;
        self.consume(front);
        self.note();
        if self.owes_credit() {
            return self.give_credit(Ring::Quiet);
        }
        Ring::Quiet
    }

    /// Give the sender all credit it has not been given. Call before sleeping.
    pub fn settle(&mut self) -> Ring {
        if self.place.position == self.given { Ring::Quiet } else { self.give_credit(Ring::Quiet) }
    }

    /// Take nothing more from this lane; `state` is `TAKES_NOTHING` or `RESET`.
    ///
    /// # Errors
    /// The word could not be written; the sender will learn of it by other means.
    pub fn stop(&mut self, state: u32) -> Result<Ring, StoreFailed> {
        self.store.half(RECEIVE_STATE, state)?;
        Ok(self.look_for_sleeper(Ring::Quiet))
    }

    /// Say that this end sleeps until there is data. Look once more before sleeping; see
    /// [`Rx::prepare_to_sleep`].
    ///
    /// # Errors
    /// The arm could not be written: do not sleep.
    pub fn arm(&mut self) -> Result<(), StoreFailed> {
        self.arm = self.arm.wrapping_add(1).max(1);
        self.store.half(ARM_DATA, self.arm)?;
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Give all credit, arm, and look once more. `true`: there is nothing, and whatever comes from
    /// now on rings the bell.
    ///
    /// # Errors
    /// The arm could not be written: do not sleep.
    pub fn prepare_to_sleep(&mut self) -> Result<(bool, Ring), StoreFailed> {
        let ring = self.settle();
        self.arm()?;
        Ok((matches!(self.look(), Ok(Seen::Nothing)), ring))
    }

    /// This end is awake.
    ///
    /// # Errors
    /// The arm could not be taken back; at worst a bell rings in vain.
    pub fn disarm(&mut self) -> Result<(), StoreFailed> {
        self.store.half(ARM_DATA, 0)
    }

    /// Tell the peer on which processor this end waits.
    ///
    /// # Errors
    /// It could not be told; nothing depends on it.
    pub fn tell_cpu(&self, cpu: u32) -> Result<(), StoreFailed> {
        self.store.half(CPU, cpu.wrapping_add(1))
    }

    /// The processor on which the peer waited last, if it said.
    #[must_use]
    pub fn peer_cpu(&self) -> Option<u32> {
        self.view.half(CPU).checked_sub(1)
    }

    #[inline]
    fn commit(&self) -> u64 {
        self.secret.wrapping_add(self.place.position)
    }

    /// Enough was consumed, or the sender sleeps for want of space.
    #[inline]
    fn owes_credit(&self) -> bool {
        let step = (self.place.capacity() / CREDIT_SHARE) as u64;
        self.place.position - self.given >= step || self.view.half(ARM_SPACE) != 0
    }

    #[inline]
    fn consume(&mut self, front: Front) {
        self.current = None;
        self.messages += 1;
        self.place.advance(front.footprint);
        debug_assert_eq!(self.place.at() % ALIGN, 0);
    }

    /// The sender may be writing there: if the memory cannot be prepared now, it may later.
    fn prepare_large(&mut self) {
        if self.place.in_large() && self.attempts < PREPARE_ATTEMPTS {
            self.attempts += 1;
            if self.prepare.as_ref().is_none_or(|prepare| prepare()) {
                self.attempts = PREPARE_ATTEMPTS;
            }
        }
    }

    #[cold]
    fn give_credit(&mut self, before: Ring) -> Ring {
        let credit = self.place.position;
        // A lost credit word is as if the receiver were slow; the sender's sleep has a limit.
        let told = self.store.pair(CREDIT, credit, credit ^ self.secret);
        if told.is_ok() {
            self.given = credit;
        }
        self.prepare_large();
        self.look_for_sleeper(before)
    }

    fn look_for_sleeper(&mut self, before: Ring) -> Ring {
        fence(Ordering::SeqCst);
        let arm = self.view.half(ARM_SPACE);
        if arm == 0 || arm == self.rung {
            return before;
        }
        self.rung = arm;
        Ring::Bell
    }

    /// Count bytes that came on another way.
    pub fn count(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        self.note();
    }

    #[inline]
    fn note(&self) {
        self.store.counter(COUNTER_RX_BYTES, self.bytes);
        self.store.counter(COUNTER_RX_MESSAGES, self.messages);
    }
}
