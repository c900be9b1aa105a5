//! What lies in a ring: records of a 16-byte header and a payload.
//!
//! A header never wraps and neither does a payload: records begin at multiples of [`ALIGN`] and a
//! record that would pass the end of the ring starts at its beginning instead (a [`Kind::Skip`]
//! covers the gap). The first header word, the *commit*, is written last and equals the lane's
//! secret plus the record's position, so bytes that lay there before (of whatever origin) are
//! never taken for a record.
//!
//! Format: docs/formats/lane.md. Golden bytes: vectors/record.txt.

/// Records begin at multiples of this: one cache line.
pub const ALIGN: usize = 64;
/// Commit (8), length (4), kind (1), flags (1), reserved (2).
pub const HEADER: usize = 16;
/// Payloads longer than this begin on the next cache line, where wide copies are fastest.
pub const INLINE_MAX: usize = 1024;
/// Behind the payload of a record whose carrier cannot order header after payload.
pub const TRAILER: usize = 8;

/// The trailer of a payload of at most so many bytes covers all of the record: it may be written
/// in one piece, whose words become visible in any order.
pub const COVERED_MAX: usize = 256;

/// What a record is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A piece of a byte stream.
    Stream = 1,
    /// One whole message.
    Message = 2,
    /// Nothing: the next record is at the beginning of the ring.
    Skip = 3,
    /// Nothing: the next record is at the beginning of the large ring.
    Grow = 4,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Stream, Self::Message, Self::Skip, Self::Grow];

    #[inline]
    #[must_use]
    pub fn from_wire(value: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == value)
    }
}

/// The second header word; the first is the commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub kind: Kind,
    /// The payload is complete only when the trailer behind it is there.
    pub trailer: bool,
    /// Payload bytes.
    pub len: u32,
}

/// A second header word that cannot be: the sender is broken or hostile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderFault {
    Kind(u8),
    Reserved(u32),
    Length { len: u32, limit: u32 },
}

impl core::fmt::Display for HeaderFault {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Kind(kind) => write!(f, "record.kind: {kind} is not known"),
            Self::Reserved(bits) => write!(f, "record.flags: reserved bits {bits:#x} are set"),
            Self::Length { len, limit } => write!(f, "record.len: {len} is more than {limit}"),
        }
    }
}

impl Header {
    /// Never panics. `limit` is the room between the header and the end of the ring, in bytes.
    ///
    /// # Errors
    /// The header cannot be true; see [`HeaderFault`].
    #[inline]
    pub fn decode(word: u64, limit: usize) -> Result<Self, HeaderFault> {
        let [l0, l1, l2, l3, kind, flags, r0, r1] = word.to_le_bytes();
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let reserved = u32::from_le_bytes([flags & !1, r0, r1, 0]);
        if reserved != 0 {
            return Err(HeaderFault::Reserved(reserved));
        }
        let kind = Kind::from_wire(kind).ok_or(HeaderFault::Kind(kind))?;
        let header = Self { kind, trailer: flags & 1 != 0, len };
        if header.footprint() > limit {
            return Err(HeaderFault::Length { len, limit: u32::try_from(limit).unwrap_or(u32::MAX) });
        }
        Ok(header)
    }

    /// The inverse of [`Header::decode`].
    #[inline]
    #[must_use]
    pub fn encode(self) -> u64 {
        let Self { kind, trailer, len } = self;
        let [l0, l1, l2, l3] = len.to_le_bytes();
        u64::from_le_bytes([l0, l1, l2, l3, kind as u8, u8::from(trailer), 0, 0])
    }

    /// Where the payload begins, from the beginning of the record.
    #[inline]
    #[must_use]
    pub fn payload_at(self) -> usize {
        payload_at(self.len as usize)
    }

    /// Bytes of ring the record takes, a multiple of [`ALIGN`].
    #[inline]
    #[must_use]
    pub fn footprint(self) -> usize {
        footprint(self.len as usize, self.trailer)
    }
}

/// Where a payload of `len` bytes begins in its record.
#[inline]
#[must_use]
pub fn payload_at(len: usize) -> usize {
    if len <= INLINE_MAX { HEADER } else { ALIGN }
}

/// Bytes of ring that a record with a payload of `len` bytes takes, a multiple of [`ALIGN`].
#[inline]
#[must_use]
pub fn footprint(len: usize, trailer: bool) -> usize {
    let end =
        if trailer { trailer_at(len).saturating_add(TRAILER) } else { payload_at(len).saturating_add(len) };
    end.saturating_add(ALIGN - 1) & !(ALIGN - 1)
}

/// Where the trailer of a payload of `len` bytes lies in its record, a multiple of 8.
#[inline]
#[must_use]
pub fn trailer_at(len: usize) -> usize {
    payload_at(len).saturating_add(len).saturating_add(TRAILER - 1) & !(TRAILER - 1)
}

