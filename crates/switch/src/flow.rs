//! Connections of guests' `AF_VSOCK` sockets, packet by packet.
//!
//! A flow has two sides. A side is a guest's socket, which speaks packets with credit; or a lane or a kernel socket to
//! a program that is no guest, for which the switch speaks them. Between two guests credit is end to end: what one announces, the other
//! is told. Bytes wait in the switch only while the receiving guest has no buffers, and never more of them than the
//! sender was told it may send, so what a guest can make the switch hold is bounded by what it was granted.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use isthmus_engine::lane::Offer;
use isthmus_proto::sched::{Bucket, Terms};
use isthmus_ring::layout::{COUNTER_RX_BYTES, COUNTER_RX_MESSAGES, COUNTER_TX_BYTES, COUNTER_TX_MESSAGES};
use isthmus_ring::{Mapped, Store};
use isthmus_wire::control::TICKET;
use isthmus_wire::vsock::Header;

use crate::bridge::{Bridge, Outside, WINDOW};
use crate::kernel::KernelSocket;

pub type FlowId = u64;

/// What a guest may send before it is known who takes it, bytes.
pub const NARROW: u32 = 64 << 10;
/// Bytes of what an agent says first: whose end it wants.
pub const NAME: u32 = 8;

/// A guest's socket and the one it talks to: how packets find their flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    pub cid: u32,
    pub port: u32,
    pub peer: u32,
    pub peer_port: u32,
    pub kind: u16,
}

impl Key {
    /// The same connection, seen from the other side.
    #[must_use]
    pub fn other(self) -> Self {
        Self { cid: self.peer, port: self.peer_port, peer: self.cid, peer_port: self.port, kind: self.kind }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The broker was asked for the opener.
    Asking,
    /// The accepting guest was asked.
    Requested,
    /// The accepting guest agreed; the opener is not told yet.
    Accepted,
    Open,
}

/// What waits to be sent to a guest's socket.
#[derive(Default)]
pub struct Out {
    pub request: bool,
    pub response: bool,
    pub credit: bool,
    pub credit_request: bool,
    pub data: VecDeque<u8>,
    /// Of seqpacket sockets: bytes of `data` that belong together, and the flags of their last packet.
    pub marks: VecDeque<(usize, u32)>,
    /// Flags of the `SHUTDOWN` that follows the data.
    pub shutdown: u32,
    /// The last packet of all.
    pub reset: bool,
    /// The guest's list of flows with something to send has this one.
    pub queued: bool,
}

impl Out {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let Self { request, response, credit, credit_request, data, marks, shutdown, reset, queued: _ } =
            self;
        let flags = *request || *response || *credit || *credit_request || *reset;
        !flags && data.is_empty() && marks.is_empty() && *shutdown == 0
    }
}

/// A guest's socket.
#[derive(Default)]
pub struct Socket {
    pub out: Out,
    /// As the guest said last: its buffer, and how much it took from it.
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    /// Bytes that were sent to it.
    pub sent: u32,
    /// Bytes that came from it, and up to where it was told it may send. Both wrap.
    pub received: u32,
    pub edge: u32,
    /// Of those, bytes that the other side took (counted here only if that is a lane).
    pub taken: u32,
    /// `taken` when the guest was last told.
    pub told: u32,
    /// What it has shut down, and what it was told that the other side has.
    pub shut: u32,
    pub told_shut: u32,
}

impl Socket {
    /// Believe what a packet says about its sender's buffer. `true`: there is news.
    pub fn credit(&mut self, header: &Header) -> bool {
        // It can have taken no more than it was given.
        let fwd_cnt = if ahead(header.fwd_cnt, self.sent) { self.sent } else { header.fwd_cnt };
        let news = (self.buf_alloc, self.fwd_cnt) != (header.buf_alloc, fwd_cnt);
        (self.buf_alloc, self.fwd_cnt) = (header.buf_alloc, fwd_cnt);
        news
    }

    /// Bytes that may be sent to it now.
    #[must_use]
    pub fn room(&self) -> u32 {
        let flying = self.sent.wrapping_sub(self.fwd_cnt);
        // A guest that says it took more than it got has `flying` near 2^32.
        self.buf_alloc.saturating_sub(flying)
    }

    /// Note what the guest is told in a packet's header: it may send so much.
    pub fn grant(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        let edge = fwd_cnt.wrapping_add(buf_alloc);
        if ahead(edge, self.edge) {
            self.edge = edge;
        }
    }

    /// Count bytes that came. `false`: more than it was told.
    #[must_use]
    pub fn receive(&mut self, len: u32) -> bool {
        let room = self.edge.wrapping_sub(self.received);
        if room >= 1 << 31 || len > room {
            return false;
        }
        self.received = self.received.wrapping_add(len);
        true
    }
}

