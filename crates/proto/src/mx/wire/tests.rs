//! Two endpoints and what may happen to them, in the network of [`net`].

mod instances;
mod net;
mod patience;
mod strangers;
mod wraps;

use alloc::collections::VecDeque;
use alloc::vec;

use isthmus_wire::mxoe::decode;
use net::*;
use proptest::prelude::*;

use super::*;

const CLEAR: Weather = Weather { lost: 0, doubled: 0, late: 0, corrupted: 0 };
const STORM: Weather = Weather { lost: 100_000, doubled: 50_000, late: 100_000, corrupted: 0 };

/// Around every limit of the format.
const LENGTHS: [u32; 17] = [
    0, 1, 32, 33, 128, 129, 4095, 4096, 4097, 8192, 32767, 32768, 32769, 131_071, 131_072, 131_073, 1_048_577,
];

fn exchange(seed: u64, weather: Weather, profile: Profile, lengths: &[u32]) -> Net {
    let mut net = Net::connected(seed, weather, profile);
    for (n, length) in lengths.iter().enumerate() {
        net.send(0, n as u32, *length, *length > 32768);
    }
    net.run(|net| net.all_ended() && net.sides[1].program.arrived.len() == lengths.len());
    net.check(1, lengths);
    net
}

#[test]
fn every_length_arrives() {
    for profile in [Profile::WIRE, Profile::own(9000), Profile::own(1500), Profile::own(65535)] {
        let net = exchange(1, CLEAR, profile, &LENGTHS);
        // Nothing was sent twice: each message, its acknowledgement and a little more.
        assert!(net.frames < 2000, "{} frames", net.frames);
    }
}

#[test]
fn every_length_arrives_through_a_storm() {
    for seed in 1..12 {
        for profile in [Profile::WIRE, Profile::own(9000), Profile::own(1500), Profile::own(65535)] {
            exchange(seed, STORM, profile, &LENGTHS);
        }
    }
}

#[test]
fn each_type_of_frame_may_be_lost_for_a_while() {
    for kind in 35..=43 {
        let mut net = Net::new(u64::from(kind), CLEAR, Profile::WIRE);
        if kind == 36 {
            net.swallowed = vec![kind];
        }
        net.connect(0, KEY);
        net.run_for(2 * SECOND);
        net.swallowed.clear();
        net.run(|net| !net.sides[0].program.connected.is_empty());
        net.swallowed = vec![kind];
        for (n, length) in LENGTHS.iter().enumerate() {
            net.send(0, n as u32, *length, *length > 32768);
        }
        net.run_for(2 * SECOND);
        net.swallowed.clear();
        net.run(|net| net.all_ended() && net.sides[1].program.arrived.len() == LENGTHS.len());
        net.check(1, &LENGTHS);
    }
}

/// Acknowledgements to notifies: a tenth is lost, a tenth doubled, and every third comes after many that were sent later.
#[test]
fn each_type_of_frame_has_its_own_storm() {
    let weather = Weather { lost: 100_000, doubled: 100_000, late: 300_000, corrupted: 0 };
    let lengths: Vec<u32> = LENGTHS.iter().copied().cycle().take(3 * LENGTHS.len()).collect();
    for (kind, profile) in (35..=43).flat_map(|kind| [(kind, Profile::WIRE), (kind, Profile::own(1500))]) {
        let mut net = Net::new(u64::from(kind), weather, profile);
        net.only = Some(kind);
        net.connect(0, KEY);
        net.run(|net| !net.sides[0].program.connected.is_empty());
        for (n, length) in lengths.iter().enumerate() {
            net.send(0, n as u32, *length, *length > 32768);
        }
        net.run(|net| net.all_ended() && net.sides[1].program.arrived.len() == lengths.len());
        net.check(1, &lengths);
    }
}

