//! Frames of MX over Ethernet.
//!
//! An Ethernet header, the sender's index in the receiver's table of peers, a type, and a body of that type; all numbers
//! are big-endian. Frames shorter than 60 bytes are padded, so a length is what its field says and never what the frame
//! has. There are two dialects that no frame announces: *wire*, which Myricom's own stations speak, and *own*, which
//! differs in two frames and in sizes ([`Profile`]).
//!
//! Format: docs/formats/mxoe.md. Golden bytes: vectors/mxoe.txt.

mod decode;
mod encode;
#[cfg(test)]
mod tests;

pub use decode::decode;
pub use encode::{encode, stamp};

/// Of MX over Ethernet, by default.
pub const ETHERTYPE: u16 = 0x86DF;
/// Bytes in front of every frame's type: the Ethernet header and [`Head::peer_index`].
pub const HEAD_LEN: usize = 16;
/// The Ethernet header alone.
pub const ETHERNET_LEN: usize = 14;
/// In [`Head::destination`]: everybody.
pub const BROADCAST: [u8; 6] = [0xFF; 6];
/// In [`Head::peer_index`]: not learnt yet.
pub const INDEX_UNKNOWN: u16 = 0xFFFF;
/// Shorter frames are padded with zeros.
pub const FRAME_MIN: usize = 60;
/// Longest data of a tiny and of a small message, bytes.
pub const TINY_MAX: usize = 32;
pub const SMALL_MAX: usize = 128;
/// Longest name of a host, with the zero behind it.
pub const NAME_MAX: usize = 80;
/// Of a connect and of an acknowledgement: bytes of what the libraries say to each other.
const LIBRARY_LEN: u8 = 16;
/// What an acknowledgement begins with.
const ACK: u8 = 0x55;
/// Fragment units above this cannot be: no fragment is that long.
const PIPELINE_MAX: u8 = 15;

pub const BAD_ENDPOINT: u8 = 1;
pub const ENDPOINT_CLOSED: u8 = 2;
pub const BAD_SESSION: u8 = 3;
pub const BAD_WINDOW: u8 = 4;
/// In the reply to a connect: welcome, and a key that is not the endpoint's.
pub const CONNECTED: u8 = 0;
pub const BAD_KEY: u8 = 11;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Wire,
    Own,
}

/// What two stations must have in common, and no frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profile {
    pub dialect: Dialect,
    pub ethertype: u16,
    /// Data bytes of a fragment of a medium message, and fragments of one at most.
    pub fragment: u16,
    pub fragments: u8,
    /// Data bytes of a reply to a pull, and replies that one pull asks for.
    pub reply: u16,
    pub replies: u8,
}

impl Profile {
    /// What Myricom's stations speak.
    pub const WIRE: Self = Self {
        dialect: Dialect::Wire,
        ethertype: ETHERTYPE,
        fragment: 4096,
        fragments: 8,
        reply: 4096,
        replies: 8,
    };

    /// What the longest frame carries behind its Ethernet header, bytes.
    #[must_use]
    pub fn mtu(&self) -> u32 {
        const FRAGMENT_HEAD: u32 = 48 - ETHERNET_LEN as u32;
        const REPLY_HEAD: u32 = (REPLY_HEAD_LEN - ETHERNET_LEN) as u32;
        (u32::from(self.fragment) + FRAGMENT_HEAD).max(u32::from(self.reply) + REPLY_HEAD)
    }

    /// Open-MX's own, for interfaces that carry so many bytes behind the Ethernet header: [`OWN_MTU`].
    ///
    /// Its makers knew no frames beyond 9,216 bytes; for those there is nobody to agree with but ourselves, and a pull
    /// asks for fewer of them.
    #[must_use]
    pub const fn own(mtu: u16) -> Self {
        const MEDIUM: u16 = 48;
        const REPLY: u16 = 32;
        const KNOWN_MAX: u16 = 9216;
        const REPLIES: u8 = 32;
        const BLOCK: u32 = 288 << 10;
        let fits = mtu.saturating_sub(MEDIUM);
        let fragment = if fits <= 4096 {
            fits
        } else if fits >= 8192 {
            8192
        } else {
            4096
        };
        let reply = mtu.saturating_sub(REPLY);
        let replies = if mtu <= KNOWN_MAX { REPLIES } else { (BLOCK / reply as u32) as u8 };
        Self { dialect: Dialect::Own, ethertype: ETHERTYPE, fragment, fragments: 32, reply, replies }
    }
}

