//! Processors: where we run, how many there are, how many tasks want one.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::clock::now_ns;

/// The processor this thread runs on now.
#[must_use]
pub fn current() -> u32 {
    rustix::thread::sched_getcpu() as u32
}

/// Processors of the machine that are switched on, as of a second ago at most: the C library opens a file to know.
#[must_use]
pub fn online() -> u32 {
    static KNOWN: AtomicU32 = AtomicU32::new(0);
    static KNOWN_AT_S: AtomicU32 = AtomicU32::new(0);
    let now_s = (now_ns() / 1_000_000_000) as u32;
    let known = KNOWN.load(Ordering::Relaxed);
    if known != 0 && KNOWN_AT_S.load(Ordering::Relaxed) == now_s {
        return known;
    }
    // SAFETY: asks for a number.
    let n = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    let n = u32::try_from(n).unwrap_or(1).max(1);
    KNOWN.store(n, Ordering::Relaxed);
    KNOWN_AT_S.store(now_s, Ordering::Relaxed);
    n
}

/// Tasks that run or want to run on the whole machine, from `/proc/loadavg`; `None` where it
/// cannot be read. Takes a few microseconds.
#[must_use]
pub fn runnable() -> Option<u32> {
    static LOADAVG: OnceLock<Option<File>> = OnceLock::new();
    let file = LOADAVG.get_or_init(|| File::open("/proc/loadavg").ok()).as_ref()?;
    let mut text = [0; 64];
    let n = file.read_at(&mut text, 0).ok()?;
    let text = std::str::from_utf8(text.get(..n)?).ok()?;
    text.split_ascii_whitespace().nth(3)?.split_once('/')?.0.parse().ok()
}

/// Counts the forks of this process: a child sees another number than its parent.
#[must_use]
pub fn generation() -> u32 {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        extern "C" fn forked() {
            GENERATION.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: registers a function that only touches an atomic, which is allowed after fork.
        unsafe { libc::pthread_atfork(None, None, Some(forked)) };
    });
    GENERATION.load(Ordering::Relaxed)
}

static GENERATION: AtomicU32 = AtomicU32::new(0);

/// Raise the limit on open descriptors to what this process may have; returns the limit.
pub fn raise_descriptor_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    let wish = Rlimit { current: now.maximum, maximum: now.maximum };
    if now.current != now.maximum && setrlimit(Resource::Nofile, wish).is_ok() {
        return now.maximum.unwrap_or(u64::MAX);
    }
    now.current.unwrap_or(u64::MAX)
}
