//! Kernel sockets that the broker brings to this process.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;

use isthmus_engine::Wait;
use isthmus_engine::node::Attachment;
use isthmus_engine::node::sockets::{Ports as Inner, SocketRequest};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::connection::{kind_of, with_how};
use crate::errors::to_python;

/// An attachment whose connections are kernel sockets.
#[pyclass(frozen, module = "isthmus._native")]
pub struct KernelSockets {
    node: Arc<Attachment>,
    ports: Arc<Inner>,
}

#[pymethods]
impl KernelSockets {
    #[new]
    fn new(py: Python<'_>, door: PathBuf, program: &str) -> PyResult<Self> {
        let (node, ports) = py.detach(|| Inner::attach(&door, program)).map_err(|e| to_python(py, &e))?;
        Ok(Self { node, ports })
    }

    /// Was this made by this process, not by its parent?
    #[getter]
    fn ours(&self) -> bool {
        self.node.ours()
    }

    /// Is this program in a guest, whose kernel sockets are `AF_VSOCK`'s?
    #[getter]
    fn guest(&self) -> bool {
        self.node.identity().guest
    }

    /// A connected socket, and what is known of it: connection, peer, peer_port, port, why.
    #[pyo3(signature = (to, port, kind, *, timeout=None))]
    fn connect<'py>(
        &self,
        py: Python<'py>,
        to: String,
        port: u32,
        kind: &str,
        timeout: Option<f64>,
    ) -> PyResult<(RawFd, Bound<'py, PyDict>)> {
        let kind = kind_of(kind)?;
        let request = SocketRequest { to, port, kind, source: String::new(), source_port: 0, ahead: false };
        let brought = with_how(py, Wait::Adaptive, timeout, |how| self.node.connect_socket(&request, how))?;
        let known = PyDict::new(py);
        known.set_item("connection", brought.granted.connection)?;
        known.set_item("peer", brought.granted.peer_name)?;
        known.set_item("peer_port", brought.granted.peer_port)?;
        known.set_item("port", brought.granted.port)?;
        known.set_item("why", brought.granted.why)?;
        Ok((brought.socket.into_raw_fd(), known))
    }

    /// Lease a port for a listening Unix socket whose file (O_PATH) is given away. Returns the port.
    #[pyo3(signature = (port, kind, backlog, listener, *, timeout=None))]
    fn listen(
        &self,
        py: Python<'_>,
        port: u32,
        kind: &str,
        backlog: u32,
        listener: RawFd,
        timeout: Option<f64>,
    ) -> PyResult<u32> {
        if listener < 0 {
            return Err(PyValueError::new_err("a closed descriptor"));
        }
        // SAFETY: the caller gave it away.
        let file = unsafe { OwnedFd::from_raw_fd(listener) };
        let kind = kind_of(kind)?;
        with_how(py, Wait::Adaptive, timeout, |how| {
            self.ports.listen(&self.node, port, kind, backlog, file, how)
        })
    }

    /// Give a port back.
    fn unlisten(&self, port: u32) {
        self.ports.close(&self.node, port);
    }
}
