//! One queue of a guest's device: chains of pieces of its memory.
//!
//! The guest writes the chains at any time; each address is read once, checked against the memory table, and used
//! as a pointer from then on. Layout and rules of the rings are in `virtio-queue`.

use std::os::fd::OwnedFd;

use isthmus_wire::vhost_user::VringAddr;
use isthmus_wire::vsock::{Header, PAYLOAD_MAX};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;

use crate::Fault;
use crate::memory::Memory;

/// Longest queue a monitor may ask for. QEMU has 128, user-mode Linux 256.
const SIZE_MAX: u16 = 1024;
/// Chains of the transmit queue that are kept at most, and their share of the queue.
const KEPT_MAX: usize = 16;
const KEPT_SHARE: u16 = 8;

/// A run of bytes in a guest's memory. Good while the `Memory` it was found in lives.
pub type Piece = (*mut u8, usize);

/// A chain of the guest's, taken from the queue and not yet given back.
#[derive(Default)]
pub struct Chain {
    head: u16,
    pub pieces: Vec<Piece>,
}

/// A queue as its monitor describes it, and as it runs.
#[derive(Default)]
pub struct Vring {
    pub num: u16,
    pub base: u16,
    pub addr: Option<VringAddr>,
    pub kick: Option<OwnedFd>,
    pub call: Option<OwnedFd>,
    pub enabled: bool,
    running: Option<Queue>,
    /// Chains were given back since the guest was last told.
    told: bool,
    /// Chains that are done with and not given back yet; see [`Vring::keep`].
    kept: Vec<u16>,
}

impl Vring {
    #[must_use]
    pub fn running(&self) -> bool {
        self.running.is_some()
    }

    /// Begin if everything is known that is needed. `true` if it began now.
    ///
    /// # Errors
    /// The queue does not lie in the guest's memory.
    pub fn start(&mut self, memory: &Memory, event_idx: bool) -> Result<bool, Fault> {
        let Some(addr) = self.addr.filter(|_| self.enabled && self.kick.is_some() && self.num > 0) else {
            return Ok(false);
        };
        if self.running.is_some() {
            return Ok(false);
        }
        let place =
            |user| memory.from_user(user).map(GuestAddress).ok_or(Fault::Queue("outside the guest's memory"));
        let wrong = |_| Fault::Queue("not where or as long as a queue may be");
        let mut queue = Queue::new(SIZE_MAX).map_err(wrong)?;
        queue.try_set_size(self.num).map_err(wrong)?;
        queue.try_set_desc_table_address(place(addr.descriptors)?).map_err(wrong)?;
        queue.try_set_avail_ring_address(place(addr.available)?).map_err(wrong)?;
        queue.try_set_used_ring_address(place(addr.used)?).map_err(wrong)?;
        queue.set_event_idx(event_idx);
        queue.set_next_avail(self.base);
        let used = queue.used_idx(memory.mapped(), std::sync::atomic::Ordering::Acquire).map_err(wrong)?;
        queue.set_next_used(used.0);
        queue.set_ready(true);
        if !queue.is_valid(memory.mapped()) {
            return Err(Fault::Queue("outside the guest's memory"));
        }
        self.running = Some(queue);
        self.told = true;
        Ok(true)
    }

    /// Stop, and say where to go on.
    pub fn stop(&mut self) -> u16 {
        self.kept.clear();
        if let Some(queue) = self.running.take() {
            self.base = queue.next_avail();
        }
        self.base
    }

    /// Is there a chain to take?
    #[must_use]
    pub fn waiting(&self, memory: &Memory) -> bool {
        self.running.as_ref().is_some_and(|queue| {
            queue
                .avail_idx(memory.mapped(), std::sync::atomic::Ordering::Acquire)
                .is_ok_and(|idx| idx.0 != queue.next_avail())
        })
    }

    /// Take the next chain: its pieces that we may read (`writable` false) or write.
    ///
    /// # Errors
    /// The queue is not one any more, or the chain names memory that the guest does not have. The chain of an
    /// error that names the chain was given back.
    pub fn take(&mut self, memory: &Memory, writable: bool, chain: &mut Chain) -> Result<bool, Fault> {
        let Some(queue) = &mut self.running else { return Ok(false) };
        let mapped = memory.mapped();
        let mut available = queue.iter(mapped).map_err(|_| Fault::Queue("an index beyond the queue"))?;
        let Some(found) = available.next() else { return Ok(false) };
        chain.head = found.head_index();
        chain.pieces.clear();
        // An indirect table may name more than the queue has; no driver's packet does.
        let mut left = usize::from(self.num);
        for descriptor in found {
            let (at, len) = (descriptor.addr().0, descriptor.len());
            let piece = memory.at(at, len.into()).filter(|_| left > 0);
            left = left.saturating_sub(1);
            let Some(piece) = piece else { return Err(Fault::Queue("a chain outside the guest's memory")) };
            if descriptor.is_write_only() == writable {
                chain.pieces.push((piece, len as usize));
            }
        }
        Ok(true)
    }

    /// Give a chain back, with `len` bytes written to it.
    pub fn give_back(&mut self, memory: &Memory, chain: &Chain, len: u32) {
        if let Some(queue) = &mut self.running {
            let _ = queue.add_used(memory.mapped(), chain.head, len);
            self.told = false;
        }
    }

