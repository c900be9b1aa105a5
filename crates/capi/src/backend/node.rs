//! Endpoints of this program's domain: peers of the node over lanes, those of other nodes through the card.
//!
//! The program attaches to the broker of its node at `mx_init`. There is one board, the card that the broker gave the
//! domain. What a call means is the business of `isthmus_mx`; here it is put into the other words.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use std::{env, io};

use isthmus_engine::Error;
use isthmus_engine::node::{Attachment, Nic, Node as Engine};
use isthmus_mx::{BUFFERED_MAX, ENDPOINTS, How, Parts, Report, Wait, find_station, station_name};
use isthmus_proto::mx::matching::Pattern;
use isthmus_sys::signals::quietly;

use super::{
    Address, Arrived, Board, Decomposed, Endpoint, Fabric, Fault, Host, Options, Outgoing, Part, Patience,
    REQUEST_BITS, RequestId, ReturnCode, Speed, Status, StatusCode, Unexpected, Verdict,
};
use crate::environment;

/// Names the door, or the directory it is in.
const DOOR_ENV: &str = "ISTHMUS_DOOR";
/// Where a container finds its door unless it was told otherwise.
const DOOR_DEFAULT: &str = "/run/isthmus/door/door";
/// The only board.
const BOARD: u32 = 0;
/// The mapper of everybody: programs take those for unreachable that name another one, and here there is one fabric.
const MAPPER: u64 = 0x02_00_00_00_00_01;
/// The broker answers within this.
const ANSWER: Duration = Duration::from_secs(5);

const _: () = assert!(isthmus_mx::RequestId::BITS == REQUEST_BITS);

/// The endpoints that are open: programs ask about an address without saying whose it is.
static OPEN: Mutex<Vec<Weak<isthmus_mx::Endpoint>>> = Mutex::new(Vec::new());

/// The list is whole whatever a thread that held it came to.
fn open_endpoints() -> MutexGuard<'static, Vec<Weak<isthmus_mx::Endpoint>>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An attachment to the broker.
pub struct Node {
    attachment: Arc<Attachment>,
    nic: u64,
}

fn within(time: Duration) -> How<'static> {
    How { deadline: Instant::now().checked_add(time), ..How::default() }
}

fn find_door() -> PathBuf {
    let named = env::var_os(DOOR_ENV).filter(|named| !named.is_empty());
    let named = PathBuf::from(named.unwrap_or_else(|| DOOR_DEFAULT.into()));
    if named.is_dir() { named.join("door") } else { named }
}

/// What this program calls itself.
fn program_name() -> String {
    let path = env::current_exe().unwrap_or_default();
    path.file_name().map_or_else(|| "program".into(), |name| name.to_string_lossy().into_owned())
}

/// Why there is no node, in the words of a driver: no device without a door, none behind it without a broker.
fn no_node(door: &Path, error: &Error) -> Fault {
    let code = match error {
        Error::NoBroker { source, .. } => match source.kind() {
            io::ErrorKind::NotFound => ReturnCode::NoDev,
            io::ErrorKind::PermissionDenied => ReturnCode::NoPerm,
            _ => ReturnCode::NoDriver,
        },
        Error::BadAnswer(_) => ReturnCode::BadKernelVersion,
        Error::Refused { .. } => ReturnCode::NoPerm,
        _ => ReturnCode::NoDriver,
    };
    let what = format!("{error}; the door is {}, or what {DOOR_ENV} names", door.display());
    Fault::new(code, what)
}

fn fault(fault: &isthmus_mx::Fault) -> Fault {
    let code = ReturnCode::from_number(u32::from(fault.code() as u8)).unwrap_or(ReturnCode::Failure);
    match fault {
        isthmus_mx::Fault::Code(_) => code.into(),
        isthmus_mx::Fault::Because(..) => Fault::new(code, fault.to_string()),
    }
}

fn said<T>(result: isthmus_mx::Result<T>) -> Result<T, Fault> {
    result.map_err(|error| fault(&error))
}

