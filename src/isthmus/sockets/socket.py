"""`Socket`: lanes behind the methods of `socket.socket`.

Programs and libraries that are handed a socket object work with it unchanged. What differs from a kernel
socket, and why, is in docs/reference/sockets.md.

The hot methods (`send`, `sendall`, `recv`, `recv_into`) call a method of the engine's connection that is kept
at hand, and look at nothing else unless there are flags or errors.
"""

from __future__ import annotations

import contextlib
import errno
import io
import socket as _socket
import sys
import types
import warnings
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias, cast

from isthmus import errors
from isthmus.node import Node, attach

from .address import Address, read_address
from .ends import KINDS, End, Lanes, new_end
from .files import send_file
from .options import get_option, set_option

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

    from isthmus import _native
    from isthmus.views import RecvView, SendView

__all__ = ["Socket", "Stats"]

MSG_DONTWAIT = int(_socket.MSG_DONTWAIT)
MSG_PEEK = int(_socket.MSG_PEEK)
MSG_WAITALL = int(_socket.MSG_WAITALL)
MSG_TRUNC = int(_socket.MSG_TRUNC)
MSG_NOSIGNAL = int(_socket.MSG_NOSIGNAL)
MSG_CMSG_CLOEXEC = int(getattr(_socket, "MSG_CMSG_CLOEXEC", 0x40000000))
_SEND_FLAGS = MSG_DONTWAIT | MSG_NOSIGNAL
_RECV_FLAGS = MSG_DONTWAIT | MSG_NOSIGNAL | MSG_PEEK | MSG_WAITALL | MSG_TRUNC | MSG_CMSG_CLOEXEC

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


def _refuse_flags(call: str, flags: int, known: int) -> None:
    unknown = flags & ~known
    if unknown:
        names = [
            name
            for name in dir(_socket)
            if name.startswith("MSG_")
            and int(getattr(_socket, name)) & unknown == int(getattr(_socket, name)) > 0
        ]
        shown = ", ".join(names) or hex(unknown)
        raise errors.Unsupported(errno.EOPNOTSUPP, f"{call}: {shown} has no meaning on lanes; leave it out")


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


