//! `Connection`, `Listener`, `Datagram`, `Poller`: the engine's objects for Python.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use isthmus_engine::connection::Connection as Inner;
use isthmus_engine::datagram::Datagram as InnerDatagram;
use isthmus_engine::listener::Listener as InnerListener;
use isthmus_engine::poller::Poller as InnerPoller;
use isthmus_engine::{Dest, Source};
use isthmus_engine::{Error, How, Result, Wait};
use isthmus_wire::control::{Carrier, SocketKind};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

use crate::buffer::Buffer;
use crate::errors::to_python;
use crate::mx::MxWindow;

/// Transfers of at least so many bytes let other Python threads run meanwhile.
const DETACH_BYTES: usize = 32 * 1024;
/// Looks at an empty lane before other Python threads may run: about a microsecond.
const EAGER_LOOKS: u32 = 40;

/// How a call waits, from Python's words. `timeout` in seconds; `None` waits for ever, 0 not at all.
pub fn with_how<T: Send>(
    py: Python<'_>,
    wait: Wait,
    timeout: Option<f64>,
    run: impl FnOnce(&How<'_>) -> Result<T> + Send,
) -> PyResult<T> {
    let now = timeout.is_some_and(|t| t <= 0.0);
    let deadline = match timeout {
        Some(t) if !now => {
            Some(Duration::try_from_secs_f64(t).ok().and_then(|t| Instant::now().checked_add(t)).ok_or_else(
                || PyValueError::new_err(format!("timeout={t}: seconds, not negative, not NaN")),
            )?)
        }
        _ => None,
    };
    // A signal handler may raise: keep what it raised and end the wait.
    let raised: Mutex<Option<PyErr>> = Mutex::new(None);
    let ask = || {
        Python::attach(|py| match py.check_signals() {
            Ok(()) => false,
            Err(error) => {
                if let Ok(mut raised) = raised.lock() {
                    *raised = Some(error);
                }
                true
            }
        })
    };
    let result = if now {
        run(&How::at_once())
    } else {
        let how = How { wait, now, deadline, interrupted: Some(&ask) };
        py.detach(|| run(&how))
    };
    result.map_err(|error| {
        let raised = raised.lock().ok().and_then(|mut raised| raised.take());
        raised.unwrap_or_else(|| to_python(py, &error))
    })
}

/// Pointers into Python buffers, pinned by the caller's stack.
struct Parts<T>(Vec<T>);
// SAFETY: the buffers stay pinned whichever thread looks at them.
unsafe impl<T> Send for Parts<T> {}

/// A source or destination that may cross into a detached closure.
struct Movable<T>(T);
// SAFETY: as for `Parts`.
unsafe impl<T> Send for Movable<T> {}

impl<T> Movable<T> {
    /// By method, so that closures capture the whole and not the pointer inside.
    fn get(&mut self) -> &mut T {
        &mut self.0
    }
}

pub fn wait_of(value: u8) -> Wait {
    match value {
        0 => Wait::Spin,
        2 => Wait::Block,
        _ => Wait::Adaptive,
    }
}

/// A connection over two lanes. `isthmus.Socket` wraps it.
#[pyclass(frozen, module = "isthmus._native")]
pub struct Connection {
    pub inner: Arc<Inner>,
    wait: AtomicU8,
}

impl Connection {
    pub fn new(inner: Arc<Inner>) -> Self {
        Self { inner, wait: AtomicU8::new(1) }
    }

    fn wait_mode(&self) -> Wait {
        wait_of(self.wait.load(Ordering::Relaxed))
    }

    /// Is there something at the front, after a short eager look? Only worth it before waiting.
    fn eager(&self) -> bool {
        (0..EAGER_LOOKS).any(|_| {
            std::hint::spin_loop();
            self.inner.poll_receive()
        })
    }

    fn receive_with<T: Send>(
        &self,
        py: Python<'_>,
        timeout: Option<f64>,
        room: usize,
        mut run: impl FnMut(&How<'_>) -> Result<T> + Send,
    ) -> PyResult<T> {
        if room < DETACH_BYTES && timeout.is_none_or(|t| t > 0.0) && self.eager() {
            match run(&How::at_once()) {
                // Another thread was faster.
                Err(Error::WouldBlock { .. }) => {}
                result => return result.map_err(|e| to_python(py, &e)),
            }
        }
        with_how(py, self.wait_mode(), timeout, run)
    }
}

#[pymethods]
impl Connection {
    /// Send a buffer: all of it as stream bytes, or as one message. Returns the bytes sent.
    fn send(&self, py: Python<'_>, data: &Bound<'_, PyAny>, timeout: Option<f64>) -> PyResult<usize> {
        let buffer = Buffer::readable(data)?;
        let len = buffer.len();
        let parts = Parts(vec![(buffer.start().cast_const(), len)]);
        self.send_parts(py, parts, len, timeout)
    }

    /// Send a list of buffers one after the other.
    fn sendmsg(
        &self,
        py: Python<'_>,
        buffers: Vec<Bound<'_, PyAny>>,
        timeout: Option<f64>,
    ) -> PyResult<usize> {
        let held = buffers.iter().map(Buffer::readable).collect::<PyResult<Vec<_>>>()?;
        let parts = Parts(held.iter().map(|b| (b.start().cast_const(), b.len())).collect());
        let len = held.iter().map(Buffer::len).sum();
        self.send_parts(py, parts, len, timeout)
    }

    /// Receive into a buffer. Returns the bytes stored and the length of the message.
    #[pyo3(signature = (into, timeout, peek=false))]
    fn recv_into(
        &self,
        py: Python<'_>,
        into: &Bound<'_, PyAny>,
        timeout: Option<f64>,
        peek: bool,
    ) -> PyResult<(usize, usize)> {
        let buffer = Buffer::writable(into)?;
        let parts = Parts(vec![(buffer.start(), buffer.len())]);
        self.recv_parts(py, parts, buffer.len(), timeout, peek)
    }

    /// Receive into a list of buffers, filled one after the other.
    #[pyo3(signature = (into, timeout, peek=false))]
    fn recvmsg_into(
        &self,
        py: Python<'_>,
        into: Vec<Bound<'_, PyAny>>,
        timeout: Option<f64>,
        peek: bool,
    ) -> PyResult<(usize, usize)> {
        let held = into.iter().map(Buffer::writable).collect::<PyResult<Vec<_>>>()?;
        let parts = Parts(held.iter().map(|b| (b.start(), b.len())).collect());
        let len = held.iter().map(Buffer::len).sum();
        self.recv_parts(py, parts, len, timeout, peek)
    }

    /// Fill a buffer from the stream; fewer bytes only at its end.
    fn recv_exactly_into(
        &self,
        py: Python<'_>,
        into: &Bound<'_, PyAny>,
        timeout: Option<f64>,
    ) -> PyResult<usize> {
        let buffer = Buffer::writable(into)?;
        let room = buffer.len();
        let parts = Parts(vec![(buffer.start(), room)]);
        // SAFETY: the buffer is held by this method until after the call.
        let mut dest = Movable(unsafe { Dest::new(&parts.0) });
        self.receive_with(py, timeout, DETACH_BYTES, |how| self.inner.receive_all(dest.get(), how))
    }

    /// Receive at most `limit` bytes, or one message cut to `limit`: (bytes, length of the message).
    #[pyo3(signature = (limit, timeout, peek=false))]
    fn recv<'py>(
        &self,
        py: Python<'py>,
        limit: usize,
        timeout: Option<f64>,
        peek: bool,
    ) -> PyResult<(Bound<'py, PyBytes>, usize)> {
        let stream = self.inner.info.kind == SocketKind::Stream;
        if limit == 0 && stream {
            return Ok((PyBytes::new(py, b""), 0));
        }
        loop {
            let Some((_, there)) = self.receive_with(py, timeout, 0, |how| self.inner.front(how))? else {
                return Ok((PyBytes::new(py, b""), 0));
            };
            // Small pieces are given together, as a kernel socket does.
            let there = if stream && there < limit { self.inner.available(limit).max(there) } else { there };
            let mut got = (0, 0);
            let bytes = PyBytes::new_with(py, limit.min(there), |room| {
                let parts = [(room.as_mut_ptr(), room.len())];
                // SAFETY: the fresh bytes object is ours alone until this returns.
                let mut dest = unsafe { Dest::new(&parts) };
                let how = How::at_once();
                let result =
                    if peek { self.inner.peek(&mut dest, &how) } else { self.inner.receive(&mut dest, &how) };
                got = result.map_err(|e| to_python(py, &e))?;
                Ok(())
            });
            match bytes {
                Ok(bytes) if got.0 == limit.min(there) => return Ok((bytes, got.1)),
                // Another thread was faster and took some of it.
                Ok(bytes) => return Ok((PyBytes::new(py, &bytes.as_bytes()[..got.0]), got.1)),
                Err(error) if is_would_block(py, &error) && timeout.is_none_or(|t| t > 0.0) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// As `recv_into`, but None instead of waiting, and without a system call.
    fn try_recv_into(&self, py: Python<'_>, into: &Bound<'_, PyAny>) -> PyResult<Option<(usize, usize)>> {
        if !self.inner.poll_receive() {
            return Ok(None);
        }
        self.recv_into(py, into, Some(0.0), false).map(Some)
    }

    /// As `recv`, but None instead of waiting, and without a system call.
    fn try_recv<'py>(&self, py: Python<'py>, limit: usize) -> PyResult<Option<Bound<'py, PyBytes>>> {
        if !self.inner.poll_receive() {
            return Ok(None);
        }
        self.recv(py, limit, Some(0.0), false).map(|(bytes, _)| Some(bytes))
    }

    /// Send what fits of a buffer from `start` on (a message: all or nothing) and return the bytes
    /// sent, None if nothing fits now.
    #[pyo3(signature = (data, start=0))]
    fn try_send(&self, py: Python<'_>, data: &Bound<'_, PyAny>, start: usize) -> PyResult<Option<usize>> {
        let buffer = Buffer::readable(data)?;
        let start = start.min(buffer.len());
        let len = buffer.len() - start;
        // SAFETY: `start` is within the buffer.
        let parts = Parts(vec![(unsafe { buffer.start().add(start) }.cast_const(), len)]);
        // SAFETY: the buffer is held by this method until after the call.
        let mut source = unsafe { Source::new(&parts.0) };
        let how = How::at_once();
        let sent = match self.inner.info.kind {
            SocketKind::Stream => self.inner.send_stream(&mut source, &how),
            _ => self.inner.send_message(&mut source, &how).map(|()| len),
        };
        match sent {
            Ok(n) => Ok(Some(n)),
            Err(Error::WouldBlock { done: 0 }) => Ok(None),
            Err(Error::WouldBlock { done }) => Ok(Some(done)),
            Err(error) => Err(to_python(py, &error)),
        }
    }

    /// Before parking for data: spin a little, then arm. True: do not park, there is something.
    fn spin_then_park(&self, py: Python<'_>) -> PyResult<bool> {
        py.detach(|| self.inner.spin_then_park()).map_err(|e| to_python(py, &e))
    }

    /// Where the next record lies in this process: (address, bytes), or None at the end. It stays
    /// until `release_front`.
    fn front(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<(usize, usize)>> {
        let front = self.receive_with(py, timeout, 0, |how| self.inner.front(how))?;
        Ok(front.map(|(at, len)| (self.inner.view().bytes(at, len) as usize, len)))
    }

    /// Where `size` bytes may be written that are to be sent: their address. Until `commit` or `abandon` nothing
    /// else can be sent. None: this carrier has no such place; abandon, and send from elsewhere.
    fn reserve(&self, py: Python<'_>, size: usize, timeout: Option<f64>) -> PyResult<Option<usize>> {
        let reserve = |how: &How<'_>| self.inner.reserve(size, how).map(|place| place.map(|at| at as usize));
        if self.inner.poll_send(size) {
            match reserve(&How::at_once()) {
                Err(Error::WouldBlock { .. }) if timeout.is_none_or(|t| t > 0.0) => {}
                result => return result.map_err(|e| to_python(py, &e)),
            }
        }
        with_how(py, self.wait_mode(), timeout, reserve)
    }

    /// Send what was written there.
    fn commit(&self, py: Python<'_>) -> PyResult<()> {
        self.inner.commit().map_err(|e| to_python(py, &e))
    }

    /// Send nothing of it.
    fn abandon(&self) {
        self.inner.abandon();
    }

    fn release_front(&self) {
        self.inner.release_front();
    }

    /// Before parking in an event loop. True: do not park, there is something already.
    fn park(&self, py: Python<'_>, data: bool, space: bool) -> PyResult<bool> {
        self.inner.park(data, space).map_err(|e| to_python(py, &e))
    }

    /// (something to receive, space to send)
    fn poll(&self) -> (bool, bool) {
        self.inner.poll()
    }

    fn shut_send(&self) {
        self.inner.shut_send();
    }

    fn shut_receive(&self) {
        self.inner.shut_receive();
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.inner.close());
    }

    /// Close so that the peer hears a reset behind what was sent.
    fn abort(&self, py: Python<'_>) {
        py.detach(|| self.inner.abort());
    }

    /// A descriptor for `select` that follows the connection.
    fn fileno(&self, py: Python<'_>) -> PyResult<i32> {
        self.inner.readiness().map_err(|e| to_python(py, &e))
    }

    /// 0 spins, 1 spins a little and then sleeps, 2 sleeps at once.
    #[setter]
    fn set_wait(&self, mode: u8) {
        self.wait.store(mode, Ordering::Relaxed);
    }

    #[getter]
    fn wait(&self) -> u8 {
        self.wait.load(Ordering::Relaxed)
    }

    /// Bytes and messages sent, bytes and messages received.
    #[getter]
    fn totals(&self) -> (u64, u64, u64, u64) {
        let [a, b, c, d] = self.inner.totals();
        (a, b, c, d)
    }

    #[getter]
    fn message_max(&self) -> usize {
        self.inner.message_max()
    }

    #[getter]
    fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }

    #[getter]
    fn pending(&self) -> usize {
        self.inner.pending()
    }

    /// The number by which the peer knows a window, if it does; if not, it is lent now.
    fn lend(&self, window: &MxWindow) -> Option<u32> {
        self.inner.lend(window.inner())
    }

    #[getter]
    fn closed(&self) -> bool {
        self.inner.closed()
    }

    #[getter]
    fn id(&self) -> u64 {
        self.inner.info.id
    }

    #[getter]
    fn kind(&self) -> &'static str {
        self.inner.info.kind.name()
    }

    #[getter]
    fn path(&self) -> &'static str {
        self.inner.info.carrier.name()
    }

    #[getter]
    fn why(&self) -> &str {
        &self.inner.info.why
    }

    #[getter]
    fn port(&self) -> u32 {
        self.inner.info.port
    }

    /// (number, name, port) of the other side.
    #[getter]
    fn peer(&self) -> (u32, &str, u32) {
        let info = &self.inner.info;
        (info.peer, &info.peer_name, info.peer_port)
    }

    /// Ring sizes of this side, bytes: (small, large).
    #[getter]
    fn rings(&self) -> (u32, u32) {
        (self.inner.info.small, self.inner.info.large)
    }

    /// Ring sizes of the other side, bytes: (small, large).
    #[getter]
    fn peer_rings(&self) -> (u32, u32) {
        self.inner.info.theirs
    }
}

