//! The crank: waits for descriptors, gives each guest its turn.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use isthmus_proto::sched::{Scheduler, Terms};
use isthmus_sys::alarm::Alarm;
use isthmus_sys::poll::{Ready, Set};
use isthmus_wire::control::{self, GuestState, Message};
use rustix::net::SocketFlags;

use crate::Fault;
use crate::account::Account;
use crate::attachment::Attachment;
use crate::device::{Changed, Device, RX, TX};
use crate::ends::Kept;
use crate::flow::{By, End, Flow, FlowId, Key, OPENER};
use crate::line::Line;
use crate::seat::{Begun, Seat};
use crate::vring::Chain;

/// Messages of one monitor before others get their turn.
const MESSAGES_A_TURN: usize = 8;
/// With neither a broker nor a guest for so long, nobody will come.
const LONELY: Duration = Duration::from_secs(5);
/// No system call waits longer.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// Between attempts to reach a broker that is gone.
pub(crate) const AGAIN: Duration = Duration::from_millis(200);

/// What a token is about: the upper byte; the rest says which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Topic {
    Broker = 1,
    Listener = 2,
    Device = 3,
    Kick = 4,
    Attachment = 5,
    Bell = 6,
}

impl Topic {
    const ALL: [Self; 6] =
        [Self::Broker, Self::Listener, Self::Device, Self::Kick, Self::Attachment, Self::Bell];

    pub(crate) fn token(self, which: u64) -> u64 {
        u64::from(self as u8) << 56 | which
    }

    fn from_token(token: u64) -> Option<(Self, u64)> {
        let topic = Self::ALL.into_iter().find(|topic| u64::from(*topic as u8) == token >> 56)?;
        Some((topic, token & ((1 << 56) - 1)))
    }
}

/// A guest: its device, and what waits for it.
pub(crate) struct Guest {
    pub(crate) name: String,
    listener: OwnedFd,
    pub(crate) door: OwnedFd,
    pub(crate) device: Option<Device>,
    pub(crate) home: u64,
    /// Flows that have something to send to this guest, each once; and which side of the flow it is.
    pub(crate) ready: VecDeque<(FlowId, usize)>,
    pub(crate) flows: HashSet<FlowId>,
    /// Packets of it that nobody has a flow for, to be answered by resets.
    pub(crate) resets: VecDeque<isthmus_wire::vsock::Header>,
    /// So many of those that nothing more is taken from it.
    pub(crate) held_back: bool,
    /// Memory of its for lanes, by the agent's numbers; and the one whose pages are being named.
    pub(crate) seats: HashMap<u32, Place>,
    pub(crate) begun: Option<(FlowId, Begun)>,
    /// Its transmit queue waits to be served; and on what terms that is.
    pub(crate) marked: bool,
    pub(crate) terms: Terms,
    /// Bytes that wait here until it has buffers.
    pub(crate) waiting: usize,
    /// It has buffers for more than it got in its turn.
    pub(crate) pressed: bool,
    state: GuestState,
}

/// A seat of a guest's, and who uses it.
pub(crate) struct Place {
    pub(crate) seat: Seat,
    /// The agent's connection: the seat is given up with it.
    pub(crate) agent: FlowId,
    pub(crate) flow: Option<(FlowId, usize)>,
    /// The connection that rings for it.
    pub(crate) bell: Option<FlowId>,
}

