//! Golden bytes, both dialects, and garbage.

use proptest::prelude::*;
use std::collections::BTreeMap;
use std::vec;
use std::vec::Vec;

use super::*;
use crate::reader::Problem;

const A: [u8; 6] = [2, 0, 0, 0, 0, 1];
const B: [u8; 6] = [2, 0, 0, 0, 0, 2];
const OWN: Profile = Profile::own(9000);

fn golden() -> BTreeMap<&'static str, Vec<u8>> {
    let text = include_str!("../../../../vectors/mxoe.txt");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let bytes = |hex: &str| -> Vec<u8> {
        hex.as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(core::str::from_utf8(pair).expect("hex"), 16).expect("hex"))
            .collect()
    };
    lines.map(|line| line.split_once(' ').expect("a name")).map(|(name, hex)| (name, bytes(hex))).collect()
}

fn to_b(sequence: u16) -> Message {
    Message {
        ends: Ends { to: 1, ..Ends::default() },
        sequence,
        piggyack: 1,
        matching: 0x0123_4567_89ab_cdef,
        session: 0x5566_7788,
        ..Message::default()
    }
}

#[test]
fn the_golden_bytes_are_these() {
    let golden = golden();
    let ends = Ends { from: 1, ..Ends::default() };
    let (session, own_session, length) = (0x1122_3344, 0x5566_7788, 1_000_000);
    let window = Window { id: 4, sequence: 0x17, offset: 0 };
    let cookie = Cookie { handle: 0x23, magic: 0x2107_1981 };
    let data: Vec<u8> = (0..904u32).map(|i| (i * 7 % 251) as u8).collect();
    let bytes: Vec<u8> = (0..40).collect();
    let to = Ends { to: 1, ..Ends::default() };
    let magic = 0x1305_2008;
    let frames = [
        ("connect", Frame::Connect { ends: to, index: 2, session, key: 0x12345, expects: 1, number: 0 }),
        (
            "connected",
            Frame::Connected {
                ends,
                index: 1,
                session,
                own_session,
                expects: 1,
                number: 0,
                status: CONNECTED,
            },
        ),
        ("tiny", Frame::Tiny { message: to_b(1), data: b"abc" }),
        ("small", Frame::Small { message: to_b(2), data: &bytes }),
        ("ack", Frame::Ack { ends, session, next: 2, number: 1, sent: 2, resent: 0 }),
        (
            "medium-wire",
            Frame::Medium { message: to_b(2), total: 5000, fragment: 1, offset: 4096, data: &data },
        ),
        (
            "medium-own",
            Frame::Medium { message: to_b(2), total: 100_000, fragment: 3, offset: 24_576, data: &data },
        ),
        ("rendezvous", Frame::Rendezvous { message: to_b(3), length, window }),
        (
            "pull-wire",
            Frame::Pull { ends, session, length, window, cookie, skip: 0, block: 0x8000, first: 0 },
        ),
        (
            "pull-own",
            Frame::Pull {
                ends,
                session,
                length,
                window: Window { offset: 70_000, ..window },
                cookie,
                skip: 5,
                block: 286_976,
                first: 32,
            },
        ),
        ("pull-reply", Frame::PullReply { frame: 1, offset: 4096, cookie, data: &bytes[..16] }),
        ("notify", Frame::Notify { ends, session, length, window, sequence: 1, piggyack: 4 }),
        (
            "nack-lib",
            Frame::NackLib { to: 1, from: 0, generation: 0, why: ENDPOINT_CLOSED, index: 2, sequence: 3 },
        ),
        ("nack-pull", Frame::NackPull { from: 1, generation: 0, why: BAD_WINDOW, cookie }),
        ("host-query", Frame::HostQuery { index: 2, magic }),
        ("host-reply", Frame::HostReply { index: 1, magic, name: b"worker-7\0" }),
        ("discovery", Frame::Discovery { nic: 0x200_0000_0001, serial: 0xcafe }),
    ];
    assert_eq!(frames.len(), golden.len());
    for (name, frame) in frames {
        let bytes = &golden[name];
        let profile = if name.ends_with("own") { OWN } else { Profile::WIRE };
        let (head, decoded) = decode(bytes, &profile).expect(name);
        assert_eq!(decoded, frame, "{name}");
        let (destination, source, peer_index) = match name {
            "discovery" => ([0xFF; 6], A, 0),
            _ if head.source == A => (B, A, 1),
            _ => (A, B, 2),
        };
        assert_eq!(head, Head { destination, source, ethertype: ETHERTYPE, peer_index }, "{name}");
        let mut out = [0; 2000];
        let len = encode(&head, &frame, &profile, &mut out).expect(name);
        assert_eq!(&out[..len], &bytes[..], "{name}");
    }
}

