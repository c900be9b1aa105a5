//! Turns the crank: interface, connections and clock around a [`Station`].

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use isthmus_engine::listener::{Listener, Terms};
use isthmus_engine::node::{Attachment, Node, PARTNER_ANYBODY};
use isthmus_engine::{Error, How, Result};
use isthmus_sys::ethernet::Link;
use isthmus_sys::poll::{Flag, Ready, Set};
use isthmus_sys::{capability, clock};
use isthmus_wire::card::{PORT, RECORD_MAX};
use isthmus_wire::control::SocketKind;
use isthmus_wire::mxoe::{HEAD_LEN, OWN_MTU};

use crate::config::Config;
use crate::counters::{DomainCounters, Totals};
use crate::lines::{Active, Lines, Took};
use crate::queue::Sent;
use crate::station::{Delivery, PortId, Station};

const TOKEN_LINK: u64 = 0;
const TOKEN_LISTENER: u64 = 1;
const TOKEN_WAKE: u64 = 2;
const FIRST_PORT: PortId = 16;

/// The broker says within this whose address is which.
const ANSWER: Duration = Duration::from_secs(2);
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 64;
/// Frames taken from the wire, or put on it, before somebody else's turn.
const LINK_BATCH: usize = 64;
/// Records taken from one connection before the next one's turn.
const RECORD_BATCH: usize = 16;
/// While there is something to do, bells, timers and new connections are looked at so often, µs.
const LOOK_US: u64 = 50;
/// The kernel's queue drains without telling anybody, µs.
const FULL_US: u64 = 100;
/// A connection that is neither quiet nor brings anything, half a record say, or whose lane is full, is looked at again
/// so soon, µs.
const AGAIN_US: u64 = 1000;
/// No sleep is longer: the flag to stop is looked at this often.
const SLEEP_LIMIT: Duration = Duration::from_millis(250);

/// The process's one card: an interface and those who share it.
pub struct Card {
    set: Arc<Set>,
    wake: Flag,
    inner: Mutex<Inner>,
    /// Threads that want a look at the counters: the crank would never let them in.
    asking: AtomicU32,
    /// Its own, if it made one.
    attachment: Option<Arc<Attachment>>,
}

struct Inner {
    link: Link,
    station: Station,
    listener: Arc<Listener>,
    set: Arc<Set>,
    lines: Lines,
    active: Active,
    next_port: PortId,
    buffer: Vec<u8>,
    answer: Vec<u8>,
    poll_us: u64,
    /// When a frame was last seen, from the wire or for it.
    busy_us: u64,
    looked_us: u64,
}

/// How to go on.
enum Next {
    /// At once, without asking the kernel.
    Turn,
    /// At once, once others have had the processor if they want it: it may be they who bring something.
    Wait,
    /// At once, after a look at who rang.
    Look,
    Sleep(Duration),
}

fn now_us() -> u64 {
    clock::now_ns() / 1000
}

fn os(what: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::Os { what, source }
}

impl Card {
    /// Open the interface, attach through `door`, give up all privileges and listen. The broker says which domain has which
    /// address. For the one thread of a process: threads that are there already keep what they may.
    ///
    /// # Errors
    /// The interface cannot be opened, or the broker refuses.
    pub fn open(config: Config, door: &Path) -> Result<Self> {
        if config.own_mtu != 0 && !OWN_MTU.contains(&config.own_mtu) {
            return Err(Error::BadAnswer(format!("no dialect has frames for an MTU of {}", config.own_mtu)));
        }
        let link = Self::link(&config)?;
        let attachment = Node::attach(door, isthmus_wire::card::DOMAIN)?;
        capability::drop_all().map_err(os("giving up privileges"))?;
        let node = Arc::downgrade(&attachment);
        let nic_of = move |domain: &str| {
            let how = How { deadline: Some(Instant::now() + ANSWER), ..How::default() };
            let found = node.upgrade().and_then(|node| node.find_nic(0, domain, &how).ok());
            found.map_or(0, |found| found.nic)
        };
        let mut card = Self::with_link(config, link, &attachment, Box::new(nic_of))?;
        card.attachment = Some(attachment);
        Ok(card)
    }

    /// Open the interface, give up this thread's privileges, and listen with an attachment that is there already.
    ///
    /// # Errors
    /// As [`Card::open`].
    pub fn new(
        config: Config,
        attachment: &Arc<Attachment>,
        nic_of: Box<dyn Fn(&str) -> u64 + Send>,
    ) -> Result<Self> {
        let link = Self::link(&config)?;
        capability::drop_all().map_err(os("giving up privileges"))?;
        Self::with_link(config, link, attachment, nic_of)
    }

    fn link(config: &Config) -> Result<Link> {
        let opening = os("opening the interface");
        let profile = config.profile();
        let link =
            Link::open(&config.interface, profile.ethertype, profile.mtu() as usize).map_err(opening)?;
        if config.bypass_queue {
            link.bypass_queue(true).map_err(os("passing by the interface's queue"))?;
        }
        Ok(link)
    }

