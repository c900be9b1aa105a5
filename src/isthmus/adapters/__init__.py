"""Libraries over Isthmus: one small module for each, imported only by who has the library.

A host name is a domain's name, an address of it, or its number. Where both lanes and kernel sockets would
do, lanes are tried first.
"""

from __future__ import annotations

import isthmus
from isthmus import errors

__all__ = ["connect"]


def connect(host: str, port: int, timeout: float | None = None) -> isthmus.Socket:
    """Connect to whatever listens there: over lanes, or by a kernel socket if it takes only those.

    Returns
    -------
    Socket
        Or `socket.socket`, which has all of its methods that a library can know of.

    Raises
    ------
    As `isthmus.create_connection`.
    """
    try:
        return isthmus.create_connection((host, port), timeout)
    except errors.PathUnavailable:
        return isthmus.kernel_socket((host, port), timeout)  # type: ignore[return-value]  # they look alike
