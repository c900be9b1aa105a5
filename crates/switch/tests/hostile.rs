//! What guests, monitors, agents, containers and brokers may do to a switch, and what of it the others notice:
//! nothing.

mod fake;

use std::os::fd::AsFd;

use fake::{
    BUFFERS, FREE, HEADERS, INDIRECT, Link, MEMORY, NEXT, NOBODY, Node, PAYLOADS, QUEUE, RX, SET_MEM_TABLE,
    SET_OWNER, TX, WRITE, descriptors, encoded, flood, memory_table, monitor_message, open, own_memory,
    until,
};
use isthmus_sys::{memory, packet};
use isthmus_wire::control::{
    BELL_PORT, CONTROL_PORT, Carrier, Message, Refusal, SEATS_PORT, SocketKind, decode,
};
use isthmus_wire::vsock::{
    CREDIT_UPDATE, Header, REQUEST, RESPONSE, RST, RW, SEQ_EOM, SEQPACKET, SHUTDOWN, STREAM,
};
use rustix::fs::OFlags;

/// Operations of packets, for assertions that say what else came.
fn ops(headers: &[Header]) -> Vec<u16> {
    headers.iter().map(|header| header.op).collect()
}

// ---- memory and time

#[test]
fn a_length_that_wraps_ends_the_device_and_takes_no_memory() {
    let node = Node::new();
    let (mut a, mut b) = (node.guest(3), node.guest(4));
    let (to, _) = open(&mut a, &mut b, STREAM);
    b.post(1);
    let before = own_memory();
    let mut header = a.header(&to, RW);
    header.len = (1 << 31) + (2 << 20);
    a.write(HEADERS, &header.encode());
    a.descriptor(a.table(TX), 0, HEADERS, Header::LEN as u32, NEXT, 1);
    let mut left = header.len;
    for index in 1.. {
        let len = left.min(48 << 20);
        left -= len;
        a.descriptor(a.table(TX), index, PAYLOADS, len, if left > 0 { NEXT } else { 0 }, index + 1);
        if left == 0 {
            break;
        }
    }
    a.offer(TX, 0);
    a.kick(TX);
    assert!(node.ended(3).contains("longer than any driver sends"));
    b.wait(RST);
    b.ping();
    let grown = own_memory().saturating_sub(before);
    assert!(grown < 16, "{grown} MiB");
}

#[test]
fn a_receiver_that_says_it_took_what_it_did_not_get_makes_nothing_grow() {
    let node = Node::new();
    let (mut a, mut b) = (node.guest(3), node.guest(4));
    let (to, back) = open(&mut a, &mut b, STREAM);
    let before = own_memory();
    let data = vec![1; 64 << 10];
    let cut = (0..150).any(|_| {
        b.fwd_cnt = b.fwd_cnt.wrapping_add(1 << 20);
        b.sign(&back, CREDIT_UPDATE);
        // The sender is told, if it is, and sends as if it were.
        if a.posted() < 64 {
            a.post(64);
        }
        for _ in 0..16 {
            a.queue(a.header(&to, RW), &data);
        }
        a.kick(TX);
        ops(&a.ping()).contains(&RST)
    });
    let grown = own_memory().saturating_sub(before);
    assert!(grown < 80, "{grown} MiB");
    assert!(cut, "150 MiB for a guest that takes nothing");
    a.ping();
}

#[test]
fn empty_messages_without_end_are_cut_off() {
    let node = Node::new();
    let (mut a, mut b, mut victim) = (node.guest(3), node.guest(4), node.guest(5));
    let (to, _) = open(&mut a, &mut b, SEQPACKET);
    a.post(8);
    let mut header = a.header(&to, RW);
    header.flags = SEQ_EOM;
    let cut = (0..60_000).any(|count| {
        a.queue(header, &[]);
        if count % 32 == 0 {
            a.kick(TX);
        }
        a.poll().is_some_and(|packet| packet.0.op == RST)
    });
    assert!(cut, "60,000 messages for a guest that takes nothing");
    victim.ping();
}

