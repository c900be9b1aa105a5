//! `listen` and `accept`: a listener's port is leased from the broker, and neighbours who come are knocked in.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use isthmus_engine::Error;
use isthmus_engine::node::Node;
use isthmus_engine::node::sockets::{Brought, Visitor};
use isthmus_sys::inet::{self, Kind};
use isthmus_sys::poll;
use isthmus_sys::seccomp::{self, Answer, Call, Place};
use isthmus_wire::control::Refusal;

use crate::address::{self, NOBODYS, canonical};
use crate::ahead::{AGAIN, KNOCKING};
use crate::knocks::{Knock, Waiting};
use crate::supervisor::{ANSWER_LIMIT, Exchanged, Supervisor, Verdict};
use crate::target;

/// A knock crosses no wire. One that takes longer waits for room in the listener's backlog.
const KNOCK_LIMIT: Duration = Duration::from_millis(3);
/// How long one that was ended may take to be seen at its end, where softirqs wait for their turn.
const ENDING: Duration = Duration::from_millis(200);

/// A listening TCP socket of a supervised program.
pub(crate) struct Listener {
    pub address: SocketAddr,
    v6_only: bool,
    /// What the loop calls it once somebody has waited in `accept`.
    pub token: Option<u64>,
}

/// A port of the domain that is leased for listeners.
pub(crate) struct Lease {
    held: bool,
    /// `listen` calls that wait for it.
    pub waiting: Vec<u64>,
    /// Until when they do.
    pub until: Option<Instant>,
    backlog: u32,
}

/// A TCP connection that was accepted for somebody who was interrupted, and whose listener has no room for its knock.
pub(crate) struct PutOff {
    socket: OwnedFd,
    from: SocketAddr,
    listener: SocketAddr,
    pub knock_at: Instant,
    until: Instant,
}

impl PutOff {
    fn new(socket: OwnedFd, from: SocketAddr, listener: SocketAddr) -> Self {
        let now = Instant::now();
        Self { socket, from, listener, knock_at: now + AGAIN, until: now + KNOCKING }
    }
}

/// An `accept` that waits for somebody to come.
pub(crate) struct Accept {
    call: Call,
    flags: i32,
    /// Of the listener. We hold no copy of it: that would keep it open.
    pub inode: u64,
    pub until: Option<Instant>,
}

impl Listener {
    /// Does it take who connects to this address of its network?
    fn takes(&self, named: IpAddr) -> bool {
        let own = self.address.ip();
        let family = own.is_ipv4() == named.is_ipv4() || (named.is_ipv4() && !self.v6_only);
        own == named || (own.is_unspecified() && family)
    }
}

impl Supervisor {
    pub(crate) fn listen(self: &Arc<Self>, call: Call) -> Verdict {
        let [fd, backlog, ..] = call.arguments;
        let Ok(descriptor) = target::look(call.thread, fd as RawFd) else { return Verdict::Untouched };
        let Ok(socket) = seccomp::descriptor_of(call.thread, fd as RawFd) else { return Verdict::Untouched };
        if inet::kind_of(socket.as_fd()).unwrap_or(Kind::Other) == Kind::Other || self.state().rings {
            return Verdict::Untouched;
        }
        if let Err(error) = inet::listen(socket.as_fd(), backlog as i32) {
            return Verdict::Is(Answer::Errno(error.raw_os_error().unwrap_or(libc::EINVAL)));
        }
        let Ok(address) = inet::local_address(socket.as_fd()).map(canonical) else {
            return Verdict::Is(Answer::Value(0));
        };
        // Nobody outside this network reaches it, whatever path there is.
        if address.ip().is_loopback() {
            return Verdict::Is(Answer::Value(0));
        }
        if self.state().hidden.contains(&descriptor.inode) {
            return Verdict::Is(Answer::Value(0));
        }
        let v6_only = inet::is_v6_only(socket.as_fd());
        self.listens(socket.as_fd(), descriptor.inode, Listener { address, v6_only, token: None });
        let asks = {
            let mut state = self.state();
            let fresh = Lease {
                held: false,
                waiting: Vec::new(),
                until: None,
                backlog: (backlog as i32).max(1) as u32,
            };
            let lease = state.leases.entry(address.port()).or_insert(fresh);
            if lease.held {
                return Verdict::Is(Answer::Value(0));
            }
            lease.waiting.push(call.id);
            let asks = lease.until.is_none();
            lease.until = Some(Instant::now() + ANSWER_LIMIT);
            asks
        };
        match self.node() {
            Some(node) if asks => self.lease(node, address.port()),
            None => self.leased(address.port(), Err(Error::BrokerLost)),
            _ => {}
        }
        Verdict::Waits
    }

