//! The two namespaces of numbers: what a call returns, and what became of a request.
//!
//! They overlap and are not the same. An error handler is told of both in the one type, so that what became of a
//! request has to be told by a number that no call returns where there is no code that says the same
//! ([`StatusCode::told`]).

use std::ffi::CStr;

/// An enumeration of C: the number, the name in the header, and what it says to people.
macro_rules! codes {
    ($(#[$about:meta])* $name:ident { $($variant:ident = $number:literal, $c_name:literal, $text:literal;)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        #[allow(dead_code, reason = "the tables are complete, whatever a backend makes use of")]
        pub enum $name { $($variant = $number,)* }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            pub fn number(self) -> u32 {
                self as u32
            }

            pub fn from_number(number: u32) -> Option<Self> {
                Self::ALL.iter().copied().find(|code| code.number() == number)
            }

            /// The name that the header gives it.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $c_name,)* }
            }

            pub fn text(self) -> &'static CStr {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

codes! {
    /// What a call returns.
    ReturnCode {
        Success = 0, "MX_SUCCESS", c"success";
        BadBadBad = 1, "MX_BAD_BAD_BAD", c"internal error";
        Failure = 2, "MX_FAILURE", c"failure";
        AlreadyInitialized = 3, "MX_ALREADY_INITIALIZED", c"the library is initialised already";
        NotInitialized = 4, "MX_NOT_INITIALIZED", c"the library is not initialised; call mx_init first";
        NoDev = 5, "MX_NO_DEV", c"no device";
        NoDriver = 6, "MX_NO_DRIVER", c"nothing is behind the device";
        NoPerm = 7, "MX_NO_PERM", c"permission denied";
        BoardUnknown = 8, "MX_BOARD_UNKNOWN", c"no such board";
        BadEndpoint = 9, "MX_BAD_ENDPOINT", c"no such endpoint";
        BadSegList = 10, "MX_BAD_SEG_LIST", c"the list of segments is bad";
        BadSegMem = 11, "MX_BAD_SEG_MEM", c"the memory of a segment is bad";
        BadSegCnt = 12, "MX_BAD_SEG_CNT", c"too many segments";
        BadRequest = 13, "MX_BAD_REQUEST", c"no such request, or not one for this call";
        BadMatchMask = 14, "MX_BAD_MATCH_MASK", c"the match value has ones where the mask has none";
        NoResources = 15, "MX_NO_RESOURCES", c"out of resources";
        BadAddrList = 16, "MX_BAD_ADDR_LIST", c"the list of addresses is bad";
        BadAddrCount = 17, "MX_BAD_ADDR_COUNT", c"the count of addresses is bad";
        BadRoot = 18, "MX_BAD_ROOT", c"the root is bad";
        NotCompleted = 19, "MX_NOT_COMPLETED", c"not completed";
        Busy = 20, "MX_BUSY", c"in use";
        BadInfoKey = 21, "MX_BAD_INFO_KEY", c"no such key of information";
        BadInfoVal = 22, "MX_BAD_INFO_VAL", c"the value goes to or comes from nowhere";
        BadNic = 23, "MX_BAD_NIC", c"the NIC id is bad";
        BadParamList = 24, "MX_BAD_PARAM_LIST", c"the list of parameters is bad";
        BadParamName = 25, "MX_BAD_PARAM_NAME", c"no such parameter";
        BadParamVal = 26, "MX_BAD_PARAM_VAL", c"the value of a parameter is bad";
        BadHostnameArgs = 27, "MX_BAD_HOSTNAME_ARGS", c"the host name is bad";
        HostNotFound = 28, "MX_HOST_NOT_FOUND", c"no such host";
        RequestPending = 29, "MX_REQUEST_PENDING", c"the request is pending";
        Timeout = 30, "MX_TIMEOUT", c"no answer in time";
        NoMatch = 31, "MX_NO_MATCH", c"nothing matches";
        BadEndpointId = 32, "MX_BAD_ENDPOINT_ID", c"the peer has no endpoints of that number";
        ConnectionFailed = 33, "MX_CONNECTION_FAILED", c"the peer's endpoint is not open";
        BadConnectionKey = 34, "MX_BAD_CONNECTION_KEY", c"the peer's endpoint has another key";
        BadInfoLength = 35, "MX_BAD_INFO_LENGTH", c"the value has another length";
        NicNotFound = 36, "MX_NIC_NOT_FOUND", c"no such NIC";
        BadKernelVersion = 37, "MX_BAD_KERNEL_VERSION", c"the other half has another version";
        BadLibVersion = 38, "MX_BAD_LIB_VERSION", c"the program was made for another version of the interface";
        NicDead = 39, "MX_NIC_DEAD", c"the NIC is dead";
        CancelNotSupported = 40, "MX_CANCEL_NOT_SUPPORTED", c"only receives and connects can be cancelled";
        CloseInHandler = 41, "MX_CLOSE_IN_HANDLER", c"an endpoint cannot be closed in its own handler";
        BadMatchingForContextIdMask = 42, "MX_BAD_MATCHING_FOR_CONTEXT_ID_MASK", c"the mask leaves the context id open";
        NotSupportedWithContextId = 43, "MX_NOT_SUPPORTED_WITH_CONTEXT_ID", c"not supported with context ids";
    }
}

codes! {
    /// What became of a request.
    StatusCode {
        Success = 0, "MX_STATUS_SUCCESS", c"success";
        Pending = 1, "MX_STATUS_PENDING", c"pending";
        Buffered = 2, "MX_STATUS_BUFFERED", c"buffered";
        Rejected = 3, "MX_STATUS_REJECTED", c"rejected";
        Timeout = 4, "MX_STATUS_TIMEOUT", c"no answer in time";
        Truncated = 5, "MX_STATUS_TRUNCATED", c"the message was longer than the receive, and its rest is lost";
        Cancelled = 6, "MX_STATUS_CANCELLED", c"cancelled";
        EndpointUnknown = 7, "MX_STATUS_ENDPOINT_UNKNOWN", c"no such endpoint";
        EndpointClosed = 8, "MX_STATUS_ENDPOINT_CLOSED", c"the peer's endpoint is closed";
        EndpointUnreachable = 9, "MX_STATUS_ENDPOINT_UNREACHABLE", c"the peer cannot be reached";
        BadSession = 10, "MX_STATUS_BAD_SESSION", c"the peer knows of no connection, or of another one";
        BadKey = 11, "MX_STATUS_BAD_KEY", c"the peer's endpoint has another key";
        BadEndpoint = 12, "MX_STATUS_BAD_ENDPOINT", c"the peer has no endpoints of that number";
        BadRdmawin = 13, "MX_STATUS_BAD_RDMAWIN", c"the peer's memory is no longer there";
        Aborted = 14, "MX_STATUS_ABORTED", c"aborted";
        EventqFull = 15, "MX_STATUS_EVENTQ_FULL", c"the queue of events is full";
        NoResources = 16, "MX_STATUS_NO_RESOURCES", c"out of resources";
    }
}

/// What there is no return code for is told to error handlers by numbers from here on, as Open-MX does.
const TOLD_CANCELLED: u32 = 90;
const TOLD_BAD_RDMAWIN: u32 = 91;
const TOLD_UNREACHABLE: u32 = 92;
const TOLD_BAD_SESSION: u32 = 93;
const TOLD_ABORTED: u32 = 94;
const TOLD_TRUNCATED: u32 = 95;

impl StatusCode {
    /// What an error handler is told.
    pub fn told(self) -> u32 {
        match self {
            Self::Success => ReturnCode::Success.number(),
            Self::Timeout => ReturnCode::Timeout.number(),
            Self::Truncated => TOLD_TRUNCATED,
            Self::Cancelled => TOLD_CANCELLED,
            Self::EndpointClosed => ReturnCode::ConnectionFailed.number(),
            Self::EndpointUnreachable => TOLD_UNREACHABLE,
            Self::BadSession => TOLD_BAD_SESSION,
            Self::BadKey => ReturnCode::BadConnectionKey.number(),
            Self::BadEndpoint => ReturnCode::BadEndpointId.number(),
            Self::BadRdmawin => TOLD_BAD_RDMAWIN,
            Self::Aborted => TOLD_ABORTED,
            Self::NoResources => ReturnCode::NoResources.number(),
            Self::EndpointUnknown => ReturnCode::BadEndpoint.number(),
            Self::Pending | Self::Buffered | Self::Rejected | Self::EventqFull => {
                ReturnCode::Failure.number()
            }
        }
    }

    /// What stands in the status once the handler, told of `self`, has returned `answer`.
    ///
    /// What is no number of ours is passed on: a program may have numbers of its own.
    pub fn after_handler(self, answer: u32) -> u32 {
        if answer == self.told() {
            return self.number();
        }
        Self::ALL.iter().find(|code| code.told() == answer).map_or(answer, |code| code.number())
    }
}

/// The text of what a call returns or a handler is told.
pub fn return_text(number: u32) -> &'static CStr {
    let told = || StatusCode::ALL.iter().find(|code| code.told() == number).map(|code| code.text());
    ReturnCode::from_number(number).map(ReturnCode::text).or_else(told).unwrap_or(c"unknown return code")
}

/// The text of what became of a request.
pub fn status_text(number: u32) -> &'static CStr {
    StatusCode::from_number(number).map_or(c"unknown status code", StatusCode::text)
}

