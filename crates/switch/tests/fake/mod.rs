//! What is around a switch: a broker and guests that do what a test tells them, and nothing on their own.
//!
//! A [`Node`] runs a real switch in a thread of this process and answers it as a broker would. A [`Guest`] is a
//! monitor and a driver at once: it hands its memory in over vhost-user and writes its queues by hand, so that it can
//! also write what no driver would. Nothing is waited for without a limit.

// Each suite uses its part of this.
#![allow(dead_code)]

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use isthmus_engine::lane::Offer;
use isthmus_switch::Switch;
use isthmus_sys::{memory, packet};
use isthmus_wire::control::{
    self, ANY_PORT, ANYBODY, Carrier, GuestState, MESSAGE_MAX, Message, Refusal, SocketKind,
};
use isthmus_wire::vsock::{CREDIT_UPDATE, Header, REQUEST, RESPONSE, RST, RW, SEQ_EOM, SEQPACKET, STREAM};
use rustix::event::EventfdFlags;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt};

/// Whoever is not answered for so long is not answered.
pub const SOON: Duration = Duration::from_secs(5);
/// A number that no guest has.
pub const NOBODY: u32 = 77;

/// Ask again and again, until there is an answer or too much time has gone.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(began.elapsed() < SOON, "{what}: not within {SOON:?}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Memory of this process that is neither a file's nor a guest's, MiB.
pub fn own_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("/proc");
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("a line about it");
    let kib: u64 = line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number");
    kib / 1024
}

/// Descriptors that this process has.
pub fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc").count()
}

/// One message as its bytes.
pub fn encoded(request: u32, message: &Message<'_>) -> Vec<u8> {
    let mut buffer = [0; MESSAGE_MAX];
    let len = control::encode(request, message, &mut buffer).expect("a message");
    buffer[..len].to_vec()
}

fn say(socket: &OwnedFd, request: u32, message: &Message<'_>, descriptors: &[BorrowedFd<'_>]) {
    // A switch that is gone hears nothing; the test sees that elsewhere.
    let _ = packet::send(socket.as_fd(), &encoded(request, message), descriptors);
}

fn listen(path: &Path, kind: SocketType, backlog: i32) -> OwnedFd {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
    let socket = socket.expect("a socket");
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).expect("a short path")).expect("a free path");
    rustix::net::listen(&socket, backlog).expect("to listen");
    socket
}

fn connect(path: &Path, kind: SocketType) -> OwnedFd {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None);
    let socket = socket.expect("a socket");
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).expect("a short path")).expect("a listener");
    socket
}

// ---- the broker

/// A connection that was asked for and not answered.
struct Pending {
    opener: Arc<OwnedFd>,
    request: u32,
    to: u32,
    bell: OwnedFd,
}

#[derive(Default)]
struct Broker {
    homes: HashMap<u32, Arc<OwnedFd>>,
    pending: HashMap<u64, Pending>,
    /// What was heard, and through whose door; without greetings and questions.
    heard: Vec<(u32, String)>,
    states: HashMap<u32, (GuestState, String)>,
    connections: u64,
    silent: bool,
    over: bool,
}

#[derive(Default)]
struct Shared {
    broker: Mutex<Broker>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Broker> {
        self.broker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The broker, when it speaks.
    fn speaking(&self) -> MutexGuard<'_, Broker> {
        let silent = |broker: &mut Broker| broker.silent && !broker.over;
        self.changed.wait_while(self.lock(), silent).unwrap_or_else(PoisonError::into_inner)
    }

    /// One program that came through a guest's door.
    fn serve(&self, cid: u32, socket: &Arc<OwnedFd>) {
        let mut buffer = [0; MESSAGE_MAX];
        while let Ok((len @ 1.., descriptors)) = packet::receive(socket.as_fd(), &mut buffer) {
            let (request, message) = control::decode(&buffer[..len]).expect("a message from the switch");
            let mut broker = self.speaking();
            if broker.over {
                return;
            }
            broker.answer(cid, socket, request, &message, &descriptors);
        }
    }
}

