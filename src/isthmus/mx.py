"""MX: message passing by matching, between domains of a node and, through the card, between nodes.

    with mx.Endpoint(key=7) as endpoint:                    # in one container
        buffer = bytearray(1000)
        status = endpoint.irecv(0x12, buffer).wait()

    with mx.Endpoint() as endpoint:                         # in another
        peer = endpoint.connect("worker-7", 0, key=7)
        endpoint.isend(peer, 0x12, b"hello").wait()

A receive takes messages whose 64-bit match equals its own where its mask has ones, the oldest first. Messages
from one endpoint to one other are matched in the order in which they were sent. An endpoint makes progress by
itself, whether or not the program calls; any call may be made from any thread.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Generator
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from isthmus import _native, errors
from isthmus.node import attach
from isthmus.views import view_of

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

    from isthmus.node import Node

    #: One buffer, or several that are one message, or None for no bytes.
    Data = Buffer | list[Any] | tuple[Buffer, ...] | None

__all__ = ["ALL", "TIMEOUT", "Code", "Endpoint", "Peer", "Request", "Status", "buffer"]

#: The mask that ignores nothing.
ALL = 2**64 - 1
#: Before a peer of another node that does not answer is given up, unless the program says otherwise, seconds.
TIMEOUT = 500.0
#: Peers that are kept, so as not to be made anew for each message.
_PEERS_MAX = 1024


class Code(IntEnum):
    """How a request ended."""

    SUCCESS = 0
    TRUNCATED = 5
    CANCELLED = 6
    ENDPOINT_CLOSED = 8
    ENDPOINT_UNREACHABLE = 9
    BAD_SESSION = 10
    BAD_KEY = 11
    BAD_ENDPOINT = 12
    BAD_RDMAWIN = 13
    ABORTED = 14
    NO_RESOURCES = 16


class Peer:
    """An endpoint, as the endpoint that knows it calls it. Means nothing to any other.

    Attributes
    ----------
    nic : int
        Address of its card, 48 bits.
    endpoint : int
    session : int
        Tells it from those that had its number before.
    """

    __slots__ = ("_words", "endpoint", "nic", "session")

    def __init__(self, words: tuple[int, int], nic: int, endpoint: int, session: int) -> None:
        self._words = words
        self.nic = nic
        self.endpoint = endpoint
        self.session = session

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Peer) and self._words == other._words

    def __hash__(self) -> int:
        return hash(self._words)

    def __repr__(self) -> str:
        return f"<Peer {format_nic(self.nic)} endpoint {self.endpoint}>"


@dataclass(frozen=True)
class Status:
    """How a request ended, or what a probe found.

    Attributes
    ----------
    code : Code
    peer : Peer or None
        Who sent what was received; where a send went; whom a connect reached. None once it was forgotten.
    match : int
    length, transferred : int
        Bytes of the message, and bytes that fitted the receive.
    """

    code: Code
    peer: Peer | None
    match: int
    length: int
    transferred: int

    def check(self) -> Status:
        """Itself if the request succeeded.

        Raises
        ------
        MXError
            It did not, or the message was longer than the receive.
        """
        if self.code is Code.SUCCESS:
            return self
        words = self.code.name.lower().replace("_", " ")
        raise errors.mx_error(self.code, f"{words}: {self.transferred} of {self.length} bytes")


class Request:
    """Something asked of an endpoint that has not ended, or was not asked about since. Can be awaited."""

    __slots__ = ("_endpoint", "_id", "_status", "_timeout")

    def __init__(self, endpoint: Endpoint, id: int) -> None:
        self._endpoint = endpoint
        self._id = id
        self._status: Status | None = None
        self._timeout = endpoint._timeout

    @property
    def timeout(self) -> float | None:
        """Seconds that a peer of another node may leave this request without an answer; None: for ever.

        Then the peer is given up, and all that is under way with it ends (`Code.ENDPOINT_UNREACHABLE`). It is
        counted from when the request was made, and is the endpoint's unless set. Of a receive it counts
        while a message longer than 32 KiB is fetched, and only the receive ends. In a node nothing gets lost,
        and nothing is counted.

        Raises
        ------
        ValueError
            It is negative, or no number.
        MXError
            The request has ended, and was asked about.
        """
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float | None) -> None:
        self._endpoint._native.set_timeout(self._id, seconds)
        self._timeout = seconds

    def test(self) -> Status | None:
        """Its status if it has ended. Does not wait."""
        if self._status is None:
            self._take(self._endpoint._native.test(self._id))
        return self._status

    def wait(self, timeout: float | None = None) -> Status | None:
        """Its status, once it has ended; None after `timeout` seconds, or after `Endpoint.wake_up`."""
        if self._status is None:
            self._take(self._endpoint._native.wait(self._id, timeout))
        return self._status

    def cancel(self) -> bool:
        """Take back a receive that nothing has matched, or a connect without answer. False: it is too late.

        Raises
        ------
        MXError
            A send, or it has ended.
        """
        cancelled = self._endpoint._native.cancel(self._id)
        if cancelled:
            self._endpoint._requests.pop(self._id, None)
            self._status = Status(Code.CANCELLED, None, 0, 0, 0)
        return cancelled

    def forget(self) -> None:
        """Let it end unseen. Its buffers must stay unused until it has."""
        self._endpoint._native.forget(self._id)
        self._endpoint._requests.pop(self._id, None)

    def _take(self, told: _native._MxTold | None) -> None:
        if told is not None:
            self._endpoint._requests.pop(self._id, None)
            self._status = self._endpoint._status(told)

    def __await__(self) -> Generator[object, None, Status]:
        while (status := self.test()) is None:
            ending = self._endpoint._next_ending()
            # It may have ended before there was anybody to tell.
            if (status := self.test()) is not None:
                ending.cancel()
                break
            yield from ending.__await__()
        return status


class Endpoint:
    """An endpoint of this program's domain; a context manager that closes it.

    Parameters
    ----------
    id : int, optional
        Below 64; by default the lowest that is free.
    key : int, default 0
        What others must say to connect. It tells programs apart and keeps nobody out: rules do.
    context : (bits, shift), default (0, 0)
        Bits of the match that receives always name in full; messages that differ in them have queues of their
        own.
    wire : bool, default True
        Use the card, if the node has one, to reach other nodes.
    spin : bool, default False
        Never sleep while waiting.
    timeout : float or None, seconds, default 500
        A peer of another node that does not answer for so long is given up; None: never. Requests may have
        their own: `Request.timeout`.
    node : Node, optional
        Whose door to use; by default that of `isthmus.attach`.

    Raises
    ------
    MXError
        That endpoint is open, or all are (`code` 20).
    NoBroker, BrokerLost
        There is nobody to ask.
    """

    def __init__(
        self,
        id: int | None = None,
        *,
        key: int = 0,
        context: tuple[int, int] = (0, 0),
        wire: bool = True,
        spin: bool = False,
        timeout: float | None = TIMEOUT,
        node: Node | None = None,
    ) -> None:
        self._node = node or attach()
        self._native = _native.MxEndpoint(
            self._node.native,
            endpoint=id,
            key=key,
            context_bits=context[0],
            context_shift=context[1],
            wire=wire,
            wait=0 if spin else 1,
        )
        self._wire = wire
        self._timeout: float | None = TIMEOUT
        if timeout != TIMEOUT:
            self.timeout = timeout
        self._requests: dict[int, Request] = {}
        self._peers: dict[tuple[int, int], Peer] = {}
        #: Coroutines that wait for the next ending; the descriptor tells of it while there are any.
        self._endings: list[asyncio.Future[None]] = []
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def id(self) -> int:
        """Its number."""
        return self._native.id

    @property
    def nic(self) -> int:
        """Address of this domain's card, 48 bits."""
        return self._native.nic

    @property
    def has_card(self) -> bool:
        """Is there a way to other nodes?"""
        return self._native.has_card

    @property
    def lost(self) -> int:
        """Sends to other nodes that had ended, with their bytes copied, and were never acknowledged."""
        return self._native.lost

    @property
    def peer(self) -> Peer:
        """This endpoint, as a peer of itself."""
        peer = self._peer(self._native.address)
        assert peer is not None
        return peer

    @property
    def timeout(self) -> float | None:
        """Seconds that a peer of another node may leave a request without an answer; None: for ever.

        Of requests that are made from now on; see `Request.timeout`.
        """
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float | None) -> None:
        self._native.set_timeout(None, seconds)
        self._timeout = seconds

    # Connecting.

    def connect(self, to: str | int, endpoint: int = 0, key: int = 0, timeout: float | None = None) -> Peer:
        """Connect to an endpoint.

        Parameters
        ----------
        to : str or int
            A domain by name, of this node or else of another one ("shop", or "shop:0" as MX calls its
            card), or the address of a card ("02:1a:…", or 48 bits).
        endpoint : int, default 0
        key : int, default 0
            What that endpoint was opened with.
        timeout : float or None, seconds
            None: the endpoint's own, see `Request.timeout`.

        Raises
        ------
        MXError
            Nobody has it open (`code` 33), no domain has so many (32), the key is another (34), no card of
            that address is known (36), no answer came in time (30).
        RefusedByRule
            A rule of the policy forbids it, or none allows it.
        UnknownDomain
            There is no domain of that name. Where there is a card this takes 3 s: cards have to learn of
            each other.
        """
        words = self._native.connect(self._nic(to), endpoint, key, timeout)
        peer = self._peer(words)
        assert peer is not None
        return peer

    def iconnect(self, to: str | int, endpoint: int = 0, key: int = 0, match: int = 0) -> Request:
        """As `connect`, without waiting: the peer is in the request's status."""
        return self._request(self._native.iconnect(self._nic(to), endpoint, key, match))

    def disconnect(self, peer: Peer) -> None:
        """Forget a peer: whatever is under way with it ends. It is not told."""
        self._native.disconnect(peer._words)
        self._peers.pop(peer._words, None)

    def _nic(self, to: str | int) -> int:
        if isinstance(to, int):
            return to
        if to.count(":") == 5:
            return int(to.replace(":", ""), 16)
        try:
            return self._node.native.find_nic(0, to.removesuffix(":0"))[0]
        except errors.UnknownDomain:
            station = to if ":" in to else f"{to}:0"
            found = self._node.native.find_station(station) if self._wire else None
            if found is None:
                raise
            return found

    # Messages.

    def isend(self, peer: Peer, match: int, data: Data) -> Request:
        """Send a message; the buffers must stay as they are until it has ended.

        Parameters
        ----------
        peer : Peer
        match : int, 64 bits
        data : buffer, list of buffers or None
            Together the message, at most 4 GiB.
        """
        return self._request(self._native.isend(peer._words, _buffers(data), match, False))

    def issend(self, peer: Peer, match: int, data: Data) -> Request:
        """As `isend`; ends when the receiver has matched it."""
        return self._request(self._native.isend(peer._words, _buffers(data), match, True))

    def irecv(self, match: int, data: Data, mask: int = ALL) -> Request:
        """Receive a message into the buffers.

        Raises
        ------
        MXError
            `match` has bits outside of `mask` (`code` 14), or `mask` leaves the context open (42).
        """
        return self._request(self._native.irecv(match, mask, _buffers(data)))

    def wait_any(
        self, match: int | None = None, mask: int = ALL, timeout: float | None = None
    ) -> Request | None:
        """The request that ended first of those with such a match, or of all; None when the time is over.

        Its `test` and `wait` return at once.
        """
        found = self._native.wait_any(*_pattern(match, mask), timeout)
        if found is None:
            return None
        id, told = found
        status = self._status(told)
        request = self._requests.pop(id, None)
        if request is None:
            # The thread that makes it has its number, and has not noted it yet.
            own = Request(self, id)
            own._status = status
            request = self._requests.setdefault(id, own)
            if request is not own:
                del self._requests[id]
        request._status = status
        return request

    def test_any(self, match: int | None = None, mask: int = ALL) -> Request | None:
        """As `wait_any`, without waiting."""
        return self.wait_any(match, mask, 0)

    def peek(self, timeout: float | None = None) -> Request | None:
        """The request that ended first of those nobody has asked about; it stays."""
        id = self._native.peek(timeout)
        return None if id is None else self._requests.get(id)

    def probe(self, match: int | None = None, mask: int = ALL, timeout: float | None = None) -> Status | None:
        """The oldest message that no receive was posted for and whose match fits, or of all; it stays."""
        told = self._native.probe(*_pattern(match, mask), timeout)
        return None if told is None else self._status(told)

    def iprobe(self, match: int | None = None, mask: int = ALL) -> Status | None:
        """As `probe`, without waiting."""
        return self.probe(match, mask, 0)

    # The rest.

    def wake_up(self) -> None:
        """Every call that waits at this endpoint returns now, as if its time were over."""
        self._native.wake_up()

    def close(self) -> None:
        """Give the endpoint back. What was sent goes out first; other requests never end."""
        self._closed = True
        self._native.close()
        endings, self._endings = self._endings, []
        for ending in endings:
            if not ending.done():
                ending.set_exception(self._gone())
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._native.fileno())
        self._loop = None
        self._requests.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<mx.Endpoint {self.id} of {format_nic(self.nic)}>"

    def _request(self, id: int) -> Request:
        own = Request(self, id)
        request = self._requests.setdefault(id, own)
        if request is not own:
            # It has ended already, and another thread waited for any.
            del self._requests[id]
        return request

    def _peer(self, words: tuple[int, int]) -> Peer | None:
        peer = self._peers.get(words)
        if peer is None:
            known = self._native.decompose(words)
            if known is None:
                return None
            if len(self._peers) >= _PEERS_MAX:
                # Peers that are equal are as good as the same.
                self._peers.clear()
            peer = self._peers[words] = Peer(words, *known)
        return peer

    def _status(self, told: _native._MxTold) -> Status:
        code, words, match, length, transferred = told
        return Status(Code(code), self._peer(words), match, length, transferred)

    # asyncio.

    def _next_ending(self) -> asyncio.Future[None]:
        """Done when some request ends later."""
        if self._closed:
            raise self._gone()
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None and not self._loop.is_closed():
                raise errors.WrongState(0, "an endpoint belongs to one event loop at a time")
            self._loop, self._endings = loop, []
            loop.add_reader(self._native.fileno(), self._hear)
        while self._endings and self._endings[-1].done():
            self._endings.pop()
        if not self._endings:
            self._native.lower()
        # One for each: who cancels a coroutine cancels the future that it waits for.
        ending: asyncio.Future[None] = loop.create_future()
        self._endings.append(ending)
        return ending

    def _hear(self) -> None:
        endings, self._endings = self._endings, []
        if not endings:
            self._native.lower()
        for ending in endings:
            if not ending.done():
                ending.set_result(None)

    def _gone(self) -> errors.Closed:
        return errors.Closed(errno.EBADF, f"endpoint {self.id} was closed")


