//! The Python extension module `isthmus._native`: convert, call, convert back.
//!
//! The only crate that knows Python exists. A method here with an `if` about a protocol belongs a
//! crate further down.

mod bench;
mod bench_mx;
mod buffer;
mod card;
mod connection;
mod control;
mod errors;
mod living;
mod mx;
mod node;
mod seat;
mod sockets;
mod supervisor;
mod switch;

use pyo3::prelude::*;

#[pymodule(gil_used = false)]
mod _native {
    #[pymodule_export]
    use super::control::{bell_pair, check_name, control_decode, control_encode, parse_address};

    #[pymodule_export]
    use super::connection::{Connection, Datagram, Listener, Poller};

    #[pymodule_export]
    use super::bench::{
        BenchRing, bench_cacheline, bench_connect_client, bench_connect_server, bench_connection, bench_fd,
        bench_memcpy, bench_ring, bench_ring_memory,
    };

    #[pymodule_export]
    use super::bench_mx::{bench_mx, bench_mx_many};
    #[pymodule_export]
    use super::card::run_card;
    #[pymodule_export]
    use super::living::{Living, unix_socket_kind};
    #[pymodule_export]
    use super::mx::{MxEndpoint, MxWindow};
    #[pymodule_export]
    use super::seat::Seat;
    #[pymodule_export]
    use super::sockets::KernelSockets;
    #[pymodule_export]
    use super::supervisor::{pass_calls, spawn_supervised, supervise};
    #[pymodule_export]
    use super::switch::run_switch;

    #[pymodule_export]
    use super::node::{Counters, Node, Pollable, check_window};

    #[pymodule_export]
    const SMALL_DEFAULT: u32 = isthmus_engine::lane::SMALL_DEFAULT;
    #[pymodule_export]
    const LARGE_DEFAULT: u32 = isthmus_engine::lane::LARGE_DEFAULT;
    #[pymodule_export]
    const ERROR_CLASSES: [&str; 17] = super::errors::CLASSES;

    #[pymodule_export]
    const CONTROL_VERSION: u8 = isthmus_wire::control::VERSION;
    #[pymodule_export]
    const CONTROL_MESSAGE_MAX: usize = isthmus_wire::control::MESSAGE_MAX;
    #[pymodule_export]
    const CONTROL_TEXT_MAX: usize = isthmus_wire::control::TEXT_MAX;
    #[pymodule_export]
    const CONTROL_DESCRIPTORS_MAX: usize = isthmus_wire::control::DESCRIPTORS_MAX;
    #[pymodule_export]
    const ANYBODY: u32 = isthmus_wire::control::ANYBODY;
    #[pymodule_export]
    const ANY_PORT: u32 = isthmus_wire::control::ANY_PORT;
    #[pymodule_export]
    const FEATURE_GUEST: u32 = isthmus_wire::control::FEATURE_GUEST;
    #[pymodule_export]
    const FEATURE_SOCKETS: u32 = isthmus_wire::control::FEATURE_SOCKETS;
    #[pymodule_export]
    const FEATURE_WINDOWS: u32 = isthmus_wire::control::FEATURE_WINDOWS;
    #[pymodule_export]
    const WINDOWS_MAX: usize = isthmus_wire::control::WINDOWS_MAX;
    #[pymodule_export]
    const WINDOW_MAX: u64 = isthmus_wire::control::WINDOW_MAX;
    #[pymodule_export]
    const CONTROL_PORT: u32 = isthmus_wire::control::CONTROL_PORT;
    #[pymodule_export]
    const SEATS_PORT: u32 = isthmus_wire::control::SEATS_PORT;
    #[pymodule_export]
    const BELL_PORT: u32 = isthmus_wire::control::BELL_PORT;
    #[pymodule_export]
    const SOCKETS_PORT: u32 = isthmus_wire::control::SOCKETS_PORT;
    #[pymodule_export]
    const CARD_DOMAIN: &str = isthmus_wire::card::DOMAIN;
    #[pymodule_export]
    const CARD_PORT: u32 = isthmus_wire::card::PORT;
    #[pymodule_export]
    const CARD_RECORD_MAX: usize = isthmus_wire::card::RECORD_MAX;
    #[pymodule_export]
    const PRIVILEGED_PORT_MAX: u32 = isthmus_wire::control::PRIVILEGED_PORT_MAX;

    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        super::control::add_lists(module)
    }
}
