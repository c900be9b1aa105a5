//! Whom an endpoint knows.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU16, Ordering};

use isthmus_proto::mx::wire::PeerId;

/// A peer, as the endpoint that knows it calls it: 16 bytes that mean nothing to any other endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// Of its card: 48 bits.
    pub nic: u64,
    pub endpoint: u8,
    pub session: u32,
    pub(crate) peer: u32,
    /// Of this entry: the number of a peer that was forgotten is used again.
    pub(crate) instance: u16,
}

/// Peers of one endpoint: their numbers have so many bits in an address.
const PEER_BITS: u32 = 20;

impl Address {
    /// Nobody: all zeros.
    pub const NONE: Self = Self { nic: 0, endpoint: 0, session: 0, peer: (1 << PEER_BITS) - 1, instance: 0 };

    #[must_use]
    pub fn to_words(self) -> [u64; 2] {
        let place = u64::from(self.instance) << PEER_BITS | u64::from(self.peer.wrapping_add(1) & PEER_MASK);
        let session = u64::from(self.session) << 32;
        // The place takes what the card, the endpoint and the session leave.
        [self.nic << 16 | u64::from(self.endpoint) << 8 | place >> 32 & 0xFF, session | place & 0xFFFF_FFFF]
    }

    #[must_use]
    pub fn from_words(words: [u64; 2]) -> Self {
        let [one, other] = words;
        let place = (one & 0xFF) << 32 | other & 0xFFFF_FFFF;
        Self {
            nic: one >> 16,
            endpoint: (one >> 8) as u8,
            session: (other >> 32) as u32,
            peer: (place as u32).wrapping_sub(1) & PEER_MASK,
            instance: (place >> PEER_BITS) as u16,
        }
    }
}

const PEER_MASK: u32 = (1 << PEER_BITS) - 1;

/// Entries of this process so far. Of all its endpoints: programs ask about an address without saying whose it is.
static INSTANCES: AtomicU16 = AtomicU16::new(1);

/// How a peer is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// It is this endpoint.
    Own,
    Lane(u32),
    Wire(PeerId),
    /// Its lane has ended.
    Ended,
}

pub(crate) struct Peer {
    pub nic: u64,
    pub endpoint: u8,
    pub session: u32,
    pub path: Path,
    /// The program's own word.
    pub context: u64,
    instance: u16,
}

#[derive(Default)]
pub(crate) struct Peers {
    all: Vec<Option<Peer>>,
    by_address: HashMap<(u64, u8), u32>,
    by_wire: HashMap<PeerId, u32>,
}

impl Peers {
    pub fn get(&mut self, peer: u32) -> Option<&mut Peer> {
        self.all.get_mut(peer as usize)?.as_mut()
    }

    /// `None`: the address is of a peer that was forgotten, or of another endpoint.
    pub fn find(&mut self, address: Address) -> Option<&mut Peer> {
        self.get(address.peer).filter(|peer| peer.instance == address.instance)
    }

    pub fn at(&self, nic: u64, endpoint: u8) -> Option<u32> {
        self.by_address.get(&(nic, endpoint)).copied()
    }

    pub fn on_wire(&self, peer: PeerId) -> Option<u32> {
        self.by_wire.get(&peer).copied()
    }

    pub fn address(&self, peer: u32) -> Address {
        let Some(Some(known)) = self.all.get(peer as usize) else { return Address::NONE };
        let Peer { nic, endpoint, session, instance, .. } = *known;
        Address { nic, endpoint, session, peer, instance }
    }

    /// This peer is there, at this session and on this path; its context stays what it was.
    pub fn meet(&mut self, nic: u64, endpoint: u8, session: u32, path: Path) -> u32 {
        let known = self.at(nic, endpoint);
        let peer = known.unwrap_or_else(|| {
            let free = self.all.iter().position(Option::is_none).unwrap_or(self.all.len());
            if free == self.all.len() {
                self.all.push(None);
            }
            let instance = INSTANCES.fetch_add(1, Ordering::Relaxed);
            self.all[free] = Some(Peer { nic, endpoint, session, path, context: 0, instance });
            self.by_address.insert((nic, endpoint), free as u32);
            free as u32
        });
        if let Some(entry) = self.get(peer) {
            // A path that works stays, so that messages keep their order.
            if entry.session != session || entry.path == Path::Ended {
                (entry.session, entry.path) = (session, path);
            }
        }
        if let Path::Wire(id) = path {
            self.by_wire.insert(id, peer);
        }
        peer
    }

    pub fn forget(&mut self, peer: u32) -> Option<Peer> {
        let gone = self.all.get_mut(peer as usize)?.take()?;
        self.by_address.remove(&(gone.nic, gone.endpoint));
        self.by_wire.retain(|_, known| *known != peer);
        Some(gone)
    }

    /// Its lane has ended.
    pub fn end_lane(&mut self, lane: u32) {
        for peer in self.all.iter_mut().flatten().filter(|peer| peer.path == Path::Lane(lane)) {
            peer.path = Path::Ended;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_two_words() {
        let all = Address {
            nic: 0xFEDC_BA98_7654,
            endpoint: 0xA5,
            session: 0x1234_5678,
            peer: PEER_MASK - 1,
            instance: 0xBEEF,
        };
        for address in [all, Address { peer: 0, instance: 1, ..all }, Address::NONE] {
            assert_eq!(Address::from_words(address.to_words()), address);
        }
        assert_eq!(Address::NONE.to_words(), [0, 0]);
    }

    #[test]
    fn the_address_of_a_peer_that_was_forgotten_is_nobody_s() {
        let mut peers = Peers::default();
        let first = peers.meet(7, 1, 5, Path::Own);
        let address = peers.address(first);
        assert!(peers.find(address).is_some());
        peers.forget(first);
        assert_eq!(peers.meet(8, 1, 5, Path::Own), first);
        assert!(peers.find(address).is_none());
    }
}
