//! Control messages: what a program and the broker of its node say to each other.
//!
//! A program reaches the broker through its domain's *door*, a `SOCK_SEQPACKET` Unix socket, so a
//! message is one packet and the door it came through is the identity of its sender. Descriptors
//! travel beside the packet (`SCM_RIGHTS`); each message's documentation says which.
//!
//! ```text
//! program                      broker                      other program
//!   Hello            ->
//!                    <-  Welcome
//!   Bind             ->                                    (listens)
//!                    <-  Bound
//!   Connect [lane]   ->  Incoming [lane, bell]     ->
//!                        <-                    Accept [lane]
//!                    <-  Connected [lane, bell]
//!   Close            ->                        <-  Close
//! ```
//!
//! Every message is a 12-byte header (version, kind, reserved, request, body length) and a body of
//! little-endian fields in the order they are declared below. Text has a 16-bit length in front.
//!
//! Format: docs/formats/control.md. Golden bytes: vectors/control.txt.

use crate::reader::{DecodeError, Problem, Reader};
use crate::writer::{EncodeError, Writer};

/// Version of this format. A broker and a program of different versions part with a clear error.
pub const VERSION: u8 = 1;
/// Version, kind, reserved (2), request (4), body length (4).
pub const HEADER: usize = 12;
/// No message is longer, header included; a sender never needs a larger buffer.
pub const MESSAGE_MAX: usize = 4096;
/// Longest text field, bytes.
pub const TEXT_MAX: usize = 3500;
/// Descriptors beside one message.
pub const DESCRIPTORS_MAX: usize = 3;
/// Bytes of a ticket, see [`Message::Connected`].
pub const TICKET: usize = 32;
/// In `Bind.partner`: anybody whom a rule lets in.
pub const ANYBODY: u32 = u32::MAX;

/// In `Bind.port`: every port of the domain that no program of it has bound. For the switch, which stands for all
/// programs of a guest that speak plain `AF_VSOCK`.
pub const ANY_PORT: u32 = u32::MAX;

/// In `Welcome.features`: the program is in a guest. Every lane is carried by the switch, and the memory for both
/// directions comes with `incoming` and `connected`.
pub const FEATURE_GUEST: u32 = 1;

/// In `Hello.features` and `Welcome.features`: the program's connections are kernel sockets that the broker brings
/// (`connect-socket`), and so are those to its ports.
pub const FEATURE_SOCKETS: u32 = 2;

/// In `Hello.features` and `Welcome.features`: windows may be lent to this program (`window`), and it may lend some.
pub const FEATURE_WINDOWS: u32 = 4;
/// Windows that one side of a connection may have lent at a time.
pub const WINDOWS_MAX: usize = 64;
/// Longest window, bytes.
pub const WINDOW_MAX: u64 = 1 << 32;

/// Ports of the host on which the switch itself listens, for the agents of its guests.
pub const CONTROL_PORT: u32 = 1;
/// Only from a privileged port: whoever names pages of a guest's memory may name any.
pub const SEATS_PORT: u32 = 2;
/// The same: four bytes say whose bell it is.
pub const BELL_PORT: u32 = 3;
/// Eight bytes say which end of which connection: its number, times two, and one more for the opener. What follows is
/// the connection's.
pub const SOCKETS_PORT: u32 = 4;
/// The last port that only root of a guest may use.
pub const PRIVILEGED_PORT_MAX: u32 = 1023;

