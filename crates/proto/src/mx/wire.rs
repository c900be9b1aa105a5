//! Messages over frames that get lost, doubled and overtaken: one endpoint's side of MX over Ethernet.
//!
//! The machine orders, acknowledges, sends again, and serves pulls. It holds no message and decides no match: for both it
//! asks [`Above`]. Facts: docs/formats/mxoe.md.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use isthmus_wire::mxoe::{
    self, BAD_SESSION, BAD_WINDOW, CONNECTED, Cookie, Ends, Frame, INDEX_UNKNOWN, Message, Profile,
    SMALL_MAX, TINY_MAX, Window,
};

use super::Status;
pub use super::limits::{Limits, Timing};
use super::peer::{Connecting, Early, Outgoing, Partial, Peer, Turn, What};
use super::pull::{Ended, Jobs, Pulls};
use super::sequence::Sequence;

mod receive;
#[cfg(test)]
mod tests;
mod windows;

use windows::Sending;

/// Messages of a peer of which some parts are missing, and those behind them.
const PARTS_MAX: u16 = 1 << 12;
/// Windows of an endpoint: their number is a byte.
const WINDOWS: usize = 256;
/// The first use of a window.
const WINDOW_FIRST: u8 = 23;
/// Longest data of a message's own frame: no profile has longer fragments.
const DATA_MAX: usize = 9216;
/// Bytes that are kept of messages that came before their turn, from all peers.
const EARLY_ALL: usize = 64 << 20;
/// Peers of one endpoint.
const PEERS_MAX: usize = 1 << 14;

/// One endpoint, as it is opened.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub profile: Profile,
    pub timing: Timing,
    pub limits: Limits,
    pub endpoint: u8,
    /// Random: tells this endpoint from those that had its number before.
    pub session: u32,
    /// What others must know to connect.
    pub key: u32,
}

/// The peer of a message. Its number is used again after [`Wire::disconnect`].
pub type PeerId = u32;

/// What a program waits for, by the number that it gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pending {
    Send(u32),
    Connect(u32),
    /// Of a large message: the ticket.
    Pull(u32),
}

/// A large message that waits to be pulled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Large {
    pub(crate) window: Window,
    pub length: u32,
}

/// A message whose turn it is.
#[derive(Debug)]
pub struct Arrival<'a> {
    pub peer: PeerId,
    /// The peer's card and endpoint, and its session.
    pub address: (u64, u8),
    pub session: u32,
    pub matching: u64,
    pub length: u32,
    pub body: Body<'a>,
}

#[derive(Debug)]
pub enum Body<'a> {
    /// All of it.
    Whole(&'a [u8]),
    /// It comes in parts, under the ticket of the [`Verdict`].
    Parts,
    /// It is to be pulled: now, or later with [`Wire::pull`].
    Large(Large),
}

/// What becomes of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is no memory for it. It will come again.
    Later,
    /// It was taken, or kept to be pulled some time.
    Kept,
    /// Its bytes are to be placed under this ticket; of a large message so many.
    Take { ticket: u32, length: u32 },
}

/// What a reply to a pull says besides its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    pub frame: u8,
    pub offset: u32,
    pub cookie: Cookie,
}

