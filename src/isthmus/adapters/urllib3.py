"""urllib3 and requests.

pool = PoolManager()
pool.request("GET", "http://web:8000/")

session = requests.Session()
session.mount("http://", Adapter())
"""

from __future__ import annotations

from typing import Any

import urllib3
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.exceptions import NewConnectionError

from isthmus import adapters

__all__ = ["Connection", "ConnectionPool", "PoolManager"]


class Connection(HTTPConnection):
    """An HTTP connection to a domain."""

    def _new_conn(self) -> Any:
        timeout = self.timeout if isinstance(self.timeout, (int, float)) else None
        try:
            return adapters.connect(self._dns_host, int(self.port or 80), timeout)
        except OSError as error:
            raise NewConnectionError(self, f"Failed to establish a new connection: {error}") from error


class ConnectionPool(HTTPConnectionPool):
    """Connections to one port of a domain."""

    ConnectionCls = Connection


class PoolManager(urllib3.PoolManager):
    """``http://`` goes to domains. ``https://`` is refused: nothing leaves the node, TLS or not."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.pool_classes_by_scheme = {"http": ConnectionPool}
        # What has no key is what urllib3 calls an unknown scheme.
        self.key_fn_by_scheme = {"http": self.key_fn_by_scheme["http"]}


def __getattr__(name: str) -> Any:
    if name != "Adapter":
        raise AttributeError(name)
    from requests.adapters import HTTPAdapter

    class Adapter(HTTPAdapter):
        """For `requests.Session.mount`."""

        def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **more: Any) -> None:
            self.poolmanager = PoolManager(num_pools=connections, maxsize=maxsize, block=block, **more)

    globals()["Adapter"] = Adapter
    return Adapter
