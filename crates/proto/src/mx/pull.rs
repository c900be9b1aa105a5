//! Large messages: the receiver pulls them in blocks of a few frames, several blocks at a time.
//!
//! Frames are numbered over the whole message. The first may be short, because a frame never crosses a multiple of the
//! reply size in the owner's window; `skip` says by how much.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use isthmus_wire::mxoe::{Cookie, Frame, MAGIC, Profile, Window};

use super::Status;
use super::limits::{Limits, Timing};

const SLOT_BITS: u32 = 10;
const GENERATION_BITS: u32 = 32 - SLOT_BITS;
/// Pulls that ask at a time; further ones wait.
const ACTIVE_MAX: usize = 32;
/// Answers that wait for room to be sent.
const JOBS_MAX: usize = 1024;

/// A run of frames to ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    first: u32,
    skip: u32,
    length: u32,
}

#[derive(Debug)]
struct Block {
    /// Where it begins in the message, bytes.
    at: u32,
    length: u32,
    skip: u32,
    first: u32,
    /// A bit for each frame that has not come.
    missing: u64,
    /// For the first time, and for the last.
    first_asked_at: u64,
    asked_at: u64,
}

impl Block {
    /// Where the n-th frame of this block begins, and how long it is.
    fn piece(&self, n: u32, reply: u32) -> (u32, u32) {
        let end = (reply - self.skip).saturating_add(n * reply).min(self.length);
        let begin = if n == 0 { 0 } else { reply - self.skip + (n - 1) * reply };
        (self.at + begin, end - begin)
    }

    fn frames(&self, reply: u32) -> u32 {
        (self.skip + self.length).div_ceil(reply)
    }

    /// What has not come, as runs that can be asked for.
    fn runs(&self, reply: u32) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let mut last = u32::MAX;
        for n in (0..self.frames(reply)).filter(|n| self.missing & 1 << n != 0) {
            let (_, length) = self.piece(n, reply);
            match runs.last_mut() {
                Some(run) if last.wrapping_add(1) == n => run.length += length,
                _ => {
                    runs.push(Run { first: self.first + n, skip: if n == 0 { self.skip } else { 0 }, length })
                }
            }
            last = n;
        }
        runs
    }
}

#[derive(Debug)]
pub(crate) struct Pull {
    pub peer: u32,
    pub ticket: u32,
    pub window: Window,
    pub length: u32,
    blocks: VecDeque<Block>,
    /// Asked for so far, bytes and frames.
    asked: u32,
    frames: u32,
    left: u32,
    due: u64,
    /// Times that nothing came in a row, and for how long together, ns, up to when.
    silent: u32,
    silence: u64,
    silent_at: u64,
    /// After so much it is given up.
    patience: u64,
    /// What was asked for is lost.
    is_lost: bool,
    generation: u32,
}

/// A pull's end, for whoever asked for it.
pub(crate) struct Ended {
    pub peer: u32,
    pub ticket: u32,
    pub window: Window,
    pub outcome: Result<u32, Status>,
}

/// The pulls of one endpoint.
pub(crate) struct Pulls {
    slots: Vec<Option<Pull>>,
    waiting: VecDeque<Pull>,
    generation: u32,
    magic: u32,
    reply: u32,
    replies: u32,
    blocks: usize,
    all_blocks: usize,
    /// Smoothed time from asking for a block until it is there, and its deviation, ns.
    block_time: u64,
    deviation: u64,
}

impl Pulls {
    pub fn new(endpoint: u8, profile: &Profile, limits: &Limits) -> Self {
        Self {
            slots: Vec::new(),
            waiting: VecDeque::new(),
            generation: 0x23,
            magic: u32::from(endpoint) ^ MAGIC,
            reply: profile.reply.max(1).into(),
            // A block's frames have a bit each.
            replies: u32::from(profile.replies).clamp(1, 64),
            // A frame's number is a byte, and says which frame it is.
            blocks: usize::from(limits.blocks.min(u8::MAX / profile.replies.max(1)).max(1)),
            all_blocks: limits.all_blocks.into(),
            block_time: 0,
            deviation: 0,
        }
    }

    pub fn start(&mut self, peer: u32, ticket: u32, window: Window, length: u32, patience: u64, now: u64) {
        let pull = Pull {
            peer,
            ticket,
            window,
            length,
            blocks: VecDeque::new(),
            asked: 0,
            frames: 0,
            left: length,
            due: now,
            silent: 0,
            silence: 0,
            silent_at: now,
            patience,
            is_lost: false,
            generation: 0,
        };
        self.waiting.push_back(pull);
        self.admit();
    }

