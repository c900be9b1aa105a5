//! The switch: a virtio socket device for many guests, and what moves their bytes.
//!
//! One process, one thread, small and long-lived, because no monitor reconnects to a device that died: it holds the
//! vhost-user sockets and with them the memory of every guest. It decides nothing. Who may talk to whom it asks the
//! broker, as a program that came through the guest's door ([`attachment`]); when the broker restarts, what is open
//! stays open.
//!
//! Read in this order: [`memory`] and [`vring`] (a guest's memory and its queues), [`device`] (the conversation with
//! the monitor), [`flow`] (what a connection is), [`switch`] (the crank), then `packets`, `deliver` and `home`, which
//! are its three sides: from guests, to guests, and the broker, which it speaks to over a [`line`]. Programs with
//! lanes in a guest's own memory are in `agent` and [`seat`]; who is served next is in `schedule`, what that cost in
//! [`account`].
//!
//! # Rules
//! - A packet comes from the guest whose queue it lay in, whatever it says.
//! - Everything in a guest's memory is read once, bounded, and then used.
//! - Whoever breaks a protocol loses its device and its connections; nobody else notices.
//! - Nothing waits: every descriptor is non-blocking, every turn is bounded, every queue is.

pub mod account;
mod agent;
pub mod attachment;
pub mod bridge;
mod deliver;
pub mod device;
mod ends;
mod error;
pub mod flow;
mod home;
pub mod kernel;
pub mod line;
pub mod memory;
mod packets;
pub mod sandbox;
mod schedule;
pub mod seat;
pub mod switch;
pub mod vring;

pub use error::Fault;
pub use switch::Switch;