/// A numbered list whose discriminant is the wire value.
macro_rules! list {
    ($(#[$doc:meta])* $name:ident: $repr:ident { $($(#[$vdoc:meta])* $variant:ident = $value:literal $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr($repr)]
        pub enum $name { $($(#[$vdoc])* $variant = $value),+ }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            #[must_use]
            pub fn from_wire(value: $repr) -> Option<Self> {
                Self::ALL.iter().copied().find(|v| *v as $repr == value)
            }

            /// The word used in the CLI, in Python and in the docs.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }
    };
}

list! {
    /// What a lane's bytes are to its user.
    SocketKind: u8 {
        Stream = 1 "stream",
        Seqpacket = 2 "seqpacket",
        Datagram = 3 "datagram",
    }
}

list! {
    /// Who carries a lane.
    Carrier: u8 {
        Sealed = 1 "sealed",
        Put = 2 "put",
        /// A guest is involved. Each side brings what it brings for `sealed`; a guest's side is the switch.
        Switch = 3 "switch",
    }
}

list! {
    /// How far a guest's device has come.
    GuestState: u8 {
        /// No monitor has connected.
        Waiting = 1 "waiting",
        /// A monitor has; the guest has not started the device.
        Attached = 2 "attached",
        /// The guest's driver uses it.
        Running = 3 "running",
    }
}

list! {
    /// Why something was not done.
    Refusal: u16 {
        UnknownDomain = 1 "unknown-domain",
        RefusedByRule = 2 "refused-by-rule",
        NobodyListens = 3 "nobody-listens",
        PortInUse = 4 "port-in-use",
        LimitReached = 5 "limit-reached",
        BacklogFull = 6 "backlog-full",
        TimedOut = 7 "timed-out",
        /// Ask again with the carrier that `text` names.
        UseCarrier = 8 "use-carrier",
        NotYours = 9 "not-yours",
        BadRequest = 10 "bad-request",
        WildcardNeedsRule = 11 "wildcard-needs-rule",
        PathUnavailable = 12 "path-unavailable",
        WrongKind = 13 "wrong-kind",
        DomainRemoved = 14 "domain-removed",
        PeerGone = 15 "peer-gone",
        Version = 16 "version",
        /// The address that the opener named is not one of the listener's network.
        WrongAddress = 17 "wrong-address",
    }
}

/// A field's value without its type, for callers that handle fields by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    Number(u64),
    Text(&'a str),
    Bytes(&'a [u8]),
}

/// How a Rust type travels as a field.
trait Field<'a>: Sized {
    fn read(reader: &mut Reader<'a>, name: &'static str) -> Result<Self, DecodeError>;
    fn write(self, writer: &mut Writer<'_>, name: &'static str) -> Result<(), EncodeError>;
    fn value(&'a self) -> Value<'a>;
    fn from_value(value: Value<'a>) -> Option<Self>;
}

macro_rules! number_field {
    ($($type:ident),+) => {$(
        impl<'a> Field<'a> for $type {
            fn read(reader: &mut Reader<'a>, name: &'static str) -> Result<Self, DecodeError> {
                reader.$type(name)
            }
            fn write(self, writer: &mut Writer<'_>, name: &'static str) -> Result<(), EncodeError> {
                writer.bytes(name, &self.to_le_bytes())
            }
            fn value(&'a self) -> Value<'a> {
                Value::Number(u64::from(*self))
            }
            fn from_value(value: Value<'a>) -> Option<Self> {
                match value {
                    Value::Number(n) => n.try_into().ok(),
                    _ => None,
                }
            }
        }
    )+};
}
number_field!(u8, u16, u32, u64);

macro_rules! list_field {
    ($($type:ident: $repr:ident),+) => {$(
        impl<'a> Field<'a> for $type {
            fn read(reader: &mut Reader<'a>, name: &'static str) -> Result<Self, DecodeError> {
                let value = reader.$repr(name)?;
                Self::from_wire(value).ok_or_else(|| {
                    reader.error(name, size_of::<$repr>(), Problem::Unknown(u64::from(value)))
                })
            }
            fn write(self, writer: &mut Writer<'_>, name: &'static str) -> Result<(), EncodeError> {
                writer.bytes(name, &(self as $repr).to_le_bytes())
            }
            fn value(&'a self) -> Value<'a> {
                Value::Text(self.name())
            }
            fn from_value(value: Value<'a>) -> Option<Self> {
                match value {
                    Value::Text(text) => Self::ALL.iter().copied().find(|v| v.name() == text),
                    _ => None,
                }
            }
        }
    )+};
}
list_field!(SocketKind: u8, Carrier: u8, Refusal: u16, GuestState: u8);

impl<'a> Field<'a> for &'a str {
    fn read(reader: &mut Reader<'a>, name: &'static str) -> Result<Self, DecodeError> {
        reader.text(name, TEXT_MAX)
    }
    fn write(self, writer: &mut Writer<'_>, name: &'static str) -> Result<(), EncodeError> {
        writer.text(name, self, TEXT_MAX)
    }
    fn value(&'a self) -> Value<'a> {
        Value::Text(self)
    }
    fn from_value(value: Value<'a>) -> Option<Self> {
        match value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }
}

impl<'a> Field<'a> for &'a [u8] {
    fn read(reader: &mut Reader<'a>, name: &'static str) -> Result<Self, DecodeError> {
        let len = usize::from(reader.u16(name)?);
        reader.take(name, len)
    }
    fn write(self, writer: &mut Writer<'_>, name: &'static str) -> Result<(), EncodeError> {
        let Ok(len) = u16::try_from(self.len()) else {
            return Err(EncodeError { field: name, reason: "the bytes are too many" });
        };
        writer.bytes(name, &len.to_le_bytes())?;
        writer.bytes(name, self)
    }
    fn value(&'a self) -> Value<'a> {
        Value::Bytes(self)
    }
    fn from_value(value: Value<'a>) -> Option<Self> {
        match value {
            Value::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }
}

impl<'a> Field<'a> for [u8; TICKET] {
    fn read(reader: &mut Reader<'a>, name: &'static str) -> Result<Self, DecodeError> {
        reader.array(name)
    }
    fn write(self, writer: &mut Writer<'_>, name: &'static str) -> Result<(), EncodeError> {
        writer.bytes(name, &self)
    }
    fn value(&'a self) -> Value<'a> {
        Value::Bytes(self)
    }
    fn from_value(value: Value<'a>) -> Option<Self> {
        match value {
            Value::Bytes(bytes) => bytes.try_into().ok(),
            _ => None,
        }
    }
}

macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident = $code:literal $text:literal {
        $($(#[$fdoc:meta])* $field:ident: $type:ty),* $(,)?
    })+) => {
        /// One control message. `program ->` and `broker ->` say who sends it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Message<'a> {
            $($(#[$doc])* $name { $($(#[$fdoc])* $field: $type),* }),+
        }

        /// Every kind of message with its wire value and its fields, in order.
        pub const MESSAGES: &[(&str, u8, &[&str])] =
            &[$(($text, $code, &[$(stringify!($field)),*])),+];

        impl<'a> Message<'a> {
            /// The message's name, as in [`MESSAGES`].
            #[must_use]
            pub fn name(&self) -> &'static str {
                match self { $(Self::$name { .. } => $text),+ }
            }

            fn code(&self) -> u8 {
                match self { $(Self::$name { .. } => $code),+ }
            }

            #[allow(unused_variables, reason = "messages without fields read and write nothing")]
            fn read(code: u8, reader: &mut Reader<'a>) -> Result<Option<Self>, DecodeError> {
                Ok(Some(match code {
                    $($code => Self::$name {
                        $($field: <$type as Field<'a>>::read(reader, concat!($text, ".", stringify!($field)))?),*
                    },)+
                    _ => return Ok(None),
                }))
            }

            #[allow(unused_variables, reason = "messages without fields read and write nothing")]
            fn write(&self, writer: &mut Writer<'_>) -> Result<(), EncodeError> {
                match self {
                    $(Self::$name { $($field),* } => {
                        $(<$type as Field<'_>>::write(*$field, writer, stringify!($field))?;)*
                    })+
                }
                Ok(())
            }

            /// Show every field to `see`, in order.
            #[allow(unused_variables, reason = "messages without fields read and write nothing")]
            pub fn fields(&'a self, mut see: impl FnMut(&'static str, Value<'a>)) {
                match self {
                    $(Self::$name { $($field),* } => {
                        $(see(stringify!($field), Field::value($field));)*
                    })+
                }
            }

            /// Make a message from its name and its fields by name.
            ///
            /// # Errors
            /// No such message, or a field that is missing or of the wrong type.
            #[allow(unused_variables, reason = "messages without fields read and write nothing")]
            pub fn build(
                name: &str,
                mut field: impl FnMut(&'static str) -> Option<Value<'a>>,
            ) -> Result<Self, EncodeError> {
                match name {
                    $($text => Ok(Self::$name {
                        $($field: field(stringify!($field)).and_then(Field::from_value).ok_or(
                            EncodeError { field: stringify!($field), reason: "is missing or of the wrong type" },
                        )?),*
                    }),)+
                    _ => Err(EncodeError { field: "kind", reason: "no such message" }),
                }
            }
        }
    };
}

messages! {
    /// program -> the first message of an attachment.
    Hello = 1 "hello" {
        features: u32,
        /// What the program calls itself, for `isthmus status`. Believed by nobody.
        program: &'a str,
    }
    /// broker -> the answer: who you are.
    Welcome = 2 "welcome" {
        features: u32,
        domain: u32,
        domain_name: &'a str,
        node: &'a str,
        /// Largest ring this domain may bring, bytes.
        ring_max: u32,
        /// Sequence number of the broker's life; a new one after each restart.
        epoch: u64,
    }
    /// program -> lease a port and listen on it. `port` 0 lets the broker choose.
    Bind = 3 "bind" {
        port: u32,
        kind: SocketKind,
        /// The only domain that may send here, or [`ANYBODY`].
        partner: u32,
        backlog: u32,
    }
    /// broker -> the port is yours.
    Bound = 4 "bound" { port: u32 }
    /// program -> give the port back. Answered by `done`.
    Unbind = 5 "unbind" { port: u32, partner: u32 }
    /// program -> open a connection. With the lane's descriptors: for `sealed` the read-only ring;
    /// for `put` the write-only inbox and the read-only counters page.
    Connect = 6 "connect" {
        /// Name or decimal number of the domain.
        to: &'a str,
        to_port: u32,
        /// A port leased by this program, or 0 for one chosen by the broker.
        from_port: u32,
        kind: SocketKind,
        carrier: Carrier,
        /// Refuse every other carrier (1) or take what policy says (0).
        require: u8,
        small: u32,
        large: u32,
    }
    /// broker -> somebody connects to one of your ports. With their lane's descriptors (without the
    /// counters page) and, last, your end of the bell. Answer with `accept` or `refuse`.
    Incoming = 7 "incoming" {
        connection: u64,
        secret: u64,
        from: u32,
        from_name: &'a str,
        from_port: u32,
        port: u32,
        partner: u32,
        kind: SocketKind,
        carrier: Carrier,
        small: u32,
        large: u32,
        why: &'a str,
        ticket: [u8; TICKET],
    }
    /// program -> taken into the backlog. With this side's lane descriptors, as in `connect`.
    Accept = 8 "accept" { connection: u64, small: u32, large: u32 }
    /// program -> not taken.
    Refuse = 9 "refuse" { connection: u64, refusal: Refusal }
    /// broker -> the connection is open. With the other side's lane descriptors (without the
    /// counters page) and, last, your end of the bell.
    Connected = 10 "connected" {
        connection: u64,
        secret: u64,
        to: u32,
        to_name: &'a str,
        to_port: u32,
        from_port: u32,
        carrier: Carrier,
        small: u32,
        large: u32,
        why: &'a str,
        /// Proves to a restarted broker that this connection was granted, and on what terms.
        ticket: [u8; TICKET],
    }
    /// broker -> the request was refused.
    Refused = 11 "refused" {
        refusal: Refusal,
        /// Number of the rule that decided, 0 where none did.
        rule: u32,
        text: &'a str,
    }
    /// broker -> the request was done and there is nothing to say.
    Done = 12 "done" {}
    /// program -> this side of the connection is finished. Not answered.
    Close = 13 "close" { connection: u64 }
    /// broker -> drop this connection now.
    Cut = 14 "cut" { connection: u64, refusal: Refusal, text: &'a str }
    /// program -> which domain is this? Answered by `resolved`.
    Resolve = 15 "resolve" { name: &'a str }
    /// broker -> this one.
    Resolved = 16 "resolved" { domain: u32, name: &'a str }
    /// program -> after a broker's restart: I still hold this connection. With the read-only
    /// counters page (for `sealed`, the ring itself). Answered by `done` or `refused`.
    Resume = 17 "resume" {
        connection: u64,
        /// The other side: domain and port.
        peer: u32,
        peer_port: u32,
        port: u32,
        kind: SocketKind,
        carrier: Carrier,
        small: u32,
        large: u32,
        /// 1 if this side called `connect`, 0 if it accepted.
        opener: u8,
        ticket: [u8; TICKET],
    }
    /// program -> what does the broker know of my domain? `offset` pages through the answer.
    Status = 18 "status" { offset: u32 }
    /// broker -> a piece of a JSON text of `total` bytes.
    Report = 19 "report" { offset: u32, total: u32, text: &'a str }
    /// broker -> switch: there is a guest of this name and number. With the listening socket for its monitor and the
    /// directory of its domain's door. Answered by `done`. Again: the descriptors replace those of before.
    Guest = 32 "guest" {
        cid: u32,
        name: &'a str,
    }
    /// broker -> switch: the domain was removed; its device ends. Answered by `done`.
    GuestGone = 33 "guest-gone" { cid: u32 }
    /// agent -> switch, over the guest's socket device: a seat, memory of the guest for the two lanes of one
    /// connection. Its pages come in as many `pages` as it takes to name `runs`; then it is answered by `done`.
    Seat = 35 "seat" {
        /// Chosen by the agent; not used in this guest.
        seat: u32,
        small: u32,
        large: u32,
        runs: u32,
    }
    /// agent -> switch: pages of the seat that was named last, in the order of its layout: (guest-physical address u64,
    /// bytes u32) for each run of them.
    Pages = 36 "pages" { runs: &'a [u8] }
    /// agent -> switch: nobody uses the seat any more. Answered by `done` once the switch touches none of its pages.
    SeatGone = 37 "seat-gone" { seat: u32 }
    /// switch -> agent: the connection in this seat is over, and the switch touches none of its pages.
    SeatFree = 39 "seat-free" { seat: u32 }
    /// broker -> switch, through the door of a guest: how the switch is to serve this connection. Before `incoming` and
    /// `connected`, and again when the rules change. Not answered.
    Terms = 41 "terms" {
        connection: u64,
        /// 0 to 7; 7 is served first.
        class: u8,
        weight: u16,
        /// Bytes a second, each way; 0: no limit.
        rate: u64,
    }
    /// agent -> program: beside a descriptor of the socket device's registers. A store of `value` (u16) at `offset`
    /// tells the switch to look at the lanes of the guest, without a system call. For programs of root alone.
    Doorbell = 40 "doorbell" { offset: u32, value: u16 }
    /// agent -> switch, on a program's control connection: the seat of the `connect` or `accept` that follows.
    /// Not answered.
    UseSeat = 38 "use-seat" { seat: u32 }
    /// switch -> broker: what became of a guest's device. Not answered.
    GuestState = 34 "guest-state" {
        cid: u32,
        state: GuestState,
        text: &'a str,
    }
    /// switch -> broker: what it spent on behalf of a domain since it began to serve it. Once a second while that
    /// grows. Not answered.
    GuestCpu = 42 "guest-cpu" {
        cid: u32,
        cpu_us: u64,
    }
    /// program -> bring a kernel socket, connected to a port of another program that takes such sockets. Answered by
    /// `connected-socket`.
    ConnectSocket = 43 "connect-socket" {
        /// Name or decimal number of the domain, or an IP address that is one of its.
        to: &'a str,
        to_port: u32,
        kind: SocketKind,
        /// What the listener is told of where this comes from: an IP address of this domain, or nothing; and a port.
        source: &'a str,
        source_port: u32,
        /// 1: ahead of its use. Whoever uses it writes two bytes there first, the port that it comes from, and says
        /// `take-socket`.
        ahead: u8,
    }
    /// broker -> somebody connects to one of your ports with a kernel socket. With your end of it. Answer with `accept`
    /// (whose ring sizes are 0) or `refuse`.
    IncomingSocket = 44 "incoming-socket" {
        connection: u64,
        from: u32,
        from_name: &'a str,
        from_port: u32,
        /// An IP address that the broker knows as the opener's, or nothing; and the port that it gave.
        source: &'a str,
        source_port: u32,
        port: u32,
        partner: u32,
        /// The IP address that the opener named, if it named one.
        destination: &'a str,
        kind: SocketKind,
        /// 1: ahead of its use. Nobody is there before the first two bytes come, the port that they come from (little
        /// endian), in the place of `source_port`.
        ahead: u8,
        why: &'a str,
        ticket: [u8; TICKET],
    }
    /// broker -> the socket is connected. With your end of it.
    ConnectedSocket = 45 "connected-socket" {
        connection: u64,
        to: u32,
        to_name: &'a str,
        to_port: u32,
        from_port: u32,
        why: &'a str,
        ticket: [u8; TICKET],
    }
    /// program -> as `resume`, for a kernel socket. With the socket.
    ResumeSocket = 46 "resume-socket" {
        connection: u64,
        peer: u32,
        peer_port: u32,
        port: u32,
        kind: SocketKind,
        opener: u8,
        ticket: [u8; TICKET],
    }
    /// program -> the IP addresses of its network, with spaces between them, in the place of those it named before.
    /// Believed for 30 seconds, as far as the operator gave them to the domain. Answered by `done`.
    Addresses = 47 "addresses" { list: &'a str }
    /// program -> connections of this domain took the ordinary network. For `isthmus status`. Not answered.
    Fallback = 48 "fallback" {
        /// Where to, as the program named it.
        to: &'a str,
        to_port: u32,
        /// How many did, since the last message.
        count: u32,
        /// 1 if they were refused instead.
        refused: u8,
        why: &'a str,
    }
    /// program -> a connection that was made ahead is used now. Not answered.
    TakeSocket = 49 "take-socket" { connection: u64 }
    /// program -> which domain has the virtual network card of this address? With `nic` 0: of this name; with neither:
    /// my own. Answered by `nic`.
    FindNic = 50 "find-nic" { nic: u64, name: &'a str }
    /// broker -> this one. An address is 48 bits, its first byte on the wire the highest.
    Nic = 51 "nic" { nic: u64, domain: u32, name: &'a str }
    /// program -> lend memory of mine to the other side of this `sealed` connection, which may read it. With a
    /// read-only descriptor of it. Answered by `done` once the other side was told.
    LendWindow = 52 "lend-window" {
        connection: u64,
        /// 1 if this side called `connect`, 0 if it accepted.
        opener: u8,
        /// Chosen by the lender, not 0, never used again for this connection.
        window: u32,
        /// Bytes, all of them there: nothing of it is a hole.
        size: u64,
        /// 1: the other side has it, and only a broker that was started again does not know.
        again: u8,
    }
    /// broker -> the other side of this connection lends you memory. With the descriptor.
    Window = 53 "window" {
        connection: u64,
        /// 1 if you called `connect`, 0 if you accepted.
        opener: u8,
        window: u32,
        size: u64,
    }
    /// program -> nobody needs what was lent any more. Not answered.
    TakeBackWindow = 54 "take-back-window" { connection: u64, opener: u8, window: u32 }
    /// broker -> what was lent to you was taken back.
    WindowGone = 55 "window-gone" { connection: u64, opener: u8, window: u32 }
}

/// Decode one packet: the request number and the message.
///
/// Request numbers are chosen by the asker and repeated in the answer; 0 in messages that answer
/// nothing.
///
/// # Errors
/// Says which field is wrong and where. Nothing of the packet may be used.
pub fn decode(bytes: &[u8]) -> Result<(u32, Message<'_>), DecodeError> {
    let mut reader = Reader::new("control", bytes);
    let version = reader.u8("version")?;
    if version != VERSION {
        let problem = Problem::NotExpected { value: version.into(), expected: VERSION.into() };
        return Err(reader.error("version", 1, problem));
    }
    let code = reader.u8("kind")?;
    let reserved = reader.u16("reserved")?;
    if reserved != 0 {
        let problem = Problem::NotExpected { value: reserved.into(), expected: 0 };
        return Err(reader.error("reserved", 2, problem));
    }
    let request = reader.u32("request")?;
    let len = reader.u32("len")? as usize;
    if len > MESSAGE_MAX - HEADER {
        let problem = Problem::TooBig { value: len as u64, limit: (MESSAGE_MAX - HEADER) as u64 };
        return Err(reader.error("len", 4, problem));
    }
    let body = reader.take("body", len)?;
    reader.end()?;
    let mut reader = Reader::new("control", body);
    let Some(message) = Message::read(code, &mut reader)? else {
        return Err(DecodeError {
            format: "control",
            field: "kind",
            at: 1,
            problem: Problem::Unknown(code.into()),
        });
    };
    reader.end()?;
    Ok((request, message))
}

/// Encode one packet into `out` and return its length, bytes.
///
/// # Errors
/// A text that is too long, or a message that does not fit `out`; what `out` holds then means
/// nothing.
pub fn encode(request: u32, message: &Message<'_>, out: &mut [u8]) -> Result<usize, EncodeError> {
    let Some((header, body)) = out.split_at_mut_checked(HEADER) else {
        return Err(EncodeError { field: "header", reason: "the message does not fit its buffer" });
    };
    let mut writer = Writer::new(body);
    message.write(&mut writer)?;
    let len = writer.len();
    if HEADER + len > MESSAGE_MAX {
        return Err(EncodeError { field: "body", reason: "the message is too long" });
    }
    let mut front = Writer::new(header);
    front.bytes("version", &[VERSION, message.code(), 0, 0])?;
    front.bytes("request", &request.to_le_bytes())?;
    front.bytes("len", &(len as u32).to_le_bytes())?;
    Ok(HEADER + len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{string::ToString, vec, vec::Vec};

    /// One message of every kind, with distinct values in every field.
    fn samples() -> Vec<Message<'static>> {
        MESSAGES
            .iter()
            .map(|(name, _, _)| {
                let mut n = 0u64;
                Message::build(name, |field| {
                    n += 1;
                    Some(match field {
                        "program" | "domain_name" | "node" | "to" | "from_name" | "to_name" | "why"
                        | "text" | "name" | "source" | "destination" | "list"
                            if !matches!((*name, field), ("connected" | "connected-socket", "to")) =>
                        {
                            Value::Text("déjà-vu")
                        }
                        "kind" => Value::Text("seqpacket"),
                        "carrier" => Value::Text("put"),
                        "refusal" => Value::Text("backlog-full"),
                        "state" => Value::Text("running"),
                        "ticket" => Value::Bytes(&[7; TICKET]),
                        "runs" if *name == "pages" => Value::Bytes(&[7; 12]),
                        _ => Value::Number(n),
                    })
                })
                .expect(name)
            })
            .collect()
    }

    #[test]
    fn every_message_comes_back_and_every_strict_prefix_is_refused() {
        for message in samples() {
            let mut out = [0; MESSAGE_MAX];
            let len = encode(7, &message, &mut out).expect("fits");
            assert_eq!(decode(&out[..len]), Ok((7, message)));
            for short in 0..len {
                assert!(decode(&out[..short]).is_err(), "{} cut at {short}", message.name());
            }
            assert!(decode(&out[..=len]).is_err(), "{} with a byte too many", message.name());
        }
    }

    #[test]
    fn refusals_say_where() {
        let mut out = [0; MESSAGE_MAX];
        let bind = Message::Bind { port: 1, kind: SocketKind::Stream, partner: ANYBODY, backlog: 4 };
        let len = encode(1, &bind, &mut out).expect("fits");
        out[HEADER + 4] = 9;
        let error = decode(&out[..len]).expect_err("kind 9");
        assert_eq!(error.to_string(), "control.bind.kind at byte 4: 9 is not known");
        out[0] = 2;
        let error = decode(&out[..len]).expect_err("version 2");
        assert_eq!(error.to_string(), "control.version at byte 0: 2 where 1 must be");
    }

    #[test]
    fn the_golden_bytes_are_these() {
        let golden = include_str!("../../../vectors/control.txt");
        let lines: Vec<&str> = golden.lines().filter(|l| !l.starts_with('#') && !l.is_empty()).collect();
        let samples = samples();
        assert_eq!(lines.len(), samples.len(), "one line for each message");
        for (line, message) in lines.iter().zip(samples) {
            let (name, hex) = line.split_once(' ').expect("name and bytes");
            let bytes: Vec<u8> = (0..hex.len() / 2)
                .map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).expect("hex"))
                .collect();
            assert_eq!(name, message.name());
            let mut out = vec![0; MESSAGE_MAX];
            let len = encode(0x0102_0304, &message, &mut out).expect("fits");
            assert_eq!(&out[..len], &bytes[..], "{name}");
            assert_eq!(decode(&bytes), Ok((0x0102_0304, message)));
        }
    }

    #[test]
    fn a_text_that_is_too_long_is_refused_by_name() {
        let long = "x".repeat(TEXT_MAX + 1);
        let mut out = [0; MESSAGE_MAX];
        let error = encode(1, &Message::Resolve { name: &long }, &mut out).expect_err("too long");
        assert_eq!(error.to_string(), "name: the text is too long");
    }

    proptest! {
        #[test]
        fn garbage_is_refused_or_encodes_to_itself(mut bytes: Vec<u8>, code in 0u8..64) {
            if bytes.len() >= HEADER {
                bytes[0] = VERSION;
                bytes[1] = code;
                bytes[2..4].fill(0);
                let len = (bytes.len() - HEADER) as u32;
                bytes[8..12].copy_from_slice(&len.to_le_bytes());
            }
            if let Ok((request, message)) = decode(&bytes) {
                let mut out = vec![0; MESSAGE_MAX];
                let len = encode(request, &message, &mut out).expect("fits");
                prop_assert_eq!(&out[..len], &bytes[..]);
            }
        }
    }
}