impl Broker {
    fn answer(
        &mut self,
        cid: u32,
        socket: &Arc<OwnedFd>,
        request: u32,
        message: &Message<'_>,
        descriptors: &[OwnedFd],
    ) {
        let nobody = Message::Refused { refusal: Refusal::NobodyListens, rule: 0, text: "" };
        match *message {
            Message::Hello { .. } => {
                let ring_max = 1 << 28;
                let (domain_name, node) = ("domain", "node");
                let welcome =
                    Message::Welcome { features: 0, domain: cid, domain_name, node, ring_max, epoch: 1 };
                say(socket, request, &welcome, &[]);
            }
            Message::Bind { port, .. } => {
                say(socket, request, &Message::Bound { port }, &[]);
                if port == ANY_PORT {
                    self.homes.insert(cid, Arc::clone(socket));
                }
            }
            Message::Connect { to, to_port, from_port, kind, small, large, .. } => {
                let to = to.parse().unwrap_or(0);
                let Some(home) = self.homes.get(&to) else { return say(socket, request, &nobody, &[]) };
                self.connections += 1;
                let connection = self.connections;
                let (bell, other) = packet::pair().expect("a pair");
                let from_port = if from_port == 0 { 0x8000_0000 + connection as u32 } else { from_port };
                let incoming = incoming(connection, cid, from_port, to_port, kind, small, large);
                say(home, 0, &incoming, &[descriptors[0].as_fd(), other.as_fd()]);
                let pending = Pending { opener: Arc::clone(socket), request, to, bell };
                self.pending.insert(connection, pending);
            }
            Message::Accept { connection, small, large } => {
                self.heard.push((cid, format!("{message:?}")));
                let Some(Pending { opener, request, to, bell }) = self.pending.remove(&connection) else {
                    return;
                };
                let connected = Message::Connected {
                    connection,
                    secret: 5,
                    to,
                    to_name: "accepter",
                    to_port: 1,
                    from_port: 7,
                    carrier: Carrier::Switch,
                    small,
                    large,
                    why: "",
                    ticket: [0; 32],
                };
                say(&opener, request, &connected, &[descriptors[0].as_fd(), bell.as_fd()]);
            }
            Message::Refuse { connection, .. } => {
                self.heard.push((cid, format!("{message:?}")));
                if let Some(pending) = self.pending.remove(&connection) {
                    say(&pending.opener, pending.request, &nobody, &[]);
                }
            }
            _ => self.heard.push((cid, format!("{message:?}"))),
        }
    }
}

fn incoming(
    connection: u64,
    from: u32,
    from_port: u32,
    port: u32,
    kind: SocketKind,
    small: u32,
    large: u32,
) -> Message<'static> {
    Message::Incoming {
        connection,
        secret: 5,
        from,
        from_name: "opener",
        from_port,
        port,
        partner: ANYBODY,
        kind,
        carrier: Carrier::Switch,
        small,
        large,
        why: "",
        ticket: [0; 32],
    }
}

/// A program that is no guest and has connected to one.
pub struct Container {
    pub bell: OwnedFd,
    _offer: Offer,
}

/// A switch and its broker. One at a time in a process, so that what one test makes grow is not another one's fault.
pub struct Node {
    place: PathBuf,
    shared: Arc<Shared>,
    broker: OwnedFd,
    doors: Mutex<Vec<Arc<OwnedFd>>>,
    stop: Arc<AtomicBool>,
    switch: Option<JoinHandle<()>>,
    _alone: MutexGuard<'static, ()>,
}