fn from_words(address: Address) -> isthmus_mx::Address {
    isthmus_mx::Address::from_words(address.0)
}

/// What the endpoint that knows this address makes of it.
fn ask_owner<T>(ask: impl Fn(&isthmus_mx::Endpoint) -> Option<T>) -> Option<T> {
    let open: Vec<_> = open_endpoints().iter().filter_map(Weak::upgrade).collect();
    open.iter().find_map(|endpoint| ask(endpoint))
}

impl Node {
    fn find(&self, nic: u64, name: &str) -> Option<Nic> {
        self.attachment.find_nic(nic, name, &within(ANSWER)).ok()
    }

    /// The way to other nodes, if this program may take it.
    fn beyond(&self) -> Option<&Attachment> {
        (!environment::stays_on_node()).then_some(&self.attachment)
    }
}

impl Host for Node {
    type Endpoint = Open;

    const ENDPOINTS_MAX: u32 = ENDPOINTS as u32;
    const COPY_SEND_MAX: u32 = isthmus_mx::EAGER_MAX as u32;
    const PIO_SEND_MAX: u32 = 128;
    const COUNTERS: &'static [&'static str] = &["Endpoints open", "Sends lost after they were done"];

    fn start() -> Result<Self, Fault> {
        let door = find_door();
        let attached = quietly(|| Engine::attach(&door, &program_name()));
        let attachment = attached.map_err(|error| no_node(&door, &error))?;
        let found = attachment.find_nic(0, "", &within(ANSWER)).map_err(|error| no_node(&door, &error))?;
        Ok(Self { attachment, nic: found.nic })
    }

    fn boards(&self) -> Vec<Board> {
        vec![Board { nic: self.nic, numa_node: 0, speed: Speed::TenGigabit }]
    }

    fn counters(&self, board: u32) -> Option<Vec<u32>> {
        let open: Vec<_> = open_endpoints().iter().filter_map(Weak::upgrade).collect();
        let lost = open.iter().map(|endpoint| endpoint.lost()).sum();
        let narrow = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        (board == BOARD).then(|| vec![narrow(open.len() as u64), narrow(lost)])
    }

    fn fabric(&self, board: u32) -> Option<Fabric> {
        (board == BOARD).then_some(Fabric { mapper_nic: MAPPER, map_version: 1, hosts: 1 })
    }

    /// A domain of this node is a host with one board, and so is a station of another that has a name; those of this
    /// node come first. A card anywhere can be named by its own address.
    fn nic_named(&self, name: &str) -> Option<u64> {
        let bytes: Vec<&str> = name.split(':').collect();
        if bytes.len() == 6 && bytes.iter().all(|byte| byte.len() == 2) {
            return u64::from_str_radix(&bytes.concat(), 16).ok();
        }
        let domain = name.strip_suffix(":0").unwrap_or(name);
        if domain.is_empty() {
            return None;
        }
        let neighbour = self.find(0, domain).map(|found| found.nic);
        let named = if name.contains(':') { name.to_owned() } else { format!("{name}:{BOARD}") };
        neighbour.or_else(|| quietly(|| find_station(self.beyond()?, &named)))
    }

    fn name_of(&self, nic: u64) -> Option<String> {
        if nic == 0 {
            return None;
        }
        let neighbour = self.find(nic, "").map(|found| format!("{}:{BOARD}", found.name));
        neighbour.or_else(|| quietly(|| station_name(self.beyond()?, nic)))
    }

    fn open(&self, options: Options) -> Result<Open, Fault> {
        if let Some(board) = options.board.filter(|board| *board != BOARD) {
            let what = format!("board {board}: there is only board {BOARD}");
            return Err(Fault::new(ReturnCode::BoardUnknown, what));
        }
        let number =
            options.endpoint.map(u8::try_from).transpose().ok().filter(|n| n.is_none_or(|n| n < ENDPOINTS));
        let Some(endpoint) = number else {
            let what = format!("endpoints are 0 to {}", ENDPOINTS - 1);
            return Err(Fault::new(ReturnCode::BadEndpoint, what));
        };
        let wanted = isthmus_mx::Options {
            endpoint,
            key: options.key,
            contexts: options.contexts,
            wire: !environment::stays_on_node(),
            timing: environment::timing(),
            buffered_max: environment::early_sends_max().unwrap_or(BUFFERED_MAX),
            unexpected_max: options.unexpected_max.map(|max| max as usize),
            ..isthmus_mx::Options::default()
        };
        let opened = Arc::new(said(quietly(|| isthmus_mx::Endpoint::open(&self.attachment, wanted)))?);
        let mut open = open_endpoints();
        open.retain(|endpoint| endpoint.strong_count() > 0);
        open.push(Arc::downgrade(&opened));
        let wait = if environment::spins() { Wait::Spin } else { Wait::default() };
        Ok(Open { endpoint: opened, wait })
    }

    fn decompose(address: Address) -> Decomposed {
        let isthmus_mx::Address { nic, endpoint, session, .. } = from_words(address);
        Decomposed { nic, endpoint: endpoint.into(), session }
    }

    fn context_of(address: Address) -> usize {
        let address = from_words(address);
        ask_owner(|endpoint| endpoint.peer_context(address)).unwrap_or(0) as usize
    }

    fn set_context_of(address: Address, context: usize) {
        let address = from_words(address);
        ask_owner(|endpoint| endpoint.set_peer_context(address, context as u64).ok());
    }
}

