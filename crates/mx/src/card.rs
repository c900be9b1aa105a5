//! Peers of other nodes, through the card.
//!
//! The card is a program of this node that owns the network interface. It takes whole frames from us, checks that they are
//! ours to send, and gives us those that are for this endpoint. What they mean is [`Wire`]'s business; here its questions
//! are answered from the endpoint's requests.

use std::sync::Arc;
use std::time::{Duration, Instant};

use isthmus_engine::node::{Attachment, ConnectRequest};
use isthmus_engine::{Connection, Dest, Error, Front, How, Source, lane};
use isthmus_proto::mx::Status;
use isthmus_proto::mx::wire::{
    Above, Arrival, Body, Config, Large, Limits, PeerId, Pending, Reply, Verdict, Wire,
};
use isthmus_wire::card::{self, FRAME_HEAD as FRONT, Opening};
use isthmus_wire::control::SocketKind;
use isthmus_wire::mxoe::{
    ETHERNET_LEN, Frame, Head, INDEX_UNKNOWN, OWN_MTU, Profile, REPLY_HEAD_LEN, ReplyHead, decode, encode,
    mac_of, nic_of_mac,
};

use crate::buffer::Parts;
use crate::codes::Return;
use crate::peers::Path;
use crate::requests::{Kind, Request, RequestId, Stage};
use crate::state::{EAGER_MAX, Kept, State, Unexpected, WIRE_TICKET};

/// It answers within this.
const ANSWER: Duration = Duration::from_secs(2);
/// The first ring towards it: long frames go straight to the large one.
const RING: u32 = 16 * 1024;
/// The question that opens an endpoint and its answer are shorter, bytes.
const OPENED_MAX: usize = 64;
/// Bytes that the card may have to take yet; beyond, frames are not made.
const AHEAD: usize = 768 << 10;
/// Frames that are taken before others have their turn.
const TURN: usize = 256;

pub(crate) struct Card {
    pub connection: Arc<Connection>,
    pub wire: Wire,
    pub profile: Profile,
}

/// Connect to the card.
///
/// # Errors
/// There is none, or no rule lets us.
pub(crate) fn dial(attachment: &Attachment, how: &How<'_>) -> Result<Arc<Connection>, Error> {
    let request = ConnectRequest {
        to: card::DOMAIN.into(),
        port: card::PORT,
        from_port: 0,
        kind: SocketKind::Seqpacket,
        require: None,
        small: RING,
        large: lane::LARGE_DEFAULT,
    };
    attachment.connect(&request, how)
}

/// Connect to the card and be this endpoint there.
///
/// # Errors
/// There is none, no rule lets us, or it lends nothing to this domain.
pub(crate) fn open(
    attachment: &Attachment,
    nic: u64,
    endpoint: u8,
) -> Result<(Arc<Connection>, Profile), Error> {
    let how = How { deadline: Some(Instant::now() + ANSWER), ..How::default() };
    let connection = dial(attachment, &how)?;
    let mut record = [0; OPENED_MAX];
    let open = card::Record::Open { endpoint: endpoint.into() };
    let len = card::encode(&open, &mut record).map_err(|e| Error::BadAnswer(e.to_string()))?;
    lane::with_source(&record[..len], |source| connection.send_message(source, &how))?;
    let (len, _) = lane::with_dest(&mut record, |dest| connection.receive(dest, &how))?;
    let answer = card::decode(&record[..len]).map_err(|e| Error::BadAnswer(e.to_string()))?;
    let card::Record::Opened { status: Opening::Opened, endpoint: id, nic: ours, mtu, own } = answer else {
        return Err(Error::BadAnswer("the card lends nothing to this domain".into()));
    };
    if id != endpoint || ours != nic {
        return Err(Error::BadAnswer("the card takes us for somebody else".into()));
    }
    if own != 0 && !OWN_MTU.contains(&own) {
        return Err(Error::BadAnswer(format!("no dialect has frames for an MTU of {own}")));
    }
    let profile = if own == 0 { Profile::WIRE } else { Profile::own(own) };
    if mtu < profile.mtu() {
        return Err(Error::BadAnswer(format!("frames of {mtu} bytes are too short for this dialect")));
    }
    Ok((connection, profile))
}

