//! Any frame is refused, or its data lies within it and what is sent again is the same.
#![no_main]

use isthmus_wire::mxoe::{Frame, Profile, REPLY_HEAD_LEN, ReplyHead, decode, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for profile in [Profile::WIRE, Profile::own(9000), Profile::own(65535), Profile::own(1500)] {
        let reply = ReplyHead::decode(&bytes[..bytes.len().min(REPLY_HEAD_LEN)], bytes.len());
        let Ok((head, frame)) = decode(bytes, &profile) else {
            assert_eq!(reply, None);
            continue;
        };
        assert_eq!(reply.is_some(), matches!(frame, Frame::PullReply { .. }));
        let data = match frame {
            Frame::Tiny { data, .. } | Frame::Small { data, .. } | Frame::Medium { data, .. } => data,
            Frame::PullReply { data, .. } => data,
            Frame::HostReply { name, .. } => name,
            _ => &[],
        };
        assert!(data.len() <= bytes.len());
        let mut out = [0; 1 << 16];
        if let Ok(len) = encode(&head, &frame, &profile, &mut out) {
            assert_eq!(isthmus_wire::mxoe::decode(&out[..len], &profile), Ok((head, frame)));
        }
    }
});
