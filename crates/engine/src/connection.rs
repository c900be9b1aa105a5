//! A connection: two lanes and a bell.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::Duration;

use isthmus_proto::spin::{GUEST, LOCAL, Spin};
use isthmus_ring::layout::{COUNTERS_LEN, RESET, TAKES_NOTHING};
use isthmus_ring::{Dest, Mapped, Region, Ring, Room, Rx, Seen, Source, StoreFailed, Tx};
use isthmus_sys::cpu;
use isthmus_wire::control::{Carrier, SocketKind, TICKET};

use crate::bell::{Bell, Woken};
use crate::datagram::Datagram;
use crate::error::{Error, Result};
use crate::lane::{AnyStore, Ends};
use crate::lock;
use crate::node::{Attachment, Node};
use crate::readiness::Readiness;
use crate::wait::{How, Place, spin};
use crate::window::Windows;

/// What the broker said when it made the connection.
#[derive(Clone, Debug)]
pub struct Info {
    pub id: u64,
    pub kind: SocketKind,
    pub carrier: Carrier,
    /// Port on this side.
    pub port: u32,
    pub peer: u32,
    pub peer_name: String,
    pub peer_port: u32,
    /// Why this carrier, in words.
    pub why: String,
    /// This side called `connect`.
    pub opener: bool,
    pub ticket: [u8; TICKET],
    pub small: u32,
    pub large: u32,
    /// Ring sizes of the other side: small, large.
    pub theirs: (u32, u32),
}

impl Info {
    /// Tells the connections of one attachment apart: a program connected to itself has both ends
    /// of one number.
    #[must_use]
    pub fn key(&self) -> u64 {
        key(self.id, self.opener)
    }
}

pub(crate) fn key(id: u64, opener: bool) -> u64 {
    id << 1 | u64::from(opener)
}

/// So many receives of such lengths, bytes, without a send between them are a stream. Shorter ones
/// may be urgent, and in longer ones the copy itself lets the sender get ahead.
const STREAMING: u32 = 16;
const STREAM_BYTES: std::ops::Range<usize> = 1024..16 * 1024;
/// Pauses between two looks at an empty stream: about half a microsecond.
const STREAM_GAP: u32 = 32;

const CLOSED: u8 = 1;
const SHUT_RECEIVE: u8 = 2;
const SHUT_SEND: u8 = 4;

struct TxSide {
    tx: Tx<AnyStore, Mapped>,
    /// Bytes of the lane that a caller is filling.
    reserved: Option<usize>,
    spin: Spin,
    /// Threads that sleep until there is space. The last one disarms.
    asleep: u32,
}

struct RxSide {
    rx: Rx<AnyStore, Mapped>,
    spin: Spin,
    /// Threads that sleep until there is data. The last one disarms.
    asleep: u32,
    /// A reset was reported; after it comes the end, as with kernel sockets.
    reset_told: bool,
    told_cpu: u32,
}

pub struct Connection {
    pub info: Info,
    tx: Mutex<TxSide>,
    rx: Mutex<RxSide>,
    bell: Bell,
    state: AtomicU8,
    cut: OnceLock<String>,
    broken: AtomicBool,
    /// Long pieces received since this side last sent: many mean that the peer streams.
    one_way: AtomicU32,
    counters: Region,
    view: Region,
    /// To show to a restarted broker; in a guest the switch does that.
    counters_fd: Option<OwnedFd>,
    readiness: OnceLock<Arc<Readiness>>,
    /// The datagram socket this lane belongs to, if it is to be told of news.
    owner: OnceLock<Weak<Datagram>>,
    node: Weak<Node>,
    windows: Windows,
    _attachment: Option<Arc<Attachment>>,
    /// The peer runs on no processor of this kernel.
    in_guest: bool,
    /// It was opened, and whoever asked for it does not have it yet.
    unclaimed: AtomicBool,
    generation: u32,
}

/// What a non-waiting attempt found.
enum Try<T> {
    Done(T),
    Wait,
}

