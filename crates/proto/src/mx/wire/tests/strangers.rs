//! Somebody else on the wire, who keeps to the format and to nothing else.

use super::*;

const NIC: u64 = NICS[1] + 99;

/// A stranger who is connected to one side, and what he and that side call each other.
struct Stranger {
    side: usize,
    id: PeerId,
    ends: Ends,
    first: Sequence,
}

impl Stranger {
    fn connected(net: &mut Net, side: usize) -> Self {
        let ends = Ends { to: side as u8, from: 3, generation: 0 };
        let connect =
            Frame::Connect { ends, index: INDEX_UNKNOWN, session: 77, key: KEY, expects: 1, number: 0 };
        let Side { wire, program } = &mut net.sides[side];
        wire.handle(net.now, NIC, &connect, program);
        let id = wire.by_address[&(NIC, 3)];
        let first = wire.peer(id).expect("a peer").next_match;
        Self { side, id, ends, first }
    }

    fn says(&self, net: &mut Net, frame: &Frame<'_>) {
        let Side { wire, program } = &mut net.sides[self.side];
        wire.handle(net.now, NIC, frame, program);
        program.out.retain(|(to, _)| *to != NIC);
    }

    /// The head of his message of this number.
    fn message(&self, number: u16) -> Message {
        let Self { ends, first, .. } = *self;
        let sequence = first.plus(number).bits();
        Message { ends, checksum: 0, sequence, piggyack: 1, matching: 1, session: SESSIONS[self.side] }
    }
}

#[test]
fn who_serves_no_pull_holds_up_nobody_elses() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    let stranger = Stranger::connected(&mut net, 1);
    for n in 0..40 {
        let window = Window { id: n as u8, sequence: 1, offset: 0 };
        let message = stranger.message(n);
        stranger.says(&mut net, &Frame::Rendezvous { message, length: 1 << 20, window });
    }
    net.send(0, 0, 1 << 20, true);
    net.run_for(10 * SECOND);
    assert!(net.sides[0].program.sends.is_empty());
}

#[test]
fn who_takes_no_large_message_holds_up_nobody_elses() {
    let mut net = Net::connected(1, CLEAR, Profile::WIRE);
    let stranger = Stranger::connected(&mut net, 0);
    let Side { wire, program } = &mut net.sides[0];
    for send in 1000..1200 {
        program.sends.insert(send, vec![0; 100_000]);
        wire.send(net.now, stranger.id, (send, 1, 100_000), true, program).expect("connected");
    }
    net.send(0, 0, 100_000, true);
    for number in 1..100 {
        // He acknowledges all.
        let next = net.sides[0].wire.peer(stranger.id).expect("a peer").next_send.bits();
        let (ends, session) = (stranger.ends, SESSIONS[0]);
        stranger.says(&mut net, &Frame::Ack { ends, session, next, number, sent: next, resent: 0 });
        net.run_for(50 * MS);
    }
    assert!(!net.sides[0].program.sends.contains_key(&0));
    assert!(net.sides[0].program.sends.contains_key(&1000));
}

#[test]
fn what_comes_early_counts_whatever_it_carries() {
    let mut net = Net::new(1, CLEAR, Profile::WIRE);
    let stranger = Stranger::connected(&mut net, 1);
    for number in 1..=255 {
        for fragment in 0..=255 {
            let message = stranger.message(number);
            stranger.says(&mut net, &Frame::Medium { message, total: 0, fragment, offset: 0, data: &[] });
        }
    }
    let peer = net.sides[1].wire.peer(stranger.id).expect("a peer");
    assert!(peer.early_kept() > 0);
    assert!(peer.early_kept() * size_of::<Early>() <= peer.early_bytes());
}

#[test]
fn of_more_messages_than_there_are_numbers_all_end() {
    let mut net = Net::new(1, CLEAR, Profile::WIRE);
    let stranger = Stranger::connected(&mut net, 1);
    for number in 0..20_000 {
        let message = stranger.message(number);
        let first = Frame::Medium { message, total: 2, fragment: 0, offset: 0, data: &[1] };
        stranger.says(&mut net, &first);
    }
    let Side { wire, program } = &mut net.sides[1];
    wire.disconnect(stranger.id, program);
    assert!(!program.arrived.is_empty());
    assert!(program.arrived.iter().all(|(_, _, end)| end.is_some()));
}
