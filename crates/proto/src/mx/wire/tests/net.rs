//! A network of two endpoints that loses, doubles, overtakes and corrupts, on a clock of its own.

use alloc::collections::{BTreeMap, BinaryHeap};
use alloc::vec;
use core::cmp::Reverse;

use isthmus_wire::mxoe::{ETHERNET_LEN, Head, decode, encode};

use super::super::*;
use super::CLEAR;

pub const MS: u64 = 1_000_000;
pub const SECOND: u64 = 1000 * MS;
/// More frames than any test sends at once.
const ROOM: usize = 512;

/// A small generator: a test that failed runs the same way again.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn chance(&mut self, in_a_million: u64) -> bool {
        self.roll() % 1_000_000 < in_a_million
    }
}

/// Bytes that tell messages and places apart.
fn content(seed: u64, length: u32) -> Vec<u8> {
    (0..length).map(|n| (seed as u32).wrapping_mul(31).wrapping_add(n ^ n >> 8) as u8).collect()
}

pub type Outcome = Result<u32, Status>;

/// Takes whatever comes, in the order in which it comes.
#[derive(Default)]
pub struct Program {
    pub sends: BTreeMap<u32, Vec<u8>>,
    /// Ended sends, with how.
    pub ended: Vec<(u32, Outcome)>,
    /// Whatever has arrived: peer, match, bytes, and how it ended.
    pub arrived: Vec<(u64, Vec<u8>, Option<Outcome>)>,
    pub connected: Vec<(u32, Result<PeerId, Status>)>,
    pub voided: Vec<PeerId>,
    /// Large messages that nobody takes yet: with the peer and where they arrived.
    pub kept: Vec<(PeerId, Large, u32)>,
    pub keeps: bool,
    /// Refuse so many messages.
    pub no_memory: u32,
    /// Refuse the one that comes so many later; 0: none.
    pub refuses_in: u32,
    /// Take so many bytes of each.
    pub short: Option<u32>,
    /// With pulls.
    pub patience: Option<u64>,
    pub out: Vec<(u64, Vec<u8>)>,
    pub full: bool,
    nic: u64,
    profile: Option<Profile>,
}

impl Program {
    pub fn new(side: usize, profile: Profile) -> Self {
        Self { nic: NICS[side], profile: Some(profile), ..Self::default() }
    }
}

impl Above for Program {
    fn room(&self) -> usize {
        if self.full { 0 } else { ROOM }
    }

    fn transmit(&mut self, to: u64, frame: &Frame<'_>) {
        let mac = |nic: u64| core::array::from_fn(|i| nic.to_be_bytes()[i + 2]);
        let profile = self.profile.expect("a profile");
        let head = Head {
            destination: mac(to),
            source: mac(self.nic),
            ethertype: profile.ethertype,
            peer_index: INDEX_UNKNOWN,
        };
        let mut bytes = vec![0; profile.mtu() as usize + ETHERNET_LEN];
        let len = encode(&head, frame, &profile, &mut bytes).expect("what is sent can be encoded");
        self.out.push((to, bytes[..len].to_vec()));
    }

    fn gather(&mut self, send: u32, at: u32, into: &mut [u8]) {
        let at = at as usize;
        into.copy_from_slice(&self.sends[&send][at..at + into.len()]);
    }

    fn arrive(&mut self, arrival: Arrival<'_>) -> Verdict {
        if self.no_memory > 0 {
            self.no_memory -= 1;
            return Verdict::Later;
        }
        if self.refuses_in > 0 {
            self.refuses_in -= 1;
            if self.refuses_in == 0 {
                return Verdict::Later;
            }
        }
        let ticket = self.arrived.len() as u32;
        let room = vec![0; arrival.length as usize];
        match arrival.body {
            Body::Whole(data) => {
                let done = Some(Ok(data.len() as u32));
                self.arrived.push((arrival.matching, data.to_vec(), done));
                Verdict::Kept
            }
            Body::Large(large) if self.keeps => {
                self.arrived.push((arrival.matching, room, None));
                self.kept.push((arrival.peer, large, ticket));
                Verdict::Kept
            }
            Body::Parts | Body::Large(_) => {
                self.arrived.push((arrival.matching, room, None));
                Verdict::Take { ticket, length: self.short.unwrap_or(u32::MAX) }
            }
        }
    }

