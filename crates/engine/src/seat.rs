//! Seats: memory of a guest for the lanes of one connection, made by the guest's agent.
//!
//! The agent owns the memory, so that it outlives the program that uses it: the kernel frees what a dying program had
//! mapped before it closes the program's sockets, and meanwhile the switch could write into pages that are somebody
//! else's. The pages stay where they are because they are huge pages of a shared file, or are pinned.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use isthmus_ring::Geometry;
use isthmus_ring::layout::{LARGE_AT, PAGE, SMALL_AT};
use isthmus_sys::mapping::Mapping;
use isthmus_sys::{memory, pin};

use crate::error::{Error, Result};
use crate::lane::seat_stride;

/// A seat, touched, pinned and ready to be named to the switch. Drop it only when the switch has let go.
pub struct Seat {
    file: OwnedFd,
    mapping: Mapping,
    stride: usize,
    _pin: Option<OwnedFd>,
    runs: Vec<(u64, u32)>,
}

impl Seat {
    /// `huge`: of huge pages that the guest has reserved. Needs root.
    ///
    /// # Errors
    /// There is no such memory, it cannot be pinned, or its addresses may not be known.
    pub fn new(small: u32, large: u32, huge: bool) -> Result<Self> {
        let geometry = Geometry::new(small, large).map_err(|e| Error::Os {
            what: "ring sizes",
            source: io::Error::new(io::ErrorKind::InvalidInput, e),
        })?;
        Self::make(geometry, huge).map_err(Error::os("making a seat"))
    }

    fn make(geometry: Geometry, huge: bool) -> io::Result<Self> {
        let stride = seat_stride(geometry);
        let file = if huge {
            memory::create_huge(c"isthmus-seat", 2 * stride)?
        } else {
            memory::create(c"isthmus-seat", 2 * stride)?
        };
        let mapping = Mapping::writable(file.as_fd(), 2 * stride)?;
        let mut pieces = Vec::new();
        for lane in [0, stride] {
            for (at, len) in parts(geometry) {
                // SAFETY: within the mapping.
                pieces.push((unsafe { mapping.base().add(lane + at) }, len));
            }
        }
        for (start, len) in &pieces {
            for at in (0..*len).step_by(PAGE) {
                // SAFETY: within the mapping, which is ours alone until now.
                unsafe { start.add(at).write_volatile(0) };
            }
        }
        // SAFETY: mapped above, readable and writable.
        let pinned = if huge { None } else { Some(unsafe { pin::pin(&pieces) }?) };
        let mut runs = Vec::new();
        for (start, len) in pieces {
            runs.extend(pin::frames(start, len)?);
        }
        Ok(Self { file, mapping, stride, _pin: pinned, runs })
    }

    /// Make it as new for the next connection: the words of both sides are zero. Nobody may be using it.
    pub fn clear(&self) {
        for lane in [0, self.stride] {
            for word in (0..PAGE).step_by(8) {
                // SAFETY: within the mapping; a program that had this seat may still write there, as it may at any time.
                unsafe { self.mapping.base().add(lane + word).cast::<u64>().write_volatile(0) };
            }
        }
    }

    /// For the program that is to use it.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where its pages are, in the order of its layout: guest-physical address and bytes.
    #[must_use]
    pub fn runs(&self) -> &[(u64, u32)] {
        &self.runs
    }
}

/// What of a layout is used: offset and bytes of each part.
#[must_use]
pub fn parts(geometry: Geometry) -> Vec<(usize, usize)> {
    let mut parts = vec![(0, PAGE), (SMALL_AT, geometry.small())];
    if geometry.large() > 0 {
        parts.push((LARGE_AT, geometry.large()));
    }
    parts
}