    fn admit(&mut self) {
        loop {
            let active = self.slots.iter().flatten().count();
            if active >= 1 << SLOT_BITS {
                return;
            }
            // A peer that serves none of its pulls holds up nobody else's.
            let fits = |pull: &Pull| {
                active < ACTIVE_MAX || !self.slots.iter().flatten().any(|one| one.peer == pull.peer)
            };
            let Some(at) = self.waiting.iter().position(fits) else { return };
            let Some(mut pull) = self.waiting.remove(at) else { return };
            pull.generation = self.generation;
            self.generation = self.generation.wrapping_add(1) & ((1 << GENERATION_BITS) - 1);
            match self.slots.iter_mut().find(|slot| slot.is_none()) {
                Some(slot) => *slot = Some(pull),
                None => self.slots.push(Some(pull)),
            }
        }
    }

    fn cookie(&self, slot: usize, pull: &Pull) -> Cookie {
        Cookie { handle: (slot as u32) << GENERATION_BITS | pull.generation, magic: self.magic }
    }

    fn find(&self, cookie: Cookie) -> Option<usize> {
        let slot = (cookie.handle >> GENERATION_BITS) as usize;
        let pull = self.slots.get(slot)?.as_ref()?;
        (self.cookie(slot, pull) == cookie).then_some(slot)
    }

    pub fn peer_of(&self, cookie: Cookie) -> Option<u32> {
        self.slots[self.find(cookie)?].as_ref().map(|pull| pull.peer)
    }

    /// A reply: the ticket under which its data is to be placed at its offset. `None`: it is not what was asked for, or
    /// was here before.
    pub fn take(&mut self, cookie: Cookie, frame: u8, offset: u32, len: usize, now: u64) -> Option<u32> {
        let slot = self.find(cookie)?;
        let reply = self.reply;
        let pull = self.slots[slot].as_mut()?;
        let block =
            pull.blocks.iter_mut().find(|b| offset.checked_sub(b.at).is_some_and(|d| d < b.length))?;
        let n = (offset - block.at + block.skip) / reply;
        let fits =
            block.piece(n, reply) == (offset, len as u32) && (block.first.wrapping_add(n) as u8) == frame;
        if !fits || block.missing & 1 << n == 0 {
            return None;
        }
        block.missing &= !(1 << n);
        pull.left -= len as u32;
        (pull.silent, pull.silence, pull.silent_at, pull.due) = (0, 0, now, now);
        if block.missing == 0 {
            // Whether an answer is that to the first question or to a repeated one no frame says.
            let sample = now.saturating_sub(block.first_asked_at);
            let error = sample.abs_diff(self.block_time);
            if self.block_time == 0 {
                (self.block_time, self.deviation) = (sample, sample / 2);
            } else {
                self.deviation = self.deviation / 4 * 3 + error / 4;
                self.block_time = self.block_time / 8 * 7 + sample / 8;
            }
        }
        Some(pull.ticket)
    }

    /// Give it up after so much silence, ns.
    pub fn set_patience(&mut self, ticket: u32, patience: u64) {
        let all = self.slots.iter_mut().flatten().chain(&mut self.waiting);
        all.filter(|pull| pull.ticket == ticket).for_each(|pull| pull.patience = patience);
    }

    /// What was asked for is lost, with its answers: it is asked for again at once.
    pub fn ask_again(&mut self, now: u64) {
        for pull in self.slots.iter_mut().flatten() {
            (pull.due, pull.is_lost) = (now, true);
        }
    }

    /// It is refused, or its peer is gone.
    pub fn fail(&mut self, is_meant: impl Fn(&Pull) -> bool, why: Status, ended: &mut Vec<Ended>) {
        let over = |pull: Pull| Ended {
            peer: pull.peer,
            ticket: pull.ticket,
            window: pull.window,
            outcome: Err(why),
        };
        for slot in &mut self.slots {
            if slot.as_ref().is_some_and(&is_meant) {
                ended.extend(slot.take().map(over));
            }
        }
        let waiting = core::mem::take(&mut self.waiting);
        for pull in waiting {
            if is_meant(&pull) {
                ended.push(over(pull));
            } else {
                self.waiting.push_back(pull);
            }
        }
        self.admit();
    }

    pub fn fail_one(&mut self, cookie: Cookie, why: Status, ended: &mut Vec<Ended>) {
        let Some(slot) = self.find(cookie) else { return };
        let Some(generation) = self.slots[slot].as_ref().map(|pull| pull.generation) else { return };
        self.fail(|pull| pull.generation == generation && pull.asked > 0, why, ended);
    }

