//! A clock to spin by.
//!
//! Where asking the kernel for the time is a system call, as in user-mode Linux (25 µs), we count the processor's own
//! ticks, of which we measure once how long they are. That is precise enough to say how long to spin.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A kernel's clock that takes longer is not asked while we spin.
const SLOW: Duration = Duration::from_micros(3);
/// For how long ticks are counted to know their length.
const MEASURE: Duration = Duration::from_micros(500);

/// Nanoseconds since some moment of this process. May differ between two processors by what their counters do.
#[must_use]
pub fn now_ns() -> u64 {
    static CLOCK: OnceLock<Clock> = OnceLock::new();
    CLOCK.get_or_init(Clock::choose).now_ns()
}

enum Clock {
    Kernel {
        origin: Instant,
    },
    /// The lower [`FRACTION`] bits of the factor are behind the point.
    Counter {
        origin: u64,
        ns_per_tick: u64,
    },
}

/// Bits of `ns_per_tick` behind the point.
const FRACTION: u32 = 32;

impl Clock {
    fn choose() -> Self {
        let origin = Instant::now();
        let cost = (Instant::now() - origin).min(Instant::now() - origin);
        if cost <= SLOW {
            return Self::Kernel { origin };
        }
        Self::counter().unwrap_or(Self::Kernel { origin })
    }

    /// The processor's counter, if it has one that is worth the name.
    fn counter() -> Option<Self> {
        let mut measured = [measure()?, measure()?, measure()?];
        // Whoever loses its processor between two looks measures anything; not twice, most likely.
        measured.sort_unstable();
        Some(Self::Counter { origin: ticks()?, ns_per_tick: measured[1] })
    }

    #[inline]
    fn now_ns(&self) -> u64 {
        match *self {
            Self::Kernel { origin } => origin.elapsed().as_nanos() as u64,
            Self::Counter { origin, ns_per_tick } => {
                let passed = ticks().unwrap_or(origin).saturating_sub(origin);
                ((u128::from(passed) * u128::from(ns_per_tick)) >> FRACTION) as u64
            }
        }
    }
}

/// How long a tick is. None for a counter that stands still, or ticks more than a hundred times in a nanosecond.
fn measure() -> Option<u64> {
    let (first, began) = (ticks()?, Instant::now());
    while began.elapsed() < MEASURE {}
    let (passed, took) = (ticks()?.checked_sub(first)?, began.elapsed().as_nanos());
    let ns_per_tick = u64::try_from((took << FRACTION).checked_div(u128::from(passed))?).ok()?;
    (ns_per_tick >> (FRACTION - 7) > 0).then_some(ns_per_tick)
}

/// What the processor has counted, where programs may ask it.
#[inline]
fn ticks() -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: reads a register; a kernel that forbids it is one that nobody uses.
        Some(unsafe { std::arch::x86_64::_rdtsc() })
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_and_the_kernel_agree_on_how_long_something_took() {
        let Some(clock) = Clock::counter() else { return };
        let mut counted = None;
        let kernel = Clock::Kernel { origin: Instant::now() };
        for _ in 0..2 {
            let before = clock.now_ns();
            let at = kernel.now_ns();
            while kernel.now_ns() - at < 2_000_000 {}
            counted = Some(clock.now_ns() - before);
        }
        // Whoever was not running meanwhile counts more.
        assert!(counted.is_some_and(|ns| ns >= 1_500_000), "{counted:?}");
    }

    #[test]
    fn time_goes_forward() {
        let first = now_ns();
        while now_ns() == first {}
        assert!(now_ns() > first);
    }
}