impl Node {
    pub fn new() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        static NODES: AtomicU32 = AtomicU32::new(0);
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let number = NODES.fetch_add(1, Ordering::Relaxed);
        let place = std::env::temp_dir().join(format!("isthmus-switch-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&place).expect("a directory");
        let path = place.join("switch");
        let listener = listen(&path, SocketType::SEQPACKET, 5);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let switch = std::thread::spawn(move || {
            let mut switch = Switch::new(listener).expect("descriptors");
            switch.run(true, |_| stopped.load(Ordering::Relaxed)).expect("to wait");
        });
        let broker = connect(&path, SocketType::SEQPACKET);
        let shared = Arc::new(Shared::default());
        let (reader, states) = (broker.try_clone().expect("a descriptor"), Arc::clone(&shared));
        std::thread::spawn(move || {
            let mut buffer = [0; MESSAGE_MAX];
            while let Ok((len @ 1.., _)) = packet::receive(reader.as_fd(), &mut buffer) {
                if let Ok((_, Message::GuestState { cid, state, text })) = control::decode(&buffer[..len]) {
                    let mut broker = states.lock();
                    let known = broker.states.entry(cid).or_insert((state, String::new()));
                    known.0 = state;
                    // What was said last, when something was.
                    if !text.is_empty() {
                        known.1 = text.to_owned();
                    }
                }
            }
        });
        let doors = Mutex::default();
        Self { place, shared, broker, doors, stop, switch: Some(switch), _alone: alone }
    }

    /// A guest whose device runs, known to the broker.
    pub fn guest(&self, cid: u32) -> Guest {
        self.guest_behind(cid, 128)
    }

    /// The same, with a door at which only so many may wait.
    pub fn guest_behind(&self, cid: u32, backlog: i32) -> Guest {
        let place = self.place.join(cid.to_string());
        std::fs::create_dir_all(&place).expect("a directory");
        let door = Arc::new(listen(&place.join("door"), SocketType::SEQPACKET, backlog));
        let device = listen(&place.join("vsock"), SocketType::STREAM, 5);
        self.doors.lock().expect("no panic").push(Arc::clone(&door));
        let shared = Arc::clone(&self.shared);
        std::thread::spawn(move || {
            loop {
                if shared.speaking().over {
                    return;
                }
                let Ok(socket) = rustix::net::accept_with(&door, SocketFlags::CLOEXEC) else { return };
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || shared.serve(cid, &Arc::new(socket)));
            }
        });
        let directory = File::open(&place).expect("the directory");
        let hello = Message::Guest { cid, name: "guest" };
        say(&self.broker, 1, &hello, &[device.as_fd(), directory.as_fd()]);
        let mut guest = Guest::new(cid, &place.join("vsock"));
        until("a guest that runs", || {
            let broker = self.shared.lock();
            let runs = broker.states.get(&cid).is_some_and(|state| state.0 == GuestState::Running);
            (runs && broker.homes.contains_key(&cid)).then_some(())
        });
        // Behind this the switch has heard the broker too.
        guest.ping();
        guest
    }

    /// A broker that takes the place of this one names guests, which nobody runs, and does not listen meanwhile.
    /// How many of them it hears of then.
    pub fn name_guests(&self, cids: std::ops::Range<u32>) -> usize {
        let broker = connect(&self.place.join("switch"), SocketType::SEQPACKET);
        let device = listen(&self.place.join("vsock"), SocketType::STREAM, 5);
        let directory = File::open(&self.place).expect("the directory");
        for cid in cids.clone() {
            let hello = Message::Guest { cid, name: "guest" };
            say(&broker, 1, &hello, &[device.as_fd(), directory.as_fd()]);
        }
        packet::allow_waiting(broker.as_fd(), SOON / 5).expect("a socket");
        let (mut states, mut buffer) = (HashMap::new(), [0; MESSAGE_MAX]);
        let mut done = 0;
        while let Ok((len @ 1.., _)) = packet::receive(broker.as_fd(), &mut buffer) {
            match control::decode(&buffer[..len]) {
                Ok((_, Message::GuestState { cid, state, .. })) => drop(states.insert(cid, state)),
                Ok((_, Message::Done {})) => done += 1,
                _ => {}
            }
            if done == cids.len() && states.len() == cids.len() {
                break;
            }
        }
        states.len().min(done)
    }

    /// The broker hears and says nothing, or goes on where it was.
    pub fn silence(&self, silent: bool) {
        self.shared.lock().silent = silent;
        self.shared.changed.notify_all();
    }

    /// The broker is gone, as far as guests' homes know.
    pub fn hang_up(&self) {
        for (_, home) in self.shared.lock().homes.drain() {
            packet::shut(home.as_fd());
        }
    }

