//! The caller's buffers: a list to send from, a list to receive into.
//!
//! Raw pointers, because a Python buffer may be written by another thread while we copy it; a
//! Rust slice would promise that it is not. We bend Rust's rule there knowingly: the copy may then
//! hold any mixture of old and new bytes, which is what the writer asked for, and nothing else is
//! affected.

use std::marker::PhantomData;

/// Bytes to be sent, taken from the front.
pub struct Source<'a> {
    parts: &'a [(*const u8, usize)],
    /// Bytes of `parts[0]` that were taken.
    skip: usize,
    left: usize,
    borrowed: PhantomData<&'a [u8]>,
}

impl<'a> Source<'a> {
    /// # Safety
    /// Every part must be readable for `'a`. Other threads may write it meanwhile.
    #[must_use]
    pub unsafe fn new(parts: &'a [(*const u8, usize)]) -> Self {
        let left = parts.iter().fold(0usize, |sum, part| sum.saturating_add(part.1));
        Self { parts, skip: 0, left, borrowed: PhantomData }
    }

    /// Nothing to send.
    #[must_use]
    pub fn empty() -> Self {
        Self { parts: &[], skip: 0, left: 0, borrowed: PhantomData }
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
    pub fn take(&mut self, len: usize, mut each: impl FnMut(*const u8, usize)) {
        assert!(len <= self.left, "taking {len} of {} bytes", self.left);
        self.left -= len;
        let mut len = len;
        while len > 0 {
            let (start, size) = self.parts[0];
            let piece = (size - self.skip).min(len);
            if piece > 0 {
                // SAFETY: `skip + piece <= size`, so the piece lies in a part that is readable.
                each(unsafe { start.add(self.skip) }, piece);
            }
            len -= piece;
            self.skip += piece;
            if self.skip == size {
                self.parts = &self.parts[1..];
                self.skip = 0;
            }
        }
    }
}

/// Room for received bytes, filled from the front.
pub struct Dest<'a> {
    parts: &'a [(*mut u8, usize)],
    skip: usize,
    left: usize,
    borrowed: PhantomData<&'a mut [u8]>,
}

impl<'a> Dest<'a> {
    /// # Safety
    /// Every part must be writable for `'a` and overlap no other. Other threads may touch it
    /// meanwhile.
    #[must_use]
    pub unsafe fn new(parts: &'a [(*mut u8, usize)]) -> Self {
        let left = parts.iter().fold(0usize, |sum, part| sum.saturating_add(part.1));
        Self { parts, skip: 0, left, borrowed: PhantomData }
    }

    /// Bytes of room.
    #[must_use]
    pub fn left(&self) -> usize {
        self.left
    }

    /// Show room for the next `len` bytes piece by piece and take it.
    ///
    /// # Panics
    /// There is room for fewer than `len` bytes.
    pub fn fill(&mut self, len: usize, mut each: impl FnMut(*mut u8, usize)) {
        assert!(len <= self.left, "filling {len} of {} bytes", self.left);
        self.left -= len;
        let mut len = len;
        while len > 0 {
            let (start, size) = self.parts[0];
            let piece = (size - self.skip).min(len);
            if piece > 0 {
                // SAFETY: `skip + piece <= size`, so the piece lies in a part that is writable.
                each(unsafe { start.add(self.skip) }, piece);
            }
            len -= piece;
            self.skip += piece;
            if self.skip == size {
                self.parts = &self.parts[1..];
                self.skip = 0;
            }
        }
    }
}
