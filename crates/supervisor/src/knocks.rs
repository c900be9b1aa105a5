//! Knocks: TCP connections of our own to listeners, one for each who waits to be accepted.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use isthmus_engine::node::sockets::{Brought, Visitor};

/// Knocks of nobody that are remembered, and for how long if there are more.
const OVER_MAX: usize = 1024;
const OVER_FOR: Duration = Duration::from_secs(60);

/// What a knock stands for.
pub(crate) enum Waiting {
    Neighbour(Box<Visitor>),
    /// A TCP connection that was accepted for somebody who was interrupted just then.
    Tcp(OwnedFd, SocketAddr),
}

pub(crate) struct Knock {
    /// Our end; closing it ends the knock.
    pub socket: OwnedFd,
    pub waiting: Waiting,
    /// What the loop calls it: it hears when the listener is closed.
    pub token: u64,
}

impl Knock {
    /// The connection that waits.
    pub fn connection(&self) -> Option<u64> {
        match &self.waiting {
            Waiting::Neighbour(visitor) => Some(visitor.brought.granted.connection),
            Waiting::Tcp(..) => None,
        }
    }

    /// The port that it is for, unless it is TCP's own.
    pub fn port(&self) -> Option<u32> {
        match &self.waiting {
            Waiting::Neighbour(visitor) => Some(visitor.brought.granted.port),
            Waiting::Tcp(..) => None,
        }
    }

    /// For a broker that was started again: a copy of the socket that waits.
    pub fn brought(&self) -> Option<Brought> {
        let Waiting::Neighbour(visitor) = &self.waiting else { return None };
        let Brought { socket, granted } = &visitor.brought;
        Some(Brought { socket: socket.try_clone().ok()?, granted: granted.clone() })
    }
}

/// Every knock, by where it comes from.
#[derive(Default)]
pub(crate) struct Knocks {
    standing: HashMap<SocketAddr, Knock>,
    /// Those that ended before they were accepted, and when. They stay in the listener's backlog, and are nobody.
    over: HashMap<SocketAddr, Instant>,
}

impl Knocks {
    pub fn insert(&mut self, from: SocketAddr, knock: Knock) {
        self.over.remove(&from);
        self.standing.insert(from, knock);
    }

    pub fn standing(&self) -> impl Iterator<Item = &Knock> {
        self.standing.values()
    }

    /// It was accepted.
    pub fn accepted(&mut self, from: SocketAddr) -> Option<Knock> {
        self.standing.remove(&from)
    }

    /// End one, before it is accepted; its socket is closed when this returns.
    pub fn end(&mut self, from: SocketAddr) -> Option<Waiting> {
        let Knock { socket, waiting, .. } = self.standing.remove(&from)?;
        drop(socket);
        self.remember(from, Instant::now());
        Some(waiting)
    }

    /// End those that are meant, and who waits with them; returns how many.
    pub fn end_where(&mut self, is_meant: impl Fn(&Knock) -> bool) -> usize {
        let meant = self.standing.iter().filter(|(_, knock)| is_meant(knock)).map(|(from, _)| *from);
        let meant: Vec<SocketAddr> = meant.collect();
        meant.iter().filter_map(|from| self.end(*from)).count()
    }

    /// May what was accepted from there be a knock of nobody? A program may have got the same port since: it is one
    /// only if it has ended, too.
    pub fn may_be_over(&mut self, from: SocketAddr) -> bool {
        self.over.remove(&from).is_some()
    }

    fn remember(&mut self, from: SocketAddr, now: Instant) {
        if self.over.len() >= OVER_MAX {
            self.over.retain(|_, since| *since + OVER_FOR > now);
        }
        if self.over.len() < OVER_MAX {
            self.over.insert(from, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    fn knock(token: u64) -> Knock {
        let (socket, waiting) = isthmus_sys::packet::pair().expect("a pair");
        Knock { socket, waiting: Waiting::Tcp(waiting, from(1)), token }
    }

    #[test]
    fn what_ends_before_it_is_accepted_is_nobody_once() {
        let mut knocks = Knocks::default();
        knocks.insert(from(5), knock(1));
        knocks.insert(from(6), knock(2));
        assert!(knocks.end(from(5)).is_some());
        assert!(knocks.accepted(from(5)).is_none());
        assert!(knocks.may_be_over(from(5)));
        assert!(!knocks.may_be_over(from(5)), "one connection of that port, not all");
        assert!(knocks.accepted(from(6)).is_some());
        assert!(!knocks.may_be_over(from(6)));
    }

    #[test]
    fn a_port_that_is_used_again_is_a_knock_again() {
        let mut knocks = Knocks::default();
        knocks.insert(from(5), knock(1));
        assert_eq!(knocks.end_where(|knock| knock.token == 1), 1);
        knocks.insert(from(5), knock(2));
        assert!(!knocks.may_be_over(from(5)));
        assert_eq!(knocks.standing().count(), 1);
    }

    #[test]
    fn not_more_are_remembered_than_a_few() {
        let mut knocks = Knocks::default();
        let now = Instant::now();
        for port in 0..=OVER_MAX as u16 {
            knocks.remember(from(port), now);
        }
        assert_eq!(knocks.over.len(), OVER_MAX);
        knocks.remember(from(9999), now + 2 * OVER_FOR);
        assert_eq!(knocks.over.len(), 1);
    }
}
