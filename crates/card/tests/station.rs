//! Cards on one wire, programs at them, and strangers: without a wire, a program or a clock.

use std::collections::HashMap;

use isthmus_card::{Buffer, Config, DomainCounters, Faults, PortId, Sent, Station, mac_of};
use isthmus_wire::card::{self, ANY_ENDPOINT, FRAME_HEAD, Opening, Record};
use isthmus_wire::mxoe::{
    self, BAD_ENDPOINT, BROADCAST, Cookie, ENDPOINT_CLOSED, ETHERTYPE, Ends, Frame, Head, INDEX_UNKNOWN,
    Message, Profile, Window,
};
use proptest::prelude::*;

const MTU: usize = 9000;
const WORKER: u64 = 0x0200_0000_0001;
const STORE: u64 = 0x0200_0000_0002;
const OTHER: u64 = 0x0200_0000_0003;
/// A station that is no card.
const STRANGER: u64 = 0x0200_0000_0099;
const SECOND: u64 = 1_000_000;

fn nic_of(domain: &str) -> u64 {
    match domain {
        "worker" => WORKER,
        "store" => STORE,
        "other" | "twin" => OTHER,
        "group" => 0x0100_0000_0001,
        _ => 0,
    }
}

fn config() -> Config {
    Config { serial: 7, between_domains: true, ..Config::default() }
}

/// A card with its programs, and what they were sent.
struct Host {
    station: Station,
    now: u64,
    got: HashMap<PortId, Vec<Vec<u8>>>,
    /// Programs that take nothing.
    deaf: bool,
}

impl Host {
    fn new(config: Config) -> Self {
        let station = Station::new(config, MTU, Box::new(nic_of));
        Self { station, now: 0, got: HashMap::new(), deaf: false }
    }

    fn with(config: Config, programs: &[(PortId, &str)]) -> Self {
        let mut host = Self::new(config);
        for (port, domain) in programs {
            host.station.attach(*port, domain, 0).expect("room");
            assert_eq!(host.open(*port, 0).0, Opening::Opened);
        }
        host
    }

    fn quiet(programs: &[(PortId, &str)]) -> Self {
        Self::with(Config { discovery: false, ..config() }, programs)
    }

    fn deliver(&mut self, delivery: Option<isthmus_card::Delivery>, frame: &[u8]) {
        let Some(delivery) = delivery else { return };
        let times = if self.deaf { 0 } else { delivery.times };
        for _ in 0..times {
            let record = [&delivery.head[..], &frame[16..]].concat();
            self.got.entry(delivery.port).or_default().push(record);
        }
        self.station.delivered(&delivery, times, frame.len());
    }

    /// A program says something; what the card answers.
    fn say(&mut self, port: PortId, record: &[u8]) -> Vec<u8> {
        let (mut buffer, mut answer) = (Buffer::new(self.station.record_max()), Vec::new());
        buffer.fill(|room| {
            let len = if record.len() > room.len() { 0 } else { record.len() };
            room[..len].copy_from_slice(&record[..len]);
            (len, ())
        });
        let delivery = self.station.handle_record(self.now, port, &mut buffer, &mut answer);
        self.deliver(delivery, buffer.record().get(2..).unwrap_or_default());
        answer
    }

    fn ask(&mut self, port: PortId, record: &Record<'_>) -> Vec<u8> {
        let mut bytes = [0; 200];
        let len = card::encode(record, &mut bytes).expect("a record");
        self.say(port, &bytes[..len])
    }

    fn open(&mut self, port: PortId, endpoint: u16) -> (Opening, u8) {
        match card::decode(&self.ask(port, &Record::Open { endpoint })) {
            Ok(Record::Opened { status, endpoint, mtu: 9000, .. }) => (status, endpoint),
            other => panic!("{other:?}"),
        }
    }

    /// A program sends a frame, and says of itself whatever it likes.
    fn send(&mut self, port: PortId, to: u64, frame: &Frame<'_>) -> Vec<u8> {
        self.say(port, &[&FRAME_HEAD[..], &bytes([9; 6], to, 0x7777, frame)].concat())
    }

    fn hear(&mut self, frame: &[u8]) {
        let delivery = self.station.handle_frame(self.now, frame);
        self.deliver(delivery, frame);
    }

    fn hear_from(&mut self, from: u64, to: u64, index: u16, frame: &Frame<'_>) {
        self.hear(&bytes(mac_of(from), to, index, frame));
    }

    fn sent(&mut self) -> Vec<Vec<u8>> {
        let mut sent = Vec::new();
        self.station.poll_transmit(usize::MAX, |frame| {
            sent.push(frame.to_vec());
            Sent::Yes
        });
        sent
    }