/// Is `a` after `b`? Both wrap; they are less than 2^31 apart.
fn ahead(a: u32, b: u32) -> bool {
    let by = a.wrapping_sub(b);
    by != 0 && by < 1 << 31
}

/// The lane of an opener that is no guest, until the guest has agreed.
pub struct Waiting {
    pub lane: OwnedFd,
    pub bell: OwnedFd,
    pub secret: u64,
    pub small: u32,
    pub large: u32,
}

pub enum Side {
    /// A guest's `AF_VSOCK` socket.
    Guest(Socket),
    /// A program's lanes.
    Lane(Box<Bridge>),
    /// A kernel socket.
    Kernel(Box<KernelSocket>),
    /// Lanes of a program that are made once the other side has agreed.
    Waiting(Box<Waiting>),
    /// The switch itself, for agents of guests.
    Service(Service),
    /// Not known yet, or not there any more.
    Unknown,
}

/// What a guest's agent talks to in the switch.
pub struct Service {
    pub kind: ServiceKind,
    /// Bytes of a message whose end has not come.
    pub begun: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceKind {
    /// The broker, for a program: this attachment.
    Control(u64),
    /// Memory for lanes.
    Seats,
    /// The bell of a seat; not known until it was named.
    Bell(Option<u32>),
    /// A kernel socket that was not named yet.
    Socket,
}

/// What the broker knows of a side that came through a guest's door.
pub struct Held {
    /// By which attachment.
    pub attachment: u64,
    pub connection: u64,
    pub ticket: [u8; TICKET],
    /// This side's memory. Between guests only its page is used, for the totals.
    offer: Offer,
    totals: Mapped,
}

impl Held {
    #[must_use]
    pub fn new(attachment: u64, offer: Offer) -> Self {
        let totals = Mapped::new(offer.counters().clone());
        Self { attachment, connection: 0, ticket: [0; TICKET], offer, totals }
    }

    #[must_use]
    pub fn offer(&self) -> &Offer {
        &self.offer
    }
}

pub struct Flow {
    /// As the opener sees it, as the accepter does. (A guest may mean one domain by two numbers.)
    pub keys: [Key; 2],
    pub state: State,
    /// Opener, accepter.
    pub sides: [Side; 2],
    pub held: [Option<Held>; 2],
    /// Bytes and messages from the opener, from the accepter.
    sent: [(u64, u64); 2],
    /// The flow has ended; a guest is yet to be told.
    pub ended: bool,
    /// When to give up on a guest that does not answer.
    pub deadline: Option<Instant>,
    /// The seats of sides that are programs of guests.
    pub seats: [Option<u32>; 2],
    /// Of both lanes.
    pub secret: u64,
    /// Of a kernel socket: which end of which connection it is.
    pub end: Option<End>,
    /// Of kernel sockets of two guests: the ends that the broker brought, the opener's first. Nothing passes through them;
    /// the broker sees by them that the connection is there.
    pub brought: Option<Box<[OwnedFd; 2]>>,
    /// Of a kernel socket whose guest's program speaks plain `AF_VSOCK`: for a broker that was started again.
    pub ticket: Option<[u8; TICKET]>,
    /// On what terms its bytes move; which directions are waiting for that; what they may still send.
    pub terms: Terms,
    pub marked: [bool; 2],
    pub buckets: [Bucket; 2],
    /// Of what a guest's socket sent, what it was told that was taken: with a rate, no more than that allows.
    passed: [u32; 2],
}

/// One end of a connection of kernel sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct End {
    pub connection: u64,
    pub opener: bool,
}

/// Who has ended a connection, and needs not be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Nobody,
    Side(usize),
    /// It is gone, with both sides if both were its.
    Guest(u32),
}

pub const OPENER: usize = 0;
pub const ACCEPTER: usize = 1;

impl Flow {
    #[must_use]
    pub fn new(key: Key, state: State, sides: [Side; 2]) -> Self {
        Self {
            keys: [key, key.other()],
            state,
            sides,
            held: [None, None],
            sent: [(0, 0); 2],
            ended: false,
            deadline: None,
            seats: [None, None],
            secret: 0,
            end: None,
            brought: None,
            ticket: None,
            terms: Terms::default(),
            marked: [false; 2],
            buckets: Default::default(),
            passed: [0; 2],
        }
    }