#[test]
fn an_agent_that_never_reads_its_answers_is_cut_off() {
    let node = Node::new();
    let (mut a, mut victim) = (node.guest(3), node.guest(4));
    a.buf_alloc = 0;
    let to = a.agent(900, SEATS_PORT, SEQPACKET);
    let question = encoded(1, &Message::SeatGone { seat: 1 });
    let mut header = a.header(&to, RW);
    header.flags = SEQ_EOM;
    let cut = (0..400_000).any(|count| {
        a.queue(header, &question);
        if count % 32 == 0 {
            a.kick(TX);
        }
        if a.posted() < 64 {
            a.post(64);
        }
        a.poll().is_some_and(|packet| packet.0.op == RST)
    });
    assert!(cut, "400,000 answers for an agent that takes none");
    victim.ping();
}

#[test]
fn a_monitor_that_talks_without_end_holds_nobody_up() {
    let node = Node::new();
    let (mut victim, b) = (node.guest(3), node.guest(4));
    for _ in 0..2 {
        flood(b.monitor.try_clone().expect("a descriptor"), monitor_message(SET_OWNER, &[]).repeat(5000));
    }
    for _ in 0..5 {
        victim.ping();
    }
}

#[test]
fn a_monitor_that_hands_memory_in_without_end_holds_nobody_up() {
    let node = Node::new();
    let (mut victim, b) = (node.guest(3), node.guest(4));
    let monitor = b.monitor.try_clone().expect("a descriptor");
    let file = b.memory.try_clone().expect("a descriptor");
    let regions: Vec<_> = (0..8).map(|index| (index << 30, MEMORY as u64, 0)).collect();
    let message = monitor_message(SET_MEM_TABLE, &memory_table(&regions));
    std::thread::spawn(move || while packet::send(monitor.as_fd(), &message, &[file.as_fd(); 8]).is_ok() {});
    for _ in 0..5 {
        victim.ping();
    }
}

#[test]
fn indirect_tables_that_are_longer_than_a_queue_end_the_device() {
    let node = Node::new();
    let mut victim = node.guest(3);
    for (cid, queue) in [(4, TX), (5, RX)] {
        let mut b = node.guest(cid);
        // Only the first piece is of use; the others are to be walked over.
        let (used, unused) = if queue == TX { (0, WRITE) } else { (WRITE, 0) };
        for index in 0..u16::MAX {
            let more = if index < u16::MAX - 1 { NEXT } else { 0 };
            let (len, flags) = if index == 0 { (Header::LEN as u32, used) } else { (0, unused) };
            b.descriptor(FREE, index, BUFFERS, len, flags | more, index + 1);
        }
        let size = u32::from(u16::MAX) * 16;
        for index in 0..QUEUE {
            b.descriptor(b.table(queue), index, FREE, size, INDIRECT, 0);
        }
        for index in 0..QUEUE - 1 {
            b.offer(queue, index);
        }
        if queue == RX {
            // Something that is to be put there.
            b.sign(&Link { port: 9, peer: NOBODY, peer_port: 9, kind: STREAM }, RW);
        }
        b.kick(queue);
        victim.ping();
        assert!(node.ended(cid).starts_with("queue:"));
        victim.ping();
    }
}

#[test]
fn requests_that_a_silent_broker_does_not_answer_leave_descriptors_for_others() {
    const REQUESTS: u32 = 2000;
    let node = Node::new();
    let (mut victim, mut b) = (node.guest(3), node.guest(4));
    let before = descriptors();
    node.silence(true);
    let mut reset = 0;
    for index in 0..REQUESTS {
        let link = Link { port: 10_000 + index, peer: 9, peer_port: 60, kind: STREAM };
        b.queue(b.header(&link, REQUEST), &[]);
        if index % 32 == 0 {
            b.kick(TX);
        }
        if b.posted() < 64 {
            b.post(64);
        }
        while let Some((header, _)) = b.poll() {
            assert_eq!(header.op, RST);
            reset += 1;
        }
    }
    b.kick(TX);
    victim.ping();
    let grown = descriptors().saturating_sub(before);
    assert!(grown < 4096, "{grown} descriptors");
    node.silence(false);
    while reset < REQUESTS {
        if b.posted() < 64 {
            b.post(64);
        }
        let packet = until(
            &format!(
                "the answer to each request; {reset} reset, {} chains taken, {} buffers",
                b.taken(TX),
                b.posted()
            ),
            || b.poll(),
        );
        assert_eq!(packet.0.op, RST);
        reset += 1;
    }
    until("descriptors that are closed again", || (descriptors() < before + 64).then_some(()));
}

