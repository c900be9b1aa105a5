//! A message is decoded or refused by name; a memory table never has more regions than it may.
#![no_main]

use isthmus_wire::vhost_user::{Header, Message, PAYLOAD_MAX, REGIONS_MAX};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = Header::decode(bytes) else { return };
    assert!(header.size <= PAYLOAD_MAX);
    let payload = &bytes[Header::LEN..];
    if let Ok(Message::SetMemTable(table)) = Message::decode(header.request, payload) {
        assert!(table.regions().len() <= REGIONS_MAX);
    }
});
