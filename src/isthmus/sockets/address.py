"""Addresses as sockets take and give them: ``(domain, port)``."""

from __future__ import annotations

from typing import TypeAlias

from isthmus import _native

__all__ = ["PORT_MAX", "Address", "read_address"]

Address: TypeAlias = tuple[str, int]
PORT_MAX = 2**32 - 1


def read_address(address: object, call: str) -> Address:
    """What a caller meant: ``(domain, port)`` or ``"domain:port"``; the domain by name or by number.

    Raises
    ------
    TypeError, ValueError, OverflowError
        Says what is wrong with it, as ``socket`` does.
    """
    if isinstance(address, str):
        host, port = _native.parse_address(address)
        return str(host), port
    if not isinstance(address, (tuple, list)) or len(address) != 2:
        raise TypeError(f"{call}: an address is (domain, port) or 'domain:port', not {address!r}")
    host, port = address
    if isinstance(host, bool) or not isinstance(host, (str, int)):
        raise TypeError(f"{call}: a domain is a name or a number, not {host!r}")
    try:
        number = port.__index__()
    except AttributeError:
        raise TypeError(f"{call}: a port is an integer, not {port!r}") from None
    if not 0 <= number <= PORT_MAX:
        raise OverflowError(f"{call}: port {number}: ports are 0 to {PORT_MAX}")
    if isinstance(host, int):
        host = "" if host in (-1, _native.ANYBODY) else str(host)
    return host, number
