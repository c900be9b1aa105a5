//! Who is served next: strict classes, within a class by the weight of its tenants, within a tenant in turn; and
//! nobody faster than its rate.
//!
//! Pure: the owner says what has become ready and what it cost, and hands in the time. Tenants of one class share by
//! deficit round robin: each round a tenant may use so many bytes as its weight says, and what it used more is taken
//! off its next round. A rate is a bucket of bytes that fills with time; what is over its rate waits aside.

extern crate alloc;

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

/// Classes 0 to 7; 7 is served first.
pub const CLASSES: usize = 8;
/// The weight of a tenant for which no rule names one.
pub const WEIGHT_DEFAULT: u16 = 100;
/// Bytes that one service may take: what somebody of a higher class waits for at most.
pub const QUANTUM: usize = 128 * 1024;
/// Bytes that a tenant of weight 1 may use in a round; one of the usual weight may use a whole quantum.
const ROUND: i64 = (QUANTUM / WEIGHT_DEFAULT as usize) as i64;
/// How long a bucket that was idle may have filled, µs.
const BURST_US: u64 = 10_000;

/// How something is to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Below [`CLASSES`]; more is taken for the highest.
    pub class: u8,
    /// At least 1.
    pub weight: u16,
    /// Bytes a second; 0: no limit.
    pub rate: u64,
}

impl Default for Terms {
    fn default() -> Self {
        Self { class: 0, weight: WEIGHT_DEFAULT, rate: 0 }
    }
}

/// Bytes that may still be sent at some rate.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bucket {
    /// Negative: more was sent than it held.
    level: i64,
    filled_us: u64,
}

impl Bucket {
    /// May something be sent now? If not, when.
    pub fn ready(&mut self, rate: u64, now_us: u64) -> Result<(), u64> {
        if rate == 0 {
            return Ok(());
        }
        let elapsed = now_us.saturating_sub(self.filled_us).min(1_000_000);
        self.filled_us = now_us;
        let most = i64::try_from(rate / 1_000_000 * BURST_US + rate % 1_000_000 * BURST_US / 1_000_000)
            .unwrap_or(i64::MAX)
            .max(QUANTUM as i64);
        let more = i64::try_from(u128::from(rate) * u128::from(elapsed) / 1_000_000).unwrap_or(i64::MAX);
        self.level = self.level.saturating_add(more).min(most);
        if self.level > 0 {
            return Ok(());
        }
        let missing = u128::from(self.level.unsigned_abs()) + 1;
        let wait = (missing * 1_000_000).div_ceil(u128::from(rate));
        Err(now_us.saturating_add(u64::try_from(wait).unwrap_or(u64::MAX)))
    }

    /// Something was sent.
    pub fn take(&mut self, bytes: usize) {
        self.level = self.level.saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
}

#[derive(Debug, Default)]
struct Tenant {
    weight: u16,
    /// What it may still use in this round.
    deficit: i64,
    items: VecDeque<u64>,
}

#[derive(Debug, Default)]
struct Class {
    tenants: BTreeMap<u32, Tenant>,
    /// Tenants that have items, in the order of their turns.
    round: VecDeque<u32>,
    /// Who was served last: if it is ready again at once, its turn goes on while its round lasts.
    current: Option<u32>,
}

/// What is ready, and in which order it is served. An item is in it once or not at all: that is the owner's to know.
#[derive(Debug, Default)]
pub struct Scheduler {
    classes: [Class; CLASSES],
    len: usize,
}

impl Scheduler {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `item` of a tenant is ready.
    pub fn push(&mut self, tenant: u32, terms: Terms, item: u64) {
        let class = &mut self.classes[usize::from(terms.class).min(CLASSES - 1)];
        let entry = class.tenants.entry(tenant).or_default();
        entry.weight = terms.weight.max(1);
        if entry.items.is_empty() {
            if class.current == Some(tenant) && entry.deficit > 0 {
                class.round.push_front(tenant);
            } else {
                class.round.push_back(tenant);
            }
        }
        entry.items.push_back(item);
        self.len += 1;
    }

    /// Who is next: the item, its tenant and its class, for [`Scheduler::charge`].
    pub fn pop(&mut self) -> Option<(u64, u32, usize)> {
        let number = self.classes.iter().rposition(|class| !class.round.is_empty())?;
        let class = &mut self.classes[number];
        loop {
            let tenant = *class.round.front()?;
            let Some(entry) = class.tenants.get_mut(&tenant) else {
                class.round.pop_front();
                continue;
            };
            if entry.deficit <= 0 {
                // Its round is over; the next one begins behind the others.
                entry.deficit += ROUND * i64::from(entry.weight);
                class.round.rotate_left(1);
                continue;
            }
            if let Some(before) = class.current.replace(tenant).filter(|before| *before != tenant) {
                // Nothing is saved up while there is nothing to do.
                if class
                    .tenants
                    .get(&before)
                    .is_some_and(|other| other.items.is_empty() && other.deficit >= 0)
                {
                    class.tenants.remove(&before);
                }
            }
            let Some(entry) = class.tenants.get_mut(&tenant) else { continue };
            let item = entry.items.pop_front();
            if entry.items.is_empty() {
                class.round.pop_front();
            }
            let Some(item) = item else { continue };
            self.len -= 1;
            return Some((item, tenant, number));
        }
    }

