//! Which receive gets which message.
//!
//! A receive names a value of 64 bits and a mask; it takes the oldest message whose value is the same where the mask has
//! ones. A message goes to the receive that was posted first of those that take it. What nobody has posted a receive for
//! is *unexpected* and waits.
//!
//! A program may set some bits of the values apart as *context ids*: messages of different contexts have queues of their
//! own, so that a long queue of one slows no other down. Receives name their context in full.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::vec::Vec;

/// Widest field of context ids, bits.
pub const CONTEXT_BITS_MAX: u8 = 16;

/// Where the context id lies in a value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Contexts {
    bits: u8,
    shift: u8,
}

impl Contexts {
    /// `None`: wider than [`CONTEXT_BITS_MAX`], or beyond the value's end.
    #[must_use]
    pub fn new(bits: u8, shift: u8) -> Option<Self> {
        (bits <= CONTEXT_BITS_MAX && bits.checked_add(shift)? <= 64).then_some(Self { bits, shift })
    }

    fn mask(self) -> u64 {
        ((1u64 << self.bits) - 1).checked_shl(self.shift.into()).unwrap_or(0)
    }

    fn of(self, value: u64) -> u16 {
        (value & self.mask()).checked_shr(self.shift.into()).unwrap_or(0) as u16
    }
}

/// What a receive or a probe wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pattern {
    pub value: u64,
    pub mask: u64,
}

impl Pattern {
    #[must_use]
    pub fn takes(self, value: u64) -> bool {
        value & self.mask == self.value
    }
}

/// Why a pattern is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadPattern {
    /// The value has ones where the mask has none, so nothing could ever match.
    OutsideMask,
    /// The mask leaves the context open.
    OpenContext,
}

/// What became of a receive that was posted.
#[derive(Debug, PartialEq, Eq)]
pub enum Posted<R, M> {
    Waits,
    /// A message was there already.
    Meets(R, M),
}

struct Queue<R, M> {
    posted: VecDeque<(Pattern, R)>,
    /// With the values and the serial numbers of the messages.
    unexpected: VecDeque<(u64, u64, M)>,
}

impl<R, M> Default for Queue<R, M> {
    fn default() -> Self {
        Self { posted: VecDeque::new(), unexpected: VecDeque::new() }
    }
}

impl<R, M> Queue<R, M> {
    fn is_empty(&self) -> bool {
        self.posted.is_empty() && self.unexpected.is_empty()
    }
}

/// The posted receives `R` and the unexpected messages `M` of one endpoint.
pub struct Matching<R, M> {
    contexts: Contexts,
    queues: Queues<R, M>,
    last: u64,
}

/// By context id. That of 0 is always there, because most programs have no other; others are not when they are empty.
struct Queues<R, M> {
    zero: Queue<R, M>,
    others: BTreeMap<u16, Queue<R, M>>,
}

impl<R, M> Queues<R, M> {
    #[inline]
    fn get(&self, context: u16) -> Option<&Queue<R, M>> {
        if context == 0 { Some(&self.zero) } else { self.others.get(&context) }
    }

    #[inline]
    fn get_mut(&mut self, context: u16) -> Option<&mut Queue<R, M>> {
        if context == 0 { Some(&mut self.zero) } else { self.others.get_mut(&context) }
    }

    #[inline]
    fn entry(&mut self, context: u16) -> &mut Queue<R, M> {
        if context == 0 { &mut self.zero } else { self.others.entry(context).or_default() }
    }

    fn values(&self) -> impl Iterator<Item = &Queue<R, M>> {
        core::iter::once(&self.zero).chain(self.others.values())
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = (u16, &mut Queue<R, M>)> {
        let others = self.others.iter_mut().map(|(context, queue)| (*context, queue));
        core::iter::once((0, &mut self.zero)).chain(others)
    }

    /// Forget what is empty.
    #[inline]
    fn tidy(&mut self, context: u16) {
        if context != 0 && self.others.get(&context).is_some_and(Queue::is_empty) {
            self.others.remove(&context);
        }
    }
}

impl<R, M> Matching<R, M> {
    #[must_use]
    pub fn new(contexts: Contexts) -> Self {
        let queues = Queues { zero: Queue::default(), others: BTreeMap::new() };
        Self { contexts, queues, last: 0 }
    }