#[test]
fn what_the_other_dialect_says_is_something_else() {
    let golden = golden();
    let told = decode(&golden["pull-wire"], &OWN).map(|decoded| decoded.1);
    assert_ne!(told, decode(&golden["pull-wire"], &Profile::WIRE).map(|decoded| decoded.1));
}

#[test]
fn sizes_follow_the_mtu() {
    let of = |mtu| (Profile::own(mtu).fragment, Profile::own(mtu).reply);
    assert_eq!((of(9000), of(1500), of(4144)), ((8192, 8968), (1452, 1468), (4096, 4112)));
    assert_eq!(of(65535), (8192, 65503));
    for mtu in [9000, 9216, 9217, 65535] {
        let Profile { reply, replies, .. } = Profile::own(mtu);
        let block = u32::from(reply) * u32::from(replies);
        assert!((255 << 10..=288 << 10).contains(&block), "{mtu}: {block}");
    }
}

#[test]
fn a_length_is_what_its_field_says() {
    let golden = golden();
    // The padding is nobody's data, and a length beyond the frame is refused.
    for (name, at) in [("tiny", 20), ("small", 20), ("medium-wire", 40), ("pull-reply", 18)] {
        let mut bytes = golden[name].clone();
        bytes[at..at + 2].copy_from_slice(&u16::MAX.to_be_bytes());
        let error = decode(&bytes, &Profile::WIRE).expect_err(name);
        assert!(matches!(error.problem, Problem::TooBig { .. }), "{name}: {error}");
        let cut = &golden[name][..golden[name].len().min(56) - 16];
        assert!(decode(cut, &Profile::WIRE).is_err(), "{name}");
    }
}

/// Stations leave in them what was in the memory before.
#[test]
fn bytes_that_mean_nothing_may_be_anything() {
    let golden = golden();
    // From, and up to.
    let nothing: [(&str, &[(usize, usize)]); 17] = [
        ("connect", &[(19, 20), (21, 24), (28, 32), (44, 60)]),
        ("connected", &[(19, 20), (21, 24), (28, 32), (45, 60)]),
        ("tiny", &[(43, 60)]),
        ("small", &[]),
        ("ack", &[(21, 24), (29, 30), (43, 60)]),
        ("medium-wire", &[(22, 24), (46, 48)]),
        ("medium-own", &[(46, 48)]),
        ("rendezvous", &[(48, 60)]),
        ("pull-wire", &[(48, 60)]),
        ("pull-own", &[(33, 36)]),
        ("pull-reply", &[(48, 60)]),
        ("notify", &[(30, 34), (38, 60)]),
        ("nack-lib", &[(20, 25), (30, 60)]),
        ("nack-pull", &[(20, 24), (32, 60)]),
        ("host-query", &[(17, 18), (20, 24), (28, 60)]),
        ("host-reply", &[(20, 24), (28, 32), (41, 60)]),
        ("discovery", &[(17, 32), (44, 60)]),
    ];
    assert_eq!(nothing.len(), golden.len());
    for (name, ranges) in nothing {
        let profile = if name.ends_with("own") { OWN } else { Profile::WIRE };
        let expected = decode(&golden[name], &profile).expect(name);
        for at in ranges.iter().flat_map(|(from, to)| *from..*to) {
            for byte in [1, 0x55, 0xFF] {
                let mut bytes = golden[name].clone();
                bytes[at] = byte;
                let (head, mut frame) = decode(&bytes, &profile).expect(name);
                if let Frame::Connect { ends, .. } | Frame::Connected { ends, .. } = &mut frame {
                    // Who wants to may know it.
                    ends.generation = 0;
                }
                assert_eq!((head, frame), expected, "{name}, byte {at}");
            }
        }
        // The checksum of others is not known to be one.
        if ["tiny", "small", "rendezvous"].contains(&name) {
            let mut bytes = golden[name].clone();
            bytes[22] ^= 0xFF;
            assert!(decode(&bytes, &profile).is_ok(), "{name}");
        }
    }
}

#[test]
fn the_placement_of_a_fragment_is_its_sender_s() {
    let mut bytes = golden()["medium-wire"].clone();
    bytes[43] = 10;
    let (_, frame) = decode(&bytes, &Profile::WIRE).expect("a fragment");
    assert!(matches!(frame, Frame::Medium { offset: 1024, .. }));
    bytes[43] = 200;
    assert!(decode(&bytes, &Profile::WIRE).is_err());
}

#[test]
fn types_that_nobody_serves_are_refused() {
    for kind in [0, 2, 5, 32, 33, 34, 46, 255] {
        let mut bytes = golden()["tiny"].clone();
        bytes[16] = kind;
        let error = decode(&bytes, &Profile::WIRE).expect_err("not served");
        assert_eq!(error.problem, Problem::Unknown(kind.into()));
    }
}

