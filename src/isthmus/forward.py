"""Between a domain's ports and the sockets of programs that know nothing of Isthmus.

    async with Forwarder(endpoint(":5432"), endpoint("unix:/run/postgresql/.s.PGSQL.5432")) as forwarder:
        await forwarder.serve()

Every connection that comes in on one side is opened on the other, and the bytes are passed on both ways, each
direction with an end of its own. A reset on one side is a reset on the other. What runs this is a program of
its domain like any other: the policy decides who reaches it, and whom it reaches.

Endpoints
---------
``unix:PATH``
    A Unix stream socket.
``tcp:HOST:PORT``
    The network, with the network's protection.
``DOMAIN:PORT``, ``:PORT``
    A port of a domain, to connect to; a port of this domain, to listen on.
``hybrid:PATH``
    A Unix socket on which each client first says ``CONNECT <port>`` and is answered ``OK <port>``, as with
    the socket devices of Firecracker and Cloud Hypervisor; goes with a domain without a port on the other
    side.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import struct
import types
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from isthmus import aio
from isthmus._native import parse_address

if TYPE_CHECKING:
    from typing_extensions import Self

    from isthmus.node import Node

__all__ = ["Ended", "Endpoint", "Forwarder", "endpoint"]

#: Bytes of each direction of a connection.
BUFFER = 256 * 1024
#: Longest that opening the other side, or the first line of a hybrid client, may take.
OPEN_S = 10.0
#: ``CONNECT 4294967295\n``
HYBRID_LINE_MAX = 20
BACKLOG = 128


class Stream(Protocol):
    """One end of a connection, whatever carries it."""

    async def recv_into(self, buffer: memoryview, /) -> int: ...
    async def send(self, data: memoryview, /) -> None: ...
    def shut_send(self) -> None: ...
    def close(self) -> None: ...
    def reset(self) -> None: ...


class _Kernel:
    """A kernel socket in an event loop."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    async def recv_into(self, buffer: memoryview) -> int:
        return await self._loop.sock_recv_into(self._sock, buffer)

    async def send(self, data: memoryview) -> None:
        await self._loop.sock_sendall(self._sock, data)

    def shut_send(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._sock.close()

    def reset(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()


class _Lane:
    """A connection of ours in an event loop."""

    def __init__(self, connection: aio.Connection) -> None:
        self.recv_into = connection.recv_into
        self.send = connection.send
        self.shut_send = connection.shut_send
        self.close = connection.close
        self.reset = connection.abort


class Listening(ABC):
    """What an endpoint listens with."""

    @abstractmethod
    async def accept(self) -> Stream:
        """The next connection."""

    @abstractmethod
    def close(self) -> None:
        """Listen no more."""


class _KernelListening(Listening):
    def __init__(self, sock: socket.socket, path: Path | None) -> None:
        sock.listen(BACKLOG)
        sock.setblocking(False)
        self._sock = sock
        self._path = path
        self._made = None if path is None else path.stat().st_ino

    async def accept(self) -> Stream:
        sock, _ = await asyncio.get_running_loop().sock_accept(self._sock)
        return _Kernel(sock)

    def close(self) -> None:
        self._sock.close()
        if self._path is not None:
            # Not another's that has taken its place.
            with contextlib.suppress(OSError):
                if self._path.stat().st_ino == self._made:
                    self._path.unlink()


class _LaneListening(Listening):
    def __init__(self, listener: aio.Listener) -> None:
        self._listener = listener

    async def accept(self) -> Stream:
        return _Lane(await self._listener.accept())

    def close(self) -> None:
        self._listener.close()


@dataclass(frozen=True)
class Endpoint:
    """One side of a forwarder; made by `endpoint`.

    Attributes
    ----------
    kind : str
        ``unix``, ``hybrid``, ``tcp`` or ``domain``.
    host : str
        A path, a host, or a domain; empty for this domain.
    port : int or None
        None where there is none: for paths, and for a domain whose port a hybrid client names.
    """

    kind: str
    host: str
    port: int | None = None

    def __str__(self) -> str:
        if self.kind == "domain":
            return self.host if self.port is None else f"{self.host}:{self.port}"
        return f"{self.kind}:{self.host}" + ("" if self.port is None else f":{self.port}")

    async def listen(self, node: Node | None) -> Listening:
        """Begin to listen.

        Raises
        ------
        OSError
            The place is taken or not allowed.
        """
        if self.kind == "domain":
            if self.host:
                raise OSError(
                    errno.EINVAL, f"{self}: one listens on a port of one's own domain: :{self.port}"
                )
            return _LaneListening(await aio.listen(self.port or 0, node=node))
        if self.kind == "tcp":
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            sock = socket.create_server((self.host, self.port or 0), family=family)
            return _KernelListening(sock, None)
        path = Path(self.host)
        _remove_stale(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.bind(str(path))
            return _KernelListening(sock, path)
        except BaseException:
            sock.close()
            raise

    async def connect(self, node: Node | None, port: int | None) -> Stream:
        """Open a connection; `port` where this endpoint has none.

        Raises
        ------
        OSError
            Nobody listens, a rule refuses, or it takes too long.
        """
        if self.kind == "domain":
            return _Lane(await aio.connect((self.host, self.port or port or 0), node=node))
        if self.kind == "unix":
            return _Kernel(await _connect_unix(self.host))
        loop = asyncio.get_running_loop()
        failed: OSError | None = None
        for family, _, _, _, address in await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM):
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                await loop.sock_connect(sock, address)
            except OSError as error:
                sock.close()
                failed = error
            except BaseException:
                sock.close()
                raise
            else:
                return _Kernel(sock)
        raise failed or OSError(errno.EHOSTUNREACH, f"{self}: no address")


async def _connect_unix(path: str) -> socket.socket:
    """Connect; where the listener has no room now, try again: nothing tells when it has."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:
                await asyncio.sleep(0.01)
            else:
                return sock
    except BaseException:
        sock.close()
        raise


def _remove_stale(path: Path) -> None:
    """Take away a socket on which nobody listens any more."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return
    except OSError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1)
        try:
            sock.connect(str(path))
        except ConnectionRefusedError:
            with contextlib.suppress(OSError):
                path.unlink()
        except OSError:
            pass


def endpoint(text: str) -> Endpoint:
    """Read an endpoint; see the module's docstring.

    Raises
    ------
    ValueError
        Says what is wrong with it.
    """
    kind, colon, rest = text.partition(":")
    if colon and kind in ("unix", "hybrid"):
        if not rest:
            raise ValueError(f"{text}: give a path, as in {kind}:/run/app.sock")
        if len(os.fsencode(rest)) > 107:
            raise ValueError(f"{text}: a path of a socket has at most 107 bytes")
        return Endpoint(kind, rest)
    if colon and kind == "tcp":
        host, colon, port = rest.rpartition(":")
        if not colon or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"{text}: give host and port, as in tcp:127.0.0.1:8080")
        return Endpoint(kind, host.strip("[]") or "127.0.0.1", int(port))
    if not colon:
        return Endpoint("domain", text)
    if not kind:
        if not rest.isdigit() or int(rest) > 2**32 - 1:
            raise ValueError(f"{text}: a port is a number from 0 to {2**32 - 1}")
        return Endpoint("domain", "", int(rest))
    domain, number = parse_address(text)
    return Endpoint("domain", str(domain), number)