impl Connection {
    pub(crate) fn new(
        info: Info,
        ends: Ends,
        bell: OwnedFd,
        counters_fd: Option<OwnedFd>,
        node: Option<&Arc<Node>>,
    ) -> Arc<Self> {
        let Ends { tx, rx, counters, view } = ends;
        // Without a page to show this is a program in a guest.
        let in_guest = counters_fd.is_none();
        let spin = Spin::new(if in_guest { GUEST } else { LOCAL });
        Arc::new(Self {
            info,
            tx: Mutex::new(TxSide { tx, reserved: None, spin, asleep: 0 }),
            rx: Mutex::new(RxSide { rx, spin, asleep: 0, reset_told: false, told_cpu: u32::MAX }),
            bell: Bell::new(bell),
            state: AtomicU8::new(0),
            cut: OnceLock::new(),
            broken: AtomicBool::new(false),
            one_way: AtomicU32::new(0),
            counters,
            view,
            counters_fd,
            readiness: OnceLock::new(),
            owner: OnceLock::new(),
            node: node.map_or_else(Weak::new, Arc::downgrade),
            windows: Windows::default(),
            _attachment: node.and_then(|node| node.keep()),
            in_guest,
            unclaimed: AtomicBool::new(false),
            generation: cpu::generation(),
        })
    }

    /// Bytes and messages sent, bytes and messages received.
    #[must_use]
    pub fn totals(&self) -> [u64; COUNTERS_LEN] {
        std::array::from_fn(|i| self.counters.read_counter(i))
    }

    /// Longest message, bytes.
    #[must_use]
    pub fn message_max(&self) -> usize {
        lock(&self.tx).tx.message_max()
    }

