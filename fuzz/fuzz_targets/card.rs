//! Any record is refused, or is exactly what it says.
#![no_main]

use isthmus_wire::card::{RECORD_MAX, Record, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(record) = isthmus_wire::card::decode(bytes) else { return };
    if let Record::PeerList(lines) | Record::CounterList(lines) = record {
        let (peers, counters) = (lines.peers().count(), lines.counters().count());
        assert!(peers.max(counters) <= bytes.len());
    }
    let mut out = [0; RECORD_MAX];
    let len = encode(&record, &mut out).expect("it was decoded");
    assert_eq!(&out[..len], bytes);
});