/// What went wrong in a call: the code, and what happened in words.
#[derive(Debug)]
pub struct Fault {
    pub code: ReturnCode,
    pub what: String,
}

impl Fault {
    pub fn new(code: ReturnCode, what: impl Into<String>) -> Self {
        Self { code, what: what.into() }
    }
}

impl From<ReturnCode> for Fault {
    fn from(code: ReturnCode) -> Self {
        Self::new(code, code.text().to_string_lossy())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// The enumerators of the header, by name.
    fn header() -> BTreeMap<&'static str, u32> {
        let text = include_str!("../include/myriexpress.h");
        let words = text.lines().filter_map(|line| line.trim().trim_end_matches(',').split_once(" = "));
        words.filter_map(|(name, number)| Some((name, number.parse().ok()?))).collect()
    }

    #[test]
    fn the_header_has_the_same_names_and_numbers() {
        let header = header();
        for code in ReturnCode::ALL {
            assert_eq!(header.get(code.name()), Some(&code.number()), "{}", code.name());
        }
        for code in StatusCode::ALL {
            assert_eq!(header.get(code.name()), Some(&code.number()), "{}", code.name());
        }
        let statuses = header.keys().filter(|name| name.starts_with("MX_STATUS_")).count();
        assert_eq!((ReturnCode::ALL.len(), StatusCode::ALL.len(), statuses), (44, 17, 17));
    }

    #[test]
    fn a_handler_may_turn_what_it_is_told_into_success_or_anything() {
        assert_eq!(StatusCode::Truncated.after_handler(TOLD_TRUNCATED), 5);
        assert_eq!(StatusCode::Truncated.after_handler(0), 0);
        assert_eq!(StatusCode::Truncated.after_handler(TOLD_UNREACHABLE), 9);
        assert_eq!(StatusCode::Truncated.after_handler(4711), 4711);
        // Numbers of several: what it was, if the handler left it alone.
        assert_eq!(StatusCode::EventqFull.after_handler(StatusCode::EventqFull.told()), 15);
    }

    #[test]
    fn what_is_unknown_has_a_text_too() {
        assert_eq!(return_text(4711), c"unknown return code");
        assert_eq!(return_text(TOLD_TRUNCATED), StatusCode::Truncated.text());
        assert_eq!(status_text(17), c"unknown status code");
    }
}