impl State {
    /// Frames go this way from now on. What was under way over another card goes on if this wire speaks as that did.
    pub fn take_card(&mut self, connection: Arc<Connection>, profile: Profile) {
        self.card_lane = Some(Arc::clone(&connection));
        if let Some(before) = &self.card {
            self.hear_no_more(&before.connection);
        }
        self.backlog.clear();
        // As long as a record with the longest frame; a longer one means nothing in this dialect.
        let longest = FRONT.len() + ETHERNET_LEN + profile.mtu() as usize;
        (self.scratch, self.out_scratch) = (vec![0; longest], vec![0; longest]);
        if self.profile == Some(profile) {
            if let Some(card) = &mut self.card {
                card.connection = connection;
                card.wire.resume(isthmus_sys::clock::now_ns());
                return;
            }
        }
        // What was under way in another dialect does not arrive any more.
        self.with_card(|card, state| card.wire.end_all(state));
        self.profile = Some(profile);
        let config = Config {
            profile,
            timing: self.timing,
            limits: Limits::default(),
            endpoint: self.endpoint,
            session: self.session,
            key: self.key,
        };
        self.card = Some(Card { connection, wire: Wire::new(config), profile });
    }

    /// Work on the card with the rest of the endpoint at hand.
    pub fn with_card<T>(&mut self, work: impl FnOnce(&mut Card, &mut Self) -> T) -> Option<T> {
        let mut card = self.card.take()?;
        let done = work(&mut card, self);
        self.card = Some(card);
        Some(done)
    }

    /// Connect to an endpoint of another node; the request ends when it is answered. `false`: there is no card.
    pub fn connect_wire(&mut self, now: u64, nic: u64, endpoint: u8, key: u32, connect: u32) -> bool {
        self.with_card(|card, state| card.wire.connect(now, (nic, endpoint), key, connect, state))
            .unwrap_or(false)
    }

    pub fn send_wire(&mut self, now: u64, peer: PeerId, slot: u32, synchronous: bool) {
        let Some(request) = self.requests.at(slot) else { return };
        let (matching, length) = (request.report.matching, request.report.length);
        let large = synchronous || length as usize > EAGER_MAX;
        let early = !large && self.buffered < self.buffered_max;
        let sending = if early { self.copy_send(slot) } else { slot };
        let sent = self
            .with_card(|card, state| card.wire.send(now, peer, (sending, matching, length), large, state));
        let outcome = sent.unwrap_or(Err(Status::EndpointUnreachable));
        if early {
            if outcome.is_err() {
                // The program hears of it.
                self.end(sending, Status::Success, 0);
            }
            self.end(slot, outcome.err().unwrap_or(Status::Success), outcome.map_or(0, |()| length));
        } else if let Err(status) = outcome {
            self.end(slot, status, 0);
        }
    }

    /// A send that goes on when the program has its memory back.
    fn copy_send(&mut self, slot: u32) -> u32 {
        let Some(original) = self.requests.at(slot) else { return slot };
        let mut data = vec![0; original.report.length as usize];
        original.parts.copy_out(0, &mut data);
        let (peer, matching, length) = (original.peer, original.report.matching, original.report.length);
        let mut copy = Request::new(Kind::Send, Parts::empty(), peer, matching, length, 0);
        (copy.copied, copy.buffered) = (Some(data.into()), true);
        self.buffered += 1;
        let copy = self.requests.add(copy);
        if let Some(original) = self.requests.at(slot) {
            original.copy = Some(copy);
        }
        copy.slot()
    }

