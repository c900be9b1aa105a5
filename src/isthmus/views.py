"""Received bytes where they lie: a view straight into the ring.

    with sock.recv_view() as view:
        total += numpy.frombuffer(view, dtype="f4").sum()

One copy less than `Socket.recv_into`, for those who can use the bytes where they are. Two rules:

- **The sender can still change what the view shows**, even between your check and your use. Copy before you
  believe.
- The ring is not given back before `RecvView.release` (the end of the block): a view that is kept makes the
  sender wait.

A slice that outlives the block points to memory that stays mapped for as long as the slice lives; it shows
whatever the sender put there since, and in a guest, once the connection is closed, bytes of a later one.
"""

from __future__ import annotations

import contextlib
import ctypes
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from isthmus import _native

__all__ = ["RecvView"]


class _Pinned(ctypes.Array[ctypes.c_ubyte]):
    """Bytes of a ring, keeping the connection whose memory they are."""

    _type_ = ctypes.c_ubyte
    # Where the array really ends is said by the slice that is handed out: one type serves all lengths.
    _length_ = 1 << 31
    keeper: _native.Connection


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
        pinned = _Pinned.from_address(address)
        pinned.keeper = self._connection
        self._held = True
        self._view = memoryview(pinned).cast("B")[:length].toreadonly()
        return self._view

    def release(self) -> None:
        """Give the bytes back to the sender: they count as received. Harmless when repeated."""
        if self._held:
            self._held = False
            self._connection.release_front()
        view, self._view = self._view, None
        if view is not None:
            # Where something made from it lives on, it does so on the terms of the module's docstring.
            with contextlib.suppress(BufferError):
                view.release()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.release()
