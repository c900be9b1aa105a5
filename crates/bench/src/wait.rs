//! How an end waits: the one choice that decides most latency figures.

use std::{str::FromStr, time::Duration};

use crate::error::BenchError;

/// How long `adaptive` spins before it sleeps. Waking a sleeper on another core costs 16 to 25 us whatever the
/// transport, so this bounds the loss at about one wake.
pub const ADAPTIVE_SPIN: Duration = Duration::from_micros(20);

/// What an end does while nothing has arrived, or while there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Ask again at once, for ever.
    Spin,
    /// Ask again for `spin`, then sleep in the kernel.
    Adaptive { spin: Duration },
    /// Sleep in the kernel at once.
    Block,
}

impl Wait {
    /// How long to spin before sleeping; `None` is for ever.
    pub(crate) fn spin(self) -> Option<Duration> {
        match self {
            Self::Spin => None,
            Self::Adaptive { spin } => Some(spin),
            Self::Block => Some(Duration::ZERO),
        }
    }
}

impl FromStr for Wait {
    type Err = BenchError;

    fn from_str(word: &str) -> Result<Self, BenchError> {
        match word {
            "spin" => Ok(Self::Spin),
            "adaptive" => Ok(Self::Adaptive { spin: ADAPTIVE_SPIN }),
            "block" => Ok(Self::Block),
            _ => Err(BenchError::UnknownWord {
                what: "wait",
                word: word.to_owned(),
                choices: "spin, adaptive, block",
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_wait_is_refused_with_the_choices() {
        let error = "hard".parse::<Wait>().expect_err("not a wait");
        assert_eq!(error.to_string(), "wait=hard: one of spin, adaptive, block");
        assert_eq!("block".parse::<Wait>().expect("a wait"), Wait::Block);
    }
}