    /// Bytes of ring that hold what the peer has not received yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        lock(&self.tx).tx.in_flight()
    }

    /// What can be received at once: bytes of the stream's first piece, or of the next message.
    #[must_use]
    pub fn pending(&self) -> usize {
        match lock(&self.rx).rx.look() {
            Ok(Seen::Data(len)) => len,
            _ => 0,
        }
    }

    /// How many bytes of the stream can be received at once, counted up to `limit`; a hint.
    #[must_use]
    pub fn available(&self, limit: usize) -> usize {
        lock(&self.rx).rx.available(limit)
    }

    #[must_use]
    pub fn closed(&self) -> bool {
        self.state.load(Ordering::Acquire) & CLOSED != 0
    }

    /// Is the other side still there, as far as is known?
    #[must_use]
    pub fn peer_gone(&self) -> bool {
        self.bell.gone()
    }

    /// The descriptor that becomes readable when a sleeper is to look again; for event loops.
    #[must_use]
    pub fn bell(&self) -> &Bell {
        &self.bell
    }

    pub(crate) fn counters_fd(&self) -> Option<BorrowedFd<'_>> {
        self.counters_fd.as_ref().map(std::os::fd::AsFd::as_fd)
    }

    /// Count bytes that did not go through the rings.
    pub(crate) fn count(&self, sent: u64, received: u64) {
        if sent > 0 {
            lock(&self.tx).tx.count(sent);
        }
        if received > 0 {
            lock(&self.rx).rx.count(received);
        }
    }

    pub(crate) fn windows(&self) -> &Windows {
        &self.windows
    }

    pub(crate) fn node(&self) -> Option<Arc<Node>> {
        self.node.upgrade()
    }

    pub(crate) fn in_guest(&self) -> bool {
        self.in_guest
    }

    pub(crate) fn generation(&self) -> u32 {
        self.generation
    }

    /// The memory in which received records lie, for views in place.
    #[must_use]
    pub fn view(&self) -> &Region {
        &self.view
    }

    #[inline]
    fn check(&self) -> Result<()> {
        if self.generation != cpu::generation() {
            return Err(Error::Forked);
        }
        if self.state.load(Ordering::Acquire) & CLOSED != 0 {
            return Err(Error::Closed);
        }
        if let Some(text) = self.cut.get() {
            return Err(Error::Cut { text: text.clone() });
        }
        Ok(())
    }

    fn reset(&self, done: usize) -> Error {
        let Info { peer_name, peer_port, .. } = &self.info;
        Error::Reset { done, peer: format!("{peer_name}:{peer_port}") }
    }

    fn memory(&self, failed: StoreFailed) -> Error {
        self.broken.store(true, Ordering::Release);
        Error::Memory { errno: failed.errno }
    }

    fn ring(&self, ring: Ring) {
        if ring == Ring::Bell {
            self.bell.ring();
        }
    }

    // ---- sending

    /// Send all of `source` as bytes of the stream; returns how many that were.
    ///
    /// # Errors
    /// The error carries how many bytes are in the lane: they will be received unless the peer
    /// dies.
    pub fn send_stream(&self, source: &mut Source<'_>, how: &How<'_>) -> Result<usize> {
        let asked = source.left();
        self.send(how, |side| {
            if source.left() == 0 {
                return Ok((Try::Done(()), Ring::Quiet, asked));
            }
            let written = side.tx.write_stream(source).map_err(|e| self.memory(e))?;
            let step = if written.all { Try::Done(()) } else { Try::Wait };
            Ok((step, written.ring, asked - source.left()))
        })?;
        Ok(asked)
    }

    /// Send `source` as one message, whole or not at all.
    ///
    /// # Errors
    /// Nothing was sent.
    pub fn send_message(&self, source: &mut Source<'_>, how: &How<'_>) -> Result<()> {
        self.send(how, |side| {
            let written = side.tx.write_message(source)?.map_err(|e| self.memory(e))?;
            let step = if written.all { Try::Done(()) } else { Try::Wait };
            Ok((step, written.ring, 0))
        })
    }

    /// Send one message if there is room for it now; `false`: there is none. Makes no system call unless the peer sleeps.
    ///
    /// # Errors
    /// As [`Connection::send_message`]: nothing was sent.
    #[inline]
    pub fn try_send_message(&self, source: &mut Source<'_>) -> Result<bool> {
        self.check()?;
        let mut side = lock(&self.tx);
        self.may_send(&side, 0)?;
        if side.reserved.is_some() {
            return Err(Error::Reserved);
        }
        let written = side.tx.write_message(source)?.map_err(|e| self.memory(e))?;
        drop(side);
        self.ring(written.ring);
        Ok(written.all)
    }

    /// Wait for room for `len` bytes, of the stream or of one message, which the caller fills where the returned
    /// address says and then sends with [`Connection::commit`] or gives up with [`Connection::abandon`]. Until then
    /// nothing else can be sent. The memory stays mapped while this connection lives.
    ///
    /// `None`: what this carrier's lane reads cannot be written in place; abandon, and send it from elsewhere.
    ///
    /// # Errors
    /// As [`Connection::send_message`]; nothing is reserved.
    pub fn reserve(&self, len: usize, how: &How<'_>) -> Result<Option<*mut u8>> {
        let mut place = None;
        self.send(how, |side| {
            match side.tx.reserve(len)?.map_err(|e| self.memory(e))? {
                Room::Full(ring) => return Ok((Try::Wait, ring, 0)),
                Room::Here(here) => place = Some(here),
                Room::Elsewhere => {}
            }
            side.reserved = Some(len);
            Ok((Try::Done(()), Ring::Quiet, 0))
        })?;
        Ok(place)
    }

    /// Send what was reserved and filled.
    ///
    /// # Errors
    /// As [`Connection::send_message`]; nothing is reserved any more.
    pub fn commit(&self) -> Result<()> {
        let mut side = lock(&self.tx);
        let Some(len) = side.reserved.take() else { return Ok(()) };
        self.check()?;
        self.may_send(&side, 0)?;
        if len == 0 && self.info.kind == SocketKind::Stream {
            return Ok(());
        }
        let kind = crate::lane::record_kind(self.info.kind);
        let ring = side.tx.commit(kind, len).map_err(|e| self.memory(e))?;
        drop(side);
        self.ring(ring);
        self.refresh();
        Ok(())
    }

    /// Send nothing of what was reserved.
    pub fn abandon(&self) {
        lock(&self.tx).reserved = None;
    }

    fn send(
        &self,
        how: &How<'_>,
        mut step: impl FnMut(&mut TxSide) -> Result<(Try<()>, Ring, usize)>,
    ) -> Result<()> {
        let mut done = 0;
        loop {
            self.check()?;
            let mut side = lock(&self.tx);
            if self.one_way.load(Ordering::Relaxed) != 0 {
                self.one_way.store(0, Ordering::Relaxed);
            }
            self.may_send(&side, done)?;
            if side.reserved.is_some() {
                return Err(Error::Reserved);
            }
            let (tried, ring, so_far) = step(&mut side)?;
            done = so_far;
            self.ring(ring);
            match tried {
                Try::Done(()) => {
                    drop(side);
                    self.refresh();
                    return Ok(());
                }
                Try::Wait if how.now => {
                    drop(side);
                    if self.bell.glance() && done == 0 {
                        return Err(self.peer_is_gone(done));
                    }
                    self.refresh();
                    return Err(Error::WouldBlock { done });
                }
                Try::Wait => self.wait_for_space(side, how, done)?,
            }
        }
    }

    #[inline]
    fn may_send(&self, side: &TxSide, done: usize) -> Result<()> {
        let broken = side.tx.finished() || self.broken.load(Ordering::Relaxed);
        if !broken && side.tx.open() && !self.bell.gone() {
            return Ok(());
        }
        Err(self.why_not_send(side, broken, done))
    }

    #[cold]
    fn why_not_send(&self, side: &TxSide, broken: bool, done: usize) -> Error {
        if !broken && side.tx.peer_takes() == RESET { self.take_reset(done) } else { Error::Pipe { done } }
    }

    fn peer_is_gone(&self, done: usize) -> Error {
        match self.cut.get() {
            Some(text) => Error::Cut { text: text.clone() },
            None => Error::Pipe { done },
        }
    }

    fn wait_for_space(&self, mut side: MutexGuard<'_, TxSide>, how: &How<'_>, done: usize) -> Result<()> {
        if how.expired() {
            return Err(Error::TimedOut { done });
        }
        let TxSide { tx, spin: budget, asleep, .. } = &mut *side;
        let place = self.before_spinning();
        let peer_cpu = tx.peer_cpu();
        if spin(how.wait, budget, place, peer_cpu, 0, |_| tx.has_space() || !tx.open()) {
            return Ok(());
        }
        if how.wait == crate::wait::Wait::Spin {
            drop(side);
            self.bell.glance();
            return self.stop_wanted(how, done);
        }
        let ticket = self.bell.ticket();
        tx.arm().map_err(|e| self.memory(e))?;
        if tx.has_space() || !tx.open() {
            if *asleep == 0 {
                let _ = tx.disarm();
            }
            return Ok(());
        }
        *asleep += 1;
        drop(side);
        let woken = self.bell.wait(ticket, how.left(Duration::MAX));
        {
            let mut side = lock(&self.tx);
            side.asleep -= 1;
            if side.asleep == 0 {
                let _ = side.tx.disarm();
            }
        }
        // What we were woken for may be news for an event loop.
        self.refresh();
        if woken == Woken::Signal { self.stop_wanted(how, done) } else { Ok(()) }
    }

    fn stop_wanted(&self, how: &How<'_>, done: usize) -> Result<()> {
        if how.wants_to_stop() { Err(Error::Interrupted { done }) } else { Ok(()) }
    }

    // ---- receiving

    /// Receive into `dest`: what there is of the stream, or one message. Returns the bytes stored
    /// and the length of the message (equal for streams). `(0, 0)` is the end.
    ///
    /// # Errors
    /// Nothing was received.
    pub fn receive(&self, dest: &mut Dest<'_>, how: &How<'_>) -> Result<(usize, usize)> {
        if dest.left() == 0 && self.info.kind == SocketKind::Stream {
            self.check()?;
            return Ok((0, 0));
        }
        self.receive_with(how, |rx| {
            let (got, whole, ring) = rx.read(dest)?;
            self.ring(ring);
            Ok((got, whole))
        })
        .map(|got| got.unwrap_or((0, 0)))
    }

    /// As [`Connection::receive`], without consuming.
    ///
    /// # Errors
    /// As [`Connection::receive`].
    pub fn peek(&self, dest: &mut Dest<'_>, how: &How<'_>) -> Result<(usize, usize)> {
        self.receive_with(how, |rx| Ok(rx.peek(dest))).map(|got| got.unwrap_or((0, 0)))
    }

    /// Fill `dest` from the stream; fewer bytes only at the end of it.
    ///
    /// # Errors
    /// Carries how many bytes were received into `dest` before.
    pub fn receive_all(&self, dest: &mut Dest<'_>, how: &How<'_>) -> Result<usize> {
        let room = dest.left();
        while dest.left() > 0 {
            match self.receive(dest, how) {
                Ok((0, _)) => break,
                Ok(_) => {}
                Err(error) => return Err(error.after(room - dest.left())),
            }
        }
        Ok(room - dest.left())
    }

    /// Where the next record's payload lies (offset in [`Connection::view`], bytes); `None` at the
    /// end. It stays until [`Connection::release_front`]. Streams give the first piece.
    ///
    /// # Errors
    /// As [`Connection::receive`].
    pub fn front(&self, how: &How<'_>) -> Result<Option<(usize, usize)>> {
        self.receive_with(how, |rx| Ok(rx.front())).map(Option::flatten)
    }

    /// Consume what [`Connection::front`] showed.
    pub fn release_front(&self) {
        let ring = lock(&self.rx).rx.skip();
        self.ring(ring);
        self.refresh();
    }

    /// Wait until `take` can be called on data; `None` at the end of the lane.
    fn receive_with<T>(
        &self,
        how: &How<'_>,
        mut take: impl FnMut(&mut Rx<AnyStore, Mapped>) -> Result<T>,
    ) -> Result<Option<T>> {
        loop {
            self.check()?;
            let mut side = lock(&self.rx);
            if !how.now && side.rx.quiet() {
                // Most waits end here, with the side still locked.
                self.spin_for_data(&mut side, how);
            }
            let shut = self.state.load(Ordering::Acquire) & SHUT_RECEIVE != 0;
            // In this order: whatever the peer published before it died is seen after its death is.
            let gone = self.bell.gone();
            match side.rx.look()? {
                Seen::Data(len) => {
                    let taken = take(&mut side.rx)?;
                    drop(side);
                    let pieces = if STREAM_BYTES.contains(&len)
                        || len >= STREAM_BYTES.end && self.info.carrier == Carrier::Put
                    {
                        self.one_way.load(Ordering::Relaxed).saturating_add(1)
                    } else {
                        0
                    };
                    self.one_way.store(pieces, Ordering::Relaxed);
                    self.refresh();
                    return Ok(Some(taken));
                }
                // As with kernel sockets: what arrived before can still be received.
                Seen::Nothing if shut => return Ok(None),
                Seen::End => return self.end_of_lane(&mut side),
                Seen::Nothing if gone => return self.end_of_a_dead_peer(&mut side),
                Seen::Nothing => {}
            }
            if how.now {
                self.ring(side.rx.settle());
                drop(side);
                if self.bell.glance() && !gone {
                    continue;
                }
                self.refresh();
                return Err(Error::WouldBlock { done: 0 });
            }
            self.wait_for_data(side, how)?;
        }
    }

    /// The peer finished: the end, or first a reset if it closed over unread data.
    fn end_of_lane<T>(&self, side: &mut RxSide) -> Result<Option<T>> {
        let reset = lock(&self.tx).tx.peer_takes() == RESET;
        if reset && !side.reset_told {
            side.reset_told = true;
            return Err(self.reset(0));
        }
        Ok(None)
    }

    fn end_of_a_dead_peer<T>(&self, side: &mut RxSide) -> Result<Option<T>> {
        if side.reset_told {
            return Ok(None);
        }
        side.reset_told = true;
        Err(self.reset(0))
    }

    fn take_reset(&self, done: usize) -> Error {
        // Sending after the peer's reset: the first time the reset, then a broken pipe.
        match self.rx.try_lock() {
            Ok(mut side) if !side.reset_told => {
                side.reset_told = true;
                self.reset(done)
            }
            _ => Error::Pipe { done },
        }
    }

    /// How to wait here, once whoever was rung for can hear it.
    fn before_spinning(&self) -> Place {
        if self.in_guest {
            self.bell.let_out();
        }
        if !self.in_guest {
            Place::Local
        } else if cpu::online() < 2 {
            Place::SmallGuest
        } else {
            Place::Guest
        }
    }

    /// Spin until there is something or the budget is used up.
    fn spin_for_data(&self, side: &mut RxSide, how: &How<'_>) {
        let RxSide { rx, spin: budget, .. } = side;
        let place = self.before_spinning();
        let peer_cpu = rx.peer_cpu();
        let gap = if self.one_way.load(Ordering::Relaxed) >= STREAMING { STREAM_GAP } else { 0 };
        spin(how.wait, budget, place, peer_cpu, gap, |thorough| {
            // The end of the lane is not a record: look for it now and then. And a record that
            // has begun may never be completed: only a whole one is worth waking for.
            (thorough || !rx.quiet()) && !matches!(rx.look(), Ok(Seen::Nothing))
        });
    }

    fn wait_for_data(&self, mut side: MutexGuard<'_, RxSide>, how: &How<'_>) -> Result<()> {
        if how.expired() {
            return Err(Error::TimedOut { done: 0 });
        }
        let RxSide { rx, asleep, told_cpu, .. } = &mut *side;
        if how.wait == crate::wait::Wait::Spin {
            let ring = rx.settle();
            self.ring(ring);
            drop(side);
            self.bell.glance();
            return self.stop_wanted(how, 0);
        }
        let here = cpu::current();
        if *told_cpu != here {
            *told_cpu = here;
            let _ = rx.tell_cpu(here);
        }
        let ticket = self.bell.ticket();
        let (quiet, ring) = rx.prepare_to_sleep().map_err(|e| self.memory(e))?;
        self.ring(ring);
        if !quiet {
            if *asleep == 0 {
                let _ = rx.disarm();
            }
            return Ok(());
        }
        *asleep += 1;
        drop(side);
        let woken = self.bell.wait(ticket, how.left(Duration::MAX));
        {
            let mut side = lock(&self.rx);
            side.asleep -= 1;
            if side.asleep == 0 {
                let _ = side.rx.disarm();
            }
        }
        self.refresh();
        if woken == Woken::Signal { self.stop_wanted(how, 0) } else { Ok(()) }
    }

    // ---- ending

    /// No more sending: the peer receives everything and then the end.
    pub fn shut_send(&self) {
        self.state.fetch_or(SHUT_SEND, Ordering::AcqRel);
        let mut side = lock(&self.tx);
        if !side.tx.finished() {
            let ring = side.tx.finish();
            self.ring(ring.unwrap_or(Ring::Bell));
        }
        drop(side);
        self.both_shut();
        self.refresh();
    }

    /// No more receiving: the peer's next send fails.
    pub fn shut_receive(&self) {
        self.state.fetch_or(SHUT_RECEIVE, Ordering::AcqRel);
        let ring = lock(&self.rx).rx.stop(TAKES_NOTHING);
        self.ring(ring.unwrap_or(Ring::Bell));
        self.both_shut();
        self.refresh();
    }

    /// Nothing is left to hear: wake whoever sleeps here.
    fn both_shut(&self) {
        let both = SHUT_RECEIVE | SHUT_SEND;
        if self.state.load(Ordering::Acquire) & both == both {
            self.bell.shut();
        } else {
            self.bell.wake_followers();
        }
    }

    /// Until [`Connection::claim`], nobody can send here: to the other side its end is no stream that ends in order.
    pub(crate) fn leave_unclaimed(&self) {
        self.unclaimed.store(true, Ordering::Release);
    }

    /// Whoever asked for this connection has it.
    pub fn claim(&self) {
        self.unclaimed.store(false, Ordering::Release);
    }

    /// Finish both directions and tell the broker. What was sent is delivered. Harmless when
    /// repeated.
    pub fn close(&self) {
        self.end(self.unclaimed.load(Ordering::Acquire));
    }

    /// As [`Connection::close`], but the peer hears a reset behind what was sent, as if this side had died: what it
    /// received may not be everything.
    pub fn abort(&self) {
        self.end(true);
    }

    fn end(&self, abort: bool) {
        if self.state.fetch_or(CLOSED, Ordering::AcqRel) & CLOSED != 0 || self.generation != cpu::generation()
        {
            return;
        }
        {
            let mut side = lock(&self.rx);
            let unread = matches!(side.rx.look(), Ok(Seen::Data(_)));
            let _ = side.rx.stop(if unread || abort { RESET } else { TAKES_NOTHING });
        }
        if !abort {
            let mut side = lock(&self.tx);
            if !side.tx.finished() {
                let _ = side.tx.finish();
            }
        }
        self.forget_windows();
        // Wakes the peer whatever it waits for, and our own waiters.
        self.bell.shut();
        if let Some(readiness) = self.readiness.get() {
            readiness.set(true, true);
        }
        if let Some(node) = self.node.upgrade() {
            node.closed(self);
        }
    }

    /// The broker's order: both directions end here and now.
    pub(crate) fn cut(&self, text: &str) {
        let _ = self.cut.set(text.to_owned());
        self.bell.shut();
        if let Some(readiness) = self.readiness.get() {
            readiness.set(true, true);
        }
    }
}

impl Error {
    /// The same error, after `done` bytes.
    pub(crate) fn after(self, done: usize) -> Self {
        match self {
            Self::WouldBlock { .. } => Self::WouldBlock { done },
            Self::TimedOut { .. } => Self::TimedOut { done },
            Self::Interrupted { .. } => Self::Interrupted { done },
            Self::Pipe { .. } => Self::Pipe { done },
            Self::Reset { peer, .. } => Self::Reset { done, peer },
            other => other,
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

mod events;
pub use events::Front;
#[cfg(test)]
mod tests;
