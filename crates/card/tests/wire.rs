//! Two cards on the two ends of a cable, programs at both, and a broker that knows them.
//!
//! Needs the command `isthmus` (on the path, or as `ISTHMUS_COMMAND`) and the right to make a network; says so and is
//! skipped otherwise.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use isthmus_card::{Card, Config};
use isthmus_engine::lane::{with_dest, with_source};
use isthmus_engine::node::{ConnectRequest, Node};
use isthmus_engine::{Connection, How};
use isthmus_wire::card::{self, Opening, Record};
use isthmus_wire::control::SocketKind;
use isthmus_wire::mxoe::{self, ETHERTYPE, Ends, Frame, Head, Message, Profile};

const NICS: [(&str, u64); 3] =
    [("worker", 0x0200_0000_0001), ("store", 0x0200_0000_0002), ("third", 0x0200_0000_0003)];
/// Long after everything has happened, or never will.
const LIMIT: Duration = Duration::from_secs(20);
/// A frame may be lost: it is sent again so much later.
const AGAIN: Duration = Duration::from_millis(50);
const RING: u32 = 2 << 20;

fn nic_of(domain: &str) -> u64 {
    NICS.iter().find(|(name, _)| *name == domain).map_or(0, |(_, nic)| *nic)
}

/// A broker of the test's own, with its directory; both are gone at the end.
struct Broker {
    child: Child,
    directory: PathBuf,
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn isthmus(directory: &Path) -> Command {
    let name = std::env::var("ISTHMUS_COMMAND").unwrap_or_else(|_| "isthmus".into());
    let mut command = Command::new(name);
    command.env("ISTHMUS_DIR", directory);
    command
}

impl Broker {
    fn start() -> Option<Self> {
        let directory = std::env::temp_dir().join(format!("isthmus-card-{}", std::process::id()));
        std::fs::create_dir_all(&directory).ok()?;
        let mut command = isthmus(&directory);
        let child = command.arg("broker").stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = child.inspect_err(|error| println!("SKIPPED: isthmus: {error}")).ok()?;
        Some(Self { child, directory })
    }

    /// The door of a new domain.
    fn door(&mut self, domain: &str) -> PathBuf {
        let end = Instant::now() + LIMIT;
        loop {
            let output =
                isthmus(&self.directory).args(["domain", "add", domain]).output().expect("a command");
            if output.status.success() {
                let directory = String::from_utf8(output.stdout).expect("text");
                return Path::new(directory.trim()).join("door");
            }
            assert!(self.child.try_wait().expect("a child").is_none(), "the broker ended");
            assert!(Instant::now() < end, "{}", String::from_utf8_lossy(&output.stderr));
        }
    }
}

/// Give this thread and its children a network in which `one` and `two` are connected.
fn cable() -> Result<(), String> {
    // SAFETY: changes what this thread sees, and nothing else.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(format!("no new network here: {}", std::io::Error::last_os_error()));
    }
    for line in
        ["link add one mtu 9000 type veth peer name two mtu 9000", "link set one up", "link set two up"]
    {
        let status = Command::new("ip").args(line.split(' ')).status();
        if !status.as_ref().is_ok_and(std::process::ExitStatus::success) {
            return Err(format!("ip {line}: {status:?}"));
        }
    }
    Ok(())
}

/// A program with one endpoint.
struct Program {
    connection: Arc<Connection>,
    nic: u64,
}

fn limited() -> How<'static> {
    How { deadline: Some(Instant::now() + LIMIT), ..How::default() }
}

impl Program {
    fn new(door: &Path, card: &str) -> Self {
        let attachment = Node::attach(door, "test").expect("a broker");
        let request = ConnectRequest {
            to: card.into(),
            port: card::PORT,
            from_port: 0,
            kind: SocketKind::Seqpacket,
            require: None,
            small: 128 * 1024,
            large: RING,
        };
        let connection = attachment.connect(&request, &limited()).expect("a card");
        let mut program = Self { connection, nic: 0 };
        let mut given = 0;
        program.ask(&Record::Open { endpoint: 0 }, |record| match record {
            Record::Opened { status: Opening::Opened, nic, mtu: 9000, .. } => given = nic,
            other => panic!("{other:?}"),
        });
        program.nic = given;
        program
    }

    fn send(&self, record: &Record<'_>) {
        let mut bytes = [0; card::RECORD_MAX];
        let len = card::encode(record, &mut bytes).expect("a record");
        with_source(&bytes[..len], |source| self.connection.send_message(source, &limited())).expect("sent");
    }

    fn receive(&self, then: impl FnOnce(Record<'_>)) {
        let mut bytes = [0; card::RECORD_MAX];
        let got = with_dest(&mut bytes, |dest| self.connection.receive(dest, &limited()));
        then(card::decode(&bytes[..got.expect("a record").0]).expect("a good record"));
    }

    fn ask(&self, record: &Record<'_>, then: impl FnOnce(Record<'_>)) {
        self.send(record);
        self.receive(then);
    }

    fn send_frame(&self, to: u64, frame: &Frame<'_>) {
        let [_, _, destination @ ..] = to.to_be_bytes();
        let head = Head { destination, source: [0; 6], ethertype: ETHERTYPE, peer_index: 0 };
        let mut bytes = [0; 9014];
        let len = mxoe::encode(&head, frame, &Profile::own(9000), &mut bytes).expect("a frame");
        self.send(&Record::Frame(&bytes[..len]));
    }

