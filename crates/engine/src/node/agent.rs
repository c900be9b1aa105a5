//! The attachment's thread: answers, connections that come in, cuts, relayed bells, and attaching
//! again when the broker went away.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use isthmus_sys::packet;
use isthmus_wire::control::{self, MESSAGE_MAX, Message, Refusal};

use super::{
    ANSWER_LIMIT, Answer, Identity, Node, TOKEN_CONTROL, TOKEN_WAKE, decode_any, greet_waiting, send,
    send_how,
};
use crate::bell::Doorbell;
use crate::connection::{Connection, Info, key};
use crate::error::{Error, Result};
use crate::listener::Acceptor;
use crate::lock;

/// First and longest pause between attempts to reach a broker that went away.
const RETRY_FIRST: Duration = Duration::from_millis(20);
const RETRY_MOST: Duration = Duration::from_secs(1);

/// What the next broker was shown: leased ports with their partners, and keys of connections.
struct Shown {
    ports: Vec<(u32, u32)>,
    connections: Vec<u64>,
}

impl Node {
    pub(super) fn run(self: Arc<Self>) {
        let mut events = Vec::new();
        match &self.host {
            Some(host) if self.attached() => host.attached(&self),
            Some(_) => self.attach_again(),
            None => {}
        }
        while !self.stopping.load(Ordering::Acquire) {
            events.clear();
            let limit = self.spare.left();
            if self.set.wait(limit, &mut events).is_err() {
                continue;
            }
            if limit.is_some() {
                self.spare.let_go();
            }
            for (token, ready) in &events {
                match *token {
                    TOKEN_WAKE => self.wake.lower(),
                    TOKEN_CONTROL => {
                        let mut there = !ready.writable || self.post_more();
                        if ready.readable || ready.hung_up {
                            there &= self.read_control();
                        }
                        if !there {
                            self.attach_again();
                        }
                    }
                    key => {
                        let member = lock(&self.connections).get(&key).and_then(Weak::upgrade);
                        if let Some(connection) = member {
                            connection.heard();
                            if ready.hung_up || connection.peer_gone() {
                                let _ = self.set.remove(connection.bell().as_fd());
                            }
                        }
                    }
                }
            }
        }
        self.lose_control();
    }

    /// Handle one packet; `false` if the broker is gone.
    fn read_control(self: &Arc<Self>) -> bool {
        let Ok(control) = self.control() else { return false };
        let mut buffer = [0; MESSAGE_MAX];
        match packet::receive(control.as_fd(), &mut buffer) {
            Ok((0, _)) => false,
            Ok((len, descriptors)) => {
                self.dispatch(&buffer[..len], descriptors);
                true
            }
            Err(error) => error.kind() == std::io::ErrorKind::Interrupted,
        }
    }

    fn dispatch(self: &Arc<Self>, packet: &[u8], descriptors: Vec<OwnedFd>) {
        let Ok((request, message)) = control::decode(packet) else { return };
        match message {
            Message::Incoming { connection, .. } => {
                if let Err(refusal) = self.incoming(&message, descriptors) {
                    let _ = self.tell(0, &Message::Refuse { connection, refusal }, &[]);
                }
            }
            Message::IncomingSocket { connection, .. } => {
                if let Err(refusal) = self.incoming_socket(&message, descriptors) {
                    self.refuse(connection, refusal);
                }
            }
            Message::Window { connection, opener, window, size } => {
                let member =
                    lock(&self.connections).get(&key(connection, opener != 0)).and_then(Weak::upgrade);
                if let (Some(connection), Some(file)) = (member, descriptors.first()) {
                    connection.borrow(window, size, file, &self.lenders);
                }
            }
            Message::WindowGone { connection, opener, window } => {
                let member =
                    lock(&self.connections).get(&key(connection, opener != 0)).and_then(Weak::upgrade);
                if let Some(connection) = member {
                    connection.give_back(window);
                }
            }
            Message::Doorbell { offset, value } => {
                let registers = descriptors.first().map(AsFd::as_fd);
                if let Some(Ok(doorbell)) = registers.map(|file| Doorbell::new(file, offset, value)) {
                    let _ = self.doorbell.set(Arc::new(doorbell));
                }
            }
            Message::Cut { connection, text, .. } => {
                if let Some(host) = &self.host {
                    host.cut(connection, text);
                }
                // Both ends, if this program is connected to itself.
                for opener in [true, false] {
                    let member = lock(&self.connections).remove(&key(connection, opener));
                    if let Some(connection) = member.and_then(|member| member.upgrade()) {
                        connection.cut(text);
                        connection.heard();
                        // Its bell stays at its end: it would be ready for ever.
                        let _ = self.set.remove(connection.bell().as_fd());
                    }
                }
            }
            _ => {
                let then = lock(&self.slots).remove(&request);
                if let Some(then) = then {
                    then(Ok(Answer { packet: packet.to_vec(), descriptors }));
                } else if let Message::Connected { connection, .. }
                | Message::ConnectedSocket { connection, .. } = message
                {
                    // Whoever asked was told that the broker is lost, and the next one was asked.
                    let _ = self.tell(0, &Message::Close { connection }, &[]);
                }
            }
        }
    }