    /// How long to wait for a block before asking again.
    fn patience(&self, silent: u32, timing: &Timing) -> u64 {
        let usual =
            if self.block_time == 0 { timing.pull_first } else { self.block_time + 4 * self.deviation };
        let usual = usual.max(timing.pull_least);
        usual.checked_shl(silent.min(20)).unwrap_or(u64::MAX).min(timing.pull_most)
    }

    /// Ask for what is missing, as far as there is room: `ask` says `false` when there is none. Then what has ended.
    pub fn turn(
        &mut self,
        now: u64,
        timing: &Timing,
        ended: &mut Vec<Ended>,
        mut ask: impl FnMut(u32, Window, Cookie, u32, (u32, u32, u32)) -> bool,
    ) {
        for slot in 0..self.slots.len() {
            let Some(mut pull) = self.slots[slot].take() else { continue };
            if now < pull.due {
                self.slots[slot] = Some(pull);
                continue;
            }
            let cookie = self.cookie(slot, &pull);
            let (peer, ticket, window, length) = (pull.peer, pull.ticket, pull.window, pull.length);
            if pull.left == 0 {
                ended.push(Ended { peer, ticket, window, outcome: Ok(length) });
                continue;
            }
            let mut send = |run: Run| ask(peer, window, cookie, length, (run.skip, run.length, run.first));
            self.go_on(&mut pull, now, timing, &mut send);
            if pull.silent > 0 && pull.silence >= pull.patience {
                ended.push(Ended { peer, ticket, window, outcome: Err(Status::EndpointUnreachable) });
            } else {
                self.slots[slot] = Some(pull);
            }
        }
        self.admit();
    }

    fn go_on(&self, pull: &mut Pull, now: u64, timing: &Timing, send: &mut dyn FnMut(Run) -> bool) {
        // A block that was asked for before one that is there has lost frames.
        let newest = pull.blocks.iter().filter(|b| b.missing == 0).map(|b| b.asked_at).max();
        let newest = newest.unwrap_or(0);
        while pull.blocks.front().is_some_and(|block| block.missing == 0) {
            pull.blocks.pop_front();
        }
        let patience = self.patience(pull.silent, timing);
        let is_lost = core::mem::take(&mut pull.is_lost);
        let mut full = false;
        let mut silent = false;
        for block in pull.blocks.iter_mut().filter(|block| block.missing != 0) {
            let late = now >= block.asked_at.saturating_add(patience);
            if full || !(late || is_lost || block.asked_at < newest) {
                continue;
            }
            silent |= late;
            for run in block.runs(self.reply) {
                full |= !send(run);
            }
            block.asked_at = now;
        }
        if silent {
            // Blocks may be late one after the other; and a program that was stopped itself has not waited.
            let waited = now.saturating_sub(pull.silent_at).min(patience);
            (pull.silence, pull.silent_at) = (pull.silence.saturating_add(waited), now);
            pull.silent += 1;
        }
        let others: usize = self.slots.iter().flatten().map(|pull| pull.blocks.len()).sum();
        let most = self.blocks.min(self.all_blocks.saturating_sub(others)).max(1);
        while !full && pull.blocks.len() < most && pull.asked < pull.length {
            let skip = if pull.asked == 0 { pull.window.offset % self.reply } else { 0 };
            let longest = self.reply * self.replies - skip;
            let block = Block {
                at: pull.asked,
                length: longest.min(pull.length - pull.asked),
                skip,
                first: pull.frames,
                missing: 0,
                first_asked_at: now,
                asked_at: now,
            };
            let frames = block.frames(self.reply);
            let block = Block { missing: u64::MAX >> (64 - frames), ..block };
            if !send(Run { first: block.first, skip, length: block.length }) {
                full = true;
                break;
            }
            (pull.asked, pull.frames) = (pull.asked + block.length, pull.frames + frames);
            pull.blocks.push_back(block);
        }
        let patience = self.patience(pull.silent, timing);
        let next =
            pull.blocks.iter().filter(|b| b.missing != 0).map(|b| b.asked_at.saturating_add(patience)).min();
        let retry = now.saturating_add(timing.no_room);
        pull.due = if full { retry } else { next.unwrap_or(retry) };
    }

    pub fn due(&self) -> u64 {
        self.slots.iter().flatten().map(|pull| pull.due).min().unwrap_or(u64::MAX)
    }
}

/// A pull of the peer's, on its way to be answered.
#[derive(Debug)]
struct Job {
    nic: u64,
    cookie: Cookie,
    send: u32,
    /// Of the window, in the message.
    base: u64,
    /// Of the next frame from the window's offset.
    offset: u64,
    left: u32,
    /// Bytes that the next frame may carry.
    most: u32,
    frame: u8,
}

