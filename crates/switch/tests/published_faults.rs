//! Faults that were published about other back ends of `AF_VSOCK` between guests, each as a test that we do not have
//! it.

mod fake;

use fake::{BUFFER, Guest, Link, NOBODY, Node, QUEUE, SOON, TX, open, own_memory, until};
use isthmus_wire::vsock::{
    CREDIT_REQUEST, CREDIT_UPDATE, Header, REQUEST, RST, RW, SEQ_EOM, SEQPACKET, STREAM,
};

/// Bytes in which each place differs from its neighbours.
fn pattern(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|at| (at.wrapping_mul(31) ^ (at >> 8)) as u8).collect()
}

/// An honest socket: it keeps to its credit, and notes what it got.
struct Talker {
    guest: Guest,
    link: Link,
    /// What it was granted, and how much it has sent.
    edge: usize,
    sent: usize,
    got: Vec<u8>,
}

impl Talker {
    fn new(guest: Guest, link: Link, granted: usize) -> Self {
        Self { guest, link, edge: granted, sent: 0, got: Vec::new() }
    }

    /// Send as far as there is credit.
    fn talk(&mut self, whole: usize, packet: usize) {
        while self.sent < self.edge.min(whole) {
            let len = packet.min(self.edge.min(whole) - self.sent);
            self.guest.queue(self.guest.header(&self.link, RW), &pattern(self.sent, len));
            self.sent += len;
        }
        self.guest.kick(TX);
    }

    /// Take what has come, and say so.
    fn listen(&mut self) {
        let free = QUEUE - self.guest.posted();
        self.guest.post(free);
        let before = self.got.len();
        while let Some((header, payload)) = self.guest.poll() {
            assert!(matches!(header.op, RW | CREDIT_UPDATE), "operation {}", header.op);
            self.got.extend(payload);
            self.edge = header.fwd_cnt as usize + header.buf_alloc as usize;
        }
        if self.got.len() != before {
            self.guest.fwd_cnt = self.got.len() as u32;
            self.guest.sign(&self.link, CREDIT_UPDATE);
        }
    }
}

/// Two guests that both transmit and wait for their buffers only then had stopped each other.
#[test]
fn both_sides_send_at_once_with_full_queues_and_every_byte_arrives() {
    const WHOLE: usize = 4 << 20;
    let node = Node::new();
    let (mut a, mut b) = (node.guest(3), node.guest(4));
    let granted = a.buf_alloc as usize;
    let (to, back) = open(&mut a, &mut b, STREAM);
    let (mut a, mut b) = (Talker::new(a, to, granted), Talker::new(b, back, granted));
    // More packets than a queue has, and nobody has a buffer for any of them.
    a.talk(WHOLE, 4000);
    b.talk(WHOLE, 4000);
    assert_eq!((a.sent, b.sent), (granted, granted));
    until("both transmit queues taken", || {
        (a.guest.taken(TX) <= 16 && b.guest.taken(TX) <= 16).then_some(())
    });
    let began = std::time::Instant::now();
    while a.got.len() < WHOLE || b.got.len() < WHOLE {
        a.listen();
        b.listen();
        a.talk(WHOLE, 4000);
        b.talk(WHOLE, 4000);
        assert!(began.elapsed() < 2 * SOON, "{} and {} bytes have arrived", a.got.len(), b.got.len());
    }
    assert!(a.got == pattern(0, WHOLE));
    assert!(b.got == pattern(0, WHOLE));
}

/// A sender without credit asked for some, and the answer did not reach it.
#[test]
fn a_large_receive_goes_on_after_a_credit_request() {
    let node = Node::new();
    let (mut a, mut b) = (node.guest(3), node.guest(4));
    b.buf_alloc = 64 << 10;
    let (to, back) = open(&mut a, &mut b, STREAM);
    let mut got = Vec::new();
    for round in 0..8 {
        b.post(20);
        a.send(&to, &pattern(round << 16, 64 << 10));
        a.sign(&to, CREDIT_REQUEST);
        // Nothing is said about the bytes before the question is heard.
        until("the question", || {
            let (header, payload) = b.poll()?;
            got.extend(payload);
            (header.op == CREDIT_REQUEST).then_some(())
        });
        b.post(20);
        while got.len() < (round + 1) << 16 {
            got.extend(b.receive().1);
        }
        b.fwd_cnt = got.len() as u32;
        a.post(1);
        b.sign(&back, CREDIT_UPDATE);
        let answer = a.receive().0;
        assert_eq!((answer.op, answer.buf_alloc, answer.fwd_cnt), (CREDIT_UPDATE, b.buf_alloc, b.fwd_cnt));
        // The buffers that were too many are used in the next rounds.
        while b.posted() > 200 {
            b.ping();
        }
    }
    assert!(got == pattern(0, 8 << 16));
}

