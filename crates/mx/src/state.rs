//! What an endpoint is, under its lock: requests, matching, peers.

use std::collections::{HashMap, VecDeque};
use std::os::fd::AsFd;
use std::sync::Arc;

use isthmus_engine::Connection;
use isthmus_proto::mx::Status;
use isthmus_proto::mx::matching::{Matching, Pattern, Posted};
use isthmus_proto::mx::wire::{Large, PeerId, Timing};
use isthmus_proto::spin::{LOCAL, Spin};
use isthmus_sys::poll::Set;
use isthmus_wire::mxoe::Profile;

use crate::buffer::Parts;
use crate::card::Card;
use crate::codes::{Fault, Result, Return};
use crate::lanes::{Greeting, Lane};
use crate::peers::{Address, Path, Peers};
use crate::placing::{Place, Placing};
use crate::requests::{Kind, Report, Request, RequestId, Requests, Stage};

pub(crate) mod unseen;

/// Longest message that is sent without asking whether anybody wants it, bytes.
pub const EAGER_MAX: usize = 32 * 1024;
/// Bytes of messages that nobody has asked for yet, unless the program says otherwise.
const UNEXPECTED_MAX: usize = 64 << 20;
/// Bytes that an unexpected message costs besides its own.
const UNEXPECTED_COST: usize = 128;
/// Sends that the program takes for ended and the peer has not acknowledged, unless the program says otherwise.
pub const BUFFERED_MAX: usize = 512;

/// A message that nobody has posted a receive for.
pub(crate) struct Unexpected {
    pub peer: u32,
    pub matching: u64,
    pub length: u32,
    pub what: Kept,
}

pub(crate) enum Kept {
    /// Its bytes. Over the wire they may still be coming: `whole` says whether they are all here.
    Bytes {
        data: Vec<u8>,
        whole: bool,
    },
    /// It is with its sender, who calls it so.
    OnLane {
        lane: u32,
        id: u32,
        /// Where it lies, if this side may read it there.
        place: Option<Place>,
    },
    OnWire {
        peer: PeerId,
        large: Large,
    },
    /// One of our own sends.
    Own {
        send: u32,
    },
}

pub(crate) struct State {
    pub nic: u64,
    pub endpoint: u8,
    pub session: u32,
    pub key: u32,
    pub requests: Requests,
    /// Ended requests in the order in which they ended; some were asked about since.
    done: VecDeque<RequestId>,
    /// Counts endings.
    pub ended: u64,
    matching: Matching<u32, u32>,
    unexpected: HashMap<u32, Unexpected>,
    unexpected_bytes: usize,
    /// Bytes of messages that nobody has asked for yet; beyond, their senders wait.
    pub unexpected_max: usize,
    last_unexpected: u32,
    unseen: unseen::Unseen,
    /// Messages that come in parts and were asked for meanwhile: by whom.
    pub promised: HashMap<u32, u32>,
    pub peers: Peers,
    /// What the bells of lanes are in.
    pub bells: Option<Arc<Set>>,
    pub lanes: Vec<Option<Lane>>,
    /// Long messages that are being taken from where they lie.
    pub placing: Placing,
    /// Lanes with something to send.
    pub pending: bool,
    /// A message waits for memory, which a receive may set free.
    pub is_stuck: bool,
    pub card: Option<Card>,
    /// Where frames go, also while the card is being worked on.
    pub card_lane: Option<Arc<Connection>>,
    /// Frames for which there was no room.
    pub backlog: VecDeque<Box<[u8]>>,
    /// Which connect the broker refused last, and why.
    pub refused: Option<(RequestId, isthmus_engine::Error)>,
    pub profile: Option<Profile>,
    /// For a record that comes, and one that goes.
    pub scratch: Vec<u8>,
    pub out_scratch: Vec<u8>,
    /// Sends over the wire that the program takes for ended, and how many there may be.
    pub buffered: usize,
    pub buffered_max: usize,
    /// Those of them that never were acknowledged, of which the program is not told otherwise.
    pub lost: u64,
    /// How patient that side is.
    pub timing: Timing,
    /// When what is being done is done, ns.
    pub now: u64,
    /// What callers that sleep were told of.
    pub told: u64,
    /// How long it pays to look before sleeping.
    pub spin: Spin,
}