#[test]
fn a_door_that_lets_nobody_in_holds_nobody_up() {
    let node = Node::new();
    let (mut victim, mut b) = (node.guest(3), node.guest_behind(4, 8));
    node.silence(true);
    b.post(64);
    for index in 0..40 {
        let link = Link { port: 5000 + index, peer: 2, peer_port: CONTROL_PORT, kind: SEQPACKET };
        b.queue(b.header(&link, REQUEST), &[]);
    }
    b.kick(TX);
    victim.ping();
    node.silence(false);
    victim.ping();
    b.ping();
}

#[test]
fn a_container_that_rings_without_end_holds_nobody_up() {
    let node = Node::new();
    let (mut victim, mut b) = (node.guest(3), node.guest(4));
    b.post(4);
    let container = node.container(4, 60);
    let header = b.wait(REQUEST);
    let link = Link { port: 60, peer: 50, peer_port: header.src_port, kind: STREAM };
    b.sign(&link, RESPONSE);
    b.wait(CREDIT_UPDATE);
    rustix::fs::fcntl_setfl(&container.bell, OFlags::empty()).expect("a socket that waits");
    flood(container.bell.try_clone().expect("a descriptor"), vec![0; 100_000]);
    for _ in 0..5 {
        victim.ping();
    }
    b.ping();
}

// ---- memory tables

#[test]
fn a_region_smaller_than_its_huge_page_is_refused() {
    let Ok(huge) = memory::create_huge(c"huge", 2 << 20) else {
        println!("skipped: this kernel makes no files of huge pages");
        return;
    };
    let node = Node::new();
    let (mut victim, b) = (node.guest(3), node.guest(4));
    let table = memory_table(&[(0, MEMORY as u64, 0), (1 << 32, 4 * 4096, 0)]);
    b.tell(SET_MEM_TABLE, &table, &[b.memory.as_fd(), huge.as_fd()]);
    assert!(node.ended(4).contains("not whole pages of its file"));
    victim.ping();
}

#[test]
fn memory_that_is_handed_in_again_loses_no_chains() {
    let node = Node::new();
    let mut a = node.guest(3);
    let nobody = Link { port: 5, peer: NOBODY, peer_port: 5, kind: STREAM };
    for round in 0..30 {
        for _ in 0..15 {
            a.sign(&nobody, RST);
        }
        a.ping();
        a.hand_in_memory();
        a.settle();
        let taken = a.taken(TX);
        assert!(taken <= 16, "round {round}: {taken} chains were not given back");
    }
    a.ping();
}

// ---- queues

#[test]
fn garbage_in_a_queue_ends_that_device_and_no_other() {
    let node = Node::new();
    let mut victim = node.guest(3);
    for seed in 1..=6u64 {
        let cid = 10 + seed as u32;
        let mut b = node.guest(cid);
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut chance = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let garbage: Vec<u8> = (0..2 * u64::from(QUEUE)).flat_map(|_| chance().to_le_bytes()).collect();
        b.write(b.table(TX), &garbage);
        let head = (chance() % u64::from(QUEUE)) as u16;
        for _ in 0..100 {
            b.offer(TX, head);
        }
        b.kick(TX);
        let why = node.ended(cid);
        assert!(why != "a monitor has connected", "seed {seed}");
        victim.ping();
    }
}

#[test]
fn an_address_outside_a_guests_memory_ends_its_device() {
    let node = Node::new();
    let mut victim = node.guest(3);
    let end = MEMORY as u64;
    let places = [(end, 44), (end - 43, 44), (u64::MAX - 10, 44), (0, u32::MAX), (1 << 63, 44)];
    for (cid, (at, len)) in (10..).zip(places) {
        for queue in [TX, RX] {
            let cid = cid + 100 * queue as u32;
            let mut b = node.guest(cid);
            b.descriptor(b.table(queue), 200, at, len, if queue == RX { WRITE } else { 0 }, 0);
            b.offer(queue, 200);
            b.kick(queue);
            if queue == RX {
                b.sign(&Link { port: 9, peer: NOBODY, peer_port: 9, kind: STREAM }, RW);
            }
            assert!(node.ended(cid).contains("outside the guest's memory"), "{len} bytes at {at:#x}");
            victim.ping();
        }
    }
}

