//! What becomes of a record from a program.

use isthmus_wire::card::{self, FRAME_AT, Peer, RECORD_MAX, Record};
use isthmus_wire::mxoe::{self, ETHERNET_LEN, FRAME_MIN, Frame, Head, INDEX_UNKNOWN};

use super::{Delivery, LEARNT_MAX, PortId, Station};
use crate::counters::DomainCounters;
use crate::faults::Fate;
use crate::frames::{self, Author};
use crate::nic::{is_station, nic_of_mac};
use crate::queue::Sender;

/// Room for a frame that the card answers with.
const ANSWER_MAX: usize = 128;

impl Station {
    /// A record has come from a program. What is to be delivered to another program of this card, if anything: of a
    /// frame that begins at 2 in `record`. What `answer` then holds, if anything, is a record for the program itself.
    pub fn handle_record(
        &mut self,
        now_us: u64,
        port: PortId,
        record: &mut [u8],
        answer: &mut Vec<u8>,
    ) -> Option<Delivery> {
        answer.clear();
        let domain = self.ports.get(&port)?.domain;
        match card::decode(record) {
            Ok(Record::Frame(_)) => {
                let frame = record.get_mut(FRAME_AT..)?;
                return match self.handle_program_frame(now_us, port, frame, answer) {
                    Ok(delivery) => delivery,
                    Err(why) => {
                        *why(&mut self.domains.get_mut(domain)?.counters) += 1;
                        None
                    }
                };
            }
            Ok(asked) => {
                answer.resize(RECORD_MAX, 0);
                let len = self.reply(port, domain, &asked, answer).unwrap_or(0);
                answer.truncate(len);
            }
            Err(_) => {}
        }
        if answer.is_empty() {
            self.domains.get_mut(domain)?.counters.bad_records += 1;
        }
        None
    }

    /// The length of the answer to a question; `None`: it is no question.
    fn reply(&mut self, port: PortId, slot: usize, asked: &Record<'_>, out: &mut [u8]) -> Option<usize> {
        let found = |peer: Option<&crate::peers::Peer>, out: &mut [u8]| {
            let (nic, name) = peer.map_or((0, ""), |peer| (peer.nic, &peer.name));
            card::encode(&Record::Found { found: peer.is_some(), nic, name }, out)
        };
        match *asked {
            Record::Open { endpoint } => {
                let (status, endpoint) = self.open(port, endpoint);
                let nic = self.nic(slot).map_or(0, |nic| nic.nic);
                let mtu = u32::try_from(self.mtu).unwrap_or(u32::MAX);
                let own = self.config.own_mtu;
                card::encode(&Record::Opened { status, endpoint, nic, mtu, own }, out)
            }
            Record::Find { name } => found(self.peers.find(name), out),
            Record::FindNic { nic } => {
                let peer = self.peers.index(nic).and_then(|index| self.peers.get(index));
                found(peer, out)
            }
            Record::Peers { first } => {
                let first = usize::try_from(first).unwrap_or(usize::MAX);
                let peers = self.peers.from(first);
                card::encode_peers(
                    peers.map(|(index, peer)| Peer { index: index as u32, nic: peer.nic, name: &peer.name }),
                    out,
                )
            }
            Record::Counters => card::encode_counters(self.domains.get(slot)?.counters.lines(), out),
            // What only the card says.
            _ => return None,
        }
        .ok()
    }

    fn handle_program_frame(
        &mut self,
        now_us: u64,
        port: PortId,
        frame: &mut [u8],
        answer: &mut Vec<u8>,
    ) -> Result<Option<Delivery>, Count> {
        let Some(&super::Port { domain: slot, endpoint: Some(endpoint) }) = self.ports.get(&port) else {
            return Err(|counters| &mut counters.wrong_endpoint);
        };
        let nic = self.nic(slot).ok_or(NOT_OURS)?;
        let (mac, profile) = (nic.mac, self.config.profile());
        let bad: Count = |counters| &mut counters.bad_frames;
        if frame.len() > self.frame_max() {
            return Err(bad);
        }
        mxoe::stamp(frame, mac, profile.ethertype, INDEX_UNKNOWN, INDEX_UNKNOWN).map_err(|_| bad)?;
        let (head, decoded) = mxoe::decode(frame, &profile).map_err(|_| bad)?;
        if frames::author(&decoded) == Author::Station {
            return Err(|counters| &mut counters.not_for_programs);
        }
        if !frames::is_of(&decoded, endpoint) {
            return Err(NOT_OURS);
        }
        let connects = matches!(decoded, Frame::Connect { .. });
        let index = self.destination(now_us, slot, nic_of_mac(head.destination), connects)?;
        let fate = self.chance.fate(mxoe::type_of(frame).unwrap_or(0));
        mxoe::stamp(frame, mac, profile.ethertype, self.reverse(slot, index), index).map_err(|_| bad)?;
        match self.peers.local(index) {
            Some(to) if to != slot && !self.config.between_domains => {
                Err(|counters| &mut counters.unknown_peer)
            }
            Some(to) => self.pass_on(slot, to, frame, fate, answer),
            None => {
                let sender = Sender { tenant: slot as u32, port };
                self.enqueue(now_us, sender, frame, fate).map(|()| None)
            }
        }
    }

