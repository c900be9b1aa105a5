//! The buffer protocol, without copies and without the GIL afterwards.
//!
//! `Py_buffer` joined the stable ABI in Python 3.11, but its layout and its two functions are the
//! same since 3.3, so one `abi3` wheel for 3.10 and later can use them; see
//! docs/decisions/0004-buffers-under-abi3.md.

use std::ffi::{c_char, c_int, c_void};

use pyo3::exceptions::PyTypeError;
use pyo3::ffi::PyObject;
use pyo3::prelude::*;

#[repr(C)]
struct RawBuffer {
    buf: *mut c_void,
    obj: *mut PyObject,
    len: isize,
    itemsize: isize,
    readonly: c_int,
    ndim: c_int,
    format: *mut c_char,
    shape: *mut isize,
    strides: *mut isize,
    suboffsets: *mut isize,
    internal: *mut c_void,
}

unsafe extern "C" {
    fn PyObject_GetBuffer(object: *mut PyObject, view: *mut RawBuffer, flags: c_int) -> c_int;
    fn PyBuffer_Release(view: *mut RawBuffer);
}

const SIMPLE: c_int = 0;
const WRITABLE: c_int = 1;

/// A contiguous buffer borrowed from a Python object until dropped.
///
/// Another Python thread may write it while we read it, and the reverse: we bend Rust's aliasing
/// rule knowingly and only ever use it through raw copies.
pub struct Buffer {
    raw: RawBuffer,
}

// SAFETY: the memory is pinned by the buffer protocol whatever thread uses it; dropping happens
// with the interpreter attached (see Drop).
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    pub fn readable(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::new(object, SIMPLE)
    }

    pub fn writable(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        Self::new(object, WRITABLE)
    }

    #[inline]
    fn new(object: &Bound<'_, PyAny>, flags: c_int) -> PyResult<Self> {
        let mut raw = std::mem::MaybeUninit::<RawBuffer>::uninit();
        // SAFETY: the object is alive and the interpreter is attached; on success the buffer is
        // filled in.
        unsafe {
            if PyObject_GetBuffer(object.as_ptr(), raw.as_mut_ptr(), flags) != 0 {
                let error = PyErr::fetch(object.py());
                if error.is_instance_of::<PyTypeError>(object.py()) {
                    let name = object.get_type().name()?;
                    return Err(PyTypeError::new_err(format!("a bytes-like object is required, not {name}")));
                }
                return Err(error);
            }
            Ok(Self { raw: raw.assume_init() })
        }
    }

    #[inline]
    pub fn start(&self) -> *mut u8 {
        self.raw.buf.cast()
    }

    #[inline]
    pub fn len(&self) -> usize {
        self.raw.len.unsigned_abs()
    }
}

impl Drop for Buffer {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: filled by PyObject_GetBuffer and released once. Every method that makes a buffer
        // keeps it on its own stack, so it is dropped with the interpreter attached.
        unsafe { PyBuffer_Release(&raw mut self.raw) };
    }
}
