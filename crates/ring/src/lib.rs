//! Rings in memory that a stranger can write.
//!
//! A *lane* is one-way: a sender, a receiver, a ring of records, a word of credit back. Its memory
//! has one fixed layout ([`layout`]) that **one party writes and the other reads**. With the
//! `sealed` carrier the memory belongs to the writer and the reader maps it read-only; with `put`
//! it belongs to the reader and the writer reaches it through a write-only descriptor. Everything
//! else is the same, so this crate knows only a [`Store`] (where I write what my peer reads) and a
//! [`View`] (where I read what my peer writes). Each side of a connection has one of each: its
//! store carries its own records and its credit for the other's.
//!
//! What it refuses to do: wait, wake, map, copy descriptors. It says *when* a bell must be rung
//! ([`Ring`]) and leaves the ringing to the engine.
//!
//! # Rules
//! - Everything read from a view is hostile. A header is read once, bounded, and only then used;
//!   a lie spoils this lane and nothing else.
//! - A record is visible when its commit word is; the commit is written last. See
//!   [`isthmus_wire::record`].
//! - Nobody sleeps unseen: a sleeper *arms* (writes a generation number where the peer reads it),
//!   fences, looks once more and only then sleeps; the peer publishes, fences, and looks at the
//!   arm. One of the two always sees the other. Loom checks this in `tests/loom.rs`.

mod copy;
pub mod layout;
mod mapped;
mod parts;
mod rx;
pub mod sync;
mod tx;

pub use copy::Mover;
pub use layout::Geometry;
pub use mapped::{Mapped, Region};
pub use parts::{Dest, Source};
pub use rx::{Fault, Rx, Seen};
pub use tx::{Room, TooLarge, Tx, Written};

use isthmus_wire::record::Header;

/// Must the peer's bell be rung now? Yes, once, when this says so.
#[must_use = "a sleeping peer is woken only if its bell is rung"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    Bell,
    Quiet,
}

/// A store that did not take the bytes: the memory or the descriptor behind it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreFailed {
    /// The `errno` of the failed call.
    pub errno: i32,
}

/// Where one party writes what the other reads.
///
/// Offsets are bytes in the layout, multiples of 8 (4 for halves), checked by the caller.
pub trait Store {
    /// Records need a trailer because this store cannot write a header after its payload.
    fn trailer(&self) -> bool;
    /// Release: what was written before is visible to whoever sees `value`.
    ///
    /// # Errors
    /// The word was not written.
    fn word(&self, at: usize, value: u64) -> Result<(), StoreFailed>;
    /// Two words that lie side by side.
    ///
    /// # Errors
    /// Neither word, or only the first, was written.
    fn pair(&self, at: usize, first: u64, second: u64) -> Result<(), StoreFailed> {
        self.word(at, first)?;
        self.word(at + 8, second)
    }
    /// As [`Store::word`], for 32 bits.
    ///
    /// # Errors
    /// The half was not written.
    fn half(&self, at: usize, value: u32) -> Result<(), StoreFailed>;
    /// Write the payload (taken from the front of `source`) and the header; the commit comes last.
    ///
    /// # Errors
    /// The record is not visible; part of the space it would have taken may be overwritten.
    fn record(
        &self,
        at: usize,
        commit: u64,
        header: Header,
        source: &mut Source<'_>,
    ) -> Result<(), StoreFailed>;
    /// Where a payload of `len` bytes at `at` can be written by others than this store; `None` where the peer's
    /// memory is out of reach.
    fn in_place(&self, at: usize, len: usize) -> Option<*mut u8>;
    /// Longest payload of one stream record, bytes: the receiver copies one while the sender fills
    /// the next. 64 KiB is where a mapped ring of 2 MiB was fastest.
    fn chunk(&self) -> usize {
        64 * 1024
    }
    /// Make the memory of the large ring ready, once, before its first use.
    fn prepare_large(&self);
    /// Note a total for the broker's accounting; see [`layout`] for the indices.
    fn counter(&self, index: usize, value: u64);
}

/// Where one party reads what the other writes.
pub trait View {
    /// Acquire.
    fn word(&self, at: usize) -> u64;
    /// Acquire.
    fn half(&self, at: usize) -> u32;
    /// Copy `len` bytes at `at` to the front of `dest`. The caller has checked that they lie in
    /// the layout; they may change while they are read.
    fn copy_out(&self, at: usize, len: usize, dest: &mut Dest<'_>);
}
