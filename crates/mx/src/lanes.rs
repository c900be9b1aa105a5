//! Peers of this node.
//!
//! Each pair of endpoints has a connection of ours, of messages: records of [`isthmus_wire::mx_lane`]. Short messages are
//! in one record. Long ones are announced; their receiver pulls them, and their bytes then go straight from the sender's
//! memory to the lane and from the lane to the receiver's memory. Where they lie in a window of the sender's that its
//! receiver may read, the receiver takes them there instead (`placing`).

use std::collections::VecDeque;
use std::sync::Arc;

use isthmus_engine::Connection;
use isthmus_proto::mx::Status;
use isthmus_wire::mx_lane::{HEADER, OFFSET, Record, VERSION};
use isthmus_wire::mxoe::{BAD_KEY, CONNECTED};

use crate::buffer::Parts;
use crate::peers::Path;
use crate::placing::{Place, lies_in};
use crate::requests::{Kind, RequestId, Stage};
use crate::state::{EAGER_MAX, Kept, State, Unexpected};

/// Bytes of a long message that are one record: the receiver copies one while the sender writes the next.
const CHUNK: usize = 64 * 1024;
/// Records that are taken from one lane before the next has its turn.
const TURN: usize = 64;
/// Chunks of long messages that go into one lane before anything else is looked at: about a megabyte.
const CHUNKS: usize = (1 << 20) / CHUNK;
/// Records that wait for room in a lane: a peer that asks for so many without reading one is none.
const RECORDS_MAX: usize = 1 << 16;
/// Welcomes that wait for room in a lane: a peer that asks again and again without listening is none.
const WELCOMES_MAX: usize = 256;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Greeting {
    /// The other side opened it, and has not said which endpoint it is. `nic` is what the broker said of its domain.
    Awaited {
        nic: u64,
    },
    /// We opened it, and wait for the answer.
    Asked {
        nic: u64,
        endpoint: u8,
    },
    Done {
        peer: u32,
    },
}

enum Out {
    /// A message, or the announcement of one.
    Send {
        slot: u32,
        announced: bool,
    },
    Record(Record),
}

/// A long message that was asked for.
struct Stream {
    slot: u32,
    ticket: u32,
    at: u32,
    end: u32,
}

pub(crate) struct Lane {
    pub connection: Arc<Connection>,
    pub greeting: Greeting,
    /// Connects that wait for a welcome, oldest first.
    asked: VecDeque<RequestId>,
    /// The next message waits for memory: there is nothing to look for.
    pub is_stuck: bool,
    out: VecDeque<Out>,
    /// Of these, those that are no messages of the program's.
    records: usize,
    streams: VecDeque<Stream>,
}

impl Lane {
    pub fn new(connection: Arc<Connection>, greeting: Greeting) -> Self {
        Self {
            connection,
            greeting,
            asked: VecDeque::new(),
            is_stuck: false,
            out: VecDeque::new(),
            records: 0,
            streams: VecDeque::new(),
        }
    }

    pub fn asked(&mut self) -> VecDeque<RequestId> {
        std::mem::take(&mut self.asked)
    }

    pub fn is_idle(&self) -> bool {
        self.out.is_empty() && self.streams.is_empty()
    }

    fn write(&self, record: &Record) -> bool {
        self.write_with(record, &Parts::empty(), 0, 0)
    }

    /// `false`: the lane is full, or has ended, which [`State::poll_lane`] sees.
    fn write_with(&self, record: &Record, parts: &Parts, at: usize, len: usize) -> bool {
        let sent =
            parts.with_source(&record.encode(), at, len, |source| self.connection.try_send_message(source));
        sent.unwrap_or(false)
    }
}

impl State {
    /// Work on this connection from now on; returns its number.
    pub fn add_lane(&mut self, lane: Lane) -> u32 {
        let free = self.lanes.iter().position(Option::is_none).unwrap_or(self.lanes.len());
        if free == self.lanes.len() {
            self.lanes.push(None);
        }
        self.lanes[free] = Some(lane);
        free as u32
    }

    fn lane(&mut self, lane: u32) -> Option<&mut Lane> {
        self.lanes.get_mut(lane as usize)?.as_mut()
    }

