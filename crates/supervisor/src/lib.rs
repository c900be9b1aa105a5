//! Unmodified programs: their TCP connections to neighbours become kernel sockets that the broker brings.
//!
//! A program runs behind a filter ([`filter`]). Its `connect`, `listen` and `accept` calls, and questions about sockets
//! that were exchanged, wait for the [`Supervisor`], which answers them or lets the kernel do what was asked. No other
//! call costs anything, and bytes never pass through here.
//!
//! Accepting: a neighbour's connection is announced to the listening program by a *knock*, a TCP connection of our own
//! to the listener, from its own network. So it is ready in whatever way the program waits, in the kernel's order and
//! within the program's backlog; when the program accepts the knock, it gets the neighbour's socket.
//!
//! Read in this order: [`filter`], [`supervisor`], [`connect`], [`listen`], [`knocks`], [`questions`], [`epoll`].

pub mod address;
mod ahead;
pub mod connect;
pub mod epoll;
mod fallback;
pub mod filter;
mod knocks;
pub mod ledger;
pub mod listen;
pub mod questions;
pub mod supervisor;
mod target;

pub use supervisor::{Options, Supervisor, pass_all};
