//! Kernel sockets that the broker brings: for those who must have a descriptor of their own.
//!
//! The engine only passes them on; who holds one later is not its business. So the [`Host`] keeps what a restarted
//! broker must be shown.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use isthmus_sys::packet::{self, Shape};
use isthmus_wire::control::{
    ANYBODY, FEATURE_SOCKETS, FEATURE_WINDOWS, Message, Refusal, SocketKind, TICKET,
};

use super::{Answer, Attachment, Node, decode, unexpected, wait_for};
use crate::error::{Error, Result};
use crate::listener::Terms;
use crate::lock;
use crate::outbox::OUTBOX_MAX;
use crate::wait::How;

/// How long programs wait that could do without a broker; it is looked for meanwhile.
const FIRST_LIMIT: Duration = Duration::from_secs(1);

/// What a broker that was started again must be shown of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Granted {
    pub connection: u64,
    pub kind: SocketKind,
    /// The other side.
    pub peer: u32,
    pub peer_name: String,
    pub peer_port: u32,
    pub port: u32,
    /// This side asked for it.
    pub opener: bool,
    pub why: String,
    pub ticket: [u8; TICKET],
}

/// A kernel socket, connected.
pub struct Brought {
    pub socket: OwnedFd,
    pub granted: Granted,
}

/// Somebody who connects to a port of this program.
pub struct Visitor {
    pub brought: Brought,
    /// The opener's IP address and port as the broker knows them; may be empty.
    pub source: String,
    pub source_port: u32,
    /// The IP address that the opener named, if it named one.
    pub destination: String,
    /// Made ahead of its use: nobody is there before the first [`AHEAD`] bytes come.
    pub ahead: bool,
}

/// Bytes in front of a connection that was made ahead: the port that it comes from, in the place of `source_port`.
pub const AHEAD: usize = 2;

/// What somebody asks for.
#[derive(Clone, Debug)]
pub struct SocketRequest {
    /// A domain's name, its number or an IP address of it.
    pub to: String,
    pub port: u32,
    pub kind: SocketKind,
    /// What the other side is told of where this comes from; may be empty.
    pub source: String,
    pub source_port: u32,
    /// Ahead of its use; whoever uses it writes [`AHEAD`] bytes there, and says so by [`Node::take_socket`].
    pub ahead: bool,
}

/// A program whose connections are kernel sockets. Everything is called on the engine's thread.
pub trait Host: Send + Sync {
    /// Answer with [`Node::accept_socket`] or [`Node::refuse`], now or soon.
    fn incoming(&self, node: &Arc<Node>, visitor: Visitor);
    /// A connection that rules do not allow any more.
    fn cut(&self, connection: u64, why: &str);
    /// A broker is there, for the first time or again.
    fn attached(&self, node: &Arc<Node>);
    /// Every connection whose socket still exists, and a copy of it, for the broker that was started again.
    fn held(&self) -> Vec<Brought>;
}

impl Node {
    /// Attach as a program whose connections are kernel sockets: now, or as soon as a broker is there.
    ///
    /// # Errors
    /// This process is out of descriptors or threads.
    pub fn attach_host(door: &Path, program: &str, host: Arc<dyn Host>) -> Result<Arc<Attachment>> {
        let greeted = super::greet(door, program, FEATURE_SOCKETS, FIRST_LIMIT).ok();
        Self::start(door, program, greeted, Some(host))
    }

    /// Ask for a connection. `then` is called on the engine's thread.
    pub fn connect_socket_then(
        &self,
        request: &SocketRequest,
        then: Box<dyn FnOnce(Result<Brought>) + Send>,
    ) {
        let SocketRequest { to, port, kind, source, source_port, ahead } = request;
        let message = Message::ConnectSocket {
            to,
            to_port: *port,
            kind: *kind,
            source,
            source_port: *source_port,
            ahead: u8::from(*ahead),
        };
        let kind = *kind;
        self.ask_then(&message, &[], Box::new(move |answer| then(answer.and_then(|a| brought(a, kind)))));
    }

    /// A connection that was made ahead is used now. `false`: the broker has much to read; say it later.
    pub fn take_socket(&self, connection: u64) -> bool {
        let has_room = lock(&self.outbox).waiting() < OUTBOX_MAX / 2;
        has_room && self.tell(0, &Message::TakeSocket { connection }, &[]).is_ok()
    }