    /// What the last service of a tenant took.
    pub fn charge(&mut self, tenant: u32, class: usize, bytes: usize) {
        let Some(class) = self.classes.get_mut(class) else { return };
        let Some(entry) = class.tenants.get_mut(&tenant) else { return };
        let round = ROUND * i64::from(entry.weight);
        // Nobody owes more than a few rounds, whatever it was served at once.
        entry.deficit = (entry.deficit - i64::try_from(bytes).unwrap_or(i64::MAX)).max(-16 * round);
    }

    /// Forget a tenant and what it has ready.
    pub fn remove(&mut self, tenant: u32) -> Vec<u64> {
        let mut gone = Vec::new();
        for class in &mut self.classes {
            if let Some(entry) = class.tenants.remove(&tenant) {
                self.len -= entry.items.len();
                gone.extend(entry.items);
                class.round.retain(|other| *other != tenant);
            }
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn terms(class: u8, weight: u16) -> Terms {
        Terms { class, weight, rate: 0 }
    }

    /// Serve tenants that always have one item ready, and count what each got.
    fn served(tenants: &[(u32, Terms, usize)], services: usize) -> BTreeMap<u32, usize> {
        let mut sched = Scheduler::default();
        for (tenant, terms, _) in tenants {
            sched.push(*tenant, *terms, u64::from(*tenant));
        }
        let mut got = BTreeMap::new();
        for _ in 0..services {
            let (item, tenant, class) = sched.pop().expect("somebody is ready");
            assert_eq!(item, u64::from(tenant));
            let (_, terms, bytes) = tenants.iter().find(|t| t.0 == tenant).expect("known");
            *got.entry(tenant).or_default() += bytes;
            sched.charge(tenant, class, *bytes);
            sched.push(tenant, *terms, item);
        }
        got
    }

    #[test]
    fn a_higher_class_is_served_first_and_alone() {
        let got = served(&[(1, terms(0, 100), 1000), (2, terms(7, 1), 1000)], 100);
        assert_eq!(got.get(&1), None);
    }

    #[test]
    fn tenants_share_by_weight_whatever_the_size_of_their_pieces() {
        let got = served(&[(1, terms(3, 100), QUANTUM), (2, terms(3, 300), 5000)], 20_000);
        let ratio = got[&2] as f64 / got[&1] as f64;
        assert!((2.7..3.3).contains(&ratio), "{got:?}");
    }

    #[test]
    fn many_items_of_one_tenant_are_one_share() {
        let mut sched = Scheduler::default();
        for item in 0..50 {
            sched.push(1, terms(0, 100), item);
        }
        sched.push(2, terms(0, 100), 99);
        let mut before = 0;
        while let Some((item, tenant, class)) = sched.pop() {
            sched.charge(tenant, class, QUANTUM);
            if item == 99 {
                break;
            }
            before += 1;
        }
        assert!(before <= 2, "{before}");
    }

    #[test]
    fn a_rate_is_kept_over_time() {
        let (rate, mut now, mut sent) = (10_000_000u64, 0u64, 0u64);
        let mut bucket = Bucket::default();
        while now < 5_000_000 {
            match bucket.ready(rate, now) {
                Ok(()) => {
                    bucket.take(50_000);
                    sent += 50_000;
                }
                Err(at) => {
                    assert!(at > now);
                    now = at;
                }
            }
        }
        assert!((48_000_000..52_500_000).contains(&sent), "{sent}");
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_nothing_is_served_twice(
            pushes in proptest::collection::vec((0u32..5, 0u8..10, 0u16..2000, 0usize..1_000_000), 1..200)
        ) {
            let mut sched = Scheduler::default();
            for (item, (tenant, class, weight, _)) in pushes.iter().enumerate() {
                sched.push(*tenant, terms(*class, *weight), item as u64);
            }
            let mut seen = alloc::collections::BTreeSet::new();
            while let Some((item, tenant, class)) = sched.pop() {
                prop_assert!(seen.insert(item));
                let (of, _, _, bytes) = pushes[item as usize];
                prop_assert_eq!(of, tenant);
                sched.charge(tenant, class, bytes);
            }
            prop_assert_eq!(seen.len(), pushes.len());
            prop_assert!(sched.is_empty());
        }
    }
}
