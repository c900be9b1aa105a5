//! A signal that ends a call which waits where nothing should.

use std::io;
use std::time::Duration;

/// Sends its thread a signal at regular intervals (`SIGALRM`), so that no system call of it waits longer: it fails with
/// `Interrupted`. Takes that signal for the whole process.
pub struct Alarm(libc::timer_t);

impl Alarm {
    /// For the calling thread.
    ///
    /// # Errors
    /// The kernel gives no timer.
    pub fn start(every: Duration) -> io::Result<Self> {
        extern "C" fn heard(_: libc::c_int) {}
        // SAFETY: the handler does nothing; all-zero is a valid value of these structures, and each is filled in as
        // its call wants it.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            // Without SA_RESTART: what was interrupted is not to begin again.
            action.sa_sigaction = heard as *const () as usize;
            if libc::sigaction(libc::SIGALRM, &action, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = libc::SIGALRM;
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer = std::ptr::null_mut();
            if libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) != 0 {
                return Err(io::Error::last_os_error());
            }
            let alarm = Self(timer);
            let period = libc::timespec {
                tv_sec: every.as_secs() as libc::time_t,
                tv_nsec: every.subsec_nanos().into(),
            };
            let times = libc::itimerspec { it_interval: period, it_value: period };
            if libc::timer_settime(timer, 0, &times, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(alarm)
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: made by `start`, and deleted once.
        unsafe { libc::timer_delete(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_call_that_waits_is_interrupted() {
        let (mut here, _there) = std::os::unix::net::UnixStream::pair().expect("a pair");
        let _alarm = Alarm::start(Duration::from_millis(20)).expect("a timer");
        let error = here.read(&mut [0]).expect_err("nothing to read");
        assert_eq!(error.kind(), io::ErrorKind::Interrupted);
    }
}
