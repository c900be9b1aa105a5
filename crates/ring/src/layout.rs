//! Where things lie in a lane's memory.
//!
//! ```text
//! 0          page: words of the writer, a cache line for each rhythm of change
//! 64 KiB     small ring, `small` bytes
//! 2 MiB      large ring, `large` bytes (absent when `large` is 0)
//! ```
//!
//! The hole in front of the large ring costs no memory; it lets the large ring be a huge page.
//! A lane begins in its small ring and moves to the large one, for good, when traffic asks for it.
//! Format: docs/formats/lane.md.

use core::fmt;

/// How far the writer has consumed the ring of the other direction (position, bytes).
pub const CREDIT: usize = 64;
/// [`CREDIT`] xor the lane's secret, beside it: both words together cannot be read half-written.
pub const CREDIT_CHECK: usize = 72;
/// Not 0: the writer sleeps until there is data in the other direction. A new number each time.
pub const ARM_DATA: usize = 128;
/// Not 0: the writer sleeps until there is space in this direction. A new number each time.
pub const ARM_SPACE: usize = 132;
/// The processor the writer last waited on, plus 1; 0 when unknown. A hint.
pub const CPU: usize = 136;
/// [`fin_word`] of the position at which this direction ends; anything else while it goes on.
pub const FIN: usize = 192;
/// What the writer still takes from the other direction: [`TAKES_ALL`], [`TAKES_NOTHING`], [`RESET`].
pub const RECEIVE_STATE: usize = 200;
/// Four totals for the broker: bytes and messages sent, bytes and messages received.
pub const COUNTERS: usize = 256;
pub const COUNTER_TX_BYTES: usize = 0;
pub const COUNTER_TX_MESSAGES: usize = 1;
pub const COUNTER_RX_BYTES: usize = 2;
pub const COUNTER_RX_MESSAGES: usize = 3;
/// Totals in the page.
pub const COUNTERS_LEN: usize = 4;

pub const TAKES_ALL: u32 = 0;
/// Its receiving side was shut down.
pub const TAKES_NOTHING: u32 = 1;
/// It was closed while data lay unread.
pub const RESET: u32 = 2;

/// Bytes of the page.
pub const PAGE: usize = 4096;
pub const SMALL_AT: usize = 64 * 1024;
pub const LARGE_AT: usize = 2 * 1024 * 1024;
/// Rings are multiples of this, bytes: one page.
pub const RING_MULTIPLE: usize = 4096;
/// Smallest ring, bytes.
pub const RING_MIN: usize = 4096;
/// Largest small ring, bytes; it ends well before the large one begins.
pub const SMALL_MAX: usize = 1024 * 1024;
/// Largest large ring, bytes.
pub const LARGE_MAX: usize = 64 * 1024 * 1024;
/// A ring's share that may be consumed before credit is given back: 1/8.
pub const CREDIT_SHARE: usize = 8;

/// What [`FIN`] holds when a direction ends at `position`.
#[must_use]
pub fn fin_word(secret: u64, position: u64) -> u64 {
    // The commit of the record that would follow is `secret + position`; this is never equal to
    // it, and 0 (a fresh page) only by a chance of 2^-64.
    !secret.wrapping_add(position)
}

/// Sizes of the two rings of one direction, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    small: usize,
    large: usize,
}

/// Ring sizes that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadGeometry {
    pub small: u32,
    pub large: u32,
}

impl fmt::Display for BadGeometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { small, large } = self;
        write!(
            f,
            "rings of {small} and {large} bytes: both are multiples of {RING_MULTIPLE}, the small one from \
             {RING_MIN} to {SMALL_MAX}, the large one 0 or at most {LARGE_MAX}"
        )
    }
}

impl std::error::Error for BadGeometry {}

impl Geometry {
    /// # Errors
    /// The sizes break a rule of [`BadGeometry`].
    pub fn new(small: u32, large: u32) -> Result<Self, BadGeometry> {
        let (s, l) = (small as usize, large as usize);
        let multiples = s % RING_MULTIPLE == 0 && l % RING_MULTIPLE == 0;
        if !multiples || !(RING_MIN..=SMALL_MAX).contains(&s) || l > LARGE_MAX {
            return Err(BadGeometry { small, large });
        }
        Ok(Self { small: s, large: l })
    }

    #[must_use]
    pub fn small(self) -> usize {
        self.small
    }

    /// 0 when the lane never grows.
    #[must_use]
    pub fn large(self) -> usize {
        self.large
    }

    /// Bytes of the whole layout.
    #[must_use]
    pub fn file_len(self) -> usize {
        if self.large == 0 { SMALL_AT + self.small } else { LARGE_AT + self.large }
    }

    /// Longest message, bytes: 7/16 of the larger ring.
    ///
    /// A message is not split at the end of the ring, so it may need nearly twice its length; and
    /// the receiver may hold back 1/8 of the ring as credit not yet given. Within 7/16 a message
    /// always fits a ring whose content was received, whatever the receiver does next.
    #[must_use]
    pub fn message_max(self) -> usize {
        self.small.max(self.large) / 16 * 7 - 2 * isthmus_wire::record::ALIGN
    }
}

/// Where the next record of a lane begins. Both ends keep one, in step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Bytes of ring used since the lane began.
    pub(crate) position: u64,
    /// Where the present ring begins in the layout, and its bytes.
    base: usize,
    capacity: usize,
    /// From the beginning of the present ring.
    offset: usize,
}

impl Place {
    /// The beginning of a lane.
    pub(crate) fn new(geometry: Geometry) -> Self {
        Self { position: 0, base: SMALL_AT, capacity: geometry.small, offset: 0 }
    }

    /// The same, as an offset in the layout.
    #[inline]
    pub(crate) fn at(&self) -> usize {
        self.base + self.offset
    }

    /// Bytes of the present ring.
    #[inline]
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Bytes up to the end of the present ring.
    #[inline]
    pub(crate) fn to_end(self) -> usize {
        self.capacity - self.offset
    }

    #[inline]
    pub(crate) fn in_large(&self) -> bool {
        self.base == LARGE_AT
    }

    /// Past a record of `by` bytes, which ends in the present ring.
    #[inline]
    pub(crate) fn advance(&mut self, by: usize) {
        self.position += by as u64;
        self.offset += by;
        if self.offset >= self.capacity {
            self.offset = 0;
        }
    }

    /// To the beginning of the large ring, past a record of `by` bytes.
    pub(crate) fn grow(&mut self, geometry: Geometry, by: usize) {
        *self =
            Self { position: self.position + by as u64, base: LARGE_AT, capacity: geometry.large, offset: 0 };
    }
}
