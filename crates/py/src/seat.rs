//! Memory for lanes in a guest, for its agent.

use std::os::fd::AsRawFd;

use isthmus_engine::seat;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::to_python;

/// A seat: memory of this guest, pinned, for the two lanes of one connection.
#[pyclass(frozen, module = "isthmus._native")]
pub struct Seat(seat::Seat);

#[pymethods]
impl Seat {
    #[new]
    #[pyo3(signature = (small, large, huge=false))]
    fn new(py: Python<'_>, small: u32, large: u32, huge: bool) -> PyResult<Self> {
        py.detach(|| seat::Seat::new(small, large, huge)).map(Self).map_err(|error| to_python(py, &error))
    }

    /// Descriptor of the memory; it stays the seat's.
    #[getter]
    fn fd(&self) -> i32 {
        self.0.file().as_raw_fd()
    }

    /// Make it as new for the next connection. Nobody may be using it.
    fn clear(&self) {
        self.0.clear();
    }

    /// How many runs of pages it is.
    #[getter]
    fn count(&self) -> usize {
        self.0.runs().len()
    }

    /// Where `count` runs from `first` are, as the message `pages` has them.
    fn runs<'py>(&self, py: Python<'py>, first: usize, count: usize) -> Bound<'py, PyBytes> {
        let mut out = Vec::new();
        for (at, len) in self.0.runs().iter().skip(first).take(count) {
            out.extend_from_slice(&at.to_le_bytes());
            out.extend_from_slice(&len.to_le_bytes());
        }
        PyBytes::new(py, &out)
    }
}
