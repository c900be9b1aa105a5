//! The connections of programs, and what waits for those whose lane is full.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use isthmus_engine::lane::{with_dest, with_source, with_two_sources};
use isthmus_engine::{Connection, Error, How, Result};

use crate::buffer::Buffer;
use crate::station::PortId;

/// Records that wait for one full lane; more are lost. A lane is full for a moment when it moves to its large ring or
/// its program is late, and a frame that is lost is missed for half a second.
const HELD_MAX: usize = 64;
/// And their bytes.
const HELD_BYTES: usize = 1 << 20;

pub(crate) struct Line {
    pub(crate) connection: Arc<Connection>,
    /// When it last brought something.
    pub(crate) busy_us: u64,
    held: Held,
}

/// Records that wait, oldest first.
#[derive(Default)]
struct Held {
    records: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Held {
    /// `false`: too much waits already.
    fn push(&mut self, head: &[u8], rest: &[u8]) -> bool {
        let room = self.records.len() < HELD_MAX && self.bytes < HELD_BYTES;
        if room {
            self.bytes += head.len() + rest.len();
            self.records.push_back([head, rest].concat());
        }
        room
    }

    fn pop(&mut self) {
        if let Some(record) = self.records.pop_front() {
            self.bytes -= record.len();
        }
    }
}

/// Connections that are looked at; the others ring.
#[derive(Default)]
pub(crate) struct Active {
    ports: Vec<PortId>,
}

impl Active {
    pub(crate) fn is_empty(&self) -> bool {
        self.ports.is_empty()
    }

    pub(crate) fn add(&mut self, port: PortId) {
        if !self.ports.contains(&port) {
            self.ports.push(port);
        }
    }

    /// Look at each once; it stays while `look` says so. Every round begins with another one: of endpoints that are more
    /// than their domain may have frames waiting, only the first find room.
    pub(crate) fn round(&mut self, mut look: impl FnMut(PortId) -> bool) {
        self.ports.retain(|port| look(*port));
        if !self.ports.is_empty() {
            self.ports.rotate_left(1);
        }
    }
}

/// What a connection brought.
pub(crate) enum Took {
    Record,
    Nothing,
    End,
}

#[derive(Default)]
pub(crate) struct Lines {
    lines: HashMap<PortId, Line>,
    /// Those for which something waits.
    holding: Vec<PortId>,
}

impl Lines {
    pub(crate) fn insert(&mut self, port: PortId, connection: Arc<Connection>, now_us: u64) {
        self.lines.insert(port, Line { connection, busy_us: now_us, held: Held::default() });
    }

    pub(crate) fn get(&self, port: PortId) -> Option<&Line> {
        self.lines.get(&port)
    }

    pub(crate) fn get_mut(&mut self, port: PortId) -> Option<&mut Line> {
        self.lines.get_mut(&port)
    }

    pub(crate) fn remove(&mut self, port: PortId) -> Option<Line> {
        self.lines.remove(&port)
    }

    /// Does anything wait for a lane?
    pub(crate) fn holds(&self) -> bool {
        !self.holding.is_empty()
    }

    /// Send a program one record, now or when its lane has room. `false`: too much waits for it already, or it is gone.
    pub(crate) fn put(&mut self, port: PortId, head: &[u8], rest: &[u8]) -> bool {
        let Some(line) = self.lines.get_mut(&port) else { return false };
        if line.held.records.is_empty() {
            match line.send(head, rest) {
                Ok(()) => return true,
                Err(Error::WouldBlock { .. }) => self.holding.push(port),
                Err(_) => return false,
            }
        }
        line.held.push(head, rest)
    }

    /// Send what waits and has room now.
    pub(crate) fn flush(&mut self) {
        let Self { lines, holding } = self;
        holding.retain(|port| lines.get_mut(port).is_some_and(|line| !line.flush()));
    }
}

impl Line {
    fn send(&self, head: &[u8], rest: &[u8]) -> Result<()> {
        with_two_sources(head, rest, |source| self.connection.send_message(source, &How::at_once()))
    }

    /// `true`: nothing waits any more.
    fn flush(&mut self) -> bool {
        while let Some(record) = self.held.records.front() {
            let sent = with_source(record, |source| self.connection.send_message(source, &How::at_once()));
            if matches!(sent, Err(Error::WouldBlock { .. })) {
                return false;
            }
            self.held.pop();
        }
        true
    }

    /// The next record. One that is too long is cut, and then is none.
    pub(crate) fn take(&self, buffer: &mut Buffer) -> Took {
        buffer.fill(|room| match with_dest(room, |dest| self.connection.receive(dest, &How::at_once())) {
            Ok((stored, whole)) if whole > 0 || !self.connection.at_end() => {
                (if whole > stored { 0 } else { stored }, Took::Record)
            }
            Err(Error::WouldBlock { .. }) => (0, Took::Nothing),
            Ok(_) | Err(_) => (0, Took::End),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_for_a_lane_is_bounded_in_records_and_in_bytes() {
        for (len, most) in [(100, HELD_MAX), (HELD_BYTES / 4, 4)] {
            let mut held = Held::default();
            let rest = vec![7; len - 18];
            assert!((0..most).all(|_| held.push(&[1; 18], &rest)));
            assert!(!held.push(&[1; 18], &rest), "{len}");
            held.pop();
            assert!(held.push(&[1; 18], &rest));
            (0..=most).for_each(|_| held.pop());
            assert_eq!((held.records.len(), held.bytes), (0, 0));
        }
    }

    #[test]
    fn every_round_begins_with_another_connection() {
        let mut active = Active::default();
        for port in [7, 8, 9, 8] {
            active.add(port);
        }
        let mut looked = Vec::new();
        for _ in 0..3 {
            active.round(|port| {
                looked.push(port);
                true
            });
        }
        assert_eq!(looked, [7, 8, 9, 8, 9, 7, 9, 7, 8]);
        active.round(|port| port == 8);
        looked.clear();
        active.round(|port| {
            looked.push(port);
            false
        });
        assert_eq!((looked, active.is_empty()), (vec![8], true));
        active.round(|_| true);
    }

    #[test]
    fn endpoints_that_are_more_than_there_is_room_for_find_it_in_turn() {
        let mut active = Active::default();
        (0..10).for_each(|port| active.add(port));
        let mut found = [0; 10];
        for _ in 0..100 {
            let mut room = 3;
            active.round(|port| {
                found[port as usize] += usize::from(room > 0);
                room -= usize::from(room > 0);
                true
            });
        }
        assert_eq!(found, [30; 10]);
    }
}
