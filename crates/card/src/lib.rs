//! The card: owns one Ethernet interface and lends it to domains, for MX over Ethernet.
//!
//! Each domain has a network card of its own, a *nic*: an address, endpoints, a share of the wire. Programs connect to
//! the card as to any other program and send it whole frames; it puts in what they must not say themselves (who they
//! are), and passes what arrives to the endpoint that it is for. It knows which stations there are, and nothing of
//! messages: who acknowledges, resends and matches is the program.
//!
//! Read in this order: [`Station`], which decides everything and does nothing; [`Card`], which turns the crank; then
//! docs/formats/card.md and docs/formats/mxoe.md.
#![forbid(unsafe_code)]

mod buffer;
mod card;
mod config;
mod counters;
mod faults;
mod frames;
mod lines;
mod nic;
mod peers;
mod queue;
mod station;

pub use buffer::Buffer;
pub use card::Card;
pub use config::Config;
pub use counters::{DomainCounters, Totals};
pub use faults::Faults;
pub use nic::{mac_of, nic_of_mac};
pub use queue::Sent;
pub use station::{Delivery, PortId, Station, TooManyPorts};
