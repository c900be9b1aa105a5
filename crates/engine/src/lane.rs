//! The two carriers of one kernel, and how a side of a connection brings its memory.
//!
//! | carrier | each side makes | the other side gets | who copies |
//! | --- | --- | --- | --- |
//! | `sealed` | memory it writes, sealed against every other writer | a read-only descriptor | the receiver |
//! | `put` | memory it reads, of fixed size | a write-only descriptor | the kernel, for the sender |

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use isthmus_ring::layout::{COUNTERS, COUNTERS_LEN, LARGE_AT, PAGE};
use isthmus_ring::{Dest, Geometry, Mapped, Region, Rx, Source, Store, StoreFailed, Tx};
use isthmus_sys::mapping::Mapping;
use isthmus_sys::memory::{self, Piece};
use isthmus_wire::control::{Carrier, SocketKind};
use isthmus_wire::record::{
    ALIGN, COVERED_MAX, HEADER, Header, Kind, TRAILER, payload_at, trailer_at, trailer_word,
};

use crate::error::{Error, Result};

/// Small ring of a new lane, bytes.
pub const SMALL_DEFAULT: u32 = 32 * 1024;
/// Large ring of a lane, bytes: one huge page.
pub const LARGE_DEFAULT: u32 = 2 * 1024 * 1024;
/// Longest stream record of a `put` lane, bytes: a call costs the kernel as much as the copy of
/// 32 KiB, so long records cost less, until nothing is left that both ends could copy at once.
const PUT_CHUNK: usize = 256 * 1024;
/// Largest number of buffers in one record of a `put` lane; longer lists are copied together first.
const PIECES: usize = 16;

/// A mapped file, as the ring sees it.
fn region(mapping: Mapping) -> Region {
    let mapping = Arc::new(mapping);
    let (base, len) = (mapping.base(), mapping.len());
    // SAFETY: the mapping begins at a page and lives as long as the region.
    unsafe { Region::new(base, len, mapping) }
}

fn mapping_of(region: &Region) -> Option<&Mapping> {
    region.keeper().downcast_ref::<Mapping>()
}

/// One side's memory, made before the other side is known.
pub struct Offer {
    pub carrier: Carrier,
    pub geometry: Geometry,
    pub small: u32,
    pub large: u32,
    own: Region,
    counters: Region,
    descriptors: Vec<OwnedFd>,
}

impl Offer {
    /// Make this side's memory.
    ///
    /// # Errors
    /// The kernel gives no memory, or the sizes cannot be.
    pub fn new(carrier: Carrier, small: u32, large: u32) -> Result<Self> {
        let geometry = Geometry::new(small, large).map_err(|e| Error::Os {
            what: "ring sizes",
            source: io::Error::new(io::ErrorKind::InvalidInput, e),
        })?;
        let make = match carrier {
            Carrier::Sealed | Carrier::Switch => Self::sealed,
            Carrier::Put => Self::put,
        };
        let (own, counters, descriptors) = make(geometry).map_err(Error::os("making a lane"))?;
        Ok(Self { carrier, geometry, small, large, own, counters, descriptors })
    }

    fn sealed(geometry: Geometry) -> io::Result<(Region, Region, Vec<OwnedFd>)> {
        let len = geometry.file_len();
        let file = memory::create(c"isthmus-lane", len)?;
        let mapping = Mapping::writable(file.as_fd(), len)?;
        // Before the first word is written the page must exist, or a reader would pay for it.
        memory::seal(file.as_fd(), memory::READ_ONLY_SEALS)?;
        let read_only = memory::reopen_read_only(file.as_fd())?;
        let own = region(mapping);
        Ok((own.clone(), own, vec![read_only]))
    }

    fn put(geometry: Geometry) -> io::Result<(Region, Region, Vec<OwnedFd>)> {
        let len = geometry.file_len();
        let file = memory::create(c"isthmus-inbox", len)?;
        let mapping = Mapping::writable(file.as_fd(), len)?;
        memory::seal(file.as_fd(), memory::SIZE_SEALS)?;
        let write_only = memory::reopen_write_only(file.as_fd())?;
        // Other users can then not open the inbox again to read it; the same user still can.
        memory::set_mode(file.as_fd(), 0o200)?;
        let page = memory::create(c"isthmus-counters", PAGE)?;
        let page_mapping = Mapping::writable(page.as_fd(), PAGE)?;
        memory::seal(page.as_fd(), memory::READ_ONLY_SEALS)?;
        let page_read_only = memory::reopen_read_only(page.as_fd())?;
        Ok((region(mapping), region(page_mapping), vec![write_only, page_read_only]))
    }

