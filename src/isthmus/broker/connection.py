"""What the broker knows of a connection: two sides, each of which ends on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .directory import Binding, Domain
from .policy import Decision

if TYPE_CHECKING:
    from isthmus._native import Counters

    from .attachment import Attachment


#: The path of a connection whose ends are kernel sockets that the broker brought.
SOCKET = "socket"


class Side:
    """One end of a connection."""

    __slots__ = (
        "attachment",
        "chosen",
        "connection",
        "counters",
        "domain",
        "gone",
        "held",
        "memory",
        "peer",
        "port",
        "windows",
    )

    def __init__(self, connection: Connection, domain: Domain, peer: Domain, port: int) -> None:
        self.connection = connection
        self.domain = domain
        self.peer = peer
        self.port = port
        self.attachment: Attachment | None = None
        self.counters: Counters | None = None
        self.memory = 0
        #: Whether it counts against its domain's limits.
        self.held = False
        #: Whether `port` was chosen by the broker for this connection.
        self.chosen = False
        #: Memory that this side has lent to the other: which file each number is.
        self.windows: dict[int, tuple[int, int]] = {}
        #: Numbers that it took back and the other side has not been told of.
        self.gone: list[int] = []

    @property
    def other(self) -> Side:
        connection = self.connection
        return connection.accepter if self is connection.opener else connection.opener

    @property
    def _lanes(self) -> int:
        return 0 if self.connection.carrier == SOCKET else 2

    def hold(self, memory: int) -> None:
        domain = self.domain
        self.held = True
        self.memory = memory
        domain.connections += 1
        domain.lanes += self._lanes
        domain.memory += memory
        domain.peers[self.peer.number] = domain.peers.get(self.peer.number, 0) + 1

    def bring(self, memory: int) -> None:
        self.domain.memory += memory - self.memory
        self.memory = memory

    def lend(self, window: int, file: tuple[int, int], size: int) -> None:
        self.windows[window] = file
        self.domain.lend(file, size)

    def take_back(self, window: int) -> None:
        file = self.windows.pop(window, None)
        if file is not None:
            self.domain.take_back(file)

    def release(self) -> None:
        """End this side: the account, the limits, the port. Again does nothing."""
        if not self.held:
            return
        self.held = False
        domain = self.domain
        domain.connections -= 1
        domain.lanes -= self._lanes
        domain.memory -= self.memory
        for window in list(self.windows):
            self.take_back(window)
        left = domain.peers.get(self.peer.number, 1) - 1
        if left:
            domain.peers[self.peer.number] = left
        else:
            domain.peers.pop(self.peer.number, None)
        if self.chosen:
            domain.chosen.discard(self.port)
        domain.sockets.discard(self)
        if self.counters is not None:
            domain.account(self.connection.carrier).add(self.counters.read())
            self.counters = None
        if self.attachment is not None:
            self.attachment.sides.discard(self)
            self.attachment = None

    def belong_to(self, attachment: Attachment) -> None:
        self.attachment = attachment
        attachment.sides.add(self)


class Pending:
    """What is known of a connection only until its listener has answered."""

    __slots__ = ("bell", "binding", "deadline", "large", "request", "secret", "small")

    def __init__(
        self, request: int, binding: Binding, bell: int, secret: int, small: int, large: int, deadline: float
    ) -> None:
        self.request = request
        self.binding = binding
        #: The opener's end.
        self.bell = bell
        self.secret = secret
        self.small = small
        self.large = large
        self.deadline = deadline


class Connection:
    """A connection as far as the broker knows it."""

    __slots__ = (
        "accepter",
        "ahead",
        "carrier",
        "kind",
        "number",
        "opener",
        "pending",
        "rule",
        "since",
        "why",
    )

    def __init__(
        self,
        number: int,
        kind: str,
        carrier: str,
        rule: int,
        why: str,
        since: float,
        opener: tuple[Domain, int],
        accepter: tuple[Domain, int],
    ) -> None:
        self.number = number
        self.kind = kind
        self.carrier = carrier
        self.rule = rule
        self.why = why
        self.since = since
        self.opener = Side(self, opener[0], accepter[0], opener[1])
        self.accepter = Side(self, accepter[0], opener[0], accepter[1])
        self.pending: Pending | None = None
        #: Made before anybody asked for it, and not used yet.
        self.ahead = False

    def side_of(self, attachment: Attachment) -> Side | None:
        """The open side that this program holds; a program connected to itself closes the opener's first."""
        if self.opener.attachment is attachment:
            return self.opener
        if self.accepter.attachment is attachment:
            return self.accepter
        return None


def path_of(decision: Decision, opener: Domain, accepter: Domain) -> str:
    """What carries a connection that was accepted."""
    if "vm" in (opener.kind, accepter.kind):
        return "switch"
    return "put" if decision.strict else "sealed"


def path_text(decision: Decision, path: str, opener: Domain, accepter: Domain) -> str:
    """Why a connection takes the path it takes, in the words that both ends get."""
    if path == SOCKET and "vm" in (opener.kind, accepter.kind):
        return f"a guest is involved, so the switch copies; {decision.why}; both programs use kernel sockets"
    if path == SOCKET:
        return f"same kernel; {decision.why}; both programs use kernel sockets"
    if path == "switch":
        return f"a guest is involved, so the switch copies; {decision.why}"
    if decision.strict:
        return f"same kernel; {decision.why}; strict, so the kernel copies"
    return f"same kernel; {decision.why}; not strict"
