//! How long one cache line takes from core to core: no message between them is faster.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread::scope,
    time::Duration,
};

use rustix::thread::{CpuSet, sched_setaffinity};

use crate::{
    clock::{Clock, cpu_seconds},
    error::BenchError,
    histogram::Histogram,
    loops::Latency,
};

/// A word alone on its line, and on the neighbour that the processor may fetch with it.
#[repr(align(128))]
struct Line(AtomicU64);

/// Pass a counter back and forth between two threads, pinned to `cpus` when given.
///
/// # Errors
///
/// [`BenchError::NoSuchCpu`] when a thread may not run where it should.
pub fn cacheline(cpus: Option<(usize, usize)>, duration: Duration) -> Result<Latency, BenchError> {
    let clock = Clock::start();
    let (ping, pong) = (Line(AtomicU64::new(0)), Line(AtomicU64::new(0)));
    let over = AtomicBool::new(false);
    scope(|scope| {
        let answering = scope.spawn(|| -> Result<(), BenchError> {
            let pinned = pin(cpus.map(|(_, second)| second));
            let mut seen = 0;
            while pinned.is_ok() && !over.load(Ordering::Relaxed) {
                let now = ping.0.load(Ordering::Acquire);
                if now != seen {
                    seen = now;
                    pong.0.store(now, Ordering::Release);
                }
            }
            over.store(true, Ordering::Relaxed);
            pinned
        });
        let asking = scope.spawn(|| -> Result<Latency, BenchError> {
            let found =
                pin(cpus.map(|(first, _)| first)).map(|()| ask(&clock, &ping.0, &pong.0, &over, duration));
            over.store(true, Ordering::Relaxed);
            found
        });
        let answered = answering.join();
        let asked = asking.join();
        match (asked, answered) {
            (Ok(found), Ok(answered)) => answered.and(found),
            (Err(panic), _) | (_, Err(panic)) => std::panic::resume_unwind(panic),
        }
    })
}

fn ask(clock: &Clock, ping: &AtomicU64, pong: &AtomicU64, over: &AtomicBool, duration: Duration) -> Latency {
    let mut histogram = Histogram::new();
    let cpu = cpu_seconds();
    let started = clock.ticks();
    let until = started + clock.ticks_in(duration);
    let (mut value, mut before) = (0, started);
    while before < until {
        value += 1;
        ping.store(value, Ordering::Release);
        while pong.load(Ordering::Acquire) != value {
            if over.load(Ordering::Relaxed) {
                break;
            }
        }
        let after = clock.ticks();
        histogram.record(after - before);
        before = after;
    }
    let one_way_us =
        |part| histogram.quantile(part).map_or(f64::NAN, |ticks| ticks * clock.nanoseconds(1) / 2e3);
    Latency {
        p50_us: one_way_us(0.5),
        p99_us: one_way_us(0.99),
        round_trips: histogram.count(),
        seconds: clock.seconds(before - started),
        cpu_s: cpu_seconds() - cpu,
    }
}

fn pin(cpu: Option<usize>) -> Result<(), BenchError> {
    let Some(cpu) = cpu else { return Ok(()) };
    let refused = |source: rustix::io::Errno| BenchError::NoSuchCpu { cpu, source: source.into() };
    if cpu >= CpuSet::MAX_CPU {
        return Err(refused(rustix::io::Errno::INVAL));
    }
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_comes_back() {
        let found = cacheline(None, Duration::from_millis(5)).expect("two threads");
        assert!(found.round_trips > 0 && found.p50_us > 0.0);
    }

    #[test]
    fn a_processor_that_is_not_there_is_named() {
        for cpu in [CpuSet::MAX_CPU - 1, CpuSet::MAX_CPU] {
            let error = cacheline(Some((0, cpu)), Duration::from_millis(5)).expect_err("no such processor");
            assert!(error.to_string().contains(&format!("processor {cpu}")), "{error}");
        }
    }
}
