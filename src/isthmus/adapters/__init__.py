"""Libraries over Isthmus: one small module for each, imported only by who has the library.

A host name is a domain's name, an address of it, or its number. Where both lanes and kernel sockets would
do, lanes are tried first.
"""

from __future__ import annotations

import socket

import isthmus
from isthmus import errors

__all__ = ["connect"]


def connect(host: str, port: int, timeout: float | None = None) -> isthmus.Socket | socket.socket:
    """Connect to whatever listens there: over lanes, or by a kernel socket if it takes only those.

    Returns
    -------
    Socket or socket.socket
        They have the same methods, as far as a library can know of them.

    Raises
    ------
    As `isthmus.create_connection`.
    """
    try:
        return isthmus.create_connection((host, port), timeout)
    except errors.PathUnavailable:
        return isthmus.kernel_socket((host, port), timeout)
