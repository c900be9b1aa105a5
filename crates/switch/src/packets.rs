//! From guests: what lies in their transmit queues.

use std::sync::Arc;

use isthmus_wire::control::{Message, Refusal};
use isthmus_wire::vsock::{
    self, CREDIT_REQUEST, CREDIT_UPDATE, Header, REQUEST, RESPONSE, RST, RW, SEQPACKET, SHUTDOWN,
    SHUTDOWN_RECEIVE, SHUTDOWN_SEND, STREAM,
};

use crate::bridge::{Taken, WINDOW};
use crate::device::TX;
use crate::flow::{ACCEPTER, By, FlowId, Key, OPENER, Side, State};
use crate::switch::Switch;
use crate::vring::{Chain, Cursor, parse};

/// Resets that wait for a guest that has no buffers; until it has, nothing more is taken from it.
const RESETS_MAX: usize = 1024;
/// What handling a packet costs beside its bytes, as bytes.
const PACKET_COST: usize = 2048;

impl Switch {
    /// Take packets from a guest until they have as many bytes as `budget`. Returns what they cost, in bytes, and
    /// whether there may be more.
    pub(crate) fn take_packets(&mut self, cid: u32, budget: usize) -> (usize, bool) {
        let mut chain = std::mem::take(&mut self.chain);
        let taken = self.take_into(cid, budget, &mut chain);
        self.chain = chain;
        taken
    }

    fn take_into(&mut self, cid: u32, budget: usize, chain: &mut Chain) -> (usize, bool) {
        let mut cost = 0;
        while cost < budget {
            let Some(guest) = self.guests.get_mut(&cid) else { return (cost, false) };
            if guest.resets.len() >= RESETS_MAX {
                // It goes on when it has taken some; see `deliver`.
                guest.held_back = true;
                return (cost, false);
            }
            let Some(device) = guest.device.as_mut() else { return (cost, false) };
            let Some((vring, memory)) = device.vring(TX) else { return (cost, false) };
            let memory = Arc::clone(memory);
            if cost == 0 {
                vring.ignore(&memory);
            }
            cost += PACKET_COST;
            let taken = match vring.take(&memory, false, chain) {
                Ok(false) if vring.listen(&memory) => continue,
                Ok(false) => return (cost, false),
                Ok(true) => parse(chain),
                Err(fault) => Err(fault),
            };
            match taken {
                Ok((header, payload)) => {
                    cost += header.len as usize;
                    self.handle_packet(cid, header, payload);
                }
                Err(fault) => {
                    self.blame(cid, &fault);
                    return (cost, false);
                }
            }
            let device = self.guests.get_mut(&cid).and_then(|guest| guest.device.as_mut());
            if let Some((vring, memory)) = device.and_then(|device| device.vring(TX)) {
                vring.keep(&Arc::clone(memory), chain);
            }
        }
        (cost, true)
    }

    fn handle_packet(&mut self, cid: u32, mut header: Header, payload: Cursor<'_>) {
        // Whatever it says.
        header.src_cid = cid.into();
        let Ok(peer) = u32::try_from(header.dst_cid) else { return self.answer_reset(cid, &header) };
        let key = Key { cid, port: header.src_port, peer, peer_port: header.dst_port, kind: header.kind };
        match (self.keys.get(&key).copied(), header.op) {
            (None, RST) => {}
            (None, REQUEST) if matches!(header.kind, STREAM | SEQPACKET) => self.open(key, &header),
            (None, _) => self.answer_reset(cid, &header),
            (Some((id, side)), REQUEST) if matches!(header.kind, STREAM | SEQPACKET) => {
                // The guest's kernel uses the port again: to it the old connection is over, and needs no reset.
                self.end_flow(id, By::Side(side));
                if self.keys.contains_key(&key) {
                    self.answer_reset(cid, &header)
                } else {
                    self.open(key, &header)
                }
            }
            (Some((id, side)), _) => self.handle_known(id, side, &header, payload),
        }
    }