/// The answers that this endpoint owes.
#[derive(Default)]
pub(crate) struct Jobs(VecDeque<Job>);

impl Jobs {
    /// Somebody asks for a part of a window over a message of `size` bytes. `false`: it is not there to be asked for, or
    /// too many ask; the frame is dropped.
    pub fn add(&mut self, nic: u64, send: u32, size: u32, frame: &Frame<'_>, profile: &Profile) -> bool {
        let Frame::Pull { window, cookie, skip, block, first, .. } = *frame else { return false };
        let (reply, base) = (u64::from(profile.reply), u64::from(window.offset));
        let (skip, block) = (u64::from(skip), u64::from(block));
        let Some(offset) = (u64::from(first) * reply + skip).checked_sub(base % reply) else { return false };
        let frames = (skip + block).div_ceil(reply);
        let inside = base.saturating_add(offset).saturating_add(block) <= u64::from(size);
        let asked = block > 0 && skip < reply && frames <= u64::from(profile.replies);
        if !inside || !asked || self.0.len() >= JOBS_MAX {
            return false;
        }
        self.0.push_back(Job {
            nic,
            cookie,
            send,
            base,
            offset,
            left: block as u32,
            most: (reply - skip) as u32,
            frame: first as u8,
        });
        true
    }

    /// The next frame of an answer: to whom, which part of which send, and what the frame says of it.
    pub fn next(&mut self, profile: &Profile) -> Option<Piece> {
        let job = self.0.front_mut()?;
        let len = job.left.min(job.most);
        let piece = Piece {
            nic: job.nic,
            send: job.send,
            at: (job.base + job.offset) as u32,
            len,
            cookie: job.cookie,
            frame: job.frame,
            offset: job.offset as u32,
        };
        job.offset += u64::from(len);
        job.left -= len;
        job.most = profile.reply.into();
        job.frame = job.frame.wrapping_add(1);
        if job.left == 0 {
            self.0.pop_front();
        }
        Some(piece)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The message is not there any more.
    pub fn forget(&mut self, send: u32) {
        self.0.retain(|job| job.send != send);
    }
}

pub(crate) struct Piece {
    pub nic: u64,
    pub send: u32,
    /// Where its bytes lie in the message.
    pub at: u32,
    pub len: u32,
    pub cookie: Cookie,
    pub frame: u8,
    pub offset: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(length: u32, offset: u32) -> Vec<(u32, u32, u32)> {
        let profile = Profile::WIRE;
        let limits = Limits { blocks: 64, all_blocks: 64, ..Limits::default() };
        let mut pulls = Pulls::new(1, &profile, &limits);
        let window = Window { id: 1, sequence: 1, offset };
        pulls.start(0, 0, window, length, u64::MAX, 1);
        let mut asked = Vec::new();
        pulls.turn(1, &Timing::default(), &mut Vec::new(), |_, _, _, _, run| {
            asked.push((run.2, run.0, run.1));
            true
        });
        asked
    }

    /// Frame, first offset, length of each block.
    #[test]
    fn blocks_are_those_of_the_format_s_example() {
        assert_eq!(runs(100_000, 0), [(0, 0, 32768), (8, 0, 32768), (16, 0, 32768), (24, 0, 1696)]);
        assert_eq!(runs(100_000, 100), [(0, 100, 32668), (8, 0, 32768), (16, 0, 32768), (24, 0, 1796)]);
    }

    #[test]
    fn answers_are_what_the_puller_expects() {
        let profile = Profile::WIRE;
        const GIB_4: u32 = u32::MAX;
        let around = [4096, 4096 * 8, 4096 * 8 * 4].map(|limit| [limit - 1, limit, limit + 1]);
        let around = around.into_iter().flatten().flat_map(|length| [(length, 0), (length, 100)]);
        let others = [(1, 0), (4097, 4095), (32768 * 4 + 1, 8191), (GIB_4, 0), (GIB_4 - 5000, 5000)];
        for (length, offset) in around.chain(others) {
            let mut pulls = Pulls::new(1, &profile, &Limits::default());
            let window = Window { id: 1, sequence: 1, offset };
            pulls.start(7, 9, window, length, u64::MAX, 1);
            let (mut jobs, mut got, mut now) = (Jobs::default(), 0, 1);
            loop {
                let mut ended = Vec::new();
                pulls.turn(now, &Timing::default(), &mut ended, |peer, window, cookie, length, run| {
                    assert_eq!(peer, 7);
                    let (skip, block, first) = run;
                    let (ends, session) = (Default::default(), 0);
                    let frame = Frame::Pull { ends, session, length, window, cookie, skip, block, first };
                    assert!(jobs.add(5, 3, offset + length, &frame, &profile));
                    true
                });
                if let Some(end) = ended.pop() {
                    assert_eq!((end.ticket, end.outcome), (9, Ok(length)));
                    break;
                }
                while let Some(piece) = jobs.next(&profile) {
                    now += 1;
                    assert_eq!(piece.at, offset + piece.offset);
                    let len = piece.len as usize;
                    assert_eq!(pulls.take(piece.cookie, piece.frame ^ 1, piece.offset, len, now), None);
                    assert_eq!(pulls.take(piece.cookie, piece.frame, piece.offset, len + 1, now), None);
                    assert_eq!(pulls.take(piece.cookie, piece.frame, piece.offset, len, now), Some(9));
                    assert_eq!(pulls.take(piece.cookie, piece.frame, piece.offset, len, now), None);
                    got += piece.len;
                }
            }
            assert_eq!(got, length);
        }
    }