pub struct Switch {
    pub(crate) set: Set,
    /// Nothing here waits; a descriptor that a stranger changed could make us.
    _alarm: Alarm,
    /// Where the broker connects, and its connection.
    listener: OwnedFd,
    broker: Option<Line>,
    pub(crate) guests: HashMap<u32, Guest>,
    pub(crate) flows: HashMap<FlowId, Flow>,
    pub(crate) keys: HashMap<Key, (FlowId, usize)>,
    pub(crate) last_flow: FlowId,
    pub(crate) attachments: HashMap<u64, Attachment>,
    last_attachment: u64,
    /// Connections between guests of ours: the accepting side's flow, until the opener's is connected.
    pub(crate) meetings: HashMap<u64, FlowId>,
    /// Kernel sockets that the broker brought for programs of guests, until their agents ask for them.
    pub(crate) ends: HashMap<(u32, End), Kept>,
    /// Connections of two guests, whose other end was not asked for yet.
    pub(crate) named: HashMap<u64, FlowId>,
    /// What waits to be moved; and what waits for its rate, by the microsecond when it may.
    pub(crate) sched: Scheduler,
    pub(crate) late: BTreeSet<(u64, u64)>,
    /// Terms of connections that are about to be made, by guest, and since when.
    pub(crate) terms: HashMap<(u32, u64), (Terms, Instant)>,
    pub(crate) began: Instant,
    pub(crate) account: Account,
    /// For how long after something was moved lanes are looked at without waiting to be rung, and when that was.
    pub(crate) poll: Duration,
    pub(crate) moved: Instant,
    /// Directions of connections whose programs do not ring now.
    pub(crate) polled: BTreeSet<u64>,
    /// When guests that do not answer were last looked for.
    pub(crate) swept: Instant,
    /// A chain in use, kept for its allocation.
    pub(crate) chain: Chain,
    pub(crate) scratch: Chain,
}

impl Switch {
    /// `listener`: a listening `SOCK_SEQPACKET` socket, on which the broker tells us of its guests.
    ///
    /// It is to run on the thread that makes it, and has that process's `SIGALRM`.
    ///
    /// # Errors
    /// No descriptors or no timers are left.
    pub fn new(listener: OwnedFd) -> io::Result<Self> {
        isthmus_sys::cpu::raise_descriptor_limit();
        let set = Set::new()?;
        set.add(listener.as_fd(), Topic::Broker.token(0))?;
        Ok(Self {
            set,
            _alarm: Alarm::start(LONGEST_WAIT)?,
            listener,
            broker: None,
            guests: HashMap::new(),
            flows: HashMap::new(),
            keys: HashMap::new(),
            last_flow: 0,
            attachments: HashMap::new(),
            last_attachment: 0,
            meetings: HashMap::new(),
            ends: HashMap::new(),
            named: HashMap::new(),
            sched: Scheduler::default(),
            late: BTreeSet::new(),
            terms: HashMap::new(),
            began: Instant::now(),
            account: Account::new(),
            poll: Duration::ZERO,
            moved: Instant::now(),
            polled: BTreeSet::new(),
            swept: Instant::now(),
            chain: Chain::default(),
            scratch: Chain::default(),
        })
    }

    /// Look at lanes for so long after something was moved before their programs have to ring. On a machine with
    /// processors to spare; `Duration::MAX` keeps one of them busy for ever.
    #[must_use]
    pub fn with_poll(mut self, poll: Duration) -> Self {
        self.poll = poll;
        self
    }

    /// Serve until `stop` says so or, unless `stay`, nobody needs us. `stop` is asked in every turn, at least once a second, and told whether a signal came.
    ///
    /// # Errors
    /// The kernel does not let us wait.
    pub fn run(&mut self, stay: bool, mut stop: impl FnMut(bool) -> bool) -> io::Result<()> {
        let mut events = Vec::new();
        let mut interrupted = false;
        let mut busy = Instant::now();
        while !stop(interrupted) {
            if self.broker.is_some() || self.guests.values().any(|guest| guest.device.is_some()) {
                busy = Instant::now();
            } else if !stay && busy.elapsed() > LONELY {
                break;
            }
            events.clear();
            interrupted = match self.set.wait(Some(self.patience()), &mut events) {
                Ok(()) => false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => true,
                Err(error) => return Err(error),
            };
            let mut now = Instant::now();
            for (token, ready) in events.drain(..) {
                let domain = self.domain_of(token);
                self.handle(token, ready);
                now = self.account.note(domain, now);
            }
            self.attach_again();
            self.look_at_polled();
            self.turn();
            self.tell_account();
        }
        Ok(())
    }