    /// A peer of another node that does not answer this request for so long is given up, ns.
    ///
    /// # Errors
    /// There is no such request.
    pub fn set_patience_of(&mut self, id: RequestId, ns: u64) -> Result<(), Return> {
        let request = self.requests.get(id).ok_or(Return::BadRequest)?;
        request.patience = Some(ns);
        let pending = match (request.kind, request.stage, request.copy) {
            (Kind::Send, Stage::Done, Some(copy)) if self.requests.get(copy).is_some() => {
                Pending::Send(copy.slot())
            }
            (_, Stage::Done, _) => return Ok(()),
            (Kind::Send, ..) => Pending::Send(id.slot()),
            (Kind::Connect, ..) => Pending::Connect(id.slot()),
            (Kind::Receive, ..) => Pending::Pull(id.slot()),
        };
        if let Some(card) = &mut self.card {
            card.wire.set_patience_of(pending, ns);
        }
        Ok(())
    }

    /// Fetch a large message that was kept.
    pub fn pull_wire(&mut self, slot: u32, peer: PeerId, large: Large) {
        let Some(request) = self.requests.at(slot) else { return };
        let (want, now) = (request.want, self.now);
        let asked = self.with_card(|card, state| card.wire.pull(now, peer, large, (slot, want), state));
        if asked.is_none() {
            self.end_receive(slot, Err(Status::EndpointUnreachable));
        }
    }

    pub fn disconnect_wire(&mut self, peer: PeerId) {
        self.with_card(|card, state| card.wire.disconnect(peer, state));
    }

    /// Acknowledge what was received.
    pub fn close_card(&mut self) {
        self.with_card(|card, state| card.wire.close(state));
        if let Some(connection) = self.card_lane.take() {
            connection.close();
        }
    }

    /// Take the frames that have come, and do what is due; `true`: there was something.
    pub fn poll_card(&mut self, now: u64) -> bool {
        self.now = now;
        self.with_card(|card, state| {
            let came = state.take_frames(now, card);
            state.flush_backlog();
            card.wire.tick(now, state);
            came
        })
        .unwrap_or(false)
    }

    fn take_frames(&mut self, now: u64, card: &mut Card) -> bool {
        let mut record = std::mem::take(&mut self.scratch);
        let came = self.take_records(now, card, &mut record);
        self.scratch = record;
        came
    }

    fn take_records(&mut self, now: u64, card: &mut Card, record: &mut [u8]) -> bool {
        let connection = Arc::clone(&card.connection);
        for n in 0..TURN {
            let mut front = match connection.front_message() {
                Ok(Some(front)) => front,
                Ok(None) => return n > 0,
                Err(_) => {
                    // Another card may come; the resends wait for it.
                    self.card_lane = None;
                    return true;
                }
            };
            let mut beginning = [0; FRONT.len() + REPLY_HEAD_LEN];
            if front.peek(&mut beginning) == beginning.len() {
                let frame_len = front.len() - FRONT.len();
                if let Some(reply) = ReplyHead::decode(&beginning[FRONT.len()..], frame_len) {
                    self.take_reply(now, card, &reply, front);
                    continue;
                }
            }
            let Ok(len) = lane::with_dest(record, |dest: &mut Dest<'_>| front.take(dest)) else {
                return true;
            };
            let Some(bytes) = record[..len].strip_prefix(&FRONT) else { continue };
            if let Ok((head, frame)) = decode(bytes, &card.profile) {
                card.wire.handle(now, nic_of_mac(head.source), &frame, self);
            }
        }
        true
    }

