//! Sends and receives, and what becomes of them.

use std::time::Duration;

use isthmus_proto::mx::matching::Pattern;

use crate::backend::{self, Address, Endpoint, Fault, Outgoing, Part, Patience, RequestId, ReturnCode};
use crate::edge::Place;
use crate::handlers::{self, answer, answer_for};
use crate::layout::{EndpointHandle, RequestHandle, Segment, Status};
use crate::library::{self, Open};

/// `MX_MAX_SEGMENTS`
const SEGMENTS_MAX: u32 = 256;
/// `NULL`
const NO_REQUEST: RequestHandle = RequestHandle(0);

/// A timeout of C is in milliseconds, and 0 is for ever.
pub fn patience(timeout_ms: u32) -> Patience {
    match timeout_ms {
        0 => Patience::Forever,
        timeout_ms => Patience::For(Duration::from_millis(timeout_ms.into())),
    }
}

/// Give the program its request. Where it wants none, nobody will ask for it.
pub fn hand_over(open: &Open, id: RequestId, request: &Place<RequestHandle>) -> Result<(), Fault> {
    if request.is_null() {
        return open.endpoint.forget(id);
    }
    request.put(open.handle_of(id));
    Ok(())
}

fn parts(segments: &Place<Segment>, count: u32) -> Result<Vec<Part>, Fault> {
    if count > SEGMENTS_MAX {
        let what = format!("{count} segments, and at most {SEGMENTS_MAX} are allowed");
        return Err(Fault::new(ReturnCode::BadSegCnt, what));
    }
    let nowhere = || Fault::new(ReturnCode::BadSegList, format!("{count} segments are said to be at NULL"));
    let list = segments.all(count).ok_or_else(nowhere)?;
    let parts: Option<Vec<Part>> = list.iter().map(Segment::part).collect();
    let parts = parts
        .ok_or_else(|| Fault::new(ReturnCode::BadSegMem, "a segment has bytes, and they are at NULL"))?;
    let total: usize = parts.iter().map(|part| part.len).sum();
    match u32::try_from(total) {
        Ok(_) => Ok(parts),
        Err(_) => {
            Err(Fault::new(ReturnCode::BadSegList, format!("{total} bytes are more than a message can have")))
        }
    }
}

/// What `_any` and the probes look for.
fn pattern(value: u64, mask: u64) -> Result<Pattern, Fault> {
    (value & !mask == 0).then_some(Pattern { value, mask }).ok_or_else(|| ReturnCode::BadMatchMask.into())
}

/// Where an outcome goes, and whether there is one.
struct Outcome {
    status: Place<Status>,
    result: Place<u32>,
}

impl Outcome {
    /// What is not there leaves the status alone.
    fn put(&self, function: &str, open: &Open, found: Option<backend::Status>) {
        self.result.put(found.is_some().into());
        if let Some(status) = found {
            self.status.put(handlers::status(function, open, status));
        }
    }
}