    /// Count bytes between two guests, for the broker's accounts. Lanes count by themselves.
    pub fn count(&mut self, from: usize, bytes: u32) {
        let Some(total) = self.sent.get_mut(from) else { return };
        total.0 += u64::from(bytes);
        total.1 += 1;
        let totals = [
            (from, COUNTER_TX_BYTES, COUNTER_TX_MESSAGES),
            (1 - from, COUNTER_RX_BYTES, COUNTER_RX_MESSAGES),
        ];
        for (side, bytes, messages) in totals {
            if let Some(held) = &self.held[side] {
                held.totals.counter(bytes, total.0);
                held.totals.counter(messages, total.1);
            }
        }
    }

    /// The connection as this side sees it.
    #[must_use]
    pub fn key_of(&self, side: usize) -> Key {
        self.keys[side]
    }

    #[must_use]
    pub fn socket(&mut self, side: usize) -> Option<&mut Socket> {
        match self.sides.get_mut(side) {
            Some(Side::Guest(socket)) => Some(socket),
            _ => None,
        }
    }

    /// The program on this side, if it has no socket in a guest.
    #[must_use]
    pub fn outside(&mut self, side: usize) -> Option<&mut dyn Outside> {
        match self.sides.get_mut(side) {
            Some(Side::Lane(bridge)) => Some(bridge.as_mut()),
            Some(Side::Kernel(socket)) => Some(socket.as_mut()),
            _ => None,
        }
    }

    #[must_use]
    pub fn kernel_socket(&self) -> Option<&KernelSocket> {
        self.sides.iter().find_map(|side| match side {
            Side::Kernel(socket) => Some(socket.as_ref()),
            _ => None,
        })
    }

    /// Has somebody been waited for long enough: who agrees to be connected, who says which kernel socket it wants, or
    /// who takes what a guest sent before it went?
    #[must_use]
    pub fn is_late(&self, now: Instant) -> bool {
        let unnamed = |side: &Side| matches!(side, Side::Service(Service { kind: ServiceKind::Socket, .. }));
        let left = matches!(self.sides, [Side::Unknown, Side::Kernel(_)] | [Side::Kernel(_), Side::Unknown]);
        let waits = self.state != State::Open || left || self.sides.iter().any(unnamed);
        waits && self.deadline.is_some_and(|at| at <= now)
    }

    /// Is this, or does it stand for, that end?
    #[must_use]
    pub fn has_end(&self, end: End) -> bool {
        let joined = |own: End| own == end || self.brought.is_some() && own.connection == end.connection;
        self.end.is_some_and(joined)
    }

