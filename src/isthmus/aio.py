"""Awaitable connections that do not pay for asyncio's streams.

asyncio's streams copy every byte into a buffer of their own and make several calls of Python for each. Here
``await connection.recv_into(buffer)`` goes from the ring into the caller's buffer. A wait begins with letting
the other tasks of the loop run once (the peer may be one of them), then spins a few microseconds in Rust as
far as that has paid lately, and only then parks. All parked connections of a loop share one descriptor and
are woken in one batch.

    async with await aio.connect("worker-7:9000") as connection:
        await connection.send(b"question")
        answer = await connection.recv(65536)

Cancelling: a cancelled receive has received nothing; a cancelled ``send`` has put a prefix into the lane,
whose length is ``error.done`` of the ``CancelledError`` (0 or everything for messages); a cancelled
``connect`` or ``accept`` leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterator, Generator
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary, WeakValueDictionary

from isthmus import _native, errors

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

    from isthmus.node import Node

__all__ = ["Connection", "Listener", "connect", "listen"]

Kind = Literal["stream", "seqpacket"]


class _Watcher:
    """The parked connections of one event loop, behind one descriptor."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.poller = _native.Poller()
        self.members: WeakValueDictionary[int, Connection] = WeakValueDictionary()
        loop.add_reader(self.poller.fileno(), self._wake)

    def add(self, connection: Connection) -> int:
        token = self.poller.add(connection.native)
        self.members[token] = connection
        return token

    def remove(self, token: int) -> None:
        self.members.pop(token, None)
        self.poller.remove(token)

    def _wake(self) -> None:
        for token in self.poller.ready():
            connection = self.members.get(token)
            if connection is not None:
                connection._look_again()


_watchers: WeakKeyDictionary[asyncio.AbstractEventLoop, _Watcher] = WeakKeyDictionary()


def _watcher(loop: asyncio.AbstractEventLoop) -> _Watcher:
    watcher = _watchers.get(loop)
    if watcher is None:
        watcher = _watchers[loop] = _Watcher(loop)
    return watcher


class _Turn:
    """``await _TURN``: every other task that can run does so once."""

    __slots__ = ()

    def __await__(self) -> Generator[None, None, None]:
        yield


_TURN = _Turn()


