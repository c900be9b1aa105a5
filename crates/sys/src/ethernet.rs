//! One Ethernet interface: whole frames of one ethertype, in and out.
//!
//! Received frames lie in a ring that the kernel fills and this process reads in place (`TPACKET_V2`: frame by frame, no
//! timer). Sending is a system call for each frame: the kernel copies it, and says so when its queue is full.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags};

/// An Ethernet address.
pub type Mac = [u8; 6];

/// Destination, source, ethertype.
pub const HEADER: usize = 14;
/// Bytes of the ring of received frames: what arrives within some milliseconds at 10 Gb/s, and what 64 endpoints that
/// each have two messages of 64 KiB under way send at one time.
const RING: usize = 16 << 20;
/// Bytes that may wait for the interface in the kernel, which doubles them and counts what its bookkeeping takes.
const SEND_ROOM: usize = 512 << 10;
/// The kernel allocates the ring in blocks; no frame crosses one.
const BLOCK: usize = 256 * 1024;
/// In front of each frame in the ring: the kernel's header, the sender's address, and what aligns the data behind the
/// Ethernet header to 16. Rounded up.
const LEAD: usize = 96;
/// Slots begin at multiples of a cache line.
const SLOT_MULTIPLE: usize = 64;
/// Of an address in the kernel's sense: `sll_pkttype` lies so far behind the ring's header.
const PACKET_TYPE_AT: usize = 32 + 10;
/// A tag with this identifier is only a priority.
const VLAN_NONE: u16 = 0;
const VLAN_MASK: u16 = 0xFFF;

/// An interface, opened for one ethertype.
pub struct Link {
    socket: OwnedFd,
    index: i32,
    mac: Mac,
    mtu: usize,
    ring: Ring,
    dropped: AtomicU64,
}

/// Where the kernel puts received frames.
struct Ring {
    base: NonNull<u8>,
    slot: usize,
    slots: usize,
    /// The slot that is filled next.
    next: usize,
}

// SAFETY: plain memory, reached only through the link that owns it.
unsafe impl Send for Ring {}
// SAFETY: as above; whoever shares a link cannot reach the ring, which takes `&mut`.
unsafe impl Sync for Ring {}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and no slice of it is left.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), RING) };
    }
}

