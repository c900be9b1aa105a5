//! One peer of an endpoint: another endpoint, at another station.
//!
//! What is sent to it waits for acknowledgements; what comes from it is put in order. Both by sequence numbers of whole
//! messages, one for each direction.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

use isthmus_wire::mxoe::Window;

use super::limits::{Limits, Timing};
use super::sequence::Sequence;

/// Messages beyond the next that are kept until their turn comes.
const EARLY_MAX: u16 = 255;
/// Bytes that such messages may hold.
const EARLY_BYTES: usize = 4 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Eager,
    Rendezvous { window: u8 },
    Notify { window: Window },
}

/// A message on its way to the peer.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub what: What,
    /// The caller's name for it; a notify has none.
    pub send: Option<u32>,
    pub matching: u64,
    pub length: u32,
    pub sequence: Sequence,
    pub sent_at: u64,
    /// When to send it again, and how long that was to be waited for.
    pub due: u64,
    pub wait: u64,
    /// How often it was sent.
    pub times: u32,
    /// The peer is given up that lets it wait for so long, ns.
    pub patience: u64,
    /// When it was asked for, on the clock of [`Peer::waited`].
    pub from: u64,
}

impl Outgoing {
    pub fn new(what: What, send: Option<u32>, matching: u64, length: u32) -> Self {
        Self {
            what,
            send,
            matching,
            length,
            sequence: Sequence::first(0),
            sent_at: 0,
            due: 0,
            wait: 0,
            times: 0,
            patience: u64::MAX,
            from: 0,
        }
    }

    /// Bytes that its frames carry.
    pub fn carries(&self) -> u32 {
        if self.what == What::Eager { self.length } else { 0 }
    }
}

/// A connect that has no answer yet.
#[derive(Debug)]
pub(crate) struct Connecting {
    pub connect: u32,
    pub key: u32,
    pub number: u8,
    /// What it says that is expected: the same however often it is sent.
    pub expects: Sequence,
    pub due: u64,
    pub wait: u64,
    pub times: u32,
    /// How long it may go without an answer, and has, ns.
    pub patience: u64,
    pub silence: u64,
}

impl Connecting {
    /// It is time to ask again, if not to give up.
    pub fn is_spent(&self, now: u64) -> bool {
        self.times > 0 && self.due <= now && self.silence.saturating_add(self.wait) >= self.patience
    }
}

/// A message of several fragments, not all of which have come.
#[derive(Debug)]
pub(crate) struct Partial {
    pub ticket: u32,
    pub total: u32,
    pub missing: u32,
    seen: [u64; 4],
}

impl Partial {
    pub fn new(ticket: u32, total: u32) -> Self {
        Self { ticket, total, missing: total, seen: [0; 4] }
    }

    /// `false`: this fragment was here before.
    pub fn take(&mut self, fragment: u8, len: usize) -> bool {
        let (word, bit) = (usize::from(fragment / 64), 1u64 << (fragment % 64));
        if self.seen[word] & bit != 0 {
            return false;
        }
        self.seen[word] |= bit;
        self.missing = self.missing.saturating_sub(len as u32);
        true
    }
}

/// What came before its turn.
#[derive(Debug)]
pub(crate) enum Early {
    Whole { matching: u64, data: Vec<u8> },
    Fragment { matching: u64, total: u32, fragment: u8, offset: u32, data: Vec<u8> },
    Large { matching: u64, length: u32, window: Window },
    Notify { length: u32, window: Window },
}

impl Early {
    /// Bytes that it takes here.
    pub fn len(&self) -> usize {
        size_of::<Self>()
            + match self {
                Self::Whole { data, .. } | Self::Fragment { data, .. } => data.len(),
                Self::Large { .. } | Self::Notify { .. } => 0,
            }
    }
}

/// Where a sequence number lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It is the next to be matched.
    Now,
    /// Of a message that was matched and is not complete, or a copy of one that is.
    Matched,
    Early,
    /// A copy of a complete one: the acknowledgement was lost, or the sender wants to know whether anybody is here.
    Again,
    Never,
}