@dataclass(frozen=True)
class Ended:
    """A connection that is over.

    Attributes
    ----------
    number : int
        Counts from 1.
    forth, back : int, bytes
        From the side that opened it, and to it.
    seconds : float
    error : str or None
        Why, if it did not end in order.
    """

    number: int
    forth: int
    back: int
    seconds: float
    error: str | None


class Forwarder:
    """Passes connections on. An async context that closes all of them.

    Parameters
    ----------
    here, there : Endpoint
        Where connections come in, and where they are opened.
    node : Node, optional
        The attachment; by default that of `isthmus.attach()`.
    limit : int
        Connections at the same time; further ones wait.
    ended : callable, optional
        Told each connection that is over.

    Raises
    ------
    ValueError
        The two do not go together.
    OSError
        On entry: one cannot listen there.
    """

    def __init__(
        self,
        here: Endpoint,
        there: Endpoint,
        *,
        node: Node | None = None,
        limit: int = 1024,
        ended: Callable[[Ended], None] = lambda _: None,
    ) -> None:
        named_later = there.kind == "domain" and there.port is None
        if (here.kind == "hybrid") != named_later:
            raise ValueError(
                f"{here} to {there}: hybrid:PATH goes with a domain, whose port each client names; "
                "everything else with a port or a path"
            )
        if there.kind == "hybrid" or (there.kind == "domain" and not there.host):
            raise ValueError(f"{there}: connections are opened to a domain's port, tcp: or unix:")
        if here.kind == "domain" and here.port is None:
            raise ValueError(f"{here}: one listens on a port, as in :8080")
        self._here, self._there = here, there
        self._node = node
        self._room = asyncio.Semaphore(limit)
        self._ended = ended
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0

    async def __aenter__(self) -> Self:
        self._listening = await self._here.listen(self._node)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._listening.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def serve(self) -> None:
        """Pass connections on until cancelled."""
        while True:
            await self._room.acquire()
            try:
                one = await self._listening.accept()
            except OSError as error:
                self._room.release()
                if error.errno in (errno.EBADF, errno.EINVAL):
                    raise
                # One that is gone already; or until some of those that are open have ended.
                await asyncio.sleep(0.1)
                continue
            self._count += 1
            task = asyncio.create_task(self._forward(one, self._count))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._room.release()

    async def _forward(self, one: Stream, number: int) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        moved, error = [0, 0], None
        done = False
        other: Stream | None = None
        try:
            async with asyncio.timeout(OPEN_S) if hasattr(asyncio, "timeout") else _timeout(OPEN_S):
                port = await _hybrid_port(one) if self._here.kind == "hybrid" else None
                other = await self._there.connect(self._node, port)
            if port is not None:
                await one.send(memoryview(b"OK %d\n" % port))
            ways = [
                asyncio.ensure_future(_pass(one, other, moved, 0)),
                asyncio.ensure_future(_pass(other, one, moved, 1)),
            ]
            try:
                await asyncio.gather(*ways)
                done = True
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, ValueError, asyncio.TimeoutError) as failed:
            error = str(failed) or "it took too long to open"
        finally:
            # What was cut short must not look as if it were all.
            for stream in (one, other):
                if stream is not None and done:
                    stream.close()
                elif stream is not None:
                    stream.reset()
        self._ended(Ended(number, moved[0], moved[1], loop.time() - began, error))


