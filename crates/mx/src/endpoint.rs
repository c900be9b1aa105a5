//! What a program calls.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use isthmus_engine::listener::Terms;
use isthmus_engine::node::{Attachment, ConnectRequest, PARTNER_ANYBODY};
use isthmus_engine::{Error, How, Wait, lane};
use isthmus_proto::mx::Status;
use isthmus_proto::mx::matching::{Contexts, Matching, Pattern};
use isthmus_proto::mx::wire::Timing;
use isthmus_wire::control::{Refusal, SocketKind};
use isthmus_wire::mx_lane::PORT;

use crate::buffer::Parts;
use crate::codes::{Result, Return};
use crate::peers::{Address, Path};
use crate::progress::{Event, Shared};
use crate::requests::{Kind, Report, Request, RequestId};
use crate::state::unseen::Handler;
use crate::state::{BUFFERED_MAX, State};

/// Endpoints of one domain are numbered below this.
pub const ENDPOINTS: u8 = 64;
/// Peers that may wait to be taken in.
const BACKLOG: u32 = 256;
/// The broker answers within this.
const ANSWER: Duration = Duration::from_secs(5);
/// A close waits so long for what was sent to be with the peers.
const LINGER: Duration = Duration::from_secs(2);

/// How an endpoint is opened.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// `None`: the lowest that is free.
    pub endpoint: Option<u8>,
    /// What others must know to connect. No secret: it tells programs apart.
    pub key: u32,
    pub contexts: Contexts,
    /// Use the card, if there is one: else only peers of this node can be reached.
    pub wire: bool,
    /// How patient the card's side is with other nodes.
    pub timing: Timing,
    /// Sends to other nodes that have ended for the program and are not acknowledged, at most.
    pub buffered_max: usize,
    /// Bytes of messages that wait for a receive; beyond, their senders wait. `None`: the usual.
    pub unexpected_max: Option<usize>,
    /// Ring sizes of the lanes to each peer, bytes.
    pub small: u32,
    pub large: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            endpoint: None,
            key: 0,
            contexts: Contexts::default(),
            wire: true,
            timing: Timing::default(),
            buffered_max: BUFFERED_MAX,
            unexpected_max: None,
            small: lane::SMALL_DEFAULT,
            large: lane::LARGE_DEFAULT,
        }
    }
}

/// One open endpoint. It makes progress by itself; every call may be made from any thread.
pub struct Endpoint {
    shared: Arc<Shared>,
    pub nic: u64,
    pub id: u8,
}

fn at_most(time: Duration) -> How<'static> {
    How { deadline: Some(Instant::now() + time), ..How::default() }
}

/// `None` is for ever.
fn in_ns(time: Option<Duration>) -> u64 {
    time.map_or(u64::MAX, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX))
}

fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