    /// What a program has got since it was last asked.
    fn got(&mut self, port: PortId) -> Vec<Vec<u8>> {
        self.got.remove(&port).unwrap_or_default()
    }

    fn counted(&self, domain: &str) -> DomainCounters {
        *self.station.domains().find(|(name, _)| *name == domain).expect("a domain").1
    }

    fn wait_until(&mut self, us: u64) {
        while let Some(due) = self.station.poll_timeout().filter(|due| *due <= us) {
            self.now = self.now.max(due);
            self.station.handle_timeout(self.now);
        }
        self.now = us;
    }
}

/// Everything that either sends arrives at the other, until both are silent.
fn exchange(one: &mut Host, two: &mut Host) {
    loop {
        let (from_one, from_two) = (one.sent(), two.sent());
        if from_one.is_empty() && from_two.is_empty() {
            return;
        }
        from_one.iter().for_each(|frame| two.hear(frame));
        from_two.iter().for_each(|frame| one.hear(frame));
    }
}

fn bytes(source: [u8; 6], to: u64, peer_index: u16, frame: &Frame<'_>) -> Vec<u8> {
    let head = Head { destination: mac_of(to), source, ethertype: ETHERTYPE, peer_index };
    let mut bytes = vec![0; 9100];
    let len = mxoe::encode(&head, frame, &Profile::WIRE, &mut bytes).expect("a frame");
    bytes.truncate(len);
    bytes
}

fn decode(frame: &[u8]) -> (Head, Frame<'_>) {
    mxoe::decode(frame, &Profile::WIRE).expect("a good frame")
}

/// The frame in a record.
fn in_record(record: &[u8]) -> (Head, Frame<'_>) {
    match card::decode(record) {
        Ok(Record::Frame(frame)) => decode(frame),
        other => panic!("{other:?}"),
    }
}

fn ends(to: u8, from: u8) -> Ends {
    Ends { to, from, generation: 0 }
}

fn connect(to: u8, from: u8) -> Frame<'static> {
    Frame::Connect { ends: ends(to, from), index: 0x5555, session: 1, key: 2, expects: 1, number: 0 }
}

fn connected(to: u8, from: u8) -> Frame<'static> {
    let ends = ends(to, from);
    Frame::Connected { ends, index: 0x5555, session: 1, own_session: 2, expects: 1, number: 0, status: 0 }
}

fn tiny(to: u8, from: u8) -> Frame<'static> {
    Frame::Tiny { message: Message { ends: ends(to, from), sequence: 3, ..Message::default() }, data: b"abc" }
}

fn ack(to: u8, from: u8) -> Frame<'static> {
    Frame::Ack { ends: ends(to, from), session: 1, next: 2, number: 1, sent: 2, resent: 0 }
}

fn cookie(endpoint: u8) -> Cookie {
    Cookie { handle: 5, magic: 0x2107_1980 ^ u32::from(endpoint) }
}

fn pull(to: u8, from: u8, replies_to: u8) -> Frame<'static> {
    Frame::Pull {
        ends: ends(to, from),
        session: 1,
        length: 10,
        window: Window::default(),
        cookie: cookie(replies_to),
        skip: 0,
        block: 10,
        first: 0,
    }
}

#[test]
fn an_endpoint_is_one_connection_s() {
    let mut host = Host::new(Config { endpoints: 3, ..config() });
    let mut port = 0;
    let mut fresh = |host: &mut Host, domain: &str| {
        port += 1;
        host.station.attach(port, domain, 0).expect("room");
        port
    };
    let first = fresh(&mut host, "worker");
    assert_eq!(host.open(first, 1), (Opening::Opened, 1));
    assert_eq!(host.open(first, 2).0, Opening::Busy, "this connection has one");
    let next = fresh(&mut host, "worker");
    for (endpoint, status) in [(1, Opening::Busy), (3, Opening::BadEndpoint), (256, Opening::BadEndpoint)] {
        assert_eq!(host.open(next, endpoint).0, status);
    }
    assert_eq!(host.open(next, ANY_ENDPOINT), (Opening::Opened, 0));
    let next = fresh(&mut host, "worker");
    assert_eq!(host.open(next, ANY_ENDPOINT), (Opening::Opened, 2));
    let next = fresh(&mut host, "worker");
    assert_eq!(host.open(next, ANY_ENDPOINT).0, Opening::NoMore);
    host.station.detach(first);
    assert_eq!(host.open(next, ANY_ENDPOINT), (Opening::Opened, 1));
    // Another domain has its own.
    let next = fresh(&mut host, "store");
    assert_eq!(host.open(next, 1), (Opening::Opened, 1));
}

