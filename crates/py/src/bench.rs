//! The loops of `isthmus bench`: a descriptor and a plan go in, a dict comes out.

use std::os::fd::{IntoRawFd, RawFd};
use std::slice;
use std::sync::Mutex;
use std::time::Duration;

use isthmus_bench::{self as bench, BenchError, Plan, Report, Transport};
use isthmus_engine::connection::Connection as Inner;
use isthmus_engine::lane::{with_dest, with_source};
use isthmus_engine::{How, Wait};
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::buffer::Buffer;
use crate::connection::Connection;

/// A fault of the caller is a `ValueError`, one of the machine or the transport an `OSError`.
pub fn fault(error: BenchError) -> PyErr {
    match error {
        BenchError::Transport { .. } | BenchError::Memory { .. } | BenchError::NoSuchCpu { .. } => {
            PyOSError::new_err(error.to_string())
        }
        _ => PyValueError::new_err(error.to_string()),
    }
}

/// [`Report`], as the dict that `isthmus.bench.native` calls the same.
#[derive(IntoPyObject)]
pub struct ReportDict {
    p50_us: Option<f64>,
    p99_us: Option<f64>,
    count: u64,
    bytes: u64,
    seconds: Option<f64>,
    cpu_s: f64,
    total_bytes: u64,
}

impl From<Report> for ReportDict {
    fn from(report: Report) -> Self {
        let Report { p50_us, p99_us, count, bytes, seconds, cpu_s, total_bytes } = report;
        Self { p50_us, p99_us, count, bytes, seconds, cpu_s, total_bytes }
    }
}

/// `PlanDict` of `isthmus.bench.native`: what both ends of a loop are told.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct PlanDict {
    size: usize,
    warmup_s: f64,
    duration_s: f64,
    gap_s: f64,
    pages: String,
    data: String,
    windows: bool,
}

fn duration(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds)
        .map_err(|error| PyValueError::new_err(format!("{seconds} seconds: {error}")))
}

impl PlanDict {
    pub fn plan(&self) -> PyResult<Plan> {
        Ok(Plan {
            size: self.size,
            warmup: duration(self.warmup_s)?,
            duration: duration(self.duration_s)?,
            gap: duration(self.gap_s)?,
            pages: self.pages.parse().map_err(fault)?,
            data: self.data.parse().map_err(fault)?,
            windows: self.windows,
        })
    }
}

/// Play `part` over any transport while other Python threads run.
pub fn play<T: Transport + Send>(
    py: Python<'_>,
    transport: Result<T, BenchError>,
    part: &str,
    plan: &PlanDict,
) -> PyResult<ReportDict> {
    let mut transport = transport.map_err(fault)?;
    let part = part.parse().map_err(fault)?;
    let plan = plan.plan()?;
    py.detach(|| bench::play(&mut transport, part, &plan)).map(ReportDict::from).map_err(fault)
}

/// Play `part` over a connected stream socket, which stays the caller's.
#[pyfunction]
#[pyo3(signature = (fd, wait, part, plan, /))]
pub fn bench_fd(py: Python<'_>, fd: RawFd, wait: &str, part: &str, plan: PlanDict) -> PyResult<ReportDict> {
    let wait = wait.parse().map_err(fault)?;
    play(py, bench::FdStream::duplicate(fd, wait), part, &plan)
}

fn open_ring(fd: RawFd, left: bool, wait: &str, streaming: bool) -> Result<bench::MappedRing, BenchError> {
    let side = if left { bench::Side::Left } else { bench::Side::Right };
    Ok(bench::MappedRing::open_raw(fd, side, wait.parse()?)?.with_streaming_copies(streaming))
}

/// Play `part` over a ring that both sides can write; `streaming` copies out past the caches.
#[pyfunction]
#[pyo3(signature = (fd, left, streaming, wait, part, plan, /))]
pub fn bench_ring(
    py: Python<'_>,
    fd: RawFd,
    left: bool,
    streaming: bool,
    wait: &str,
    part: &str,
    plan: PlanDict,
) -> PyResult<ReportDict> {
    play(py, open_ring(fd, left, wait, streaming), part, &plan)
}

