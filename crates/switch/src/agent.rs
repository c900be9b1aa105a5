//! Agents of guests: programs that want lanes in their own memory, and the seats those lie in.
//!
//! A program in a guest speaks to the broker through its guest's agent and through us, with the messages that every
//! program uses. What cannot pass is descriptors; so the agent names a *seat* where a program would bring a lane
//! ([`crate::seat`]), and we bring the lane to the broker.

use std::os::fd::OwnedFd;
use std::time::Instant;

use isthmus_engine::lane::{Offer, record_kind};
use isthmus_proto::sched::Terms;
use isthmus_wire::control::{self, ANY_PORT, Carrier, FEATURE_GUEST, MESSAGE_MAX, Message, Refusal};
use isthmus_wire::vsock::{SEQ_EOM, SEQPACKET};

use crate::attachment::Asked;
use crate::bridge::{Bell, Outside};
use crate::flow::{ACCEPTER, By, End, Flow, FlowId, Held, Key, OPENER, Service, ServiceKind, Side, State};
use crate::home::{ANSWER, packet_kind, socket_kind};
use crate::seat::{Begun, RUNS_MAX, SEATS_MAX};
use crate::switch::{Place, Switch};
use crate::vring::Cursor;

/// Bytes of a program that is gone that are moved at once; a ring holds no more.
const LAST_BYTES: usize = 4 << 20;
/// Bytes that wait for an agent that does not read.
const ANSWERS_MAX: usize = 1 << 20;

impl Switch {
    /// Bytes from a guest for the switch itself; `end`: a message ends with them.
    pub(crate) fn handle_service(&mut self, id: FlowId, side: usize, payload: &mut Cursor<'_>, end: bool) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let cid = flow.key_of(side).cid;
        let message = flow.key_of(side).kind == SEQPACKET;
        let Side::Service(service) = &mut flow.sides[1 - side] else { return };
        let len = payload.left();
        let at = service.begun.len();
        if at + len > MESSAGE_MAX && message {
            return self.end_flow(id, By::Nobody);
        }
        service.begun.resize(at + len, 0);
        if let Some(room) = service.begun.get_mut(at..) {
            payload.read(room);
        }
        let kind = service.kind;
        let packet = if message && !end { None } else { Some(std::mem::take(&mut service.begun)) };
        if let Some(socket) = flow.socket(side) {
            socket.taken = socket.taken.wrapping_add(len as u32);
            if socket.taken.wrapping_sub(socket.told) > socket.buf_alloc / 4 {
                socket.out.credit = true;
                self.queue(id, side);
            }
        }
        let Some(packet) = packet else { return };
        let good = match kind {
            ServiceKind::Control(attachment) => self.pass_to_broker(attachment, id, &packet),
            ServiceKind::Seats => self.handle_seats(cid, id, &packet),
            ServiceKind::Bell(seat) => self.handle_bell(cid, id, seat, packet),
            ServiceKind::Socket => self.handle_socket(cid, id, packet),
        };
        if good.is_none() {
            self.end_flow(id, By::Nobody);
        }
    }

    /// A message from the switch to an agent.
    fn answer_agent(&mut self, id: FlowId, request: u32, message: &Message<'_>) {
        let mut packet = [0; MESSAGE_MAX];
        if let Ok(len) = control::encode(request, message, &mut packet) {
            self.send_to_agent(id, &packet[..len]);
        }
    }

    fn send_to_agent(&mut self, id: FlowId, packet: &[u8]) {
        let Some(flow) = self.flows.get_mut(&id).filter(|flow| !flow.ended) else { return };
        let Some(socket) = flow.socket(OPENER) else { return };
        if socket.out.data.len() > ANSWERS_MAX {
            return self.end_flow(id, By::Nobody);
        }
        socket.out.data.extend(packet);
        socket.out.marks.push_back((packet.len(), SEQ_EOM));
        self.keep_for(id, packet.len());
    }

    /// So many bytes more wait for an agent.
    fn keep_for(&mut self, id: FlowId, len: usize) {
        let cid = self.flows.get(&id).map(|flow| flow.key_of(OPENER).cid);
        if let Some(guest) = cid.and_then(|cid| self.guests.get_mut(&cid)) {
            guest.waiting += len;
        }
        self.queue(id, OPENER);
    }