    fn with_link(
        config: Config,
        link: Link,
        attachment: &Arc<Attachment>,
        nic_of: Box<dyn Fn(&str) -> u64 + Send>,
    ) -> Result<Self> {
        let ring_max = attachment.identity().ring_max;
        let terms = Terms {
            port: PORT,
            partner: PARTNER_ANYBODY,
            kind: SocketKind::Seqpacket,
            backlog: BACKLOG,
            small: config.small_ring.min(ring_max),
            large: config.large_ring.min(ring_max),
        };
        let listener = attachment.listen(terms, &How::default())?;
        let making = || os("making an event loop");
        let (set, wake) = (Arc::new(Set::new().map_err(making())?), Flag::new().map_err(making())?);
        set.add(link.as_fd(), TOKEN_LINK).map_err(making())?;
        set.add(listener.waiting(), TOKEN_LISTENER).map_err(making())?;
        set.add(wake.as_fd(), TOKEN_WAKE).map_err(making())?;
        let inner = Inner {
            poll_us: config.poll_us,
            station: Station::new(config, link.mtu(), nic_of),
            link,
            listener,
            set: Arc::clone(&set),
            lines: Lines::default(),
            active: Active::default(),
            next_port: FIRST_PORT,
            buffer: vec![0; RECORD_MAX],
            answer: Vec::new(),
            busy_us: 0,
            looked_us: 0,
        };
        Ok(Self { set, wake, inner: Mutex::new(inner), asking: AtomicU32::new(0), attachment: None })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serve until `stop` is set; look at it soon with [`Card::wake`]. One thread at a time.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn run(&self, stop: &AtomicBool) -> Result<()> {
        let mut events: Vec<(u64, Ready)> = Vec::new();
        while !stop.load(Ordering::Acquire) {
            while self.asking.load(Ordering::Acquire) > 0 {
                std::thread::yield_now();
            }
            let next = self.inner().turn(&mut events)?;
            let limit = match next {
                Next::Turn => continue,
                Next::Wait => {
                    std::thread::yield_now();
                    continue;
                }
                Next::Look => Duration::ZERO,
                Next::Sleep(limit) => limit.min(SLEEP_LIMIT),
            };
            // A signal ends it early, and no harm is done.
            let _ = self.set.wait(Some(limit), &mut events);
            if events.iter().any(|(token, _)| *token == TOKEN_WAKE) {
                self.wake.lower();
            }
        }
        Ok(())
    }

    /// Let [`Card::run`] look at its flag.
    pub fn wake(&self) {
        self.wake.raise();
    }

    #[must_use]
    pub fn counters(&self) -> Totals {
        self.ask(|inner| {
            let ring_full = inner.link.dropped().unwrap_or(0);
            inner.station.note_ring_full(ring_full);
            inner.station.totals()
        })
    }

    /// Each domain's, by its name.
    #[must_use]
    pub fn domain_counters(&self) -> Vec<(String, DomainCounters)> {
        self.ask(|inner| inner.station.domains().map(|(name, counted)| (name.to_owned(), *counted)).collect())
    }

    fn ask<T>(&self, question: impl FnOnce(&mut Inner) -> T) -> T {
        self.asking.fetch_add(1, Ordering::AcqRel);
        let answer = question(&mut self.inner());
        self.asking.fetch_sub(1, Ordering::AcqRel);
        answer
    }
}

impl Inner {
    fn turn(&mut self, events: &mut Vec<(u64, Ready)>) -> Result<Next> {
        let now = now_us();
        for (token, ready) in events.drain(..) {
            self.event(now, token, ready)?;
        }
        let mut worked = self.take_from_link(now);
        worked |= self.take_from_programs(now);
        self.lines.flush();
        if self.looks(now) {
            self.station.handle_timeout(now);
        }
        let full = self.transmit();
        if worked {
            self.busy_us = now;
        }
        Ok(self.next(now, worked, full))
    }

    fn looks(&self, now: u64) -> bool {
        now.saturating_sub(self.looked_us) >= LOOK_US
    }

    fn next(&mut self, now: u64, worked: bool, full: bool) -> Next {
        let spins = self.station.has_frames() || now.saturating_sub(self.busy_us) < self.poll_us;
        if worked || spins && !full {
            if !self.looks(now) {
                return if worked { Next::Turn } else { Next::Wait };
            }
            self.looked_us = now;
            return Next::Look;
        }
        self.looked_us = 0;
        let full = full.then_some(now + FULL_US);
        let again = (!self.active.is_empty() || self.lines.holds()).then_some(now + AGAIN_US);
        let due = [self.station.poll_timeout(), full, again].into_iter().flatten().min();
        Next::Sleep(due.map_or(SLEEP_LIMIT, |at| Duration::from_micros(at.saturating_sub(now))))
    }

