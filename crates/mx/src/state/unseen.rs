//! Messages that no receive waits for, and the program's handler of them.
//!
//! Such a message goes to the end of a queue. A thread of the program's that calls us takes the queue from its front and
//! shows the handler one message after the other, with no lock held; what else arrives meanwhile queues up behind, whether
//! or not a receive waits for it, so that nothing is overtaken. The handler runs in calls of the program only, never on a
//! thread of ours: it may look at whatever the program looks at.

use std::collections::VecDeque;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use super::{EAGER_MAX, Kept, State, Unexpected, WIRE_TICKET};
use crate::peers::Address;
use crate::progress::Shared;
use isthmus_proto::mx::Status;

/// A message as the handler sees it.
pub struct Arrived<'a> {
    pub source: Address,
    pub matching: u64,
    /// Bytes.
    pub length: u32,
    /// In full, or not at all: long messages are still with their senders.
    pub data: Option<&'a [u8]>,
}

/// What the handler wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Try the receives once more, then keep it.
    Continue,
    /// The message is dealt with. What was still with its sender is discarded.
    Finished,
}

/// Called with no lock held, by one thread at a time for each endpoint.
pub type Handler = Arc<dyn Fn(Arrived<'_>) -> Verdict + Send + Sync>;

/// What was not shown to the handler yet, and who is in it.
#[derive(Default)]
pub(crate) struct Unseen {
    queue: VecDeque<u32>,
    handler: Option<Handler>,
    handling: Option<ThreadId>,
    /// What it is shown.
    shown: Option<u32>,
    paused: bool,
}

/// A message on its way through the handler.
struct Showing {
    handler: Handler,
    number: u32,
    source: Address,
    matching: u64,
    length: u32,
    data: Option<Vec<u8>>,
}

impl Showing {
    fn ask(&self) -> Verdict {
        let Self { source, matching, length, .. } = *self;
        (self.handler)(Arrived { source, matching, length, data: self.data.as_deref() })
    }
}

impl State {
    /// Does everything that arrives queue up for now?
    pub(super) fn defers(&self) -> bool {
        let Unseen { queue, handling, paused, .. } = &self.unseen;
        *paused || handling.is_some() || !queue.is_empty()
    }

    /// Is this message none that a receive can meet yet?
    pub(super) fn defer(&mut self, number: u32) -> bool {
        let defers = self.defers() || self.unseen.handler.is_some();
        if defers {
            self.unseen.queue.push_back(number);
        }
        defers
    }

    /// What was queued and is meant.
    pub(super) fn forget_unseen(&mut self, is_meant: impl Fn(&Unexpected) -> bool) -> Vec<u32> {
        let unexpected = &self.unexpected;
        let is_its = |n: &u32| unexpected.get(n).is_some_and(&is_meant);
        let mut gone: Vec<u32> = self.unseen.queue.iter().copied().filter(&is_its).collect();
        self.unseen.queue.retain(|n| !is_its(n));
        gone.extend(self.unseen.shown.filter(is_its));
        gone
    }

    /// Is the caller in the handler?
    pub fn is_handled_here(&self) -> bool {
        self.unseen.handling.is_some_and(|thread| thread == thread::current().id())
    }

    /// Nothing moves for this caller.
    pub fn is_still(&self) -> bool {
        self.unseen.paused || self.is_handled_here()
    }

    /// Bring what is queued to the receives that wait, up to a message that the handler must see.
    fn next_unseen(&mut self) -> Option<Showing> {
        while !self.unseen.paused && self.unseen.handling.is_none() {
            let number = self.unseen.queue.pop_front()?;
            let Some(message) = self.unexpected.get(&number) else { continue };
            match self.unseen.handler.clone() {
                Some(handler) if !self.matching.awaits(message.matching) => {
                    self.unseen.handling = Some(thread::current().id());
                    self.unseen.shown = Some(number);
                    return self.showing(handler, number);
                }
                _ => self.settle(number),
            }
        }
        None
    }

    fn showing(&mut self, handler: Handler, number: u32) -> Option<Showing> {
        let message = self.unexpected.get_mut(&number)?;
        let (peer, matching, length) = (message.peer, message.matching, message.length);
        let data = match &mut message.what {
            Kept::Bytes { data, whole: true } => Some(std::mem::take(data)),
            Kept::Own { send } if length as usize <= EAGER_MAX => {
                let mut data = vec![0; length as usize];
                self.requests.at(*send)?.parts.copy_out(0, &mut data);
                Some(data)
            }
            Kept::Bytes { whole: false, .. }
            | Kept::Own { .. }
            | Kept::OnLane { .. }
            | Kept::OnWire { .. } => None,
        };
        Some(Showing { handler, number, source: self.peers.address(peer), matching, length, data })
    }

    /// The handler has seen it.
    fn seen(&mut self, showing: Showing, verdict: Verdict) {
        (self.unseen.handling, self.unseen.shown) = (None, None);
        let Showing { number, data, .. } = showing;
        let was_shown = data.is_some();
        // Its sender may be another one by now, and the message void.
        let Some(message) = self.unexpected.get_mut(&number) else { return };
        if let (Kept::Bytes { data: place, .. }, Some(data)) = (&mut message.what, data) {
            *place = data;
        }
        match verdict {
            Verdict::Continue => self.settle(number),
            Verdict::Finished => self.finish(number, was_shown),
        }
    }

    /// To the first receive that waits for it, or among those that wait themselves.
    fn settle(&mut self, number: u32) {
        let Some(message) = self.unexpected.get(&number) else { return };
        let matching = message.matching;
        match self.matching.arrive(matching) {
            Some(slot) => self.meet(slot, number),
            None => {
                self.matching.keep(matching, number);
                self.ended += 1;
            }
        }
    }

    fn finish(&mut self, number: u32, was_shown: bool) {
        let Some(message) = self.take_kept(number) else { return };
        match message.what {
            // What is still coming finds no place.
            Kept::Bytes { .. } => {}
            Kept::OnLane { lane, id, .. } => self.decline_lane(lane, id),
            Kept::OnWire { peer, large } => {
                let now = isthmus_sys::clock::now_ns();
                let nothing = (WIRE_TICKET | number, 0);
                self.with_card(|card, state| card.wire.pull(now, peer, large, nothing, state));
            }
            Kept::Own { send } if was_shown || message.length == 0 => {
                self.end(send, Status::Success, message.length);
            }
            Kept::Own { send } => self.end(send, Status::Truncated, 0),
        }
    }
}

impl Shared {
    /// Show the handler what it has not seen; the lock is free while it runs.
    pub fn show<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        while !state.unseen.queue.is_empty() && !state.is_still() && state.unseen.handling.is_none() {
            while let Some(showing) = state.next_unseen() {
                drop(state);
                let verdict = showing.ask();
                state = self.lock();
                state.seen(showing, verdict);
                self.handled.notify_all();
            }
            self.after(&mut state);
        }
        state
    }

    /// From now on this handler sees messages first. One that runs goes on.
    pub fn set_handler(&self, handler: Option<Handler>) {
        let mut state = self.lock();
        state.unseen.handler = handler;
        drop(self.show(state));
    }

    /// Nothing moves until [`Shared::resume`]. Waits for the end of a handler that runs, unless that is the caller.
    pub fn pause(&self) {
        let mut state = self.lock();
        state.unseen.paused = true;
        while state.unseen.handling.is_some() && !state.is_handled_here() {
            state = self.handled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub fn resume(&self) {
        let mut state = self.lock();
        if std::mem::take(&mut state.unseen.paused) {
            self.progress(&mut state);
            self.after(&mut state);
            drop(self.show(state));
            self.raise_news();
        }
    }
}
