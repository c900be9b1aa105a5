//! What comes from peers.

use super::*;
use isthmus_wire::mxoe::BAD_KEY;

impl Wire {
    /// A frame that is for this endpoint, from a station whose address was checked. Then [`Wire::tick`] is due; many frames
    /// may be handled before it.
    pub fn handle(&mut self, now: u64, from: u64, frame: &Frame<'_>, above: &mut impl Above) {
        match *frame {
            Frame::Connect { .. } => self.on_connect(now, from, frame, above),
            Frame::Connected { .. } => self.on_connected(now, from, frame, above),
            Frame::Tiny { message, data } | Frame::Small { message, data } => {
                let early = |data: &[u8]| Early::Whole { matching: message.matching, data: data.to_vec() };
                self.on_message(now, from, &message, Content::Whole(data), || early(data), above);
            }
            Frame::Medium { message, total, fragment, offset, data } => {
                let part = Part { total, fragment, offset, data };
                let matching = message.matching;
                let early = || Early::Fragment { matching, total, fragment, offset, data: data.to_vec() };
                if part.fits() && total <= self.medium_max() {
                    self.on_message(now, from, &message, Content::Part(part), early, above);
                }
            }
            Frame::Rendezvous { message, length, window } => {
                let large = Large { window, length };
                let early = || Early::Large { matching: message.matching, length, window };
                self.on_message(now, from, &message, Content::Large(large), early, above);
            }
            Frame::Notify { ends, session, length, window, sequence, piggyack } => {
                let message = Message { ends, checksum: 0, sequence, piggyack, matching: 0, session };
                let early = || Early::Notify { length, window };
                self.on_message(now, from, &message, Content::Notify { length, window }, early, above);
            }
            Frame::Ack { ends, session, next, number, .. } => {
                if session == self.config.session {
                    self.on_ack(now, from, ends.from, next, number, above);
                }
            }
            Frame::Pull { ends, session, window, cookie, .. } => {
                self.on_pull(now, from, (ends, session), (window, cookie), frame, above);
            }
            Frame::PullReply { frame, offset, cookie, data } => {
                let reply = Reply { frame, offset, cookie };
                if let Some(ticket) = self.take_reply(now, from, reply, data.len()) {
                    above.place(ticket, offset, data);
                }
            }
            Frame::NackLib { to, why, sequence, .. } => {
                if let (Some(why), Some(id)) = (Status::of_nack(why), self.by_address.get(&(from, to))) {
                    self.on_nack(now, *id, Sequence::from_bits(sequence), why, above);
                }
            }
            Frame::NackPull { why, cookie, .. } => {
                let peer = self.pulls.peer_of(cookie).filter(|peer| self.is_at(*peer, from));
                if let (Some(why), Some(_)) = (Status::of_nack(why), peer) {
                    let mut ended = Vec::new();
                    self.pulls.fail_one(cookie, why, &mut ended);
                    self.end_pulls(now, ended, above);
                    self.wake_at(now);
                }
            }
            Frame::Discovery { .. } | Frame::HostQuery { .. } | Frame::HostReply { .. } => {}
        }
    }

    /// The head of a reply to a pull: the ticket under which its data is to be placed at its offset. `None`: it is not what
    /// was asked for, and its data goes nowhere.
    pub fn take_reply(&mut self, now: u64, from: u64, reply: Reply, len: usize) -> Option<u32> {
        let Reply { frame, offset, cookie } = reply;
        self.pulls.peer_of(cookie).filter(|peer| self.is_at(*peer, from))?;
        let ticket = self.pulls.take(cookie, frame, offset, len, now)?;
        self.wake_at(now);
        Some(ticket)
    }

    fn is_at(&self, peer: PeerId, nic: u64) -> bool {
        self.peer(peer).is_some_and(|peer| peer.nic == nic)
    }

    // ---- connecting

