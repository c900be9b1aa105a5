//! The loop that answers calls, and what it knows.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use isthmus_engine::Living;
use isthmus_engine::node::sockets::{Brought, Granted, Host, Visitor};
use isthmus_engine::node::{Attachment, Node};
use isthmus_sys::poll::{Flag, Set};
use isthmus_sys::seccomp::{self, Answer, Call};
use isthmus_sys::{inet, packet, poll};

use crate::address::may_be_a_neighbour;
use crate::ahead::{Ahead, Held};
use crate::connect::{Connect, HIDDEN, Routes};
use crate::epoll::Polls;
use crate::fallback::Fallbacks;
use crate::knocks::{Knock, Knocks};
use crate::ledger::{self, Ledger};
use crate::listen::{Accept, Lease, Listener, PutOff};
use crate::target;

const TOKEN_CALLS: u64 = 0;
const TOKEN_WAKE: u64 = 1;
/// Of listeners and knocks; each gets the next.
const TOKEN_FIRST: u64 = 2;
/// How long the broker may take before a program goes on without it.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(3);
/// How often the broker is told of fallbacks, and of this network's addresses.
const TELL_FALLBACKS: Duration = Duration::from_millis(500);
const TELL_ADDRESSES: Duration = Duration::from_secs(10);
/// Sockets known before it is worth looking which of them are closed.
const SWEEP_FIRST: usize = 64;

#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Refuse what cannot be exchanged, except within this network.
    pub require: bool,
    /// A line for each connection on standard error.
    pub verbose: bool,
    /// Let programs make rings (`io_uring`), and be reached over TCP once one has.
    pub rings: bool,
}

/// What becomes of a call.
pub(crate) enum Verdict {
    /// None of our business.
    Untouched,
    Is(Answer),
    /// It is answered later.
    Waits,
    /// The ordinary network, because.
    Fallback(SocketAddr, String),
}

/// A socket that a program holds in the place of a TCP connection.
pub(crate) struct Exchanged {
    pub local: SocketAddr,
    pub peer: SocketAddr,
    /// The program believes that it has an IPv6 socket.
    pub v6: bool,
    /// Its program has called `connect` once more.
    pub asked_again: bool,
    pub granted: Granted,
    /// What the program set that only TCP knows: by level and option.
    pub set: HashMap<(i32, i32), Vec<u8>>,
}

#[derive(Default)]
pub(crate) struct State {
    pub connects: HashMap<u64, Connect>,
    pub listeners: HashMap<u64, Listener>,
    pub leases: HashMap<u16, Lease>,
    /// Our own connections to listeners, by where they come from.
    pub knocks: Knocks,
    pub put_off: Vec<PutOff>,
    pub accepts: Vec<Accept>,
    /// Listeners of programs that cannot be looked into: who accepts there is not seen.
    pub hidden: HashSet<u64>,
    pub polls: Polls,
    pub routes: Routes,
    /// Connections made ahead: by what the loop calls them, those that somebody may come through; and those for our
    /// own programs.
    pub held: HashMap<u64, Held>,
    pub ahead: Ahead,
    /// Those that somebody has come through, and the broker was not told of by us.
    pub used: Vec<u64>,
    next_token: u64,
    /// By inode.
    pub exchanged: HashMap<u64, Exchanged>,
    sweep_at: usize,
    pub fallbacks: Fallbacks,
    pub own: HashSet<IpAddr>,
    pub next_port: u16,
    /// The broker did not answer in time, and has not since.
    pub stuck: bool,
    /// It was asked whether it answers at all.
    asked: bool,
    /// A program makes rings: who accepts through them is not seen here.
    pub rings: bool,
}

impl State {
    /// What the loop will call something.
    pub fn new_token(&mut self) -> u64 {
        let token = self.next_token.max(TOKEN_FIRST);
        self.next_token = token + 1;
        token
    }
}

/// Supervises every program behind one filter.
pub struct Supervisor {
    calls: OwnedFd,
    ledger: Ledger,
    pub(crate) options: Options,
    /// We may look into programs of any user.
    may_trace: bool,
    state: Mutex<State>,
    living: Living,
    node: OnceLock<Arc<Attachment>>,
    pub(crate) set: Set,
    wake: Flag,
}