    /// Lease a port, to which anybody may connect whom a rule lets in.
    pub fn lease_then(&self, port: u32, backlog: u32, then: Box<dyn FnOnce(Result<()>) + Send>) {
        let message = Message::Bind { port, kind: SocketKind::Stream, partner: ANYBODY, backlog };
        let bound = |answer: Answer| match decode(&answer.packet)? {
            Message::Bound { .. } => Ok(()),
            other => Err(unexpected(&other)),
        };
        self.ask_then(&message, &[], Box::new(move |answer| then(answer.and_then(bound))));
    }

    /// Give a port back.
    pub fn give_back(&self, port: u32) {
        self.ask_then(&Message::Unbind { port, partner: ANYBODY }, &[], Box::new(drop));
    }

    /// The visitor is taken in. With `instead`, a socket that is connected to this program already, the opener gets that
    /// one, and the visitor's is not used.
    ///
    /// # Errors
    /// The broker is gone.
    pub fn accept_socket(&self, connection: u64, instead: Option<BorrowedFd<'_>>) -> Result<()> {
        let accept = Message::Accept { connection, small: 0, large: 0 };
        self.tell(0, &accept, instead.as_slice())
    }

    /// As [`Node::connect_socket_then`], and wait.
    ///
    /// # Errors
    /// The broker refuses, or the time ran out.
    pub fn connect_socket(&self, request: &SocketRequest, how: &How<'_>) -> Result<Brought> {
        let (tx, rx) = mpsc::sync_channel(1);
        self.connect_socket_then(request, Box::new(move |result| drop(tx.send(result))));
        wait_for(&rx, how)?
    }

    /// It is not.
    pub fn refuse(&self, connection: u64, refusal: Refusal) {
        let _ = self.tell(0, &Message::Refuse { connection, refusal }, &[]);
    }

    /// The IP addresses of this network, with spaces between them. `then` hears whether the broker answered.
    pub fn tell_addresses_then(&self, list: &str, then: Box<dyn FnOnce(bool) + Send>) {
        self.ask_then(&Message::Addresses { list }, &[], Box::new(move |answer| then(answer.is_ok())));
    }

    /// Connections took the ordinary network, or were refused it.
    pub fn tell_fallback(&self, to: &str, port: u32, count: u32, refused: bool, why: &str) {
        let message = Message::Fallback { to, to_port: port, count, refused: refused.into(), why };
        let _ = self.tell(0, &message, &[]);
    }

    pub(super) fn incoming_socket(
        self: &Arc<Self>,
        message: &Message<'_>,
        descriptors: Vec<OwnedFd>,
    ) -> std::result::Result<(), Refusal> {
        let (Some(host), Ok([socket])) = (&self.host, <[OwnedFd; 1]>::try_from(descriptors)) else {
            return Err(Refusal::BadRequest);
        };
        let Message::IncomingSocket {
            connection,
            from,
            from_name,
            from_port,
            source,
            source_port,
            port,
            destination,
            kind,
            ahead,
            why,
            ticket,
            ..
        } = *message
        else {
            return Err(Refusal::BadRequest);
        };
        let granted = Granted {
            connection,
            kind,
            peer: from,
            peer_name: from_name.to_owned(),
            peer_port: from_port,
            port,
            opener: false,
            why: why.to_owned(),
            ticket,
        };
        let visitor = Visitor {
            brought: Brought { socket, granted },
            source: source.to_owned(),
            source_port,
            destination: destination.to_owned(),
            ahead: ahead != 0,
        };
        host.incoming(self, visitor);
        Ok(())
    }

    /// Show a new broker what sockets of the last one there are.
    pub(super) fn show_sockets(self: &Arc<Self>, control: &Arc<OwnedFd>) -> Result<()> {
        for Brought { socket, granted } in self.host.iter().flat_map(|host| host.held()) {
            let message = Message::ResumeSocket {
                connection: granted.connection,
                peer: granted.peer,
                peer_port: granted.peer_port,
                port: granted.port,
                kind: granted.kind,
                opener: u8::from(granted.opener),
                ticket: granted.ticket,
            };
            let answer = self.exchange(control, &message, &[socket.as_fd()])?;
            if let (Message::Refused { text, .. }, Some(host)) = (super::decode_any(&answer)?, &self.host) {
                host.cut(granted.connection, text);
            }
        }
        Ok(())
    }

