//! What the C functions need from below: a [`Host`] that boards and peers are known to, and its [`Endpoint`]s.
//!
//! Everything that is C stays above: handles, layouts, error handlers, timeouts where 0 is for ever. What is here
//! speaks of requests by number, says what went wrong by a [`Fault`], and calls nothing of the program's but the
//! handler of unexpected messages, and that with no lock held.

use std::sync::Arc;
use std::time::Duration;

use isthmus_proto::mx::matching::{Contexts, Pattern};

pub use crate::codes::{Fault, ReturnCode, StatusCode};

mod node;

/// The backend that this library is made with.
pub type Chosen = node::Node;

/// Most endpoints of a program at a time, over all boards: the numbers of requests need the other bits.
pub const OPEN_MAX: usize = u16::MAX as usize - 1;

/// Bits of a [`RequestId`].
pub const REQUEST_BITS: u32 = 48;

/// A stretch of the program's memory, which it lends until the request is done.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub start: *mut u8,
    pub len: usize,
}

// SAFETY: a Part is a number until somebody follows it, and whoever does answers for that; the program lends the memory
// to the library as a whole, not to one thread.
unsafe impl Send for Part {}

/// Who can be sent to; the sixteen bytes that programs keep. All zero is nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Address(pub [u64; 2]);

/// What an address says of its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decomposed {
    pub nic: u64,
    pub endpoint: u32,
    pub session: u32,
}

/// A request of one endpoint: never 0, of [`REQUEST_BITS`] bits, and not soon used again for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// What became of a request, or what a message would become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    pub code: StatusCode,
    /// Of a send: where it went.
    pub source: Address,
    pub match_value: u64,
    /// Bytes.
    pub sent: u32,
    /// Bytes.
    pub taken: u32,
    /// What the program gave with the request.
    pub context: usize,
}

/// How long a call may wait for what it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    None,
    For(Duration),
    Forever,
}

/// A message that no receive waits for, as a handler sees it. `data`: in full, or not at all.
pub struct Arrived<'a> {
    pub source: Address,
    pub match_value: u64,
    pub len: u32,
    pub data: Option<&'a [u8]>,
}

/// What a handler of unexpected messages wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Try the receives once more, then keep it.
    Continue,
    /// The message is dealt with.
    Finished,
}

/// A handler of unexpected messages. Called without any lock, and by one thread at a time for each endpoint.
pub type Unexpected = Arc<dyn Fn(Arrived<'_>) -> Verdict + Send + Sync>;

/// An interface that endpoints can be opened on.
#[derive(Clone, Debug)]
pub struct Board {
    /// The MAC address as a number: the first byte of the wire in bits 47 to 40.
    pub nic: u64,
    pub numa_node: u32,
    pub speed: Speed,
}

/// As the C interface numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(dead_code, reason = "all that the interface has a number for")]
pub enum Speed {
    TwoGigabit = 0,
    TenGigabit = 1,
    /// As fast as whatever Ethernet there is.
    Ethernet = 2,
}

/// What is known of the fabric a board is part of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fabric {
    pub mapper_nic: u64,
    pub map_version: u32,
    pub hosts: u32,
}

/// How an endpoint is opened. `None`: any that is free; endpoints are spread over boards.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub board: Option<u32>,
    pub endpoint: Option<u32>,
    /// Compared when a peer connects, and never else.
    pub key: u32,
    pub contexts: Contexts,
    /// Bytes or messages that may wait unexpected; a backend may have limits of its own.
    pub unexpected_max: Option<u32>,
}

/// Between `mx_init` and `mx_finalize`. Endpoints outlive it.
pub trait Host: Sized + Send + Sync + 'static {
    type Endpoint: Endpoint;

    /// Endpoints of a board.
    const ENDPOINTS_MAX: u32;
    /// Bytes of the longest message that is not sent before a receive has taken it.
    const COPY_SEND_MAX: u32;
    /// Bytes of the longest message that goes into one frame with its header.
    const PIO_SEND_MAX: u32;
    /// Names of what is counted, each shorter than 128 bytes.
    const COUNTERS: &'static [&'static str];

    /// # Errors
    /// `NoDev`, `NoDriver`, `NoPerm`, `BadKernelVersion`: why there is none.
    fn start() -> Result<Self, Fault>;
    /// In the order of their numbers.
    fn boards(&self) -> Vec<Board>;
    /// As many as [`Host::COUNTERS`]; `None`: no such board.
    fn counters(&self, board: u32) -> Option<Vec<u32>>;
    /// `None`: no such board.
    fn fabric(&self, board: u32) -> Option<Fabric>;
    /// Boards of peers, and our own. By convention `host:N`, N being the number of the board at its host.
    fn nic_named(&self, name: &str) -> Option<u64>;
    /// Empty: known, but not by name yet.
    fn name_of(&self, nic: u64) -> Option<String>;
    /// # Errors
    /// `BoardUnknown`, `BadEndpoint`: no such number. `Busy`: in use, or none is left.
    fn open(&self, options: Options) -> Result<Self::Endpoint, Fault>;

    // An address is asked these without an endpoint, also after `mx_finalize`.

    fn decompose(address: Address) -> Decomposed;
    /// What the program keeps with the address; 0 until it is set, and for an address of nobody.
    fn context_of(address: Address) -> usize;
    fn set_context_of(address: Address, context: usize);
}

