//! A lane against its model: a queue of bytes, a queue of messages. And against a hostile peer.
#![cfg(not(loom))]

use std::collections::VecDeque;
use std::sync::Arc;

use isthmus_ring::layout::{self, ARM_DATA, ARM_SPACE, CREDIT, SMALL_AT};
use isthmus_ring::{Dest, Fault, Geometry, Mapped, Region, Ring, Rx, Seen, Source, Tx, View};
use isthmus_wire::record::Kind;
use proptest::prelude::*;

const SECRET: u64 = 0x1234_5678_9abc_def1;

fn memory(geometry: Geometry) -> Region {
    let mut words = vec![0u64; geometry.file_len() / 8].into_boxed_slice();
    let base = words.as_mut_ptr().cast();
    // SAFETY: the box lives in the region; it is only reached through the region.
    unsafe { Region::new(base, geometry.file_len(), Arc::new(std::sync::Mutex::new(words))) }
}

struct Pair {
    tx: Tx<Mapped, Mapped>,
    rx: Rx<Mapped, Mapped>,
    /// What the sender writes.
    forth: Region,
    /// What the receiver writes.
    back: Region,
}

fn pair(small: u32, large: u32, kind: Kind) -> Pair {
    let geometry = Geometry::new(small, large).expect("geometry");
    let (forth, back) = (memory(geometry), memory(geometry));
    Pair {
        tx: Tx::new(Mapped::new(forth.clone()), Mapped::new(back.clone()), geometry, SECRET),
        rx: Rx::new(Mapped::new(back.clone()), Mapped::new(forth.clone()), geometry, SECRET, kind),
        forth,
        back,
    }
}

fn bytes(start: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| ((start + i) * 31 % 251) as u8).collect()
}

fn stream(tx: &mut Tx<Mapped, Mapped>, data: &[u8]) -> usize {
    let parts = [(data.as_ptr(), data.len())];
    // SAFETY: `data` outlives the call.
    tx.write_stream(&mut unsafe { Source::new(&parts) }).expect("mapped memory").bytes
}

fn message(tx: &mut Tx<Mapped, Mapped>, data: &[u8]) -> bool {
    let parts = [(data.as_ptr(), data.len())];
    // SAFETY: `data` outlives the call.
    tx.write_message(&mut unsafe { Source::new(&parts) }).expect("fits").expect("mapped memory").all
}

fn read(rx: &mut Rx<Mapped, Mapped>, room: usize) -> Result<Option<(Vec<u8>, usize)>, Fault> {
    match rx.look()? {
        Seen::Nothing | Seen::End => return Ok(None),
        Seen::Data(_) => {}
    }
    let mut out = vec![0; room];
    let parts = [(out.as_mut_ptr(), out.len())];
    // SAFETY: `out` outlives the call.
    let (got, whole, _) = rx.read(&mut unsafe { Dest::new(&parts) })?;
    out.truncate(got);
    Ok(Some((out, whole)))
}

#[derive(Clone, Debug)]
enum Step {
    Send(usize),
    Receive(usize),
    Settle,
}

