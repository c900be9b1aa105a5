//! Sequence numbers of 14 bits, with two bits of *partner session* above them.

const BITS: u32 = 14;
const MASK: u16 = (1 << BITS) - 1;

/// Increments never reach the session, and the session never takes part in a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sequence(u16);

impl Sequence {
    /// The first message of a connection.
    pub fn first(session: u8) -> Self {
        Self(u16::from(session & 3) << BITS | 1)
    }

    pub fn from_bits(bits: u16) -> Self {
        Self(bits)
    }

    pub fn bits(self) -> u16 {
        self.0
    }

    pub fn session(self) -> u8 {
        (self.0 >> BITS) as u8
    }

    pub fn value(self) -> u16 {
        self.0 & MASK
    }

    pub fn plus(self, steps: u16) -> Self {
        Self(self.0 & !MASK | self.0.wrapping_add(steps) & MASK)
    }

    pub fn next(self) -> Self {
        self.plus(1)
    }

    /// Steps from `earlier` to this one, modulo 2¹⁴.
    pub fn since(self, earlier: Self) -> u16 {
        self.0.wrapping_sub(earlier.0) & MASK
    }

    /// Of a new session, with a value that stale frames do not have.
    pub fn elsewhere(self, scramble: u16) -> Self {
        Self((self.0 & !MASK).wrapping_add(1 << BITS) | (self.0 ^ scramble) & MASK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn increments_wrap_within_their_session() {
        let last = Sequence::from_bits(0x7FFF);
        assert_eq!((last.session(), last.value()), (1, 0x3FFF));
        assert_eq!(last.next(), Sequence::from_bits(0x4000));
        assert_eq!((last.next().since(last), last.since(last.next())), (1, 0x3FFF));
        assert_eq!(Sequence::first(3).bits(), 0xC001);
        let elsewhere = Sequence::first(3).elsewhere(0xB0F0);
        assert_eq!((elsewhere.session(), elsewhere.value()), (0, 0x30F1));
    }
}
