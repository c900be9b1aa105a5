//! Ways to copy memory. Which one is best depends on the size, and on whether the data is in a cache.

use std::str::FromStr;

use crate::error::BenchError;

/// A way to copy memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copy {
    /// The C library's `memcpy`.
    Libc,
    /// The processor's own `rep movsb`.
    String,
    /// Stores that go past the caches: best for a destination that will not be read soon.
    Streaming,
}

impl Copy {
    pub const ALL: [Self; 3] = [Self::Libc, Self::String, Self::Streaming];

    /// Copy `len` bytes.
    ///
    /// # Safety
    ///
    /// As [`std::ptr::copy_nonoverlapping`]: both ranges valid for `len` bytes, and apart. Another process may write the
    /// source meanwhile; then the bytes copied are unspecified, and nothing else is.
    #[inline(always)]
    pub(crate) unsafe fn run(self, from: *const u8, to: *mut u8, len: usize) {
        match self {
            // SAFETY: the caller promises what `copy_nonoverlapping` asks for.
            Self::Libc => unsafe { std::ptr::copy_nonoverlapping(from, to, len) },
            // SAFETY: as above; the two kernels read and write exactly these ranges.
            Self::String => unsafe { string(from, to, len) },
            // SAFETY: as above.
            Self::Streaming => unsafe { streaming(from, to, len) },
        }
    }
}

impl FromStr for Copy {
    type Err = BenchError;

    fn from_str(word: &str) -> Result<Self, BenchError> {
        match word {
            "libc" => Ok(Self::Libc),
            "string" => Ok(Self::String),
            "streaming" => Ok(Self::Streaming),
            _ => Err(BenchError::UnknownWord {
                what: "copy",
                word: word.to_owned(),
                choices: "libc, string, streaming",
            }),
        }
    }
}

#[cfg(target_arch = "x86_64")]
unsafe fn string(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: `rep movsb` copies `len` bytes upwards (the direction flag is clear by the ABI) and changes only the
    // registers named here.
    unsafe {
        core::arch::asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags));
    }
}

#[cfg(target_arch = "x86_64")]
unsafe fn streaming(from: *const u8, to: *mut u8, len: usize) {
    use core::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};

    const LINE: usize = 64;
    let head = (to.addr().wrapping_neg() % LINE).min(len);
    let lines = (len - head) / LINE;
    // SAFETY: `head + lines * LINE <= len`, so every access is inside the two ranges; `to + head` is a multiple of 64,
    // which the streaming stores need. SSE2 is part of x86-64.
    unsafe {
        std::ptr::copy_nonoverlapping(from, to, head);
        let (source, target) = (from.add(head).cast::<__m128i>(), to.add(head).cast::<__m128i>());
        for line in 0..lines {
            let (source, target) = (source.add(line * 4), target.add(line * 4));
            let (a, b) = (_mm_loadu_si128(source), _mm_loadu_si128(source.add(1)));
            let (c, d) = (_mm_loadu_si128(source.add(2)), _mm_loadu_si128(source.add(3)));
            _mm_stream_si128(target, a);
            _mm_stream_si128(target.add(1), b);
            _mm_stream_si128(target.add(2), c);
            _mm_stream_si128(target.add(3), d);
        }
        _mm_sfence();
        let done = head + lines * LINE;
        std::ptr::copy_nonoverlapping(from.add(done), to.add(done), len - done);
    }
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn string(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller promises what `copy_nonoverlapping` asks for.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len) }
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn streaming(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller promises what `copy_nonoverlapping` asks for.
    unsafe { std::ptr::copy_nonoverlapping(from, to, len) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_copies_every_length_and_alignment() {
        let source: Vec<u8> = (0..1000_u32).map(|i| (i * 7) as u8).collect();
        for copy in Copy::ALL {
            for (skip, len) in [(0, 0), (0, 1), (1, 63), (3, 64), (5, 65), (0, 500), (7, 993)] {
                let mut target = vec![0; 1100];
                // SAFETY: `skip + len` is within both vectors, which are apart.
                unsafe { copy.run(source.as_ptr().add(skip), target.as_mut_ptr().add(skip * 3), len) };
                assert_eq!(&target[skip * 3..skip * 3 + len], &source[skip..skip + len], "{copy:?}");
                assert!(target[skip * 3 + len..].iter().all(|&byte| byte == 0), "{copy:?} wrote too far");
            }
        }
    }
}