    fn patience(&mut self, _ticket: u32) -> Option<u64> {
        self.patience
    }

    fn place(&mut self, ticket: u32, at: u32, data: &[u8]) {
        self.arrived[ticket as usize].1[at as usize..][..data.len()].copy_from_slice(data);
    }

    fn placed(&mut self, ticket: u32, outcome: Result<u32, Status>) {
        let end = &mut self.arrived[ticket as usize].2;
        assert_eq!(*end, None, "a ticket ends once");
        *end = Some(outcome);
    }

    fn sent(&mut self, send: u32, outcome: Result<u32, Status>) {
        assert!(self.sends.remove(&send).is_some(), "send {send} ended twice");
        self.ended.push((send, outcome));
    }

    fn connected(&mut self, connect: u32, outcome: Result<(PeerId, (u64, u8), u32), Status>) {
        self.connected.push((connect, outcome.map(|(peer, ..)| peer)));
    }

    fn void(&mut self, peer: PeerId) {
        self.voided.push(peer);
    }
}

pub struct Side {
    pub wire: Wire,
    pub program: Program,
}

/// In a million frames.
#[derive(Clone, Copy, Debug, Default)]
pub struct Weather {
    pub lost: u64,
    pub doubled: u64,
    pub late: u64,
    pub corrupted: u64,
}

/// Whether a frame is lost.
type Loses = alloc::boxed::Box<dyn FnMut(&[u8]) -> bool>;

/// When it arrives, in which order, at which side.
type Flying = (u64, u64, usize, Vec<u8>);

pub struct Net {
    pub sides: [Side; 2],
    pub now: u64,
    dice: Dice,
    pub weather: Weather,
    profile: Profile,
    flying: BinaryHeap<Reverse<Flying>>,
    serial: u64,
    /// Frames that are not delivered: one bit a type.
    pub swallowed: Vec<u8>,
    /// The weather is for frames of this type.
    pub only: Option<u8>,
    /// Says which frames are lost.
    pub loses: Option<Loses>,
    pub frames: u64,
    /// Nobody is at this side.
    pub gone: Option<usize>,
    /// Until then the line of each side is busy with what it sends.
    busy: [u64; 2],
}

pub const NICS: [u64; 2] = [0x0200_0000_0001, 0x0200_0000_0002];
pub const KEY: u32 = 0x12345;
pub const SESSIONS: [u32; 2] = [0x1122_3344, 0x5566_7788];
/// Of another program that opens the second endpoint later.
pub const LATER: u32 = 0x99AA_BBCC;

pub fn wire(side: usize, session: u32, profile: Profile) -> Wire {
    Wire::new(Config {
        profile,
        timing: Timing::default(),
        limits: Limits::default(),
        endpoint: side as u8,
        session,
        key: KEY,
    })
}

impl Net {
    pub fn new(seed: u64, weather: Weather, profile: Profile) -> Self {
        let side =
            |at: usize| Side { wire: wire(at, SESSIONS[at], profile), program: Program::new(at, profile) };
        Self {
            sides: [side(0), side(1)],
            now: SECOND,
            dice: Dice(seed | 1),
            weather,
            profile,
            flying: BinaryHeap::new(),
            serial: 0,
            swallowed: Vec::new(),
            only: None,
            loses: None,
            frames: 0,
            gone: None,
            busy: [0; 2],
        }
    }

    pub fn connected(seed: u64, weather: Weather, profile: Profile) -> Self {
        let mut net = Self::new(seed, weather, profile);
        net.connect(0, KEY);
        net.run(|net| !net.sides[0].program.connected.is_empty());
        assert_eq!(net.sides[0].program.connected, [(0, Ok(0))]);
        net
    }

    pub fn connect(&mut self, side: usize, key: u32) {
        let Side { wire, program } = &mut self.sides[side];
        let connect = program.connected.len() as u32;
        assert!(wire.connect(self.now, (NICS[1 - side], 1 - side as u8), key, connect, program));
        self.post(side);
    }

    pub fn send(&mut self, from: usize, send: u32, length: u32, large: bool) {
        let Side { wire, program } = &mut self.sides[from];
        let matching = u64::from(send) << 8;
        program.sends.insert(send, content(matching, length));
        wire.send(self.now, 0, (send, matching, length), large, program).expect("connected");
        self.post(from);
    }

