//! What programs and the card say to each other.
//!
//! The card is the program that owns an Ethernet interface and lends it to domains. A program connects to its port with a
//! sequenced-packet socket; the connection is one endpoint of MX. Each record begins with its kind, a byte; numbers are
//! little-endian, and text has its length in front, a byte.
//!
//! Format: docs/formats/card.md. Golden bytes: vectors/card.txt.

use crate::reader::{DecodeError, Problem, Reader};
use crate::writer::{EncodeError, Writer};

/// The domain of a node's card.
pub const DOMAIN: &str = "card";
/// Where the card listens.
pub const PORT: u32 = 19_800;
/// No record is longer, bytes: the longest frame that an interface can carry, and what stands in front of it.
pub const RECORD_MAX: usize = 66 * 1024;
/// Longest name of a station, bytes.
pub const NAME_MAX: usize = 80;
/// Longest name of a counter, bytes.
pub const COUNTER_NAME_MAX: usize = 40;
/// In [`Record::Open`]: whichever is free.
pub const ANY_ENDPOINT: u16 = 0xFFFF;
/// In front of a frame: so what follows the Ethernet header is aligned to 16.
pub const FRAME_AT: usize = 2;
/// Destination, source, ethertype.
const ETHERNET: usize = 14;
/// Of an Ethernet address as a number, the first byte of the wire uppermost.
const NIC_BITS: u32 = 48;

/// How an open ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Opening {
    Opened = 0,
    /// Such a number no endpoint has.
    BadEndpoint = 1,
    /// Somebody has it, or this connection has one.
    Busy = 2,
    /// All are taken.
    NoMore = 3,
    /// This domain has no network card.
    NotAllowed = 4,
}

impl Opening {
    const ALL: [Self; 5] = [Self::Opened, Self::BadEndpoint, Self::Busy, Self::NoMore, Self::NotAllowed];
}

/// One line of the table of peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer<'a> {
    pub index: u32,
    pub nic: u64,
    /// Empty while it is not known.
    pub name: &'a str,
}

/// One line of the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counter<'a> {
    pub name: &'a str,
    pub value: u64,
}

/// Lines as they lie in a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lines<'a>(&'a [u8]);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// Program: let this connection be that endpoint, or [`ANY_ENDPOINT`].
    Open { endpoint: u16 },
    /// Card: it is, or why not. Without a network card `nic` is 0.
    /// `own`: the dialect of the wire is Open-MX's own for this MTU, 0: that of MX.
    Opened { status: Opening, endpoint: u8, nic: u64, mtu: u32, own: u16 },
    /// Both: a frame of Ethernet, from its destination on.
    Frame(&'a [u8]),
    /// Program: who has this name?
    Find { name: &'a str },
    /// Program: who has this address?
    FindNic { nic: u64 },
    /// Card: this one; or nobody, and then there is neither an address nor a name.
    Found { found: bool, nic: u64, name: &'a str },
    /// Program: whom do you know, from this index on?
    Peers { first: u32 },
    /// Card: [`Lines::peers`], as many as fit; none if there are no more.
    PeerList(Lines<'a>),
    /// Program: what did you count for my domain?
    Counters,
    /// Card: [`Lines::counters`].
    CounterList(Lines<'a>),
}

const OPEN: u8 = 1;
const OPENED: u8 = 2;
const FRAME: u8 = 3;
const FIND: u8 = 4;
const FIND_NIC: u8 = 5;
const FOUND: u8 = 6;
const PEERS: u8 = 7;
const PEER_LIST: u8 = 8;
const COUNTERS: u8 = 9;
const COUNTER_LIST: u8 = 10;

/// What stands before a frame.
pub const FRAME_HEAD: [u8; FRAME_AT] = [FRAME, 0];

impl<'a> Lines<'a> {
    /// The lines of a [`Record::PeerList`].
    pub fn peers(self) -> impl Iterator<Item = Peer<'a>> {
        let mut r = Reader::new("card", self.0);
        core::iter::from_fn(move || peer(&mut r).ok())
    }

    /// The lines of a [`Record::CounterList`].
    pub fn counters(self) -> impl Iterator<Item = Counter<'a>> {
        let mut r = Reader::new("card", self.0);
        core::iter::from_fn(move || counter(&mut r).ok())
    }
}

fn text<'a>(r: &mut Reader<'a>, field: &'static str, limit: usize) -> Result<&'a str, DecodeError> {
    let len = usize::from(r.u8(field)?);
    if len > limit {
        return Err(r.error(field, 1, Problem::TooBig { value: len as u64, limit: limit as u64 }));
    }
    let bytes = r.take(field, len)?;
    core::str::from_utf8(bytes).map_err(|_| r.error(field, len, Problem::NotText))
}

fn nic(r: &mut Reader<'_>) -> Result<u64, DecodeError> {
    let nic = r.u64("nic")?;
    if nic >> NIC_BITS != 0 {
        return Err(r.error("nic", 8, Problem::TooBig { value: nic, limit: (1 << NIC_BITS) - 1 }));
    }
    Ok(nic)
}

fn peer<'a>(r: &mut Reader<'a>) -> Result<Peer<'a>, DecodeError> {
    Ok(Peer { index: r.u32("index")?, nic: nic(r)?, name: text(r, "name", NAME_MAX)? })
}

