//! A connection whose other side is the test: it holds what a peer holds, and need not be honest.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use isthmus_ring::layout::{ARM_DATA, SMALL_AT};
use isthmus_ring::{Mapped, Ring, View};
use isthmus_sys::{memory, packet};
use isthmus_wire::control::{Carrier, SocketKind, TICKET};
use isthmus_wire::record::{Header, Kind, trailer_word};

use super::{Connection, Info};
use crate::error::Error;
use crate::lane::{Ends, Offer, with_dest, with_source};
use crate::wait::{How, Wait};

const SMALL: u32 = 8192;
const SECRET: u64 = 0x0123_4567_89ab_cdef;
/// Long after everything has happened, or never will.
const LIMIT: Duration = Duration::from_secs(20);

struct Peer {
    ends: Ends,
    bell: OwnedFd,
    /// Our lane, as the peer got it.
    lane: OwnedFd,
    _offer: Offer,
}

fn connection(carrier: Carrier, kind: SocketKind) -> (Arc<Connection>, Peer) {
    let [ours, theirs] = [0, 1].map(|_| Offer::new(carrier, SMALL, 0).expect("memory"));
    let given = |offer: &Offer| offer.descriptors()[0].try_clone_to_owned().expect("a descriptor");
    let (bell, their_bell) = packet::pair().expect("sockets");
    let here = ours.join(&given(&theirs), SMALL, 0, SECRET, kind).expect("a good lane");
    let there = theirs.join(&given(&ours), SMALL, 0, SECRET, kind).expect("a good lane");
    let info = Info {
        id: 2,
        kind,
        carrier,
        port: 1,
        peer: 1,
        peer_name: "peer".into(),
        peer_port: 1,
        why: String::new(),
        opener: true,
        ticket: [0; TICKET],
        small: SMALL,
        large: 0,
        theirs: (SMALL, 0),
    };
    let counters = ours.counters_descriptor().expect("a descriptor");
    let connection = Connection::new(info, here, bell, Some(counters), None);
    (connection, Peer { ends: there, bell: their_bell, lane: given(&ours), _offer: theirs })
}

fn limited(wait: Wait, limit: Duration) -> How<'static> {
    How { wait, deadline: Some(Instant::now() + limit), ..How::default() }
}

fn receive(connection: &Connection, how: &How<'_>) -> Result<Vec<u8>, Error> {
    let mut out = vec![0; 4096];
    let (got, _) = with_dest(&mut out, |dest| connection.receive(dest, how))?;
    out.truncate(got);
    Ok(out)
}

/// A sender can be killed in the middle of the call that writes its record.
#[test]
fn half_a_record_does_not_hide_the_death_of_its_sender() {
    for wait in [Wait::Adaptive, Wait::Spin, Wait::Block] {
        let (connection, peer) = connection(Carrier::Put, SocketKind::Stream);
        let mut half = SECRET.to_ne_bytes().to_vec();
        half.extend(Header { kind: Kind::Stream, trailer: true, len: 100 }.encode().to_le_bytes());
        let piece = [memory::Piece::new(half.as_ptr(), half.len())];
        // SAFETY: the piece is readable.
        let written = unsafe { memory::write_at(peer.lane.as_fd(), &piece, SMALL_AT as u64) };
        assert_eq!(written.expect("our inbox"), half.len());
        drop(peer);
        let told = receive(&connection, &limited(wait, LIMIT));
        assert!(matches!(told, Err(Error::Reset { .. })), "{wait:?}: {told:?}");
    }
}

/// Its sender lives, and never goes on.
#[test]
fn half_a_record_does_not_hold_its_receiver_beyond_its_time() {
    for wait in [Wait::Adaptive, Wait::Spin, Wait::Block] {
        let (connection, peer) = connection(Carrier::Put, SocketKind::Stream);
        let commit = SECRET.to_ne_bytes();
        let piece = [memory::Piece::new(commit.as_ptr(), commit.len())];
        // SAFETY: the piece is readable.
        let written = unsafe { memory::write_at(peer.lane.as_fd(), &piece, SMALL_AT as u64) };
        assert_eq!(written.expect("our inbox"), 8);
        let told = receive(&connection, &limited(wait, Duration::from_millis(50)));
        assert!(matches!(told, Err(Error::TimedOut { .. })), "{wait:?}: {told:?}");
        assert!(!connection.spin_then_park().expect("a lane"), "{wait:?}: half a record is nothing");
    }
}

