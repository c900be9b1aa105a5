"""`Handle`: all of a socket but what goes through it.

Who and what it is, how long its calls wait, its options, its descriptor and how long it lives. Several of
them (`Handle.dup`) may be of one end; see :mod:`.ends`. What connects, sends and receives is in
:mod:`.socket`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import socket as _socket
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias, cast

from isthmus import errors
from isthmus.node import Node, attach

from .address import Address
from .ends import KINDS, End, Lanes, new_end
from .options import get_option, ring_sizes, set_option

if TYPE_CHECKING:
    from typing_extensions import Self

    from isthmus import _native

__all__ = ["Handle", "Stats"]

_WAITS = ("spin", "adaptive", "block")
#: Callers in the standard library that take a descriptor in order to move data through it behind our back.
#: Ours is for polling only: to them it would look like a socket that swallows bytes.
_DATA_CALLERS = {
    ("ssl", "_create"): "ssl",
    ("asyncio.unix_events", "_sock_sendfile_native_impl"): "sendfile",
}


# In the class below, `type` is what kind of socket it is.
_Raised: TypeAlias = "type[BaseException] | None"


class Stats(NamedTuple):
    """What went through a connection since it was opened, as its own side counts."""

    bytes_sent: int
    messages_sent: int
    bytes_received: int
    messages_received: int
    #: Bytes of ring that hold what the other side has not received yet.
    in_flight: int
    #: Bytes that can be received at once without another look: the first piece, or the next message.
    pending: int


def _closed(*_: object, **__: object) -> NoReturn:
    raise errors.Closed(errno.EBADF, "this socket was closed")


def _waiting_limit(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, str) or not hasattr(type(value), "__float__") | hasattr(type(value), "__index__"):
        raise TypeError(f"a time limit is a number of seconds or None, not {value!r}")
    seconds = float(value)  # type: ignore[arg-type]  # it has just been looked at
    if not seconds >= 0:
        raise ValueError("Timeout value out of range")
    # The engine's clock ends somewhere; a year is for ever.
    return min(seconds, 31_536_000.0)


class Handle:
    """A socket that nobody can send to or receive from; `Socket` can. Its parameters are described there."""

    __slots__ = (
        "__weakref__",
        "_closed",
        "_end",
        "_io_refs",
        "_recv",
        "_recv_into",
        "_recv_limit",
        "_recv_wait",
        "_send",
        "_send_limit",
        "_send_wait",
        "_timeout",
    )

    # Typed as the connection's own methods, which they are once there is one.
    _send: Any
    _recv: Any
    _recv_into: Any

    def __init__(
        self,
        type: int = _socket.SOCK_STREAM,
        *,
        node: Node | None = None,
        require: str | None = None,
        rings: int | tuple[int, int] | None = None,
    ) -> None:
        kind = int(type) & ~(_socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC)
        # First, so that a constructor that fails leaves something that can be thrown away.
        self._closed = True
        self._io_refs = 0
        if kind not in KINDS:
            raise errors.Unsupported(
                errno.EPROTONOSUPPORT, f"type={type!r}: sockets are SOCK_STREAM, SOCK_SEQPACKET or SOCK_DGRAM"
            )
        end = new_end(kind, node._again() if node is not None else attach(), require, _rings(rings))
        self._adopt(end, 0.0 if int(type) & _socket.SOCK_NONBLOCK else _socket.getdefaulttimeout())

    def _adopt(self, end: End, timeout: float | None) -> None:
        self._end = end
        self._closed = False
        self._io_refs = 0
        self._recv_limit: float | None = None
        self._send_limit: float | None = None
        self._timeout = timeout
        self._recv_wait = self._send_wait = timeout
        self._send = end.send
        self._recv = end.recv
        self._recv_into = end.recv_into
        if isinstance(end, Lanes):
            with end.lock:
                if end.connection is not None:
                    self._follow(end.connection)
                else:
                    end.followers.add(self)

    def _follow(self, connection: _native.Connection) -> None:
        if not self._closed:
            self._send = connection.send
            self._recv = connection.recv
            self._recv_into = connection.recv_into

    @classmethod
    def _over(cls, end: End, timeout: float | None) -> Self:
        made = cls.__new__(cls)
        made._adopt(end, timeout)
        return made

    # ---- who and what

    @property
    def family(self) -> int:
        """``AF_VSOCK``, the nearest that the kernel has: names and numbers of neighbours instead of hosts."""
        return _socket.AF_VSOCK

    @property
    def type(self) -> _socket.SocketKind:
        """``SOCK_STREAM``, ``SOCK_SEQPACKET`` or ``SOCK_DGRAM``."""
        return self._end.type

    @property
    def proto(self) -> int:
        """0."""
        return 0

    @property
    def node(self) -> Node:
        """The attachment it came from."""
        return self._end.node

    @property
    def connection(self) -> _native.Connection | None:
        """The engine's connection, if there is one."""
        return self._end.connection

    def _lane(self, call: str) -> _native.Connection:
        connection = self._end.connection
        if self._closed:
            _closed()
        if connection is None:
            raise errors.NotConnected(errno.ENOTCONN, f"{call}: this socket is not connected")
        return connection

    @property
    def path(self) -> str | None:
        """What carries the connection: ``"sealed"``, ``"put"``, ``"switch"``; None while there is none."""
        connection = self._end.connection
        return None if connection is None else connection.path

    @property
    def why(self) -> str | None:
        """Why that path, in words; None while there is no connection."""
        connection = self._end.connection
        return None if connection is None else connection.why

    @property
    def wait(self) -> str:
        """How a blocking call of this connection waits.

        ``"adaptive"`` (default) spins a little and then sleeps, ``"spin"`` never sleeps, ``"block"`` never
        spins.
        """
        return _WAITS[self._lane("wait").wait]

    @wait.setter
    def wait(self, mode: str) -> None:
        if mode not in _WAITS:
            raise ValueError(f"wait={mode!r}: adaptive, spin or block")
        self._lane("wait").wait = _WAITS.index(mode)

    def stats(self) -> Stats:
        """What went through this connection.

        Raises
        ------
        NotConnected
        """
        connection = self._lane("stats")
        return Stats(*connection.totals, connection.in_flight, connection.pending)

    def getsockname(self) -> Address:
        """``(domain, port)`` of this side; ``("", 0)`` before there is a port."""
        self._open()
        return self._end.local()

    def getpeername(self) -> Address:
        """``(domain, port)`` of the other side, as the broker says it is.

        Raises
        ------
        NotConnected
        """
        self._open()
        return self._end.peer()

    def __repr__(self) -> str:
        words = [f"isthmus.Socket {self._end.type.name}"] if hasattr(self, "_end") else ["isthmus.Socket"]
        if self._closed:
            words.append("closed")
        else:
            if self._end.bound is not None:
                words.append("{}:{}".format(*self._end.bound))
            if self._end.listening:
                words.append("listening")
            with contextlib.suppress(OSError):
                words.append("to {}:{}".format(*self._end.peer()))
            if self.path:
                words.append(f"by {self.path}")
        return f"<{' '.join(words)}>"

    def __getstate__(self) -> NoReturn:
        raise TypeError("cannot pickle an isthmus.Socket: a connection belongs to the process that made it")

    # ---- waiting

    def settimeout(self, value: float | None, /) -> None:
        """Wait at most `value` seconds; None for ever, 0 not at all."""
        self._timeout = _waiting_limit(value)
        self._limits()

    def gettimeout(self) -> float | None:
        """What `settimeout` said."""
        return self._timeout

    @property
    def timeout(self) -> float | None:
        """As `gettimeout`."""
        return self._timeout

    def setblocking(self, flag: bool, /) -> None:
        """``settimeout(None)`` or ``settimeout(0.0)``."""
        self.settimeout(None if flag else 0.0)

    def getblocking(self) -> bool:
        """Whether calls may wait at all."""
        return self._timeout != 0

    def _set_limit(self, receiving: bool, seconds: float | None) -> None:
        if receiving:
            self._recv_limit = seconds
        else:
            self._send_limit = seconds
        self._limits()

    def _limits(self) -> None:
        timeout = self._timeout
        self._recv_wait = self._recv_limit if timeout is None else timeout
        self._send_wait = self._send_limit if timeout is None else timeout

    # ---- options

    def getsockopt(self, level: int, optname: int, buflen: int = 0, /) -> Any:
        """As `socket.socket.getsockopt`; docs/reference/sockets.md has the table.

        Raises
        ------
        Unsupported
            Errno ``ENOPROTOOPT``: the option has no meaning here.
        """
        self._open()
        return get_option(self, level, optname, buflen)

    def setsockopt(self, level: int, optname: int, value: Any, optlen: int | None = None, /) -> None:
        """As `socket.socket.setsockopt`.

        ``SO_SNDBUF`` and ``SO_RCVBUF`` before `bind` or `connect` choose the size of this side's ring.

        Raises
        ------
        Unsupported
            Errno ``ENOPROTOOPT``: the option has no meaning here, or is read-only.
        """
        self._open()
        set_option(self, level, optname, value, optlen)

    # ---- files and descriptors

    def fileno(self) -> int:
        """A descriptor for `select`, `poll` and `epoll`; -1 when closed.

        It follows the socket: readable and writable exactly when receiving and sending would not wait. It
        carries no data. It is another one after `listen`.
        """
        if self._closed:
            return -1
        frame = sys._getframe(1)
        caller = _DATA_CALLERS.get((frame.f_globals.get("__name__", ""), frame.f_code.co_name))
        if caller is not None:
            _refuse_descriptor(caller)
        return self._end.fileno()

    def detach(self) -> NoReturn:
        """Refused: there is no kernel descriptor that carries the data.

        Raises
        ------
        Unsupported
            The socket stays as it is.
        """
        raise errors.Unsupported(
            errno.EOPNOTSUPP,
            "detach: no descriptor carries the data of an isthmus.Socket. Keep the object; for polling, "
            "fileno() is enough",
        )

    def dup(self) -> Self:
        """Another handle of the same socket, with the same time limit. The connection ends with the last."""
        self._open()
        with self._end.lock:
            self._end.handles += 1
        made = self._over(self._end, self._timeout)
        made._recv_limit, made._send_limit = self._recv_limit, self._send_limit
        made._limits()
        return made

    def get_inheritable(self) -> bool:
        """False: another program could do nothing with the descriptor."""
        return False

    def set_inheritable(self, inheritable: bool, /) -> None:
        """Only ``False``.

        Raises
        ------
        Unsupported
        """
        if inheritable:
            raise errors.Unsupported(
                errno.EOPNOTSUPP, "set_inheritable: a connection belongs to the process that made it"
            )

    def makefile(
        self,
        mode: str = "r",
        buffering: int | None = None,
        *,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> Any:
        """A file over a stream, as `socket.socket.makefile`. The socket stays open until it is closed too."""
        if not set(mode) <= {"r", "w", "b"}:
            raise ValueError(f"invalid mode {mode!r} (only r, w, b allowed)")
        self._open()
        writing = "w" in mode
        reading = "r" in mode or not writing
        binary = "b" in mode
        raw_mode: Any = ("r" if reading else "") + ("w" if writing else "")
        raw = _socket.SocketIO(cast(_socket.socket, self), raw_mode)
        self._io_refs += 1
        if buffering is None or buffering < 0:
            buffering = io.DEFAULT_BUFFER_SIZE
        if buffering == 0:
            if not binary:
                raise ValueError("unbuffered streams must be binary")
            return raw
        buffered: Any
        if reading and writing:
            buffered = io.BufferedRWPair(raw, raw, buffering)
        elif reading:
            buffered = io.BufferedReader(raw, buffering)
        else:
            buffered = io.BufferedWriter(raw, buffering)
        if binary:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline)
        text.mode = mode  # type: ignore[misc]
        return text

    def _decref_socketios(self) -> None:
        # Called by socket.SocketIO.
        if self._io_refs > 0:
            self._io_refs -= 1
        if self._closed:
            self.close()

    # ---- ending

    def shutdown(self, how: int, /) -> None:
        """End one direction or both.

        ``SHUT_WR``: the other side receives everything and then the end. ``SHUT_RD``: what has arrived can
        still be received, then comes the end; the other side can send no more. On a listening socket
        ``SHUT_RD`` gives the port back and ends `accept`.

        Raises
        ------
        NotConnected
        """
        self._open()
        if how not in (_socket.SHUT_RD, _socket.SHUT_WR, _socket.SHUT_RDWR):
            raise OSError(errno.EINVAL, f"shutdown: how={how!r}: SHUT_RD, SHUT_WR or SHUT_RDWR")
        self._end.shutdown(how != _socket.SHUT_WR, how != _socket.SHUT_RD)

    def close(self) -> None:
        """Close this handle; what was sent is delivered. Harmless when repeated.

        The connection ends when its last handle and the last file of `makefile` are closed. If data from the
        other side lies unread then, the other side gets `PeerReset`.
        """
        self._closed = True
        if self._io_refs <= 0:
            self._real_close()

    def _real_close(self) -> None:
        end = self._take_end()
        if end is not None:
            end.release()

    def _take_end(self) -> End | None:
        """The end, once: after that the methods at hand say that the socket is closed."""
        if self._recv is _closed:
            return None
        self._send = self._recv = self._recv_into = _closed
        return self._end

    def _open(self) -> None:
        if self._recv is _closed:
            _closed()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: _Raised, error: BaseException | None, trace: types.TracebackType | None) -> None:
        if not self._closed:
            self.close()

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self._io_refs = 0
            self.close()


def _rings(rings: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if rings is None or isinstance(rings, tuple):
        return rings
    return ring_sizes(rings)


def _refuse_descriptor(caller: str) -> NoReturn:
    if caller == "sendfile":
        import asyncio

        # asyncio then sends the file piece by piece.
        raise asyncio.SendfileNotAvailableError("no kernel descriptor carries the data of an isthmus.Socket")
    raise errors.Unsupported(
        errno.EOPNOTSUPP,
        "SSLContext.wrap_socket needs a kernel descriptor that carries the data; an isthmus.Socket has none. "
        "Use SSLContext.wrap_bio, or asyncio with ssl=",
    )