fn send(
    function: &str,
    endpoint: EndpointHandle,
    (segments, count): (Place<Segment>, u32),
    (to, match_value, synchronous): (Address, u64, bool),
    context: usize,
    request: Place<RequestHandle>,
) -> u32 {
    answer_for(function, endpoint, |open| {
        let parts = parts(&segments, count)?;
        let outgoing = Outgoing { parts: &parts, to, match_value, synchronous, context };
        // SAFETY: the program lends the memory of its segments until the request is done.
        let id = unsafe { open.endpoint.isend(outgoing) }?;
        hand_over(open, id, &request)
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_isend(
    endpoint: EndpointHandle,
    segments: Place<Segment>,
    count: u32,
    to: Address,
    match_info: u64,
    context: usize,
    request: Place<RequestHandle>,
) -> u32 {
    send("mx_isend", endpoint, (segments, count), (to, match_info, false), context, request)
}

#[unsafe(no_mangle)]
extern "C" fn mx_issend(
    endpoint: EndpointHandle,
    segments: Place<Segment>,
    count: u32,
    to: Address,
    match_info: u64,
    context: usize,
    request: Place<RequestHandle>,
) -> u32 {
    send("mx_issend", endpoint, (segments, count), (to, match_info, true), context, request)
}

#[unsafe(no_mangle)]
extern "C" fn mx_irecv(
    endpoint: EndpointHandle,
    segments: Place<Segment>,
    count: u32,
    match_info: u64,
    match_mask: u64,
    context: usize,
    request: Place<RequestHandle>,
) -> u32 {
    answer_for("mx_irecv", endpoint, |open| {
        let parts = parts(&segments, count)?;
        let pattern = Pattern { value: match_info, mask: match_mask };
        // SAFETY: the program lends the memory of its segments until the request is done.
        let id = unsafe { open.endpoint.irecv(&parts, pattern, context) }?;
        hand_over(open, id, &request)
    })
}

fn complete(
    function: &str,
    endpoint: EndpointHandle,
    request: Place<RequestHandle>,
    patience: Patience,
    outcome: Outcome,
) -> u32 {
    answer_for(function, endpoint, |open| {
        let found = open.endpoint.complete(open.request(request.get())?, patience)?;
        if found.is_some() {
            request.put(NO_REQUEST);
        }
        outcome.put(function, open, found);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_test(
    endpoint: EndpointHandle,
    request: Place<RequestHandle>,
    status: Place<Status>,
    result: Place<u32>,
) -> u32 {
    complete("mx_test", endpoint, request, Patience::None, Outcome { status, result })
}

#[unsafe(no_mangle)]
extern "C" fn mx_wait(
    endpoint: EndpointHandle,
    request: Place<RequestHandle>,
    timeout: u32,
    status: Place<Status>,
    result: Place<u32>,
) -> u32 {
    complete("mx_wait", endpoint, request, patience(timeout), Outcome { status, result })
}

fn complete_any(
    function: &str,
    endpoint: EndpointHandle,
    (value, mask): (u64, u64),
    patience: Patience,
    outcome: Outcome,
) -> u32 {
    answer_for(function, endpoint, |open| {
        let found = open.endpoint.complete_any(pattern(value, mask)?, patience)?;
        outcome.put(function, open, found);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_test_any(
    endpoint: EndpointHandle,
    match_info: u64,
    match_mask: u64,
    status: Place<Status>,
    result: Place<u32>,
) -> u32 {
    complete_any(
        "mx_test_any",
        endpoint,
        (match_info, match_mask),
        Patience::None,
        Outcome { status, result },
    )
}

#[unsafe(no_mangle)]
extern "C" fn mx_wait_any(
    endpoint: EndpointHandle,
    timeout: u32,
    match_info: u64,
    match_mask: u64,
    status: Place<Status>,
    result: Place<u32>,
) -> u32 {
    complete_any(
        "mx_wait_any",
        endpoint,
        (match_info, match_mask),
        patience(timeout),
        Outcome { status, result },
    )
}

fn peek(
    function: &str,
    endpoint: EndpointHandle,
    patience: Patience,
    request: Place<RequestHandle>,
    result: Place<u32>,
) -> u32 {
    answer_for(function, endpoint, |open| {
        let found = open.endpoint.peek(patience)?;
        if let Some(id) = found {
            request.put(open.handle_of(id));
        }
        result.put(found.is_some().into());
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_ipeek(endpoint: EndpointHandle, request: Place<RequestHandle>, result: Place<u32>) -> u32 {
    peek("mx_ipeek", endpoint, Patience::None, request, result)
}

#[unsafe(no_mangle)]
extern "C" fn mx_peek(
    endpoint: EndpointHandle,
    timeout: u32,
    request: Place<RequestHandle>,
    result: Place<u32>,
) -> u32 {
    peek("mx_peek", endpoint, patience(timeout), request, result)
}

fn probe(
    function: &str,
    endpoint: EndpointHandle,
    (value, mask): (u64, u64),
    patience: Patience,
    outcome: Outcome,
) -> u32 {
    answer_for(function, endpoint, |open| {
        let found = open.endpoint.probe(pattern(value, mask)?, patience)?;
        outcome.put(function, open, found);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_iprobe(
    endpoint: EndpointHandle,
    match_info: u64,
    match_mask: u64,
    status: Place<Status>,
    result: Place<u32>,
) -> u32 {
    probe("mx_iprobe", endpoint, (match_info, match_mask), Patience::None, Outcome { status, result })
}

#[unsafe(no_mangle)]
extern "C" fn mx_probe(
    endpoint: EndpointHandle,
    timeout: u32,
    match_info: u64,
    match_mask: u64,
    status: Place<Status>,
    result: Place<u32>,
) -> u32 {
    probe("mx_probe", endpoint, (match_info, match_mask), patience(timeout), Outcome { status, result })
}

fn buffered(
    function: &str,
    endpoint: EndpointHandle,
    request: Place<RequestHandle>,
    patience: Patience,
    result: Place<u32>,
) -> u32 {
    answer_for(function, endpoint, |open| {
        result.put(open.endpoint.is_buffered(open.request(request.get())?, patience)?.into());
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_ibuffered(
    endpoint: EndpointHandle,
    request: Place<RequestHandle>,
    result: Place<u32>,
) -> u32 {
    buffered("mx_ibuffered", endpoint, request, Patience::None, result)
}

#[unsafe(no_mangle)]
extern "C" fn mx_buffered(
    endpoint: EndpointHandle,
    request: Place<RequestHandle>,
    timeout: u32,
    result: Place<u32>,
) -> u32 {
    buffered("mx_buffered", endpoint, request, patience(timeout), result)
}

#[unsafe(no_mangle)]
extern "C" fn mx_context(request: Place<RequestHandle>, context: Place<usize>) -> u32 {
    answer("mx_context", || {
        let handle = request.get().unwrap_or(NO_REQUEST);
        let open = library::owner(handle)?;
        context.put(open.endpoint.context(open.request(Some(handle))?)?);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_cancel(endpoint: EndpointHandle, request: Place<RequestHandle>, result: Place<u32>) -> u32 {
    answer_for("mx_cancel", endpoint, |open| {
        let is_gone = open.endpoint.cancel(open.request(request.get())?)?;
        if is_gone {
            request.put(NO_REQUEST);
        }
        result.put(is_gone.into());
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_forget(endpoint: EndpointHandle, request: Place<RequestHandle>) -> u32 {
    answer_for("mx_forget", endpoint, |open| {
        open.endpoint.forget(open.request(request.get())?)?;
        request.put(NO_REQUEST);
        Ok(())
    })
}

/// The request by value. 0 milliseconds are for ever, as everywhere.
#[unsafe(no_mangle)]
extern "C" fn mx_set_request_timeout(endpoint: EndpointHandle, request: RequestHandle, timeout: u32) -> u32 {
    answer_for("mx_set_request_timeout", endpoint, |open| {
        let id = match request {
            NO_REQUEST => None,
            request => Some(open.request(Some(request))?),
        };
        open.endpoint.set_patience(id, patience(timeout))
    })
}
