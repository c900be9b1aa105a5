//! Every interleaving of a sender and a receiver, and every order in which a weak memory may show
//! one what the other wrote.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p isthmus-ring --release --test loom --target-dir target/loom
//! ```
//!
//! The code under test is `Tx` and `Rx` themselves. Only the memory is a model: the words that
//! these few records touch are loom's atomics, and each payload is one loom cell, so that a
//! payload read before it is complete, or overwritten before its credit came, is reported as the
//! data race it is. A sleeper whose bell never rings is reported as a deadlock.
//!
//! What was tried to see each model red is in docs/decisions/0013-model-checking.md.
#![cfg(loom)]

use std::collections::HashMap;

use isthmus_ring::layout::{
    ARM_DATA, ARM_SPACE, CPU, CREDIT, CREDIT_CHECK, FIN, LARGE_AT, RECEIVE_STATE, SMALL_AT, TAKES_NOTHING,
};
use isthmus_ring::sync::{AtomicU32, AtomicU64, Ordering};
use isthmus_ring::{Dest, Geometry, Ring, Rx, Seen, Source, Store, StoreFailed, Tx, View};
use isthmus_wire::record::{
    ALIGN, COVERED_MAX, Header, Kind, footprint, payload_at, trailer_at, trailer_word,
};
use loom::cell::UnsafeCell;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

const SECRET: u64 = 0x1234_5678_9abc_def1;
/// The smallest ring there is.
const RING: u32 = 4096;
/// A payload whose record fills the whole ring: there is one slot, and every record is in it.
const FILLS: usize = RING as usize - ALIGN;
/// The shortest payload: a ring full of records of it has 64.
const TINY: usize = 1;

/// How the writer's stores are ordered; the weaker ones show that the models can fail.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    /// As `Mapped` does it.
    Release,
    /// The commit is visible before the payload is.
    Relaxed,
    /// The commit is written before the payload is.
    CommitFirst,
}

/// One party's memory: what it writes and the other reads.
struct Memory {
    words: HashMap<usize, AtomicU64>,
    halves: HashMap<usize, AtomicU32>,
    /// A payload's first byte stands for all of it.
    payloads: HashMap<usize, UnsafeCell<u8>>,
    /// Whether the large ring may be used.
    prepared: UnsafeCell<bool>,
    order: Order,
}

// SAFETY: loom runs one thread at a time, and reports unordered use of a cell.
unsafe impl Sync for Memory {}

impl Memory {
    /// With `slots`: offsets of records, each with the length of its payload.
    fn new(slots: &[(usize, usize)], order: Order) -> Arc<Self> {
        let mut words = vec![CREDIT, CREDIT_CHECK, FIN];
        for (at, len) in slots {
            words.extend([*at, at + 8, at + trailer_at(*len)]);
        }
        Arc::new(Self {
            words: words.into_iter().map(|at| (at, AtomicU64::new(0))).collect(),
            halves: [ARM_DATA, ARM_SPACE, CPU, RECEIVE_STATE]
                .into_iter()
                .map(|at| (at, AtomicU32::new(0)))
                .collect(),
            payloads: slots.iter().map(|(at, len)| (at + payload_at(*len), UnsafeCell::new(0))).collect(),
            prepared: UnsafeCell::new(false),
            order,
        })
    }

    fn prepare(&self) {
        // SAFETY: loom reports whoever looks meanwhile.
        self.prepared.with_mut(|prepared| unsafe { prepared.write(true) });
    }
}

/// One end's access to a [`Memory`]; `put` as the carrier of that name does it.
#[derive(Clone)]
struct End {
    memory: Arc<Memory>,
    put: bool,
}

impl Store for End {
    fn trailer(&self) -> bool {
        self.put
    }

    fn word(&self, at: usize, value: u64) -> Result<(), StoreFailed> {
        self.memory.words[&at].store(value, Ordering::Release);
        Ok(())
    }

    fn half(&self, at: usize, value: u32) -> Result<(), StoreFailed> {
        self.memory.halves[&at].store(value, Ordering::Release);
        Ok(())
    }