    /// A part of a large message goes straight to where it belongs.
    fn take_reply(&mut self, now: u64, card: &mut Card, reply: &ReplyHead, front: Front<'_>) {
        let ReplyHead { head, frame, offset, cookie, len } = *reply;
        let said = Reply { frame, offset, cookie };
        let ticket = card.wire.take_reply(now, nic_of_mac(head.source), said, len.into());
        let mut beginning = [0; FRONT.len() + REPLY_HEAD_LEN];
        // What comes unasked is dropped, and what the lane's end breaks is asked for again.
        let _ = match ticket.and_then(|slot| self.requests.at(slot)) {
            Some(request) => {
                let (at, len) = (offset as usize, len.into());
                request.parts.with_dest(&mut beginning, at, len, |dest| front.take(dest))
            }
            None => front.take(&mut Dest::empty()),
        };
    }

    fn flush_backlog(&mut self) {
        while let Some(record) = self.backlog.front() {
            if !self.put_record(record) {
                return;
            }
            self.backlog.pop_front();
        }
    }

    fn put_record(&self, record: &[u8]) -> bool {
        let Some(lane) = &self.card_lane else { return true };
        isthmus_engine::lane::with_source(record, |source| lane.try_send_message(source)).unwrap_or(true)
    }
}

/// The wire's questions.
impl Above for State {
    /// Without a card frames are lost, as on a cable that nobody has plugged in: time runs, and what was lost comes again.
    fn room(&self) -> usize {
        if !self.backlog.is_empty() {
            return 0;
        }
        let ahead = self.card_lane.as_ref().map_or(0, |lane| lane.in_flight());
        let longest = self.profile.map_or(AHEAD, |profile| profile.mtu() as usize + ETHERNET_LEN);
        AHEAD.saturating_sub(ahead) / longest
    }

    fn transmit(&mut self, to: u64, frame: &Frame<'_>) {
        let Some(profile) = self.profile else { return };
        let head = Head {
            destination: mac_of(to),
            source: mac_of(self.nic),
            ethertype: profile.ethertype,
            peer_index: INDEX_UNKNOWN,
        };
        let mut scratch = std::mem::take(&mut self.out_scratch);
        scratch[..FRONT.len()].copy_from_slice(&FRONT);
        if let Ok(len) = encode(&head, frame, &profile, &mut scratch[FRONT.len()..]) {
            let record = &scratch[..FRONT.len() + len];
            if !self.backlog.is_empty() || !self.put_record(record) {
                self.backlog.push_back(record.into());
            }
        }
        self.out_scratch = scratch;
    }

    fn transmit_reply(&mut self, to: u64, reply: Reply, send: u32, at: u32, len: u32) {
        let (Some(lane), Some(profile)) = (self.card_lane.clone(), self.profile) else { return };
        let own = mac_of(self.nic);
        let Some(request) = self.requests.at(send) else { return };
        let Reply { frame, offset, cookie } = reply;
        let head = Head {
            destination: mac_of(to),
            source: own,
            ethertype: profile.ethertype,
            peer_index: INDEX_UNKNOWN,
        };
        let head = ReplyHead { head, frame, offset, cookie, len: len as u16 };
        let mut front = [0; FRONT.len() + REPLY_HEAD_LEN];
        front[..FRONT.len()].copy_from_slice(&FRONT);
        front[FRONT.len()..].copy_from_slice(&head.encode());
        let put = |source: &mut Source<'_>| lane.try_send_message(source).unwrap_or(true);
        let sent =
            self.backlog.is_empty() && request.parts.with_source(&front, at as usize, len as usize, put);
        if !sent {
            let mut record = vec![0; front.len() + len as usize];
            record[..front.len()].copy_from_slice(&front);
            request.parts.copy_out(at as usize, &mut record[front.len()..]);
            self.backlog.push_back(record.into());
        }
    }

    fn gather(&mut self, send: u32, at: u32, into: &mut [u8]) {
        let Some(request) = self.requests.at(send) else { return };
        let at = at as usize;
        match &request.copied {
            Some(data) => into.copy_from_slice(&data[at..at + into.len()]),
            None => request.parts.copy_out(at, into),
        }
    }