    /// Nobody knows what this packet is about: say so. A reset is never answered.
    pub(crate) fn answer_reset(&mut self, cid: u32, header: &Header) {
        if let Some(guest) = self.guests.get_mut(&cid) {
            if header.op != RST {
                guest.resets.push_back(header.answer(RST));
            }
        }
    }

    fn handle_known(&mut self, id: FlowId, side: usize, header: &Header, payload: Cursor<'_>) {
        if header.op == RST && self.linger(id, side) {
            return;
        }
        let Some(flow) = self.flows.get_mut(&id) else { return };
        if flow.ended {
            return self.handle_last(id, side, header);
        }
        let state = flow.state;
        let Some(socket) = flow.socket(side) else { return };
        let news = socket.credit(header);
        let talks = if side == OPENER {
            state == State::Open
        } else {
            matches!(state, State::Accepted | State::Open)
        };
        match header.op {
            RST => {
                if side == ACCEPTER && state == State::Requested {
                    self.refuse(id, Refusal::NobodyListens);
                }
                return self.end_flow(id, By::Side(side));
            }
            RESPONSE if side == ACCEPTER && state == State::Requested => self.accepted(id),
            RW if talks => self.handle_bytes(id, side, header, payload),
            SHUTDOWN if talks => self.handle_shutdown(id, side, header.flags),
            CREDIT_UPDATE if talks => {}
            CREDIT_REQUEST if talks => match flow.socket(1 - side) {
                Some(other) => {
                    other.out.credit_request = true;
                    self.queue(id, 1 - side);
                }
                None => {
                    if let Some(socket) = flow.socket(side) {
                        socket.out.credit = true;
                    }
                    self.queue(id, side);
                }
            },
            // It does not keep to the protocol, or says something twice: the connection is worth nothing.
            _ => {
                if side == ACCEPTER && state == State::Requested {
                    self.refuse(id, Refusal::NobodyListens);
                }
                return self.end_flow(id, By::Nobody);
            }
        }
        if news {
            self.pass_credit(id, side, header.op);
        }
    }

    /// From a guest whose connection is over, and which has not got everything yet.
    fn handle_last(&mut self, id: FlowId, side: usize, header: &Header) {
        let Some(flow) = self.flows.get_mut(&id).filter(|flow| flow.holds_back(side)) else { return };
        let Some(socket) = flow.socket(side) else { return };
        let both = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
        socket.credit(header);
        socket.shut |= if header.op == SHUTDOWN { header.flags & both } else { 0 };
        if header.op == RST || socket.shut == both {
            // It takes nothing more.
            let cid = flow.key_of(side).cid;
            self.answer_reset(cid, header);
            return self.forget_side(id, side);
        }
        self.queue(id, side);
    }