/// The first block, or the last one, is lost as a whole when it is first answered.
#[test]
fn a_block_that_is_lost_comes_again() {
    for length in [1, 4097, 32769, 131_072, 131_073, 1_048_577] {
        for last in [false, true] {
            let mut net = Net::connected(1, CLEAR, Profile::WIRE);
            let mut seen = alloc::collections::BTreeSet::new();
            let block = if last { (length - 1) / 32768 } else { 0 };
            net.loses = Some(alloc::boxed::Box::new(move |frame: &[u8]| {
                let offset = u32::from_be_bytes([frame[20], frame[21], frame[22], frame[23]]);
                frame[16] == 42 && offset / 32768 == block && seen.insert(offset)
            }));
            net.send(0, 0, length, true);
            let before = net.now;
            net.run(|net| net.all_ended() && net.sides[1].program.arrived.len() == 1);
            net.check(1, &[length]);
            assert!(net.now - before < SECOND / 10, "{} ns", net.now - before);
        }
    }
}

/// A message of one byte, as side 0 sends it: the n-th after the next that is expected.
fn tiny_after(net: &Net, n: u16) -> (Message, [u8; 1]) {
    let peer = net.sides[1].wire.peer(0).expect("a peer");
    let message = Message {
        ends: Ends { to: 1, from: 0, generation: 0 },
        checksum: 0,
        sequence: peer.next_match.plus(n).bits(),
        piggyack: peer.next_send.bits(),
        matching: n.into(),
        session: SESSIONS[1],
    };
    (message, [n as u8])
}

#[test]
fn messages_may_overtake_255_others_and_no_more() {
    // So that the numbers wrap in the middle.
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    let value = net.sides[1].wire.peer(0).expect("a peer").next_match.value();
    let sent = ((1 << 14) - 100 - u32::from(value)) as usize;
    for n in 0..sent {
        net.send(0, n as u32, 0, false);
        if n % 64 == 0 {
            net.run(Net::all_ended);
        }
    }
    net.run(|net| net.all_ended() && net.sides[1].program.arrived.len() == sent);
    let frames: Vec<_> = (0..=256).rev().map(|n| tiny_after(&net, n)).collect();
    let Side { wire, program } = &mut net.sides[1];
    for (message, data) in &frames {
        for _ in 0..2 {
            wire.handle(net.now, NICS[0], &Frame::Tiny { message: *message, data }, program);
        }
    }
    let arrived: Vec<u64> = program.arrived[sent..].iter().map(|(matching, ..)| *matching).collect();
    assert_eq!(arrived, (0..256).collect::<Vec<u64>>(), "the 257th is too early, and nothing comes twice");
    // Of another partner session they are nobody's.
    let (mut message, data) = tiny_after(&net, 0);
    message.sequence ^= 1 << 14;
    let Side { wire, program } = &mut net.sides[1];
    wire.handle(net.now, NICS[0], &Frame::Tiny { message, data: &data }, program);
    assert_eq!(program.arrived.len(), sent + 256);
}

#[test]
fn a_large_message_is_pulled_from_where_its_window_says() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    let (message, _) = tiny_after(&net, 0);
    let window = Window { id: 7, sequence: 99, offset: 100 };
    let Side { wire, program } = &mut net.sides[1];
    wire.handle(net.now, NICS[0], &Frame::Rendezvous { message, length: 50_000, window }, program);
    wire.tick(net.now, program);
    let pulls: Vec<_> = program.out.iter().filter(|(_, frame)| frame[16] == 41).collect();
    let told: Vec<_> =
        pulls.iter().map(|(_, frame)| decode(frame, &Profile::WIRE).expect("a pull").1).collect();
    let said = |told: &Frame<'_>| match *told {
        Frame::Pull { window, skip, block, first, .. } => (window, skip, block, first),
        _ => panic!("no pull"),
    };
    assert_eq!(told.iter().map(said).collect::<Vec<_>>(), [(window, 100, 32668, 0), (window, 0, 17332, 8)]);
}