#[test]
fn only_an_address_that_a_station_can_have_makes_a_nic() {
    let mut host = Host::new(config());
    for (port, domain) in (1..).zip(["nobody", "group", "other", "twin"]) {
        let address = host.station.attach(port, domain, 0).expect("room");
        let (status, mac) = if domain == "other" {
            (Opening::Opened, Some(mac_of(OTHER)))
        } else {
            (Opening::NotAllowed, None)
        };
        assert_eq!((host.open(port, 0).0, address), (status, mac), "{domain}");
    }
    assert_eq!(host.station.attach(9, "other", 0), Ok(None), "the interface hears it already");
}

#[test]
fn two_cards_find_each_other_and_their_programs_talk() {
    let mut one = Host::with(config(), &[(1, "worker")]);
    let mut two = Host::with(config(), &[(1, "other"), (2, "store")]);
    for second in 0..3 {
        one.wait_until(second * SECOND);
        two.wait_until(second * SECOND);
        exchange(&mut one, &mut two);
    }
    let found = one.ask(1, &Record::Find { name: "store:0" });
    assert_eq!(card::decode(&found), Ok(Record::Found { found: true, nic: STORE, name: "store:0" }));
    let found = two.ask(1, &Record::FindNic { nic: WORKER });
    assert_eq!(card::decode(&found), Ok(Record::Found { found: true, nic: WORKER, name: "worker:0" }));
    let found = one.ask(1, &Record::Find { name: "nobody:0" });
    assert_eq!(card::decode(&found), Ok(Record::Found { found: false, nic: 0, name: "" }));

    one.send(1, STORE, &connect(0, 0));
    let asked = one.sent();
    assert_eq!(decode(&asked[0]).0.source, mac_of(WORKER), "whatever the program said");
    asked.iter().for_each(|frame| two.hear(frame));
    let got = two.got(2);
    let (head, frame) = in_record(&got[0]);
    assert!(matches!(frame, Frame::Connect { .. }));
    two.send(
        2,
        u64::from_be_bytes([&[0, 0][..], &head.source].concat().try_into().expect("8")),
        &connected(0, 0),
    );
    exchange(&mut one, &mut two);
    assert!(matches!(in_record(&one.got(1)[0]).1, Frame::Connected { .. }));
    // Now each knows what the other calls it.
    one.send(1, STORE, &tiny(0, 0));
    let sent = one.sent();
    let list = two.ask(2, &Record::Peers { first: 0 });
    let Ok(Record::PeerList(lines)) = card::decode(&list) else { panic!("no list") };
    let index = lines.peers().find(|peer| peer.nic == WORKER).expect("known").index;
    assert_eq!(u32::from(decode(&sent[0]).0.peer_index), index);
    two.hear(&sent[0]);
    let got = two.got(2);
    let (head, frame) = in_record(&got[0]);
    assert_eq!(u32::from(head.peer_index), index);
    assert!(matches!(frame, Frame::Tiny { data: b"abc", .. }));
    assert_eq!((one.station.totals().stale_index, two.station.totals().stale_index), (0, 0));
    assert_eq!(two.counted("store").received_frames, 2);
    assert!(two.got(1).is_empty(), "nobody else hears it");
}