/// MTUs that [`Profile::own`] has a sense for.
pub const OWN_MTU: core::ops::RangeInclusive<u16> = 576..=65535;

/// The first byte of the wire is the uppermost of 48 bits.
#[must_use]
pub fn nic_of_mac(mac: [u8; 6]) -> u64 {
    mac.iter().fold(0, |nic, byte| nic << 8 | u64::from(*byte))
}

/// The inverse; what is above 48 bits is not looked at.
#[must_use]
pub fn mac_of(nic: u64) -> [u8; 6] {
    let [_, _, mac @ ..] = nic.to_be_bytes();
    mac
}

/// In front of every frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub ethertype: u16,
    /// The sender's index in the receiver's table of peers, or [`INDEX_UNKNOWN`].
    pub peer_index: u16,
}

/// The two endpoints of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    pub to: u8,
    pub from: u8,
    /// Set by nobody, and looked at by nobody.
    pub generation: u8,
}

/// What every message says, whatever its class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    pub ends: Ends,
    /// Undefined unless both sides agreed to check.
    pub checksum: u16,
    /// Fourteen bits of sequence, and above them two of the partner session.
    pub sequence: u16,
    /// Everything before this was received; the same bits.
    pub piggyack: u16,
    pub matching: u64,
    /// Of the endpoint it is for.
    pub session: u32,
}

/// Which part of whose memory is meant: a window (region) of an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    pub id: u8,
    pub sequence: u8,
    pub offset: u32,
}

/// A pull: the puller's own, and sent back with each reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cookie {
    pub handle: u32,
    pub magic: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A station makes itself known to all.
    Discovery {
        nic: u64,
        serial: u32,
    },
    /// What is your name? With the index of whom is asked in the table of who asks.
    HostQuery {
        index: u16,
        magic: u32,
    },
    /// The name, with the zero behind it.
    HostReply {
        index: u16,
        magic: u32,
        name: &'a [u8],
    },
    /// Everything before `next` was received. `number` grows with each.
    Ack {
        ends: Ends,
        session: u32,
        next: u16,
        number: u32,
        sent: u16,
        resent: u8,
    },
    /// May I send to you? The index is that of the other in the sender's table.
    Connect {
        ends: Ends,
        index: u16,
        session: u32,
        key: u32,
        expects: u16,
        number: u8,
    },
    /// The answer: `session` is the requester's again.
    Connected {
        ends: Ends,
        index: u16,
        session: u32,
        own_session: u32,
        expects: u16,
        number: u8,
        status: u8,
    },
    Tiny {
        message: Message,
        data: &'a [u8],
    },
    Small {
        message: Message,
        data: &'a [u8],
    },
    /// Part of a message of `total` bytes; it begins at `offset`.
    Medium {
        message: Message,
        total: u32,
        fragment: u8,
        offset: u32,
        data: &'a [u8],
    },
    /// A large message waits to be pulled.
    Rendezvous {
        message: Message,
        length: u32,
        window: Window,
    },
    /// Send me `block` bytes of the `length`, in frames that are numbered from `first`. The first begins `skip` bytes
    /// into its place.
    Pull {
        ends: Ends,
        session: u32,
        length: u32,
        window: Window,
        cookie: Cookie,
        skip: u32,
        block: u32,
        first: u32,
    },
    /// `frame` is its number, modulo 256; `offset` is from the window's.
    PullReply {
        frame: u8,
        offset: u32,
        cookie: Cookie,
        data: &'a [u8],
    },
    /// All of it was pulled.
    Notify {
        ends: Ends,
        session: u32,
        length: u32,
        window: Window,
        sequence: u16,
        piggyack: u16,
    },
    /// A message could not be delivered to the endpoint `to`; `from` had sent it.
    NackLib {
        to: u8,
        from: u8,
        generation: u8,
        why: u8,
        index: u16,
        sequence: u16,
    },
    /// A pull could not be served.
    NackPull {
        from: u8,
        generation: u8,
        why: u8,
        cookie: Cookie,
    },
}

