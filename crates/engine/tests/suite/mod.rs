//! What a lane promises whoever carries it. Each function is run for each carrier, here and where the switch stands
//! between two lanes.

use std::cell::RefCell;
use std::collections::VecDeque;

use isthmus_engine::lane::{Ends, with_dest, with_source};
use isthmus_ring::Seen;
use isthmus_wire::control::SocketKind;

pub const SMALL: u32 = 32 * 1024;
pub const LARGE: u32 = 256 * 1024;
pub const SECRET: u64 = 0x0123_4567_89ab_cdef;

/// Two ends of a connection of this kind, with rings of these sizes.
pub type Make = fn(SocketKind, u32, u32) -> Pair;

pub struct Pair {
    pub here: Ends,
    pub there: Ends,
}

thread_local! {
    static PUMP: RefCell<Option<Box<dyn FnMut()>>> = const { RefCell::new(None) };
}

/// Who stands between the two ends, if somebody does: moves what can be moved.
#[allow(dead_code, reason = "not every carrier has somebody there")]
pub fn set_pump(pump: Option<Box<dyn FnMut()>>) {
    PUMP.with(|slot| *slot.borrow_mut() = pump);
}

pub fn pump() {
    PUMP.with(|slot| {
        if let Some(pump) = &mut *slot.borrow_mut() {
            pump();
        }
    });
}

pub fn pattern(from: u64, len: usize) -> Vec<u8> {
    (from..from + len as u64).map(|i| (i.wrapping_mul(31) ^ (i >> 8)) as u8).collect()
}

/// Send what fits; the number of bytes.
pub fn send(from: &mut Ends, data: &[u8]) -> usize {
    let sent = with_source(data, |source| from.tx.write_stream(source)).expect("memory").bytes;
    pump();
    sent
}

pub fn send_message(from: &mut Ends, data: &[u8]) -> bool {
    let sent = with_source(data, |source| from.tx.write_message(source))
        .expect("not too large")
        .expect("memory")
        .all;
    pump();
    sent
}

/// Receive what there is, at most `room` bytes: what was stored and the length of the message.
pub fn receive(to: &mut Ends, room: usize) -> Option<(Vec<u8>, usize)> {
    pump();
    match to.rx.look().expect("an honest sender") {
        Seen::Data(_) => {}
        Seen::Nothing | Seen::End => return None,
    }
    let mut out = vec![0; room];
    let (got, whole, _) = with_dest(&mut out, |dest| to.rx.read(dest)).expect("an honest sender");
    out.truncate(got);
    Some((out, whole))
}

/// Sizes around every edge of a record, a ring and a chunk.
pub fn sizes(most: usize) -> Vec<usize> {
    let edges = [1, 16, 48, 64, 1024, 4096, 8192, 16 * 1024, 32 * 1024, 64 * 1024, 256 * 1024, 1024 * 1024];
    let around = edges.iter().flat_map(|edge| edge - 1..=edge + 1);
    around.filter(|size| (1..=most).contains(size)).chain([most]).collect()
}

pub fn bytes_of_every_size_arrive(make: Make) {
    let mut p = make(SocketKind::Stream, SMALL, LARGE);
    let mut total = 0;
    for size in sizes(1024 * 1024 + 1) {
        let data = pattern(total, size);
        let (mut sent, mut got) = (0, 0);
        while got < size {
            sent += send(&mut p.here, &data[sent..]);
            let Some((piece, whole)) = receive(&mut p.there, 50_000) else {
                // The sender may wait for its receiver to hear that the lane grows.
                let _ = p.there.rx.settle();
                continue;
            };
            assert_eq!(whole, piece.len());
            assert_eq!(piece, data[got..got + piece.len()], "{size} bytes, at {got}");
            got += piece.len();
        }
        assert_eq!(sent, size);
        total += size as u64;
    }
    assert_eq!(p.there.rx.totals().0, total);
}

pub fn messages_of_every_size_arrive_whole(make: Make) {
    let mut p = make(SocketKind::Seqpacket, SMALL, LARGE);
    let most = p.here.tx.message_max();
    assert!(most > LARGE as usize / 3);
    for size in sizes(most).into_iter().chain([0, 1]) {
        let data = pattern(size as u64, size);
        let mut attempts = 0;
        while !send_message(&mut p.here, &data) {
            // As above, and for nothing else.
            assert_eq!(p.there.rx.look(), Ok(Seen::Nothing));
            let _ = p.there.rx.settle();
            attempts += 1;
            assert!(attempts < 4, "an empty lane takes {size} bytes");
        }
        assert_eq!(receive(&mut p.there, most), Some((data, size)));
    }
    let too_large = vec![0; most + 1];
    let refused = with_source(&too_large, |source| p.here.tx.write_message(source)).expect_err("too large");
    assert_eq!((refused.len, refused.limit), (most + 1, most));
    // What does not fit the caller's buffer is lost, and its length is told.
    assert!(send_message(&mut p.here, &pattern(0, 100)));
    assert!(send_message(&mut p.here, b"next"));
    assert_eq!(receive(&mut p.there, 10), Some((pattern(0, 10), 100)));
    assert_eq!(receive(&mut p.there, 10), Some((b"next".to_vec(), 4)));
}

