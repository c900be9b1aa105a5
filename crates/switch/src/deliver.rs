//! To guests: what fills their receive queues.

use std::sync::Arc;

use isthmus_wire::vsock::{
    CREDIT_REQUEST, CREDIT_UPDATE, Header, REQUEST, RESPONSE, RST, RW, SEQ_EOM, SHUTDOWN, SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
};

use isthmus_ring::layout::{RESET, TAKES_ALL};

use crate::bridge::{Front, MESSAGES_MAX};
use crate::device::RX;
use crate::flow::{By, FlowId, Side, State};
use crate::switch::Switch;
use crate::vring::Cursor;

/// Bytes of one flow that a guest gets before its other flows have their turn.
const TURN_BYTES: usize = 128 << 10;

/// Buffers that one packet is spread over at once; what is left is queued, and others have their turn.
const EMITS_MAX: usize = 64;
/// Bytes that are kept for a guest that takes nothing.
pub(crate) const WAITING_MAX: usize = 64 << 20;
/// Room for payload that every receive buffer has, if it does not take all there is (Linux: 3.7 KiB).
const BUFFER_MIN: usize = 512;

/// What became of a packet for a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    /// So many bytes of its payload.
    Bytes(usize),
    /// The guest has no buffer: it kicks when it has.
    Full,
}

/// How a flow's turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Nothing,
    More,
    Full,
    /// The flow is no more.
    Over,
}

