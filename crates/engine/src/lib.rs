//! Turns the crank: lanes become connections, doors become attachments.
//!
//! Read in this order: [`lane`] (the two carriers), [`connection`] (two lanes and a bell),
//! [`node`] (a program's attachment to its broker), then [`listener`], [`datagram`],
//! [`readiness`] (a kernel descriptor for `select`), [`poller`] (many connections in one event
//! loop) and [`window`] (memory that the other side may read where it lies).

pub mod bell;
pub mod connection;
pub mod datagram;
pub mod error;
pub mod lane;
pub mod listener;
pub mod node;
pub mod outbox;
pub mod poller;
pub mod readiness;
pub mod seat;
mod wait;
pub mod window;

pub use connection::{Connection, Front, Info};
pub use error::{Error, Result};
pub use isthmus_ring::{Dest, Mover, Source};
pub use isthmus_sys::inet::unix_shape;
pub use isthmus_sys::living::Living;
pub use isthmus_sys::packet;
pub use wait::{How, Wait, spin_beside};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Lock, also after a panic elsewhere: every structure here is left whole at each step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