impl Endpoint {
    /// Open an endpoint of this program's domain.
    ///
    /// # Errors
    /// [`Return::Busy`]: somebody has that number, or all are taken. [`Return::BadEndpoint`]: there is no such number.
    /// [`Return::NoDevice`]: no broker answers.
    pub fn open(attachment: &Arc<Attachment>, options: Options) -> Result<Self> {
        let node = Arc::clone(attachment);
        let nic = node.find_nic(0, "", &at_most(ANSWER))?.nic;
        let wanted = options.endpoint.map_or(0..ENDPOINTS, |id| id..id.saturating_add(1));
        if wanted.end > ENDPOINTS {
            return Err(Return::BadEndpoint.into());
        }
        let mut found = None;
        for id in wanted {
            let terms = Terms {
                port: PORT + u32::from(id),
                partner: PARTNER_ANYBODY,
                kind: SocketKind::Seqpacket,
                backlog: BACKLOG,
                small: options.small,
                large: options.large,
            };
            match node.listen(terms, &at_most(ANSWER)) {
                Ok(listener) => {
                    found = Some((id, listener));
                    break;
                }
                Err(Error::Refused { refusal: Refusal::PortInUse, .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let (id, listener) = found.ok_or(Return::Busy)?;
        // 0 and all ones mean other things to other stations.
        let session = (random() as u32).clamp(1, u32::MAX - 1);
        let matching = Matching::new(options.contexts);
        let mut state = State::new(nic, id, session, options.key, matching);
        state.peers.meet(nic, id, session, Path::Own);
        state.timing = options.timing;
        state.buffered_max = options.buffered_max;
        state.unexpected_max = options.unexpected_max.unwrap_or(state.unexpected_max);
        let shared = Shared::start(attachment, state, listener, &options)?;
        let endpoint = Self { shared, nic, id };
        if options.wire {
            // Without a card there are the peers of this node.
            endpoint.shared.seek_card();
        }
        Ok(endpoint)
    }

    /// Is it open, and this the process that opened it?
    ///
    /// # Errors
    /// [`Return::BadEndpoint`]: it was closed. [`Error::Forked`].
    pub fn check(&self) -> Result<()> {
        if !self.shared.is_ours() {
            return Err(Error::Forked.into());
        }
        if self.shared.closing.load(Ordering::Acquire) {
            return Err(Return::BadEndpoint.into());
        }
        Ok(())
    }

    /// As [`Endpoint::check`]; what was asked of one that is closed now never ends.
    fn check_process(&self) -> Result<()> {
        if self.shared.is_ours() { Ok(()) } else { Err(Error::Forked.into()) }
    }

    /// Is there a way to other nodes?
    #[must_use]
    pub fn has_card(&self) -> bool {
        self.shared.lock().card_lane.is_some()
    }

    /// Sends to other nodes that had ended, because their bytes were copied, and were never acknowledged.
    #[must_use]
    pub fn lost(&self) -> u64 {
        if self.shared.is_ours() { self.shared.lock().lost } else { 0 }
    }

    /// This endpoint, as a peer of itself.
    #[must_use]
    pub fn address(&self) -> Address {
        if self.shared.is_ours() { self.shared.lock().peers.address(0) } else { Address::NONE }
    }

    /// The card, the endpoint and the session of an address.
    #[must_use]
    pub fn decompose(&self, address: Address) -> Option<(u64, u8, u32)> {
        if !self.shared.is_ours() {
            return None;
        }
        let mut state = self.shared.lock();
        let peer = state.peers.find(address)?;
        Some((peer.nic, peer.endpoint, address.session))
    }

    /// The program's own word for a peer; 0 before it was set.
    #[must_use]
    pub fn peer_context(&self, address: Address) -> Option<u64> {
        if !self.shared.is_ours() {
            return None;
        }
        self.shared.lock().peers.find(address).map(|peer| peer.context)
    }

    /// # Errors
    /// [`Return::BadEndpoint`]: no such peer.
    pub fn set_peer_context(&self, address: Address, context: u64) -> Result<()> {
        self.check()?;
        let mut state = self.shared.lock();
        state.peers.find(address).ok_or(Return::BadEndpoint)?.context = context;
        Ok(())
    }

    // ---- connecting

    /// Begin to connect to an endpoint of a card. The request's report carries the address.
    ///
    /// # Errors
    /// [`Return::NicNotFound`]: no domain of this node has such a card, and there is no way to others.
    pub fn iconnect(
        &self,
        nic: u64,
        endpoint: u32,
        key: u32,
        matching: u64,
        context: u64,
    ) -> Result<RequestId> {
        let request = Request::new(Kind::Connect, Parts::empty(), u32::MAX, matching, 0, context);
        self.begin_connect(request, nic, endpoint, key)
    }

    fn begin_connect(&self, request: Request, nic: u64, endpoint: u32, key: u32) -> Result<RequestId> {
        self.check()?;
        let Ok(endpoint) = u8::try_from(endpoint) else { return self.connect_nobody(request, nic) };
        let mut state = self.shared.lock();
        let known = state.peers.at(nic, endpoint);
        let path = known.and_then(|peer| state.peers.get(peer)).map(|peer| peer.path);
        match path {
            Some(Path::Own) => {
                let id = state.requests.add(request);
                if key == state.key {
                    state.connected(id.slot(), 0);
                } else {
                    state.end(id.slot(), Status::BadKey, 0);
                }
                self.shared.after(&mut state);
                return Ok(id);
            }
            Some(Path::Lane(lane)) => {
                let id = state.requests.add(request);
                state.greet(lane, key, id);
                return Ok(id);
            }
            Some(Path::Wire(_)) => return self.connect_wire(state, request, (nic, endpoint), key),
            Some(Path::Ended) | None => {}
        }
        drop(state);
        match self.shared.attachment.find_nic(nic, "", &at_most(ANSWER)) {
            Ok(found) => {
                let mut state = self.shared.lock();
                if endpoint >= ENDPOINTS {
                    return Ok(self.refuse_connect(state, request));
                }
                let id = state.requests.add(request);
                drop(state);
                self.open_lane(id, found.name, (nic, endpoint), key);
                Ok(id)
            }
            Err(Error::Refused { refusal: Refusal::UnknownDomain, .. }) => {
                self.connect_wire(self.shared.lock(), request, (nic, endpoint), key)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// To an endpoint of a number that no station has.
    fn connect_nobody(&self, request: Request, nic: u64) -> Result<RequestId> {
        if !self.has_card() {
            self.shared.attachment.find_nic(nic, "", &at_most(ANSWER))?;
        }
        Ok(self.refuse_connect(self.shared.lock(), request))
    }

    fn refuse_connect(&self, mut state: std::sync::MutexGuard<'_, State>, request: Request) -> RequestId {
        let id = state.refuse_connect(request);
        self.shared.after(&mut state);
        id
    }

    fn connect_wire(
        &self,
        mut state: std::sync::MutexGuard<'_, State>,
        request: Request,
        (nic, endpoint): (u64, u8),
        key: u32,
    ) -> Result<RequestId> {
        let id = state.requests.add(request);
        if state.connect_wire(isthmus_sys::clock::now_ns(), nic, endpoint, key, id.slot()) {
            return Ok(id);
        }
        state.requests.remove(id.slot());
        Err(Return::NicNotFound.into())
    }

    fn open_lane(&self, id: RequestId, domain: String, (nic, endpoint): (u64, u8), key: u32) {
        let (small, large) = self.shared.rings;
        let request = ConnectRequest {
            to: domain,
            port: PORT + u32::from(endpoint),
            from_port: 0,
            kind: SocketKind::Seqpacket,
            require: None,
            small,
            large,
        };
        let shared = Arc::downgrade(&self.shared);
        let then = move |opened: isthmus_engine::Result<_>| {
            let Some(shared) = shared.upgrade() else { return };
            if let Ok(connection) = &opened {
                let connection: &Arc<isthmus_engine::Connection> = connection;
                connection.claim();
            }
            shared.tell(Event::Opened { id, nic, endpoint, key, opened });
        };
        self.shared.attachment.connect_then(request, Box::new(then));
    }

    /// Connect, and wait for the answer: until the deadline, or for as long as the endpoint has patience if there is none.
    ///
    /// # Errors
    /// [`Return::BadConnectionKey`], [`Return::BadEndpointId`], [`Return::ConnectionFailed`] (nobody has it open),
    /// [`Return::Timeout`], or as [`Endpoint::iconnect`].
    pub fn connect(&self, nic: u64, endpoint: u32, key: u32, how: &How<'_>) -> Result<Address> {
        let mut request = Request::new(Kind::Connect, Parts::empty(), u32::MAX, 0, 0, 0);
        request.own = true;
        let id = self.begin_connect(request, nic, endpoint, key)?;
        if how.deadline.is_some() {
            self.set_patience_of(id, None)?;
        }
        let Some(report) = self.wait(id, how)? else {
            if !self.cancel(id)? {
                self.forget(id)?;
            }
            return Err(Return::Timeout.into());
        };
        match report.status {
            Status::Success => Ok(report.source),
            Status::BadKey => Err(Return::BadConnectionKey.into()),
            Status::BadEndpoint => Err(Return::BadEndpointId.into()),
            Status::EndpointClosed => Err(Return::ConnectionFailed.into()),
            Status::EndpointUnreachable => {
                let refused = self.shared.lock().refused.take_if(|(its, _)| *its == id);
                Err(refused.map_or(Return::Timeout.into(), |(_, error)| error.into()))
            }
            _ => Err(Return::Timeout.into()),
        }
    }

    /// Forget a peer: whatever is under way with it ends, its address is none any more. It is not told.
    ///
    /// # Errors
    /// [`Return::BadEndpoint`]: no such peer, or this endpoint itself.
    pub fn disconnect(&self, address: Address) -> Result<()> {
        self.check()?;
        let mut state = self.shared.lock();
        let done = state.disconnect(address);
        self.shared.after(&mut state);
        done
    }

    // ---- messages

    /// Send a message. `synchronous`: it ends when the receiver has matched it.
    ///
    /// # Safety
    /// The pieces must be readable until the request has ended, or the endpoint is closed.
    ///
    /// # Errors
    /// [`Return::BadSegmentCount`]: more than 4 GiB.
    pub unsafe fn isend(
        &self,
        to: Address,
        parts: Parts,
        matching: u64,
        synchronous: bool,
        context: u64,
    ) -> Result<RequestId> {
        self.check()?;
        let mut state = self.shared.lock();
        if state.card.is_some() {
            state.now = isthmus_sys::clock::now_ns();
        }
        let id = state.send(to, parts, matching, synchronous, context)?;
        self.shared.after(&mut state);
        drop(self.shared.show(state));
        Ok(id)
    }

    /// Post a receive.
    ///
    /// # Safety
    /// The pieces must be writable, and apart from all others, until the request has ended, or the endpoint is closed.
    ///
    /// # Errors
    /// [`Return::BadMatchMask`], [`Return::BadMatchingForContext`], [`Return::BadSegmentCount`].
    pub unsafe fn irecv(&self, pattern: Pattern, parts: Parts, context: u64) -> Result<RequestId> {
        self.check()?;
        let mut state = self.shared.lock();
        let id = state.post_receive(pattern, parts, context)?;
        self.shared.after(&mut state);
        drop(self.shared.show(state));
        Ok(id)
    }

    /// Has it ended? If so it is forgotten.
    ///
    /// # Errors
    /// [`Return::BadRequest`].
    pub fn test(&self, id: RequestId) -> Result<Option<Report>> {
        self.check_process()?;
        self.shared.look(|state| state.test(id).transpose()).transpose()
    }

    /// Wait until it has ended; it is forgotten then. `None`: the time is over, or [`Endpoint::wake_up`] was called.
    ///
    /// # Errors
    /// [`Return::BadRequest`].
    pub fn wait(&self, id: RequestId, how: &How<'_>) -> Result<Option<Report>> {
        self.check_process()?;
        self.shared.wait(how, |state| state.test(id).transpose())?.transpose()
    }

    /// The oldest ended request whose match the pattern takes.
    ///
    /// # Errors
    /// [`Return::BadMatchMask`].
    pub fn test_any(&self, pattern: Pattern) -> Result<Option<(RequestId, Report)>> {
        self.check_process()?;
        check(pattern)?;
        Ok(self.shared.look(|state| any(state, pattern)))
    }

    /// As [`Endpoint::test_any`], waiting.
    ///
    /// # Errors
    /// [`Return::BadMatchMask`].
    pub fn wait_any(&self, pattern: Pattern, how: &How<'_>) -> Result<Option<(RequestId, Report)>> {
        self.check_process()?;
        check(pattern)?;
        Ok(self.shared.wait(how, |state| any(state, pattern))?)
    }

    /// Which request ended first of those nobody has asked about? It stays.
    ///
    /// # Errors
    /// None, but for signals.
    pub fn peek(&self, how: &How<'_>) -> Result<Option<RequestId>> {
        self.check_process()?;
        Ok(self.shared.wait(how, |state| state.oldest(None))?)
    }

    /// The oldest message that nobody has posted a receive for and that the pattern takes. It stays.
    ///
    /// # Errors
    /// [`Return::BadMatchMask`].
    pub fn probe(&self, pattern: Pattern, how: &How<'_>) -> Result<Option<Report>> {
        self.check_process()?;
        check(pattern)?;
        Ok(self.shared.wait(how, |state| state.probe(pattern))?)
    }

    /// Take back a receive that nothing has matched, or a connect without answer. `false`: too late, it will end.
    ///
    /// # Errors
    /// [`Return::CancelNotSupported`]: a send. [`Return::BadRequest`].
    pub fn cancel(&self, id: RequestId) -> Result<bool> {
        self.check_process()?;
        let mut state = self.shared.lock();
        self.shared.progress(&mut state);
        self.shared.show(state).cancel(id)
    }

    /// Has the program the memory of a send back? A send to this endpoint itself is copied for that.
    ///
    /// # Errors
    /// [`Return::BadRequest`]: it is no send.
    pub fn is_buffered(&self, id: RequestId, how: &How<'_>) -> Result<bool> {
        self.check_process()?;
        let ask = |state: &mut State| match state.is_buffered(id) {
            Ok(false) => None,
            other => Some(other),
        };
        self.shared.wait(how, ask)?.unwrap_or(Ok(false))
    }

    /// Let it end unseen.
    ///
    /// # Errors
    /// [`Return::BadRequest`].
    pub fn forget(&self, id: RequestId) -> Result<()> {
        self.check_process()?;
        self.shared.lock().forget(id)
    }

    /// Has it not been asked about yet, or not ended?
    #[must_use]
    pub fn is_live(&self, id: RequestId) -> bool {
        self.shared.is_ours() && self.shared.lock().requests.get(id).is_some()
    }

    /// A descriptor that is readable when requests have ended since [`Endpoint::lower`]: for event loops.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        self.shared.ended.as_fd().as_raw_fd()
    }

    /// From now on [`Endpoint::fd`] tells of what ends later.
    pub fn lower(&self) {
        self.shared.lower();
    }

    /// The context with which a request was posted.
    ///
    /// # Errors
    /// [`Return::BadRequest`].
    pub fn context(&self, id: RequestId) -> Result<u64> {
        self.check_process()?;
        let mut state = self.shared.lock();
        Ok(state.requests.get(id).ok_or(Return::BadRequest)?.report.context)
    }

    /// Have a handler see the messages that no receive waits for, before they wait themselves. It is called inside of the
    /// program's own calls.
    pub fn set_handler(&self, handler: Option<Handler>) {
        if self.shared.is_ours() {
            self.shared.set_handler(handler);
        }
    }

    /// Is the caller in the handler? Nothing moves for it, and what waits returns at once.
    #[must_use]
    pub fn is_in_handler(&self) -> bool {
        self.shared.is_ours() && self.shared.lock().is_handled_here()
    }

    /// Take what has come, send what waits.
    pub fn progress(&self) {
        if self.shared.is_ours() {
            self.shared.look(|_| None::<()>);
        }
    }

    /// Nothing moves until [`Endpoint::resume`]. Returns once no handler runs, unless called by one.
    pub fn pause(&self) {
        if self.shared.is_ours() {
            self.shared.pause();
        }
    }

    /// Go on.
    pub fn resume(&self) {
        if self.shared.is_ours() {
            self.shared.resume();
        }
    }

    /// Give peers of other nodes up that do not answer what is asked for from now on for so long; `None`: never. Peers of
    /// this node need no such limit: nothing gets lost on the way to them, and when they end is heard.
    pub fn set_patience(&self, patience: Option<Duration>) {
        if !self.shared.is_ours() {
            return;
        }
        let ns = in_ns(patience);
        let mut state = self.shared.lock();
        state.timing.patience = ns;
        if let Some(card) = &mut state.card {
            card.wire.set_patience(ns);
        }
    }

    /// The same for one request, counted from when it was asked for; of a receive, while its message is fetched.
    ///
    /// # Errors
    /// [`Return::BadRequest`].
    pub fn set_patience_of(&self, id: RequestId, patience: Option<Duration>) -> Result<()> {
        self.check_process()?;
        Ok(self.shared.lock().set_patience_of(id, in_ns(patience))?)
    }

    /// Let everybody go who waits now.
    pub fn wake_up(&self) {
        if self.shared.is_ours() {
            self.shared.wake_up();
        }
    }

    /// Give the endpoint back. Requests that have not ended never will, and their memory is not touched any more. What was
    /// sent goes out first, for at most two seconds.
    pub fn close(&self) {
        if !self.shared.is_ours() {
            return;
        }
        self.shared.set_handler(None);
        self.shared.pause();
        self.shared.resume();
        let linger = How { deadline: Some(Instant::now() + LINGER), wait: Wait::Block, ..How::default() };
        let all_sent = |state: &mut State| state.is_flushed().then_some(());
        if !self.shared.closing.load(Ordering::Acquire) {
            let _ = self.shared.wait(&linger, all_sent);
        }
        self.shared.close();
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if !self.shared.is_ours() {
            // Its thread is not there, and its locks may be held for ever.
            std::mem::forget(Arc::clone(&self.shared));
        }
        self.close();
    }
}

fn check(pattern: Pattern) -> Result<()> {
    if pattern.value & !pattern.mask == 0 { Ok(()) } else { Err(Return::BadMatchMask.into()) }
}

fn any(state: &mut State, pattern: Pattern) -> Option<(RequestId, Report)> {
    let id = state.oldest(Some(pattern))?;
    Some((id, state.test(id).ok().flatten()?))
}