fn counter<'a>(r: &mut Reader<'a>) -> Result<Counter<'a>, DecodeError> {
    Ok(Counter { name: text(r, "name", COUNTER_NAME_MAX)?, value: r.u64("value")? })
}

/// All that is left, if it is whole lines.
fn lines<'a, T>(
    r: &mut Reader<'a>,
    line: impl Fn(&mut Reader<'a>) -> Result<T, DecodeError>,
    bytes: &'a [u8],
) -> Result<Lines<'a>, DecodeError> {
    while r.end().is_err() {
        line(r)?;
    }
    Ok(Lines(bytes.get(1..).unwrap_or_default()))
}

/// Decode a record.
///
/// # Errors
/// Says which field is wrong and where.
pub fn decode(bytes: &[u8]) -> Result<Record<'_>, DecodeError> {
    let mut r = Reader::new("card", bytes);
    if bytes.len() > RECORD_MAX {
        let problem = Problem::TooBig { value: bytes.len() as u64, limit: RECORD_MAX as u64 };
        return Err(r.error("length", 0, problem));
    }
    let kind = r.u8("kind")?;
    let record = match kind {
        OPEN => Record::Open { endpoint: r.u16("endpoint")? },
        OPENED => {
            let status = r.u8("status")?;
            let status = *Opening::ALL
                .get(usize::from(status))
                .ok_or_else(|| r.error("status", 1, Problem::Unknown(status.into())))?;
            let (endpoint, nic) = (r.u8("endpoint")?, nic(&mut r)?);
            Record::Opened { status, endpoint, nic, mtu: r.u32("mtu")?, own: r.u16("own")? }
        }
        FRAME => {
            let zero = r.u8("zero")?;
            if zero != 0 {
                return Err(r.error("zero", 1, Problem::NotExpected { value: zero.into(), expected: 0 }));
            }
            let len = bytes.len() - FRAME_AT;
            Record::Frame(r.take("frame", len.max(ETHERNET))?)
        }
        FIND => Record::Find { name: text(&mut r, "name", NAME_MAX)? },
        FIND_NIC => Record::FindNic { nic: nic(&mut r)? },
        FOUND => {
            let status = r.u8("status")?;
            if status > 1 {
                return Err(r.error("status", 1, Problem::Unknown(status.into())));
            }
            Record::Found { found: status == 0, nic: nic(&mut r)?, name: text(&mut r, "name", NAME_MAX)? }
        }
        PEERS => Record::Peers { first: r.u32("first")? },
        PEER_LIST => Record::PeerList(lines(&mut r, peer, bytes)?),
        COUNTERS => Record::Counters,
        COUNTER_LIST => Record::CounterList(lines(&mut r, counter, bytes)?),
        other => return Err(r.error("kind", 1, Problem::Unknown(other.into()))),
    };
    r.end()?;
    Ok(record)
}

