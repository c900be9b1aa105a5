//! The application's buffers: where messages come from and go to.
//!
//! Two things about them move figures more than the transport does: whether the data is in a cache (`hot`: one buffer
//! used again and again, `cold`: a walk through 128 MiB), and the size of the pages under them.

use std::{io, ptr::NonNull, slice, str::FromStr, sync::Arc};

use isthmus_engine::window::Window;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::error::BenchError;

/// What a `cold` walk covers before it comes back: four times the largest third-level cache of small servers.
pub const COLD_BYTES: usize = 128 << 20;

const HUGE_PAGE: usize = 2 << 20;
const CACHE_LINE: usize = 64;

/// Pages under the application's buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    Small,
    Huge,
    /// Not private: a window, huge where the kernel gives that.
    Window,
}

/// Whether messages come from, and go to, the same memory each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    Hot,
    Cold,
}

impl FromStr for Pages {
    type Err = BenchError;

    fn from_str(word: &str) -> Result<Self, BenchError> {
        match word {
            "4k" => Ok(Self::Small),
            "huge" => Ok(Self::Huge),
            _ => Err(BenchError::UnknownWord { what: "pages", word: word.to_owned(), choices: "4k, huge" }),
        }
    }
}

impl FromStr for Data {
    type Err = BenchError;

    fn from_str(word: &str) -> Result<Self, BenchError> {
        match word {
            "hot" => Ok(Self::Hot),
            "cold" => Ok(Self::Cold),
            _ => Err(BenchError::UnknownWord { what: "data", word: word.to_owned(), choices: "hot, cold" }),
        }
    }
}

/// Memory on pages of a chosen size, populated.
pub(crate) struct Memory {
    window: Option<Arc<Window>>,
    mapping: NonNull<u8>,
    mapped: usize,
    start: NonNull<u8>,
    len: usize,
}

impl Memory {
    pub(crate) fn new(len: usize, pages: Pages) -> Result<Self, BenchError> {
        if pages == Pages::Window {
            let refused = |error| BenchError::Memory { bytes: len, source: io::Error::other(error) };
            let window = Window::new(len.next_multiple_of(HUGE_PAGE)).map_err(refused)?;
            let (mapped, none) = (window.len(), io::ErrorKind::OutOfMemory);
            let start = NonNull::new(window.base())
                .ok_or_else(|| BenchError::Memory { bytes: len, source: none.into() })?;
            return Ok(Self { window: Some(window), mapping: start, mapped, start, len: mapped });
        }
        let len = len.next_multiple_of(HUGE_PAGE);
        let mapped = len + HUGE_PAGE;
        let refused = |source: rustix::io::Errno| BenchError::Memory { bytes: mapped, source: source.into() };
        // SAFETY: a fresh anonymous mapping, placed by the kernel, touches nothing that exists.
        let mapping = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                mapped,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }
        .map_err(refused)?;
        let mapping = NonNull::new(mapping.cast::<u8>()).ok_or_else(|| refused(rustix::io::Errno::NOMEM))?;
        let ahead = mapping.as_ptr().addr().next_multiple_of(HUGE_PAGE) - mapping.as_ptr().addr();
        // SAFETY: `ahead` is less than HUGE_PAGE, so the sum is inside the mapping of `len + HUGE_PAGE` bytes.
        let start = unsafe { mapping.add(ahead) };
        let mut memory = Self { window: None, mapping, mapped, start, len };
        let advice = match pages {
            Pages::Small => Advice::LinuxNoHugepage,
            Pages::Huge | Pages::Window => Advice::LinuxHugepage,
        };
        // SAFETY: the range is this mapping's own, and this advice changes page sizes, never contents.
        // A kernel without transparent huge pages refuses, and the pages are then small whatever was asked for.
        let _ = unsafe { madvise(memory.start.as_ptr().cast(), len, advice) };
        memory.bytes().fill(0);
        Ok(memory)
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `start..start + len` lies in the mapping, which lives as long as `self`, is zeroed by the kernel and
        // is reached through `self` alone.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.window.is_some() {
            return;
        }
        // SAFETY: this is the whole mapping made in `new`, and no slice of it outlives `self`.
        let _ = unsafe { munmap(self.mapping.as_ptr().cast(), self.mapped) };
    }
}

/// One buffer after the other: always the same one (`hot`), or the next of a walk (`cold`).
pub(crate) struct Walk {
    memory: Memory,
    size: usize,
    stride: usize,
    slots: usize,
    slot: usize,
}

impl Walk {
    pub(crate) fn new(size: usize, pages: Pages, data: Data) -> Result<Self, BenchError> {
        if size == 0 {
            return Err(BenchError::EmptyMessage);
        }
        let stride = size.next_multiple_of(CACHE_LINE);
        let slots = match data {
            Data::Hot => 1,
            Data::Cold => (COLD_BYTES / stride).max(2),
        };
        Ok(Self { memory: Memory::new(stride * slots, pages)?, size, stride, slots, slot: slots - 1 })
    }

    /// The same walk with every message holding the pattern that [`check`] knows.
    pub(crate) fn filled(size: usize, pages: Pages, data: Data) -> Result<Self, BenchError> {
        let mut walk = Self::new(size, pages, data)?;
        let message: Vec<u8> = (0..size).map(pattern_byte).collect();
        for _ in 0..walk.slots {
            walk.step().copy_from_slice(&message);
        }
        Ok(walk)
    }

    #[inline(always)]
    pub(crate) fn step(&mut self) -> &mut [u8] {
        self.slot = if self.slot + 1 == self.slots { 0 } else { self.slot + 1 };
        let (start, size) = (self.slot * self.stride, self.size);
        &mut self.memory.bytes()[start..start + size]
    }
}

/// What byte `offset` of every message is, byte 0 (the mark) aside.
fn pattern_byte(offset: usize) -> u8 {
    // The high bits take part, so that a message put together from the wrong chunks does not look right.
    (offset ^ (offset >> 8).wrapping_mul(31) ^ (offset >> 16).wrapping_mul(7)) as u8
}

/// Compare all of `message` but its mark with what [`Walk::filled`] wrote.
pub(crate) fn check(message: &[u8]) -> Result<(), BenchError> {
    for (offset, &found) in message.iter().enumerate().skip(1) {
        let expected = pattern_byte(offset);
        if found != expected {
            return Err(BenchError::WrongBytes { offset, expected, found });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hot_walk_stays_and_a_cold_walk_moves() {
        let mut hot = Walk::new(100, Pages::Small, Data::Hot).expect("memory");
        assert_eq!(hot.step().as_ptr(), hot.step().as_ptr());
        let mut cold = Walk::new(64 << 20, Pages::Small, Data::Cold).expect("memory");
        let (first, second) = (cold.step().as_ptr().addr(), cold.step().as_ptr().addr());
        assert_eq!(second - first, 64 << 20);
        assert_eq!(cold.step().as_ptr().addr(), first, "two slots of 64 MiB make 128 MiB");
    }

    #[test]
    fn a_wrong_byte_is_found_and_named() {
        let mut walk = Walk::filled(70_000, Pages::Huge, Data::Hot).expect("memory");
        let message = walk.step();
        assert!(check(message).is_ok());
        message[69_000] ^= 1;
        assert!(matches!(check(message), Err(BenchError::WrongBytes { offset: 69_000, .. })));
    }

    #[test]
    fn an_empty_message_is_refused() {
        assert!(matches!(Walk::new(0, Pages::Small, Data::Hot), Err(BenchError::EmptyMessage)));
    }
}
