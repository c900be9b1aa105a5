//! Who is served next: what guests transmit and what lies in lanes, by the classes, weights and rates of the rules.
//!
//! Whatever happens only marks what may have something to move; then the scheduler says in which order that is done,
//! a quantum at a time, and between a few of those we look whether somebody more urgent has come.

use std::time::{Duration, Instant};

use isthmus_proto::sched::{QUANTUM, Terms};

use crate::flow::{ACCEPTER, FlowId, OPENER, Side};
use crate::switch::Switch;

/// Quanta between two looks for events.
const SERVICES: usize = 4;
/// Looks at lanes between two looks for events, while we poll.
const LOOKS: usize = 32;
/// Of an item: it is a guest's transmit queue. Otherwise it is a flow, and the side whose bytes move in the lowest bit.
const GUEST: u64 = 1 << 63;

impl Switch {
    pub(crate) fn now_us(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// The lanes of a connection may have something to move.
    pub(crate) fn mark(&mut self, id: FlowId) {
        for from in [OPENER, ACCEPTER] {
            let Some(flow) = self.flows.get_mut(&id) else { return };
            if !flow.is_lanes() {
                self.ring_guest(id, OPENER);
                return self.ring_guest(id, ACCEPTER);
            }
            if !std::mem::replace(&mut flow.marked[from], true) {
                let (tenant, terms) = (flow.key_of(from).cid, flow.terms);
                self.sched.push(tenant, terms, id << 1 | from as u64);
            }
        }
    }

    /// A guest may have transmitted something.
    pub(crate) fn mark_guest(&mut self, cid: u32) {
        let Some(guest) = self.guests.get_mut(&cid) else { return };
        if !std::mem::replace(&mut guest.marked, true) {
            self.sched.push(cid, guest.terms, GUEST | u64::from(cid));
        }
    }

    /// On what terms a connection's bytes move; the guest's own queue is as urgent as the most urgent of them.
    pub(crate) fn set_terms(&mut self, id: FlowId, terms: Terms) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        flow.terms = terms;
        for key in flow.keys {
            if let Some(guest) = self.guests.get_mut(&key.cid) {
                guest.terms.class = guest.terms.class.max(terms.class);
                guest.terms.weight = guest.terms.weight.max(terms.weight);
            }
        }
    }

    /// Move what is most urgent, a few quanta of it.
    pub(crate) fn serve(&mut self) {
        let now = self.now_us();
        while let Some((_, item)) = self.late.first().copied().filter(|(at, _)| *at <= now) {
            self.late.pop_first();
            self.go_on(item);
        }
        let mut began = Instant::now();
        for _ in 0..SERVICES {
            let Some((item, tenant, class)) = self.sched.pop() else { return };
            let (bytes, more) = if item & GUEST != 0 {
                let cid = item as u32;
                if let Some(guest) = self.guests.get_mut(&cid) {
                    guest.marked = false;
                }
                let (bytes, more) = self.take_packets(cid, QUANTUM);
                if more {
                    self.mark_guest(cid);
                }
                (bytes, false)
            } else {
                self.serve_lane(item, now)
            };
            began = self.account.note(tenant, began);
            self.sched.charge(tenant, class, bytes);
            if more {
                self.push_again(item);
            }
        }
    }

    fn serve_lane(&mut self, item: u64, now: u64) -> (usize, bool) {
        let (id, from) = (item >> 1, (item & 1) as usize);
        let Some(flow) = self.flows.get_mut(&id) else { return (0, false) };
        let rate = flow.terms.rate;
        if let Err(at) = flow.buckets[from].ready(rate, now) {
            // It stays marked, and comes again when it may.
            self.late.insert((at, item));
            return (0, false);
        }
        flow.marked[from] = false;
        let polling = self.polling();
        let (bytes, more) = self.relay(id, from, QUANTUM, !polling);
        if polling && !more {
            self.polled.insert(item);
        }
        if bytes > 0 && !self.poll.is_zero() {
            self.moved = Instant::now();
        }
        if let Some(flow) = self.flows.get_mut(&id) {
            if rate > 0 {
                flow.buckets[from].take(bytes);
            }
            flow.marked[from] = more;
        }
        (bytes, more)
    }

    /// Is it so short ago that a lane had something that they are looked at all the time?
    fn polling(&self) -> bool {
        !self.poll.is_zero() && self.moved.elapsed() < self.poll
    }

    /// Look at the lanes whose programs were not asked to ring; when that has not paid for long enough, ask them.
    pub(crate) fn look_at_polled(&mut self) {
        for _ in 0..LOOKS {
            if self.polled.is_empty() {
                return;
            }
            let ready: Vec<u64> = if self.polling() {
                let polled: Vec<u64> = self.polled.iter().copied().collect();
                polled.into_iter().filter(|item| self.could_move(*item)).collect()
            } else {
                self.polled.iter().copied().collect()
            };
            for item in &ready {
                self.polled.remove(item);
                self.mark(item >> 1);
            }
            if !ready.is_empty() {
                return;
            }
            std::hint::spin_loop();
        }
    }

    /// Has this direction of a connection something to move; or is the connection over, and not to be looked at?
    fn could_move(&mut self, item: u64) -> bool {
        let Some(flow) = self.flows.get_mut(&(item >> 1)) else { return true };
        let [Side::Lane(a), Side::Lane(b)] = &mut flow.sides else { return true };
        let (from, to) = if item & 1 == OPENER as u64 { (a, b) } else { (b, a) };
        from.could_relay(to)
    }

    /// What a guest's socket sends or gets has used up its rate until then.
    pub(crate) fn hold_back(&mut self, id: FlowId, from: usize, at: u64) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        if !std::mem::replace(&mut flow.marked[from], true) {
            self.late.insert((at, id << 1 | from as u64));
        }
    }

    /// What waited for its rate need not any more.
    fn go_on(&mut self, item: u64) {
        let (id, from) = (item >> 1, (item & 1) as usize);
        let Some(flow) = self.flows.get_mut(&id) else { return };
        if flow.is_lanes() {
            return self.push_again(item);
        }
        flow.marked[from] = false;
        match flow.socket(from) {
            Some(socket) => {
                socket.out.credit = true;
                self.queue(id, from);
            }
            None => self.queue(id, 1 - from),
        }
    }

    fn push_again(&mut self, item: u64) {
        if let Some(flow) = self.flows.get(&(item >> 1)) {
            let from = (item & 1) as usize;
            self.sched.push(flow.key_of(from).cid, flow.terms, item);
        }
    }

    /// How long nothing needs to be moved.
    pub(crate) fn rest(&self) -> Duration {
        if !self.sched.is_empty() {
            return Duration::ZERO;
        }
        let next = self.late.first().map_or(u64::MAX, |(at, _)| *at);
        Duration::from_micros(next.saturating_sub(self.now_us()))
    }
}
