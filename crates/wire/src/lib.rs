//! Formats: bytes to types and back.
//!
//! Each format is declared once, here, and everything else (the engine, the Python broker, the
//! documentation tests) reads that declaration. Nothing in this crate touches a socket, a file, a
//! thread or a clock, and nothing in it can panic on a stranger's bytes.
//!
//! Read first: [`control`], the messages between a program and its broker; then [`record`], what
//! lies in a ring.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod address;
pub mod card;
pub mod control;
pub mod mx_lane;
pub mod mxoe;
mod reader;
pub mod record;
pub mod vhost_user;
pub mod vsock;
mod writer;

pub use reader::{DecodeError, Problem, Reader};
pub use writer::{EncodeError, Writer};
