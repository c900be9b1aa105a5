//! Who moves an endpoint on.
//!
//! Whoever calls does. While nobody calls, a thread of ours does: it sleeps until a lane's bell rings or a timer is due.
//! While a caller waits, that thread stays out of the way: the caller looks at the lanes itself, and sleeps itself.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use isthmus_engine::listener::Listener;
use isthmus_engine::node::{Attachment, Nic};
use isthmus_engine::{Connection, Error, How, Wait, spin_beside};
use isthmus_proto::mx::Status;
use isthmus_proto::spin::{GUEST, Spin};
use isthmus_sys::clock::now_ns;
use isthmus_sys::cpu::generation;
use isthmus_sys::poll::{Flag, Set};
use isthmus_wire::control::Refusal;

use crate::card;
use crate::endpoint::Options;
use crate::lanes::{Greeting, Lane};
use crate::requests::RequestId;
use crate::state::State;

const TOKEN_NEWS: u64 = u64::MAX;
const TOKEN_LISTENER: u64 = u64::MAX - 1;
const TOKEN_CARD: u64 = u64::MAX - 2;
/// Our thread looks this often whether callers have gone.
const AWAY: Duration = Duration::from_millis(1);
/// After so many looks at the same wait it sleeps until that one ends.
const LOOKS: u32 = 50;
/// No sleep is longer.
const SLEEP_LIMIT: Duration = Duration::from_secs(1);
/// Between looks for a card where there is none, ns.
const SEEK_NS: u64 = 3_000_000_000;
/// Between looks whether it is still there, ns.
const LOST_NS: u64 = 100_000_000;
/// Nobody sleeps on the set.
const AWAKE: u64 = 0;
/// Who sleeps behind another looks again this often, in case.
const BEHIND_LIMIT: Duration = Duration::from_millis(20);
/// Between questions to a broker that is not there, ns; and when to ask if there is nothing to be asked.
const ASK_NS: u64 = 50_000_000;
const NEVER: u64 = u64::MAX;
/// Looks at the lanes for one at the card, which needs the clock.
const LOOKS_PER_CARD: u32 = 8;

/// What other threads have to say.
pub(crate) enum Event {
    Opened {
        id: RequestId,
        nic: u64,
        endpoint: u8,
        key: u32,
        opened: isthmus_engine::Result<Arc<Connection>>,
    },
    /// Somebody has connected, and the broker was asked for the card of his domain.
    Met { connection: Arc<Connection>, found: isthmus_engine::Result<Nic> },
}

