//! Kernel sockets of guests' programs.
//!
//! The broker brings them as it does to programs in containers, and the descriptor stays with us. The guest's agent then
//! connects to [`SOCKETS_PORT`](isthmus_wire::control::SOCKETS_PORT) and says which end it wants; its own socket is what
//! the program gets. What one holds the other is sent ([`crate::kernel`]).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use isthmus_proto::sched::Terms;
use isthmus_wire::control::{Message, SocketKind};
use isthmus_wire::vsock::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

use crate::attachment::Asked;
use crate::bridge::Outside;
use crate::deliver::WAITING_MAX;
use crate::flow::{
    ACCEPTER, By, End, Flow, FlowId, Key, NAME, OPENER, Service, ServiceKind, Side, Socket, State,
};
use crate::home::{ANSWER, packet_kind};
use crate::kernel::KernelSocket;
use crate::switch::{Switch, Topic};
use crate::vring::Cursor;

/// Sockets that wait for the agent of one guest.
const ENDS_MAX: usize = 1024;
/// How long what a guest sent before it closed waits for who takes it.
const LINGER: Duration = Duration::from_secs(60);

/// A socket that the broker brought, and nobody has asked for yet.
pub(crate) struct Kept {
    socket: OwnedFd,
    terms: Option<Terms>,
    /// The other end is another guest's here.
    local: bool,
    pub(crate) until: Instant,
}

impl Switch {
    /// The broker has brought an end for a program of this guest. `None`: it has not.
    /// `peer`: the domain of the other end.
    pub(crate) fn keep_end(
        &mut self,
        cid: u32,
        end: End,
        peer: u32,
        descriptors: Vec<OwnedFd>,
    ) -> Option<()> {
        let local = peer != cid && self.guests.contains_key(&peer);
        let [socket] = <[OwnedFd; 1]>::try_from(descriptors).ok()?;
        // Told just before.
        let terms = self.terms.remove(&(cid, end.connection)).map(|(terms, _)| terms);
        if self.ends.keys().filter(|(whose, _)| *whose == cid).count() < ENDS_MAX {
            self.ends.insert((cid, end), Kept { socket, terms, local, until: Instant::now() + ANSWER });
        }
        Some(())
    }

