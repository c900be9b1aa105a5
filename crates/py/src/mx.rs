//! `MxEndpoint`: the endpoints of `isthmus.mx`.

use std::collections::HashMap;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use isthmus_mx::{
    Address, Contexts, Endpoint, Fault, How, Options, Parts, Pattern, Report, RequestId, Wait, Window,
};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::buffer::Buffer;
use crate::connection::{wait_of, with_how};
use crate::errors::{mx_error, to_python};
use crate::node::Node;

/// Code, address (two words), match, length, transferred.
type Told = (u8, (u64, u64), u64, u32, u32);
type Buffers = HashMap<u64, Vec<Buffer>>;

/// An endpoint. Requests are numbers; their buffers stay pinned here until they have ended.
#[pyclass(frozen, module = "isthmus._native")]
pub struct MxEndpoint {
    inner: Endpoint,
    buffers: Mutex<Buffers>,
    wait: Wait,
}

/// Memory that peers of this node may read where it lies. It is there while this object is.
#[pyclass(frozen, module = "isthmus._native")]
pub struct MxWindow(Arc<Window>);

impl MxWindow {
    pub fn inner(&self) -> &Arc<Window> {
        &self.0
    }
}

#[pymethods]
impl MxWindow {
    #[new]
    fn new(py: Python<'_>, size: usize) -> PyResult<Self> {
        py.detach(|| Window::new(size)).map(Self).map_err(|error| to_python(py, &error))
    }

    /// Where it begins, and its bytes.
    #[getter]
    fn place(&self) -> (usize, usize) {
        (self.0.base() as usize, self.0.len())
    }
}

fn told(report: &Report) -> Told {
    let [one, other] = report.source.to_words();
    (report.status as u8, (one, other), report.matching, report.length, report.transferred)
}

fn address((one, other): (u64, u64)) -> Address {
    Address::from_words([one, other])
}

fn raise<T>(py: Python<'_>, result: isthmus_mx::Result<T>) -> PyResult<T> {
    result.map_err(|fault| match &fault {
        Fault::Because(_, error @ isthmus_engine::Error::Forked)
        | Fault::Because(isthmus_mx::Return::NoDevice | isthmus_mx::Return::ConnectionFailed, error) => {
            to_python(py, error)
        }
        _ => mx_error(py, fault.code() as u8, &fault.to_string()),
    })
}

impl MxEndpoint {
    pub fn inner(&self) -> &Endpoint {
        &self.inner
    }

    fn buffers(&self) -> MutexGuard<'_, Buffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wait without the interpreter; signals are heard.
    fn wait_with<T: Send>(
        &self,
        py: Python<'_>,
        timeout: Option<f64>,
        run: impl FnOnce(&How<'_>) -> isthmus_mx::Result<T> + Send,
    ) -> PyResult<T> {
        let done = with_how(py, self.wait, timeout, |how| match run(how) {
            Err(Fault::Because(_, error @ isthmus_engine::Error::Interrupted { .. })) => Err(error),
            other => Ok(other),
        })?;
        raise(py, done)
    }

    fn keep(&self, id: RequestId, buffers: Vec<Buffer>) -> u64 {
        if !buffers.is_empty() {
            self.buffers().insert(id.0, buffers);
        }
        id.0
    }

    fn release(&self, id: u64) {
        let released = self.buffers().remove(&id);
        drop(released);
    }
}

/// Seconds; `None` is for ever.
fn patience_of(seconds: Option<f64>) -> PyResult<Option<Duration>> {
    let wrong = |s: f64| PyValueError::new_err(format!("timeout={s}: seconds, not negative, not NaN"));
    seconds.map(|s| Duration::try_from_secs_f64(s).map_err(|_| wrong(s))).transpose()
}

fn pieces(buffers: &[Buffer]) -> Parts {
    match buffers {
        [one] => Parts::new(&[(one.start(), one.len())]),
        many => Parts::new(&many.iter().map(|b| (b.start(), b.len())).collect::<Vec<_>>()),
    }
}

#[pymethods]
impl MxEndpoint {
    #[new]
    #[allow(clippy::too_many_arguments, reason = "one call, all by keyword in Python")]
    #[pyo3(signature = (node, *, endpoint=None, key=0, context_bits=0, context_shift=0, wire=true, wait=1))]
    fn new(
        py: Python<'_>,
        node: &Node,
        endpoint: Option<u8>,
        key: u32,
        context_bits: u8,
        context_shift: u8,
        wire: bool,
        wait: u8,
    ) -> PyResult<Self> {
        let contexts = Contexts::new(context_bits, context_shift)
            .ok_or_else(|| PyValueError::new_err("a context is at most 16 bits, inside of 64"))?;
        let options = Options { endpoint, key, contexts, wire, ..Options::default() };
        let attachment = node.attachment();
        let inner = raise(py, py.detach(|| Endpoint::open(&attachment, options)))?;
        Ok(Self { inner, buffers: Mutex::default(), wait: wait_of(wait) })
    }

    #[getter]
    fn nic(&self) -> u64 {
        self.inner.nic
    }

    #[getter]
    fn id(&self) -> u8 {
        self.inner.id
    }

    #[getter]
    fn has_card(&self, py: Python<'_>) -> PyResult<bool> {
        raise(py, self.inner.check())?;
        Ok(self.inner.has_card())
    }

    #[getter]
    fn lost(&self) -> u64 {
        self.inner.lost()
    }

