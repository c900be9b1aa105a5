//! The broker's side: attachments, and how connections begin and end.
//!
//! Each guest has one attachment of the switch's own, its *home*, for programs that speak plain `AF_VSOCK`; and one
//! for each program that came through the guest's agent, whose messages are passed on (see `agent`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use isthmus_engine::lane::{Ends, LARGE_DEFAULT, Offer, SMALL_DEFAULT};
use isthmus_proto::sched;
use isthmus_sys::poll::Ready;
use isthmus_wire::control::{
    self, ANY_PORT, ANYBODY, BELL_PORT, CONTROL_PORT, Carrier, Message, PRIVILEGED_PORT_MAX, Refusal,
    SEATS_PORT, SOCKETS_PORT, SocketKind, TICKET,
};
use isthmus_wire::vsock::{HOST_CID, Header, SEQPACKET, STREAM};

use crate::attachment::{Asked, Attachment};
use crate::bridge::{Bell, Bridge, Outside, Taken};
use crate::flow::{
    ACCEPTER, By, Flow, FlowId, Held, Key, OPENER, Service, ServiceKind, Side, Socket, State, Waiting,
};
use crate::switch::{AGAIN, Switch};

/// Connections of one guest, those that are being opened among them. The broker's limits are lower.
const FLOWS_MAX: usize = 8192;
/// Of those, such that the broker has not answered for; and programs that come through the guest's agent.
const ASKING_MAX: usize = 512;
const PROGRAMS_MAX: usize = 256;
/// A little longer than the broker waits for an answer.
pub(crate) const ANSWER: Duration = Duration::from_secs(6);
/// Connections that may wait for a guest's answer; the guest's own backlog is shorter.
const BACKLOG: u32 = 1024;
/// Terms of connections that are about to be made.
const TERMS_MAX: usize = 16_384;
/// The domain that is meant by the host's CID.
const HOST_DOMAIN: &str = "host";

pub(crate) fn socket_kind(kind: u16) -> SocketKind {
    if kind == SEQPACKET { SocketKind::Seqpacket } else { SocketKind::Stream }
}

pub(crate) fn packet_kind(kind: SocketKind) -> u16 {
    if kind == SocketKind::Stream { STREAM } else { SEQPACKET }
}

/// On what terms the broker made a connection.
#[derive(Clone, Copy)]
pub(crate) struct Terms {
    pub(crate) connection: u64,
    pub(crate) ticket: [u8; TICKET],
    pub(crate) secret: u64,
    pub(crate) small: u32,
    pub(crate) large: u32,
}

impl Switch {
    // ---- attachments

    /// Attach on behalf of a guest (again).
    pub(crate) fn attach(&mut self, id: u64) {
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        let Some(guest) = self.guests.get(&attachment.cid) else { return };
        if attachment.connect(guest.door.as_fd()).is_err() {
            attachment.again = Some(Instant::now() + AGAIN);
            return;
        }
        if attachment.app.is_none() {
            let program = format!("switch for {}", guest.name);
            attachment.ask(Asked::Hello, &Message::Hello { features: 0, program: &program }, &[]);
        }
        self.watch_attachment(id);
    }

    /// Try again where there was no broker, and give up on guests that did not answer.
    pub(crate) fn attach_again(&mut self) {
        let now = Instant::now();
        let due = |attachment: &Attachment| attachment.again.is_some_and(|at| at <= now);
        let due: Vec<u64> = self.attachments.iter().filter(|(_, a)| due(a)).map(|(id, _)| *id).collect();
        for id in due {
            self.attach(id);
        }
        if self.swept.elapsed() >= Duration::from_secs(1) {
            self.swept = now;
            self.check_seats();
            self.ends.retain(|_, kept| kept.until > now);
            // What they were for never came.
            self.terms.retain(|_, (_, since)| now.duration_since(*since) < ANSWER);
            let late = |flow: &Flow| flow.is_late(now);
            let late: Vec<FlowId> =
                self.flows.iter().filter(|(_, flow)| late(flow)).map(|(id, _)| *id).collect();
            for id in late {
                self.refuse(id, Refusal::TimedOut);
                self.end_flow(id, By::Nobody);
            }
        }
    }

