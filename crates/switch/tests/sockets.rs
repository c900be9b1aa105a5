//! Kernel sockets of guests' programs, joined to sockets of the guests' own.

mod fake;

use std::os::fd::{AsFd, OwnedFd};

use fake::{Guest, Link, Node, encoded, until};
use isthmus_switch::bridge::WINDOW;
use isthmus_sys::packet;
use isthmus_wire::control::{CONTROL_PORT, Message, Refusal, SOCKETS_PORT, SocketKind, decode};
use isthmus_wire::vsock::{
    CREDIT_UPDATE, REQUEST, RESPONSE, RST, RW, SEQPACKET, SHUTDOWN, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM,
};

/// A program behind the guest's agent, and the agent's connection on its behalf.
fn program(guest: &mut Guest) -> Link {
    guest.post(128);
    let link = guest.agent(5000, CONTROL_PORT, SEQPACKET);
    guest.send(&link, &encoded(1, &Message::Hello { features: 2, program: "supervisor" }));
    until("a welcome", || guest.poll().filter(|packet| matches!(decode(&packet.1), Ok((1, _)))));
    link
}

/// Two guests with a program each.
fn guests(node: &Node) -> (Guest, Guest) {
    let (mut a, mut b) = (node.guest(3), node.guest(4));
    program(&mut a);
    program(&mut b);
    (a, b)
}

/// What an agent says first.
fn name(connection: u64, opener: bool) -> [u8; 8] {
    (connection << 1 | u64::from(opener)).to_le_bytes()
}

/// Connect as an agent does for one end of a connection.
fn take(guest: &mut Guest, port: u32, connection: u64, opener: bool) -> Link {
    let link = guest.agent(port, SOCKETS_PORT, STREAM);
    guest.send(&link, &name(connection, opener));
    link
}

/// Wait until the guest may send more than a little.
fn credit(guest: &mut Guest) {
    until("credit", || guest.poll().filter(|packet| packet.0.buf_alloc == WINDOW));
}

/// The guest ends one direction, or both.
fn shut(guest: &mut Guest, link: &Link, flags: u32) {
    let mut finish = guest.header(link, SHUTDOWN);
    finish.flags = flags;
    guest.transmit(finish, &[]);
}

/// What a program shows of its connection to the next broker.
fn resume(connection: u64, opener: bool) -> Message<'static> {
    Message::ResumeSocket {
        connection,
        peer: 50,
        peer_port: 60,
        port: 7,
        kind: SocketKind::Stream,
        opener: opener.into(),
        ticket: [0; 32],
    }
}

/// Bytes that tell places apart.
fn pattern() -> Vec<u8> {
    (0..60_000u32).map(|n| (n % 251) as u8).collect()
}

/// Two guests with the two ends of one connection, as their agents get them; what the first one sends before the second
/// one has its end.
fn two(node: &Node, a: &mut Guest, b: &mut Guest, early: &[u8]) -> (Link, Link) {
    node.bring_pair(a.cid, b.cid, 8);
    told(b);
    let accepter = take(b, 7000, 8, false);
    if !early.is_empty() {
        b.send(&accepter, early);
    }
    b.ping();
    told(a);
    let opener = take(a, 7000, 8, true);
    (opener, accepter)
}

/// Wait for the message with which the agent hears of it.
fn told(guest: &mut Guest) {
    until("to be told", || {
        guest.poll().filter(|packet| {
            let message = decode(&packet.1).map(|decoded| decoded.1);
            matches!(message, Ok(Message::IncomingSocket { .. } | Message::ConnectedSocket { .. }))
        })
    });
}

/// A guest with one kernel socket that is joined. Returns the guest's end and the other one.
fn joined(node: &Node, guest: &mut Guest) -> (Link, OwnedFd) {
    program(guest);
    let other = node.bring(3, 8, true);
    told(guest);
    let link = take(guest, 7000, 8, true);
    credit(guest);
    (link, other)
}