/// Another program has the endpoint, and says nothing: whoever sends hears that it is another.
#[test]
fn a_peer_that_starts_again_in_silence_ends_what_is_sent_to_it() {
    for seed in 1..20 {
        let mut net = Net::connected(seed, Weather { lost: 30_000, late: 30_000, ..CLEAR }, Profile::WIRE);
        for n in 0..40 {
            net.send(0, n, [10, 5000, 200_000][n as usize % 3], n % 3 == 2);
        }
        net.run_for(seed * MS / 7);
        net.sides[1].wire = wire(1, LATER, Profile::WIRE);
        net.sides[1].program = Program::new(1, Profile::WIRE);
        let before = net.now;
        net.run(|net| net.sides[0].program.sends.is_empty());
        assert!(net.now - before < 60 * SECOND, "{} s", (net.now - before) / SECOND);
        let ended = &net.sides[0].program.ended;
        assert!(ended.iter().all(|(_, end)| end.is_ok() || *end == Err(Status::BadSession)), "{ended:?}");
        assert!(net.sides[1].program.arrived.is_empty());
        net.connect(0, KEY);
        net.run(|net| net.sides[0].program.connected.len() == 2);
        net.sides[0].program.ended.clear();
        (0..20).for_each(|n| net.send(0, n, 5000, false));
        net.run(|net| net.all_ended() && net.sides[1].program.arrived.len() == 20);
        net.check(1, &[5000; 20]);
    }
}

#[test]
fn loss_of_one_in_a_hundred_costs_little() {
    let lengths = [1 << 20; 64];
    let clear = exchange(3, CLEAR, Profile::WIRE, &lengths);
    let lossy = exchange(3, Weather { lost: 10_000, ..CLEAR }, Profile::WIRE, &lengths);
    let (clear, lossy) = (clear.now - SECOND, lossy.now - SECOND);
    assert!(lossy < 2 * clear, "{lossy} ns where {clear} without loss");
}

#[test]
fn many_small_messages_wait_for_each_other() {
    let lengths = vec![40; 20_000];
    exchange(5, CLEAR, Profile::WIRE, &lengths);
    exchange(5, Weather { lost: 20_000, ..CLEAR }, Profile::WIRE, &lengths[..5000]);
}

#[test]
fn the_last_frame_that_is_lost_comes_again() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.swallowed = vec![37];
    net.send(0, 0, 3, false);
    net.run_for(5 * MS);
    net.swallowed.clear();
    let before = net.now;
    net.run(Net::all_ended);
    net.check(1, &[3]);
    assert!(net.now - before < SECOND / 2);
}

#[test]
fn a_wrong_key_is_told_and_changes_nothing() {
    let mut net = Net::new(1, CLEAR, Profile::WIRE);
    net.connect(0, KEY + 1);
    net.run(|net| !net.sides[0].program.connected.is_empty());
    assert_eq!(net.sides[0].program.connected, [(0, Err(Status::BadKey))]);
    assert!(net.sides[1].wire.by_address.is_empty());
    let program = &mut net.sides[0].program;
    program.sends.insert(0, vec![]);
    assert_eq!(net.sides[0].wire.send(net.now, 0, (0, 0, 0), false, program), Err(Status::BadSession));
}

#[test]
fn a_peer_that_answers_can_be_sent_to_by_either_side() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.send(1, 0, 100_000, true);
    net.run(Net::all_ended);
    net.check(0, &[100_000]);
}

#[test]
fn a_peer_that_is_not_there_ends_a_connect_and_sends() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.gone = Some(1);
    net.send(0, 0, 10, false);
    net.send(0, 1, 1 << 20, true);
    net.connect(0, KEY);
    net.run(|net| net.sides[0].program.sends.is_empty());
    let program = &net.sides[0].program;
    assert!(program.ended.iter().all(|(_, end)| *end == Err(Status::EndpointUnreachable)));
    assert_eq!(program.connected.last(), Some(&(1, Err(Status::EndpointUnreachable))));
    // About 500 s, as the format's stations do.
    assert!(net.now > 300 * SECOND && net.now < 800 * SECOND, "{} s", net.now / SECOND);
}

#[test]
fn a_nack_ends_what_it_answers() {
    for (why, status) in [
        (mxoe::BAD_ENDPOINT, Status::BadEndpoint),
        (mxoe::ENDPOINT_CLOSED, Status::EndpointClosed),
        (mxoe::BAD_SESSION, Status::BadSession),
    ] {
        let mut net = Net::connected(1, CLEAR, Profile::WIRE);
        let first = net.next_send(0);
        net.gone = Some(1);
        net.send(0, 0, 10, false);
        net.send(0, 1, 1 << 20, true);
        net.connect(0, KEY);
        let Side { wire, program } = &mut net.sides[0];
        for sequence in [first, first + 1, 0] {
            let nack = Frame::NackLib { to: 1, from: 0, generation: 0, why, index: INDEX_UNKNOWN, sequence };
            wire.handle(net.now, NICS[1], &nack, program);
        }
        assert_eq!(program.ended, [(0, Err(status)), (1, Err(status))]);
        assert_eq!(program.connected[1], (1, Err(status)));
        assert!(wire.windows.iter().all(Option::is_none));
    }
}

