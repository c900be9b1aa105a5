//! Processor time of the switch, by the domain it was spent for.
//!
//! A clock that knows only this thread's time is a system call, so each piece of work is timed by the clock on the
//! wall, which is not, and once a second the thread's own time is shared out in the proportions that gives.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// Between two times of sharing out.
const PERIOD: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Spent {
    /// Of the wall's clock, since the last time.
    lately: Duration,
    /// Of this thread, in all.
    cpu: Duration,
}

impl Spent {
    fn cpu_us(&self) -> u64 {
        u64::try_from(self.cpu.as_micros()).unwrap_or(u64::MAX)
    }
}

pub struct Account {
    domains: HashMap<u32, Spent>,
    shared_out: Instant,
    cpu: Duration,
}

fn thread_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

impl Account {
    #[must_use]
    pub fn new() -> Self {
        Self { domains: HashMap::new(), shared_out: Instant::now(), cpu: Duration::ZERO }
    }

    /// Something was done for a domain, from `since` until now. Returns now.
    pub fn note(&mut self, domain: u32, since: Instant) -> Instant {
        let now = Instant::now();
        self.domains.entry(domain).or_default().lately += now - since;
        now
    }

    /// What was spent for a domain in all, microseconds.
    #[must_use]
    pub fn spent(&self, domain: u32) -> u64 {
        self.domains.get(&domain).map_or(0, Spent::cpu_us)
    }

    /// This domain is no more.
    pub fn forget(&mut self, domain: u32) {
        self.domains.remove(&domain);
    }

    /// Once a second: the domains for which something was done since the last time, and what was spent for each in
    /// all, microseconds.
    pub fn share_out(&mut self, now: Instant) -> Vec<(u32, u64)> {
        if now.duration_since(self.shared_out) < PERIOD {
            return Vec::new();
        }
        self.shared_out = now;
        let cpu = thread_time();
        let lately = cpu.saturating_sub(std::mem::replace(&mut self.cpu, cpu));
        self.divide(lately)
    }

    fn divide(&mut self, cpu: Duration) -> Vec<(u32, u64)> {
        let whole: Duration = self.domains.values().map(|spent| spent.lately).sum();
        let mut changed = Vec::new();
        for (domain, spent) in &mut self.domains {
            if !spent.lately.is_zero() {
                let share = spent.lately.as_secs_f64() / whole.as_secs_f64();
                spent.cpu += cpu.mul_f64(share);
                spent.lately = Duration::ZERO;
                changed.push((*domain, spent.cpu_us()));
            }
        }
        changed.sort_unstable();
        changed
    }
}

impl Default for Account {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_thread_used_is_shared_out_as_the_work_was() {
        let mut account = Account::new();
        for (domain, ms) in [(3, 30), (4, 10), (5, 0)] {
            account.domains.entry(domain).or_default().lately = Duration::from_millis(ms);
        }
        assert_eq!(account.divide(Duration::from_millis(20)), [(3, 15_000), (4, 5_000)]);
        assert_eq!(account.divide(Duration::from_millis(20)), []);
        account.domains.entry(4).or_default().lately = Duration::from_millis(1);
        account.forget(3);
        assert_eq!(account.divide(Duration::from_millis(2)), [(4, 7_000)]);
    }

    #[test]
    fn time_is_shared_out_once_a_second() {
        let mut account = Account::new();
        let began = Instant::now();
        while account.note(3, began).duration_since(began) < Duration::from_millis(5) {}
        assert_eq!(account.share_out(began), []);
        let told = account.share_out(began + PERIOD);
        assert!(matches!(told[..], [(3, us)] if us > 0), "{told:?}");
    }
}
