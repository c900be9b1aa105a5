//! Engine errors as the exceptions of `isthmus.errors`.

use isthmus_engine::Error;
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::types::PyType;

/// The class and the errno of an error. Refusals have their own table in Python, by word.
fn class_of(error: &Error) -> (&'static str, i32) {
    match error {
        Error::NoBroker { .. } => ("NoBroker", libc_errno::ECONNREFUSED),
        Error::BrokerLost => ("BrokerLost", libc_errno::ECONNABORTED),
        Error::Refused { .. } => ("Refused", 0),
        Error::BadAnswer(_) => ("ProtocolFault", libc_errno::EPROTO),
        Error::TooLarge(_) => ("MessageTooLarge", libc_errno::EMSGSIZE),
        Error::WouldBlock { .. } => ("WouldBlock", libc_errno::EAGAIN),
        Error::TimedOut { .. } => ("TimedOut", libc_errno::ETIMEDOUT),
        Error::Interrupted { .. } => ("Interrupted", libc_errno::EINTR),
        Error::Pipe { .. } => ("PeerClosed", libc_errno::EPIPE),
        Error::Reset { .. } => ("PeerReset", libc_errno::ECONNRESET),
        Error::Cut { .. } => ("ConnectionCut", libc_errno::ECONNABORTED),
        Error::Fault(_) => ("PeerFault", libc_errno::EPROTO),
        Error::Memory { .. } => ("LaneFailed", libc_errno::ENOMEM),
        Error::Reserved => ("WrongState", libc_errno::EBUSY),
        Error::Closed => ("Closed", libc_errno::EBADF),
        Error::Forked => ("Forked", libc_errno::EBADF),
        Error::Os { source, .. } => ("IsthmusError", source.raw_os_error().unwrap_or(libc_errno::EIO)),
    }
}

/// Every class that [`class_of`] names, for the test that they exist.
pub const CLASSES: [&str; 17] = [
    "NoBroker",
    "BrokerLost",
    "Refused",
    "ProtocolFault",
    "MessageTooLarge",
    "WouldBlock",
    "TimedOut",
    "Interrupted",
    "PeerClosed",
    "PeerReset",
    "ConnectionCut",
    "PeerFault",
    "LaneFailed",
    "WrongState",
    "Closed",
    "Forked",
    "IsthmusError",
];

/// Bytes that went through before the error.
fn done_before(error: &Error) -> usize {
    match error {
        Error::WouldBlock { done }
        | Error::TimedOut { done }
        | Error::Interrupted { done }
        | Error::Pipe { done }
        | Error::Reset { done, .. } => *done,
        _ => 0,
    }
}

pub fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    build(py, error).unwrap_or_else(|failed| failed)
}

fn build(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let module = py.import("isthmus.errors")?;
    if let Error::Refused { refusal, rule, text } = error {
        let made = module.getattr("refused")?.call1((refusal.name(), *rule, text))?;
        return Ok(PyErr::from_value(made));
    }
    let (name, errno) = class_of(error);
    let class = module.getattr(name)?.cast_into::<PyType>().map_err(|e| PyOSError::new_err(e.to_string()))?;
    let made = class.call1((errno, error.to_string()))?;
    let done = done_before(error);
    if done > 0 {
        made.setattr("done", done)?;
    }
    Ok(PyErr::from_value(made))
}

/// A code of the MX interface, as `isthmus.errors.MXError`.
pub fn mx_error(py: Python<'_>, code: u8, text: &str) -> PyErr {
    let made = || py.import("isthmus.errors")?.getattr("mx_error")?.call1((code, text));
    made().map_or_else(|failed| failed, PyErr::from_value)
}

/// What the kernel said, as `OSError` with its number.
pub fn os_error(error: std::io::Error) -> PyErr {
    PyOSError::new_err((error.raw_os_error().unwrap_or(libc_errno::EIO), error.to_string()))
}

/// The numbers, as Linux has them on every machine we build for.
mod libc_errno {
    pub const EINTR: i32 = 4;
    pub const EIO: i32 = 5;
    pub const EBADF: i32 = 9;
    pub const EAGAIN: i32 = 11;
    pub const ENOMEM: i32 = 12;
    pub const EBUSY: i32 = 16;
    pub const EPIPE: i32 = 32;
    pub const EPROTO: i32 = 71;
    pub const EMSGSIZE: i32 = 90;
    pub const ECONNABORTED: i32 = 103;
    pub const ECONNRESET: i32 = 104;
    pub const ETIMEDOUT: i32 = 110;
    pub const ECONNREFUSED: i32 = 111;
}
