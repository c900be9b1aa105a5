//! The Python extension module isthmus._native.