    fn say(&mut self, lane: u32, record: Record) {
        let Some(to) = self.lane(lane) else { return };
        if !to.out.is_empty() || !to.write(&record) {
            to.out.push_back(Out::Record(record));
            to.records += 1;
            self.pending = true;
        }
    }

    /// Say who we are and that we know the key; the connect ends when the answer is here.
    pub fn greet(&mut self, lane: u32, key: u32, connect: RequestId) {
        let (endpoint, session) = (self.endpoint, self.session);
        let Some(to) = self.lane(lane) else {
            return self.end(connect.slot(), Status::EndpointClosed, 0);
        };
        to.asked.push_back(connect);
        self.say(lane, Record::Hello { version: VERSION, endpoint, session, key });
    }

    // ---- sending

    pub fn send_lane(&mut self, lane: u32, slot: u32, synchronous: bool) {
        let Some(request) = self.requests.at(slot) else { return };
        let announced = synchronous || request.report.length as usize > EAGER_MAX;
        request.lane = lane;
        let Some(to) = self.lanes.get_mut(lane as usize).and_then(Option::as_mut) else { return };
        if !to.out.is_empty() || !self.try_send(lane, slot, announced) {
            if let Some(to) = self.lane(lane) {
                to.out.push_back(Out::Send { slot, announced });
            }
            self.pending = true;
        }
    }

    /// `false`: there is no room.
    fn try_send(&mut self, lane: u32, slot: u32, announced: bool) -> bool {
        let Some(to) = self.lanes.get(lane as usize).and_then(Option::as_ref) else { return true };
        let Some(request) = self.requests.at(slot) else { return true };
        let (matching, length) = (request.report.matching, request.report.length);
        if announced {
            let place = lies_in(&to.connection, &request.parts);
            let (window, offset) =
                place.as_ref().map_or((0, [0; OFFSET]), |(_, id, at)| (*id, at.to_le_bytes()));
            let behind = if place.is_some() { OFFSET } else { 0 };
            let record = Record::Announce { matching, length, id: slot, window };
            let written = to.write_with(&record, &Parts::of(&offset), 0, behind);
            if written {
                request.stage = Stage::Under;
                request.window = place.map(|(window, ..)| window);
            }
            return written;
        }
        let written = to.write_with(&Record::Message { matching }, &request.parts, 0, length as usize);
        if written {
            self.end(slot, Status::Success, length);
        }
        written
    }

    /// Send what waits, as far as there is room.
    pub fn flush_lanes(&mut self) {
        if !std::mem::take(&mut self.pending) {
            return;
        }
        for lane in 0..self.lanes.len() as u32 {
            self.flush_lane(lane);
            self.pending |= self.lane(lane).is_some_and(|lane| !lane.is_idle());
        }
    }

    fn flush_lane(&mut self, lane: u32) {
        while let Some(next) = self.lane(lane).and_then(|lane| lane.out.pop_front()) {
            let done = match &next {
                Out::Record(record) => self.lane(lane).is_none_or(|lane| lane.write(record)),
                Out::Send { slot, announced } => self.try_send(lane, *slot, *announced),
            };
            if let Some(lane) = self.lane(lane) {
                if !done {
                    return lane.out.push_front(next);
                }
                lane.records -= usize::from(matches!(next, Out::Record(_)));
            }
        }
        self.flush_streams(lane);
    }

    /// Long messages take turns, a chunk each. A peer that takes them as fast as they come has so many at a time, and then
    /// is heard, as others are.
    fn flush_streams(&mut self, lane: u32) {
        for _ in 0..CHUNKS {
            let Some(to) = self.lanes.get_mut(lane as usize).and_then(Option::as_mut) else { return };
            let Some(mut stream) = to.streams.pop_front() else { return };
            let Some(request) = self.requests.at(stream.slot) else { continue };
            let len = (stream.end - stream.at).min(CHUNK as u32);
            let record = Record::Data { ticket: stream.ticket, offset: stream.at };
            if !to.write_with(&record, &request.parts, stream.at as usize, len as usize) {
                to.streams.push_front(stream);
                return;
            }
            stream.at += len;
            if stream.at < stream.end {
                to.streams.push_back(stream);
                continue;
            }
            let length = request.report.length;
            let status = if stream.end < length { Status::Truncated } else { Status::Success };
            self.end(stream.slot, status, stream.end);
        }
    }