/// Who holds the memory and decides what matches. Called in the order in which things are to happen; none of these may
/// call the machine.
pub trait Above {
    /// How many frames can be sent at once.
    fn room(&self) -> usize;
    fn transmit(&mut self, to: u64, frame: &Frame<'_>);
    /// As [`Above::transmit`] of a [`Frame::PullReply`] whose data are `len` bytes of a send from `at` on.
    fn transmit_reply(&mut self, to: u64, reply: Reply, send: u32, at: u32, len: u32) {
        let mut data = alloc::vec![0; len as usize];
        self.gather(send, at, &mut data);
        let Reply { frame, offset, cookie } = reply;
        self.transmit(to, &Frame::PullReply { frame, offset, cookie, data: &data });
    }
    /// Bytes of a send, from `at` on.
    fn gather(&mut self, send: u32, at: u32, into: &mut [u8]);
    fn arrive(&mut self, arrival: Arrival<'_>) -> Verdict;
    /// How long a large message under this ticket may keep silent while it is pulled, ns. `None`: as long as any.
    fn patience(&mut self, ticket: u32) -> Option<u64>;
    fn place(&mut self, ticket: u32, at: u32, data: &[u8]);
    /// All of a ticket was placed, so many bytes; or no more will be.
    fn placed(&mut self, ticket: u32, outcome: Result<u32, Status>);
    /// A send has ended: the peer took so many bytes of it.
    fn sent(&mut self, send: u32, outcome: Result<u32, Status>);
    fn connected(&mut self, connect: u32, outcome: Result<(PeerId, (u64, u8), u32), Status>);
    /// What this peer sent and nobody took is void: it is another now, or gone.
    fn void(&mut self, peer: PeerId);
}

pub struct Wire {
    config: Config,
    peers: Vec<Option<Peer>>,
    by_address: BTreeMap<(u64, u8), PeerId>,
    /// What is expected first of peers that were forgotten, if they come again: nothing of what they were sent for.
    forgotten: BTreeMap<(u64, u8), Sequence>,
    windows: Vec<Option<Sending>>,
    /// Of each window: which use of it this is.
    uses: Vec<u8>,
    pulls: Pulls,
    jobs: Jobs,
    /// Of a frame that is being made.
    scratch: Vec<u8>,
    /// Of connects and of acknowledgements, whoever they are for: no answer is taken for another's.
    connect_number: u8,
    acks_sent: u32,
    /// Peers whose sends wait for room or for acknowledgements.
    stalled: bool,
    /// Nothing is to be done before.
    due: u64,
}

impl Wire {
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            pulls: Pulls::new(config.endpoint, &config.profile, &config.limits),
            config,
            peers: Vec::new(),
            by_address: BTreeMap::new(),
            forgotten: BTreeMap::new(),
            windows: (0..WINDOWS).map(|_| None).collect(),
            uses: alloc::vec![WINDOW_FIRST; WINDOWS],
            jobs: Jobs::default(),
            scratch: alloc::vec![0; DATA_MAX],
            connect_number: 0,
            acks_sent: 0,
            stalled: false,
            due: u64::MAX,
        }
    }

    /// Longest message that is sent without being pulled.
    #[must_use]
    pub fn eager_max(&self) -> u32 {
        let Profile { fragment, fragments, .. } = self.config.profile;
        (u32::from(fragment) * u32::from(fragments)).min(u16::MAX.into())
    }

    /// What is asked for from now on has so much patience, ns.
    pub fn set_patience(&mut self, ns: u64) {
        self.config.timing.patience = ns;
    }

    /// This has so much patience, ns, counted from when it was asked for. Nothing happens if it has ended.
    pub fn set_patience_of(&mut self, pending: Pending, ns: u64) {
        let mut peers = self.peers.iter_mut().flatten();
        match pending {
            Pending::Send(send) => {
                let its = peers.flat_map(Peer::outgoing).filter(|one| one.send == Some(send));
                its.for_each(|one| one.patience = ns);
                let its = self.windows.iter_mut().flatten().filter(|sending| sending.send == send);
                its.for_each(|sending| sending.patience = ns);
            }
            Pending::Connect(connect) => {
                let its = peers.find_map(|peer| peer.connects.iter_mut().find(|one| one.connect == connect));
                its.into_iter().for_each(|one| one.patience = ns);
            }
            Pending::Pull(ticket) => self.pulls.set_patience(ticket, ns),
        }
    }

    /// Frames may have been lost that nobody has missed yet, and there is a way again: everything goes out again.
    pub fn resume(&mut self, now: u64) {
        for peer in self.peers.iter_mut().flatten() {
            peer.unacked.iter_mut().for_each(|one| (one.due, one.wait) = (now, 0));
            peer.connects.iter_mut().for_each(|one| (one.due, one.wait) = (now, 0));
        }
        self.pulls.ask_again(now);
        self.wake_at(now);
    }

    /// Longest message that comes in fragments, whoever sends it: others may have another limit than ours.
    fn medium_max(&self) -> u32 {
        let Profile { dialect, fragment, fragments, .. } = self.config.profile;
        match dialect {
            mxoe::Dialect::Wire => u16::MAX.into(),
            mxoe::Dialect::Own => u32::from(fragment) * u32::from(fragments),
        }
    }

    /// The card and the endpoint of a peer.
    #[must_use]
    pub fn address(&self, peer: PeerId) -> Option<(u64, u8)> {
        self.peer(peer).map(|peer| (peer.nic, peer.endpoint))
    }

