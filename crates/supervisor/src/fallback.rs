//! Connections that took the ordinary network: why, how often, and for how long nobody need ask again.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use isthmus_engine::Error;
use isthmus_wire::control::Refusal;

/// Different destinations remembered.
const REMEMBERED_MAX: usize = 1024;

#[derive(Default)]
pub struct Fallbacks {
    /// What was answered about an address, and until when that holds.
    remembered: HashMap<SocketAddr, (Instant, String)>,
    /// Not yet told to the broker: how often, by where to, whether refused, and why.
    counts: HashMap<(SocketAddr, bool, String), u32>,
}

impl Fallbacks {
    /// Why connections to this address took the ordinary network a moment ago.
    #[must_use]
    pub fn remembered(&self, address: SocketAddr) -> Option<&str> {
        let (until, why) = self.remembered.get(&address)?;
        (*until > Instant::now()).then_some(why.as_str())
    }

    pub fn remember(&mut self, address: SocketAddr, error: &Error) {
        let Some(time) = holds_for(error) else { return };
        if self.remembered.len() >= REMEMBERED_MAX {
            self.remembered.clear();
        }
        self.remembered.insert(address, (Instant::now() + time, error.to_string()));
    }

    /// Nobody there answered in time.
    pub fn remember_late(&mut self, address: SocketAddr) {
        let until = Instant::now() + Duration::from_secs(2);
        let why = "whoever listens there did not answer in time".to_owned();
        self.remembered.insert(crate::address::canonical(address), (until, why));
    }

    /// What was learned about listeners may be over.
    pub fn forget(&mut self) {
        self.remembered.clear();
    }

    /// Count one. Returns whether it is the first for this reason since the last [`Fallbacks::take`].
    pub fn count(&mut self, address: SocketAddr, refused: bool, why: &str) -> bool {
        if self.counts.len() >= REMEMBERED_MAX {
            return false;
        }
        let count = self.counts.entry((address, refused, why.to_owned())).or_default();
        *count = count.saturating_add(1);
        *count == 1
    }

    pub fn take(&mut self) -> Vec<((SocketAddr, bool, String), u32)> {
        self.counts.drain().collect()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }
}

/// For how long an answer is as good as asking again. None: ask again.
fn holds_for(error: &Error) -> Option<Duration> {
    let Error::Refused { refusal, .. } = error else { return None };
    match refusal {
        Refusal::UnknownDomain
        | Refusal::RefusedByRule
        | Refusal::PathUnavailable
        | Refusal::WrongAddress => Some(Duration::from_secs(2)),
        // A server that has just been started is found at once, or nearly so.
        Refusal::NobodyListens | Refusal::WrongKind => Some(Duration::from_millis(100)),
        _ => None,
    }
}
