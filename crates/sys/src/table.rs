//! Tables of descriptors: a thread can have one of its own.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// From now on this thread has a table of its own, a copy of what it shared. It ends with the thread.
pub fn unshare() -> io::Result<()> {
    // SAFETY: the other threads keep the old table.
    if unsafe { libc::unshare(libc::CLONE_FILES) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A copy whose number is not smaller than `least`.
pub fn copy_above(fd: BorrowedFd<'_>, least: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: numbers alone.
    let copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, least) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: made by the call above.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// A copy of this very number, in the place of what had it.
///
/// # Safety
/// Nobody owns what has the number in this thread's table: call [`unshare`] before, and use nothing made before it.
pub unsafe fn copy_to(fd: BorrowedFd<'_>, number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the caller's word.
    let copy = unsafe { libc::dup3(fd.as_raw_fd(), number, libc::O_CLOEXEC) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: made by the call above.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Close every descriptor of this thread's table.
///
/// # Safety
/// The table is the thread's alone ([`unshare`]), and no descriptor is used in it afterwards.
pub unsafe fn close_all() {
    // SAFETY: numbers alone; the caller has nothing open that it uses again.
    let _ = unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) };
}