    /// The session that messages to a peer carry, if they can be sent.
    #[must_use]
    pub fn session(&self, peer: PeerId) -> Option<u32> {
        self.peer(peer)?.session
    }

    /// When [`Wire::tick`] has something to do, on the clock of the calls.
    #[must_use]
    pub fn due(&self) -> u64 {
        self.due
    }

    fn peer(&self, peer: PeerId) -> Option<&Peer> {
        self.peers.get(peer as usize)?.as_ref()
    }

    fn peer_mut(&mut self, peer: PeerId) -> Option<&mut Peer> {
        self.peers.get_mut(peer as usize)?.as_mut()
    }

    /// The peer of this address, known from now on. `None`: there are too many.
    fn peer_at(&mut self, nic: u64, endpoint: u8) -> Option<PeerId> {
        if let Some(peer) = self.by_address.get(&(nic, endpoint)) {
            return Some(*peer);
        }
        if self.by_address.len() >= PEERS_MAX {
            return None;
        }
        // Any value but 0: peers take that for nothing yet.
        let first = Sequence::from_bits((self.config.session >> 16 ^ self.config.session) as u16 | 1);
        let start = self.forgotten.remove(&(nic, endpoint)).unwrap_or(first);
        let peer = Some(Peer::new(nic, endpoint, start));
        let at = self.peers.iter().position(Option::is_none).unwrap_or(self.peers.len());
        match self.peers.get_mut(at) {
            Some(free) => *free = peer,
            None => self.peers.push(peer),
        }
        self.by_address.insert((nic, endpoint), at as PeerId);
        Some(at as PeerId)
    }

    fn wake_at(&mut self, when: u64) {
        self.due = self.due.min(when);
    }

    // ---- what the program wants

    /// Connect; [`Above::connected`] says how it ended. `false`: there are too many peers.
    pub fn connect(
        &mut self,
        now: u64,
        (nic, endpoint): (u64, u8),
        key: u32,
        connect: u32,
        above: &mut impl Above,
    ) -> bool {
        let patience = self.config.timing.patience;
        let Some(id) = self.peer_at(nic, endpoint) else { return false };
        let number = self.connect_number;
        self.connect_number = number.wrapping_add(1);
        let Some(peer) = self.peer_mut(id) else { return false };
        let expects = peer.next_match;
        let (due, wait, times, silence) = (now, 0, 0, 0);
        peer.connects.push_back(Connecting {
            connect,
            key,
            number,
            due,
            wait,
            times,
            patience,
            silence,
            expects,
        });
        self.wake_at(now);
        self.tick(now, above);
        true
    }

    /// `false`: it was answered already.
    pub fn cancel_connect(&mut self, connect: u32) -> bool {
        self.peers.iter_mut().flatten().any(|peer| {
            let before = peer.connects.len();
            peer.connects.retain(|one| one.connect != connect);
            peer.connects.len() < before
        })
    }

    /// Send a message; `large` ones are pulled. [`Above::sent`] says when it has ended; until then [`Above::gather`] must
    /// give its bytes.
    ///
    /// # Errors
    /// The peer was never connected, or is gone.
    pub fn send(
        &mut self,
        now: u64,
        peer: PeerId,
        (send, matching, length): (u32, u64, u32),
        large: bool,
        above: &mut impl Above,
    ) -> Result<(), Status> {
        let large = large || length > self.eager_max();
        let patience = self.config.timing.patience;
        let to = self.peer_mut(peer).filter(|peer| peer.session.is_some()).ok_or(Status::BadSession)?;
        // A window is chosen when its turn comes.
        let what = if large { What::Rendezvous { window: 0 } } else { What::Eager };
        to.enqueue(now, Outgoing::new(what, Some(send), matching, length), patience);
        self.pump(now, peer, above);
        Ok(())
    }

    /// Fetch a large message that was kept: so many of its bytes, to be placed under `ticket`.
    pub fn pull(
        &mut self,
        now: u64,
        peer: PeerId,
        large: Large,
        (ticket, length): (u32, u32),
        above: &mut impl Above,
    ) {
        self.start_pull(now, peer, large, ticket, length, above);
        self.tick(now, above);
    }

    fn start_pull(
        &mut self,
        now: u64,
        peer: PeerId,
        large: Large,
        ticket: u32,
        length: u32,
        above: &mut impl Above,
    ) {
        let length = length.min(large.length);
        if length > 0 {
            let patience = above.patience(ticket).unwrap_or(self.config.timing.patience);
            self.pulls.start(peer, ticket, large.window, length, patience, now);
            return self.wake_at(now);
        }
        self.notify(now, peer, large.window, 0, above);
        above.placed(ticket, Ok(0));
    }

