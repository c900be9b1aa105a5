//! The caller's buffers: a list to send from, a list to receive into.
//!
//! Raw pointers, because a Python buffer may be written by another thread while we copy it; a
//! Rust slice would promise that it is not. We bend Rust's rule there knowingly: the copy may then
//! hold any mixture of old and new bytes, which is what the writer asked for, and nothing else is
//! affected.

/// A pointer to bytes.
pub trait Pointer: Copy {
    /// # Safety
    /// As for `<*const u8>::add`.
    #[must_use]
    unsafe fn add(self, bytes: usize) -> Self;
}

impl Pointer for *const u8 {
    unsafe fn add(self, bytes: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe { self.add(bytes) }
    }
}

impl Pointer for *mut u8 {
    unsafe fn add(self, bytes: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe { self.add(bytes) }
    }
}

/// Buffers that are used up from the front.
pub struct Parts<'a, P> {
    parts: &'a [(P, usize)],
    /// Bytes of `parts[0]` that were taken.
    skip: usize,
    left: usize,
}

/// Bytes to be sent.
pub type Source<'a> = Parts<'a, *const u8>;
/// Room for received bytes.
pub type Dest<'a> = Parts<'a, *mut u8>;

impl<'a, P: Pointer> Parts<'a, P> {
    /// # Safety
    /// For `'a` every part of a [`Source`] must be readable; every part of a [`Dest`] must be
    /// writable and overlap no other. Other threads may touch them meanwhile.
    #[must_use]
    pub unsafe fn new(parts: &'a [(P, usize)]) -> Self {
        let left = parts.iter().fold(0usize, |sum, part| sum.saturating_add(part.1));
        Self { parts, skip: 0, left }
    }

    /// Nothing to send, no room.
    #[must_use]
    pub fn empty() -> Self {
        Self { parts: &[], skip: 0, left: 0 }
    }

    /// Bytes not taken yet.
    #[must_use]
    pub fn left(&self) -> usize {
        self.left
    }

    /// Show the next `len` bytes piece by piece and take them.
    ///
    /// # Panics
    /// Fewer than `len` bytes are left.
    #[inline]
    pub fn take(&mut self, len: usize, mut each: impl FnMut(P, usize)) {
        assert!(len <= self.left, "taking {len} of {} bytes", self.left);
        self.left -= len;
        let mut len = len;
        while len > 0 {
            let [(start, size), rest @ ..] = self.parts else { return };
            let piece = (size - self.skip).min(len);
            if piece > 0 {
                // SAFETY: `skip + piece <= size`, so the piece lies in the part.
                each(unsafe { start.add(self.skip) }, piece);
            }
            len -= piece;
            self.skip += piece;
            if self.skip == *size {
                self.parts = rest;
                self.skip = 0;
            }
        }
    }
}