impl State {
    pub fn new(nic: u64, endpoint: u8, session: u32, key: u32, matching: Matching<u32, u32>) -> Self {
        Self {
            nic,
            endpoint,
            session,
            key,
            requests: Requests::default(),
            done: VecDeque::new(),
            ended: 0,
            matching,
            unexpected: HashMap::new(),
            unexpected_bytes: 0,
            unexpected_max: UNEXPECTED_MAX,
            last_unexpected: 0,
            unseen: unseen::Unseen::default(),
            promised: HashMap::new(),
            peers: Peers::default(),
            bells: None,
            lanes: Vec::new(),
            placing: Placing::default(),
            pending: false,
            is_stuck: false,
            card: None,
            card_lane: None,
            backlog: VecDeque::new(),
            refused: None,
            profile: None,
            scratch: Vec::new(),
            out_scratch: Vec::new(),
            buffered: 0,
            buffered_max: BUFFERED_MAX,
            lost: 0,
            timing: Timing::default(),
            now: 0,
            told: 0,
            spin: Spin::new(LOCAL),
        }
    }

    // ---- requests

    /// A request has ended.
    pub fn end(&mut self, slot: u32, status: Status, transferred: u32) {
        let Some(id) = self.requests.id(slot) else { return };
        let Some(request) = self.requests.at(slot) else { return };
        if request.buffered {
            self.buffered -= 1;
            self.lost += u64::from(status != Status::Success);
            self.requests.remove(slot);
            return;
        }
        if request.stage == Stage::Done {
            return;
        }
        request.stage = Stage::Done;
        request.window = None;
        request.report.status = status;
        request.report.transferred = transferred;
        let (forgotten, own, peer) = (request.forgotten, request.own, request.peer);
        if request.report.source == Address::NONE {
            request.report.source = self.peers.address(peer);
        }
        if forgotten {
            self.requests.remove(slot);
        } else if !own {
            self.done.push_back(id);
        }
        self.ended += 1;
    }

    /// How a request ended, if it has; it is forgotten then.
    ///
    /// # Errors
    /// There is no such request.
    pub fn test(&mut self, id: RequestId) -> Result<Option<Report>> {
        let request = self.requests.get(id).ok_or(Return::BadRequest)?;
        if request.stage != Stage::Done {
            return Ok(None);
        }
        let report = request.report;
        self.requests.remove(id.slot());
        if self.done.front() == Some(&id) {
            self.done.pop_front();
        } else if self.done.back() == Some(&id) {
            self.done.pop_back();
        } else {
            self.done.retain(|one| *one != id);
        }
        Ok(Some(report))
    }

    /// The oldest ended request whose match a pattern takes.
    pub fn oldest(&mut self, pattern: Option<Pattern>) -> Option<RequestId> {
        let takes = |requests: &mut Requests, id: &RequestId| {
            pattern.is_none_or(|pattern| {
                requests.get(*id).is_some_and(|request| pattern.takes(request.report.matching))
            })
        };
        let requests = &mut self.requests;
        self.done.iter().find(|id| takes(requests, id)).copied()
    }

    pub fn post_receive(&mut self, pattern: Pattern, parts: Parts, context: u64) -> Result<RequestId> {
        let length = u32::try_from(parts.len()).map_err(|_| Return::BadSegmentCount)?;
        let request = Request::new(Kind::Receive, parts, u32::MAX, pattern.value, length, context);
        let id = self.requests.add(request);
        use isthmus_proto::mx::matching::BadPattern;
        match self.matching.post(pattern, id.slot()) {
            Ok(Posted::Waits) => {}
            Ok(Posted::Meets(slot, message)) => self.meet(slot, message),
            Err(bad) => {
                self.requests.remove(id.slot());
                return Err(Fault::Code(match bad {
                    BadPattern::OutsideMask => Return::BadMatchMask,
                    BadPattern::OpenContext => Return::BadMatchingForContext,
                }));
            }
        }
        Ok(id)
    }