    /// Our socket in the place of a guest's program, for a broker that was started again.
    pub(crate) fn end_of(&self, cid: u32, end: End) -> Option<BorrowedFd<'_>> {
        if let Some(kept) = self.ends.get(&(cid, end)) {
            return Some(kept.socket.as_fd());
        }
        let mut flows = self.guests.get(&cid)?.flows.iter().filter_map(|flow| self.flows.get(flow));
        flows.find(|flow| flow.has_end(end))?.socket_of(end)
    }

    /// A program does not want the end that was brought for it. `false`: there is none.
    pub(crate) fn drop_end(&mut self, cid: u32, end: End) -> bool {
        let kept = self.ends.remove(&(cid, end)).is_some();
        let flows = self.guests.get(&cid).map(|guest| &guest.flows);
        let of = |id: &&FlowId| self.flows.get(id).is_some_and(|flow| flow.has_end(end));
        match flows.and_then(|flows| flows.iter().find(of).copied()) {
            Some(flow) => self.end_flow(flow, By::Nobody),
            None => return kept,
        }
        true
    }

    /// An agent's connection says whose end it is. `None`: nobody's.
    pub(crate) fn handle_socket(&mut self, cid: u32, id: FlowId, mut bytes: Vec<u8>) -> Option<()> {
        let Some(name) = bytes.first_chunk::<{ NAME as usize }>() else {
            let service = Service { kind: ServiceKind::Socket, begun: bytes };
            self.flows.get_mut(&id)?.sides[ACCEPTER] = Side::Service(service);
            return Some(());
        };
        let name = u64::from_le_bytes(*name);
        let end = End { connection: name >> 1, opener: name & 1 == 1 };
        let Kept { socket, terms, local, .. } = self.ends.remove(&(cid, end))?;
        self.watch_kernel(id, socket.as_fd())?;
        let flow = self.flows.get_mut(&id)?;
        (flow.end, flow.deadline) = (Some(end), None);
        let mut ours = KernelSocket::new(socket);
        ours.narrow = local;
        // What came in the same packet is the program's already.
        let rest = bytes.split_off(NAME as usize);
        let piece = [(rest.as_ptr().cast_mut(), rest.len())];
        let taken = ours.put(&mut Cursor::new(&piece), false);
        flow.sides[ACCEPTER] = Side::Kernel(Box::new(ours));
        if let Some(socket) = flow.socket(OPENER) {
            // All of it was counted as taken, with the name.
            socket.taken = socket.taken.wrapping_sub(rest.len() as u32);
        }
        self.note_taken(id, OPENER, taken);
        self.watch_room(id, ACCEPTER);
        if let Some(terms) = terms {
            self.set_terms(id, terms);
        }
        if local {
            self.meet_guest(id, end);
        } else {
            self.widen(id);
        }
        // What the other side has sent meanwhile.
        self.queue(id, OPENER);
        Some(())
    }

    /// Both ends may be guests' of ours: then what one sends need not go through the kernel.
    fn meet_guest(&mut self, id: FlowId, end: End) {
        let Some(other) = self.named.remove(&end.connection) else {
            self.named.insert(end.connection, id);
            return;
        };
        if !(self.is_untouched(id) && self.is_untouched(other)) {
            for id in [id, other] {
                self.widen(id);
            }
            return;
        }
        for id in [id, other] {
            if let Some(socket) = self.flows.get(&id).and_then(Flow::kernel_socket) {
                let _ = self.set.remove(socket.socket());
            }
        }
        let (id, other) = if end.opener { (id, other) } else { (other, id) };
        let Some(gone) = self.flows.remove(&other) else { return };
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let joined = flow.join(gone);
        let key = flow.key_of(ACCEPTER);
        self.keys.insert(key, (id, ACCEPTER));
        if let Some(guest) = self.guests.get_mut(&key.cid) {
            guest.flows.remove(&other);
            guest.flows.insert(id);
            guest.ready.retain(|(flow, _)| *flow != other);
        }
        if joined.is_none() {
            return self.end_flow(id, By::Nobody);
        }
        for side in [OPENER, ACCEPTER] {
            if let Some(socket) = self.flows.get_mut(&id).and_then(|flow| flow.socket(side)) {
                socket.out.credit = true;
                socket.out.queued &= side == OPENER;
            }
            self.queue(id, side);
        }
    }

    /// Has an agent's connection said nothing but whose end it is, and heard nothing?
    fn is_untouched(&self, id: FlowId) -> bool {
        let Some(flow) = self.flows.get(&id).filter(|flow| !flow.ended) else { return false };
        let [Side::Guest(socket), Side::Kernel(kernel)] = &flow.sides else { return false };
        (socket.received, socket.sent, socket.shut) == (NAME, 0, 0) && kernel.is_untouched()
    }

    /// It stays what it is, and may send as much as any.
    pub(crate) fn widen(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        if let Side::Kernel(socket) = &mut flow.sides[ACCEPTER] {
            socket.narrow = false;
        }
        if let Some(socket) = flow.socket(OPENER) {
            socket.out.credit = true;
        }
        self.queue(id, OPENER);
    }

    /// Be told when a kernel socket becomes readable. `None`: the kernel does not.
    fn watch_kernel(&self, id: FlowId, socket: BorrowedFd<'_>) -> Option<()> {
        let token = Topic::Bell.token(id);
        self.set.add(socket, token).and_then(|()| self.set.watch_edge(socket, token, false)).ok()
    }

    /// Something was put into a kernel socket, or taken by it: count what waits for it, and be told when it has room
    /// again while something does.
    pub(crate) fn watch_room(&mut self, id: FlowId, side: usize) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let cid = flow.key_of(1 - side).cid;
        let Side::Kernel(socket) = &mut flow.sides[side] else { return };
        let (before, now) = socket.count();
        if let Some(guest) = self.guests.get_mut(&cid) {
            guest.waiting = (guest.waiting + now).saturating_sub(before);
            if now > before && guest.waiting > WAITING_MAX {
                // Its connections were granted more than we keep for one guest.
                return self.end_flow(id, By::Nobody);
            }
        }
        let Some(Side::Kernel(socket)) = self.flows.get_mut(&id).map(|flow| &mut flow.sides[side]) else {
            return;
        };
        let blocked = socket.blocked();
        if blocked != socket.watched {
            socket.watched = blocked;
            let _ = self.set.watch_edge(socket.socket(), Topic::Bell.token(id), blocked);
        }
    }

    /// The guest has closed its socket in order, and its kernel waits no longer for us to say so. What it sent is yet to
    /// be taken: it is, if the other end does so in time. `false`: there is nothing.
    pub(crate) fn linger(&mut self, id: FlowId, side: usize) -> bool {
        let Some(flow) = self.flows.get_mut(&id) else { return false };
        let both = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
        let closed = flow.socket(side).is_some_and(|socket| socket.shut == both);
        let Side::Kernel(other) = &flow.sides[1 - side] else { return false };
        if !closed || other.flushed() || other.gone() {
            return false;
        }
        flow.deadline = Some(Instant::now() + LINGER);
        self.forget_side(id, side);
        true
    }

    /// A kernel socket whose guest is gone has taken something, or is gone too.
    pub(crate) fn look_at_lingering(&mut self, id: FlowId, side: usize) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let Side::Kernel(socket) = &mut flow.sides[side] else { return };
        socket.push();
        if socket.flushed() || socket.gone() {
            self.end_flow(id, By::Nobody);
        } else {
            self.watch_room(id, side);
        }
    }

    /// A guest's program is shown to a broker that was started again, with the socket that stands for it.
    pub(crate) fn pass_resumed(
        &mut self,
        attachment: u64,
        request: u32,
        message: &Message<'_>,
    ) -> Option<()> {
        let Message::ResumeSocket { connection, opener, .. } = *message else { return None };
        let cid = self.attachments.get(&attachment)?.cid;
        let end = End { connection, opener: opener != 0 };
        let socket = self.end_of(cid, end).and_then(|socket| socket.try_clone_to_owned().ok());
        let descriptors: Vec<_> = socket.iter().map(AsFd::as_fd).collect();
        self.attachments.get_mut(&attachment)?.pass(request, message, &descriptors);
        Some(())
    }

    // ---- programs that speak plain `AF_VSOCK`

    /// Whom a guest's program called takes kernel sockets. `None`: nothing came of it.
    pub(crate) fn connected_socket(
        &mut self,
        id: FlowId,
        message: &Message<'_>,
        descriptors: Vec<OwnedFd>,
    ) -> Option<()> {
        let Message::ConnectedSocket { connection, to, ticket, .. } = *message else { return None };
        let [socket] = <[OwnedFd; 1]>::try_from(descriptors).ok()?;
        self.flows.get(&id).filter(|flow| !flow.ended)?;
        self.watch_kernel(id, socket.as_fd())?;
        let flow = self.flows.get_mut(&id)?;
        flow.held[OPENER] = None;
        // The guest may know it by another number.
        flow.keys[ACCEPTER].cid = to;
        (flow.end, flow.ticket) = (Some(End { connection, opener: true }), Some(ticket));
        flow.sides[ACCEPTER] = Side::Kernel(Box::new(KernelSocket::new(socket)));
        flow.state = State::Open;
        let cid = flow.key_of(OPENER).cid;
        flow.socket(OPENER)?.out.response = true;
        if let Some((terms, _)) = self.terms.remove(&(cid, connection)) {
            self.set_terms(id, terms);
        }
        self.queue(id, OPENER);
        Some(())
    }

    /// Somebody with a kernel socket wants a program of a guest that speaks plain `AF_VSOCK`: ask the guest.
    pub(crate) fn incoming_socket(
        &mut self,
        home: u64,
        message: &Message<'_>,
        descriptors: Vec<OwnedFd>,
    ) -> Option<()> {
        let Message::IncomingSocket { connection, from, from_port, port, kind, ahead, ticket, .. } = *message
        else {
            return None;
        };
        let [socket] = <[OwnedFd; 1]>::try_from(descriptors).ok()?;
        let cid = self.attachments.get(&home)?.cid;
        let terms = self.terms.remove(&(cid, connection)).map(|(terms, _)| terms);
        let key = Key { cid: from, port: from_port, peer: cid, peer_port: port, kind: packet_kind(kind) };
        if kind != SocketKind::Stream || ahead != 0 || !self.may_be_asked(&key) {
            return None;
        }
        let mut asked = Socket::default();
        asked.out.request = true;
        let id = self.new_flow();
        let ours = Side::Kernel(Box::new(KernelSocket::new(socket)));
        let mut flow = Flow::new(key, State::Requested, [ours, Side::Guest(asked)]);
        flow.deadline = Some(Instant::now() + ANSWER);
        (flow.end, flow.ticket) = (Some(End { connection, opener: false }), Some(ticket));
        self.guests.get_mut(&cid)?.flows.insert(id);
        self.flows.insert(id, flow);
        self.keys.insert(key.other(), (id, ACCEPTER));
        if let Some(terms) = terms {
            self.set_terms(id, terms);
        }
        self.queue(id, ACCEPTER);
        Some(())
    }

    /// The guest's program agreed to one of those. `false`: it is none.
    pub(crate) fn accepted_socket(&mut self, id: FlowId) -> bool {
        let Some(flow) = self.flows.get_mut(&id) else { return false };
        let (Some(end), Some(_)) = (flow.end, flow.kernel_socket()) else { return false };
        flow.state = State::Open;
        if let Some(socket) = flow.socket(ACCEPTER) {
            // It was granted nothing until now.
            socket.out.credit = true;
        }
        let home = self.home_of(id);
        self.tell(home, &Message::Accept { connection: end.connection, small: 0, large: 0 }, &[]);
        let socket = self.flows.get(&id).and_then(Flow::kernel_socket).map(KernelSocket::socket);
        if socket.and_then(|socket| self.watch_kernel(id, socket)).is_none() {
            self.end_flow(id, By::Nobody);
        }
        self.queue(id, ACCEPTER);
        true
    }

    /// The attachment of the guest that is asked for a connection.
    pub(crate) fn home_of(&self, id: FlowId) -> u64 {
        let cid = self.flows.get(&id).map_or(0, |flow| flow.key_of(ACCEPTER).cid);
        self.guests.get(&cid).map_or(0, |guest| guest.home)
    }

    /// Show a broker that was started again what a guest's plain sockets are connected to.
    pub(crate) fn show_kernel_sockets(&mut self, home: u64) {
        let Some(attachment) = self.attachments.get_mut(&home) else { return };
        let Some(guest) = self.guests.get(&attachment.cid) else { return };
        for flow in guest.flows.iter().filter_map(|flow| self.flows.get(flow)) {
            let (Some(end), Some(ticket)) = (flow.end, flow.ticket) else { continue };
            let Some(socket) = flow.kernel_socket().filter(|_| !flow.ended && flow.state == State::Open)
            else {
                continue;
            };
            let side = if end.opener { OPENER } else { ACCEPTER };
            let key = flow.key_of(side);
            let resume = Message::ResumeSocket {
                connection: end.connection,
                peer: flow.key_of(1 - side).cid,
                peer_port: key.peer_port,
                port: key.port,
                kind: SocketKind::Stream,
                opener: u8::from(end.opener),
                ticket,
            };
            attachment.ask(Asked::Resume(end.connection), &resume, &[socket.socket()]);
        }
    }
}