class Socket:
    """A socket between domains.

    Behaves like `socket.socket` of the same type; addresses are ``(domain, port)``.

    Parameters
    ----------
    type : {SOCK_STREAM, SOCK_SEQPACKET, SOCK_DGRAM}, default SOCK_STREAM
        ``SOCK_NONBLOCK`` and ``SOCK_CLOEXEC`` may be or-ed in.
    node : Node, optional
        The attachment; by default that of `isthmus.attach`.
    require : {"sealed", "put", "switch"}, optional
        Take this path or none. A listener closes connections that came another way.
    rings : int or (int, int), bytes, optional
        Size of this side's ring, or of the small ring a connection begins with and the large one it grows to.
        By default 32 KiB and 2 MiB.

    Raises
    ------
    NoBroker
        Nothing was opened.
    Unsupported
        No such type of socket.

    Notes
    -----
    Thread-safe; the GIL is released around anything that waits. Belongs to the process that made it: a child
    of `os.fork` makes its own.
    """

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

    # ---- connecting

    def bind(self, address: Address | str, /) -> None:
        """Lease a port.

        Parameters
        ----------
        address : (domain, port) or "domain:port"
            ``("", port)``: whomever a rule lets in may connect. ``("worker-7", port)``: that domain alone
            may; on the same port it is heard in front of a socket for anybody. Port 0 lets the broker choose.

        Raises
        ------
        PortInUse, WildcardNeedsRule, UnknownDomain, LimitReached, WrongState
            Nothing was leased.
        """
        self._open()
        self._end.bind(*read_address(address, "bind"))

    def listen(self, backlog: int = 128, /) -> None:
        """Take connections.

        Parameters
        ----------
        backlog : int, default 128
            So many may wait for `accept`; further ones are refused (`BacklogFull`).
        """
        self._open()
        self._end.listen(backlog)

    def accept(self) -> tuple[Self, Address]:
        """The next connection, and who it comes from.

        Raises
        ------
        TimedOut, WouldBlock
            None came.
        WrongState
            The socket does not listen.
        """
        self._open()
        end = self._end
        try:
            connection = end.accept(self._recv_wait)
        except errors.TimedOut as error:
            self._raise(error)
        made = Lanes(end.node._again(), end.kind, end.require, end.rings, connection)
        return self._over(made, _socket.getdefaulttimeout()), made.peer()

    def connect(self, address: Address | str, /) -> None:
        """Connect. Complete when the connection is in the listener's backlog.

        A datagram socket gets an address to send to and to hear from.

        Parameters
        ----------
        address : (domain, port) or "domain:port"
            The domain by name or number.

        Raises
        ------
        NobodyListens, BacklogFull, RefusedByRule, UnknownDomain, LimitReached, WrongKind, PathUnavailable
            At once. The socket can connect elsewhere.
        WouldBlock
            Non-blocking: it is under way. The descriptor becomes writable when it is decided, and
            ``getsockopt(SOL_SOCKET, SO_ERROR)`` says how.
        TimedOut
            The socket can connect again.
        """
        self._open()
        host, port = read_address(address, "connect")
        try:
            self._end.connect(host, port, self._send_wait)
        except errors.TimedOut as error:
            self._raise(error)

    def connect_ex(self, address: Address | str, /) -> int:
        """As `connect`; returns 0 or an errno instead of raising."""
        try:
            self.connect(address)
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    # ---- sending

    def send(self, data: Buffer, flags: int = 0, /) -> int:
        """Send bytes of the stream, or one message.

        Parameters
        ----------
        data : buffer, shape (n,), C-contiguous
            Borrowed until this returns.
        flags : int
            ``MSG_DONTWAIT``, ``MSG_NOSIGNAL``.

        Returns
        -------
        int, bytes
            All of them when blocking; what fitted when non-blocking or when the time ran out.

        Raises
        ------
        WouldBlock, TimedOut
            Nothing was sent.
        MessageTooLarge
            Nothing was sent; `Socket.connection.message_max` is the longest.
        PeerClosed, PeerReset, ConnectionCut
            Nothing was sent, and nothing will be.
        """
        wait = self._send_wait
        if flags:
            wait = self._send_flags("send", flags)
        try:
            return self._send(data, wait)  # type: ignore[no-any-return]
        except errors.IsthmusError as error:
            return self._sent(error)

    def sendall(self, data: Buffer, flags: int = 0, /) -> None:
        """Send all of `data`.

        Raises
        ------
        As `send`; ``error.done`` bytes of a stream are in the lane and will be received.
        """
        wait = self._send_wait
        if flags:
            wait = self._send_flags("sendall", flags)
        try:
            self._send(data, wait)
        except errors.TimedOut as error:
            self._raise(error)

    def sendto(self, data: Buffer, *args: Any) -> int:
        """``sendto(data, address)`` or ``sendto(data, flags, address)``: send one message there.

        Raises
        ------
        NobodyListens, RefusedByRule, UnknownDomain
            Nothing was sent.
        AlreadyConnected
            Streams and packets go to their other side only.
        """
        if len(args) not in (1, 2):
            raise TypeError(f"sendto() takes 2 or 3 arguments ({len(args) + 1} given)")
        flags = args[0] if len(args) == 2 else 0
        return self.sendmsg([data], (), flags, args[-1])

    def sendmsg(
        self,
        buffers: Iterable[Buffer],
        ancdata: Iterable[Any] = (),
        flags: int = 0,
        address: Address | str | None = None,
        /,
    ) -> int:
        """Send buffers one after the other: as bytes of the stream, or together as one message.

        Parameters
        ----------
        buffers : iterable of buffers
            Any number, of any length.
        ancdata
            Must be empty: descriptors and credentials do not cross.

        Returns
        -------
        int, bytes
        """
        wait = self._send_flags("sendmsg", flags) if flags else self._send_wait
        self._open()
        for item in ancdata:
            raise errors.Unsupported(
                errno.EOPNOTSUPP, f"sendmsg: ancillary data {item!r}: only bytes cross between domains"
            )
        to = None if address is None else read_address(address, "sendmsg")
        try:
            return self._end.sendmsg(list(buffers), wait, to)
        except errors.IsthmusError as error:
            return self._sent(error)

    def send_view(self, size: int) -> SendView:
        """Fill what is to be sent where it lies in the ring, without a copy.

        ``with sock.send_view(size) as view:`` gives a writable `memoryview` of `size` bytes, which are sent
        at the end of the block, as bytes of the stream or as one message; nothing is if it raises. See
        `isthmus.views`.

        Parameters
        ----------
        size : int, bytes
            At most `Socket.connection.message_max`, for streams too.
        """
        from isthmus.views import SendView

        if size < 0:
            raise ValueError("negative size in send_view")
        return SendView(self._lane("send_view"), size, self._send_wait)

    def sendfile(self, file: IO[bytes], offset: int = 0, count: int | None = None) -> int:
        """Send a file until its end, or `count` bytes of it.

        A regular file is mapped and goes from the page cache into the ring without another copy.

        Parameters
        ----------
        file : binary file
            Its position is moved behind what was sent.
        offset : int, bytes
        count : int, bytes, optional

        Returns
        -------
        int, bytes

        Raises
        ------
        ValueError
            The socket is non-blocking or not a stream, the file is open in text mode.
        """
        if self._end.kind != "stream":
            raise ValueError("only SOCK_STREAM type sockets are supported")
        if self._timeout == 0:
            raise ValueError("non-blocking sockets are not supported")
        if "b" not in getattr(file, "mode", "b"):
            raise ValueError("file should be opened in binary mode")
        if count is not None and (not isinstance(count, int) or count <= 0):
            raise ValueError(f"count must be a positive integer (got {count!r})")
        return send_file(self, file, offset, count)

    def _send_flags(self, call: str, flags: int) -> float | None:
        _refuse_flags(call, flags, _SEND_FLAGS)
        return 0.0 if flags & MSG_DONTWAIT else self._send_wait

    def _sent(self, error: errors.IsthmusError) -> int:
        """Sending stopped early: so many bytes went, or nothing did and the error stands."""
        if error.done:
            return error.done
        self._raise(error)

    def _raise(self, error: errors.IsthmusError) -> NoReturn:
        if isinstance(error, errors.TimedOut) and self._timeout is None:
            # SO_RCVTIMEO and SO_SNDTIMEO end like this.
            raise errors.WouldBlock(errno.EAGAIN, "the socket's time limit ran out") from None
        raise error

    # ---- receiving

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Receive at most `bufsize` bytes of the stream, or one message cut to `bufsize`.

        Parameters
        ----------
        bufsize : int, bytes
        flags : int
            ``MSG_PEEK``, ``MSG_WAITALL``, ``MSG_DONTWAIT``, ``MSG_TRUNC``, ``MSG_NOSIGNAL``.

        Returns
        -------
        bytes
            Empty at the end of the stream.

        Raises
        ------
        WouldBlock, TimedOut
            Nothing came.
        PeerReset, ConnectionCut, PeerFault
            Nothing more will come; what came before was received before.
        """
        if flags:
            return self._recv_flags(bufsize, flags)
        try:
            return self._recv(bufsize, self._recv_wait)[0]  # type: ignore[no-any-return]
        except errors.TimedOut as error:
            self._raise(error)
        except OverflowError:
            raise ValueError("negative buffersize in recv") from None

    def recv_into(self, buffer: Buffer, nbytes: int = 0, flags: int = 0) -> int:
        """Receive into `buffer`: what there is of the stream, or one message cut to what fits.

        One copy: from the ring into `buffer`.

        Parameters
        ----------
        buffer : writable buffer, shape (n,), C-contiguous
            Filled from its beginning.
        nbytes : int, bytes, default 0
            Room to use; 0 for all.

        Returns
        -------
        int, bytes
            0 at the end of the stream. With ``MSG_TRUNC`` the length of the message, even if it was cut.
        """
        if nbytes or flags:
            return self._recv_part("recv_into", buffer, nbytes, flags)[0]
        try:
            return self._recv_into(buffer, self._recv_wait)[0]  # type: ignore[no-any-return]
        except errors.TimedOut as error:
            self._raise(error)

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Address]:
        """As `recv`, and who sent it."""
        if bufsize < 0:
            raise ValueError("negative buffersize in recvfrom")
        if self._end.kind != "datagram":
            return self.recv(bufsize, flags), self._end.peer()
        room = bytearray(bufsize)
        stored, _, _, sender = self._recvmsg("recvfrom", [room], flags)
        return bytes(memoryview(room)[:stored]), sender

    def recvfrom_into(self, buffer: Buffer, nbytes: int = 0, flags: int = 0) -> tuple[int, Address]:
        """As `recv_into`, and who sent it."""
        return self._recv_part("recvfrom_into", buffer, nbytes, flags)

    def recvmsg(
        self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[bytes, list[Any], int, Address]:
        """As `recvfrom`, with the message's flags (``MSG_TRUNC`` if it was cut) and no ancillary data."""
        if bufsize < 0:
            raise ValueError("negative buffer size in recvmsg()")
        room = bytearray(bufsize)
        stored, _, seen, sender = self._recvmsg("recvmsg", [room], flags)
        return bytes(memoryview(room)[: min(stored, bufsize)]), [], seen, sender

    def recvmsg_into(
        self, buffers: Iterable[Buffer], ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[int, list[Any], int, Address]:
        """As `recvmsg`, into buffers that are filled one after the other."""
        stored, whole, seen, sender = self._recvmsg("recvmsg_into", list(buffers), flags)
        return whole if flags & MSG_TRUNC else stored, [], seen, sender

    def recv_view(self) -> RecvView:
        """Look at the next piece of the stream, or the next message, where it lies in the ring.

        ``with sock.recv_view() as view:`` gives a read-only `memoryview` without a copy, empty at the end.
        See `isthmus.views`.
        """
        from isthmus.views import RecvView

        return RecvView(self._lane("recv_view"), self._recv_wait)

    def _recv_flags(self, bufsize: int, flags: int) -> bytes:
        wait = self._receive_wait("recv", flags)
        if bufsize < 0:
            raise ValueError("negative buffersize in recv")
        try:
            if flags & MSG_WAITALL and self._end.kind == "stream":
                room = bytearray(bufsize)
                return bytes(memoryview(room)[: self._receive_all(room, wait)])
            return self._recv(bufsize, wait, bool(flags & MSG_PEEK))[0]  # type: ignore[no-any-return]
        except errors.TimedOut as error:
            self._raise(error)

    def _recv_part(self, call: str, buffer: Buffer, nbytes: int, flags: int) -> tuple[int, Address]:
        with memoryview(buffer).cast("B") as room:
            if nbytes < 0:
                raise ValueError(f"negative buffersize in {call}")
            if nbytes > len(room):
                raise ValueError("buffer too small for requested bytes")
            with room[: nbytes or len(room)] as part:
                stored, whole, _, sender = self._recvmsg(call, [part], flags)
        return whole if flags & MSG_TRUNC else stored, sender

    def _recvmsg(self, call: str, into: list[Any], flags: int) -> tuple[int, int, int, Address]:
        self._open()
        wait = self._receive_wait(call, flags)
        try:
            if flags & MSG_WAITALL and self._end.kind == "stream":
                stored = 0
                for part in into:
                    got = self._receive_all(part, wait)
                    stored += got
                    if got < memoryview(part).nbytes:
                        break
                return stored, stored, 0, self._end.peer()
            stored, whole, sender = self._end.recvmsg_into(into, wait, bool(flags & MSG_PEEK))
        except errors.TimedOut as error:
            self._raise(error)
        cut = MSG_TRUNC if whole > stored and self._end.kind != "stream" else 0
        return stored, whole if self._end.kind != "stream" else stored, cut, sender

    def _receive_all(self, room: Any, wait: float | None) -> int:
        try:
            return self._end.recv_exactly_into(room, wait)
        except errors.IsthmusError as error:
            if error.done:
                return error.done
            raise

    def _receive_wait(self, call: str, flags: int) -> float | None:
        _refuse_flags(call, flags, _RECV_FLAGS)
        if flags & MSG_PEEK and flags & MSG_WAITALL and self._end.kind == "stream":
            raise errors.Unsupported(
                errno.EOPNOTSUPP,
                f"{call}: MSG_PEEK with MSG_WAITALL: a look does not wait for more; leave one out",
            )
        return 0.0 if flags & MSG_DONTWAIT else self._recv_wait

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
    from .options import ring_sizes

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