impl Supervisor {
    /// Supervise whoever's calls wait at `calls`, on behalf of the domain behind `door`.
    ///
    /// # Errors
    /// This process is out of descriptors or threads.
    pub fn new(
        calls: OwnedFd,
        ledger: Ledger,
        door: &Path,
        program: &str,
        options: Options,
    ) -> io::Result<Arc<Self>> {
        let supervisor = Arc::new(Self {
            calls,
            ledger,
            options,
            may_trace: isthmus_sys::capability::may_trace(),
            state: Mutex::default(),
            living: Living::new()?,
            node: OnceLock::new(),
            set: Set::new()?,
            wake: Flag::new()?,
        });
        supervisor.set.add(supervisor.calls.as_fd(), TOKEN_CALLS)?;
        // Slower without, and no different.
        let _ = seccomp::take_turns(supervisor.calls.as_fd());
        supervisor.set.add(supervisor.wake.as_fd(), TOKEN_WAKE)?;
        supervisor.look_at_addresses();
        let host = Arc::new(Engine(Arc::clone(&supervisor)));
        let node = Node::attach_host(door, program, host).map_err(io::Error::other)?;
        let _ = supervisor.node.set(node);
        Ok(supervisor)
    }

    /// Answer calls until nobody is behind the filter any more.
    ///
    /// # Errors
    /// The kernel takes no answers.
    pub fn run(self: &Arc<Self>) -> io::Result<()> {
        let mut events = Vec::new();
        let (mut fallbacks_at, mut addresses_at) = (Instant::now(), Instant::now() + TELL_ADDRESSES);
        loop {
            let now = Instant::now();
            if now >= fallbacks_at {
                fallbacks_at = now + TELL_FALLBACKS;
                self.tell_fallbacks();
            }
            if now >= addresses_at {
                addresses_at = now + TELL_ADDRESSES;
                self.look_at_addresses();
                if let Some(node) = self.node() {
                    self.tell_addresses(node);
                    self.lease_again(node);
                }
                self.sweep();
            }
            let mut until = addresses_at;
            {
                let state = self.state();
                if !state.fallbacks.is_empty() || !state.used.is_empty() {
                    until = until.min(fallbacks_at);
                }
                let connects = state.connects.values().map(|connect| connect.until);
                let leases = state.leases.values().filter_map(|lease| lease.until);
                let accepts = state.accepts.iter().filter_map(|accept| accept.until);
                let ahead = state.held.values().map(Held::next).chain(state.ahead.next());
                let put_off = state.put_off.iter().map(|one| one.knock_at);
                let all = connects.chain(leases).chain(accepts).chain(ahead).chain(put_off);
                until = all.fold(until, Instant::min);
            }
            events.clear();
            match self.set.wait(Some(until.saturating_duration_since(now)), &mut events) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            for (token, ready) in &events {
                match *token {
                    TOKEN_WAKE => self.wake.lower(),
                    TOKEN_CALLS if ready.readable => self.next_call(),
                    TOKEN_CALLS => {
                        self.tell_fallbacks();
                        return Ok(());
                    }
                    token if self.held_ready(token) => {}
                    token => self.accept_ready(token, ready.hung_up),
                }
            }
            self.give_up(Instant::now());
        }
    }

    fn next_call(self: &Arc<Self>) {
        let Ok(call) = seccomp::receive(self.calls.as_fd()) else { return };
        self.ledger.begin(call.id);
        let verdict = match call.number {
            libc::SYS_connect => self.connect(call),
            libc::SYS_listen => self.listen(call),
            libc::SYS_accept => self.accept(call, 0),
            libc::SYS_accept4 => self.accept(call, call.arguments[3] as i32),
            libc::SYS_getsockname => self.name(call, false),
            libc::SYS_getpeername => self.name(call, true),
            libc::SYS_getsockopt => self.option(call),
            libc::SYS_setsockopt => self.set_option(call),
            libc::SYS_io_uring_setup => self.ring(),
            libc::SYS_epoll_create | libc::SYS_epoll_create1 => {
                self.state().polls.make();
                Verdict::Untouched
            }
            libc::SYS_setuid => self.change_user(call, 1, "Uid:"),
            libc::SYS_setreuid => self.change_user(call, 2, "Uid:"),
            libc::SYS_setresuid => self.change_user(call, 3, "Uid:"),
            libc::SYS_setgid => self.change_user(call, 1, "Gid:"),
            libc::SYS_setregid => self.change_user(call, 2, "Gid:"),
            libc::SYS_setresgid => self.change_user(call, 3, "Gid:"),
            _ => Verdict::Untouched,
        };
        self.settle(call, verdict);
    }

