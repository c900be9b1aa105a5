//! How fast one core can copy: no transport that copies once moves more.

use std::{hint::black_box, time::Duration};

use crate::{
    buffer::{Data, Pages, Walk},
    clock::{Clock, cpu_seconds},
    copy::Copy,
    error::BenchError,
    loops::Throughput,
};

/// Copy messages of `size` from one private buffer to another for `duration`, in one thread.
///
/// # Errors
///
/// [`BenchError`] for a size of 0, or when there is no memory.
pub fn memcpy(
    size: usize,
    duration: Duration,
    pages: Pages,
    data: Data,
    copy: Copy,
) -> Result<Throughput, BenchError> {
    let clock = Clock::start();
    let mut from = Walk::filled(size, pages, data)?;
    let mut to = Walk::new(size, pages, data)?;
    let burst = (256 * 1024 / size).clamp(1, 1024) as u64;
    let mut copy_one = || {
        let (from, to) = (from.step(), to.step());
        // SAFETY: both are `size` bytes, and they belong to two different mappings.
        unsafe { copy.run(from.as_ptr(), to.as_mut_ptr(), size) };
        black_box(to);
    };
    for _ in 0..burst {
        copy_one();
    }
    let cpu = cpu_seconds();
    let started = clock.ticks();
    let until = started + clock.ticks_in(duration);
    let mut messages = 0;
    let mut now = started;
    while now < until {
        for _ in 0..burst {
            copy_one();
        }
        messages += burst;
        now = clock.ticks();
    }
    let bytes = messages * size as u64;
    let seconds = clock.seconds((now - started).max(1));
    Ok(Throughput { messages, bytes, seconds, cpu_s: cpu_seconds() - cpu, total_bytes: bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_of_copying_gives_a_figure() {
        for copy in Copy::ALL {
            let found =
                memcpy(4096, Duration::from_millis(2), Pages::Small, Data::Hot, copy).expect("memory");
            assert!(found.bytes >= 4096 && found.seconds > 0.0);
        }
    }
}
