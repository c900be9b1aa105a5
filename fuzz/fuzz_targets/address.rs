//! Whatever is accepted as an address prints back to itself.
#![no_main]

use isthmus_wire::address::{Host, check_name, parse_address, parse_host};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if check_name(text).is_ok() {
        assert_eq!(parse_host(text), Ok(Host::Name(text)));
    }
    if let Ok((host, port)) = parse_address(text) {
        let back = match host {
            Host::Name(name) => format!("{name}:{port}"),
            Host::Number(number) => format!("{number}:{port}"),
        };
        assert_eq!(parse_address(&back), Ok((host, port)));
    }
});
