//! What waits for the wire: a queue for each domain, served in turn by bytes.

use std::collections::{HashMap, VecDeque};

use isthmus_proto::sched::{Scheduler, Terms};

/// What became of a frame that was handed to the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    Yes,
    /// No room now: it is kept.
    Full,
    /// It never can be sent.
    Failed,
}

/// Of the scheduler's rounds of 128 KiB a tenth: two long frames, so that nobody waits for many of another's.
const TURN: Terms = Terms { class: 0, weight: 10, rate: 0 };
/// What a frame takes on the wire beside its bytes: preamble, check sequence and gap.
const OVERHEAD: usize = 24;
/// Frames on their way to the wire late, for tests.
const LATE_MAX: usize = 64;
/// A late frame is sent so much later at most, µs.
const LATE_US: u64 = 10_000;
/// Buffers kept for frames to come.
const SPARE_MAX: usize = 256;

#[derive(Default)]
struct Queue {
    frames: VecDeque<Vec<u8>>,
    bytes: usize,
}

/// Queues by tenant: a domain, or the card itself.
pub(crate) struct Outgoing {
    queues: HashMap<u32, Queue>,
    scheduler: Scheduler,
    late: VecDeque<(u64, u32, Vec<u8>)>,
    spare: Vec<Vec<u8>>,
    frames_max: usize,
    bytes_max: usize,
}