pub fn a_long_walk_around_the_rings(make: Make) {
    for (small, large) in [(4096, 0), (4096, 8192), (12_288, 0)] {
        let mut p = make(SocketKind::Seqpacket, small, large);
        let most = p.here.tx.message_max();
        let mut queue = VecDeque::new();
        let mut state = 1u64;
        for turn in 0..3000u64 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let size = (state >> 33) as usize % most;
            let data = pattern(turn, size);
            let mut idle = 0;
            while !send_message(&mut p.here, &data) {
                if let Some((got, _)) = receive(&mut p.there, most) {
                    assert_eq!(Some(got), queue.pop_front(), "turn {turn}");
                } else {
                    let _ = p.there.rx.settle();
                    idle += 1;
                    assert!(idle < 4, "an empty lane takes {size} bytes, turn {turn}");
                }
            }
            queue.push_back(data);
        }
        while let Some((got, _)) = receive(&mut p.there, most) {
            assert_eq!(Some(got), queue.pop_front());
        }
        assert!(queue.is_empty());
    }
}

pub fn two_threads_and_both_directions(make: Make) {
    const EACH: usize = 2 * 1024 * 1024;
    let Pair { here, there } = make(SocketKind::Stream, SMALL, LARGE);
    let run = |mut ends: Ends, mine: u64, other: u64| {
        let data = pattern(mine, EACH);
        let want = pattern(other, EACH);
        let (mut sent, mut got) = (0, 0);
        while sent < EACH || got < EACH {
            let before = (sent, got);
            // Pieces of ever other sizes.
            let piece = (sent % 70_001 + 1).min(EACH - sent);
            sent += send(&mut ends, &data[sent..sent + piece]);
            if let Some((bytes, _)) = receive(&mut ends, 33_333) {
                assert_eq!(bytes, want[got..got + bytes.len()]);
                got += bytes.len();
            }
            if (sent, got) == before {
                let _ = ends.rx.settle();
                std::thread::yield_now();
            }
        }
        // The peer may still wait for the last credit.
        let _ = ends.rx.settle();
        ends
    };
    let other = std::thread::spawn(move || run(there, 7, 1_000_003));
    run(here, 1_000_003, 7);
    while !other.is_finished() {
        pump();
        std::thread::yield_now();
    }
    other.join().expect("the other side");
}

/// Two programs that both send first and then receive must not wait for each other: like a kernel
/// socket, a lane holds something whoever listens.
pub fn a_fresh_lane_takes_something_before_anybody_receives(make: Make) {
    let mut p = make(SocketKind::Stream, SMALL, LARGE);
    let data = pattern(0, SMALL as usize / 2);
    assert_eq!(send(&mut p.here, &data), data.len());
    let mut p = make(SocketKind::Seqpacket, SMALL, LARGE);
    assert!(send_message(&mut p.here, &data));
    assert_eq!(receive(&mut p.there, data.len()), Some((data.clone(), data.len())));
}

pub fn the_end_comes_after_the_last_byte(make: Make) {
    let mut p = make(SocketKind::Stream, SMALL, LARGE);
    assert_eq!(send(&mut p.here, b"last words"), 10);
    let _ = p.here.tx.finish().expect("memory");
    pump();
    assert_eq!(receive(&mut p.there, 4), Some((b"last".to_vec(), 4)));
    assert_eq!(receive(&mut p.there, 40), Some((b" words".to_vec(), 6)));
    for _ in 0..2 {
        assert_eq!(p.there.rx.look(), Ok(Seen::End));
    }
    // The other direction goes on.
    assert_eq!(send(&mut p.there, b"answer"), 6);
    assert_eq!(receive(&mut p.here, 40), Some((b"answer".to_vec(), 6)));
    assert_eq!(p.here.rx.look(), Ok(Seen::Nothing));
    let mut empty = make(SocketKind::Seqpacket, SMALL, LARGE);
    let _ = empty.here.tx.finish().expect("memory");
    pump();
    assert_eq!(empty.there.rx.look(), Ok(Seen::End));
}
