//! Signals of this thread.

use std::io;

/// Let these signals come again. Safe between fork and exec.
pub fn unblock(signals: &[i32]) -> io::Result<()> {
    // SAFETY: the set is made by `sigemptyset` before it is used.
    let result = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in signals {
            libc::sigaddset(&raw mut set, *signal);
        }
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut())
    };
    if result != 0 { Err(io::Error::from_raw_os_error(result)) } else { Ok(()) }
}

/// Run `work` with all signals blocked: threads that it starts never get any, and the program's handlers run on the
/// program's threads.
pub fn quietly<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: an empty set of signals is one; both sets are ours, and `before` is written before it is read.
    let before = unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        before
    };
    let done = work();
    // SAFETY: the set is what the kernel said.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    done
}
