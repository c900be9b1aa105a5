//! MX: message passing by matching.
//!
//! Pure: events in, events out, the clock handed in. [`matching`] decides which receive gets which message; [`wire`]
//! brings messages over frames that get lost ([`peer`]: order and acknowledgements, [`pull`]: large messages).

mod limits;
pub mod matching;
mod peer;
mod pull;
mod sequence;
pub mod wire;

/// What became of a request. The numbers are those of the C interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Status {
    Success = 0,
    Truncated = 5,
    Cancelled = 6,
    /// Nobody has the endpoint open.
    EndpointClosed = 8,
    /// No answer, or the other end was disconnected.
    EndpointUnreachable = 9,
    /// The other end is another one than it was.
    BadSession = 10,
    BadKey = 11,
    /// The other station has no endpoint of such a number.
    BadEndpoint = 12,
    /// What was to be pulled is not there any more.
    BadWindow = 13,
    /// The bytes could not be stored.
    Aborted = 14,
    NoResources = 16,
}

impl Status {
    /// What a nack means to the request that it answers.
    #[must_use]
    pub fn of_nack(why: u8) -> Option<Self> {
        use isthmus_wire::mxoe::{BAD_ENDPOINT, BAD_SESSION, BAD_WINDOW, ENDPOINT_CLOSED};
        match why {
            BAD_ENDPOINT => Some(Self::BadEndpoint),
            ENDPOINT_CLOSED => Some(Self::EndpointClosed),
            BAD_SESSION => Some(Self::BadSession),
            BAD_WINDOW => Some(Self::BadWindow),
            _ => None,
        }
    }
}
