//! `connect`: ask the broker for a socket to this address, and put it in the place of the program's.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use isthmus_engine::Error;
use isthmus_engine::node::sockets::{AHEAD, Brought, SocketRequest};
use isthmus_sys::inet::{self, Kind};
use isthmus_sys::packet;
use isthmus_sys::seccomp::{self, Answer, Call, Place};
use isthmus_wire::control::SocketKind;

use crate::address::{NOBODYS, canonical, may_be_a_neighbour};
use crate::epoll;
use crate::supervisor::{ANSWER_LIMIT, Exchanged, State, Supervisor, Verdict};
use crate::target;

/// Ports that we give to connections whose TCP port nobody will know, as the kernel chooses them by default.
const SOURCE_PORTS: std::ops::Range<u16> = 32768..61000;

/// How long a way through the network is taken to be what it was; and how many are remembered.
const ROUTE_HOLDS: Duration = Duration::from_secs(1);
const ROUTES_MAX: usize = 256;
/// Why a program is not helped.
pub(crate) const HIDDEN: &str =
    "its program has changed its user, and nobody here may look into it (CAP_SYS_PTRACE)";
/// In the place of an address that cannot be read.
const NOWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// A `connect` whose answer the broker owes.
pub(crate) struct Connect {
    pub call: Call,
    pub address: SocketAddr,
    pub until: Instant,
    fd: RawFd,
    /// Of the program's TCP socket; another one after the number was used again.
    inode: u64,
    nonblocking: bool,
    /// The program's TCP socket.
    socket: OwnedFd,
    source: SocketAddr,
    request: SocketRequest,
}

impl Supervisor {
    pub(crate) fn connect(self: &Arc<Self>, call: Call) -> Verdict {
        let [fd, at, len, ..] = call.arguments;
        let fd = fd as RawFd;
        let address = match target::read_address(call.thread, at, len) {
            Ok(Some(address)) => address,
            Ok(None) => return Verdict::Untouched,
            Err(_) => return Verdict::Fallback(NOWHERE, format!("connect: {HIDDEN}")),
        };
        if !may_be_a_neighbour(address) || self.state().own.contains(&address.ip().to_canonical()) {
            return Verdict::Untouched;
        }
        let (socket, inode, nonblocking) = match target::hold(call.thread, fd) {
            Ok(held) => (held.socket, held.inode, held.nonblocking),
            Err(error) if target::is_hidden(&error) => return Verdict::Fallback(address, HIDDEN.into()),
            Err(_) => return Verdict::Untouched,
        };
        if let Some(entry) = self.state().exchanged.get_mut(&inode) {
            // It was interrupted by a signal after the exchange, and asks again; or the answer was lost to one.
            let asked = std::mem::replace(&mut entry.asked_again, true);
            let over = asked || entry.peer != address;
            return Verdict::Is(if over { Answer::Errno(libc::EISCONN) } else { Answer::Value(0) });
        }
        let kind = inet::kind_of(socket.as_fd()).unwrap_or(Kind::Other);
        if kind == Kind::Other || !inet::is_fresh(socket.as_fd()) {
            return Verdict::Untouched;
        }
        let (node, request, source) = match self.prepare(&socket, address) {
            Ok(prepared) => prepared,
            Err(why) => return Verdict::Fallback(address, why),
        };
        let until = Instant::now() + ANSWER_LIMIT;
        let made = self.state().ahead.take(canonical(address), own_part(&request));
        let connect = Connect {
            call,
            address,
            until,
            fd,
            inode,
            nonblocking,
            socket,
            source,
            request: request.clone(),
        };
        if let Some(brought) = made {
            return self.exchange(connect, brought, true);
        }
        self.state().connects.insert(call.id, connect);
        let supervisor = Arc::downgrade(self);
        let then = move |result| {
            if let Some(supervisor) = supervisor.upgrade() {
                supervisor.connected(call.id, result);
            }
        };
        node.connect_socket_then(&request, Box::new(then));
        Verdict::Waits
    }

    /// What to ask the broker, or why there is no use in that.
    fn prepare(
        &self,
        socket: &OwnedFd,
        address: SocketAddr,
    ) -> Result<(Arc<isthmus_engine::node::Node>, SocketRequest, SocketAddr), String> {
        let destination = canonical(address);
        let mut state = self.state();
        if let Some(why) = state.fallbacks.remembered(destination) {
            return Err(why.to_owned());
        }
        if state.stuck {
            return Err("the broker does not answer".into());
        }
        let Some(node) = self.node() else { return Err("no broker answers".into()) };
        let bound = inet::local_address(socket.as_fd()).ok().map(canonical);
        let ip = match bound.filter(|bound| !bound.ip().is_unspecified()) {
            Some(bound) => Some(bound.ip()),
            // No way there is no obstacle: the broker knows an address of this domain.
            None => state.routes.source_towards(destination),
        };
        let port = bound.map(|bound| bound.port()).filter(|port| *port != 0);
        let port = port.unwrap_or_else(|| next_port(&mut state));
        let request = SocketRequest {
            to: destination.ip().to_string(),
            port: destination.port().into(),
            kind: SocketKind::Stream,
            source: ip.map(|ip| ip.to_string()).unwrap_or_default(),
            source_port: port.into(),
            ahead: false,
        };
        let source = SocketAddr::new(ip.unwrap_or(NOBODYS), port);
        Ok((Arc::clone(node), request, source))
    }

