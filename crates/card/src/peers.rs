//! The table of stations: who is known, by which index and name.
//!
//! An index is the order in which stations were added. It is given again only if its station was never heard, and nobody
//! sent it anything for a while: nobody knows it by this index.

use std::collections::HashMap;

use isthmus_wire::card::NAME_MAX;

/// Stations beside our own. An index is 16 bits, and one of them means nobody.
pub(crate) const PEERS_MAX: usize = 4096;
/// To whom nothing was sent for so long owes no answer, µs: a connect that waits for one is repeated every half second.
const FORGET_US: u64 = 60_000_000;

/// How a station came into the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// It is the nic of a domain: which.
    Local(usize),
    /// The operator named it.
    Named,
    Learnt,
}

/// What a station that makes itself known tells us by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum News {
    Nothing,
    /// It was not heard before.
    New,
    /// It was started again.
    Anew,
}

#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(crate) nic: u64,
    /// Empty while it is not known.
    pub(crate) name: String,
    pub(crate) origin: Origin,
    /// What it last said in discovery.
    serial: Option<u32>,
    /// When it was last asked for its name.
    asked_us: Option<u64>,
    /// A frame of it has arrived.
    heard: bool,
    /// When a program last sent it something, or it was added.
    used_us: u64,
}

impl Peer {
    fn new(nic: u64, name: &str, origin: Origin, now_us: u64) -> Self {
        let name = short(name).to_owned();
        Self { nic, name, origin, serial: None, asked_us: None, heard: false, used_us: now_us }
    }
}

#[derive(Default)]
pub(crate) struct Peers {
    peers: Vec<Peer>,
    by_nic: HashMap<u64, u16>,
    remote: usize,
    /// Where the next look for those without a name begins.
    turn: usize,
}

impl Peers {
    pub(crate) fn index(&self, nic: u64) -> Option<u16> {
        self.by_nic.get(&nic).copied()
    }

    pub(crate) fn get(&self, index: u16) -> Option<&Peer> {
        self.peers.get(usize::from(index))
    }

    /// The domain whose nic this is.
    pub(crate) fn local(&self, index: u16) -> Option<usize> {
        match self.get(index)?.origin {
            Origin::Local(slot) => Some(slot),
            Origin::Named | Origin::Learnt => None,
        }
    }

    /// All, each with its index, from one on.
    pub(crate) fn from(&self, first: usize) -> impl Iterator<Item = (usize, &Peer)> {
        self.peers.iter().enumerate().skip(first)
    }

    /// Our own and those that the operator named before those that named themselves.
    pub(crate) fn find(&self, name: &str) -> Option<&Peer> {
        let named = || self.peers.iter().filter(|peer| !name.is_empty() && peer.name == name);
        named().find(|peer| peer.origin != Origin::Learnt).or_else(|| named().next())
    }

    /// Add a station, or say which index it has. `None`: there is no room.
    pub(crate) fn add(&mut self, nic: u64, name: &str, origin: Origin) -> Option<u16> {
        let local = matches!(origin, Origin::Local(_));
        if let Some(index) = self.index(nic) {
            let peer = self.peers.get_mut(usize::from(index))?;
            if origin != Origin::Learnt {
                self.remote -= usize::from(local && !matches!(peer.origin, Origin::Local(_)));
                (peer.name, peer.origin) = (short(name).to_owned(), origin);
            }
            return Some(index);
        }
        if !local && self.remote >= PEERS_MAX {
            return None;
        }
        let index = u16::try_from(self.peers.len()).ok().filter(|index| *index != u16::MAX)?;
        self.remote += usize::from(!local);
        self.peers.push(Peer::new(nic, name, origin, 0));
        self.by_nic.insert(nic, index);
        Some(index)
    }

    /// A program sends it something.
    pub(crate) fn note_use(&mut self, index: u16, now_us: u64) {
        if let Some(peer) = self.peers.get_mut(usize::from(index)) {
            peer.used_us = now_us;
        }
    }