impl Connection {
    fn send_parts(
        &self,
        py: Python<'_>,
        parts: Parts<(*const u8, usize)>,
        len: usize,
        timeout: Option<f64>,
    ) -> PyResult<usize> {
        let stream = self.inner.info.kind == SocketKind::Stream;
        // SAFETY: the buffers are held by the calling method until after the call.
        let mut source = Movable(unsafe { Source::new(&parts.0) });
        let mut run = |how: &How<'_>| {
            let source = source.get();
            if stream {
                self.inner.send_stream(source, how).map(|_| len)
            } else {
                self.inner.send_message(source, how).map(|()| len)
            }
        };
        if len < DETACH_BYTES && self.inner.poll_send(len) {
            match run(&How::at_once()) {
                // Another thread was faster; what is left follows below.
                Err(Error::WouldBlock { .. }) if timeout.is_none_or(|t| t > 0.0) => {}
                result => return result.map_err(|e| to_python(py, &e)),
            }
        }
        with_how(py, self.wait_mode(), timeout, run)
    }

    fn recv_parts(
        &self,
        py: Python<'_>,
        parts: Parts<(*mut u8, usize)>,
        room: usize,
        timeout: Option<f64>,
        peek: bool,
    ) -> PyResult<(usize, usize)> {
        // SAFETY: the buffers are held by the calling method until after the call.
        let mut dest = Movable(unsafe { Dest::new(&parts.0) });
        self.receive_with(py, timeout, room, |how| {
            if peek { self.inner.peek(dest.get(), how) } else { self.inner.receive(dest.get(), how) }
        })
    }
}

