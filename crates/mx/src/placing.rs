//! Long messages that are taken where they lie: in a window of their sender's.
//!
//! One copy instead of two, all of it by the receiver. A sender names the window in its announcement once the other
//! side was told of it, and lends it when it could have named it for the first time. The receiver takes what it wants
//! and says so; until then the sender's request has not ended, and the bytes stay as they are, if the sender is
//! honest.

use std::collections::VecDeque;
use std::sync::Arc;

use isthmus_engine::window::{View, Window};
use isthmus_engine::{Connection, Mover};

use crate::buffer::Parts;
use crate::requests::{RequestId, Stage};
use crate::state::{EAGER_MAX, State};

/// Shorter messages go through the lane, bytes: all that is announced for its length may be taken. From 64 KiB to
/// 16 MiB one copy was 1.0 to 4.5 times as fast as two with data in the cache, 0.9 to 1.8 times with data that was not,
/// and took a quarter to two thirds of the processors' time (docs/performance.md).
const WINDOW_MIN: usize = EAGER_MAX + 1;
/// Bytes that are copied before others have their turn.
const TURN: usize = 1 << 20;

/// Where a message lies.
pub(crate) struct Place {
    pub window: Arc<View>,
    /// It was made sure that the window has all of the message from here on.
    pub at: u64,
}

struct Job {
    receive: RequestId,
    lane: u32,
    /// The sender's number for the message.
    id: u32,
    place: Place,
    done: usize,
    want: usize,
}

#[derive(Default)]
pub(crate) struct Placing {
    jobs: VecDeque<Job>,
    mover: Mover,
}

impl Placing {
    pub fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Nothing is taken for what came over this lane any more.
    pub fn end_lane(&mut self, lane: u32) {
        self.jobs.retain(|job| job.lane != lane);
    }
}

/// The window of ours in which a message lies, its number for the other side, and where in it; if the other side has
/// it.
pub(crate) fn lies_in(connection: &Arc<Connection>, parts: &Parts) -> Option<(Arc<Window>, u32, u64)> {
    let (start, len) = parts.whole().filter(|(_, len)| *len >= WINDOW_MIN)?;
    let (window, at) = Window::at(start, len)?;
    let id = connection.lend(&window)?;
    Some((window, id, at))
}

impl State {
    pub fn begin_to_place(&mut self, slot: u32, lane: u32, id: u32, place: Place) {
        let Some(receive) = self.requests.id(slot) else { return };
        let Some(request) = self.requests.at(slot) else { return };
        // Whoever sends parts of it all the same sends too many.
        request.got = request.want;
        let want = request.want as usize;
        self.placing.jobs.push_back(Job { receive, lane, id, place, done: 0, want });
    }

    /// Take some more of what lies with its senders; `true`: there was something.
    pub fn place(&mut self) -> bool {
        let mut left = TURN;
        let mut came = false;
        while left > 0 {
            let Some(mut job) = self.placing.jobs.pop_front() else { break };
            came = true;
            let request = self.requests.get(job.receive);
            let Some(request) = request.filter(|request| request.stage == Stage::Under) else { continue };
            let (len, at) = ((job.want - job.done).min(left), job.place.at + job.done as u64);
            let (mover, window) = (&mut self.placing.mover, &job.place.window);
            request.parts.with_dest(&mut [], job.done, len, |dest| window.copy(at, dest, mover));
            job.done += len;
            left -= len;
            if job.done < job.want {
                self.placing.jobs.push_back(job);
                continue;
            }
            self.placed(job.lane, job.id, job.want as u32);
            self.end_receive(job.receive.slot(), Ok(job.want as u32));
        }
        came
    }
}
