"""``multiprocessing.connection`` between domains: `Client` and `Listener` with the standard library's
connections.

The key is asked for as there; between domains the broker has already said who the other side is.
"""

from __future__ import annotations

import types
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import TYPE_CHECKING, Any

import isthmus
from isthmus.sockets.address import Address

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Client", "Listener"]


def Client(
    address: Address | str, authkey: bytes | None = None, timeout: float | None = None
) -> Connection[Any, Any]:
    """Connect to a `Listener`.

    Raises
    ------
    multiprocessing.AuthenticationError
        The keys differ.
    OSError
        As `isthmus.kernel_socket`.
    """
    sock = isthmus.kernel_socket(address, timeout)
    sock.setblocking(True)
    connection: Connection[Any, Any] = Connection(sock.detach())
    try:
        if authkey is not None:
            answer_challenge(connection, authkey)
            deliver_challenge(connection, authkey)
    except BaseException:
        connection.close()
        raise
    return connection


class Listener:
    """Listens on a port of this domain.

    Attributes
    ----------
    address : (str, int)
        Domain and port.
    """

    def __init__(
        self, address: Address | str | int = 0, backlog: int = 128, authkey: bytes | None = None
    ) -> None:
        self._server = isthmus.kernel_server(address, backlog=backlog)
        self._authkey = authkey
        self.address = (isthmus.attach().name, self._server.port)

    def accept(self) -> Connection[Any, Any]:
        """The next connection.

        Raises
        ------
        multiprocessing.AuthenticationError
            The keys differ. The listener listens on.
        """
        sock, _ = self._server.accept()
        connection: Connection[Any, Any] = Connection(sock.detach())
        try:
            if self._authkey is not None:
                deliver_challenge(connection, self._authkey)
                answer_challenge(connection, self._authkey)
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Listen no more."""
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()
