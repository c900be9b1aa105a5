//! A sender that is not ours: it has the secret, writes what it likes, and writes it while we look.
#![cfg(not(loom))]

use std::cell::Cell;

use isthmus_ring::{Dest, Fault, Geometry, Rx, Source, Store, StoreFailed, View};
use isthmus_wire::record::{ALIGN, Header, Kind};

const SECRET: u64 = 0x1234_5678_9abc_def1;
const RING: u32 = 4096;

/// A sender as fast as it can be: whenever the receiver looks, the next record is there, and it
/// is always the same.
struct Tireless {
    header: Header,
    position: Cell<u64>,
    looks: Cell<u32>,
    is_commit: Cell<bool>,
}

impl Tireless {
    fn new(kind: Kind, len: u32) -> Self {
        let header = Header { kind, trailer: false, len };
        Self { header, position: Cell::new(0), looks: Cell::new(0), is_commit: Cell::new(true) }
    }
}

impl View for Tireless {
    fn word(&self, _: usize) -> u64 {
        self.looks.set(self.looks.get() + 1);
        assert!(self.looks.get() < 100_000, "the receiver never comes back");
        if self.is_commit.replace(!self.is_commit.get()) {
            return SECRET.wrapping_add(self.position.get());
        }
        let step = if self.header.kind == Kind::Skip { u64::from(RING) } else { ALIGN as u64 };
        self.position.set(self.position.get() + step);
        self.header.encode()
    }

    fn half(&self, _: usize) -> u32 {
        0
    }

    fn copy_out(&self, _: usize, len: usize, dest: &mut Dest<'_>) {
        dest.take(len, |_, _| {});
    }
}

/// Where nobody listens.
struct Nowhere;

impl Store for Nowhere {
    fn trailer(&self) -> bool {
        false
    }

    fn word(&self, _: usize, _: u64) -> Result<(), StoreFailed> {
        Ok(())
    }

    fn half(&self, _: usize, _: u32) -> Result<(), StoreFailed> {
        Ok(())
    }

    fn record(&self, _: usize, _: u64, _: Header, _: &mut Source<'_>) -> Result<(), StoreFailed> {
        Ok(())
    }

    fn in_place(&self, _: usize, _: usize) -> Option<*mut u8> {
        None
    }

    fn prepare_large(&self) {}

    fn counter(&self, _: usize, _: u64) {}
}

#[test]
fn a_sender_of_endless_nothing_holds_nobody() {
    let geometry = Geometry::new(RING, 0).expect("geometry");
    for view in [Tireless::new(Kind::Skip, 0), Tireless::new(Kind::Stream, 0)] {
        let mut rx = Rx::new(Nowhere, view, geometry, SECRET, Kind::Stream);
        assert_eq!(rx.look(), Err(Fault::Idle));
    }
}
