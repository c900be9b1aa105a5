//! A host and a broker that does not read.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use isthmus_engine::node::sockets::{Brought, Host, Visitor};
use isthmus_engine::node::{Attachment, Node};
use isthmus_engine::outbox::OUTBOX_MAX;
use isthmus_sys::packet;
use isthmus_wire::control::{self, MESSAGE_MAX, Message};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

struct Quiet;

impl Host for Quiet {
    fn incoming(&self, _: &Arc<Node>, _: Visitor) {}
    fn cut(&self, _: u64, _: &str) {}
    fn attached(&self, _: &Arc<Node>) {}
    fn held(&self) -> Vec<Brought> {
        Vec::new()
    }
}

/// A host that is attached, and the broker's end.
fn attached(name: &str) -> (Arc<Attachment>, OwnedFd) {
    let door = PathBuf::from(format!("/tmp/isthmus-host-{}-{name}", std::process::id()));
    let listener =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .expect("a socket");
    rustix::net::bind(&listener, &SocketAddrUnix::new(&door).expect("a short path")).expect("a free path");
    rustix::net::listen(&listener, 1).expect("to listen");
    let broker = std::thread::spawn(move || {
        let end = rustix::net::accept_with(&listener, SocketFlags::CLOEXEC).expect("a program");
        assert_eq!(heard(&end), Heard::Other);
        let (domain_name, node) = ("domain", "node");
        let welcome =
            Message::Welcome { features: 0, domain: 1, domain_name, node, ring_max: 1 << 28, epoch: 1 };
        let mut packet = [0; MESSAGE_MAX];
        let len = control::encode(1, &welcome, &mut packet).expect("a message");
        packet::send(end.as_fd(), &packet[..len], &[]).expect("a program that listens");
        end
    });
    let host = Node::attach_host(&door, "host", Arc::new(Quiet)).expect("a broker");
    let end = broker.join().expect("the broker");
    std::fs::remove_file(door).expect("its door");
    (host, end)
}

#[derive(Debug, PartialEq, Eq)]
enum Heard {
    Taken(u64),
    Accepted(u64),
    Other,
}

fn heard(end: &OwnedFd) -> Heard {
    let mut buffer = [0; MESSAGE_MAX];
    let (len, _) = packet::receive(end.as_fd(), &mut buffer).expect("a packet");
    match control::decode(&buffer[..len]).expect("a message").1 {
        Message::TakeSocket { connection } => Heard::Taken(connection),
        Message::Accept { connection, .. } => Heard::Accepted(connection),
        _ => Heard::Other,
    }
}

#[test]
fn what_a_busy_broker_has_no_room_for_is_told_later() {
    let (host, broker) = attached("busy");
    // Far more than its socket holds.
    let told = (0..10_000).take_while(|connection| host.take_socket(*connection)).count() as u64;
    assert!(told > OUTBOX_MAX as u64 / 2 && told < 10_000, "{told}");
    host.accept_socket(7, None).expect("room for what matters");
    for connection in 0..told {
        assert_eq!(heard(&broker), Heard::Taken(connection));
    }
    assert_eq!(heard(&broker), Heard::Accepted(7));
    assert!(host.take_socket(8));
    assert_eq!(heard(&broker), Heard::Taken(8));
}

#[test]
fn a_broker_that_never_reads_is_none() {
    let (host, _broker) = attached("dead");
    let told = (0..10_000).take_while(|connection| host.accept_socket(*connection, None).is_ok()).count();
    assert!(told > OUTBOX_MAX && told < 10_000, "{told}");
}