    fn notify(&mut self, now: u64, peer: PeerId, window: Window, length: u32, above: &mut impl Above) {
        let patience = self.config.timing.patience;
        let Some(to) = self.peer_mut(peer) else { return };
        to.enqueue(now, Outgoing::new(What::Notify { window }, None, 0, length), patience);
        self.pump(now, peer, above);
    }

    /// Forget a peer: all that is pending with it ends, and its number is free.
    pub fn disconnect(&mut self, peer: PeerId, above: &mut impl Above) {
        self.clean_up(peer, above);
        if let Some(gone) = self.peers.get_mut(peer as usize).and_then(Option::take) {
            let address = (gone.nic, gone.endpoint);
            self.by_address.remove(&address);
            if self.forgotten.len() >= PEERS_MAX {
                self.forgotten.pop_first();
            }
            self.forgotten.insert(address, gone.next_match);
        }
    }

    /// Forget all peers, as with [`Wire::disconnect`]: this wire is not used any more.
    pub fn end_all(&mut self, above: &mut impl Above) {
        for id in 0..self.peers.len() as PeerId {
            self.disconnect(id, above);
        }
    }

    /// Before the endpoint closes: acknowledge what was received.
    pub fn close(&mut self, above: &mut impl Above) {
        for id in 0..self.peers.len() as PeerId {
            if self.peer(id).is_some_and(|peer| peer.ack_due.is_some()) {
                self.send_ack(id, above);
            }
        }
    }

    // ---- what is sent

    fn message(&mut self, to: PeerId, one: &Outgoing) -> Option<Message> {
        let from = self.config.endpoint;
        let peer = self.peer_mut(to)?;
        let session = match one.what {
            What::Notify { .. } => peer.back_session.or(peer.session)?,
            What::Eager | What::Rendezvous { .. } => peer.session?,
        };
        Some(Message {
            ends: Ends { to: peer.endpoint, from, generation: 0 },
            checksum: 0,
            sequence: one.sequence.bits(),
            piggyack: peer.acknowledge(),
            matching: one.matching,
            session,
        })
    }

    /// Frames that a message takes.
    fn frames(&self, one: &Outgoing) -> usize {
        match one.what {
            What::Eager if one.length as usize > SMALL_MAX => {
                one.length.div_ceil(self.config.profile.fragment.into()) as usize
            }
            _ => 1,
        }
    }

    /// Put a message's frames into the queue, which has room for them.
    fn transmit(&mut self, to: PeerId, one: &Outgoing, above: &mut impl Above) {
        let Some(message) = self.message(to, one) else { return };
        let Some((nic, _)) = self.address(to) else { return };
        let mut data = core::mem::take(&mut self.scratch);
        match one.what {
            What::Rendezvous { window } => {
                let window = Window { id: window, sequence: self.uses[usize::from(window)], offset: 0 };
                above.transmit(nic, &Frame::Rendezvous { message, length: one.length, window });
            }
            What::Notify { window } => {
                let Message { ends, session, sequence, piggyack, .. } = message;
                let frame = Frame::Notify { ends, session, length: one.length, window, sequence, piggyack };
                above.transmit(nic, &frame);
            }
            What::Eager if one.length as usize <= SMALL_MAX => {
                let data = &mut data[..one.length as usize];
                above.gather(one.send.unwrap_or(0), 0, data);
                let frame = if data.len() <= TINY_MAX {
                    Frame::Tiny { message, data }
                } else {
                    Frame::Small { message, data }
                };
                above.transmit(nic, &frame);
            }
            What::Eager => {
                let unit = u32::from(self.config.profile.fragment);
                for fragment in 0..one.length.div_ceil(unit) {
                    let offset = fragment * unit;
                    let data = &mut data[..unit.min(one.length - offset) as usize];
                    above.gather(one.send.unwrap_or(0), offset, data);
                    let (total, fragment) = (one.length, fragment as u8);
                    above.transmit(nic, &Frame::Medium { message, total, fragment, offset, data });
                }
            }
        }
        self.scratch = data;
    }