    /// A network that others keep busy answers each question 80 ms later.
    #[test]
    fn what_is_slow_and_not_lost_is_soon_known_to_be() {
        const DELAY: u64 = 80_000_000;
        let profile = Profile::WIRE;
        let mut pulls = Pulls::new(1, &profile, &Limits::default());
        let window = Window { id: 1, sequence: 1, offset: 0 };
        let (mut jobs, mut coming, mut now) = (Jobs::default(), VecDeque::new(), 1);
        let mut asked = [0; 3];
        for asked in &mut asked {
            pulls.start(7, 9, window, 1 << 20, u64::MAX, now);
            loop {
                let mut ended = Vec::new();
                pulls.turn(now, &Timing::default(), &mut ended, |_, window, cookie, length, run| {
                    *asked += 1;
                    let (skip, block, first) = run;
                    let (ends, session) = (Default::default(), 0);
                    let frame = Frame::Pull { ends, session, length, window, cookie, skip, block, first };
                    jobs.add(5, 3, length, &frame, &profile)
                });
                if !ended.is_empty() {
                    break;
                }
                while let Some(piece) = jobs.next(&profile) {
                    coming.push_back((now + DELAY, piece));
                }
                now = coming.front().map_or(u64::MAX, |(at, _)| *at).min(pulls.due()).max(now + 1);
                while coming.front().is_some_and(|(at, _)| *at <= now) {
                    let Some((_, piece)) = coming.pop_front() else { break };
                    pulls.take(piece.cookie, piece.frame, piece.offset, piece.len as usize, now);
                }
            }
        }
        let blocks = (1 << 20) / (u32::from(profile.reply) * u32::from(profile.replies));
        assert!(asked[0] <= 2 * blocks && asked[2] == blocks, "{asked:?} of {blocks}");
    }

    #[test]
    fn no_two_frames_that_are_asked_for_have_one_number() {
        for profile in [Profile::WIRE, Profile::own(9000), Profile::own(1500)] {
            let mut pulls =
                Pulls::new(1, &profile, &Limits { blocks: 255, all_blocks: 255, ..Limits::default() });
            pulls.start(0, 0, Window { id: 1, sequence: 1, offset: 5 }, u32::MAX - 5, u64::MAX, 1);
            let mut frames = 0;
            pulls.turn(1, &Timing::default(), &mut Vec::new(), |_, _, _, _, (skip, block, _)| {
                frames += (skip + block).div_ceil(profile.reply.into());
                true
            });
            assert!((128..256).contains(&frames), "{frames} frames");
        }
    }

    #[test]
    fn pulls_outside_the_window_are_refused() {
        let profile = Profile::WIRE;
        let mut jobs = Jobs::default();
        let mut ask = |offset, skip, block, first| {
            let window = Window { id: 1, sequence: 1, offset };
            let (cookie, ends) = (Cookie::default(), Default::default());
            let frame = Frame::Pull { ends, session: 0, length: 1, window, cookie, skip, block, first };
            jobs.add(5, 3, 10_000, &frame, &profile)
        };
        assert!(ask(0, 0, 10_000, 0));
        assert!(ask(100, 100, 9900, 0));
        assert!(!ask(0, 0, 10_001, 0));
        assert!(!ask(0, 0, 0, 0), "nothing");
        assert!(!ask(100, 0, 1, 0), "before the window");
        assert!(!ask(0, 1809, 1, 2));
        assert!(!ask(0, 0, 1, u32::MAX));
        assert!(!ask(u32::MAX, 4095, 1, 0));
        assert!(!ask(0, 4096, 1, 0), "beyond its frame");
        assert!(!ask(0, 0, u32::MAX, 0));
    }
}
