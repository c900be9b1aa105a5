//! Any header is refused, or is exactly what it says.
#![no_main]

use isthmus_wire::mx_lane::{HEADER, Record};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(record) = isthmus_wire::mx_lane::Record::decode(bytes) else { return };
    assert_eq!(record.encode(), bytes[..HEADER]);
    assert_eq!(Record::decode(&bytes[..HEADER]), Ok(record));
});