    /// The broker has answered. On the engine's thread.
    fn connected(self: &Arc<Self>, id: u64, result: Result<Brought, Error>) {
        let connect = {
            let mut state = self.state();
            state.stuck = false;
            let Some(connect) = state.connects.remove(&id) else { return };
            if let Err(error) = &result {
                state.fallbacks.remember(canonical(connect.address), error);
            }
            connect
        };
        let call = connect.call;
        let address = connect.address;
        let verdict = match result {
            Ok(brought) => self.exchange(connect, brought, false),
            Err(error) => Verdict::Fallback(address, error.to_string()),
        };
        self.settle(call, verdict);
    }

    /// Put the socket in the place of the program's. `ahead`: it was made ahead, and is used now.
    fn exchange(self: &Arc<Self>, connect: Connect, brought: Brought, ahead: bool) -> Verdict {
        let Connect { call, fd, inode, nonblocking, socket, address, source, request, .. } = connect;
        let Brought { socket: successor, granted } = brought;
        let v6 = address.is_ipv6();
        let prepared = inet::copy_options(socket.as_fd(), successor.as_fd())
            .and_then(|()| inet::set_nonblocking(successor.as_fd(), nonblocking))
            .and_then(|()| {
                let follow =
                    |polls: &[RawFd]| epoll::follow(call.thread, polls, fd, inode, successor.as_fd());
                // What was known may be old. Who waits in `connect` itself is told of its end in any case; for anybody
                // else a poll that is missed is a wait without end.
                if follow(&self.polls_of(call.thread))? == 0 && nonblocking {
                    follow(&target::epolls_of(call.thread))?;
                }
                Ok(())
            });
        if let Err(error) = prepared {
            return Verdict::Fallback(address, format!("the socket cannot be exchanged: {error}"));
        }
        let mut set = HashMap::new();
        if inet::nodelay(socket.as_fd()) {
            set.insert((libc::IPPROTO_TCP, libc::TCP_NODELAY), 1i32.to_ne_bytes().to_vec());
        }
        // Whoever looks at the address of the new socket finds it known.
        let (peer, why, connection) = (granted.peer_name.clone(), granted.why.clone(), granted.connection);
        let entry = Exchanged { local: source, peer: address, v6, asked_again: false, granted, set };
        if let Err(error) = self.exchanged(successor.as_fd(), entry) {
            return Verdict::Fallback(address, format!("the socket cannot be exchanged: {error}"));
        }
        // The number may be another file's by now, if another thread closed it. Nothing can be done about the moment
        // between this look and the exchange.
        let now = target::look(call.thread, fd).ok().filter(|now| now.inode == inode);
        let Some(now) = now.filter(|_| seccomp::waits(self.calls(), call.id)) else {
            return Verdict::Untouched;
        };
        if ahead && packet::push(successor.as_fd(), &source.port().to_le_bytes()).ok() != Some(AHEAD) {
            return Verdict::Fallback(address, "whoever listens there is gone".into());
        }
        match seccomp::give(self.calls(), call.id, successor.as_fd(), Place::At(fd), now.close_on_exec) {
            Ok(_) => {
                // Before the program goes on: as long as the TCP socket lives anywhere, event polls report it.
                drop(socket);
                self.answer(call.id, Answer::Value(0));
                let how = if ahead { "; made ahead" } else { "" };
                self.say(|| format!("connect to {address} by thread {}: {peer}; {why}{how}", call.thread));
                if let Some(node) = self.node().filter(|_| ahead) {
                    node.take_socket(connection);
                }
                self.make_ahead(&request, canonical(address), own_part(&request));
                Verdict::Waits
            }
            // It does not wait any more; or it may have no more open files than it has, which cannot be here.
            Err(_) => Verdict::Untouched,
        }
    }
}

/// From where this network sends, for a while: to ask the kernel each time takes five calls.
#[derive(Default)]
pub(crate) struct Routes(HashMap<IpAddr, (Option<IpAddr>, Instant)>);

impl Routes {
    fn source_towards(&mut self, destination: SocketAddr) -> Option<IpAddr> {
        let now = Instant::now();
        if let Some((source, until)) = self.0.get(&destination.ip()) {
            if *until > now {
                return *source;
            }
        }
        if self.0.len() >= ROUTES_MAX {
            self.0.clear();
        }
        let source = inet::source_towards(destination).ok();
        self.0.insert(destination.ip(), (source, now + ROUTE_HOLDS));
        source
    }
}

/// Where a connection comes from, as far as it matters to one that was made ahead.
fn own_part(request: &SocketRequest) -> Option<IpAddr> {
    request.source.parse().ok()
}

fn next_port(state: &mut State) -> u16 {
    if !SOURCE_PORTS.contains(&state.next_port) {
        // Two supervisors in one network do not begin at the same port, most likely.
        let spread = std::process::id() as u16 % (SOURCE_PORTS.end - SOURCE_PORTS.start);
        state.next_port = SOURCE_PORTS.start + spread;
    }
    let port = state.next_port;
    state.next_port = if port + 1 < SOURCE_PORTS.end { port + 1 } else { SOURCE_PORTS.start };
    port
}
