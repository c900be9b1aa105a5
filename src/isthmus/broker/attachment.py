"""One program's socket: packets in, packets out, bounded both ways.

What comes in is a stranger's: each packet is bounded, counted against its domain's bucket, decoded whole or
not at all, and its descriptors are closed whatever happens. What goes out waits in a bounded queue; a
program that does not read loses its own attachment and nothing else.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket
import struct
from array import array
from collections import deque
from typing import TYPE_CHECKING, Any

from isthmus._native import (
    CONTROL_DESCRIPTORS_MAX,
    CONTROL_MESSAGE_MAX,
    CONTROL_VERSION,
    control_decode,
    control_encode,
)

from .descriptors import Descriptors

if TYPE_CHECKING:
    from .connection import Side
    from .core import Broker
    from .directory import Domain, Lease

#: Packets read from one attachment before the others get their turn.
PACKETS_A_TURN = 32
#: What may wait for a program that does not read.
QUEUE_MAX_MESSAGES = 1024
QUEUE_MAX_BYTES = 4 << 20
#: From here on nobody else may add to it, so that a stranger cannot fill a listener's queue.
QUEUE_FOR_OTHERS = 256

_INT = array("i").itemsize
#: Room for exactly as many descriptors as a message may have; the kernel drops and reports the rest.
_ANCILLARY = socket.CMSG_LEN(CONTROL_DESCRIPTORS_MAX * _INT)
# Plain numbers: operations on enumerations cost as much as the system calls.
_RECEIVE_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
_SEND_FLAGS = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_TRUNCATED = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)


class OutOfDescriptors(Exception):
    """The kernel takes no more descriptors in flight from this broker."""


class Attachment:
    """An accepted connection of a door."""

    __slots__ = (
        "_blocked_since",
        "_broker",
        "_loop",
        "_queue",
        "_queue_bytes",
        "_sock",
        "_writing",
        "brings_sockets",
        "closed",
        "domain",
        "fd",
        "gid",
        "greeted",
        "leases",
        "number",
        "opened_at",
        "paused",
        "pid",
        "program",
        "report",
        "sides",
        "takes_windows",
        "uid",
    )

    def __init__(self, broker: Broker, domain: Domain, sock: socket.socket, number: int, now: float) -> None:
        self._broker = broker
        self._loop: asyncio.AbstractEventLoop = broker.loop
        self._sock = sock
        self._queue: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._queue_bytes = 0
        self._writing = False
        self._blocked_since = 0.0
        self.fd = sock.fileno()
        self.domain = domain
        self.number = number
        self.opened_at = now
        self.greeted = False
        self.paused = False
        self.closed = False
        self.program = ""
        #: Its connections, and those to its ports, are kernel sockets.
        self.brings_sockets = False
        #: It knows what a window is.
        self.takes_windows = False
        #: What the last `status` described; paged through by offset.
        self.report = ""
        self.sides: set[Side] = set()
        self.leases: dict[int, Lease] = {}
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
        self.pid, self.uid, self.gid = struct.unpack("iII", credentials)
        self._loop.add_reader(self.fd, self.handle_readable)

    # Receiving.

    def handle_readable(self) -> None:
        domain = self.domain
        broker = self._broker
        domain.refill(self._loop.time())
        receive = self._sock.recvmsg
        for _ in range(PACKETS_A_TURN):
            if domain.tokens < 1:
                self.pause()
                return
            try:
                data, ancillary, flags, _ = receive(CONTROL_MESSAGE_MAX, _ANCILLARY, _RECEIVE_FLAGS)
            except BlockingIOError:
                return
            except InterruptedError:
                continue
            except OSError as error:
                self.close("gone" if error.errno == errno.ECONNRESET else f"gone: {error.strerror}")
                return
            domain.tokens -= 1
            descriptors = Descriptors(_descriptors(ancillary) if ancillary else [], domain.undertaker)
            try:
                if not data:
                    self.close("gone")
                    return
                if flags & _TRUNCATED and self._truncated(data, flags, descriptors):
                    return
                self._handle_packet(broker, data, descriptors)
            finally:
                descriptors.close()
            if self.closed:
                return

    def _handle_packet(self, broker: Broker, data: bytes, descriptors: Descriptors) -> None:
        try:
            kind, request, fields = control_decode(data)
        except ValueError as error:
            if data[0] != CONTROL_VERSION:
                text = f"this broker speaks version {CONTROL_VERSION} of the control protocol, not {data[0]}"
                self.send("refused", 0, refusal="version", rule=0, text=text)
            self.close(f"fault: {error}")
            return
        broker.handle_message(self, kind, request, fields, descriptors)

    def _truncated(self, data: bytes, flags: int, descriptors: Descriptors) -> bool:
        if flags & socket.MSG_TRUNC:
            self.close(f"fault: a packet of more than {CONTROL_MESSAGE_MAX} bytes")
            return True
        if len(descriptors) >= CONTROL_DESCRIPTORS_MAX:
            self.close(f"fault: more than {CONTROL_DESCRIPTORS_MAX} descriptors beside one message")
            return True
        # Not the program's fault: this process is out of descriptors.
        self._broker.log.error("descriptors", text="out of descriptors; raise the limit of open files")
        try:
            request = control_decode(data)[1]
        except ValueError as error:
            self.close(f"fault: {error}")
            return True
        self.send(
            "refused", request, refusal="limit-reached", rule=0, text="the broker is out of descriptors"
        )
        descriptors.close()
        return True

    def pause(self) -> None:
        """Read no further for now: the bucket is empty. The kernel makes the program wait."""
        if not self.paused:
            self.paused = True
            self._loop.remove_reader(self.fd)
            self._broker.handle_paused(self)

    def resume(self) -> None:
        if self.paused and not self.closed:
            self.paused = False
            self._loop.add_reader(self.fd, self.handle_readable)

    def is_gone(self) -> bool:
        """Whether the program has hung up, even if that news has not been read yet."""
        poll = select.poll()
        poll.register(self.fd, 0)
        return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))

    # Sending.

    @property
    def crowded(self) -> bool:
        """Too much waits already for anybody else to add to it."""
        return len(self._queue) >= QUEUE_FOR_OTHERS

    def send(self, kind: str, request: int, fds: tuple[int, ...] = (), /, **fields: Any) -> None:
        """Send or queue a message. `fds` remain the caller's.

        Raises
        ------
        OutOfDescriptors
            The descriptors cannot be sent now; nothing was.
        """
        if self.closed:
            return
        packet = control_encode(kind, request, **fields)
        if not self._queue:
            try:
                self._write(packet, fds)
                return
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    raise OutOfDescriptors from None
                # The reader sees the end of it too, and in its own time.
                return
        if len(self._queue) >= QUEUE_MAX_MESSAGES or self._queue_bytes + len(packet) > QUEUE_MAX_BYTES:
            self.drop("slow: it does not read what it is sent")
            return
        copies: list[int] = []
        try:
            for fd in fds:
                copies.append(os.dup(fd))
        except OSError:
            for fd in copies:
                os.close(fd)
            raise OutOfDescriptors from None
        self._queue.append((packet, tuple(copies)))
        self._queue_bytes += len(packet)
        if not self._writing:
            self._writing = True
            self._blocked_since = self._loop.time()
            self._loop.add_writer(self.fd, self._handle_writable)
            self._broker.handle_blocked(self)

    def _write(self, packet: bytes, fds: tuple[int, ...]) -> None:
        if fds:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
            self._sock.sendmsg([packet], rights, _SEND_FLAGS)
        else:
            self._sock.send(packet, _SEND_FLAGS)

    def _handle_writable(self) -> None:
        while self._queue:
            packet, fds = self._queue[0]
            try:
                self._write(packet, fds)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    # The socket is writable and yet it cannot be done: look again in a while, not at once.
                    self._loop.remove_writer(self.fd)
                    return
                self.close("gone")
                return
            self._queue.popleft()
            self._queue_bytes -= len(packet)
            self._blocked_since = self._loop.time()
            for fd in fds:
                os.close(fd)
        self._writing = False
        self._loop.remove_writer(self.fd)

    def blocked_since(self) -> float | None:
        """Since when nothing of the queue could be sent; None if there is no queue."""
        if not self._writing or self.closed:
            return None
        self._loop.add_writer(self.fd, self._handle_writable)
        return self._blocked_since

    # Ending.

    def drop(self, reason: str) -> None:
        """Close soon, from a place that cannot have the attachment change under it."""
        if not self.closed:
            self._silence()
            self._loop.call_soon(self._broker.handle_detached, self, reason)

    def close(self, reason: str) -> None:
        if not self.closed:
            self._silence()
            self._broker.handle_detached(self, reason)

    def _silence(self) -> None:
        self.closed = True
        if not self.paused:
            self._loop.remove_reader(self.fd)
        if self._writing:
            self._loop.remove_writer(self.fd)
        for _, fds in self._queue:
            for fd in fds:
                os.close(fd)
        self._queue.clear()
        self._sock.close()


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found = array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % _INT])
    return found.tolist()