impl Switch {
    /// This flow has something for the guest on this side.
    pub(crate) fn queue(&mut self, id: FlowId, side: usize) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let cid = flow.key_of(side).cid;
        let Some(socket) = flow.socket(side) else { return };
        if !std::mem::replace(&mut socket.out.queued, true) {
            if let Some(guest) = self.guests.get_mut(&cid) {
                guest.ready.push_back((id, side));
            }
        }
    }

    /// Give a guest what waits for it, as far as it has buffers.
    pub(crate) fn deliver(&mut self, cid: u32) {
        while let Some(header) = self.guests.get(&cid).and_then(|guest| guest.resets.front().copied()) {
            if self.emit(cid, header, 0, &mut Cursor::new(&[])) == Sent::Full {
                return;
            }
            if let Some(guest) = self.guests.get_mut(&cid) {
                guest.resets.pop_front();
                if std::mem::take(&mut guest.held_back) {
                    self.mark_guest(cid);
                }
            }
        }
        // Whatever is queued again meanwhile waits for the next turn.
        let mut turns = self.guests.get(&cid).map_or(0, |guest| guest.ready.len());
        while turns > 0 {
            turns -= 1;
            let Some((id, side)) = self.guests.get_mut(&cid).and_then(|guest| guest.ready.pop_front()) else {
                return;
            };
            match self.deliver_flow(cid, id, side) {
                Turn::Nothing => {
                    if let Some(socket) = self.flows.get_mut(&id).and_then(|flow| flow.socket(side)) {
                        socket.out.queued = false;
                    }
                }
                Turn::More => {
                    if let Some(guest) = self.guests.get_mut(&cid) {
                        guest.ready.push_back((id, side));
                        guest.pressed = true;
                    }
                }
                Turn::Full => {
                    if let Some(guest) = self.guests.get_mut(&cid) {
                        guest.ready.push_front((id, side));
                    }
                    return;
                }
                Turn::Over => {}
            }
        }
    }

    fn deliver_flow(&mut self, cid: u32, id: FlowId, side: usize) -> Turn {
        if let Err(turn) = self.deliver_signs(cid, id, side) {
            return turn;
        }
        let turn = self.deliver_queued(cid, id, side);
        if turn != Turn::Nothing {
            return turn;
        }
        if self.flows.get(&id).is_some_and(|flow| flow.holds_back(side)) {
            // Until there is room for it; the end comes behind it.
            return Turn::Nothing;
        }
        let turn = self.deliver_lane(cid, id, side);
        if turn != Turn::Nothing {
            return turn;
        }
        self.deliver_end(cid, id, side)
    }

    /// What goes before bytes.
    fn deliver_signs(&mut self, cid: u32, id: FlowId, side: usize) -> Result<(), Turn> {
        for op in [REQUEST, RESPONSE, CREDIT_UPDATE, CREDIT_REQUEST] {
            let Some(flow) = self.flows.get_mut(&id) else { return Err(Turn::Over) };
            let Some(socket) = flow.socket(side) else { return Err(Turn::Over) };
            let out = &mut socket.out;
            let wanted = match op {
                REQUEST => &mut out.request,
                RESPONSE => &mut out.response,
                CREDIT_UPDATE => &mut out.credit,
                _ => &mut out.credit_request,
            };
            if std::mem::take(wanted)
                && self.emit_flow(cid, id, side, op, 0, &mut Cursor::new(&[])) == Sent::Full
            {
                let socket = self.flows.get_mut(&id).and_then(|flow| flow.socket(side));
                if let Some(out) = socket.map(|socket| &mut socket.out) {
                    match op {
                        REQUEST => out.request = true,
                        RESPONSE => out.response = true,
                        CREDIT_UPDATE => out.credit = true,
                        _ => out.credit_request = true,
                    }
                }
                return Err(Turn::Full);
            }
        }
        Ok(())
    }

    /// Bytes that had to wait here.
    fn deliver_queued(&mut self, cid: u32, id: FlowId, side: usize) -> Turn {
        let mut budget = TURN_BYTES;
        loop {
            let Some(flow) = self.flows.get_mut(&id) else { return Turn::Over };
            if !matches!(flow.state, State::Open) && side == crate::flow::OPENER {
                // The opener is not told of its connection yet.
                return Turn::Nothing;
            }
            let own = matches!(flow.sides[1 - side], Side::Service(_)) || flow.brought.is_some();
            let Some(socket) = flow.socket(side) else { return Turn::Over };
            let room = socket.room() as usize;
            let out = &mut socket.out;
            let (mut len, mut flags) = match out.marks.front() {
                Some(mark) => *mark,
                None if out.data.is_empty() => return Turn::Nothing,
                None => (out.data.len(), 0),
            };
            if own && len > room {
                // What is not another guest's bytes is ours to hold back.
                (len, flags) = (room, 0);
                if room == 0 {
                    return Turn::Nothing;
                }
            }
            if budget == 0 {
                return Turn::More;
            }
            let (front, back) = out.data.as_slices();
            let first = front.len().min(len);
            let pieces = [
                (front.as_ptr().cast_mut(), first),
                (back.as_ptr().cast_mut(), (len - first).min(back.len())),
            ];
            // The pieces stay where they are: nothing is added to this flow until they were copied.
            let sent = self.emit_flow(cid, id, side, RW, flags, &mut Cursor::new(&pieces));
            let Sent::Bytes(sent) = sent else { return Turn::Full };
            let Some(socket) = self.flows.get_mut(&id).and_then(|flow| flow.socket(side)) else {
                return Turn::Over;
            };
            let out = &mut socket.out;
            out.data.drain(..sent);
            if let Some(guest) = self.guests.get_mut(&cid) {
                guest.waiting = guest.waiting.saturating_sub(sent);
            }
            if let Some(mark) = out.marks.front_mut() {
                mark.0 -= sent;
                if mark.0 == 0 {
                    out.marks.pop_front();
                }
            }
            budget = budget.saturating_sub(sent.max(1));
        }
    }

    /// Bytes that lie in a lane.
    fn deliver_lane(&mut self, cid: u32, id: FlowId, side: usize) -> Turn {
        let now = self.now_us();
        let mut budget = TURN_BYTES;
        loop {
            let Some(flow) = self.flows.get_mut(&id) else { return Turn::Over };
            let Some(socket) = flow.socket(side) else { return Turn::Over };
            let (room, buffer) = (socket.room() as usize, socket.buf_alloc as usize);
            let Some(bridge) = flow.outside(1 - side) else { return Turn::Nothing };
            let (piece, message) = match bridge.front() {
                Front::Bytes(piece, message) => (piece, message),
                Front::Nothing if bridge.listen() => continue,
                Front::Nothing | Front::End | Front::Broken => return Turn::Nothing,
            };
            if message && piece.1 > buffer {
                // It can never fit the guest's buffer.
                self.end_flow(id, By::Nobody);
                return Turn::More;
            }
            if room == 0 || message && room < piece.1 {
                return Turn::Nothing;
            }
            if budget == 0 {
                return Turn::More;
            }
            let rate = flow.terms.rate;
            if let Err(at) = flow.buckets[1 - side].ready(rate, now) {
                self.hold_back(id, 1 - side, at);
                return Turn::Nothing;
            }
            let pieces = [(piece.0, piece.1.min(room))];
            let flags = if message { SEQ_EOM } else { 0 };
            let sent = self.emit_flow(cid, id, side, RW, flags, &mut Cursor::new(&pieces));
            let Sent::Bytes(sent) = sent else { return Turn::Full };
            let Some(flow) = self.flows.get_mut(&id) else { return Turn::Over };
            if rate > 0 {
                flow.buckets[1 - side].take(sent);
            }
            if let Some(bridge) = flow.outside(1 - side) {
                bridge.took(sent);
            }
            self.ring_guest(id, 1 - side);
            budget = budget.saturating_sub(sent.max(1));
        }
    }

    /// What goes behind the last byte.
    fn deliver_end(&mut self, cid: u32, id: FlowId, side: usize) -> Turn {
        let Some(flow) = self.flows.get_mut(&id) else { return Turn::Over };
        let mut flags = 0;
        let mut broken = false;
        if let Some(bridge) = flow.outside(1 - side) {
            match bridge.front() {
                Front::End => flags |= SHUTDOWN_SEND,
                Front::Broken => broken = true,
                Front::Nothing | Front::Bytes(..) => {}
            }
            broken |= bridge.takes() == RESET;
            if bridge.takes() != TAKES_ALL {
                flags |= SHUTDOWN_RECEIVE;
            }
        }
        if broken && !flow.ended {
            self.end_flow(id, By::Nobody);
            return self.deliver_end(cid, id, side);
        }
        let Some(socket) = flow.socket(side) else { return Turn::Over };
        let wanted = (socket.out.shutdown | flags) & !socket.told_shut;
        if wanted != 0 {
            let whole = socket.told_shut | wanted;
            if self.emit_flow(cid, id, side, SHUTDOWN, whole, &mut Cursor::new(&[])) == Sent::Full {
                return Turn::Full;
            }
            if let Some(socket) = self.flows.get_mut(&id).and_then(|flow| flow.socket(side)) {
                socket.told_shut = whole;
                socket.out.shutdown = 0;
            }
        }
        let Some(socket) = self.flows.get_mut(&id).and_then(|flow| flow.socket(side)) else {
            return Turn::Over;
        };
        socket.out.shutdown = 0;
        if socket.out.reset {
            if self.emit_flow(cid, id, side, RST, 0, &mut Cursor::new(&[])) == Sent::Full {
                return Turn::Full;
            }
            self.forget_side(id, side);
            return Turn::Over;
        }
        Turn::Nothing
    }

    /// Bytes from one guest for the other: at once if nothing is before them and there are buffers.
    pub(crate) fn send_bytes(&mut self, id: FlowId, side: usize, flags: u32, payload: &mut Cursor<'_>) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        let cid = flow.key_of(side).cid;
        let open = flow.state == State::Open;
        let message = flow.keys[0].kind == isthmus_wire::vsock::SEQPACKET;
        let own = flow.brought.is_some();
        let Some(socket) = flow.socket(side) else { return };
        let fits = !own || socket.room() as usize >= payload.left();
        if open && fits && !socket.out.queued {
            for _ in 0..EMITS_MAX {
                match self.emit_flow(cid, id, side, RW, flags, payload) {
                    Sent::Bytes(_) if payload.left() == 0 => return,
                    Sent::Bytes(_) => {}
                    Sent::Full => break,
                }
            }
        }
        let len = payload.left();
        let Some(guest) = self.guests.get_mut(&cid) else { return };
        if guest.waiting + len > WAITING_MAX {
            // It stands still, and its connections were granted more than we keep for it.
            return self.end_flow(id, By::Nobody);
        }
        guest.waiting += len;
        let Some(socket) = self.flows.get_mut(&id).and_then(|flow| flow.socket(side)) else { return };
        let out = &mut socket.out;
        while let Some((start, len)) = payload.next(usize::MAX) {
            // SAFETY: in a guest's memory, mapped while its packet is handled; whatever it writes meanwhile, it sends.
            out.data.extend(unsafe { std::slice::from_raw_parts(start, len) });
        }
        if message {
            match out.marks.back_mut() {
                Some(mark) if mark.1 == 0 => *mark = (mark.0 + len, flags),
                _ => out.marks.push_back((len, flags)),
            }
        }
        if out.marks.len() > MESSAGES_MAX {
            return self.end_flow(id, By::Nobody);
        }
        self.queue(id, side);
    }

    fn emit_flow(
        &mut self,
        cid: u32,
        id: FlowId,
        side: usize,
        op: u16,
        flags: u32,
        payload: &mut Cursor<'_>,
    ) -> Sent {
        let now = self.now_us();
        let Some(flow) = self.flows.get_mut(&id) else { return Sent::Bytes(payload.left()) };
        if let Err(at) = flow.pass(side, now) {
            self.hold_back(id, side, at);
        }
        let Some(flow) = self.flows.get_mut(&id) else { return Sent::Bytes(payload.left()) };
        let header = flow.header(side, op);
        let sent = self.emit(cid, header, flags, payload);
        if let (RW, Sent::Bytes(bytes)) = (op, sent) {
            if let Some(socket) = self.flows.get_mut(&id).and_then(|flow| flow.socket(side)) {
                socket.sent = socket.sent.wrapping_add(bytes as u32);
            }
        }
        sent
    }

    /// Put one packet into a guest's receive queue, with as much of `payload` as its next buffer takes. `flags` are
    /// those of the last packet of the payload.
    fn emit(&mut self, cid: u32, mut header: Header, flags: u32, payload: &mut Cursor<'_>) -> Sent {
        let mut chain = std::mem::take(&mut self.scratch);
        let mut fault = None;
        let mut sent = Sent::Full;
        if let Some(device) = self.guests.get_mut(&cid).and_then(|guest| guest.device.as_mut()) {
            if let Some((vring, memory)) = device.vring(RX) {
                let memory = Arc::clone(memory);
                let mut taken = vring.take(&memory, true, &mut chain);
                if matches!(taken, Ok(false)) && vring.listen(&memory) {
                    taken = vring.take(&memory, true, &mut chain);
                }
                match taken {
                    Ok(true) => {
                        vring.ignore(&memory);
                        let mut into = Cursor::new(&chain.pieces);
                        let left = payload.left();
                        let room = into.left().saturating_sub(Header::LEN);
                        let len = room.min(left);
                        if into.left() < Header::LEN || len < left && room < BUFFER_MIN {
                            fault = Some(crate::Fault::Queue("a receive buffer shorter than a packet"));
                        } else {
                            header.len = len as u32;
                            header.flags = if len == left { flags } else { 0 };
                            into.write(&header.encode());
                            into.copy(payload, len);
                            vring.give_back(&memory, &chain, (Header::LEN + len) as u32);
                            sent = Sent::Bytes(len);
                        }
                    }
                    Ok(false) => {}
                    Err(error) => fault = Some(error),
                }
            }
        }
        self.scratch = chain;
        if let Some(fault) = fault {
            self.blame(cid, &fault);
        }
        sent
    }
}