    fn record(
        &self,
        at: usize,
        commit: u64,
        header: Header,
        source: &mut Source<'_>,
    ) -> Result<(), StoreFailed> {
        let memory = &self.memory;
        let (word, second) = (&memory.words[&at], &memory.words[&(at + 8)]);
        let len = header.len as usize;
        if at >= LARGE_AT {
            // SAFETY: loom reports whoever prepares it meanwhile.
            assert!(
                self.put || memory.prepared.with(|prepared| unsafe { prepared.read() }),
                "not prepared yet"
            );
        }
        let mut first = None;
        // SAFETY: a piece is readable and not empty.
        source.take(len, |from, _| first = first.or(Some(unsafe { from.read() })));
        let payload = || {
            if let Some(byte) = first {
                // SAFETY: loom reports whoever reads this meanwhile.
                memory.payloads[&(at + payload_at(len))].with_mut(|cell| unsafe { cell.write(byte) });
            }
        };
        if self.put {
            // One copy by the kernel: its words are seen in any order, but all before the trailer,
            // which is another.
            word.store(commit, Ordering::Relaxed);
            second.store(header.encode(), Ordering::Relaxed);
            payload();
            // Payloads are cells and not words: what the trailer covers of them is taken to be 0.
            let words =
                (len <= COVERED_MAX).then(|| (payload_at(len)..trailer_at(len)).step_by(8).map(|_| 0));
            let trailer = trailer_word(commit, header.encode(), words);
            memory.words[&(at + trailer_at(len))].store(trailer, Ordering::Release);
            return Ok(());
        }
        match memory.order {
            Order::Release | Order::Relaxed => {
                payload();
                second.store(header.encode(), Ordering::Relaxed);
                let order =
                    if memory.order == Order::Release { Ordering::Release } else { Ordering::Relaxed };
                word.store(commit, order);
            }
            Order::CommitFirst => {
                second.store(header.encode(), Ordering::Relaxed);
                word.store(commit, Ordering::Release);
                payload();
            }
        }
        Ok(())
    }

    fn in_place(&self, _: usize, _: usize) -> Option<*mut u8> {
        None
    }

    fn prepare_large(&self) {
        if !self.put {
            self.memory.prepare();
        }
    }

    fn counter(&self, _: usize, _: u64) {}
}

impl View for End {
    fn word(&self, at: usize) -> u64 {
        self.memory.words.get(&at).map_or(0, |word| word.load(Ordering::Acquire))
    }

    fn half(&self, at: usize) -> u32 {
        self.memory.halves[&at].load(Ordering::Acquire)
    }

    fn copy_out(&self, at: usize, len: usize, dest: &mut Dest<'_>) {
        // SAFETY: loom reports whoever writes this meanwhile.
        let byte = self.memory.payloads[&at].with(|cell| unsafe { cell.read() });
        dest.take(len, |to, piece| {
            // SAFETY: the destination is writable for the whole piece.
            unsafe { to.write_bytes(byte, piece) };
        });
    }
}

/// What the engine's bell is: a byte that waits in a socket.
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    heard: Condvar,
}

impl Bell {
    fn ring(&self, ring: Ring) {
        if ring == Ring::Bell {
            *self.rung.lock().expect("no panic before") = true;
            self.heard.notify_one();
        }
    }

    fn sleep(&self) {
        let mut rung = self.rung.lock().expect("no panic before");
        while !*rung {
            rung = self.heard.wait(rung).expect("no panic before");
        }
        *rung = false;
    }
}

struct Sender {
    tx: Tx<End, End>,
    /// Wakes the receiver.
    theirs: Arc<Bell>,
    ours: Arc<Bell>,
}

struct Receiver {
    rx: Rx<End, End>,
    /// Wakes the sender.
    theirs: Arc<Bell>,
    ours: Arc<Bell>,
}