#[test]
fn a_receiver_that_dies_in_the_middle_of_a_large_message_is_noticed() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.sides[1].program.keeps = true;
    let sequence = net.next_send(0);
    net.send(0, 0, 1 << 20, true);
    net.run_for(SECOND / 2);
    assert_eq!(net.sides[1].program.kept.len(), 1);
    // Its station answers for it.
    net.gone = Some(1);
    net.run_for(2 * SECOND);
    let Side { wire, program } = &mut net.sides[0];
    assert!(program.ended.is_empty());
    let why = mxoe::ENDPOINT_CLOSED;
    let nack = Frame::NackLib { to: 1, from: 0, generation: 0, why, index: INDEX_UNKNOWN, sequence };
    wire.handle(net.now, NICS[1], &nack, program);
    assert_eq!(program.ended, [(0, Err(Status::EndpointClosed))]);
}

#[test]
fn a_large_message_that_nobody_takes_waits_for_hours() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.sides[1].program.keeps = true;
    net.send(0, 0, 1 << 20, true);
    net.run_for(3000 * SECOND);
    let (peer, large, ticket) = net.sides[1].program.kept[0];
    let Side { wire, program } = &mut net.sides[1];
    wire.pull(net.now, peer, large, (ticket, u32::MAX), program);
    net.post(1);
    net.run(Net::all_ended);
    net.check(1, &[1 << 20]);
}

#[test]
fn a_sender_that_dies_in_the_middle_of_a_pull_is_noticed() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.swallowed = vec![42];
    net.send(0, 0, 1 << 20, true);
    net.run_for(SECOND);
    net.gone = Some(0);
    net.run_for(SECOND);
    let Side { wire, program } = &mut net.sides[1];
    let cookie = Cookie { handle: 0x23, magic: 1 ^ mxoe::MAGIC };
    let wrong = Frame::NackPull { from: 1, generation: 0, why: BAD_WINDOW, cookie };
    wire.handle(net.now, NICS[0] + 7, &wrong, program);
    assert_eq!(program.arrived[0].2, None, "another station's word");
    wire.handle(net.now, NICS[0], &wrong, program);
    assert_eq!(program.arrived[0].2, Some(Err(Status::BadWindow)));
    // The sender is told all the same, if it lives.
    let notify = |(_, frame): &(u64, Vec<u8>)| frame[16] == 43;
    assert!(program.out.iter().any(notify));
}

#[test]
fn a_peer_that_starts_again_ends_what_was_pending_and_is_connected_to() {
    let mut unfinished = 0;
    for seed in 1..30 {
        let mut net = Net::connected(seed, Weather { lost: 30_000, late: 30_000, ..CLEAR }, Profile::WIRE);
        for n in 0..40 {
            net.send(0, n, [10, 5000, 200_000][n as usize % 3], n % 3 == 2);
        }
        net.run_for(seed * MS / 7);
        // Another program opens the endpoint, and connects.
        net.sides[1].wire =
            wire(1, LATER.wrapping_add((seed as u32).wrapping_mul(0x1234_5677)), Profile::WIRE);
        net.sides[1].program = Program::new(1, Profile::WIRE);
        net.connect(1, KEY);
        net.run(|net| {
            net.sides[0].program.sends.is_empty() && net.sides[1].program.connected == [(0, Ok(0))]
        });
        let fine = |(_, end): &&(u32, Result<u32, Status>)| end.is_ok();
        unfinished += 40 - net.sides[0].program.ended.iter().filter(fine).count();
        net.run_for(SECOND);
        assert!(net.sides[1].program.arrived.is_empty(), "stale messages match");
        // Both ways, in order, from the beginning.
        net.sides[0].program.ended.clear();
        net.sides[0].program.arrived.clear();
        for n in 0..20 {
            net.send(0, n, 5000, false);
            net.send(1, n, 5000, false);
        }
        net.run(|net| net.all_ended() && net.sides.iter().all(|side| side.program.arrived.len() == 20));
        net.check(0, &[5000; 20]);
        net.check(1, &[5000; 20]);
    }
    assert!(unfinished > 100, "nothing was pending");
}

