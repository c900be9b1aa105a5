//! How bytes leave a ring, chosen by size and by whether the destination is in the cache.
//!
//! Measured (docs/performance.md): the C library's `memcpy` is best into the ring and into
//! destinations that the receiver used a moment ago; when the receiver walks through more memory
//! than the caches hold, non-temporal stores are 1.6 to 2 times faster, because the destination is
//! not read first.

use crate::parts::Dest;

/// Shorter copies never use non-temporal stores, bytes.
pub(crate) const STREAM_MIN: usize = 16 * 1024;
/// Shorter copies never use string instructions, bytes.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const STRING_MIN: usize = 2048;
/// A destination written within the last so many received bytes is taken to be in the cache.
const WARM_BYTES: u64 = 4 * 1024 * 1024;
/// Destinations are remembered by blocks of this size (a power of two), bytes.
const BLOCK: usize = 32 * 1024;
/// Blocks remembered.
const BLOCKS: usize = 256;

/// Remembers where received bytes went, to tell a warm destination from a cold one.
pub(crate) struct Heat {
    /// (block number, bytes received in long records when it was last written).
    seen: Box<[(usize, u64); BLOCKS]>,
    received: u64,
}

impl Heat {
    pub(crate) fn new() -> Self {
        Self { seen: Box::new([(0, 0); BLOCKS]), received: 0 }
    }

    /// Is `dest` likely out of the cache? Also notes that `len` bytes go there now.
    pub(crate) fn cold(&mut self, dest: *const u8, len: usize) -> bool {
        if len < STREAM_MIN {
            return false;
        }
        let block = dest as usize / BLOCK;
        let slot = &mut self.seen[block % BLOCKS];
        let warm = slot.0 == block && self.received - slot.1 < WARM_BYTES;
        self.received += len as u64;
        *slot = (block, self.received);
        !warm
    }
}

/// Copies what lies in no ring, as received records are copied.
pub struct Mover(Heat);

impl Default for Mover {
    fn default() -> Self {
        Self(Heat::new())
    }
}

impl Mover {
    /// Fill all of `dest`.
    ///
    /// # Safety
    /// As many bytes are readable at `from`, and are not those of `dest`. Another process may write them meanwhile.
    pub unsafe fn fill(&mut self, dest: &mut Dest<'_>, from: *const u8) {
        let mut from = from;
        dest.take(dest.left(), |to, len| {
            let cold = self.0.cold(to, len);
            // SAFETY: the pieces add up to what is readable at `from`, by the caller's promise.
            unsafe {
                copy(from, to, len, cold);
                from = from.add(len);
            }
        });
    }
}

/// Copy `len` bytes.
///
/// # Safety
/// `from` readable and `to` writable for `len` bytes, not overlapping. Another process may write
/// `from` meanwhile: `to` then holds any mixture, and nobody has interpreted it yet.
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, len: usize, cold: bool) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if (cold && len >= STREAM_MIN || len >= STRING_MIN && slow_strings())
        && std::is_x86_feature_detected!("avx")
    {
        // SAFETY: the caller's promise, and AVX is there.
        unsafe { stream_avx(from, to, len) };
        return;
    }
    let _ = cold;
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len) };
}

/// Is the processor QEMU's emulation, whose string instructions move 0.4 GB/s? The C library uses them for middling
/// sizes because the processor says that they are fast; a loop of loads and stores is six times faster there.
#[cfg(all(target_arch = "x86_64", not(miri)))]
fn slow_strings() -> bool {
    static SLOW: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *SLOW.get_or_init(|| {
        // The first leaf for hypervisors holds who it is.
        const HYPERVISOR: u32 = 0x4000_0000;
        // `__cpuid` is safe to call since Rust 1.93 and unsafe before.
        #[allow(unused_unsafe)]
        // SAFETY: every x86-64 processor has CPUID; a leaf that is not there gives other numbers.
        let found = unsafe { std::arch::x86_64::__cpuid(HYPERVISOR) };
        let who = [found.ebx, found.ecx, found.edx].map(u32::to_le_bytes);
        who.concat() == b"TCGTCGTCGTCG"
    })
}

/// Copy with non-temporal stores.
///
/// # Safety
/// As [`copy`], and the processor has AVX.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx")]
unsafe fn stream_avx(from: *const u8, to: *mut u8, len: usize) {
    use std::arch::x86_64::{_mm_sfence, _mm256_loadu_si256, _mm256_stream_si256};
    let lead = to.align_offset(32).min(len);
    // SAFETY: `lead + 128 * blocks + tail == len`, all within both buffers; the streamed part of
    // `to` is aligned to 32 bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(from, to, lead);
        let (mut from, mut to) = (from.add(lead), to.add(lead));
        let blocks = (len - lead) / 128;
        for _ in 0..blocks {
            let a = _mm256_loadu_si256(from.cast());
            let b = _mm256_loadu_si256(from.add(32).cast());
            let c = _mm256_loadu_si256(from.add(64).cast());
            let d = _mm256_loadu_si256(from.add(96).cast());
            _mm256_stream_si256(to.cast(), a);
            _mm256_stream_si256(to.add(32).cast(), b);
            _mm256_stream_si256(to.add(64).cast(), c);
            _mm256_stream_si256(to.add(96).cast(), d);
            from = from.add(128);
            to = to.add(128);
        }
        _mm_sfence();
        std::ptr::copy_nonoverlapping(from, to, (len - lead) % 128);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_copies_copy() {
        for len in [0, 1, 31, 127, 128, 129, STREAM_MIN, STREAM_MIN + 77, 100_000] {
            for shift in [0, 1, 17] {
                let from: Vec<u8> = (0..len + shift).map(|i| (i * 7 % 251) as u8).collect();
                for cold in [false, true] {
                    let mut to = vec![0u8; len + shift];
                    // SAFETY: two vectors of the same length.
                    unsafe { copy(from.as_ptr().add(shift), to.as_mut_ptr().add(shift), len, cold) };
                    assert_eq!(to[shift..], from[shift..]);
                }
            }
        }
    }

    #[test]
    fn a_buffer_used_again_is_warm_and_a_long_walk_is_cold() {
        let mut heat = Heat::new();
        let at = |i: usize| (i * 65_536) as *const u8;
        assert!(heat.cold(at(1), 65_536));
        assert!(!heat.cold(at(1), 65_536));
        let walk = |heat: &mut Heat| (0..2048).filter(|i| heat.cold(at(*i), 65_536)).count();
        walk(&mut heat);
        assert_eq!(walk(&mut heat), 2048);
        assert!(!heat.cold(at(2047), 1024), "small copies are never streamed");
    }
}
