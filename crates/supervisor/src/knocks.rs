//! Knocks: TCP connections of our own to listeners, one for each who waits to be accepted.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use isthmus_engine::node::sockets::{Brought, Visitor};

/// Knocks of nobody that are remembered: the last ones, for most of them are accepted soon or never.
const OVER_MAX: usize = 1024;

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
    /// Those that ended before they were accepted, oldest first. They stay in the listener's backlog, and are nobody.
    over: VecDeque<SocketAddr>,
}

impl Knocks {
    pub fn insert(&mut self, from: SocketAddr, knock: Knock) {
        self.may_be_over(from);
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
        self.remember(from);
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
        let at = self.over.iter().position(|over| *over == from);
        at.is_some_and(|at| self.over.remove(at).is_some())
    }

    fn remember(&mut self, from: SocketAddr) {
        if self.over.len() >= OVER_MAX {
            self.over.pop_front();
        }
        self.over.push_back(from);
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
    fn of_too_many_the_last_are_remembered() {
        let mut knocks = Knocks::default();
        for port in 0..=OVER_MAX as u16 {
            knocks.remember(from(port));
        }
        assert_eq!(knocks.over.len(), OVER_MAX);
        assert!(!knocks.may_be_over(from(0)));
        assert!(knocks.may_be_over(from(1)) && knocks.may_be_over(from(OVER_MAX as u16)));
    }
}