    /// The broker is gone. What is open stays open; what was asked is refused.
    pub(crate) fn lose_broker(&mut self, id: u64) {
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        if let Some(line) = &attachment.line {
            let _ = self.set.remove(line.as_fd());
        }
        let (asked, app, cid) = (attachment.lose(), attachment.app, attachment.cid);
        self.give_up(&asked);
        // What was being made will never be; what is open stays.
        let flows = self.guests.get(&cid).map(|guest| &guest.flows);
        let unmade: Vec<FlowId> = flows
            .into_iter()
            .flatten()
            .copied()
            .filter(|flow| {
                self.flows.get(flow).is_some_and(|flow| {
                    flow.state != State::Open && flow.held.iter().flatten().any(|held| held.attachment == id)
                })
            })
            .collect();
        for flow in unmade {
            self.end_flow(flow, By::Nobody);
        }
        match app {
            // Its program attaches again by itself, and shows what it holds.
            Some(flow) => self.end_flow(flow, By::Nobody),
            None => {
                if let Some(attachment) = self.attachments.get_mut(&id) {
                    attachment.again = Some(Instant::now() + AGAIN);
                }
            }
        }
    }

    /// Nobody will answer these.
    pub(crate) fn give_up(&mut self, asked: &[Asked]) {
        for asked in asked {
            if let Asked::Connect(flow) = asked {
                self.end_flow(*flow, By::Nobody);
            }
        }
    }

    pub(crate) fn hear_broker_through(&mut self, id: u64, ready: Ready) {
        if ready.writable {
            if let Some(line) = self.attachments.get_mut(&id).and_then(|attachment| attachment.line.as_mut())
            {
                line.handle_writable();
            }
            self.watch_blocked(id);
        }
        loop {
            let Some(attachment) = self.attachments.get_mut(&id) else { return };
            let Some(line) = &attachment.line else { return };
            let heard = match line.receive() {
                Ok(Some((packet, descriptors))) => match attachment.app {
                    Some(flow) => self.pass_to_program(id, flow, &packet, descriptors),
                    None => self.handle_home(id, &packet, descriptors),
                },
                Ok(None) => return,
                Err(_) => None,
            };
            if heard.is_none() {
                return self.lose_broker(id);
            }
        }
    }

