//! Connections made ahead of their use.
//!
//! To be introduced costs a program several wake-ups, one after the other. While it connects to the same place again and
//! again, the next connections are made before it asks for them: the listening side holds its end and knocks at nobody's
//! door. Who uses one writes two bytes into it, the port that it comes from, and has it at once; the other side reads
//! those and knocks.
//!
//! What is refused only then ends at once, as a TCP connection that is still in the listener's backlog does.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use isthmus_engine::Error;
use isthmus_engine::node::sockets::{AHEAD, Brought, Granted, SocketRequest, Visitor};
use isthmus_sys::{packet, poll};
use isthmus_wire::control::Refusal;

use crate::supervisor::{State, Supervisor};

/// For so long one is of use: then nobody connects there any more, or whoever listens has changed.
const FRESH: Duration = Duration::from_millis(200);
/// Connections within this time are one burst; for each of them but the first, one is made ahead, but no more than
/// that.
const BURST: Duration = Duration::from_millis(100);
const AHEAD_MAX: usize = 8;
/// Places that are remembered.
const PLACES_MAX: usize = 256;
/// How long the listening side holds one that is not used; the opening side has given it up long before.
const HELD: Duration = Duration::from_secs(10);
/// How long it tries to knock for one that is used: a listener's backlog may be full for a moment. And between attempts.
pub(crate) const KNOCKING: Duration = Duration::from_secs(10);
/// The same for one that was not made ahead: its opener goes to TCP then, and may do no better there.
const ASKING: Duration = Duration::from_secs(1);
pub(crate) const AGAIN: Duration = Duration::from_millis(20);

/// A place that is connected to.
#[derive(Default)]
struct Place {
    /// When it was, in the last burst.
    recent: VecDeque<Instant>,
    ready: VecDeque<(Brought, Instant)>,
    /// Asked for, and not answered.
    asked: usize,
    /// Whoever listens there has none made ahead.
    never: bool,
}

/// What was made ahead for this side's programs; by where to and where from.
#[derive(Default)]
pub(crate) struct Ahead(HashMap<(SocketAddr, Option<IpAddr>), Place>);

impl Ahead {
    /// When something here is of no use any more.
    pub fn next(&self) -> Option<Instant> {
        self.0.values().filter_map(|place| place.ready.front()).map(|(_, until)| *until).min()
    }

    /// Throw away what is of no use any more.
    pub fn expire(&mut self, now: Instant) {
        for place in self.0.values_mut() {
            while place.ready.front().is_some_and(|(_, until)| *until <= now) {
                place.ready.pop_front();
            }
        }
    }

    /// One connection less, if it is here.
    pub fn cut(&mut self, connection: u64) {
        for place in self.0.values_mut() {
            place.ready.retain(|(brought, _)| brought.granted.connection != connection);
        }
    }

    /// What one broker made is nothing to the next.
    pub fn forget(&mut self) {
        self.0.clear();
    }

    /// One to this place, whose other end is there still.
    pub fn take(&mut self, to: SocketAddr, from: Option<IpAddr>) -> Option<Brought> {
        let place = self.0.get_mut(&(to, from))?;
        let now = Instant::now();
        while let Some((brought, until)) = place.ready.pop_front() {
            let state = poll::wait_readable(brought.socket.as_fd(), Some(Duration::ZERO));
            if until > now && state.is_ok_and(|state| !state.hung_up) {
                return Some(brought);
            }
        }
        None
    }

    /// Somebody connects there. How many more should be made ahead.
    fn wanted(&mut self, to: SocketAddr, from: Option<IpAddr>, now: Instant) -> usize {
        if self.0.len() >= PLACES_MAX && !self.0.contains_key(&(to, from)) {
            self.0.retain(|_, place| place.asked > 0 || !place.ready.is_empty());
            if self.0.len() >= PLACES_MAX {
                return 0;
            }
        }
        let place = self.0.entry((to, from)).or_default();
        if place.never {
            return 0;
        }
        place.recent.push_back(now);
        while place.recent.len() > AHEAD_MAX + 1 || place.recent.front().is_some_and(|at| *at + BURST < now) {
            place.recent.pop_front();
        }
        let wanted = (place.recent.len() - 1).saturating_sub(place.ready.len() + place.asked);
        place.asked += wanted;
        wanted
    }

    fn made(&mut self, to: SocketAddr, from: Option<IpAddr>, result: Result<Brought, Error>) {
        let Some(place) = self.0.get_mut(&(to, from)) else { return };
        place.asked = place.asked.saturating_sub(1);
        match result {
            Ok(brought) => place.ready.push_back((brought, Instant::now() + FRESH)),
            Err(Error::Refused { refusal: Refusal::PathUnavailable, .. }) => place.never = true,
            Err(_) => {}
        }
    }
}

/// A connection made ahead for whoever listens on this side.
pub(crate) struct Held {
    visitor: Box<Visitor>,
    until: Instant,
    /// It is used: when to knock (again).
    knock_at: Option<Instant>,
    /// It was not made ahead: the broker is told how it ends.
    asked: bool,
}