    pub(crate) fn settle(&self, call: Call, verdict: Verdict) {
        match verdict {
            Verdict::Untouched => drop(self.answer(call.id, Answer::Continue)),
            Verdict::Is(answer) => drop(self.answer(call.id, answer)),
            Verdict::Waits => {}
            Verdict::Fallback(address, why) => {
                let first = self.state().fallbacks.count(address, self.options.require, &why);
                if first {
                    let what = if self.options.require { "refused" } else { "TCP" };
                    self.say(|| format!("connect to {address} by thread {}: {what}: {why}", call.thread));
                }
                let refused = Answer::Errno(libc::ECONNREFUSED);
                self.answer(call.id, if self.options.require { refused } else { Answer::Continue });
                self.wake.raise();
            }
        }
    }

    /// Let a call return. `false`: it does not wait any more; it was interrupted by a signal, or its thread is gone.
    pub(crate) fn answer(&self, id: u64, answer: Answer) -> bool {
        let heard = seccomp::answer(self.calls(), id, answer).is_ok();
        self.ledger.end(id);
        heard
    }

    /// The call returns with the descriptor that it was given.
    pub(crate) fn answered(&self, id: u64) {
        self.ledger.end(id);
    }

    pub(crate) fn calls(&self) -> BorrowedFd<'_> {
        self.calls.as_fd()
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        // Left whole at each step, so a panic elsewhere does not matter.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The attachment, while a broker is there.
    pub(crate) fn node(&self) -> Option<&Arc<Attachment>> {
        self.node.get().filter(|node| node.attached())
    }

    /// The loop has a new deadline.
    pub(crate) fn wake(&self) {
        self.wake.raise();
    }

    pub(crate) fn say(&self, text: impl FnOnce() -> String) {
        // A line that nobody takes must hold nobody up.
        if self.options.verbose && poll::has_room(std::io::stderr().as_fd()) {
            eprintln!("isthmus run: {}", text());
        }
    }