    /// What to send beside `connect` or `accept`, in this order.
    #[must_use]
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.descriptors.iter().map(AsFd::as_fd).collect()
    }

    /// A descriptor of the counters page, to show to a restarted broker.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn counters_descriptor(&self) -> Result<OwnedFd> {
        let page = self.descriptors.last().ok_or(Error::Closed)?;
        page.try_clone().map_err(Error::os("keeping a lane"))
    }

    /// The page that the broker may read: this side's totals.
    #[must_use]
    pub fn counters(&self) -> &Region {
        &self.counters
    }

    /// Join this side's memory with the other's: the sending and the receiving end.
    ///
    /// `theirs` are the descriptors that came from the broker, `small` and `large` the other
    /// side's ring sizes, checked against what the descriptor really is.
    ///
    /// # Errors
    /// The other side's memory is not what it must be. Nothing of it was used.
    pub fn join(
        &self,
        theirs: &OwnedFd,
        small: u32,
        large: u32,
        secret: u64,
        kind: SocketKind,
    ) -> Result<Ends> {
        let geometry = Geometry::new(small, large).map_err(|e| Error::BadAnswer(e.to_string()))?;
        check(self.carrier, theirs.as_fd(), geometry)?;
        let kind = record_kind(kind);
        let own = self.own.clone();
        match self.carrier {
            Carrier::Sealed | Carrier::Switch => {
                let mapping = Mapping::read_only(theirs.as_fd(), geometry.file_len())
                    .map_err(Error::os("mapping a lane"))?;
                let view = region(mapping);
                let store = || AnyStore::Sealed(sealed_store(&own, self.geometry));
                Ok(Ends {
                    tx: Tx::new(store(), Mapped::new(view.clone()), self.geometry, secret),
                    rx: Rx::new(store(), Mapped::new(view.clone()), geometry, secret, kind),
                    counters: self.counters.clone(),
                    view,
                })
            }
            Carrier::Put => {
                let file = Arc::new(theirs.try_clone().map_err(Error::os("keeping a lane"))?);
                let store = || AnyStore::Put(PutStore::new(Arc::clone(&file), self.counters.clone()));
                // The ring of each direction lies in its receiver's memory.
                let mut rx = Rx::new(store(), Mapped::new(own.clone()), self.geometry, secret, kind);
                let (memory, large) = (own.clone(), self.geometry.large());
                rx.on_grow(move || make_huge(&memory, large));
                Ok(Ends {
                    tx: Tx::new(store(), Mapped::new(own.clone()), geometry, secret),
                    rx,
                    counters: self.counters.clone(),
                    view: own,
                })
            }
        }
    }
}

/// The lanes of a program in a guest, in memory that the guest's agent gave: what the program writes, then, from the
/// next multiple of a huge page, what the switch does.
///
/// Nothing may move these pages: the switch knows where they are.
///
/// # Errors
/// The memory is not what it must be.
pub fn join_seat(memory: &OwnedFd, small: u32, large: u32, secret: u64, kind: SocketKind) -> Result<Ends> {
    let geometry = Geometry::new(small, large).map_err(|e| Error::BadAnswer(e.to_string()))?;
    let stride = seat_stride(geometry);
    let len = memory::len(memory.as_fd()).map_err(Error::os("looking at a seat"))?;
    if len < 2 * stride as u64 {
        return Err(Error::BadAnswer(format!("a seat of {len} bytes where {} must be", 2 * stride)));
    }
    let mapping = Mapping::writable(memory.as_fd(), 2 * stride).map_err(Error::os("mapping a seat"))?;
    let whole = region(mapping);
    let (own, view) = (whole.part(0, stride), whole.part(stride, stride));
    let store = || AnyStore::Sealed(Mapped::new(own.clone()));
    Ok(Ends {
        tx: Tx::new(store(), Mapped::new(view.clone()), geometry, secret),
        rx: Rx::new(store(), Mapped::new(view.clone()), geometry, secret, record_kind(kind)),
        counters: own,
        view,
    })
}

