//! Why a call failed.

use std::fmt;

use isthmus_engine::Error;
use isthmus_wire::control::Refusal;

/// What the C interface calls a return code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Return {
    Failure = 2,
    NotInitialized = 4,
    NoDevice = 5,
    BadEndpoint = 9,
    BadSegmentCount = 12,
    BadRequest = 13,
    BadMatchMask = 14,
    NoResources = 15,
    Busy = 20,
    Timeout = 30,
    BadEndpointId = 32,
    ConnectionFailed = 33,
    BadConnectionKey = 34,
    NicNotFound = 36,
    CancelNotSupported = 40,
    BadMatchingForContext = 42,
}

impl Return {
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Failure => "it failed",
            Self::NotInitialized => "the library is not initialized",
            Self::NoDevice => "there is no broker",
            Self::BadEndpoint => "no such endpoint",
            Self::BadSegmentCount => "too many segments, or too many bytes",
            Self::BadRequest => "no such request",
            Self::BadMatchMask => "the value has bits outside of its mask",
            Self::NoResources => "no resources are left",
            Self::Busy => "the endpoint number is in use",
            Self::Timeout => "no answer in time",
            Self::BadEndpointId => "the other station has no endpoint of that number",
            Self::ConnectionFailed => "nobody has that endpoint open",
            Self::BadConnectionKey => "the key is not that endpoint's",
            Self::NicNotFound => "no card of that address is known",
            Self::CancelNotSupported => "sends cannot be taken back",
            Self::BadMatchingForContext => "the mask leaves the context open",
        }
    }
}

#[derive(Debug)]
pub enum Fault {
    Code(Return),
    /// What the broker or the kernel said, and the code that stands for it.
    Because(Return, Error),
}

pub type Result<T> = std::result::Result<T, Fault>;

impl Fault {
    #[must_use]
    pub fn code(&self) -> Return {
        match self {
            Self::Code(code) | Self::Because(code, _) => *code,
        }
    }
}

impl From<Return> for Fault {
    fn from(code: Return) -> Self {
        Self::Code(code)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        let code = match &error {
            Error::Refused { refusal, .. } => match refusal {
                Refusal::PortInUse => Return::Busy,
                Refusal::UnknownDomain => Return::NicNotFound,
                Refusal::LimitReached => Return::NoResources,
                _ => Return::ConnectionFailed,
            },
            Error::TimedOut { .. } => Return::Timeout,
            Error::BrokerLost | Error::NoBroker { .. } => Return::NoDevice,
            _ => Return::Failure,
        };
        Self::Because(code, error)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => f.write_str(code.text()),
            Self::Because(code, error) => write!(f, "{}: {error}", code.text()),
        }
    }
}

impl std::error::Error for Fault {}
