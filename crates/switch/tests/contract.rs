//! The lanes' contract where the switch stands between two of them: each program's lanes lie in a seat, memory of its
//! own guest, and the switch copies from one into the other.

#[path = "../../engine/tests/suite/mod.rs"]
mod suite;

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use isthmus_engine::lane::{join_seat, record_kind, seat_stride};
use isthmus_engine::seat::parts;
use isthmus_ring::Geometry;
use isthmus_ring::layout::{RESET, TAKES_ALL, TAKES_NOTHING};
use isthmus_switch::bridge::{Bell, Bridge};
use isthmus_switch::memory::Memory;
use isthmus_switch::seat::{Begun, Seat};
use isthmus_sys::memory;
use isthmus_wire::control::SocketKind;
use isthmus_wire::vhost_user::Message;
use suite::{LARGE, Pair, SECRET, SMALL, pump, receive, send, set_pump};

/// Where the guest has the pages of its seat.
const GUEST: u64 = 0x4000_0000;
const SET_MEM_TABLE: u32 = 5;

macro_rules! contract {
    ($($name:ident),+ $(,)?) => {
        $(#[test] fn $name() { suite::$name(seats); })+
    };
}

contract! {
    bytes_of_every_size_arrive,
    messages_of_every_size_arrive_whole,
    a_long_walk_around_the_rings,
    two_threads_and_both_directions,
    a_fresh_lane_takes_something_before_anybody_receives,
    the_end_comes_after_the_last_byte,
}

/// A guest's seat: the file that its program maps, and what the switch made of its pages.
fn seat(small: u32, large: u32) -> (OwnedFd, Seat) {
    let geometry = Geometry::new(small, large).expect("sizes");
    let stride = seat_stride(geometry);
    let file = memory::create(c"guest", 2 * stride).expect("memfd");
    let table: Vec<u8> =
        [1, GUEST, 2 * stride as u64, GUEST, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    let Ok(Message::SetMemTable(table)) = Message::decode(SET_MEM_TABLE, &table) else { panic!("a table") };
    let kept = file.try_clone().expect("descriptor");
    let memory = Arc::new(Memory::new(&table, vec![kept]).expect("memory"));
    let mut runs = Vec::new();
    for lane in [0, stride] {
        for (at, len) in parts(geometry) {
            runs.extend((GUEST + (lane + at) as u64).to_le_bytes());
            runs.extend((len as u32).to_le_bytes());
        }
    }
    let mut begun = Begun::new(1, 1, small, large, runs.len() as u32 / 12).expect("sizes");
    assert_eq!(begun.name(&runs), Some(true));
    (file, begun.finish(&memory).expect("pages"))
}

fn seats(kind: SocketKind, small: u32, large: u32) -> Pair {
    let [(here, one), (there, other)] = [0, 1].map(|_| seat(small, large));
    let message = kind != SocketKind::Stream;
    let bridge = |seat: &Seat| {
        Bridge::new(seat.ends(SECRET, record_kind(kind)), Bell::Guest(Cell::new(false)), message)
    };
    let (mut a, mut b) = (bridge(&one), bridge(&other));
    set_pump(Some(Box::new(move || {
        let _seats = (&one, &other);
        while a.relay(&mut b, usize::MAX, true).1 || b.relay(&mut a, usize::MAX, true).1 {}
        a.pass_stop(&b);
        b.pass_stop(&a);
    })));
    let join = |file: &OwnedFd| join_seat(file, small, large, SECRET, kind).expect("a seat");
    Pair { here: join(&here), there: join(&there) }
}

#[test]
fn a_receiver_that_stops_is_seen_to() {
    for state in [TAKES_NOTHING, RESET] {
        let mut p = seats(SocketKind::Stream, SMALL, LARGE);
        assert_eq!(p.here.tx.peer_takes(), TAKES_ALL);
        let _ = p.there.rx.stop(state).expect("memory");
        pump();
        assert_eq!(p.here.tx.peer_takes(), state);
        // And says nothing about the other direction.
        assert!(p.there.tx.open());
    }
}

#[test]
fn a_receiver_that_reads_nothing_stops_its_sender_and_loses_nothing() {
    let mut p = seats(SocketKind::Stream, 8192, 0);
    let data = suite::pattern(0, 100_000);
    let mut sent = 0;
    loop {
        match send(&mut p.here, &data[sent..]) {
            0 => break,
            some => sent += some,
        }
    }
    assert!((8192..=2 * 8192).contains(&sent), "two rings of 8192 hold {sent} bytes");
    let mut got = Vec::new();
    while got.len() < data.len() {
        match receive(&mut p.there, 700) {
            Some((piece, _)) => got.extend(piece),
            None => {
                let _ = p.there.rx.settle();
                sent += send(&mut p.here, &data[sent..]);
            }
        }
    }
    assert_eq!(got, data);
}

#[test]
fn a_switch_with_another_secret_hears_nothing() {
    let (file, seat) = seat(SMALL, LARGE);
    let mut program = join_seat(&file, SMALL, LARGE, SECRET + 2, SocketKind::Stream).expect("a seat");
    let mut switch = seat.ends(SECRET, record_kind(SocketKind::Stream));
    assert_eq!(send(&mut program, b"hello"), 5);
    assert_eq!(receive(&mut switch, 10), None);
    assert_eq!(send(&mut switch, b"hello"), 5);
    assert_eq!(receive(&mut program, 10), None);
}
