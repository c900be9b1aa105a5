//! One suite, all carriers: what a lane promises whoever carries it, and what a stranger can do
//! with the descriptors that he is given.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use isthmus_engine::Error;
use isthmus_engine::lane::{Counters, Ends, Offer, with_dest, with_source};
use isthmus_ring::layout::{RESET, TAKES_ALL, TAKES_NOTHING};
use isthmus_ring::{Ring, Seen};
use isthmus_sys::memory;
use isthmus_wire::control::{Carrier, SocketKind};
use rustix::fs::SealFlags;

mod suite;

use suite::{LARGE, SECRET, SMALL, pattern, receive, send, send_message};

/// Each function below, and those of the suite, once for each carrier.
macro_rules! contract {
    (suite: $($shared:ident),+; $($name:ident),+ $(,)?) => {
        mod sealed {
            $(#[test] fn $shared() { super::suite::$shared(super::sealed_pair); })+
            $(#[test] fn $name() { super::$name(super::Carrier::Sealed); })+
        }
        mod put {
            $(#[test] fn $shared() { super::suite::$shared(super::put_pair); })+
            $(#[test] fn $name() { super::$name(super::Carrier::Put); })+
        }
    };
}

contract! {
    suite:
    bytes_of_every_size_arrive,
    messages_of_every_size_arrive_whole,
    a_long_walk_around_the_rings,
    two_threads_and_both_directions,
    a_fresh_lane_takes_something_before_anybody_receives,
    the_end_comes_after_the_last_byte;
    a_full_lane_takes_no_more_and_credit_opens_it_again,
    a_message_that_did_not_fit_is_waited_for_and_nothing_less,
    a_receiver_that_stops_is_seen_to,
    one_bell_for_one_sleeper,
    totals_are_what_went_through,
    descriptors_that_are_not_what_they_must_be_are_refused_by_name,
    a_peer_with_another_secret_is_not_heard,
}

struct Pair {
    here: Ends,
    there: Ends,
    offers: [Offer; 2],
}

/// The descriptor that the other side gets.
fn given(offer: &Offer) -> OwnedFd {
    offer.descriptors()[0].try_clone_to_owned().expect("a descriptor")
}

fn pair_of(carrier: Carrier, kind: SocketKind, small: u32, large: u32) -> Pair {
    let offers = [0, 1].map(|_| Offer::new(carrier, small, large).expect("memory"));
    let here = offers[0].join(&given(&offers[1]), small, large, SECRET, kind).expect("a good lane");
    let there = offers[1].join(&given(&offers[0]), small, large, SECRET, kind).expect("a good lane");
    Pair { here, there, offers }
}

fn sealed_pair(kind: SocketKind, small: u32, large: u32) -> suite::Pair {
    let Pair { here, there, .. } = pair_of(Carrier::Sealed, kind, small, large);
    suite::Pair { here, there }
}

fn put_pair(kind: SocketKind, small: u32, large: u32) -> suite::Pair {
    let Pair { here, there, .. } = pair_of(Carrier::Put, kind, small, large);
    suite::Pair { here, there }
}

fn pair(carrier: Carrier, kind: SocketKind) -> Pair {
    pair_of(carrier, kind, SMALL, LARGE)
}

fn a_full_lane_takes_no_more_and_credit_opens_it_again(carrier: Carrier) {
    let mut p = pair_of(carrier, SocketKind::Stream, 8192, 0);
    let data = pattern(0, 100_000);
    let sent = send(&mut p.here, &data);
    assert!(sent <= 8192, "{sent} bytes in a ring of 8192");
    assert!(sent > 8192 - 1024, "only {sent} bytes");
    assert_eq!(send(&mut p.here, &data[sent..]), 0);
    assert!(!p.here.tx.has_space());
    assert!(p.here.tx.in_flight() >= sent);
    let mut got = Vec::new();
    while let Some((piece, _)) = receive(&mut p.there, 700) {
        got.extend(piece);
    }
    assert_eq!(got, data[..sent]);
    let _ = p.there.rx.settle();
    assert!(p.here.tx.has_space());
    assert_eq!(p.here.tx.in_flight(), 0);
    assert_eq!(send(&mut p.here, &data[..500]), 500);
}

/// A sender that took any space for enough would try again and again instead of sleeping, and
/// never hear that its peer is gone.
fn a_message_that_did_not_fit_is_waited_for_and_nothing_less(carrier: Carrier) {
    let mut p = pair_of(carrier, SocketKind::Seqpacket, 65_536, 0);
    let most = p.here.tx.message_max();
    let (large, small) = (pattern(1, most), pattern(2, 1000));
    let mut waiting = 0;
    while send_message(&mut p.here, &small) {
        waiting += 1;
    }
    for _ in 0..waiting / 4 {
        assert!(receive(&mut p.there, 2000).is_some());
    }
    let _ = p.there.rx.settle();
    assert!(!send_message(&mut p.here, &large));
    assert!(!p.here.tx.has_space(), "a quarter is free, but that is not what is waited for");
    while receive(&mut p.there, 2000).is_some() {}
    let _ = p.there.rx.settle();
    assert!(p.here.tx.has_space());
    assert!(send_message(&mut p.here, &large));
    assert_eq!(receive(&mut p.there, most), Some((large, most)));
}

fn a_receiver_that_stops_is_seen_to(carrier: Carrier) {
    for state in [TAKES_NOTHING, RESET] {
        let mut p = pair(carrier, SocketKind::Stream);
        assert_eq!(p.here.tx.peer_takes(), TAKES_ALL);
        p.here.tx.arm().expect("memory");
        assert_eq!(p.there.rx.stop(state), Ok(Ring::Bell), "who waits for space must hear of it");
        assert_eq!(p.here.tx.peer_takes(), state);
        assert!(!p.here.tx.open());
        // And says nothing about the other direction.
        assert!(p.there.tx.open());
    }
}

fn one_bell_for_one_sleeper(carrier: Carrier) {
    let mut p = pair_of(carrier, SocketKind::Stream, 8192, 0);
    let write =
        |from: &mut Ends| with_source(b"x", |source| from.tx.write_stream(source)).expect("memory").ring;
    assert_eq!(write(&mut p.here), Ring::Quiet, "nobody sleeps");
    assert_eq!(receive(&mut p.there, 10), Some((b"x".to_vec(), 1)));
    for _ in 0..3 {
        assert_eq!(p.there.rx.prepare_to_sleep(), Ok((true, Ring::Quiet)));
        assert_eq!(write(&mut p.here), Ring::Bell);
        assert_eq!(write(&mut p.here), Ring::Quiet, "it was woken already");
        p.there.rx.disarm().expect("memory");
        assert_eq!(write(&mut p.here), Ring::Quiet);
        assert_eq!(receive(&mut p.there, 10), Some((b"xxx".to_vec(), 3)));
    }
    assert_eq!(write(&mut p.here), Ring::Quiet);
    assert_eq!(p.there.rx.prepare_to_sleep(), Ok((false, Ring::Quiet)), "there is something: do not sleep");
    // The other way: a sender that waits for space.
    while send(&mut p.here, &[1; 512]) > 0 {}
    p.here.tx.arm().expect("memory");
    assert!(!p.here.tx.has_space());
    let mut bells = 0;
    let mut out = [0; 256];
    while let Ok(Seen::Data(_)) = p.there.rx.look() {
        let (_, _, ring) = with_dest(&mut out, |dest| p.there.rx.read(dest)).expect("an honest sender");
        bells += usize::from(ring == Ring::Bell);
    }
    assert_eq!(bells, 1);
    // The end rings too.
    assert_eq!(p.there.rx.prepare_to_sleep().map(|(quiet, _)| quiet), Ok(true));
    assert_eq!(p.here.tx.finish(), Ok(Ring::Bell));
}

fn totals_are_what_went_through(carrier: Carrier) {
    let mut p = pair(carrier, SocketKind::Seqpacket);
    for size in [10, 0, 5000] {
        assert!(send_message(&mut p.here, &vec![1; size]));
        assert_eq!(receive(&mut p.there, 9000).map(|got| got.1), Some(size));
    }
    let read = |offer: &Offer| {
        Counters::new(carrier, &offer.descriptors(), SMALL, LARGE).expect("our own descriptors").read()
    };
    assert_eq!(read(&p.offers[0]), [5010, 3, 0, 0]);
    assert_eq!(read(&p.offers[1]), [0, 0, 5010, 3]);
}

fn a_peer_with_another_secret_is_not_heard(carrier: Carrier) {
    let offers = [0, 1].map(|_| Offer::new(carrier, SMALL, LARGE).expect("memory"));
    let join = |a: usize, b: usize, secret| {
        offers[a].join(&given(&offers[b]), SMALL, LARGE, secret, SocketKind::Stream).expect("a good lane")
    };
    let (mut here, mut there) = (join(0, 1, SECRET), join(1, 0, SECRET + 2));
    assert_eq!(send(&mut here, b"hello"), 5);
    assert_eq!(there.rx.look(), Ok(Seen::Nothing));
    assert_eq!(send(&mut there, b"hello"), 5);
    assert_eq!(here.rx.look(), Ok(Seen::Nothing));
}

// ---- descriptors

/// A memfd as an offer would make it, but for what the test changes.
struct Forged {
    seals: SealFlags,
    len: usize,
    read: bool,
    write: bool,
}

impl Forged {
    fn make(&self) -> OwnedFd {
        let file = memory::create(c"forged", self.len).expect("memfd");
        if !self.seals.is_empty() {
            memory::seal(file.as_fd(), self.seals).expect("seals");
        }
        match (self.read, self.write) {
            (true, true) => file,
            (true, false) => memory::reopen_read_only(file.as_fd()).expect("reopen"),
            (false, _) => memory::reopen_write_only(file.as_fd()).expect("reopen"),
        }
    }
}

fn descriptors_that_are_not_what_they_must_be_are_refused_by_name(carrier: Carrier) {
    let offer = Offer::new(carrier, SMALL, LARGE).expect("memory");
    let page = Offer::new(Carrier::Put, SMALL, LARGE).expect("memory").counters_descriptor().expect("page");
    let len = offer.geometry.file_len();
    let sealed = carrier == Carrier::Sealed;
    let seals = if sealed { memory::READ_ONLY_SEALS } else { memory::SIZE_SEALS };
    let good = || Forged { seals, len, read: sealed, write: !sealed };
    // What the peer says to it and what the broker says to it, which is the same.
    let verdict = |file: &OwnedFd| {
        let peers = offer.join(file, SMALL, LARGE, SECRET, SocketKind::Stream).map(drop);
        let files = [file.as_fd(), page.as_fd()];
        let brokers = Counters::new(carrier, &files[..if sealed { 1 } else { 2 }], SMALL, LARGE).map(drop);
        let texts = [peers, brokers].map(|result| match result {
            Ok(()) => "good".to_owned(),
            Err(Error::BadAnswer(text)) => text,
            Err(other) => panic!("{other}"),
        });
        assert_eq!(texts[0], texts[1]);
        texts[0].clone()
    };
    let refused = |forged: Forged, why: &str| {
        let text = verdict(&forged.make());
        assert!(text.contains(why), "{text:?} where {why:?} must be");
    };

    assert_eq!(verdict(&good().make()), "good");
    refused(Forged { seals: SealFlags::empty(), ..good() }, "seals 0x0 where");
    for missing in seals.iter() {
        refused(Forged { seals: seals - missing, ..good() }, "seals 0x");
    }
    for len in [0, len - 4096, len + 4096] {
        refused(Forged { len, ..good() }, "bytes where");
    }
    if sealed {
        refused(Forged { read: false, write: true, ..good() }, "it cannot be read");
        refused(Forged { read: true, write: true, ..good() }, "it can be written");
    } else {
        refused(Forged { read: true, write: false, ..good() }, "it cannot be written");
        refused(Forged { read: true, write: true, ..good() }, "it can be read");
    }
    for path in ["/dev/null", "/dev/zero", "/proc/self/exe", "/"] {
        let file = OwnedFd::from(std::fs::File::open(path).expect(path));
        assert!(verdict(&file).contains("not an anonymous file"), "{path}");
    }
    let (socket, _other) = isthmus_sys::packet::pair().expect("sockets");
    assert!(verdict(&socket).contains("not an anonymous file"));
    // Sizes that break the layout are refused before anything is mapped.
    for (small, large) in [(0, 0), (4095, 0), (2 << 20, 0), (4096, 1), (4096, 65 << 20)] {
        let result = offer.join(&good().make(), small, large, SECRET, SocketKind::Stream);
        assert!(matches!(result, Err(Error::BadAnswer(_))), "{small} and {large}");
    }
}

#[test]
fn the_broker_takes_neither_too_few_nor_too_many_nor_unsealed_pages() {
    let offer = Offer::new(Carrier::Put, SMALL, LARGE).expect("memory");
    let files = offer.descriptors();
    let count = |files: &[BorrowedFd<'_>]| Counters::new(Carrier::Put, files, SMALL, LARGE).map(drop);
    assert!(count(&files).is_ok());
    assert!(count(&files[..1]).is_err());
    assert!(count(&[files[0], files[1], files[1]]).is_err());
    assert!(count(&[]).is_err());
    for (seals, len) in [(memory::SIZE_SEALS, 4096), (memory::READ_ONLY_SEALS, 4095)] {
        let page = Forged { seals, len, read: true, write: false }.make();
        assert!(count(&[files[0], page.as_fd()]).is_err());
        assert!(Counters::page(page.as_fd()).is_err());
    }
}

// ---- what a stranger can do with a descriptor

fn errno<T>(result: rustix::io::Result<T>) -> i32 {
    result.err().map_or(0, rustix::io::Errno::raw_os_error)
}

/// The errno of a call that returned `done`, 0 if it worked.
fn outcome(done: i32) -> i32 {
    if done == 0 { 0 } else { io::Error::last_os_error().raw_os_error().unwrap_or(0) }
}

fn reopened(file: BorrowedFd<'_>, flags: i32) -> Option<OwnedFd> {
    let path = std::ffi::CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("no NUL");
    // SAFETY: a path and flags.
    let fd = unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC) };
    // SAFETY: just opened, nobody else has it.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Map one page with `protection`, then try to make it writable: the outcome of each.
fn map(file: BorrowedFd<'_>, protection: i32) -> (i32, i32) {
    // SAFETY: a fresh mapping that nobody uses, gone before this returns.
    unsafe {
        let page = libc::mmap(std::ptr::null_mut(), 4096, protection, libc::MAP_SHARED, file.as_raw_fd(), 0);
        if page == libc::MAP_FAILED {
            return (outcome(-1), 0);
        }
        let changed = outcome(libc::mprotect(page, 4096, libc::PROT_READ | libc::PROT_WRITE));
        libc::munmap(page, 4096);
        (0, changed)
    }
}

fn fallocate(file: BorrowedFd<'_>, mode: i32, len: u64) -> i32 {
    // SAFETY: numbers only.
    outcome(unsafe { libc::fallocate(file.as_raw_fd(), mode, 0, len as i64) })
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// Not the peer, not root, not the same user, and by no way round.
#[test]
fn nobody_but_its_maker_ever_writes_a_sealed_lane() {
    let mut p = pair(Carrier::Sealed, SocketKind::Stream);
    assert_eq!(send(&mut p.here, b"untouched"), 9);
    let ours = given(&p.offers[0]);
    let mut all = vec![ours.try_clone().expect("a descriptor")];
    for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_WRONLY, libc::O_WRONLY | libc::O_APPEND] {
        // To open it again for writing may be possible; to write it is not.
        all.extend(reopened(ours.as_fd(), flags));
    }
    assert!(reopened(ours.as_fd(), libc::O_RDWR | libc::O_TRUNC).is_none());
    for file in &all {
        let file = file.as_fd();
        let writable = memory::access(file).expect("flags").1;
        let no_write = if writable { libc::EPERM } else { libc::EBADF };
        assert_eq!(errno(rustix::io::write(file, b"x")), no_write);
        assert_eq!(errno(rustix::io::pwrite(file, b"x", 65_536)), no_write);
        for size in [0, 4096, 1 << 30] {
            let refused = errno(rustix::fs::ftruncate(file, size));
            assert!([libc::EPERM, libc::EINVAL].contains(&refused), "{refused}");
        }
        for mode in [PUNCH, ZERO, libc::FALLOC_FL_COLLAPSE_RANGE] {
            let refused = fallocate(file, mode, 4096);
            // What tmpfs cannot do at all it says first.
            let known = [libc::EPERM, libc::EBADF, libc::EOPNOTSUPP];
            assert!(known.contains(&refused), "mode {mode}: {refused}");
        }
        for seals in [SealFlags::WRITE, SealFlags::GROW, SealFlags::SEAL] {
            assert_eq!(errno(rustix::fs::fcntl_add_seals(file, seals)), libc::EPERM);
        }
        let (mapped, _) = map(file, libc::PROT_READ | libc::PROT_WRITE);
        assert!([libc::EPERM, libc::EACCES].contains(&mapped), "{mapped}");
        let (mapped, made_writable) = map(file, libc::PROT_READ);
        assert!(mapped != 0 || made_writable == libc::EACCES, "{mapped} {made_writable}");
        let zeros = std::fs::File::open("/dev/zero").expect("zeros");
        // SAFETY: two descriptors; the offsets are the files' own.
        let sent = unsafe { libc::sendfile(file.as_raw_fd(), zeros.as_raw_fd(), std::ptr::null_mut(), 64) };
        assert_eq!(sent, -1);
    }
    write_through_proc_mem(ours.as_fd());
    // The maker cannot take the memory away under its reader either.
    let page = p.offers[0].counters().bytes(65_536, 4096).cast_mut();
    // SAFETY: a page of our own mapping; the call is refused.
    assert_eq!(outcome(unsafe { libc::madvise(page.cast(), 4096, libc::MADV_REMOVE) }), libc::EPERM);
    assert_eq!(receive(&mut p.there, 100), Some((b"untouched".to_vec(), 9)));
    assert_eq!(send(&mut p.here, b"still ours"), 10);
    assert_eq!(receive(&mut p.there, 100), Some((b"still ours".to_vec(), 10)));
}

/// Debuggers write read-only memory through `/proc/self/mem`; not this memory.
fn write_through_proc_mem(file: BorrowedFd<'_>) {
    use std::os::unix::fs::FileExt;
    // SAFETY: a fresh mapping of one page, not used as Rust memory.
    let page = unsafe {
        libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 65_536)
    };
    assert_ne!(page, libc::MAP_FAILED);
    let memory = std::fs::OpenOptions::new().write(true).open("/proc/self/mem").expect("our own memory");
    assert!(memory.write_at(&[0xff; 64], page as u64).is_err(), "a page of a sealed file was written");
    // SAFETY: mapped above.
    unsafe { libc::munmap(page, 4096) };
}

/// A sender reaches its receiver's memory by writing and by nothing else through the descriptor
/// that it was given. (The same user may open it again for reading; that is why an inbox holds
/// nothing but what this sender put there.)
#[test]
fn an_inbox_can_be_written_and_nothing_else() {
    let mut p = pair(Carrier::Put, SocketKind::Stream);
    let inbox = given(&p.offers[1]);
    let file = inbox.as_fd();
    assert_eq!(memory::access(file).expect("flags"), (false, true));
    let mut byte = [0];
    assert_eq!(errno(rustix::io::read(file, &mut byte)), libc::EBADF);
    assert_eq!(errno(rustix::io::pread(file, &mut byte, 65_536)), libc::EBADF);
    for protection in [libc::PROT_READ, libc::PROT_WRITE, libc::PROT_NONE] {
        assert_eq!(map(file, protection).0, libc::EACCES);
    }
    for size in [0, 4096, 1 << 30] {
        assert_eq!(errno(rustix::fs::ftruncate(file, size)), libc::EPERM);
    }
    let len = memory::len(file).expect("a length");
    assert_eq!(errno(rustix::io::pwrite(file, b"x", len)), libc::EPERM, "past the end");
    for seals in [SealFlags::WRITE, SealFlags::FUTURE_WRITE, SealFlags::SEAL] {
        assert_eq!(errno(rustix::fs::fcntl_add_seals(file, seals)), libc::EPERM);
    }
    let mode = rustix::fs::fstat(file).expect("stat").st_mode & 0o777;
    assert_eq!(mode, 0o200, "other users cannot open it again to read it");
    // A hole is zeros to its reader, as if they had been written: no fault, nothing believed.
    assert_eq!(send(&mut p.here, b"gone"), 4);
    assert_eq!(fallocate(file, PUNCH, len), 0);
    assert_eq!(p.there.rx.look(), Ok(Seen::Nothing));
    // The page of totals is its owner's alone.
    let page = p.offers[1].counters_descriptor().expect("page");
    assert_eq!(errno(rustix::io::pwrite(page.as_fd(), b"x", 0)), libc::EBADF);
    if let Some(again) = reopened(page.as_fd(), libc::O_RDWR) {
        assert_eq!(errno(rustix::io::pwrite(&again, b"x", 0)), libc::EPERM);
    }
}
