//! MX messages on the lanes of one node.
//!
//! A lane loses nothing and keeps the order, so what the wire needs for that is not here: a header of 24 bytes, little
//! endian, and bytes.
//!
//! Format: docs/formats/mx-lane.md. Golden bytes: vectors/mx_lane.txt.

use crate::reader::{DecodeError, Problem, Reader};

/// Bytes of a header.
pub const HEADER: usize = 24;
/// Endpoint n of a domain listens at this port and n.
pub const PORT: u32 = 0x4D58_0000;
/// Bytes behind the header of an announcement that names a window: where in it the message begins.
pub const OFFSET: usize = 8;
/// What both sides must speak.
pub const VERSION: u8 = 1;

/// A record. Bytes follow the header of [`Record::Message`] and [`Record::Data`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// The opener's first: the endpoint it speaks for, its session, and the key of whom it wants.
    Hello { version: u8, endpoint: u8, session: u32, key: u32 },
    /// The answer: 0, or why not; and the session that answers.
    Welcome { status: u8, session: u32 },
    /// A whole message.
    Message { matching: u64 },
    /// A message that is sent when it is asked for, under the sender's number. It lies in this window of the
    /// sender's, if that is not 0; [`OFFSET`] bytes follow the header then.
    Announce { matching: u64, length: u32, id: u32, window: u32 },
    /// Send so many bytes of it, to my ticket. 0: none are wanted.
    Pull { id: u32, length: u32, ticket: u32 },
    /// A part, in order.
    Data { ticket: u32, offset: u32 },
    /// So many bytes of it were taken from the window where it lies; no more are wanted.
    Placed { id: u32, length: u32 },
}

impl Record {
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER] {
        let (kind, flags, length, matching, id, more) = match *self {
            Self::Hello { version, endpoint, session, key } => (1, version, key, endpoint.into(), session, 0),
            Self::Welcome { status, session } => (2, status, 0, 0, session, 0),
            Self::Message { matching } => (3, 0, 0, matching, 0, 0),
            Self::Announce { matching, length, id, window } => (4, 0, length, matching, id, window),
            Self::Pull { id, length, ticket } => (5, 0, length, 0, id, ticket),
            Self::Data { ticket, offset } => (6, 0, 0, offset.into(), ticket, 0),
            Self::Placed { id, length } => (7, 0, length, 0, id, 0),
        };
        let mut out = [0; HEADER];
        (out[0], out[1]) = (kind, flags);
        out[4..8].copy_from_slice(&u32::to_le_bytes(length));
        out[8..16].copy_from_slice(&u64::to_le_bytes(matching));
        out[16..20].copy_from_slice(&u32::to_le_bytes(id));
        out[20..].copy_from_slice(&u32::to_le_bytes(more));
        out
    }

    /// The inverse of [`Record::encode`]: what a record has no use for is zero.
    ///
    /// # Errors
    /// It is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("mx record", bytes);
        let (kind, flags) = (reader.u8("kind")?, reader.u8("flags")?);
        reader.take("reserved", 2)?;
        let length = reader.u32("length")?;
        let matching = reader.u64("match")?;
        let (id, more) = (reader.u32("id")?, reader.u32("more")?);
        let narrow = |reader: &Reader<'_>, field, limit: u64| {
            let problem = Problem::TooBig { value: matching, limit };
            if matching > limit { Err(reader.error(field, 16, problem)) } else { Ok(matching as u32) }
        };
        let record = match kind {
            1 => {
                let endpoint = narrow(&reader, "endpoint", 0xFF)? as u8;
                Self::Hello { version: flags, endpoint, session: id, key: length }
            }
            2 => Self::Welcome { status: flags, session: id },
            3 => Self::Message { matching },
            4 => Self::Announce { matching, length, id, window: more },
            5 => Self::Pull { id, length, ticket: more },
            6 => Self::Data { ticket: id, offset: narrow(&reader, "offset", u32::MAX.into())? },
            7 => Self::Placed { id, length },
            _ => {
                return Err(reader.error("kind", HEADER, Problem::Unknown(kind.into())));
            }
        };
        let unused = record.encode().iter().zip(bytes).position(|(ours, theirs)| ours != theirs);
        match unused {
            Some(at) => {
                let value = bytes.get(at).copied().unwrap_or(0).into();
                Err(reader.error("unused", HEADER - at, Problem::NotExpected { value, expected: 0 }))
            }
            None => Ok(record),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::format;
    use std::string::{String, ToString};
    use std::vec::Vec;

    use super::*;

    #[test]
    fn the_golden_bytes_are_these() {
        let golden = include_str!("../../../vectors/mx_lane.txt");
        let lines: Vec<_> = golden.lines().filter(|line| !line.starts_with('#')).collect();
        let meant = [
            (
                "hello",
                Record::Hello { version: VERSION, endpoint: 5, session: 0x1122_3344, key: 0x00C0_FFEE },
            ),
            ("welcome", Record::Welcome { status: 0, session: 0x5566_7788 }),
            ("wrong-key", Record::Welcome { status: 11, session: 0x5566_7788 }),
            ("message", Record::Message { matching: 0x0123_4567_89AB_CDEF }),
            ("announce", Record::Announce { matching: 1 << 63, length: u32::MAX, id: 6, window: 0 }),
            ("pull", Record::Pull { id: 6, length: 100_000, ticket: 9 }),
            ("not-wanted", Record::Pull { id: 6, length: 0, ticket: 0 }),
            ("data", Record::Data { ticket: 9, offset: 65536 }),
            ("announce-in-window", Record::Announce { matching: 1 << 63, length: 100_000, id: 7, window: 3 }),
            ("placed", Record::Placed { id: 7, length: 100_000 }),
        ];
        assert_eq!(lines.len(), meant.len());
        for (line, (name, record)) in lines.into_iter().zip(meant) {
            let bytes = record.encode();
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(line, format!("{name} {hex}"));
            assert_eq!(Record::decode(&bytes), Ok(record));
        }
    }

    #[test]
    fn what_a_record_has_no_use_for_is_zero() {
        let mut bytes = Record::Welcome { status: 0, session: 5 }.encode();
        bytes[20] = 1;
        let refused = Record::decode(&bytes).expect_err("a welcome has no ticket");
        assert_eq!(refused.to_string(), "mx record.unused at byte 20: 1 where 0 must be");
        let unknown = Record::decode(&[9; HEADER]).expect_err("there is no such kind");
        assert_eq!(unknown.to_string(), "mx record.kind at byte 0: 9 is not known");
        let mut hello = Record::Hello { version: 1, endpoint: 255, session: 3, key: 4 }.encode();
        hello[9] = 1;
        let refused = Record::decode(&hello).expect_err("an endpoint is a byte");
        assert_eq!(refused.to_string(), "mx record.endpoint at byte 8: 511 is more than 255");
    }

    proptest! {
        #[test]
        fn whatever_is_a_record_is_exactly_what_it_says(
            kind in 0..9u8,
            rest: [u8; HEADER - 1],
            zeros in 0..1u32 << (HEADER - 1),
        ) {
            let mut bytes = [0; HEADER];
            bytes[0] = kind;
            for (at, byte) in rest.into_iter().enumerate().filter(|(at, _)| zeros >> at & 1 == 0) {
                bytes[at + 1] = byte;
            }
            if let Ok(record) = Record::decode(&bytes) {
                prop_assert_eq!(record.encode(), bytes);
            }
        }

        #[test]
        fn too_few_bytes_are_none(bytes: [u8; HEADER], len in 0..HEADER) {
            prop_assert!(Record::decode(&bytes[..len]).is_err());
        }
    }
}