impl Link {
    /// Open the interface `name` for frames of `ethertype` that carry at most `longest` bytes behind their Ethernet header;
    /// longer ones are not heard. Needs `CAP_NET_RAW`, and nothing of it afterwards.
    ///
    /// # Errors
    /// There is no such interface, it is no Ethernet, or this process may not.
    pub fn open(name: &str, ethertype: u16, longest: usize) -> io::Result<Self> {
        // Without a protocol it hears nothing until it is bound.
        let socket = raw_socket()?;
        let mut request = request(name)?;
        ask(socket.as_fd(), libc::SIOCGIFINDEX, &mut request)?;
        // SAFETY: the kernel filled in this member.
        let index = unsafe { request.ifr_ifru.ifru_ifindex };
        let mac = hardware_address(socket.as_fd(), &mut request)?;
        ask(socket.as_fd(), libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: the kernel filled in this member.
        let mtu = usize::try_from(unsafe { request.ifr_ifru.ifru_mtu }).unwrap_or(0);
        // Before Linux 4.20 there is none; what is outgoing is then passed over one by one.
        let _ = set(socket.as_fd(), libc::PACKET_IGNORE_OUTGOING, &1i32);
        send_room(socket.as_fd());
        let version = libc::tpacket_versions::TPACKET_V2 as libc::c_int;
        set(socket.as_fd(), libc::PACKET_VERSION, &version)?;
        let ring = Ring::map(socket.as_fd(), mtu.min(longest))?;
        bind(socket.as_fd(), index, ethertype)?;
        Ok(Self { socket, index, mac, mtu, ring, dropped: AtomicU64::new(0) })
    }

    #[must_use]
    pub fn index(&self) -> i32 {
        self.index
    }

    #[must_use]
    pub fn mac(&self) -> Mac {
        self.mac
    }

    /// Bytes that a frame may carry behind its Ethernet header, when the interface was opened.
    #[must_use]
    pub fn mtu(&self) -> usize {
        self.mtu
    }

    /// Is the interface up and its cable in?
    ///
    /// # Errors
    /// The interface is gone.
    pub fn is_up(&self) -> io::Result<bool> {
        let mut request = request("")?;
        request.ifr_ifru.ifru_ifindex = self.index;
        ask(self.socket.as_fd(), libc::SIOCGIFNAME, &mut request)?;
        ask(self.socket.as_fd(), libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the kernel filled in this member.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let wanted = libc::IFF_UP | libc::IFF_RUNNING;
        Ok(flags & wanted == wanted)
    }

    /// Let the card hear one more unicast address, until the link is dropped.
    ///
    /// # Errors
    /// The card or its driver cannot.
    pub fn add_unicast(&self, mac: Mac) -> io::Result<()> {
        self.membership(libc::PACKET_ADD_MEMBERSHIP, mac)
    }

    /// Hear it no longer. Harmless if it was not added.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn remove_unicast(&self, mac: Mac) -> io::Result<()> {
        self.membership(libc::PACKET_DROP_MEMBERSHIP, mac)
    }

    fn membership(&self, option: libc::c_int, mac: Mac) -> io::Result<()> {
        let mut address = [0; 8];
        address[..6].copy_from_slice(&mac);
        let member = libc::packet_mreq {
            mr_ifindex: self.index,
            mr_type: libc::PACKET_MR_UNICAST as libc::c_ushort,
            mr_alen: 6,
            mr_address: address,
        };
        set(self.socket.as_fd(), option, &member)
    }

    /// Hand frames to the card's queue directly, past the kernel's queue for the interface and its rules.
    ///
    /// # Errors
    /// The kernel cannot.
    pub fn bypass_queue(&self, wanted: bool) -> io::Result<()> {
        set(self.socket.as_fd(), libc::PACKET_QDISC_BYPASS, &libc::c_int::from(wanted))
    }

    /// Send one whole frame, without waiting. `false`: the queue is full, nothing was sent.
    ///
    /// # Errors
    /// The frame is longer than the interface takes, or the interface is down or gone.
    pub fn send(&self, frame: &[u8]) -> io::Result<bool> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the slice is readable; the kernel copies it.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), flags) };
        if sent >= 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN | libc::ENOBUFS | libc::EINTR) => Ok(false),
            _ => Err(error),
        }
    }

    /// Show up to `limit` frames that have arrived to `each`; returns how many slots were taken. A frame's bytes are
    /// nobody else's during the call. What was cut short, is tagged for a VLAN or left from here is passed over.
    pub fn receive(&mut self, limit: usize, mut each: impl FnMut(&[u8])) -> usize {
        for taken in 0..limit {
            let Some(slot) = self.ring.front() else { return taken };
            if let Some(frame) = slot.frame() {
                each(frame);
            }
            self.ring.release();
        }
        limit
    }

    /// Frames that found no room in the ring since the link was opened.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn dropped(&self) -> io::Result<u64> {
        let mut counts = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut len = size_of_val(&counts) as libc::socklen_t;
        // SAFETY: `len` says how large the buffer is. Reading sets the kernel's counts to zero.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut counts).cast(),
                &raw mut len,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let more = u64::from(counts.tp_drops);
        Ok(self.dropped.fetch_add(more, Ordering::Relaxed) + more)
    }

    /// What went wrong with the interface since this was last asked; until then a poll reports it.
    #[must_use]
    pub fn take_error(&self) -> Option<io::Error> {
        match rustix::net::sockopt::socket_error(&self.socket) {
            Ok(Ok(())) => None,
            Ok(Err(error)) | Err(error) => Some(error.into()),
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A slot that the kernel has filled.
struct Slot<'a> {
    bytes: &'a [u8],
    status: u32,
}

impl Slot<'_> {
    /// The frame in it, if it is whole and for us.
    fn frame(&self) -> Option<&[u8]> {
        let half = |at: usize| Some(u16::from_ne_bytes(self.bytes.get(at..at + 2)?.try_into().ok()?));
        let word = |at: usize| Some(u32::from_ne_bytes(self.bytes.get(at..at + 4)?.try_into().ok()?));
        // As `struct tpacket2_hdr` has them.
        let (whole, there, at, vlan) = (word(4)?, word(8)?, half(12)?, half(24)?);
        let tagged = self.status & libc::TP_STATUS_VLAN_VALID != 0 && vlan & VLAN_MASK != VLAN_NONE;
        if there != whole || tagged || *self.bytes.get(PACKET_TYPE_AT)? == libc::PACKET_OUTGOING {
            return None;
        }
        self.bytes.get(usize::from(at)..)?.get(..there as usize)
    }
}

