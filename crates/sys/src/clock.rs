//! A clock to spin by.
//!
//! Where asking the kernel for the time is a system call, as in user-mode Linux (25 µs), we count the processor's own
//! ticks, of which we measure once how long they are. That is precise enough to say how long to spin.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A kernel's clock that takes longer is not asked while we spin.
const SLOW: Duration = Duration::from_micros(3);
/// For how long ticks are counted to know their length.
const MEASURE: Duration = Duration::from_millis(1);

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
    /// `shift` bits of the factor are a fraction.
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
        let (Some(first), began) = (ticks(), Instant::now()) else { return Self::Kernel { origin } };
        while began.elapsed() < MEASURE {}
        let (passed, took) = (ticks().unwrap_or(first).saturating_sub(first), began.elapsed().as_nanos());
        match u64::try_from((took << FRACTION) / u128::from(passed.max(1))) {
            // A counter that stands still, or one that ticks more than a hundred times in a nanosecond, is none.
            Ok(ns_per_tick) if passed > 0 && ns_per_tick >> (FRACTION - 7) > 0 => {
                Self::Counter { origin: first, ns_per_tick }
            }
            _ => Self::Kernel { origin },
        }
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
        let Some(first) = ticks() else { return };
        let (began, mut counted) = (Instant::now(), None);
        std::thread::sleep(Duration::from_millis(5));
        let ns_per_tick = (began.elapsed().as_nanos() << FRACTION) / u128::from(ticks().unwrap_or(0) - first);
        let clock = Clock::Counter { origin: first, ns_per_tick: ns_per_tick as u64 };
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