    /// Take back a receive that nothing has matched, or a connect that has no answer.
    ///
    /// # Errors
    /// It is a send, or none of this endpoint.
    pub fn cancel(&mut self, id: RequestId) -> Result<bool> {
        let request = self.requests.get(id).ok_or(Return::BadRequest)?;
        if request.kind == Kind::Send {
            return Err(Return::CancelNotSupported.into());
        }
        if request.stage != Stage::Waiting {
            return Ok(false);
        }
        if request.kind == Kind::Receive {
            if self.matching.cancel(|slot| *slot == id.slot()).is_none() {
                return Ok(false);
            }
        } else if let Some(card) = &mut self.card {
            card.wire.cancel_connect(id.slot());
        }
        self.requests.remove(id.slot());
        Ok(true)
    }

    /// It ends unseen.
    ///
    /// # Errors
    /// There is no such request.
    pub fn forget(&mut self, id: RequestId) -> Result<()> {
        if self.test(id)?.is_none() {
            if let Some(request) = self.requests.get(id) {
                request.forgotten = true;
            }
        }
        Ok(())
    }

    /// A connect to a station that has no such endpoint.
    pub fn refuse_connect(&mut self, request: Request) -> RequestId {
        let id = self.requests.add(request);
        self.end(id.slot(), Status::BadEndpoint, 0);
        id
    }

    // ---- receiving

    /// The receive that a message is for, begun: from whom, how long. `None`: nobody waits for it.
    pub fn arrive(&mut self, peer: u32, matching: u64, length: u32) -> Option<u32> {
        if self.defers() {
            return None;
        }
        let slot = self.matching.arrive(matching)?;
        self.begin(slot, peer, matching, length);
        Some(slot)
    }

    fn begin(&mut self, slot: u32, peer: u32, matching: u64, length: u32) {
        let source = self.peers.address(peer);
        let Some(request) = self.requests.at(slot) else { return };
        request.stage = Stage::Under;
        request.want = request.report.length.min(length);
        request.report.source = source;
        request.report.matching = matching;
        request.report.length = length;
    }

    /// A receive has all that it will get.
    pub fn end_receive(&mut self, slot: u32, outcome: std::result::Result<u32, Status>) {
        let Some(request) = self.requests.at(slot) else { return };
        let (length, room) = (request.report.length, request.want);
        match outcome {
            Ok(got) if got.min(room) < length => self.end(slot, Status::Truncated, got.min(room)),
            Ok(got) => self.end(slot, Status::Success, got),
            Err(status) => self.end(slot, status, 0),
        }
    }

    /// Is there memory for a message that nobody waits for?
    pub fn has_room(&self, bytes: usize) -> bool {
        // The program's own limit is one of bytes; what has none, or has left them with its sender, is not held back.
        let most = if bytes == 0 { self.unexpected_max.max(UNEXPECTED_MAX) } else { self.unexpected_max };
        self.unexpected_bytes == 0 || self.unexpected_bytes + bytes + UNEXPECTED_COST <= most
    }

    /// Keep a message until somebody asks for it; returns its number.
    pub fn keep(&mut self, message: Unexpected) -> u32 {
        self.last_unexpected = self.last_unexpected.wrapping_add(1) & !WIRE_TICKET;
        let number = self.last_unexpected;
        self.unexpected_bytes += cost(&message);
        if !self.defer(number) {
            self.matching.keep(message.matching, number);
        }
        self.unexpected.insert(number, message);
        // Probes wait for it, or the handler.
        self.ended += 1;
        number
    }

    pub fn kept(&mut self, number: u32) -> Option<&mut Unexpected> {
        self.unexpected.get_mut(&number)
    }

    /// Does a receive wait for such a message?
    pub fn is_awaited(&self, matching: u64) -> bool {
        !self.defers() && self.matching.awaits(matching)
    }

    /// The rest of it does not come.
    pub fn drop_kept(&mut self, number: u32) {
        self.matching.forget(|kept| *kept == number);
        self.take_kept(number);
    }

    fn take_kept(&mut self, number: u32) -> Option<Unexpected> {
        let message = self.unexpected.remove(&number)?;
        self.unexpected_bytes -= cost(&message);
        Some(message)
    }