#[test]
fn an_index_beyond_the_queue_ends_the_device() {
    let node = Node::new();
    let (mut victim, mut b) = (node.guest(3), node.guest(4));
    b.set_available(TX, 30_000);
    b.kick(TX);
    assert!(node.ended(4).contains("an index beyond the queue"));
    victim.ping();
}

#[test]
fn a_chain_that_loops_has_an_end() {
    let node = Node::new();
    let (mut victim, mut b) = (node.guest(3), node.guest(4));
    b.write(FREE, &[0xff; 64]);
    b.descriptor(b.table(TX), 200, FREE, 16, NEXT, 201);
    b.descriptor(b.table(TX), 201, FREE, 16, NEXT, 200);
    for _ in 0..QUEUE / 2 {
        b.offer(TX, 200);
    }
    b.kick(TX);
    victim.ping();
    until("the chains, or the end of the device", || (b.taken(TX) <= 16 || !node.runs(4)).then_some(()));
    victim.ping();
}

#[test]
fn a_receive_buffer_that_holds_no_packet_ends_the_device() {
    let node = Node::new();
    let (mut a, mut b) = (node.guest(3), node.guest(4));
    let (to, _) = open(&mut a, &mut b, STREAM);
    b.buffer = 45;
    b.post(200);
    a.post(1);
    a.send(&to, &[1; 60_000]);
    assert!(node.ended(4).contains("shorter than a packet"));
    a.wait(RST);
    a.ping();
}

// ---- packets

#[test]
fn a_packet_comes_from_the_guest_that_sent_it_whatever_it_says() {
    let node = Node::new();
    let (mut a, mut b, mut c) = (node.guest(3), node.guest(4), node.guest(5));
    b.post(2);
    c.post(1);
    let link = Link { port: 1000, peer: 4, peer_port: 50, kind: STREAM };
    for cid in [5, 2, 0, u64::MAX] {
        let mut header = a.header(&Link { port: 1000 + cid as u32 % 100, ..link }, REQUEST);
        header.src_cid = cid;
        a.transmit(header, &[]);
        assert_eq!(b.wait(REQUEST).src_cid, 3);
        b.post(1);
    }
    assert_eq!(c.ping(), []);
}

#[test]
fn a_guest_cannot_speak_for_anothers_connection() {
    let node = Node::new();
    let (mut a, mut b, mut c) = (node.guest(3), node.guest(4), node.guest(5));
    let (to, back) = open(&mut a, &mut b, STREAM);
    // What the third one says is about connections of its own, and there are none.
    b.post(2);
    c.post(4);
    for op in [RW, RST, SHUTDOWN, CREDIT_UPDATE, RESPONSE] {
        let mut header = c.header(&to, op);
        header.src_cid = 3;
        c.transmit(header, if op == RW { b"not mine" } else { b"" });
    }
    assert_eq!(ops(&c.ping()), [RST; 4]);
    assert_eq!(b.ping(), []);
    a.post(1);
    b.send(&back, b"still open");
    assert_eq!(a.receive().1, b"still open");
}

#[test]
fn bytes_of_an_opener_before_the_answer_are_not_delivered() {
    let node = Node::new();
    let (mut a, mut b) = (node.guest(3), node.guest(4));
    a.post(2);
    b.post(4);
    let to = a.request(1000, 4, 50, STREAM);
    b.wait(REQUEST);
    a.send(&to, b"too early");
    a.wait(RST);
    // Whatever the other one answers now, it is not let in.
    b.sign(&Link { port: 50, peer: 3, peer_port: 1000, kind: STREAM }, RESPONSE);
    let header = b.receive().0;
    assert_eq!(header.op, RST);
    assert!(!ops(&b.ping()).contains(&RW));
    assert!(!ops(&a.ping()).contains(&RESPONSE));
}

