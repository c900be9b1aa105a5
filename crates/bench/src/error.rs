//! What can go wrong in a measurement, by name.

use std::{error::Error, fmt, io};

/// Why there is no figure.
#[derive(Debug)]
pub enum BenchError {
    /// A message has to hold at least its mark.
    EmptyMessage,
    /// A word that names no option, such as a wait called `hard`.
    UnknownWord { what: &'static str, word: String, choices: &'static str },
    /// An address that is neither `ip:port` nor a path.
    BadAddress { address: String },
    /// A processor number that this machine, or this process, does not have.
    NoSuchCpu { cpu: usize, source: io::Error },
    /// The transport failed while `doing` something.
    Transport { doing: &'static str, source: io::Error },
    /// The other end sent a mark that no loop sends.
    UnknownMark { mark: u8 },
    /// The last message did not hold what was sent.
    WrongBytes { offset: usize, expected: u8, found: u8 },
    /// Memory for the buffers, or a mapping of the ring, was refused.
    Memory { bytes: usize, source: io::Error },
}

impl BenchError {
    /// For `map_err`: keep the cause and say what was being done.
    pub(crate) fn transport(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Transport { doing, source }
    }
}

impl fmt::Display for BenchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EmptyMessage => write!(f, "size=0: a message holds at least one byte, its mark"),
            Self::UnknownWord { what, word, choices } => write!(f, "{what}={word}: one of {choices}"),
            Self::BadAddress { address } => {
                write!(f, "address={address}: give ip:port, or a path that begins with /")
            }
            Self::NoSuchCpu { cpu, source } => write!(f, "cannot run on processor {cpu}: {source}"),
            Self::Transport { doing, source } => write!(f, "{doing}: {source}"),
            Self::UnknownMark { mark } => {
                write!(f, "byte 0 of a message is {mark}: not a mark; do both ends run the same loop?")
            }
            Self::WrongBytes { offset, expected, found } => {
                write!(f, "byte {offset} of the last message is {found}, sent was {expected}")
            }
            Self::Memory { bytes, source } => {
                write!(f, "no memory for {bytes} bytes of buffer: {source}")
            }
        }
    }
}

impl Error for BenchError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::NoSuchCpu { source, .. } | Self::Transport { source, .. } | Self::Memory { source, .. } => {
                Some(source)
            }
            _ => None,
        }
    }
}