fn lane(kind: Kind, large: u32, put: bool, slots: &[(usize, usize)], order: Order) -> (Sender, Receiver) {
    let geometry = Geometry::new(RING, large).expect("geometry");
    let forth = End { memory: Memory::new(slots, order), put };
    let back = End { memory: Memory::new(&[], Order::Release), put };
    let (data, space) = (Arc::new(Bell::default()), Arc::new(Bell::default()));
    let rx = Rx::new(back.clone(), forth.clone(), geometry, SECRET, kind);
    let receiver = Receiver { rx, theirs: Arc::clone(&space), ours: Arc::clone(&data) };
    (Sender { tx: Tx::new(forth, back, geometry, SECRET), theirs: data, ours: space }, receiver)
}

/// Slots for `count` records of `len` bytes from the beginning of the small ring, and the header
/// word behind them, which a receiver looks at.
fn slots(count: usize, len: usize) -> Vec<(usize, usize)> {
    let step = footprint(len, false);
    let mut slots: Vec<_> = (0..count).map(|i| (SMALL_AT + i * step, len)).collect();
    if count * step < RING as usize {
        slots.push((SMALL_AT + count * step, len));
    }
    slots
}

impl Sender {
    /// Try to send `len` bytes of `tag`.
    fn attempt(&mut self, kind: Kind, tag: u8, len: usize) -> bool {
        let data = vec![tag; len];
        let parts = [(data.as_ptr(), len)];
        // SAFETY: `data` outlives the source.
        let mut source = unsafe { Source::new(&parts) };
        let written = if kind == Kind::Stream {
            self.tx.write_stream(&mut source).expect("memory")
        } else {
            self.tx.write_message(&mut source).expect("fits").expect("memory")
        };
        self.theirs.ring(written.ring);
        written.all
    }

    /// Send, and sleep as the engine does while there is no space; `false` if the receiver stopped.
    fn send(&mut self, kind: Kind, tag: u8, len: usize) -> bool {
        while !self.attempt(kind, tag, len) {
            if !self.tx.open() {
                return false;
            }
            self.tx.arm().expect("memory");
            if !self.tx.has_space() && self.tx.open() {
                self.ours.sleep();
            }
            self.tx.disarm().expect("memory");
        }
        true
    }

    fn finish(mut self) {
        let ring = self.tx.finish().expect("memory");
        self.theirs.ring(ring);
    }
}

impl Receiver {
    /// The next record's payload, `None` at the end. Sleeps as the engine does.
    fn receive(&mut self, len: usize) -> Option<Vec<u8>> {
        loop {
            match self.rx.look().expect("an honest sender") {
                Seen::End => return None,
                Seen::Data(_) => {
                    let mut out = vec![0; len];
                    let parts = [(out.as_mut_ptr(), len)];
                    // SAFETY: `out` outlives the destination.
                    let mut dest = unsafe { Dest::new(&parts) };
                    let (got, _, ring) = self.rx.read(&mut dest).expect("an honest sender");
                    self.theirs.ring(ring);
                    out.truncate(got);
                    return Some(out);
                }
                Seen::Nothing => {
                    let (quiet, ring) = self.rx.prepare_to_sleep().expect("memory");
                    self.theirs.ring(ring);
                    if quiet {
                        self.ours.sleep();
                    }
                    self.rx.disarm().expect("memory");
                }
            }
        }
    }

    /// Everything there is must be `tags` in turn, each of `len` bytes, and then the end.
    fn expect_all(&mut self, tags: &[u8], len: usize) {
        let mut got = Vec::new();
        while let Some(piece) = self.receive(len) {
            got.extend(piece);
        }
        let want: Vec<u8> = tags.iter().flat_map(|tag| vec![*tag; len]).collect();
        assert_eq!(got, want, "complete, in order, and the end behind the last one");
    }
}

/// Every interleaving with at most `preemptions` switches that no thread asked for.
fn model(preemptions: usize, run: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    if builder.preemption_bound.is_none() {
        builder.preemption_bound = Some(preemptions);
    }
    builder.check(run);
}

fn two_tiny_records_and_the_end(kind: Kind, put: bool, order: Order) {
    let (mut sender, mut receiver) = lane(kind, 0, put, &slots(2, TINY), order);
    let sending = thread::spawn(move || {
        assert!(sender.send(kind, 1, TINY));
        assert!(sender.send(kind, 2, TINY));
        sender.finish();
    });
    receiver.expect_all(&[1, 2], TINY);
    sending.join().expect("sender");
}

