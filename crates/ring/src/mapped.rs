//! A lane's memory as a mapping of this process.

use std::any::Any;
use std::cell::RefCell;
use std::sync::Arc;

use isthmus_wire::record::Header;

use crate::copy::{Heat, STREAM_MIN, copy};
use crate::layout::COUNTERS;
use crate::parts::{Dest, Source};
use crate::sync::Ordering;
use crate::{Store, StoreFailed, View};

/// Mapped memory and whatever keeps it mapped.
#[derive(Clone)]
pub struct Region {
    base: *mut u8,
    len: usize,
    /// A word that begins before this lies in the region.
    words_end: usize,
    keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the region is shared memory reached through atomics and byte copies only; what keeps it
// mapped is Send + Sync by its type.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// # Safety
    /// `base` is aligned to 64 bytes and `len` bytes from it stay mapped (readable, and writable
    /// if the region is used as a store) while `keep` lives.
    #[must_use]
    pub unsafe fn new(base: *mut u8, len: usize, keep: Arc<dyn Any + Send + Sync>) -> Self {
        assert!(base.cast_const().cast::<u64>().is_aligned(), "a region begins at a multiple of 8");
        Self { base, len, words_end: len.saturating_sub(7), keep }
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `len` bytes of it from `at`, a multiple of 64.
    ///
    /// # Panics
    /// They do not lie in the region.
    #[must_use]
    pub fn part(&self, at: usize, len: usize) -> Self {
        let base = self.at(at, len);
        // SAFETY: within this region, which `keep` keeps mapped.
        unsafe { Self::new(base, len, Arc::clone(&self.keep)) }
    }

    /// What keeps the memory mapped.
    #[must_use]
    pub fn keeper(&self) -> &Arc<dyn Any + Send + Sync> {
        &self.keep
    }

    /// A pointer to `len` bytes at `at`.
    ///
    /// # Panics
    /// They do not lie in the region: a bug in this crate, not in a stranger's bytes.
    #[inline]
    fn at(&self, at: usize, len: usize) -> *mut u8 {
        assert!(at <= self.len && len <= self.len - at, "{len} bytes at {at} of {}", self.len);
        // SAFETY: within the mapping, by the line above.
        unsafe { self.base.add(at) }
    }

    #[inline]
    fn word_at(&self, at: usize) -> &std::sync::atomic::AtomicU64 {
        debug_assert_eq!(at % 8, 0);
        assert!(at < self.words_end, "a word at {at} of {}", self.len);
        // SAFETY: `at + 8` is within the mapping by the line above, aligned (all offsets are
        // multiples of 8), and only accessed atomically.
        unsafe { std::sync::atomic::AtomicU64::from_ptr(self.base.add(at).cast()) }
    }

    #[inline]
    fn half_at(&self, at: usize) -> &std::sync::atomic::AtomicU32 {
        debug_assert_eq!(at % 4, 0);
        assert!(at < self.words_end, "a half at {at} of {}", self.len);
        // SAFETY: as for words, with multiples of 4.
        unsafe { std::sync::atomic::AtomicU32::from_ptr(self.base.add(at).cast()) }
    }

    /// A total kept by [`Store::counter`].
    #[must_use]
    pub fn read_counter(&self, index: usize) -> u64 {
        self.word_at(COUNTERS + 8 * index).load(Ordering::Relaxed)
    }

    /// Bytes at `at`, for a reader that looks at them in place. They may change at any time.
    ///
    /// # Panics
    /// They do not lie in the region.
    #[must_use]
    pub fn bytes(&self, at: usize, len: usize) -> *const u8 {
        self.at(at, len).cast_const()
    }
}

/// Called once before the large ring is used.
type Prepare = Box<dyn Fn() + Send + Sync>;

/// Memory of this process that the peer maps read-only (a store), or the peer's memory that this
/// process maps read-only (a view).
pub struct Mapped {
    region: Region,
    prepare: Option<Prepare>,
    heat: RefCell<Heat>,
}

impl Mapped {
    #[must_use]
    pub fn new(region: Region) -> Self {
        Self { region, prepare: None, heat: RefCell::new(Heat::new()) }
    }

    /// A store whose large ring is made ready by `prepare`, called once.
    #[must_use]
    pub fn with_prepare(region: Region, prepare: impl Fn() + Send + Sync + 'static) -> Self {
        Self { prepare: Some(Box::new(prepare)), ..Self::new(region) }
    }

    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }
}

impl Store for Mapped {
    #[inline]
    fn trailer(&self) -> bool {
        false
    }

    #[inline]
    fn word(&self, at: usize, value: u64) -> Result<(), StoreFailed> {
        self.region.word_at(at).store(value, Ordering::Release);
        Ok(())
    }

    #[inline]
    fn half(&self, at: usize, value: u32) -> Result<(), StoreFailed> {
        self.region.half_at(at).store(value, Ordering::Release);
        Ok(())
    }

    #[inline]
    fn record(
        &self,
        at: usize,
        commit: u64,
        header: Header,
        source: &mut Source<'_>,
    ) -> Result<(), StoreFailed> {
        let mut to = self.region.at(at + header.payload_at(), header.len as usize);
        // Less than the header says where the payload is there already.
        source.take(source.left().min(header.len as usize), |from, piece| {
            // SAFETY: the pieces add up to `len`, which was checked to lie in the region; the
            // caller's buffer is not part of a lane.
            unsafe {
                copy(from, to, piece, false);
                to = to.add(piece);
            }
        });
        self.region.word_at(at + 8).store(header.encode(), Ordering::Relaxed);
        self.region.word_at(at).store(commit, Ordering::Release);
        Ok(())
    }

    fn in_place(&self, at: usize, len: usize) -> Option<*mut u8> {
        Some(self.region.at(at, len))
    }

    fn prepare_large(&self) {
        if let Some(prepare) = &self.prepare {
            prepare();
        }
    }

    #[inline]
    fn counter(&self, index: usize, value: u64) {
        self.region.word_at(COUNTERS + 8 * index).store(value, Ordering::Relaxed);
    }
}

impl View for Mapped {
    #[inline]
    fn word(&self, at: usize) -> u64 {
        self.region.word_at(at).load(Ordering::Acquire)
    }

    #[inline]
    fn half(&self, at: usize) -> u32 {
        self.region.half_at(at).load(Ordering::Acquire)
    }

    #[inline]
    fn copy_out(&self, at: usize, len: usize, dest: &mut Dest<'_>) {
        let mut from = self.region.at(at, len).cast_const();
        let mut heat = (len >= STREAM_MIN).then(|| self.heat.borrow_mut());
        dest.take(len, |to, piece| {
            let cold = heat.as_mut().is_some_and(|heat| heat.cold(to, piece));
            // SAFETY: the pieces add up to `len`, which was checked to lie in the region; the
            // destination is the caller's and not part of a lane.
            unsafe {
                copy(from, to, piece, cold);
                from = from.add(piece);
            }
        });
    }
}
