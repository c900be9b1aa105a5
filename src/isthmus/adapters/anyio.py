"""anyio, on asyncio and trio: streams and listeners between domains, by kernel sockets."""

from __future__ import annotations

import functools

import anyio.to_thread
from anyio.abc import SocketListener, UNIXSocketStream

import isthmus
from isthmus.sockets.address import Address

__all__ = ["connect", "create_listener"]


async def connect(address: Address | str, timeout: float | None = None) -> UNIXSocketStream:
    """Connect to a port of a domain.

    Raises
    ------
    As `isthmus.kernel_socket`.
    """
    sock = await anyio.to_thread.run_sync(functools.partial(isthmus.kernel_socket, address, timeout))
    sock.setblocking(False)
    return await UNIXSocketStream.from_socket(sock)


async def create_listener(address: Address | str | int, backlog: int = 128) -> SocketListener:
    """Listen on a port of this domain; closing the listener gives the port back.

    Raises
    ------
    As `isthmus.kernel_server`.
    """
    server = await anyio.to_thread.run_sync(
        functools.partial(isthmus.kernel_server, address, backlog=backlog)
    )
    server.setblocking(False)
    return await SocketListener.from_socket(server)
