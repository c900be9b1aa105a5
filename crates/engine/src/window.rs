//! Windows: memory of this program that the other side of a `sealed` connection may read where it lies.
//!
//! A [`Window`] is like the memory of a `sealed` lane: we write it, nobody else ever can, and whoever gets its
//! descriptor from the broker reads it. It is lent for a connection when somebody first wants to name it there
//! ([`Connection::lend`]); until the broker has said that the other side was told, it cannot be named. What the other
//! side lent us is a [`View`].
//!
//! All pages of a window are there before it is sealed, and behind the seals none can be taken out: so reading one
//! never makes the kernel find memory, which would be charged to the reader.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Bound;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock, TryLockError, Weak};
use std::time::{Duration, Instant};

use isthmus_ring::{Dest, Mover};
use isthmus_sys::mapping::{HUGE, Mapping};
use isthmus_sys::{cpu, memory};
use isthmus_wire::control::{Carrier, Message, WINDOW_MAX, WINDOWS_MAX};

use crate::connection::Connection;
use crate::error::{Error, Result};
use crate::lock;

/// Windows that the programs of one domain may have lent to this one at a time, and those of all domains: more are not
/// taken, and what lies in them comes through the lane.
const FROM_ONE: usize = 256;
const FROM_ALL: usize = 4096;
/// A window that could not be lent is tried again after this.
const AGAIN: Duration = Duration::from_secs(1);
/// A window is so many whole pages, bytes each.
const PAGE: usize = 4096;

/// Memory of ours that may be lent.
pub struct Window {
    mapping: Mapping,
    /// Read-only.
    file: OwnedFd,
    serial: u64,
    /// For which connections it was lent.
    lent: Mutex<Vec<Weak<Connection>>>,
}

/// Where the windows of this process are: by their beginnings, with their lengths.
static WINDOWS: RwLock<BTreeMap<usize, (usize, Weak<Window>)>> = RwLock::new(BTreeMap::new());
static SERIALS: AtomicU64 = AtomicU64::new(1);

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<window {} of {} bytes>", self.serial, self.mapping.len())
    }
}

impl Window {
    /// At least `len` bytes, zeros, in huge pages where the kernel gives them. All of them are there.
    ///
    /// # Errors
    /// There is not so much memory, or it is more than a window may have.
    pub fn new(len: usize) -> Result<Arc<Self>> {
        let making = Error::os("making a window");
        let too_long = || std::io::Error::from(std::io::ErrorKind::InvalidInput);
        let whole = len.max(1).checked_next_multiple_of(PAGE).filter(|len| *len as u64 <= WINDOW_MAX);
        let made = whole.ok_or_else(too_long).and_then(|len| {
            let file = memory::create(c"isthmus-window", len)?;
            let mapping = Mapping::writable(file.as_fd(), len)?;
            let huge = len & !(HUGE - 1);
            if huge > 0 {
                let _ = mapping.prefer_huge(0, huge);
                let _ = mapping.collapse(0, huge);
            }
            memory::fill(file.as_fd(), len)?;
            memory::seal(file.as_fd(), memory::READ_ONLY_SEALS)?;
            Ok((mapping, memory::reopen_read_only(file.as_fd())?))
        });
        let (mapping, file) = made.map_err(making)?;
        let (base, len) = (mapping.base() as usize, mapping.len());
        let serial = SERIALS.fetch_add(1, Ordering::Relaxed);
        let window = Arc::new(Self { mapping, file, serial, lent: Mutex::default() });
        // Never waited for: a fork may copy it locked. One that is not listed is ordinary memory.
        patiently(|| WINDOWS.try_write(), |windows| windows.insert(base, (len, Arc::downgrade(&window))));
        Ok(window)
    }

    /// The window in which all of `len` bytes at `start` lie, and where in it.
    #[must_use]
    pub fn at(start: *const u8, len: usize) -> Option<(Arc<Self>, u64)> {
        let start = start as usize;
        let windows = match WINDOWS.try_read() {
            Ok(windows) => windows,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let (base, (size, window)) = windows.range((Bound::Unbounded, Bound::Included(start))).next_back()?;
        let at = start - base;
        if at > *size || len > *size - at {
            return None;
        }
        Some((window.upgrade()?, at as u64))
    }

    #[must_use]
    pub fn base(&self) -> *mut u8 {
        self.mapping.base()
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mapping.is_empty()
    }

    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let base = self.base() as usize;
        patiently(|| WINDOWS.try_write(), |windows| windows.remove(&base));
        for connection in lock(&self.lent).drain(..) {
            if let Some(connection) = connection.upgrade() {
                connection.take_back(self.serial);
            }
        }
    }
}