    /// The index of the station that a program wants to reach.
    fn destination(&mut self, now_us: u64, slot: usize, nic: u64, connects: bool) -> Result<u16, Count> {
        let index = match self.peers.index(nic) {
            Some(index) => index,
            None if connects && self.config.learn && is_station(nic) => self.learn(now_us, slot, nic)?,
            None => return Err(|counters| &mut counters.unknown_peer),
        };
        self.peers.note_use(index, now_us);
        Ok(index)
    }

    /// A program connects to a new station: it is added, or takes the place of one that this domain connected to in vain.
    fn learn(&mut self, now_us: u64, slot: usize, nic: u64) -> Result<u16, Count> {
        let not_learnt: Count = |counters| &mut counters.not_learnt;
        let own = self.nic(slot).ok_or(not_learnt)?;
        if own.learnt.len() < LEARNT_MAX {
            let index = self.add_peer(now_us, nic).ok_or(not_learnt)?;
            self.nic_mut(slot).ok_or(not_learnt)?.learnt.push(index);
            return Ok(index);
        }
        let in_vain = |index: &&u16| self.peers.is_forgettable(**index, now_us);
        let index = *own.learnt.iter().find(in_vain).ok_or(not_learnt)?;
        self.peers.replace(index, nic, now_us);
        for nic in self.domains.iter_mut().filter_map(|domain| domain.nic.as_mut()) {
            nic.reverse.remove(&index);
        }
        self.ask_soon(now_us);
        Ok(index)
    }

    fn enqueue(&mut self, now_us: u64, of: Sender, frame: &[u8], fate: Fate) -> Result<(), Count> {
        let room = match fate {
            Fate::Lost => return Err(|counters| &mut counters.faults),
            Fate::Sent => self.outgoing.push(of, frame, FRAME_MIN),
            Fate::Twice => {
                self.outgoing.push(of, frame, FRAME_MIN) && self.outgoing.push(of, frame, FRAME_MIN)
            }
            Fate::Late => self.outgoing.push_late(of, frame, FRAME_MIN, now_us),
        };
        if room { Ok(()) } else { Err(|counters| &mut counters.queue_full) }
    }

    /// To a domain of this card. What comes back at once is the refusal that a station would send.
    fn pass_on(
        &mut self,
        from: usize,
        to: usize,
        frame: &[u8],
        fate: Fate,
        answer: &mut Vec<u8>,
    ) -> Result<Option<Delivery>, Count> {
        if fate == Fate::Lost {
            return Err(|counters| &mut counters.faults);
        }
        let Ok((head, decoded)) = mxoe::decode(frame, &self.config.profile()) else {
            return Err(|counters| &mut counters.bad_frames);
        };
        if let Some(domain) = self.domains.get_mut(from) {
            domain.counters.sent_frames += 1;
            domain.counters.sent_bytes += frame.len() as u64;
        }
        let sender = self.nic(from).ok_or(NOT_OURS)?.index;
        let times = 1 + u8::from(fate == Fate::Twice);
        let endpoint = frames::recipient(&decoded).ok_or(NOT_OURS)?;
        let delivery = self.deliver(to, endpoint, frame, sender, times);
        if delivery.is_none() {
            if let Some(domain) = self.domains.get_mut(to) {
                domain.counters.no_endpoint += 1;
            }
            self.refuse(to, &head, &decoded, answer);
        }
        Ok(delivery)
    }

    fn refuse(&mut self, by: usize, refused: &Head, decoded: &Frame<'_>, answer: &mut Vec<u8>) {
        let Some(nic) = self.nic(by) else { return };
        // As in every frame that is delivered: our index of who it comes from.
        let peer_index = nic.index;
        let Some(frame) = frames::refusal(decoded, self.config.endpoints, peer_index) else { return };
        let head =
            Head { destination: refused.source, source: nic.mac, ethertype: refused.ethertype, peer_index };
        let mut bytes = [0; ANSWER_MAX];
        bytes[..FRAME_AT].copy_from_slice(&card::FRAME_HEAD);
        if let Ok(len) = mxoe::encode(&head, &frame, &self.config.profile(), &mut bytes[FRAME_AT..]) {
            answer.extend_from_slice(&bytes[..FRAME_AT + len]);
            self.totals.refusals += 1;
        }
    }
}

/// Which of a domain's counters a frame that is dropped counts in.
type Count = fn(&mut DomainCounters) -> &mut u64;

const NOT_OURS: Count = |counters| &mut counters.wrong_endpoint;

const _: () = assert!(ETHERNET_LEN + FRAME_AT == 16, "what follows the Ethernet header is aligned");
