//! The rules: pure state machines. No I/O, no clock, no unsafe; the caller brings both.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod mx;
pub mod sched;
pub mod spin;
