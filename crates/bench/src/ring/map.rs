//! The memory of a ring pair, as one end has it mapped.

use std::{
    os::fd::BorrowedFd,
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicU64},
};

use rustix::{
    io::Errno,
    mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap},
};

use super::{CONTROL_BYTES, LINE, RING_BYTES, TOTAL_BYTES};
use crate::error::BenchError;

/// One direction's words, each alone on its line and on the neighbour the processor may fetch with it.
#[repr(C)]
pub(super) struct Control {
    pub credit: Padded<AtomicU64>,
    pub receiver_sleeps: Padded<AtomicU32>,
    pub sender_sleeps: Padded<AtomicU32>,
    /// Set by the sender of this direction when it leaves.
    pub closed: Padded<AtomicU32>,
}

#[repr(C, align(128))]
pub(super) struct Padded<T>(pub T);

/// The memfd, mapped at a multiple of 2 MiB.
pub(super) struct Map {
    reserved: NonNull<u8>,
    start: NonNull<u8>,
}

// SAFETY: the mapping belongs to the process, not to a thread, and its address may be used from any.
unsafe impl Send for Map {}
// SAFETY: a shared `Map` gives out addresses and atomic words, and nothing that two threads could not hold at once.
unsafe impl Sync for Map {}

impl Map {
    const RESERVED: usize = TOTAL_BYTES + RING_BYTES;

    pub(super) fn new(memory: BorrowedFd<'_>) -> Result<Self, BenchError> {
        let refused = |source: Errno| BenchError::Memory { bytes: TOTAL_BYTES, source: source.into() };
        // SAFETY: a fresh mapping, placed by the kernel, touches nothing that exists.
        let reserved = unsafe {
            mmap_anonymous(std::ptr::null_mut(), Self::RESERVED, ProtFlags::empty(), MapFlags::PRIVATE)
        }
        .map_err(refused)?;
        let reserved = NonNull::new(reserved.cast::<u8>()).ok_or_else(|| refused(Errno::NOMEM))?;
        let ahead = reserved.as_ptr().addr().next_multiple_of(RING_BYTES) - reserved.as_ptr().addr();
        // SAFETY: `ahead` is less than RING_BYTES, so TOTAL_BYTES from there are within the reservation.
        let start = unsafe { reserved.add(ahead) };
        let map = Self { reserved, start };
        let place = map.start.as_ptr().cast();
        // SAFETY: FIXED replaces only a part of the reservation made above, which nothing else knows of.
        unsafe {
            mmap(
                place,
                TOTAL_BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED,
                memory,
                0,
            )
        }
        .map_err(refused)?;
        for ring in [0, RING_BYTES] {
            let page = map.at(ring);
            // SAFETY: a read inside the mapping, so that there is a page to collapse. Collapsing changes the size of
            // pages and never their contents; where the kernel refuses, the ring stays on small pages and works.
            unsafe {
                page.as_ptr().read_volatile();
                libc::madvise(page.as_ptr().cast(), RING_BYTES, libc::MADV_COLLAPSE);
            }
        }
        Ok(map)
    }

    #[inline(always)]
    pub(super) fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < TOTAL_BYTES, "an offset past the end of the ring's memory");
        // SAFETY: `offset` was just checked to be inside the mapping.
        unsafe { self.start.add(offset) }
    }

    #[inline(always)]
    pub(super) fn stamp_at(&self, offset: usize) -> &AtomicU64 {
        let place = self.at(offset - offset % LINE);
        // SAFETY: `place` is the start of a cache line inside the mapping, which lives as long as `self`; all access to
        // a stamp while both ends use the ring is atomic.
        unsafe { place.cast::<AtomicU64>().as_ref() }
    }

    #[inline(always)]
    pub(super) fn control(&self, direction: usize) -> &Control {
        const { assert!(2 * size_of::<Control>() <= CONTROL_BYTES) };
        let place = self.at(2 * RING_BYTES + direction.min(1) * size_of::<Control>());
        // SAFETY: `place` is a multiple of 128 inside the control page, which has room for both directions' words, all of
        // them atomic and valid for any bits.
        unsafe { place.cast::<Control>().as_ref() }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the reservation and everything mapped over it is this value's own, and no reference outlives it.
        let _ = unsafe { munmap(self.reserved.as_ptr().cast(), Self::RESERVED) };
    }
}