    /// Give a chain of the transmit queue back later, together with others.
    ///
    /// A guest needs its transmitted chains back only when it runs out of them, and an interrupt for each costs it more
    /// than the packet did. So some stay here, also while nothing happens.
    pub fn keep(&mut self, memory: &Memory, chain: &Chain) {
        self.kept.push(chain.head);
        if self.kept.len() >= usize::from(self.num / KEPT_SHARE).min(KEPT_MAX) {
            self.give_kept(memory);
        }
    }

    /// Give back what was kept.
    pub fn give_kept(&mut self, memory: &Memory) {
        if let Some(queue) = &mut self.running {
            for head in self.kept.drain(..) {
                let _ = queue.add_used(memory.mapped(), head, 0);
                self.told = false;
            }
        }
    }

    /// Interrupt the guest if chains were given back and it wants to know.
    ///
    /// # Errors
    /// The descriptor made us wait, and was given not to: the monitor changed it.
    pub fn tell(&mut self, memory: &Memory) -> Result<(), Fault> {
        let Some(queue) = &mut self.running else { return Ok(()) };
        if self.told {
            return Ok(());
        }
        self.told = true;
        if let (Ok(true), Some(call)) = (queue.needs_notification(memory.mapped()), &self.call) {
            // An eventfd or (user-mode Linux) a pipe; full means that it was told already.
            if rustix::io::write(call, &1u64.to_ne_bytes()) == Err(rustix::io::Errno::INTR) {
                return Err(Fault::Queue("its interrupt made the switch wait"));
            }
        }
        Ok(())
    }

    /// Ask the guest to kick when there are more chains. `true`: there are some already.
    pub fn listen(&mut self, memory: &Memory) -> bool {
        self.running.as_mut().is_some_and(|queue| queue.enable_notification(memory.mapped()).unwrap_or(false))
    }

    /// Ask the guest not to kick: we look by ourselves.
    pub fn ignore(&mut self, memory: &Memory) {
        if let Some(queue) = &mut self.running {
            let _ = queue.disable_notification(memory.mapped());
        }
    }
}

/// Takes bytes off the front of a list of pieces.
pub struct Cursor<'a> {
    pieces: &'a [Piece],
    skip: usize,
}

impl<'a> Cursor<'a> {
    #[must_use]
    pub fn new(pieces: &'a [Piece]) -> Self {
        Self { pieces, skip: 0 }
    }

    #[must_use]
    pub fn left(&self) -> usize {
        self.pieces.iter().fold(0usize, |sum, piece| sum.saturating_add(piece.1)).saturating_sub(self.skip)
    }

    /// The next run of at most `len` bytes; none at the end.
    pub fn next(&mut self, len: usize) -> Option<Piece> {
        loop {
            let (start, size) = *self.pieces.first()?;
            let here = (size - self.skip).min(len);
            if here == 0 {
                if size != self.skip {
                    return None;
                }
                (self.pieces, self.skip) = (self.pieces.get(1..).unwrap_or_default(), 0);
                continue;
            }
            // SAFETY: `skip + here <= size`.
            let run = unsafe { start.add(self.skip) };
            self.skip += here;
            return Some((run, here));
        }
    }

    /// Copy out; returns how many bytes there were.
    pub fn read(&mut self, out: &mut [u8]) -> usize {
        let mut done = 0;
        while let Some((from, len)) = self.next(out.len() - done) {
            // SAFETY: the piece is in a guest's memory, `out` in ours; a guest that writes meanwhile gets what it
            // wrote.
            unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr().add(done), len) };
            done += len;
        }
        done
    }

    /// Copy in; returns how many bytes found room.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let mut done = 0;
        while let Some((to, len)) = self.next(bytes.len() - done) {
            // SAFETY: as in `read`.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().add(done), to, len) };
            done += len;
        }
        done
    }

    /// Copy at most `len` bytes from another list; returns how many.
    pub fn copy(&mut self, from: &mut Cursor<'_>, len: usize) -> usize {
        let mut done = 0;
        while let Some((mut to, mut room)) = self.next(len - done) {
            while room > 0 {
                let Some((run, here)) = from.next(room) else { return done };
                // SAFETY: both are in guests' memory; the same guest may name one place twice, so they may overlap.
                unsafe {
                    std::ptr::copy(run, to, here);
                    to = to.add(here);
                }
                room -= here;
                done += here;
            }
        }
        done
    }
}

/// The header at the front of a packet, and how many bytes of payload follow it.
///
/// # Errors
/// The chain is shorter than a header, or than the payload that the header names.
pub fn parse(chain: &Chain) -> Result<(Header, Cursor<'_>), Fault> {
    let mut cursor = Cursor::new(&chain.pieces);
    let mut bytes = [0; Header::LEN];
    if cursor.read(&mut bytes) < Header::LEN {
        return Err(Fault::Queue("a packet shorter than its header"));
    }
    let header = Header::decode(&bytes)?;
    if header.len > PAYLOAD_MAX {
        return Err(Fault::Queue("a packet longer than any driver sends"));
    }
    if cursor.left() < header.len as usize {
        return Err(Fault::Queue("a packet shorter than its header says"));
    }
    Ok((header, cursor))
}
