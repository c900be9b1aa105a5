//! Beginning and ending, error handlers, texts, endpoints.

use std::ffi::c_char;

use isthmus_proto::mx::matching::Contexts;

use crate::backend::{Endpoint, Fault, Host, Options, ReturnCode};
use crate::codes;
use crate::edge::Place;
use crate::environment;
use crate::handlers::{self, ErrorHandler, answer, answer_for};
use crate::layout::{EndpointHandle, Param, Setting};
use crate::library;

/// The interface's version is in the upper byte.
const MAJOR: i32 = 3;
/// `MX_ANY_NIC` and `MX_ANY_ENDPOINT`
const ANY: u32 = u32::MAX;

#[unsafe(no_mangle)]
extern "C" fn mx__init_api(api_version: i32) -> u32 {
    answer("mx_init", || {
        handlers::arm(environment::errors_are_fatal());
        library::start(|| match api_version >> 8 {
            MAJOR => Ok(()),
            other => {
                let what =
                    format!("the program was made for version {other} of the interface, and this is {MAJOR}");
                Err(Fault::new(ReturnCode::BadLibVersion, what))
            }
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_finalize() -> u32 {
    library::stop();
    ReturnCode::Success.number()
}

#[unsafe(no_mangle)]
extern "C" fn mx_set_error_handler(handler: Option<ErrorHandler>) -> ErrorHandler {
    handlers::replace(handler)
}

#[unsafe(no_mangle)]
extern "C" fn mx_strerror(code: u32) -> *const c_char {
    codes::return_text(code).as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn mx_strstatus(code: u32) -> *const c_char {
    codes::status_text(code).as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn mx_open_endpoint(
    board: u32,
    endpoint_id: u32,
    key: u32,
    params: Place<Param>,
    params_count: u32,
    endpoint: Place<EndpointHandle>,
) -> u32 {
    answer("mx_open_endpoint", || {
        let host = library::host()?;
        let given = |number| Some(number).filter(|number| *number != ANY);
        let mut options = Options {
            board: given(board),
            endpoint: given(endpoint_id),
            key,
            contexts: Contexts::default(),
            unexpected_max: None,
        };
        let handler = read_params(&params, params_count, &mut options)?;
        if endpoint.is_null() {
            return Err(Fault::new(ReturnCode::BadEndpoint, "the endpoint would go to NULL"));
        }
        endpoint.put(library::add(host.open(options)?, handler)?);
        Ok(())
    })
}

/// Fill in what the parameters say. The handler that is among them.
fn read_params(
    params: &Place<Param>,
    count: u32,
    options: &mut Options,
) -> Result<Option<ErrorHandler>, Fault> {
    let list = params.all(count).ok_or_else(|| {
        Fault::new(ReturnCode::BadParamList, format!("{count} parameters are said to be at NULL"))
    })?;
    let mut handler = None;
    for param in list {
        let unknown = |key| Fault::new(ReturnCode::BadParamName, format!("parameter {key} is not known"));
        match param.setting().map_err(unknown)? {
            Setting::ErrorHandler(given) => handler = given,
            Setting::UnexpectedMax(given) => options.unexpected_max = Some(given),
            Setting::Contexts { bits, shift } => {
                let what = || format!("{bits} bits of context id at {shift}: at most 16 bits, within 64");
                let bad = || Fault::new(ReturnCode::BadParamVal, what());
                options.contexts = Contexts::new(bits, shift).ok_or_else(bad)?;
            }
        }
    }
    Ok(handler)
}

#[unsafe(no_mangle)]
extern "C" fn mx_close_endpoint(endpoint: EndpointHandle) -> u32 {
    answer_for("mx_close_endpoint", endpoint, |open| {
        open.endpoint.close()?;
        library::remove(endpoint);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_wakeup(endpoint: EndpointHandle) -> u32 {
    answer_for("mx_wakeup", endpoint, |open| {
        open.endpoint.wakeup();
        Ok(())
    })
}