/// The kernel copies a record in any order it likes: beside the commit may stand what lay there
/// before, which may look like a header, even of a record as long.
#[test]
fn on_put_a_commit_beside_an_old_header_is_not_yet_a_record() {
    let (connection, peer) = connection(Carrier::Put, SocketKind::Seqpacket);
    let put = |at: usize, bytes: &[u8]| {
        let piece = [memory::Piece::new(bytes.as_ptr(), bytes.len())];
        // SAFETY: the piece is readable.
        let written = unsafe { memory::write_at(peer.lane.as_fd(), &piece, at as u64) };
        assert_eq!(written.expect("our inbox"), bytes.len());
    };
    let header = |kind, trailer, len| Header { kind, trailer, len }.encode().to_le_bytes();
    put(SMALL_AT, &SECRET.to_ne_bytes());
    let old = [
        [0xfe; 8],
        header(Kind::Message, false, 5),
        header(Kind::Message, true, 60_000),
        header(Kind::Message, true, 5),
    ];
    for old in old {
        put(SMALL_AT + 8, &old);
        let told = receive(&connection, &How::at_once());
        assert!(matches!(told, Err(Error::WouldBlock { .. })), "{told:?}");
    }
    let mut words = [header(Kind::Message, true, 3), *b"new\0\0\0\0\0", [0; 8]];
    let [first, second] = [0, 1].map(|i| u64::from_ne_bytes(words[i]));
    words[2] = trailer_word(SECRET, first, Some([second].into_iter())).to_ne_bytes();
    // Each word but one, whichever it is.
    for missing in 0..3 {
        for (i, word) in words.iter().enumerate() {
            put(SMALL_AT + 8 + 8 * i, if i == missing { &[0xfe; 8] } else { word });
        }
        let told = receive(&connection, &How::at_once());
        assert!(matches!(told, Err(Error::WouldBlock { .. })), "{told:?}");
    }
    put(SMALL_AT + 24, &words[2]);
    assert_eq!(receive(&connection, &limited(Wait::Adaptive, LIMIT)).expect("a whole record"), b"new");
}

/// A message that does not fit waits for more space than there is when its receiver dies.
#[test]
fn a_message_that_waits_for_space_hears_of_the_death_of_its_receiver() {
    for carrier in [Carrier::Sealed, Carrier::Put] {
        let (connection, peer) = connection(carrier, SocketKind::Seqpacket);
        let data = vec![1; connection.message_max()];
        let send = |how: &How<'_>| with_source(&data, |source| connection.send_message(source, how));
        while send(&How::at_once()).is_ok() {}
        drop(peer);
        let told = send(&limited(Wait::Adaptive, LIMIT));
        assert!(matches!(told, Err(Error::Pipe { .. })), "{told:?}");
    }
}

/// Two threads may wait for one connection; one that gives up must not take the other's arm away.
#[test]
fn who_stops_waiting_does_not_put_others_to_sleep_for_good() {
    let (connection, mut peer) = connection(Carrier::Sealed, SocketKind::Stream);
    let patient = {
        let connection = Arc::clone(&connection);
        std::thread::spawn(move || receive(&connection, &limited(Wait::Block, LIMIT)))
    };
    let seen = Mapped::new(peer.ends.view.clone());
    while seen.half(ARM_DATA) == 0 {
        std::thread::yield_now();
    }
    let told = receive(&connection, &limited(Wait::Block, Duration::from_millis(20)));
    assert!(matches!(told, Err(Error::TimedOut { .. })), "{told:?}");
    let written = with_source(b"x", |source| peer.ends.tx.write_stream(source)).expect("memory");
    assert_eq!(written.ring, Ring::Bell, "somebody still sleeps");
    packet::push(peer.bell.as_fd(), &[1]).expect("a bell");
    assert_eq!(patient.join().expect("a thread").expect("a byte"), b"x");
}

/// Whoever rings without end wakes us without end, and no more.
#[test]
fn an_endless_bell_neither_holds_nor_deafens() {
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    let (connection, peer) = connection(Carrier::Sealed, SocketKind::Stream);
    let stop = Arc::new(AtomicBool::new(false));
    let ringing = {
        let (stop, bell) = (Arc::clone(&stop), peer.bell.try_clone().expect("a descriptor"));
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let _ = packet::push(bell.as_fd(), &[1; 65_536]);
            }
        })
    };
    let (done, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for _ in 0..200 {
            connection.bell().empty();
        }
        // A signal handler gets its say although no sleep is ever interrupted.
        let asked = AtomicU32::new(0);
        let ask = || asked.fetch_add(1, Ordering::Relaxed) > 0;
        let how = How { wait: Wait::Block, interrupted: Some(&ask), ..How::default() };
        let _ = done.send(receive(&connection, &how));
    });
    let told = told.recv_timeout(LIMIT);
    stop.store(true, Ordering::Relaxed);
    ringing.join().expect("a thread");
    assert!(matches!(told, Ok(Err(Error::Interrupted { .. }))), "{told:?}");
}