impl Ring {
    fn map(socket: BorrowedFd<'_>, longest: usize) -> io::Result<Self> {
        let slot = (LEAD + HEADER + longest).next_multiple_of(SLOT_MULTIPLE).clamp(2048, BLOCK);
        let slots = BLOCK / slot * (RING / BLOCK);
        let request = libc::tpacket_req {
            tp_block_size: BLOCK as u32,
            tp_block_nr: (RING / BLOCK) as u32,
            tp_frame_size: slot as u32,
            tp_frame_nr: slots as u32,
        };
        set(socket, libc::PACKET_RX_RING, &request)?;
        // SAFETY: a new mapping at a place that the kernel chooses.
        let base = unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            let flags = MapFlags::SHARED | MapFlags::POPULATE;
            rustix::mm::mmap(std::ptr::null_mut(), RING, access, flags, socket, 0)?
        };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, slot, slots, next: 0 })
    }

    /// Where the next slot begins. Its first word says whose it is.
    fn place(&self) -> *mut u8 {
        let per_block = BLOCK / self.slot;
        let at = self.next / per_block * BLOCK + self.next % per_block * self.slot;
        // SAFETY: `next` is less than `slots`, all of which lie in the mapping.
        unsafe { self.base.as_ptr().add(at) }
    }

    fn status(&self) -> &AtomicU32 {
        // SAFETY: slots are aligned to a cache line and lie in the mapping; the kernel too changes this word as a whole.
        unsafe { AtomicU32::from_ptr(self.place().cast()) }
    }

    fn front(&self) -> Option<Slot<'_>> {
        let status = self.status().load(Ordering::Acquire);
        if status & libc::TP_STATUS_USER == 0 {
            return None;
        }
        // SAFETY: the slot is ours until `release`, which takes `&mut`: the kernel writes nothing there.
        let bytes = unsafe { std::slice::from_raw_parts(self.place(), self.slot) };
        Some(Slot { bytes, status })
    }

    /// Give the front slot back to the kernel.
    fn release(&mut self) {
        self.status().store(libc::TP_STATUS_KERNEL, Ordering::Release);
        self.next = (self.next + 1) % self.slots;
    }
}

fn raw_socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: takes no memory.
    let socket = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: made above, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

fn bind(socket: BorrowedFd<'_>, index: i32, ethertype: u16) -> io::Result<()> {
    // SAFETY: all members may be zero.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as libc::c_ushort;
    address.sll_protocol = ethertype.to_be();
    address.sll_ifindex = index;
    let len = size_of_val(&address) as libc::socklen_t;
    // SAFETY: `len` says how long the address is.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
    if result != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Let more bytes wait in the kernel than it usually does; less will do.
fn send_room(socket: BorrowedFd<'_>) {
    let bytes = SEND_ROOM as libc::c_int;
    let len = size_of_val(&bytes) as libc::socklen_t;
    for option in [libc::SO_SNDBUF, libc::SO_SNDBUFFORCE] {
        // SAFETY: `len` says how long the value is.
        let _ = unsafe {
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const bytes).cast(), len)
        };
    }
}

/// Set an option of a packet socket to a value that is plain memory.
fn set<T: Copy>(socket: BorrowedFd<'_>, option: libc::c_int, value: &T) -> io::Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the value is readable for its length; the kernel only copies it.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, option, std::ptr::from_ref(value).cast(), len)
    };
    if result != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A question about an interface.
fn request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all members may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // A zero must be left behind it.
    if name.len() >= request.ifr_name.len() || name.bytes().any(|byte| byte == 0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn ask(socket: BorrowedFd<'_>, what: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: every question asked here reads and writes one such request.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), what as _, std::ptr::from_mut(request)) };
    if result != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn hardware_address(socket: BorrowedFd<'_>, request: &mut libc::ifreq) -> io::Result<Mac> {
    ask(socket, libc::SIOCGIFHWADDR, request)?;
    // SAFETY: the kernel filled in this member.
    let address = unsafe { request.ifr_ifru.ifru_hwaddr };
    if !matches!(address.sa_family, libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "this interface is no Ethernet"));
    }
    let mut mac = [0; 6];
    for (to, from) in mac.iter_mut().zip(address.sa_data) {
        *to = from as u8;
    }
    Ok(mac)
}