    /// How long nothing needs to be done.
    fn patience(&self) -> Duration {
        if !self.polled.is_empty() || self.guests.values().any(|guest| guest.pressed) {
            return Duration::ZERO;
        }
        let rest = self.rest();
        let soon = self.attachments.values().filter_map(|attachment| attachment.again).min();
        let left = soon.map(|at| at.saturating_duration_since(Instant::now()));
        left.unwrap_or(Duration::from_secs(1)).min(Duration::from_secs(1)).min(rest)
    }

    /// For whom this event is handled; 0 for nobody in particular.
    fn domain_of(&self, token: u64) -> u32 {
        match Topic::from_token(token) {
            Some((Topic::Listener | Topic::Device | Topic::Kick, cid)) => cid as u32,
            Some((Topic::Attachment, id)) => self.attachments.get(&id).map_or(0, |attachment| attachment.cid),
            Some((Topic::Bell, id)) => self.flows.get(&id).map_or(0, |flow| flow.key_of(OPENER).cid),
            _ => 0,
        }
    }

    fn tell_account(&mut self) {
        for (cid, cpu_us) in self.account.share_out(Instant::now()) {
            // What is done for nobody in particular is on no account.
            if cid != 0 {
                self.tell_broker(0, &Message::GuestCpu { cid, cpu_us });
            }
        }
    }

    fn handle(&mut self, token: u64, ready: Ready) {
        let Some((topic, which)) = Topic::from_token(token) else { return };
        let cid = which as u32;
        match topic {
            Topic::Broker if which == 0 => self.meet_broker(),
            Topic::Broker => self.hear_broker(ready),
            Topic::Listener => self.meet_monitor(cid),
            Topic::Device => self.hear_monitor(cid),
            Topic::Kick => {
                self.look_at_seats(cid);
                self.mark_guest(cid);
            }
            Topic::Attachment => self.hear_broker_through(which, ready),
            Topic::Bell => self.hear_bell(which),
        }
    }

    /// What is most urgent is moved; every guest for which something waits gets it.
    fn turn(&mut self) {
        self.serve();
        let cids: Vec<u32> = self.guests.keys().copied().collect();
        let mut now = Instant::now();
        for cid in cids {
            if let Some(guest) = self.guests.get_mut(&cid) {
                guest.pressed = false;
            }
            self.deliver(cid);
            let Some(guest) = self.guests.get_mut(&cid) else { continue };
            let Some(device) = &mut guest.device else { continue };
            // Who receives first: it is what somebody waits for.
            let mut told = Ok(());
            for index in [RX, TX] {
                if let Some((vring, memory)) = device.vring(index) {
                    told = told.and(vring.tell(&memory.clone()));
                }
            }
            if let Err(fault) = told {
                self.blame(cid, &fault);
            }
            now = self.account.note(cid, now);
        }
    }

    // ---- the broker

    fn meet_broker(&mut self) {
        let accepted = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        let Ok(socket) = accepted else { return };
        // A broker that starts takes the place of the one before.
        self.hang_up_broker();
        if self.set.add(socket.as_fd(), Topic::Broker.token(1)).is_ok() {
            self.broker = Some(Line::new(socket));
        }
    }

    fn hear_broker(&mut self, ready: Ready) {
        if let Some(line) = self.broker.as_mut().filter(|_| ready.writable) {
            line.handle_writable();
            self.watch_broker();
        }
        loop {
            let Some(line) = &self.broker else { return };
            let (packet, descriptors) = match line.receive() {
                Ok(Some(received)) => received,
                Ok(None) => return,
                Err(_) => break,
            };
            let Ok((request, message)) = control::decode(&packet) else { break };
            match message {
                Message::Guest { cid, name } => {
                    let Ok([listener, door]) = <[OwnedFd; 2]>::try_from(descriptors) else { break };
                    self.add_guest(cid, name, listener, door);
                    self.tell_broker(request, &Message::Done {});
                    self.tell_state(cid);
                }
                Message::GuestGone { cid } => {
                    self.remove_guest(cid);
                    self.tell_broker(request, &Message::Done {});
                }
                _ => break,
            }
        }
        self.hang_up_broker();
    }