    /// A frame of it has arrived.
    pub(crate) fn note_heard(&mut self, index: u16) {
        if let Some(peer) = self.peers.get_mut(usize::from(index)) {
            peer.heard = true;
        }
    }

    /// Was it learnt, never heard, and not used for a while?
    pub(crate) fn is_forgettable(&self, index: u16, now_us: u64) -> bool {
        self.get(index).is_some_and(|peer| {
            peer.origin == Origin::Learnt && !peer.heard && now_us >= peer.used_us.saturating_add(FORGET_US)
        })
    }

    /// Forget a station, and learn another one in its place, which has its index.
    pub(crate) fn replace(&mut self, index: u16, nic: u64, now_us: u64) {
        let Some(peer) = self.peers.get_mut(usize::from(index)) else { return };
        self.by_nic.remove(&peer.nic);
        self.by_nic.insert(nic, index);
        *peer = Peer::new(nic, "", Origin::Learnt, now_us);
    }

    /// A learnt station without a name said what it is called.
    pub(crate) fn name(&mut self, index: u16, name: &[u8]) {
        let Some(peer) = self.peers.get_mut(usize::from(index)) else { return };
        if peer.origin == Origin::Learnt && peer.name.is_empty() {
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            peer.name = short(&String::from_utf8_lossy(name)).to_owned();
        }
    }

    /// A station made itself known. One that began anew has forgotten us, and may be called something else.
    pub(crate) fn heard(&mut self, index: u16, serial: u32) -> News {
        let Some(peer) = self.peers.get_mut(usize::from(index)) else { return News::Nothing };
        peer.heard = true;
        match peer.serial.replace(serial) {
            None => News::New,
            Some(before) if before == serial => News::Nothing,
            Some(_) => {
                if peer.origin == Origin::Learnt {
                    peer.name.clear();
                    peer.asked_us = None;
                }
                News::Anew
            }
        }
    }

    /// The next station without a name that was not asked since `before_us`; it counts as asked now.
    pub(crate) fn ask_next(&mut self, before_us: u64, now_us: u64) -> Option<(u16, u64)> {
        for _ in 0..self.peers.len() {
            self.turn = (self.turn + 1) % self.peers.len();
            let index = u16::try_from(self.turn).ok()?;
            let peer = self.peers.get_mut(self.turn)?;
            let due = peer.asked_us.is_none_or(|asked| asked <= before_us);
            if peer.origin == Origin::Learnt && peer.name.is_empty() && due {
                peer.asked_us = Some(now_us);
                return Some((index, peer.nic));
            }
        }
        None
    }

    /// When a station without a name is next to be asked.
    pub(crate) fn next_question(&self, interval_us: u64) -> Option<u64> {
        let nameless = |peer: &&Peer| peer.origin == Origin::Learnt && peer.name.is_empty();
        let due = |peer: &Peer| peer.asked_us.map_or(0, |asked| asked + interval_us);
        self.peers.iter().filter(nameless).map(due).min()
    }
}

