//! What waits for the wire: a queue for each connection. Domains are served in turn by bytes, and so are the connections
//! of a domain among themselves.

use std::collections::{HashMap, VecDeque};

use isthmus_proto::sched::{Scheduler, Terms};
use isthmus_wire::card::FRAME_AT;

use crate::buffer::Buffer;
use crate::station::PortId;

/// What became of a frame that was handed to the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    Yes,
    /// No room now: it is kept.
    Full,
    /// It never can be sent.
    Failed,
}

/// Whose a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sender {
    /// A domain, or the card itself.
    pub(crate) tenant: u32,
    pub(crate) port: PortId,
}

/// Of the scheduler's rounds of 128 KiB a tenth: two long frames, so that nobody waits for many of another's.
const TURN: Terms = Terms { class: 0, weight: 10, rate: 0 };
/// What a frame takes on the wire beside its bytes: preamble, check sequence and gap.
const OVERHEAD: usize = 24;
/// Bytes that a connection may send in its turn among those of its domain. What is left of them is added to the next: a
/// longer frame waits for a few turns.
const ROUND: usize = 16 * 1024;
/// Frames on their way to the wire late, for tests.
const LATE_MAX: usize = 64;
/// A late frame is sent so much later at most, µs.
const LATE_US: u64 = 10_000;
/// Kept for frames to come: short ones, and whole buffers.
const SPARE_MAX: usize = 256;
const WHOLE_MAX: usize = 32;

/// A frame that waits. A long one stays where its record was put; a short one would waste most of that.
enum Waiting {
    Short(Vec<u8>),
    Long(Buffer),
}

impl Waiting {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Short(bytes) => bytes,
            Self::Long(buffer) => buffer.record().get(FRAME_AT..).unwrap_or_default(),
        }
    }

    fn len(&self) -> usize {
        self.bytes().len()
    }
}

/// Of a connection; never empty.
struct Queue {
    frames: VecDeque<Waiting>,
    bytes: usize,
    /// Bytes that it may still send in this round.
    credit: usize,
}

/// The queues of one tenant's connections. Deficit round robin: what somebody does not use of a round is added to its
/// next one, while it has frames.
#[derive(Default)]
struct Queues {
    by_port: HashMap<PortId, Queue>,
    /// The connections that have frames, in the order of their turns.
    round: VecDeque<PortId>,
    frames: usize,
    bytes: usize,
}

impl Queues {
    fn push(&mut self, port: PortId, frame: Waiting) {
        let (queues, round) = (&mut self.by_port, &mut self.round);
        let queue = queues.entry(port).or_insert_with(|| {
            round.push_back(port);
            Queue { frames: VecDeque::new(), bytes: 0, credit: ROUND }
        });
        self.frames += 1;
        self.bytes += frame.len();
        queue.bytes += frame.len();
        queue.frames.push_back(frame);
    }

    /// The frame whose turn it is.
    fn front(&mut self) -> Option<&[u8]> {
        let mut port = *self.round.front()?;
        loop {
            let queue = self.by_port.get_mut(&port)?;
            if queue.credit >= queue.frames.front()?.len() + OVERHEAD {
                break;
            }
            queue.credit += ROUND;
            self.round.rotate_left(1);
            port = *self.round.front()?;
        }
        self.by_port.get(&port)?.frames.front().map(Waiting::bytes)
    }

    /// Take out the frame that [`Queues::front`] showed.
    fn pop(&mut self) -> Option<Waiting> {
        let port = *self.round.front()?;
        let queue = self.by_port.get_mut(&port)?;
        let frame = queue.frames.pop_front()?;
        queue.bytes -= frame.len();
        queue.credit = queue.credit.saturating_sub(frame.len() + OVERHEAD);
        self.frames -= 1;
        self.bytes -= frame.len();
        if queue.frames.is_empty() {
            self.by_port.remove(&port);
            self.round.pop_front();
        }
        Some(frame)
    }
}

pub(crate) struct Outgoing {
    tenants: HashMap<u32, Queues>,
    scheduler: Scheduler,
    late: VecDeque<(u64, Sender, Waiting)>,
    spare: Vec<Vec<u8>>,
    whole: Vec<Buffer>,
    frames_max: usize,
    bytes_max: usize,
}