    /// A receive: it meets the oldest unexpected message that it takes, or waits behind those posted before.
    ///
    /// # Errors
    /// The pattern is none; nothing was posted.
    pub fn post(&mut self, pattern: Pattern, receive: R) -> Result<Posted<R, M>, BadPattern> {
        if pattern.value & !pattern.mask != 0 {
            return Err(BadPattern::OutsideMask);
        }
        if self.contexts.mask() & !pattern.mask != 0 {
            return Err(BadPattern::OpenContext);
        }
        let context = self.contexts.of(pattern.value);
        let queue = self.queues.entry(context);
        let found = queue.unexpected.iter().position(|(value, _, _)| pattern.takes(*value));
        let Some((_, _, message)) = found.and_then(|at| queue.unexpected.remove(at)) else {
            queue.posted.push_back((pattern, receive));
            return Ok(Posted::Waits);
        };
        self.queues.tidy(context);
        Ok(Posted::Meets(receive, message))
    }

    /// A message has come: the receive that gets it. `None`: nobody waits for it; [`Matching::keep`] it, or do not.
    #[inline]
    pub fn arrive(&mut self, value: u64) -> Option<R> {
        let context = self.contexts.of(value);
        let queue = self.queues.get_mut(context)?;
        let at = queue.posted.iter().position(|(pattern, _)| pattern.takes(value))?;
        let (_, receive) = queue.posted.remove(at)?;
        self.queues.tidy(context);
        Some(receive)
    }

    /// Does a posted receive take such a message?
    #[must_use]
    pub fn awaits(&self, value: u64) -> bool {
        let queue = self.queues.get(self.contexts.of(value));
        queue.is_some_and(|queue| queue.posted.iter().any(|(pattern, _)| pattern.takes(value)))
    }

    /// A message that nobody waits for waits itself, behind those that came before.
    pub fn keep(&mut self, value: u64, message: M) {
        self.last += 1;
        let queue = self.queues.entry(self.contexts.of(value));
        queue.unexpected.push_back((value, self.last, message));
    }

    /// The oldest unexpected message that a pattern takes, which may span contexts. It stays where it is.
    #[must_use]
    pub fn probe(&self, pattern: Pattern) -> Option<&M> {
        let oldest = |queue| -> Option<&(u64, u64, M)> {
            let queue: &Queue<R, M> = queue;
            queue.unexpected.iter().find(|(value, _, _)| pattern.takes(*value))
        };
        if self.contexts.mask() & !pattern.mask == 0 {
            let queue = self.queues.get(self.contexts.of(pattern.value))?;
            return oldest(queue).map(|(_, _, message)| message);
        }
        let all = self.queues.values().filter_map(oldest);
        all.min_by_key(|(_, serial, _)| *serial).map(|(_, _, message)| message)
    }

    /// Take back a receive that nothing has met yet.
    pub fn cancel(&mut self, is_meant: impl Fn(&R) -> bool) -> Option<R> {
        let found = self.queues.iter_mut().find_map(|(context, queue)| {
            let at = queue.posted.iter().position(|(_, receive)| is_meant(receive))?;
            Some((context, queue.posted.remove(at)?))
        });
        let (context, (_, receive)) = found?;
        self.queues.tidy(context);
        Some(receive)
    }