/// One endpoint. Safe to be called by many threads; a request is completed by one of them.
pub trait Endpoint: Send + Sync + 'static {
    fn board(&self) -> u32;
    fn address(&self) -> Address;
    /// Everything not completed is gone; whoever waits gets nothing. May linger for what was sent and not arrived.
    ///
    /// # Errors
    /// `CloseInHandler`; the endpoint stays open.
    fn close(&self) -> Result<(), Fault>;

    /// # Errors
    /// `NicNotFound`, `BadEndpointId`, `ConnectionFailed`, `BadConnectionKey`; `Timeout`, also if woken.
    fn connect(&self, nic: u64, endpoint: u32, key: u32, patience: Patience) -> Result<Address, Fault>;
    /// # Errors
    /// `NicNotFound`, at once; everything else is in the status.
    fn iconnect(
        &self,
        nic: u64,
        endpoint: u32,
        key: u32,
        match_value: u64,
        context: usize,
    ) -> Result<RequestId, Fault>;
    /// # Errors
    /// `BadEndpoint`: not an address of this endpoint, or not one that can be parted with.
    fn disconnect(&self, address: Address) -> Result<(), Fault>;

    /// # Safety
    /// The memory of `parts` can be read, and is left alone, until the request is done or [`Endpoint::is_buffered`].
    /// They are at most 256 and together of less than 4 GiB.
    ///
    /// # Errors
    /// `NoResources`.
    unsafe fn isend(&self, send: Outgoing<'_>) -> Result<RequestId, Fault>;
    /// # Safety
    /// The memory of `parts` can be written, and is left alone, until the request is done, cancelled or the endpoint
    /// closed. They are at most 256 and together of less than 4 GiB.
    ///
    /// # Errors
    /// `BadMatchMask`, `BadMatchingForContextIdMask`, `NoResources`.
    unsafe fn irecv(&self, parts: &[Part], pattern: Pattern, context: usize) -> Result<RequestId, Fault>;

    // Of all that follow: `BadRequest` is the error where there is no such request.

    /// `None`: not done in that time, or woken. Done: the request is gone.
    fn complete(&self, id: RequestId, patience: Patience) -> Result<Option<Status>, Fault>;
    /// The same for the request that was done first of those whose value the pattern takes.
    fn complete_any(&self, pattern: Pattern, patience: Patience) -> Result<Option<Status>, Fault>;
    /// The request that was done first, without completing it; [`Endpoint::complete`] then succeeds at once.
    fn peek(&self, patience: Patience) -> Result<Option<RequestId>, Fault>;
    /// The oldest unexpected message that the pattern takes, which stays where it is.
    fn probe(&self, pattern: Pattern, patience: Patience) -> Result<Option<Status>, Fault>;
    /// Only of sends.
    fn is_buffered(&self, id: RequestId, patience: Patience) -> Result<bool, Fault>;
    fn context(&self, id: RequestId) -> Result<usize, Fault>;
    /// True: gone, and nothing more is heard of it. False: it completes as others do.
    ///
    /// # Errors
    /// `CancelNotSupported`: a send.
    fn cancel(&self, id: RequestId) -> Result<bool, Fault>;
    /// It completes without anybody being told.
    fn forget(&self, id: RequestId) -> Result<(), Fault>;
    /// Peers that do not answer this request for so long are given up. `id` of `None`: those posted from now on.
    fn set_patience(&self, id: Option<RequestId>, patience: Patience) -> Result<(), Fault>;

    fn set_unexpected(&self, handler: Option<Unexpected>);
    fn progress(&self);
    /// Returns once no handler runs, unless called by one.
    fn pause(&self);
    fn resume(&self);
    /// Whoever waits now returns with nothing.
    fn wakeup(&self);
}

/// A message to be sent.
pub struct Outgoing<'a> {
    pub parts: &'a [Part],
    pub to: Address,
    pub match_value: u64,
    /// Done only once a receive has taken it.
    pub synchronous: bool,
    pub context: usize,
}
