//! How long to spin before sleeping.
//!
//! Waking a sleeper on another core costs 16 to 25 µs on the machines we know, a cache line 0.07:
//! spinning a little pays when the answer is near, and is pure loss when the peer cannot run
//! meanwhile. So the budget follows success: it doubles with every wait that ended while spinning
//! and halves with every one that did not, down to nothing, and is nothing at once when the peer
//! shares our processor or more tasks want to run than there are processors.

/// With a budget of 0, every so many waits one tries [`Limits::probe_ns`], or nothing would ever be learnt.
pub const PROBE_EVERY: u32 = 16;

/// What a budget may be, ns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The first one.
    pub start_ns: u32,
    /// The largest: a few times what a wake-up costs.
    pub max_ns: u32,
    /// The smallest worth having. Below it, 0.
    pub min_ns: u32,
    /// What is tried when it has been 0 for a while, and the budget when that paid.
    pub probe_ns: u32,
}

/// Between processes of one kernel.
pub const LOCAL: Limits = Limits { start_ns: 20_000, max_ns: 50_000, min_ns: 5_000, probe_ns: 5_000 };
/// In a guest a wake-up goes through two kernels and costs 75 to 150 µs. Two guests that both sleep answer each other
/// in twice that, which a probe must outlast, or they would never be awake together again.
pub const GUEST: Limits = Limits { start_ns: 640_000, max_ns: 1_600_000, min_ns: 160_000, probe_ns: 640_000 };

/// What is known about the machine when a wait begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Situation {
    /// The peer last waited on the processor we run on.
    pub same_processor: bool,
    /// More tasks want to run than there are processors.
    pub crowded: bool,
}

/// The budget of one waiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spin {
    budget_ns: u32,
    waits: u32,
    limits: Limits,
}

impl Spin {
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { budget_ns: limits.start_ns, waits: 0, limits }
    }

    /// How long to spin now, ns.
    pub fn budget_ns(&mut self, situation: Situation) -> u32 {
        if situation.same_processor || situation.crowded {
            return 0;
        }
        if self.budget_ns == 0 {
            self.waits = self.waits.wrapping_add(1);
            return if self.waits % PROBE_EVERY == 0 { self.limits.probe_ns } else { 0 };
        }
        self.budget_ns
    }

    /// What was waited for came while spinning.
    pub fn hit(&mut self) {
        let more = if self.budget_ns == 0 { self.limits.probe_ns } else { self.budget_ns.saturating_mul(2) };
        self.budget_ns = more.min(self.limits.max_ns);
    }

    /// It did not.
    pub fn miss(&mut self) {
        self.budget_ns /= 2;
        if self.budget_ns < self.limits.min_ns {
            self.budget_ns = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FREE: Situation = Situation { same_processor: false, crowded: false };

    #[test]
    fn a_peer_on_our_processor_or_a_crowd_means_no_spinning() {
        let mut spin = Spin::new(LOCAL);
        assert_eq!(spin.budget_ns(FREE), LOCAL.start_ns);
        assert_eq!(spin.budget_ns(Situation { same_processor: true, ..FREE }), 0);
        assert_eq!(spin.budget_ns(Situation { crowded: true, ..FREE }), 0);
    }

    #[test]
    fn spinning_in_vain_fades_and_is_tried_again_now_and_then() {
        for limits in [LOCAL, GUEST] {
            let mut spin = Spin::new(limits);
            while spin.budget_ns(FREE) > 0 {
                spin.miss();
            }
            let tries: u32 = (0..PROBE_EVERY * 10).map(|_| u32::from(spin.budget_ns(FREE) > 0)).sum();
            assert_eq!(tries, 10);
            spin.hit();
            assert_eq!(spin.budget_ns(FREE), limits.probe_ns);
            for _ in 0..10 {
                spin.hit();
            }
            assert_eq!(spin.budget_ns(FREE), limits.max_ns);
        }
    }
}
