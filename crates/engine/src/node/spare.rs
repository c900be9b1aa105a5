//! A lane made in advance, in a burst of connections, while others have to work.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use isthmus_wire::control::Carrier;

use crate::error::Result;
use crate::lane::Offer;
use crate::lock;

/// Two lanes wanted within this time are a burst, and a third is worth making in advance.
const BURST: Duration = Duration::from_millis(10);
/// A lane that nobody wants for so long is let go.
const IDLE: Duration = Duration::from_millis(100);

/// Which lane: the carrier, and the bytes of the small and the large ring.
pub(super) type Shape = (Carrier, u32, u32);

fn shape_of(offer: &Offer) -> Shape {
    (offer.carrier, offer.small, offer.large)
}

#[derive(Default)]
pub(super) struct Spare(Mutex<State>);

#[derive(Default)]
struct State {
    offer: Option<Offer>,
    /// When a lane was last wanted, and whether that was in a burst.
    wanted: Option<Instant>,
    burst: bool,
}

impl Spare {
    /// A lane: the spare one if it is of this shape, or a new one.
    ///
    /// # Errors
    /// As [`Offer::new`].
    pub(super) fn take(&self, shape: Shape) -> Result<Offer> {
        let spare = {
            let mut state = lock(&self.0);
            let before = state.wanted.replace(Instant::now());
            state.burst = before.is_some_and(|before| before.elapsed() < BURST);
            state.offer.take_if(|offer| shape_of(offer) == shape)
        };
        let (carrier, small, large) = shape;
        spare.map_or_else(|| Offer::new(carrier, small, large), Ok)
    }

    /// In a burst, make the next lane. Call when there is nothing to do but wait.
    pub(super) fn prepare(&self, shape: Shape) {
        let wanted =
            |state: &State| state.burst && state.offer.as_ref().is_none_or(|offer| shape_of(offer) != shape);
        if !wanted(&lock(&self.0)) {
            return;
        }
        // Not under the lock: a fork would copy it locked.
        let (carrier, small, large) = shape;
        let offer = Offer::new(carrier, small, large).ok();
        let mut state = lock(&self.0);
        if wanted(&state) {
            state.offer = offer;
        }
    }

    /// How long until [`Spare::let_go`] should be called, if it should.
    pub(super) fn left(&self) -> Option<Duration> {
        let state = lock(&self.0);
        // A burst counts before its lane is made: whoever makes it may still be at it.
        let wanted = state.wanted.filter(|_| state.burst || state.offer.is_some())?;
        Some(IDLE.saturating_sub(wanted.elapsed()))
    }

    /// Give the memory back if nobody wanted it for a while.
    pub(super) fn let_go(&self) {
        let mut state = lock(&self.0);
        if state.wanted.is_some_and(|wanted| wanted.elapsed() >= IDLE) {
            *state = State::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    const SHAPE: Shape = (Carrier::Sealed, 8192, 0);

    fn descriptor(offer: &Offer) -> i32 {
        offer.descriptors()[0].as_raw_fd()
    }

    #[test]
    fn a_burst_has_its_lanes_made_in_advance_and_lets_the_last_one_go() {
        let spare = Spare::default();
        let first = spare.take(SHAPE).expect("memory");
        spare.prepare(SHAPE);
        assert!(spare.left().is_none() && lock(&spare.0).offer.is_none(), "one lane is no burst");
        let second = spare.take(SHAPE).expect("memory");
        spare.prepare(SHAPE);
        let made = lock(&spare.0).offer.as_ref().map(descriptor).expect("a lane made in advance");
        assert!(spare.left().is_some_and(|left| left <= IDLE));
        let third = spare.take(SHAPE).expect("memory");
        assert_eq!(descriptor(&third), made);
        spare.prepare(SHAPE);
        spare.let_go();
        assert!(lock(&spare.0).offer.is_some(), "not before its time");
        std::thread::sleep(IDLE);
        spare.let_go();
        assert!(lock(&spare.0).offer.is_none() && spare.left().is_none());
        drop((first, second));
    }

    #[test]
    fn a_lane_of_another_shape_is_made_anew() {
        let spare = Spare::default();
        for _ in 0..2 {
            drop(spare.take(SHAPE).expect("memory"));
        }
        spare.prepare(SHAPE);
        let other = spare.take((Carrier::Put, 4096, 0)).expect("memory");
        assert_eq!((other.carrier, other.small), (Carrier::Put, 4096));
    }
}