#[test]
fn the_same_peer_can_be_given_up_and_connected_to_again() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.send(1, 0, 10, false);
    net.run(Net::all_ended);
    let Side { wire, program } = &mut net.sides[0];
    wire.clean_up(0, program);
    assert_eq!(program.voided, [0]);
    net.connect(0, KEY);
    net.run(|net| net.sides[0].program.connected.len() == 2);
    net.sides[0].program.arrived.clear();
    net.sides[1].program.ended.clear();
    net.send(1, 0, 10, false);
    net.send(0, 0, 10, false);
    net.run(|net| net.all_ended() && net.sides.iter().all(|side| side.program.arrived.len() == 1));
    net.check(0, &[10]);
    net.check(1, &[10]);
}

#[test]
fn a_disconnected_peer_is_forgotten() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.gone = Some(1);
    net.send(0, 0, 10, false);
    let Side { wire, program } = &mut net.sides[0];
    wire.disconnect(0, program);
    assert_eq!(program.ended, [(0, Err(Status::EndpointUnreachable))]);
    assert_eq!(wire.address(0), None);
    assert_eq!(wire.send(net.now, 0, (1, 0, 0), false, program), Err(Status::BadSession));
    net.gone = None;
    net.connect(0, KEY);
    net.run(|net| net.sides[0].program.connected.len() == 2);
    net.send(0, 0, 10, false);
    net.run(|net| net.sides[0].program.sends.is_empty());
}

/// Again and again: what was under way either way is over, and neither side takes the old for the new.
#[test]
fn a_peer_that_was_disconnected_and_connected_again_starts_anew() {
    for connects in [0, 1] {
        let mut net = Net::connected(1, CLEAR, Profile::WIRE);
        for round in 1..10 {
            for side in [0, 1] {
                (100..300).for_each(|n| net.send(side, n, 10, false));
                net.run_for(MS);
                // The first of them is lost, and what comes behind it waits for its turn.
                let mut lost = false;
                net.loses = Some(alloc::boxed::Box::new(move |frame: &[u8]| {
                    frame[16] == 37 && !core::mem::replace(&mut lost, true)
                }));
                (0..50).for_each(|n| net.send(side, n, 10, false));
                net.loses = None;
            }
            net.run_for(MS / 10);
            let Side { wire, program } = &mut net.sides[0];
            wire.disconnect(0, program);
            net.swallowed = (35..46).collect();
            net.run_for(MS);
            net.swallowed.clear();
            let before = net.sides[connects].program.connected.len();
            net.connect(connects, KEY);
            net.run(|net| net.sides[connects].program.connected.len() > before);
            net.run(|net| net.sides.iter().all(|side| side.program.sends.is_empty()));
            for side in &mut net.sides {
                side.program.arrived.clear();
                side.program.ended.clear();
            }
            for side in [0, 1] {
                (0..20).for_each(|n| net.send(side, n, 11, false));
            }
            net.run(|net| net.sides.iter().all(|side| side.program.sends.is_empty()));
            net.check(0, &[11; 20]);
            net.check(1, &[11; 20]);
            assert!(net.now < 60 * SECOND, "round {round} of {connects}: {} s", net.now / SECOND);
        }
    }
}

#[test]
fn a_receiver_without_memory_gets_it_again() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.sides[1].program.no_memory = 3;
    let lengths = [10, 5000, 100, 100_000, 0];
    for (n, length) in lengths.iter().enumerate() {
        net.send(0, n as u32, *length, *length > 32768);
    }
    net.run(|net| net.all_ended() && net.sides[1].program.arrived.len() == lengths.len());
    net.check(1, &lengths);
}

#[test]
fn a_receiver_may_take_less_and_the_sender_learns_how_much() {
    for short in [0, 1, 5000] {
        let mut net = Net::connected(1, CLEAR, Profile::WIRE);
        net.sides[1].program.short = Some(short);
        net.send(0, 0, 100_000, true);
        net.run(Net::all_ended);
        assert_eq!(net.sides[0].program.ended, [(0, Ok(short))]);
        assert_eq!(net.sides[1].program.arrived[0].2, Some(Ok(short)));
    }
}

