//! Messages of vhost-user: how a virtual machine monitor hands a device's queues and the guest's memory to the
//! process that plays the device.
//!
//! A Unix stream socket; the monitor asks, we answer some of it. A message is 12 bytes (request, flags, size, each
//! u32, in the machine's order, which is little-endian wherever we run) and `size` bytes. Descriptors travel with
//! the first byte.
//!
//! Format: the vhost-user protocol document of QEMU. What QEMU 7.2 and user-mode Linux 6.1 really send, which
//! differs, is in docs/formats/vhost-user.md. Golden bytes: vectors/vhost_user.txt.

use crate::reader::{DecodeError, Problem, Reader};

/// Longest payload we accept, bytes: a memory table of [`REGIONS_MAX`] regions.
pub const PAYLOAD_MAX: usize = 8 + 32 * REGIONS_MAX;
/// Regions of one memory table.
pub const REGIONS_MAX: usize = 8;
/// Descriptors beside one message.
pub const DESCRIPTORS_MAX: usize = REGIONS_MAX;

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const SET_VRING_ERR: u32 = 14;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const SET_VRING_ENABLE: u32 = 18;
pub const SET_BACKEND_REQ_FD: u32 = 21;
pub const GET_CONFIG: u32 = 24;

/// The back end may ask the monitor; user-mode Linux makes its interrupt only together with that channel.
pub const PROTOCOL_BACKEND_REQ: u64 = 1 << 5;
pub const PROTOCOL_CONFIG: u64 = 1 << 9;

/// Of a device's features: this protocol has features of its own.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 4;
/// In `SET_VRING_KICK`, `_CALL` and `_ERR`: there is no descriptor.
const NO_DESCRIPTOR: u64 = 1 << 8;

/// What stands in front of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub request: u32,
    /// Bytes that follow, at most [`PAYLOAD_MAX`].
    pub size: usize,
}

impl Header {
    pub const LEN: usize = 12;

    /// # Errors
    /// Says which field is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new("vhost-user", bytes);
        let request = r.u32("request")?;
        let flags = r.u32("flags")?;
        if flags & VERSION_MASK != VERSION {
            let problem =
                Problem::NotExpected { value: u64::from(flags & VERSION_MASK), expected: VERSION.into() };
            return Err(r.error("flags", 4, problem));
        }
        let size = r.u32("size")? as usize;
        if size > PAYLOAD_MAX {
            let problem = Problem::TooBig { value: size as u64, limit: PAYLOAD_MAX as u64 };
            return Err(r.error("size", 4, problem));
        }
        Ok(Self { request, size })
    }
}

/// The header of a reply of `size` bytes to `request`.
#[must_use]
pub fn reply_header(request: u32, size: u32) -> [u8; Header::LEN] {
    let mut out = [0; Header::LEN];
    out[0..4].copy_from_slice(&request.to_le_bytes());
    out[4..8].copy_from_slice(&(VERSION | REPLY).to_le_bytes());
    out[8..12].copy_from_slice(&size.to_le_bytes());
    out
}

/// A piece of the guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Guest-physical address of its first byte.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Where the monitor has it: addresses of queues are given in these terms.
    pub user: u64,
    /// Where it begins in its file.
    pub offset: u64,
}

/// The guest's memory, one descriptor beside the message for each region.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryTable {
    regions: [Region; REGIONS_MAX],
    count: usize,
}

impl MemoryTable {
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        self.regions.get(..self.count).unwrap_or_default()
    }
}

/// Where the three parts of a queue lie, in the monitor's addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VringAddr {
    pub index: u32,
    pub descriptors: u64,
    pub used: u64,
    pub available: u64,
}

/// A message from a monitor. What we were not asked to offer is refused.
#[allow(clippy::large_enum_variant, reason = "messages are few, and this crate allocates nothing")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    SetMemTable(MemoryTable),
    SetVringNum { index: u32, num: u32 },
    SetVringAddr(VringAddr),
    SetVringBase { index: u32, base: u32 },
    GetVringBase { index: u32 },
    SetVringKick { index: u32, descriptor: bool },
    SetVringCall { index: u32, descriptor: bool },
    SetVringErr { index: u32, descriptor: bool },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    SetVringEnable { index: u32, enable: bool },
    SetBackendReqFd,
    GetConfig { offset: u32, size: u32 },
}

