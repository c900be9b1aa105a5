//! Decides what becomes of every frame and record; does nothing itself.
//!
//! The caller brings records of programs, frames of the wire and the time, and carries out what it is told: a
//! [`Delivery`] to a program, an answer, frames to send ([`Station::poll_transmit`]).

mod beacon;
mod from_link;
mod from_program;

use std::collections::HashMap;

use isthmus_wire::card::{FRAME_AT, FRAME_HEAD, Opening};
use isthmus_wire::mxoe::{self, ETHERNET_LEN, FRAME_MIN, Frame, HEAD_LEN, Head, INDEX_UNKNOWN};

use crate::config::Config;
use crate::counters::{DomainCounters, Totals};
use crate::faults::{Chance, Fate};
use crate::nic::{is_station, mac_of};
use crate::peers::{Origin, Peers, short};
use crate::queue::{Outgoing, Sender, Sent};
use beacon::Beacon;

/// A connection of a program; the caller's number for it.
pub type PortId = u64;

/// Domains with a nic.
const NICS_MAX: usize = 1024;
/// Connections of one domain.
const PORTS_MAX: usize = 512;
/// Stations that one domain may have added by connecting to them.
const LEARNT_MAX: usize = 256;
/// How often a domain's nic is asked for that was not told: the card waits for the answer.
const ASK_NIC_US: u64 = 5_000_000;
/// In [`Outgoing`]: the card itself.
const OWN: Sender = Sender { tenant: u32::MAX, port: 0 };
/// Questions to the card are shorter, bytes.
const SHORT_RECORDS: usize = 512;
/// A frame that the card makes itself is never longer.
const OWN_FRAME_MAX: usize = 128;

/// A frame for a program: send `head` and then `frame[16..]` as one record, as often as `times` says, and tell
/// [`Station::delivered`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    pub port: PortId,
    pub head: [u8; FRAME_AT + HEAD_LEN],
    pub times: u8,
}

/// This domain has too many connections, or there are too many domains: close it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooManyPorts;

/// Of a domain.
struct Nic {
    nic: u64,
    mac: [u8; 6],
    /// In the table of peers.
    index: u16,
    endpoints: HashMap<u8, PortId>,
    /// By index of a station: its index for this nic.
    reverse: HashMap<u16, u16>,
    /// Stations that were added because this nic connected to them.
    learnt: Vec<u16>,
    beacon: Beacon,
}

struct Domain {
    name: String,
    ports: usize,
    nic: Option<Nic>,
    /// When it may be asked for again, if there is none.
    ask_us: u64,
    counters: DomainCounters,
}

struct Port {
    domain: usize,
    endpoint: Option<u8>,
}

pub struct Station {
    config: Config,
    /// Bytes that a frame may carry behind its Ethernet header.
    mtu: usize,
    nic_of: Box<dyn Fn(&str) -> u64 + Send>,
    peers: Peers,
    domains: Vec<Domain>,
    by_name: HashMap<String, usize>,
    ports: HashMap<PortId, Port>,
    outgoing: Outgoing,
    chance: Chance,
    totals: Totals,
    /// When stations are next asked for their names.
    ask_us: Option<u64>,
    /// Whose turn it is to ask.
    asker: usize,
}

impl Station {
    /// `nic_of` says which address a domain has; 0: none.
    pub fn new(config: Config, mtu: usize, nic_of: Box<dyn Fn(&str) -> u64 + Send>) -> Self {
        let mut peers = Peers::default();
        for (nic, name) in &config.peers {
            if is_station(*nic) {
                peers.add(*nic, name, Origin::Named);
            }
        }
        let outgoing = Outgoing::new(config.queue_frames, config.queue_bytes);
        let chance = Chance::new(config.faults.clone());
        Self {
            config,
            mtu,
            nic_of,
            peers,
            domains: Vec::new(),
            by_name: HashMap::new(),
            ports: HashMap::new(),
            outgoing,
            chance,
            totals: Totals::default(),
            ask_us: None,
            asker: 0,
        }
    }

    /// A program of `domain` has connected. Returns the address of its nic if that is new: the interface has to hear it.
    ///
    /// # Errors
    /// There are too many already.
    pub fn attach(
        &mut self,
        port: PortId,
        domain: &str,
        now_us: u64,
    ) -> Result<Option<[u8; 6]>, TooManyPorts> {
        let (slot, fresh) = self.slot(domain, now_us)?;
        let entry = self.domains.get_mut(slot).filter(|domain| domain.ports < PORTS_MAX);
        let entry = entry.ok_or(TooManyPorts)?;
        entry.ports += 1;
        self.ports.insert(port, Port { domain: slot, endpoint: None });
        Ok(fresh)
    }