    fn lease(self: &Arc<Self>, node: &Node, port: u16) {
        let backlog = self.state().leases.get(&port).map_or(1, |lease| lease.backlog);
        let supervisor = Arc::downgrade(self);
        let then = move |result| {
            if let Some(supervisor) = supervisor.upgrade() {
                supervisor.leased(port, result);
            }
        };
        node.lease_then(port.into(), backlog, Box::new(then));
    }

    /// A broker is there, for the first time or again: it knows of no port of ours.
    pub(crate) fn lease_all(self: &Arc<Self>, node: &Node) {
        let ports: Vec<u16> = {
            let mut state = self.state();
            for lease in state.leases.values_mut() {
                lease.held = false;
            }
            state.leases.keys().copied().collect()
        };
        for port in ports {
            self.lease(node, port);
        }
    }

    /// Ask again for ports that were refused: whoever had them may be gone, or the rules may have changed.
    pub(crate) fn lease_again(self: &Arc<Self>, node: &Node) {
        let ports: Vec<u16> = {
            let state = self.state();
            let missing = state.leases.iter().filter(|(_, lease)| !lease.held && lease.until.is_none());
            missing.map(|(port, _)| *port).collect()
        };
        for port in ports {
            self.lease(node, port);
        }
    }

    fn leased(&self, port: u16, result: Result<(), Error>) {
        let waiting = {
            let mut state = self.state();
            let Some(lease) = state.leases.get_mut(&port) else { return };
            if lease.held && result.is_err() {
                // It was asked for twice, by a program and when the broker came, and this is the second answer.
                return;
            }
            lease.held = result.is_ok();
            lease.until = None;
            std::mem::take(&mut lease.waiting)
        };
        match result {
            Ok(()) => self.say(|| format!("listen on port {port}: neighbours come directly")),
            Err(error) => {
                let nowhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
                self.state().fallbacks.count(nowhere, false, &format!("listen: {error}"));
                self.say(|| format!("listen on port {port}: TCP alone: {error}"));
            }
        }
        for id in waiting {
            self.answer(id, Answer::Value(0));
        }
        self.wake();
    }

    pub(crate) fn give_up_leases(&self, now: Instant) {
        let late = |lease: &Lease| lease.until.is_some_and(|until| until <= now);
        let ports: Vec<u16> =
            self.state().leases.iter().filter(|(_, lease)| late(lease)).map(|(port, _)| *port).collect();
        for port in ports {
            self.leased(port, Err(Error::TimedOut { done: 0 }));
        }
    }

    /// Knock at the listener that takes somebody.
    pub(crate) fn visit(&self, visitor: Box<Visitor>) -> Result<(), (Refusal, Box<Visitor>)> {
        let port = visitor.brought.granted.port as u16;
        let named: Option<IpAddr> = visitor.destination.parse().ok();
        // Of several that take it the kernel prefers the one of its own address, then the one of its own family.
        let wanted = named.or_else(|| visitor.source.parse().ok());
        let fit = |listener: &Listener| {
            let ip = listener.address.ip();
            let takes = listener.address.port() == port && named.is_none_or(|named| listener.takes(named));
            takes.then(|| {
                (Some(ip) != named, wanted.is_some_and(|wanted| wanted.is_ipv4() != ip.is_ipv4()), ip)
            })
        };
        let best = {
            let state = self.state();
            state.listeners.values().filter_map(|listener| Some((fit(listener)?, listener.address))).min()
        };
        let address = best.map(|(_, address)| address);
        let Some(address) = address else { return Err((Refusal::NobodyListens, visitor)) };
        let towards = SocketAddr::new(named.unwrap_or(reachable(address).ip()), port);
        let (error, visitor) = match self.knock(towards, Waiting::Neighbour(visitor)) {
            Err((error, Waiting::Neighbour(visitor))) => (error, visitor),
            _ => return Ok(()),
        };
        let refusal = match error.kind() {
            io::ErrorKind::AddrNotAvailable => Refusal::WrongAddress,
            io::ErrorKind::ConnectionRefused => {
                // It was closed, most likely, which nobody told us of.
                self.sweep();
                Refusal::NobodyListens
            }
            _ => Refusal::BacklogFull,
        };
        Err((refusal, visitor))
    }

