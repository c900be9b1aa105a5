//! Calls that were taken and not answered yet, in a file, so that whoever comes after a supervisor that died can let them
//! go on. The kernel would not show them again.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

const ENTRY: u64 = 8;
/// Calls that wait at once and are written down. There is a thread of a program for each.
const ENTRIES_MAX: u64 = 65536;

pub struct Ledger {
    file: File,
    places: Mutex<Places>,
}

#[derive(Default)]
struct Places {
    /// (call, place) of those that wait; few at a time.
    taken: Vec<(u64, u64)>,
    free: Vec<u64>,
    /// Places that were ever used.
    used: u64,
}

impl Ledger {
    /// In an empty file that the successor has too.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self { file, places: Mutex::default() }
    }

    /// A call was taken.
    pub fn begin(&self, id: u64) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let place = places.free.pop().unwrap_or(places.used);
        if place >= ENTRIES_MAX {
            return;
        }
        places.used = places.used.max(place + 1);
        places.taken.push((id, place));
        let _ = self.file.write_all_at(&id.to_ne_bytes(), place * ENTRY);
    }

    /// It was answered.
    pub fn end(&self, id: u64) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = places.taken.iter().rposition(|(taken, _)| *taken == id) {
            let (_, place) = places.taken.swap_remove(at);
            places.free.push(place);
            let _ = self.file.write_all_at(&[0; ENTRY as usize], place * ENTRY);
        }
    }
}

/// The calls that a supervisor left unanswered.
#[must_use]
pub fn left(file: &File) -> Vec<u64> {
    let mut bytes = vec![0; (ENTRIES_MAX * ENTRY) as usize];
    let mut len = 0;
    while let Ok(n @ 1..) = file.read_at(&mut bytes[len..], len as u64) {
        len += n;
    }
    let ids = bytes[..len].chunks_exact(ENTRY as usize).filter_map(|chunk| chunk.try_into().ok());
    ids.map(u64::from_ne_bytes).filter(|id| *id != 0).collect()
}