/// A new memfd for such a ring; the caller closes it.
#[pyfunction]
pub fn bench_ring_memory() -> PyResult<RawFd> {
    Ok(bench::MappedRing::memory().map_err(fault)?.into_raw_fd())
}

/// One end of a ring that both sides can write, for loops in Python.
#[pyclass(frozen, module = "isthmus._native")]
pub struct BenchRing(Mutex<bench::MappedRing>);

impl BenchRing {
    fn with(&self, run: impl FnOnce(&mut bench::MappedRing) -> std::io::Result<()>) -> PyResult<()> {
        let mut ring = self.0.lock().map_err(|_| PyRuntimeError::new_err("this end of the ring broke"))?;
        Ok(run(&mut ring)?)
    }
}

#[pymethods]
impl BenchRing {
    #[new]
    #[pyo3(signature = (fd, left, wait, streaming, /))]
    fn new(fd: RawFd, left: bool, wait: &str, streaming: bool) -> PyResult<Self> {
        Ok(Self(Mutex::new(open_ring(fd, left, wait, streaming).map_err(fault)?)))
    }

    /// Send all of `message`.
    #[pyo3(signature = (message, /))]
    fn send(&self, message: &Bound<'_, PyAny>) -> PyResult<()> {
        let buffer = Buffer::readable(message)?;
        // SAFETY: the buffer protocol pins these bytes until `buffer` is dropped. Another Python thread could write
        // them meanwhile, which the loops of `isthmus bench` do not.
        self.with(|ring| ring.send(unsafe { slice::from_raw_parts(buffer.start(), buffer.len()) }))
    }

    /// Fill all of `message`.
    #[pyo3(signature = (message, /))]
    fn recv_into(&self, message: &Bound<'_, PyAny>) -> PyResult<()> {
        let buffer = Buffer::writable(message)?;
        // SAFETY: as in `send`; the buffer is writable.
        self.with(|ring| ring.recv_exact(unsafe { slice::from_raw_parts_mut(buffer.start(), buffer.len()) }))
    }
}

/// Connect to `ip:port` or a path again and again.
#[pyfunction]
#[pyo3(signature = (address, warmup_s, duration_s, /))]
pub fn bench_connect_client(
    py: Python<'_>,
    address: &str,
    warmup_s: f64,
    duration_s: f64,
) -> PyResult<ReportDict> {
    let address = address.parse().map_err(fault)?;
    let (warmup, time) = (duration(warmup_s)?, duration(duration_s)?);
    let found = py.detach(|| bench::connect_client(&address, warmup, time)).map_err(fault)?;
    Ok(Report::from(found).into())
}

/// Accept from a listening socket, which stays the caller's, until the client is done.
#[pyfunction]
#[pyo3(signature = (listener, /))]
pub fn bench_connect_server(py: Python<'_>, listener: RawFd) -> PyResult<ReportDict> {
    let found = py.detach(|| bench::connect_server(listener)).map_err(fault)?;
    Ok(Report::from(found).into())
}

/// Copy with one thread; `copy` is `libc`, `string` or `streaming`.
#[pyfunction]
#[pyo3(signature = (size, duration_s, pages, data, copy, /))]
pub fn bench_memcpy(
    py: Python<'_>,
    size: usize,
    duration_s: f64,
    pages: &str,
    data: &str,
    copy: &str,
) -> PyResult<ReportDict> {
    let (pages, data) = (pages.parse().map_err(fault)?, data.parse().map_err(fault)?);
    let (copy, time) = (copy.parse().map_err(fault)?, duration(duration_s)?);
    let found = py.detach(|| bench::memcpy(size, time, pages, data, copy)).map_err(fault)?;
    Ok(Report::from(found).into())
}

/// Pass a cache line back and forth between two threads, on the processors `cpus` when given.
#[pyfunction]
#[pyo3(signature = (duration_s, cpus, /))]
pub fn bench_cacheline(
    py: Python<'_>,
    duration_s: f64,
    cpus: Option<(usize, usize)>,
) -> PyResult<ReportDict> {
    let time = duration(duration_s)?;
    let found = py.detach(|| bench::cacheline(cpus, time)).map_err(fault)?;
    Ok(Report::from(found).into())
}

