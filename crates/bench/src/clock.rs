//! A clock that can be read between two messages of 75 ns.
//!
//! `clock_gettime` costs 20 to 40 ns, a third of such a message; the time-stamp counter costs a few. It is used where
//! the processor promises one rate for ever (invariant TSC), and the monotonic clock elsewhere.

use std::{
    sync::OnceLock,
    time::{Duration, Instant},
};

use rustix::time::{ClockId, clock_gettime};

/// How long the counter is compared with the monotonic clock, once per process. 4 ms against reads that are 50 ns
/// apart is an error of 1e-5.
const CALIBRATION: Duration = Duration::from_millis(4);

/// Ticks, and what one is worth.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    counter: bool,
    ns_per_tick: f64,
    origin: Instant,
}

impl Clock {
    /// The clock of this process; the first call takes 4 ms.
    pub fn start() -> Self {
        static CLOCK: OnceLock<Clock> = OnceLock::new();
        *CLOCK.get_or_init(Self::calibrate)
    }

    fn calibrate() -> Self {
        let origin = Instant::now();
        if !has_counter() {
            return Self { counter: false, ns_per_tick: 1.0, origin };
        }
        let first = counter();
        while origin.elapsed() < CALIBRATION {
            std::hint::spin_loop();
        }
        let elapsed = origin.elapsed();
        let ticks = counter().wrapping_sub(first).max(1);
        Self { counter: true, ns_per_tick: elapsed.as_nanos() as f64 / ticks as f64, origin }
    }

    /// Ticks since some moment; only differences mean anything.
    #[inline(always)]
    pub fn ticks(&self) -> u64 {
        if self.counter { counter() } else { self.origin.elapsed().as_nanos() as u64 }
    }

    pub fn nanoseconds(&self, ticks: u64) -> f64 {
        ticks as f64 * self.ns_per_tick
    }

    pub fn seconds(&self, ticks: u64) -> f64 {
        self.nanoseconds(ticks) * 1e-9
    }

    /// How many ticks fit into `duration`.
    pub fn ticks_in(&self, duration: Duration) -> u64 {
        (duration.as_nanos() as f64 / self.ns_per_tick) as u64
    }
}

/// CPU seconds of every thread of this process, so far.
pub(crate) fn cpu_seconds() -> f64 {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 * 1e-9
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn counter() -> u64 {
    // SAFETY: reading the counter has no preconditions on x86-64.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> u64 {
    0
}

/// Whether the counter runs at one rate whatever the processor's frequency and sleep state.
#[cfg(target_arch = "x86_64")]
fn has_counter() -> bool {
    // AMD64 manual volume 3, E.4.6 and Intel SDM 18.17.1: CPUID 8000_0007, EDX bit 8 is the invariant TSC.
    const POWER: u32 = 0x8000_0007;
    // `__cpuid` is safe to call since Rust 1.93 and unsafe before.
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 processor has CPUID, and leaf 8000_0000 says which leaves may be asked for.
    unsafe {
        core::arch::x86_64::__cpuid(0x8000_0000).eax >= POWER
            && core::arch::x86_64::__cpuid(POWER).edx & (1 << 8) != 0
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn has_counter() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_agree_with_the_monotonic_clock() {
        let clock = Clock::start();
        let (start, first) = (Instant::now(), clock.ticks());
        while start.elapsed() < Duration::from_millis(20) {}
        let measured = clock.seconds(clock.ticks() - first);
        let wall = start.elapsed().as_secs_f64();
        assert!((measured / wall - 1.0).abs() < 0.05, "{measured} against {wall}");
    }
}