    fn receive_frame(&self, then: impl FnOnce(Head, Frame<'_>)) {
        self.receive(|record| {
            let Record::Frame(frame) = record else { panic!("{record:?}") };
            let (head, frame) = mxoe::decode(frame, &Profile::own(9000)).expect("a frame");
            then(head, frame);
        });
    }

    fn wait_for(&self, name: &str, expected: u64) {
        let end = Instant::now() + LIMIT;
        let mut known = false;
        while !known {
            assert!(Instant::now() < end, "{name} was never heard of");
            self.ask(&Record::Find { name }, |record| {
                known = matches!(record, Record::Found { found: true, nic, .. } if nic == expected);
            });
        }
    }
}

fn connect() -> Frame<'static> {
    Frame::Connect { ends: Ends::default(), index: 0, session: 1, key: 2, expects: 1, number: 0 }
}

fn medium(number: u16, data: &[u8]) -> Frame<'_> {
    let message = Message { sequence: number, ..Message::default() };
    Frame::Medium { message, total: data.len() as u32, fragment: 0, offset: 0, data }
}

/// So many frames are on their way at once: more than a lane's first ring holds, and fewer than any queue on the way.
const WINDOW: u16 = 40;

/// Frames go there and come back, whole and in order.
fn there_and_back(worker: &Program, store: &Program) {
    let data: Vec<u8> = (0..8192u32).map(|i| (i * 7 % 251) as u8).collect();
    for round in 0..40 {
        let numbers = round * WINDOW..(round + 1) * WINDOW;
        for number in numbers.clone() {
            worker.send_frame(store.nic, &medium(number, &data[usize::from(number)..]));
        }
        for number in numbers.clone() {
            store.receive_frame(|head, frame| {
                assert_eq!(head.source, worker.nic.to_be_bytes()[2..]);
                assert!(frame == medium(number, &data[usize::from(number)..]), "another than {number}");
                store.send_frame(worker.nic, &medium(number, &[]));
            });
        }
        for number in numbers {
            worker.receive_frame(|_, frame| assert_eq!(frame, medium(number, &[])));
        }
    }
}

fn on_two_cards(doors: &[PathBuf; 5]) {
    let stop = Arc::new(AtomicBool::new(false));
    let mut cards = Vec::new();
    for (interface, door) in ["one", "two"].into_iter().zip(doors) {
        let config = Config {
            interface: interface.into(),
            own_mtu: 9000,
            serial: 1,
            between_domains: true,
            ..Config::default()
        };
        let (door, stop) = (door.clone(), Arc::clone(&stop));
        // A thread for each: opening a card gives up its thread's privileges.
        let opened = std::thread::spawn(move || {
            let attachment = Node::attach(&door, "card").expect("attached");
            let card = Arc::new(Card::new(config, &attachment, Box::new(nic_of)).expect("a card"));
            let crank = Arc::clone(&card);
            let serve = move || {
                crank.run(&stop).expect("served");
                drop(attachment);
            };
            (card, std::thread::spawn(serve))
        });
        cards.push(opened.join().expect("opened"));
    }
    let worker = Program::new(&doors[2], "card-one");
    let store = Program::new(&doors[3], "card-two");
    let third = Program::new(&doors[4], "card-two");
    assert_eq!([worker.nic, store.nic, third.nic], NICS.map(|(_, nic)| nic));
    worker.wait_for("store:0", store.nic);
    store.wait_for("worker:0", worker.nic);
    worker.send_frame(store.nic, &connect());
    store.receive_frame(|head, frame| {
        assert_eq!(head.source, worker.nic.to_be_bytes()[2..]);
        assert!(matches!(frame, Frame::Connect { .. }));
    });
    there_and_back(&worker, &store);
    // Two domains of one card.
    there_and_back(&third, &store);
    // An endpoint that is closed.
    drop(store);
    let end = Instant::now() + LIMIT;
    let mut bytes = [0; card::RECORD_MAX];
    let refused = loop {
        assert!(Instant::now() < end, "nobody refuses");
        worker.send_frame(NICS[1].1, &connect());
        // What was sent before its card saw the end is lost.
        let soon = How { deadline: Some(Instant::now() + AGAIN), ..How::default() };
        if let Ok((len, _)) = with_dest(&mut bytes, |dest| worker.connection.receive(dest, &soon)) {
            break card::decode(&bytes[..len]).expect("a good record");
        }
    };
    let Record::Frame(frame) = refused else { panic!("{refused:?}") };
    let (_, frame) = mxoe::decode(frame, &Profile::own(9000)).expect("a frame");
    assert!(matches!(frame, Frame::NackLib { to: 0, from: 0, why: 2, .. }), "{frame:?}");
    stop.store(true, Ordering::Release);
    for (card, thread) in cards {
        card.wake();
        thread.join().expect("served to the end");
        let totals = card.counters();
        assert!(totals.sent_frames > 1600 && totals.received_frames > 1600, "{totals:?}");
        assert_eq!((totals.ring_full, totals.spoofed, totals.bad_frames), (0, 0, 0), "{totals:?}");
    }
}

#[test]
fn programs_at_two_cards_talk_over_a_cable() {
    let Some(mut broker) = Broker::start() else { return };
    let doors = ["card-one", "card-two", "worker", "store", "third"].map(|domain| broker.door(domain));
    let thread = std::thread::spawn(move || match cable() {
        Ok(()) => on_two_cards(&doors),
        Err(why) => println!("SKIPPED: {why}"),
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}