    // ---- a program's messages

    /// From a program to the broker. `None`: it is no program.
    fn pass_to_broker(&mut self, id: u64, agent: FlowId, packet: &[u8]) -> Option<()> {
        let (request, message) = control::decode(packet).ok()?;
        let cid = self.attachments.get(&id)?.cid;
        match message {
            Message::UseSeat { seat } => self.attachments.get_mut(&id)?.seat = Some(seat),
            Message::Connect { .. } => {
                let seat = self.attachments.get_mut(&id)?.seat.take();
                if self.program_connects(id, request, &message, seat).is_none() {
                    let text = "connect: a seat of this guest's that nobody uses";
                    self.answer_agent(
                        agent,
                        request,
                        &Message::Refused { refusal: Refusal::BadRequest, rule: 0, text },
                    );
                }
            }
            Message::Accept { connection, .. } => {
                let seat = self.attachments.get_mut(&id)?.seat.take();
                if self.end_of(cid, End { connection, opener: false }).is_some() {
                    self.attachments.get_mut(&id)?.pass(request, &message, &[]);
                    self.watch_blocked(id);
                    return Some(());
                }
                match self.asked_of(id, cid, connection) {
                    Some(flow) if self.program_accepts(flow, seat).is_none() => {
                        self.end_flow(flow, By::Nobody);
                    }
                    Some(_) => {}
                    // Its opener has given up meanwhile.
                    None => {
                        let text = "its opener has given up";
                        let cut = Message::Cut { connection, refusal: Refusal::TimedOut, text };
                        self.answer_agent(agent, 0, &cut);
                    }
                }
            }
            Message::Refuse { connection, refusal } => {
                if self.drop_end(cid, End { connection, opener: false }) {
                    self.attachments.get_mut(&id)?.pass(request, &message, &[]);
                } else if let Some(flow) = self.asked_of(id, cid, connection) {
                    self.refuse(flow, refusal);
                    self.end_flow(flow, By::Nobody);
                }
            }
            Message::Close { connection } => {
                let attachment = self.attachments.get_mut(&id)?;
                attachment.tell(&message, &[]);
                if let Some(flow) = self.flow_of(cid, connection) {
                    self.program_closes(flow, id);
                }
            }
            Message::Resume { connection, .. } => {
                let held = self.flow_of(cid, connection).and_then(|flow| self.held_by(flow, cid, connection));
                let page = held.and_then(|held| held.offer().counters_descriptor().ok());
                let attachment = self.attachments.get_mut(&id)?;
                let descriptors: Vec<_> = page.iter().map(std::os::fd::AsFd::as_fd).collect();
                attachment.pass_asked(Asked::Resume(connection), request, &message, &descriptors);
            }
            Message::ResumeSocket { .. } => self.pass_resumed(id, request, &message)?,
            Message::Bind { port: ANY_PORT, .. } => {
                let text = "bind: only the switch stands for all ports of a guest";
                let refused = Message::Refused { refusal: Refusal::BadRequest, rule: 0, text };
                self.answer_agent(agent, request, &refused);
            }
            _ => self.attachments.get_mut(&id)?.pass(request, &message, &[]),
        }
        self.watch_blocked(id);
        Some(())
    }