#[test]
fn a_stamped_frame_says_what_its_station_knows() {
    for (name, frame) in golden() {
        let profile = if name.ends_with("own") { OWN } else { Profile::WIRE };
        let mut stamped = frame.clone();
        stamp(&mut stamped, [7; 6], 0x88B5, 0x0102, 0x0304).expect(name);
        let (before, _) = decode(&frame, &profile).expect(name);
        let profile = Profile { ethertype: 0x88B5, ..profile };
        let (head, after) = decode(&stamped, &profile).expect(name);
        let expected = Head { source: [7; 6], ethertype: 0x88B5, peer_index: 0x0102, ..before };
        assert_eq!(head, expected, "{name}");
        match after {
            Frame::Connect { index, .. } | Frame::Connected { index, .. } => assert_eq!(index, 0x0304),
            _ => assert_eq!(stamped[HEAD_LEN..], frame[HEAD_LEN..], "{name}"),
        }
        let short = if type_of(&frame) == Some(CONNECT) { 27 } else { 15 };
        assert!(stamp(&mut stamped[..short], [7; 6], 1, 2, 3).is_err());
    }
}

#[test]
fn a_magic_says_whose_pull_it_is() {
    for (endpoint, magic) in [(1, 0x2107_1981), (0, 0x2107_1980), (0x81, 0x2107_1901)] {
        assert_eq!(Cookie { handle: 0, magic }.endpoint(), endpoint);
    }
}

#[test]
fn the_checksum_is_the_known_one() {
    assert_eq!(checksum(b"123456789"), 0x31C3);
    assert_eq!(checksum(b""), 0);
}

proptest! {
    #[test]
    fn garbage_is_refused_or_comes_back(
        kind: u8, body in prop::collection::vec(any::<u8>(), 0..300), own: bool,
    ) {
        let profile = if own { OWN } else { Profile::WIRE };
        let mut bytes = vec![0; 12];
        bytes.extend_from_slice(&ETHERTYPE.to_be_bytes());
        bytes.extend_from_slice(&[0, 1, if kind > 45 { 30 + kind % 16 } else { kind }]);
        bytes.extend_from_slice(&body);
        let Ok((head, frame)) = decode(&bytes, &profile) else { return Ok(()) };
        let mut out = vec![0; 1 << 17];
        // Another unit than ours is understood, and never sent.
        if let Ok(len) = encode(&head, &frame, &profile, &mut out) {
            prop_assert_eq!(decode(&out[..len], &profile), Ok((head, frame)));
        }
    }
}

proptest! {
    #[test]
    fn the_head_of_a_reply_is_believed_where_the_frame_is(
        body in prop::collection::vec(any::<u8>(), 0..100), kind in 41..44u8, len in 0..80u16, own: bool,
    ) {
        let profile = if own { OWN } else { Profile::WIRE };
        let mut bytes = vec![0; 12];
        bytes.extend_from_slice(&ETHERTYPE.to_be_bytes());
        bytes.extend_from_slice(&[0, 1, kind]);
        bytes.extend_from_slice(&body);
        if let Some(field) = bytes.get_mut(18..20) {
            field.copy_from_slice(&len.to_be_bytes());
        }
        let beginning = &bytes[..bytes.len().min(REPLY_HEAD_LEN)];
        let found = ReplyHead::decode(beginning, bytes.len());
        let whole = decode(&bytes, &profile).ok();
        let expected = whole.and_then(|(head, frame)| match frame {
            Frame::PullReply { frame, offset, cookie, data } => {
                Some(ReplyHead { head, frame, offset, cookie, len: data.len() as u16 })
            }
            _ => None,
        });
        prop_assert_eq!(found, expected);
    }
}

proptest! {
    #[test]
    fn the_head_of_a_reply_is_what_the_whole_frame_begins_with(
        frame: u8,
        offset: u32,
        handle: u32,
        magic: u32,
        peer_index: u16,
        len in 0..4096usize,
    ) {
        let head = Head { destination: [1; 6], source: [2; 6], ethertype: ETHERTYPE, peer_index };
        let (cookie, data) = (Cookie { handle, magic }, std::vec![7; len]);
        let mut bytes = [0; 5000];
        let whole = Frame::PullReply { frame, offset, cookie, data: &data };
        let end = encode(&head, &whole, &Profile::WIRE, &mut bytes).expect("a reply");
        let reply = ReplyHead { head, frame, offset, cookie, len: len as u16 };
        prop_assert_eq!(&reply.encode()[..], &bytes[..REPLY_HEAD_LEN]);
        prop_assert_eq!(ReplyHead::decode(&bytes[..REPLY_HEAD_LEN], end), Some(reply));
        prop_assert_eq!(ReplyHead::decode(&bytes[..REPLY_HEAD_LEN], REPLY_HEAD_LEN + len - 1), None);
        prop_assert_eq!(ReplyHead::decode(&bytes[..REPLY_HEAD_LEN - 1], end), None);
    }
}