/// Do something under a lock that nobody holds for long, unless a fork has copied it locked.
fn patiently<'a, T: 'a, R>(
    mut try_lock: impl FnMut() -> std::sync::TryLockResult<std::sync::RwLockWriteGuard<'a, T>>,
    then: impl FnOnce(&mut T) -> R,
) -> Option<R> {
    for _ in 0..10_000 {
        match try_lock() {
            Ok(mut guard) => return Some(then(&mut guard)),
            Err(TryLockError::Poisoned(poisoned)) => return Some(then(&mut poisoned.into_inner())),
            Err(TryLockError::WouldBlock) => std::thread::yield_now(),
        }
    }
    None
}

/// Is this a window of `size` bytes: memory that only its lender writes, of fixed size, all of it there?
///
/// # Errors
/// Says what it is not.
pub fn check(file: BorrowedFd<'_>, size: u64) -> Result<()> {
    let wrong = |what: String| Err(Error::BadAnswer(format!("the window: {what}")));
    let looking = || Error::os("looking at a window");
    let Ok(seals) = memory::seals(file) else { return wrong("not an anonymous file".into()) };
    if !memory::ordinary(file) {
        return wrong("not of ordinary pages".into());
    }
    let wanted = memory::READ_ONLY_SEALS;
    if !seals.contains(wanted) {
        return wrong(format!("seals {:#x} where {:#x} must be", seals.bits(), wanted.bits()));
    }
    if memory::access(file).map_err(looking())? != (true, false) {
        return wrong("it is not for reading alone".into());
    }
    let len = memory::len(file).map_err(looking())?;
    if len != size || size == 0 || size > WINDOW_MAX || size % PAGE as u64 != 0 {
        return wrong(format!("{len} bytes where {size} must be, whole pages and at most {WINDOW_MAX}"));
    }
    if !memory::is_filled(file).map_err(looking())? {
        return wrong("parts of it are holes".into());
    }
    Ok(())
}

/// A window of the other side's, which we may read. It can change at any time.
pub struct View {
    mapping: Mapping,
    domain: u32,
    lenders: Arc<Lenders>,
}

impl View {
    #[must_use]
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mapping.is_empty()
    }

    /// Do `len` bytes lie in it, from `at` on?
    #[must_use]
    pub fn has(&self, at: u64, len: u64) -> bool {
        at.checked_add(len).is_some_and(|end| end <= self.mapping.len() as u64)
    }

    /// Copy from `at` on into all of `dest`. What is copied may be any mixture of what the other side writes meanwhile.
    ///
    /// # Panics
    /// It does not lie in the window.
    pub fn copy(&self, at: u64, dest: &mut Dest<'_>, mover: &mut Mover) {
        assert!(self.has(at, dest.left() as u64), "{} bytes at {at} of {}", dest.left(), self.len());
        // SAFETY: within the mapping, by the line above; sealed against getting shorter and against holes.
        unsafe { mover.fill(dest, self.mapping.base().add(at as usize)) };
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.lenders.forget(self.domain);
    }
}

/// How many windows the programs of each domain have lent to this one.
#[derive(Default)]
pub(crate) struct Lenders(Mutex<HashMap<u32, usize>>);

impl Lenders {
    fn note(&self, domain: u32) -> bool {
        let mut counts = lock(&self.0);
        let all: usize = counts.values().sum();
        let one = counts.get(&domain).copied().unwrap_or(0);
        if one >= FROM_ONE || all >= FROM_ALL {
            return false;
        }
        counts.insert(domain, one + 1);
        true
    }

    fn forget(&self, domain: u32) {
        let mut counts = lock(&self.0);
        match counts.get_mut(&domain) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(counts.remove(&domain)),
        }
    }
}

/// What one side of a connection has lent, and what was lent to it.
#[derive(Default)]
pub(crate) struct Windows {
    ours: Mutex<Ours>,
    theirs: Mutex<HashMap<u32, Arc<View>>>,
}

#[derive(Default)]
struct Ours {
    /// By their serial numbers.
    lent: HashMap<u64, Lent>,
    last: u32,
    /// Taken back while no broker could be told.
    untold: Vec<u32>,
}

enum Lent {
    /// The broker has not answered.
    Asked(u32),
    /// The other side was told.
    Has(u32, Weak<Window>),
    /// Not now.
    Refused(Instant),
}

