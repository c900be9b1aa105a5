//! What the operator sets.

use isthmus_wire::mxoe::Profile;

use crate::faults::Faults;

#[derive(Clone, Debug)]
pub struct Config {
    /// Name of the interface.
    pub interface: String,
    /// What the stations on this wire speak: 0 for the dialect of MX, else Open-MX's own for this MTU.
    pub own_mtu: u16,
    /// Endpoints of a domain are numbered below this; at most 256.
    pub endpoints: u16,
    /// Stations that the operator names, beside those that are learnt.
    pub peers: Vec<(u64, String)>,
    /// Add stations that make themselves known, ask or connect.
    pub open_peers: bool,
    /// Add stations that a program connects to.
    pub learn: bool,
    /// Pass frames on between domains of this node. The broker's rules do not know of them, and lanes are faster.
    pub between_domains: bool,
    /// Make the domains' nics known to all stations.
    pub discovery: bool,
    /// Of discovery: another one each time the card starts.
    pub serial: u32,
    /// What a domain may have waiting for the wire. Each of its endpoints may have as much of it as is still free.
    pub queue_frames: usize,
    pub queue_bytes: usize,
    /// Look for frames for so long after the last one before sleeping, µs.
    pub poll_us: u64,
    /// Rings towards a program, bytes: at first, and when there is much to say. A frame longer than a quarter of the
    /// first goes straight to the second.
    pub small_ring: u32,
    pub large_ring: u32,
    /// Past the kernel's queue for the interface and its rules.
    pub bypass_queue: bool,
    /// For tests: what goes wrong with frames that are sent.
    pub faults: Faults,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            interface: String::new(),
            own_mtu: 0,
            endpoints: 64,
            peers: Vec::new(),
            open_peers: true,
            learn: true,
            between_domains: false,
            discovery: true,
            serial: 0,
            queue_frames: 1024,
            queue_bytes: 2 << 20,
            poll_us: 50,
            small_ring: 16 * 1024,
            large_ring: 4 << 20,
            bypass_queue: false,
            faults: Faults::default(),
        }
    }
}

impl Config {
    #[must_use]
    pub fn profile(&self) -> Profile {
        if self.own_mtu == 0 { Profile::WIRE } else { Profile::own(self.own_mtu) }
    }
}