    fn on_connect(&mut self, now: u64, from: u64, frame: &Frame<'_>, above: &mut impl Above) {
        let Frame::Connect { ends, session, key, expects, number, .. } = *frame else { return };
        let own_session = self.config.session;
        let welcome = key == self.config.key;
        let known = self.by_address.get(&(from, ends.from)).copied();
        // Who does not know the key gets an answer, and changes nothing.
        let id = if welcome { self.peer_at(from, ends.from) } else { known };
        if welcome {
            let Some(id) = id else { return };
            self.meet_asking(id, session, Sequence::from_bits(expects), above);
        }
        let expects =
            id.and_then(|id| self.peer(id)).map_or(Sequence::first(0), |peer| peer.next_match).bits();
        let ends = Ends { to: ends.from, from: self.config.endpoint, generation: 0 };
        let status = if welcome { CONNECTED } else { BAD_KEY };
        let index = INDEX_UNKNOWN;
        if above.room() > 0 {
            let reply = Frame::Connected { ends, index, session, own_session, expects, number, status };
            above.transmit(from, &reply);
        }
        if let (true, Some(id)) = (welcome, id) {
            self.pump(now, id, above);
        }
    }

    /// The peer asks: it is at this session now, and expects this of us next.
    fn meet_asking(&mut self, id: PeerId, session: u32, expects: Sequence, above: &mut impl Above) {
        let Some(peer) = self.peer(id) else { return };
        let known = peer.back_session.or(peer.session);
        // One that gave us up, and is the same, starts elsewhere.
        let started_again =
            peer.back_session == Some(session) && expects.session() != peer.next_send.session();
        if started_again || known.is_some_and(|known| known != session) {
            self.start_over(id, above);
        }
        let Some(peer) = self.peer_mut(id) else { return };
        if peer.session != Some(session) {
            peer.start_sending(expects);
        }
        (peer.session, peer.back_session) = (Some(session), Some(session));
    }

    /// The peer answers. It was told what we expect next, and goes by it.
    fn meet_answering(
        &mut self,
        id: PeerId,
        session: u32,
        expects: Sequence,
        told: Sequence,
        above: &mut impl Above,
    ) {
        let Some(peer) = self.peer(id) else { return };
        let known = peer.back_session.or(peer.session);
        let started_again = peer.session == Some(session) && expects.session() != peer.next_send.session();
        if started_again || known.is_some_and(|known| known != session) {
            self.start_over(id, above);
            if let Some(peer) = self.peer_mut(id) {
                peer.expect(told);
                peer.connects.iter_mut().for_each(|one| one.expects = told);
            }
        }
        let Some(peer) = self.peer_mut(id) else { return };
        if peer.session != Some(session) {
            peer.start_sending(expects);
        }
        (peer.session, peer.back_session) = (Some(session), Some(session));
    }

    /// What was pending with the peer's last instance ends; connects stay, which the new one may answer.
    fn start_over(&mut self, id: PeerId, above: &mut impl Above) {
        let Some(peer) = self.peer_mut(id) else { return };
        let connects = core::mem::take(&mut peer.connects);
        self.clean_up(id, above);
        if let Some(peer) = self.peer_mut(id) {
            peer.connects = connects;
            let next = peer.next_match;
            peer.connects.iter_mut().for_each(|one| one.expects = next);
        }
    }

    fn on_connected(&mut self, now: u64, from: u64, frame: &Frame<'_>, above: &mut impl Above) {
        let Frame::Connected { ends, session, own_session, expects, number, status, .. } = *frame else {
            return;
        };
        let Some(id) = self.by_address.get(&(from, ends.from)).copied() else { return };
        if session != self.config.session {
            return;
        }
        let Some(peer) = self.peer_mut(id) else { return };
        let Some(at) = peer.connects.iter().position(|one| one.number == number) else { return };
        let outcome = match status {
            CONNECTED => Ok((id, (from, ends.from), own_session)),
            BAD_KEY => Err(Status::BadKey),
            _ => return,
        };
        let Some(one) = peer.connects.remove(at) else { return };
        if outcome.is_ok() {
            self.meet_answering(id, own_session, Sequence::from_bits(expects), one.expects, above);
        }
        above.connected(one.connect, outcome);
        self.pump(now, id, above);
    }

    // ---- messages

