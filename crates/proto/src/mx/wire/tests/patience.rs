//! How long requests wait for a peer that does not answer.

use super::*;

#[test]
fn patience_is_about_what_was_asked_for() {
    for patience in [SECOND / 100, SECOND, 60 * SECOND] {
        let mut net = Net::connected(1, CLEAR, Profile::WIRE);
        net.sides[0].wire.set_patience(patience);
        net.gone = Some(1);
        let before = net.now;
        net.send(0, 0, 10, false);
        net.connect(0, KEY);
        net.run(|net| net.sides[0].program.sends.is_empty());
        let took = net.now - before;
        assert!(took >= patience && took < 2 * patience + SECOND, "{took} ns of {patience}");
    }
}

const OVER: Outcome = Err(Status::EndpointUnreachable);

/// How long side 0 takes until its sends have ended.
fn until_ended(net: &mut Net) -> u64 {
    let before = net.now;
    net.run(|net| net.sides[0].program.sends.is_empty());
    net.now - before
}

#[test]
fn a_request_that_runs_out_of_patience_takes_its_peer_down() {
    for patience in [0, SECOND / 10, SECOND, 60 * SECOND] {
        let mut net = Net::connected(1, CLEAR, Profile::WIRE);
        net.gone = Some(1);
        net.send(0, 0, 10, false);
        net.send(0, 1, 1 << 20, true);
        // These wait until there is room.
        (2..300).for_each(|n| net.send(0, n, 10, false));
        net.connect(0, KEY);
        net.sides[0].wire.set_patience_of(Pending::Send(1), patience);
        let took = until_ended(&mut net);
        assert!(took >= patience && took < patience + SECOND, "{took} ns of {patience}");
        let program = &net.sides[0].program;
        assert_eq!(program.ended.len(), 300);
        assert!(program.ended.iter().all(|(_, end)| *end == OVER));
        assert_eq!(program.connected[1], (1, Err(Status::EndpointUnreachable)));
        assert_eq!(program.voided, [0]);
    }
}

#[test]
fn what_waits_behind_others_has_a_patience_too() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.gone = Some(1);
    (0..300).for_each(|n| net.send(0, n, 10, false));
    net.sides[0].wire.set_patience_of(Pending::Send(299), SECOND);
    assert!(until_ended(&mut net) < 2 * SECOND);
}

#[test]
fn patience_is_counted_from_when_it_was_asked_for() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.gone = Some(1);
    net.send(0, 0, 10, false);
    for n in 1..40 {
        net.run_for(17 * SECOND / 3);
        net.send(0, n, 10, false);
        assert!(net.sides[0].program.ended.is_empty());
    }
    net.sides[0].wire.set_patience_of(Pending::Send(39), 3 * SECOND);
    let took = until_ended(&mut net);
    assert!((3 * SECOND..4 * SECOND).contains(&took), "{took} ns");
}

#[test]
fn an_answer_gives_all_their_patience_back() {
    for tenths in 10..20 {
        let mut net = Net::connected(1, CLEAR, Profile::WIRE);
        net.gone = Some(1);
        let next = net.next_send(0) + 1;
        net.send(0, 0, 10, false);
        net.send(0, 1, 10, false);
        for send in [0, 1] {
            net.sides[0].wire.set_patience_of(Pending::Send(send), 2 * SECOND);
        }
        net.run_for(tenths * SECOND / 10);
        let (ends, session) = (Ends { to: 0, from: 1, generation: 0 }, SESSIONS[0]);
        let ack = Frame::Ack { ends, session, next, number: 1, sent: next, resent: 0 };
        let Side { wire, program } = &mut net.sides[0];
        wire.handle(net.now, NICS[1], &ack, program);
        let took = until_ended(&mut net);
        assert_eq!(net.sides[0].program.ended, [(0, Ok(10)), (1, OVER)]);
        assert!((2 * SECOND..3 * SECOND).contains(&took), "{took} ns");
    }
}

#[test]
fn lost_frames_cost_no_request_its_patience() {
    for seed in 1..6 {
        let mut net = Net::connected(seed, STORM, Profile::WIRE);
        for (n, length) in LENGTHS.iter().enumerate() {
            net.send(0, n as u32, *length, *length > 32768);
            net.sides[0].wire.set_patience_of(Pending::Send(n as u32), 5 * SECOND);
        }
        net.run(|net| net.all_ended() && net.sides[1].program.arrived.len() == LENGTHS.len());
        net.check(1, &LENGTHS);
    }
}

#[test]
fn a_request_may_wait_for_ever() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.sides[0].wire.set_patience(u64::MAX);
    net.gone = Some(1);
    net.send(0, 0, 10, false);
    // As many milliseconds as C can say, which are more ticks than 32 bits have.
    net.send(0, 1, 10, false);
    net.sides[0].wire.set_patience_of(Pending::Send(1), u64::from(u32::MAX) * MS);
    net.connect(0, KEY);
    net.run_for(3000 * SECOND);
    assert!(net.sides[0].program.ended.is_empty());
    net.gone = None;
    net.run(|net| net.all_ended() && net.sides[0].program.connected.len() == 2);
    net.check(1, &[10, 10]);
}

#[test]
fn what_was_sent_before_keeps_its_patience() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.gone = Some(1);
    net.send(0, 0, 10, false);
    net.sides[0].wire.set_patience(SECOND);
    net.run_for(60 * SECOND);
    assert!(net.sides[0].program.ended.is_empty());
    net.send(0, 1, 10, false);
    assert!(until_ended(&mut net) < 2 * SECOND);
}

