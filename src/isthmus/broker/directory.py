"""Domains, their ports and what they hold.

A port belongs to one program (attachment) of a domain at a time; listeners are keyed (port, partner), and
one for a particular partner shadows one for anybody, as V4V's rings do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from isthmus._native import ANY_PORT, ANYBODY

from .descriptors import Undertaker
from .policy import Kind, Limits, Network

if TYPE_CHECKING:
    from .attachment import Attachment
    from .connection import Connection, Side

#: Ports that the broker hands out start here; below, programs choose.
CHOSEN_PORTS = 0x8000_0000
PORT_LAST = 0xFFFF_FFFE


class Binding:
    """A listener: somebody waits for connections at (port, partner)."""

    __slots__ = ("attachment", "backlog", "domain", "kind", "partner", "port", "waiting")

    def __init__(
        self, domain: Domain, attachment: Attachment, port: int, partner: int, kind: str, backlog: int
    ) -> None:
        self.domain = domain
        self.attachment = attachment
        self.port = port
        self.partner = partner
        self.kind = kind
        self.backlog = backlog
        #: Connections whose `incoming` this listener has not answered.
        self.waiting: set[Connection] = set()


class Lease:
    """A port that one attachment owns, with its listeners by partner."""

    __slots__ = ("attachment", "bindings", "port")

    def __init__(self, attachment: Attachment, port: int) -> None:
        self.attachment = attachment
        self.port = port
        self.bindings: dict[int, Binding] = {}


class Traffic:
    """What a domain's programs say they sent and received on one path; a lie is on the liar's own account."""

    __slots__ = ("connections", "received_bytes", "received_messages", "sent_bytes", "sent_messages")

    def __init__(self) -> None:
        self.connections = 0
        self.sent_bytes = 0
        self.sent_messages = 0
        self.received_bytes = 0
        self.received_messages = 0

    def add(self, counters: tuple[int, int, int, int]) -> None:
        self.sent_bytes += counters[0]
        self.sent_messages += counters[1]
        self.received_bytes += counters[2]
        self.received_messages += counters[3]

    def copy(self) -> Traffic:
        made = Traffic()
        for name in self.__slots__:
            setattr(made, name, getattr(self, name))
        return made

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


class Fallback:
    """Connections that took the ordinary network for the same reason."""

    __slots__ = ("count", "last")

    def __init__(self) -> None:
        self.count = 0
        #: When that was last so, seconds since 1970.
        self.last = 0.0


class Domain:
    """A tenant, known by the door its programs come through."""

    __slots__ = (
        "_next_port",
        "addresses",
        "attachments",
        "bound",
        "chosen",
        "connections",
        "control_messages",
        "fallbacks",
        "group",
        "kind",
        "lanes",
        "leases",
        "limits",
        "memory",
        "name",
        "number",
        "origin",
        "peers",
        "pending",
        "pending_by_peer",
        "refilled_at",
        "refusals",
        "sockets",
        "throttled",
        "tokens",
        "traffic",
        "uid",
        "undertaker",
        "windows",
    )

    def __init__(
        self,
        name: str,
        number: int,
        group: str,
        uid: int | None,
        limits: Limits,
        origin: str,
        kind: Kind = "container",
    ) -> None:
        self.name = name
        self.kind = kind
        self.number = number
        self.group = group
        self.uid = uid
        self.limits = limits
        #: "policy" (the file declares it) or "operator" (added at run time).
        self.origin = origin
        self.attachments: set[Attachment] = set()
        self.leases: dict[int, Lease] = {}
        self.bound = 0
        #: Source ports chosen for connections that have no leased one.
        self.chosen: set[int] = set()
        self._next_port = CHOSEN_PORTS
        self.connections = 0
        self.lanes = 0
        self.memory = 0
        #: Of that memory, windows, by their files: bytes, and for how many connections each is lent.
        self.windows: dict[tuple[int, int], tuple[int, int]] = {}
        self.pending = 0
        #: Of those, with each other domain, by its number.
        self.pending_by_peer: Counter[int] = Counter()
        #: Connections with each other domain, by its number.
        self.peers: dict[int, int] = {}
        self.undertaker = Undertaker()
        self.tokens = float(limits.control_messages_burst)
        self.refilled_at = 0.0
        self.control_messages = 0
        self.throttled = 0
        self.refusals: dict[str, int] = {}
        #: Networks the operator gave to this domain; its programs may claim addresses in them.
        self.addresses: tuple[Network, ...] = ()
        #: Sides whose ends are kernel sockets; they outlive the attachment that asked for them.
        self.sockets: set[Side] = set()
        #: What took the ordinary network, and why; the newest last.
        self.fallbacks: dict[tuple[str, int, bool, str], Fallback] = {}
        self.traffic: dict[str, Traffic] = {}

    def __repr__(self) -> str:
        return f"<domain {self.name} ({self.number})>"

    def refill(self, now: float) -> float:
        """Top up the bucket of control messages and return what is in it."""
        limits = self.limits
        tokens = self.tokens + (now - self.refilled_at) * limits.control_messages_per_second
        self.refilled_at = now
        self.tokens = tokens = min(tokens, float(limits.control_messages_burst))
        return tokens

    def start_ports_at(self, offset: int) -> None:
        """Begin choosing elsewhere, so that a restarted broker rarely meets ports of before."""
        self._next_port = CHOSEN_PORTS + offset % (PORT_LAST - CHOSEN_PORTS)

    def choose_port(self) -> int:
        """A port that nothing in this domain uses. There always is one: limits are far below 2^31."""
        port = self._next_port
        while port in self.chosen or port in self.leases:
            port = port + 1 if port < PORT_LAST else CHOSEN_PORTS
        self._next_port = port + 1 if port < PORT_LAST else CHOSEN_PORTS
        return port

    def listener(self, port: int, partner: int) -> Binding | None:
        lease = self.leases.get(port) or self.leases.get(ANY_PORT)
        if lease is None:
            return None
        return lease.bindings.get(partner) or lease.bindings.get(ANYBODY)

    def listeners(self) -> Iterator[Binding]:
        for lease in self.leases.values():
            yield from lease.bindings.values()

    def account(self, path: str) -> Traffic:
        traffic = self.traffic.get(path)
        if traffic is None:
            traffic = self.traffic[path] = Traffic()
        return traffic

    def lend(self, file: tuple[int, int], size: int) -> None:
        """A window is lent for one more connection."""
        size, count = self.windows.get(file, (size, 0))
        self.windows[file] = (size, count + 1)
        if not count:
            self.memory += size

    def take_back(self, file: tuple[int, int]) -> None:
        """A window is lent for one connection less."""
        size, count = self.windows[file]
        if count > 1:
            self.windows[file] = (size, count - 1)
            return
        del self.windows[file]
        self.memory -= size

    def wait_for(self, peer: Domain, more: int) -> None:
        """`more` connections with `peer` (or fewer, if negative) wait for an answer."""
        self.pending += more
        self.pending_by_peer[peer.number] += more
        if not self.pending_by_peer[peer.number]:
            del self.pending_by_peer[peer.number]

    def over(self, peer: Domain, memory: int, lanes: int = 2) -> str | None:
        """Which limit one more connection would pass, in words, or None."""
        limits = self.limits
        for name, used, more, most in (
            ("connections", self.connections, 1, limits.connections),
            ("connections_per_peer", self.peers.get(peer.number, 0), 1, limits.connections_per_peer),
            ("lanes", self.lanes, lanes, limits.lanes),
            ("memory", self.memory, memory, limits.memory),
            ("pending", self.pending, 1, limits.pending),
            ("pending_per_peer", self.pending_by_peer[peer.number], 1, limits.pending_per_peer),
        ):
            if used + more > most:
                return f"{name}: domain {self.name} may hold {most}"
        return None