    /// From the broker to a program. `None`: it is no broker.
    pub(crate) fn pass_to_program(
        &mut self,
        id: u64,
        agent: FlowId,
        packet: &[u8],
        descriptors: Vec<OwnedFd>,
    ) -> Option<()> {
        let (request, message) = control::decode(packet).ok()?;
        let attachment = self.attachments.get_mut(&id)?;
        let (asked, cid) = (attachment.answered(request), attachment.cid);
        match message {
            Message::Welcome { features, domain, domain_name, node, ring_max, epoch } => {
                let features = features | FEATURE_GUEST;
                let welcome = Message::Welcome { features, domain, domain_name, node, ring_max, epoch };
                self.answer_agent(agent, request, &welcome);
                return Some(());
            }
            Message::Incoming { connection, from, from_port, port, kind, .. } => {
                let kind = packet_kind(kind);
                let key = Key { cid: from, port: from_port, peer: cid, peer_port: port, kind };
                if self.accept_flow(id, key, Side::Unknown, &message, descriptors).is_none() {
                    let refusal = Refusal::LimitReached;
                    self.tell(id, &Message::Refuse { connection, refusal }, &[]);
                    return Some(());
                }
            }
            Message::Connected { .. } => {
                if let Some(Asked::Connect(flow)) = asked {
                    if !self.program_connected(id, flow, &message, descriptors) {
                        let text = "connect: its seat is gone";
                        let refused = Message::Refused { refusal: Refusal::PeerGone, rule: 0, text };
                        self.answer_agent(agent, request, &refused);
                        return Some(());
                    }
                }
            }
            Message::IncomingSocket { connection, from, .. } => {
                self.keep_end(cid, End { connection, opener: false }, from, descriptors)?;
            }
            Message::ConnectedSocket { connection, to, .. } => {
                self.keep_end(cid, End { connection, opener: true }, to, descriptors)?;
            }
            Message::Cut { connection, .. } => self.cut(cid, connection),
            Message::Terms { connection, class, weight, rate } => {
                self.note_terms(cid, connection, Terms { class, weight, rate });
                return Some(());
            }
            Message::Done {} => {
                if let Some(Asked::Resume(connection)) = asked {
                    // The broker has seen the ticket: from now on the connection is this attachment's.
                    let flow = self.flow_of(cid, connection);
                    if let Some(held) = flow.and_then(|flow| self.held_by(flow, cid, connection)) {
                        held.attachment = id;
                    }
                }
            }
            _ => {
                if let Some(Asked::Connect(flow)) = asked {
                    self.end_flow(flow, By::Nobody);
                }
            }
        }
        self.send_to_agent(agent, packet);
        Some(())
    }

    /// The connection that this program was asked to take, and has not answered for.
    fn asked_of(&self, id: u64, cid: u32, connection: u64) -> Option<FlowId> {
        let mine = |flow: &FlowId| {
            self.flows.get(flow).is_some_and(|flow| {
                let held = flow.held[ACCEPTER].as_ref();
                flow.state == State::Requested
                    && !flow.ended
                    && held.is_some_and(|held| held.attachment == id && held.connection == connection)
            })
        };
        self.guests.get(&cid)?.flows.iter().copied().find(mine)
    }

    fn program_connects(
        &mut self,
        id: u64,
        request: u32,
        message: &Message<'_>,
        seat: Option<u32>,
    ) -> Option<()> {
        let Message::Connect { to, to_port, from_port, kind, require, carrier, .. } = *message else {
            return None;
        };
        let seat = seat?;
        let cid = self.attachments.get(&id)?.cid;
        let guest = self.guests.get_mut(&cid)?;
        let place =
            guest.seats.get_mut(&seat).filter(|place| place.flow.is_none() && place.bell.is_some())?;
        let (small, large) = (place.seat.small, place.seat.large);
        let offer = Offer::new(Carrier::Switch, small, large).ok()?;
        self.last_flow += 1;
        let flow_id = self.last_flow;
        place.flow = Some((flow_id, OPENER));
        guest.flows.insert(flow_id);
        let wire = packet_kind(kind);
        let key = Key { cid, port: from_port, peer: 0, peer_port: to_port, kind: wire };
        let mut flow = Flow::new(key, State::Asking, [Side::Unknown, Side::Unknown]);
        flow.seats[OPENER] = Some(seat);
        let connect = Message::Connect { to, to_port, from_port, kind, carrier, require, small, large };
        let attachment = self.attachments.get_mut(&id)?;
        attachment.pass_asked(Asked::Connect(flow_id), request, &connect, &offer.descriptors());
        flow.held[OPENER] = Some(Held::new(id, offer));
        flow.deadline = Some(Instant::now() + ANSWER);
        self.flows.insert(flow_id, flow);
        Some(())
    }

