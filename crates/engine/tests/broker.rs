//! Programs and brokers that do not read, or are gone.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use isthmus_engine::node::sockets::{Brought, Host, Visitor};
use isthmus_engine::node::{Attachment, ConnectRequest, Node};
use isthmus_engine::outbox::OUTBOX_MAX;
use isthmus_engine::{Error, Result};
use isthmus_sys::packet;
use isthmus_wire::control::{self, MESSAGE_MAX, Message, SocketKind};
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

/// A program that is attached, and the broker's end.
fn attached(name: &str, attach: impl FnOnce(&Path) -> Result<Arc<Attachment>>) -> (Arc<Attachment>, OwnedFd) {
    let door = PathBuf::from(format!("/tmp/isthmus-broker-{}-{name}", std::process::id()));
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
    let program = attach(&door).expect("a broker");
    let end = broker.join().expect("the broker");
    std::fs::remove_file(door).expect("its door");
    (program, end)
}

fn host(name: &str) -> (Arc<Attachment>, OwnedFd) {
    attached(name, |door| Node::attach_host(door, name, Arc::new(Quiet)))
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
    let (host, broker) = host("busy");
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
    let (host, _broker) = host("dead");
    let told = (0..10_000).take_while(|connection| host.accept_socket(*connection, None).is_ok()).count();
    assert!(told > OUTBOX_MAX && told < 10_000, "{told}");
}

#[test]
fn who_hears_that_the_broker_is_gone_may_ask_again() {
    let (program, broker) = attached("gone", |door| Node::attach(door, "gone"));
    drop(broker);
    while program.attached() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let request = ConnectRequest {
        to: "b".into(),
        port: 1,
        from_port: 0,
        kind: SocketKind::Stream,
        require: None,
        small: 8192,
        large: 0,
    };
    let (tx, rx) = mpsc::channel();
    // In a thread of its own: if it waits for itself, this test ends all the same.
    std::thread::spawn(move || {
        let (again, other) = (Arc::clone(&*program), request.clone());
        let then = move |_| again.connect_then(other, Box::new(move |result| drop(tx.send(result.err()))));
        program.connect_then(request, Box::new(then));
    });
    let error = rx.recv_timeout(Duration::from_secs(20)).expect("an answer to the second question");
    assert!(matches!(error, Some(Error::BrokerLost)), "{error:?}");
}
