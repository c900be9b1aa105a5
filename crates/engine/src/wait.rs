//! How a caller waits.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use isthmus_proto::spin::{Situation, Spin};
use isthmus_sys::clock::now_ns;
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

    #[must_use]
    pub fn wants_to_stop(&self) -> bool {
        self.interrupted.is_some_and(|ask| ask())
    }

    #[must_use]
    pub fn expired(&self) -> bool {
        self.deadline.is_some_and(|at| Instant::now() >= at)
    }

    /// What is left, at most `limit`.
    #[must_use]
    pub fn left(&self, limit: Duration) -> Duration {
        self.deadline.map_or(limit, |at| at.saturating_duration_since(Instant::now()).min(limit))
    }
}

/// Looks at a ring between two looks at the clock: about half a microsecond. A look at the clock
/// takes as long as twenty of them, and what arrives meanwhile is seen that much later.
const LOOKS_PER_CLOCK: u32 = 512;
/// Looks before the processor is told that we spin.
const EAGER_LOOKS: u32 = 2 * LOOKS_PER_CLOCK;
/// A wait that ended within so many looks says nothing about the budget.
const SHORT_LOOKS: u32 = 64;
/// A spinning waiter that never sleeps checks this often that its peer lives, ns.
const SPIN_SLICE_NS: u64 = 1_000_000;
/// The number of runnable tasks is read at most this often, and believed for twice as long, ns.
const CROWD_NS: u64 = 1_000_000;
/// So many readings in a row make a crowd: a task that only passes by is none.
const CROWD_READINGS: u32 = 3;
/// A guest whose processor was taken away for so long between two looks at the clock, ns, shares it with others; that
/// is believed for so long, ns.
const TAKEN_AWAY_NS: u64 = 500_000;
const SHARED_NS: u64 = 3_000_000;
/// Where the kernel has one processor, its own threads get it this often, ns.
const YIELD_NS: u64 = 100_000;

/// Where a waiter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Beside its peer.
    Local,
    /// In a guest, its peer elsewhere.
    Guest,
    /// In a guest with one processor, which its kernel needs to send and to receive.
    SmallGuest,
}

/// Spin until `look` says yes; `false` if the budget ran out first.
///
/// `look` is told now and then to look thoroughly, and may be quick at all other times.
/// `gap` pauses come between two looks: a receiver of a stream that lets its sender get ahead takes
/// many records at a time, instead of fighting for the line of each.
#[inline]
pub(crate) fn spin(
    wait: Wait,
    budget: &mut Spin,
    place: Place,
    peer_cpu: Option<u32>,
    gap: u32,
    mut look: impl FnMut(bool) -> bool,
) -> bool {
    let limit = match wait {
        Wait::Block => return look(true),
        Wait::Spin => SPIN_SLICE_NS,
        Wait::Adaptive => {
            let same_processor = peer_cpu.is_some_and(|peer| peer == cpu::current());
            let ns = budget.budget_ns(Situation { same_processor, crowded: crowded() });
            if ns == 0 {
                return look(true);
            }
            u64::from(ns)
        }
    };
    let mut start = None;
    let (mut last, mut yielded) = (u64::MAX, 0);
    let mut looks = 0u32;
    let burst = (LOOKS_PER_CLOCK / (gap + 1)).max(1);
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
        let now = now_ns();
        let began = *start.get_or_insert(now);
        if now.saturating_sub(began) > limit {
            if wait == Wait::Adaptive {
                budget.miss();
                look_at_the_crowd();
            }
            return false;
        }
        if place == Place::Local {
            continue;
        }
        if now.saturating_sub(last) > TAKEN_AWAY_NS {
            SHARED_UNTIL.store(now + SHARED_NS, Ordering::Relaxed);
            return false;
        }
        last = now;
        if place == Place::SmallGuest && now.saturating_sub(yielded) > YIELD_NS {
            std::thread::yield_now();
            last = now_ns();
            yielded = last;
        }
    }
}

/// As every wait of ours begins: spin as `wait` and the budget allow until `look` says yes. `false`: it is time to sleep
/// or, where nobody sleeps, to look around. In a `guest` let out first what was rung.
pub fn spin_beside(wait: Wait, budget: &mut Spin, guest: bool, mut look: impl FnMut() -> bool) -> bool {
    let place = match guest {
        false => Place::Local,
        true if cpu::online() < 2 => Place::SmallGuest,
        true => Place::Guest,
    };
    spin(wait, budget, place, None, 0, |_| look())
}

/// Readings in a row that saw more runnable tasks than processors.
static CROWD: AtomicU32 = AtomicU32::new(0);
static CROWD_READ_AT: AtomicU64 = AtomicU64::new(0);
/// Until when a guest's processor is taken to be somebody else's as well.
static SHARED_UNTIL: AtomicU64 = AtomicU64::new(0);

/// Do more tasks want to run than there are processors, for some time now?
fn crowded() -> bool {
    let shared = SHARED_UNTIL.load(Ordering::Relaxed);
    if shared != 0 && now_ns() < shared {
        return true;
    }
    CROWD.load(Ordering::Relaxed) >= CROWD_READINGS
        && now_ns().saturating_sub(CROWD_READ_AT.load(Ordering::Relaxed)) < 2 * CROWD_NS
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