/// An endpoint that is open, until [`Endpoint::close`].
pub struct Open {
    endpoint: Arc<isthmus_mx::Endpoint>,
    wait: Wait,
}

fn number(id: RequestId) -> isthmus_mx::RequestId {
    isthmus_mx::RequestId(id.0)
}

fn pieces(parts: &[Part]) -> Parts {
    match parts {
        [one] => Parts::new(&[(one.start, one.len)]),
        many => Parts::new(&many.iter().map(|part| (part.start, part.len)).collect::<Vec<_>>()),
    }
}

fn status(report: &Report) -> Status {
    Status {
        code: StatusCode::from_number(u32::from(report.status as u8)).unwrap_or(StatusCode::Aborted),
        source: Address(report.source.to_words()),
        match_value: report.matching,
        sent: report.length,
        taken: report.transferred,
        context: report.context as usize,
    }
}

fn handler(unexpected: Unexpected) -> isthmus_mx::Handler {
    Arc::new(move |arrived: isthmus_mx::Arrived<'_>| {
        let verdict = unexpected(Arrived {
            source: Address(arrived.source.to_words()),
            match_value: arrived.matching,
            len: arrived.length,
            data: arrived.data,
        });
        match verdict {
            Verdict::Continue => isthmus_mx::Verdict::Continue,
            Verdict::Finished => isthmus_mx::Verdict::Finished,
        }
    })
}

/// NIC 0 is nobody's; of the broker it asks for our own.
fn somebody(nic: u64) -> Result<u64, Fault> {
    let unknown = || Fault::new(ReturnCode::NicNotFound, format!("{nic:#014x}: no such NIC is known"));
    Some(nic).filter(|nic| *nic != 0 && nic >> 48 == 0).ok_or_else(unknown)
}

impl Open {
    fn how(&self, patience: Patience) -> How<'static> {
        let how = match patience {
            Patience::None => How::at_once(),
            Patience::For(time) => within(time),
            Patience::Forever => How::default(),
        };
        How { wait: self.wait, ..how }
    }
}

impl Endpoint for Open {
    fn board(&self) -> u32 {
        BOARD
    }

    fn address(&self) -> Address {
        Address(self.endpoint.address().to_words())
    }

    fn close(&self) -> Result<(), Fault> {
        if self.endpoint.is_in_handler() {
            return Err(ReturnCode::CloseInHandler.into());
        }
        self.endpoint.close();
        open_endpoints().retain(|endpoint| !std::ptr::eq(endpoint.as_ptr(), Arc::as_ptr(&self.endpoint)));
        Ok(())
    }