    fn on_message(
        &mut self,
        now: u64,
        from: u64,
        message: &Message,
        content: Content<'_>,
        early: impl FnOnce() -> Early,
        above: &mut impl Above,
    ) {
        let known = self.by_address.get(&(from, message.ends.from)).copied();
        let known = known.filter(|id| self.peer(*id).is_some_and(|peer| peer.back_session.is_some()));
        let (Some(id), true) = (known, message.session == self.config.session) else {
            return self.nack(from, message, BAD_SESSION, above);
        };
        let Config { timing, profile, .. } = self.config;
        let (sequence, piggyack) =
            (Sequence::from_bits(message.sequence), Sequence::from_bits(message.piggyack));
        let Some(peer) = self.peer_mut(id) else { return };
        if piggyack.session() != peer.next_send.session() {
            return;
        }
        let turn = peer.turn(sequence);
        self.take_ack(now, id, piggyack, above);
        let Some(peer) = self.peer_mut(id) else { return };
        match turn {
            Turn::Now => {
                if !self.deliver(now, id, message.matching, content, above) {
                    return;
                }
                self.deliver_early(now, id, above);
            }
            Turn::Matched => {
                if let Content::Part(part) = content {
                    self.place_part(id, sequence, &part, above);
                } else if let Some(peer) = self.peer_mut(id) {
                    // It is repeated: what it says was heard, and the acknowledgement lost or held back.
                    peer.ack_due = Some(now);
                }
            }
            Turn::Early => self.keep_early(id, sequence, early()),
            Turn::Again => peer.ack_due = Some(now),
            Turn::Never => return,
        }
        let Some(peer) = self.peer_mut(id) else { return };
        peer.owe_ack(now, &timing);
        if matches!(content, Content::Notify { .. }) && profile.dialect == mxoe::Dialect::Wire {
            // Stations of old wait for it.
            peer.ack_due = Some(now);
        }
        let due = peer.due();
        self.wake_at(due);
    }

    /// Keep what came before its turn, as long as all peers together do not send too much of that.
    fn keep_early(&mut self, id: PeerId, sequence: Sequence, early: Early) {
        let held: usize = self.peers.iter().flatten().map(Peer::early_bytes).sum();
        if held + early.len() <= EARLY_ALL {
            if let Some(peer) = self.peer_mut(id) {
                peer.keep_early(sequence, early);
            }
        }
    }

    /// A message is next. `false`: it cannot be taken now.
    fn deliver(
        &mut self,
        now: u64,
        id: PeerId,
        matching: u64,
        content: Content<'_>,
        above: &mut impl Above,
    ) -> bool {
        let Some(peer) = self.peer(id) else { return false };
        // Before their numbers come again some must be whole.
        if peer.next_match.since(peer.next_whole) >= PARTS_MAX {
            return false;
        }
        let (address, session) = ((peer.nic, peer.endpoint), peer.back_session.unwrap_or(0));
        let arrival = |length, body| Arrival { peer: id, address, session, matching, length, body };
        let mut partial = None;
        match content {
            Content::Whole(data) => {
                if above.arrive(arrival(data.len() as u32, Body::Whole(data))) == Verdict::Later {
                    return false;
                }
            }
            Content::Part(part) if part.data.len() == part.total as usize => {
                if above.arrive(arrival(part.total, Body::Whole(part.data))) == Verdict::Later {
                    return false;
                }
            }
            Content::Part(part) => match above.arrive(arrival(part.total, Body::Parts)) {
                Verdict::Later => return false,
                Verdict::Kept => {}
                Verdict::Take { ticket, .. } => partial = Some(Partial::new(ticket, part.total)),
            },
            Content::Large(large) => match above.arrive(arrival(large.length, Body::Large(large))) {
                Verdict::Later => return false,
                Verdict::Kept => {}
                Verdict::Take { ticket, length } => {
                    self.matched(id, None);
                    self.start_pull(now, id, large, ticket, length, above);
                    return true;
                }
            },
            Content::Notify { length, window } => {
                self.matched(id, None);
                self.on_notify(id, length, window, above);
                return true;
            }
        }
        let is_partial = partial.is_some();
        let sequence = self.peer(id).map(|peer| peer.next_match);
        self.matched(id, partial);
        if let (true, Content::Part(part), Some(sequence)) = (is_partial, content, sequence) {
            self.place_part(id, sequence, &part, above);
        }
        true
    }

    fn matched(&mut self, id: PeerId, partial: Option<Partial>) {
        if let Some(peer) = self.peer_mut(id) {
            peer.matched(partial);
        }
    }

    /// What came before its turn, and whose turn it is now.
    fn deliver_early(&mut self, now: u64, id: PeerId, above: &mut impl Above) {
        loop {
            let Some(peer) = self.peer_mut(id) else { return };
            let kept = peer.take_early();
            let Some(first) = kept.first() else { return };
            let sequence = peer.next_match;
            let (matching, content) = first.content();
            if !self.deliver(now, id, matching, content, above) {
                if let Some(peer) = self.peer_mut(id) {
                    peer.put_back(kept);
                }
                return;
            }
            for one in &kept[1..] {
                if let (_, Content::Part(part)) = one.content() {
                    self.place_part(id, sequence, &part, above);
                }
            }
        }
    }

