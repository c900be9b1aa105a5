//! The native loops of `isthmus bench`, as functions that take a descriptor and give a dict.

use std::{
    os::fd::{IntoRawFd, RawFd},
    time::Duration,
};

use isthmus_bench::{self as bench, BenchError, Plan, Report, Transport};
use isthmus_engine::connection::Connection as Inner;
use isthmus_engine::lane::{with_dest, with_source};
use isthmus_engine::{How, Wait};
use pyo3::{
    exceptions::{PyOSError, PyValueError},
    prelude::*,
    types::PyByteArray,
};

use crate::connection::Connection;

fn to_python(error: BenchError) -> PyErr {
    match error {
        BenchError::Transport { .. } | BenchError::Memory { .. } | BenchError::NoSuchCpu { .. } => {
            PyOSError::new_err(error.to_string())
        }
        _ => PyValueError::new_err(error.to_string()),
    }
}

/// [`Report`], as the dict that `isthmus.bench.native` names `Report`.
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

/// What every loop is told, as keyword arguments.
#[derive(FromPyObject)]
pub struct PlanArguments {
    #[pyo3(item)]
    size: usize,
    #[pyo3(item)]
    warmup_s: f64,
    #[pyo3(item)]
    duration_s: f64,
    #[pyo3(item)]
    gap_s: f64,
    #[pyo3(item)]
    pages: String,
    #[pyo3(item)]
    data: String,
}

fn seconds(value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value).map_err(|error| PyValueError::new_err(format!("{value} s: {error}")))
}

impl PlanArguments {
    fn plan(&self) -> PyResult<Plan> {
        Ok(Plan {
            size: self.size,
            warmup: seconds(self.warmup_s)?,
            duration: seconds(self.duration_s)?,
            gap: seconds(self.gap_s)?,
            pages: self.pages.parse().map_err(to_python)?,
            data: self.data.parse().map_err(to_python)?,
        })
    }
}

/// Play `part` over any [`Transport`], without the GIL.
pub fn play<T: Transport + Send>(
    py: Python<'_>,
    transport: Result<T, BenchError>,
    part: &str,
    plan: &PlanArguments,
) -> PyResult<ReportDict> {
    let mut transport = transport.map_err(to_python)?;
    let part = part.parse().map_err(to_python)?;
    let plan = plan.plan()?;
    py.detach(|| bench::play(&mut transport, part, &plan)).map(ReportDict::from).map_err(to_python)
}

/// Play `part` over a connected stream socket.
#[pyfunction]
pub fn bench_fd(
    py: Python<'_>,
    fd: RawFd,
    wait: &str,
    part: &str,
    plan: PlanArguments,
) -> PyResult<ReportDict> {
    let wait = wait.parse().map_err(to_python)?;
    play(py, bench::FdStream::duplicate(fd, wait), part, &plan)
}

fn open_ring(fd: RawFd, left: bool, wait: &str, streaming: bool) -> Result<bench::MappedRing, BenchError> {
    let side = if left { bench::Side::Left } else { bench::Side::Right };
    Ok(bench::MappedRing::open_raw(fd, side, wait.parse()?)?.with_streaming_copies(streaming))
}

/// Play `part` over a ring that both sides can write.
#[pyfunction]
pub fn bench_ring(
    py: Python<'_>,
    fd: RawFd,
    left: bool,
    streaming: bool,
    wait: &str,
    part: &str,
    plan: PlanArguments,
) -> PyResult<ReportDict> {
    play(py, open_ring(fd, left, wait, streaming), part, &plan)
}

/// A new memfd for a ring; the caller closes it.
#[pyfunction]
pub fn bench_ring_memory() -> PyResult<RawFd> {
    Ok(bench::MappedRing::memory().map_err(to_python)?.into_raw_fd())
}

/// One end of a ring that both sides can write, for loops in Python.
#[pyclass]
pub struct BenchRing(bench::MappedRing);

#[pymethods]
impl BenchRing {
    #[new]
    fn new(fd: RawFd, left: bool, wait: &str, streaming: bool) -> PyResult<Self> {
        Ok(Self(open_ring(fd, left, wait, streaming).map_err(to_python)?))
    }

    fn send(&mut self, message: &Bound<'_, PyByteArray>) -> PyResult<()> {
        // SAFETY: the GIL is held until the copy is done and nothing runs Python meanwhile; on a free-threaded build the
        // caller must not resize the buffer from another thread, which the loops of `isthmus bench` do not.
        Ok(self.0.send(unsafe { message.as_bytes() })?)
    }

    fn recv_into(&mut self, message: &Bound<'_, PyByteArray>) -> PyResult<()> {
        // SAFETY: as in `send`; no other reference to the buffer exists in this call.
        Ok(self.0.recv_exact(unsafe { message.as_bytes_mut() })?)
    }
}

/// Connect to `address` (`ip:port` or a path) again and again.
#[pyfunction]
pub fn bench_connect_client(
    py: Python<'_>,
    address: &str,
    warmup_s: f64,
    duration_s: f64,
) -> PyResult<ReportDict> {
    let address = address.parse().map_err(to_python)?;
    let (warmup, duration) = (seconds(warmup_s)?, seconds(duration_s)?);
    let found = py.detach(|| bench::connect_client(&address, warmup, duration)).map_err(to_python)?;
    Ok(Report::from(found).into())
}

/// Accept from a listening socket until the client is done.
#[pyfunction]
pub fn bench_connect_server(py: Python<'_>, listener: RawFd) -> PyResult<ReportDict> {
    let found = py.detach(|| bench::connect_server(listener)).map_err(to_python)?;
    Ok(Report::from(found).into())
}

/// Copy in one thread: `copy` is `libc`, `string` or `streaming`.
#[pyfunction]
pub fn bench_memcpy(
    py: Python<'_>,
    size: usize,
    duration_s: f64,
    pages: &str,
    data: &str,
    copy: &str,
) -> PyResult<ReportDict> {
    let (pages, data) = (pages.parse().map_err(to_python)?, data.parse().map_err(to_python)?);
    let (copy, duration) = (copy.parse().map_err(to_python)?, seconds(duration_s)?);
    let found = py.detach(|| bench::memcpy(size, duration, pages, data, copy)).map_err(to_python)?;
    Ok(Report::from(found).into())
}

/// Pass a cache line back and forth between two threads, pinned to `cpus` when given.
#[pyfunction]
#[pyo3(signature = (duration_s, cpus=None))]
pub fn bench_cacheline(
    py: Python<'_>,
    duration_s: f64,
    cpus: Option<(usize, usize)>,
) -> PyResult<ReportDict> {
    let duration = seconds(duration_s)?;
    let found = py.detach(|| bench::cacheline(cpus, duration)).map_err(to_python)?;
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

fn other(error: isthmus_engine::Error) -> std::io::Error {
    std::io::Error::other(error)
}

/// Play `part` over a connection of ours.
#[pyfunction]
pub fn bench_connection(
    py: Python<'_>,
    connection: &Connection,
    wait: &str,
    part: &str,
    plan: PlanArguments,
) -> PyResult<ReportDict> {
    let wait = match wait {
        "spin" => Wait::Spin,
        "block" => Wait::Block,
        _ => Wait::Adaptive,
    };
    let how = How { wait, ..How::default() };
    play(py, Ok(Lane { connection: &connection.inner, how }), part, &plan)
}