fn steps(most: usize) -> impl Strategy<Value = Vec<Step>> {
    let size = prop_oneof![0..200usize, 900..1200usize, 0..most];
    let step = prop_oneof![
        4 => size.clone().prop_map(Step::Send),
        4 => size.prop_map(Step::Receive),
        1 => Just(Step::Settle),
    ];
    prop::collection::vec(step, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 4 } else { 256 }, ..ProptestConfig::default() })]

    #[test]
    fn a_stream_lane_is_a_queue_of_bytes(steps in steps(40_000), large in prop_oneof![Just(0u32), Just(65_536)]) {
        let mut p = pair(8192, large, Kind::Stream);
        let mut model = VecDeque::new();
        let mut sent = 0u64;
        for step in steps {
            match step {
                Step::Send(len) => {
                    let data = bytes(sent, len);
                    let n = stream(&mut p.tx, &data);
                    prop_assert!(n <= len);
                    model.extend(&data[..n]);
                    sent += n as u64;
                }
                Step::Receive(0) => {}
                Step::Receive(room) => match read(&mut p.rx, room).expect("an honest sender") {
                    None => prop_assert!(model.is_empty()),
                    Some((got, _)) => {
                        prop_assert!(!got.is_empty());
                        let want: Vec<u8> = model.drain(..got.len()).collect();
                        prop_assert_eq!(got, want);
                    }
                },
                Step::Settle => { let _ = p.rx.settle(); }
            }
        }
        // What was sent can be received to the last byte, and then the end is seen.
        let _ = p.tx.finish().expect("mapped memory");
        while let Some((got, _)) = read(&mut p.rx, 5000).expect("an honest sender") {
            let want: Vec<u8> = model.drain(..got.len()).collect();
            prop_assert_eq!(got, want);
        }
        prop_assert!(model.is_empty());
        prop_assert_eq!(p.rx.look(), Ok(Seen::End));
        prop_assert_eq!(p.tx.totals().0, p.rx.totals().0);
    }

    #[test]
    fn a_message_lane_is_a_queue_of_messages(steps in steps(28_000), large in prop_oneof![Just(0u32), Just(65_536)]) {
        let mut p = pair(8192, large, Kind::Message);
        let limit = p.tx.message_max();
        let mut model: VecDeque<Vec<u8>> = VecDeque::new();
        let mut sent = 0u64;
        for step in steps {
            match step {
                Step::Send(len) => {
                    let data = bytes(sent, len.min(limit));
                    if message(&mut p.tx, &data) {
                        sent += data.len() as u64;
                        model.push_back(data);
                    } else {
                        prop_assert!(!model.is_empty(), "an empty lane takes any message");
                    }
                }
                Step::Receive(room) => match read(&mut p.rx, room).expect("an honest sender") {
                    None => prop_assert!(model.is_empty()),
                    Some((got, whole)) => {
                        let want = model.pop_front().expect("a message");
                        prop_assert_eq!(whole, want.len());
                        prop_assert_eq!(&got[..], &want[..room.min(want.len())]);
                    }
                },
                Step::Settle => { let _ = p.rx.settle(); }
            }
        }
    }

    #[test]
    fn a_sender_that_scribbles_is_refused_or_delivers_rubbish_but_never_more(
        scribbles in prop::collection::vec((0usize..12_000, any::<u64>(), 0usize..3), 1..60),
    ) {
        let mut p = pair(8192, 65_536, Kind::Stream);
        for (word, value, how) in scribbles {
            let _ = stream(&mut p.tx, &bytes(0, 300));
            let at = match how {
                0 => word * 8,
                // Aim: the header at the front, and a commit that fits.
                1 => SMALL_AT + 8,
                _ => SMALL_AT,
            };
            let value = if how == 2 { SECRET + (value & 0xfffc0) } else { value };
            if at + 8 <= p.forth.len() {
                // SAFETY: within the region; this is what a hostile sender can do at any time.
                unsafe { p.forth.bytes(at, 8).cast_mut().cast::<u64>().write_volatile(value) };
            }
            for _ in 0..4 {
                if read(&mut p.rx, 4096).is_err() {
                    return Ok(());
                }
            }
        }
    }

    #[test]
    fn a_receiver_that_lies_about_credit_never_makes_the_sender_panic(
        lies in prop::collection::vec((any::<u64>(), any::<u64>(), 0usize..3), 1..80),
    ) {
        let mut p = pair(8192, 65_536, Kind::Stream);
        for (credit, check, how) in lies {
            let (credit, check) = match how {
                0 => (credit, check),
                1 => (credit, credit ^ SECRET),
                _ => (credit % 70_000, (credit % 70_000) ^ SECRET),
            };
            for (at, value) in [(CREDIT, credit), (CREDIT + 8, check), (ARM_DATA, credit), (192, check)] {
                // SAFETY: within the page; this is what a hostile receiver can do at any time.
                unsafe { p.back.bytes(at, 8).cast_mut().cast::<u64>().write_volatile(value) };
            }
            let _ = stream(&mut p.tx, &bytes(0, 5000));
            let _ = p.tx.has_space();
            let _ = p.tx.in_flight();
        }
    }
}