fn is_would_block(py: Python<'_>, error: &PyErr) -> bool {
    error.is_instance_of::<pyo3::exceptions::PyBlockingIOError>(py)
}

/// A leased port on which connections arrive.
#[pyclass(frozen, module = "isthmus._native")]
pub struct Listener {
    pub inner: Arc<InnerListener>,
}

#[pymethods]
impl Listener {
    fn accept(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Connection> {
        with_how(py, Wait::Adaptive, timeout, |how| self.inner.accept(how)).map(Connection::new)
    }

    /// Take connections from now on, for a port that was leased with a backlog of 0.
    fn open(&self, backlog: u32) {
        self.inner.open(backlog);
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.inner.close());
    }

    fn fileno(&self) -> i32 {
        self.inner.fd()
    }

    #[getter]
    fn port(&self) -> u32 {
        self.inner.port()
    }
}

/// A datagram socket over a lane for each sender.
#[pyclass(frozen, module = "isthmus._native")]
pub struct Datagram {
    pub inner: Arc<InnerDatagram>,
}

#[pymethods]
impl Datagram {
    fn send_to(
        &self,
        py: Python<'_>,
        buffers: Vec<Bound<'_, PyAny>>,
        to: &str,
        port: u32,
        timeout: Option<f64>,
    ) -> PyResult<usize> {
        let held = buffers.iter().map(Buffer::readable).collect::<PyResult<Vec<_>>>()?;
        let parts = Parts(held.iter().map(|b| (b.start().cast_const(), b.len())).collect::<Vec<_>>());
        let len = held.iter().map(Buffer::len).sum();
        with_how(py, Wait::Adaptive, timeout, move |how| {
            let parts = parts;
            // SAFETY: the buffers are held by this method until after the call.
            let mut source = unsafe { Source::new(&parts.0) };
            // A datagram socket may wait for the broker even when it may not wait for space.
            let patient = How { now: false, deadline: None, ..*how };
            self.inner.open_lane(to, port, &patient)?;
            self.inner.send_to(&mut source, to, port, how)
        })?;
        Ok(len)
    }

