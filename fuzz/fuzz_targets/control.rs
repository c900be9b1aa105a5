//! What decodes encodes to the same bytes, whole and field by field.
#![no_main]

use isthmus_wire::control::{MESSAGE_MAX, Message, decode, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok((request, message)) = decode(bytes) else { return };
    let mut out = [0; MESSAGE_MAX];
    let len = encode(request, &message, &mut out).expect("what was decoded fits");
    assert_eq!(&out[..len], bytes);
    let mut fields = Vec::new();
    message.fields(|name, value| fields.push((name, value)));
    let again = Message::build(message.name(), |name| {
        fields.iter().find(|field| field.0 == name).map(|field| field.1)
    });
    assert_eq!(again, Ok(message));
});