impl Outgoing {
    /// What each tenant may have waiting.
    pub(crate) fn new(frames_max: usize, bytes_max: usize) -> Self {
        Self {
            tenants: HashMap::new(),
            scheduler: Scheduler::default(),
            late: VecDeque::new(),
            spare: Vec::new(),
            whole: Vec::new(),
            frames_max,
            bytes_max,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.scheduler.is_empty()
    }

    /// Is there room for one more frame of any length? A connection may have as much waiting as its tenant has free: one
    /// alone half of all, two a third each. So there is room for whoever has nothing waiting, and nobody counts them.
    pub(crate) fn has_room(&self, of: Sender) -> bool {
        let Some(tenant) = self.tenants.get(&of.tenant) else { return true };
        let free_frames = self.frames_max.saturating_sub(tenant.frames);
        let free_bytes = self.bytes_max.saturating_sub(tenant.bytes);
        match tenant.by_port.get(&of.port) {
            Some(own) => own.frames.len() < free_frames && own.bytes < free_bytes,
            None => free_frames > 0 && free_bytes > 0,
        }
    }

    /// `false`: this connection, or its tenant, has too much waiting; the frame is gone.
    pub(crate) fn push(&mut self, of: Sender, frame: &[u8], min_len: usize) -> bool {
        if !self.has_room(of) {
            return false;
        }
        let bytes = self.copy(frame, min_len);
        self.enqueue(of, bytes);
        self.release(|_, late| late == of);
        true
    }

    /// As [`Outgoing::push`], of the frame of a record. The record is gone afterwards: there may be another buffer.
    pub(crate) fn push_record(&mut self, of: Sender, record: &mut Buffer, min_len: usize) -> bool {
        let len = record.record().len();
        if len < (record.capacity() / 2).max(FRAME_AT + min_len) {
            return self.push(of, record.record().get(FRAME_AT..).unwrap_or_default(), min_len);
        }
        if !self.has_room(of) {
            return false;
        }
        let next = self.whole.pop().unwrap_or_else(|| Buffer::new(record.capacity()));
        self.enqueue(of, Waiting::Long(std::mem::replace(record, next)));
        self.release(|_, late| late == of);
        true
    }

    /// As [`Outgoing::push`], behind the connection's next frame or a little later.
    pub(crate) fn push_late(&mut self, of: Sender, frame: &[u8], min_len: usize, now_us: u64) -> bool {
        if self.late.len() >= LATE_MAX {
            return self.push(of, frame, min_len);
        }
        let bytes = self.copy(frame, min_len);
        self.late.push_back((now_us + LATE_US, of, bytes));
        true
    }

    fn copy(&mut self, frame: &[u8], min_len: usize) -> Waiting {
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.clear();
        bytes.extend_from_slice(frame);
        if bytes.len() < min_len {
            bytes.resize(min_len, 0);
        }
        Waiting::Short(bytes)
    }

    fn enqueue(&mut self, of: Sender, frame: Waiting) {
        let tenant = self.tenants.entry(of.tenant).or_default();
        tenant.push(of.port, frame);
        if tenant.frames == 1 {
            self.scheduler.push(of.tenant, TURN, of.tenant.into());
        }
    }

    fn release(&mut self, which: impl Fn(u64, Sender) -> bool) {
        while let Some(at) = self.late.iter().position(|(due, of, _)| which(*due, *of)) {
            let Some((_, of, frame)) = self.late.remove(at) else { return };
            self.enqueue(of, frame);
        }
    }

    /// Late frames whose time has come.
    pub(crate) fn handle_timeout(&mut self, now_us: u64) {
        self.release(|due, _| due <= now_us);
    }

    pub(crate) fn poll_timeout(&self) -> Option<u64> {
        self.late.front().map(|(due, ..)| *due)
    }

    /// Send up to `limit` frames, whoever's turn it is; `done` hears of each that is gone: its tenant and its length.
    /// `true`: the wire is full.
    pub(crate) fn transmit(
        &mut self,
        limit: usize,
        mut send: impl FnMut(&[u8]) -> Sent,
        mut done: impl FnMut(u32, usize, Sent),
    ) -> bool {
        for _ in 0..limit {
            let Some((_, number, class)) = self.scheduler.pop() else { return false };
            let Some(tenant) = self.tenants.get_mut(&number) else { continue };
            let Some(frame) = tenant.front() else { continue };
            let (len, sent) = (frame.len(), send(frame));
            if sent == Sent::Full {
                self.scheduler.push(number, TURN, number.into());
                return true;
            }
            self.scheduler.charge(number, class, len + OVERHEAD);
            match tenant.pop() {
                Some(Waiting::Short(bytes)) if self.spare.len() < SPARE_MAX => self.spare.push(bytes),
                Some(Waiting::Long(buffer)) if self.whole.len() < WHOLE_MAX => self.whole.push(buffer),
                _ => {}
            }
            if tenant.frames > 0 {
                self.scheduler.push(number, TURN, number.into());
            }
            done(number, len, sent);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The only connection of a domain.
    fn alone(tenant: u32) -> Sender {
        Sender { tenant, port: 0 }
    }

    /// One of several connections of domain 1.
    fn port(port: PortId) -> Sender {
        Sender { tenant: 1, port }
    }

    fn sent(queue: &mut Outgoing, limit: usize) -> Vec<(u32, usize)> {
        let mut got = Vec::new();
        queue.transmit(limit, |_| Sent::Yes, |tenant, len, _| got.push((tenant, len)));
        got
    }

    /// The first byte and the length of each frame that is sent.
    fn marked(queue: &mut Outgoing, limit: usize) -> Vec<(u8, usize)> {
        let mut got = Vec::new();
        let send = |frame: &[u8]| {
            got.push((frame[0], frame.len()));
            Sent::Yes
        };
        queue.transmit(limit, send, |_, _, _| {});
        got
    }

    #[test]
    fn two_domains_share_the_wire_by_bytes_whatever_their_frames() {
        let mut queue = Outgoing::new(1_000_000, usize::MAX);
        for _ in 0..20_000 {
            queue.push(alone(1), &[1; 9014], 60);
        }
        for _ in 0..40_000 {
            queue.push(alone(2), &[2; 1014], 60);
        }
        let mut bytes = [0usize; 3];
        for (tenant, len) in sent(&mut queue, 20_000) {
            bytes[tenant as usize] += len + OVERHEAD;
        }
        let share = bytes[1] as f64 / (bytes[1] + bytes[2]) as f64;
        assert!((0.45..0.55).contains(&share), "{bytes:?}");
    }

    #[test]
    fn endpoints_of_a_domain_share_by_bytes_whatever_their_frames() {
        let mut queue = Outgoing::new(1_000_000, usize::MAX);
        let lens = [9014, 4160, 1014, 60];
        for (number, len) in (0u8..).zip(lens) {
            for _ in 0..10_000_000 / (len + OVERHEAD) {
                queue.push(port(number.into()), &vec![number; len], 60);
            }
        }
        let mut bytes = [0usize; 4];
        for (number, len) in marked(&mut queue, 20_000) {
            bytes[usize::from(number)] += len + OVERHEAD;
        }
        let (least, most) = (bytes.iter().min().expect("four"), bytes.iter().max().expect("four"));
        assert!(*least > 1_000_000 && most - least <= 2 * ROUND, "{bytes:?}");
    }

    #[test]
    fn who_has_one_frame_at_a_time_gets_no_more_than_who_has_many() {
        let mut queue = Outgoing::new(1_000_000, usize::MAX);
        for _ in 0..3000 {
            queue.push(port(0), &[0; 4096], 60);
        }
        let mut bytes = [0usize; 2];
        for _ in 0..2000 {
            if !queue.tenants[&1].by_port.contains_key(&1) {
                queue.push(port(1), &[1; 9014], 60);
            }
            for (number, len) in marked(&mut queue, 1) {
                bytes[usize::from(number)] += len + OVERHEAD;
            }
        }
        assert!(bytes[1] > 0 && bytes[1] <= bytes[0], "{bytes:?}");
    }

    #[test]
    fn a_domain_with_many_endpoints_gets_no_more_than_one_with_one() {
        let mut queue = Outgoing::new(1_000_000, usize::MAX);
        for round in 0..20_000 {
            queue.push(port(round % 64), &[1; 4096], 60);
            queue.push(alone(2), &[2; 4096], 60);
        }
        let many = sent(&mut queue, 10_000).iter().filter(|(tenant, _)| *tenant == 1).count();
        assert!((4950..=5050).contains(&many), "{many}");
    }

    #[test]
    fn who_sends_little_does_not_wait_behind_who_sends_much() {
        let mut queue = Outgoing::new(1000, usize::MAX);
        while queue.push(port(1), &[1; 9014], 60) {}
        sent(&mut queue, 5);
        queue.push(alone(2), &[2; 60], 60);
        queue.push(port(3), &[3; 60], 60);
        let order = marked(&mut queue, 100);
        for number in [2, 3] {
            let before = order.iter().position(|(mark, _)| *mark == number);
            assert!(before.is_some_and(|before| before <= 4), "{order:?}");
        }
    }

    #[test]
    fn a_full_wire_keeps_what_it_did_not_take_in_order() {
        let mut queue = Outgoing::new(100, 1 << 20);
        for number in 0..10 {
            assert!(queue.push(alone(1), &[number; 70], 60));
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
        let mut fits = |port, tenant, len| queue.push(Sender { tenant, port }, &vec![0; len], 60);
        assert_eq!([1, 2, 3, 4].map(|port| fits(port, 1, 10)), [true, true, true, false]);
        assert_eq!([1, 2, 3].map(|port| fits(port, 2, 100)), [true, true, false]);
        assert_eq!(sent(&mut queue, 10).len(), 5);
        assert!(queue.has_room(alone(1)) && queue.has_room(alone(2)));
    }

    #[test]
    fn an_endpoint_that_floods_leaves_room_for_the_others() {
        for (frames_max, bytes_max) in [(1000, usize::MAX), (usize::MAX, 1000 * 60)] {
            let mut queue = Outgoing::new(frames_max, bytes_max);
            let mut fill = |number| {
                let mut frames = 0;
                while queue.push(port(number), &[0; 60], 60) {
                    frames += 1;
                }
                frames
            };
            assert_eq!([fill(0), fill(1), fill(2)], [500, 250, 125]);
            // Once there is room again it is shared by all.
            for _ in 0..10_000 {
                sent(&mut queue, 1);
                for number in 0..3 {
                    queue.push(port(number), &[0; 60], 60);
                }
            }
            let waiting: Vec<_> = queue.tenants[&1].by_port.values().map(|own| own.frames.len()).collect();
            assert!(waiting.iter().all(|frames| (249..=251).contains(frames)), "{waiting:?}");
            assert!(queue.has_room(port(3)));
        }
    }

    #[test]
    fn a_long_frame_is_sent_from_where_its_record_lies_and_a_short_one_is_copied() {
        let mut queue = Outgoing::new(1000, usize::MAX);
        let mut buffer = Buffer::new(1000);
        let lens = [2, 40, 499, 500, 1000, 61, 777];
        for (mark, len) in (0u8..).zip(lens) {
            let places = [buffer.record().as_ptr()];
            buffer.fill(|room| {
                room[..len].fill(mark);
                (len, ())
            });
            assert!(queue.push_record(alone(1), &mut buffer, 60));
            assert_eq!(buffer.capacity(), 1000);
            assert_eq!(places[0] == buffer.record().as_ptr(), len < 500, "{len}");
        }
        let (mut sent, padded) = (Vec::new(), |len: usize| (len - FRAME_AT).max(60));
        queue.transmit(
            100,
            |frame| {
                sent.push(frame.to_vec());
                Sent::Yes
            },
            |_, _, _| {},
        );
        for (mark, (len, frame)) in (0u8..).zip(lens.into_iter().zip(&sent)) {
            assert_eq!(frame.len(), padded(len));
            let (bytes, padding) = frame.split_at(len - FRAME_AT);
            assert!(bytes.iter().all(|byte| *byte == mark) && padding.iter().all(|byte| *byte == 0));
        }
        assert_eq!((sent.len(), queue.whole.len()), (lens.len(), 3));
        let mut full = Outgoing::new(1, usize::MAX);
        assert!(full.push_record(alone(1), &mut buffer, 60) && !full.push_record(alone(1), &mut buffer, 60));
    }

    #[test]
    fn of_whom_all_was_sent_nothing_is_left() {
        let mut queue = Outgoing::new(1000, 1 << 20);
        for number in 0..100 {
            assert!(queue.push(port(number), &[0; 100], 60) && queue.push(port(number), &[0; 9000], 60));
        }
        assert_eq!(sent(&mut queue, 1000).len(), 200);
        let Queues { by_port, round, frames, bytes } = &queue.tenants[&1];
        assert!(by_port.is_empty() && round.is_empty() && queue.is_empty());
        assert_eq!((*frames, *bytes), (0, 0));
    }

    #[test]
    fn a_late_frame_comes_behind_the_next_or_after_a_while() {
        let mut queue = Outgoing::new(10, 1 << 20);
        queue.push_late(alone(1), &[0; 61], 60, 100);
        queue.push(alone(2), &[0; 62], 60);
        queue.push(alone(1), &[0; 63], 60);
        let order: Vec<_> = sent(&mut queue, 10).into_iter().map(|(_, len)| len).collect();
        assert_eq!(order, [62, 63, 61]);
        queue.push_late(alone(1), &[0; 61], 60, 200);
        assert_eq!(queue.poll_timeout(), Some(200 + LATE_US));
        queue.handle_timeout(200);
        assert!(queue.is_empty());
        queue.handle_timeout(200 + LATE_US);
        assert_eq!(sent(&mut queue, 10), [(1, 61)]);
    }
}