#[test]
fn a_message_that_can_never_fit_is_refused_and_the_limit_named() {
    let mut p = pair(8192, 65_536, Kind::Message);
    let limit = p.tx.message_max();
    assert_eq!(limit, 65_536 / 16 * 7 - 128);
    let data = vec![1; limit + 1];
    let parts = [(data.as_ptr(), data.len())];
    // SAFETY: `data` outlives the call.
    let refused = p.tx.write_message(&mut unsafe { Source::new(&parts) }).expect_err("too large");
    assert_eq!((refused.len, refused.limit), (limit + 1, limit));
    assert_eq!(p.rx.look(), Ok(Seen::Nothing));
}

#[test]
fn an_emptied_ring_takes_the_largest_message_even_if_credit_was_held_back() {
    let mut p = pair(65_536, 0, Kind::Message);
    let small = vec![1; 1000];
    let largest = vec![2; p.tx.message_max()];
    for _ in 0..400 {
        assert!(message(&mut p.tx, &small));
        assert!(read(&mut p.rx, 2000).expect("honest").is_some());
        assert!(message(&mut p.tx, &largest), "nothing lies in the ring");
        assert!(read(&mut p.rx, 70_000).expect("honest").is_some());
    }
}

#[test]
fn a_bell_is_rung_once_for_each_arm_and_only_after_publishing() {
    let mut p = pair(8192, 0, Kind::Stream);
    let data = bytes(0, 10);
    let parts = [(data.as_ptr(), data.len())];
    let write = |tx: &mut Tx<_, _>| {
        // SAFETY: `data` outlives the calls.
        let mut source = unsafe { Source::new(&parts) };
        tx.write_stream(&mut source).expect("mapped").ring
    };
    assert_eq!(write(&mut p.tx), Ring::Quiet);
    p.rx.arm().expect("mapped");
    assert_eq!(write(&mut p.tx), Ring::Bell);
    assert_eq!(write(&mut p.tx), Ring::Quiet);
    p.rx.arm().expect("mapped");
    assert_eq!(write(&mut p.tx), Ring::Bell);
    p.rx.disarm().expect("mapped");
    assert_eq!(write(&mut p.tx), Ring::Quiet);
}

#[test]
fn a_waiting_sender_gets_its_credit_at_once() {
    let mut p = pair(4096, 0, Kind::Stream);
    while stream(&mut p.tx, &bytes(0, 100)) > 0 {}
    assert!(!p.tx.has_space());
    p.tx.arm().expect("mapped");
    let mut rung = 0;
    while let Ok(Seen::Data(_)) = p.rx.look() {
        let mut out = [0; 100];
        let parts = [(out.as_mut_ptr(), out.len())];
        // SAFETY: `out` outlives the call.
        let (_, _, ring) = p.rx.read(&mut unsafe { Dest::new(&parts) }).expect("honest");
        rung += usize::from(ring == Ring::Bell);
    }
    assert_eq!(rung, 1, "one bell for one arm");
    assert!(p.tx.has_space());
}

#[test]
fn payload_that_looks_like_a_record_is_not_taken_for_one() {
    // The sender's data comes from a third party who knows everything but the secret.
    let mut p = pair(4096, 0, Kind::Stream);
    let mut forged = Vec::new();
    for i in 0..32u64 {
        forged.extend_from_slice(&(i * 64).to_le_bytes());
        forged.extend_from_slice(&[16, 0, 0, 0, 1, 0, 0, 0]);
    }
    let mut total = 0;
    for _ in 0..200 {
        total += stream(&mut p.tx, &forged);
        while let Some((got, _)) = read(&mut p.rx, 8192).expect("honest") {
            total -= got.len();
        }
    }
    assert_eq!(total, 0);
}

#[test]
fn words_of_the_page_do_not_overlap() {
    let mut words = [
        (CREDIT, 8),
        (layout::CREDIT_CHECK, 8),
        (ARM_DATA, 4),
        (ARM_SPACE, 4),
        (layout::CPU, 4),
        (layout::FIN, 8),
        (layout::RECEIVE_STATE, 4),
        (layout::COUNTERS, 8 * layout::COUNTERS_LEN),
    ];
    words.sort_unstable();
    assert!(words.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
    assert!(words.last().is_some_and(|w| w.0 + w.1 <= layout::PAGE));
    let p = pair(4096, 0, Kind::Stream);
    assert_eq!(View::word(&Mapped::new(p.forth.clone()), SMALL_AT), 0);
}