    fn connect(&self, nic: u64, endpoint: u32, key: u32, patience: Patience) -> Result<Address, Fault> {
        let address = said(self.endpoint.connect(somebody(nic)?, endpoint, key, &self.how(patience)))?;
        Ok(Address(address.to_words()))
    }

    fn iconnect(
        &self,
        nic: u64,
        endpoint: u32,
        key: u32,
        match_value: u64,
        context: usize,
    ) -> Result<RequestId, Fault> {
        let id = self.endpoint.iconnect(somebody(nic)?, endpoint, key, match_value, context as u64);
        said(id).map(|id| RequestId(id.0))
    }

    fn disconnect(&self, address: Address) -> Result<(), Fault> {
        said(self.endpoint.disconnect(from_words(address)))
    }

    unsafe fn isend(&self, send: Outgoing<'_>) -> Result<RequestId, Fault> {
        let Outgoing { parts, to, match_value, synchronous, context } = send;
        let parts = pieces(parts);
        // SAFETY: the caller's promise is the same.
        let id =
            unsafe { self.endpoint.isend(from_words(to), parts, match_value, synchronous, context as u64) };
        said(id).map(|id| RequestId(id.0))
    }

    unsafe fn irecv(&self, parts: &[Part], pattern: Pattern, context: usize) -> Result<RequestId, Fault> {
        // SAFETY: the caller's promise is the same; that its parts are apart it says to C.
        let id = unsafe { self.endpoint.irecv(pattern, pieces(parts), context as u64) };
        said(id).map(|id| RequestId(id.0))
    }

    fn complete(&self, id: RequestId, patience: Patience) -> Result<Option<Status>, Fault> {
        let found = match patience {
            Patience::None => self.endpoint.test(number(id)),
            patience => self.endpoint.wait(number(id), &self.how(patience)),
        };
        Ok(said(found)?.as_ref().map(status))
    }

    fn complete_any(&self, pattern: Pattern, patience: Patience) -> Result<Option<Status>, Fault> {
        let found = said(self.endpoint.wait_any(pattern, &self.how(patience)))?;
        Ok(found.map(|(_, report)| status(&report)))
    }

    fn peek(&self, patience: Patience) -> Result<Option<RequestId>, Fault> {
        Ok(said(self.endpoint.peek(&self.how(patience)))?.map(|id| RequestId(id.0)))
    }

    fn probe(&self, pattern: Pattern, patience: Patience) -> Result<Option<Status>, Fault> {
        Ok(said(self.endpoint.probe(pattern, &self.how(patience)))?.as_ref().map(status))
    }

    fn is_buffered(&self, id: RequestId, patience: Patience) -> Result<bool, Fault> {
        said(self.endpoint.is_buffered(number(id), &self.how(patience)))
    }

    fn context(&self, id: RequestId) -> Result<usize, Fault> {
        said(self.endpoint.context(number(id))).map(|context| context as usize)
    }

    fn cancel(&self, id: RequestId) -> Result<bool, Fault> {
        said(self.endpoint.cancel(number(id)))
    }

    fn forget(&self, id: RequestId) -> Result<(), Fault> {
        said(self.endpoint.forget(number(id)))
    }

    fn set_patience(&self, id: Option<RequestId>, patience: Patience) -> Result<(), Fault> {
        let time = match patience {
            Patience::None => Some(Duration::ZERO),
            Patience::For(time) => Some(time),
            Patience::Forever => None,
        };
        match id {
            Some(id) => said(self.endpoint.set_patience_of(number(id), time)),
            None => {
                self.endpoint.set_patience(time);
                Ok(())
            }
        }
    }

    fn set_unexpected(&self, unexpected: Option<Unexpected>) {
        self.endpoint.set_handler(unexpected.map(handler));
    }

    fn progress(&self) {
        self.endpoint.progress();
    }

    fn pause(&self) {
        self.endpoint.pause();
    }

    fn resume(&self) {
        self.endpoint.resume();
    }

    fn wakeup(&self) {
        self.endpoint.wake_up();
    }
}
