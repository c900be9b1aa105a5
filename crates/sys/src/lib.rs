//! Linux, one call per function.
//!
//! Everything that needs `unsafe` towards the kernel is here, and nothing else is: no policy, no
//! retry loops, no knowledge of lanes. Errors are the kernel's (`std::io::Error`).

pub mod alarm;
pub mod capability;
pub mod clock;
pub mod cpu;
pub mod ethernet;
pub mod guard;
pub mod inet;
pub mod living;
pub mod mapping;
pub mod memory;
pub mod packet;
pub mod pin;
pub mod poll;
pub mod seccomp;
pub mod signals;
pub mod table;