impl Held {
    pub fn connection(&self) -> u64 {
        self.visitor.brought.granted.connection
    }

    pub fn port(&self) -> u32 {
        self.visitor.brought.granted.port
    }

    /// For a broker that was started again, if it is used: a copy of the socket.
    pub fn brought(&self) -> Option<Brought> {
        if !self.is_used() {
            return None;
        }
        let Brought { socket, granted } = &self.visitor.brought;
        Some(Brought { socket: socket.try_clone().ok()?, granted: granted.clone() })
    }

    /// Does it wait for room at its listener, and its opener believe that it is connected?
    pub fn is_used(&self) -> bool {
        self.knock_at.is_some() && !self.asked
    }

    /// When something is to be done about it.
    pub fn next(&self) -> Instant {
        self.knock_at.unwrap_or(self.until)
    }
}

impl State {
    /// When those that wait for room at the listeners of a port knock next, if any do: who comes later waits with them.
    fn behind(&self, port: u32) -> Option<Instant> {
        let waiting = |other: &Held| if other.port() == port { other.knock_at } else { None };
        self.held.values().filter_map(waiting).max()
    }
}

impl Supervisor {
    /// A program has connected there: have more made ahead, if it goes on like that.
    pub(crate) fn make_ahead(
        self: &Arc<Self>,
        request: &SocketRequest,
        to: SocketAddr,
        from: Option<IpAddr>,
    ) {
        let Some(node) = self.node() else { return };
        let wanted = self.state().ahead.wanted(to, from, Instant::now());
        for _ in 0..wanted {
            let supervisor = Arc::downgrade(self);
            let then = move |result| {
                if let Some(supervisor) = supervisor.upgrade() {
                    supervisor.state().ahead.made(to, from, result);
                    // They are thrown away in time.
                    supervisor.wake();
                }
            };
            let request = SocketRequest { ahead: true, source_port: 0, ..request.clone() };
            node.connect_socket_then(&request, Box::new(then));
        }
    }

    /// Somebody may come: hold the end until then. On the engine's thread.
    pub(crate) fn hold(&self, visitor: Box<Visitor>) -> Result<(), Refusal> {
        let port = visitor.brought.granted.port;
        // Of a listener that was closed we are not told; and nobody would be refused by it later.
        let living = self.living_now().map_err(|_| Refusal::LimitReached)?;
        let listens = |(inode, address): (&u64, u16)| u32::from(address) == port && living.contains(inode);
        if !self.state().listeners.iter().map(|(inode, l)| (inode, l.address.port())).any(listens) {
            return Err(Refusal::NobodyListens);
        }
        let mut state = self.state();
        let token = state.new_token();
        if self.set.add(visitor.brought.socket.as_fd(), token).is_err() {
            return Err(Refusal::LimitReached);
        }
        let until = Instant::now() + HELD;
        state.held.insert(token, Held { visitor, until, knock_at: None, asked: false });
        Ok(())
    }

    /// Something came to one of those. `false`: the token is not one of theirs.
    pub(crate) fn held_ready(&self, token: u64) -> bool {
        let Some(mut held) = self.state().held.remove(&token) else { return false };
        let mut port = [0; AHEAD];
        let socket = held.visitor.brought.socket.as_fd();
        let came = packet::pull(socket, &mut port);
        let _ = self.set.remove(socket);
        // Given up; or this is nobody who keeps to the rules.
        if came.is_ok_and(|len| len == AHEAD) {
            held.visitor.source_port = u16::from_le_bytes(port).into();
            let now = Instant::now();
            held.until = now + KNOCKING;
            held.knock_at = self.state().behind(held.port()).or(Some(now));
            {
                // Who opened it says so at once, if it is honest; we do later, for many together.
                let mut state = self.state();
                state.used.push(held.connection());
                state.held.insert(token, held);
            }
            self.look_after_held(now);
        }
        true
    }

    /// Somebody comes. On the engine's thread.
    pub(crate) fn come(&self, visitor: Box<Visitor>) {
        let now = Instant::now();
        let token = {
            let mut state = self.state();
            let knock_at = state.behind(visitor.brought.granted.port).or(Some(now));
            let token = state.new_token();
            state.held.insert(token, Held { visitor, until: now + ASKING, knock_at, asked: true });
            token
        };
        self.look_after_held(now);
        if self.state().held.contains_key(&token) {
            self.wake();
        }
    }

    /// Knock for one that is used. `false`: its listener has no room now.
    fn knock_for(&self, token: u64, mut held: Held) -> bool {
        let connection = held.connection();
        match self.visit(held.visitor) {
            Ok(()) => {
                if let Some(node) = self.node().filter(|_| held.asked) {
                    let _ = node.accept_socket(connection, None);
                }
                true
            }
            Err((Refusal::BacklogFull, visitor)) if Instant::now() < held.until => {
                held.knock_at = Some(Instant::now() + AGAIN);
                self.state().held.insert(token, Held { visitor, ..held });
                false
            }
            Err((refusal, visitor)) => {
                self.turn_away(&visitor, refusal, held.asked);
                true
            }
        }
    }