    pub(crate) fn tell(&mut self, id: u64, message: &Message<'_>, descriptors: &[BorrowedFd<'_>]) {
        if let Some(attachment) = self.attachments.get_mut(&id) {
            attachment.tell(message, descriptors);
            self.watch_blocked(id);
        }
    }

    /// `None`: this is no broker.
    fn handle_home(&mut self, id: u64, packet: &[u8], descriptors: Vec<OwnedFd>) -> Option<()> {
        let (request, message) = control::decode(packet).ok()?;
        let attachment = self.attachments.get_mut(&id)?;
        let cid = attachment.cid;
        match (attachment.answered(request), message) {
            (Some(Asked::Hello), Message::Welcome { .. }) => self.greeted(id),
            (Some(Asked::Bind), Message::Bound { .. }) => attachment.ready = true,
            (Some(Asked::Connect(flow)), Message::Connected { .. }) => {
                self.connected(id, flow, &message, descriptors);
            }
            (Some(Asked::Connect(flow)), Message::ConnectedSocket { .. }) => {
                let joined = self.connected_socket(flow, &message, descriptors);
                joined.unwrap_or_else(|| self.end_flow(flow, By::Nobody));
            }
            (Some(Asked::Connect(flow)), _) => self.end_flow(flow, By::Nobody),
            (Some(Asked::Resume(connection)), Message::Refused { .. }) => self.cut(cid, connection),
            (None, Message::Incoming { connection, .. }) => {
                let refusal = Refusal::NobodyListens;
                let asked = self.incoming(id, &message, descriptors);
                asked.unwrap_or_else(|| self.tell(id, &Message::Refuse { connection, refusal }, &[]));
            }
            (None, Message::IncomingSocket { connection, .. }) => {
                let refusal = Refusal::NobodyListens;
                let asked = self.incoming_socket(id, &message, descriptors);
                asked.unwrap_or_else(|| self.tell(id, &Message::Refuse { connection, refusal }, &[]));
            }
            (None, Message::Cut { connection, .. }) => self.cut(cid, connection),
            (None, Message::Terms { connection, class, weight, rate }) => {
                self.note_terms(cid, connection, sched::Terms { class, weight, rate });
            }
            _ => {}
        }
        Some(())
    }

    /// The broker knows us: we stand for all ports, and hold these connections.
    fn greeted(&mut self, id: u64) {
        let Some(attachment) = self.attachments.get_mut(&id) else { return };
        let all =
            Message::Bind { port: ANY_PORT, kind: SocketKind::Stream, partner: ANYBODY, backlog: BACKLOG };
        attachment.ask(Asked::Bind, &all, &[]);
        let Some(guest) = self.guests.get(&attachment.cid) else { return };
        for flow in guest.flows.iter().filter_map(|flow| self.flows.get(flow)) {
            if flow.ended || flow.state != State::Open {
                continue;
            }
            for side in [OPENER, ACCEPTER] {
                let held =
                    flow.held[side].as_ref().filter(|held| held.connection != 0 && held.attachment == id);
                let Some(held) = held else { continue };
                let Ok(page) = held.offer().counters_descriptor() else { continue };
                let key = flow.key_of(side);
                let resume = Message::Resume {
                    connection: held.connection,
                    peer: flow.key_of(1 - side).cid,
                    peer_port: key.peer_port,
                    port: key.port,
                    kind: socket_kind(key.kind),
                    carrier: Carrier::Switch,
                    small: held.offer().small,
                    large: held.offer().large,
                    opener: u8::from(side == OPENER),
                    ticket: held.ticket,
                };
                attachment.ask(Asked::Resume(held.connection), &resume, &[page.as_fd()]);
            }
        }
        self.show_kernel_sockets(id);
        self.watch_blocked(id);
    }

    // ---- connections begin

    /// Can this connection's guest be asked for it?
    pub(crate) fn may_be_asked(&self, key: &Key) -> bool {
        let guest = self.guests.get(&key.peer).filter(|guest| guest.flows.len() < FLOWS_MAX);
        let device = guest.and_then(|guest| guest.device.as_ref());
        device.is_some_and(crate::device::Device::running) && !self.keys.contains_key(&key.other())
    }

    /// A guest's program wants a connection: ask the broker, or it is for ourselves.
    pub(crate) fn open(&mut self, key: Key, header: &Header) {
        let Some(guest) = self.guests.get_mut(&key.cid) else { return };
        if guest.flows.len() >= FLOWS_MAX {
            return self.answer_reset(key.cid, header);
        }
        let mut socket = Socket::default();
        socket.credit(header);
        if u64::from(key.peer) == HOST_CID && (CONTROL_PORT..=SOCKETS_PORT).contains(&key.peer_port) {
            return self.open_service(key, socket, header);
        }
        let id = self.new_flow();
        let Some(guest) = self.guests.get_mut(&key.cid) else { return };
        let home = guest.home;
        let offer = Offer::new(Carrier::Switch, SMALL_DEFAULT, LARGE_DEFAULT);
        let attachment = self.attachments.get_mut(&home);
        let attachment = attachment.filter(|attachment| attachment.ready && attachment.asking() < ASKING_MAX);
        let (Some(attachment), Ok(offer)) = (attachment, offer) else {
            return self.answer_reset(key.cid, header);
        };
        let number = key.peer.to_string();
        let connect = Message::Connect {
            to: if u64::from(key.peer) == HOST_CID { HOST_DOMAIN } else { &number },
            to_port: key.peer_port,
            from_port: key.port,
            kind: socket_kind(key.kind),
            carrier: Carrier::Switch,
            require: 0,
            small: offer.small,
            large: offer.large,
        };
        attachment.ask(Asked::Connect(id), &connect, &offer.descriptors());
        guest.flows.insert(id);
        let mut flow = Flow::new(key, State::Asking, [Side::Guest(socket), Side::Unknown]);
        flow.held[OPENER] = Some(Held::new(home, offer));
        flow.deadline = Some(Instant::now() + ANSWER);
        self.flows.insert(id, flow);
        self.keys.insert(key, (id, OPENER));
        self.watch_blocked(home);
    }

    /// A guest's agent talks to the switch itself.
    fn open_service(&mut self, key: Key, socket: Socket, header: &Header) {
        let privileged = key.port <= PRIVILEGED_PORT_MAX;
        let kind = match (key.peer_port, key.kind) {
            (CONTROL_PORT, SEQPACKET) => None,
            (SEATS_PORT, SEQPACKET) if privileged => Some(ServiceKind::Seats),
            (BELL_PORT, STREAM) if privileged => Some(ServiceKind::Bell(None)),
            // Its first bytes say whose it is, and nobody else can know them.
            (SOCKETS_PORT, STREAM) => Some(ServiceKind::Socket),
            _ => return self.answer_reset(key.cid, header),
        };
        let id = self.new_flow();
        let programs = self.attachments.values().filter(|attachment| attachment.cid == key.cid).count();
        if kind.is_none() && programs > PROGRAMS_MAX {
            return self.answer_reset(key.cid, header);
        }
        let kind = kind.unwrap_or_else(|| {
            let attachment = self.new_attachment(key.cid, Some(id));
            self.attach(attachment);
            ServiceKind::Control(attachment)
        });
        if let ServiceKind::Control(attachment) = kind {
            // No broker: the program hears it as it would at a door.
            if self.attachments.get(&attachment).is_none_or(|attachment| attachment.line.is_none()) {
                self.attachments.remove(&attachment);
                return self.answer_reset(key.cid, header);
            }
        }
        let service = Side::Service(Service { kind, begun: Vec::new() });
        let mut socket = socket;
        socket.out.response = true;
        let mut flow = Flow::new(key, State::Open, [Side::Guest(socket), service]);
        // Whoever wants a kernel socket says soon which.
        flow.deadline = (key.peer_port == SOCKETS_PORT).then(|| Instant::now() + ANSWER);
        self.flows.insert(id, flow);
        self.keys.insert(key, (id, OPENER));
        if let Some(guest) = self.guests.get_mut(&key.cid) {
            guest.flows.insert(id);
        }
        self.queue(id, OPENER);
    }

    /// Somebody wants a connection to a program of a guest that speaks plain `AF_VSOCK`: ask the guest.
    fn incoming(&mut self, home: u64, message: &Message<'_>, descriptors: Vec<OwnedFd>) -> Option<()> {
        let Message::Incoming { from, from_port, port, kind, .. } = *message else { return None };
        let cid = self.attachments.get(&home)?.cid;
        let kind = match kind {
            SocketKind::Datagram => return None,
            kind => packet_kind(kind),
        };
        let key = Key { cid: from, port: from_port, peer: cid, peer_port: port, kind };
        if !self.may_be_asked(&key) {
            return None;
        }
        let mut socket = Socket::default();
        socket.out.request = true;
        let id = self.accept_flow(home, key, Side::Guest(socket), message, descriptors)?;
        self.keys.insert(key.other(), (id, ACCEPTER));
        self.queue(id, ACCEPTER);
        Some(())
    }

    /// A flow whose accepting side, a guest's, is to be asked.
    pub(crate) fn accept_flow(
        &mut self,
        attachment: u64,
        key: Key,
        side: Side,
        message: &Message<'_>,
        descriptors: Vec<OwnedFd>,
    ) -> Option<FlowId> {
        let Message::Incoming { connection, secret, small, large, ticket, .. } = *message else {
            return None;
        };
        let [lane, bell] = <[OwnedFd; 2]>::try_from(descriptors).ok()?;
        let offer = Offer::new(Carrier::Switch, SMALL_DEFAULT, LARGE_DEFAULT).ok()?;
        let local = self.guests.contains_key(&key.cid);
        let terms = self.terms.remove(&(key.peer, connection)).map(|(terms, _)| terms);
        let guest = self.guests.get_mut(&key.peer)?;
        if guest.flows.len() >= FLOWS_MAX {
            return None;
        }
        self.last_flow += 1;
        let id = self.last_flow;
        guest.flows.insert(id);
        // Between two guests nothing passes through this lane: the opener's side is with us as well.
        let opener = if local {
            self.meetings.insert(connection, id);
            Side::Unknown
        } else {
            Side::Waiting(Box::new(Waiting { lane, bell, secret, small, large }))
        };
        let mut flow = Flow::new(key, State::Requested, [opener, side]);
        flow.deadline = Some(Instant::now() + ANSWER);
        flow.secret = secret;
        let mut held = Held::new(attachment, offer);
        (held.connection, held.ticket) = (connection, ticket);
        flow.held[ACCEPTER] = Some(held);
        self.flows.insert(id, flow);
        if let Some(terms) = terms {
            self.set_terms(id, terms);
        }
        Some(id)
    }

    /// The guest's program agreed.
    pub(crate) fn accepted(&mut self, id: FlowId) {
        if self.accepted_socket(id) {
            return;
        }
        let Some(flow) = self.flows.get_mut(&id) else { return };
        flow.state = State::Accepted;
        let Some(held) = &flow.held[ACCEPTER] else { return };
        let (offer, attachment) = (held.offer(), held.attachment);
        let accept = Message::Accept { connection: held.connection, small: offer.small, large: offer.large };
        if let Some(attachment) = self.attachments.get_mut(&attachment) {
            attachment.tell(&accept, &offer.descriptors());
        }
        if let Side::Waiting(_) = &flow.sides[OPENER] {
            let Side::Waiting(waiting) = std::mem::replace(&mut flow.sides[OPENER], Side::Unknown) else {
                return;
            };
            let Waiting { lane, bell, secret, small, large } = *waiting;
            self.join(id, ACCEPTER, (secret, small, large), &lane, bell);
        }
        self.watch_blocked(attachment);
    }

    /// The broker has brought the opener together with whoever listens.
    pub(crate) fn connected(
        &mut self,
        attachment: u64,
        id: FlowId,
        message: &Message<'_>,
        descriptors: Vec<OwnedFd>,
    ) -> bool {
        let Message::Connected { connection, ticket, secret, small, large, .. } = *message else {
            return false;
        };
        let terms = Terms { connection, ticket, secret, small, large };
        let other = self.meetings.remove(&connection);
        let open = self.flows.get_mut(&id).filter(|flow| !flow.ended);
        let (Some(flow), Ok([lane, bell])) = (open, <[OwnedFd; 2]>::try_from(descriptors)) else {
            // The opener has given up meanwhile.
            self.tell(attachment, &Message::Close { connection }, &[]);
            if let Some(other) = other {
                self.end_flow(other, By::Nobody);
            }
            return false;
        };
        if let Some(held) = &mut flow.held[OPENER] {
            (held.connection, held.ticket) = (terms.connection, terms.ticket);
        }
        let cid = flow.key_of(OPENER).cid;
        if let Some((terms, _)) = self.terms.remove(&(cid, connection)) {
            self.set_terms(id, terms);
        }
        match other {
            Some(other) => self.meet(id, other),
            None => self.join(id, OPENER, (terms.secret, terms.small, terms.large), &lane, bell),
        }
        let Some(flow) = self.flows.get_mut(&id).filter(|flow| !flow.ended) else { return false };
        if let Some(socket) = flow.socket(OPENER) {
            socket.out.response = true;
        }
        self.queue(id, OPENER);
        true
    }

    /// Both sides of a connection are with us: make one flow of the two.
    fn meet(&mut self, opener: FlowId, accepter: FlowId) {
        let Some(mut other) = self.flows.remove(&accepter).filter(|flow| !flow.ended) else {
            return self.end_flow(opener, By::Nobody);
        };
        let Some(flow) = self.flows.get_mut(&opener) else { return };
        flow.state = State::Open;
        flow.keys[ACCEPTER] = other.keys[ACCEPTER];
        flow.held[ACCEPTER] = other.held[ACCEPTER].take();
        flow.seats[ACCEPTER] = other.seats[ACCEPTER];
        flow.sides[ACCEPTER] = std::mem::replace(&mut other.sides[ACCEPTER], Side::Unknown);
        let key = flow.keys[ACCEPTER];
        let seat = flow.seats[ACCEPTER];
        if let Some(socket) = flow.socket(ACCEPTER) {
            // It was granted nothing until now.
            socket.out.credit = true;
            socket.out.queued = false;
        }
        if self.keys.get(&key) == Some(&(accepter, ACCEPTER)) {
            self.keys.insert(key, (opener, ACCEPTER));
        }
        if let Some(guest) = self.guests.get_mut(&key.cid) {
            guest.flows.remove(&accepter);
            guest.flows.insert(opener);
            guest.ready.retain(|(id, _)| *id != accepter);
            if let Some(place) = seat.and_then(|seat| guest.seats.get_mut(&seat)) {
                place.flow = Some((opener, ACCEPTER));
            }
        }
        self.queue(opener, ACCEPTER);
        self.mark(opener);
    }

    /// Make the lanes between the guest on `side` and the program that is no guest's on the other one.
    fn join(&mut self, id: FlowId, side: usize, terms: (u64, u32, u32), lane: &OwnedFd, bell: OwnedFd) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let kind = socket_kind(flow.key_of(side).kind);
        let Some(held) = &flow.held[side] else { return };
        let (secret, small, large) = terms;
        let Ok(ends) = held.offer().join(lane, small, large, secret, kind) else {
            return self.end_flow(id, By::Nobody);
        };
        self.seat_lane(id, 1 - side, ends, Bell::Socket(bell));
        let Some(flow) = self.flows.get_mut(&id) else { return };
        flow.state = State::Open;
        if let Some(socket) = flow.socket(side) {
            socket.out.credit = true;
        }
        // The first look arms the lane.
        self.queue(id, side);
        self.mark(id);
        let Some(Side::Lane(bridge)) = self.flows.get(&id).map(|flow| &flow.sides[1 - side]) else { return };
        if bridge.descriptor().is_some_and(|bell| !self.watch_bell(id, bell)) {
            self.end_flow(id, By::Nobody);
        }
    }

    /// Put lanes in the place of a side.
    pub(crate) fn seat_lane(&mut self, id: FlowId, side: usize, ends: Ends, bell: Bell) {
        if let Some(flow) = self.flows.get_mut(&id) {
            let message = flow.key_of(side).kind == SEQPACKET;
            flow.sides[side] = Side::Lane(Box::new(Bridge::new(ends, bell, message)));
        }
    }

    /// A program at the other end of a lane rang.
    pub(crate) fn hear_bell(&mut self, id: FlowId) {
        for side in [OPENER, ACCEPTER] {
            let Some(flow) = self.flows.get_mut(&id) else { return };
            let Some(outside) = flow.outside(side) else { continue };
            outside.hear();
            let gone = outside.gone();
            if gone {
                // Nothing more will ring; what is in the lane is delivered.
                if let Some(bell) = outside.descriptor() {
                    let _ = self.set.remove(bell);
                }
            }
            self.look_at_lane(id, side);
        }
        self.mark(id);
    }

    /// A program's lane may have bytes for a guest's socket, or room for that socket's.
    pub(crate) fn look_at_lane(&mut self, id: FlowId, side: usize) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        if flow.socket(1 - side).is_none() {
            return self.look_at_lingering(id, side);
        }
        let Some(outside) = flow.outside(side) else { return };
        let taken = outside.push();
        if taken == Taken::Broken && outside.gone() {
            return self.end_flow(id, By::Nobody);
        }
        self.note_taken(id, 1 - side, taken);
        self.watch_room(id, side);
        self.queue(id, 1 - side);
        self.end_if_done(id);
    }

    // ---- connections end

    /// On what terms the broker lets a connection be; it says so before the connection is made, or again later.
    pub(crate) fn note_terms(&mut self, cid: u32, connection: u64, terms: sched::Terms) {
        match self.flow_of(cid, connection) {
            Some(id) => self.set_terms(id, terms),
            None if self.terms.len() < TERMS_MAX => {
                self.terms.insert((cid, connection), (terms, Instant::now()));
            }
            None => {}
        }
    }

    /// The broker's order.
    pub(crate) fn cut(&mut self, cid: u32, connection: u64) {
        self.ends.retain(|(whose, end), _| (*whose, end.connection) != (cid, connection));
        if let Some(id) = self.flow_of(cid, connection) {
            self.end_flow(id, By::Nobody);
        }
    }

    /// The flow that the broker knows by this number.
    pub(crate) fn flow_of(&self, cid: u32, connection: u64) -> Option<FlowId> {
        let held = |id: &&FlowId| {
            let held = |side: &Option<Held>| side.as_ref().is_some_and(|held| held.connection == connection);
            self.flows.get(id).is_some_and(|flow| {
                flow.held.iter().any(held) || flow.end.is_some_and(|end| end.connection == connection)
            })
        };
        self.guests.get(&cid)?.flows.iter().find(held).copied()
    }

    /// A connection is over. Every guest on it is told, after the bytes that wait for it, but not `by`, who ended it.
    pub(crate) fn end_flow(&mut self, id: FlowId, by: By) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let first = !std::mem::replace(&mut flow.ended, true);
        if first && flow.state == State::Requested && flow.end.is_some() {
            self.refuse(id, Refusal::NobodyListens);
        }
        for side in [OPENER, ACCEPTER] {
            let Some(flow) = self.flows.get_mut(&id) else { return };
            let cid = flow.key_of(side).cid;
            if first {
                if let Some(held) = flow.held[side].take().filter(|held| held.connection != 0) {
                    self.meetings.remove(&held.connection);
                    let asked = matches!(flow.state, State::Requested) && side == ACCEPTER;
                    let message = if asked {
                        Message::Refuse { connection: held.connection, refusal: Refusal::NobodyListens }
                    } else {
                        Message::Close { connection: held.connection }
                    };
                    self.tell(held.attachment, &message, &[]);
                }
            }
            let Some(flow) = self.flows.get_mut(&id) else { return };
            if let Some(outside) = flow.outside(side) {
                // Whoever closed over what it had not read resets.
                let flushed = outside.flushed();
                outside.close(!flushed);
                if let Some(bell) = outside.descriptor() {
                    let _ = self.set.remove(bell);
                }
                self.ring_guest(id, side);
                self.forget_side(id, side);
                continue;
            }
            match &mut flow.sides[side] {
                Side::Guest(_) if by == By::Side(side) || by == By::Guest(cid) => self.forget_side(id, side),
                Side::Guest(socket) => {
                    socket.out.reset = true;
                    self.queue(id, side);
                }
                Side::Service(service) => {
                    let (kind, guest) = (service.kind, flow.key_of(1 - side).cid);
                    self.forget_side(id, side);
                    self.end_service(guest, id, kind);
                }
                _ => self.forget_side(id, side),
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
        let (whose, kept) = match &mut flow.sides[side] {
            Side::Guest(socket) => (key.cid, socket.out.data.len()),
            Side::Kernel(socket) => (flow.keys[1 - side].cid, socket.count().0),
            _ => (0, 0),
        };
        if let Some(guest) = self.guests.get_mut(&whose) {
            guest.waiting = guest.waiting.saturating_sub(kept);
        }
        let Some(flow) = self.flows.get_mut(&id) else { return };
        flow.sides[side] = Side::Unknown;
        if let Some(seat) = flow.seats[side].take() {
            self.free_seat(key.cid, seat, (id, side));
        }
        let Some(flow) = self.flows.get_mut(&id) else { return };
        // A guest connected to itself is on both sides.
        let still_here =
            flow.key_of(1 - side).cid == key.cid && !matches!(flow.sides[1 - side], Side::Unknown);
        let over = flow.sides.iter().all(|side| matches!(side, Side::Unknown));
        if !still_here {
            if let Some(guest) = self.guests.get_mut(&key.cid) {
                guest.flows.remove(&id);
            }
        }
        if over {
            if let Some(end) = flow.end {
                if self.named.get(&end.connection) == Some(&id) {
                    self.named.remove(&end.connection);
                }
            }
            for key in flow.keys {
                if let Some(guest) = self.guests.get_mut(&key.cid) {
                    guest.flows.remove(&id);
                }
            }
            self.flows.remove(&id);
        }
    }
}