    /// Send what waits for a peer, as far as there is room.
    fn pump(&mut self, now: u64, id: PeerId, above: &mut impl Above) {
        let Config { timing, limits, .. } = self.config;
        loop {
            let Some(peer) = self.peer(id) else { return };
            let Some(next) = peer.queue.front() else { return };
            let ready = peer.window_open(next.carries(), &limits) && self.frames(next) <= above.room();
            let what = next.what;
            let window = match what {
                What::Rendezvous { .. } => self.free_window(id),
                _ => Some(0),
            };
            let (true, Some(window)) = (ready, window) else {
                self.stalled = true;
                return self.wake_at(now.saturating_add(timing.no_room));
            };
            let Some(peer) = self.peer_mut(id) else { return };
            let Some(mut one) = peer.queue.pop_front() else { return };
            one.sequence = peer.next_send;
            peer.next_send = peer.next_send.next();
            peer.in_flight += one.carries();
            (one.sent_at, one.times, one.wait) = (now, 1, peer.resend_after(0, &timing));
            one.due = now.saturating_add(one.wait);
            if let What::Rendezvous { .. } = what {
                one.what = What::Rendezvous { window };
                self.open_window(window, id, &one);
            }
            self.transmit(id, &one, above);
            self.wake_at(one.due);
            let sequence = one.sequence;
            if let Some(peer) = self.peer_mut(id) {
                peer.unacked.push_back(one);
            }
            self.age_windows(id, sequence);
        }
    }

    fn send_ack(&mut self, to: PeerId, above: &mut impl Above) {
        let from = self.config.endpoint;
        let Some(peer) = self.peer_mut(to) else { return };
        let Some(session) = peer.back_session.or(peer.session) else { return };
        if above.room() == 0 {
            return;
        }
        let next = peer.acknowledge();
        let ends = Ends { to: peer.endpoint, from, generation: 0 };
        let nic = peer.nic;
        self.acks_sent = self.acks_sent.wrapping_add(1);
        let ack = Frame::Ack { ends, session, next, number: self.acks_sent, sent: next, resent: 0 };
        above.transmit(nic, &ack);
    }

    // ---- time

    /// Do what is due. Also after there is room again, or frames were handled.
    pub fn tick(&mut self, now: u64, above: &mut impl Above) {
        self.go_on(now, above);
        if now < self.due {
            return;
        }
        self.due = u64::MAX;
        for id in 0..self.peers.len() as PeerId {
            if self.peer(id).is_some_and(|peer| peer.due() <= now) {
                self.tick_peer(now, id, above);
            }
            if let Some(peer) = self.peer(id) {
                let due = peer.due();
                self.wake_at(due);
            }
        }
        self.keep_windows_alive(now, above);
        self.turn_pulls(now, above);
        if self.stalled {
            self.wake_at(now.saturating_add(self.config.timing.no_room));
        }
    }

    /// What waits for room or for an acknowledgement.
    fn go_on(&mut self, now: u64, above: &mut impl Above) {
        let profile = self.config.profile;
        while !self.jobs.is_empty() && above.room() > 0 {
            let Some(piece) = self.jobs.next(&profile) else { break };
            let reply = Reply { frame: piece.frame, offset: piece.offset, cookie: piece.cookie };
            above.transmit_reply(piece.nic, reply, piece.send, piece.at, piece.len);
        }
        if !self.jobs.is_empty() {
            self.wake_at(now.saturating_add(self.config.timing.no_room));
        }
        if core::mem::take(&mut self.stalled) {
            for id in 0..self.peers.len() as PeerId {
                self.pump(now, id, above);
            }
        }
    }

    fn tick_peer(&mut self, now: u64, id: PeerId, above: &mut impl Above) {
        let Config { timing, endpoint, session, .. } = self.config;
        if self.peer(id).is_some_and(|peer| peer.ack_due.is_some_and(|due| due <= now)) {
            self.send_ack(id, above);
            if let Some(peer) = self.peer_mut(id) {
                peer.ack_due = peer.ack_due.map(|_| now.saturating_add(timing.no_room));
            }
        }
        let Some(peer) = self.peer_mut(id) else { return };
        if peer.loses_patience(now) || peer.connects.iter().any(|one| one.is_spent(now)) {
            return self.clean_up(id, above);
        }
        let (nic, ends) = (peer.nic, Ends { to: peer.endpoint, from: endpoint, generation: 0 });
        for one in peer.connects.iter_mut().filter(|one| one.due <= now) {
            let Connecting { key, number, .. } = *one;
            let expects = one.expects.bits();
            (one.times, one.silence) = (one.times + 1, one.silence.saturating_add(one.wait));
            one.wait = (timing.resend_first << one.times.min(6)).min(timing.resend_max);
            one.due = now.saturating_add(one.wait);
            let index = INDEX_UNKNOWN;
            above.transmit(nic, &Frame::Connect { ends, index, session, key, expects, number });
        }
        let late = peer.unacked.iter().filter(|one| one.due <= now).map(|one| one.sequence);
        for sequence in late.collect::<Vec<_>>() {
            self.send_again(now, id, sequence, above);
        }
    }

