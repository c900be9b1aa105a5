//! A ring in memory that both sides can write: what shared memory gives when nobody is a stranger.
//!
//! The baseline without isolation. Either end can forge, rewrite or erase what the other wrote; between strangers this
//! is not a transport at all, and it is here to show what isolation costs.
//!
//! One memfd holds two rings, one for each direction, of one 2 MiB huge page each (`MADV_COLLAPSE`, no privilege
//! needed), and a page of control words. A message is cut into chunks of at most 64 KiB. In front of each chunk is a
//! header whose first word is a *stamp*, a different number for each position in the endless stream of bytes; the
//! receiver waits for the stamp it expects, so nothing else has to be fetched, and nothing has to be erased after use.
//! The receiver says how far it has read now and then (credit), the sender looks only when it seems out of room.
//!
//! Sleeping: a futex on the low half of the stamp (receiver) or of the credit (sender), both with a flag that says so,
//! so that no system call is made while both are awake.

mod map;

use std::{
    io,
    os::fd::{AsFd, OwnedFd, RawFd},
    sync::atomic::{AtomicU32, AtomicU64, Ordering, fence},
};

use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    io::Errno,
    thread::futex,
    time::Timespec,
};

use self::map::Map;
use crate::{clock::Clock, copy::Copy, error::BenchError, fd::duplicate, loops::Transport, wait::Wait};

/// Bytes of one direction's ring: one huge page.
pub const RING_BYTES: usize = 2 << 20;

const CONTROL_BYTES: usize = 4096;
const TOTAL_BYTES: usize = 2 * RING_BYTES + CONTROL_BYTES;
/// Longest piece of a message under one header, so that the receiver copies while the sender does.
const CHUNK_BYTES: usize = 64 << 10;
const LINE: usize = 64;
/// Stamp and length, on a line of their own: the receiver polls it while the sender fills the lines behind it.
const HEADER: usize = LINE;
/// The receiver reports what it has read at least this often.
const CREDIT_BYTES: u64 = RING_BYTES as u64 / 8;
/// A sleeper looks again after this long, so a wake that never comes costs time and not the run.
const NAP: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
/// Polls between two looks at whether the other end has left.
const POLLS_BETWEEN_LOOKS: u32 = 1 << 16;

/// Which end of the ring pair this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Left,
    Right,
}

/// Both directions mapped: a [`Transport`].
pub struct MappedRing {
    map: Map,
    out: Direction,
    into: Direction,
    clock: Clock,
    /// Ticks to spin before sleeping, `None` for ever.
    spin: Option<u64>,
    copy_out: Copy,
}

/// What one end keeps of one direction.
struct Direction {
    index: usize,
    /// Bytes of the endless stream written (sender) or read (receiver).
    position: u64,
    /// The other end's position, as last heard (sender) or last told (receiver).
    credit: u64,
}

impl Direction {
    fn new(index: usize) -> Self {
        Self { index, position: 0, credit: 0 }
    }

    /// Bytes from the position to the end of the ring's memory.
    fn contiguous(&self) -> usize {
        RING_BYTES - self.offset()
    }

    /// Where that is in the ring.
    fn offset(&self) -> usize {
        self.position as usize % RING_BYTES
    }

    /// Where that is in the mapping.
    fn place(&self) -> usize {
        self.index * RING_BYTES + self.offset()
    }
}

impl MappedRing {
    /// Memory for one pair of ends: make it once and pass the descriptor on.
    ///
    /// # Errors
    ///
    /// [`BenchError::Memory`] when the kernel has none.
    pub fn memory() -> Result<OwnedFd, BenchError> {
        let refused = |source: Errno| BenchError::Memory { bytes: TOTAL_BYTES, source: source.into() };
        let memory = memfd_create("isthmus-bench-ring", MemfdFlags::CLOEXEC).map_err(refused)?;
        ftruncate(&memory, TOTAL_BYTES as u64).map_err(refused)?;
        Ok(memory)
    }

    /// Map one end. Both must wait in the same way, and each side is opened once.
    ///
    /// # Errors
    ///
    /// [`BenchError::Memory`] when `memory` cannot be mapped.
    pub fn open<Fd: AsFd>(memory: Fd, side: Side, wait: Wait) -> Result<Self, BenchError> {
        let clock = Clock::start();
        let (out, into) = match side {
            Side::Left => (0, 1),
            Side::Right => (1, 0),
        };
        Ok(Self {
            map: Map::new(memory.as_fd())?,
            out: Direction::new(out),
            into: Direction::new(into),
            clock,
            spin: wait.spin().map(|spin| clock.ticks_in(spin)),
            copy_out: Copy::Libc,
        })
    }

    /// The same for a descriptor that stays somebody else's.
    ///
    /// # Errors
    ///
    /// [`BenchError`] when `memory` is not open or cannot be mapped.
    pub fn open_raw(memory: RawFd, side: Side, wait: Wait) -> Result<Self, BenchError> {
        Self::open(duplicate(memory)?, side, wait)
    }

