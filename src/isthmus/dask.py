"""Dask over lanes: the communication back end ``isthmus://`` of `distributed`.

Found by its entry point: ``LocalCluster(protocol="isthmus://")``, ``dask worker isthmus://scheduler:8786``
in the container of a domain. An address is ``isthmus://domain:port``; where a listener is to listen, the
domain is this program's own whatever it is called.

A message is a stream of bytes: the number of frames and the length of each, u64 little-endian, then the
frames. The same in both directions, between programs of one version of `distributed`, as with its own back
ends.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import dask.config
from distributed.comm.addressing import parse_host_port, unparse_host_port
from distributed.comm.core import BaseListener, Comm, CommClosedError, Connector
from distributed.comm.registry import Backend
from distributed.comm.utils import from_frames, to_frames
from distributed.protocol.utils import host_array
from distributed.utils import ensure_memoryview, nbytes

from isthmus import aio, errors
from isthmus.node import Node, attach

__all__ = ["IsthmusBackend", "IsthmusComm", "IsthmusConnector", "IsthmusListener"]

logger = logging.getLogger(__name__)

PREFIX = "isthmus://"
_COUNT = struct.Struct("<Q")
#: Frames of one message; more are nonsense.
FRAMES_MAX = 1 << 24
#: Frames up to this size go out together with their neighbours.
SMALL = 1 << 16


class IsthmusComm(Comm):
    """A connection over lanes. One task reads while another writes."""

    def __init__(self, connection: aio.Connection, local: str, peer: str, deserialize: bool = True) -> None:
        # First: the base class keeps every comm in a list whose members are shown.
        self._connection: aio.Connection | None = connection
        self._local_addr = local
        self._peer_addr = peer
        super().__init__(deserialize=deserialize)

    @property
    def local_address(self) -> str:
        return self._local_addr

    @property
    def peer_address(self) -> str:
        return self._peer_addr

    @property
    def same_host(self) -> bool:
        """Always: a lane never leaves the node. So nothing is compressed."""
        return True

    @property
    def extra_info(self) -> dict[str, str]:
        connection = self._connection
        return {} if connection is None else {"path": connection.path, "why": connection.why}

    async def read(self, deserializers: Any = None) -> Any:
        connection = self._open()
        try:
            (count,) = _COUNT.unpack(await connection.recv_exactly(_COUNT.size))
            if count > FRAMES_MAX:
                raise EOFError(f"{count} frames")
            lengths = struct.unpack(f"<{count}Q", await connection.recv_exactly(count * _COUNT.size))
            frames = [await _frame(connection, length) for length in lengths]
        except (OSError, EOFError) as error:
            raise self._lost(error) from error
        except BaseException:
            # What was read of the message is lost, and what follows would not be understood.
            self.abort()
            raise
        try:
            return await from_frames(
                frames,
                deserialize=self.deserialize,
                deserializers=deserializers,
                allow_offload=self.allow_offload,
            )
        except EOFError as error:
            self.abort()
            raise CommClosedError(f"in {self}: a message was cut short") from error

    async def write(self, msg: Any, serializers: Any = None, on_error: str = "message") -> int:
        self._open()
        frames = await to_frames(
            msg,
            allow_offload=self.allow_offload,
            serializers=serializers,
            on_error=on_error,
            context={"sender": self.local_info, "recipient": self.remote_info, **self.handshake_options},
        )
        connection = self._open()
        lengths = [nbytes(frame) for frame in frames]
        try:
            for piece in _pieces(frames, lengths):
                await connection.send(piece)
        except OSError as error:
            raise self._lost(error) from error
        except BaseException:
            # Nobody knows where the next message would begin.
            self.abort()
            raise
        return sum(lengths)

    async def close(self) -> None:
        """Finish: what was written is delivered."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def abort(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    def closed(self) -> bool:
        connection = self._connection
        return connection is None or _is_over(connection)

    def _open(self) -> aio.Connection:
        if self._connection is None:
            raise CommClosedError(f"in {self}: it was closed")
        return self._connection

    def _lost(self, error: BaseException) -> CommClosedError:
        text = "the other side closed it" if isinstance(error, asyncio.IncompleteReadError) else str(error)
        self.abort()
        return CommClosedError(f"in {self}: {text}")


def _is_over(connection: aio.Connection) -> bool:
    """Whether the other side has ended it and everything was read. Takes nothing, and does not wait."""
    native = connection.native
    if native.closed:
        return True
    if not native.poll()[0]:
        return False
    try:
        return not native.recv(1, 0.0, True)[0]
    except errors.WouldBlock:
        return False
    except OSError:
        return True