    fn hang_up_broker(&mut self) {
        if let Some(line) = self.broker.take() {
            let _ = self.set.remove(line.as_fd());
        }
    }

    fn tell_broker(&mut self, request: u32, message: &Message<'_>) {
        if let Some(line) = &mut self.broker {
            line.send(request, message, &[]);
            self.watch_broker();
        }
    }

    fn watch_broker(&mut self) {
        let Some(line) = &mut self.broker else { return };
        if line.watch(&self.set, Topic::Broker.token(1)).is_none() {
            // It names its guests again when it comes again.
            self.hang_up_broker();
        }
    }

    fn add_guest(&mut self, cid: u32, name: &str, listener: OwnedFd, door: OwnedFd) {
        if self.set.add(listener.as_fd(), Topic::Listener.token(cid.into())).is_err() {
            return;
        }
        let home = if let Some(guest) = self.guests.get_mut(&cid) {
            let _ = self.set.remove(guest.listener.as_fd());
            (guest.listener, guest.door) = (listener, door);
            let home = guest.home;
            self.lose_broker(home);
            home
        } else {
            let home = self.new_attachment(cid, None);
            let guest = Guest {
                name: name.to_owned(),
                listener,
                door,
                device: None,
                home,
                ready: VecDeque::new(),
                flows: HashSet::new(),
                resets: VecDeque::new(),
                held_back: false,
                seats: HashMap::new(),
                begun: None,
                marked: false,
                terms: Terms::default(),
                waiting: 0,
                pressed: false,
                state: GuestState::Waiting,
            };
            self.guests.insert(cid, guest);
            home
        };
        self.attach(home);
    }

    fn remove_guest(&mut self, cid: u32) {
        self.end_device(cid, "the domain was removed");
        self.account.forget(cid);
        if let Some(guest) = self.guests.remove(&cid) {
            let _ = self.set.remove(guest.listener.as_fd());
            let gone: Vec<u64> =
                self.attachments.iter().filter(|(_, a)| a.cid == cid).map(|(id, _)| *id).collect();
            for id in gone {
                if let Some(line) = self.attachments.remove(&id).and_then(|attachment| attachment.line) {
                    let _ = self.set.remove(line.as_fd());
                }
            }
        }
    }

    // ---- monitors

