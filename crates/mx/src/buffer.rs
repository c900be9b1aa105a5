//! The caller's memory: a list of pieces that is one message.
//!
//! As in `isthmus_ring::Source` these are raw pointers, because programs may touch their buffers meanwhile. Whoever posts a
//! request promises that the pieces stay where they are until it has ended or its endpoint is closed.

use isthmus_engine::{Dest, Source};

type Piece = (*mut u8, usize);

/// Pieces of memory, in order.
pub enum Parts {
    One([Piece; 1]),
    Many(Box<[Piece]>),
}

// SAFETY: addresses; who reads or writes there has the caller's promise, on whatever thread.
unsafe impl Send for Parts {}

impl Parts {
    #[must_use]
    pub fn new(pieces: &[(*mut u8, usize)]) -> Self {
        match pieces {
            [one] => Self::One([*one]),
            more => Self::Many(more.iter().copied().filter(|(_, len)| *len > 0).collect()),
        }
    }

    #[must_use]
    pub fn empty() -> Self {
        Self::Many(Box::default())
    }

    /// Of one piece that is read.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self::One([(bytes.as_ptr().cast_mut(), bytes.len())])
    }

    fn pieces(&self) -> &[Piece] {
        match self {
            Self::One(one) => one,
            Self::Many(many) => many,
        }
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.pieces().iter().fold(0, |sum, (_, len)| sum.saturating_add(*len))
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of it, if it is in one piece.
    pub(crate) fn whole(&self) -> Option<(*const u8, usize)> {
        match self.pieces() {
            [(start, len)] => Some((start.cast_const(), *len)),
            _ => None,
        }
    }

    /// `len` bytes from `at` on, as far as they are there: piece by piece.
    fn each(&self, at: usize, len: usize, mut show: impl FnMut(*mut u8, usize)) {
        let (mut skip, mut left) = (at, len);
        for (start, size) in self.pieces() {
            if skip >= *size {
                skip -= size;
                continue;
            }
            let take = (size - skip).min(left);
            if take == 0 {
                return;
            }
            // SAFETY: `skip` lies in this piece, which the caller of `isend` or `irecv` vouched for.
            show(unsafe { start.add(skip) }, take);
            (left, skip) = (left - take, 0);
        }
    }

    /// Send `front` and then `len` bytes from `at` on: `send` gets both as one source.
    pub(crate) fn with_source<T>(
        &self,
        front: &[u8],
        at: usize,
        len: usize,
        send: impl FnOnce(&mut Source<'_>) -> T,
    ) -> T {
        let front = (front.as_ptr(), front.len());
        let (mut one, mut many) = ([front, (front.0, 0)], Vec::new());
        let list = if let Self::One(_) = self {
            self.each(at, len, |start, len| one[1] = (start.cast_const(), len));
            &one[..]
        } else {
            many.push(front);
            self.each(at, len, |start, len| many.push((start.cast_const(), len)));
            &many[..]
        };
        // SAFETY: the pieces are readable: the promise of whoever posted the request, which has not ended.
        send(&mut unsafe { Source::new(list) })
    }

    /// Receive a header's length into `front`, and then into `len` bytes from `at` on.
    pub(crate) fn with_dest<T>(
        &self,
        front: &mut [u8],
        at: usize,
        len: usize,
        receive: impl FnOnce(&mut Dest<'_>) -> T,
    ) -> T {
        let front = (front.as_mut_ptr(), front.len());
        let (mut one, mut many) = ([front, (front.0, 0)], Vec::new());
        let list = if let Self::One(_) = self {
            self.each(at, len, |start, len| one[1] = (start, len));
            &one[..]
        } else {
            many.push(front);
            self.each(at, len, |start, len| many.push((start, len)));
            &many[..]
        };
        // SAFETY: the pieces are writable and apart: the promise of whoever posted the request, which has not ended.
        receive(&mut unsafe { Dest::new(list) })
    }

    /// Bytes from `at` on, which must be there.
    pub(crate) fn copy_out(&self, at: usize, into: &mut [u8]) {
        let mut done = 0;
        self.each(at, into.len(), |start, len| {
            // SAFETY: readable, as above; `into` has room for what was asked for.
            unsafe { into[done..].as_mut_ptr().copy_from_nonoverlapping(start, len) };
            done += len;
        });
    }

    /// Store bytes from `at` on; what is beyond the end is lost.
    pub(crate) fn copy_in(&self, at: usize, data: &[u8]) {
        let mut done = 0;
        self.each(at, data.len(), |start, len| {
            // SAFETY: writable, as above.
            unsafe { start.copy_from(data[done..].as_ptr(), len) };
            done += len;
        });
    }

    /// Copy the beginning of one message to another.
    pub(crate) fn copy_from(&self, other: &Self, len: usize) {
        let mut data = [0; 4096];
        let mut at = 0;
        while at < len {
            let chunk = &mut data[..(len - at).min(4096)];
            other.copy_out(at, chunk);
            self.copy_in(at, chunk);
            at += chunk.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_one_message() {
        let (mut a, mut b, mut c) = (*b"abc", *b"", *b"defgh");
        let parts = Parts::new(&[(a.as_mut_ptr(), 3), (b.as_mut_ptr(), 0), (c.as_mut_ptr(), 5)]);
        let mut out = [0; 4];
        parts.copy_out(2, &mut out);
        assert_eq!((&out, parts.len()), (b"cdef", 8));
        parts.copy_in(1, b"12345678901234567890");
        assert_eq!((&a, &c), (b"a12", b"34567"));
        assert_eq!(parts.with_source(b"h", 2, 100, |source| source.left()), 7);
    }
}