const DISCOVERY: u8 = 1;
const HOST_QUERY: u8 = 3;
const HOST_REPLY: u8 = 4;
const TRUC: u8 = 35;
const CONNECT: u8 = 36;
const TINY: u8 = 37;
const SMALL: u8 = 38;
const MEDIUM: u8 = 39;
const RENDEZVOUS: u8 = 40;
const PULL: u8 = 41;
const PULL_REPLY: u8 = 42;
const NOTIFY: u8 = 43;
const NACK_LIB: u8 = 44;
const NACK_PULL: u8 = 45;

/// Where a connect says the index of whom it is for in the sender's table.
const CONNECT_INDEX_AT: usize = 26;

/// What an endpoint's magic is made with, so that a reply, which names no endpoint, finds its way.
pub const MAGIC: u32 = 0x2107_1980;

/// The number that the frame begins its body with.
#[must_use]
pub fn type_of(frame: &[u8]) -> Option<u8> {
    frame.get(HEAD_LEN).copied()
}

impl Cookie {
    /// The endpoint that pulls, if its station makes magics as Open-MX does.
    #[must_use]
    pub fn endpoint(&self) -> u8 {
        (self.magic ^ MAGIC) as u8
    }
}

/// Bytes in front of the data of a reply to a pull.
pub const REPLY_HEAD_LEN: usize = 32;

/// A reply to a pull without its data, which may then be copied from where it lies to where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyHead {
    pub head: Head,
    pub frame: u8,
    pub offset: u32,
    pub cookie: Cookie,
    /// Bytes of data behind it.
    pub len: u16,
}

impl ReplyHead {
    /// What a reply begins with. `None`: this is none, or data of so many bytes cannot follow in a frame of this length.
    #[must_use]
    pub fn decode(bytes: &[u8], frame_len: usize) -> Option<Self> {
        let bytes: &[u8; REPLY_HEAD_LEN] = bytes.first_chunk()?;
        if type_of(bytes)? != PULL_REPLY {
            return None;
        }
        let half = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at)) << 16 | u32::from(half(at + 2));
        let mac = |at: usize| core::array::from_fn(|i| bytes[at + i]);
        let len = half(18);
        (REPLY_HEAD_LEN + usize::from(len) <= frame_len).then_some(Self {
            head: Head { destination: mac(0), source: mac(6), ethertype: half(12), peer_index: half(14) },
            frame: bytes[17],
            offset: word(20),
            cookie: Cookie { handle: word(24), magic: word(28) },
            len,
        })
    }

    #[must_use]
    pub fn encode(&self) -> [u8; REPLY_HEAD_LEN] {
        let Self { head, frame, offset, cookie, len } = *self;
        let mut out = [0; REPLY_HEAD_LEN];
        out[..6].copy_from_slice(&head.destination);
        out[6..12].copy_from_slice(&head.source);
        out[12..14].copy_from_slice(&head.ethertype.to_be_bytes());
        out[14..16].copy_from_slice(&head.peer_index.to_be_bytes());
        (out[16], out[17]) = (PULL_REPLY, frame);
        out[18..20].copy_from_slice(&len.to_be_bytes());
        out[20..24].copy_from_slice(&offset.to_be_bytes());
        out[24..28].copy_from_slice(&cookie.handle.to_be_bytes());
        out[28..].copy_from_slice(&cookie.magic.to_be_bytes());
        out
    }
}

/// The checksum that stations carry who agreed to: CRC-16 of polynomial 0x1021, from 0, most significant bit first.
#[must_use]
pub fn checksum(data: &[u8]) -> u16 {
    data.iter().fold(0, |crc, byte| {
        (0..8).fold(
            crc ^ u16::from(*byte) << 8,
            |crc, _| {
                if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 }
            },
        )
    })
}
