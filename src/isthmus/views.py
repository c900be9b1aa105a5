"""Bytes of a connection where they lie: views straight into the rings.

    with sock.recv_view() as view:
        total += numpy.frombuffer(view, dtype="f4").sum()

    with sock.send_view(4 * 1000) as view:
        numpy.frombuffer(view, dtype="f4")[:] = numpy.random.random(1000)

One copy less than `Socket.recv_into` and `Socket.sendall`, for those who can use the bytes, or make them,
where they are. Between guests that leaves one copy on the whole way. The rules:

- **The sender can still change what a received view shows**, even between your check and your use. Copy
  before you believe.
- The ring is not given back before `RecvView.release` (the end of the block): a view that is kept makes the
  sender wait.
- While a view for sending is open, nothing else can be sent over its socket. It begins with whatever lay
  there before, of this connection; write all of it.

A slice that outlives the block points to memory that stays mapped for as long as the slice lives. A received
one shows whatever the sender put there since, and in a guest, once the connection is closed, bytes of a later
one. Whoever writes to one for sending spoils what is sent, or what is sent later.
"""

from __future__ import annotations

import contextlib
import ctypes
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isthmus import _native

__all__ = ["RecvView", "SendView"]


class _Pinned(ctypes.Array[ctypes.c_ubyte]):
    """Bytes of ours, keeping what their memory belongs to."""

    _type_ = ctypes.c_ubyte
    # Where the array really ends is said by the slice that is handed out: one type serves all lengths.
    _length_ = 1 << 32
    keeper: object


def view_of(address: int, length: int, keeper: object) -> memoryview:
    """Memory that is there while `keeper` is, writable."""
    pinned = _Pinned.from_address(address)
    pinned.keeper = keeper
    return memoryview(pinned).cast("B")[:length]


def _let_go(view: memoryview | None) -> None:
    if view is not None:
        # Where something made from it lives on, it does so on the terms of the module's docstring.
        with contextlib.suppress(BufferError):
            view.release()


class RecvView:
    """The front of a connection's lane, in place. Made by `Socket.recv_view`.

    Parameters
    ----------
    connection : isthmus._native.Connection
    timeout : float or None, seconds
    """

    __slots__ = ("_connection", "_held", "_timeout", "_view")

    def __init__(self, connection: _native.Connection, timeout: float | None) -> None:
        self._connection = connection
        self._timeout = timeout
        self._view: memoryview | None = None
        self._held = False

    def __enter__(self) -> memoryview:
        """Wait for the next piece of the stream or the next message.

        Returns
        -------
        memoryview, shape (n,), bytes, read-only
            Empty at the end of the stream.

        Raises
        ------
        WouldBlock, TimedOut, PeerReset, ConnectionCut
            Nothing is held.
        """
        if self._held:
            raise RuntimeError("this view is in use; ask for another after its release")
        front = self._connection.front(self._timeout)
        if front is None:
            self._view = memoryview(b"")
            return self._view
        address, length = front
        self._held = True
        self._view = view_of(address, length, self._connection).toreadonly()
        return self._view

    def release(self) -> None:
        """Give the bytes back to the sender: they count as received. Harmless when repeated."""
        if self._held:
            self._held = False
            self._connection.release_front()
        view, self._view = self._view, None
        _let_go(view)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.release()


class SendView:
    """Room in a connection's lane, to be filled in place. Made by `Socket.send_view`.

    Parameters
    ----------
    connection : isthmus._native.Connection
    size : int, bytes
    timeout : float or None, seconds
    """

    __slots__ = ("_connection", "_own", "_size", "_timeout", "_view")

    def __init__(self, connection: _native.Connection, size: int, timeout: float | None) -> None:
        self._connection = connection
        self._size = size
        self._timeout = timeout
        self._view: memoryview | None = None
        #: Where the lane cannot be written in place: what is copied there in the end.
        self._own: bytearray | None = None

    def __enter__(self) -> memoryview:
        """Wait for room.

        Returns
        -------
        memoryview, shape (size,), bytes, writable

        Raises
        ------
        MessageTooLarge
            The ring never has so much room; `Socket.connection.message_max` is the most.
        WouldBlock, TimedOut, PeerClosed, PeerReset, ConnectionCut
            Nothing is reserved.
        WrongState
            Another view of this socket is open.
        """
        if self._view is not None:
            raise RuntimeError("this view is in use; ask for another after its end")
        address = self._connection.reserve(self._size, self._timeout)
        if address is None:
            self._own = bytearray(self._size)
            self._view = memoryview(self._own)
        else:
            self._view = view_of(address, self._size, self._connection)
        return self._view

    def send(self) -> None:
        """Send the bytes, all of them: a piece of the stream, or one message.

        Raises
        ------
        PeerClosed, PeerReset, ConnectionCut, Closed
            Nothing was sent.
        """
        if self._view is None:
            return
        self._end()
        own, self._own = self._own, None
        if own is None:
            self._connection.commit()
        else:
            self._connection.abandon()
            # There was room: this waits for the copy alone, and a part of it is of no use to anybody.
            self._connection.send(own, None)

    def abandon(self) -> None:
        """Send nothing of it. Harmless when repeated."""
        if self._view is not None:
            self._end()
            self._own = None
            self._connection.abandon()

    def _end(self) -> None:
        view, self._view = self._view, None
        _let_go(view)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if self._view is None:
            return
        if kind is None:
            self.send()
        else:
            self.abandon()
