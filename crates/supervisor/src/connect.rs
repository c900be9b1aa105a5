//! `connect`: ask the broker for a socket to this address, and put it in the place of the program's.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use isthmus_engine::Error;
use isthmus_engine::node::sockets::{Brought, SocketRequest};
use isthmus_sys::inet::{self, Kind};
use isthmus_sys::seccomp::{self, Answer, Call, Place};
use isthmus_wire::control::SocketKind;

use crate::address::{NOBODYS, canonical, may_be_a_neighbour};
use crate::epoll;
use crate::supervisor::{ANSWER_LIMIT, Exchanged, State, Supervisor, Verdict};
use crate::target::{self, Descriptor};

/// Ports that we give to connections whose TCP port nobody will know, as the kernel chooses them by default.
const SOURCE_PORTS: std::ops::Range<u16> = 32768..61000;

/// A `connect` whose answer the broker owes.
pub(crate) struct Connect {
    pub call: Call,
    pub address: SocketAddr,
    pub until: Instant,
    fd: RawFd,
    descriptor: Descriptor,
    /// The program's TCP socket.
    socket: OwnedFd,
    source: SocketAddr,
}

impl Supervisor {
    pub(crate) fn connect(self: &Arc<Self>, call: Call) -> Verdict {
        let [fd, at, len, ..] = call.arguments;
        let fd = fd as RawFd;
        let Some(address) = target::read_address(call.thread, at, len) else { return Verdict::Untouched };
        let Ok(descriptor) = target::look(call.thread, fd) else { return Verdict::Untouched };
        if let Some(entry) = self.state().exchanged.get_mut(&descriptor.inode) {
            // It was interrupted by a signal after the exchange, and asks again.
            let told = std::mem::replace(&mut entry.told, true);
            return Verdict::Is(if told { Answer::Errno(libc::EISCONN) } else { Answer::Value(0) });
        }
        if !may_be_a_neighbour(address) || self.state().own.contains(&address.ip().to_canonical()) {
            return Verdict::Untouched;
        }
        let socket = match seccomp::descriptor_of(call.thread, fd) {
            Ok(socket) => socket,
            Err(error) => {
                return Verdict::Fallback(address, format!("no copy of the program's socket: {error}"));
            }
        };
        let kind = inet::kind_of(socket.as_fd()).unwrap_or(Kind::Other);
        if kind == Kind::Other || !inet::is_fresh(socket.as_fd()) {
            return Verdict::Untouched;
        }
        let (node, request, source) = match self.prepare(&socket, address) {
            Ok(prepared) => prepared,
            Err(why) => return Verdict::Fallback(address, why),
        };
        let until = Instant::now() + ANSWER_LIMIT;
        self.state()
            .connects
            .insert(call.id, Connect { call, address, until, fd, descriptor, socket, source });
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
            None => inet::source_towards(destination).ok(),
        };
        let port = bound.map(|bound| bound.port()).filter(|port| *port != 0);
        let port = port.unwrap_or_else(|| next_port(&mut state));
        let request = SocketRequest {
            to: destination.ip().to_string(),
            port: destination.port().into(),
            kind: SocketKind::Stream,
            source: ip.map(|ip| ip.to_string()).unwrap_or_default(),
            source_port: port.into(),
        };
        let source = SocketAddr::new(ip.unwrap_or(NOBODYS), port);
        Ok((Arc::clone(node), request, source))
    }

    /// The broker has answered. On the engine's thread.
    fn connected(&self, id: u64, result: Result<Brought, Error>) {
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
            Ok(brought) => self.exchange(connect, brought),
            Err(error) => Verdict::Fallback(address, error.to_string()),
        };
        self.settle(call, verdict);
    }

    /// Put the socket in the place of the program's.
    fn exchange(&self, connect: Connect, brought: Brought) -> Verdict {
        let Connect { call, fd, descriptor, socket, address, source, .. } = connect;
        let Brought { socket: successor, granted } = brought;
        let v6 = address.is_ipv6();
        let prepared = inet::copy_options(socket.as_fd(), successor.as_fd())
            .and_then(|()| inet::set_nonblocking(successor.as_fd(), descriptor.nonblocking))
            .and_then(|()| epoll::follow(call.thread, fd, descriptor.inode, successor.as_fd()));
        if let Err(error) = prepared {
            return Verdict::Fallback(address, format!("the socket cannot be exchanged: {error}"));
        }
        let mut set = HashMap::new();
        if inet::nodelay(socket.as_fd()) {
            set.insert((libc::IPPROTO_TCP, libc::TCP_NODELAY), 1i32.to_ne_bytes().to_vec());
        }
        // Whoever looks at the address of the new socket finds it known.
        let (peer, why) = (granted.peer_name.clone(), granted.why.clone());
        let entry = Exchanged { local: source, peer: address, v6, told: false, granted, set };
        if let Err(error) = self.exchanged(successor.as_fd(), entry) {
            return Verdict::Fallback(address, format!("the socket cannot be exchanged: {error}"));
        }
        // The number may be another file's by now, if another thread closed it. Nothing can be done about the moment
        // between this look and the exchange.
        let unchanged = target::look(call.thread, fd).is_ok_and(|now| now.inode == descriptor.inode);
        if !unchanged || !seccomp::waits(self.calls(), call.id) {
            return Verdict::Untouched;
        }
        match seccomp::give(self.calls(), call.id, successor.as_fd(), Place::At(fd), descriptor.close_on_exec)
        {
            Ok(_) => {
                if self.answer(call.id, Answer::Value(0)) {
                    if let Ok(inode) = inet::inode_of(successor.as_fd()) {
                        if let Some(entry) = self.state().exchanged.get_mut(&inode) {
                            entry.told = true;
                        }
                    }
                }
                self.say(|| format!("connect to {address} by thread {}: {peer}; {why}", call.thread));
                Verdict::Waits
            }
            // It does not wait any more; or it may have no more open files than it has, which cannot be here.
            Err(_) => Verdict::Untouched,
        }
    }
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