impl Connection {
    /// The number by which the other side knows a window of ours, if it does. If not, it is lent now, and known soon.
    pub fn lend(self: &Arc<Self>, window: &Arc<Window>) -> Option<u32> {
        if self.info.carrier != Carrier::Sealed || self.in_guest() || !self.is_ours() {
            return None;
        }
        let node = self.node()?;
        let id = {
            let mut ours = lock(&self.windows().ours);
            while let Some(id) = ours.untold.last() {
                if !self.tell_taken_back(*id) {
                    return None;
                }
                ours.untold.pop();
            }
            match ours.lent.get(&window.serial) {
                Some(Lent::Has(id, _)) => return Some(*id),
                Some(Lent::Asked(_)) => return None,
                Some(Lent::Refused(when)) if when.elapsed() < AGAIN => return None,
                Some(Lent::Refused(_)) | None => {}
            }
            ours.lent.retain(|_, lent| !matches!(lent, Lent::Refused(when) if when.elapsed() >= AGAIN));
            if ours.lent.len() >= WINDOWS_MAX || !node.lends_windows() {
                return None;
            }
            ours.last = ours.last.checked_add(1)?;
            let id = ours.last;
            ours.lent.insert(window.serial, Lent::Asked(id));
            id
        };
        {
            let mut lent = lock(&window.lent);
            lent.retain(|connection| connection.strong_count() > 0);
            lent.push(Arc::downgrade(self));
        }
        let (connection, serial, lent) = (Arc::downgrade(self), window.serial, Arc::downgrade(window));
        let answered = move |done| {
            let Some(connection) = connection.upgrade() else { return };
            let mut ours = lock(&connection.windows().ours);
            // It may have been taken back.
            if let Some(entry @ Lent::Asked(_)) = ours.lent.get_mut(&serial) {
                *entry = if done { Lent::Has(id, lent) } else { Lent::Refused(Instant::now()) };
            }
        };
        node.ask_now(&self.lend_message(id, window, false), &[window.file()], Box::new(answered));
        None
    }