    /// Where a domain is, and its address if it came just now.
    fn slot(&mut self, name: &str, now_us: u64) -> Result<(usize, Option<[u8; 6]>), TooManyPorts> {
        if let Some(slot) = self.by_name.get(name).copied() {
            let known = self.domains.get(slot);
            let asks = known.is_some_and(|known| known.nic.is_none() && now_us >= known.ask_us);
            let mac = if asks { self.ask_nic(slot, now_us) } else { None };
            return Ok((slot, mac));
        }
        let counters = DomainCounters::default();
        let domain = Domain { name: name.to_owned(), ports: 0, nic: None, ask_us: 0, counters };
        let mut slot = self.domains.len();
        if slot < NICS_MAX {
            self.domains.push(domain);
        } else {
            // One without a nic, of which nobody is here, is known to nobody.
            let is_free = |domain: &Domain| domain.ports == 0 && domain.nic.is_none();
            slot = self.domains.iter().position(is_free).ok_or(TooManyPorts)?;
            self.by_name.remove(&std::mem::replace(&mut self.domains[slot], domain).name);
        }
        self.by_name.insert(name.to_owned(), slot);
        Ok((slot, self.ask_nic(slot, now_us)))
    }

    /// Ask for a domain's address. Without an answer it is asked for again when somebody of the domain comes: a broker that
    /// was started again may know.
    fn ask_nic(&mut self, slot: usize, now_us: u64) -> Option<[u8; 6]> {
        let name = self.domains.get(slot)?.name.clone();
        let nic = self.new_nic(&name, slot, now_us);
        let mac = nic.as_ref().map(|nic| nic.mac);
        let domain = self.domains.get_mut(slot)?;
        (domain.nic, domain.ask_us) = (nic, now_us.saturating_add(ASK_NIC_US));
        if mac.is_some() {
            // Stations that were heard while nobody here could ask.
            self.ask_soon(now_us);
        }
        mac
    }

    /// `None`: the domain has none, or one that cannot be, or that of another domain.
    fn new_nic(&mut self, name: &str, slot: usize, now_us: u64) -> Option<Nic> {
        let nic = (self.nic_of)(name);
        let taken = self.peers.index(nic).is_some_and(|index| self.peers.local(index).is_some());
        if !is_station(nic) || taken {
            return None;
        }
        let index = self.peers.add(nic, &station_name(name), Origin::Local(slot))?;
        Some(Nic {
            nic,
            mac: mac_of(nic),
            index,
            endpoints: HashMap::new(),
            reverse: HashMap::new(),
            learnt: Vec::new(),
            beacon: Beacon::new(now_us),
        })
    }

    /// A connection has ended: its endpoint is closed.
    pub fn detach(&mut self, port: PortId) {
        let Some(Port { domain, endpoint }) = self.ports.remove(&port) else { return };
        let Some(domain) = self.domains.get_mut(domain) else { return };
        domain.ports -= 1;
        if let (Some(nic), Some(endpoint)) = (&mut domain.nic, endpoint) {
            nic.endpoints.remove(&endpoint);
        }
    }

    /// May a record of this connection be taken now? Until then it waits in its lane.
    #[must_use]
    pub fn has_room(&self, port: PortId) -> bool {
        let domain = self.ports.get(&port).map(|port| port.domain);
        domain.is_none_or(|domain| self.outgoing.has_room(Sender { tenant: domain as u32, port }))
    }

    /// How often a delivery was done, and how long the frame was, bytes.
    pub fn delivered(&mut self, delivery: &Delivery, times: u8, len: usize) {
        let Some(port) = self.ports.get(&delivery.port) else { return };
        let Some(domain) = self.domains.get_mut(port.domain) else { return };
        domain.counters.received_frames += u64::from(times);
        domain.counters.received_bytes += u64::from(times) * len as u64;
        domain.counters.lane_full += u64::from(delivery.times.saturating_sub(times));
    }

    /// Send up to `limit` frames. `true`: the wire is full, come back.
    pub fn poll_transmit(&mut self, limit: usize, send: impl FnMut(&[u8]) -> Sent) -> bool {
        let Self { outgoing, domains, totals, .. } = self;
        outgoing.transmit(limit, send, |tenant, len, sent| {
            let counters = domains.get_mut(tenant as usize).map(|domain| &mut domain.counters);
            if sent != Sent::Yes {
                let failed = counters.map_or(&mut totals.not_sent, |counters| &mut counters.not_sent);
                *failed += 1;
                return;
            }
            totals.sent_frames += 1;
            totals.sent_bytes += len as u64;
            if let Some(counters) = counters {
                counters.sent_frames += 1;
                counters.sent_bytes += len as u64;
            }
        })
    }

    /// Does something wait for the wire?
    #[must_use]
    pub fn has_frames(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// When [`Station::handle_timeout`] is next worth calling, µs.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<u64> {
        let beacons = self.domains.iter().filter_map(|domain| domain.nic.as_ref()?.beacon.due());
        let beacon = beacons.min().filter(|_| self.config.discovery);
        [beacon, self.ask_us, self.outgoing.poll_timeout()].into_iter().flatten().min()
    }

    #[must_use]
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// Frames that the kernel had no room for, since the interface was opened.
    pub fn note_ring_full(&mut self, frames: u64) {
        self.totals.ring_full = frames;
    }

    /// Was an address of [`Station::attach`] refused by the interface?
    pub fn note_address(&mut self, refused: bool) {
        self.totals.address_refused += u64::from(refused);
    }

