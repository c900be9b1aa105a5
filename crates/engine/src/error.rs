//! What can go wrong, named for what went wrong.

use std::fmt;
use std::io;

use isthmus_ring::{Fault, TooLarge};
use isthmus_wire::control::Refusal;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug)]
pub enum Error {
    /// No broker answers at this door.
    NoBroker { door: String, source: io::Error },
    /// The broker went away while it was asked; it may or may not have done what was asked.
    BrokerLost,
    /// The broker refused; `rule` is 0 where no rule decided.
    Refused { refusal: Refusal, rule: u32, text: String },
    /// The broker or a peer's engine sent something that cannot be.
    BadAnswer(String),
    /// The message can never fit. Nothing was sent.
    TooLarge(TooLarge),
    /// It would have to wait. `done` bytes were sent or received before.
    WouldBlock { done: usize },
    /// The time ran out. `done` bytes were sent or received before.
    TimedOut { done: usize },
    /// A signal handler wants to stop the wait. `done` bytes were sent or received before.
    Interrupted { done: usize },
    /// The peer takes nothing more, or this side was shut down for sending. `done` bytes were put
    /// into the lane before.
    Pipe { done: usize },
    /// The peer died, or closed while data for it lay unread. What it sent before was delivered.
    Reset { done: usize, peer: String },
    /// The broker cut the connection.
    Cut { text: String },
    /// The peer broke the format of the lane. The connection is useless; nothing else is.
    Fault(Fault),
    /// The lane's memory failed (out of memory, most likely). The connection is useless.
    Memory { errno: i32 },
    /// A view of what is to be sent is being filled. Nothing was sent.
    Reserved,
    /// This object was closed.
    Closed,
    /// This object belongs to the process that made it, not to its fork.
    Forked,
    /// The operating system refused something.
    Os { what: &'static str, source: io::Error },
}

impl Error {
    pub fn os(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Os { what, source }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoBroker { door, source } => {
                let hint = match source.kind() {
                    io::ErrorKind::PermissionDenied => {
                        "This user may not use this door; the operator says whose it is: isthmus domain add"
                    }
                    io::ErrorKind::NotFound => {
                        "In a container, mount the door's directory; on the node, start one: isthmus broker"
                    }
                    _ => "Start one: isthmus broker",
                };
                write!(f, "no broker answers at {door} ({source}). {hint}")
            }
            Self::BrokerLost => {
                f.write_str("the broker went away; established connections live on, ask again")
            }
            Self::Refused { text, .. } => f.write_str(text),
            Self::BadAnswer(text) => write!(f, "an answer that cannot be: {text}"),
            Self::TooLarge(error) => write!(f, "{error}"),
            Self::WouldBlock { .. } => f.write_str("it would have to wait"),
            Self::TimedOut { .. } => f.write_str("timed out"),
            Self::Interrupted { .. } => f.write_str("interrupted"),
            Self::Pipe { .. } => f.write_str("the other side takes nothing more"),
            Self::Reset { peer, .. } => write!(f, "{peer} died, or closed before it read everything"),
            Self::Cut { text } => write!(f, "the broker cut this connection: {text}"),
            Self::Fault(fault) => write!(f, "the peer broke the lane: {fault}"),
            Self::Memory { errno } => {
                write!(f, "the lane's memory failed: {}", io::Error::from_raw_os_error(*errno))
            }
            Self::Reserved => f.write_str("a view for sending is being filled; end it first"),
            Self::Closed => f.write_str("this object was closed"),
            Self::Forked => f.write_str("made before fork(); connect again in the child"),
            Self::Os { what, source } => write!(f, "{what}: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::NoBroker { source, .. } | Self::Os { source, .. } => Some(source),
            Self::Fault(fault) => Some(fault),
            _ => None,
        }
    }
}

impl From<TooLarge> for Error {
    fn from(error: TooLarge) -> Self {
        Self::TooLarge(error)
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}