    /// What a side's next message will be called on the wire.
    pub fn next_send(&self, side: usize) -> u16 {
        self.sides[side].wire.peer(0).expect("a peer").next_send.bits()
    }

    /// What a side has to send flies.
    pub fn post(&mut self, from: usize) {
        for (to, mut frame) in core::mem::take(&mut self.sides[from].program.out) {
            if to != NICS[1 - from] {
                // What strangers are told, nobody hears.
                continue;
            }
            self.frames += 1;
            let weather = if self.only.is_some_and(|kind| kind != frame[16]) { CLEAR } else { self.weather };
            if self.dice.chance(weather.lost) || self.swallowed.contains(&frame[16]) {
                continue;
            }
            if self.loses.as_mut().is_some_and(|loses| loses(&frame)) {
                continue;
            }
            if self.dice.chance(weather.corrupted) {
                let at = 14 + self.dice.roll() as usize % (frame.len() - 14);
                frame[at] ^= 1 << (self.dice.roll() % 8);
            }
            let copies = 1 + u64::from(self.dice.chance(weather.doubled));
            for _ in 0..copies {
                let late = if self.dice.chance(weather.late) { self.dice.roll() % (3 * MS) } else { 0 };
                // 10 Gbit/s, and 20 µs on the way.
                self.busy[from] = self.busy[from].max(self.now) + frame.len() as u64 * 4 / 5;
                self.serial += 1;
                let at = self.busy[from] + 20_000 + late;
                self.flying.push(Reverse((at, self.serial, 1 - from, frame.clone())));
            }
        }
    }

    /// Until `done`, or for an hour of the clock.
    pub fn run(&mut self, mut done: impl FnMut(&Self) -> bool) {
        let until = self.now + 3600 * SECOND;
        while !done(self) {
            assert!(self.now < until, "nothing happens any more");
            self.step();
        }
    }

    pub fn run_for(&mut self, time: u64) {
        let until = self.now + time;
        while self.now < until {
            self.step_to(until);
        }
    }

    pub fn step(&mut self) {
        self.step_to(u64::MAX);
    }

    fn step_to(&mut self, until: u64) {
        let timers = self.sides.iter().map(|side| side.wire.due()).min().unwrap_or(u64::MAX);
        let flying = self.flying.peek().map_or(u64::MAX, |Reverse((at, ..))| *at);
        // Where nothing is due, time goes on all the same.
        self.now = timers.min(flying).min(self.now + SECOND).min(until).max(self.now);
        while let Some(Reverse((at, ..))) = self.flying.peek() {
            if *at > self.now {
                break;
            }
            let Some(Reverse((_, _, to, bytes))) = self.flying.pop() else { break };
            if self.gone == Some(to) {
                continue;
            }
            if let Ok((_, frame)) = decode(&bytes, &self.profile) {
                let Side { wire, program } = &mut self.sides[to];
                wire.handle(self.now, NICS[1 - to], &frame, program);
            }
        }
        for side in 0..2 {
            let Side { wire, program } = &mut self.sides[side];
            wire.tick(self.now, program);
            assert!(
                wire.due() > self.now || !program.out.is_empty() || program.full,
                "a timer that never ends"
            );
            self.post(side);
        }
    }

    pub fn all_ended(&self) -> bool {
        self.sides.iter().all(|side| {
            side.program.sends.is_empty() && side.program.arrived.iter().all(|(_, _, end)| end.is_some())
        })
    }

    /// Everything that was sent is here, once, whole, in order.
    pub fn check(&self, to: usize, lengths: &[u32]) {
        let arrived = &self.sides[to].program.arrived;
        let order: Vec<u64> = arrived.iter().map(|(matching, ..)| *matching).collect();
        let sent: Vec<u64> = (0..lengths.len() as u64).map(|n| n << 8).collect();
        assert_eq!(order, sent);
        for ((matching, data, end), length) in arrived.iter().zip(lengths) {
            assert_eq!(*end, Some(Ok(*length)));
            assert!(*data == content(*matching, *length), "message {matching:#x} of {length} bytes");
        }
        let mut ended = self.sides[1 - to].program.ended.clone();
        ended.sort_by_key(|(send, _)| *send);
        let expected: Vec<_> = lengths.iter().enumerate().map(|(n, len)| (n as u32, Ok(*len))).collect();
        assert_eq!(ended, expected);
    }
}
