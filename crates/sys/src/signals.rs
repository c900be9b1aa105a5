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
