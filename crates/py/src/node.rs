//! `Node`: a program's attachment to its broker.

use std::os::fd::{BorrowedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use isthmus_engine::Wait;
use isthmus_engine::lane::{Counters as InnerCounters, LARGE_DEFAULT, SMALL_DEFAULT};
use isthmus_engine::listener::Terms;
use isthmus_engine::node::{Attachment, ConnectRequest, Node as Inner};
use isthmus_engine::readiness::Readiness;
use isthmus_wire::control::ANYBODY;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::connection::{Connection, Datagram, Listener, carrier_of, kind_of, with_how};
use crate::errors::to_python;

/// An attachment to the broker behind a door.
#[pyclass(frozen, module = "isthmus._native")]
pub struct Node {
    inner: Arc<Attachment>,
}

impl Node {
    pub fn attachment(&self) -> Arc<Attachment> {
        Arc::clone(&self.inner)
    }
}

#[pymethods]
impl Node {
    #[new]
    fn new(py: Python<'_>, door: PathBuf, program: &str) -> PyResult<Self> {
        let inner = py.detach(|| Inner::attach(&door, program)).map_err(|e| to_python(py, &e))?;
        Ok(Self { inner })
    }

    /// domain, domain_name, node, ring_max, epoch
    #[getter]
    fn identity<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let identity = self.inner.identity();
        let dict = PyDict::new(py);
        dict.set_item("domain", identity.domain)?;
        dict.set_item("domain_name", identity.domain_name)?;
        dict.set_item("node", identity.node)?;
        dict.set_item("ring_max", identity.ring_max)?;
        dict.set_item("epoch", identity.epoch)?;
        Ok(dict)
    }

    /// Is a broker attached now?
    #[getter]
    fn attached(&self) -> bool {
        self.inner.attached()
    }

    /// Was it made by this process, and not stopped?
    #[getter]
    fn ours(&self) -> bool {
        self.inner.ours()
    }

    #[allow(clippy::too_many_arguments, reason = "one call, all by keyword in Python")]
    #[pyo3(signature = (to, port, kind, *, from_port=0, require=None, small=SMALL_DEFAULT, large=LARGE_DEFAULT, timeout=None))]
    fn connect(
        &self,
        py: Python<'_>,
        to: String,
        port: u32,
        kind: &str,
        from_port: u32,
        require: Option<&str>,
        small: u32,
        large: u32,
        timeout: Option<f64>,
    ) -> PyResult<Connection> {
        let (kind, require) = (kind_of(kind)?, carrier_of(require)?);
        let request = ConnectRequest { to, port, from_port, kind, require, small, large };
        with_how(py, Wait::Adaptive, timeout, |how| self.inner.connect(&request, how)).map(Connection::new)
    }

    /// Connect without waiting: `then(connection or None, exception or None)` is called on the
    /// engine's thread.
    #[allow(clippy::too_many_arguments, reason = "one call, all by keyword in Python")]
    #[pyo3(signature = (to, port, kind, then, *, from_port=0, require=None, small=SMALL_DEFAULT, large=LARGE_DEFAULT, readiness=None))]
    fn connect_then(
        &self,
        py: Python<'_>,
        to: String,
        port: u32,
        kind: &str,
        then: Py<PyAny>,
        from_port: u32,
        require: Option<&str>,
        small: u32,
        large: u32,
        readiness: Option<Py<Pollable>>,
    ) -> PyResult<()> {
        let (kind, require) = (kind_of(kind)?, carrier_of(require)?);
        let request = ConnectRequest { to, port, from_port, kind, require, small, large };
        let readiness = readiness.map(|pollable| Arc::clone(&pollable.get().inner));
        let answered = move |result: isthmus_engine::Result<Arc<isthmus_engine::Connection>>| {
            Python::attach(|py| {
                let called = match result {
                    Ok(connection) => {
                        // Before the call: it may hand the connection to another thread, which may close it.
                        connection.claim();
                        let shown = Connection::new(Arc::clone(&connection));
                        let called = then.call1(py, (shown, py.None()));
                        if called.is_err() {
                            connection.abort();
                        }
                        if let Some(readiness) = readiness {
                            connection.attach_readiness(readiness);
                        }
                        called
                    }
                    Err(error) => {
                        let called = then.call1(py, (py.None(), to_python(py, &error)));
                        if let Some(readiness) = readiness {
                            readiness.set(true, true);
                        }
                        called
                    }
                };
                if let Err(error) = called {
                    error.write_unraisable(py, None);
                }
            });
        };
        // A broker that does not read is waited for.
        py.detach(|| self.inner.connect_then(request, Box::new(answered)));
        Ok(())
    }

    #[pyo3(signature = (port, kind, *, partner=ANYBODY, backlog=128, small=SMALL_DEFAULT, large=LARGE_DEFAULT, timeout=None))]
    #[allow(clippy::too_many_arguments, reason = "one call, all by keyword in Python")]
    fn listen(
        &self,
        py: Python<'_>,
        port: u32,
        kind: &str,
        partner: u32,
        backlog: u32,
        small: u32,
        large: u32,
        timeout: Option<f64>,
    ) -> PyResult<Listener> {
        let terms = Terms { port, partner, kind: kind_of(kind)?, backlog, small, large };
        let inner = with_how(py, Wait::Adaptive, timeout, |how| self.inner.listen(terms, how))?;
        Ok(Listener { inner })
    }

    /// A datagram socket on a port (0: chosen by the broker), or without one (None).
    #[pyo3(signature = (port=None, *, partner=ANYBODY, small=SMALL_DEFAULT, large=LARGE_DEFAULT, timeout=None))]
    fn datagram(
        &self,
        py: Python<'_>,
        port: Option<u32>,
        partner: u32,
        small: u32,
        large: u32,
        timeout: Option<f64>,
    ) -> PyResult<Datagram> {
        let inner = with_how(py, Wait::Adaptive, timeout, |how| {
            self.inner.datagram(port, partner, (small, large), how)
        })?;
        Ok(Datagram { inner })
    }

    /// Address of a virtual network card, number and name of its domain.
    #[pyo3(signature = (nic=0, name="", timeout=None))]
    fn find_nic(
        &self,
        py: Python<'_>,
        nic: u64,
        name: &str,
        timeout: Option<f64>,
    ) -> PyResult<(u64, u32, String)> {
        let found = with_how(py, Wait::Adaptive, timeout, |how| self.inner.find_nic(nic, name, how))?;
        Ok((found.nic, found.domain, found.name))
    }

    /// The network card of another node's station, as in `node7:0`; waits up to 3 s for this node's card to learn of it.
    /// None: nobody has this name, or there is no card.
    fn find_station(&self, py: Python<'_>, name: &str) -> Option<u64> {
        py.detach(|| isthmus_mx::find_station(&self.inner, name))
    }

    /// (number, name) of a domain given by name or number.
    #[pyo3(signature = (name, timeout=None))]
    fn resolve(&self, py: Python<'_>, name: &str, timeout: Option<f64>) -> PyResult<(u32, String)> {
        with_how(py, Wait::Adaptive, timeout, |how| self.inner.resolve(name, how))
    }

    /// What the broker knows of this domain, as JSON text.
    #[pyo3(signature = (timeout=None))]
    fn status(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<String> {
        with_how(py, Wait::Adaptive, timeout, |how| self.inner.status(how))
    }

    /// Finish every connection in order, as at the end of the program.
    fn finish(&self, py: Python<'_>) {
        py.detach(|| self.inner.finish());
    }

    /// Detach. Connections live on.
    fn stop(&self) {
        self.inner.stop();
    }
}

/// A descriptor for `select` that exists before its connection does.
#[pyclass(frozen, module = "isthmus._native")]
pub struct Pollable {
    inner: Arc<Readiness>,
}

#[pymethods]
impl Pollable {
    #[new]
    fn new(py: Python<'_>) -> PyResult<Self> {
        Ok(Self { inner: Arc::new(Readiness::new().map_err(|e| to_python(py, &e))?) })
    }

    fn fileno(&self) -> i32 {
        self.inner.fd()
    }

    fn set(&self, readable: bool, writable: bool) {
        self.inner.set(readable, writable);
    }
}

/// A lane's totals, for the broker.
#[pyclass(frozen, module = "isthmus._native")]
pub struct Counters {
    inner: InnerCounters,
}

#[pymethods]
impl Counters {
    /// Check the descriptors that came with `connect` or `accept` and map the counters page; with
    /// `resume` only the page comes and `page_only` is true. The descriptors stay the caller's.
    #[new]
    #[pyo3(signature = (carrier, descriptors, small, large, page_only=false))]
    fn new(
        carrier: &str,
        descriptors: Vec<RawFd>,
        small: u32,
        large: u32,
        page_only: bool,
    ) -> PyResult<Self> {
        let carrier = carrier_of(Some(carrier))?.ok_or_else(|| PyValueError::new_err("no carrier"))?;
        if descriptors.iter().any(|fd| *fd < 0) {
            return Err(PyValueError::new_err("a descriptor is negative"));
        }
        // SAFETY: the caller keeps the descriptors open during the call; a number that is not open
        // makes the calls on it fail.
        let files: Vec<_> = descriptors.iter().map(|fd| unsafe { BorrowedFd::borrow_raw(*fd) }).collect();
        let inner = match (page_only, files.as_slice()) {
            (true, [page]) => InnerCounters::page(*page),
            (true, _) => return Err(PyValueError::new_err("resume comes with one descriptor")),
            (false, files) => InnerCounters::new(carrier, files, small, large),
        };
        Ok(Self { inner: inner.map_err(|e| PyValueError::new_err(e.to_string()))? })
    }

    /// Bytes and messages sent, bytes and messages received, as their owner says.
    fn read(&self) -> (u64, u64, u64, u64) {
        let [a, b, c, d] = self.inner.read();
        (a, b, c, d)
    }
}

/// Check the descriptor that came with `lend-window`. It stays the caller's.
#[pyfunction]
pub fn check_window(descriptor: RawFd, size: u64) -> PyResult<()> {
    if descriptor < 0 {
        return Err(PyValueError::new_err("a descriptor is negative"));
    }
    // SAFETY: the caller keeps the descriptor open during the call; a number that is not open makes the calls on it
    // fail.
    let file = unsafe { BorrowedFd::borrow_raw(descriptor) };
    isthmus_engine::window::check(file, size).map_err(|e| PyValueError::new_err(e.to_string()))
}
