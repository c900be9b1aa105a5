//! The receiving end of a lane.

use std::fmt;

use isthmus_wire::record::{ALIGN, Header, HeaderFault, Kind, trailer_at};

use crate::layout::{
    ARM_DATA, ARM_SPACE, COUNTER_RX_BYTES, COUNTER_RX_MESSAGES, CPU, CREDIT, CREDIT_SHARE, FIN, Geometry,
    RECEIVE_STATE, Stage, fin_word,
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

/// The receiving end. One owner; not for sharing between threads.
pub struct Rx<S, V> {
    store: S,
    view: V,
    geometry: Geometry,
    secret: u64,
    kind: Kind,
    stage: Stage,
    position: u64,
    offset: usize,
    /// The record at the front, validated, and how much of its payload was received.
    current: Option<(Header, usize)>,
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
            stage: Stage::Small,
            position: 0,
            offset: 0,
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
        self.current.is_none() && self.view.word(self.stage.base() + self.offset) != self.commit()
    }

    /// Look at the front of the lane.
    ///
    /// # Errors
    /// The sender broke the format. Every later call says so again.
    pub fn look(&mut self) -> Result<Seen, Fault> {
        loop {
            if let Some((header, taken)) = self.current {
                return Ok(Seen::Data(header.len as usize - taken));
            }
            let at = self.stage.base() + self.offset;
            if self.view.word(at) != self.commit() {
                // The end is written after the last record, so a record seen missing here and an
                // end at this very position mean that there will be none.
                let ended = self.view.word(FIN) == fin_word(self.secret, self.position);
                return Ok(if ended { Seen::End } else { Seen::Nothing });
            }
            let to_end = self.stage.capacity(self.geometry) - self.offset;
            let header = Header::decode(self.view.word(at + 8), to_end).map_err(Fault::Header)?;
            if header.trailer {
                let trailer = at + trailer_at(header.len as usize);
                if self.view.word(trailer) != !self.commit() {
                    return Ok(Seen::Nothing);
                }
            }
            match header.kind {
                Kind::Grow if self.stage == Stage::Large || self.geometry.large() == 0 => {
                    return Err(Fault::Grow);
                }
                Kind::Message | Kind::Stream if header.kind != self.kind => return Err(Fault::Kind),
                Kind::Stream if header.len > 0 => self.take(header),
                Kind::Message => self.take(header),
                _ if self.idle >= IDLE_MAX => return Err(Fault::Idle),
                kind => {
                    self.idle += 1;
                    match kind {
                        Kind::Grow => self.grow(header),
                        Kind::Skip => self.advance(to_end),
                        Kind::Stream | Kind::Message => self.advance(header.footprint()),
                    }
                }
            }
        }
    }

    fn take(&mut self, header: Header) {
        self.current = Some((header, 0));
        self.idle = 0;
    }

    fn grow(&mut self, header: Header) {
        self.position += header.footprint() as u64;
        self.stage = Stage::Large;
        self.offset = 0;
    }

    /// Receive from the front into `dest`: as much of the stream as there is and fits, or one
    /// message, the rest of which is lost if it does not fit.
    ///
    /// Returns the bytes stored, the bytes of the message (equal for streams) and whether the
    /// sender's bell must be rung. Call after [`Rx::look`] said `Data`.
    ///
    /// # Errors
    /// As [`Rx::look`]; what was received before the fault is kept and returned first.
    pub fn read(&mut self, dest: &mut Dest<'_>) -> Result<(usize, usize, Ring), Fault> {
        let room = dest.left();
        let mut ring = Ring::Quiet;
        let mut whole = 0;
        while let Some((header, taken)) = self.current {
            let at = self.stage.base() + self.offset + header.payload_at() + taken;
            let rest = header.len as usize - taken;
            let len = rest.min(dest.left());
            self.view.copy_out(at, len, dest);
            if self.kind == Kind::Message {
                whole = header.len as usize;
            }
            if len == rest || self.kind == Kind::Message {
                self.consume(header);
                if self.position - self.given >= self.credit_step() || self.view.half(ARM_SPACE) != 0 {
                    ring = self.give_credit(ring);
                }
            } else {
                self.current = Some((header, taken + len));
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
        let Some((mut header, mut taken)) = self.current else { return };
        let (mut position, mut offset, mut stage) = (self.position, self.offset, self.stage);
        loop {
            let at = stage.base() + offset + header.payload_at() + taken;
            if header.kind == Kind::Stream && !visit(at, header.len as usize - taken) {
                return;
            }
            let capacity = stage.capacity(self.geometry);
            let step = if header.kind == Kind::Skip { capacity - offset } else { header.footprint() };
            position += step as u64;
            offset += step;
            if offset >= capacity {
                offset = 0;
            }
            if header.kind == Kind::Grow {
                (stage, offset) = (Stage::Large, 0);
            }
            // As `look` does, without its consequences.
            let at = stage.base() + offset;
            let commit = self.secret.wrapping_add(position);
            // A full turn would show the front again.
            if position - self.position >= 2 * stage.capacity(self.geometry) as u64
                || self.view.word(at) != commit
            {
                return;
            }
            let to_end = stage.capacity(self.geometry) - offset;
            let Ok(next) = Header::decode(self.view.word(at + 8), to_end) else { return };
            if next.trailer && self.view.word(at + trailer_at(next.len as usize)) != !commit {
                return;
            }
            match next.kind {
                Kind::Stream | Kind::Skip => {}
                Kind::Grow if stage == Stage::Small && self.geometry.large() > 0 => {}
                _ => return,
            }
            (header, taken) = (next, 0);
        }
    }

    /// Where the payload at the front lies: offset in the layout and length. It stays there until
    /// [`Rx::skip`]; the sender may still scribble over it.
    #[must_use]
    pub fn front(&self) -> Option<(usize, usize)> {
        let (header, taken) = self.current?;
        let at = self.stage.base() + self.offset + header.payload_at() + taken;
        Some((at, header.len as usize - taken))
    }

    /// Consume the record at the front, as after looking at it in place.
    pub fn skip(&mut self) -> Ring {
        let Some((header, taken)) = self.current else { return Ring::Quiet };
        self.bytes += (header.len as usize - taken) as u64;
        self.consume(header);
        self.note();
        if self.position - self.given >= self.credit_step() || self.view.half(ARM_SPACE) != 0 {
            return self.give_credit(Ring::Quiet);
        }
        Ring::Quiet
    }

    /// Give the sender all credit it has not been given. Call before sleeping.
    pub fn settle(&mut self) -> Ring {
        if self.position == self.given { Ring::Quiet } else { self.give_credit(Ring::Quiet) }
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

    fn commit(&self) -> u64 {
        self.secret.wrapping_add(self.position)
    }

    fn credit_step(&self) -> u64 {
        (self.stage.capacity(self.geometry) / CREDIT_SHARE) as u64
    }

    fn consume(&mut self, header: Header) {
        self.current = None;
        self.messages += 1;
        self.advance(header.footprint());
    }

    fn advance(&mut self, by: usize) {
        self.position += by as u64;
        self.offset += by;
        debug_assert_eq!(self.offset % ALIGN, 0);
        if self.offset >= self.stage.capacity(self.geometry) {
            self.offset = 0;
        }
    }

    /// The sender may be writing there: if the memory cannot be prepared now, it may later.
    fn prepare_large(&mut self) {
        if self.stage == Stage::Large && self.attempts < PREPARE_ATTEMPTS {
            self.attempts += 1;
            if self.prepare.as_ref().is_none_or(|prepare| prepare()) {
                self.attempts = PREPARE_ATTEMPTS;
            }
        }
    }

    fn give_credit(&mut self, before: Ring) -> Ring {
        let credit = self.position;
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

    fn note(&self) {
        self.store.counter(COUNTER_RX_BYTES, self.bytes);
        self.store.counter(COUNTER_RX_MESSAGES, self.messages);
    }
}
