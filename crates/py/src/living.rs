//! Which of the sockets that the broker gave away still exist.

use std::os::fd::{BorrowedFd, RawFd};

use isthmus_engine::packet::Shape;
use isthmus_engine::{Living as Inner, unix_shape};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::os_error;

/// Weak references to open files, each with a token.
#[pyclass(frozen, module = "isthmus._native")]
pub struct Living(Inner);

#[pymethods]
impl Living {
    #[new]
    fn new() -> PyResult<Self> {
        Inner::new().map(Self).map_err(os_error)
    }

    /// Remember the file until it is closed everywhere; the descriptor itself may be closed at once.
    fn add(&self, fd: RawFd, token: u64) -> PyResult<()> {
        if fd < 0 {
            return Err(PyValueError::new_err("a closed descriptor"));
        }
        // SAFETY: used for this call only; a number that is no open descriptor makes it fail.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        self.0.add(fd, token).map_err(os_error)
    }

    /// The tokens of all files that somebody still holds open.
    fn tokens(&self) -> PyResult<Vec<u64>> {
        self.0.tokens().map_err(os_error)
    }
}

/// "stream" or "seqpacket" for a connected Unix socket, None for anything else. Asks nothing that the file system of a
/// stranger's descriptor would have to answer.
#[pyfunction]
pub fn unix_socket_kind(fd: RawFd) -> Option<&'static str> {
    if fd < 0 {
        return None;
    }
    // SAFETY: used for this call only; a number that is no open descriptor has no shape.
    match unix_shape(unsafe { BorrowedFd::borrow_raw(fd) })? {
        Shape::Stream => Some("stream"),
        Shape::Packets => Some("seqpacket"),
    }
}