class Connection:
    """One end of a connection, for the tasks of one event loop.

    One task may receive while another sends; two at once in one direction raise ``RuntimeError``.

    Parameters
    ----------
    native : isthmus._native.Connection
        Owned from now on. Use `connect` or `Listener.accept`.
    """

    __slots__ = ("__weakref__", "_data", "_loop", "_space", "_token", "_watcher", "native")

    def __init__(self, native: _native.Connection) -> None:
        self.native = native
        self._loop = asyncio.get_running_loop()
        self._watcher = _watcher(self._loop)
        self._data: asyncio.Future[None] | None = None
        self._space: asyncio.Future[None] | None = None
        self._token = self._watcher.add(self)

    @property
    def path(self) -> str:
        """What carries the connection: ``sealed``, ``put`` or ``switch``."""
        return self.native.path

    @property
    def why(self) -> str:
        """Why that path, in words."""
        return self.native.why

    @property
    def peer(self) -> tuple[str, int]:
        """Name and port of the other side."""
        _, name, port = self.native.peer
        return name, port

    async def recv_into(self, buffer: Buffer) -> int:
        """Receive into `buffer`: what there is of the stream, or one message.

        Parameters
        ----------
        buffer : writable buffer, shape (n,), C-contiguous
            Filled from its beginning. A longer message loses its end.

        Returns
        -------
        int, bytes
            0 at the end of the stream.

        Raises
        ------
        PeerReset, ConnectionCut, PeerFault
            Nothing more will arrive; what arrived before was received before.
        """
        native = self.native
        while True:
            got = native.try_recv_into(buffer)
            if got is None:
                await _TURN
                got = native.try_recv_into(buffer)
                if got is None:
                    if await self._data_or_end():
                        return native.recv_into(buffer, 0.0)[0]
                    continue
            return got[0]

    async def recv(self, limit: int) -> bytes:
        """Receive at most `limit` bytes, or one message cut to `limit`. Empty at the end."""
        native = self.native
        while True:
            got = native.try_recv(limit)
            if got is None:
                await _TURN
                got = native.try_recv(limit)
                if got is None:
                    if await self._data_or_end():
                        return native.recv(limit, 0.0)[0]
                    continue
            return got

    async def recv_exactly(self, count: int) -> bytearray:
        """Receive exactly `count` bytes of the stream.

        Raises
        ------
        asyncio.IncompleteReadError
            The stream ended before; ``partial`` holds what came.
        """
        data = bytearray(count)
        view = memoryview(data)
        got = 0
        while got < count:
            n = await self.recv_into(view[got:])
            if n == 0:
                raise asyncio.IncompleteReadError(bytes(view[:got]), count)
            got += n
        return data

    async def send(self, data: Buffer) -> None:
        """Send all of `data`: as bytes of the stream, or as one message.

        Parameters
        ----------
        data : buffer, shape (n,), C-contiguous
            Borrowed until this returns.

        Raises
        ------
        PeerClosed, PeerReset, ConnectionCut
            A prefix may be in the lane.
        MessageTooLarge
            Nothing was sent.
        """
        native = self.native
        sent = native.try_send(data)
        if sent is not None and native.kind != "stream":
            return
        size = memoryview(data).nbytes
        done = sent or 0
        try:
            while done < size or sent is None:
                if sent is None:
                    await self._wait_for_space()
                sent = native.try_send(data, done)
                done += sent or 0
        except asyncio.CancelledError as cancelled:
            cancelled.done = done  # type: ignore[attr-defined]  # the promise of the module's docstring
            raise

    def shut_send(self) -> None:
        """Send no more: the other side receives everything and then the end."""
        self.native.shut_send()

    def close(self) -> None:
        """Finish both directions. What was sent is delivered. Harmless when repeated."""
        if self._token:
            self._watcher.remove(self._token)
            self._token = 0
        self.native.close()
        self._look_again()

    def abort(self) -> None:
        """As `close`, but the other side hears a reset behind what was sent: it may not be everything."""
        if self._token:
            self._watcher.remove(self._token)
            self._token = 0
        self.native.abort()
        self._look_again()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._token:
            self._watcher.remove(self._token)

    def __repr__(self) -> str:
        name, port = self.peer
        return f"<isthmus.aio.Connection to {name}:{port} by {self.path}>"

    async def _data_or_end(self) -> bool:
        """Wait until there is something; True if only a plain call can say what (the end, an error)."""
        if self._data is not None:
            raise RuntimeError("another task is receiving from this connection")
        if self.native.spin_then_park():
            return True
        future = self._data = self._loop.create_future()
        try:
            await future
        finally:
            self._data = None
        return self.native.poll()[0]

    async def _wait_for_space(self) -> None:
        if self._space is not None:
            raise RuntimeError("another task is sending on this connection")
        await _TURN
        if self.native.park(False, True):
            return
        future = self._space = self._loop.create_future()
        try:
            await future
        finally:
            self._space = None

    def _look_again(self) -> None:
        for future in (self._data, self._space):
            if future is not None and not future.done():
                future.set_result(None)