impl Message {
    /// Decode the payload that followed a header with this `request`.
    ///
    /// # Errors
    /// Says which field is wrong and where.
    pub fn decode(request: u32, payload: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader::new("vhost-user", payload);
        let message = match request {
            GET_FEATURES => Self::GetFeatures,
            SET_FEATURES => Self::SetFeatures(r.u64("features")?),
            SET_OWNER => Self::SetOwner,
            SET_MEM_TABLE => return Self::memory_table(&mut r),
            SET_VRING_NUM => Self::SetVringNum { index: r.u32("index")?, num: r.u32("num")? },
            SET_VRING_ADDR => {
                let index = r.u32("index")?;
                r.u32("flags")?;
                let descriptors = r.u64("descriptors")?;
                let used = r.u64("used")?;
                let available = r.u64("available")?;
                r.u64("log")?;
                Self::SetVringAddr(VringAddr { index, descriptors, used, available })
            }
            SET_VRING_BASE => Self::SetVringBase { index: r.u32("index")?, base: r.u32("base")? },
            GET_VRING_BASE => {
                let index = r.u32("index")?;
                r.u32("num")?;
                Self::GetVringBase { index }
            }
            SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => {
                let word = r.u64("index")?;
                let (index, descriptor) = ((word & 0xFF) as u32, word & NO_DESCRIPTOR == 0);
                match request {
                    SET_VRING_KICK => Self::SetVringKick { index, descriptor },
                    SET_VRING_CALL => Self::SetVringCall { index, descriptor },
                    _ => Self::SetVringErr { index, descriptor },
                }
            }
            GET_PROTOCOL_FEATURES => Self::GetProtocolFeatures,
            SET_PROTOCOL_FEATURES => Self::SetProtocolFeatures(r.u64("features")?),
            SET_VRING_ENABLE => {
                Self::SetVringEnable { index: r.u32("index")?, enable: r.u32("enable")? != 0 }
            }
            SET_BACKEND_REQ_FD => {
                // QEMU sends a word, user-mode Linux nothing.
                return Ok(Self::SetBackendReqFd);
            }
            GET_CONFIG => {
                let (offset, size) = (r.u32("offset")?, r.u32("size")?);
                r.u32("flags")?;
                r.take("config", (size as usize).min(PAYLOAD_MAX))?;
                Self::GetConfig { offset, size }
            }
            _ => return Err(r.error("request", 0, Problem::Unknown(request.into()))),
        };
        r.end()?;
        Ok(message)
    }

    fn memory_table(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let count = r.u32("regions")?;
        if count as usize > REGIONS_MAX {
            let problem = Problem::TooBig { value: count.into(), limit: REGIONS_MAX as u64 };
            return Err(r.error("regions", 4, problem));
        }
        r.u32("padding")?;
        let mut table = MemoryTable { count: count as usize, ..MemoryTable::default() };
        for region in table.regions.iter_mut().take(count as usize) {
            *region = Region {
                guest: r.u64("guest address")?,
                size: r.u64("size")?,
                user: r.u64("user address")?,
                offset: r.u64("offset")?,
            };
        }
        // User-mode Linux sends room for two regions and counts one: what follows says nothing.
        Ok(Self::SetMemTable(table))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{string::ToString, vec::Vec};

    /// Messages as QEMU 7.2 and user-mode Linux 6.1 send them, and what they say.
    fn golden() -> Vec<(Vec<u8>, Message)> {
        let expected = |name: &str| match name {
            "qemu-get-features" => Message::GetFeatures,
            "uml-memory" => Message::SetMemTable(MemoryTable {
                regions: {
                    let mut regions = [Region::default(); REGIONS_MAX];
                    regions[0] = Region {
                        guest: 0x2217_A000,
                        size: 0x7B0_0000,
                        user: 0x2217_A000,
                        offset: 0x2217_A000,
                    };
                    regions
                },
                count: 1,
            }),
            "vring-addr" => Message::SetVringAddr(VringAddr {
                index: 1,
                descriptors: 0x1000,
                used: 0x3000,
                available: 0x2000,
            }),
            "kick-without" => Message::SetVringKick { index: 1, descriptor: false },
            "get-config" => Message::GetConfig { offset: 0, size: 8 },
            other => panic!("{other}: no such vector"),
        };
        include_str!("../../../vectors/vhost_user.txt")
            .lines()
            .filter(|l| !l.starts_with('#') && !l.is_empty())
            .map(|line| {
                let (name, hex) = line.split_once(' ').expect("name and bytes");
                let bytes = (0..hex.len() / 2)
                    .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).expect("hex"))
                    .collect();
                (bytes, expected(name))
            })
            .collect()
    }

    #[test]
    fn the_golden_bytes_say_this() {
        for (bytes, message) in golden() {
            let header = Header::decode(&bytes[..Header::LEN]).expect("a header");
            assert_eq!(header.size, bytes.len() - Header::LEN);
            assert_eq!(Message::decode(header.request, &bytes[Header::LEN..]), Ok(message));
        }
    }

    #[test]
    fn refusals_say_where() {
        let mut header = [0; Header::LEN];
        header[4] = 2;
        let error = Header::decode(&header).expect_err("version 2");
        assert_eq!(error.to_string(), "vhost-user.flags at byte 4: 2 where 1 must be");
        header[4] = 1;
        header[8..12].copy_from_slice(&1000u32.to_le_bytes());
        let error = Header::decode(&header).expect_err("too long");
        assert_eq!(error.to_string(), "vhost-user.size at byte 8: 1000 is more than 264");
        let error = Message::decode(SET_MEM_TABLE, &[9, 0, 0, 0]).expect_err("nine regions");
        assert_eq!(error.to_string(), "vhost-user.regions at byte 0: 9 is more than 8");
        assert!(Message::decode(99, &[]).is_err());
    }

    proptest! {
        #[test]
        fn garbage_never_surprises(request in 0u32..48, payload in proptest::collection::vec(any::<u8>(), 0..PAYLOAD_MAX)) {
            if let Ok(Message::SetMemTable(table)) = Message::decode(request, &payload) {
                prop_assert!(table.regions().len() <= REGIONS_MAX);
            }
        }
    }
}