    /// Its opener believes that it is connected, and its listener has no room just now.
    pub(crate) fn knock_again(&self, visitor: Box<Visitor>) {
        let now = Instant::now();
        {
            let mut state = self.state();
            let token = state.new_token();
            let held = Held { visitor, until: now + KNOCKING, knock_at: Some(now + AGAIN), asked: false };
            state.held.insert(token, held);
        }
        self.wake();
    }

    fn turn_away(&self, visitor: &Visitor, refusal: Refusal, asked: bool) {
        let Granted { connection, peer_name, .. } = &visitor.brought.granted;
        self.say(|| format!("accept from {peer_name}: ended: {refusal:?}"));
        if let Some(node) = self.node().filter(|_| asked) {
            node.refuse(*connection, refusal);
        }
    }

    /// Knock (again), in the order in which they came, and throw away what nobody uses. A listener without room costs
    /// one attempt, however many wait for it.
    pub(crate) fn look_after_held(&self, now: Instant) {
        let due: Vec<(u64, Held)> = {
            let mut state = self.state();
            state.ahead.expire(now);
            let due = state.held.iter().filter(|(_, held)| held.next() <= now).map(|(token, _)| *token);
            let mut due: Vec<u64> = due.collect();
            due.sort_unstable();
            due.into_iter().filter_map(|token| Some((token, state.held.remove(&token)?))).collect()
        };
        let mut full = HashSet::new();
        for (token, mut held) in due {
            let port = held.port();
            if held.knock_at.is_none() {
                continue;
            }
            if held.until <= now {
                self.turn_away(&held.visitor, Refusal::BacklogFull, held.asked);
            } else if full.contains(&port) {
                held.knock_at = Some(now + AGAIN);
                self.state().held.insert(token, held);
            } else if !self.knock_for(token, held) {
                full.insert(port);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use isthmus_engine::node::sockets::Granted;
    use isthmus_wire::control::SocketKind;

    use super::*;

    const HERE: Option<IpAddr> = None;

    fn place() -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 7], 80))
    }

    fn brought(connection: u64) -> (Brought, std::os::fd::OwnedFd) {
        let (socket, other) = packet::pair().expect("a pair");
        let granted = Granted {
            connection,
            kind: SocketKind::Stream,
            peer: 1,
            peer_name: String::new(),
            peer_port: 80,
            port: 7,
            opener: true,
            why: String::new(),
            ticket: [0; 32],
        };
        (Brought { socket, granted }, other)
    }

    #[test]
    fn only_who_connects_again_and_again_has_some_made_ahead() {
        let (mut ahead, now) = (Ahead::default(), Instant::now());
        assert_eq!(ahead.wanted(place(), HERE, now), 0);
        assert_eq!(ahead.wanted(place(), HERE, now), 1);
        // One is asked for already.
        assert_eq!(ahead.wanted(place(), HERE, now), 1);
        for _ in 0..50 {
            ahead.wanted(place(), HERE, now);
        }
        assert_eq!(ahead.0[&(place(), HERE)].asked, AHEAD_MAX);
        // Much later it is the first one again.
        let mut ahead = Ahead::default();
        ahead.wanted(place(), HERE, now);
        assert_eq!(ahead.wanted(place(), HERE, now + 2 * BURST), 0);
    }

    #[test]
    fn what_is_taken_is_fresh_and_has_another_end() {
        let mut ahead = Ahead::default();
        let now = Instant::now();
        ahead.wanted(place(), HERE, now);
        ahead.wanted(place(), HERE, now);
        let (first, gone) = brought(1);
        let (second, _other) = brought(2);
        ahead.made(place(), HERE, Ok(first));
        ahead.made(place(), HERE, Ok(second));
        drop(gone);
        assert_eq!(ahead.take(place(), HERE).map(|brought| brought.granted.connection), Some(2));
        assert!(ahead.take(place(), HERE).is_none());
        let (third, _other) = brought(3);
        ahead.made(place(), HERE, Ok(third));
        assert!(ahead.next().is_some());
        ahead.expire(Instant::now() + FRESH);
        assert!(ahead.take(place(), HERE).is_none() && ahead.next().is_none());
    }

    #[test]
    fn whoever_cannot_is_not_asked_again() {
        let (mut ahead, now) = (Ahead::default(), Instant::now());
        ahead.wanted(place(), HERE, now);
        assert_eq!(ahead.wanted(place(), HERE, now), 1);
        let error = Error::Refused { refusal: Refusal::PathUnavailable, rule: 0, text: String::new() };
        ahead.made(place(), HERE, Err(error));
        assert_eq!(ahead.wanted(place(), HERE, now), 0);
    }
}
