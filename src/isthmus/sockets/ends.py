"""What a socket is underneath: lanes, or lanes of many senders. Shared by the handles that `dup` makes.

An end begins empty, is bound, listens or connects, and is closed when its last handle is. Calls come from any
thread; what changes the state holds the lock, what moves data does not.
"""

from __future__ import annotations

import errno
import socket
import threading
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias
from weakref import WeakSet

from isthmus import _native, errors

from .address import Address
from .options import ring_sizes

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from isthmus.node import Node

__all__ = ["Datagrams", "End", "Lanes", "new_end"]

Kind: TypeAlias = Literal["stream", "seqpacket", "datagram"]

KINDS: dict[int, Kind] = {
    socket.SOCK_STREAM: "stream",
    socket.SOCK_SEQPACKET: "seqpacket",
    socket.SOCK_DGRAM: "datagram",
}
#: What Linux allows where nobody changed it; more waiting connections than this help nobody.
BACKLOG_MAX = 4096


class Follower(Protocol):
    """A handle that keeps the methods of its connection at hand."""

    def _follow(self, connection: _native.Connection) -> None: ...


class End:
    """What every kind of socket has."""

    kind: Kind

    def __init__(self, node: Node, kind: Kind, require: str | None, rings: tuple[int, int] | None) -> None:
        self.node = node
        self.kind = kind
        self.type = next(socket.SocketKind(number) for number, name in KINDS.items() if name == kind)
        self.require = require
        self.rings = rings or (_native.SMALL_DEFAULT, _native.LARGE_DEFAULT)
        self.lock = threading.RLock()
        self.handles = 1
        self.remembered: dict[tuple[int, int], bytes] = {}
        self.bound: Address | None = None

    @property
    def listening(self) -> bool:
        return False

    def choose_rings(self, size: int) -> None:
        self.rings = ring_sizes(size, self.node.ring_max)

    def buffers(self) -> tuple[int, int]:
        """Capacity towards the peer and from it, bytes."""
        own = max(self.rings)
        return own, own

    def take_error(self) -> int:
        return 0

    def release(self) -> None:
        """One handle less; the last one closes."""
        with self.lock:
            self.handles -= 1
            last = self.handles == 0
        if last:
            self.close()

    def local(self) -> Address:
        return self.bound or ("", 0)

    def partner(self, host: str) -> int:
        """Whom a port is for: a domain's number, or anybody."""
        if host in ("", self.node.name):
            return _native.ANYBODY
        return self.node.native.resolve(host)[0]

    def already_bound(self) -> None:
        if self.bound is not None:
            raise errors.WrongState(errno.EINVAL, f"bind: this socket has port {self.bound[1]} already")

    # What the kinds do differently.

    @property
    def connection(self) -> _native.Connection | None:
        raise NotImplementedError

    def bind(self, host: str, port: int) -> None:
        raise NotImplementedError

    def listen(self, backlog: int) -> None:
        raise errors.Unsupported(errno.EOPNOTSUPP, f"listen: a {self.kind} socket takes no connections")

    def accept(self, timeout: float | None) -> _native.Connection:
        raise errors.Unsupported(errno.EOPNOTSUPP, f"accept: a {self.kind} socket takes no connections")

    def connect(self, host: str, port: int, timeout: float | None) -> None:
        raise NotImplementedError

    def send(self, data: Buffer, timeout: float | None) -> int:
        raise NotImplementedError

    def sendmsg(self, buffers: list[Buffer], timeout: float | None, to: Address | None = None) -> int:
        raise NotImplementedError

    def recv(self, limit: int, timeout: float | None, peek: bool = False) -> tuple[bytes, int]:
        raise NotImplementedError

    def recv_into(self, into: Buffer, timeout: float | None, peek: bool = False) -> tuple[int, int]:
        raise NotImplementedError

    def recv_exactly_into(self, into: Buffer, timeout: float | None) -> int:
        raise NotImplementedError

    def recvmsg_into(
        self, into: list[Buffer], timeout: float | None, peek: bool = False
    ) -> tuple[int, int, Address]:
        """Bytes stored, bytes of the message, who sent it."""
        raise NotImplementedError

    def shutdown(self, receive: bool, send: bool) -> None:
        raise NotImplementedError

    def fileno(self) -> int:
        raise NotImplementedError

    def peer(self) -> Address:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Lanes(End):
    """Streams and packets: a pair of lanes, or a port on which they arrive."""

    def __init__(
        self,
        node: Node,
        kind: Kind,
        require: str | None,
        rings: tuple[int, int] | None,
        connection: _native.Connection | None = None,
    ) -> None:
        super().__init__(node, kind, require, rings)
        self._connection = connection
        self._listener: _native.Listener | None = None
        self._listening = False
        self._stopped = False
        self._closed = False
        #: A connect under way, or one whose result was not asked for yet.
        self._connecting: threading.Event | None = None
        self._fresh = False
        self._error: OSError | None = None
        self._pollable: _native.Pollable | None = None
        #: Told of the connection when there is one, so that they can keep its methods at hand.
        self.followers: WeakSet[Follower] = WeakSet()
        if connection is not None:
            self.bound = (node.name, connection.port)

    @property
    def connection(self) -> _native.Connection | None:
        return self._connection

    @property
    def listening(self) -> bool:
        return self._listening

    def buffers(self) -> tuple[int, int]:
        connection = self._connection
        if connection is None:
            return super().buffers()
        # The ring of a direction is its receiver's memory on the put path, its sender's on every other.
        own, theirs = max(connection.rings), max(connection.peer_rings)
        return (theirs, own) if connection.path == "put" else (own, theirs)

    def take_error(self) -> int:
        error = self._failed()
        if error is None and self._connection is not None:
            try:
                # Looks at nothing; raises what would keep anything from being looked at.
                self._connection.park(False, False)
            except OSError as broken:
                error = broken
        return 0 if error is None else error.errno or errno.EIO

    def _failed(self) -> OSError | None:
        """How a connect failed that nobody waited for; told once, and the socket can connect again."""
        with self.lock:
            error, self._error = self._error, None
            if self._connection is None:
                self._fresh = False
        return error

    # Ports.

    def bind(self, host: str, port: int) -> None:
        with self.lock:
            self.already_bound()
            self._lease(port, self.partner(host))

    def _lease(self, port: int, partner: int) -> None:
        small, large = self.rings
        # Leased, and nobody can connect before `listen`.
        listener = self.node.native.listen(
            port, self.kind, partner=partner, backlog=0, small=small, large=large
        )
        self._listener = listener
        self.bound = (self.node.name, listener.port)

    def listen(self, backlog: int) -> None:
        with self.lock:
            if self._connection is not None or self._connecting is not None or self._stopped:
                raise errors.WrongState(errno.EINVAL, "listen: this socket is connected; listen on another")
            if self._listener is None:
                self._lease(0, _native.ANYBODY)
            assert self._listener is not None
            self._listener.open(min(max(backlog, 1), BACKLOG_MAX))
            self._listening = True

    def accept(self, timeout: float | None) -> _native.Connection:
        listener = self._listener
        if self._closed:
            raise errors.Closed(errno.EBADF, "this socket was closed")
        if listener is None or not self._listening:
            raise errors.WrongState(errno.EINVAL, "accept: this socket does not listen; call listen() first")
        while True:
            try:
                connection = listener.accept(timeout)
            except errors.Closed:
                if self._stopped and not self._closed:
                    raise errors.WrongState(errno.EINVAL, "accept: this socket was shut down") from None
                raise
            if self.require is None or connection.path == self.require:
                return connection
            # Better none than one over another path than was required; the opener is told so by its end.
            connection.close()

    # Connecting.

    def connect(self, host: str, port: int, timeout: float | None) -> None:
        with self.lock:
            if self._fresh:
                # The result of a connect that was not waited for, as the kernel gives it: once.
                self._fresh = False
                error, self._error = self._error, None
                if error is not None:
                    raise error
                return
            if self._connection is not None:
                raise errors.AlreadyConnected(
                    errno.EISCONN, f"connect: this socket is connected to {_shown(self.peer())} already"
                )
            if self._listening:
                raise errors.WrongState(errno.EINVAL, "connect: this socket listens; connect with another")
            if self._connecting is not None:
                raise errors.WouldBlock(errno.EALREADY, "connect: a connect is under way")
            from_port = self._listener.port if self._listener is not None else 0
            polled = timeout == 0 or self._pollable is not None
            done = self._start(host, port, from_port) if polled else None
        if done is None:
            small, large = self.rings
            connection = self.node.native.connect(
                host,
                port,
                self.kind,
                from_port=from_port,
                require=self.require,
                small=small,
                large=large,
                timeout=timeout,
            )
            with self.lock:
                if self._closed or self._connection is not None or self._connecting is not None:
                    connection.close()
                    raise errors.Closed(errno.EBADF, "connect: the socket was used otherwise meanwhile")
                self._settle(connection)
            return
        if timeout == 0:
            raise errors.WouldBlock(errno.EINPROGRESS, f"connect: under way to {host}:{port}")
        if not done.wait(timeout):
            raise errors.TimedOut(errno.ETIMEDOUT, f"connect to {host}:{port}: timed out; it goes on")
        with self.lock:
            self._fresh = False
            error, self._error = self._error, None
        if error is not None:
            raise error

    def _start(self, host: str, port: int, from_port: int) -> threading.Event:
        """Connect without waiting. The descriptor becomes writable when it is decided."""
        if self._pollable is None:
            self._pollable = _native.Pollable()
        self._pollable.set(False, False)
        done = self._connecting = threading.Event()

        def then(connection: _native.Connection | None, error: BaseException | None) -> None:
            # On the engine's thread.
            with self.lock:
                self._connecting = None
                if connection is not None:
                    if self._closed:
                        connection.close()
                    else:
                        self._fresh = True
                        self._settle(connection)
                else:
                    self._fresh = True
                    self._error = error if isinstance(error, OSError) else OSError(errno.EIO, str(error))
            done.set()

        small, large = self.rings
        try:
            self.node.native.connect_then(
                host,
                port,
                self.kind,
                then,
                from_port=from_port,
                require=self.require,
                small=small,
                large=large,
                readiness=self._pollable,
            )
        except BaseException:
            self._connecting = None
            raise
        return done

    def _settle(self, connection: _native.Connection) -> None:
        self._connection = connection
        self.bound = (self.node.name, connection.port)
        for follower in self.followers:
            follower._follow(connection)

    # Data, before there is a connection: the handles call the connection's own methods afterwards.

    def _connected(self, timeout: float | None) -> _native.Connection:
        connecting = self._connecting
        if connecting is not None:
            if timeout is not None and timeout <= 0:
                raise errors.WouldBlock(errno.EAGAIN, "the connect is still under way")
            if not connecting.wait(timeout):
                raise errors.TimedOut(errno.ETIMEDOUT, "timed out; the connect is still under way")
        connection = self._connection
        if connection is not None:
            return connection
        if self._closed:
            raise errors.Closed(errno.EBADF, "this socket was closed")
        error = self._failed()
        if error is not None:
            raise error
        what = "it listens; send and receive on what accept() gives" if self._listening else "connect() first"
        raise errors.NotConnected(errno.ENOTCONN, f"this socket is not connected: {what}")

    def send(self, data: Buffer, timeout: float | None) -> int:
        return self._connected(timeout).send(data, timeout)

    def sendmsg(self, buffers: list[Buffer], timeout: float | None, to: Address | None = None) -> int:
        if to is not None:
            if self._connection is None:
                self._connected(timeout)
            raise errors.AlreadyConnected(
                errno.EISCONN, f"a {self.kind} socket sends to its other side only; leave the address out"
            )
        return self._connected(timeout).sendmsg(buffers, timeout)

    def recv(self, limit: int, timeout: float | None, peek: bool = False) -> tuple[bytes, int]:
        return self._connected(timeout).recv(limit, timeout, peek)

    def recv_into(self, into: Buffer, timeout: float | None, peek: bool = False) -> tuple[int, int]:
        return self._connected(timeout).recv_into(into, timeout, peek)

    def recv_exactly_into(self, into: Buffer, timeout: float | None) -> int:
        return self._connected(timeout).recv_exactly_into(into, timeout)

    def recvmsg_into(
        self, into: list[Buffer], timeout: float | None, peek: bool = False
    ) -> tuple[int, int, Address]:
        connection = self._connected(timeout)
        stored, whole = connection.recvmsg_into(into, timeout, peek)
        _, name, port = connection.peer
        return stored, whole, (name, port)

    # The rest.

    def shutdown(self, receive: bool, send: bool) -> None:
        connection = self._connection
        if connection is None:
            with self.lock:
                if self._listening and self._listener is not None and receive:
                    self._stopped = True
                    self._listening = False
                    self._listener.close()
                    return
            raise errors.NotConnected(errno.ENOTCONN, "shutdown: this socket is not connected")
        if receive:
            connection.shut_receive()
        if send:
            connection.shut_send()

    def fileno(self) -> int:
        with self.lock:
            if self._closed:
                return -1
            if self._pollable is not None and not self._listening:
                return self._pollable.fileno()
            if self._connection is not None:
                return self._connection.fileno()
            if self._listening and self._listener is not None:
                return self._listener.fileno()
            self._pollable = _native.Pollable()
            self._pollable.set(False, True)
            return self._pollable.fileno()

    def peer(self) -> Address:
        connection = self._connection
        if connection is None:
            raise errors.NotConnected(errno.ENOTCONN, "this socket is not connected: it has no other side")
        _, name, port = connection.peer
        return name, port

    def close(self) -> None:
        with self.lock:
            self._closed = True
            listener, connection = self._listener, self._connection
            # A socket that is closed and still known to somebody holds no memory and no descriptors.
            self._listener = self._connection = self._pollable = None
        if listener is not None:
            listener.close()
        if connection is not None:
            connection.close()