    /// A receive was posted for a message that was there before.
    fn meet(&mut self, slot: u32, number: u32) {
        let Some(Unexpected { peer, matching, length, .. }) = self.unexpected.get(&number) else { return };
        let (peer, matching, length) = (*peer, *matching, *length);
        self.begin(slot, peer, matching, length);
        if let Some(Unexpected { what: Kept::Bytes { whole: false, .. }, .. }) = self.unexpected.get(&number)
        {
            // The rest of it is coming: it is handed over when it is whole.
            self.promised.insert(number, slot);
            return;
        }
        let Some(message) = self.take_kept(number) else { return };
        match message.what {
            Kept::Bytes { data, .. } => self.hand_over(slot, &data),
            Kept::OnLane { lane, id, place } => self.pull_lane(slot, lane, id, place),
            Kept::OnWire { peer, large } => self.pull_wire(slot, peer, large),
            Kept::Own { send } => self.copy_own(slot, send),
        }
    }

    /// A kept message has all its bytes, and somebody waits for it.
    pub fn hand_over_kept(&mut self, number: u32, slot: u32) {
        if let Some(Unexpected { what: Kept::Bytes { data, .. }, .. }) = self.take_kept(number) {
            self.hand_over(slot, &data);
        }
    }

    pub fn hand_over(&mut self, slot: u32, data: &[u8]) {
        if let Some(request) = self.requests.at(slot) {
            request.parts.copy_in(0, data);
        }
        self.end_receive(slot, Ok(data.len() as u32));
    }

    fn copy_own(&mut self, slot: u32, send: u32) {
        let (Some(receive), Some(from)) =
            (self.requests.remove_parts(slot), self.requests.remove_parts(send))
        else {
            return;
        };
        let want = self.requests.at(slot).map_or(0, |request| request.want);
        receive.copy_from(&from, want as usize);
        self.end_receive(slot, Ok(want));
        let length = self.requests.at(send).map_or(0, |request| request.report.length);
        self.end(send, if want < length { Status::Truncated } else { Status::Success }, want);
    }

    /// The oldest message that nobody has asked for and a pattern takes.
    pub fn probe(&mut self, pattern: Pattern) -> Option<Report> {
        let number = *self.matching.probe(pattern)?;
        let message = self.unexpected.get(&number)?;
        Some(Report {
            status: Status::Success,
            source: self.peers.address(message.peer),
            matching: message.matching,
            length: message.length,
            transferred: message.length,
            context: 0,
        })
    }

    /// What a peer sent and nobody asked for is void.
    pub fn void(&mut self, peer: u32) {
        self.forget_kept(|message| message.peer == peer);
    }

    fn forget_kept(&mut self, is_meant: impl Fn(&Unexpected) -> bool) {
        let unexpected = &self.unexpected;
        let gone = self.matching.forget(|n| unexpected.get(n).is_some_and(&is_meant));
        for number in gone.into_iter().chain(self.forget_unseen(&is_meant)) {
            self.take_kept(number);
        }
    }

    // ---- sending

    /// # Errors
    /// The list is too long for a message, or the address is not of this endpoint's making.
    pub fn send(
        &mut self,
        to: Address,
        parts: Parts,
        matching: u64,
        synchronous: bool,
        context: u64,
    ) -> Result<RequestId> {
        let length = u32::try_from(parts.len()).map_err(|_| Return::BadSegmentCount)?;
        let known = self.peers.find(to).filter(|peer| peer.session == to.session);
        let (path, unknown) = (known.as_ref().map_or(Path::Ended, |peer| peer.path), known.is_none());
        let id = self.requests.add(Request::new(Kind::Send, parts, to.peer, matching, length, context));
        if let Some(request) = self.requests.at(id.slot()) {
            request.report.source = to;
        }
        match path {
            Path::Own => self.send_own(id.slot(), to.peer, matching, length),
            Path::Lane(lane) => self.send_lane(lane, id.slot(), synchronous),
            Path::Wire(peer) => self.send_wire(self.now, peer, id.slot(), synchronous),
            Path::Ended => {
                let status = if unknown { Status::BadSession } else { Status::EndpointClosed };
                self.end(id.slot(), status, 0);
            }
        }
        Ok(id)
    }