    fn program_connected(
        &mut self,
        id: u64,
        flow_id: FlowId,
        message: &Message<'_>,
        descriptors: Vec<OwnedFd>,
    ) -> bool {
        let Message::Connected { secret, to, from_port, .. } = *message else { return false };
        if let Some(flow) = self.flows.get_mut(&flow_id) {
            (flow.keys[OPENER].peer, flow.keys[OPENER].port) = (to, from_port);
            flow.keys[ACCEPTER] = flow.keys[OPENER].other();
            let kind = flow.keys[OPENER].kind;
            let ends = flow.seats[OPENER].and_then(|seat| self.ends_of(flow_id, OPENER, seat, secret, kind));
            if let Some(ends) = ends {
                self.seat_lane(flow_id, OPENER, ends, Bell::Guest(std::cell::Cell::new(false)));
            }
        }
        self.connected(id, flow_id, message, descriptors)
    }

    fn program_accepts(&mut self, flow_id: FlowId, seat: Option<u32>) -> Option<()> {
        let flow = self.flows.get_mut(&flow_id)?;
        let (key, secret) = (flow.keys[ACCEPTER], flow.secret);
        let seat = seat?;
        let place = self.guests.get_mut(&key.cid)?.seats.get_mut(&seat)?;
        if place.flow.is_some() || place.bell.is_none() {
            return None;
        }
        place.flow = Some((flow_id, ACCEPTER));
        flow.seats[ACCEPTER] = Some(seat);
        let ends = self.ends_of(flow_id, ACCEPTER, seat, secret, key.kind)?;
        self.seat_lane(flow_id, ACCEPTER, ends, Bell::Guest(std::cell::Cell::new(false)));
        self.accepted(flow_id);
        Some(())
    }

    fn ends_of(
        &self,
        flow: FlowId,
        side: usize,
        seat: u32,
        secret: u64,
        kind: u16,
    ) -> Option<isthmus_engine::lane::Ends> {
        let cid = self.flows.get(&flow)?.key_of(side).cid;
        let place = self.guests.get(&cid)?.seats.get(&seat)?;
        Some(place.seat.ends(secret, record_kind(socket_kind(kind))))
    }