/// From the beginning of one layout in a seat to that of the other.
#[must_use]
pub fn seat_stride(geometry: Geometry) -> usize {
    geometry.file_len().next_multiple_of(isthmus_sys::mapping::HUGE)
}

/// What the records of a socket of this kind are.
#[must_use]
pub fn record_kind(kind: SocketKind) -> Kind {
    match kind {
        SocketKind::Stream => Kind::Stream,
        SocketKind::Seqpacket | SocketKind::Datagram => Kind::Message,
    }
}

fn sealed_store(own: &Region, geometry: Geometry) -> Mapped {
    let memory = own.clone();
    let large = geometry.large();
    Mapped::with_prepare(own.clone(), move || {
        make_huge(&memory, large);
    })
}

/// Huge pages for the large ring, where the kernel gives them; ordinary pages do as well.
///
/// `false`: not now; trying again later may help.
fn make_huge(memory: &Region, large: usize) -> bool {
    let Some(mapping) = mapping_of(memory) else { return true };
    let huge = large & !(isthmus_sys::mapping::HUGE - 1);
    if huge == 0 {
        return true;
    }
    let _ = mapping.prefer_huge(LARGE_AT, huge);
    mapping.collapse(LARGE_AT, huge).is_ok()
}

/// A connection's two ends on this side.
pub struct Ends {
    pub tx: Tx<AnyStore, Mapped>,
    pub rx: Rx<AnyStore, Mapped>,
    /// This side's totals.
    pub counters: Region,
    /// Where received records lie.
    pub view: Region,
}

/// Is this descriptor what the carrier says a peer must bring?
///
/// # Errors
/// Says what it is not.
pub fn check(carrier: Carrier, file: BorrowedFd<'_>, geometry: Geometry) -> Result<()> {
    let wrong = |what: String| Err(Error::BadAnswer(format!("the peer's lane: {what}")));
    let Ok(seals) = memory::seals(file) else { return wrong("not an anonymous file".into()) };
    if !memory::ordinary(file) {
        return wrong("not of ordinary pages".into());
    }
    let wanted = match carrier {
        Carrier::Sealed | Carrier::Switch => memory::READ_ONLY_SEALS,
        Carrier::Put => memory::SIZE_SEALS,
    };
    if !seals.contains(wanted) {
        return wrong(format!("seals {:#x} where {:#x} must be", seals.bits(), wanted.bits()));
    }
    let len = memory::len(file).map_err(Error::os("looking at a lane"))?;
    if len != geometry.file_len() as u64 {
        return wrong(format!("{len} bytes where {} must be", geometry.file_len()));
    }
    let (read, write) = memory::access(file).map_err(Error::os("looking at a lane"))?;
    match carrier {
        Carrier::Sealed | Carrier::Switch if !read => wrong("it cannot be read".into()),
        Carrier::Put if !write => wrong("it cannot be written".into()),
        // Nobody could write sealed memory through it, but whoever brings that is not our engine.
        Carrier::Sealed | Carrier::Switch if write => wrong("it can be written".into()),
        // The sender could map it: then a page would be shared where a rule says that none is.
        Carrier::Put if read => wrong("it can be read".into()),
        Carrier::Sealed | Carrier::Switch | Carrier::Put => Ok(()),
    }
}

/// The totals of one side, for the broker: checks the descriptors of `connect` and `accept`, maps
/// the page read-only.
pub struct Counters(Region);