#[test]
fn a_connect_has_a_patience_of_its_own() {
    let mut net = Net::new(1, CLEAR, Profile::WIRE);
    net.gone = Some(1);
    net.connect(0, KEY);
    net.sides[0].wire.set_patience_of(Pending::Connect(0), 2 * SECOND);
    let before = net.now;
    net.run(|net| !net.sides[0].program.connected.is_empty());
    let took = net.now - before;
    assert!((2 * SECOND..3 * SECOND).contains(&took), "{took} ns");
}

/// The receiver has heard of it and is there: that nobody takes it is no silence.
#[test]
fn patience_is_with_the_peer_and_not_with_its_program() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.sides[1].program.keeps = true;
    net.send(0, 0, 1 << 20, true);
    net.sides[0].wire.set_patience_of(Pending::Send(0), 20 * SECOND);
    net.run_for(1000 * SECOND);
    assert!(net.sides[0].program.ended.is_empty());
    net.gone = Some(1);
    net.run_for(10 * SECOND);
    net.gone = None;
    net.run_for(10 * SECOND);
    net.gone = Some(1);
    let took = until_ended(&mut net);
    assert!((20 * SECOND..25 * SECOND).contains(&took), "{took} ns");
    assert_eq!(net.sides[0].program.ended, [(0, OVER)]);
}

#[test]
fn a_receive_that_runs_out_of_patience_ends_alone() {
    // Known when the pull begins, or said later.
    for early in [true, false] {
        let mut net = Net::connected(1, CLEAR, Profile::WIRE);
        net.swallowed = vec![42];
        net.sides[1].program.patience = early.then_some(2 * SECOND);
        net.send(0, 0, 1 << 20, true);
        net.run_for(SECOND / 10);
        net.sides[1].program.patience = None;
        net.send(0, 1, 1 << 20, true);
        net.run_for(SECOND / 10);
        if !early {
            net.sides[1].wire.set_patience_of(Pending::Pull(0), 2 * SECOND);
        }
        net.run_for(SECOND);
        assert_eq!(net.sides[1].program.arrived[0].2, None);
        net.run_for(5 * SECOND);
        assert_eq!(net.sides[1].program.arrived[0].2, Some(OVER));
        // Its sender is told how much of it was taken, and the other goes on.
        assert_eq!(net.sides[0].program.ended, [(0, Ok(0))]);
        net.swallowed.clear();
        net.run(Net::all_ended);
        assert_eq!(net.sides[1].program.arrived[1].2, Some(Ok(1 << 20)));
    }
}

#[test]
fn a_program_that_was_stopped_has_not_waited() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.send(1, 0, 8 << 20, true);
    net.run_for(MS);
    net.swallowed = vec![37, 40, 42];
    net.send(0, 0, 10, false);
    net.send(0, 1, 1 << 20, true);
    net.run_for(SECOND / 10);
    assert_eq!(net.sides[0].program.arrived[0].2, None);
    net.now += 1000 * SECOND;
    net.step();
    net.swallowed.clear();
    net.run(|net| net.all_ended() && !net.sides[1].program.arrived.is_empty());
    net.check(1, &[10, 1 << 20]);
    net.check(0, &[8 << 20]);
}

#[test]
fn what_was_lost_with_the_way_goes_out_again_at_once() {
    for more in 0..10 {
        let mut net = Net::connected(1, CLEAR, Profile::WIRE);
        net.sides[0].wire.set_patience(60 * SECOND);
        net.send(1, 0, 8 << 20, true);
        net.run_for(MS);
        assert_eq!(net.sides[0].program.arrived[0].2, None);
        net.swallowed = (35..46).collect();
        net.send(0, 0, 10, false);
        net.connect(0, KEY);
        net.run_for(30 * SECOND + more * 97 * MS);
        net.swallowed.clear();
        let now = net.now;
        net.sides.iter_mut().for_each(|side| side.wire.resume(now));
        net.run(|net| net.all_ended() && net.sides[0].program.connected.len() == 2);
        assert!(net.now - now < 20 * MS, "{} ns", net.now - now);
        net.check(1, &[10]);
        net.check(0, &[8 << 20]);
    }
}

/// It has acknowledged the announcement, and was never asked again; or it has begun to fetch.
#[test]
fn a_large_message_to_a_station_that_is_gone_ends() {
    for keeps in [true, false] {
        let mut net = Net::connected(1, CLEAR, Profile::WIRE);
        net.sides[1].program.keeps = keeps;
        // No answer to a pull arrives.
        net.swallowed = vec![42];
        net.sides[0].wire.set_patience(10 * SECOND);
        net.send(0, 0, 1 << 20, true);
        net.run_for(SECOND / 2);
        net.swallowed = (35..46).collect();
        let took = until_ended(&mut net);
        assert!(took > 9 * SECOND && took < 20 * SECOND, "{took} ns");
        assert_eq!(net.sides[0].program.ended, [(0, OVER)]);
    }
}

#[test]
fn an_acknowledgement_waits_for_room() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.sides[1].program.full = true;
    net.send(0, 0, 10, false);
    net.run_for(20 * MS);
    net.sides[1].program.full = false;
    let Side { wire, program } = &mut net.sides[1];
    wire.close(program);
    assert!(program.out.iter().any(|(_, frame)| frame[16] == 35), "closed, and never acknowledged");
}