class Listener:
    """A leased port on which connections arrive, for one event loop."""

    def __init__(self, native: _native.Listener) -> None:
        self.native = native
        self._loop = asyncio.get_running_loop()
        self._waiters: list[asyncio.Future[None]] = []
        self._loop.add_reader(native.fileno(), self._wake)

    @property
    def port(self) -> int:
        """The leased port."""
        return self.native.port

    async def accept(self) -> Connection:
        """The next connection.

        Raises
        ------
        Closed
            The listener was closed.
        """
        while True:
            try:
                return Connection(self.native.accept(0.0))
            except BlockingIOError:
                future = self._loop.create_future()
                self._waiters.append(future)
                if len(self._waiters) == 1:
                    self._loop.add_reader(self.native.fileno(), self._wake)
                try:
                    await future
                finally:
                    if future in self._waiters:
                        self._waiters.remove(future)

    def __aiter__(self) -> AsyncIterator[Connection]:
        return self._connections()

    async def _connections(self) -> AsyncIterator[Connection]:
        while True:
            try:
                yield await self.accept()
            except errors.Closed:
                return

    def _wake(self) -> None:
        # The descriptor stays readable while connections wait: look away until somebody asks.
        self._loop.remove_reader(self.native.fileno())
        waiters, self._waiters = self._waiters, []
        for future in waiters:
            if not future.done():
                future.set_result(None)

    def close(self) -> None:
        """Give the port back. Connections not yet accepted are closed. Harmless when repeated."""
        self._loop.remove_reader(self.native.fileno())
        self.native.close()
        self._wake()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()


def _split(address: str | tuple[str, int]) -> tuple[str, int]:
    if isinstance(address, str):
        host, port = _native.parse_address(address)
        return str(host), port
    return str(address[0]), address[1]


async def connect(
    address: str | tuple[str, int],
    *,
    kind: Kind = "stream",
    require: str | None = None,
    node: Node | None = None,
) -> Connection:
    """Open a connection.

    Parameters
    ----------
    address : "domain:port" or (domain, port)
        Domain by name or number.
    kind : {"stream", "seqpacket"}
    require : {"sealed", "put", "switch"}, optional
        Take this path or none.
    node : Node, optional
        The attachment; by default that of `isthmus.attach()`.

    Raises
    ------
    NobodyListens, RefusedByRule, UnknownDomain, LimitReached, PathUnavailable, NoBroker
        Nothing was opened.
    """
    from isthmus.node import attach

    host, port = _split(address)
    attachment = (node or attach()).native
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[_native.Connection] = loop.create_future()

    abandoned = False

    # A connection that comes when nobody waits any more is, to the other side, no stream that ends in order.
    def settle(connection: _native.Connection | None, error: BaseException | None) -> None:
        if opened.cancelled():
            if connection is not None:
                connection.abort()
        elif error is not None:
            opened.set_exception(error)
        elif connection is not None:
            opened.set_result(connection)

    def then(connection: _native.Connection | None, error: BaseException | None) -> None:
        try:
            if not abandoned:
                loop.call_soon_threadsafe(settle, connection, error)
                return
        except RuntimeError:  # the loop was closed meanwhile
            pass
        if connection is not None:
            connection.abort()

    attachment.connect_then(host, port, kind, then, require=require)
    try:
        return Connection(await opened)
    except asyncio.CancelledError:
        abandoned = True
        # It may have come in the very turn in which we were cancelled.
        if not opened.cancelled() and opened.done() and opened.exception() is None:
            opened.result().abort()
        raise


async def listen(
    address: str | tuple[str, int] | int,
    *,
    kind: Kind = "stream",
    backlog: int = 128,
    node: Node | None = None,
) -> Listener:
    """Lease a port and listen on it.

    Parameters
    ----------
    address : int, "partner:port" or (partner, port)
        A port alone, or with partner ``""``, takes whomever a rule lets in; a partner's name takes that
        domain alone. Port 0 lets the broker choose.
    """
    from isthmus.node import attach

    attachment = (node or attach()).native
    partner, port = ("", address) if isinstance(address, int) else _split(address)
    loop = asyncio.get_running_loop()

    def lease() -> _native.Listener:
        number = attachment.resolve(partner)[0] if partner else _native.ANYBODY
        return attachment.listen(port, kind, partner=number, backlog=backlog)

    return Listener(await loop.run_in_executor(None, lease))