class Datagrams(End):
    """Messages from and to many: a lane for each other side, made when it is first needed."""

    def __init__(self, node: Node, kind: Kind, require: str | None, rings: tuple[int, int] | None) -> None:
        super().__init__(node, kind, require, rings)
        if require is not None:
            raise errors.Unsupported(
                errno.EOPNOTSUPP, "require: a datagram socket takes the path that policy gives; see .path"
            )
        self._native: _native.Datagram | None = None
        self._target: Address | None = None
        self._lane: _native.Connection | None = None
        self._shut = (False, False)
        self._closed = False

    @property
    def connection(self) -> _native.Connection | None:
        return self._lane

    def _socket(self) -> _native.Datagram:
        native = self._native
        if native is None:
            with self.lock:
                if self._closed:
                    raise errors.Closed(errno.EBADF, "this socket was closed")
                if self._native is None:
                    self._native = self._make(None, _native.ANYBODY)
                native = self._native
        return native

    def _make(self, port: int | None, partner: int) -> _native.Datagram:
        small, large = self.rings
        return self.node.native.datagram(port, partner=partner, small=small, large=large)

    def bind(self, host: str, port: int) -> None:
        with self.lock:
            self.already_bound()
            if self._native is not None:
                raise errors.WrongState(errno.EINVAL, "bind: this socket has sent or been polled already")
            self._native = self._make(port, self.partner(host))
            self.bound = (self.node.name, self._native.port)

    def connect(self, host: str, port: int, timeout: float | None) -> None:
        native = self._socket()
        # Asking the broker cannot be polled for: it is waited for even where space is not.
        lane = native.connect(host, port, None if timeout == 0 else timeout)
        _, name, number = lane.peer
        with self.lock:
            self._lane = lane
            self._target = (name, number)

    def _destination(self, to: Address | None) -> Address:
        to = to or self._target
        if to is None:
            raise errors.NotConnected(
                errno.EDESTADDRREQ, "send: no address; use sendto(), or connect() first"
            )
        if self._shut[1]:
            raise errors.PeerClosed(errno.EPIPE, "send: this socket was shut down for sending")
        return to

    def send(self, data: Buffer, timeout: float | None) -> int:
        return self.sendmsg([data], timeout)

    def sendmsg(self, buffers: list[Buffer], timeout: float | None, to: Address | None = None) -> int:
        host, port = self._destination(to)
        return self._socket().send_to(buffers, host, port, timeout)

    def recvmsg_into(
        self, into: list[Buffer], timeout: float | None, peek: bool = False
    ) -> tuple[int, int, Address]:
        native = self._socket()
        while True:
            if self._shut[0]:
                return 0, 0, ("", 0)
            stored, whole, _, name, port = native.recv_from_into(into, timeout, peek)
            if self._target is None or self._target == (name, port):
                return stored, whole, (name, port)
            if peek:
                # A connected socket hears nobody else: take the stranger's message out of the way.
                native.recv_from_into([], 0.0, False)

    def recv(self, limit: int, timeout: float | None, peek: bool = False) -> tuple[bytes, int]:
        room = bytearray(limit)
        stored, whole, _ = self.recvmsg_into([room], timeout, peek)
        return bytes(memoryview(room)[:stored]), whole

    def recv_into(self, into: Buffer, timeout: float | None, peek: bool = False) -> tuple[int, int]:
        stored, whole, _ = self.recvmsg_into([into], timeout, peek)
        return stored, whole

    def recv_exactly_into(self, into: Buffer, timeout: float | None) -> int:
        # MSG_WAITALL means nothing where a receive takes one message.
        return self.recv_into(into, timeout)[0]

    def shutdown(self, receive: bool, send: bool) -> None:
        if self._target is None:
            raise errors.NotConnected(errno.ENOTCONN, "shutdown: this socket is not connected")
        with self.lock:
            self._shut = (self._shut[0] or receive, self._shut[1] or send)

    def fileno(self) -> int:
        return self._socket().fileno()

    def peer(self) -> Address:
        if self._target is None:
            raise errors.NotConnected(errno.ENOTCONN, "this socket is not connected: it has no other side")
        return self._target

    def close(self) -> None:
        with self.lock:
            self._closed = True
            native = self._native
            self._native = self._lane = None
        if native is not None:
            native.close()


def new_end(kind: int, node: Node, require: str | None, rings: tuple[int, int] | None) -> End:
    """An end for a socket of type `kind`, one of ``socket.SOCK_*``."""
    word = KINDS.get(int(kind))
    if word is None:
        raise errors.Unsupported(
            errno.EPROTONOSUPPORT,
            f"type={kind!r}: sockets are SOCK_STREAM, SOCK_SEQPACKET or SOCK_DGRAM",
        )
    if require is not None and require not in _native.CARRIERS:
        known = " or ".join(sorted(_native.CARRIERS))
        raise ValueError(f"require={require!r}: a path is {known}")
    if word == "datagram":
        return Datagrams(node, word, require, rings)
    return Lanes(node, word, require, rings)


def _shown(address: Address) -> str:
    return f"{address[0]}:{address[1]}"
