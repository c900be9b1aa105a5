//! Packets of a virtio socket device.
//!
//! In front of every packet in a transmit or receive queue: 44 bytes, little-endian, then `len` bytes of payload.
//! Sockets are `(cid, port)`: a guest's context identifier is the number of its domain, so the switch believes no
//! `src_cid` that a guest writes.
//!
//! Credit: each packet says how large its sender's receive buffer is (`buf_alloc`) and how much was taken from it
//! since the connection began (`fwd_cnt`, wraps); the other side may have `buf_alloc - (sent - fwd_cnt)` bytes in
//! flight.
//!
//! Format: virtio 1.2, section 5.10.6. Golden bytes: vectors/vsock.txt.

use crate::reader::{DecodeError, Reader};

/// The host, to its guests.
pub const HOST_CID: u64 = 2;
/// Identifiers below are not for guests.
pub const GUEST_CID_MIN: u32 = 3;

pub const STREAM: u16 = 1;
pub const SEQPACKET: u16 = 2;

pub const REQUEST: u16 = 1;
pub const RESPONSE: u16 = 2;
pub const RST: u16 = 3;
pub const SHUTDOWN: u16 = 4;
pub const RW: u16 = 5;
pub const CREDIT_UPDATE: u16 = 6;
pub const CREDIT_REQUEST: u16 = 7;

/// Of `SHUTDOWN`: the sender receives, sends no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
pub const SHUTDOWN_SEND: u32 = 2;
/// Of `RW` on a seqpacket socket: the message ends here; the record ends here (`MSG_EOR`).
pub const SEQ_EOM: u32 = 1;
pub const SEQ_EOR: u32 = 2;

/// Longest payload that a driver sends in one packet, bytes (Linux: 64 KiB).
pub const PAYLOAD_MAX: u32 = 64 * 1024;

/// What stands in front of every packet.
///
/// Type and operation stay numbers: a device answers what it does not know with a reset, and needs the rest of the
/// header for that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Payload bytes.
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    /// Wraps.
    pub fwd_cnt: u32,
}

impl Header {
    pub const LEN: usize = 44;

    /// # Errors
    /// There are fewer than [`Header::LEN`] bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new("vsock", bytes);
        Ok(Self {
            src_cid: r.u64("src_cid")?,
            dst_cid: r.u64("dst_cid")?,
            src_port: r.u32("src_port")?,
            dst_port: r.u32("dst_port")?,
            len: r.u32("len")?,
            kind: r.u16("type")?,
            op: r.u16("op")?,
            flags: r.u32("flags")?,
            buf_alloc: r.u32("buf_alloc")?,
            fwd_cnt: r.u32("fwd_cnt")?,
        })
    }

    /// The inverse of [`Header::decode`].
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let Self { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt } = *self;
        let mut out = [0; Self::LEN];
        out[0..8].copy_from_slice(&src_cid.to_le_bytes());
        out[8..16].copy_from_slice(&dst_cid.to_le_bytes());
        out[16..20].copy_from_slice(&src_port.to_le_bytes());
        out[20..24].copy_from_slice(&dst_port.to_le_bytes());
        out[24..28].copy_from_slice(&len.to_le_bytes());
        out[28..30].copy_from_slice(&kind.to_le_bytes());
        out[30..32].copy_from_slice(&op.to_le_bytes());
        out[32..36].copy_from_slice(&flags.to_le_bytes());
        out[36..40].copy_from_slice(&buf_alloc.to_le_bytes());
        out[40..44].copy_from_slice(&fwd_cnt.to_le_bytes());
        out
    }

    /// A packet without payload to whoever sent this one.
    #[must_use]
    pub fn answer(&self, op: u16) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    #[test]
    fn the_golden_bytes_are_these() {
        let golden = include_str!("../../../vectors/vsock.txt");
        let lines: Vec<&str> = golden.lines().filter(|l| !l.starts_with('#') && !l.is_empty()).collect();
        let header = Header {
            src_cid: 3,
            dst_cid: 0x0102_0304_0506_0708,
            src_port: 0x8000_0001,
            dst_port: 9000,
            len: 65_536,
            kind: SEQPACKET,
            op: RW,
            flags: SEQ_EOM | SEQ_EOR,
            buf_alloc: 262_144,
            fwd_cnt: 0xFFFF_FFFE,
        };
        let reset = header.answer(RST);
        assert_eq!(lines.len(), 2);
        for (line, header) in lines.iter().zip([header, reset]) {
            let (_, hex) = line.split_once(' ').expect("name and bytes");
            let bytes: Vec<u8> = (0..hex.len() / 2)
                .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).expect("hex"))
                .collect();
            assert_eq!(header.encode()[..], bytes[..]);
            assert_eq!(Header::decode(&bytes), Ok(header));
        }
    }

    proptest! {
        #[test]
        fn any_44_bytes_are_a_header_and_come_back(bytes: [u8; Header::LEN]) {
            let header = Header::decode(&bytes).expect("enough bytes");
            prop_assert_eq!(header.encode(), bytes);
            for short in 0..Header::LEN {
                prop_assert!(Header::decode(&bytes[..short]).is_err());
            }
        }
    }
}
