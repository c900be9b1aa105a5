//! A header that decodes describes a record that lies within its ring.
#![no_main]

use isthmus_wire::record::{ALIGN, Header, TRAILER, footprint, payload_at, payload_in, trailer_at};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // As in a ring: the commit, then the header. What follows is the room there is.
    let Some(word) = bytes.get(8..16).and_then(|word| word.try_into().ok()) else { return };
    let word = u64::from_le_bytes(word);
    let limit = bytes.len() * ALIGN;
    let Ok(header) = Header::decode(word, limit) else { return };
    assert_eq!(header.encode(), word);
    let len = header.len as usize;
    assert!(header.footprint() <= limit && header.footprint() % ALIGN == 0);
    assert!(header.payload_at() + len <= header.footprint());
    assert_eq!((header.payload_at(), header.footprint()), (payload_at(len), footprint(len, header.trailer)));
    if header.trailer {
        assert!(trailer_at(len) % 8 == 0 && trailer_at(len) >= payload_at(len) + len);
        assert!(trailer_at(len) + TRAILER <= header.footprint());
    }
    assert!(payload_in(header.footprint(), header.trailer) >= len);
});