/// Encode a record; returns its length, bytes.
///
/// # Errors
/// It does not fit the buffer, or a field does not fit the format. What the buffer holds then means nothing.
pub fn encode(record: &Record<'_>, out: &mut [u8]) -> Result<usize, EncodeError> {
    let room = out.len().min(RECORD_MAX);
    let mut w = Writer::new(out.get_mut(..room).unwrap_or_default());
    match *record {
        Record::Open { endpoint } => {
            w.bytes("kind", &[OPEN])?;
            w.bytes("endpoint", &endpoint.to_le_bytes())?;
        }
        Record::Opened { status, endpoint, nic, mtu, own } => {
            w.bytes("status", &[OPENED, status as u8, endpoint])?;
            put_nic(&mut w, nic)?;
            w.bytes("mtu", &mtu.to_le_bytes())?;
            w.bytes("own", &own.to_le_bytes())?;
        }
        Record::Frame(frame) => {
            if frame.len() < ETHERNET {
                return Err(EncodeError { field: "frame", reason: "is shorter than its addresses" });
            }
            w.bytes("kind", &FRAME_HEAD)?;
            w.bytes("frame", frame)?;
        }
        Record::Find { name } => {
            w.bytes("kind", &[FIND])?;
            put_text(&mut w, name, NAME_MAX)?;
        }
        Record::FindNic { nic } => {
            w.bytes("kind", &[FIND_NIC])?;
            put_nic(&mut w, nic)?;
        }
        Record::Found { found, nic, name } => {
            w.bytes("status", &[FOUND, u8::from(!found)])?;
            put_nic(&mut w, nic)?;
            put_text(&mut w, name, NAME_MAX)?;
        }
        Record::Peers { first } => {
            w.bytes("kind", &[PEERS])?;
            w.bytes("first", &first.to_le_bytes())?;
        }
        Record::PeerList(lines) => {
            w.bytes("kind", &[PEER_LIST])?;
            w.bytes("lines", lines.0)?;
        }
        Record::Counters => w.bytes("kind", &[COUNTERS])?,
        Record::CounterList(lines) => {
            w.bytes("kind", &[COUNTER_LIST])?;
            w.bytes("lines", lines.0)?;
        }
    }
    Ok(w.len())
}

/// Encode a [`Record::PeerList`] of as many peers as fit; returns its length, bytes.
///
/// # Errors
/// There is no room for any, or a name is too long.
pub fn encode_peers<'p>(
    peers: impl IntoIterator<Item = Peer<'p>>,
    out: &mut [u8],
) -> Result<usize, EncodeError> {
    encode_lines(PEER_LIST, peers, out, |w, peer: &Peer<'_>| {
        w.bytes("index", &peer.index.to_le_bytes())?;
        put_nic(w, peer.nic)?;
        put_text(w, peer.name, NAME_MAX)
    })
}

/// Encode a [`Record::CounterList`] of as many counters as fit; returns its length, bytes.
///
/// # Errors
/// As [`encode_peers`].
pub fn encode_counters<'c>(
    counters: impl IntoIterator<Item = Counter<'c>>,
    out: &mut [u8],
) -> Result<usize, EncodeError> {
    encode_lines(COUNTER_LIST, counters, out, |w, counter: &Counter<'_>| {
        put_text(w, counter.name, COUNTER_NAME_MAX)?;
        w.bytes("value", &counter.value.to_le_bytes())
    })
}

/// No line is longer, bytes.
const LINE_MAX: usize = 4 + 8 + 1 + NAME_MAX;

