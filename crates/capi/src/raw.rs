//! Whole frames, for daemons that find out who is on a network.
//!
//! There are none to be had: finding peers is the backend's own business. No endpoint of this kind opens, so that every
//! other function here is given one that is not.

use crate::backend::{Fault, Host, ReturnCode};
use crate::edge::{Bytes, Place, Text};
use crate::handlers::answer;
use crate::layout::Param;
use crate::library;

/// `MX__INVALID_HANDLE`
const INVALID_HANDLE: i32 = -1;

/// `mx_raw_endpoint_t`
#[repr(transparent)]
struct RawHandle(#[allow(dead_code, reason = "no number of it is good")] usize);

#[unsafe(no_mangle)]
extern "C" fn mx_raw_open_endpoint(
    board: u32,
    _params: Place<Param>,
    _params_count: u32,
    _endpoint: Place<usize>,
) -> u32 {
    answer("mx_raw_open_endpoint", || {
        if board as usize >= library::host()?.boards().len() {
            return Err(Fault::new(ReturnCode::BoardUnknown, format!("there is no board {board}")));
        }
        Err(Fault::new(ReturnCode::NoDev, "there are no raw endpoints; peers are found without"))
    })
}

#[unsafe(no_mangle)]
extern "C" fn mx_raw_handle(_endpoint: RawHandle) -> i32 {
    INVALID_HANDLE
}

/// Functions that are given an endpoint which cannot be: their names, and the types of what else they are given.
macro_rules! refuse {
    ($($name:ident($($type:ty),*);)*) => { $(
        #[unsafe(no_mangle)]
        extern "C" fn $name(_: RawHandle $(, _: $type)*) -> u32 {
            answer(stringify!($name), || {
                Err(Fault::new(ReturnCode::BadEndpoint, "no such raw endpoint is open"))
            })
        }
    )* };
}

refuse! {
    mx_raw_close_endpoint();
    mx_raw_send(u32, Bytes, u32, Bytes, u32, usize);
    mx_raw_next_event(Place<u32>, Place<usize>, Bytes, Place<u32>, u32, Place<i32>);
    mx_raw_set_route_begin();
    mx_raw_set_route_end();
    mx_raw_set_route_mag(u64, Bytes, u32, u32, u32, u32, u32);
    mx_raw_set_route(u64, Bytes, u32, u32, u32, u32);
    mx_raw_clear_routes(u64, u32);
    mx_raw_remove_peer(u64);
    mx_raw_set_map_version(u32, u64, u32, u32, u32);
    mx_raw_num_ports(Place<u32>);
    mx_raw_line_speed(Place<u32>);
    mx_raw_set_hostname(Text);
    mx_raw_set_peer_name(u64, Text);
    mx_raw_set_nic_reply_info(Bytes, u32);
}