    /// A guest's buffer has changed: the other guest hears of it, or the lane may go on.
    fn pass_credit(&mut self, id: FlowId, side: usize, op: u16) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        if matches!(flow.sides[1 - side], Side::Lane(_) | Side::Kernel(_) | Side::Service(_)) {
            return self.queue(id, side);
        }
        if flow.brought.is_some() {
            // What was held back for it.
            self.queue(id, side);
        }
        let Some(flow) = self.flows.get_mut(&id) else { return };
        if op == CREDIT_UPDATE {
            if let Some(other) = flow.socket(1 - side) {
                other.out.credit = true;
                self.queue(id, 1 - side);
            }
        }
    }

    fn handle_bytes(&mut self, id: FlowId, side: usize, header: &Header, mut payload: Cursor<'_>) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let Some(socket) = flow.socket(side) else { return };
        if !socket.receive(header.len) {
            // More than it was told it may send.
            return self.end_flow(id, By::Nobody);
        }
        let mut pieces = Vec::new();
        let mut left = header.len as usize;
        while let Some(piece) = payload.next(left) {
            left -= piece.1;
            pieces.push(piece);
        }
        let mut payload = Cursor::new(&pieces);
        let message = flow.keys[0].kind == SEQPACKET;
        if header.len == 0 && !message {
            return;
        }
        let narrow = flow.is_narrow(side);
        if let Some(outside) = flow.outside(1 - side) {
            let before = outside.takes();
            let taken = outside.put(&mut payload, header.flags & vsock::SEQ_EOM != 0);
            let news = outside.takes() != before;
            self.note_taken(id, side, taken);
            self.watch_room(id, 1 - side);
            if narrow {
                // The two will not become one any more, and it may send as much as any.
                self.widen(id);
            }
            if news {
                // It takes no more, and its sender is told so.
                self.queue(id, side);
            }
            return self.ring_guest(id, 1 - side);
        }
        match &mut flow.sides[1 - side] {
            Side::Guest(_) => {
                flow.count(side, header.len);
                let flags = if message { header.flags } else { 0 };
                self.send_bytes(id, 1 - side, flags, &mut payload);
            }
            Side::Service(_) => {
                self.handle_service(id, side, &mut payload, header.flags & vsock::SEQ_EOM != 0)
            }
            Side::Lane(_) | Side::Kernel(_) | Side::Waiting(_) | Side::Unknown => {}
        }
    }

    /// The lane took bytes of this guest's: it may send more.
    pub(crate) fn note_taken(&mut self, id: FlowId, side: usize, taken: Taken) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let Taken::Bytes(bytes) = taken else { return self.end_flow(id, By::Nobody) };
        let Some(socket) = flow.socket(side) else { return };
        socket.taken = socket.taken.wrapping_add(bytes as u32);
        // Linux sends no more than its own receive buffer holds, whatever it was granted.
        let window = WINDOW.min(socket.buf_alloc);
        if socket.taken.wrapping_sub(socket.told) > window / 4 {
            socket.out.credit = true;
            self.queue(id, side);
        }
    }

    fn handle_shutdown(&mut self, id: FlowId, side: usize, flags: u32) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let both = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
        let Some(socket) = flow.socket(side) else { return };
        socket.shut |= flags & both;
        let shut = socket.shut;
        if let Some(outside) = flow.outside(1 - side) {
            if shut & SHUTDOWN_SEND != 0 {
                outside.finish();
            }
            if shut & SHUTDOWN_RECEIVE != 0 {
                outside.stop(false);
            }
            self.ring_guest(id, 1 - side);
            return self.end_if_done(id);
        }
        match &mut flow.sides[1 - side] {
            Side::Guest(other) => {
                other.out.shutdown |= shut;
                self.queue(id, 1 - side);
            }
            // It closes, and is told that we have.
            Side::Service(_) if shut == both => self.end_flow(id, By::Nobody),
            _ => {}
        }
    }

    /// A guest that has shut down both directions is told that the end has come once its lane has everything.
    pub(crate) fn end_if_done(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let both = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
        for side in [OPENER, ACCEPTER] {
            let shut = flow.socket(side).is_some_and(|socket| socket.shut == both);
            if shut && flow.outside(1 - side).is_some_and(|outside| outside.flushed() || outside.gone()) {
                return self.end_flow(id, By::Nobody);
            }
        }
    }

    /// Tell the broker that nobody took this connection.
    pub(crate) fn refuse(&mut self, id: FlowId, refusal: Refusal) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        if let Some(end) = flow.end.take_if(|_| flow.state == State::Requested) {
            let home = self.home_of(id);
            return self.tell(home, &Message::Refuse { connection: end.connection, refusal }, &[]);
        }
        let Some(held) = flow.held[ACCEPTER].take() else { return };
        self.meetings.remove(&held.connection);
        self.tell(held.attachment, &Message::Refuse { connection: held.connection, refusal }, &[]);
    }
}