    /// What the broker heard through a guest's door, except greetings and questions.
    pub fn heard(&self, cid: u32) -> Vec<String> {
        let broker = self.shared.lock();
        broker.heard.iter().filter(|heard| heard.0 == cid).map(|heard| heard.1.clone()).collect()
    }

    /// Connections that wait for an answer.
    pub fn pending(&self) -> usize {
        self.shared.lock().pending.len()
    }

    /// Why a guest's device has ended.
    pub fn ended(&self, cid: u32) -> String {
        until("the end of a device", || {
            let broker = self.shared.lock();
            let (state, text) = broker.states.get(&cid)?;
            (*state == GuestState::Waiting).then(|| text.clone())
        })
    }

    /// Does a guest's device run?
    pub fn runs(&self, cid: u32) -> bool {
        self.shared.lock().states.get(&cid).is_some_and(|state| state.0 == GuestState::Running)
    }

    /// A container connects to a guest's program.
    pub fn container(&self, cid: u32, port: u32) -> Container {
        let (small, large) = (32 << 10, 2 << 20);
        let offer = Offer::new(Carrier::Switch, small, large).expect("memory");
        let (bell, other) = packet::pair().expect("a pair");
        let incoming = incoming(99, 50, 1, port, SocketKind::Stream, small, large);
        let home = Arc::clone(&self.shared.lock().homes[&cid]);
        say(&home, 0, &incoming, &[offer.descriptors()[0], other.as_fd()]);
        Container { bell, _offer: offer }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.shared.lock().over = true;
        self.shared.changed.notify_all();
        for door in self.doors.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            packet::shut(door.as_fd());
        }
        // The switch wakes up for this.
        packet::shut(self.broker.as_fd());
        let _ = std::fs::remove_dir_all(&self.place);
        if std::thread::panicking() {
            return;
        }
        let switch = self.switch.take().expect("once");
        until("the end of the switch", || switch.is_finished().then_some(()));
        switch.join().expect("a switch that does not panic");
    }
}

// ---- a guest

/// Chains of each queue.
pub const QUEUE: u16 = 256;
/// The queue by which the guest receives, and the one by which it transmits.
pub const RX: usize = 0;
pub const TX: usize = 1;
/// Bytes of a guest's memory.
pub const MEMORY: usize = 64 << 20;
/// Bytes of a receive buffer, as Linux has them.
pub const BUFFER: u32 = 4096;

/// Where things lie in a guest's memory.
const QUEUES: [u64; 2] = [0x1_0000, 0x2_0000];
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
pub const HEADERS: u64 = 0x8_0000;
pub const BUFFERS: u64 = 0x10_0000;
pub const PAYLOADS: u64 = 0x40_0000;
/// Nothing of ours lies here or above.
pub const FREE: u64 = 0x200_0000;

/// Of a descriptor: another one follows; the device writes it; it names a table.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// vhost-user requests.
pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ENABLE: u32 = 18;
/// Whole messages, indirect tables, quiet indices, protocol features, version 1.
const FEATURES: u64 = 1 << 1 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32;

/// A monitor's message as its bytes.
pub fn monitor_message(request: u32, payload: &[u8]) -> Vec<u8> {
    let front = [request, 1, payload.len() as u32];
    front.into_iter().flat_map(u32::to_le_bytes).chain(payload.iter().copied()).collect()
}

/// A table of memory: of each region the guest's address, its length, and the offset in its file. The monitor's
/// addresses are the guest's.
pub fn memory_table(regions: &[(u64, u64, u64)]) -> Vec<u8> {
    let front = [regions.len() as u32, 0].into_iter().flat_map(u32::to_le_bytes);
    let regions = regions.iter().flat_map(|(at, len, offset)| [*at, *len, *at, *offset]);
    front.chain(regions.flat_map(u64::to_le_bytes)).collect()
}

/// One side of a connection, as its guest names it.
#[derive(Clone, Copy)]
pub struct Link {
    pub port: u32,
    pub peer: u32,
    pub peer_port: u32,
    pub kind: u16,
}