#[test]
fn a_hostile_program_hurts_only_itself() {
    let mut host = Host::quiet(&[(1, "worker"), (2, "store")]);
    host.station.attach(3, "worker", 0).expect("room");
    host.hear_from(STRANGER, WORKER, 0, &connect(0, 0));
    host.got(1);
    type Counted = fn(&DomainCounters) -> u64;
    let wrong: Counted = |counted| counted.wrong_endpoint;
    let unknown: Counted = |counted| counted.unknown_peer;
    let station: Counted = |counted| counted.not_for_programs;
    let frames: [(PortId, u64, Frame<'_>, Counted); 11] = [
        (1, STRANGER, tiny(0, 1), wrong),
        (1, STRANGER, pull(0, 0, 1), wrong),
        (1, STRANGER, Frame::NackLib { to: 1, from: 0, generation: 0, why: 1, index: 0, sequence: 0 }, wrong),
        (3, STRANGER, tiny(0, 0), wrong),
        (1, OTHER, tiny(0, 0), unknown),
        (1, 0xFFFF_FFFF_FFFF, connect(0, 0), unknown),
        (1, 0x0300_0000_0000, connect(0, 0), unknown),
        (1, 0xFFFF_FFFF_FFFF, Frame::Discovery { nic: WORKER, serial: 1 }, station),
        (1, STRANGER, Frame::HostQuery { index: 0, magic: 0 }, station),
        (1, STRANGER, Frame::HostReply { index: 0, magic: 0, name: b"x\0" }, station),
        (1, WORKER, Frame::HostQuery { index: 0, magic: 0 }, station),
    ];
    for (port, to, frame, counted) in frames {
        let before = counted(&host.counted("worker"));
        assert!(host.send(port, to, &frame).is_empty());
        assert_eq!(counted(&host.counted("worker")), before + 1, "{frame:?}");
    }
    let long = [&FRAME_HEAD[..], &bytes([2; 6], STRANGER, 0, &tiny(0, 0)), &[0; 9000]].concat();
    for record in [&long[..], &[3, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4], &[3, 0], &[2, 0], &[99], &[]]
    {
        let before = host.counted("worker");
        assert!(host.say(1, record).is_empty());
        let after = host.counted("worker");
        assert_eq!(after.bad_frames + after.bad_records, before.bad_frames + before.bad_records + 1);
    }
    assert!(host.sent().is_empty());
    assert!(host.got.is_empty());
    assert_eq!(host.counted("store"), DomainCounters::default());
}

#[test]
fn nobody_on_the_wire_is_one_of_us() {
    let mut host = Host::quiet(&[(1, "worker"), (2, "store")]);
    host.hear_from(STORE, WORKER, 0, &connect(0, 0));
    host.hear_from(WORKER, WORKER, 0, &connect(0, 0));
    assert_eq!(host.station.totals().spoofed, 2);
    host.hear_from(0x0300_0000_0001, WORKER, 0, &connect(0, 0));
    host.hear_from(STRANGER, 0xFFFF_FFFF_FFFF, 0, &connect(0, 0));
    host.hear_from(OTHER, STRANGER, 0, &connect(0, 0));
    host.hear_from(STRANGER, WORKER, 0, &Frame::Discovery { nic: OTHER, serial: 1 });
    host.hear(&[0; 5]);
    assert_eq!((host.station.totals().bad_frames, host.station.totals().foreign), (3, 1));
    assert!(host.got.is_empty() && host.sent().is_empty());
    let found = host.ask(1, &Record::FindNic { nic: OTHER });
    assert!(matches!(card::decode(&found), Ok(Record::Found { found: false, .. })));
}

#[test]
fn whoever_is_not_known_connects_first() {
    for open_peers in [true, false] {
        let mut host = Host::with(Config { open_peers, discovery: false, ..config() }, &[(1, "worker")]);
        host.hear_from(STRANGER, WORKER, 0, &tiny(0, 0));
        host.hear_from(STRANGER, WORKER, 0, &connected(0, 0));
        assert_eq!(host.station.totals().unknown_peer, 2);
        host.hear_from(STRANGER, WORKER, INDEX_UNKNOWN, &connect(0, 0));
        host.hear_from(STRANGER, WORKER, INDEX_UNKNOWN, &tiny(0, 0));
        assert_eq!(host.got(1).len(), if open_peers { 2 } else { 0 });
    }
    let peers = vec![(STRANGER, "stranger:0".to_owned())];
    let mut host = Host::with(Config { open_peers: false, peers, ..config() }, &[(1, "worker")]);
    host.hear_from(STRANGER, WORKER, INDEX_UNKNOWN, &tiny(0, 0));
    assert_eq!(host.got(1).len(), 1, "the operator named it");
    let found = host.ask(1, &Record::Find { name: "stranger:0" });
    assert!(matches!(card::decode(&found), Ok(Record::Found { nic: STRANGER, .. })));
}

#[test]
fn an_index_is_counted_and_never_believed() {
    let mut host = Host::quiet(&[(1, "worker")]);
    host.hear_from(OTHER, WORKER, INDEX_UNKNOWN, &connect(0, 0));
    host.hear_from(STRANGER, WORKER, INDEX_UNKNOWN, &connect(0, 0));
    let own = in_record(&host.got(1)[1]).0.peer_index;
    // It says that it is the other.
    host.hear_from(STRANGER, WORKER, own - 1, &tiny(0, 0));
    let got = host.got(1);
    let (head, _) = in_record(&got[0]);
    assert_eq!((head.source, head.peer_index), (mac_of(STRANGER), own));
    assert_eq!(host.station.totals().stale_index, 1);
    host.hear_from(STRANGER, WORKER, own, &tiny(0, 0));
    let reply = Frame::PullReply { frame: 0, offset: 0, cookie: cookie(0), data: b"abc" };
    host.hear_from(STRANGER, WORKER, 0x4444, &reply);
    assert_eq!((host.got(1).len(), host.station.totals().stale_index), (2, 1));
    // What they call us, they say in a connect; and it goes back to them.
    host.send(1, STRANGER, &tiny(0, 0));
    assert_eq!(decode(&host.sent()[0]).0.peer_index, 0x5555);
}

/// A station that only makes itself known still has the table that it had.
#[test]
fn what_a_station_calls_us_is_forgotten_when_it_begins_anew() {
    let mut host = Host::quiet(&[(1, "worker")]);
    host.hear_from(STRANGER, WORKER, INDEX_UNKNOWN, &connect(0, 0));
    for (serial, index) in [(1, 0x5555), (1, 0x5555), (2, INDEX_UNKNOWN)] {
        host.hear_from(STRANGER, 0xFFFF_FFFF_FFFF, 0, &Frame::Discovery { nic: STRANGER, serial });
        host.send(1, STRANGER, &tiny(0, 0));
        assert_eq!(decode(&host.sent()[0]).0.peer_index, index, "{serial}");
    }
}

#[test]
fn an_endpoint_that_nobody_has_refuses_what_waits_for_an_answer() {
    let mut host = Host::quiet(&[(1, "worker"), (2, "store")]);
    host.hear_from(STRANGER, WORKER, INDEX_UNKNOWN, &connect(0, 4));
    let answer = |to: u8, sequence| {
        let why = if to < 64 { ENDPOINT_CLOSED } else { BAD_ENDPOINT };
        Some(Frame::NackLib { to, from: 4, generation: 0, why, index: 0x5555, sequence })
    };
    let why = ENDPOINT_CLOSED;
    let refused = Frame::NackPull { from: 4, generation: 0, why, cookie: cookie(4) };
    let reply = Frame::PullReply { frame: 0, offset: 0, cookie: cookie(9), data: b"abc" };
    let cases = [
        (connect(9, 4), answer(9, 0)),
        (tiny(9, 4), answer(9, 3)),
        (tiny(63, 4), answer(63, 3)),
        (tiny(64, 4), answer(64, 3)),
        (tiny(255, 4), answer(255, 3)),
        (pull(9, 4, 4), Some(refused)),
        (connected(9, 4), None),
        (ack(9, 4), None),
        (reply, None),
        (Frame::NackLib { to: 4, from: 9, generation: 0, why: 1, index: 0, sequence: 0 }, None),
        (Frame::NackPull { from: 9, generation: 0, why: 1, cookie: cookie(9) }, None),
    ];
    for (frame, expected) in &cases {
        host.hear_from(STRANGER, WORKER, INDEX_UNKNOWN, frame);
        let sent = host.sent();
        let got = sent.first().map(|frame| decode(frame));
        assert_eq!(got.map(|(_, frame)| frame), *expected, "{frame:?}");
        if let Some((head, _)) = got {
            assert_eq!((head.destination, head.source), (mac_of(STRANGER), mac_of(WORKER)));
            assert_eq!(head.peer_index, 0x5555);
        }
    }
    assert_eq!(host.counted("worker").no_endpoint, cases.len() as u64);
    // A domain of the same card answers in the same way, and at once.
    let answer = host.send(1, STORE, &tiny(9, 0));
    let (head, frame) = in_record(&answer);
    assert!(matches!(frame, Frame::NackLib { to: 9, from: 0, why: ENDPOINT_CLOSED, sequence: 3, .. }));
    assert_eq!((head.destination, head.source), (mac_of(WORKER), mac_of(STORE)));
    assert!(host.send(1, STORE, &ack(9, 0)).is_empty());
    assert!(host.sent().is_empty());
}

#[test]
fn what_the_rules_do_not_know_does_not_pass() {
    let config = Config { between_domains: false, discovery: false, ..config() };
    let mut host = Host::with(config, &[(1, "worker"), (2, "store")]);
    for frame in [connect(0, 0), tiny(0, 0), pull(0, 0, 0)] {
        assert!(host.send(1, STORE, &frame).is_empty());
    }
    assert!(host.got(2).is_empty() && host.sent().is_empty());
    assert_eq!(host.counted("worker").unknown_peer, 3);
    // To itself it may.
    host.send(1, WORKER, &tiny(0, 0));
    assert_eq!(host.got(1).len(), 1);
}

#[test]
fn domains_of_one_card_talk_without_the_wire() {
    let mut host = Host::quiet(&[(1, "worker"), (2, "store")]);
    let list = host.ask(2, &Record::Peers { first: 0 });
    let Ok(Record::PeerList(lines)) = card::decode(&list) else { panic!("no list") };
    let known: Vec<_> = lines.peers().map(|peer| (peer.nic, peer.name)).collect();
    assert_eq!(known, [(WORKER, "worker:0"), (STORE, "store:0")]);
    for frame in [connect(0, 0), tiny(0, 0), pull(0, 0, 0)] {
        assert!(host.send(1, STORE, &frame).is_empty());
    }
    let got = host.got(2);
    assert_eq!(got.len(), 3);
    let (head, frame) = in_record(&got[1]);
    assert_eq!((head.source, head.destination, head.peer_index), (mac_of(WORKER), mac_of(STORE), 0));
    assert_eq!(frame, tiny(0, 0));
    // And to itself.
    host.send(1, WORKER, &tiny(0, 0));
    assert_eq!(host.got(1).len(), 1);
    assert!(host.sent().is_empty());
    host.deaf = true;
    host.send(1, STORE, &tiny(0, 0));
    assert_eq!((host.counted("store").lane_full, host.counted("store").received_frames), (1, 3));
    assert_eq!(host.counted("worker").sent_frames, 5);
}

#[test]
fn one_domain_s_stations_leave_room_for_another_s() {
    let mut host = Host::quiet(&[(1, "worker"), (2, "store")]);
    for station in 0..300 {
        host.send(1, STRANGER + station, &connect(0, 0));
    }
    assert_eq!((host.sent().len(), host.counted("worker").not_learnt), (256, 44));
    host.send(2, STRANGER + 1000, &connect(0, 0));
    assert_eq!(host.sent().len(), 1);
    let mut closed = Host::with(Config { learn: false, discovery: false, ..config() }, &[(1, "worker")]);
    closed.send(1, STRANGER, &connect(0, 0));
    assert_eq!(closed.counted("worker").unknown_peer, 1);
}

#[test]
fn stations_that_never_answered_make_room_for_new_ones() {
    let named = STRANGER + 5;
    let config = Config { discovery: false, peers: vec![(named, "named:0".into())], ..config() };
    let mut host = Host::with(config, &[(1, "worker"), (2, "store")]);
    let connect_to = |host: &mut Host, station: u64| {
        let before = host.counted("worker").not_learnt;
        host.send(1, STRANGER + station, &connect(0, 0));
        host.sent();
        host.counted("worker").not_learnt == before
    };
    let taken = (0..300).filter(|station| connect_to(&mut host, *station)).count();
    assert_eq!(taken, 257, "the named one is there already");
    // One answers; a program of another domain still wants one.
    host.hear_from(STRANGER, WORKER, INDEX_UNKNOWN, &connected(0, 0));
    host.now = 59 * SECOND;
    assert!(!connect_to(&mut host, 1000));
    host.send(2, STRANGER + 1, &connect(0, 0));
    host.now = 60 * SECOND;
    let taken = (1000..1300).filter(|station| connect_to(&mut host, *station)).count();
    assert_eq!(taken, 254);
    host.now += SECOND;
    for kept in [STRANGER, STRANGER + 1, named, STORE, STRANGER + 1000] {
        let before = host.counted("worker").unknown_peer;
        host.send(1, kept, &tiny(0, 0));
        assert_eq!(host.counted("worker").unknown_peer, before, "{kept:x}");
    }
    host.send(1, STRANGER + 2, &tiny(0, 0));
    assert_eq!(host.counted("worker").unknown_peer, 1);
    // It comes back as whoever is new.
    host.hear_from(STRANGER + 2, WORKER, INDEX_UNKNOWN, &connect(0, 0));
    assert_eq!(host.got(1).len(), 2);
}

#[test]
fn a_full_queue_holds_back_its_own_endpoint() {
    let config = Config { queue_frames: 20, discovery: false, ..config() };
    let mut host = Host::with(config, &[(1, "worker"), (2, "store")]);
    host.send(1, STRANGER, &connect(0, 0));
    assert!(host.station.poll_transmit(9, |_| Sent::Full), "the wire is full");
    let mut sent = 1;
    while host.station.has_room(1) {
        host.send(1, STRANGER, &tiny(0, 0));
        sent += 1;
    }
    assert_eq!((sent, host.station.has_room(2)), (10, true));
    host.send(1, STRANGER, &tiny(0, 0));
    assert_eq!(host.counted("worker").queue_full, 1);
    let frames = host.sent();
    assert!(matches!(decode(&frames[0]).1, Frame::Connect { .. }), "nothing overtook");
    assert_eq!((frames.len(), host.station.has_room(1), host.station.has_frames()), (10, true, false));
    host.send(1, STRANGER, &tiny(0, 0));
    host.station.poll_transmit(9, |_| Sent::Failed);
    assert_eq!((host.counted("worker").not_sent, host.counted("worker").sent_frames), (1, 10));
}

#[test]
fn an_endpoint_that_floods_does_not_hold_back_the_others_of_its_domain() {
    let mut host = Host::quiet(&[(1, "worker")]);
    host.station.attach(2, "worker", 0).expect("room");
    assert_eq!(host.open(2, 1).0, Opening::Opened);
    host.send(1, STRANGER, &connect(0, 0));
    while host.station.has_room(1) {
        host.send(1, STRANGER, &tiny(0, 0));
    }
    assert!(host.station.has_room(2));
    for _ in 0..3 {
        host.send(2, STRANGER, &tiny(0, 1));
    }
    let from = |frame: &[u8]| match decode(frame).1 {
        Frame::Tiny { message, .. } => message.ends.from,
        Frame::Connect { ends, .. } => ends.from,
        other => panic!("{other:?}"),
    };
    // What it had waiting is sent though it is gone, and then there is nothing left of it.
    host.station.detach(1);
    let senders: Vec<u8> = host.sent().iter().map(|frame| from(frame)).collect();
    let last = senders.iter().rposition(|endpoint| *endpoint == 1);
    assert!(last.is_some_and(|last| last < senders.len() / 2), "{last:?} of {}", senders.len());
    assert_eq!(senders.iter().filter(|endpoint| **endpoint == 0).count(), senders.len() - 3);
    assert_eq!(host.counted("worker").sent_frames, senders.len() as u64);
    assert!(!host.station.has_frames());
}

#[test]
fn two_domains_share_the_wire() {
    let config = Config { queue_bytes: usize::MAX, queue_frames: usize::MAX, discovery: false, ..config() };
    let mut host = Host::with(config, &[(1, "worker"), (2, "store")]);
    let data = [7; 4096];
    let message = Message { ends: ends(0, 0), ..Message::default() };
    let medium = Frame::Medium { message, total: 4096, fragment: 0, offset: 0, data: &data };
    for port in [1, 2] {
        host.send(port, STRANGER, &connect(0, 0));
    }
    for _ in 0..2000 {
        host.send(1, STRANGER, &medium);
        for _ in 0..20 {
            host.send(2, STRANGER, &tiny(0, 0));
        }
    }
    host.station.poll_transmit(20_000, |_| Sent::Yes);
    // With what a frame takes on the wire beside its bytes.
    let taken = |counted: DomainCounters| (counted.sent_bytes + 24 * counted.sent_frames) as f64;
    let (one, two) = (taken(host.counted("worker")), taken(host.counted("store")));
    assert!((one / (one + two) - 0.5).abs() < 0.05, "{one} {two}");
}

#[test]
fn a_nic_makes_itself_known_eight_times_and_then_now_and_then() {
    let mut host = Host::with(config(), &[(1, "worker")]);
    let heard = |host: &mut Host, until: u64| {
        host.wait_until(until * SECOND);
        let mut frames = host.sent();
        frames.retain(|frame| !matches!(decode(frame).1, Frame::HostQuery { .. }));
        for frame in &frames {
            let (head, frame) = decode(frame);
            assert_eq!((head.destination, head.source), (BROADCAST, mac_of(WORKER)));
            assert_eq!(frame, Frame::Discovery { nic: WORKER, serial: 7 });
        }
        frames.len()
    };
    assert_eq!([0, 3, 100].map(|until| heard(&mut host, until)), [1, 3, 4]);
    assert_eq!([186, 187, 300].map(|until| heard(&mut host, until)), [0, 1, 0]);
    // Its own are nothing new; another station's serial is, once.
    let everybody = 0xFFFF_FFFF_FFFF;
    host.hear_from(WORKER, everybody, 0, &Frame::Discovery { nic: WORKER, serial: 8 });
    assert_eq!(heard(&mut host, 310), 0);
    for (serial, until, times) in [(1, 320, 8), (1, 330, 0), (2, 340, 8)] {
        host.hear_from(STRANGER, everybody, 0, &Frame::Discovery { nic: STRANGER, serial });
        assert_eq!(heard(&mut host, until), times);
    }
}

#[test]
fn a_station_is_asked_for_its_name_until_it_says_it() {
    let mut host = Host::quiet(&[(1, "worker")]);
    host.hear_from(STRANGER, WORKER, INDEX_UNKNOWN, &connect(0, 0));
    let mut asked = Vec::new();
    for second in 1..=12 {
        host.wait_until(second * SECOND);
        for frame in host.sent() {
            let (head, frame) = decode(&frame);
            assert_eq!((head.destination, head.peer_index), (mac_of(STRANGER), 0x5555));
            let Frame::HostQuery { magic, index: 1 } = frame else { panic!("{frame:?}") };
            asked.push((second, magic));
        }
    }
    assert_eq!(asked, [1, 6, 11].map(|second| (second, 0x1305_2008)));
    let reply = |magic| Frame::HostReply { index: 0x6666, magic, name: b"far:0\0" };
    host.hear_from(STRANGER, WORKER, 1, &reply(1));
    let name = |host: &mut Host| host.ask(1, &Record::Find { name: "far:0" })[1];
    assert_eq!(name(&mut host), 1, "an answer to another question");
    host.hear_from(STRANGER, WORKER, 1, &reply(0x1305_2008));
    assert_eq!(name(&mut host), 0);
    host.wait_until(60 * SECOND);
    assert!(host.sent().is_empty());
    // And it is told ours.
    host.hear_from(STRANGER, WORKER, 1, &Frame::HostQuery { index: 0x6667, magic: 99 });
    let sent = host.sent();
    let (head, frame) = decode(&sent[0]);
    assert_eq!(frame, Frame::HostReply { index: 1, magic: 99, name: b"worker:0\0" });
    assert_eq!(head.peer_index, 0x6667);
}

#[test]
fn faults_happen_where_they_are_wanted() {
    let faults = Faults { drop_every: [(37, 2)].into(), duplicate_ppm: 1_000_000, ..Faults::default() };
    let mut host =
        Host::with(Config { faults, discovery: false, ..config() }, &[(1, "worker"), (2, "store")]);
    host.send(1, STRANGER, &connect(0, 0));
    assert_eq!(host.sent().len(), 2);
    for to in [STRANGER, STORE] {
        host.send(1, to, &tiny(0, 0));
        host.send(1, to, &tiny(0, 0));
    }
    assert_eq!((host.sent().len(), host.got(2).len(), host.counted("worker").faults), (2, 2, 2));
}

proptest! {
    #[test]
    fn garbage_from_anywhere_does_no_harm(
        pieces in prop::collection::vec(
            (any::<bool>(), 0u8..12, 30u8..48, 0u64..5, prop::collection::vec(any::<u8>(), 0..120)), 1..40
        )
    ) {
        let mut host = Host::with(config(), &[(1, "worker"), (2, "store")]);
        for (wire, record, kind, to, body) in pieces {
            let kind = if kind < 35 { kind - 30 } else { kind };
            let frame = [&mac_of(WORKER - 1 + to)[..], &mac_of(STRANGER), &[0x86, 0xDF, 0, 1, kind], &body].concat();
            if wire {
                host.hear(&frame);
            } else if record == 3 {
                host.say(1, &[&FRAME_HEAD[..], &frame].concat());
            } else {
                host.say(1, &[&[record], &body[..]].concat());
            }
            host.now += 10_000;
            host.wait_until(host.now);
            for frame in host.sent() {
                let (head, _) = decode(&frame);
                prop_assert!(head.source == mac_of(WORKER) || head.source == mac_of(STORE));
                prop_assert!(frame.len() >= 60);
            }
        }
        for record in host.got.values().flatten() {
            in_record(record);
        }
    }
}

#[test]
fn a_nic_that_was_not_told_is_asked_for_again() {
    let mut answers = vec![0x0200_0000_0077, 0].into_iter();
    let asked = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    let count = std::sync::Arc::clone(&asked);
    let told = std::sync::Mutex::new(std::iter::from_fn(move || answers.next_back()));
    let nic = move |_: &str| {
        count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        told.lock().expect("one thread").next().expect("no third question")
    };
    let mut station = Station::new(config(), MTU, Box::new(nic));
    assert_eq!(station.attach(1, "late", 0), Ok(None));
    // Not for each who comes.
    assert_eq!(station.attach(2, "late", 1_000_000), Ok(None));
    assert_eq!(asked.load(std::sync::atomic::Ordering::Relaxed), 1);
    assert_eq!(station.attach(3, "late", 5_000_000), Ok(Some([2, 0, 0, 0, 0, 0x77])));
    assert_eq!(station.attach(4, "late", 50_000_000), Ok(None));
}

#[test]
fn domains_without_a_nic_leave_room_when_they_are_gone() {
    let mut station = Station::new(config(), MTU, Box::new(|_: &str| 0));
    for n in 0..3000 {
        assert_eq!(station.attach(n, &format!("d{n}"), 0), Ok(None));
        station.detach(n);
    }
}