# Not wait_for: before Python 3.12 it can lose a cancellation that comes as the other side answers.
@contextlib.asynccontextmanager
async def _timeout(seconds: float):  # type: ignore[no-untyped-def]  # Python 3.10 has no asyncio.timeout
    task = asyncio.current_task()
    assert task is not None
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()

    handle = asyncio.get_running_loop().call_later(seconds, expire)
    try:
        yield
    except asyncio.CancelledError:
        if expired:
            raise asyncio.TimeoutError from None
        raise
    finally:
        handle.cancel()


async def _pass(source: Stream, sink: Stream, moved: list[int], way: int) -> None:
    """One direction, until its end."""
    with memoryview(bytearray(BUFFER)) as buffer:
        while count := await source.recv_into(buffer):
            await sink.send(buffer[:count])
            moved[way] += count
    sink.shut_send()


async def _hybrid_port(client: Stream) -> int:
    """The port that a hybrid client asks for; not a byte behind its line is taken."""
    line = bytearray()
    byte = memoryview(bytearray(1))
    while not line.endswith(b"\n"):
        if len(line) >= HYBRID_LINE_MAX or not await client.recv_into(byte):
            raise ValueError("a hybrid client begins with CONNECT <port>")
        line += byte
    word, _, port = line.rstrip(b"\r\n").partition(b" ")
    if word != b"CONNECT" or not port.isdigit() or int(port) > 2**32 - 1:
        raise ValueError("a hybrid client begins with CONNECT <port>")
    return int(port)