    #[getter]
    fn address(&self, py: Python<'_>) -> PyResult<(u64, u64)> {
        raise(py, self.inner.check())?;
        let [one, other] = self.inner.address().to_words();
        Ok((one, other))
    }

    /// Card, endpoint, session; `None` for an address that is none any more.
    fn decompose(&self, of: (u64, u64)) -> Option<(u64, u8, u32)> {
        self.inner.decompose(address(of))
    }

    fn connect(
        &self,
        py: Python<'_>,
        nic: u64,
        endpoint: u32,
        key: u32,
        timeout: Option<f64>,
    ) -> PyResult<(u64, u64)> {
        let found = self.wait_with(py, timeout, |how| self.inner.connect(nic, endpoint, key, how))?;
        let [one, other] = found.to_words();
        Ok((one, other))
    }

    fn iconnect(&self, py: Python<'_>, nic: u64, endpoint: u32, key: u32, matching: u64) -> PyResult<u64> {
        raise(py, py.detach(|| self.inner.iconnect(nic, endpoint, key, matching, 0))).map(|id| id.0)
    }

    fn disconnect(&self, py: Python<'_>, peer: (u64, u64)) -> PyResult<()> {
        raise(py, self.inner.disconnect(address(peer)))
    }

    fn isend(
        &self,
        py: Python<'_>,
        to: (u64, u64),
        buffers: Vec<Bound<'_, PyAny>>,
        matching: u64,
        synchronous: bool,
    ) -> PyResult<u64> {
        let buffers = buffers.iter().map(Buffer::readable).collect::<PyResult<Vec<_>>>()?;
        let parts = pieces(&buffers);
        // SAFETY: the buffers are pinned until the request has ended; see `keep` and `release`.
        let sent = unsafe { self.inner.isend(address(to), parts, matching, synchronous, 0) };
        raise(py, sent).map(|id| self.keep(id, buffers))
    }

    fn irecv(&self, py: Python<'_>, value: u64, mask: u64, buffers: Vec<Bound<'_, PyAny>>) -> PyResult<u64> {
        let buffers = buffers.iter().map(Buffer::writable).collect::<PyResult<Vec<_>>>()?;
        let parts = pieces(&buffers);
        // SAFETY: as in `isend`.
        let posted = unsafe { self.inner.irecv(Pattern { value, mask }, parts, 0) };
        raise(py, posted).map(|id| self.keep(id, buffers))
    }

    fn test(&self, py: Python<'_>, id: u64) -> PyResult<Option<Told>> {
        let report = raise(py, self.inner.test(RequestId(id)))?;
        if report.is_some() {
            self.release(id);
        }
        Ok(report.as_ref().map(told))
    }

    fn wait(&self, py: Python<'_>, id: u64, timeout: Option<f64>) -> PyResult<Option<Told>> {
        let report = self.wait_with(py, timeout, |how| self.inner.wait(RequestId(id), how))?;
        if report.is_some() {
            self.release(id);
        }
        Ok(report.as_ref().map(told))
    }

    fn wait_any(
        &self,
        py: Python<'_>,
        value: u64,
        mask: u64,
        timeout: Option<f64>,
    ) -> PyResult<Option<(u64, Told)>> {
        let pattern = Pattern { value, mask };
        let found = self.wait_with(py, timeout, |how| self.inner.wait_any(pattern, how))?;
        Ok(found.map(|(id, report)| {
            self.release(id.0);
            (id.0, told(&report))
        }))
    }

    fn peek(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Option<u64>> {
        Ok(self.wait_with(py, timeout, |how| self.inner.peek(how))?.map(|id| id.0))
    }

    fn probe(&self, py: Python<'_>, value: u64, mask: u64, timeout: Option<f64>) -> PyResult<Option<Told>> {
        let pattern = Pattern { value, mask };
        let found = self.wait_with(py, timeout, |how| self.inner.probe(pattern, how))?;
        Ok(found.as_ref().map(told))
    }

    fn cancel(&self, py: Python<'_>, id: u64) -> PyResult<bool> {
        let cancelled = raise(py, self.inner.cancel(RequestId(id)))?;
        if cancelled {
            self.release(id);
        }
        Ok(cancelled)
    }

    fn forget(&self, py: Python<'_>, id: u64) -> PyResult<()> {
        raise(py, self.inner.forget(RequestId(id)))?;
        // Those that were forgotten earlier may have ended since.
        let ended: Vec<_> = {
            let mut buffers = self.buffers();
            let gone: Vec<u64> =
                buffers.keys().copied().filter(|id| !self.inner.is_live(RequestId(*id))).collect();
            gone.into_iter().filter_map(|id| buffers.remove(&id)).collect()
        };
        drop(ended);
        Ok(())
    }

    /// Of one request, or of those that are asked for from now on.
    fn set_timeout(&self, py: Python<'_>, id: Option<u64>, timeout: Option<f64>) -> PyResult<()> {
        let patience = patience_of(timeout)?;
        match id {
            Some(id) => raise(py, self.inner.set_patience_of(RequestId(id), patience)),
            None => {
                self.inner.set_patience(patience);
                Ok(())
            }
        }
    }

    fn wake_up(&self) {
        self.inner.wake_up();
    }

    /// Readable once requests have ended after `lower`.
    fn fileno(&self) -> RawFd {
        self.inner.fd()
    }

    fn lower(&self) {
        self.inner.lower();
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| self.inner.close());
        let released = std::mem::take(&mut *self.buffers());
        drop(released);
    }
}