#[test]
fn bytes_of_an_accepter_before_the_broker_agreed_are_not_delivered() {
    let node = Node::new();
    let (mut a, mut b) = (node.guest(3), node.guest(4));
    a.post(4);
    b.post(4);
    a.request(1000, 4, 50, STREAM);
    b.wait(REQUEST);
    node.silence(true);
    let back = Link { port: 50, peer: 3, peer_port: 1000, kind: STREAM };
    b.sign(&back, RESPONSE);
    b.send(&back, b"too early");
    b.wait(RST);
    node.silence(false);
    // It may hear of the connection before it hears of its end.
    until("the end of the connection", || {
        let (header, payload) = a.poll()?;
        assert!(header.op != RW && payload.is_empty(), "bytes that came too early");
        (header.op == RST).then_some(())
    });
    assert_eq!(a.ping(), []);
}

#[test]
fn a_reset_is_never_answered() {
    let node = Node::new();
    let mut a = node.guest(3);
    a.post(8);
    for (peer, kind) in [(NOBODY, STREAM), (2, STREAM), (3, SEQPACKET), (NOBODY, 9)] {
        a.sign(&Link { port: 4000, peer, peer_port: 5, kind }, RST);
    }
    assert_eq!(a.ping(), []);
}

#[test]
fn whoever_sends_more_than_it_was_granted_is_reset() {
    let node = Node::new();
    let (mut a, mut b) = (node.guest(3), node.guest(4));
    b.buf_alloc = 1000;
    let (to, _) = open(&mut a, &mut b, STREAM);
    a.post(1);
    b.post(4);
    a.send(&to, &[7; 1000]);
    assert_eq!(b.receive().1, [7; 1000]);
    a.send(&to, &[8]);
    a.wait(RST);
    assert_eq!(b.receive().0.op, RST);
    a.ping();
}

#[test]
fn a_guest_may_be_connected_to_itself() {
    let node = Node::new();
    let mut a = node.guest(3);
    a.post(8);
    let to = a.request(1000, 3, 50, STREAM);
    let back = Link { port: 50, peer: 3, peer_port: 1000, kind: STREAM };
    a.wait(REQUEST);
    a.sign(&back, RESPONSE);
    until("both ends that are open", || {
        let header = a.poll()?.0;
        assert!(matches!(header.op, RESPONSE | CREDIT_UPDATE), "operation {}", header.op);
        (header.op == RESPONSE).then_some(())
    });
    a.send(&to, b"to myself");
    let mut got = Vec::new();
    until("bytes", || {
        got = a.poll()?.1;
        (!got.is_empty()).then_some(())
    });
    assert_eq!(got, b"to myself");
    a.sign(&to, RST);
    assert_eq!(a.wait(RST).dst_port, 50);
    a.ping();
}

// ---- the broker

/// The broker is lost while a connection is being made; `answered`: the accepting guest has agreed before that.
fn broker_lost(answered: bool) {
    let node = Node::new();
    let (mut a, mut b) = (node.guest(3), node.guest(4));
    a.post(4);
    b.post(4);
    a.request(1000, 4, 50, STREAM);
    b.wait(REQUEST);
    let back = Link { port: 50, peer: 3, peer_port: 1000, kind: STREAM };
    node.silence(true);
    if answered {
        b.sign(&back, RESPONSE);
        b.ping();
    }
    node.hang_up();
    if !answered {
        b.sign(&back, RESPONSE);
    }
    a.wait(RST);
    b.wait(RST);
    node.silence(false);
}

#[test]
fn a_broker_that_is_lost_before_the_answer_resets_both_sides() {
    broker_lost(false);
}

#[test]
fn a_broker_that_is_lost_behind_the_answer_resets_both_sides() {
    broker_lost(true);
}

// ---- agents

/// A program asks for a connection to a guest.
fn connect_to(to: &str) -> Message<'_> {
    Message::Connect {
        to,
        to_port: 60,
        from_port: 0,
        kind: SocketKind::Stream,
        carrier: Carrier::Switch,
        require: 0,
        small: 4096,
        large: 0,
    }
}

