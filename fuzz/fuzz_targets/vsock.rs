//! Any header comes back as it was, and its answer goes the other way.
#![no_main]

use isthmus_wire::vsock::{Header, RST};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(header) = Header::decode(bytes) else {
        assert!(bytes.len() < Header::LEN);
        return;
    };
    assert_eq!(header.encode()[..], bytes[..Header::LEN]);
    let answer = header.answer(RST);
    assert_eq!((answer.src_cid, answer.dst_port), (header.dst_cid, header.src_port));
});
