//! What becomes of a frame from the wire.

use isthmus_wire::mxoe::{self, BROADCAST, Frame, Head, INDEX_UNKNOWN};

use super::beacon::MAGIC;
use super::{Delivery, Station, station_name};
use crate::frames;
use crate::nic::{is_station, nic_of_mac};
use crate::peers::{News, Origin};

impl Station {
    /// A frame has arrived; what is to be delivered, if anything.
    pub fn handle_frame(&mut self, now_us: u64, frame: &[u8]) -> Option<Delivery> {
        self.totals.received_frames += 1;
        self.totals.received_bytes += frame.len() as u64;
        let destination: [u8; 6] = frame.get(..6)?.try_into().ok()?;
        let local = self.local(nic_of_mac(destination));
        if local.is_none() && destination != BROADCAST {
            self.totals.foreign += 1;
            return None;
        }
        let decoded = mxoe::decode(frame, &self.config.profile());
        let Some((head, decoded)) = decoded.ok().filter(|_| frame.len() <= self.frame_max()) else {
            self.totals.bad_frames += 1;
            return None;
        };
        let source = nic_of_mac(head.source);
        if !is_station(source) {
            self.totals.bad_frames += 1;
            return None;
        }
        if self.local(source).is_some() {
            self.totals.spoofed += 1;
            return None;
        }
        match (decoded, local) {
            (Frame::Discovery { nic, serial }, _) => self.heard(now_us, source, nic, serial),
            (_, None) => self.totals.bad_frames += 1,
            (Frame::HostQuery { magic, .. }, Some(slot)) => {
                self.asked(now_us, slot, &head, &decoded, magic);
            }
            (Frame::HostReply { magic, name, .. }, Some(slot)) => {
                if let Some(index) = self.sender(now_us, slot, &head, &decoded).filter(|_| magic == MAGIC) {
                    self.peers.name(index, name);
                }
            }
            (_, Some(slot)) => return self.for_endpoint(now_us, slot, frame, &head, &decoded),
        }
        None
    }

    fn for_endpoint(
        &mut self,
        now_us: u64,
        slot: usize,
        frame: &[u8],
        head: &Head,
        decoded: &Frame<'_>,
    ) -> Option<Delivery> {
        let sender = self.sender(now_us, slot, head, decoded)?;
        let endpoint = frames::recipient(decoded)?;
        let delivery = self.deliver(slot, endpoint, frame, sender, 1);
        if delivery.is_some() {
            return delivery;
        }
        if let Some(domain) = self.domains.get_mut(slot) {
            domain.counters.no_endpoint += 1;
        }
        let own_index = self.reverse(slot, sender);
        if let Some(refusal) = frames::refusal(decoded, self.config.endpoints, own_index) {
            self.totals.refusals += 1;
            self.send_own(slot, head.source, own_index, &refusal);
        }
        None
    }

    /// The index of a frame's sender, which it is known by or added with, and what it says it calls us.
    fn sender(&mut self, now_us: u64, slot: usize, head: &Head, frame: &Frame<'_>) -> Option<u16> {
        let nic = nic_of_mac(head.source);
        let index = match (self.peers.index(nic), frame) {
            (Some(index), _) => index,
            (None, Frame::Connect { .. } | Frame::HostQuery { .. }) if self.config.open_peers => {
                self.add_peer(now_us, nic)?
            }
            _ => {
                self.totals.unknown_peer += 1;
                return None;
            }
        };
        self.peers.note_heard(index);
        // Replies to pulls carry whatever lay in their sender's memory.
        let told = head.peer_index != INDEX_UNKNOWN && !matches!(frame, Frame::PullReply { .. });
        self.totals.stale_index += u64::from(told && head.peer_index != index);
        if let (Some(told), Some(nic)) = (frames::told_index(frame), self.nic_mut(slot)) {
            nic.reverse.insert(index, told);
        }
        Some(index)
    }

    pub(super) fn add_peer(&mut self, now_us: u64, nic: u64) -> Option<u16> {
        let added = self.peers.add(nic, "", Origin::Learnt);
        if added.is_some() {
            self.ask_soon(now_us);
        } else {
            self.totals.peers_full += 1;
        }
        added
    }

    /// A station makes itself known.
    fn heard(&mut self, now_us: u64, source: u64, nic: u64, serial: u32) {
        if source != nic {
            self.totals.bad_frames += 1;
            return;
        }
        let index = match self.peers.index(nic) {
            Some(index) => Some(index),
            None if self.config.open_peers => self.add_peer(now_us, nic),
            None => {
                self.totals.unknown_peer += 1;
                None
            }
        };
        let Some(index) = index else { return };
        match self.peers.heard(index, serial) {
            News::Nothing => return,
            News::New => {}
            News::Anew => {
                for nic in self.domains.iter_mut().filter_map(|domain| domain.nic.as_mut()) {
                    nic.reverse.remove(&index);
                }
            }
        }
        self.hurry(now_us);
        self.ask_soon(now_us);
    }

    /// A station wants to know what a domain is called.
    fn asked(&mut self, now_us: u64, slot: usize, head: &Head, frame: &Frame<'_>, magic: u32) {
        let Some(index) = self.sender(now_us, slot, head, frame) else { return };
        let Some(domain) = self.domains.get(slot) else { return };
        let name = station_name(&domain.name) + "\0";
        let reply = Frame::HostReply { index, magic, name: name.as_bytes() };
        self.send_own(slot, head.source, self.reverse(slot, index), &reply);
    }
}