/// Two guests with agents and a seat each, and a program of the first one that is connected to a plain socket of the
/// second one. That program says something about its own connection, as if it had been asked to take it.
fn about_ones_own_connection(seat: Option<u32>, message: &Message<'_>) {
    let node = Node::new();
    let (mut a, mut b) = (node.guest(3), node.guest(4));
    for (guest, number) in [(&mut a, 1u32), (&mut b, 7)] {
        guest.post(64);
        let seats = guest.agent(900, SEATS_PORT, SEQPACKET);
        let base = FREE + u64::from(number) * 0x1_0000;
        let runs: Vec<u8> = (0..4u64)
            .flat_map(|page| [&(base + 4096 * page).to_le_bytes()[..], &4096u32.to_le_bytes()].concat())
            .collect();
        let place = Message::Seat { seat: number, small: 4096, large: 0, runs: 4 };
        guest.send(&seats, &encoded(1, &place));
        guest.send(&seats, &encoded(1, &Message::Pages { runs: &runs }));
        let (_, done) = until("a seat", || guest.poll().filter(|packet| packet.0.op == RW));
        assert!(matches!(decode(&done), Ok((1, Message::Done {}))));
        let bell = guest.agent(901, BELL_PORT, STREAM);
        guest.send(&bell, &number.to_le_bytes());
        until("a bell", || guest.poll().filter(|packet| packet.1 == [1]));
    }
    let program = a.agent(5000, CONTROL_PORT, SEQPACKET);
    a.send(&program, &encoded(1, &Message::UseSeat { seat: 1 }));
    a.send(&program, &encoded(5, &connect_to("4")));
    let asked = b.wait(REQUEST);
    let back = Link { port: 60, peer: 3, peer_port: asked.src_port, kind: STREAM };
    b.sign(&back, RESPONSE);
    until("a connection", || {
        a.poll().filter(|packet| matches!(decode(&packet.1), Ok((5, Message::Connected { .. }))))
    });
    b.wait(CREDIT_UPDATE);

    if let Some(seat) = seat {
        a.send(&program, &encoded(0, &Message::UseSeat { seat }));
    }
    a.send(&program, &encoded(0, message));
    a.ping();
    let others = b.ping();
    assert!(!ops(&others).contains(&RST), "the other guest's connection is over: {others:?}");
    // Behind this the broker has heard everything.
    b.request(6000, NOBODY, 1, STREAM);
    b.wait(RST);
    let heard = node.heard(4);
    assert_eq!(heard.len(), 1, "said in the name of the other guest: {heard:?}");
    assert!(heard[0].starts_with("Accept"));
    // Its seat is nobody else's either.
    let program = b.agent(5000, CONTROL_PORT, SEQPACKET);
    b.send(&program, &encoded(1, &Message::UseSeat { seat: 7 }));
    b.send(&program, &encoded(5, &connect_to("3")));
    a.wait(REQUEST);
}

#[test]
fn a_monitor_whose_interrupt_would_block_for_ever_ends_itself_alone() {
    let node = Node::new();
    let (mut a, mut b) = (node.guest(3), node.guest(4));
    for queue in [RX, TX] {
        let call = a.call(queue);
        let flags = rustix::fs::fcntl_getfl(call).expect("its flags");
        // What may be in it is taken out without waiting; then it is made to wait.
        let _ = rustix::io::read(call, &mut [0; 8]);
        rustix::fs::fcntl_setfl(call, flags - OFlags::NONBLOCK).expect("to change them");
        rustix::io::write(call, &(u64::MAX - 1).to_ne_bytes()).expect("to fill it");
        a.listen(queue);
    }
    // An answer, for which the guest is to be interrupted.
    a.post(1);
    a.request(6000, NOBODY, 1, STREAM);
    assert!(node.ended(3).contains("made the switch wait"));
    b.ping();
}

#[test]
fn a_broker_that_names_many_guests_before_it_listens_hears_of_each() {
    let node = Node::new();
    assert_eq!(node.name_guests(100..400), 300);
}

#[test]
fn a_program_that_refuses_its_own_connection_does_not_act_for_the_other_guest() {
    let refuse = Message::Refuse { connection: 1, refusal: Refusal::BacklogFull };
    about_ones_own_connection(None, &refuse);
}

#[test]
fn a_program_that_accepts_its_own_connection_does_not_act_for_the_other_guest() {
    let accept = Message::Accept { connection: 1, small: 4096, large: 0 };
    about_ones_own_connection(Some(7), &accept);
}
