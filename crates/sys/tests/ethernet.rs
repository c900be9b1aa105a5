//! Frames between the two ends of a veth pair, in a network of the test's own.

use std::process::Command;
use std::time::Duration;

use isthmus_sys::ethernet::{HEADER, Link, Mac};
use isthmus_sys::{capability, poll};
use std::os::fd::AsFd;

const TYPE: u16 = 0x86DF;
/// Long after everything has happened.
const LIMIT: Duration = Duration::from_secs(20);

/// Run `test` in a thread with a network of its own, in which `one` and `two` are connected; or say why not.
fn with_cable(mtu: usize, test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: changes what this thread sees, and nothing else.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            println!("SKIPPED: no new network here: {}", std::io::Error::last_os_error());
            return;
        }
        let mtu = mtu.to_string();
        let lines: [&[&str]; 3] = [
            &["link", "add", "one", "mtu", &mtu, "type", "veth", "peer", "name", "two", "mtu", &mtu],
            &["link", "set", "one", "up"],
            &["link", "set", "two", "up"],
        ];
        for line in lines {
            match Command::new("ip").args(line).status() {
                Ok(status) if status.success() => {}
                other => {
                    println!("SKIPPED: ip {}: {other:?}", line.join(" "));
                    return;
                }
            }
        }
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn frame(to: Mac, from: Mac, kind: u16, len: usize) -> Vec<u8> {
    let mut frame = [&to[..], &from[..], &kind.to_be_bytes()].concat();
    frame.extend((0..len).map(|i| (i % 251) as u8));
    frame
}

fn next(link: &mut Link) -> Vec<u8> {
    let mut got = Vec::new();
    while got.is_empty() {
        let ready = poll::wait_readable(link.as_fd(), Some(LIMIT)).expect("poll");
        assert!(ready.readable, "no frame came");
        link.receive(1, |frame| got = frame.to_vec());
    }
    got
}

#[test]
fn frames_arrive_whole_and_for_any_address() {
    with_cable(9000, || {
        let mut one = Link::open("one", TYPE, 9000).expect("an interface");
        let mut two = Link::open("two", TYPE, 9000).expect("an interface");
        assert_eq!((one.mtu(), one.is_up().expect("a state")), (9000, true));
        assert_ne!((one.index(), one.mac()), (two.index(), two.mac()));
        let elsewhere = [2, 0, 0, 0, 0, 9];
        two.add_unicast(elsewhere).expect("one more address");
        capability::drop_all().expect("fewer rights");
        for (to, len) in [(two.mac(), 46), (elsewhere, 9000), ([2, 7, 7, 7, 7, 7], 1500), ([0xFF; 6], 50)] {
            let sent = frame(to, one.mac(), TYPE, len);
            assert!(one.send(&sent).expect("sent"));
            assert!(one.send(&frame(to, one.mac(), 0x88B5, 50)).expect("another type"));
            assert_eq!(next(&mut two), sent);
        }
        // More than the ring has slots: it goes round.
        for number in 0..3000 {
            let sent = frame(one.mac(), two.mac(), TYPE, 46 + number % 4000);
            assert!(two.send(&sent).expect("sent"));
            assert_eq!(next(&mut one), sent);
        }
        assert_eq!(two.receive(100, |_| panic!("what was sent came back")), 0);
        assert!(
            one.send(&frame(elsewhere, one.mac(), TYPE, 9001)).is_err(),
            "longer than the interface takes"
        );
        two.remove_unicast(elsewhere).expect("it was added");
        assert_eq!(two.dropped().expect("a count"), 0);
    });
}

#[test]
fn what_finds_no_room_is_counted() {
    with_cable(1500, || {
        let one = Link::open("one", TYPE, 9000).expect("an interface");
        let mut two = Link::open("two", TYPE, 9000).expect("an interface");
        let mut sent = 0;
        while two.dropped().expect("a count") == 0 {
            assert!(sent < 100_000, "the ring has no end");
            sent += usize::from(one.send(&frame(two.mac(), one.mac(), TYPE, 1000)).expect("sent"));
        }
        let got = two.receive(usize::MAX, |frame| assert_eq!(frame.len(), HEADER + 1000));
        assert!(got > 1000 && got < sent);
    });
}

#[test]
fn what_is_no_interface_is_refused() {
    with_cable(1500, || {
        for name in ["none", "", "a-name-longer-than-any", "o\0e"] {
            assert!(Link::open(name, TYPE, 9000).is_err(), "{name:?}");
        }
        let one = Link::open("one", TYPE, 9000).expect("an interface");
        assert!(Command::new("ip").args(["link", "del", "two"]).status().expect("ip").success());
        assert!(one.is_up().is_err());
        assert!(one.send(&frame([2; 6], one.mac(), TYPE, 50)).is_err());
        assert!(one.take_error().is_some());
        assert!(one.take_error().is_none());
    });
}
