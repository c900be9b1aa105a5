//! System calls of another process that wait for this one: seccomp user notification (seccomp_unotify(2)), and what is
//! needed to answer them, which the kernel allows towards processes that one may trace.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Which of its calls a process must have answered: `calls`, and `options` (setsockopt, getsockopt) at these levels.
#[derive(Clone, Copy, Debug)]
pub struct Filter<'a> {
    pub calls: &'a [libc::c_long],
    /// Calls whose second argument says whether they are meant.
    pub options: &'a [libc::c_long],
    pub levels: &'a [libc::c_int],
    /// (level, option) that are meant too.
    pub pairs: &'a [(libc::c_int, libc::c_int)],
    /// (call, level, option) that succeeds at once, and does nothing.
    pub idle: &'a [(libc::c_long, libc::c_int, libc::c_int)],
}

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;

// Offsets in `struct seccomp_data`; the lower half of an argument, little-endian.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const LEVEL: u32 = 16 + 8;
const OPTION: u32 = 16 + 16;

impl Filter<'_> {
    /// The filter as a program for the kernel. Calls of another architecture (32 bit) are let pass.
    #[must_use]
    pub fn program(&self) -> Vec<libc::sock_filter> {
        let load = |offset| op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
        let pass = op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW);
        let ask = op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_USER_NOTIF);
        let done = op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO);
        let mut program = vec![load(ARCH), equal(ARCHITECTURE, 1, 0), pass];
        for (call, level, option) in self.idle {
            let (call, level, option) = (*call as u32, *level as u32, *option as u32);
            program.extend([load(NUMBER), equal(call, 0, 5), load(LEVEL), equal(level, 0, 3)]);
            program.extend([load(OPTION), equal(option, 0, 1), done]);
        }
        program.push(load(NUMBER));
        for call in self.calls {
            program.extend([equal(*call as u32, 0, 1), ask]);
        }
        // What may follow: look at the level, and for some levels at the option.
        let mut look = vec![load(LEVEL)];
        for level in self.levels {
            look.extend([equal(*level as u32, 0, 1), ask]);
        }
        for (level, option) in self.pairs {
            look.extend([
                load(LEVEL),
                equal(*level as u32, 0, 3),
                load(OPTION),
                equal(*option as u32, 0, 1),
                ask,
            ]);
        }
        look.push(pass);
        for (n, call) in self.options.iter().enumerate() {
            // Over the comparisons with the other calls and the end, to where the looking begins.
            let over = self.options.len() - n;
            program.push(equal(*call as u32, u8::try_from(over).unwrap_or(u8::MAX), 0));
        }
        program.push(pass);
        program.extend(look);
        program
    }
}

fn op(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

fn equal(value: u32, jt: u8, jf: u8) -> libc::sock_filter {
    op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, jt, jf, value)
}

/// Put this thread, and whatever it starts, behind a filter, for good. Its meant calls wait for whoever reads the
/// descriptor that comes back. Nothing that is executed from now on gains privileges (`no_new_privs`).
///
/// Safe between fork and exec: it allocates nothing.
///
/// # Errors
/// The kernel has no such thing, or a filter of this kind is there already (`EBUSY`).
pub fn install(program: &[libc::sock_filter]) -> io::Result<OwnedFd> {
    let prog = libc::sock_fprog { len: program.len() as libc::c_ushort, filter: program.as_ptr().cast_mut() };
    // SAFETY: the program is read within the call.
    unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const prog,
        );
        owned(fd)
    }
}

