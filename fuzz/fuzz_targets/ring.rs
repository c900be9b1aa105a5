//! A lane between two ends, each of which may lie. While nobody has lied it is a queue; from then
//! on anything may arrive, but nothing panics, nothing is written beyond the reader's buffer, and
//! every call returns.
#![no_main]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use isthmus_ring::layout::{
    ARM_DATA, ARM_SPACE, CPU, CREDIT, CREDIT_CHECK, FIN, LARGE_AT, RECEIVE_STATE, SMALL_AT, fin_word,
};
use isthmus_ring::{Dest, Geometry, Mapped, Region, Rx, Seen, Source, Store, StoreFailed, Tx};
use isthmus_wire::record::{COVERED_MAX, Header, Kind, payload_at, trailer_at, trailer_word};
use libfuzzer_sys::fuzz_target;

const SECRET: u64 = 0x1234_5678_9abc_def1;
/// What lies behind a reader's buffer and must stay there.
const GUARD: [u8; 64] = [0xa5; 64];

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Word {
    Credit,
    CreditCheck,
    ArmData,
    ArmSpace,
    Cpu,
    Fin,
    ReceiveState,
    /// A commit or a header of the small ring, or of the large one.
    Small(u16),
    Large(u16),
}

impl Word {
    fn at(self) -> usize {
        match self {
            Self::Credit => CREDIT,
            Self::CreditCheck => CREDIT_CHECK,
            Self::ArmData => ARM_DATA,
            Self::ArmSpace => ARM_SPACE & !7,
            Self::Cpu => CPU,
            Self::Fin => FIN,
            Self::ReceiveState => RECEIVE_STATE,
            Self::Small(word) => SMALL_AT + usize::from(word) * 8,
            Self::Large(word) => LARGE_AT + usize::from(word) * 8,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Value {
    Any(u64),
    /// The commit of a record at a position.
    Commit(u32),
    Header {
        kind: u8,
        trailer: bool,
        len: u32,
    },
    Fin(u32),
    /// Both credit words.
    Credit(u32),
}

#[derive(Arbitrary, Debug)]
enum Step {
    Send(u16),
    Receive(u16),
    Peek(u16),
    Ask,
    Skip,
    Settle,
    Sleep,
    WaitForSpace,
    Finish,
    Stop(u32),
    /// The sender writes what it can write; the receiver too.
    SenderLies(Word, Value),
    ReceiverLies(Word, Value),
}

#[derive(Arbitrary, Debug)]
struct Script {
    messages: bool,
    /// Records with trailers, as `put` writes them.
    put: bool,
    small_pages: u8,
    large_pages: u8,
    steps: Vec<Step>,
}

fn memory(geometry: Geometry) -> Region {
    let len = geometry.file_len();
    let mut words = vec![0u64; len / 8].into_boxed_slice();
    let base = words.as_mut_ptr().cast();
    // SAFETY: the box lives in the region; it is only reached through the region.
    unsafe { Region::new(base, len, Arc::new(Mutex::new(words))) }
}

fn lie(memory: &Region, word: Word, value: Value) {
    let write = |at: usize, value: u64| {
        if at + 8 <= memory.len() {
            // SAFETY: within the region, aligned, and one thread.
            unsafe { memory.bytes(at, 8).cast_mut().cast::<u64>().write_volatile(value) };
        }
    };
    match value {
        Value::Any(value) => write(word.at(), value),
        Value::Commit(position) => write(word.at(), SECRET.wrapping_add(u64::from(position))),
        Value::Header { kind, trailer, len } => match Kind::from_wire(kind % 5) {
            Some(kind) => write(word.at(), Header { kind, trailer, len }.encode()),
            None => write(word.at(), u64::from(len)),
        },
        Value::Fin(position) => write(FIN, fin_word(SECRET, position.into())),
        Value::Credit(position) => {
            write(CREDIT, position.into());
            write(CREDIT_CHECK, u64::from(position) ^ SECRET);
        }
    }
}

/// A store that writes records as the kernel does for `put`.
struct Put(Mapped);

impl Store for Put {
    fn trailer(&self) -> bool {
        true
    }

    fn word(&self, at: usize, value: u64) -> Result<(), StoreFailed> {
        self.0.word(at, value)
    }

    fn half(&self, at: usize, value: u32) -> Result<(), StoreFailed> {
        self.0.half(at, value)
    }

    fn record(
        &self,
        at: usize,
        commit: u64,
        header: Header,
        source: &mut Source<'_>,
    ) -> Result<(), StoreFailed> {
        let (len, end) = (header.len as usize, trailer_at(header.len as usize));
        let mut payload = vec![0; end - payload_at(len)];
        let mut filled = 0;
        source.take(len, |from, piece| {
            // SAFETY: the pieces add up to `len`.
            unsafe { std::ptr::copy_nonoverlapping(from, payload[filled..].as_mut_ptr(), piece) };
            filled += piece;
        });
        let words: Vec<u64> =
            payload.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("8"))).collect();
        let covered = (len <= COVERED_MAX).then_some(words.iter().copied());
        let trailer = trailer_word(commit, header.encode(), covered);
        for (i, word) in words.iter().enumerate() {
            self.word(at + payload_at(len) + 8 * i, *word)?;
        }
        self.word(at + 8, header.encode())?;
        self.word(at, commit)?;
        self.word(at + end, trailer)
    }

    fn in_place(&self, _: usize, _: usize) -> Option<*mut u8> {
        None
    }

    fn prepare_large(&self) {}

    fn counter(&self, index: usize, value: u64) {
        self.0.counter(index, value);
    }
}

fuzz_target!(|script: Script| {
    if script.put { play(script, |region| Put(Mapped::new(region))) } else { play(script, Mapped::new) }
});

fn play<S: Store>(script: Script, store: impl Fn(Region) -> S) {
    let pages = |n: u8, most: u32| u32::from(n) % most * 4096;
    let small = 4096 + pages(script.small_pages, 4);
    let geometry = Geometry::new(small, pages(script.large_pages, 9)).expect("good sizes");
    let kind = if script.messages { Kind::Message } else { Kind::Stream };
    let (forth, back) = (memory(geometry), memory(geometry));
    let mut tx = Tx::new(store(forth.clone()), Mapped::new(back.clone()), geometry, SECRET);
    let mut rx = Rx::new(store(back.clone()), Mapped::new(forth.clone()), geometry, SECRET, kind);
    let mut honest = true;
    let mut bytes: VecDeque<u8> = VecDeque::new();
    let mut messages: VecDeque<Vec<u8>> = VecDeque::new();
    let mut count = 0u8;

    for step in script.steps {
        match step {
            Step::Send(len) if !tx.finished() => {
                count = count.wrapping_add(1);
                let len = usize::from(len).min(if script.messages { tx.message_max() } else { 65_535 });
                let data: Vec<u8> = (0..len).map(|i| (i as u8).wrapping_mul(7) ^ count).collect();
                let parts = [(data.as_ptr(), len / 3), (data[len / 3..].as_ptr(), len - len / 3)];
                // SAFETY: `data` outlives the source.
                let mut source = unsafe { Source::new(&parts) };
                if script.messages {
                    let written = tx.write_message(&mut source).expect("fits").expect("memory");
                    if written.all {
                        messages.push_back(data);
                    } else {
                        assert!(!honest || !messages.is_empty(), "an empty lane takes any message");
                    }
                } else {
                    let written = tx.write_stream(&mut source).expect("memory");
                    assert_eq!(written.all, written.bytes == len);
                    bytes.extend(&data[..written.bytes]);
                }
            }
            Step::Receive(room) | Step::Peek(room) => {
                let looked = rx.look();
                assert!(!honest || looked.is_ok());
                let Ok(Seen::Data(_)) = looked else {
                    assert!(!honest || (bytes.is_empty() && messages.is_empty()));
                    continue;
                };
                let room = usize::from(room);
                let mut out = vec![0; room];
                out.extend(GUARD);
                let parts = [(out.as_mut_ptr(), room)];
                // SAFETY: `out` outlives the destination.
                let mut dest = unsafe { Dest::new(&parts) };
                let peek = matches!(step, Step::Peek(_));
                let result = if peek {
                    let (got, whole) = rx.peek(&mut dest);
                    Ok((got, whole))
                } else {
                    rx.read(&mut dest).map(|(got, whole, _)| (got, whole))
                };
                assert_eq!(out[room..], GUARD);
                let Ok((got, whole)) = result else {
                    assert!(!honest);
                    continue;
                };
                assert!(got <= room);
                if !honest {
                    continue;
                }
                if script.messages {
                    let front = messages.front().expect("a message");
                    assert_eq!((got, whole), (front.len().min(room), front.len()));
                    assert_eq!(out[..got], front[..got]);
                    if !peek {
                        messages.pop_front();
                    }
                } else {
                    assert!(got > 0 || room == 0);
                    assert!(bytes.iter().take(got).eq(&out[..got]), "other bytes than were sent");
                    if !peek {
                        bytes.drain(..got);
                    }
                }
            }
            Step::Ask => {
                let _ =
                    (rx.quiet(), rx.totals(), rx.peer_cpu(), tx.peer_cpu(), tx.peer_takes(), tx.in_flight());
                if matches!(rx.look(), Ok(Seen::Data(_))) {
                    let available = rx.available(10_000);
                    assert!(!honest || script.messages || available == bytes.len().min(10_000));
                }
                if let Some((at, len)) = rx.front() {
                    assert!(at + len <= geometry.file_len());
                }
                let _ = (tx.fits(100), tx.has_space());
            }
            Step::Skip if !honest => drop(rx.skip()),
            Step::Settle => drop(rx.settle()),
            Step::Sleep => drop(rx.prepare_to_sleep()),
            Step::WaitForSpace => {
                tx.arm().expect("memory");
                let _ = tx.has_space();
                tx.disarm().expect("memory");
            }
            Step::Finish if !tx.finished() => drop(tx.finish()),
            Step::Stop(state) => drop(rx.stop(state)),
            Step::SenderLies(word, value) => {
                honest = false;
                lie(&forth, word, value);
            }
            Step::ReceiverLies(word, value) => {
                honest = false;
                lie(&back, word, value);
            }
            Step::Send(_) | Step::Finish | Step::Skip => {}
        }
    }
    if honest && tx.finished() {
        assert_eq!(rx.look() == Ok(Seen::End), bytes.is_empty() && messages.is_empty());
    }
}
