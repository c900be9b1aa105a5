//! MX endpoints.
//!
//! An [`Endpoint`] sends and receives messages that are told apart by 64 bits and a mask. Peers of the same node are
//! reached over lanes ([`lanes`]); those of other nodes over the card, with frames that this side orders and sends again
//! (`isthmus_proto::mx::wire`, [`card`]). Which of both it is no program sees.
//!
//! Read first: [`endpoint`] (what a program calls, and who waits how), then `state` (requests and matching) and
//! `state::unseen` (what no receive waits for, and the handler of it).

mod buffer;
mod card;
mod codes;
mod endpoint;
mod lanes;
mod peers;
mod placing;
mod progress;
mod requests;
mod state;
mod stations;

pub use buffer::Parts;
pub use codes::{Fault, Result, Return};
pub use endpoint::{ENDPOINTS, Endpoint, Options};
pub use isthmus_engine::window::Window;
pub use isthmus_engine::{How, Wait};
pub use isthmus_proto::mx::Status;
pub use isthmus_proto::mx::matching::{Contexts, Pattern};
pub use isthmus_proto::mx::wire::Timing;
pub use peers::Address;
pub use requests::{Report, RequestId};
pub use state::unseen::{Arrived, Handler, Verdict};
pub use state::{BUFFERED_MAX, EAGER_MAX};
pub use stations::{find_station, station_name};