    fn place_part(&mut self, id: PeerId, sequence: Sequence, part: &Part<'_>, above: &mut impl Above) {
        let Some(peer) = self.peer_mut(id) else { return };
        let Some(partial) = peer.partial.get_mut(&sequence.value()) else { return };
        if partial.total != part.total || !partial.take(part.fragment, part.data.len()) {
            return;
        }
        let (ticket, total, whole) = (partial.ticket, partial.total, partial.missing == 0);
        above.place(ticket, part.offset, part.data);
        if whole {
            peer.partial.remove(&sequence.value());
            peer.complete();
            above.placed(ticket, Ok(total));
        }
    }

    fn on_notify(&mut self, id: PeerId, length: u32, window: Window, above: &mut impl Above) {
        let at = usize::from(window.id);
        let ours = self.windows[at].as_ref().is_some_and(|sending| sending.peer == id);
        if !ours || self.uses[at] != window.sequence {
            return;
        }
        let Some(sending) = self.close_window(window.id) else { return };
        // It may have overtaken the acknowledgement of its announcement.
        if let Some(peer) = self.peer_mut(id) {
            for one in &mut peer.unacked {
                if one.sequence == sending.sequence && one.what == (What::Rendezvous { window: window.id }) {
                    one.send = None;
                }
            }
        }
        above.sent(sending.send, Ok(length.min(sending.length)));
        self.stalled = true;
    }

    fn nack(&mut self, to: u64, message: &Message, why: u8, above: &mut impl Above) {
        if above.room() > 0 {
            let Message { ends, sequence, .. } = *message;
            let index = INDEX_UNKNOWN;
            let (to_endpoint, from) = (self.config.endpoint, ends.from);
            let nack = Frame::NackLib { to: to_endpoint, from, generation: 0, why, index, sequence };
            above.transmit(to, &nack);
        }
    }

    // ---- acknowledgements

    fn on_ack(&mut self, now: u64, from: u64, endpoint: u8, next: u16, number: u32, above: &mut impl Above) {
        let Some(id) = self.by_address.get(&(from, endpoint)).copied() else { return };
        let Some(peer) = self.peer_mut(id) else { return };
        // Not newer than one that was heard.
        if number.wrapping_sub(peer.acks_heard).wrapping_sub(1) >= 1 << 31 {
            return;
        }
        peer.acks_heard = number;
        let next = Sequence::from_bits(next);
        if next.session() != peer.next_send.session() {
            return;
        }
        let nothing_new = next == peer.acked;
        self.take_ack(now, id, next, above);
        if nothing_new {
            self.on_same_ack(now, id, above);
        }
        // The receivers of large messages are there.
        for sending in self.windows.iter_mut().flatten().filter(|sending| sending.peer == id) {
            sending.asked = 0;
        }
    }

    fn take_ack(&mut self, now: u64, id: PeerId, value: Sequence, above: &mut impl Above) {
        let keep_alive = now.saturating_add(self.config.timing.keep_alive);
        let Some(peer) = self.peer_mut(id) else { return };
        if value == peer.acked {
            return;
        }
        for one in peer.take_ack(value, now) {
            match (one.what, one.send) {
                (What::Eager, Some(send)) => above.sent(send, Ok(one.length)),
                (What::Rendezvous { window }, Some(send)) => {
                    let sending = self.windows[usize::from(window)].as_mut();
                    if let Some(sending) = sending.filter(|sending| sending.send == send && !sending.is_old) {
                        sending.due = Some(keep_alive);
                        self.wake_at(keep_alive);
                    }
                }
                _ => {}
            }
        }
        if self.peer(id).is_some_and(|peer| peer.recovering.is_some()) {
            self.repair(now, id, above);
        }
        self.pump(now, id, above);
    }

    /// The peer hears from us, and still waits for the first message that it did not acknowledge: it was lost.
    fn on_same_ack(&mut self, now: u64, id: PeerId, above: &mut impl Above) {
        let Some(peer) = self.peer_mut(id) else { return };
        // Only if the peer can have heard something newer.
        if peer.recovering.is_none() && peer.unacked.len() > 1 {
            peer.recovering = Some(peer.next_send);
            self.repair(now, id, above);
        }
    }

