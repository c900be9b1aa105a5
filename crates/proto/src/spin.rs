//! How long to spin before sleeping.
//!
//! Waking a sleeper on another core costs 16 to 25 µs on the machines we know, a cache line 0.07:
//! spinning a little pays when the answer is near, and is pure loss when the peer cannot run
//! meanwhile. So the budget follows success: it doubles with every wait that ended while spinning
//! and halves with every one that did not, down to nothing, and is nothing at once when the peer
//! shares our processor or more tasks want to run than there are processors.

/// First budget, ns.
pub const START_NS: u32 = 20_000;
/// Largest budget, ns: a few times what a wake-up costs.
pub const MAX_NS: u32 = 50_000;
/// Smallest budget worth having, ns. Below it, 0.
pub const MIN_NS: u32 = 5_000;
/// With a budget of 0, every so many waits one tries [`MIN_NS`], or nothing would ever be learnt.
pub const PROBE_EVERY: u32 = 16;

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
    /// All limits are so many times what they are between processes of one kernel.
    scale: u32,
}

/// In a guest a wake-up goes through two kernels and costs 75 to 150 µs.
pub const GUEST_SCALE: u32 = 6;

impl Default for Spin {
    fn default() -> Self {
        Self::scaled(1)
    }
}

impl Spin {
    /// A waiter whose wake-ups cost `scale` times as much.
    #[must_use]
    pub fn scaled(scale: u32) -> Self {
        Self { budget_ns: START_NS.saturating_mul(scale), waits: 0, scale }
    }

    /// How long to spin now, ns.
    pub fn budget_ns(&mut self, situation: Situation) -> u32 {
        if situation.same_processor || situation.crowded {
            return 0;
        }
        if self.budget_ns == 0 {
            self.waits = self.waits.wrapping_add(1);
            return if self.waits % PROBE_EVERY == 0 { self.min() } else { 0 };
        }
        self.budget_ns
    }

    /// What was waited for came while spinning.
    pub fn hit(&mut self) {
        let max = MAX_NS.saturating_mul(self.scale);
        self.budget_ns = self.budget_ns.saturating_mul(2).clamp(self.min(), max);
    }

    /// The peer runs on no processor of this kernel: we are in a guest.
    #[must_use]
    pub fn peer_is_elsewhere(&self) -> bool {
        self.scale > 1
    }

    fn min(&self) -> u32 {
        MIN_NS.saturating_mul(self.scale)
    }

    /// It did not.
    pub fn miss(&mut self) {
        self.budget_ns /= 2;
        if self.budget_ns < self.min() {
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
        let mut spin = Spin::default();
        assert_eq!(spin.budget_ns(FREE), START_NS);
        assert_eq!(spin.budget_ns(Situation { same_processor: true, ..FREE }), 0);
        assert_eq!(spin.budget_ns(Situation { crowded: true, ..FREE }), 0);
    }

    #[test]
    fn spinning_in_vain_fades_and_is_tried_again_now_and_then() {
        let mut spin = Spin::default();
        while spin.budget_ns(FREE) > 0 {
            spin.miss();
        }
        let tries: u32 = (0..PROBE_EVERY * 10).map(|_| u32::from(spin.budget_ns(FREE) > 0)).sum();
        assert_eq!(tries, 10);
        spin.hit();
        assert_eq!(spin.budget_ns(FREE), MIN_NS);
        for _ in 0..10 {
            spin.hit();
        }
        assert_eq!(spin.budget_ns(FREE), MAX_NS);
    }
}