impl Counters {
    /// # Errors
    /// The descriptors are not what the carrier says they must be.
    pub fn new(carrier: Carrier, files: &[BorrowedFd<'_>], small: u32, large: u32) -> Result<Self> {
        let geometry = Geometry::new(small, large).map_err(|e| Error::BadAnswer(e.to_string()))?;
        let page = match (carrier, files) {
            (Carrier::Sealed | Carrier::Switch, [ring]) => {
                check(carrier, *ring, geometry)?;
                ring
            }
            (Carrier::Put, [inbox, page]) => {
                check(carrier, *inbox, geometry)?;
                page
            }
            _ => {
                let text = format!("{} descriptors for the {} carrier", files.len(), carrier.name());
                return Err(Error::BadAnswer(text));
            }
        };
        Self::page(*page)
    }

    /// Only the page, as beside `resume`.
    ///
    /// # Errors
    /// It is not a page that only its owner can write.
    pub fn page(page: BorrowedFd<'_>) -> Result<Self> {
        let sealed = memory::seals(page).is_ok_and(|seals| seals.contains(memory::READ_ONLY_SEALS));
        if !sealed || memory::len(page).map_err(Error::os("looking at a lane"))? < PAGE as u64 {
            return Err(Error::BadAnswer("the counters page is not a sealed page".into()));
        }
        Ok(Self(region(Mapping::read_only(page, PAGE).map_err(Error::os("mapping a page"))?)))
    }

    /// Bytes and messages sent, bytes and messages received, as their owner says.
    #[must_use]
    pub fn read(&self) -> [u64; COUNTERS_LEN] {
        std::array::from_fn(|i| self.0.read_counter(i))
    }
}

/// Where a side writes what its peer reads.
pub enum AnyStore {
    Sealed(Mapped),
    Put(PutStore),
}

impl Store for AnyStore {
    #[inline]
    fn trailer(&self) -> bool {
        matches!(self, Self::Put(_))
    }

    #[inline]
    fn word(&self, at: usize, value: u64) -> std::result::Result<(), StoreFailed> {
        match self {
            Self::Sealed(store) => store.word(at, value),
            Self::Put(store) => store.write(at, &value.to_ne_bytes()),
        }
    }

    #[inline]
    fn pair(&self, at: usize, first: u64, second: u64) -> std::result::Result<(), StoreFailed> {
        match self {
            Self::Sealed(store) => store.pair(at, first, second),
            Self::Put(store) => {
                let mut both = [0; 16];
                both[..8].copy_from_slice(&first.to_ne_bytes());
                both[8..].copy_from_slice(&second.to_ne_bytes());
                store.write(at, &both)
            }
        }
    }

    #[inline]
    fn half(&self, at: usize, value: u32) -> std::result::Result<(), StoreFailed> {
        match self {
            Self::Sealed(store) => store.half(at, value),
            Self::Put(store) => store.write(at, &value.to_ne_bytes()),
        }
    }

    #[inline]
    fn record(
        &self,
        at: usize,
        commit: u64,
        header: Header,
        source: &mut Source<'_>,
    ) -> std::result::Result<(), StoreFailed> {
        match self {
            Self::Sealed(store) => store.record(at, commit, header, source),
            Self::Put(store) => store.record(at, commit, header, source),
        }
    }

    #[inline]
    fn chunk(&self) -> usize {
        match self {
            Self::Sealed(store) => store.chunk(),
            Self::Put(_) => PUT_CHUNK,
        }
    }

    fn in_place(&self, at: usize, len: usize) -> Option<*mut u8> {
        match self {
            Self::Sealed(store) => store.in_place(at, len),
            Self::Put(_) => None,
        }
    }

    fn prepare_large(&self) {
        if let Self::Sealed(store) = self {
            store.prepare_large();
        }
    }

    #[inline]
    fn counter(&self, index: usize, value: u64) {
        match self {
            Self::Sealed(store) => store.counter(index, value),
            Self::Put(store) => store.counters.counter(index, value),
        }
    }
}

/// The peer's inbox, reached through a write-only descriptor.
///
/// The kernel copies a piece in any order it likes, and pieces one after the other. So a record ends
/// with a trailer word, which the receiver waits for: a piece of its own, or, in a short record of
/// one piece, the sum of the others.
pub struct PutStore {
    file: Arc<OwnedFd>,
    counters: Mapped,
}

impl PutStore {
    fn new(file: Arc<OwnedFd>, counters: Region) -> Self {
        debug_assert!(counters.len() >= COUNTERS + 8 * COUNTERS_LEN);
        Self { file, counters: Mapped::new(counters) }
    }

    fn write(&self, at: usize, bytes: &[u8]) -> std::result::Result<(), StoreFailed> {
        self.pieces(at, &[Piece::new(bytes.as_ptr(), bytes.len())])
    }

    fn pieces(&self, at: usize, pieces: &[Piece]) -> std::result::Result<(), StoreFailed> {
        let wanted: usize = pieces.iter().map(Piece::len).sum();
        // SAFETY: every caller passes pieces of live buffers.
        match unsafe { memory::write_at(self.file.as_fd(), pieces, at as u64) } {
            Ok(n) if n == wanted => Ok(()),
            Ok(_) => Err(StoreFailed { errno: ENOSPC }),
            Err(error) => Err(StoreFailed { errno: error.raw_os_error().unwrap_or(ENOSPC) }),
        }
    }

