"""redis-py, for a server under ``isthmus run`` in another domain.

redis.Redis(connection_pool=redis.ConnectionPool(Connection, host="cache", port=6379))
redis.asyncio.Redis(connection_pool=redis.asyncio.ConnectionPool(AsyncConnection, host="cache", port=6379))
"""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio.connection import Connection as _AsyncConnection
from redis.connection import Connection as _Connection

import isthmus

__all__ = ["AsyncConnection", "Connection"]


class Connection(_Connection):
    """A connection to a domain."""

    def _connect(self) -> Any:
        sock = isthmus.kernel_socket((self.host, int(self.port)), self.socket_connect_timeout)
        sock.settimeout(self.socket_timeout)
        return sock


class AsyncConnection(_AsyncConnection):
    """The same for `redis.asyncio`."""

    async def _connect(self) -> None:
        address = (str(self.host), int(self.port))
        sock = await asyncio.to_thread(isthmus.kernel_socket, address, self.socket_connect_timeout)
        sock.setblocking(False)
        self._reader, self._writer = await asyncio.open_connection(sock=sock)