pub(crate) struct Peer {
    pub nic: u64,
    pub endpoint: u8,
    /// What this endpoint's messages carry: the peer's session. `None`: not connected.
    pub session: Option<u32>,
    /// Of the peer as it connected here; what acknowledgements, pulls and notifies carry.
    pub back_session: Option<u32>,
    // -- to the peer
    pub next_send: Sequence,
    pub acked: Sequence,
    pub queue: VecDeque<Outgoing>,
    pub unacked: VecDeque<Outgoing>,
    /// Bytes of `unacked`.
    pub in_flight: u32,
    /// A clock that runs while there is something to be acknowledged, ns: the waits that are over. No wait counts for more
    /// than it was to take: a program that was stopped itself has not waited.
    waits: u64,
    /// When the peer last acknowledged anything, on that clock.
    answered: u64,
    /// Until this is acknowledged the peer misses something: what is next after an acknowledgement is sent again.
    pub recovering: Option<Sequence>,
    pub connects: VecDeque<Connecting>,
    /// Smoothed time between a message and its acknowledgement, ns; 0 before the first.
    pub round_trip: u64,
    pub acks_heard: u32,
    // -- from the peer
    pub next_match: Sequence,
    /// The first that is not complete: what is acknowledged.
    pub next_whole: Sequence,
    pub last_acked: Sequence,
    /// By sequence value.
    pub partial: BTreeMap<u16, Partial>,
    early: BTreeMap<u16, Vec<Early>>,
    early_bytes: usize,
    pub ack_due: Option<u64>,
}

impl Peer {
    /// `start`: what this side expects first, which it tells when they connect. Frames that an endpoint of the same number
    /// was sent long ago shall not fit.
    pub fn new(nic: u64, endpoint: u8, start: Sequence) -> Self {
        let first = Sequence::first(0);
        Self {
            nic,
            endpoint,
            session: None,
            back_session: None,
            next_send: first,
            acked: first,
            queue: VecDeque::new(),
            unacked: VecDeque::new(),
            in_flight: 0,
            waits: 0,
            answered: 0,
            recovering: None,
            connects: VecDeque::new(),
            round_trip: 0,
            acks_heard: 0,
            next_match: start,
            next_whole: start,
            last_acked: start,
            partial: BTreeMap::new(),
            early: BTreeMap::new(),
            early_bytes: 0,
            ack_due: None,
        }
    }

    // ---- receiving

    pub fn turn(&self, sequence: Sequence) -> Turn {
        let ahead = sequence.since(self.next_match);
        if sequence.session() != self.next_match.session() {
            Turn::Never
        } else if ahead == 0 {
            Turn::Now
        } else if ahead <= EARLY_MAX {
            Turn::Early
        } else if sequence.since(self.next_whole) < self.next_match.since(self.next_whole) {
            Turn::Matched
        } else if self.next_whole.since(sequence) <= 1 << 13 {
            Turn::Again
        } else {
            Turn::Never
        }
    }

    /// Keep what came before its turn; what is there already or too much is not kept.
    pub fn keep_early(&mut self, sequence: Sequence, early: Early) {
        if self.early_bytes + early.len() > EARLY_BYTES {
            return;
        }
        let kept = self.early.entry(sequence.value()).or_default();
        let again = match (&early, kept.first()) {
            (_, None) => false,
            (Early::Fragment { fragment, .. }, Some(Early::Fragment { .. })) => {
                kept.iter().any(|one| matches!(one, Early::Fragment { fragment: f, .. } if f == fragment))
            }
            _ => true,
        };
        if !again {
            self.early_bytes += early.len();
            kept.push(early);
        }
    }

    /// Bytes that are kept until their turn.
    pub fn early_bytes(&self) -> usize {
        self.early_bytes
    }

    #[cfg(test)]
    pub fn early_kept(&self) -> usize {
        self.early.values().map(Vec::len).sum()
    }

    /// What was kept for the message that is next.
    pub fn take_early(&mut self) -> Vec<Early> {
        let kept = self.early.remove(&self.next_match.value()).unwrap_or_default();
        self.early_bytes -= kept.iter().map(Early::len).sum::<usize>();
        kept
    }

    /// Put back what could not be taken now.
    pub fn put_back(&mut self, kept: Vec<Early>) {
        self.early_bytes += kept.iter().map(Early::len).sum::<usize>();
        self.early.insert(self.next_match.value(), kept);
    }

    pub fn has_early(&self) -> bool {
        !self.early.is_empty()
    }

    /// The message that is next was matched.
    pub fn matched(&mut self, partial: Option<Partial>) {
        // A copy that was put back for want of memory is of no use any more.
        self.take_early();
        if let Some(partial) = partial {
            self.partial.insert(self.next_match.value(), partial);
        }
        self.next_match = self.next_match.next();
        self.complete();
    }

    /// Move on over all that is complete.
    pub fn complete(&mut self) {
        while self.next_whole != self.next_match && !self.partial.contains_key(&self.next_whole.value()) {
            self.next_whole = self.next_whole.next();
        }
    }

    /// Something is to be acknowledged: at once, or with whatever is sent next.
    pub fn owe_ack(&mut self, now: u64, timing: &Timing) {
        let owed = self.next_whole.since(self.last_acked);
        let gap = self.has_early() || self.next_whole != self.next_match;
        if owed >= timing.ack_after || (gap && owed == 0) {
            self.ack_due = Some(now);
        } else if owed > 0 && self.ack_due.is_none() {
            self.ack_due = Some(now.saturating_add(timing.ack_delay));
        }
    }