    /// The socket that the broker brought for that end.
    #[must_use]
    pub fn socket_of(&self, end: End) -> Option<BorrowedFd<'_>> {
        match self.brought.as_deref() {
            Some([opener, accepter]) => Some(if end.opener { opener.as_fd() } else { accepter.as_fd() }),
            None => self.kernel_socket().map(KernelSocket::socket),
        }
    }

    /// Two guests' connections to the two ends of one become one flow: this one, the opener's. Only while neither has
    /// said more than whose end it is. `None`: they are not what they should be, and are lost.
    pub fn join(&mut self, mut other: Self) -> Option<()> {
        let Side::Kernel(theirs) = std::mem::replace(&mut other.sides[ACCEPTER], Side::Unknown) else {
            return None;
        };
        let guest = std::mem::replace(&mut other.sides[OPENER], Side::Unknown);
        let Side::Kernel(ours) = std::mem::replace(&mut self.sides[ACCEPTER], guest) else { return None };
        self.brought = Some(Box::new([ours.into_socket(), theirs.into_socket()]));
        self.keys[ACCEPTER] = other.keys[OPENER];
        self.passed[ACCEPTER] = other.passed[OPENER];
        Some(())
    }

    /// May this side's guest send little, because two may become one?
    #[must_use]
    pub fn is_narrow(&self, side: usize) -> bool {
        matches!(&self.sides[1 - side], Side::Kernel(other) if other.narrow)
    }

    /// Do bytes wait here for this side's guest to have room? Between two guests' own sockets none do.
    #[must_use]
    pub fn holds_back(&self, side: usize) -> bool {
        self.brought.is_some()
            && matches!(&self.sides[side], Side::Guest(socket) if !socket.out.data.is_empty())
    }

    /// Are both sides lanes?
    #[must_use]
    pub fn is_lanes(&self) -> bool {
        matches!(self.sides, [Side::Lane(_), Side::Lane(_)])
    }

    /// What this side's guest may send at once, and how much of what it sent was taken.
    fn window(&mut self, side: usize) -> (u32, u32) {
        match &self.sides[1 - side] {
            // It counts the name that it sent us as well. What it was granted before is kept here if need be.
            Side::Guest(other) if self.brought.is_some() => {
                let most = if self.terms.rate > 0 { WINDOW } else { u32::MAX };
                (other.buf_alloc.clamp(NARROW, most), other.fwd_cnt.wrapping_add(NAME))
            }
            // What it may send at once is what the rate cannot hold back.
            Side::Guest(other) if self.terms.rate > 0 => (other.buf_alloc.min(WINDOW), other.fwd_cnt),
            Side::Guest(other) => (other.buf_alloc, other.fwd_cnt),
            // A window that becomes smaller confuses Linux; so it is small as long as two guests' may become one flow.
            Side::Service(Service { kind: ServiceKind::Socket, .. }) => {
                (NARROW, self.socket(side).map_or(0, |socket| socket.taken))
            }
            Side::Kernel(other) if other.narrow => {
                (NARROW, self.socket(side).map_or(0, |socket| socket.taken))
            }
            Side::Lane(_) | Side::Kernel(_) | Side::Service(_) => {
                (WINDOW, self.socket(side).map_or(0, |socket| socket.taken))
            }
            // Whatever it sends would have nowhere to go.
            Side::Waiting(_) | Side::Unknown => (0, 0),
        }
    }

    /// Let this side's guest know of what was taken, as its rate allows. It waits for that before it sends more, and its
    /// window stays as wide as the other side made it: a message that is longer would be refused.
    ///
    /// # Errors
    /// When there may be more.
    pub fn pass(&mut self, side: usize, now_us: u64) -> Result<(), u64> {
        let (_, taken) = self.window(side);
        let more = taken.wrapping_sub(self.passed[side]);
        if more != 0 && more <= i32::MAX as u32 {
            self.buckets[side].ready(self.terms.rate, now_us)?;
            self.buckets[side].take(if self.terms.rate > 0 { more as usize } else { 0 });
        }
        self.passed[side] = taken;
        Ok(())
    }

    /// The header of a packet to this side's guest: who sends it, and what it may send.
    pub fn header(&mut self, side: usize, op: u16) -> Header {
        let key = self.key_of(side);
        let (buf_alloc, fwd_cnt) = (self.window(side).0, self.passed[side]);
        if let Some(socket) = self.socket(side) {
            socket.grant(buf_alloc, fwd_cnt);
            socket.told = socket.taken;
        }
        Header {
            src_cid: key.peer.into(),
            dst_cid: key.cid.into(),
            src_port: key.peer_port,
            dst_port: key.port,
            kind: key.kind,
            op,
            buf_alloc,
            fwd_cnt,
            ..Header::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_may_send_what_it_was_told_and_not_a_byte_more() {
        let mut socket = Socket { received: u32::MAX - 10, edge: u32::MAX - 10, ..Socket::default() };
        socket.grant(100, u32::MAX - 10);
        assert!(socket.receive(100));
        assert!(!socket.receive(1));
    }

    #[test]
    fn a_smaller_window_takes_back_nothing_that_was_granted() {
        let mut socket = Socket::default();
        socket.grant(1000, 0);
        socket.grant(10, 0);
        assert!(socket.receive(1000));
        assert!(!socket.receive(1));
    }

    #[test]
    fn nobody_is_believed_to_have_taken_more_than_it_got() {
        let mut socket = Socket { sent: 100, ..Socket::default() };
        let lie = Header { buf_alloc: 4096, fwd_cnt: 1 << 20, ..Header::default() };
        assert!(socket.credit(&lie));
        assert_eq!((socket.fwd_cnt, socket.room()), (100, 4096));
    }

    #[test]
    fn a_length_that_wraps_is_more_than_was_granted() {
        let mut socket = Socket { received: 10, edge: 20, ..Socket::default() };
        assert!(!socket.receive(u32::MAX));
        assert!(!socket.receive((1 << 31) + 10));
        assert!(socket.receive(10));
    }

    #[test]
    fn a_guest_that_promises_its_partner_four_gigabytes_is_held_to_the_rate() {
        let key = Key { cid: 3, port: 1024, peer: 4, peer_port: 80, kind: 1 };
        let generous = Socket { buf_alloc: u32::MAX, fwd_cnt: 0, ..Socket::default() };
        let sides = [Side::Guest(Socket::default()), Side::Guest(generous)];
        let mut flow = Flow::new(key, State::Open, sides);
        assert_eq!(flow.header(OPENER, 0).buf_alloc, u32::MAX);
        flow.terms.rate = 1_000_000;
        assert_eq!(flow.header(OPENER, 0).buf_alloc, WINDOW);
        for taken in [WINDOW, 2 * WINDOW] {
            flow.sides[ACCEPTER] =
                Side::Guest(Socket { buf_alloc: u32::MAX, fwd_cnt: taken, ..Socket::default() });
            let held = flow.pass(OPENER, 1).is_err();
            assert_eq!((held, flow.header(OPENER, 0).fwd_cnt), (taken > WINDOW, WINDOW));
        }
    }
}
