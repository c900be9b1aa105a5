"""`Socket`: lanes behind the methods of `socket.socket`.

Programs and libraries that are handed a socket object work with it unchanged. What differs from a kernel
socket, and why, is in docs/reference/sockets.md.

The hot methods (`send`, `sendall`, `recv`, `recv_into`) call a method of the engine's connection that is kept
at hand, and look at nothing else unless there are flags or errors. What a socket is besides (its names, time
limits, options, descriptor and life) is in :mod:`.handle`.
"""

from __future__ import annotations

import errno
import socket as _socket
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Any, NoReturn

from isthmus import errors

from .address import Address, read_address
from .ends import Lanes
from .files import send_file
from .handle import Handle

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

    from isthmus.views import RecvView, SendView

__all__ = ["Socket"]

MSG_DONTWAIT = int(_socket.MSG_DONTWAIT)
MSG_PEEK = int(_socket.MSG_PEEK)
MSG_WAITALL = int(_socket.MSG_WAITALL)
MSG_TRUNC = int(_socket.MSG_TRUNC)
MSG_NOSIGNAL = int(_socket.MSG_NOSIGNAL)
MSG_CMSG_CLOEXEC = int(getattr(_socket, "MSG_CMSG_CLOEXEC", 0x40000000))
_SEND_FLAGS = MSG_DONTWAIT | MSG_NOSIGNAL
_RECV_FLAGS = MSG_DONTWAIT | MSG_NOSIGNAL | MSG_PEEK | MSG_WAITALL | MSG_TRUNC | MSG_CMSG_CLOEXEC


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


class Socket(Handle):
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

    __slots__ = ()

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