    /// Receive one message: (bytes stored, its length, sender's number, name and port).
    #[pyo3(signature = (into, timeout, peek=false))]
    fn recv_from_into(
        &self,
        py: Python<'_>,
        into: Vec<Bound<'_, PyAny>>,
        timeout: Option<f64>,
        peek: bool,
    ) -> PyResult<(usize, usize, u32, String, u32)> {
        let held = into.iter().map(Buffer::writable).collect::<PyResult<Vec<_>>>()?;
        let parts = Parts(held.iter().map(|b| (b.start(), b.len())).collect::<Vec<_>>());
        let from = with_how(py, Wait::Adaptive, timeout, move |how| {
            let parts = parts;
            // SAFETY: the buffers are held by this method until after the call.
            self.inner.receive(&mut unsafe { Dest::new(&parts.0) }, peek, how)
        })?;
        Ok((from.stored, from.len, from.domain, from.name, from.port))
    }

    /// Have a lane to an address and let it decide whether the socket is writable. Returns the
    /// lane's connection.
    fn connect(&self, py: Python<'_>, to: &str, port: u32, timeout: Option<f64>) -> PyResult<Connection> {
        let lane = with_how(py, Wait::Adaptive, timeout, |how| self.inner.open_lane(to, port, how))?;
        self.inner.set_target(Some(Arc::clone(&lane)));
        Ok(Connection::new(lane))
    }

