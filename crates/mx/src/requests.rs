//! Requests: what a program has asked for and not heard the end of.

use std::sync::Arc;

use isthmus_engine::window::Window;
use isthmus_proto::mx::Status;

use crate::buffer::Parts;
use crate::peers::Address;

/// Names a request of one endpoint. Never 0, and not used again for very long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

impl RequestId {
    /// It fits so many bits.
    pub const BITS: u32 = 2 * HALF;

    pub(crate) fn new(slot: u32, generation: u32) -> Self {
        Self((u64::from(generation) << HALF) + u64::from(slot) + 1)
    }

    pub(crate) fn slot(self) -> u32 {
        (self.0 as u32 & HALF_MASK).wrapping_sub(1)
    }

    fn generation(self) -> u32 {
        (self.0 >> HALF) as u32
    }
}

/// Bits of a slot's number, and of its generation.
const HALF: u32 = 24;
const HALF_MASK: u32 = (1 << HALF) - 1;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    pub status: Status,
    /// Of a receive: who sent it. Of a send: where it went. Of a connect: the new address.
    pub source: Address,
    pub matching: u64,
    /// Bytes of the message, and bytes that were transferred.
    pub length: u32,
    pub transferred: u32,
    /// The program's own word, given when it was posted.
    pub context: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Send,
    Receive,
    Connect,
}

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Not matched, not answered, or not yet with the peer.
    Waiting,
    /// A receive: the bytes of its message are coming. A send: the receiver knows of it.
    Under,
    /// It has ended, and waits to be asked about.
    Done,
}

pub(crate) struct Request {
    pub kind: Kind,
    pub stage: Stage,
    pub parts: Parts,
    /// A copy of what is sent, made so that the program has its memory back.
    pub copied: Option<Box<[u8]>>,
    pub peer: u32,
    /// Of a receive whose bytes are coming over a lane: which lane, and how many have come and will.
    pub lane: u32,
    pub got: u32,
    pub want: u32,
    /// Of a send that its receiver may take where it lies: what it lies in, which is not taken back before the end.
    pub window: Option<Arc<Window>>,
    pub report: Report,
    /// Nobody will ask about it.
    pub forgotten: bool,
    /// It is a call's of ours, which asks about it by its number only.
    pub own: bool,
    /// The program was told that it has ended: it ends here when the peer has it.
    pub buffered: bool,
    /// What goes on for this one, which has ended in that way.
    pub copy: Option<RequestId>,
    /// Its own, ns; `None`: the endpoint's.
    pub patience: Option<u64>,
    generation: u32,
}

impl Request {
    pub fn new(kind: Kind, parts: Parts, peer: u32, matching: u64, length: u32, context: u64) -> Self {
        let report = Report {
            status: Status::Success,
            source: Address::NONE,
            matching,
            length,
            transferred: 0,
            context,
        };
        Self {
            kind,
            stage: Stage::Waiting,
            parts,
            copied: None,
            peer,
            lane: u32::MAX,
            got: 0,
            want: 0,
            window: None,
            report,
            forgotten: false,
            own: false,
            buffered: false,
            copy: None,
            patience: None,
            generation: 0,
        }
    }
}

/// The requests of one endpoint.
#[derive(Default)]
pub(crate) struct Requests {
    slots: Vec<Option<Request>>,
    free: Vec<u32>,
    generation: u32,
}

impl Requests {
    pub fn add(&mut self, mut request: Request) -> RequestId {
        self.generation = self.generation.wrapping_add(1) & HALF_MASK;
        request.generation = self.generation;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() as u32 - 1
        });
        self.slots[slot as usize] = Some(request);
        RequestId::new(slot, self.generation)
    }

    pub fn at(&mut self, slot: u32) -> Option<&mut Request> {
        self.slots.get_mut(slot as usize)?.as_mut()
    }

    pub fn get(&mut self, id: RequestId) -> Option<&mut Request> {
        self.at(id.slot()).filter(|request| request.generation == id.generation())
    }

    pub fn id(&self, slot: u32) -> Option<RequestId> {
        let request = self.slots.get(slot as usize)?.as_ref()?;
        Some(RequestId::new(slot, request.generation))
    }

    pub fn remove(&mut self, slot: u32) -> Option<Request> {
        let request = self.slots.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        Some(request)
    }

    /// The buffers of a request that ends now.
    pub fn remove_parts(&mut self, slot: u32) -> Option<Parts> {
        Some(std::mem::replace(&mut self.at(slot)?.parts, Parts::empty()))
    }

    pub fn slots(&self) -> impl Iterator<Item = (u32, &Request)> {
        self.slots.iter().enumerate().filter_map(|(n, r)| Some((n as u32, r.as_ref()?)))
    }
}