/// A connection of ours, in the loops that every transport plays.
struct Lane<'c> {
    connection: &'c Inner,
    how: How<'c>,
}

impl Transport for Lane<'_> {
    #[inline]
    fn send(&mut self, message: &[u8]) -> std::io::Result<()> {
        with_source(message, |source| self.connection.send_stream(source, &self.how)).map_err(other)?;
        Ok(())
    }

    #[inline]
    fn recv_exact(&mut self, message: &mut [u8]) -> std::io::Result<()> {
        let len = message.len();
        let got = with_dest(message, |dest| self.connection.receive_all(dest, &self.how)).map_err(other)?;
        if got == len { Ok(()) } else { Err(std::io::ErrorKind::UnexpectedEof.into()) }
    }
}

/// The same, with messages that lie in the rings: nobody fills them, and of what arrives only the mark is read. The
/// last message is filled and read whole, so that it can be checked.
struct InPlace<'c>(Lane<'c>);

/// Bytes of a message that are written and read in any case: its mark is among them.
const TOUCHED: usize = 1;
const LAST: u8 = bench::Mark::Last as u8;
/// Longest piece that is reserved at once: a ring holds several.
const PIECE: usize = 256 * 1024;

impl Transport for InPlace<'_> {
    fn send(&mut self, message: &[u8]) -> std::io::Result<()> {
        let Lane { connection, how } = &self.0;
        let whole = message.first() == Some(&LAST);
        let mut touch = TOUCHED;
        let piece = PIECE.min(connection.message_max());
        for part in message.chunks(piece) {
            let place = connection.reserve(part.len(), how).map_err(other)?;
            let place =
                place.ok_or_else(|| std::io::Error::other("this carrier has no room to fill in place"))?;
            let touched = if whole { part.len() } else { std::mem::take(&mut touch).min(part.len()) };
            // SAFETY: `part.len()` bytes are reserved there, in memory that lives as long as the connection.
            unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), place, touched) };
            connection.commit().map_err(other)?;
        }
        Ok(())
    }

    fn recv_exact(&mut self, message: &mut [u8]) -> std::io::Result<()> {
        let Lane { connection, how } = &self.0;
        let (mut got, mut whole) = (0, false);
        while got < message.len() {
            let front = connection.front(how).map_err(other)?;
            let Some((at, len)) = front else { return Err(std::io::ErrorKind::UnexpectedEof.into()) };
            let room = message
                .get_mut(got..got + len)
                .ok_or_else(|| std::io::Error::other("a record with the bytes of two messages"))?;
            let from = connection.view().bytes(at, len);
            // SAFETY: `len` bytes of the view; the sender may change them, and then the check says so.
            unsafe {
                if got == 0 {
                    whole = from.read() == LAST;
                    room[0] = from.read();
                }
                if whole {
                    std::ptr::copy_nonoverlapping(from, room.as_mut_ptr(), len);
                }
            }
            got += len;
            connection.release_front();
        }
        Ok(())
    }
}

fn other(error: isthmus_engine::Error) -> std::io::Error {
    std::io::Error::other(error)
}

/// How a case of the benches waits: `spin`, `block`, else adaptively.
pub fn how_of<'a>(wait: &str) -> How<'a> {
    let wait = match wait {
        "spin" => Wait::Spin,
        "block" => Wait::Block,
        _ => Wait::Adaptive,
    };
    How { wait, ..How::default() }
}

/// Play `part` over a connection of ours; `in_place` leaves the messages in the rings.
#[pyfunction]
pub fn bench_connection(
    py: Python<'_>,
    connection: &Connection,
    wait: &str,
    part: &str,
    plan: PlanDict,
    in_place: bool,
) -> PyResult<ReportDict> {
    let how = how_of(wait);
    let lane = Lane { connection: &connection.inner, how };
    if in_place { play(py, Ok(InPlace(lane)), part, &plan) } else { play(py, Ok(lane), part, &plan) }
}