    /// Has the program the memory of a send back?
    ///
    /// # Errors
    /// It is no send, or none of this endpoint.
    pub fn is_buffered(&mut self, id: RequestId) -> Result<bool> {
        let request = self.requests.get(id).filter(|request| request.kind == Kind::Send);
        let request = request.ok_or(Return::BadRequest)?;
        let is_own = self.peers.get(request.peer).is_some_and(|peer| peer.path == Path::Own);
        if request.stage != Stage::Done && is_own && request.copied.is_none() {
            let mut data = vec![0; request.report.length as usize].into_boxed_slice();
            request.parts.copy_out(0, &mut data);
            request.parts = Parts::of(&data);
            request.copied = Some(data);
        }
        Ok(request.stage == Stage::Done || is_own)
    }

    fn send_own(&mut self, slot: u32, peer: u32, matching: u64, length: u32) {
        if let Some(receive) = self.arrive(peer, matching, length) {
            return self.copy_own(receive, slot);
        }
        self.keep(Unexpected { peer, matching, length, what: Kept::Own { send: slot } });
    }

    // ---- ends

    /// Is all that was sent and need not be asked for with the peers, or in their lanes? What lies in a window may be
    /// on its way to the peer already.
    pub fn is_flushed(&self) -> bool {
        let lies = |request: &Request| request.stage == Stage::Under && request.window.is_some();
        let none_lies = || !self.requests.slots().any(|(_, request)| lies(request));
        none_lies()
            && self.buffered == 0
            && self.backlog.is_empty()
            && self.lanes.iter().flatten().all(Lane::is_idle)
    }

    /// A lane has ended: what was under way over it ends too, and what was only announced over it. What has arrived
    /// stays.
    pub fn end_lane(&mut self, lane: u32, status: Status) {
        let Some(mut gone) = self.lanes.get_mut(lane as usize).and_then(Option::take) else { return };
        self.hear_no_more(&gone.connection);
        gone.connection.close();
        self.peers.end_lane(lane);
        self.placing.end_lane(lane);
        for connect in gone.asked() {
            if self.requests.get(connect).is_some() {
                self.end(connect.slot(), status, 0);
            }
        }
        self.forget_kept(|message| matches!(message.what, Kept::OnLane { lane: its, .. } if its == lane));
        let peers = &mut self.peers;
        let hit: Vec<u32> = self
            .requests
            .slots()
            .filter(|(_, request)| {
                request.stage != Stage::Done && request.lane == lane
                    || (request.kind == Kind::Send
                        && request.stage != Stage::Done
                        && request.lane == u32::MAX
                        && peers.get(request.peer).is_some_and(|peer| peer.path == Path::Ended))
            })
            .map(|(slot, _)| slot)
            .collect();
        for slot in hit {
            self.end(slot, status, 0);
        }
    }

    /// Closing it is not enough: a fork of this process has its bell too.
    pub fn hear_no_more(&self, connection: &Connection) {
        if let Some(bells) = &self.bells {
            let _ = bells.remove(connection.bell().as_fd());
        }
    }

    /// All lanes of a peer: both sides may have made one.
    pub fn end_lanes_of(&mut self, peer: u32, status: Status) {
        for lane in 0..self.lanes.len() as u32 {
            let its = self.lanes.get(lane as usize).and_then(Option::as_ref).map(|lane| lane.greeting);
            if its == Some(Greeting::Done { peer }) {
                self.end_lane(lane, status);
            }
        }
    }

    /// Forget a peer: what is under way with it ends.
    ///
    /// # Errors
    /// The address is not of this endpoint's making, or its own.
    pub fn disconnect(&mut self, address: Address) -> Result<()> {
        let peer = self.peers.find(address).ok_or(Return::BadEndpoint)?;
        match peer.path {
            Path::Own => return Err(Return::BadEndpoint.into()),
            Path::Wire(id) => self.disconnect_wire(id),
            Path::Lane(_) | Path::Ended => {}
        }
        self.end_lanes_of(address.peer, Status::EndpointUnreachable);
        self.void(address.peer);
        self.peers.forget(address.peer);
        Ok(())
    }
}

/// In tickets of the wire: of a message that is kept, not of a request.
pub(crate) const WIRE_TICKET: u32 = 1 << 31;

fn cost(message: &Unexpected) -> usize {
    // Not the data's own length: that may be with the handler.
    let bytes = if let Kept::Bytes { .. } = &message.what { message.length as usize } else { 0 };
    bytes + UNEXPECTED_COST
}