    fn meet_monitor(&mut self, cid: u32) {
        let Some(guest) = self.guests.get_mut(&cid) else { return };
        let accepted =
            rustix::net::accept_with(&guest.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
        let Ok(socket) = accepted else { return };
        // A second monitor is turned away: the first one has the guest.
        if guest.device.is_none() && self.set.add(socket.as_fd(), Topic::Device.token(cid.into())).is_ok() {
            guest.device = Some(Device::new(socket, cid));
            self.note_state(cid, "a monitor has connected");
        }
    }

    fn hear_monitor(&mut self, cid: u32) {
        for _ in 0..MESSAGES_A_TURN {
            let Some(device) = self.guests.get_mut(&cid).and_then(|guest| guest.device.as_mut()) else {
                return;
            };
            let heard = device.handle_readable();
            for kick in device.retired() {
                let _ = self.set.remove(kick.as_fd());
            }
            match heard {
                Ok(None) => return,
                Ok(Some(Changed::Nothing)) => {}
                Ok(Some(Changed::Memory)) => self.check_seats(),
                Ok(Some(Changed::Started(index))) => {
                    if let Some(kick) = device.kick(index) {
                        let _ = self.set.add_edge(kick, Topic::Kick.token(u64::from(cid)));
                    }
                    if let Some((vring, memory)) = device.vring(index) {
                        let memory = memory.clone();
                        vring.listen(&memory);
                    }
                    self.mark_guest(cid);
                    self.note_state(cid, "");
                }
                Ok(Some(Changed::Stopped(index))) => {
                    if index == TX || index == RX {
                        self.reset_flows(cid);
                        self.note_state(cid, "the guest has reset its device");
                    }
                }
                Err(fault) => {
                    self.end_device(cid, &fault.to_string());
                    return;
                }
            }
        }
    }

    /// A fault of a guest's or its monitor's, or its end: the device is gone, and with it all connections.
    pub(crate) fn end_device(&mut self, cid: u32, why: &str) {
        self.reset_flows(cid);
        let Some(guest) = self.guests.get_mut(&cid) else { return };
        if let Some(device) = guest.device.take() {
            let _ = self.set.remove(device.as_fd());
            for index in [RX, TX] {
                if let Some(kick) = device.kick(index) {
                    let _ = self.set.remove(kick);
                }
            }
            self.note_state(cid, why);
        }
    }

    pub(crate) fn blame(&mut self, cid: u32, fault: &Fault) {
        self.end_device(cid, &fault.to_string());
    }

    fn reset_flows(&mut self, cid: u32) {
        let Some(guest) = self.guests.get_mut(&cid) else { return };
        guest.ready.clear();
        guest.resets.clear();
        guest.begun = None;
        let seats: Vec<u32> = guest.seats.keys().copied().collect();
        for seat in seats {
            self.leave_seat(cid, seat);
        }
        let Some(guest) = self.guests.get_mut(&cid) else { return };
        let flows: Vec<FlowId> = guest.flows.iter().copied().collect();
        for flow in flows {
            self.end_flow(flow, By::Guest(cid));
        }
    }

    fn note_state(&mut self, cid: u32, text: &str) {
        let Some(guest) = self.guests.get_mut(&cid) else { return };
        let state = match &guest.device {
            None => GuestState::Waiting,
            Some(device) if device.running() => GuestState::Running,
            Some(_) => GuestState::Attached,
        };
        guest.state = state;
        self.tell_broker(0, &Message::GuestState { cid, state, text });
    }

    fn tell_state(&mut self, cid: u32) {
        let Some(state) = self.guests.get(&cid).map(|guest| guest.state) else { return };
        self.tell_broker(0, &Message::GuestState { cid, state, text: "" });
        self.tell_broker(0, &Message::GuestCpu { cid, cpu_us: self.account.spent(cid) });
    }

    // ---- what the parts need of each other

    pub(crate) fn new_flow(&mut self) -> FlowId {
        self.last_flow += 1;
        self.last_flow
    }

    pub(crate) fn new_attachment(&mut self, cid: u32, app: Option<FlowId>) -> u64 {
        self.last_attachment += 1;
        self.attachments.insert(self.last_attachment, Attachment::new(cid, app));
        self.last_attachment
    }

    pub(crate) fn watch_attachment(&self, id: u64) {
        if let Some(line) = self.attachments.get(&id).and_then(|attachment| attachment.line.as_ref()) {
            let _ = self.set.add(line.as_fd(), Topic::Attachment.token(id));
        }
    }

    /// Report also when the broker's socket can be written again, while something waits for that.
    pub(crate) fn watch_blocked(&mut self, id: u64) {
        let Some(line) = self.attachments.get_mut(&id).and_then(|attachment| attachment.line.as_mut()) else {
            return;
        };
        if line.watch(&self.set, Topic::Attachment.token(id)).is_none() {
            // The next broker is shown what is held.
            self.lose_broker(id);
        }
    }

    pub(crate) fn watch_bell(&self, flow: FlowId, bell: BorrowedFd<'_>) -> bool {
        self.set.add(bell, Topic::Bell.token(flow)).is_ok()
    }
}