    /// A program has this socket now.
    pub(crate) fn exchanged(&self, socket: BorrowedFd<'_>, entry: Exchanged) -> io::Result<()> {
        let inode = inet::inode_of(socket)?;
        match self.living.add(socket, inode) {
            // It could not be given to who accepted it, and is given to the next.
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        self.state().exchanged.insert(inode, entry);
        self.sweep_when_many();
        Ok(())
    }

    /// A program listens here.
    pub(crate) fn listens(&self, socket: BorrowedFd<'_>, inode: u64, mut listener: Listener) {
        // Again, with another backlog: it is there already, and the loop may know it.
        let _ = self.living.add(socket, inode);
        {
            let mut state = self.state();
            listener.token = state.listeners.get(&inode).and_then(|known| known.token);
            state.listeners.insert(inode, listener);
        }
        self.sweep_when_many();
    }

    fn sweep_when_many(&self) {
        let state = self.state();
        let known = state.exchanged.len() + state.listeners.len();
        let many = known >= state.sweep_at.max(SWEEP_FIRST);
        drop(state);
        if many {
            self.sweep();
        }
    }

    /// Of what was seen of programs, what one of them still has.
    pub(crate) fn living_now(&self) -> io::Result<HashSet<u64>> {
        Ok(self.living.tokens()?.into_iter().collect())
    }

    /// Forget what programs have closed.
    pub(crate) fn sweep(&self) {
        // With the state locked: what another thread has put there since would not be among the living.
        let mut state = self.state();
        let Ok(living) = self.living_now() else { return };
        state.exchanged.retain(|inode, _| living.contains(inode));
        let closed: Vec<SocketAddr> = {
            let closed = state.listeners.iter().filter(|(inode, _)| !living.contains(inode));
            closed.map(|(_, listener)| listener.address).collect()
        };
        state.listeners.retain(|inode, _| living.contains(inode));
        state.hidden.retain(|inode| living.contains(inode));
        state.sweep_at = 2 * (state.exchanged.len() + state.listeners.len());
        drop(state);
        for address in &closed {
            self.give_back_unused(address.port());
        }
        if !closed.is_empty() {
            self.let_go(|accept| !living.contains(&accept.inode));
        }
    }

    fn give_up(self: &Arc<Self>, now: Instant) {
        let late: Vec<Connect> = {
            let mut state = self.state();
            let late = state.connects.iter().filter(|(_, connect)| connect.until <= now).map(|(id, _)| *id);
            let late: Vec<u64> = late.collect();
            late.into_iter().filter_map(|id| state.connects.remove(&id)).collect()
        };
        if let (false, Some(node)) = (late.is_empty(), self.node()) {
            // Was it the broker, or who listens there? If it is the broker, this question stays unanswered too.
            let mut state = self.state();
            state.stuck = std::mem::replace(&mut state.asked, true);
            drop(state);
            self.tell_addresses(node);
        }
        for connect in late {
            self.state().fallbacks.remember_late(connect.address);
            let why = format!("the broker did not answer within {} s", ANSWER_LIMIT.as_secs());
            self.settle(connect.call, Verdict::Fallback(connect.address, why));
        }
        self.look_after_held(now);
        self.look_after_put_off(now);
        self.give_up_leases(now);
        self.give_up_accepts(now);
    }

    fn tell_fallbacks(&self) {
        let Some(node) = self.node() else { return };
        let (counts, used) = {
            let mut state = self.state();
            (state.fallbacks.take(), std::mem::take(&mut state.used))
        };
        let untold = used.iter().position(|connection| !node.take_socket(*connection));
        if let Some(untold) = untold {
            self.state().used.extend(&used[untold..]);
        }
        for ((address, refused, why), count) in counts {
            node.tell_fallback(
                &address.ip().to_canonical().to_string(),
                address.port().into(),
                count,
                refused,
                &why,
            );
        }
    }

    fn look_at_addresses(&self) {
        if let Ok(addresses) = inet::own_addresses() {
            self.state().own = addresses.into_iter().map(|address| address.to_canonical()).collect();
        }
    }

    fn tell_addresses(self: &Arc<Self>, node: &Node) {
        let own: Vec<String> = {
            let state = self.state();
            let shown = state.own.iter().filter(|ip| may_be_a_neighbour(SocketAddr::new(**ip, 1)));
            shown.take(64).map(ToString::to_string).collect()
        };
        let supervisor = Arc::downgrade(self);
        let then = move |answered| {
            if let (true, Some(supervisor)) = (answered, supervisor.upgrade()) {
                let mut state = supervisor.state();
                (state.stuck, state.asked) = (false, false);
            }
        };
        node.tell_addresses_then(&own.join(" "), Box::new(then));
    }

    /// The event polls of a thread's process.
    pub(crate) fn polls_of(&self, thread: i32) -> Vec<RawFd> {
        let known = self.state().polls.of(thread);
        known.unwrap_or_else(|| {
            let began = Instant::now();
            let found = target::epolls_of(thread);
            self.state().polls.note(thread, began, found.clone());
            found
        })
    }

    /// A process changes one of its users. If nobody here may look into it then, nobody sees what it accepts; an accept
    /// would meet a knock.
    fn change_user(&self, call: Call, count: usize, field: &str) -> Verdict {
        let wanted: Vec<u32> = call.arguments.iter().take(count).map(|id| *id as u32).collect();
        if self.may_trace || target::changes_user(call.thread, &wanted, field) == Some(false) {
            return Verdict::Untouched;
        }
        let sockets = target::socket_inodes(call.thread);
        self.hide(|inode| sockets.contains(&inode));
        Verdict::Untouched
    }

    /// Neighbours reach these listeners over TCP from now on.
    pub(crate) fn hide(&self, is_meant: impl Fn(u64) -> bool) {
        let ports: Vec<u16> = {
            let mut state = self.state();
            let meant: Vec<u64> = state.listeners.keys().copied().filter(|inode| is_meant(*inode)).collect();
            state.hidden.extend(&meant);
            meant.iter().filter_map(|inode| state.listeners.remove(inode)).map(|l| l.address.port()).collect()
        };
        if ports.is_empty() {
            return;
        }
        let is_of = |connection: Option<u32>| connection.is_some_and(|port| ports.contains(&(port as u16)));
        {
            let mut state = self.state();
            for port in &ports {
                let nowhere = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), *port);
                state.fallbacks.count(nowhere, false, &format!("listen: {HIDDEN}"));
            }
            state.held.retain(|_, held| !is_of(Some(held.port())));
            state.knocks.end_where(|knock| is_of(knock.port()));
        }
        for port in &ports {
            self.give_back_unused(*port);
            self.say(|| format!("listen on port {port}: TCP alone: {HIDDEN}"));
        }
        self.let_go(|accept| is_meant(accept.inode));
        self.wake();
    }

    /// What is done through a ring is not seen here: an accept there would meet a knock.
    fn ring(&self) -> Verdict {
        if !self.options.rings {
            // As where container runtimes refuse them: programs that could make use of one do without.
            return Verdict::Is(Answer::Errno(libc::ENOSYS));
        }
        let leases = {
            let mut state = self.state();
            state.rings = true;
            state.listeners.clear();
            state.knocks.end_where(|_| true);
            std::mem::take(&mut state.leases)
        };
        for (port, lease) in leases {
            for id in lease.waiting {
                self.answer(id, Answer::Value(0));
            }
            if let Some(node) = self.node() {
                node.give_back(port.into());
            }
        }
        self.let_go(|_| true);
        self.say(|| "a program uses io_uring: neighbours reach it over TCP".into());
        Verdict::Untouched
    }
}

