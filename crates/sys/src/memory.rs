//! Anonymous files whose size, and who may write them, is settled for ever by seals.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};

/// `F_SEAL_FUTURE_WRITE | SHRINK | GROW | SEAL`: nobody but those who map it writable already will
/// ever write it, and its size is fixed. Holds against root and against the same user.
pub const READ_ONLY_SEALS: SealFlags =
    SealFlags::FUTURE_WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::SEAL);
/// The size is fixed and no further seal can be added.
pub const SIZE_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// A new file of `len` zero bytes that takes no memory until it is touched.
pub fn create(name: &CStr, len: usize) -> io::Result<OwnedFd> {
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, len as u64)?;
    Ok(file)
}

/// A new file of `len` zero bytes of reserved huge pages.
///
/// # Errors
/// The kernel has no huge pages of this kind.
pub fn create_huge(name: &CStr, len: usize) -> io::Result<OwnedFd> {
    let file =
        rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?;
    rustix::fs::ftruncate(&file, len as u64)?;
    Ok(file)
}

pub fn seal(file: BorrowedFd<'_>, seals: SealFlags) -> io::Result<()> {
    Ok(rustix::fs::fcntl_add_seals(file, seals)?)
}

/// The seals of a file; an error if it is not an anonymous file at all.
pub fn seals(file: BorrowedFd<'_>) -> io::Result<SealFlags> {
    Ok(rustix::fs::fcntl_get_seals(file)?)
}

/// Does the file lie in ordinary shared memory? Files of reserved huge pages are refused: a page of
/// theirs that cannot be had kills whoever touches it.
#[must_use]
pub fn ordinary(file: BorrowedFd<'_>) -> bool {
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    rustix::fs::fstatfs(file).is_ok_and(|fs| fs.f_type as u64 == TMPFS_MAGIC)
}

/// Length in bytes.
pub fn len(file: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0))
}

/// Take memory for all of its `len` bytes now.
///
/// # Errors
/// There is not so much.
pub fn fill(file: BorrowedFd<'_>, len: usize) -> io::Result<()> {
    Ok(rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, len as u64)?)
}

/// Is all of it there, and nothing a hole?
pub fn is_filled(file: BorrowedFd<'_>) -> io::Result<bool> {
    /// What `st_blocks` counts, bytes.
    const BLOCK: i64 = 512;
    let stat = rustix::fs::fstat(file)?;
    Ok(stat.st_blocks.saturating_mul(BLOCK) >= stat.st_size)
}

/// Permission bits for whoever would open the file again through `/proc`.
pub fn set_mode(file: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    Ok(rustix::fs::fchmod(file, Mode::from_raw_mode(mode))?)
}

/// May the descriptor itself be read, written?
pub fn access(file: BorrowedFd<'_>) -> io::Result<(bool, bool)> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    let mode = flags & OFlags::RWMODE;
    Ok((mode == OFlags::RDONLY || mode == OFlags::RDWR, mode == OFlags::WRONLY || mode == OFlags::RDWR))
}

/// The same file through a new descriptor that can only be read.
pub fn reopen_read_only(file: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    reopen(file, OFlags::RDONLY)
}

/// The same file through a new descriptor that can only be written.
pub fn reopen_write_only(file: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    reopen(file, OFlags::WRONLY)
}

fn reopen(file: BorrowedFd<'_>, access: OFlags) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(rustix::fs::open(path, access | OFlags::CLOEXEC, Mode::empty())?)
}

/// One buffer of a gathered write.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Piece(libc::iovec);

impl Piece {
    #[must_use]
    pub fn new(start: *const u8, len: usize) -> Self {
        Self(libc::iovec { iov_base: start.cast_mut().cast(), iov_len: len })
    }

    /// Append what the piece points at.
    ///
    /// # Safety
    /// It is readable.
    pub unsafe fn copy_to(&self, out: &mut Vec<u8>) {
        // SAFETY: the caller's promise.
        out.extend_from_slice(unsafe { std::slice::from_raw_parts(self.0.iov_base.cast(), self.0.iov_len) });
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }
}

/// Write the pieces, in order, at `at`; returns the bytes written.
///
/// # Safety
/// Every piece is readable.
pub unsafe fn write_at(file: BorrowedFd<'_>, pieces: &[Piece], at: u64) -> io::Result<usize> {
    let count = pieces.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
    let Ok(at) = libc::off_t::try_from(at) else { return Err(io::ErrorKind::InvalidInput.into()) };
    // SAFETY: `Piece` is an iovec; the caller vouches for what they point at. The kernel takes one
    // buffer a sixth faster than a list of one.
    let n = unsafe {
        match pieces {
            [Piece(one)] => libc::pwrite(file.as_raw_fd(), one.iov_base, one.iov_len, at),
            _ => libc::pwritev(file.as_raw_fd(), pieces.as_ptr().cast(), count, at),
        }
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}