    fn disconnect(&self) {
        self.inner.set_target(None);
    }

    fn fileno(&self, py: Python<'_>) -> PyResult<i32> {
        self.inner.readiness().map_err(|e| to_python(py, &e))
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.inner.close());
    }

    #[getter]
    fn port(&self) -> u32 {
        self.inner.port()
    }

    #[getter]
    fn lanes(&self) -> usize {
        self.inner.lanes()
    }
}

/// Many connections in one event loop.
#[pyclass(frozen, module = "isthmus._native")]
pub struct Poller {
    inner: InnerPoller,
}

#[pymethods]
impl Poller {
    #[new]
    fn new(py: Python<'_>) -> PyResult<Self> {
        Ok(Self { inner: InnerPoller::new().map_err(|e| to_python(py, &e))? })
    }

    fn fileno(&self) -> i32 {
        self.inner.fd()
    }

    fn add(&self, py: Python<'_>, connection: &Connection) -> PyResult<u64> {
        self.inner.add(&connection.inner).map_err(|e| to_python(py, &e))
    }

    fn remove(&self, token: u64) {
        self.inner.remove(token);
    }

    /// Tokens of the connections to look at. Does not wait.
    fn ready<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let mut tokens = Vec::new();
        self.inner.ready(&mut tokens).map_err(|e| to_python(py, &e))?;
        PyList::new(py, tokens)
    }
}

pub fn carrier_of(word: Option<&str>) -> PyResult<Option<Carrier>> {
    let Some(word) = word else { return Ok(None) };
    let found = Carrier::ALL.iter().copied().find(|c| c.name() == word);
    found.map(Some).ok_or_else(|| {
        let known: Vec<_> = Carrier::ALL.iter().map(|c| c.name()).collect();
        PyValueError::new_err(format!("path {word:?}: this build knows {}", known.join(" and ")))
    })
}

pub fn kind_of(word: &str) -> PyResult<SocketKind> {
    let found = SocketKind::ALL.iter().copied().find(|k| k.name() == word);
    found.ok_or_else(|| PyValueError::new_err(format!("socket kind {word:?}: stream, seqpacket or datagram")))
}