    /// Give a port back if no listener uses it.
    pub(crate) fn give_back_unused(&self, port: u16) {
        let mut state = self.state();
        let is_used = state.listeners.values().any(|listener| listener.address.port() == port);
        if is_used {
            return;
        }
        let Some(lease) = state.leases.remove(&port) else { return };
        drop(state);
        // Whoever waits for the broker there has closed its socket meanwhile.
        for id in lease.waiting {
            self.answer(id, Answer::Value(0));
        }
        if let Some(node) = self.node() {
            node.give_back(port.into());
        }
    }

    /// Connect to a listener of this network, on behalf of who waits. `WouldBlock`: it has no room.
    fn knock(&self, listener: SocketAddr, waiting: Waiting) -> Result<(), (io::Error, Waiting)> {
        let begun = inet::bound(listener.ip()).and_then(|socket| {
            let from = canonical(inet::local_address(socket.as_fd())?);
            Ok((socket.try_clone()?, socket, from))
        });
        // Known before it can be accepted, and without the lock while it is under way.
        let (copy, socket, from) = match begun {
            Ok(begun) => begun,
            Err(error) => return Err((error, waiting)),
        };
        let token = {
            let mut state = self.state();
            let token = state.new_token();
            state.knocks.insert(from, Knock { socket, waiting, token });
            token
        };
        // A byte that nobody reads: some listeners want to see one, and a connection that is closed with something
        // unread leaves no trace in the kernel's tables, which are not endless.
        let completed = inet::begin(copy.as_fd(), listener)
            .and_then(|()| inet::completed(copy.as_fd(), KNOCK_LIMIT))
            .and_then(|completed| if completed { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) })
            .and_then(|()| inet::send_byte(copy.as_fd()))
            // Not before: what is not connected yet counts as hung up.
            .and_then(|()| self.set.add(copy.as_fd(), token));
        let Err(error) = completed else { return Ok(()) };
        let waiting = {
            let mut state = self.state();
            // Who accepts it from now on meets a connection that has ended.
            drop(copy);
            state.knocks.end(from)
        };
        // Or it was accepted all the same.
        waiting.map_or(Ok(()), |waiting| Err((error, waiting)))
    }

    fn put_off(&self, one: PutOff) {
        self.state().put_off.push(one);
        self.wake();
    }

    /// Knock again for those whose listener had no room. Whose listener is gone, or stays full, is reset.
    pub(crate) fn look_after_put_off(&self, now: Instant) {
        let due = self.state().put_off.extract_where(|one| one.knock_at <= now);
        for PutOff { socket, from, listener, until, .. } in due {
            let knocked = self.knock(listener, Waiting::Tcp(socket, from));
            if let Err((error, Waiting::Tcp(socket, from))) = knocked {
                if error.kind() == io::ErrorKind::WouldBlock && now < until {
                    let again = PutOff { socket, from, listener, knock_at: now + AGAIN, until };
                    self.state().put_off.push(again);
                }
            }
        }
    }

    /// The listener of a knock was closed, or its program is gone: so is who waited.
    pub(crate) fn knock_over(&self, token: u64) -> bool {
        self.state().knocks.end_where(|knock| knock.token == token) > 0
    }

    /// Whoever waits in `accept` at what is no listener of ours any more goes on without us.
    pub(crate) fn let_go(&self, is_meant: impl Fn(&Accept) -> bool) {
        let meant = self.state().accepts.extract_where(is_meant);
        for accept in meant {
            self.answer(accept.call.id, Answer::Continue);
        }
    }

    pub(crate) fn accept(&self, call: Call, flags: i32) -> Verdict {
        let fd = call.arguments[0] as RawFd;
        let descriptor = match target::look(call.thread, fd) {
            Ok(descriptor) => descriptor,
            Err(error) => {
                if target::is_hidden(&error) {
                    // Whichever it is that it accepts at.
                    self.hide(|_| true);
                }
                return Verdict::Untouched;
            }
        };
        let inode = descriptor.inode;
        if !self.state().listeners.contains_key(&inode) {
            return Verdict::Untouched;
        }
        let Ok(listener) = seccomp::descriptor_of(call.thread, fd) else { return Verdict::Untouched };
        let limit = if descriptor.nonblocking { None } else { inet::receive_limit(listener.as_fd()) };
        let accept = Accept { call, flags, inode, until: limit.map(|limit| Instant::now() + limit) };
        if let Some(verdict) = self.take(&accept, &listener) {
            return verdict;
        }
        if descriptor.nonblocking {
            return Verdict::Is(Answer::Errno(libc::EAGAIN));
        }
        let mut state = self.state();
        // A thread waits once: what it waited for before was interrupted.
        let before = state.accepts.extract_where(|accept| accept.call.thread == call.thread);
        for accept in before {
            self.answered(accept.call.id);
        }
        let token = state.new_token();
        let Some(known) = state.listeners.get_mut(&inode) else { return Verdict::Untouched };
        let watched = known.token.is_some();
        known.token.get_or_insert(token);
        state.accepts.push(accept);
        if !watched {
            // It leaves the set when the program closes it, and says so if somebody is there already.
            if self.set.add_edge(listener.as_fd(), token).is_err() {
                if let Some(known) = state.listeners.get_mut(&inode) {
                    known.token = None;
                }
                state.accepts.pop();
                return Verdict::Is(Answer::Errno(libc::ENOBUFS));
            }
        }
        Verdict::Waits
    }

    /// Somebody came to a listener at which an `accept` has waited.
    pub(crate) fn accept_ready(&self, token: u64, hung_up: bool) {
        if hung_up && self.knock_over(token) {
            return;
        }
        let waiting: Vec<Accept> = {
            let mut state = self.state();
            let inode = state.listeners.iter().find(|(_, listener)| listener.token == Some(token));
            let Some(inode) = inode.map(|(inode, _)| *inode) else { return };
            state.accepts.extract_where(|accept| accept.inode == inode)
        };
        let mut left = Vec::new();
        for accept in waiting {
            if !seccomp::waits(self.calls(), accept.call.id) {
                self.answered(accept.call.id);
                continue;
            }
            let listener = seccomp::descriptor_of(accept.call.thread, accept.call.arguments[0] as RawFd);
            // The number may be another file's by now.
            let same = |listener: &OwnedFd| inet::inode_of(listener.as_fd()).is_ok_and(|i| i == accept.inode);
            let taken = listener.ok().filter(same).and_then(|listener| self.take(&accept, &listener));
            match taken {
                Some(verdict) => self.settle(accept.call, verdict),
                None => left.push(accept),
            }
        }
        self.state().accepts.splice(0..0, left);
    }

    pub(crate) fn give_up_accepts(&self, now: Instant) {
        let late =
            self.state().accepts.extract_where(|accept| accept.until.is_some_and(|until| until <= now));
        for accept in late {
            self.answer(accept.call.id, Answer::Errno(libc::EAGAIN));
        }
    }

    /// Accept for a program. None: nobody is there.
    fn take(&self, accept: &Accept, listener: &OwnedFd) -> Option<Verdict> {
        loop {
            let ready = poll::wait_readable(listener.as_fd(), Some(Duration::ZERO)).unwrap_or_default();
            if ready.hung_up && !ready.readable {
                // It was shut down: the kernel knows what to say.
                return Some(Verdict::Untouched);
            }
            if !ready.readable || !seccomp::waits(self.calls(), accept.call.id) {
                return None;
            }
            let (tcp, from) = match inet::accept(listener.as_fd()) {
                Ok(accepted) => accepted,
                Err(error) => {
                    return Some(Verdict::Is(Answer::Errno(error.raw_os_error().unwrap_or(libc::EAGAIN))));
                }
            };
            let (knock, may_be_over) = {
                let mut state = self.state();
                let knock = state.knocks.accepted(canonical(from));
                let may_be_over = knock.is_none() && state.knocks.may_be_over(canonical(from));
                (knock, may_be_over)
            };
            if may_be_over && inet::hangs_up(tcp.as_fd(), ENDING) {
                continue;
            }
            let waiting = match knock {
                Some(knock) => {
                    // Its byte is unread: the connection is reset, and our end is not left over.
                    drop(tcp);
                    knock.waiting
                }
                None if self.options.require && !self.is_own(from) => {
                    self.state().fallbacks.count(from, true, "accept: it came over TCP");
                    continue;
                }
                None => Waiting::Tcp(tcp, from),
            };
            return Some(self.hand_over(accept, listener, waiting));
        }
    }

    fn is_own(&self, address: SocketAddr) -> bool {
        let ip = address.ip().to_canonical();
        ip.is_loopback() || self.state().own.contains(&ip)
    }

    /// Give the program what it accepted.
    fn hand_over(&self, accept: &Accept, listener: &OwnedFd, waiting: Waiting) -> Verdict {
        let Accept { call, flags, .. } = accept;
        let [_, at, len_at, ..] = call.arguments;
        let bound = inet::local_address(listener.as_fd());
        let v6 = bound.as_ref().is_ok_and(SocketAddr::is_ipv6);
        let (socket, from) = match &waiting {
            Waiting::Tcp(socket, from) => (socket, *from),
            Waiting::Neighbour(visitor) => (&visitor.brought.socket, source_of(visitor)),
        };
        let nonblocking = flags & libc::SOCK_NONBLOCK != 0;
        if inet::set_nonblocking(socket.as_fd(), nonblocking).is_err() {
            return Verdict::Is(Answer::Errno(libc::ENOBUFS));
        }
        if at != 0 {
            let bytes = address::encode(from, v6);
            if let Err(number) = target::write_address(call.thread, at, len_at, &bytes) {
                return Verdict::Is(Answer::Errno(number));
            }
        }
        if let Waiting::Neighbour(visitor) = &waiting {
            let local = local_of(visitor, bound.ok().map(canonical));
            let granted = visitor.brought.granted.clone();
            let entry = Exchanged { local, peer: from, v6, asked_again: false, granted, set: HashMap::new() };
            if self.exchanged(socket.as_fd(), entry).is_err() {
                return Verdict::Is(Answer::Errno(libc::ENOBUFS));
            }
        }
        let close_on_exec = flags & libc::SOCK_CLOEXEC != 0;
        match seccomp::give(self.calls(), call.id, socket.as_fd(), Place::Returned, close_on_exec) {
            Ok(_) => {
                self.answered(call.id);
                if let Waiting::Neighbour(visitor) = &waiting {
                    let Brought { granted, .. } = &visitor.brought;
                    self.say(|| format!("accept from {from}: {}; {}", granted.peer_name, granted.why));
                }
                Verdict::Waits
            }
            Err(error) => {
                // Interrupted, or without room for one more open file: whoever accepts next gets it.
                if let Ok(bound) = inet::local_address(listener.as_fd()).map(canonical) {
                    let listener = reachable(bound);
                    match self.knock(listener, waiting) {
                        Ok(()) => {}
                        Err((_, Waiting::Neighbour(visitor))) => self.knock_again(visitor),
                        Err((_, Waiting::Tcp(socket, from))) => {
                            self.put_off(PutOff::new(socket, from, listener))
                        }
                    }
                }
                Verdict::Is(Answer::Errno(error.raw_os_error().unwrap_or(libc::EMFILE)))
            }
        }
    }
}

fn reachable(bound: SocketAddr) -> SocketAddr {
    match bound.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), bound.port()),
        IpAddr::V6(ip) if ip.is_unspecified() => SocketAddr::new(Ipv6Addr::LOCALHOST.into(), bound.port()),
        _ => bound,
    }
}

/// Take out of a list what is meant, in order.
trait Extract<T> {
    fn extract_where(&mut self, is_meant: impl Fn(&T) -> bool) -> Vec<T>;
}

impl<T> Extract<T> for Vec<T> {
    fn extract_where(&mut self, is_meant: impl Fn(&T) -> bool) -> Vec<T> {
        let (meant, left) = std::mem::take(self).into_iter().partition(|item| is_meant(item));
        *self = left;
        meant
    }
}

fn source_of(visitor: &Visitor) -> SocketAddr {
    SocketAddr::new(visitor.source.parse().unwrap_or(NOBODYS), visitor.source_port as u16)
}

fn local_of(visitor: &Visitor, bound: Option<SocketAddr>) -> SocketAddr {
    let port = visitor.brought.granted.port as u16;
    let ip = visitor.destination.parse().ok().or(bound.map(|bound| bound.ip()));
    SocketAddr::new(ip.unwrap_or(NOBODYS), port)
}