pub(crate) struct Shared {
    own: Weak<Self>,
    pub attachment: Arc<Attachment>,
    pub rings: (u32, u32),
    /// A way to other nodes is wanted; while there is none, when to look for one, ns.
    wire: bool,
    /// This program is a guest's.
    guest: bool,
    seek_at: AtomicU64,
    state: Mutex<State>,
    /// Told of endings while callers sleep behind another.
    turned: Condvar,
    /// Told when a handler has returned.
    pub handled: Condvar,
    inbox: Mutex<Vec<Event>>,
    /// Is there something in the inbox, or at the listener?
    unread: AtomicBool,
    listener: Arc<Listener>,
    set: Arc<Set>,
    news: Flag,
    /// Raised when requests end, once until it is lowered; only after somebody has asked for that.
    pub ended: Flag,
    pub told_fd: AtomicBool,
    /// Held by the one thread that sleeps on the set.
    leader: Mutex<()>,
    /// It is ours, which makes way for callers.
    ours_leads: AtomicBool,
    /// Until when it sleeps, ns; [`AWAKE`] while it does not. Changed with the state locked.
    asleep_until: AtomicU64,
    /// Callers that sleep behind it. Changed with the state locked.
    behind: AtomicU32,
    /// Callers that wait, and counts of those that came.
    callers: AtomicU32,
    came: AtomicU32,
    /// Our thread sleeps until the last caller leaves.
    aside: AtomicBool,
    /// A caller has gone to sleep elsewhere.
    hand_over: AtomicBool,
    wakeups: AtomicU64,
    looks: AtomicU32,
    pub closing: AtomicBool,
    /// Of the process that opened it.
    generation: u32,
    thread: Mutex<Option<JoinHandle<()>>>,
    nics: Mutex<HashMap<String, u64>>,
    /// Those who have connected while no broker could say who they are; and when it is asked again, ns.
    unknown: Mutex<Vec<Arc<Connection>>>,
    ask_at: AtomicU64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub fn start(
        attachment: &Arc<Attachment>,
        state: State,
        listener: Arc<Listener>,
        options: &Options,
    ) -> isthmus_engine::Result<Arc<Self>> {
        let guest = attachment.identity().guest;
        let mut state = state;
        if guest {
            state.spin = Spin::new(GUEST);
        }
        let set = Arc::new(Set::new().map_err(Error::os("opening an endpoint"))?);
        state.bells = Some(Arc::clone(&set));
        let news = Flag::new().map_err(Error::os("opening an endpoint"))?;
        set.add(news.as_fd(), TOKEN_NEWS).map_err(Error::os("opening an endpoint"))?;
        // SAFETY: the listener is kept, and with it the descriptor.
        let waiting = unsafe { BorrowedFd::borrow_raw(listener.fd()) };
        // While nothing may progress nobody is accepted, and it stays readable.
        set.add_edge(waiting, TOKEN_LISTENER).map_err(Error::os("opening an endpoint"))?;
        let ended = Flag::new().map_err(Error::os("opening an endpoint"))?;
        let shared = Arc::new_cyclic(|own| Self {
            own: Weak::clone(own),
            attachment: Arc::clone(attachment),
            rings: (options.small, options.large),
            wire: options.wire,
            guest,
            // Whoever opens the endpoint looks first.
            seek_at: AtomicU64::new(now_ns().saturating_add(SEEK_NS)),
            state: Mutex::new(state),
            turned: Condvar::new(),
            handled: Condvar::new(),
            inbox: Mutex::default(),
            unread: AtomicBool::new(false),
            listener,
            set,
            news,
            ended,
            told_fd: AtomicBool::new(true),
            leader: Mutex::new(()),
            ours_leads: AtomicBool::new(false),
            asleep_until: AtomicU64::new(AWAKE),
            behind: AtomicU32::new(0),
            callers: AtomicU32::new(0),
            came: AtomicU32::new(0),
            aside: AtomicBool::new(false),
            hand_over: AtomicBool::new(false),
            wakeups: AtomicU64::new(0),
            looks: AtomicU32::new(0),
            closing: AtomicBool::new(false),
            generation: generation(),
            thread: Mutex::new(None),
            nics: Mutex::default(),
            unknown: Mutex::default(),
            ask_at: AtomicU64::new(NEVER),
        });
        let own = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("isthmus-mx".into())
            .stack_size(256 * 1024)
            .spawn(move || own.run())
            .map_err(Error::os("starting an endpoint's thread"))?;
        *locked(&shared.thread) = Some(thread);
        Ok(shared)
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Is this the process that opened it? In its fork nothing may be touched: nobody lets go of the locks there.
    pub fn is_ours(&self) -> bool {
        self.generation == generation()
    }

    /// From other threads of ours.
    pub fn tell(&self, event: Event) {
        locked(&self.inbox).push(event);
        self.unread.store(true, Ordering::Release);
        self.news.raise();
        self.step_in();
    }

    /// The caller sleeps elsewhere until `ended` is raised; our thread takes over at once.
    pub fn lower(&self) {
        self.ended.lower();
        self.told_fd.store(false, Ordering::Release);
        self.hand_over.store(true, Ordering::Release);
        if let Some(thread) = &*locked(&self.thread) {
            thread.thread().unpark();
        }
    }

    /// Our thread may be needed.
    fn step_in(&self) {
        if self.aside.swap(false, Ordering::AcqRel) {
            if let Some(thread) = &*locked(&self.thread) {
                thread.thread().unpark();
            }
        }
    }

    // ---- progress

    /// Take what has come, send what waits. `true`: something came.
    pub fn progress(&self, state: &mut State) -> bool {
        if self.closing.load(Ordering::Acquire) || state.is_still() {
            return false;
        }
        if self.unread.load(Ordering::Acquire) {
            self.read_inbox(state);
        }
        let ask_at = self.ask_at.load(Ordering::Relaxed);
        if ask_at != NEVER && ask_at <= now_ns() {
            self.ask_at.store(NEVER, Ordering::Relaxed);
            let unknown = std::mem::take(&mut *locked(&self.unknown));
            unknown.into_iter().for_each(|connection| self.meet(state, connection));
        }
        let mut came = false;
        state.is_stuck = false;
        for lane in 0..state.lanes.len() as u32 {
            came |= state.poll_lane(lane);
        }
        came |= state.place();
        if state.card.is_some() {
            let looks = self.looks.fetch_add(1, Ordering::Relaxed);
            let waits = state.card_lane.as_ref().is_some_and(|lane| lane.poll_receive());
            if waits || looks % LOOKS_PER_CARD == 0 {
                came |= state.poll_card(now_ns());
            }
        }
        state.flush_lanes();
        came
    }

    /// After a call that may have changed something: whoever sleeps looks again.
    pub fn after(&self, state: &mut State) {
        if state.pending || state.is_stuck || state.card.is_some() || !state.placing.is_empty() {
            self.progress(state);
        }
        self.tell_others(state);
        let until = self.asleep_until.load(Ordering::Relaxed);
        if until != AWAKE && state.card.as_ref().is_some_and(|card| card.wire.due() < until) {
            // It would sleep past a timer that was set since.
            self.news.raise();
        }
    }

    /// Those who sleep hear of what has ended.
    fn tell_others(&self, state: &mut State) {
        if state.ended == state.told {
            return;
        }
        state.told = state.ended;
        if !self.told_fd.swap(true, Ordering::AcqRel) {
            self.ended.raise();
        }
        if self.behind.load(Ordering::Relaxed) > 0 {
            self.turned.notify_all();
        }
        if self.asleep_until.load(Ordering::Relaxed) != AWAKE && !self.ours_leads.load(Ordering::Relaxed) {
            self.news.raise();
        }
    }

    fn read_inbox(&self, state: &mut State) {
        self.unread.store(false, Ordering::Release);
        let events = std::mem::take(&mut *locked(&self.inbox));
        for event in events {
            let (id, nic, endpoint, key, opened) = match event {
                Event::Opened { id, nic, endpoint, key, opened } => (id, nic, endpoint, key, opened),
                Event::Met { connection, found } => {
                    self.met(state, connection, found);
                    continue;
                }
            };
            // It may have been taken back.
            if state.requests.get(id).is_none() {
                continue;
            }
            match opened {
                Ok(connection) => {
                    let lane = self.adopt(state, connection, Greeting::Asked { nic, endpoint });
                    state.greet(lane, key, id);
                }
                Err(Error::Refused { refusal: Refusal::NobodyListens, .. }) => {
                    state.end(id.slot(), Status::EndpointClosed, 0);
                }
                Err(error) => {
                    state.refused = Some((id, error));
                    state.end(id.slot(), Status::EndpointUnreachable, 0);
                }
            }
        }
        while let Ok(connection) = self.listener.accept(&How::at_once()) {
            self.meet(state, connection);
        }
    }

    /// Somebody has connected: which card has his domain? The broker is asked once for each domain.
    fn meet(&self, state: &mut State, connection: Arc<Connection>) {
        let known = locked(&self.nics).get(&connection.info.peer_name).copied();
        if let Some(nic) = known {
            self.adopt(state, connection, Greeting::Awaited { nic });
            return;
        }
        let (own, domain) = (Weak::clone(&self.own), connection.info.peer_name.clone());
        let then = move |found| {
            if let Some(shared) = own.upgrade() {
                shared.tell(Event::Met { connection, found });
            }
        };
        self.attachment.find_nic_then(0, &domain, Box::new(then));
    }

    fn met(&self, state: &mut State, connection: Arc<Connection>, found: isthmus_engine::Result<Nic>) {
        match found {
            Ok(Nic { nic, .. }) => {
                locked(&self.nics).insert(connection.info.peer_name.clone(), nic);
                self.adopt(state, connection, Greeting::Awaited { nic });
            }
            Err(Error::BrokerLost) => {
                locked(&self.unknown).push(connection);
                self.ask_at.store(now_ns().saturating_add(ASK_NS), Ordering::Relaxed);
            }
            // His domain is gone, and so is he.
            Err(_) => {}
        }
    }

    fn adopt(&self, state: &mut State, connection: Arc<Connection>, greeting: Greeting) -> u32 {
        connection.bell().watch();
        let lane = state.add_lane(Lane::new(Arc::clone(&connection), greeting));
        let _ = self.set.add(connection.bell().as_fd(), u64::from(lane));
        lane
    }

    /// Connect to the card, if there is one.
    pub fn seek_card(&self) {
        self.seek_at.store(now_ns().saturating_add(SEEK_NS), Ordering::Relaxed);
        let (nic, endpoint) = {
            let state = self.lock();
            (state.nic, state.endpoint)
        };
        let Ok((connection, profile)) = card::open(&self.attachment, nic, endpoint) else { return };
        connection.bell().watch();
        let mut state = self.lock();
        if self.set.add(connection.bell().as_fd(), TOKEN_CARD).is_ok() {
            state.take_card(connection, profile);
        }
    }

    fn misses_card(&self) -> bool {
        let now = now_ns();
        if !self.wire || now < self.seek_at.load(Ordering::Relaxed) {
            return false;
        }
        self.seek_at.store(now.saturating_add(LOST_NS), Ordering::Relaxed);
        self.lock().card_lane.is_none()
    }

    // ---- waiting

    /// Look once, as a call that does not wait does.
    pub fn look<T>(&self, mut check: impl FnMut(&mut State) -> Option<T>) -> Option<T> {
        let mut state = self.lock();
        self.came.fetch_add(1, Ordering::Relaxed);
        if let Some(found) = check(&mut state) {
            return Some(found);
        }
        self.progress(&mut state);
        let mut state = self.show(state);
        let found = check(&mut state);
        self.tell_others(&mut state);
        found
    }

    /// Wait until `check` finds something. `None`: the time is over, or somebody called [`Shared::wake_up`].
    ///
    /// # Errors
    /// [`Error::Interrupted`]: a signal wants to be heard.
    pub fn wait<T>(
        &self,
        how: &How<'_>,
        mut check: impl FnMut(&mut State) -> Option<T>,
    ) -> isthmus_engine::Result<Option<T>> {
        let wakeups = self.wakeups.load(Ordering::Acquire);
        let found = self.look(&mut check);
        // In the handler nothing would come of waiting.
        if found.is_some() || how.now || self.lock().is_handled_here() {
            return Ok(found);
        }
        self.callers.fetch_add(1, Ordering::AcqRel);
        let found = self.wait_turns(how, wakeups, &mut check);
        if self.callers.fetch_sub(1, Ordering::AcqRel) == 1 && self.aside.load(Ordering::Acquire) {
            self.step_in();
        }
        // Others hear of what else has ended; mostly there are none.
        if self.callers.load(Ordering::Acquire) > 0 || !self.told_fd.load(Ordering::Acquire) {
            self.tell_others(&mut self.lock());
        }
        found
    }

    fn wait_turns<T>(
        &self,
        how: &How<'_>,
        wakeups: u64,
        check: &mut impl FnMut(&mut State) -> Option<T>,
    ) -> isthmus_engine::Result<Option<T>> {
        let mut budget = locked(&self.state).spin;
        loop {
            let mut found = None;
            if self.guest {
                for lane in self.lock().lanes.iter().flatten() {
                    lane.connection.bell().let_out();
                }
            }
            spin_beside(how.wait, &mut budget, self.guest, || {
                let mut state = self.lock();
                self.progress(&mut state);
                let mut state = self.show(state);
                found = check(&mut state);
                found.is_some()
            });
            if found.is_some() {
                locked(&self.state).spin = budget;
                return Ok(found);
            }
            let over = how.expired()
                || self.closing.load(Ordering::Acquire)
                || self.wakeups.load(Ordering::Acquire) != wakeups;
            if over {
                return Ok(None);
            }
            if how.wants_to_stop() {
                return Err(Error::Interrupted { done: 0 });
            }
            locked(&self.state).spin = budget;
            // Others move this endpoint on too: what they found since is seen before sleeping, under the same lock.
            let mut ready = |state: &mut State| {
                found = check(state);
                found.is_some()
            };
            if how.wait == Wait::Spin {
                self.listen(Duration::ZERO, false);
            } else if let Ok(leading) = self.leader.try_lock() {
                self.sleep(how.left(SLEEP_LIMIT), &mut ready);
                self.lead_no_more(leading);
            } else {
                self.sleep_behind(how.left(BEHIND_LIMIT), &mut ready);
            }
            if found.is_some() {
                return Ok(found);
            }
        }
    }

    /// Sleep while another sleeps on the set, unless there is something already.
    fn sleep_behind(&self, limit: Duration, ready: &mut dyn FnMut(&mut State) -> bool) {
        let mut state = self.lock();
        // Is there still somebody who sleeps on the set? See `lead_no_more`.
        if ready(&mut state) || self.leader.try_lock().is_ok() {
            return;
        }
        // Bells ring once, and what this one rang for may have been taken by us.
        if self.arm(&mut state).is_zero() {
            return;
        }
        if self.ours_leads.load(Ordering::Relaxed) {
            self.news.raise();
        }
        self.behind.fetch_add(1, Ordering::Relaxed);
        let waited = self.turned.wait_timeout(state, limit);
        // It has the lock again.
        self.behind.fetch_sub(1, Ordering::Relaxed);
        drop(waited);
    }

    /// Another may have to sleep on the set now. Whoever saw us lead did so with the state locked, and sleeps by the time
    /// we have locked it.
    fn lead_no_more(&self, leading: MutexGuard<'_, ()>) {
        drop(leading);
        let _state = self.lock();
        if self.behind.load(Ordering::Relaxed) > 0 {
            self.turned.notify_all();
        }
    }

    /// From now on every bell rings. How long nothing else has to be done: zero, if there is something already.
    fn arm(&self, state: &mut State) -> Duration {
        let mut limit = SLEEP_LIMIT;
        if state.is_still() {
            return limit;
        }
        if !state.placing.is_empty() {
            limit = Duration::ZERO;
        }
        let ask_at = self.ask_at.load(Ordering::Relaxed);
        limit = limit.min(Duration::from_nanos(ask_at.saturating_sub(now_ns())));
        for lane in state.lanes.iter().flatten().filter(|lane| !lane.is_stuck) {
            // Also true of one that has ended: it is looked at.
            if lane.connection.park(true, !lane.is_idle()).unwrap_or(true) {
                limit = Duration::ZERO;
            }
        }
        if let Some(card) = &state.card {
            let due = card.wire.due().saturating_sub(now_ns());
            limit = limit.min(Duration::from_nanos(due));
        }
        if let Some(lane) = &state.card_lane {
            if lane.park(true, !state.backlog.is_empty()).unwrap_or(true) {
                limit = Duration::ZERO;
            }
        }
        limit
    }

    /// Sleep until a bell rings, unless there is something already.
    fn sleep(&self, limit: Duration, ready: &mut dyn FnMut(&mut State) -> bool) {
        let mut limit = limit;
        {
            let mut state = self.lock();
            self.looks.store(0, Ordering::Relaxed);
            let unread = self.unread.load(Ordering::Acquire) && !state.is_still();
            if self.progress(&mut state) || unread {
                limit = Duration::ZERO;
            }
            self.tell_others(&mut state);
            if ready(&mut state) {
                return;
            }
            limit = limit.min(self.arm(&mut state));
            let until = now_ns().saturating_add(limit.as_nanos() as u64);
            self.asleep_until.store(until.max(AWAKE + 1), Ordering::Relaxed);
        }
        self.listen(limit, true);
    }

    /// Hear the bells that ring within `limit`, and go on with whatever they ring for.
    fn listen(&self, limit: Duration, leading: bool) {
        let mut events = Vec::new();
        let waited = self.set.wait(Some(limit), &mut events);
        let mut state = self.lock();
        if leading {
            self.asleep_until.store(AWAKE, Ordering::Relaxed);
        }
        if waited.is_err() || events.is_empty() {
            return;
        }
        for (token, _) in events {
            match token {
                TOKEN_NEWS => self.news.lower(),
                TOKEN_LISTENER => self.unread.store(true, Ordering::Release),
                TOKEN_CARD => {
                    if let Some(card) = &state.card {
                        self.hear(&card.connection);
                    }
                }
                lane => {
                    if let Some(Some(lane)) = state.lanes.get(lane as usize) {
                        self.hear(&lane.connection);
                    }
                }
            }
        }
        self.looks.store(0, Ordering::Relaxed);
        self.progress(&mut state);
        self.after(&mut state);
    }

    fn hear(&self, connection: &Connection) {
        connection.bell().empty();
        connection.bell().wake_followers();
        if connection.bell().gone() {
            // It would be ready for ever.
            let _ = self.set.remove(connection.bell().as_fd());
        }
    }

    /// Whoever sleeps on the set looks again.
    pub fn raise_news(&self) {
        self.news.raise();
    }

    pub fn wake_up(&self) {
        self.wakeups.fetch_add(1, Ordering::AcqRel);
        self.news.raise();
        let _state = self.lock();
        self.turned.notify_all();
    }

    // ---- our thread

    fn run(&self) {
        let (mut last, mut same) = (u32::MAX, 0);
        while !self.closing.load(Ordering::Acquire) {
            // Also while somebody waits: a card may be what is waited for.
            if self.misses_card() {
                self.seek_card();
            }
            let came = self.came.load(Ordering::Relaxed);
            let busy = self.callers.load(Ordering::Acquire) > 0;
            let now = self.hand_over.swap(false, Ordering::AcqRel);
            if (came != last && !now) || busy {
                same = if came == last { same + 1 } else { 0 };
                last = came;
                if busy && same >= LOOKS {
                    self.stand_aside();
                } else {
                    std::thread::park_timeout(AWAY);
                }
                continue;
            }
            match self.leader.try_lock() {
                Ok(leading) => {
                    self.ours_leads.store(true, Ordering::Release);
                    if self.callers.load(Ordering::Acquire) == 0 {
                        self.sleep(SLEEP_LIMIT, &mut |_| false);
                    }
                    self.ours_leads.store(false, Ordering::Release);
                    self.lead_no_more(leading);
                }
                Err(_) => std::thread::park_timeout(AWAY),
            }
        }
    }

    /// Sleep until the last caller leaves.
    fn stand_aside(&self) {
        self.aside.store(true, Ordering::Release);
        if self.callers.load(Ordering::Acquire) > 0 && !self.closing.load(Ordering::Acquire) {
            std::thread::park_timeout(SLEEP_LIMIT);
        }
        self.aside.store(false, Ordering::Release);
    }

    /// End everything. Harmless when repeated.
    pub fn close(&self) {
        if self.closing.swap(true, Ordering::AcqRel) {
            return;
        }
        self.listener.close();
        self.wake_up();
        let thread = locked(&self.thread).take();
        if let Some(thread) = thread {
            thread.thread().unpark();
            let _ = thread.join();
        }
        let mut state = self.lock();
        state.close_card();
        for lane in state.lanes.drain(..).flatten() {
            lane.connection.close();
        }
    }
}
