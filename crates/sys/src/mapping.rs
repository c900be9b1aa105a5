//! Mappings of files, placed so that huge pages are possible.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Mutex;

use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Size of a huge page on the machines we know; a mapping begins at a multiple of it.
pub const HUGE: usize = 2 * 1024 * 1024;

/// `MADV_COLLAPSE`, Linux 6.1: make huge pages now, without privilege or configuration.
const MADV_COLLAPSE: libc::c_int = 25;
/// `MADV_POPULATE_WRITE`, Linux 5.14: touch the pages for writing.
const MADV_POPULATE_WRITE: libc::c_int = 23;

/// Pieces of files, mapped one behind the other in reserved address space; unmapped when dropped.
///
/// What was not patched cannot be touched.
pub struct Patchwork {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: as for `Mapping`.
unsafe impl Send for Patchwork {}
// SAFETY: as above.
unsafe impl Sync for Patchwork {}

impl Patchwork {
    /// Reserve `len` bytes, beginning at a multiple of [`HUGE`].
    pub fn new(len: usize) -> io::Result<Self> {
        let whole = len.checked_add(HUGE).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new reservation, of which what lies before and behind the aligned part is given back.
        unsafe {
            let start = rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                whole,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
            .cast::<u8>();
            let before = start.align_offset(HUGE).min(HUGE);
            let base = start.add(before);
            if before > 0 {
                let _ = rustix::mm::munmap(start.cast(), before);
            }
            if before < HUGE {
                let _ = rustix::mm::munmap(base.add(len).cast(), HUGE - before);
            }
            let base = NonNull::new(base).ok_or(io::ErrorKind::OutOfMemory)?;
            Ok(Self { base, len })
        }
    }

    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Map `len` bytes of `file` at `offset` to `at`, for reading and writing. Returns where they are.
    pub fn patch(&mut self, at: usize, len: usize, file: BorrowedFd<'_>, offset: u64) -> io::Result<*mut u8> {
        if at > self.len || len > self.len - at || len == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: within our own reservation, checked above.
        let mapped = unsafe {
            let to = self.base.as_ptr().add(at).cast();
            let access = ProtFlags::READ | ProtFlags::WRITE;
            rustix::mm::mmap(to, len, access, MapFlags::SHARED | MapFlags::FIXED, file, offset)?
        };
        Ok(mapped.cast())
    }
}

impl Drop for Patchwork {
    fn drop(&mut self) {
        // SAFETY: our own reservation and what was mapped over it; nobody uses it any more.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// A shared mapping of a whole file; unmapped when dropped.
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory; whoever reads or writes it answers for that.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Map the first `len` bytes of `file` for reading.
    pub fn read_only(file: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        Self::new(file, len, ProtFlags::READ)
    }

    /// Map the first `len` bytes of `file` for reading and writing.
    pub fn writable(file: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        Self::new(file, len, ProtFlags::READ | ProtFlags::WRITE)
    }

    /// Map one page of a device's registers.
    pub fn registers(file: BorrowedFd<'_>, offset: u64) -> io::Result<Self> {
        const PAGE: usize = 4096;
        // SAFETY: a new mapping at a place that the kernel chooses.
        let base = unsafe {
            let access = ProtFlags::READ | ProtFlags::WRITE;
            rustix::mm::mmap(std::ptr::null_mut(), PAGE, access, MapFlags::SHARED, file, offset)?
        };
        NonNull::new(base.cast())
            .map(|base| Self { base, len: PAGE })
            .ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    fn new(file: BorrowedFd<'_>, len: usize, protection: ProtFlags) -> io::Result<Self> {
        if len == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let base = match place_again(file, len, protection) {
            Some(base) => base,
            None => place(file, len, protection)?,
        };
        NonNull::new(base).map(|base| Self { base, len }).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Turn `len` bytes at `at` into huge pages if the kernel can; touches them.
    ///
    /// # Errors
    /// The kernel cannot (before 6.1, or memory is fragmented): ordinary pages serve as well.
    pub fn collapse(&self, at: usize, len: usize) -> io::Result<()> {
        if at > self.len || len > self.len - at {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the range lies in the mapping; neither call changes what it holds. One touched
        // page is enough for the kernel to have something to collapse.
        let done = unsafe {
            let start = self.base.as_ptr().add(at).cast();
            libc::madvise(start, 4096.min(len), MADV_POPULATE_WRITE);
            libc::madvise(start, len, MADV_COLLAPSE)
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Ask for huge pages when the memory is first touched.
    pub fn prefer_huge(&self, at: usize, len: usize) -> io::Result<()> {
        if at > self.len || len > self.len - at {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the range lies in the mapping; advice changes no content.
        unsafe { rustix::mm::madvise(self.base.as_ptr().add(at).cast(), len, Advice::LinuxHugepage)? };
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nobody holds a pointer into it any more.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        if self.len >= HUGE {
            if let Ok(mut places) = PLACES.try_lock() {
                if places.len() < PLACES_MAX {
                    places.push(self.base.as_ptr() as usize);
                }
            }
        }
    }
}

/// Where mappings began that are gone, at multiples of [`HUGE`]. The next one is tried there,
/// which takes one call instead of four. Never waited for: a fork may copy it locked.
static PLACES: Mutex<Vec<usize>> = Mutex::new(Vec::new());
const PLACES_MAX: usize = 64;

fn place_again(file: BorrowedFd<'_>, len: usize, protection: ProtFlags) -> Option<*mut u8> {
    if len < HUGE {
        return None;
    }
    let start = PLACES.try_lock().ok()?.pop()?;
    let flags = MapFlags::SHARED | MapFlags::FIXED_NOREPLACE;
    // SAFETY: a new mapping, which the kernel refuses to put over anything that is there.
    let placed = unsafe { rustix::mm::mmap(start as *mut _, len, protection, flags, file, 0) };
    let base = placed.ok()?.cast::<u8>();
    if base as usize % HUGE != 0 {
        // Before Linux 4.17 the address is only a wish.
        // SAFETY: made above, and nobody knows it yet.
        let _ = unsafe { rustix::mm::munmap(base.cast(), len) };
        return None;
    }
    Some(base)
}

/// Map `file` where there is room, from a multiple of [`HUGE`] if it is as long.
fn place(file: BorrowedFd<'_>, len: usize, protection: ProtFlags) -> io::Result<*mut u8> {
    let whole = if len < HUGE { len } else { len + HUGE };
    // Reserve room for an aligned start, then place the file in it and give the rest back.
    // SAFETY: a fresh anonymous mapping at an address the kernel chooses.
    let room = unsafe {
        rustix::mm::mmap_anonymous(std::ptr::null_mut(), whole, ProtFlags::empty(), MapFlags::PRIVATE)?
    };
    let room_start = room as usize;
    let start = if len < HUGE { room_start } else { (room_start + HUGE - 1) & !(HUGE - 1) };
    let lead = start - room_start;
    let flags = MapFlags::SHARED | MapFlags::FIXED;
    // SAFETY: the range lies in the reservation made above and nothing else is there.
    let placed = unsafe { rustix::mm::mmap(room.byte_add(lead), len, protection, flags, file, 0) };
    let base = match placed {
        Ok(base) => base,
        Err(error) => {
            // SAFETY: the reservation is ours and unused.
            let _ = unsafe { rustix::mm::munmap(room, whole) };
            return Err(error.into());
        }
    };
    let end = lead + len.next_multiple_of(rustix::param::page_size());
    // SAFETY: the two ends of the reservation beside the file's mapping, unused.
    unsafe {
        if lead > 0 {
            let _ = rustix::mm::munmap(room, lead);
        }
        if end < whole {
            let _ = rustix::mm::munmap(room.byte_add(end), whole - end);
        }
    }
    Ok(base.cast())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use std::os::fd::AsFd;

    #[test]
    fn a_place_that_was_given_back_serves_again_only_if_it_is_free() {
        let len = 2 * HUGE;
        let file = memory::create(c"test", len).expect("memfd");
        for _ in 0..3 {
            drop(Mapping::writable(file.as_fd(), len).expect("map"));
        }
        let held: Vec<_> = (0..4).map(|_| Mapping::writable(file.as_fd(), len).expect("map")).collect();
        let mut bases: Vec<_> = held.iter().map(|mapping| mapping.base() as usize).collect();
        bases.sort_unstable();
        assert!(bases.iter().all(|base| base % HUGE == 0));
        assert!(bases.windows(2).all(|pair| pair[1] - pair[0] >= len), "one over another: {bases:x?}");
        // Somebody else took the place meanwhile.
        let taken = Mapping::writable(file.as_fd(), len).expect("map");
        PLACES.lock().expect("places").push(taken.base() as usize);
        let other = Mapping::writable(file.as_fd(), len).expect("map");
        assert_ne!(other.base(), taken.base());
        assert_eq!(other.base() as usize % HUGE, 0);
    }

    #[test]
    fn sealed_memory_stays_writable_for_its_owner_alone() {
        let len = HUGE + HUGE;
        let file = memory::create(c"test", len).expect("memfd");
        let mine = Mapping::writable(file.as_fd(), len).expect("map");
        assert_eq!(mine.base() as usize % HUGE, 0);
        memory::seal(file.as_fd(), memory::READ_ONLY_SEALS).expect("seal");
        let theirs = memory::reopen_read_only(file.as_fd()).expect("reopen");
        assert_eq!(memory::access(theirs.as_fd()).expect("flags"), (true, false));
        let view = Mapping::read_only(theirs.as_fd(), len).expect("map");
        // SAFETY: two mappings made above.
        unsafe {
            mine.base().add(77).write_volatile(9);
            assert_eq!(view.base().add(77).read_volatile(), 9);
        }
        for file in [&file, &theirs] {
            assert!(Mapping::writable(file.as_fd(), len).is_err(), "a second writable mapping");
            assert!(memory::seal(file.as_fd(), memory::SIZE_SEALS).is_err());
            assert!(rustix::fs::ftruncate(file, 0).is_err());
            let piece = [memory::Piece::new([1u8].as_ptr(), 1)];
            // SAFETY: one readable byte.
            assert!(unsafe { memory::write_at(file.as_fd(), &piece, 0) }.is_err());
        }
        // Huge pages also after sealing; kernels before 6.1 say no.
        if let Err(error) = mine.collapse(HUGE, HUGE) {
            println!("no huge pages here: {error}");
        }
    }
}