/// What the engine tells the supervisor, on its own thread.
struct Engine(Arc<Supervisor>);

impl Host for Engine {
    fn incoming(&self, node: &Arc<Node>, visitor: Visitor) {
        let connection = visitor.brought.granted.connection;
        let visitor = Box::new(visitor);
        if !visitor.ahead {
            return self.0.come(visitor);
        }
        match self.0.hold(visitor) {
            Ok(()) => drop(node.accept_socket(connection, None)),
            Err(refusal) => node.refuse(connection, refusal),
        }
    }

    fn cut(&self, connection: u64, why: &str) {
        let state = self.0.state();
        let meant = |(_, entry): &(&u64, &Exchanged)| entry.granted.connection == connection;
        let inodes: Vec<u64> = state.exchanged.iter().filter(meant).map(|(inode, _)| *inode).collect();
        drop(state);
        {
            let mut state = self.0.state();
            state.knocks.end_where(|knock| knock.connection() == Some(connection));
            state.held.retain(|_, held| held.connection() != connection);
            state.ahead.cut(connection);
        }
        if inodes.is_empty() {
            return;
        }
        for (inode, socket) in target::find_sockets(&|inode| inodes.contains(&inode)) {
            packet::shut(socket.as_fd());
            self.0.state().exchanged.remove(&inode);
        }
        self.0.say(|| format!("connection {connection:016x} was cut: {why}"));
    }

    fn attached(&self, node: &Arc<Node>) {
        {
            let mut state = self.0.state();
            (state.stuck, state.asked) = (false, false);
            // Another broker does not know them.
            state.ahead.forget();
            state.held.retain(|_, held| held.is_used());
            state.used.clear();
        }
        self.0.tell_addresses(node);
        self.0.lease_all(node);
        self.0.state().fallbacks.forget();
    }

    fn held(&self) -> Vec<Brought> {
        let mut queued: Vec<Brought> = {
            let state = self.0.state();
            let knocks = state.knocks.standing().filter_map(Knock::brought);
            knocks.chain(state.held.values().filter_map(Held::brought)).collect()
        };
        let inodes: HashSet<u64> = self.0.state().exchanged.keys().copied().collect();
        if inodes.is_empty() {
            return queued;
        }
        let sockets = target::find_sockets(&|inode| inodes.contains(&inode));
        let state = self.0.state();
        let brought = |(inode, socket)| {
            let granted = state.exchanged.get(&inode)?.granted.clone();
            Some(Brought { socket, granted })
        };
        queued.extend(sockets.into_iter().filter_map(brought));
        queued
    }
}

/// Let every call that waits go on, until nobody is behind the filter any more: what is left to do for programs whose
/// supervisor is gone.
///
/// # Errors
/// The kernel takes no answers.
pub fn pass_all(calls: BorrowedFd<'_>, ledger: &File) -> io::Result<()> {
    for id in ledger::left(ledger) {
        let _ = seccomp::answer(calls, id, Answer::Continue);
    }
    let set = Set::new()?;
    set.add(calls, TOKEN_CALLS)?;
    let mut events = Vec::new();
    loop {
        events.clear();
        match set.wait(None, &mut events) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        for (_, ready) in &events {
            if !ready.readable {
                return Ok(());
            }
            if let Ok(call) = seccomp::receive(calls) {
                let _ = seccomp::answer(calls, call.id, Answer::Continue);
            }
        }
    }
}
