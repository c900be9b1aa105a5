//! Endpoints that are closed and opened again, and peers that give each other up and do not hear of it.

use super::*;

#[test]
fn a_late_answer_is_not_taken_for_that_to_another_connect() {
    for disconnects in [false, true] {
        let mut net = Net::new(1, CLEAR, Profile::WIRE);
        let mut held = Vec::new();
        for n in 0..2 {
            let Side { wire, program } = &mut net.sides[0];
            assert!(wire.connect(net.now, (NICS[1], 1), KEY, n, program));
            if n == 0 && disconnects {
                let id = wire.by_address[&(NICS[1], 1)];
                wire.disconnect(id, program);
            } else if n == 0 {
                wire.set_patience_of(Pending::Connect(0), SECOND);
                while program.connected.is_empty() {
                    net.now += MS;
                    wire.tick(net.now, program);
                }
            }
            held.append(&mut program.out);
        }
        assert_eq!(net.sides[0].program.connected.len(), 1, "the first was given up");
        // The other side looks only now, and answers all.
        for (_, frame) in held {
            let (_, frame) = decode(&frame, &Profile::WIRE).expect("a frame");
            let Side { wire, program } = &mut net.sides[1];
            wire.handle(net.now, NICS[0], &frame, program);
        }
        net.post(1);
        net.run(|net| net.sides[0].program.connected.len() == 2);
        let (_, connected) = net.sides[0].program.connected[1];
        assert!(connected.is_ok());
        net.send(0, 0, 10, false);
        net.run(Net::all_ended);
        assert_eq!(net.sides[1].program.arrived.len(), 1, "disconnects: {disconnects}");
    }
}

#[test]
fn acknowledgements_are_heard_however_often_a_peer_was_given_up() {
    for times in 1..=8 {
        let mut net = Net::connected(1, CLEAR, Profile::WIRE);
        for n in 0..500 {
            net.send(1, n, 10, false);
            net.run_for(MS / 10);
        }
        net.run(Net::all_ended);
        // The other side hears nothing of these.
        net.swallowed = (35..46).collect();
        for _ in 0..times {
            let Side { wire, program } = &mut net.sides[0];
            wire.disconnect(0, program);
            net.connect(0, KEY);
            net.run_for(MS);
        }
        net.swallowed.clear();
        let before = net.sides[0].program.connected.len();
        net.run(|net| net.sides[0].program.connected.len() > before);
        net.sides[0].program.arrived.clear();
        net.send(1, 0, 10, false);
        net.run_for(20 * SECOND);
        assert_eq!(net.sides[0].program.arrived.len(), 1);
        assert!(net.sides[1].program.sends.is_empty(), "after {times} times the sender hears of nothing");
    }
}

/// Side 1 is closed and opened again: it knows nothing any more.
fn open_again(net: &mut Net) {
    net.sides[1].wire = wire(1, LATER, Profile::WIRE);
    net.sides[1].program = Program::new(1, Profile::WIRE);
}

#[test]
fn a_pull_does_not_fetch_from_the_window_of_a_later_instance() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.send(1, 7, 1 << 20, true);
    // No answer to a pull arrives.
    net.swallowed = vec![42];
    net.run_for(5 * SECOND);
    assert_eq!(net.sides[0].program.arrived.len(), 1);
    net.swallowed.clear();
    open_again(&mut net);
    net.connect(1, KEY);
    net.run(|net| !net.sides[1].program.connected.is_empty());
    // Nobody has asked for this one yet.
    net.sides[0].program.keeps = true;
    net.send(1, 9, 1 << 20, true);
    net.run_for(60 * SECOND);
    let (_, _, end) = net.sides[0].program.arrived[0];
    assert_eq!(end, Some(Err(Status::EndpointUnreachable)));
    assert_eq!(net.sides[1].program.sends.len(), 1, "it waits to be taken");
}

#[test]
fn messages_of_an_old_instance_behind_a_connect_cost_the_new_one_nothing() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.send(1, 0, 10, false);
    net.run(Net::all_ended);
    // Two are on their way when their program ends and another one begins; and we connect before they are here.
    net.send(1, 1, 10, false);
    net.send(1, 2, 10, false);
    open_again(&mut net);
    net.connect(0, KEY);
    net.run(|net| net.sides[0].program.connected.len() == 2);
    net.sides[0].program.arrived.clear();
    (0..5).for_each(|n| net.send(1, n, 10, false));
    net.run(|net| net.sides[1].program.sends.is_empty());
    let order = net.sides[0].program.arrived.iter().map(|(matching, ..)| *matching >> 8);
    assert_eq!(order.collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
}