/// Let whoever answers run where the caller ran, which then has nothing to do there: the two take turns. Since Linux 6.6.
pub fn take_turns(listener: BorrowedFd<'_>) -> io::Result<()> {
    const SYNC_WAKE_UP: u64 = 1;
    // SAFETY: this request takes its flags in the place of a pointer.
    let result =
        unsafe { libc::ioctl(listener.as_raw_fd(), request(1, 4, size_of::<u64>()) as _, SYNC_WAKE_UP) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A call that waits.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    pub id: u64,
    /// The thread that waits, in this process's numbering.
    pub thread: i32,
    pub number: libc::c_long,
    pub arguments: [u64; 6],
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The kernel does it, reading the arguments again.
    Continue,
    Value(i64),
    Errno(i32),
}

/// The next call that waits; blocks until there is one.
///
/// # Errors
/// `NotFound`: it was given up while we were reading it.
pub fn receive(listener: BorrowedFd<'_>) -> io::Result<Call> {
    // SAFETY: all-zero is what the kernel wants to find, and it fills in the whole structure.
    let seen = unsafe {
        let mut seen: libc::seccomp_notif = std::mem::zeroed();
        control(listener, request(3, 0, size_of::<libc::seccomp_notif>()), (&raw mut seen).cast())?;
        seen
    };
    Ok(Call { id: seen.id, thread: seen.pid as i32, number: seen.data.nr.into(), arguments: seen.data.args })
}

/// Let the call return.
///
/// # Errors
/// `NotFound`: it does not wait any more.
pub fn answer(listener: BorrowedFd<'_>, id: u64, answer: Answer) -> io::Result<()> {
    let (val, error, flags) = match answer {
        Answer::Continue => (0, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
        Answer::Value(value) => (value, 0, 0),
        Answer::Errno(number) => (0, -number, 0),
    };
    let mut response = libc::seccomp_notif_resp { id, val, error, flags };
    control(listener, request(3, 1, size_of::<libc::seccomp_notif_resp>()), (&raw mut response).cast())?;
    Ok(())
}

/// Does the call still wait? What was learned of its process before is true if it does.
#[must_use]
pub fn waits(listener: BorrowedFd<'_>, id: u64) -> bool {
    let mut id = id;
    control(listener, request(1, 2, size_of::<u64>()), (&raw mut id).cast()).is_ok()
}

/// Where a descriptor goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the place of this one.
    At(RawFd),
    /// At the lowest free number, which the call returns.
    Returned,
}

/// Give the waiting process a copy of a descriptor.
///
/// # Errors
/// `NotFound`: the call does not wait any more. Others are the process's, such as too many open files.
pub fn give(
    listener: BorrowedFd<'_>,
    id: u64,
    fd: BorrowedFd<'_>,
    place: Place,
    close_on_exec: bool,
) -> io::Result<RawFd> {
    let (flags, newfd) = match place {
        Place::At(number) => (libc::SECCOMP_ADDFD_FLAG_SETFD, number as u32),
        Place::Returned => (libc::SECCOMP_ADDFD_FLAG_SEND, 0),
    };
    let mut add = libc::seccomp_notif_addfd {
        id,
        flags: flags as u32,
        srcfd: fd.as_raw_fd() as u32,
        newfd,
        newfd_flags: if close_on_exec { libc::O_CLOEXEC as u32 } else { 0 },
    };
    control(listener, request(1, 3, size_of::<libc::seccomp_notif_addfd>()), (&raw mut add).cast())
}

fn request(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | u64::from(b'!') << 8 | number
}

fn control(listener: BorrowedFd<'_>, request: u64, argument: *mut libc::c_void) -> io::Result<RawFd> {
    // SAFETY: the request says how large the structure is that the argument points to.
    let result = unsafe { libc::ioctl(listener.as_raw_fd(), request as _, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Copy memory of another process. Less than asked for is an error.
pub fn read_memory(thread: i32, address: u64, buffer: &mut [u8]) -> io::Result<()> {
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: buffer.len() };
    // SAFETY: the local vector is the buffer; the remote one is never dereferenced here.
    let done = unsafe { libc::process_vm_readv(thread, &raw const local, 1, &raw const remote, 1, 0) };
    whole(done, buffer.len())
}

/// Write into the memory of another process.
pub fn write_memory(thread: i32, address: u64, bytes: &[u8]) -> io::Result<()> {
    let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: bytes.len() };
    // SAFETY: the local vector is only read; the remote one is never dereferenced here.
    let done = unsafe { libc::process_vm_writev(thread, &raw const local, 1, &raw const remote, 1, 0) };
    whole(done, bytes.len())
}

fn whole(done: isize, wanted: usize) -> io::Result<()> {
    match usize::try_from(done) {
        Ok(done) if done == wanted => Ok(()),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// A copy of a descriptor of another process.
///
/// # Errors
/// There is none of this number, or this process may not trace that one.
pub fn descriptor_of(thread: i32, fd: RawFd) -> io::Result<OwnedFd> {
    // A thread that is not the first of its process needs a flag, which Linux knows since 6.9.
    let opened = pidfd(thread, libc::O_EXCL).or_else(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => pidfd(process_of(thread)?, 0),
        _ => Err(error),
    })?;
    // SAFETY: numbers alone.
    unsafe { owned(libc::syscall(libc::SYS_pidfd_getfd, opened.as_raw_fd(), fd, 0)) }
}

fn pidfd(thread: i32, flags: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: numbers alone.
    unsafe { owned(libc::syscall(libc::SYS_pidfd_open, thread, flags)) }
}

/// The process a thread belongs to.
pub fn process_of(thread: i32) -> io::Result<i32> {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status"))?;
    let field = status.lines().find_map(|line| line.strip_prefix("Tgid:"));
    field.and_then(|text| text.trim().parse().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// # Safety
/// The number is a system call's result: negative, or a descriptor that nobody owns yet.
unsafe fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the caller's word.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}
