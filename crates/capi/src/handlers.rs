//! Error handlers, and how a function answers.
//!
//! Whatever goes wrong is told to a handler: the endpoint's own, or else the program's. What the handler returns takes
//! the place of the code. The handler that a program starts with ends it.

use std::ffi::c_char;
use std::io::{self, Write};
use std::panic::{self, AssertUnwindSafe};
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::backend::{Fault, ReturnCode, Status};
use crate::layout::{self, EndpointHandle};
use crate::library::{self, Open};

/// `mx_error_handler_t`
pub type ErrorHandler = unsafe extern "C" fn(*mut c_char, u32) -> u32;

/// The status of a program that its handler has ended.
const EXIT_STATUS: i32 = -1;

// Data, not functions: programs read a pointer from them.

#[unsafe(no_mangle)]
pub static MX_ERRORS_ARE_FATAL: ErrorHandler = end_program;
#[unsafe(no_mangle)]
pub static MX_ERRORS_RETURN: ErrorHandler = return_code;

/// The program's handler.
static IN_CHARGE: Mutex<ErrorHandler> = Mutex::new(end_program);
/// The environment can say that `end_program` does not.
static IS_FATAL: AtomicBool = AtomicBool::new(true);

unsafe extern "C" fn return_code(_message: *mut c_char, code: u32) -> u32 {
    code
}

unsafe extern "C" fn end_program(message: *mut c_char, code: u32) -> u32 {
    if !IS_FATAL.load(Ordering::Relaxed) {
        return code;
    }
    // SAFETY: a handler is given a string that ends in NUL, if any.
    let text = (!message.is_null()).then(|| unsafe { std::ffi::CStr::from_ptr(message) });
    let text = text.unwrap_or_default().to_string_lossy();
    let advice = "set the handler MX_ERRORS_RETURN to go on after errors";
    // A program without standard error ends all the same.
    let _ = writeln!(io::stderr(), "{text} (code {code}); {advice}");
    process::exit(EXIT_STATUS)
}

/// Put another handler in charge; the one that was. `None`: the one that a program starts with.
pub fn replace(handler: Option<ErrorHandler>) -> ErrorHandler {
    let mut in_charge = IN_CHARGE.lock().unwrap_or_else(PoisonError::into_inner);
    std::mem::replace(&mut *in_charge, handler.unwrap_or(end_program))
}

/// Read again what the environment says.
pub fn arm(is_fatal: bool) {
    IS_FATAL.store(is_fatal, Ordering::Relaxed);
}

/// Ask the handler about `code`.
fn tell(own: Option<ErrorHandler>, message: &str, code: u32) -> u32 {
    let handler = own.unwrap_or_else(|| *IN_CHARGE.lock().unwrap_or_else(PoisonError::into_inner));
    let mut text = format!("MX: {message}").replace('\0', " ").into_bytes();
    text.push(0);
    // SAFETY: a program that installs a handler has a function there that takes a string and a code. No lock is held.
    unsafe { handler(text.as_mut_ptr().cast(), code) }
}

/// Run a function of the interface and answer C.
pub fn answer(function: &str, body: impl FnOnce() -> Result<(), Fault>) -> u32 {
    conclude(function, None, panic::catch_unwind(AssertUnwindSafe(body)))
}

/// The same for a function that is given an endpoint.
pub fn answer_for(
    function: &str,
    handle: EndpointHandle,
    body: impl FnOnce(&Open) -> Result<(), Fault>,
) -> u32 {
    let Some(open) = library::find(handle) else {
        return answer(function, || Err(Fault::new(ReturnCode::BadEndpoint, "no such endpoint is open")));
    };
    conclude(function, open.handler, panic::catch_unwind(AssertUnwindSafe(|| body(&open))))
}

type Outcome = std::thread::Result<Result<(), Fault>>;

fn conclude(function: &str, own: Option<ErrorHandler>, outcome: Outcome) -> u32 {
    let internal =
        |_| Err(Fault::new(ReturnCode::Failure, "internal error; what panicked is on standard error"));
    match outcome.unwrap_or_else(internal) {
        Ok(()) => ReturnCode::Success.number(),
        Err(fault) => {
            tell(own, &format!("{function}: {} ({})", fault.what, fault.code.name()), fault.code.number())
        }
    }
}

/// What a status looks like to C, once the handler has been asked about it.
pub fn status(function: &str, open: &Open, status: Status) -> layout::Status {
    let code = match status.code.told() {
        0 => status.code.number(),
        told => {
            let what = status.code.text().to_string_lossy();
            let message = format!("{function}: {what} ({})", status.code.name());
            status.code.after_handler(tell(open.handler, &message, told))
        }
    };
    layout::Status {
        code,
        source: status.source,
        match_info: status.match_value,
        msg_length: status.sent,
        xfer_length: status.taken,
        context: status.context,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_failure_and_goes_no_further() {
        let before = replace(Some(return_code));
        assert_eq!(answer("mx_test", || panic!("on purpose")), ReturnCode::Failure.number());
        assert_eq!(answer("mx_test", || Ok(())), 0);
        replace(Some(before));
    }
}