/// The trailer of a record with this commit and this header word.
///
/// `words` are all between the header and the trailer, the last one filled up with zeros; they
/// count in records of at most [`COVERED_MAX`] bytes. The trailer of a longer one only follows its
/// payload. Whoever chose the bytes that lay there before, or the payload, does not know the
/// commit, and cannot choose them so that a mixture of both passes for the record.
#[inline]
#[must_use]
pub fn trailer_word(commit: u64, header: u64, words: Option<impl Iterator<Item = u64>>) -> u64 {
    let Some(words) = words else { return !commit };
    let factor = u128::from(commit.rotate_left(32) | 1);
    let fold = |sum: u64, word: u64| {
        let product = u128::from(sum ^ word) * factor;
        product as u64 ^ (product >> 64) as u64
    };
    !words.fold(fold(commit, header), fold)
}

/// The longest payload whose record fits `room` bytes of ring (a multiple of [`ALIGN`], not 0).
#[must_use]
pub fn payload_in(room: usize, trailer: bool) -> usize {
    let room = room.saturating_sub(if trailer { TRAILER } else { 0 });
    let near = room.saturating_sub(HEADER);
    if near <= INLINE_MAX { near } else { room.saturating_sub(ALIGN).max(INLINE_MAX) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    #[test]
    fn the_golden_records_are_these() {
        let golden = include_str!("../../../vectors/record.txt");
        let lines: Vec<&str> = golden.lines().filter(|l| !l.starts_with('#') && !l.is_empty()).collect();
        assert_eq!(lines.len(), 24, "two carriers, each with 5 streams, 5 messages, a skip and a grow");
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            let [carrier, kind, len, hex] = words[..] else { panic!("four words: {line}") };
            let bytes: Vec<u8> = (0..hex.len() / 2)
                .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).expect("hex"))
                .collect();
            let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
            let header = Header::decode(word(8), bytes.len()).expect("a header");
            let kind = match kind {
                "stream" => Kind::Stream,
                "message" => Kind::Message,
                "skip" => Kind::Skip,
                _ => Kind::Grow,
            };
            let len: u32 = len.parse().expect("a length");
            assert_eq!(header, Header { kind, trailer: carrier == "put", len }, "{line}");
            assert_eq!(header.encode(), word(8));
            assert_eq!(header.footprint(), bytes.len());
            let payload = &bytes[header.payload_at()..][..len as usize];
            assert!(payload.iter().enumerate().all(|(i, byte)| usize::from(*byte) == i * 7 % 251));
            if header.trailer {
                let end = trailer_at(len as usize);
                let covered = len as usize <= COVERED_MAX;
                let words = covered.then(|| (HEADER..end).step_by(8).map(word));
                assert_eq!(word(end), trailer_word(word(0), word(8), words));
            }
        }
    }

    proptest! {
        #[test]
        fn what_decodes_encodes_to_the_same_word(word: u64, limit in 0usize..1 << 21) {
            if let Ok(header) = Header::decode(word, limit) {
                prop_assert_eq!(header.encode(), word);
                prop_assert!(header.footprint() <= limit);
                prop_assert!(header.payload_at() + header.len as usize <= header.footprint());
            }
        }
    }

    proptest! {
        #[test]
        fn the_longest_payload_fits_and_one_byte_more_does_not(lines in 1usize..4096, trailer: bool) {
            let room = lines * ALIGN;
            let most = payload_in(room, trailer);
            prop_assert!(footprint(most, trailer) <= room);
            // Between 1024 and 1072 bytes one byte more costs a whole line, which may still fit.
            prop_assert!(footprint(most + 1, trailer) > room || most == INLINE_MAX);
        }
    }

    proptest! {
        #[test]
        fn a_mixture_of_two_records_has_no_trailer_of_either(
            old in proptest::collection::vec(any::<u64>(), 9),
            new in proptest::collection::vec(any::<u64>(), 9),
            from_old: u16,
            commit: u64,
        ) {
            let mixed: Vec<u64> =
                (0..9).map(|i| if from_old >> i & 1 == 1 { old[i] } else { new[i] }).collect();
            let trailer =
                |words: &[u64]| trailer_word(commit, words[0], Some(words[1..].iter().copied()));
            prop_assert_eq!(trailer(&mixed) == trailer(&new), mixed == new);
        }
    }

    #[test]
    fn a_length_that_passes_the_end_of_the_ring_is_refused() {
        let word = Header { kind: Kind::Stream, trailer: false, len: u32::MAX }.encode();
        assert!(matches!(Header::decode(word, 1 << 21), Err(HeaderFault::Length { .. })));
        let word = Header { kind: Kind::Stream, trailer: false, len: 49 }.encode();
        assert!(matches!(Header::decode(word, 64), Err(HeaderFault::Length { .. })));
        let word = Header { kind: Kind::Stream, trailer: false, len: 48 }.encode();
        assert!(Header::decode(word, 64).is_ok());
    }

    #[test]
    fn reserved_bits_and_unknown_kinds_are_refused() {
        let good = Header { kind: Kind::Message, trailer: true, len: 8 }.encode();
        assert!(Header::decode(good, 4096).is_ok());
        assert!(matches!(Header::decode(good | 1 << 41, 4096), Err(HeaderFault::Reserved(_))));
        assert!(matches!(Header::decode(good | 1 << 63, 4096), Err(HeaderFault::Reserved(_))));
        assert!(matches!(Header::decode(good | 0xf0 << 32, 4096), Err(HeaderFault::Kind(_))));
    }
}
