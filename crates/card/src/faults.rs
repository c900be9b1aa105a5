//! What goes wrong on purpose, so that tests see what becomes of it.

use std::collections::HashMap;

/// Faults of frames that are sent; none by default.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// For a type of frame: every so manieth is lost.
    pub drop_every: HashMap<u8, u32>,
    /// Of a million frames, so many are lost, sent twice, or sent behind a later one.
    pub lose_ppm: u32,
    pub duplicate_ppm: u32,
    pub delay_ppm: u32,
    /// What chance begins with.
    pub seed: u64,
}

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Sent,
    Lost,
    Twice,
    Late,
}

pub(crate) struct Chance {
    faults: Faults,
    quiet: bool,
    seen: HashMap<u8, u32>,
    state: u64,
}

const MILLION: u32 = 1_000_000;

impl Chance {
    pub(crate) fn new(faults: Faults) -> Self {
        let Faults { lose_ppm, duplicate_ppm, delay_ppm, .. } = faults;
        let quiet = faults.drop_every.is_empty() && [lose_ppm, duplicate_ppm, delay_ppm] == [0; 3];
        Self { state: faults.seed, faults, quiet, seen: HashMap::new() }
    }

    pub(crate) fn fate(&mut self, kind: u8) -> Fate {
        if self.quiet {
            return Fate::Sent;
        }
        if let Some(every) = self.faults.drop_every.get(&kind) {
            let seen = self.seen.entry(kind).or_default();
            *seen += 1;
            if *seen >= *every {
                *seen = 0;
                return Fate::Lost;
            }
        }
        let mut left = self.draw();
        let Faults { lose_ppm, duplicate_ppm, delay_ppm, .. } = self.faults;
        for (share, fate) in [(lose_ppm, Fate::Lost), (duplicate_ppm, Fate::Twice), (delay_ppm, Fate::Late)] {
            if left < share {
                return fate;
            }
            left -= share;
        }
        Fate::Sent
    }

    /// Less than a million. SplitMix64, by Steele, Lea and Flood.
    fn draw(&mut self) -> u32 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ z >> 31) % u64::from(MILLION)) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fates(faults: &Faults, n: usize) -> Vec<Fate> {
        let mut chance = Chance::new(faults.clone());
        (0..n).map(|_| chance.fate(37)).collect()
    }

    #[test]
    fn nothing_goes_wrong_by_itself() {
        assert!(fates(&Faults::default(), 1000).iter().all(|fate| *fate == Fate::Sent));
    }

    #[test]
    fn every_third_of_one_type_is_lost() {
        let faults = Faults { drop_every: [(37, 3)].into(), ..Faults::default() };
        let lost: Vec<_> = fates(&faults, 9).iter().map(|fate| *fate == Fate::Lost).collect();
        assert_eq!(lost, [false, false, true].repeat(3));
        assert_eq!(Chance::new(faults).fate(38), Fate::Sent);
    }

    #[test]
    fn one_seed_is_one_course_and_shares_are_kept() {
        let faults =
            Faults { lose_ppm: 100_000, duplicate_ppm: 50_000, delay_ppm: 200_000, ..Faults::default() };
        let course = fates(&faults, 20_000);
        assert_eq!(course, fates(&faults, 20_000));
        assert_ne!(course, fates(&Faults { seed: 1, ..faults }, 20_000));
        for (fate, expected) in [(Fate::Lost, 2000), (Fate::Twice, 1000), (Fate::Late, 4000)] {
            let n = course.iter().filter(|one| **one == fate).count();
            assert!(n.abs_diff(expected) < expected / 5, "{fate:?}: {n}");
        }
    }
}