    // ---- receiving

    /// Take what has come over a lane; `true`: there was something.
    pub fn poll_lane(&mut self, lane: u32) -> bool {
        let Some(from) = self.lane(lane) else { return false };
        from.is_stuck = false;
        if from.records > RECORDS_MAX {
            self.lane_is_over(lane);
            return true;
        }
        let connection = Arc::clone(&from.connection);
        for n in 0..TURN {
            let mut front = match connection.front_message() {
                Ok(Some(front)) => front,
                Ok(None) => return n > 0,
                Err(_) => {
                    self.lane_is_over(lane);
                    return true;
                }
            };
            let mut beginning = [0; HEADER + OFFSET];
            let len = front.len();
            let seen = front.peek(&mut beginning);
            let record = beginning.get(..seen).and_then(|seen| Record::decode(seen).ok());
            let Some(record) = record else {
                drop(front);
                self.lane_is_over(lane);
                return true;
            };
            let len = len - HEADER;
            let fine = match record {
                Record::Message { matching } => {
                    if let Some(taken) = self.take_message(lane, matching, len, front) {
                        taken
                    } else {
                        // There is no memory for it: it waits, and all behind it.
                        self.stick(lane);
                        return n > 0;
                    }
                }
                Record::Announce { matching, .. } if !self.has_room(0) && !self.is_awaited(matching) => {
                    self.stick(lane);
                    return n > 0;
                }
                Record::Data { ticket, offset } => self.take_data(lane, (ticket, offset), len, front),
                Record::Announce { matching, length, id, window } if window != 0 => {
                    let offset = beginning.last_chunk().copied().map_or(0, u64::from_le_bytes);
                    let taken = front.take(&mut isthmus_engine::Dest::empty()).is_ok();
                    let fits = len == OFFSET && taken;
                    fits && self.on_announce(lane, matching, length, id, Some((window, offset)))
                }
                other => {
                    // Taken or dropped: it holds the lane.
                    let taken = front.take(&mut isthmus_engine::Dest::empty()).is_ok();
                    len == 0 && taken && self.handle(lane, other)
                }
            };
            if !fine {
                self.lane_is_over(lane);
                return true;
            }
        }
        true
    }

    /// Nothing more can be taken from this lane for now.
    fn stick(&mut self, lane: u32) {
        self.is_stuck = true;
        if let Some(lane) = self.lane(lane) {
            lane.is_stuck = true;
        }
    }

    fn lane_is_over(&mut self, lane: u32) {
        self.end_lane(lane, Status::EndpointClosed);
    }

    /// Whose lane this is, once it has said so.
    fn peer_of(&mut self, lane: u32) -> Option<u32> {
        match self.lane(lane)?.greeting {
            Greeting::Done { peer } => Some(peer),
            _ => None,
        }
    }

    /// `None`: not now. `Some(false)`: this lane says what cannot be.
    fn take_message(
        &mut self,
        lane: u32,
        matching: u64,
        len: usize,
        front: isthmus_engine::Front<'_>,
    ) -> Option<bool> {
        let Some(peer) = self.peer_of(lane) else { return Some(false) };
        if len > EAGER_MAX {
            return Some(false);
        }
        let mut header = [0; HEADER];
        if !self.has_room(len) && !self.is_awaited(matching) {
            return None;
        }
        let Some(slot) = self.arrive(peer, matching, len as u32) else {
            let mut data = vec![0; len];
            let parts = Parts::new(&[(data.as_mut_ptr(), len)]);
            let got = parts.with_dest(&mut header, 0, len, |dest| front.take(dest)).is_ok();
            let what = Kept::Bytes { data, whole: true };
            self.keep(Unexpected { peer, matching, length: len as u32, what });
            return Some(got);
        };
        let Some(request) = self.requests.at(slot) else { return Some(false) };
        let want = request.want as usize;
        let got = request.parts.with_dest(&mut header, 0, want, |dest| front.take(dest)).is_ok();
        self.end_receive(slot, Ok(len as u32));
        Some(got)
    }