    /// Copy to the receiver past its caches: better when the destination is larger than they are.
    pub fn with_streaming_copies(mut self, streaming: bool) -> Self {
        self.copy_out = if streaming { Copy::Streaming } else { Copy::Libc };
        self
    }

    fn send_chunk(&mut self, chunk: &[u8]) -> io::Result<usize> {
        let len = chunk.len().min(CHUNK_BYTES).min(self.out.contiguous() - HEADER);
        let step = (HEADER + len).next_multiple_of(LINE) as u64;
        self.wait_for_room(step)?;
        let header = self.map.at(self.out.place());
        // SAFETY: `offset` is a multiple of 64 below RING_BYTES and `HEADER + len` reaches at most the ring's end, so
        // all is inside the mapping. The credit says that the receiver has read these bytes, so it does not look.
        unsafe {
            Copy::Libc.run(chunk.as_ptr(), header.as_ptr().add(HEADER), len);
            // Last, next to the stamp: the header's line then changes hands once.
            header.cast::<u32>().add(2).write(len as u32);
        }
        let word = self.map.stamp_at(self.out.place());
        let stamp = stamp(self.out.position);
        self.out.position += step;
        if self.spin.is_none() {
            word.store(stamp, Ordering::Release);
        } else {
            // Stamp, then flag; the receiver's flag, then stamp. Both orders are total, so one of the two sees the other.
            word.swap(stamp, Ordering::SeqCst);
            let control = self.map.control(self.out.index);
            if control.receiver_sleeps.0.load(Ordering::SeqCst) != 0 {
                control.receiver_sleeps.0.store(0, Ordering::Relaxed);
                futex::wake(low_half(word), futex::Flags::empty(), 1)?;
            }
        }
        Ok(len)
    }

    #[inline(always)]
    fn wait_for_room(&mut self, step: u64) -> io::Result<()> {
        let enough = |credit: u64, position: u64| position + step - credit <= RING_BYTES as u64;
        if enough(self.out.credit, self.out.position) {
            return Ok(());
        }
        let control = self.map.control(self.out.index);
        let gone = &self.map.control(self.into.index).closed.0;
        let position = self.out.position;
        let credit = self.wait_until(&control.credit.0, &control.sender_sleeps.0, gone, |credit| {
            enough(credit, position)
        })?;
        self.out.credit = credit;
        Ok(())
    }

