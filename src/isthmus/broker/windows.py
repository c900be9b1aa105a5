"""Windows: memory of one program that the other side of a `sealed` connection may read where it lies.

The broker passes a window's descriptor on, keeps none, and counts its bytes as the lender's: once, however
many connections it is lent for. What was lent ends with the side that lent it.

Format: docs/formats/control.md.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from isthmus._native import WINDOWS_MAX, check_window

from .answers import Refuse
from .attachment import Attachment
from .connection import Side
from .descriptors import Descriptors

if TYPE_CHECKING:
    from .core import Broker

#: Lending is worth so many messages more: a descriptor is looked at and passed on.
LEND_COSTS = 3


class Windows:
    """What programs lend to each other."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker

    def handle_lend(
        self, attachment: Attachment, request: int, fields: dict[str, Any], descriptors: Descriptors
    ) -> None:
        side = self._side(attachment, fields)
        if side is None:
            raise Refuse("not-yours", "lend-window: this program has no such connection")
        connection, domain, window, size = side.connection, side.domain, fields["window"], fields["size"]
        if connection.carrier != "sealed":
            raise Refuse("path-unavailable", f"lend-window: the connection is {connection.carrier}")
        if window == 0 or window in side.windows:
            raise Refuse("bad-request", f"lend-window: {window} is not a new number")
        if len(side.windows) >= WINDOWS_MAX:
            raise Refuse("limit-reached", f"windows: one side of a connection may lend {WINDOWS_MAX}")
        domain.tokens -= LEND_COSTS
        self.tell(side)
        other = side.other.attachment
        if not fields["again"]:
            if other is None:
                raise Refuse("peer-gone", "lend-window: the other side is not there")
            if not other.takes_windows:
                raise Refuse("path-unavailable", "lend-window: the other side's program takes no windows")
            if other.crowded:
                raise Refuse("backlog-full", "lend-window: the other side's program does not read")
        if len(descriptors) != 1 or not descriptors.all_memfds():
            raise Refuse("bad-request", "lend-window: it needs 1 descriptor, a memfd")
        fd = descriptors.fds[0]
        try:
            check_window(fd, size)
        except ValueError as error:
            raise Refuse("bad-request", f"lend-window: {error}") from None
        found = os.fstat(fd)
        file = (found.st_dev, found.st_ino)
        more = 0 if file in domain.windows else size
        if domain.memory + more > domain.limits.memory:
            raise Refuse("limit-reached", f"memory: domain {domain.name} may hold {domain.limits.memory}")
        if other is not None and not fields["again"]:
            other.send(
                "window",
                0,
                (fd,),
                connection=connection.number,
                opener=int(side.other is connection.opener),
                window=window,
                size=size,
            )
        side.lend(window, file, size)
        attachment.send("done", request)

    def handle_take_back(
        self, attachment: Attachment, _: int, fields: dict[str, Any], __: Descriptors
    ) -> None:
        side = self._side(attachment, fields)
        if side is None:
            return
        side.take_back(fields["window"])
        # Also of one that is not known here: it may have been lent before this broker was started.
        if len(side.gone) < WINDOWS_MAX:
            side.gone.append(fields["window"])
        self.tell(side)

    def tell(self, side: Side) -> None:
        """Tell the other side what was taken back, if it is there and reads."""
        other, connection = side.other.attachment, side.connection
        if other is None or other.crowded:
            return
        gone, side.gone = side.gone, []
        for window in gone if other.takes_windows else []:
            opener = int(side.other is connection.opener)
            other.send("window-gone", 0, connection=connection.number, opener=opener, window=window)

    def _side(self, attachment: Attachment, fields: dict[str, Any]) -> Side | None:
        """The side of an open connection that this program holds and means."""
        connection = self._broker.introductions.connections.get(fields["connection"])
        if connection is None or connection.pending is not None:
            return None
        side = connection.opener if fields["opener"] else connection.accepter
        return side if side.attachment is attachment and side.held else None
