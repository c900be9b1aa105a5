//! Messages have numbers of 14 bits: what stays for long must not be taken for what has its number later.

use super::*;

const NUMBERS: u32 = 1 << 14;

/// Everything arrived in the order in which it was sent.
fn check_order(net: &Net) {
    let order = net.sides[1].program.arrived.iter().map(|(matching, ..)| (*matching >> 8) as u32);
    let order: Vec<u32> = order.collect();
    let wrong = order.iter().zip(0..).find(|(got, wanted)| *got != wanted);
    assert_eq!(wrong, None, "this message was delivered in the place of that");
}

#[test]
fn a_copy_that_came_early_and_was_put_back_is_not_delivered_later() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    // There is no memory for the first; the others come early, and when it is there, there is none for the second.
    net.sides[1].program.no_memory = 1;
    (0..3).for_each(|n| net.send(0, n, 10, false));
    net.run(|net| net.sides[1].wire.peer(0).is_some_and(|peer| peer.early_kept() == 2));
    net.sides[1].program.refuses_in = 2;
    net.run(|net| net.all_ended() && net.sides[1].program.arrived.len() == 3);
    assert_eq!(net.sides[1].wire.peer(0).expect("a peer").early_bytes(), 0);
    for n in 3..NUMBERS + 600 {
        net.send(0, n, 11, false);
        if n % 64 == 0 {
            net.run_for(50 * MS);
        }
    }
    net.run(Net::all_ended);
    check_order(&net);
}

#[test]
fn a_large_message_that_nobody_takes_is_not_announced_as_another() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.sides[1].program.keeps = true;
    net.send(0, 0, 100_000, true);
    for n in 1..NUMBERS + 3000 {
        net.send(0, n, 11, false);
        net.run_for(5 * MS);
    }
    net.run_for(2 * SECOND);
    check_order(&net);
    assert_eq!(net.sides[1].program.kept.len(), 1);
    assert_eq!(net.sides[0].program.sends.len(), 1, "all others have ended");
    // It can be taken still.
    let (peer, large, ticket) = net.sides[1].program.kept[0];
    let Side { wire, program } = &mut net.sides[1];
    wire.pull(net.now, peer, large, (ticket, u32::MAX), program);
    net.post(1);
    net.run(Net::all_ended);
}

#[test]
fn a_peer_with_an_old_announcement_that_is_silent_is_not_given_up() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.sides[1].program.keeps = true;
    net.send(0, 0, 100_000, true);
    net.run_for(3 * SECOND);
    for n in 1..10_000 {
        net.send(0, n, 11, false);
        if n % 64 == 0 {
            net.run_for(MS);
        }
    }
    net.run_for(600 * SECOND);
    assert!(net.sides[0].program.ended.iter().all(|(_, end)| end.is_ok()));
    assert!(net.sides[0].program.voided.is_empty());
}

#[test]
fn a_notify_takes_the_name_of_its_own_announcement_alone() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    net.sides[1].program.keeps = true;
    net.send(0, 0, 100_000, true);
    net.run_for(MS);
    for n in 1..NUMBERS {
        net.send(0, n, 11, false);
        if n % 64 == 0 {
            net.run_for(MS);
        }
    }
    net.run_for(50 * MS);
    assert_eq!(net.sides[0].program.sends.len(), 1, "only the large one is left");
    // The next one has its number, and is lost for a while.
    net.swallowed = vec![37];
    net.send(0, NUMBERS, 12, false);
    let (peer, large, ticket) = net.sides[1].program.kept[0];
    let Side { wire, program } = &mut net.sides[1];
    wire.pull(net.now, peer, large, (ticket, u32::MAX), program);
    net.post(1);
    net.run_for(5 * MS);
    assert!(!net.sides[0].program.sends.contains_key(&0), "the large one was taken");
    net.swallowed.clear();
    net.run(Net::all_ended);
}
