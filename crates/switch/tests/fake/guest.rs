//! A monitor and a driver at once: it hands its memory in, and writes its queues by hand.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{Ordering, fence};

use isthmus_sys::{memory, packet};
use isthmus_wire::vsock::{Header, REQUEST, RESPONSE, RST, RW, SEQ_EOM, SEQPACKET, STREAM};
use rustix::event::EventfdFlags;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::net::{SocketType, sockopt};

use super::{NOBODY, SOON, connect, until};

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
    pub fn new(cid: u32, path: &Path) -> Self {
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

    /// The next packet with bytes; others before it are dropped.
    pub fn receive_bytes(&mut self) -> (Header, Vec<u8>) {
        until("bytes", || self.poll().filter(|packet| packet.0.op == RW))
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
