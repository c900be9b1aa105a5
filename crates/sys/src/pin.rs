//! Pages that stay where they are, and where that is.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Bits of an entry of `/proc/self/pagemap`: present, and the frame's number.
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;
const IORING_REGISTER_BUFFERS: libc::c_uint = 0;
/// `struct io_uring_params`, bytes; all zero asks for nothing special.
const URING_PARAMS: usize = 120;

/// Keep pages from being moved while the descriptor that is returned is open.
///
/// `mlock` keeps them from being swapped out, not from being moved (by compaction, or by a fork). So they are
/// registered as buffers of an io_uring that is never used, which takes a long-term reference on each.
///
/// # Safety
/// The pieces are mapped, readable and writable.
///
/// # Errors
/// The kernel has no io_uring, or so much memory may not be locked.
pub unsafe fn pin(pieces: &[(*mut u8, usize)]) -> io::Result<OwnedFd> {
    let mut params = [0u8; URING_PARAMS];
    // SAFETY: the parameters are as long as the kernel's structure.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, params.as_mut_ptr()) };
    let ring = i32::try_from(ring).map_err(|_| io::Error::last_os_error())?;
    if ring < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it.
    let ring = unsafe { OwnedFd::from_raw_fd(ring) };
    let buffers: Vec<libc::iovec> =
        pieces.iter().map(|(start, len)| libc::iovec { iov_base: start.cast(), iov_len: *len }).collect();
    // SAFETY: the caller vouches for the pieces.
    let done = unsafe {
        for (start, len) in pieces {
            libc::mlock(start.cast(), *len);
        }
        libc::syscall(
            libc::SYS_io_uring_register,
            ring.as_raw_fd(),
            IORING_REGISTER_BUFFERS,
            buffers.as_ptr(),
            buffers.len(),
        )
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(ring) }
}

/// The physical addresses of `len` bytes of pages at `start`, which were touched: runs of (address, bytes).
///
/// # Errors
/// Only root may know, and a page that is not there has none.
pub fn frames(start: *const u8, len: usize) -> io::Result<Vec<(u64, u32)>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut entries = vec![0; len / PAGE * 8];
    // One read: each one is slow where system calls are.
    pagemap.read_exact_at(&mut entries, (start as usize / PAGE * 8) as u64)?;
    let mut runs: Vec<(u64, u32)> = Vec::new();
    for entry in entries.chunks_exact(8) {
        let entry = u64::from_ne_bytes(entry.try_into().unwrap_or_default());
        let at = (entry & FRAME) * PAGE as u64;
        if entry & PRESENT == 0 || at == 0 {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        match runs.last_mut() {
            Some(run) if run.0 + u64::from(run.1) == at => run.1 += PAGE as u32,
            _ => runs.push((at, PAGE as u32)),
        }
    }
    Ok(runs)
}