async def _frame(connection: aio.Connection, length: int) -> Any:
    frame = host_array(length)
    view = memoryview(frame)
    got = 0
    while got < length:
        n = await connection.recv_into(view[got:])
        if n == 0:
            raise EOFError(f"{length - got} bytes of a frame are missing")
        got += n
    return frame


def _pieces(frames: list[Any], lengths: list[int]) -> list[Any]:
    """What to send: the head, small frames together, and large ones as they are."""
    pieces: list[Any] = []
    small = bytearray(struct.pack(f"<{len(frames) + 1}Q", len(frames), *lengths))
    for frame, length in zip(frames, lengths, strict=True):
        if length <= SMALL:
            small += ensure_memoryview(frame)
            if len(small) < 2 * SMALL:
                continue
        if small:
            pieces.append(small)
            small = bytearray()
        if length > SMALL:
            pieces.append(ensure_memoryview(frame))
    if small:
        pieces.append(small)
    return pieces


class IsthmusConnector(Connector):
    async def connect(self, address: str, deserialize: bool = True, **_: Any) -> IsthmusComm:
        host, port = parse_host_port(address)
        node = attach()
        try:
            connection = await aio.connect((_own_name(host, node), port), node=node)
        except errors.IsthmusError as error:
            raise CommClosedError(f"{PREFIX}{address}: {error}") from error
        local = unparse_host_port(node.name, connection.native.port)
        return IsthmusComm(
            connection, PREFIX + local, PREFIX + unparse_host_port(*connection.peer), deserialize
        )


class IsthmusListener(BaseListener):
    #: Workers make an address of it.
    prefix = PREFIX

    def __init__(
        self,
        address: str,
        comm_handler: Callable[[Comm], Awaitable[None] | None],
        deserialize: bool = True,
        allow_offload: bool = True,
        **_: Any,
    ) -> None:
        super().__init__()
        self._port = parse_host_port(address, 0)[1]
        self._handler = comm_handler
        self._deserialize = deserialize
        self._allow_offload = allow_offload
        self._node: Node | None = None
        self._listener: aio.Listener | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        backlog = int(dask.config.get("distributed.comm.socket-backlog"))
        self._node = attach()
        self._listener = await aio.listen(self._port, backlog=backlog, node=self._node)
        self._begin(self._accept(self._listener, self.listen_address))

    def stop(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    @property
    def listen_address(self) -> str:
        if self._listener is None or self._node is None:
            raise ValueError("a listener that was not started has no address")
        return PREFIX + unparse_host_port(self._node.name, self._listener.port)

    @property
    def contact_address(self) -> str:
        return self.listen_address

    def _begin(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: aio.Listener, local: str) -> None:
        async for connection in listener:
            peer = PREFIX + unparse_host_port(*connection.peer)
            comm = IsthmusComm(connection, local, peer, self._deserialize)
            comm.allow_offload = self._allow_offload
            self._begin(self._serve(comm))

    async def _serve(self, comm: IsthmusComm) -> None:
        try:
            await self.on_connection(comm)
        except CommClosedError:
            logger.info("Connection from %s closed before handshake completed", comm.peer_address)
            return
        handled = self._handler(comm)
        if handled is not None:
            await handled


class IsthmusBackend(Backend):
    def get_connector(self) -> IsthmusConnector:
        return IsthmusConnector()

    def get_listener(
        self, loc: str, handle_comm: Callable[[Comm], Awaitable[None] | None], deserialize: bool, **more: Any
    ) -> IsthmusListener:
        return IsthmusListener(loc, handle_comm, deserialize, **more)

    def get_address_host(self, loc: str) -> str:
        return str(parse_host_port(loc, 0)[0])

    def get_address_host_port(self, loc: str) -> tuple[str, int]:
        host, port = parse_host_port(loc)
        return str(host), int(port)

    def resolve_address(self, loc: str) -> str:
        host, port = parse_host_port(loc, 0)
        return str(unparse_host_port(_own_name(host, attach()), port or None))

    def get_local_address_for(self, loc: str) -> str:
        return attach().name


def _own_name(host: str, node: Node) -> str:
    """The domain that an address means: this one, where it says no more than "here"."""
    here = host in ("", "localhost", "0.0.0.0", "::", "::1") or host.startswith("127.")
    return node.name if here else host