/// A guest: its monitor's connection, its memory and its queues.
pub struct Guest {
    pub cid: u32,
    pub monitor: OwnedFd,
    pub memory: OwnedFd,
    base: *mut u8,
    kicks: [OwnedFd; 2],
    calls: [OwnedFd; 2],
    available: [u16; 2],
    seen: u16,
    sent: u16,
    pings: u32,
    /// What its packets say of its buffer: the size, and how much was taken.
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    /// Bytes of the receive buffers that it posts.
    pub buffer: u32,
}

impl Drop for Guest {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, with this length, and nothing of it is used any more.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), MEMORY) };
    }
}

impl Guest {
    fn new(cid: u32, path: &Path) -> Self {
        let memory = memory::create(c"guest", MEMORY).expect("memory");
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        let hint = std::ptr::null_mut();
        // SAFETY: a new mapping, at a place that the kernel picks.
        let base = unsafe { rustix::mm::mmap(hint, MEMORY, rights, MapFlags::SHARED, &memory, 0) };
        let event = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC).expect("a descriptor");
        let monitor = connect(path, SocketType::STREAM);
        sockopt::set_socket_timeout(&monitor, sockopt::Timeout::Recv, Some(SOON)).expect("a limit");
        let guest = Self {
            cid,
            monitor,
            memory,
            base: base.expect("room").cast(),
            kicks: [event(), event()],
            calls: [event(), event()],
            available: [0; 2],
            seen: 0,
            sent: 0,
            pings: 0,
            buf_alloc: 1 << 20,
            fwd_cnt: 0,
            buffer: BUFFER,
        };
        guest.set_up();
        guest
    }

    // ---- its monitor

    /// The descriptor by which the switch interrupts the guest for a queue.
    pub fn call(&self, index: usize) -> &OwnedFd {
        &self.calls[index]
    }

    /// Ask to be interrupted for the next chain that is given back.
    pub fn listen(&mut self, queue: usize) {
        let used = self.number(QUEUES[queue] + USED + 2);
        self.write(QUEUES[queue] + AVAILABLE + 4 + 2 * u64::from(QUEUE), &used.to_le_bytes());
    }

    /// Say something to the switch as the monitor.
    pub fn tell(&self, request: u32, payload: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let message = monitor_message(request, payload);
        packet::send(self.monitor.as_fd(), &message, descriptors).expect("a switch that listens");
    }

    /// Wait until the switch has handled everything that the monitor said.
    pub fn settle(&self) {
        self.tell(GET_FEATURES, &[], &[]);
        let mut reply = [0; 20];
        let mut got = 0;
        while got < reply.len() {
            let flags = rustix::net::RecvFlags::empty();
            let (len, _) = rustix::net::recv(&self.monitor, &mut reply[got..], flags).expect("a reply");
            assert!(len > 0, "the switch has hung up");
            got += len;
        }
    }

    /// Hand the memory in (again).
    pub fn hand_in_memory(&self) {
        self.tell(SET_MEM_TABLE, &memory_table(&[(0, MEMORY as u64, 0)]), &[self.memory.as_fd()]);
    }

    fn set_up(&self) {
        self.tell(SET_OWNER, &[], &[]);
        self.tell(SET_FEATURES, &FEATURES.to_le_bytes(), &[]);
        self.hand_in_memory();
        for (index, at) in QUEUES.into_iter().enumerate() {
            let state = |value: u32| [index as u32, value].map(u32::to_le_bytes).concat();
            self.tell(SET_VRING_NUM, &state(QUEUE.into()), &[]);
            self.tell(SET_VRING_BASE, &state(0), &[]);
            let places = [at, at + USED, at + AVAILABLE, 0].map(u64::to_le_bytes).concat();
            self.tell(SET_VRING_ADDR, &[state(0), places].concat(), &[]);
            let number = (index as u64).to_le_bytes();
            self.tell(SET_VRING_KICK, &number, &[self.kicks[index].as_fd()]);
            self.tell(SET_VRING_CALL, &number, &[self.calls[index].as_fd()]);
            self.tell(SET_VRING_ENABLE, &state(1), &[]);
        }
        self.settle();
    }

    // ---- its memory

    pub fn write(&self, at: u64, bytes: &[u8]) {
        assert!(at as usize + bytes.len() <= MEMORY);
        // SAFETY: within the mapping, as was just checked.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(at as usize), bytes.len()) };
    }

    pub fn read(&self, at: u64, len: usize) -> Vec<u8> {
        assert!(at as usize + len <= MEMORY);
        let mut bytes = vec![0; len];
        // SAFETY: within the mapping, as was just checked.
        unsafe { std::ptr::copy_nonoverlapping(self.base.add(at as usize), bytes.as_mut_ptr(), len) };
        bytes
    }

    fn number(&self, at: u64) -> u16 {
        assert!(at as usize + 2 <= MEMORY && at % 2 == 0);
        // SAFETY: within the mapping and aligned, as was just checked. The switch writes it meanwhile.
        unsafe { self.base.add(at as usize).cast::<u16>().read_volatile() }
    }

    /// Write one descriptor of a table.
    pub fn descriptor(&self, table: u64, index: u16, at: u64, len: u32, flags: u16, next: u16) {
        let place = table + 16 * u64::from(index);
        self.write(place, &at.to_le_bytes());
        self.write(place + 8, &len.to_le_bytes());
        self.write(place + 12, &flags.to_le_bytes());
        self.write(place + 14, &next.to_le_bytes());
    }

    /// The table of descriptors of a queue.
    pub fn table(&self, queue: usize) -> u64 {
        QUEUES[queue]
    }

    // ---- its queues

    /// Make a chain available; the device is not kicked.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let slot = u64::from(self.available[queue] % QUEUE);
        self.write(QUEUES[queue] + AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        self.set_available(queue, self.available[queue].wrapping_add(1));
    }

    /// Say that so many chains were made available.
    pub fn set_available(&mut self, queue: usize, index: u16) {
        self.available[queue] = index;
        fence(Ordering::SeqCst);
        self.write(QUEUES[queue] + AVAILABLE + 2, &index.to_le_bytes());
        fence(Ordering::SeqCst);
    }

    pub fn kick(&self, queue: usize) {
        rustix::io::write(&self.kicks[queue], &1u64.to_ne_bytes()).expect("room");
    }

    /// Chains that the switch has and did not give back.
    pub fn taken(&self, queue: usize) -> u16 {
        self.available[queue].wrapping_sub(self.number(QUEUES[queue] + USED + 2))
    }

    /// Give the switch so many receive buffers.
    pub fn post(&mut self, count: u16) {
        assert!(
            self.available[RX].wrapping_sub(self.seen) + count <= QUEUE,
            "more buffers than the queue has"
        );
        for _ in 0..count {
            let index = self.available[RX] % QUEUE;
            self.descriptor(QUEUES[RX], index, BUFFERS + 8192 * u64::from(index), self.buffer, WRITE, 0);
            self.offer(RX, index);
        }
        self.kick(RX);
    }

    /// Receive buffers that the switch has not filled.
    pub fn posted(&self) -> u16 {
        self.available[RX].wrapping_sub(self.seen)
    }

    /// The next packet that the switch has put into a buffer.
    pub fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        if self.number(QUEUES[RX] + USED + 2) == self.seen {
            return None;
        }
        fence(Ordering::SeqCst);
        let entry = self.read(QUEUES[RX] + USED + 4 + 8 * u64::from(self.seen % QUEUE), 8);
        self.seen = self.seen.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().expect("four bytes"));
        let packet = self.read(BUFFERS + 8192 * u64::from(word(0)), word(4) as usize);
        let header = Header::decode(&packet).expect("a header");
        let payload = packet[Header::LEN..].to_vec();
        assert_eq!(header.len as usize, payload.len());
        assert_eq!(header.dst_cid, u64::from(self.cid));
        Some((header, payload))
    }

    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        until("a packet", || self.poll())
    }

    /// The next packet with this operation; others before it are dropped.
    pub fn wait(&mut self, op: u16) -> Header {
        until(&format!("a packet with operation {op}"), || {
            self.poll().map(|packet| packet.0).filter(|header| header.op == op)
        })
    }

    pub fn header(&self, link: &Link, op: u16) -> Header {
        Header {
            src_cid: self.cid.into(),
            dst_cid: link.peer.into(),
            src_port: link.port,
            dst_port: link.peer_port,
            len: 0,
            kind: link.kind,
            op,
            flags: 0,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    /// Put a packet into the transmit queue; the device is not kicked. Its length is that of the payload.
    pub fn queue(&mut self, mut header: Header, payload: &[u8]) {
        assert!(payload.len() <= 64 << 10);
        let index = self.sent % (QUEUE / 2) * 2;
        self.sent = self.sent.wrapping_add(1);
        if self.taken(TX) >= QUEUE / 2 - 1 {
            self.kick(TX);
            until("room to transmit", || (self.taken(TX) < QUEUE / 2 - 1).then_some(()));
        }
        header.len = payload.len() as u32;
        let at = HEADERS + 64 * u64::from(index);
        self.write(at, &header.encode());
        let flags = if payload.is_empty() { 0 } else { NEXT };
        self.descriptor(QUEUES[TX], index, at, Header::LEN as u32, flags, index + 1);
        let at = PAYLOADS + (u64::from(index) << 15);
        self.write(at, payload);
        self.descriptor(QUEUES[TX], index + 1, at, header.len, 0, 0);
        self.offer(TX, index);
    }

    pub fn transmit(&mut self, header: Header, payload: &[u8]) {
        self.queue(header, payload);
        self.kick(TX);
    }

    /// Transmit a packet without a payload.
    pub fn sign(&mut self, link: &Link, op: u16) {
        self.transmit(self.header(link, op), &[]);
    }

    /// Transmit bytes, or one whole message.
    pub fn send(&mut self, link: &Link, payload: &[u8]) {
        let mut header = self.header(link, RW);
        header.flags = if link.kind == SEQPACKET { SEQ_EOM } else { 0 };
        self.transmit(header, payload);
    }

    /// Is this guest served? A packet to nobody is answered by a reset. Returns the packets that came before it.
    pub fn ping(&mut self) -> Vec<Header> {
        self.pings += 1;
        let link = Link { port: 0x4000_0000 + self.pings, peer: NOBODY, peer_port: self.pings, kind: STREAM };
        self.post(1);
        self.sign(&link, RW);
        let mut others = Vec::new();
        until("the answer to a packet", || {
            let header = self.poll()?.0;
            if (header.op, header.dst_port) == (RST, link.port) {
                return Some(());
            }
            others.push(header);
            None
        });
        others
    }

    /// Ask for a connection.
    pub fn request(&mut self, port: u32, peer: u32, peer_port: u32, kind: u16) -> Link {
        let link = Link { port, peer, peer_port, kind };
        self.sign(&link, REQUEST);
        link
    }

    /// Connect to the switch itself, as an agent does.
    pub fn agent(&mut self, port: u32, peer_port: u32, kind: u16) -> Link {
        self.post(1);
        let link = self.request(port, 2, peer_port, kind);
        self.wait(RESPONSE);
        link
    }
}

/// A connection between programs of two guests; neither has a receive buffer left.
pub fn open(a: &mut Guest, b: &mut Guest, kind: u16) -> (Link, Link) {
    a.post(1);
    b.post(2);
    let to = a.request(1000, b.cid, 50, kind);
    assert_eq!(b.wait(REQUEST).src_cid, u64::from(a.cid));
    let back = Link { port: 50, peer: a.cid, peer_port: 1000, kind };
    b.sign(&back, RESPONSE);
    assert_eq!(a.wait(RESPONSE).buf_alloc, b.buf_alloc);
    // It was granted nothing while the opener was not told.
    assert_eq!(b.wait(CREDIT_UPDATE).buf_alloc, a.buf_alloc);
    (to, back)
}

/// Keep putting bytes into a socket, until whoever is behind it has gone.
pub fn flood(socket: OwnedFd, bytes: Vec<u8>) {
    std::thread::spawn(move || while rustix::net::send(&socket, &bytes, SendFlags::NOSIGNAL).is_ok() {});
}