    /// What is sent now acknowledges this.
    pub fn acknowledge(&mut self) -> u16 {
        self.last_acked = self.next_whole;
        self.ack_due = None;
        self.next_whole.bits()
    }

    // ---- sending

    /// A message that is to be sent when its turn comes.
    pub fn enqueue(&mut self, now: u64, one: Outgoing, patience: u64) {
        self.queue.push_back(Outgoing { patience, from: self.waited(now), ..one });
    }

    /// All that is to be acknowledged some time.
    pub fn outgoing(&mut self) -> impl Iterator<Item = &mut Outgoing> {
        self.unacked.iter_mut().chain(&mut self.queue)
    }

    /// What the clock of waiting shows.
    pub fn waited(&self, now: u64) -> u64 {
        let oldest = self.unacked.front();
        let running = oldest.map_or(0, |one| one.wait.saturating_sub(one.due.saturating_sub(now)));
        self.waits.saturating_add(running)
    }

    /// If it is time to send the oldest message again: has any waited for as long as it may?
    pub fn loses_patience(&mut self, now: u64) -> bool {
        let Some(oldest) = self.unacked.front().filter(|oldest| oldest.due <= now) else { return false };
        self.waits = self.waits.saturating_add(oldest.wait);
        let (waits, answered) = (self.waits, self.answered);
        self.outgoing().any(|one| waits.saturating_sub(one.from.max(answered)) >= one.patience)
    }

    /// The peer has answered, when the clock showed this; something else is the oldest now.
    pub fn has_answered(&mut self, now: u64, waited: u64) {
        (self.waits, self.answered) = (waited, waited);
        if let Some(oldest) = self.unacked.front_mut() {
            oldest.wait = oldest.wait.min(oldest.due.saturating_sub(now));
        }
    }

    /// May another message of so many bytes be on its way?
    pub fn window_open(&self, bytes: u32, limits: &Limits) -> bool {
        self.unacked.is_empty()
            || (self.unacked.len() < usize::from(limits.messages)
                && self.in_flight.saturating_add(bytes) <= limits.bytes)
    }

    /// When a message sent now for the n-th time is to be sent again.
    pub fn resend_after(&self, times: u32, timing: &Timing) -> u64 {
        let first = timing.resend_first.max(2 * self.round_trip + 2 * timing.ack_delay);
        first.checked_shl(times.min(20)).unwrap_or(u64::MAX).min(timing.resend_max)
    }

    /// An acknowledgement: what is done, oldest first. Values beyond what was sent, or older ones, say nothing.
    pub fn take_ack(&mut self, value: Sequence, now: u64) -> Vec<Outgoing> {
        let steps = value.since(self.acked);
        if value.session() != self.next_send.session() || steps > self.next_send.since(self.acked) {
            return Vec::new();
        }
        let (waited, mut done) = (self.waited(now), Vec::new());
        while self.unacked.front().is_some_and(|one| one.sequence.since(self.acked) < steps) {
            let Some(one) = self.unacked.pop_front() else { break };
            self.in_flight -= one.carries();
            if one.times == 1 {
                let sample = now.saturating_sub(one.sent_at);
                self.round_trip =
                    if self.round_trip == 0 { sample } else { self.round_trip / 8 * 7 + sample / 8 };
            }
            done.push(one);
        }
        self.has_answered(now, waited);
        self.acked = value;
        if self.recovering.is_some_and(|until| value.since(until) < 1 << 13) {
            self.recovering = None;
        }
        done
    }

    /// When there is something to do.
    pub fn due(&self) -> u64 {
        let resend = self.unacked.iter().map(|one| one.due).min();
        let connect = self.connects.iter().map(|one| one.due).min();
        let all = [self.ack_due, resend, connect];
        all.into_iter().flatten().min().unwrap_or(u64::MAX)
    }

    /// Start again with what the peer expects.
    pub fn start_sending(&mut self, from: Sequence) {
        (self.next_send, self.acked, self.recovering) = (from, from, None);
    }

    /// Forget what came. Stale frames may still come, and none of them shall match.
    pub fn start_elsewhere(&mut self) {
        self.expect(self.next_match.elsewhere(0xB0F0));
    }

    /// As was told to the peer.
    pub fn expect(&mut self, next: Sequence) {
        (self.next_match, self.next_whole, self.last_acked) = (next, next, next);
        self.clear_received();
    }

    fn clear_received(&mut self) {
        self.partial.clear();
        self.early.clear();
        (self.early_bytes, self.ack_due, self.acks_heard) = (0, None, 0);
    }
}