    fn event(&mut self, now: u64, token: u64, ready: Ready) -> Result<()> {
        if !matches!(token, TOKEN_LINK | TOKEN_WAKE) {
            self.busy_us = now;
        }
        match token {
            TOKEN_LINK if ready.hung_up => {
                // Down is a state that passes; gone is not.
                let _ = self.link.take_error();
                self.link.is_up().map(drop).map_err(os("the interface is gone"))
            }
            TOKEN_LINK | TOKEN_WAKE => Ok(()),
            TOKEN_LISTENER => {
                self.accept(now);
                Ok(())
            }
            port => {
                self.heard(port);
                Ok(())
            }
        }
    }

    fn accept(&mut self, now: u64) {
        while let Ok(connection) = self.listener.accept(&How::at_once()) {
            let port = self.next_port;
            let Ok(fresh) = self.station.attach(port, &connection.info.peer_name, now) else {
                connection.close();
                continue;
            };
            self.next_port += 1;
            connection.bell().watch();
            if self.set.add(connection.bell().as_fd(), port).is_err() {
                self.station.detach(port);
                connection.close();
                continue;
            }
            let refused = fresh.is_some_and(|mac| self.link.add_unicast(mac).is_err());
            self.station.note_address(refused);
            self.lines.insert(port, connection, now);
            self.active.add(port);
        }
    }

    /// A connection's bell rang.
    fn heard(&mut self, port: PortId) {
        let Some(line) = self.lines.get(port) else { return };
        let bell = line.connection.bell();
        bell.empty();
        bell.wake_followers();
        if bell.gone() {
            // It would be ready for ever.
            let _ = self.set.remove(bell.as_fd());
        }
        self.active.add(port);
    }

    fn take_from_link(&mut self, now: u64) -> bool {
        let Self { link, station, lines, .. } = self;
        let taken = link.receive(LINK_BATCH, |frame| {
            if let Some(delivery) = station.handle_frame(now, frame) {
                deliver(lines, station, &delivery, frame);
            }
        });
        taken > 0
    }

    fn take_from_programs(&mut self, now: u64) -> bool {
        let mut worked = false;
        let mut active = std::mem::take(&mut self.active);
        active.round(|port| {
            let Some(busy_us) = self.lines.get(port).map(|line| line.busy_us) else { return false };
            let (records, ended) = self.take_records(now, port);
            worked |= records > 0;
            let quiet = records == 0 && now.saturating_sub(busy_us) >= self.poll_us;
            !(ended || quiet && self.has_parked(port))
        });
        self.active = active;
        worked
    }

    /// How many records a connection brought; whether it is over.
    fn take_records(&mut self, now: u64, port: PortId) -> (usize, bool) {
        for records in 0..RECORD_BATCH {
            if !self.station.has_room(port) {
                return (records, false);
            }
            let Some(line) = self.lines.get_mut(port) else { return (records, true) };
            let len = match line.take(&mut self.buffer) {
                Took::Record(len) => len,
                Took::Nothing => return (records, false),
                Took::End => {
                    self.close(port);
                    return (records, true);
                }
            };
            line.busy_us = now;
            self.record(now, port, len);
        }
        (RECORD_BATCH, false)
    }

    fn record(&mut self, now: u64, port: PortId, len: usize) {
        let Self { station, lines, buffer, answer, .. } = self;
        let record = buffer.get_mut(..len).unwrap_or_default();
        if let Some(delivery) = station.handle_record(now, port, record, answer) {
            let frame = record.get(isthmus_wire::card::FRAME_AT..).unwrap_or_default();
            deliver(lines, station, &delivery, frame);
        }
        if !answer.is_empty() {
            station.note_answer(port, lines.put(port, answer, &[]));
        }
    }

    /// From now on this connection rings, unless there is something already, or its queue waits for the wire.
    fn has_parked(&mut self, port: PortId) -> bool {
        let Some(line) = self.lines.get(port) else { return true };
        match line.connection.park(true, false) {
            Ok(false) => true,
            Ok(true) => false,
            Err(_) => {
                self.close(port);
                true
            }
        }
    }

    fn close(&mut self, port: PortId) {
        self.station.detach(port);
        if let Some(line) = self.lines.remove(port) {
            let _ = self.set.remove(line.connection.bell().as_fd());
            line.connection.close();
        }
    }

    fn transmit(&mut self) -> bool {
        let Self { link, station, .. } = self;
        station.poll_transmit(LINK_BATCH, |frame| match link.send(frame) {
            Ok(true) => Sent::Yes,
            Ok(false) => Sent::Full,
            Err(_) => Sent::Failed,
        })
    }
}

fn deliver(lines: &mut Lines, station: &mut Station, delivery: &Delivery, frame: &[u8]) {
    let rest = frame.get(HEAD_LEN..).unwrap_or_default();
    let mut times = 0;
    for _ in 0..delivery.times {
        times += u8::from(lines.put(delivery.port, &delivery.head, rest));
    }
    station.delivered(delivery, times, frame.len());
}
