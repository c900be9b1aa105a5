//! Load loops and machine limits for `isthmus bench`.
//!
//! Every figure that a native client reports comes from here: the same ping-pong and the same stream, generic over
//! whatever carries the messages. Implement [`Transport`] (two methods) and the loops are yours; each is compiled for
//! its transport, so nothing stands between the loop and the carrier. The baselines live here too: anything with a
//! descriptor ([`FdStream`]), a ring that both sides can write ([`MappedRing`]: what one gets without isolation), and
//! the limits no transport can pass ([`memcpy`], [`cacheline`]).
//!
//! Refused here: processes, namespaces, statistics over several runs, tables. Those are Python's (`isthmus.bench`).
//!
//! Read [`pingpong_client`] and [`stream_receiver`] first. How the loops agree on an end without a second channel:
//! byte 0 of every message is a [`Mark`].

mod buffer;
mod cacheline;
mod clock;
mod connect;
mod copy;
mod error;
mod fd;
mod histogram;
mod loops;
mod memcpy;
mod report;
mod ring;
mod wait;

pub use buffer::{COLD_BYTES, Data, Pages};
pub use cacheline::cacheline;
pub use clock::Clock;
pub use connect::{Address, Connects, connect_client, connect_server};
pub use copy::Copy as CopyKernel;
pub use error::BenchError;
pub use fd::FdStream;
pub use histogram::Histogram;
pub use loops::{
    Latency, Mark, Plan, Served, Throughput, Transport, pingpong_client, pingpong_server, stream_receiver,
    stream_sender,
};
pub use memcpy::memcpy;
pub use report::{Part, Report, play};
pub use ring::{MappedRing, RING_BYTES, Side};
pub use wait::{ADAPTIVE_SPIN, Wait};
