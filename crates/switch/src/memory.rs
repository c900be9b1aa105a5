//! A guest's memory, as its monitor handed it in.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use isthmus_sys::guard::Guard;
use isthmus_wire::vhost_user::{MemoryTable, Region};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::Fault;

/// Bytes of guest memory that one table may name: address space is what it costs us.
const MEMORY_MAX: u64 = 16 << 40;

struct Part {
    /// As the guest and the monitor number it.
    region: Region,
    base: *mut u8,
    file: Arc<File>,
    /// Bytes of a page of the file.
    block: u64,
    guard: Guard,
}

/// All of a guest's memory, mapped. Nothing in it is ever believed twice.
pub struct Memory {
    // Before the mappings: a guard ends before what it guards.
    parts: Vec<Part>,
    mapped: GuestMemoryMmap<()>,
}

// SAFETY: the pointers are into the mappings that `mapped` owns; what they point at is shared with a guest anyway.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

/// Bytes of a page of a file. Only files in memory are taken: others can make whoever touches them wait.
fn block_size(file: &OwnedFd) -> Result<u64, Fault> {
    const TMPFS: u64 = 0x0102_1994;
    const HUGETLBFS: u64 = 0x9584_58F6;
    let system = rustix::fs::fstatfs(file)?;
    match system.f_type as u64 & 0xFFFF_FFFF {
        TMPFS => Ok(4096),
        HUGETLBFS => u64::try_from(system.f_bsize).map_err(|_| Fault::Memory("a file of no pages")),
        _ => Err(Fault::Memory("a file that does not lie in memory; use memfd or /dev/shm")),
    }
}

impl Memory {
    /// Map what the table names; one file for each region.
    ///
    /// # Errors
    /// A region cannot be: nothing stays mapped.
    pub fn new(table: &MemoryTable, files: Vec<OwnedFd>) -> Result<Self, Fault> {
        let regions = table.regions();
        if files.len() != regions.len() || regions.is_empty() {
            return Err(Fault::Memory("a descriptor for each region, and at least one region"));
        }
        let total = regions.iter().fold(0u64, |sum, region| sum.saturating_add(region.size));
        if total > MEMORY_MAX {
            return Err(Fault::Memory("more memory than a guest can have"));
        }
        let mut parts = Vec::new();
        let mut mapped = Vec::new();
        for (region, file) in regions.iter().zip(files) {
            let ends = [region.guest, region.user, region.offset].map(|at| at.checked_add(region.size));
            if ends.contains(&None) || region.offset % 4096 != 0 || region.size == 0 {
                return Err(Fault::Memory("a region that wraps, is empty or lies between pages"));
            }
            let block = block_size(&file)?;
            if region.size % block != 0 || region.offset % block != 0 {
                return Err(Fault::Memory("a region that is not whole pages of its file"));
            }
            let file = Arc::new(File::from(file));
            let size = usize::try_from(region.size).map_err(|_| Fault::Memory("a region too large"))?;
            let mapping = MmapRegion::from_file(FileOffset::from_arc(Arc::clone(&file), region.offset), size)
                .map_err(|_| Fault::Memory("a region that cannot be mapped"))?;
            let base = mapping.as_ptr();
            let guard = Guard::new(base, size.next_multiple_of(4096))
                .map_err(|_| Fault::Memory("too many guests"))?;
            let mapping = GuestRegionMmap::new(mapping, GuestAddress(region.guest))
                .ok_or(Fault::Memory("a region that wraps"))?;
            parts.push(Part { region: *region, base, file, block, guard });
            mapped.push(mapping);
        }
        let mapped = GuestMemoryMmap::from_regions(mapped)
            .map_err(|_| Fault::Memory("regions that overlap or are out of order"))?;
        Ok(Self { parts, mapped })
    }

    /// For the queues.
    #[must_use]
    pub fn mapped(&self) -> &GuestMemoryMmap<()> {
        &self.mapped
    }

    /// The guest-physical address of one of the monitor's.
    #[must_use]
    pub fn from_user(&self, user: u64) -> Option<u64> {
        self.parts.iter().find_map(|part| {
            let at = user.checked_sub(part.region.user).filter(|at| *at < part.region.size)?;
            Some(part.region.guest + at)
        })
    }

    /// Where `len` bytes at a guest-physical address lie in this process, if they lie in one region.
    #[must_use]
    pub fn at(&self, guest: u64, len: u64) -> Option<*mut u8> {
        let (part, at) = self.part(guest, len)?;
        // SAFETY: `at + len` is within the mapping, checked by `part`.
        Some(unsafe { part.base.add(at as usize) })
    }

    /// The file, and the offset in it, of `len` bytes at a guest-physical address, if they are whole pages of the file.
    #[must_use]
    pub fn file(&self, guest: u64, len: u64) -> Option<(BorrowedFd<'_>, u64)> {
        let (part, at) = self.part(guest, len)?;
        let offset = part.region.offset + at;
        // The kernel would map the rest of a huge page too, over whatever lies there.
        (offset % part.block == 0 && len % part.block == 0).then_some((part.file.as_fd(), offset))
    }

    fn part(&self, guest: u64, len: u64) -> Option<(&Part, u64)> {
        self.parts.iter().find_map(|part| {
            let at = guest.checked_sub(part.region.guest)?;
            (at <= part.region.size && len <= part.region.size - at).then_some((part, at))
        })
    }

    /// Did the monitor take memory away that it had handed in?
    #[must_use]
    pub fn failed(&self) -> bool {
        self.parts.iter().any(|part| part.guard.failed())
    }
}
