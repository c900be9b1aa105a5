//! How stations learn of each other: discovery, and questions for names.

use isthmus_wire::mxoe::{BROADCAST, Frame};

use super::Station;

/// A nic that is new makes itself known so often, at this interval, and then at the slow one, µs: as Open-MX does, and
/// Myricom's own daemon.
const FAST: u8 = 8;
const FAST_US: u64 = 1_000_000;
const SLOW_US: u64 = 180_000_000;
/// A station without a name is asked for it at this interval, µs.
const ASK_US: u64 = 5_000_000;
/// How soon a station that is new is asked, µs: many come at once.
const ASK_SOON_US: u64 = 50_000;
/// Stations asked at one time.
const ASK_BATCH: usize = 64;
/// A question and its answer carry it; it never changes, because we never forget all names at once.
pub(super) const MAGIC: u32 = 0x1305_2008;

/// When a nic makes itself known.
pub(super) struct Beacon {
    fast: u8,
    at_us: u64,
}

impl Beacon {
    pub(super) fn new(now_us: u64) -> Self {
        Self { fast: FAST, at_us: now_us }
    }

    pub(super) fn due(&self) -> Option<u64> {
        Some(self.at_us)
    }

    /// Somebody new is there.
    fn hurry(&mut self, now_us: u64) {
        self.fast = FAST;
        self.at_us = self.at_us.min(now_us + FAST_US);
    }

    fn fire(&mut self, now_us: u64) -> bool {
        if now_us < self.at_us {
            return false;
        }
        self.fast = self.fast.saturating_sub(1);
        self.at_us = now_us + if self.fast > 0 { FAST_US } else { SLOW_US };
        true
    }
}

impl Station {
    /// Do what is due.
    pub fn handle_timeout(&mut self, now_us: u64) {
        self.outgoing.handle_timeout(now_us);
        if self.config.discovery {
            self.make_known(now_us);
        }
        if self.ask_us.is_some_and(|at| at <= now_us) {
            self.ask_names(now_us);
        }
    }

    fn make_known(&mut self, now_us: u64) {
        for slot in 0..self.domains.len() {
            let Some(nic) = self.nic_mut(slot).filter(|nic| now_us >= nic.beacon.at_us) else { continue };
            if nic.beacon.fire(now_us) {
                let frame = Frame::Discovery { nic: nic.nic, serial: self.config.serial };
                self.send_own(slot, BROADCAST, 0, &frame);
            }
        }
    }

    pub(super) fn hurry(&mut self, now_us: u64) {
        for domain in &mut self.domains {
            if let Some(nic) = &mut domain.nic {
                nic.beacon.hurry(now_us);
            }
        }
    }

    /// A station is there that may have no name.
    pub(super) fn ask_soon(&mut self, now_us: u64) {
        let soon = now_us + ASK_SOON_US;
        self.ask_us = Some(self.ask_us.map_or(soon, |at| at.min(soon)));
    }

    /// A question goes out from one nic, and another one the next time: the station may know only one of them.
    fn ask_names(&mut self, now_us: u64) {
        self.ask_us = None;
        let nics: Vec<usize> = (0..self.domains.len()).filter(|slot| self.nic(*slot).is_some()).collect();
        if nics.is_empty() {
            self.ask_us = Some(now_us + ASK_US);
            return;
        }
        for _ in 0..ASK_BATCH {
            let before = now_us.saturating_sub(ASK_US);
            let Some((index, nic)) = self.peers.ask_next(before, now_us) else { break };
            self.asker = (self.asker + 1) % nics.len();
            let slot = nics[self.asker];
            let frame = Frame::HostQuery { index, magic: MAGIC };
            self.send_own(slot, crate::nic::mac_of(nic), self.reverse(slot, index), &frame);
        }
        if let Some(at) = self.peers.next_question(ASK_US) {
            self.ask_us = Some(at.max(now_us + ASK_SOON_US));
        }
    }
}