    /// Send the oldest again, unless that was just done.
    fn repair(&mut self, now: u64, id: PeerId, above: &mut impl Above) {
        let Some(peer) = self.peer(id) else { return };
        let Some(first) = peer.unacked.front() else { return };
        if first.times == 1 {
            let sequence = first.sequence;
            self.send_again(now, id, sequence, above);
        }
    }

    fn on_nack(&mut self, now: u64, id: PeerId, sequence: Sequence, why: Status, above: &mut impl Above) {
        let Some(peer) = self.peer_mut(id) else { return };
        if let Some(at) = peer.unacked.iter().position(|one| one.sequence == sequence) {
            let Some(one) = peer.unacked.get_mut(at) else { return };
            // Its number must be acknowledged some time, or nothing behind it ever is: who nacks it has no such order.
            let (what, send) = (one.what, one.send.take());
            let waited = peer.waited(now);
            if let Some(one) = peer.unacked.remove(at) {
                peer.in_flight -= one.carries();
            }
            peer.has_answered(now, waited);
            match (what, send) {
                (What::Rendezvous { window }, Some(_)) => {
                    if let Some(sending) = self.close_window(window) {
                        above.sent(sending.send, Err(why));
                    }
                }
                (What::Eager, Some(send)) => above.sent(send, Err(why)),
                _ => {}
            }
            return self.pump(now, id, above);
        }
        let asked =
            |sending: &Sending| sending.peer == id && sending.sequence == sequence && sending.due.is_some();
        if let Some(window) = self.windows.iter().position(|w| w.as_ref().is_some_and(asked)) {
            if let Some(sending) = self.close_window(window as u8) {
                above.sent(sending.send, Err(why));
            }
            return;
        }
        if sequence.bits() != 0 {
            return;
        }
        if let Some(one) = self.peer_mut(id).and_then(|peer| peer.connects.pop_front()) {
            above.connected(one.connect, Err(why));
        }
    }

    // ---- pulls of others

    fn on_pull(
        &mut self,
        now: u64,
        from: u64,
        (ends, session): (Ends, u32),
        (window, cookie): (Window, Cookie),
        frame: &Frame<'_>,
        above: &mut impl Above,
    ) {
        let id = self.by_address.get(&(from, ends.from)).copied();
        let sending = self.windows[usize::from(window.id)].as_mut();
        let sending =
            sending.filter(|s| Some(s.peer) == id && self.uses[usize::from(window.id)] == window.sequence);
        let why = if session != self.config.session {
            Some(BAD_SESSION)
        } else if sending.is_none() {
            Some(BAD_WINDOW)
        } else {
            None
        };
        if let Some(why) = why {
            if above.room() > 0 {
                above.transmit(from, &Frame::NackPull { from: ends.from, generation: 0, why, cookie });
            }
            return;
        }
        let Some(sending) = sending else { return };
        // Its receiver is there.
        sending.asked = 0;
        if let Some(due) = &mut sending.due {
            *due = now.saturating_add(self.config.timing.keep_alive);
        }
        if self.jobs.add(from, sending.send, sending.length, frame, &self.config.profile) {
            self.wake_at(now);
        }
    }
}

/// A fragment of a medium message.
#[derive(Clone, Copy)]
struct Part<'a> {
    total: u32,
    fragment: u8,
    offset: u32,
    data: &'a [u8],
}

impl Part<'_> {
    fn fits(&self) -> bool {
        self.offset.checked_add(self.data.len() as u32).is_some_and(|end| end <= self.total)
            && !(self.data.is_empty() && self.total > 0)
    }
}

/// What a message is, whatever its sequence says.
#[derive(Clone, Copy)]
enum Content<'a> {
    Whole(&'a [u8]),
    Part(Part<'a>),
    Large(Large),
    Notify { length: u32, window: Window },
}

impl Early {
    fn content(&self) -> (u64, Content<'_>) {
        match self {
            Self::Whole { matching, data } => (*matching, Content::Whole(data)),
            Self::Fragment { matching, total, fragment, offset, data } => {
                let part = Part { total: *total, fragment: *fragment, offset: *offset, data };
                (*matching, Content::Part(part))
            }
            Self::Large { matching, length, window } => {
                (*matching, Content::Large(Large { window: *window, length: *length }))
            }
            Self::Notify { length, window } => (0, Content::Notify { length: *length, window: *window }),
        }
    }
}