    /// Was an answer of [`Station::handle_record`] taken?
    pub fn note_answer(&mut self, port: PortId, taken: bool) {
        let domain = self.ports.get(&port).map(|port| port.domain);
        if let Some(domain) = domain.and_then(|domain| self.domains.get_mut(domain)) {
            domain.counters.lane_full += u64::from(!taken);
        }
    }

    /// Each domain's counters, by its name.
    pub fn domains(&self) -> impl Iterator<Item = (&str, &DomainCounters)> {
        self.domains.iter().map(|domain| (domain.name.as_str(), &domain.counters))
    }

    // ---- what both directions need

    /// Room that any record of a program needs, bytes; a longer one is none.
    #[must_use]
    pub fn record_max(&self) -> usize {
        (FRAME_AT + self.frame_max()).max(SHORT_RECORDS)
    }

    /// Longest whole frame, bytes.
    fn frame_max(&self) -> usize {
        self.mtu.min(self.config.profile().mtu() as usize) + ETHERNET_LEN
    }

    fn nic(&self, slot: usize) -> Option<&Nic> {
        self.domains.get(slot)?.nic.as_ref()
    }

    fn nic_mut(&mut self, slot: usize) -> Option<&mut Nic> {
        self.domains.get_mut(slot)?.nic.as_mut()
    }

    /// The domain to which an address of ours belongs.
    fn local(&self, nic: u64) -> Option<usize> {
        self.peers.local(self.peers.index(nic)?)
    }

    /// A frame for the endpoint of a program, if somebody has it open. It carries our index of its sender.
    fn deliver(&self, slot: usize, endpoint: u8, frame: &[u8], sender: u16, times: u8) -> Option<Delivery> {
        let port = *self.nic(slot)?.endpoints.get(&endpoint)?;
        let mut head = [0; FRAME_AT + HEAD_LEN];
        head[..FRAME_AT].copy_from_slice(&FRAME_HEAD);
        head[FRAME_AT..].copy_from_slice(frame.get(..HEAD_LEN)?);
        head[FRAME_AT + ETHERNET_LEN..].copy_from_slice(&sender.to_be_bytes());
        Some(Delivery { port, head, times })
    }

    /// Send a frame of the card's own from a domain's nic to a station.
    fn send_own(&mut self, from: usize, to: [u8; 6], peer_index: u16, frame: &Frame<'_>) {
        let Some(nic) = self.nic(from) else { return };
        let ethertype = self.config.profile().ethertype;
        let head = Head { destination: to, source: nic.mac, ethertype, peer_index };
        let mut bytes = [0; OWN_FRAME_MAX];
        let Ok(len) = mxoe::encode(&head, frame, &self.config.profile(), &mut bytes) else { return };
        let kind = mxoe::type_of(&bytes).unwrap_or(0);
        let room = match self.chance.fate(kind) {
            Fate::Lost => true,
            Fate::Twice => {
                self.outgoing.push(OWN, &bytes[..len], FRAME_MIN)
                    && self.outgoing.push(OWN, &bytes[..len], FRAME_MIN)
            }
            Fate::Sent | Fate::Late => self.outgoing.push(OWN, &bytes[..len], FRAME_MIN),
        };
        self.totals.queue_full += u64::from(!room);
    }

    /// What a station calls this nic in its table.
    fn reverse(&self, slot: usize, peer: u16) -> u16 {
        self.nic(slot).and_then(|nic| nic.reverse.get(&peer)).copied().unwrap_or(INDEX_UNKNOWN)
    }

    fn open(&mut self, port: PortId, endpoint: u16) -> (Opening, u8) {
        let endpoints = self.config.endpoints.min(256);
        let Some(Port { domain, endpoint: own }) = self.ports.get_mut(&port) else {
            return (Opening::NotAllowed, 0);
        };
        let nic = self.domains.get_mut(*domain).and_then(|domain| domain.nic.as_mut());
        let Some(nic) = nic else { return (Opening::NotAllowed, 0) };
        if own.is_some() {
            return (Opening::Busy, 0);
        }
        let free = |endpoint: &u8| !nic.endpoints.contains_key(endpoint);
        let chosen = if endpoint == isthmus_wire::card::ANY_ENDPOINT {
            (0..=u8::MAX).take(endpoints.into()).find(free).ok_or(Opening::NoMore)
        } else {
            match u8::try_from(endpoint) {
                Ok(endpoint) if u16::from(endpoint) < endpoints => {
                    Some(endpoint).filter(free).ok_or(Opening::Busy)
                }
                _ => Err(Opening::BadEndpoint),
            }
        };
        match chosen {
            Ok(endpoint) => {
                nic.endpoints.insert(endpoint, port);
                *own = Some(endpoint);
                (Opening::Opened, endpoint)
            }
            Err(refused) => (refused, 0),
        }
    }
}

/// What a domain is called among stations: it has one board.
fn station_name(domain: &str) -> String {
    const BOARD: &str = ":0";
    let mut name = short(domain).to_owned();
    while name.len() + BOARD.len() >= isthmus_wire::card::NAME_MAX {
        name.pop();
    }
    name + BOARD
}