    fn arrive(&mut self, arrival: Arrival<'_>) -> Verdict {
        let Arrival { peer: id, address: (nic, endpoint), session, matching, length, body } = arrival;
        let peer = self.peers.meet(nic, endpoint, session, Path::Wire(id));
        let bytes = if let Body::Large(_) = body { 0 } else { length as usize };
        if !self.has_room(bytes) && !self.is_awaited(matching) {
            return Verdict::Later;
        }
        let slot = State::arrive(self, peer, matching, length);
        match (body, slot) {
            (Body::Whole(data), Some(slot)) => {
                self.hand_over(slot, data);
                Verdict::Kept
            }
            (Body::Whole(data), None) => {
                let what = Kept::Bytes { data: data.to_vec(), whole: true };
                self.keep(Unexpected { peer, matching, length, what });
                Verdict::Kept
            }
            (Body::Parts, None) => {
                let what = Kept::Bytes { data: vec![0; length as usize], whole: false };
                let number = self.keep(Unexpected { peer, matching, length, what });
                Verdict::Take { ticket: WIRE_TICKET | number, length }
            }
            (Body::Large(large), None) => {
                self.keep(Unexpected { peer, matching, length, what: Kept::OnWire { peer: id, large } });
                Verdict::Kept
            }
            (Body::Parts | Body::Large(_), Some(slot)) => {
                let length = self.requests.at(slot).map_or(0, |request| request.want);
                Verdict::Take { ticket: slot, length }
            }
        }
    }

    fn patience(&mut self, ticket: u32) -> Option<u64> {
        if ticket & WIRE_TICKET != 0 {
            return None;
        }
        self.requests.at(ticket)?.patience
    }

    fn place(&mut self, ticket: u32, at: u32, data: &[u8]) {
        if ticket & WIRE_TICKET == 0 {
            if let Some(request) = self.requests.at(ticket) {
                request.parts.copy_in(at as usize, data);
            }
        } else if let Some(Unexpected { what: Kept::Bytes { data: kept, .. }, .. }) =
            self.kept(ticket & !WIRE_TICKET)
        {
            if let Some(place) = kept.get_mut(at as usize..at as usize + data.len()) {
                place.copy_from_slice(data);
            }
        }
    }

    fn placed(&mut self, ticket: u32, outcome: Result<u32, Status>) {
        if ticket & WIRE_TICKET == 0 {
            return self.end_receive(ticket, outcome);
        }
        let number = ticket & !WIRE_TICKET;
        let promised = self.promised.remove(&number);
        if let Some(Unexpected { what: Kept::Bytes { whole, .. }, .. }) = self.kept(number) {
            *whole = true;
        }
        match (promised, outcome) {
            (Some(slot), Ok(_)) => self.hand_over_kept(number, slot),
            (Some(slot), Err(status)) => {
                self.drop_kept(number);
                self.end_receive(slot, Err(status));
            }
            (None, Ok(_)) => {}
            (None, Err(_)) => self.drop_kept(number),
        }
    }

    fn sent(&mut self, send: u32, outcome: Result<u32, Status>) {
        let length = self.requests.at(send).map_or(0, |request| request.report.length);
        match outcome {
            Ok(taken) if taken < length => self.end(send, Status::Truncated, taken),
            Ok(taken) => self.end(send, Status::Success, taken),
            Err(status) => self.end(send, status, 0),
        }
    }

    fn connected(&mut self, connect: u32, outcome: Result<(PeerId, (u64, u8), u32), Status>) {
        match outcome {
            Ok((id, (nic, endpoint), session)) => {
                let peer = self.peers.meet(nic, endpoint, session, Path::Wire(id));
                State::connected(self, connect, peer);
            }
            Err(status) => self.end(connect, status, 0),
        }
    }

    fn void(&mut self, peer: PeerId) {
        if let Some(peer) = self.peers.on_wire(peer) {
            State::void(self, peer);
        }
    }
}