    /// What this program says of itself in `hello`.
    pub(super) fn features(&self) -> u32 {
        if self.host.is_some() { FEATURE_SOCKETS } else { FEATURE_WINDOWS }
    }
}

fn brought(answer: Answer, kind: SocketKind) -> Result<Brought> {
    let Answer { packet, descriptors } = answer;
    let Message::ConnectedSocket { connection, to, to_name, to_port, from_port, why, ticket } =
        decode(&packet)?
    else {
        return Err(Error::BadAnswer("not an answer to connect-socket".into()));
    };
    let Ok([socket]) = <[OwnedFd; 1]>::try_from(descriptors) else {
        return Err(Error::BadAnswer("a connection without its socket".into()));
    };
    let granted = Granted {
        connection,
        kind,
        peer: to,
        peer_name: to_name.to_owned(),
        peer_port: to_port,
        port: from_port,
        opener: true,
        why: why.to_owned(),
        ticket,
    };
    Ok(Brought { socket, granted })
}

fn shape_of(kind: SocketKind) -> Shape {
    if kind == SocketKind::Stream { Shape::Stream } else { Shape::Packets }
}

/// Kernel sockets of one program, which asks for each by itself, and has listeners that are kernel sockets too.
#[derive(Default)]
pub struct Ports(Mutex<HashMap<u32, Port>>);

struct Port {
    kind: SocketKind,
    backlog: u32,
    /// The listener's file: whoever has it can connect there, whatever its name.
    listener: OwnedFd,
}

impl Ports {
    /// Attach as a program of kernel sockets.
    ///
    /// # Errors
    /// No broker answers at the door, or it refuses.
    pub fn attach(door: &Path, program: &str) -> Result<(Arc<Attachment>, Arc<Self>)> {
        let ports = Arc::new(Self::default());
        let greeted = super::greet(door, program, FEATURE_SOCKETS, super::ANSWER_LIMIT)?;
        let host: Arc<dyn Host> = Arc::clone(&ports) as _;
        Ok((Node::start(door, program, Some(greeted), Some(host))?, ports))
    }

    /// Lease a port (0: the broker chooses) for a listening Unix socket, of which `listener` is the file (`O_PATH`).
    ///
    /// # Errors
    /// As [`Node::listen`].
    pub fn listen(
        &self,
        node: &Node,
        port: u32,
        kind: SocketKind,
        backlog: u32,
        listener: OwnedFd,
        how: &How<'_>,
    ) -> Result<u32> {
        let port = node.bind(&Terms { port, partner: ANYBODY, kind, backlog, small: 0, large: 0 }, how)?;
        lock(&self.0).insert(port, Port { kind, backlog, listener });
        Ok(port)
    }

    /// Give a port back.
    pub fn close(&self, node: &Node, port: u32) {
        if lock(&self.0).remove(&port).is_some() {
            node.give_back(port);
        }
    }
}

impl Host for Ports {
    fn incoming(&self, node: &Arc<Node>, visitor: Visitor) {
        let Granted { connection, port, kind, .. } = visitor.brought.granted;
        if visitor.ahead {
            return node.refuse(connection, Refusal::PathUnavailable);
        }
        let connected =
            lock(&self.0).get(&port).map(|port| packet::connect_to(port.listener.as_fd(), shape_of(kind)));
        match connected {
            Some(Ok(socket)) => drop(node.accept_socket(connection, Some(socket.as_fd()))),
            Some(Err(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                node.refuse(connection, Refusal::BacklogFull);
            }
            _ => node.refuse(connection, Refusal::NobodyListens),
        }
    }

    fn cut(&self, _: u64, _: &str) {}

    fn attached(&self, node: &Arc<Node>) {
        let ports: Vec<_> =
            lock(&self.0).iter().map(|(number, port)| (*number, port.kind, port.backlog)).collect();
        for (port, kind, backlog) in ports {
            node.ask_then(&Message::Bind { port, kind, partner: ANYBODY, backlog }, &[], Box::new(drop));
        }
    }

    fn held(&self) -> Vec<Brought> {
        Vec::new()
    }
}