#[test]
fn a_record_seen_is_complete_no_wake_up_is_lost_and_the_end_comes_last() {
    model(3, || two_tiny_records_and_the_end(Kind::Stream, false, Order::Release));
}

#[test]
fn the_same_for_messages() {
    model(3, || two_tiny_records_and_the_end(Kind::Message, false, Order::Release));
}

#[test]
fn the_same_with_a_trailer() {
    model(3, || two_tiny_records_and_the_end(Kind::Stream, true, Order::Release));
}

#[test]
#[should_panic(expected = "an honest sender")]
fn a_commit_that_orders_nothing_is_found() {
    model(3, || two_tiny_records_and_the_end(Kind::Stream, false, Order::Relaxed));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_commit_before_its_payload_is_found() {
    model(3, || two_tiny_records_and_the_end(Kind::Stream, false, Order::CommitFirst));
}

/// One slot: the second record waits for the first one's credit, and must not touch its payload
/// before that.
#[test]
fn a_full_ring_is_not_overwritten_and_its_sender_is_woken() {
    model(3, || {
        let (mut sender, mut receiver) = lane(Kind::Stream, 0, false, &slots(1, FILLS), Order::Release);
        let sending = thread::spawn(move || {
            assert!(sender.send(Kind::Stream, 1, FILLS));
            assert!(sender.send(Kind::Stream, 2, FILLS));
            sender.finish();
        });
        receiver.expect_all(&[1, 2], FILLS);
        sending.join().expect("sender");
    });
}

/// Only the sender sleeps here, so more interleavings can be afforded.
#[test]
fn a_sender_that_waits_for_space_is_woken_by_credit_or_by_the_receivers_end() {
    for stops in [false, true] {
        model(4, move || {
            let (mut sender, mut receiver) = lane(Kind::Stream, 0, false, &slots(1, FILLS), Order::Release);
            assert!(sender.attempt(Kind::Stream, 1, FILLS));
            let sending = thread::spawn(move || sender.send(Kind::Stream, 2, FILLS));
            if stops {
                let ring = receiver.rx.stop(TAKES_NOTHING).expect("memory");
                receiver.theirs.ring(ring);
            } else {
                assert_eq!(receiver.receive(FILLS), Some(vec![1; FILLS]));
            }
            assert_eq!(sending.join().expect("sender"), !stops);
        });
    }
}

/// The ring is not full, but what is left is too little: credit that comes between the last look
/// and the sleep must be seen.
#[test]
fn a_sender_with_a_little_space_left_is_woken_too() {
    model(4, || {
        let (long, short, next) = (1664, 448, 200);
        let second = SMALL_AT + footprint(long, false);
        let third = second + footprint(long, false);
        let end = third + footprint(short, false);
        let all = [(SMALL_AT, long), (second, long), (third, short), (end, 0), (SMALL_AT, next)];
        let (mut sender, mut receiver) = lane(Kind::Message, 0, false, &all, Order::Release);
        for len in [long, long, short] {
            assert!(sender.attempt(Kind::Message, 1, len));
        }
        let sending = thread::spawn(move || assert!(sender.send(Kind::Message, 2, next)));
        assert_eq!(receiver.receive(long), Some(vec![1; long]));
        sending.join().expect("sender");
    });
}

/// The sender prepares the large ring before it uses it, where the memory is the sender's.
#[test]
fn a_lane_grows_whoever_owns_its_memory() {
    for put in [true, false] {
        model(3, move || {
            // The record that says so, a message too long for the small ring, the header behind it.
            let len = 5000;
            let all = [(SMALL_AT, 0), (LARGE_AT, len), (LARGE_AT + footprint(len, put), 0)];
            let (mut sender, mut receiver) = lane(Kind::Message, 4 * RING, put, &all, Order::Release);
            let sending = thread::spawn(move || {
                // It waits for nothing else than that: the ring is empty.
                assert!(sender.send(Kind::Message, 7, len));
            });
            assert_eq!(receiver.receive(len), Some(vec![7; len]));
            sending.join().expect("sender");
        });
    }
}