    fn incoming(
        self: &Arc<Self>,
        message: &Message<'_>,
        descriptors: Vec<OwnedFd>,
    ) -> std::result::Result<(), Refusal> {
        let Message::Incoming {
            connection,
            secret,
            from,
            from_name,
            from_port,
            port,
            partner,
            kind,
            carrier,
            small,
            large,
            why,
            ticket,
        } = *message
        else {
            return Err(Refusal::BadRequest);
        };
        let acceptor = lock(&self.acceptors).get(&(port, partner)).and_then(Weak::upgrade);
        let acceptor = acceptor.ok_or(Refusal::NobodyListens)?;
        acceptor.room()?;
        let terms = acceptor.terms();
        let info = Info {
            id: connection,
            kind,
            carrier,
            port,
            peer: from,
            peer_name: from_name.to_owned(),
            peer_port: from_port,
            why: why.to_owned(),
            opener: false,
            ticket,
            small: terms.small,
            large: terms.large,
            theirs: (small, large),
        };
        if lock(&self.identity).guest {
            return self.incoming_in_guest(&*acceptor, info, descriptors, secret);
        }
        let shape = (carrier, terms.small, terms.large);
        let offer = self.spare.take(shape).map_err(|_| Refusal::LimitReached)?;
        // Answered first: the opener goes on while this side maps what it got, and if it cannot, the
        // opener hears that the other side is gone.
        let accept = Message::Accept { connection, small: terms.small, large: terms.large };
        if self.tell(0, &accept, &offer.descriptors()).is_ok() {
            match self.join(Some(&offer), info, descriptors, (small, large), secret) {
                Ok(joined) => acceptor.incoming(joined),
                Err(_) => drop(self.tell(0, &Message::Close { connection }, &[])),
            }
        }
        self.spare.prepare(shape);
        Ok(())
    }

    /// As above, where the agent of the guest brings the memory of both directions.
    fn incoming_in_guest(
        self: &Arc<Self>,
        acceptor: &dyn Acceptor,
        mut info: Info,
        descriptors: Vec<OwnedFd>,
        secret: u64,
    ) -> std::result::Result<(), Refusal> {
        let (connection, theirs) = (info.id, info.theirs);
        (info.small, info.large) = theirs;
        // The memory first: until the switch is told, nobody writes there.
        let joined = self.join(None, info, descriptors, theirs, secret).map_err(|_| Refusal::LimitReached)?;
        let accept = Message::Accept { connection, small: theirs.0, large: theirs.1 };
        if self.tell(0, &accept, &[]).is_ok() {
            acceptor.incoming(joined);
        }
        Ok(())
    }

    fn lose_control(&self) {
        {
            let mut control = lock(&self.control);
            if let Some(control) = control.take() {
                let _ = self.set.remove(control.as_fd());
            }
            lock(&self.outbox).clear();
        }
        let slots: Vec<_> = lock(&self.slots).drain().collect();
        for (_, then) in slots {
            then(Err(Error::BrokerLost));
        }
    }

    /// The broker went away: wait for the next one and show it what we hold.
    fn attach_again(self: &Arc<Self>) {
        self.lose_control();
        let mut pause = RETRY_FIRST;
        while !self.stopping.load(Ordering::Acquire) {
            if let Ok((control, identity)) = self.greet_again() {
                let control = Arc::new(control);
                let shown = self
                    .show_what_we_hold(&control, identity.windows)
                    .and_then(|shown| self.show_sockets(&control).map(|()| shown));
                if let Ok(shown) = shown {
                    if self.set.add(control.as_fd(), TOKEN_CONTROL).is_ok() {
                        *lock(&self.identity) = identity;
                        *lock(&self.control) = Some(control);
                        self.take_back(&shown);
                        if let Some(host) = &self.host {
                            host.attached(self);
                        }
                        return;
                    }
                }
            }
            self.relay_until(Instant::now() + pause);
            pause = (pause * 2).min(RETRY_MOST);
        }
    }

    fn greet_again(&self) -> Result<(OwnedFd, Identity)> {
        greet_waiting(&self.door, &self.program, self.features(), ANSWER_LIMIT, |control| {
            self.answers(control)
        })
    }

    /// Does a broker that is not ours yet say something within [`ANSWER_LIMIT`]?
    fn answers(&self, control: BorrowedFd<'_>) -> bool {
        if self.set.add(control, TOKEN_CONTROL).is_err() {
            return false;
        }
        let said = self.relay_until(Instant::now() + ANSWER_LIMIT);
        let _ = self.set.remove(control);
        said
    }