/// Read exactly so many bytes.
fn read(socket: &OwnedFd, len: usize) -> Vec<u8> {
    let mut got = Vec::new();
    until("bytes", || {
        let mut buffer = vec![0; 1 << 16];
        if let Ok(n @ 1..) = packet::pull(socket.as_fd(), &mut buffer) {
            got.extend_from_slice(&buffer[..n]);
        }
        (got.len() >= len).then_some(())
    });
    assert_eq!(got.len(), len);
    got
}

/// The end of a stream.
fn ends(socket: &OwnedFd) {
    until("the end", || {
        (!matches!(packet::pull(socket.as_fd(), &mut [0; 1 << 16]), Err(_) | Ok(1..))).then_some(())
    });
}

fn bytes(guest: &mut Guest, len: usize) -> Vec<u8> {
    let mut got = Vec::new();
    until("bytes", || {
        if let Some((header, payload)) = guest.poll() {
            if header.op == RW {
                got.extend_from_slice(&payload);
            }
        }
        (got.len() >= len).then_some(())
    });
    got
}

#[test]
fn bytes_and_both_ends_pass() {
    let node = Node::new();
    let mut guest = node.guest(3);
    let (link, other) = joined(&node, &mut guest);
    guest.send(&link, b"from the guest");
    assert_eq!(read(&other, 14), b"from the guest");
    packet::push(other.as_fd(), b"to the guest").expect("room");
    assert_eq!(bytes(&mut guest, 12), b"to the guest");
    packet::shut_send(other.as_fd());
    assert_eq!(guest.wait(SHUTDOWN).flags, SHUTDOWN_SEND);
    guest.send(&link, b"more");
    shut(&mut guest, &link, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    guest.wait(RST);
    assert_eq!(read(&other, 4), b"more");
    ends(&other);
}

#[test]
fn what_the_other_end_sent_before_the_guest_came_is_not_lost() {
    let node = Node::new();
    let mut guest = node.guest(3);
    program(&mut guest);
    let other = node.bring(3, 8, false);
    packet::push(other.as_fd(), b"early").expect("room");
    packet::shut_send(other.as_fd());
    told(&mut guest);
    let link = guest.agent(7000, SOCKETS_PORT, STREAM);
    // The name comes in two parts, the second with bytes of the program's behind it.
    guest.send(&link, &name(8, false)[..3]);
    guest.send(&link, &[&name(8, false)[3..], b"first"].concat());
    assert_eq!(read(&other, 5), b"first");
    assert_eq!(bytes(&mut guest, 5), b"early");
    guest.wait(SHUTDOWN);
}

#[test]
fn nobody_gets_an_end_by_a_name_that_is_not_its() {
    let node = Node::new();
    let (mut a, mut b) = (node.guest(3), node.guest(4));
    program(&mut a);
    b.post(16);
    let other = node.bring(3, 8, true);
    told(&mut a);
    // Of another guest; of the other side; of no connection.
    for (own, name) in [(false, name(8, true)), (true, name(8, false)), (true, name(9, true))] {
        let guest = if own { &mut a } else { &mut b };
        let link = guest.agent(7000, SOCKETS_PORT, STREAM);
        guest.send(&link, &name);
        guest.wait(RST);
    }
    // It is still there for the one whose it is, once.
    let link = take(&mut a, 7001, 8, true);
    a.send(&link, b"mine");
    assert_eq!(read(&other, 4), b"mine");
    take(&mut a, 7002, 8, true);
    a.wait(RST);
    a.send(&link, b"still");
    assert_eq!(read(&other, 5), b"still");
}

#[test]
fn ends_that_nobody_asks_for_are_not_kept_without_bound() {
    let node = Node::new();
    let mut guest = node.guest(3);
    program(&mut guest);
    let mut others = Vec::new();
    for connection in 0..1100 {
        others.push(node.bring(3, connection, true));
        if connection % 64 == 63 {
            guest.post(64);
            for _ in 0..64 {
                told(&mut guest);
            }
        }
    }
    let gone = |other: &&OwnedFd| matches!(packet::pull(other.as_fd(), &mut [0]), Ok(0));
    until("the last ones to be closed", || (others.iter().filter(gone).count() >= 60).then_some(()));
    assert!(!gone(&&others[0]));
}

#[test]
fn who_does_not_read_is_sent_no_more_than_a_window() {
    let node = Node::new();
    let mut guest = node.guest(3);
    let (link, other) = joined(&node, &mut guest);
    let part = vec![5; 60_000];
    let mut sent = 0;
    // As much as the guest was told it may send; the window moves as the socket takes some.
    for _ in 0..17 {
        guest.send(&link, &part);
        sent += part.len();
    }
    guest.ping();
    let got = read(&other, sent);
    assert!(got.iter().all(|byte| *byte == 5));
    guest.send(&link, b"and on");
    assert_eq!(read(&other, 6), b"and on");
}

#[test]
fn a_guest_that_sends_more_than_it_may_is_cut_off() {
    let node = Node::new();
    let mut guest = node.guest(3);
    let (link, other) = joined(&node, &mut guest);
    let part = vec![5; 60_000];
    for _ in 0..40 {
        guest.send(&link, &part);
    }
    guest.wait(RST);
    ends(&other);
}

#[test]
fn who_closes_ends_it_for_the_guest() {
    let node = Node::new();
    let mut guest = node.guest(3);
    let (link, other) = joined(&node, &mut guest);
    guest.send(&link, b"not read");
    guest.ping();
    drop(other);
    // It had not read everything: nothing that comes now can arrive.
    guest.wait(RST);
}

#[test]
fn what_a_program_says_about_its_end_reaches_the_broker() {
    let node = Node::new();
    let mut guest = node.guest(3);
    let control = program(&mut guest);
    let other = node.bring(3, 8, false);
    told(&mut guest);
    guest.send(&control, &encoded(0, &Message::Accept { connection: 8, small: 0, large: 0 }));
    until("an accept", || node.heard(3).iter().any(|heard| heard.starts_with("Accept")).then_some(()));
    let refused = node.bring(3, 10, false);
    told(&mut guest);
    let refusal = Refusal::BacklogFull;
    guest.send(&control, &encoded(0, &Message::Refuse { connection: 10, refusal }));
    until("a refusal", || node.heard(3).iter().any(|heard| heard.contains("BacklogFull")).then_some(()));
    ends(&refused);
    let link = take(&mut guest, 7000, 8, false);
    guest.send(&link, b"x");
    assert_eq!(read(&other, 1), b"x");
}

#[test]
fn a_cut_ends_both() {
    let node = Node::new();
    let mut guest = node.guest(3);
    let (link, other) = joined(&node, &mut guest);
    guest.send(&link, b"x");
    assert_eq!(read(&other, 1), b"x");
    node.tell_program(3, &Message::Cut { connection: 8, refusal: Refusal::RefusedByRule, text: "" });
    guest.wait(RST);
    ends(&other);
    // Also one that nobody has asked for yet.
    let kept = node.bring(3, 12, true);
    node.tell_program(3, &Message::Cut { connection: 12, refusal: Refusal::RefusedByRule, text: "" });
    ends(&kept);
}

#[test]
fn a_program_shows_its_end_to_the_next_broker() {
    let node = Node::new();
    let mut guest = node.guest(3);
    let (_, other) = joined(&node, &mut guest);
    let again = guest.agent(5001, CONTROL_PORT, SEQPACKET);
    for connection in [8, 9] {
        guest.send(&again, &encoded(6, &resume(connection, true)));
        until("an answer", || guest.poll().filter(|packet| matches!(decode(&packet.1), Ok((6, _)))));
    }
    // Of a connection that it does not have there is nothing to show.
    let shown = node.shown();
    assert_eq!(shown.len(), 1);
    packet::push(other.as_fd(), b"the same").expect("room");
    assert_eq!(bytes(&mut guest, 8), b"the same");
    drop(shown);
}

#[test]
fn what_a_guest_sent_before_it_closed_arrives_although_its_kernel_waits_no_longer() {
    let node = Node::new();
    let mut guest = node.guest(3);
    let (link, other) = joined(&node, &mut guest);
    let part = pattern();
    for _ in 0..8 {
        guest.send(&link, &part);
    }
    shut(&mut guest, &link, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    // Linux resets a connection that it has closed after 8 s without an answer.
    guest.sign(&link, RST);
    guest.ping();
    assert_eq!(read(&other, 8 * part.len()), part.repeat(8));
    ends(&other);
    // One that did not close loses what it had sent, and so does one whose other end is gone.
    let other = node.bring(3, 9, true);
    told(&mut guest);
    let link = take(&mut guest, 7001, 9, true);
    credit(&mut guest);
    for _ in 0..8 {
        guest.send(&link, &part);
    }
    guest.sign(&link, RST);
    guest.ping();
    ends(&other);
}

#[test]
fn terms_of_what_never_came_to_be_are_forgotten() {
    let node = Node::new();
    let mut guest = node.guest(3);
    let control = program(&mut guest);
    guest.buf_alloc = 256 << 20;
    guest.sign(&control, CREDIT_UPDATE);
    let terms = |connection, rate| Message::Terms { connection, class: 0, weight: 1, rate };
    // As many as the switch has room for, and some.
    for n in 0..16_400 {
        node.tell_program(3, &terms(1_000_000 + n, 0));
        let _other = node.bring(3, 1_000_000 + n, false);
        told(&mut guest);
        let refusal = Refusal::NobodyListens;
        guest.send(&control, &encoded(0, &Message::Refuse { connection: 1_000_000 + n, refusal }));
        if guest.posted() < 64 {
            guest.post(64);
        }
    }
    node.tell_program(3, &terms(8, 100_000));
    let other = node.bring(3, 8, true);
    told(&mut guest);
    let link = take(&mut guest, 7000, 8, true);
    guest.sign(&link, CREDIT_UPDATE);
    fake::flood(other, vec![1; 4 << 20]);
    let began = std::time::Instant::now();
    let mut got = 0;
    while began.elapsed() < std::time::Duration::from_secs(1) {
        got += guest.poll().map_or(0, |packet| packet.1.len());
        if guest.posted() < 64 {
            guest.post(64);
        }
    }
    // What the rate lets through, and a burst; without it, all of it.
    assert!(got < 1 << 20, "{got} bytes");
}

#[test]
fn what_waits_for_those_who_do_not_read_has_a_bound() {
    let node = Node::new();
    let mut guest = node.guest(3);
    program(&mut guest);
    let part = vec![5; 60_000];
    let connect = |guest: &mut Guest, n: u64| {
        let other = node.bring(3, 100 + n, true);
        told(guest);
        let link = guest.agent(7000 + n as u32, SOCKETS_PORT, STREAM);
        guest.send(&link, &name(100 + n, true));
        credit(guest);
        for _ in 0..17 {
            guest.send(&link, &part);
        }
        guest.ping();
        while guest.poll().is_some() {}
        if guest.posted() < 64 {
            guest.post(64);
        }
        other
    };
    let before = fake::own_memory();
    let many: Vec<_> = (0..140).map(|n| connect(&mut guest, n)).collect();
    let grown = fake::own_memory().saturating_sub(before);
    // 64 MiB, by what buffers grow by.
    assert!(grown < 140, "{grown} MiB");
    let ended = many.iter().filter(|other| {
        let mut got = 0;
        let mut buffer = vec![0; 1 << 20];
        while let Ok(n @ 1..) = packet::pull(other.as_fd(), &mut buffer) {
            got += n;
        }
        got < 17 * part.len() && matches!(packet::pull(other.as_fd(), &mut buffer), Ok(0))
    });
    assert!(ended.count() > 20);
}

#[test]
fn who_writes_to_nobody_is_told_at_once() {
    let node = Node::new();
    let mut guest = node.guest(3);
    let (link, other) = joined(&node, &mut guest);
    guest.ping();
    drop(other);
    assert_eq!(guest.wait(SHUTDOWN).flags, SHUTDOWN_SEND);
    guest.send(&link, b"anybody?");
    assert_eq!(guest.wait(SHUTDOWN).flags, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
}

// ---- two guests

#[test]
fn two_guests_talk_past_the_kernel_with_each_other_s_credit() {
    let node = Node::new();
    let (mut a, mut b) = guests(&node);
    (a.buf_alloc, b.buf_alloc) = (200_000, 200_000);
    let (opener, accepter) = two(&node, &mut a, &mut b, b"");
    // What the other has room for; the name counts as taken.
    let told = a.wait(CREDIT_UPDATE);
    assert_eq!((told.buf_alloc, told.fwd_cnt), (200_000, 8));
    a.send(&opener, b"there");
    let (header, payload) = b.receive_bytes();
    assert_eq!((&payload[..], header.src_cid, header.src_port), (&b"there"[..], 2, SOCKETS_PORT));
    b.send(&accepter, b"and back");
    assert_eq!(a.receive_bytes().1, b"and back");
    // It has taken five bytes: of what the other has sent, thirteen.
    b.fwd_cnt = 5;
    b.sign(&accepter, CREDIT_UPDATE);
    until("credit", || a.poll().filter(|packet| packet.0.op == CREDIT_UPDATE && packet.0.fwd_cnt == 13));
    shut(&mut a, &opener, SHUTDOWN_SEND);
    assert_eq!(b.wait(SHUTDOWN).flags, SHUTDOWN_SEND);
    b.sign(&accepter, RST);
    a.wait(RST);
    assert_eq!(node.pair_left(), 0, "the broker still sees it");
}

#[test]
fn a_guest_that_has_no_room_is_sent_nothing_that_it_would_drop() {
    let node = Node::new();
    let (mut a, mut b) = guests(&node);
    b.buf_alloc = 1000;
    let (opener, accepter) = two(&node, &mut a, &mut b, b"");
    // It may send what it was told before anybody knew who takes it.
    let sent = pattern();
    a.send(&opener, &sent);
    let mut got = Vec::new();
    while got.len() < sent.len() {
        let (_, payload) = b.receive_bytes();
        got.extend_from_slice(&payload);
        assert!(got.len() as u32 - b.fwd_cnt <= 1000, "more than there is room for");
        b.fwd_cnt = got.len() as u32;
        b.sign(&accepter, CREDIT_UPDATE);
        if b.posted() < 32 {
            b.post(64);
        }
    }
    assert!(got == sent);
}

#[test]
fn what_was_held_back_for_a_guest_comes_before_the_end() {
    let node = Node::new();
    let (mut a, mut b) = guests(&node);
    b.buf_alloc = 1000;
    let (opener, accepter) = two(&node, &mut a, &mut b, b"");
    a.send(&opener, &[7; 5000]);
    shut(&mut a, &opener, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    // As Linux does after 8 s.
    a.sign(&opener, RST);
    a.ping();
    let mut got = 0;
    let end = loop {
        let (header, payload) = b.receive();
        match header.op {
            RW => {
                got += payload.len();
                b.fwd_cnt = got as u32;
                b.sign(&accepter, CREDIT_UPDATE);
            }
            SHUTDOWN | RST => break header.op,
            _ => {}
        }
    };
    assert_eq!((got, end), (5000, SHUTDOWN));
    b.wait(RST);
    assert_eq!(node.pair_left(), 0);
    // One that closes without taking it is not waited for.
    node.bring_pair(a.cid, b.cid, 9);
    told(&mut b);
    let accepter = take(&mut b, 7001, 9, false);
    told(&mut a);
    let opener = take(&mut a, 7001, 9, true);
    b.fwd_cnt = 0;
    a.send(&opener, &[7; 5000]);
    a.sign(&opener, RST);
    a.ping();
    shut(&mut b, &accepter, SHUTDOWN_SEND | SHUTDOWN_RECEIVE);
    b.wait(RST);
    assert_eq!(node.pair_left(), 0);
}

#[test]
fn what_a_guest_says_before_the_other_is_there_arrives_in_order() {
    let node = Node::new();
    let (mut a, mut b) = guests(&node);
    let (opener, accepter) = two(&node, &mut a, &mut b, b"early");
    assert_eq!(a.receive_bytes().1, b"early");
    b.send(&accepter, b"late");
    assert_eq!(a.receive_bytes().1, b"late");
    a.send(&opener, b"answer");
    assert_eq!(b.receive_bytes().1, b"answer");
}

#[test]
fn two_guests_connection_is_shown_and_cut_like_any() {
    let node = Node::new();
    let (mut a, mut b) = guests(&node);
    two(&node, &mut a, &mut b, b"");
    for (guest, opener) in [(&mut a, true), (&mut b, false)] {
        let again = guest.agent(5001, CONTROL_PORT, SEQPACKET);
        guest.send(&again, &encoded(6, &resume(8, opener)));
        until("an answer", || guest.poll().filter(|packet| matches!(decode(&packet.1), Ok((6, _)))));
    }
    let shown = node.shown();
    assert_eq!(shown.len(), 2);
    // The two ends of one pair.
    packet::push(shown[0].as_fd(), b"x").expect("room");
    assert_eq!(read(&shown[1], 1), b"x");
    drop(shown);
    node.tell_program(4, &Message::Cut { connection: 8, refusal: Refusal::RefusedByRule, text: "" });
    a.wait(RST);
    b.wait(RST);
    assert_eq!(node.pair_left(), 0);
}

// ---- programs that speak plain `AF_VSOCK`

#[test]
fn a_kernel_socket_reaches_a_plain_listener() {
    let node = Node::new();
    let mut guest = node.guest(3);
    guest.post(64);
    let other = node.bring_home(3, 8);
    packet::push(other.as_fd(), b"early").expect("room");
    let asked = guest.wait(REQUEST);
    assert_eq!((asked.src_cid, asked.src_port, asked.dst_port), (50, 7, 60));
    let link = Link { port: 60, peer: 50, peer_port: 7, kind: STREAM };
    guest.sign(&link, RESPONSE);
    assert!(guest.wait(CREDIT_UPDATE).buf_alloc > 0);
    assert_eq!(bytes(&mut guest, 5), b"early");
    until("an accept", || node.heard(3).first().filter(|heard| heard.starts_with("Accept")).map(drop));
    guest.send(&link, b"back");
    assert_eq!(read(&other, 4), b"back");
    node.hang_up();
    until("to be shown", || (node.shown().len() == 1).then_some(()));
    guest.send(&link, b"still");
    assert_eq!(read(&other, 5), b"still");
}

#[test]
fn a_plain_listener_that_is_not_there_is_refused() {
    let node = Node::new();
    let mut guest = node.guest(3);
    guest.post(64);
    let other = node.bring_home(3, 8);
    guest.wait(REQUEST);
    guest.sign(&Link { port: 60, peer: 50, peer_port: 7, kind: STREAM }, RST);
    until("a refusal", || node.heard(3).iter().any(|heard| heard.contains("NobodyListens")).then_some(()));
    ends(&other);
    assert_eq!(node.heard(3).len(), 1);
}

#[test]
fn a_plain_program_reaches_a_kernel_socket() {
    let node = Node::new();
    let mut guest = node.guest(3);
    guest.post(64);
    let other = node.answer_with_socket();
    let link = guest.request(6000, 50, 60, STREAM);
    guest.wait(RESPONSE);
    guest.send(&link, b"there");
    assert_eq!(read(&other, 5), b"there");
    packet::push(other.as_fd(), b"and back").expect("room");
    assert_eq!(bytes(&mut guest, 8), b"and back");
    guest.sign(&link, RST);
    ends(&other);
}