    fn take_data(
        &mut self,
        lane: u32,
        (ticket, offset): (u32, u32),
        len: usize,
        front: isthmus_engine::Front<'_>,
    ) -> bool {
        let Some(request) = self.requests.at(ticket) else { return false };
        let ours = request.kind == Kind::Receive && request.stage == Stage::Under && request.lane == lane;
        let fits = len > 0 && len as u64 + u64::from(offset) <= u64::from(request.want);
        if !ours || offset != request.got || !fits {
            return false;
        }
        let mut header = [0; HEADER];
        let taken =
            request.parts.with_dest(&mut header, offset as usize, len, |dest| front.take(dest)).is_ok();
        request.got += len as u32;
        let (got, want) = (request.got, request.want);
        if got == want {
            self.end_receive(ticket, Ok(got));
        }
        taken
    }

    /// `false`: it cannot be.
    fn handle(&mut self, lane: u32, record: Record) -> bool {
        match record {
            Record::Hello { version, endpoint, session, key } => {
                version == VERSION && self.on_hello(lane, endpoint, session, key)
            }
            Record::Welcome { status, session } => self.on_welcome(lane, status, session),
            Record::Announce { matching, length, id, .. } => {
                self.on_announce(lane, matching, length, id, None)
            }
            Record::Pull { id, length, ticket } => self.on_pull(lane, id, length, ticket),
            Record::Placed { id, length } => self.on_placed(lane, id, length),
            Record::Message { .. } | Record::Data { .. } => false,
        }
    }

    fn on_hello(&mut self, lane: u32, endpoint: u8, session: u32, key: u32) -> bool {
        let Some(from) = self.lane(lane) else { return false };
        let greeting = from.greeting;
        let waits = |out: &Out| matches!(out, Out::Record(Record::Welcome { .. }));
        if from.out.iter().filter(|out| waits(out)).count() >= WELCOMES_MAX {
            return false;
        }
        let (own_session, welcome) = (self.session, key == self.key);
        match greeting {
            // That is ourselves, and nobody else.
            Greeting::Awaited { nic } if (nic, endpoint) == (self.nic, self.endpoint) => return false,
            Greeting::Awaited { nic } if welcome => {
                let peer = self.meet_on_lane(nic, endpoint, session, lane);
                if let Some(lane) = self.lane(lane) {
                    lane.greeting = Greeting::Done { peer };
                }
            }
            Greeting::Awaited { .. } => {}
            // It came to us, or we to it, and now it connects: does it know the key?
            Greeting::Done { peer } => {
                let known = self
                    .peers
                    .get(peer)
                    .is_some_and(|peer| peer.endpoint == endpoint && peer.session == session);
                if !known {
                    return false;
                }
            }
            Greeting::Asked { .. } => return false,
        }
        let status = if welcome { CONNECTED } else { BAD_KEY };
        self.say(lane, Record::Welcome { status, session: own_session });
        true
    }

    /// The peer of a lane; if it is another instance than the one that was known, what that one sent is void.
    fn meet_on_lane(&mut self, nic: u64, endpoint: u8, session: u32, lane: u32) -> u32 {
        let known = self.peers.at(nic, endpoint);
        let another = known.filter(|peer| self.peers.get(*peer).is_some_and(|peer| peer.session != session));
        if let Some(peer) = another {
            self.end_lanes_of(peer, Status::EndpointClosed);
            self.void(peer);
        }
        self.peers.meet(nic, endpoint, session, Path::Lane(lane))
    }

    fn on_welcome(&mut self, lane: u32, status: u8, session: u32) -> bool {
        let Some(from) = self.lane(lane) else { return false };
        let Some(connect) = from.asked.pop_front() else { return false };
        let greeting = from.greeting;
        // It may have been taken back, and its number be another's.
        let waits = self.requests.get(connect).is_some();
        if status != CONNECTED {
            if waits {
                self.end(connect.slot(), Status::BadKey, 0);
            }
            // Nobody else has asked here: it ends.
            return matches!(greeting, Greeting::Done { .. });
        }
        let peer = match greeting {
            Greeting::Done { peer } => peer,
            Greeting::Asked { nic, endpoint } => self.meet_on_lane(nic, endpoint, session, lane),
            Greeting::Awaited { .. } => return false,
        };
        if let Some(lane) = self.lane(lane) {
            lane.greeting = Greeting::Done { peer };
        }
        if waits {
            self.connected(connect.slot(), peer);
        }
        true
    }

