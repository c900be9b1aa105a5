//! What can go wrong with a stranger.

use std::fmt;
use std::io;

use isthmus_wire::DecodeError;

/// A monitor or a guest broke a protocol: its device ends, and nobody else's.
#[derive(Debug)]
pub enum Fault {
    Decode(DecodeError),
    Memory(&'static str),
    Queue(&'static str),
    Message(&'static str),
    Os(io::Error),
    /// The other side is gone.
    Gone,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Decode(error) => write!(f, "{error}"),
            Self::Memory(text) => write!(f, "memory table: {text}"),
            Self::Queue(text) => write!(f, "queue: {text}"),
            Self::Message(text) => write!(f, "vhost-user: {text}"),
            Self::Os(error) => write!(f, "{error}"),
            Self::Gone => f.write_str("the monitor is gone"),
        }
    }
}

impl std::error::Error for Fault {}

impl From<DecodeError> for Fault {
    fn from(error: DecodeError) -> Self {
        Self::Decode(error)
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Os(error)
    }
}

impl From<rustix::io::Errno> for Fault {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Os(error.into())
    }
}