def buffer(size: int) -> memoryview:
    """Memory from which long messages reach peers of this node with one copy instead of two.

    Like a `bytearray` for all other purposes. Peers to whom something of it is sent may read all of it, at
    any time: keep nothing else there. Children of `os.fork` share it.

    Parameters
    ----------
    size : int, bytes
        At most 4 GiB. All of it is taken at once, in huge pages where the kernel gives them.

    Returns
    -------
    memoryview, shape (size,), bytes, writable
        Zeros. The memory is given back when nothing made from it is left.

    Raises
    ------
    ValueError
        `size` is negative, or more than 4 GiB.
    MemoryError
        There is not so much.
    """
    if not 0 <= size <= _native.WINDOW_MAX:
        raise ValueError(f"mx.buffer: {size} bytes; a buffer has 0 to {_native.WINDOW_MAX}")
    try:
        window = _native.MxWindow(size)
    except errors.IsthmusError as error:
        if error.errno in (errno.ENOMEM, errno.ENOSPC):
            raise MemoryError(f"mx.buffer: there are no {size} bytes") from None
        raise
    return view_of(window.place[0], size, window)


def format_nic(nic: int) -> str:
    """The address of a card as people write it."""
    return nic.to_bytes(6, "big").hex(":")


def _pattern(match: int | None, mask: int) -> tuple[int, int]:
    """Without a match everything fits."""
    return (0, 0) if match is None else (match, mask)


def _buffers(data: Data) -> list[Buffer]:
    if data is None:
        return []
    if isinstance(data, (list, tuple)):
        return list(data)
    return [data]
