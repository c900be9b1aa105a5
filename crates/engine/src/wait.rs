//! How a caller waits.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use isthmus_proto::spin::{Situation, Spin};
use isthmus_sys::cpu;

/// Never sleep, spin a little and then sleep (the default), or sleep at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wait {
    Spin,
    #[default]
    Adaptive,
    Block,
}

/// How one call waits.
#[derive(Clone, Copy, Default)]
pub struct How<'a> {
    pub wait: Wait,
    /// Do not wait at all.
    pub now: bool,
    /// Give up then.
    pub deadline: Option<Instant>,
    /// Asked after every interrupted or long sleep: `true` ends the wait (`Error::Interrupted`).
    pub interrupted: Option<&'a (dyn Fn() -> bool + Sync)>,
}

impl How<'_> {
    #[must_use]
    pub fn at_once() -> Self {
        Self { now: true, ..Self::default() }
    }

    pub(crate) fn wants_to_stop(&self) -> bool {
        self.interrupted.is_some_and(|ask| ask())
    }

    pub(crate) fn expired(&self) -> bool {
        self.deadline.is_some_and(|at| Instant::now() >= at)
    }

    /// What is left, at most `limit`.
    pub(crate) fn left(&self, limit: Duration) -> Duration {
        self.deadline.map_or(limit, |at| at.saturating_duration_since(Instant::now()).min(limit))
    }
}

/// Looks at a ring between two looks at the clock: about half a microsecond. A look at the clock
/// takes as long as twenty of them, and what arrives meanwhile is seen that much later.
const LOOKS_PER_CLOCK: u32 = 512;
/// A clock that takes longer is slow, and is looked at so many times less often.
const SLOW_CLOCK: Duration = Duration::from_micros(3);
const SLOW_FACTOR: u32 = 128;
/// Looks before the processor is told that we spin.
const EAGER_LOOKS: u32 = 2 * LOOKS_PER_CLOCK;
/// A wait that ended within so many looks says nothing about the budget.
const SHORT_LOOKS: u32 = 64;
/// A spinning waiter that never sleeps checks this often that its peer lives.
const SPIN_SLICE: Duration = Duration::from_millis(1);
/// The number of runnable tasks is read at most this often, and believed for twice as long, ns.
const CROWD_NS: u64 = 1_000_000;
/// So many readings in a row make a crowd: a task that only passes by is none.
const CROWD_READINGS: u32 = 3;

/// Spin until `look` says yes; `false` if the budget ran out first.
///
/// `look` is told now and then to look thoroughly, and may be quick at all other times.
/// `gap` pauses come between two looks: a receiver of a stream that lets its sender get ahead takes
/// many records at a time, instead of fighting for the line of each.
#[inline]
pub(crate) fn spin(
    wait: Wait,
    budget: &mut Spin,
    peer_cpu: Option<u32>,
    gap: u32,
    mut look: impl FnMut(bool) -> bool,
) -> bool {
    let limit = match wait {
        Wait::Block => return look(true),
        Wait::Spin => SPIN_SLICE,
        Wait::Adaptive => {
            let same_processor = peer_cpu.is_some_and(|peer| peer == cpu::current());
            let ns = budget.budget_ns(Situation { same_processor, crowded: crowded() });
            if ns == 0 {
                return look(true);
            }
            Duration::from_nanos(u64::from(ns))
        }
    };
    let mut start = None;
    let mut looks = 0u32;
    let burst = (looks_per_clock() / (gap + 1)).max(1);
    loop {
        // Nothing but looking: what arrives is seen by the next look.
        let pauses = gap + u32::from(looks >= EAGER_LOOKS);
        for i in 0..burst {
            if look(false) {
                if wait == Wait::Adaptive && looks.saturating_add(i) > SHORT_LOOKS {
                    budget.hit();
                }
                return true;
            }
            for _ in 0..pauses {
                std::hint::spin_loop();
            }
        }
        looks = looks.saturating_add(burst);
        if look(true) {
            return true;
        }
        let now = Instant::now();
        if now.duration_since(*start.get_or_insert(now)) > limit {
            if wait == Wait::Adaptive {
                budget.miss();
                look_at_the_crowd();
            }
            return false;
        }
    }
}

/// How often the clock is looked at: seldom where that is slow, because what arrives meanwhile is not seen. In
/// user-mode Linux it is a system call of 25 µs.
fn looks_per_clock() -> u32 {
    static LOOKS: AtomicU32 = AtomicU32::new(0);
    match LOOKS.load(Ordering::Relaxed) {
        0 => {
            let started = Instant::now();
            let cost = (Instant::now() - started).min(Instant::now() - started);
            let looks = if cost > SLOW_CLOCK { LOOKS_PER_CLOCK * SLOW_FACTOR } else { LOOKS_PER_CLOCK };
            LOOKS.store(looks, Ordering::Relaxed);
            looks
        }
        looks => looks,
    }
}

/// Readings in a row that saw more runnable tasks than processors.
static CROWD: AtomicU32 = AtomicU32::new(0);
static CROWD_READ_AT: AtomicU64 = AtomicU64::new(0);

/// Do more tasks want to run than there are processors, for some time now?
fn crowded() -> bool {
    CROWD.load(Ordering::Relaxed) >= CROWD_READINGS
        && now_ns().wrapping_sub(CROWD_READ_AT.load(Ordering::Relaxed)) < 2 * CROWD_NS
}

/// Read the number of runnable tasks, now and then. Only after spinning in vain: a wait that ends
/// in time never pays for it.
fn look_at_the_crowd() {
    let now = now_ns();
    let age = now.wrapping_sub(CROWD_READ_AT.load(Ordering::Relaxed));
    if age < CROWD_NS {
        return;
    }
    CROWD_READ_AT.store(now, Ordering::Relaxed);
    // Those of the machine: a program pinned to one has its peer on another.
    let processors = cpu::online();
    if processors < 2 || cpu::runnable().is_some_and(|tasks| tasks > processors) {
        CROWD.fetch_add(1, Ordering::Relaxed);
    } else {
        CROWD.store(0, Ordering::Relaxed);
    }
}

fn now_ns() -> u64 {
    static ORIGIN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    // A fresh process must not believe a reading it never made.
    ORIGIN
        .get_or_init(|| Instant::now().checked_sub(Duration::from_secs(1)).unwrap_or_else(Instant::now))
        .elapsed()
        .as_nanos() as u64
}
