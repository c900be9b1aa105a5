//! Windows: large messages that are being sent, from their announcement until their receivers have fetched them.

use super::*;

/// Large messages of one endpoint that are being sent at a time, beside one to each peer that has none.
const LARGE_MAX: usize = 128;
/// So many messages later the number of one is not used any more; how often that is looked at, in messages.
const OLD: u16 = 1 << 12;
const OLD_LOOK: u16 = 1 << 10;

/// A large message of ours that is being pulled, or will be.
pub(super) struct Sending {
    pub(super) peer: PeerId,
    pub(super) send: u32,
    pub(super) length: u32,
    /// Of its announcement.
    pub(super) sequence: Sequence,
    pub(super) matching: u64,
    /// The announcement was acknowledged; when to ask again.
    pub(super) due: Option<u64>,
    pub(super) asked: u32,
    /// So many messages were sent since that its number may soon be another's.
    pub(super) is_old: bool,
    pub(super) patience: u64,
}

impl Sending {
    /// Is it given up? A question or its answer may be lost: it takes two.
    fn is_spent(&self, timing: &Timing) -> bool {
        let silence = timing.keep_alive.saturating_mul(self.asked.into());
        self.asked >= 2 && silence >= self.patience
    }
}

impl Wire {
    /// Large messages whose numbers may soon be others' are not announced again: they would be taken for those.
    pub(super) fn age_windows(&mut self, id: PeerId, now: Sequence) {
        if now.value() % OLD_LOOK != 0 {
            return;
        }
        let its = self.windows.iter_mut().flatten().filter(|sending| sending.peer == id);
        for sending in its.filter(|sending| now.since(sending.sequence) >= OLD) {
            (sending.is_old, sending.due) = (true, None);
        }
    }

    /// Of many that are open each peer has one: who does not take what is sent to it holds up nobody else's.
    pub(super) fn free_window(&self, peer: PeerId) -> Option<u8> {
        let open = || self.windows.iter().flatten();
        if open().count() >= LARGE_MAX && open().any(|sending| sending.peer == peer) {
            return None;
        }
        self.windows.iter().position(Option::is_none).map(|at| at as u8)
    }

    pub(super) fn open_window(&mut self, window: u8, peer: PeerId, one: &Outgoing) {
        self.windows[usize::from(window)] = Some(Sending {
            peer,
            send: one.send.unwrap_or(0),
            length: one.length,
            sequence: one.sequence,
            matching: one.matching,
            due: None,
            asked: 0,
            is_old: false,
            patience: one.patience,
        });
    }

    pub(super) fn close_window(&mut self, window: u8) -> Option<Sending> {
        let sending = self.windows[usize::from(window)].take()?;
        let uses = &mut self.uses[usize::from(window)];
        *uses = uses.wrapping_add(1);
        self.jobs.forget(sending.send);
        Some(sending)
    }

    /// Large messages whose receivers know of them and say nothing: are they still there? The announcement is repeated;
    /// a receiver that has it acknowledges it again, and of one that is gone its station says so.
    pub(super) fn keep_windows_alive(&mut self, now: u64, above: &mut impl Above) {
        let timing = self.config.timing;
        let mut dead = None;
        for window in 0..WINDOWS as u16 {
            let Some(sending) = &mut self.windows[usize::from(window)] else { continue };
            let Some(due) = sending.due else { continue };
            if due <= now {
                sending.due = Some(now.saturating_add(timing.keep_alive));
                if sending.is_spent(&timing) {
                    dead = Some(sending.peer);
                }
                sending.asked += 1;
                let what = What::Rendezvous { window: window as u8 };
                let mut one = Outgoing::new(what, Some(sending.send), sending.matching, sending.length);
                one.sequence = sending.sequence;
                let peer = sending.peer;
                if above.room() > 0 {
                    self.transmit(peer, &one, above);
                }
            }
            let due = self.windows[usize::from(window)].as_ref().and_then(|sending| sending.due);
            self.wake_at(due.unwrap_or(u64::MAX));
        }
        if let Some(peer) = dead {
            self.clean_up(peer, above);
        }
    }

    pub(super) fn is_large(&self, send: u32) -> bool {
        self.windows.iter().flatten().any(|sending| sending.send == send)
    }

    pub(super) fn fail_windows(&mut self, peer: PeerId, why: Status, above: &mut impl Above) {
        for window in 0..=u8::MAX {
            if self.windows[usize::from(window)].as_ref().is_some_and(|sending| sending.peer == peer) {
                if let Some(sending) = self.close_window(window) {
                    above.sent(sending.send, Err(why));
                }
            }
        }
    }
}
