"""Questions to the card: which stations there are, and what it counted for this domain.

Format: docs/formats/card.md.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from isthmus import errors
from isthmus._native import CARD_DOMAIN, CARD_PORT, CARD_RECORD_MAX
from isthmus.sockets import create_connection

if TYPE_CHECKING:
    from typing_extensions import Self

    from isthmus.node import Node

__all__ = ["Card", "Station"]

_FIND, _FOUND, _PEERS, _PEER_LIST, _COUNTERS, _COUNTER_LIST = 4, 6, 7, 8, 9, 10
#: An answer may be lost, and the question is asked again.
_AGAIN_S = 0.5
_TRIES = 4


@dataclass(frozen=True)
class Station:
    """A station that the card knows, its own domains among them.

    Attributes
    ----------
    index : int
        In the card's table.
    nic : int
        Address of its card, 48 bits.
    name : str
        Empty while it is not known.
    """

    index: int
    nic: int
    name: str


class Card:
    """A line to the node's card; a context manager that closes it.

    Parameters
    ----------
    node : Node, optional
        Whose door to use; by default that of `isthmus.attach`.

    Raises
    ------
    UnknownDomain, NobodyListens, RefusedByRule
        There is no card, or not for this domain.
    """

    def __init__(self, node: Node | None = None) -> None:
        self._sock = create_connection((CARD_DOMAIN, CARD_PORT), 5, type=socket.SOCK_SEQPACKET, node=node)
        self._sock.settimeout(_AGAIN_S)

    def stations(self) -> list[Station]:
        """All stations, by index."""
        found: list[Station] = []
        while True:
            first = found[-1].index + 1 if found else 0
            answer = self._ask(struct.pack("<BI", _PEERS, first), _PEER_LIST)
            at, before = 1, len(found)
            while at < len(answer):
                index, nic, length = struct.unpack_from("<IQB", answer, at)
                at += 13 + length
                found.append(Station(index, nic, answer[at - length : at].decode()))
            if len(found) == before:
                return found

    def find(self, name: str) -> int | None:
        """The address of the station of this name, if the card knows it."""
        text = name.encode()
        answer = self._ask(struct.pack("<BB", _FIND, len(text)) + text, _FOUND)
        status, nic = struct.unpack_from("<BQ", answer, 1)
        return nic if status == 0 else None

    def counters(self) -> dict[str, int]:
        """What was counted for this domain, by name."""
        answer, at, found = self._ask(bytes([_COUNTERS]), _COUNTER_LIST), 1, {}
        while at < len(answer):
            length = answer[at]
            name = answer[at + 1 : at + 1 + length].decode()
            (found[name],) = struct.unpack_from("<Q", answer, at + 1 + length)
            at += 9 + length
        return found

    def _ask(self, question: bytes, kind: int) -> bytes:
        for _ in range(_TRIES):
            self._sock.send(question)
            try:
                answer = bytes(self._sock.recv(CARD_RECORD_MAX))
            except errors.TimedOut:
                continue
            if not answer:
                raise errors.PeerClosed(0, "the card has ended")
            if answer[0] == kind:
                return answer
        raise errors.TimedOut(0, "the card does not answer")

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