    fn receive_chunk(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let header = self.map.at(self.into.place());
        let word = self.map.stamp_at(self.into.place());
        let expected = stamp(self.into.position);
        if word.load(Ordering::Acquire) != expected {
            let control = self.map.control(self.into.index);
            self.wait_until(word, &control.receiver_sleeps.0, &control.closed.0, |found| found == expected)?;
        }
        // SAFETY: the header is inside the mapping; the stamp was read with Acquire and is the sender's
        // last write, so the length and the payload are complete.
        let len = unsafe { header.cast::<u32>().add(2).read() } as usize;
        if len > target.len() || len > self.into.contiguous() - HEADER {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a chunk is longer than the message it belongs to",
            ));
        }
        // SAFETY: `len` was bounded by the ring's end and by `target` just above.
        unsafe { self.copy_out.run(header.as_ptr().add(HEADER), target.as_mut_ptr(), len) };
        self.into.position += (HEADER + len).next_multiple_of(LINE) as u64;
        if self.into.position - self.into.credit >= CREDIT_BYTES {
            self.give_credit()?;
        }
        Ok(len)
    }

    fn give_credit(&mut self) -> io::Result<()> {
        self.into.credit = self.into.position;
        let control = self.map.control(self.into.index);
        if self.spin.is_none() {
            control.credit.0.store(self.into.credit, Ordering::Release);
            return Ok(());
        }
        control.credit.0.swap(self.into.credit, Ordering::SeqCst);
        if control.sender_sleeps.0.load(Ordering::SeqCst) != 0 {
            control.sender_sleeps.0.store(0, Ordering::Relaxed);
            futex::wake(low_half(&control.credit.0), futex::Flags::empty(), 1)?;
        }
        Ok(())
    }

    /// Wait until `word` is `good`: spin as long as agreed, then sleep with `flag` up.
    fn wait_until(
        &self,
        word: &AtomicU64,
        flag: &AtomicU32,
        gone: &AtomicU32,
        good: impl Fn(u64) -> bool,
    ) -> io::Result<u64> {
        let mut since = None;
        loop {
            for poll in 0_u32..POLLS_BETWEEN_LOOKS {
                let found = word.load(Ordering::Acquire);
                if good(found) {
                    return Ok(found);
                }
                // The clock costs as much as ten polls.
                if let Some(spin) = self.spin
                    && poll % 16 == 0
                {
                    let now = self.clock.ticks();
                    if now - *since.get_or_insert(now) >= spin {
                        break;
                    }
                }
            }
            if self.spin.is_some() {
                flag.store(1, Ordering::SeqCst);
                let found = word.load(Ordering::SeqCst);
                if !good(found) {
                    nap(word, found)?;
                }
                flag.store(0, Ordering::Relaxed);
            }
            if gone.load(Ordering::Relaxed) != 0 {
                fence(Ordering::Acquire);
                let found = word.load(Ordering::Acquire);
                return if good(found) { Ok(found) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }
}

impl Transport for MappedRing {
    #[inline]
    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        let mut sent = 0;
        while sent < message.len() {
            sent += self.send_chunk(&message[sent..])?;
        }
        Ok(())
    }

    #[inline]
    fn recv_exact(&mut self, message: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < message.len() {
            filled += self.receive_chunk(&mut message[filled..])?;
        }
        Ok(())
    }
}

impl Drop for MappedRing {
    fn drop(&mut self) {
        let control = self.map.control(self.out.index);
        control.closed.0.store(1, Ordering::SeqCst);
    }
}

/// What stands in front of the chunk at `position`. Never 0, and different for any two positions: the factor is odd.
#[inline(always)]
fn stamp(position: u64) -> u64 {
    (position / LINE as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn low_half(word: &AtomicU64) -> &AtomicU32 {
    let half = std::ptr::from_ref(word).cast::<AtomicU32>();
    // SAFETY: both halves of a 64-bit word are aligned 32-bit words inside it; the futex call only compares.
    unsafe { &*half.add(usize::from(cfg!(target_endian = "big"))) }
}

fn nap(word: &AtomicU64, found: u64) -> io::Result<()> {
    match futex::wait(low_half(word), futex::Flags::empty(), found as u32, Some(&NAP)) {
        Ok(()) | Err(Errno::AGAIN | Errno::INTR | Errno::TIMEDOUT) => Ok(()),
        Err(other) => Err(other.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(wait: Wait) -> (MappedRing, MappedRing) {
        let memory = MappedRing::memory().expect("memfd");
        let left = MappedRing::open(&memory, Side::Left, wait).expect("left");
        (left, MappedRing::open(&memory, Side::Right, wait).expect("right"))
    }

    /// Sizes around every boundary, many times round the ring, both ways.
    #[test]
    fn every_byte_arrives_in_order_across_the_end_of_the_ring() {
        let (mut left, mut right) = pair(Wait::Block);
        let sizes = [
            1,
            47,
            48,
            49,
            64,
            1023,
            CHUNK_BYTES - 1,
            CHUNK_BYTES,
            CHUNK_BYTES + 1,
            RING_BYTES,
            3 * RING_BYTES + 5,
        ];
        let answer = std::thread::spawn(move || {
            for size in sizes.iter().cycle().take(4 * sizes.len()) {
                let mut message = vec![0; *size];
                right.recv_exact(&mut message).expect("message");
                right.send(&message).expect("echo");
            }
        });
        for (round, size) in sizes.iter().cycle().take(4 * sizes.len()).enumerate() {
            let message: Vec<u8> = (0..*size).map(|i| (i + i / 255 + round) as u8).collect();
            let mut echo = vec![0; *size];
            left.send(&message).expect("send");
            left.recv_exact(&mut echo).expect("echo");
            assert!(message == echo, "{size} bytes, round {round}");
        }
        answer.join().expect("other end");
    }

    /// One line before the end there is room for a header and for nothing behind it.
    #[test]
    fn a_header_alone_at_the_end_of_the_ring_is_passed_over() {
        let (mut left, mut right) = pair(Wait::Block);
        let mut room = RING_BYTES - LINE;
        let mut received = vec![0; CHUNK_BYTES];
        while room > 0 {
            let len = CHUNK_BYTES.min(room - HEADER);
            left.send(&vec![1; len]).expect("send");
            right.recv_exact(&mut received[..len]).expect("receive");
            room -= HEADER + len;
        }
        assert_eq!(left.out.contiguous(), LINE);
        left.send(b"next").expect("send");
        right.recv_exact(&mut received[..4]).expect("receive");
        assert_eq!(&received[..4], b"next");
    }

    #[test]
    fn a_sender_without_credit_sleeps_until_there_is_room() {
        let (mut left, mut right) = pair(Wait::Block);
        let sender = std::thread::spawn(move || left.send(&vec![7; 2 * RING_BYTES]).map(|()| left));
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!sender.is_finished(), "twice the ring cannot fit");
        let mut message = vec![0; 2 * RING_BYTES];
        right.recv_exact(&mut message).expect("all of it");
        assert!(message.iter().all(|&byte| byte == 7));
        sender.join().expect("thread").expect("sent");
    }

    #[test]
    fn an_end_that_leaves_is_noticed_after_its_last_message() {
        for wait in [Wait::Spin, Wait::Block] {
            let (mut left, mut right) = pair(wait);
            left.send(b"last").expect("send");
            drop(left);
            let mut message = [0; 4];
            right.recv_exact(&mut message).expect("still there");
            assert_eq!(&message, b"last");
            let error = right.recv_exact(&mut message).expect_err("nobody");
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn a_descriptor_of_something_else_is_refused() {
        let (left, _right) = std::os::unix::net::UnixStream::pair().expect("socketpair");
        let error = MappedRing::open(left, Side::Left, Wait::Spin).err().expect("not memory");
        assert!(matches!(error, BenchError::Memory { .. }), "{error}");
    }
}
