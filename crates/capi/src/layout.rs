//! What C sees: the types of the header.

use std::ffi::c_void;

use crate::backend::{Address, Part};
use crate::handlers::ErrorHandler;

/// `mx_endpoint_t`: see [`crate::library`]. It points nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct EndpointHandle(pub usize);

/// `mx_request_t`: see [`crate::library`]. It points nowhere. 0 is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct RequestHandle(pub usize);

/// `mx_segment_t`
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Segment {
    start: *mut u8,
    len: u32,
}

impl Segment {
    /// `None`: bytes that are nowhere.
    pub fn part(&self) -> Option<Part> {
        let len = self.len as usize;
        (len == 0 || !self.start.is_null()).then_some(Part { start: self.start, len })
    }
}

/// `mx_status_t`
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Status {
    pub code: u32,
    pub source: Address,
    pub match_info: u64,
    pub msg_length: u32,
    pub xfer_length: u32,
    pub context: usize,
}

/// `mx_param_t`
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Param {
    key: u32,
    value: ParamValue,
}

#[derive(Clone, Copy)]
#[repr(C)]
union ParamValue {
    error_handler: Option<ErrorHandler>,
    unexpected_max: u32,
    /// Bits and shift.
    context: [u8; 2],
}

/// What a parameter says.
pub enum Setting {
    ErrorHandler(Option<ErrorHandler>),
    UnexpectedMax(u32),
    Contexts { bits: u8, shift: u8 },
}

impl Param {
    /// `Err`: a key that nobody knows.
    pub fn setting(&self) -> Result<Setting, u32> {
        match self.key {
            // SAFETY: with this key the program has set this member.
            0 => Ok(Setting::ErrorHandler(unsafe { self.value.error_handler })),
            // SAFETY: with this key the program has set this member.
            1 => Ok(Setting::UnexpectedMax(unsafe { self.value.unexpected_max })),
            2 => {
                // SAFETY: with this key the program has set this member.
                let [bits, shift] = unsafe { self.value.context };
                Ok(Setting::Contexts { bits, shift })
            }
            key => Err(key),
        }
    }
}

/// `mx_mapper_state_t`
#[derive(Clone, Copy)]
#[repr(C)]
pub struct MapperState {
    pub board_number: u32,
    pub mapper_mac: [u8; 6],
    pub iport: u16,
    pub map_version: u32,
    pub num_hosts: u32,
    pub network_configured: u32,
    pub routes_valid: u32,
    pub level: u32,
    pub flags: u32,
}

/// `mx_unexp_handler_t`
pub type UnexpectedHandler = unsafe extern "C" fn(*mut c_void, Address, u64, u32, *mut c_void) -> u32;

/// `mx_matching_callback_t`
pub type MatchingCallback = unsafe extern "C" fn(*mut c_void, u64, i32);