    /// A message that was not acknowledged goes out again.
    fn send_again(&mut self, now: u64, id: PeerId, sequence: Sequence, above: &mut impl Above) {
        let timing = self.config.timing;
        let Some(at) = self.peer(id).and_then(|p| p.unacked.iter().position(|o| o.sequence == sequence))
        else {
            return;
        };
        let frames = self.peer(id).map_or(0, |peer| self.frames(&peer.unacked[at]));
        let Some(peer) = self.peer_mut(id) else { return };
        if frames > above.room() {
            let one = &mut peer.unacked[at];
            (one.due, one.wait) = (now.saturating_add(timing.no_room), timing.no_room);
            return;
        }
        let wait = peer.resend_after(peer.unacked[at].times, &timing);
        let one = &mut peer.unacked[at];
        (one.sent_at, one.times, one.wait, one.due) = (now, one.times + 1, wait, now.saturating_add(wait));
        // It is looked at by nobody else meanwhile.
        let placeholder = Outgoing::new(one.what, None, 0, 0);
        let one = core::mem::replace(one, placeholder);
        self.transmit(id, &one, above);
        if let Some(peer) = self.peer_mut(id) {
            peer.unacked[at] = one;
        }
    }

    fn turn_pulls(&mut self, now: u64, above: &mut impl Above) {
        let (from, timing) = (self.config.endpoint, self.config.timing);
        let mut ended = Vec::new();
        let peers = &self.peers;
        self.pulls.turn(now, &timing, &mut ended, |peer, window, cookie, length, (skip, block, first)| {
            let Some(peer) = peers.get(peer as usize).and_then(Option::as_ref) else { return false };
            let Some(session) = peer.back_session.or(peer.session) else { return false };
            if above.room() == 0 {
                return false;
            }
            let ends = Ends { to: peer.endpoint, from, generation: 0 };
            let frame = Frame::Pull { ends, session, length, window, cookie, skip, block, first };
            above.transmit(peer.nic, &frame);
            true
        });
        self.end_pulls(now, ended, above);
        let due = self.pulls.due();
        self.wake_at(due);
    }

    fn end_pulls(&mut self, now: u64, ended: Vec<Ended>, above: &mut impl Above) {
        for Ended { peer, ticket, window, outcome } in ended {
            self.notify(now, peer, window, outcome.unwrap_or(0), above);
            above.placed(ticket, outcome);
        }
    }

    // ---- ends

    /// All that is pending with a peer ends.
    fn clean_up(&mut self, id: PeerId, above: &mut impl Above) {
        const WHY: Status = Status::EndpointUnreachable;
        let Some(peer) = self.peer_mut(id) else { return };
        let connects = core::mem::take(&mut peer.connects);
        let pending: Vec<_> = peer.unacked.drain(..).chain(peer.queue.drain(..)).collect();
        let tickets: Vec<u32> = peer.partial.values().map(|partial| partial.ticket).collect();
        (peer.in_flight, peer.session, peer.back_session) = (0, None, None);
        peer.start_elsewhere();
        for one in pending {
            if let (What::Eager, Some(send)) | (What::Rendezvous { .. }, Some(send)) = (one.what, one.send) {
                if !self.is_large(send) {
                    above.sent(send, Err(WHY));
                }
            }
        }
        self.fail_windows(id, WHY, above);
        for one in connects {
            above.connected(one.connect, Err(WHY));
        }
        for ticket in tickets {
            above.placed(ticket, Err(WHY));
        }
        // Also if it lives on as another instance, whose windows have the same numbers.
        let mut ended = Vec::new();
        self.pulls.fail(|pull| pull.peer == id, WHY, &mut ended);
        for Ended { ticket, outcome, .. } in ended {
            above.placed(ticket, outcome);
        }
        above.void(id);
    }
}
