//! Mapped files that their owner may cut short.
//!
//! Touching a page behind the end of a file raises `SIGBUS`. Files that strangers hand in cannot always be sealed
//! against that (the memory of a guest belongs to its monitor), so a process that maps them *guards* the mappings:
//! the handler puts pages of zeros in the place of a mapping that failed and notes that it did. Whoever guards asks
//! [`Guard::failed`] before it believes what it read.

use std::io;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Mappings that one process can guard.
pub const GUARDS_MAX: usize = 4096;

struct Slot {
    base: AtomicUsize,
    /// 0: free. Written last when taken, first when given back.
    len: AtomicUsize,
    taken: AtomicBool,
    failed: AtomicBool,
}

static SLOTS: [Slot; GUARDS_MAX] = [const {
    Slot {
        base: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        taken: AtomicBool::new(false),
        failed: AtomicBool::new(false),
    }
}; GUARDS_MAX];
static HANDLER: Once = Once::new();

/// A guarded mapping. Drop it before the mapping is removed.
pub struct Guard(&'static Slot);

impl Guard {
    /// Guard `len` bytes at `base`, whole pages of a mapping of this process.
    ///
    /// # Errors
    /// [`GUARDS_MAX`] mappings are guarded already.
    pub fn new(base: *mut u8, len: usize) -> io::Result<Self> {
        HANDLER.call_once(install);
        let free = |slot: &&Slot| {
            slot.taken.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        let slot = SLOTS.iter().find(free).ok_or(io::ErrorKind::OutOfMemory)?;
        slot.failed.store(false, Ordering::Relaxed);
        slot.base.store(base as usize, Ordering::Relaxed);
        slot.len.store(len, Ordering::Release);
        Ok(Self(slot))
    }

    /// Was a page of the mapping not there when it was touched? All of it reads as zeros since.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.0.failed.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.len.store(0, Ordering::Release);
        self.0.taken.store(false, Ordering::Release);
    }
}

fn install() {
    // SAFETY: the handler only reads atomics and makes one system call; the action is whole.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
    }
}

extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure to a handler with SA_SIGINFO.
    let at = unsafe { (*info).si_addr() } as usize;
    for slot in &SLOTS {
        let len = slot.len.load(Ordering::Acquire);
        let base = slot.base.load(Ordering::Relaxed);
        if len == 0 || at < base || at - base >= len {
            continue;
        }
        slot.failed.store(true, Ordering::Release);
        // SAFETY: the range is one whole mapping of this process, guarded by its owner, who expects this.
        let put = unsafe {
            libc::mmap(
                base as *mut libc::c_void,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if put != libc::MAP_FAILED {
            return;
        }
        break;
    }
    // Not ours: what would have happened without us happens when the access is tried again.
    // SAFETY: as above.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::Mapping;
    use crate::memory;
    use std::os::fd::AsFd;

    #[test]
    fn a_file_cut_short_reads_as_zeros_and_is_noted() {
        let file = memory::create(c"guard", 8192).expect("memory");
        let mapping = Mapping::writable(file.as_fd(), 8192).expect("a mapping");
        let guard = Guard::new(mapping.base(), 8192).expect("a guard");
        // SAFETY: mapped above.
        unsafe { mapping.base().add(5000).write_volatile(7) };
        assert!(!guard.failed());
        rustix::fs::ftruncate(&file, 4096).expect("shorter");
        // SAFETY: mapped; the page is gone, which is what the guard is for.
        assert_eq!(unsafe { mapping.base().add(5000).read_volatile() }, 0);
        assert!(guard.failed());
    }
}
