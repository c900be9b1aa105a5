//! The broker's side: who may connect, and how connections begin and end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use isthmus_engine::lane::{LARGE_DEFAULT, Offer, SMALL_DEFAULT};
use isthmus_sys::poll::Ready;
use isthmus_wire::control::{self, ANY_PORT, ANYBODY, Carrier, Message, Refusal, SocketKind};
use isthmus_wire::vsock::{Header, SEQPACKET, STREAM};

use crate::attachment::Asked;
use crate::bridge::{Bridge, Taken};
use crate::flow::{ACCEPTER, Flow, FlowId, Held, Key, OPENER, Side, Socket, State, Waiting};
use crate::switch::{AGAIN, Switch};

/// Connections of one guest, those that are being opened among them. The broker's limits are lower.
const FLOWS_MAX: usize = 16_384;
/// A little longer than the broker waits for an answer.
const ANSWER: Duration = Duration::from_secs(6);
/// Connections that may wait for a guest's answer; the guest's own backlog is shorter.
const BACKLOG: u32 = 1024;
/// The domain that is meant by the host's CID.
const HOST_DOMAIN: &str = "host";

fn socket_kind(kind: u16) -> SocketKind {
    if kind == SEQPACKET { SocketKind::Seqpacket } else { SocketKind::Stream }
}

impl Switch {
    // ---- the attachment

    pub(crate) fn attach(&mut self, cid: u32) {
        self.lose_home(cid);
        let Some(guest) = self.guests.get_mut(&cid) else { return };
        if guest.home.connect(guest.door.as_fd()).is_err() {
            guest.home.again = Some(Instant::now() + AGAIN);
            return;
        }
        let program = format!("switch for {}", guest.name);
        guest.home.ask(Asked::Hello, &Message::Hello { features: 0, program: &program }, &[]);
        if let Some(socket) = guest.home.socket.as_ref().and_then(|socket| socket.try_clone().ok()) {
            self.watch_home(cid, socket.as_fd());
        }
    }

    /// Try again where there was no broker, and give up on guests that did not answer.
    pub(crate) fn attach_again(&mut self) {
        let now = Instant::now();
        let due = |guest: &crate::switch::Guest| guest.home.again.is_some_and(|at| at <= now);
        let cids: Vec<u32> =
            self.guests.iter().filter(|(_, guest)| due(guest)).map(|(cid, _)| *cid).collect();
        for cid in cids {
            self.attach(cid);
        }
        if self.swept.elapsed() >= Duration::from_secs(1) {
            self.swept = now;
            let late =
                |flow: &Flow| flow.deadline.is_some_and(|at| at <= now) && flow.state == State::Requested;
            let late: Vec<FlowId> =
                self.flows.iter().filter(|(_, flow)| late(flow)).map(|(id, _)| *id).collect();
            for id in late {
                self.refuse(id, Refusal::TimedOut);
                self.end_flow(id, None);
            }
        }
    }

    /// The broker is gone. What is open stays open; what was asked is refused.
    fn lose_home(&mut self, cid: u32) {
        let Some(guest) = self.guests.get_mut(&cid) else { return };
        if let Some(socket) = guest.home.socket.as_ref().and_then(|socket| socket.try_clone().ok()) {
            self.forget(socket.as_fd());
        }
        let Some(guest) = self.guests.get_mut(&cid) else { return };
        for asked in guest.home.lose() {
            if let Asked::Connect(id) = asked {
                self.end_flow(id, None);
            }
        }
    }

    pub(crate) fn hear_home(&mut self, cid: u32, ready: Ready) {
        let Some(guest) = self.guests.get_mut(&cid) else { return };
        if ready.writable {
            guest.home.handle_writable();
            let blocked = guest.home.blocked();
            self.watch_home_again(cid, blocked);
        }
        loop {
            let Some(guest) = self.guests.get_mut(&cid) else { return };
            match guest.home.receive() {
                Ok(Some((packet, descriptors))) => {
                    if self.handle_home(cid, &packet, descriptors).is_some() {
                        continue;
                    }
                }
                Ok(None) => return,
                Err(_) => {}
            }
            self.lose_home(cid);
            if let Some(guest) = self.guests.get_mut(&cid) {
                guest.home.again = Some(Instant::now() + AGAIN);
            }
            return;
        }
    }

