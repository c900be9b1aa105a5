//! Pointers that C hands over.
//!
//! They can be made by C only, which by the header's word makes them NULL or points to what the header says. That word
//! is what every `unsafe` here leans on, so that the functions above need none.

use std::ffi::{CStr, c_char};

/// Where something is to be put, or is to be found, or both. NULL: nowhere.
#[repr(transparent)]
pub struct Place<T>(*mut T);

impl<T: Copy> Place<T> {
    pub fn is_null(&self) -> bool {
        self.0.is_null()
    }

    pub fn get(&self) -> Option<T> {
        // SAFETY: not NULL, so it points to a T that can be read.
        (!self.0.is_null()).then(|| unsafe { self.0.read() })
    }

    pub fn put(&self, value: T) {
        if !self.0.is_null() {
            // SAFETY: not NULL, so it points to a T that can be written.
            unsafe { self.0.write(value) };
        }
    }

    /// The first of `count` that are there. `None`: nowhere, and not for want of any.
    pub fn all(&self, count: u32) -> Option<&[T]> {
        match (self.0.is_null(), count) {
            (_, 0) => Some(&[]),
            (true, _) => None,
            // SAFETY: not NULL, so it points to as many T as the program says beside it.
            (false, count) => Some(unsafe { std::slice::from_raw_parts(self.0, count as usize) }),
        }
    }
}

/// Bytes of which only the program knows the meaning, or nobody but who asked for them.
#[repr(transparent)]
pub struct Bytes(*mut u8);

impl Bytes {
    pub fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// The number at the front, by as many bytes as there are said to be: 1, or 4 and more.
    pub fn number(&self, len: u32) -> Option<u32> {
        match (self.0.is_null(), len) {
            // SAFETY: not NULL, so it points to the byte that the program says is there.
            (false, 1) => Some(u32::from(unsafe { self.0.read() })),
            // SAFETY: not NULL, so it points to the four bytes that the program says are there, wherever they lie.
            (false, 4..) => Some(unsafe { self.0.cast::<u32>().read_unaligned() }),
            _ => None,
        }
    }

    /// Put all of `bytes` there, for which the caller has seen that there is room. Nothing is put nowhere.
    pub fn put(&self, bytes: &[u8]) {
        if !self.0.is_null() {
            // SAFETY: not NULL, so it points to as many bytes as the program said, which the caller looked at.
            unsafe { self.0.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        }
    }
}

/// A string of C.
#[repr(transparent)]
pub struct Text(*const c_char);

impl Text {
    /// What is no UTF-8 is no name that anybody has.
    pub fn get(&self) -> Option<&str> {
        // SAFETY: not NULL, so it points to a string that ends in NUL.
        let text = (!self.0.is_null()).then(|| unsafe { CStr::from_ptr(self.0) })?;
        text.to_str().ok()
    }
}