impl Outgoing {
    /// What each tenant may have waiting.
    pub(crate) fn new(frames_max: usize, bytes_max: usize) -> Self {
        Self {
            queues: HashMap::new(),
            scheduler: Scheduler::default(),
            late: VecDeque::new(),
            spare: Vec::new(),
            frames_max,
            bytes_max,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.scheduler.is_empty()
    }

    /// Is there room for one more frame of any length?
    pub(crate) fn has_room(&self, tenant: u32) -> bool {
        let queue = self.queues.get(&tenant);
        queue.is_none_or(|queue| queue.frames.len() < self.frames_max && queue.bytes < self.bytes_max)
    }

    /// `false`: this tenant has too much waiting; the frame is gone.
    pub(crate) fn push(&mut self, tenant: u32, frame: &[u8], min_len: usize) -> bool {
        if !self.has_room(tenant) {
            return false;
        }
        let bytes = self.copy(frame, min_len);
        self.enqueue(tenant, bytes);
        self.release(|_, of| of == tenant);
        true
    }

    /// As [`Outgoing::push`], behind the tenant's next frame or a little later.
    pub(crate) fn push_late(&mut self, tenant: u32, frame: &[u8], min_len: usize, now_us: u64) -> bool {
        if self.late.len() >= LATE_MAX {
            return self.push(tenant, frame, min_len);
        }
        let bytes = self.copy(frame, min_len);
        self.late.push_back((now_us + LATE_US, tenant, bytes));
        true
    }

    fn copy(&mut self, frame: &[u8], min_len: usize) -> Vec<u8> {
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.clear();
        bytes.extend_from_slice(frame);
        if bytes.len() < min_len {
            bytes.resize(min_len, 0);
        }
        bytes
    }

    fn enqueue(&mut self, tenant: u32, bytes: Vec<u8>) {
        let queue = self.queues.entry(tenant).or_default();
        queue.bytes += bytes.len();
        queue.frames.push_back(bytes);
        if queue.frames.len() == 1 {
            self.scheduler.push(tenant, TURN, tenant.into());
        }
    }

    fn release(&mut self, which: impl Fn(u64, u32) -> bool) {
        while let Some(at) = self.late.iter().position(|(due, tenant, _)| which(*due, *tenant)) {
            let Some((_, tenant, bytes)) = self.late.remove(at) else { return };
            self.enqueue(tenant, bytes);
        }
    }

    /// Late frames whose time has come.
    pub(crate) fn handle_timeout(&mut self, now_us: u64) {
        self.release(|due, _| due <= now_us);
    }

    pub(crate) fn poll_timeout(&self) -> Option<u64> {
        self.late.front().map(|(due, ..)| *due)
    }

    /// Send up to `limit` frames, whoever's turn it is; `done` hears of each that is gone. `true`: the wire is full.
    pub(crate) fn transmit(
        &mut self,
        limit: usize,
        mut send: impl FnMut(&[u8]) -> Sent,
        mut done: impl FnMut(u32, usize, Sent),
    ) -> bool {
        for _ in 0..limit {
            let Some((_, tenant, class)) = self.scheduler.pop() else { return false };
            let Some(queue) = self.queues.get_mut(&tenant) else { continue };
            let Some(frame) = queue.frames.front() else { continue };
            let (len, sent) = (frame.len(), send(frame));
            if sent == Sent::Full {
                self.scheduler.push(tenant, TURN, tenant.into());
                return true;
            }
            self.scheduler.charge(tenant, class, len + OVERHEAD);
            queue.bytes -= len;
            if let Some(buffer) = queue.frames.pop_front().filter(|_| self.spare.len() < SPARE_MAX) {
                self.spare.push(buffer);
            }
            if !queue.frames.is_empty() {
                self.scheduler.push(tenant, TURN, tenant.into());
            }
            done(tenant, len, sent);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(queue: &mut Outgoing, limit: usize) -> Vec<(u32, usize)> {
        let mut got = Vec::new();
        queue.transmit(limit, |_| Sent::Yes, |tenant, len, _| got.push((tenant, len)));
        got
    }

    #[test]
    fn two_domains_share_the_wire_by_bytes_whatever_their_frames() {
        let mut queue = Outgoing::new(1_000_000, usize::MAX);
        for _ in 0..20_000 {
            queue.push(1, &[1; 9014], 60);
        }
        for _ in 0..40_000 {
            queue.push(2, &[2; 1014], 60);
        }
        let mut bytes = [0usize; 3];
        for (tenant, len) in sent(&mut queue, 20_000) {
            bytes[tenant as usize] += len + OVERHEAD;
        }
        let share = bytes[1] as f64 / (bytes[1] + bytes[2]) as f64;
        assert!((0.45..0.55).contains(&share), "{bytes:?}");
    }

    #[test]
    fn who_sends_little_does_not_wait_behind_who_sends_much() {
        let mut queue = Outgoing::new(1000, usize::MAX);
        for _ in 0..1000 {
            queue.push(1, &[1; 9014], 60);
        }
        sent(&mut queue, 5);
        queue.push(2, &[2; 60], 60);
        let before = sent(&mut queue, 100).iter().position(|(tenant, _)| *tenant == 2);
        assert!(before.is_some_and(|before| before <= 3), "{before:?}");
    }

    #[test]
    fn a_full_wire_keeps_what_it_did_not_take_in_order() {
        let mut queue = Outgoing::new(100, 1 << 20);
        for number in 0..10 {
            assert!(queue.push(1, &[number; 70], 60));
        }
        let (mut room, mut got) = (0, Vec::new());
        while !queue.is_empty() {
            room += 3;
            queue.transmit(
                usize::MAX,
                |frame| {
                    if room == 0 {
                        return Sent::Full;
                    }
                    room -= 1;
                    got.push(frame[0]);
                    Sent::Yes
                },
                |_, _, _| {},
            );
        }
        assert_eq!(got, (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn a_queue_has_an_end_in_frames_and_bytes_and_others_have_their_own() {
        let mut queue = Outgoing::new(3, 150);
        assert!(
            [true, true, true, false].map(|room| queue.push(1, &[0; 10], 60) == room).iter().all(|ok| *ok)
        );
        assert!([true, true, false].map(|room| queue.push(2, &[0; 100], 60) == room).iter().all(|ok| *ok));
        assert_eq!(sent(&mut queue, 10).len(), 5);
        assert!(queue.has_room(1) && queue.has_room(2));
    }

    #[test]
    fn a_late_frame_comes_behind_the_next_or_after_a_while() {
        let mut queue = Outgoing::new(10, 1 << 20);
        queue.push_late(1, &[0; 61], 60, 100);
        queue.push(2, &[0; 62], 60);
        queue.push(1, &[0; 63], 60);
        let order: Vec<_> = sent(&mut queue, 10).into_iter().map(|(_, len)| len).collect();
        assert_eq!(order, [62, 63, 61]);
        queue.push_late(1, &[0; 61], 60, 200);
        assert_eq!(queue.poll_timeout(), Some(200 + LATE_US));
        queue.handle_timeout(200);
        assert!(queue.is_empty());
        queue.handle_timeout(200 + LATE_US);
        assert_eq!(sent(&mut queue, 10), [(1, 61)]);
    }
}