    /// Throw unexpected messages away, such as those of a peer that is gone. In the order in which they came.
    pub fn forget(&mut self, is_meant: impl Fn(&M) -> bool) -> Vec<M> {
        let mut gone = Vec::new();
        for (_, queue) in self.queues.iter_mut() {
            for (value, serial, message) in core::mem::take(&mut queue.unexpected) {
                if is_meant(&message) {
                    gone.push((serial, message));
                } else {
                    queue.unexpected.push_back((value, serial, message));
                }
            }
        }
        self.queues.others.retain(|_, queue| !queue.is_empty());
        gone.sort_unstable_by_key(|(serial, _)| *serial);
        gone.into_iter().map(|(_, message)| message).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u64 = u64::MAX;

    fn exactly(value: u64) -> Pattern {
        Pattern { value, mask: ALL }
    }

    #[test]
    fn messages_and_receives_meet_in_order() {
        let mut matching = Matching::new(Contexts::default());
        assert_eq!(matching.arrive(7), None::<&str>);
        matching.keep(7, "first");
        matching.keep(7, "second");
        assert_eq!(matching.post(exactly(7), "a"), Ok(Posted::Meets("a", "first")));
        assert_eq!(matching.post(exactly(8), "b"), Ok(Posted::Waits));
        assert_eq!(matching.post(Pattern { value: 0, mask: 0 }, "c"), Ok(Posted::Meets("c", "second")));
        assert_eq!(matching.post(Pattern { value: 0, mask: 0 }, "d"), Ok(Posted::Waits));
        assert_eq!(
            (matching.arrive(8), matching.arrive(8), matching.arrive(8)),
            (Some("b"), Some("d"), None)
        );
    }

    #[test]
    fn patterns_that_are_none_are_refused() {
        let contexts = Contexts::new(8, 56).expect("the upper byte");
        let mut matching: Matching<u8, ()> = Matching::new(contexts);
        let outside = Pattern { value: 1 << 56 | 1, mask: 0xFF << 56 };
        assert_eq!(matching.post(outside, 1), Err(BadPattern::OutsideMask));
        assert_eq!(matching.post(Pattern { value: 1, mask: 1 }, 1), Err(BadPattern::OpenContext));
        assert_eq!(matching.arrive(1), None);
        assert_eq!((Contexts::new(17, 0), Contexts::new(16, 49), Contexts::new(1, 255)), (None, None, None));
        assert!(Contexts::new(16, 48).is_some() && Contexts::new(0, 64).is_some());
    }

    #[test]
    fn a_probe_may_span_contexts_and_takes_nothing() {
        let mut matching: Matching<(), u8> = Matching::new(Contexts::new(4, 60).expect("four bits"));
        matching.keep(2 << 60 | 5, 1);
        matching.keep(1 << 60 | 5, 2);
        let any = Pattern { value: 5, mask: 0xFF };
        assert_eq!((matching.probe(any), matching.probe(any)), (Some(&1), Some(&1)));
        assert_eq!(matching.probe(exactly(1 << 60 | 5)), Some(&2));
        assert_eq!(matching.probe(exactly(3 << 60 | 5)), None);
    }

    #[test]
    fn what_is_taken_back_or_forgotten_is_gone() {
        let mut matching = Matching::new(Contexts::new(4, 60).expect("four bits"));
        assert_eq!(matching.post(exactly(9), 'r'), Ok(Posted::Waits));
        assert_eq!((matching.cancel(|r| *r == 'x'), matching.cancel(|r| *r == 'r')), (None, Some('r')));
        assert_eq!(matching.arrive(9), None);
        for n in [3u64, 1, 2, 1] {
            matching.keep(n << 60, n);
        }
        assert_eq!(matching.forget(|n| *n != 1), [3, 2]);
        assert_eq!(matching.forget(|_| true), [1, 1]);
        assert!(matching.queues.others.is_empty() && matching.queues.zero.is_empty());
    }

    /// Without contexts: two lists, looked through from the front.
    #[derive(Default)]
    struct Naive {
        posted: Vec<(Pattern, usize)>,
        unexpected: Vec<(u64, usize)>,
    }

    proptest! {
        #[test]
        fn contexts_change_nothing_but_speed(
            bits in 0..3u8,
            steps in prop::collection::vec((0..4u8, 0..16u64, 0..16u64), 0..200),
        ) {
            // Small numbers, so that they meet: two bits of context, two of tag.
            let contexts = Contexts::new(bits, 2).expect("narrow");
            let (mut matching, mut naive) = (Matching::new(contexts), Naive::default());
            for (n, (what, value, mask)) in steps.into_iter().enumerate() {
                let mask = mask | contexts.mask();
                let pattern = Pattern { value: value & mask, mask };
                match what {
                    0 => {
                        let at = naive.unexpected.iter().position(|(value, _)| pattern.takes(*value));
                        let expected = match at.map(|at| naive.unexpected.remove(at)) {
                            Some((_, message)) => Posted::Meets(n, message),
                            None => {
                                naive.posted.push((pattern, n));
                                Posted::Waits
                            }
                        };
                        prop_assert_eq!(matching.post(pattern, n), Ok(expected));
                    }
                    1 | 2 => {
                        let at = naive.posted.iter().position(|(pattern, _)| pattern.takes(value));
                        let expected = at.map(|at| naive.posted.remove(at).1);
                        prop_assert_eq!(matching.arrive(value), expected);
                        if expected.is_none() {
                            naive.unexpected.push((value, n));
                            matching.keep(value, n);
                        }
                    }
                    _ => {
                        let open = Pattern { value: value & mask & 3, mask: mask & 3 };
                        for pattern in [pattern, open] {
                            let found = naive.unexpected.iter().find(|(value, _)| pattern.takes(*value));
                            prop_assert_eq!(matching.probe(pattern), found.map(|(_, n)| n));
                        }
                    }
                }
            }
        }
    }
}