    /// A connect has succeeded.
    pub fn connected(&mut self, connect: u32, peer: u32) {
        let address = self.peers.address(peer);
        if let Some(request) = self.requests.at(connect) {
            request.report.source = address;
            self.end(connect, Status::Success, 0);
        }
    }

    fn on_announce(
        &mut self,
        lane: u32,
        matching: u64,
        length: u32,
        id: u32,
        named: Option<(u32, u64)>,
    ) -> bool {
        let Some(peer) = self.peer_of(lane) else { return false };
        let place = match (named, self.lane(lane)) {
            // A window that is not known is on its way, or was not taken: then the bytes come through the lane.
            (Some((window, at)), Some(lane)) => {
                lane.connection.view_of(window).map(|window| Place { window, at })
            }
            _ => None,
        };
        if place.as_ref().is_some_and(|place| !place.window.has(place.at, length.into())) {
            return false;
        }
        if let Some(slot) = self.arrive(peer, matching, length) {
            self.pull_lane(slot, lane, id, place);
        } else {
            self.keep(Unexpected { peer, matching, length, what: Kept::OnLane { lane, id, place } });
        }
        true
    }

    /// Ask for a long message, or take it where it lies.
    pub fn pull_lane(&mut self, slot: u32, lane: u32, id: u32, place: Option<Place>) {
        let Some(request) = self.requests.at(slot) else { return };
        let (want, length) = (request.want, request.report.length);
        (request.lane, request.got) = (lane, 0);
        if self.lane(lane).is_none() {
            return self.end_receive(slot, Err(Status::EndpointClosed));
        }
        if let Some(place) = place.filter(|_| want > 0) {
            return self.begin_to_place(slot, lane, id, place);
        }
        self.say(lane, Record::Pull { id, length: want, ticket: slot });
        if want == 0 {
            let status = if length > 0 { Status::Truncated } else { Status::Success };
            self.end(slot, status, 0);
        }
    }

    /// Nothing of a long message is wanted.
    pub fn decline_lane(&mut self, lane: u32, id: u32) {
        self.say(lane, Record::Pull { id, length: 0, ticket: 0 });
    }

    /// All of a message that is wanted was taken from where it lay.
    pub fn placed(&mut self, lane: u32, id: u32, length: u32) {
        if let Some(lane) = self.lane(lane) {
            lane.connection.count_placed(0, length);
        }
        self.say(lane, Record::Placed { id, length });
    }

    fn on_placed(&mut self, lane: u32, id: u32, length: u32) -> bool {
        let Some(request) = self.requests.at(id) else { return false };
        let ours = request.kind == Kind::Send && request.stage == Stage::Under && request.lane == lane;
        // Once for each announcement, and not of one that was pulled.
        if !ours || request.want != 0 || request.window.is_none() {
            return false;
        }
        let whole = request.report.length;
        if length == 0 || length > whole {
            return false;
        }
        if let Some(lane) = self.lane(lane) {
            lane.connection.count_placed(length, 0);
        }
        self.end(id, if length < whole { Status::Truncated } else { Status::Success }, length);
        true
    }

    fn on_pull(&mut self, lane: u32, id: u32, length: u32, ticket: u32) -> bool {
        let Some(request) = self.requests.at(id) else { return false };
        let ours = request.kind == Kind::Send && request.stage == Stage::Under && request.lane == lane;
        // Once for each announcement.
        if !ours || request.want != 0 || length > request.report.length {
            return false;
        }
        let whole = request.report.length;
        if length == 0 {
            self.end(id, if whole > 0 { Status::Truncated } else { Status::Success }, 0);
            return true;
        }
        request.want = length;
        let Some(to) = self.lane(lane) else { return false };
        // No more than there are sends of ours.
        to.streams.push_back(Stream { slot: id, ticket, at: 0, end: length });
        self.pending = true;
        true
    }
}