    fn lend_message(&self, window: u32, what: &Window, again: bool) -> Message<'static> {
        Message::LendWindow {
            connection: self.info.id,
            opener: u8::from(self.info.opener),
            window,
            size: what.len() as u64,
            again: u8::from(again),
        }
    }

    /// It is no more.
    fn take_back(&self, serial: u64) {
        if !self.is_ours() {
            return;
        }
        let gone = lock(&self.windows().ours).lent.remove(&serial);
        if let Some(Lent::Asked(id) | Lent::Has(id, _)) = gone {
            if !self.closed() && !self.tell_taken_back(id) {
                lock(&self.windows().ours).untold.push(id);
            }
        }
    }

    fn tell_taken_back(&self, window: u32) -> bool {
        self.node().is_none_or(|node| !node.lends_windows() || node.say_now(&self.taken_back(window)))
    }

    fn taken_back(&self, window: u32) -> Message<'static> {
        Message::TakeBackWindow { connection: self.info.id, opener: u8::from(self.info.opener), window }
    }

    /// What a broker that was started again must hear of: windows that are lent, and those that were taken back
    /// meanwhile.
    pub(crate) fn lent_windows(&self) -> (Vec<(Message<'static>, Arc<Window>)>, Vec<Message<'static>>) {
        let (held, untold) = {
            let mut ours = lock(&self.windows().ours);
            let held: Vec<_> = ours
                .lent
                .values()
                .filter_map(|lent| match lent {
                    Lent::Has(id, window) => Some((*id, window.upgrade()?)),
                    Lent::Asked(_) | Lent::Refused(_) => None,
                })
                .collect();
            (held, std::mem::take(&mut ours.untold))
        };
        (
            held.into_iter().map(|(id, window)| (self.lend_message(id, &window, true), window)).collect(),
            untold.into_iter().map(|id| self.taken_back(id)).collect(),
        )
    }

    /// A broker that was started again does not have this window: it is not named any more. What to say then.
    pub(crate) fn lend_no_more(&self, window: &Window) -> Option<Message<'static>> {
        let mut ours = lock(&self.windows().ours);
        match ours.lent.insert(window.serial, Lent::Refused(Instant::now())) {
            Some(Lent::Asked(id) | Lent::Has(id, _)) => Some(self.taken_back(id)),
            Some(Lent::Refused(_)) | None => None,
        }
    }

    /// The window of the other side's that has this number.
    #[must_use]
    pub fn view_of(&self, window: u32) -> Option<Arc<View>> {
        lock(&self.windows().theirs).get(&window).map(Arc::clone)
    }

    /// The other side lends this. What is none, or too many, is not taken.
    pub(crate) fn borrow(&self, window: u32, size: u64, file: &OwnedFd, lenders: &Arc<Lenders>) {
        if self.closed() || self.info.carrier != Carrier::Sealed {
            return;
        }
        {
            let theirs = lock(&self.windows().theirs);
            if theirs.len() >= WINDOWS_MAX || theirs.contains_key(&window) {
                return;
            }
        }
        let Ok(len) = usize::try_from(size) else { return };
        if check(file.as_fd(), size).is_err() || !lenders.note(self.info.peer) {
            return;
        }
        let view = match Mapping::read_only(file.as_fd(), len) {
            Ok(mapping) => View { mapping, domain: self.info.peer, lenders: Arc::clone(lenders) },
            Err(_) => return lenders.forget(self.info.peer),
        };
        lock(&self.windows().theirs).insert(window, Arc::new(view));
    }

    /// The other side takes it back. Whoever reads in it still has it.
    pub(crate) fn give_back(&self, window: u32) {
        let gone = lock(&self.windows().theirs).remove(&window);
        drop(gone);
    }

    /// The connection has ended: nothing is lent any more.
    pub(crate) fn forget_windows(&self) {
        lock(&self.windows().ours).lent.clear();
        let gone = std::mem::take(&mut *lock(&self.windows().theirs));
        drop(gone);
    }

    /// So many bytes of ours were taken from a window; so many of the other side's we have taken.
    pub fn count_placed(&self, sent: u32, received: u32) {
        self.count(sent.into(), received.into());
    }

    fn is_ours(&self) -> bool {
        self.generation() == cpu::generation()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_found_by_what_lies_in_them() {
        let window = Window::new(10_000).expect("memory");
        assert_eq!(window.len(), 3 * PAGE);
        let base = window.base().cast_const();
        let at = |start: *const u8, len| Window::at(start, len).map(|(_, at)| at);
        assert_eq!(at(base, 3 * PAGE), Some(0));
        assert_eq!(at(base.wrapping_add(1), 3 * PAGE - 1), Some(1));
        assert_eq!(at(base.wrapping_add(1), 3 * PAGE), None);
        assert_eq!(at(base, usize::MAX), None);
        assert_eq!(at(base.wrapping_sub(1), 1), None);
        assert_eq!(at(base.wrapping_add(3 * PAGE), 1), None);
        drop(window);
        assert_eq!(at(base, 1), None);
    }

    #[test]
    fn what_is_no_window_is_refused() {
        let window = Window::new(PAGE).expect("memory");
        check(window.file(), PAGE as u64).expect("ours is one");
        let refused = |file: &OwnedFd, size| check(file.as_fd(), size).expect_err("no window").to_string();
        let size = PAGE as u64;
        assert!(check(window.file(), 2 * size).is_err());
        assert!(check(window.file(), 0).is_err());
        let make = |len, filled: bool, seals| {
            let file = memory::create(c"test", len).expect("memfd");
            if filled {
                memory::fill(file.as_fd(), len).expect("memory");
            }
            memory::seal(file.as_fd(), seals).expect("seal");
            (memory::reopen_read_only(file.as_fd()).expect("reopen"), file)
        };
        let (holes, _) = make(PAGE, false, memory::READ_ONLY_SEALS);
        assert!(refused(&holes, size).contains("holes"));
        let (partly, whole) = make(2 * PAGE, false, memory::SIZE_SEALS);
        memory::fill(whole.as_fd(), PAGE).expect("memory");
        assert!(refused(&partly, 2 * size).contains("seals"));
        let (reads, writes) = make(PAGE, true, memory::READ_ONLY_SEALS);
        check(reads.as_fd(), size).expect("one");
        assert!(refused(&writes, size).contains("reading alone"));
        let (odd, _) = make(PAGE + 1, true, memory::READ_ONLY_SEALS);
        assert!(refused(&odd, size + 1).contains("whole pages"));
    }

    #[test]
    fn nobody_makes_holes_in_a_window() {
        let window = Window::new(2 * PAGE).expect("memory");
        // SAFETY: a mapping of ours of that length.
        let removed = unsafe { libc::madvise(window.base().cast(), PAGE, libc::MADV_REMOVE) };
        assert_eq!(removed, -1, "its owner has made one");
        // SAFETY: as above; what it drops is the mapping's, not the file's.
        assert_eq!(unsafe { libc::madvise(window.base().cast(), PAGE, libc::MADV_DONTNEED) }, 0);
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&window.file()));
        let writable = std::fs::OpenOptions::new().write(true).open(path).expect("reopened");
        assert!(rustix::fs::fallocate(&writable, punch, 0, PAGE as u64).is_err());
        check(window.file(), 2 * PAGE as u64).expect("all of it is there");
    }

    #[test]
    fn one_lender_does_not_take_all_places() {
        let lenders = Lenders::default();
        assert_eq!((0..1000).filter(|_| lenders.note(1)).count(), FROM_ONE);
        assert!(lenders.note(2));
        lenders.forget(1);
        assert!(lenders.note(1));
        assert!(!lenders.note(1));
        let rest = (3..1000).map(|n| (0..FROM_ONE).filter(|_| lenders.note(n)).count()).sum::<usize>();
        assert_eq!(rest, FROM_ALL - FROM_ONE - 1);
        lenders.forget(2);
        assert!(lenders.note(2));
    }
}