#[test]
fn without_room_nothing_is_lost() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    for (n, length) in LENGTHS.iter().enumerate() {
        net.send(0, n as u32, *length, *length > 32768);
        net.sides[0].program.full = n % 2 == 0;
    }
    for turn in 0..400 {
        net.sides[turn % 2].program.full ^= true;
        net.run_for(MS / 3);
    }
    net.sides.iter_mut().for_each(|side| side.program.full = false);
    net.run(|net| net.all_ended() && net.sides[1].program.arrived.len() == LENGTHS.len());
    net.check(1, &LENGTHS);
}

#[test]
fn somebody_else_s_frames_change_nothing() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.sides[1].program.keeps = true;
    net.send(0, 0, 100_000, true);
    net.run_for(10 * MS);
    let (ends, session) = (Ends { to: 0, from: 1, generation: 0 }, SESSIONS[0]);
    let Side { wire, program } = &mut net.sides[0];
    let stranger = NICS[1] + 5;
    let window = Window { id: 0, sequence: WINDOW_FIRST, offset: 0 };
    for frame in [
        Frame::Notify { ends, session, length: 7, window, sequence: 1, piggyack: 2 },
        Frame::Ack { ends, session, next: 2, number: 9, sent: 2, resent: 0 },
        Frame::NackLib { to: 1, from: 0, generation: 0, why: 2, index: 0, sequence: 1 },
        Frame::Pull {
            ends,
            session,
            length: 9,
            window,
            cookie: Cookie::default(),
            skip: 0,
            block: 9,
            first: 0,
        },
    ] {
        wire.handle(net.now, stranger, &frame, program);
    }
    assert!(program.ended.is_empty() && wire.jobs.is_empty());
    // Nacks, and no data.
    assert!(program.out.iter().all(|(to, frame)| *to == stranger && (frame[16] == 44 || frame[16] == 45)));
}

#[test]
fn a_pull_outside_of_what_was_announced_reads_nothing() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.sides[1].program.keeps = true;
    net.send(0, 0, 100_000, true);
    net.run_for(10 * MS);
    let (ends, session) = (Ends { to: 0, from: 1, generation: 0 }, SESSIONS[0]);
    let Side { wire, program } = &mut net.sides[0];
    let cookie = Cookie::default();
    let pull = |window, skip, block, first| Frame::Pull {
        ends,
        session,
        length: 100_000,
        window,
        cookie,
        skip,
        block,
        first,
    };
    let window = Window { id: 0, sequence: WINDOW_FIRST, offset: 0 };
    for frame in [
        pull(window, 0, 8192, 23),
        pull(window, 0, 1, u32::MAX),
        pull(Window { offset: 4096 * 24, ..window }, 0, 4096, 0),
        pull(window, 4000, 4096 * 8, 0),
    ] {
        wire.handle(net.now, NICS[1], &frame, program);
    }
    wire.tick(net.now, program);
    assert!(program.out.is_empty());
    // Of a window that is not there, or not any more: said so.
    for window in [Window { id: 1, ..window }, Window { sequence: WINDOW_FIRST - 1, ..window }] {
        wire.handle(net.now, NICS[1], &pull(window, 0, 10, 0), program);
    }
    assert_eq!(program.out.len(), 2);
    assert!(program.out.iter().all(|(_, frame)| frame[16] == 45 && frame[19] == BAD_WINDOW));
}