fn encode_lines<T>(
    kind: u8,
    lines: impl IntoIterator<Item = T>,
    out: &mut [u8],
    put: impl Fn(&mut Writer<'_>, &T) -> Result<(), EncodeError>,
) -> Result<usize, EncodeError> {
    let room = out.len().min(RECORD_MAX);
    let mut all = Writer::new(out.get_mut(..room).unwrap_or_default());
    all.bytes("kind", &[kind])?;
    for line in lines {
        let mut bytes = [0; LINE_MAX];
        let mut one = Writer::new(&mut bytes);
        put(&mut one, &line)?;
        let len = one.len();
        if all.len() + len > room {
            break;
        }
        all.bytes("line", bytes.get(..len).unwrap_or_default())?;
    }
    Ok(all.len())
}

fn put_nic(w: &mut Writer<'_>, nic: u64) -> Result<(), EncodeError> {
    if nic >> NIC_BITS != 0 {
        return Err(EncodeError { field: "nic", reason: "is more than 48 bits" });
    }
    w.bytes("nic", &nic.to_le_bytes())
}

fn put_text(w: &mut Writer<'_>, text: &str, limit: usize) -> Result<(), EncodeError> {
    let len = u8::try_from(text.len()).ok().filter(|len| usize::from(*len) <= limit);
    let Some(len) = len else {
        return Err(EncodeError { field: "name", reason: "the text is too long" });
    };
    w.bytes("name", &[len])?;
    w.bytes("name", text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::{String, ToString};
    use std::vec;
    use std::vec::Vec;

    const NIC: u64 = 0x0200_0000_0001;

    fn golden() -> Vec<(&'static str, Vec<u8>)> {
        let text = include_str!("../../../vectors/card.txt");
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let byte =
            |pair: &[u8]| u8::from_str_radix(core::str::from_utf8(pair).expect("hex"), 16).expect("hex");
        let split = lines.map(|line| line.split_once(' ').expect("a name"));
        split.map(|(name, hex)| (name, hex.as_bytes().chunks(2).map(byte).collect())).collect()
    }

    /// What the golden bytes mean, in their order.
    fn every<'a>(lists: &[&'a [u8]; 4]) -> Vec<(&'static str, Record<'a>)> {
        let [frame, peers, none, counters] = *lists;
        let opened = |status, endpoint, nic| Record::Opened { status, endpoint, nic, mtu: 9000, own: 1500 };
        vec![
            ("open", Record::Open { endpoint: 3 }),
            ("open-any", Record::Open { endpoint: ANY_ENDPOINT }),
            ("opened", opened(Opening::Opened, 3, NIC)),
            ("not-allowed", opened(Opening::NotAllowed, 0, 0)),
            ("frame", Record::Frame(frame)),
            ("find", Record::Find { name: "store:0" }),
            ("find-nic", Record::FindNic { nic: NIC }),
            ("found", Record::Found { found: true, nic: NIC, name: "worker:0" }),
            ("not-found", Record::Found { found: false, nic: 0, name: "" }),
            ("peers", Record::Peers { first: 258 }),
            ("peer-list", Record::PeerList(Lines(peers))),
            ("no-more-peers", Record::PeerList(Lines(none))),
            ("counters", Record::Counters),
            ("counter-list", Record::CounterList(Lines(counters))),
        ]
    }

    #[test]
    fn the_golden_bytes_are_these_and_no_prefix_of_them() {
        let golden = golden();
        let behind = |wanted: &str, at: usize| -> &[u8] {
            golden.iter().find(|(name, _)| *name == wanted).map(|(_, bytes)| &bytes[at..]).expect(wanted)
        };
        let lists = [behind("frame", 2), behind("peer-list", 1), &[], behind("counter-list", 1)];
        let every = every(&lists);
        assert_eq!(every.len(), golden.len());
        for ((name, record), (expected, bytes)) in every.into_iter().zip(&golden) {
            assert_eq!(name, *expected);
            let mut out = [0; 100];
            let len = encode(&record, &mut out).expect("fits");
            assert_eq!(out[..len], bytes[..], "{name}");
            assert_eq!(decode(bytes), Ok(record));
            for cut in 0..bytes.len() {
                let shorter = match record {
                    Record::Frame(_) => cut >= FRAME_AT + ETHERNET,
                    // One whole line less, or none.
                    Record::PeerList(_) => [1, 22].contains(&cut),
                    Record::CounterList(_) => cut == 1,
                    _ => false,
                };
                assert_eq!(decode(&bytes[..cut]).is_ok(), shorter, "{name} cut to {cut}");
            }
            if !matches!(record, Record::Frame(_)) {
                assert!(decode(&[&bytes[..], &[0]].concat()).is_err(), "{name}");
            }
        }
    }

    #[test]
    fn lists_are_read_line_by_line() {
        let golden = golden();
        let bytes = |wanted: &str| &golden.iter().find(|(name, _)| *name == wanted).expect(wanted).1;
        let Ok(Record::PeerList(lines)) = decode(bytes("peer-list")) else { panic!("no list") };
        let expected =
            [Peer { index: 0, nic: NIC, name: "worker:0" }, Peer { index: 1, nic: NIC + 1, name: "" }];
        assert!(lines.peers().eq(expected));
        let Ok(Record::CounterList(lines)) = decode(bytes("counter-list")) else { panic!("no list") };
        assert!(lines.counters().eq([Counter { name: "sent_frames", value: 5 }]));
    }

    #[test]
    fn what_the_format_does_not_say_is_refused() {
        let no_text = [&[6, 0][..], &[0; 8], &[1, 0xFF]].concat();
        let large = [&[5][..], &[0; 6], &[1, 0]].concat();
        let long_name = [&[4, 81][..], &[b'a'; 81]].concat();
        let long = [&[3, 0][..], &[0; RECORD_MAX - 1]].concat();
        for bytes in [&[][..], &[0], &[11], &[3, 1], &[2, 5], &[6, 2], &no_text, &large, &long_name, &long] {
            assert!(decode(bytes).is_err(), "{:?}", &bytes[..bytes.len().min(20)]);
        }
        let mut out = vec![0; 2 * RECORD_MAX];
        let name = "a".repeat(81);
        for record in [
            Record::Find { name: &name },
            Record::FindNic { nic: 1 << 48 },
            Record::Frame(&[0; 13]),
            Record::Frame(&[0; RECORD_MAX - 1]),
        ] {
            assert!(encode(&record, &mut out).is_err());
        }
    }

    fn numbered(names: &[String], first: usize) -> impl Iterator<Item = Peer<'_>> {
        let lines = names.iter().enumerate().skip(first);
        lines.map(|(i, name)| Peer { index: i as u32, nic: NIC + i as u64, name })
    }

    #[test]
    fn a_list_holds_what_fits_and_the_next_one_goes_on() {
        let names: Vec<String> = (0..1000u32).map(|i| i.to_string()).collect();
        let (mut out, mut seen) = (vec![0; 2 * RECORD_MAX], 0);
        loop {
            let len = encode_peers(numbered(&names, seen), &mut out).expect("room");
            assert!(len <= RECORD_MAX);
            let Ok(Record::PeerList(lines)) = decode(&out[..len]) else { panic!("no list") };
            let got: Vec<_> = lines.peers().collect();
            assert!(got.iter().copied().eq(numbered(&names, seen).take(got.len())));
            seen += got.len();
            if got.is_empty() {
                break;
            }
        }
        assert_eq!(seen, names.len());
        let counter = Counter { name: "sent", value: 7 };
        let len = encode_counters([counter], &mut out).expect("room");
        let Ok(Record::CounterList(lines)) = decode(&out[..len]) else { panic!("no list") };
        assert!(lines.counters().eq([counter]));
    }

    proptest! {
        #[test]
        fn garbage_is_refused_or_comes_back(kind in 0u8..12, body in prop::collection::vec(0u8..8, 0..200)) {
            let bytes = [&[kind], &body[..]].concat();
            let Ok(record) = decode(&bytes) else { return Ok(()) };
            let mut out = [0; 300];
            let len = encode(&record, &mut out).expect("it was decoded");
            prop_assert_eq!(&out[..len], &bytes[..]);
        }
    }
}
