//! The handler of unexpected messages, progression, and what MX never had.

use std::ffi::c_void;
use std::ptr;
use std::sync::Arc;

use crate::backend::{Address, Arrived, Endpoint, Fault, ReturnCode, Unexpected, Verdict};
use crate::edge::{Bytes, Place};
use crate::handlers::answer_for;
use crate::layout::{EndpointHandle, MatchingCallback, RequestHandle, UnexpectedHandler};
use crate::library::Open;

/// `MX_RECV_FINISHED`; everything else is `MX_RECV_CONTINUE`.
const FINISHED: u32 = 1;

#[unsafe(no_mangle)]
extern "C" fn mx_register_unexp_handler(
    endpoint: EndpointHandle,
    handler: Option<UnexpectedHandler>,
    context: usize,
) -> u32 {
    answer_for("mx_register_unexp_handler", endpoint, |open| {
        open.endpoint.set_unexpected(handler.map(|handler| ask(handler, context)));
        Ok(())
    })
}

fn ask(handler: UnexpectedHandler, context: usize) -> Unexpected {
    Arc::new(move |arrived: Arrived<'_>| {
        let data = arrived.data.map_or(ptr::null_mut(), |data| data.as_ptr().cast_mut().cast::<c_void>());
        let context = ptr::with_exposed_provenance_mut(context);
        // SAFETY: the program registered this function for such calls; the data is there while it runs.
        match unsafe { handler(context, arrived.source, arrived.match_value, arrived.len, data) } {
            FINISHED => Verdict::Finished,
            _ => Verdict::Continue,
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_register_unexp_callback(
    endpoint: EndpointHandle,
    callback: Option<MatchingCallback>,
    context: usize,
) -> u32 {
    answer_for("mx_register_unexp_callback", endpoint, |open| {
        open.endpoint.set_unexpected(callback.map(|callback| report(callback, context)));
        Ok(())
    })
}

fn report(callback: MatchingCallback, context: usize) -> Unexpected {
    Arc::new(move |arrived: Arrived<'_>| {
        let len = i32::try_from(arrived.len).unwrap_or(i32::MAX);
        // SAFETY: the program registered this function for such calls.
        unsafe { callback(ptr::with_exposed_provenance_mut(context), arrived.match_value, len) };
        Verdict::Continue
    })
}

fn on(function: &str, endpoint: EndpointHandle, act: impl FnOnce(&Open)) -> u32 {
    answer_for(function, endpoint, |open| {
        act(open);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_progress(endpoint: EndpointHandle) -> u32 {
    on("mx_progress", endpoint, |open| open.endpoint.progress())
}

#[unsafe(no_mangle)]
extern "C" fn mx_disable_progression(endpoint: EndpointHandle) -> u32 {
    on("mx_disable_progression", endpoint, |open| open.endpoint.pause())
}

#[unsafe(no_mangle)]
extern "C" fn mx_reenable_progression(endpoint: EndpointHandle) -> u32 {
    on("mx_reenable_progression", endpoint, |open| open.endpoint.resume())
}

fn one_sided(_open: &Open) -> Result<(), Fault> {
    Err(Fault::new(ReturnCode::Failure, "there is no one-sided access; send and receive instead"))
}

#[unsafe(no_mangle)]
extern "C" fn mx_iput(
    endpoint: EndpointHandle,
    _local: Bytes,
    _len: u32,
    _to: Address,
    _remote: u64,
    _context: usize,
    _request: Place<RequestHandle>,
) -> u32 {
    answer_for("mx_iput", endpoint, one_sided)
}

#[unsafe(no_mangle)]
extern "C" fn mx_iget(
    endpoint: EndpointHandle,
    _local: Bytes,
    _len: u32,
    _from: Address,
    _remote: u64,
    _context: usize,
    _request: Place<RequestHandle>,
) -> u32 {
    answer_for("mx_iget", endpoint, one_sided)
}