#[test]
fn no_byte_that_is_wrong_does_harm() {
    for seed in 1..40 {
        let weather = Weather { corrupted: 100_000, lost: 10_000, ..CLEAR };
        let mut net = Net::new(seed, weather, Profile::WIRE);
        for side in [0, 1] {
            net.connect(side, KEY);
        }
        net.run_for(SECOND);
        for n in 0..60 {
            for side in [0, 1] {
                if net.sides[side].wire.session(0).is_some() {
                    net.send(side, n, LENGTHS[n as usize % LENGTHS.len()].min(40_000), n % 5 == 0);
                }
            }
            net.run_for(MS);
        }
        net.run_for(2 * SECOND);
        // In clear weather they find together again.
        net.weather = CLEAR;
        let Side { wire, program } = &mut net.sides[0];
        wire.disconnect(0, program);
        program.ended.clear();
        net.run_for(2 * SECOND);
        let connects = net.sides[0].program.connected.len();
        net.connect(0, KEY);
        net.run(|net| net.sides[0].program.connected.len() > connects);
        assert_eq!(net.sides[0].program.connected.last(), Some(&(connects as u32, Ok(0))));
        net.sides[1].program.arrived.clear();
        (0..10).for_each(|n| net.send(0, n, 5000, false));
        net.run(|net| net.sides[0].program.sends.is_empty());
        net.check(1, &[5000; 10]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_messages_arrive_in_any_weather(
        seed: u64,
        lost in 0..150_000u64,
        doubled in 0..100_000u64,
        late in 0..200_000u64,
        lengths in prop::collection::vec((0..3u8, 0..4u32), 1..80),
        own: bool,
    ) {
        let profile = if own { Profile::own(1500) } else { Profile::WIRE };
        let lengths: Vec<u32> = lengths
            .into_iter()
            .enumerate()
            .map(|(n, (scale, more))| [n as u32, 4000 * more + n as u32, 50_000 * more][usize::from(scale)])
            .collect();
        let mut net = Net::connected(seed, Weather { lost, doubled, late, corrupted: 0 }, profile);
        let mut waiting: VecDeque<_> = lengths.iter().enumerate().collect();
        while let Some((n, length)) = waiting.pop_front() {
            net.send(0, n as u32, *length, *length > 32768 || seed & 1 << (n % 64) != 0);
            if n % 7 == 0 {
                net.run_for(MS / 10);
            }
        }
        net.run(|net| net.all_ended() && net.sides[1].program.arrived.len() == lengths.len());
        net.check(1, &lengths);
    }
}

#[test]
fn a_medium_message_longer_than_any_can_be_is_none() {
    let profile = Profile::own(9000);
    let mut net = Net::connected(1, CLEAR, profile);
    let sequence = net.sides[1].wire.peer(0).expect("a peer").next_match.bits();
    let piggyack = net.sides[1].wire.peer(0).expect("a peer").next_send.bits();
    let ends = Ends { to: 1, from: 0, generation: 0 };
    let message = Message { ends, checksum: 0, sequence, piggyack, matching: 1, session: SESSIONS[1] };
    let Side { wire, program } = &mut net.sides[1];
    for total in [u32::MAX, 32 * 8192 + 1] {
        let frame = Frame::Medium { message, total, fragment: 0, offset: 0, data: &[7; 100] };
        wire.handle(net.now, NICS[0], &frame, program);
        assert!(program.arrived.is_empty(), "room for {total} bytes was made");
    }
    let frame = Frame::Medium { message, total: 32 * 8192, fragment: 0, offset: 0, data: &[7; 100] };
    wire.handle(net.now, NICS[0], &frame, program);
    assert_eq!(program.arrived.len(), 1);
}

#[test]
fn what_comes_early_from_many_peers_has_a_bound() {
    let mut net = Net::new(1, CLEAR, Profile::WIRE);
    let Side { wire, program } = &mut net.sides[1];
    for endpoint in 0..64 {
        let ends = Ends { to: 1, from: endpoint, generation: 0 };
        let (index, session) = (INDEX_UNKNOWN, 77);
        let connect = Frame::Connect { ends, index, session, key: KEY, expects: 1, number: 0 };
        wire.handle(net.now, NICS[0], &connect, program);
        let peer = wire.by_address[&(NICS[0], endpoint)];
        let next = wire.peer(peer).expect("a peer").next_match;
        for n in 1..200 {
            for fragment in 0..8 {
                let message = Message {
                    ends,
                    checksum: 0,
                    sequence: next.plus(n).bits(),
                    piggyack: 1,
                    matching: 1,
                    session: SESSIONS[1],
                };
                let offset = u32::from(fragment) * 4096;
                let frame = Frame::Medium { message, total: 32768, fragment, offset, data: &[7; 4096] };
                wire.handle(net.now, NICS[0], &frame, program);
            }
        }
        program.out.clear();
    }
    let held: usize = wire.peers.iter().flatten().map(Peer::early_bytes).sum();
    assert!(held > 1 << 20 && held <= EARLY_ALL, "{held} bytes");
}