    /// Relay bells until then, or until we are told to stop; `true`: the broker says something.
    fn relay_until(&self, until: Instant) -> bool {
        let mut events = Vec::new();
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            events.clear();
            let _ = self.set.wait(Some(left), &mut events);
            for (token, ready) in &events {
                let member = lock(&self.connections).get(token).and_then(Weak::upgrade);
                if let Some(connection) = member {
                    connection.heard();
                    if ready.hung_up {
                        let _ = self.set.remove(connection.bell().as_fd());
                    }
                }
            }
            let is_there = |wanted| events.iter().any(|(token, _)| *token == wanted);
            if is_there(TOKEN_CONTROL) || is_there(TOKEN_WAKE) {
                return is_there(TOKEN_CONTROL);
            }
        }
        false
    }

    fn show_what_we_hold(self: &Arc<Self>, control: &Arc<OwnedFd>, windows: bool) -> Result<Shown> {
        let acceptors: Vec<_> =
            lock(&self.acceptors).iter().filter_map(|(key, a)| Some((*key, a.upgrade()?.terms()))).collect();
        let mut shown = Shown { ports: Vec::new(), connections: Vec::new() };
        for ((port, partner), terms) in acceptors {
            shown.ports.push((port, partner));
            let bind = Message::Bind { port, kind: terms.kind, partner, backlog: terms.backlog };
            // A refused lease stays refused: the rules may have changed. Connects simply stop.
            self.exchange(control, &bind, &[])?;
        }
        let held: Vec<_> = lock(&self.connections).values().filter_map(Weak::upgrade).collect();
        for connection in held {
            let Info { id, kind, carrier, port, peer, peer_port, opener, ticket, small, large, .. } =
                connection.info;
            let resume = Message::Resume {
                connection: id,
                peer,
                peer_port,
                port,
                kind,
                carrier,
                small,
                large,
                opener: u8::from(opener),
                ticket,
            };
            shown.connections.push(connection.info.key());
            let page: Vec<_> = connection.counters_fd().into_iter().collect();
            let answer = self.exchange(control, &resume, &page)?;
            if let Message::Refused { text, .. } = decode_any(&answer)? {
                lock(&self.connections).remove(&connection.info.key());
                connection.cut(text);
                connection.heard();
                // Its bell stays at its end: it would be ready for ever.
                let _ = self.set.remove(connection.bell().as_fd());
                continue;
            }
            if windows {
                self.show_windows(control, &connection)?;
            }
        }
        Ok(shown)
    }

    /// The other side has the windows that were lent; the broker counts them.
    fn show_windows(self: &Arc<Self>, control: &Arc<OwnedFd>, connection: &Connection) -> Result<()> {
        let (lent, gone) = connection.lent_windows();
        for (message, window) in lent {
            let answer = self.exchange(control, &message, &[window.file()])?;
            if !matches!(decode_any(&answer)?, Message::Done {}) {
                if let Some(message) = connection.lend_no_more(&window) {
                    send(control, 0, &message, &[])?;
                }
            }
        }
        for message in gone {
            send(control, 0, &message, &[])?;
        }
        Ok(())
    }

    /// Tell the broker what ended while it was being shown, and could not be told then.
    fn take_back(&self, shown: &Shown) {
        for (port, partner) in shown.ports.iter().copied() {
            if !lock(&self.acceptors).contains_key(&(port, partner)) {
                self.ask_then(&Message::Unbind { port, partner }, &[], Box::new(drop));
            }
        }
        for key in shown.connections.iter().copied() {
            if !lock(&self.connections).contains_key(&key) {
                let _ = self.tell(0, &Message::Close { connection: key >> 1 }, &[]);
            }
        }
    }

    /// Ask on a control socket that nobody else reads yet; what else arrives is handled, and bells are relayed.
    pub(super) fn exchange(
        self: &Arc<Self>,
        control: &Arc<OwnedFd>,
        message: &Message<'_>,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>> {
        let asked = self.next_request.fetch_add(1, Ordering::Relaxed).max(1);
        // It reads while it answers.
        send_how(control, asked, message, descriptors, packet::send_now)?;
        let mut buffer = [0; MESSAGE_MAX];
        loop {
            if !self.answers(control.as_fd()) {
                return Err(Error::BrokerLost);
            }
            let (len, descriptors) = packet::receive(control.as_fd(), &mut buffer)
                .map_err(Error::os("reading from the broker"))?;
            if len == 0 {
                return Err(Error::BrokerLost);
            }
            match control::decode(&buffer[..len]) {
                Ok((request, _)) if request == asked => return Ok(buffer[..len].to_vec()),
                Ok((
                    _,
                    Message::Incoming { connection, .. } | Message::IncomingSocket { connection, .. },
                )) => {
                    // Not ready yet: the opener is told to try again.
                    drop(descriptors);
                    let refuse = Message::Refuse { connection, refusal: Refusal::BacklogFull };
                    send(control, 0, &refuse, &[])?;
                }
                _ => self.dispatch(&buffer[..len], descriptors),
            }
        }
    }
}
