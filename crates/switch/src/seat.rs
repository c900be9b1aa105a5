//! Seats: memory of a guest in which the lanes of one connection of a program of it lie.
//!
//! A program that polls its lanes makes no system call; the switch reads and writes them from the other side. The
//! agent of the guest, which is root there, names the pages by their guest-physical addresses, keeps them where they
//! are, and frees them only when the switch has said that it lets go. Each run of pages is checked against the memory
//! that the monitor handed in, and mapped once more, one behind the other, so that a ring needs no translation. Pages
//! that the guest does not have are refused; pages that it should not have named are its own.
//!
//! ```text
//! 0        layout that the program writes and the switch reads
//! stride   layout that the switch writes and the program reads
//! ```

use std::sync::Arc;

use isthmus_engine::lane::{AnyStore, Ends, seat_stride};
use isthmus_engine::seat::parts;
use isthmus_ring::layout::PAGE;
use isthmus_ring::{Geometry, Mapped, Region, Rx, Tx};
use isthmus_sys::guard::Guard;
use isthmus_sys::mapping::Patchwork;
use isthmus_wire::record::Kind;

use crate::memory::Memory;

/// Runs of pages that one guest may have mapped: the kernel bounds what one process may map (65,530).
pub const RUNS_MAX: usize = 16_384;
/// Seats of one guest.
pub const SEATS_MAX: usize = 1024;
/// Bytes that name one run: an address and a length.
const RUN: usize = 12;

/// A seat whose pages are being named.
pub struct Begun {
    pub seat: u32,
    pub request: u32,
    small: u32,
    large: u32,
    geometry: Geometry,
    left: usize,
    runs: Vec<(u64, u32)>,
}

/// A seat, mapped. Given up when dropped.
pub struct Seat {
    pub small: u32,
    pub large: u32,
    geometry: Geometry,
    /// As the agent named them.
    runs: Vec<(u64, u32)>,
    // Before the mapping it guards.
    guard: Guard,
    place: Arc<Patchwork>,
}

impl Begun {
    /// `None`: the sizes cannot be.
    #[must_use]
    pub fn new(seat: u32, request: u32, small: u32, large: u32, runs: u32) -> Option<Self> {
        let geometry = Geometry::new(small, large).ok()?;
        let left = usize::try_from(runs).ok().filter(|runs| *runs <= RUNS_MAX)?;
        Some(Self { seat, request, small, large, geometry, left, runs: Vec::new() })
    }

    /// Some pages. `None`: they are not named as they must be; `Some(true)`: these were the last.
    #[must_use]
    pub fn name(&mut self, bytes: &[u8]) -> Option<bool> {
        let runs = bytes.chunks_exact(RUN);
        if !runs.remainder().is_empty() || runs.len() > self.left || bytes.is_empty() {
            return None;
        }
        self.left -= runs.len();
        for run in runs {
            let (at, len) = run.split_at(8);
            let (at, len) =
                (u64::from_le_bytes(at.try_into().ok()?), u32::from_le_bytes(len.try_into().ok()?));
            self.runs.push((at, len));
        }
        Some(self.left == 0)
    }

    /// Map the pages.
    ///
    /// # Errors
    /// Says what is wrong with them, or that there is no room.
    pub fn finish(self, memory: &Arc<Memory>) -> Result<Seat, &'static str> {
        let Self { small, large, geometry, runs, .. } = self;
        let stride = seat_stride(geometry);
        let mut wanted = parts(geometry);
        wanted.extend(parts(geometry).iter().map(|(at, len)| (at + stride, *len)));
        let mut place = Patchwork::new(2 * stride).map_err(|_| "no room to map it")?;
        let mut left = wanted.into_iter();
        let (mut at, mut room) = left.next().unwrap_or_default();
        for (guest, len) in &runs {
            let len = *len as usize;
            if guest % PAGE as u64 != 0 || len % PAGE != 0 || len == 0 || len > room {
                return Err("runs of whole pages, within the parts of the layout");
            }
            let (file, offset) =
                memory.file(*guest, len as u64).ok_or("pages that the guest does not have")?;
            place.patch(at, len, file, offset).map_err(|_| "no room to map it")?;
            (at, room) = (at + len, room - len);
            if room == 0 {
                (at, room) = left.next().unwrap_or_default();
            }
        }
        if room != 0 || left.next().is_some() {
            return Err("fewer pages than the layout has");
        }
        let guard = Guard::new(place.base(), 2 * stride).map_err(|_| "no room to map it")?;
        Ok(Seat { small, large, geometry, runs, guard, place: Arc::new(place) })
    }
}

impl Seat {
    /// How many runs of pages it has mapped.
    #[must_use]
    pub fn runs(&self) -> usize {
        self.runs.len()
    }

    /// Are its pages still the guest's, and there? A guest may lose memory while it runs.
    #[must_use]
    pub fn whole(&self, memory: &Memory) -> bool {
        !self.guard.failed() && self.runs.iter().all(|(at, len)| memory.file(*at, u64::from(*len)).is_some())
    }

    /// The switch's ends of the lanes in this seat.
    #[must_use]
    pub fn ends(&self, secret: u64, kind: Kind) -> Ends {
        let stride = seat_stride(self.geometry);
        let keep: Arc<Patchwork> = Arc::clone(&self.place);
        // SAFETY: the mapping lives as long as the region. What of it is not mapped lies in no part of a layout.
        let whole = unsafe { Region::new(self.place.base(), 2 * stride, keep) };
        let (theirs, ours) = (whole.part(0, stride), whole.part(stride, stride));
        let store = || AnyStore::Sealed(Mapped::new(ours.clone()));
        Ends {
            tx: Tx::new(store(), Mapped::new(theirs.clone()), self.geometry, secret),
            rx: Rx::new(store(), Mapped::new(theirs.clone()), self.geometry, secret, kind),
            counters: ours.clone(),
            view: theirs,
        }
    }
}