/// Packets from one guest to another waited in a queue without a limit.
#[test]
fn what_waits_for_a_guest_that_stands_still_is_bounded() {
    let node = Node::new();
    let (mut a, mut b, mut victim) = (node.guest(3), node.guest(4), node.guest(5));
    b.buf_alloc = 1 << 30;
    let (to, _) = open(&mut a, &mut b, STREAM);
    let before = own_memory();
    a.post(1);
    let data = vec![1; 64 << 10];
    let cut = (0..4096).any(|count| {
        a.queue(a.header(&to, RW), &data);
        if count % 16 == 0 {
            a.kick(TX);
        }
        a.poll().is_some_and(|packet| packet.0.op == RST)
    });
    let grown = own_memory().saturating_sub(before);
    assert!(grown < 80, "{grown} MiB");
    assert!(cut, "256 MiB for a guest that takes nothing");
    victim.ping();
    // Whoever stood still hears of it when it goes on: bytes first, the reset behind them.
    b.post(1);
    assert_eq!(b.receive().0.op, RW);
}

/// A packet larger than the peer's buffer was cut, and the rest was lost.
#[test]
fn a_packet_larger_than_a_receive_buffer_is_split_and_not_cut() {
    let room = BUFFER as usize - Header::LEN;
    for kind in [STREAM, SEQPACKET] {
        // The buffers are there before the packet is, and behind it.
        for early in [true, false] {
            let node = Node::new();
            let (mut a, mut b) = (node.guest(3), node.guest(4));
            let (to, _) = open(&mut a, &mut b, kind);
            let whole = pattern(0, 64 << 10);
            if early {
                b.post(40);
            }
            a.send(&to, &whole);
            a.send(&to, b"the next one");
            if !early {
                a.ping();
                b.post(40);
            }
            let mut got = Vec::new();
            let mut ends = Vec::new();
            while got.len() < whole.len() + 12 {
                let (header, payload) = b.receive();
                assert_eq!(header.op, RW);
                got.extend(payload);
                if header.flags & SEQ_EOM != 0 {
                    ends.push(got.len());
                }
                if kind == STREAM {
                    assert_eq!(header.flags, 0);
                }
            }
            assert!(got == [&whole[..], b"the next one"].concat());
            let messages: &[usize] = if kind == SEQPACKET { &[64 << 10, (64 << 10) + 12] } else { &[] };
            assert_eq!(ends, messages);
            assert!(usize::from(40 - b.posted()) >= whole.len().div_ceil(room));
        }
    }
}

/// A program that connected to nobody waited for its own patience to end.
#[test]
fn a_request_to_an_unknown_number_is_reset_at_once() {
    let node = Node::new();
    let mut a = node.guest(3);
    for (kind, peer) in [(STREAM, NOBODY), (SEQPACKET, NOBODY), (STREAM, 0), (STREAM, u32::MAX), (9, NOBODY)]
    {
        a.post(1);
        let link = a.request(1000, peer, 50, kind);
        let header = a.receive().0;
        assert_eq!((header.op, header.src_cid, header.dst_port), (RST, peer.into(), link.port));
    }
}

/// The same, for a guest that is there and a port of it at which nobody is.
#[test]
fn a_request_to_an_unknown_port_is_reset_at_once() {
    let node = Node::new();
    let (mut a, mut b) = (node.guest(3), node.guest(4));
    a.post(2);
    b.post(1);
    a.request(1000, 4, 51, STREAM);
    b.wait(REQUEST);
    b.sign(&Link { port: 51, peer: 3, peer_port: 1000, kind: STREAM }, RST);
    let header = a.receive().0;
    assert_eq!((header.op, header.src_cid, header.src_port), (RST, 4, 51));
    // A port of the switch's own that nobody has.
    a.request(1000, 2, 51, STREAM);
    assert_eq!(a.receive().0.op, RST);
}