/// As much of a name as fits a frame, with the zero behind it.
pub(crate) fn short(name: &str) -> &str {
    let mut end = name.len().min(NAME_MAX - 1);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_is_the_order_and_stays() {
        let mut peers = Peers::default();
        assert_eq!(peers.add(7, "", Origin::Learnt), Some(0));
        assert_eq!(peers.add(8, "b:0", Origin::Local(3)), Some(1));
        assert_eq!(peers.add(7, "", Origin::Learnt), Some(0));
        assert_eq!((peers.index(8), peers.local(1), peers.local(0)), (Some(1), Some(3), None));
        // A domain comes whose nic somebody on the wire had.
        assert_eq!(peers.add(7, "a:0", Origin::Local(4)), Some(0));
        assert_eq!((peers.local(0), peers.remote), (Some(4), 0));
        // Nobody on the wire takes it back.
        assert_eq!(peers.add(7, "mine", Origin::Learnt), Some(0));
        assert_eq!(peers.find("a:0").map(|peer| peer.nic), Some(7));
    }

    #[test]
    fn the_table_has_an_end_for_others_and_room_for_our_own() {
        let mut peers = Peers::default();
        for nic in 0..PEERS_MAX as u64 {
            assert!(peers.add(nic, "", Origin::Learnt).is_some());
        }
        assert_eq!(peers.add(1 << 20, "", Origin::Learnt), None);
        assert_eq!(peers.add(1 << 20, "", Origin::Local(0)), Some(PEERS_MAX as u16));
    }

    #[test]
    fn only_who_was_never_heard_and_not_used_for_a_while_is_forgotten() {
        let mut peers = Peers::default();
        let origins = [Origin::Learnt, Origin::Learnt, Origin::Learnt, Origin::Named, Origin::Local(0)];
        let all: Vec<u16> =
            (1..).zip(origins).filter_map(|(nic, origin)| peers.add(nic, "", origin)).collect();
        peers.note_heard(all[1]);
        peers.heard(all[2], 5);
        for index in &all {
            peers.note_use(*index, 1000);
        }
        assert!(all.iter().all(|index| !peers.is_forgettable(*index, 999 + FORGET_US)));
        let late = all.iter().map(|index| peers.is_forgettable(*index, 1000 + FORGET_US));
        assert_eq!(late.collect::<Vec<_>>(), [true, false, false, false, false]);
        peers.name(all[0], b"gone:0\0");
        peers.replace(all[0], 77, 1000 + FORGET_US);
        assert_eq!((peers.index(1), peers.index(77), peers.remote), (None, Some(all[0]), 4));
        assert!(peers.find("gone:0").is_none() && !peers.is_forgettable(all[0], 1001 + FORGET_US));
    }

    #[test]
    fn a_name_is_taken_once_and_never_from_who_has_one_already() {
        let mut peers = Peers::default();
        let learnt = peers.add(1, "", Origin::Learnt).expect("room");
        let named = peers.add(2, "store:0", Origin::Named).expect("room");
        assert!(peers.find("").is_none());
        peers.name(learnt, b"store:0\0garbage");
        peers.name(named, b"other\0");
        assert_eq!(peers.find("store:0").map(|peer| peer.nic), Some(2), "the operator's comes first");
        peers.name(learnt, b"again\0");
        assert!(peers.find("again").is_none());
        let odd = peers.add(3, "", Origin::Learnt).expect("room");
        peers.name(odd, &[0xFF; 80]);
        assert!(peers.get(odd).is_some_and(|peer| peer.name.len() < NAME_MAX && !peer.name.is_empty()));
    }

    #[test]
    fn another_serial_is_another_station() {
        let mut peers = Peers::default();
        let index = peers.add(1, "", Origin::Learnt).expect("room");
        assert_eq!(peers.heard(index, 5), News::New);
        peers.name(index, b"b:0\0");
        assert_eq!(peers.heard(index, 5), News::Nothing);
        assert!(peers.find("b:0").is_some());
        assert_eq!(peers.heard(index, 6), News::Anew);
        assert!(peers.find("b:0").is_none());
    }

    #[test]
    fn each_without_a_name_is_asked_in_turn() {
        let mut peers = Peers::default();
        for nic in 0..3 {
            peers.add(nic, "", Origin::Learnt);
        }
        peers.add(9, "c", Origin::Named);
        let mut asked: Vec<_> = (0..3).filter_map(|_| peers.ask_next(0, 10)).map(|(_, nic)| nic).collect();
        asked.sort_unstable();
        assert_eq!(asked, [0, 1, 2]);
        assert_eq!(peers.ask_next(9, 11), None);
        assert!(peers.ask_next(10, 20).is_some());
    }
}