    /// A program is done with its side: what it sent is delivered, and the broker knows already.
    fn program_closes(&mut self, id: FlowId, attachment: u64) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        for side in [OPENER, ACCEPTER] {
            let ours = flow.held[side].as_ref().is_some_and(|held| held.attachment == attachment);
            if ours {
                flow.held[side] = None;
                if let Side::Lane(bridge) = &mut flow.sides[side] {
                    bridge.lose();
                }
                break;
            }
        }
        self.look_at_lane(id, OPENER);
        self.look_at_lane(id, ACCEPTER);
        self.mark(id);
    }

    /// This guest's side of a connection, as the broker knows it.
    fn held_by(&mut self, flow: FlowId, cid: u32, connection: u64) -> Option<&mut Held> {
        let flow = self.flows.get_mut(&flow)?;
        let keys = flow.keys;
        let (held, _) = flow.held.iter_mut().zip(keys).find(|(held, key)| {
            key.cid == cid && held.as_ref().is_some_and(|held| held.connection == connection)
        })?;
        held.as_mut()
    }

    // ---- seats

    /// From an agent, about its guest's memory. `None`: it does not keep to the protocol.
    fn handle_seats(&mut self, cid: u32, id: FlowId, packet: &[u8]) -> Option<()> {
        let (request, message) = control::decode(packet).ok()?;
        let guest = self.guests.get_mut(&cid)?;
        match message {
            Message::Seat { seat, small, large, runs } => {
                let begun = Begun::new(seat, request, small, large, runs);
                let used: usize = guest.seats.values().map(|place| place.seat.runs()).sum();
                let fits = guest.seats.len() < SEATS_MAX && used + runs as usize <= RUNS_MAX;
                match begun.filter(|_| fits && !guest.seats.contains_key(&seat)) {
                    Some(begun) => guest.begun = Some((id, begun)),
                    None => self.refuse_seat(id, request, "too many, too large, or there already"),
                }
            }
            Message::Pages { runs } => {
                let (from, mut begun) = guest.begun.take()?;
                match begun.name(runs).filter(|_| from == id) {
                    None => self.refuse_seat(id, begun.request, "pages that are not named as they must be"),
                    Some(false) => guest.begun = Some((id, begun)),
                    Some(true) => {
                        let memory = guest.device.as_ref().and_then(|device| device.memory()).cloned()?;
                        let (number, request) = (begun.seat, begun.request);
                        match begun.finish(&memory) {
                            Ok(seat) => {
                                guest.seats.insert(number, Place { seat, agent: id, flow: None, bell: None });
                                self.answer_agent(id, request, &Message::Done {});
                            }
                            Err(text) => self.refuse_seat(id, request, text),
                        }
                    }
                }
            }
            Message::SeatGone { seat } => {
                self.leave_seat(cid, seat);
                self.answer_agent(id, request, &Message::Done {});
            }
            _ => return None,
        }
        Some(())
    }

    fn refuse_seat(&mut self, id: FlowId, request: u32, text: &str) {
        let text = format!("seat: {text}");
        self.answer_agent(
            id,
            request,
            &Message::Refused { refusal: Refusal::BadRequest, rule: 0, text: &text },
        );
    }

    /// The connection in this seat is over: its agent may give it to another one.
    pub(crate) fn free_seat(&mut self, cid: u32, seat: u32, sat: (FlowId, usize)) {
        let place = self.guests.get_mut(&cid).and_then(|guest| guest.seats.get_mut(&seat));
        let Some(place) = place.filter(|place| place.flow == Some(sat)) else { return };
        place.flow = None;
        let (agent, bell) = (place.agent, place.bell.take());
        if let Some(bell) = bell {
            self.end_flow(bell, By::Nobody);
        }
        self.answer_agent(agent, 0, &Message::SeatFree { seat });
    }

    /// Touch nothing of this seat any more. Whoever sat there is gone, for its peer.
    pub(crate) fn leave_seat(&mut self, cid: u32, seat: u32) {
        let Some(place) = self.guests.get_mut(&cid).and_then(|guest| guest.seats.remove(&seat)) else {
            return;
        };
        if let Some((flow, side)) = place.flow {
            // What it had sent and the other side can take is delivered first.
            self.relay(flow, side, LAST_BYTES, true);
            if let Some(flow) = self.flows.get_mut(&flow) {
                flow.seats[side] = None;
            }
            self.end_flow(flow, By::Nobody);
        }
        if let Some(bell) = place.bell {
            self.end_flow(bell, By::Nobody);
        }
    }

    /// Seats whose memory is not there any more.
    pub(crate) fn check_seats(&mut self) {
        let mut lost = Vec::new();
        for (cid, guest) in &self.guests {
            let Some(memory) = guest.device.as_ref().and_then(|device| device.memory()) else { continue };
            lost.extend(
                guest.seats.iter().filter(|(_, p)| !p.seat.whole(memory)).map(|(seat, _)| (*cid, *seat)),
            );
        }
        for (cid, seat) in lost {
            self.leave_seat(cid, seat);
        }
    }

    // ---- bells

    /// A bell of a guest's rang, or says whose it is.
    fn handle_bell(&mut self, cid: u32, id: FlowId, seat: Option<u32>, bytes: Vec<u8>) -> Option<()> {
        let Some(seat) = seat else {
            let number = u32::from_le_bytes(bytes.get(..4)?.try_into().ok()?);
            let place = self.guests.get_mut(&cid)?.seats.get_mut(&number)?;
            if place.bell.is_some() {
                return None;
            }
            place.bell = Some(id);
            let flow = self.flows.get_mut(&id)?;
            flow.sides[ACCEPTER] =
                Side::Service(Service { kind: ServiceKind::Bell(Some(number)), begun: Vec::new() });
            // The agent waits for this before it lets a program use the seat.
            let socket = flow.socket(OPENER)?;
            socket.out.data.push_back(1);
            self.keep_for(id, 1);
            return Some(());
        };
        let place = self.guests.get(&cid)?.seats.get(&seat)?;
        if let Some((flow, side)) = place.flow {
            self.look_at_lane(flow, side);
            self.mark(flow);
        }
        Some(())
    }

    /// All lanes of a guest may have news: it has kicked without a packet.
    pub(crate) fn look_at_seats(&mut self, cid: u32) {
        let Some(guest) = self.guests.get(&cid) else { return };
        let flows: Vec<_> = guest.seats.values().filter_map(|place| place.flow).collect();
        for (flow, side) in flows {
            self.look_at_lane(flow, side);
            self.mark(flow);
        }
    }

    /// Wake the program in a guest on this side, if its lane says so.
    pub(crate) fn ring_guest(&mut self, id: FlowId, side: usize) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        if !flow.outside(side).is_some_and(|outside| outside.must_ring()) {
            return;
        }
        let (cid, seat) = (flow.key_of(side).cid, flow.seats[side]);
        let bell = seat.and_then(|seat| self.guests.get(&cid)?.seats.get(&seat)?.bell);
        let Some(bell) = bell else { return };
        if let Some(socket) = self.flows.get_mut(&bell).and_then(|flow| flow.socket(OPENER)) {
            // One byte is enough until it is heard.
            let quiet = socket.out.data.is_empty();
            if quiet {
                socket.out.data.push_back(1);
            }
            self.keep_for(bell, usize::from(quiet));
        }
    }

    // ---- from lane to lane

    /// Move at most `budget` bytes of one direction of a connection between two programs. Returns how many, and
    /// whether there are more that could be moved now. `sleep`: as for [`crate::bridge::Bridge::relay`].
    pub(crate) fn relay(&mut self, id: FlowId, from: usize, budget: usize, sleep: bool) -> (usize, bool) {
        let Some(flow) = self.flows.get_mut(&id) else { return (0, false) };
        let [Side::Lane(a), Side::Lane(b)] = &mut flow.sides else { return (0, false) };
        let (from, to) = if from == OPENER { (a, b) } else { (b, a) };
        let moved = from.relay(to, budget, sleep);
        from.pass_stop(to);
        // A side that is gone has nothing more to take, and nothing to give once its lane is empty.
        let over = to.gone() && (from.gone() || to.drained(from)) || from.gone() && from.drained(to);
        self.ring_guest(id, OPENER);
        self.ring_guest(id, ACCEPTER);
        if over {
            self.end_flow(id, By::Nobody);
            return (moved.0, false);
        }
        moved
    }

    /// The agent's connection for a service is gone.
    pub(crate) fn end_service(&mut self, cid: u32, id: FlowId, kind: ServiceKind) {
        match kind {
            ServiceKind::Control(attachment) => {
                if let Some(mut attachment) = self.attachments.remove(&attachment) {
                    if let Some(line) = &attachment.line {
                        let _ = self.set.remove(std::os::fd::AsFd::as_fd(line));
                    }
                    self.give_up(&attachment.lose());
                }
            }
            ServiceKind::Seats => {
                let Some(guest) = self.guests.get_mut(&cid) else { return };
                guest.begun.take_if(|(agent, _)| *agent == id);
                let seats: Vec<u32> = guest
                    .seats
                    .iter()
                    .filter(|(_, place)| place.agent == id)
                    .map(|(seat, _)| *seat)
                    .collect();
                for seat in seats {
                    self.leave_seat(cid, seat);
                }
            }
            ServiceKind::Bell(Some(seat)) => {
                let place = self.guests.get_mut(&cid).and_then(|guest| guest.seats.get_mut(&seat));
                if let Some(place) = place.filter(|place| place.bell == Some(id)) {
                    place.bell = None;
                    let Some((flow, side)) = place.flow else {
                        // Nobody came to sit there: the agent may give the seat to another connection.
                        let agent = place.agent;
                        return self.answer_agent(agent, 0, &Message::SeatFree { seat });
                    };
                    // The program has closed, or is gone: its side says no more.
                    let side_of = self.flows.get_mut(&flow).map(|flow| &mut flow.sides[side]);
                    if let Some(Side::Lane(bridge)) = side_of {
                        bridge.lose();
                    }
                    self.look_at_lane(flow, side);
                    self.mark(flow);
                }
            }
            ServiceKind::Bell(None) | ServiceKind::Socket => {}
        }
    }
}
