//! libmyriexpress: the functions of `include/myriexpress.h`.
//!
//! A function here converts, calls, and converts back. What it calls is a [`backend`]; what C sees is in [`edge`] and
//! [`layout`]; what goes wrong goes through [`handlers`]. Read [`handlers::answer`] first: every function is one call
//! of it.
//!
//! Nothing unwinds into C: a panic becomes `MX_FAILURE`. No lock is held while the program's handlers run.
#![cfg(target_pointer_width = "64")]

mod backend;
mod codes;
mod connections;
mod edge;
mod environment;
mod extensions;
mod handlers;
mod info;
mod layout;
mod library;
mod raw;
mod requests;
mod setup;