    fn record(
        &self,
        at: usize,
        commit: u64,
        header: Header,
        source: &mut Source<'_>,
    ) -> std::result::Result<(), StoreFailed> {
        let len = header.len as usize;
        if len <= COVERED_MAX {
            return self.short_record(at, commit, header, source);
        }
        let mut front = [0u8; ALIGN];
        front[..8].copy_from_slice(&commit.to_ne_bytes());
        front[8..HEADER].copy_from_slice(&header.encode().to_le_bytes());
        let mut back = [0u8; 2 * TRAILER];
        let pad = trailer_at(len) - payload_at(len) - len;
        back[pad..pad + TRAILER].copy_from_slice(&(!commit).to_ne_bytes());

        let mut pieces = [Piece::new(std::ptr::null(), 0); PIECES + 2];
        pieces[0] = Piece::new(front.as_ptr(), payload_at(len));
        let mut count = 1;
        let mut copied = Vec::new();
        source.take(len, |start, piece| {
            if count <= PIECES && copied.is_empty() {
                pieces[count] = Piece::new(start, piece);
                count += 1;
            } else {
                if copied.is_empty() {
                    count -= 1;
                    // SAFETY: a piece of the caller's buffer, as is the next one.
                    unsafe { pieces[count].copy_to(&mut copied) };
                }
                // SAFETY: as above.
                unsafe { Piece::new(start, piece).copy_to(&mut copied) };
            }
        });
        if !copied.is_empty() {
            pieces[count] = Piece::new(copied.as_ptr(), copied.len());
            count += 1;
        }
        pieces[count] = Piece::new(back.as_ptr(), pad + TRAILER);
        self.pieces(at, &pieces[..=count])
    }

    /// All in one piece, copied together first: each piece costs the kernel more than the copy of a
    /// few lines. Its trailer covers all of it, so nothing depends on the order.
    fn short_record(
        &self,
        at: usize,
        commit: u64,
        header: Header,
        source: &mut Source<'_>,
    ) -> std::result::Result<(), StoreFailed> {
        let (len, header) = (header.len as usize, header.encode());
        let end = trailer_at(len);
        let mut record = [0u8; HEADER + COVERED_MAX + TRAILER];
        record[..8].copy_from_slice(&commit.to_ne_bytes());
        record[8..HEADER].copy_from_slice(&header.to_le_bytes());
        let mut to = record[HEADER..].as_mut_ptr();
        source.take(len, |start, piece| {
            // SAFETY: the pieces add up to `len`, at most `COVERED_MAX`; the caller's buffer is not
            // ours.
            unsafe {
                std::ptr::copy_nonoverlapping(start, to, piece);
                to = to.add(piece);
            }
        });
        let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_ne_bytes);
        let words = record[HEADER..end].chunks_exact(8).map(word);
        let trailer = trailer_word(commit, header, Some(words));
        record[end..end + TRAILER].copy_from_slice(&trailer.to_ne_bytes());
        self.write(at, &record[..end + TRAILER])
    }
}

/// What a short write to a file of fixed size means: there was no memory for its pages.
const ENOSPC: i32 = 28;

/// A destination over one slice.
pub fn with_dest<T>(buffer: &mut [u8], then: impl FnOnce(&mut Dest<'_>) -> T) -> T {
    let parts = [(buffer.as_mut_ptr(), buffer.len())];
    // SAFETY: the slice is borrowed for the whole call.
    then(&mut unsafe { Dest::new(&parts) })
}

/// A source over one slice.
pub fn with_source<T>(buffer: &[u8], then: impl FnOnce(&mut Source<'_>) -> T) -> T {
    let parts = [(buffer.as_ptr(), buffer.len())];
    // SAFETY: the slice is borrowed for the whole call.
    then(&mut unsafe { Source::new(&parts) })
}

/// A source over two slices, one behind the other.
pub fn with_two_sources<T>(front: &[u8], rest: &[u8], then: impl FnOnce(&mut Source<'_>) -> T) -> T {
    let parts = [(front.as_ptr(), front.len()), (rest.as_ptr(), rest.len())];
    // SAFETY: the slices are borrowed for the whole call.
    then(&mut unsafe { Source::new(&parts) })
}