    pub(crate) fn tell_home(&mut self, cid: u32, message: &Message<'_>, descriptors: &[BorrowedFd<'_>]) {
        if let Some(guest) = self.guests.get_mut(&cid) {
            guest.home.tell(message, descriptors);
            if guest.home.blocked() {
                self.watch_home_again(cid, true);
            }
        }
    }

    /// `None`: this is no broker.
    fn handle_home(&mut self, cid: u32, packet: &[u8], descriptors: Vec<OwnedFd>) -> Option<()> {
        let (request, message) = control::decode(packet).ok()?;
        let asked = self.guests.get_mut(&cid)?.home.answered(request);
        match (asked, message) {
            (Some(Asked::Hello), Message::Welcome { .. }) => self.greeted(cid),
            (Some(Asked::Bind), Message::Bound { .. }) => self.guests.get_mut(&cid)?.home.ready = true,
            (
                Some(Asked::Connect(id)),
                Message::Connected { connection, secret, small, large, ticket, .. },
            ) => {
                let terms = Terms { secret, small, large };
                self.connected(cid, id, connection, ticket, &terms, descriptors);
            }
            (Some(Asked::Connect(id)), _) => self.end_flow(id, None),
            (Some(Asked::Resume(connection)), Message::Refused { .. }) => self.cut(cid, connection),
            (
                None,
                Message::Incoming {
                    connection,
                    secret,
                    from,
                    from_port,
                    port,
                    kind,
                    small,
                    large,
                    ticket,
                    ..
                },
            ) => {
                let terms = Terms { secret, small, large };
                let kind = match kind {
                    SocketKind::Stream => Some(STREAM),
                    SocketKind::Seqpacket => Some(SEQPACKET),
                    SocketKind::Datagram => None,
                };
                let taken = kind.is_some_and(|kind| {
                    let key = Key { cid: from, port: from_port, peer: cid, peer_port: port, kind };
                    self.incoming(key, connection, ticket, &terms, descriptors)
                });
                if !taken {
                    let refusal = Refusal::NobodyListens;
                    self.tell_home(cid, &Message::Refuse { connection, refusal }, &[]);
                }
            }
            (None, Message::Cut { connection, .. }) => self.cut(cid, connection),
            _ => {}
        }
        Some(())
    }

    /// The broker knows us: we stand for all ports, and hold these connections.
    fn greeted(&mut self, cid: u32) {
        let Some(guest) = self.guests.get_mut(&cid) else { return };
        let all =
            Message::Bind { port: ANY_PORT, kind: SocketKind::Stream, partner: ANYBODY, backlog: BACKLOG };
        guest.home.ask(Asked::Bind, &all, &[]);
        for id in &guest.flows {
            let Some(flow) = self.flows.get(id) else { continue };
            for side in [OPENER, ACCEPTER] {
                let key = flow.key_of(side);
                let Some(held) = flow.held[side].as_ref().filter(|held| held.connection != 0) else {
                    continue;
                };
                if key.cid != cid || flow.ended || flow.state != State::Open {
                    continue;
                }
                let Ok(page) = held.offer().counters_descriptor() else { continue };
                let resume = Message::Resume {
                    connection: held.connection,
                    peer: key.peer,
                    peer_port: key.peer_port,
                    port: key.port,
                    kind: socket_kind(key.kind),
                    carrier: Carrier::Switch,
                    small: held.offer().small,
                    large: held.offer().large,
                    opener: u8::from(side == OPENER),
                    ticket: held.ticket,
                };
                guest.home.ask(Asked::Resume(held.connection), &resume, &[page.as_fd()]);
            }
        }
    }

    // ---- connections begin

    /// A guest's program wants a connection: ask the broker.
    pub(crate) fn open(&mut self, key: Key, header: &Header) {
        let id = self.new_flow();
        let Some(guest) = self.guests.get_mut(&key.cid) else { return };
        let offer = Offer::new(Carrier::Switch, SMALL_DEFAULT, LARGE_DEFAULT);
        let (true, true, Ok(offer)) = (guest.home.ready, guest.flows.len() < FLOWS_MAX, offer) else {
            return self.answer_reset(key.cid, header);
        };
        let number = key.peer.to_string();
        let connect = Message::Connect {
            to: if u64::from(key.peer) == isthmus_wire::vsock::HOST_CID { HOST_DOMAIN } else { &number },
            to_port: key.peer_port,
            from_port: key.port,
            kind: socket_kind(key.kind),
            carrier: Carrier::Switch,
            require: 0,
            small: offer.small,
            large: offer.large,
        };
        guest.home.ask(Asked::Connect(id), &connect, &offer.descriptors());
        guest.flows.insert(id);
        let mut socket = Socket::default();
        socket.credit(header);
        let mut flow = Flow::new(key, State::Asking, [Side::Guest(socket), Side::Unknown]);
        flow.held[OPENER] = Some(Held::new(offer));
        self.flows.insert(id, flow);
        self.keys.insert(key, (id, OPENER));
        if self.guests.get(&key.cid).is_some_and(|guest| guest.home.blocked()) {
            self.watch_home_again(key.cid, true);
        }
    }

    /// Somebody wants a connection to a guest's program: ask the guest. `false`: it cannot be asked.
    fn incoming(
        &mut self,
        key: Key,
        connection: u64,
        ticket: [u8; control::TICKET],
        terms: &Terms,
        descriptors: Vec<OwnedFd>,
    ) -> bool {
        let Ok([lane, bell]) = <[OwnedFd; 2]>::try_from(descriptors) else { return false };
        let Some(guest) = self.guests.get_mut(&key.peer) else { return false };
        let running = guest.device.as_ref().is_some_and(crate::device::Device::running);
        let Ok(offer) = Offer::new(Carrier::Switch, SMALL_DEFAULT, LARGE_DEFAULT) else { return false };
        if !running || guest.flows.len() >= FLOWS_MAX || self.keys.contains_key(&key.other()) {
            return false;
        }
        // Between two guests of ours the packets are passed on, and the lane is not needed.
        let known = self.keys.get(&key).map(|found| found.0);
        let id = known.unwrap_or_else(|| self.new_flow());
        let flow = self.flows.entry(id).or_insert_with(|| {
            let Terms { secret, small, large } = *terms;
            let waiting = Waiting { lane, bell, secret, small, large };
            Flow::new(key, State::Asking, [Side::Waiting(Box::new(waiting)), Side::Unknown])
        });
        if flow.state != State::Asking || flow.ended {
            return false;
        }
        flow.state = State::Requested;
        flow.deadline = Some(Instant::now() + ANSWER);
        let mut socket = Socket::default();
        socket.out.request = true;
        flow.sides[ACCEPTER] = Side::Guest(socket);
        let mut held = Held::new(offer);
        (held.connection, held.ticket) = (connection, ticket);
        flow.held[ACCEPTER] = Some(held);
        self.keys.insert(key.other(), (id, ACCEPTER));
        if let Some(guest) = self.guests.get_mut(&key.peer) {
            guest.flows.insert(id);
        }
        self.queue(id, ACCEPTER);
        true
    }

    /// The guest's program agreed.
    pub(crate) fn accepted(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        flow.state = State::Accepted;
        flow.deadline = None;
        let cid = flow.key_of(ACCEPTER).cid;
        let Some(held) = &flow.held[ACCEPTER] else { return };
        let offer = held.offer();
        let accept = Message::Accept { connection: held.connection, small: offer.small, large: offer.large };
        if let Some(guest) = self.guests.get_mut(&cid) {
            guest.home.tell(&accept, &offer.descriptors());
        }
        if let Side::Waiting(_) = &flow.sides[OPENER] {
            let Side::Waiting(waiting) = std::mem::replace(&mut flow.sides[OPENER], Side::Unknown) else {
                return;
            };
            let Waiting { lane, bell, secret, small, large } = *waiting;
            self.join(id, ACCEPTER, &Terms { secret, small, large }, &lane, bell);
        }
        if self.guests.get(&cid).is_some_and(|guest| guest.home.blocked()) {
            self.watch_home_again(cid, true);
        }
    }

    /// The broker has brought the opener together with whoever listens.
    fn connected(
        &mut self,
        cid: u32,
        id: FlowId,
        connection: u64,
        ticket: [u8; control::TICKET],
        terms: &Terms,
        descriptors: Vec<OwnedFd>,
    ) {
        let open = self.flows.get_mut(&id).filter(|flow| !flow.ended);
        let (Some(flow), Ok([lane, bell])) = (open, <[OwnedFd; 2]>::try_from(descriptors)) else {
            // The opener has given up meanwhile.
            return self.tell_home(cid, &Message::Close { connection }, &[]);
        };
        if let Some(held) = &mut flow.held[OPENER] {
            (held.connection, held.ticket) = (connection, ticket);
        }
        match &flow.sides[ACCEPTER] {
            Side::Guest(_) => flow.state = State::Open,
            _ => self.join(id, OPENER, terms, &lane, bell),
        }
        if let Some(socket) = self.flows.get_mut(&id).and_then(|flow| flow.socket(OPENER)) {
            socket.out.response = true;
        }
        self.queue(id, OPENER);
    }

    /// Make the lanes between the guest on `side` and the program on the other one.
    fn join(&mut self, id: FlowId, side: usize, terms: &Terms, lane: &OwnedFd, bell: OwnedFd) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let kind = socket_kind(flow.key.kind);
        let Some(held) = &flow.held[side] else { return };
        let joined = held.offer().join(lane, terms.small, terms.large, terms.secret, kind);
        let Ok(ends) = joined else { return self.end_flow(id, None) };
        flow.state = State::Open;
        flow.sides[1 - side] = Side::Lane(Box::new(Bridge::new(ends, bell, kind == SocketKind::Seqpacket)));
        // The first look arms the lane.
        self.queue(id, side);
        let Some(Side::Lane(bridge)) = self.flows.get(&id).map(|flow| &flow.sides[1 - side]) else { return };
        if !self.watch_bell(id, bridge.bell()) {
            self.end_flow(id, None);
        }
    }

    /// A program at the other end of a lane rang.
    pub(crate) fn hear_bell(&mut self, id: FlowId) {
        for side in [OPENER, ACCEPTER] {
            let Some(flow) = self.flows.get_mut(&id) else { return };
            let Some(bridge) = flow.bridge(1 - side) else { continue };
            bridge.hear();
            let gone = bridge.gone();
            let taken = bridge.push();
            if taken == Taken::Broken && gone {
                return self.end_flow(id, None);
            }
            if gone {
                // Nothing more will ring; what is in the lane is delivered.
                let Some(Side::Lane(bridge)) = self.flows.get(&id).map(|flow| &flow.sides[1 - side]) else {
                    return;
                };
                self.forget(bridge.bell());
            }
            self.note_taken(id, side, taken);
            self.queue(id, side);
            self.end_if_done(id);
        }
    }

    // ---- connections end

    /// The broker's order.
    fn cut(&mut self, cid: u32, connection: u64) {
        let Some(guest) = self.guests.get(&cid) else { return };
        let held = |id: &&FlowId| {
            let held = |side: &Option<Held>| side.as_ref().is_some_and(|held| held.connection == connection);
            self.flows.get(id).is_some_and(|flow| flow.held.iter().any(held))
        };
        if let Some(id) = guest.flows.iter().find(held).copied() {
            self.end_flow(id, None);
        }
    }

    /// A connection is over. Every guest on it is told, after the bytes that wait for it, but not `by`, who ended it.
    pub(crate) fn end_flow(&mut self, id: FlowId, by: Option<u32>) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let first = !std::mem::replace(&mut flow.ended, true);
        for side in [OPENER, ACCEPTER] {
            let Some(flow) = self.flows.get_mut(&id) else { return };
            let cid = flow.key_of(side).cid;
            if first {
                if let Some(held) = flow.held[side].take().filter(|held| held.connection != 0) {
                    let requested = matches!(flow.state, State::Requested);
                    let message = if requested && side == ACCEPTER {
                        Message::Refuse { connection: held.connection, refusal: Refusal::NobodyListens }
                    } else {
                        Message::Close { connection: held.connection }
                    };
                    self.tell_home(cid, &message, &[]);
                }
            }
            let Some(flow) = self.flows.get_mut(&id) else { return };
            match &mut flow.sides[side] {
                Side::Guest(_) if by == Some(cid) => self.forget_side(id, side),
                Side::Guest(socket) => {
                    socket.out.reset = true;
                    self.queue(id, side);
                }
                Side::Lane(bridge) => {
                    // Whoever closed over what it had not read resets.
                    bridge.close(!bridge.flushed());
                    let Some(Side::Lane(bridge)) = self.flows.get(&id).map(|flow| &flow.sides[side]) else {
                        return;
                    };
                    self.forget(bridge.bell());
                    self.forget_side(id, side);
                }
                Side::Waiting(_) | Side::Unknown => self.forget_side(id, side),
            }
        }
    }

    /// This side has been told, or needs not be. The flow is gone when both have.
    pub(crate) fn forget_side(&mut self, id: FlowId, side: usize) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let key = flow.key_of(side);
        if matches!(flow.sides[side], Side::Guest(_)) && self.keys.get(&key) == Some(&(id, side)) {
            self.keys.remove(&key);
        }
        flow.sides[side] = Side::Unknown;
        // A guest connected to itself is on both sides.
        let here =
            |side: usize| flow.key_of(side).cid == key.cid && matches!(flow.sides[side], Side::Guest(_));
        let still_here = here(1 - side);
        let over = flow.sides.iter().all(|side| matches!(side, Side::Unknown));
        if !still_here {
            if let Some(guest) = self.guests.get_mut(&key.cid) {
                guest.flows.remove(&id);
            }
        }
        if over {
            self.flows.remove(&id);
        }
    }
}

/// On what terms a lane was made.
struct Terms {
    secret: u64,
    small: u32,
    large: u32,
}
