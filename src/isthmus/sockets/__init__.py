"""Sockets between domains: `Socket`, and the two functions that make one."""

from __future__ import annotations

import socket as _socket
from typing import TYPE_CHECKING

from .address import Address, read_address
from .handle import Stats
from .socket import Socket

if TYPE_CHECKING:
    from isthmus.node import Node

__all__ = ["Address", "Socket", "Stats", "create_connection", "create_server"]


class _Default:
    """The default time limit: that of `socket.getdefaulttimeout`."""

    def __repr__(self) -> str:
        return "socket.getdefaulttimeout()"


_DEFAULT = _Default()


def create_connection(
    address: Address | str,
    timeout: float | _Default | None = _DEFAULT,
    *,
    type: int = _socket.SOCK_STREAM,
    require: str | None = None,
    rings: int | tuple[int, int] | None = None,
    node: Node | None = None,
) -> Socket:
    """Connect to a port of a domain.

    Parameters
    ----------
    address : ("worker-7", 9000) or "worker-7:9000"
        The domain by name or number.
    timeout : float or None, seconds
        For connecting and for everything after; by default that of `socket.getdefaulttimeout`.
    type : {SOCK_STREAM, SOCK_SEQPACKET, SOCK_DGRAM}, default SOCK_STREAM
    require : {"sealed", "put", "switch"}, optional
        Take this path or none.
    rings : int or (int, int), bytes, optional
        Size of this side's ring; see `Socket`.
    node : Node, optional
        The attachment; by default that of `isthmus.attach`.

    Returns
    -------
    Socket
        Connected: it is in the listener's backlog.

    Raises
    ------
    NobodyListens, BacklogFull, RefusedByRule, UnknownDomain, LimitReached, WrongKind, PathUnavailable
        Refused, at once. Nothing was opened.
    NoBroker, BrokerLost, TimedOut
        Nothing was opened.
    """
    sock = Socket(type, node=node, require=require, rings=rings)
    try:
        if not isinstance(timeout, _Default):
            sock.settimeout(timeout)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def create_server(
    address: Address | str | int,
    *,
    type: int = _socket.SOCK_STREAM,
    backlog: int = 128,
    require: str | None = None,
    rings: int | tuple[int, int] | None = None,
    node: Node | None = None,
) -> Socket:
    """Lease a port and listen on it.

    Parameters
    ----------
    address : ("", 9000), ":9000"-like text, or the port alone
        A domain in front of the port lets that domain in and nobody else. Port 0 lets the broker choose;
        `Socket.getsockname` says which it was.
    type : {SOCK_STREAM, SOCK_SEQPACKET, SOCK_DGRAM}, default SOCK_STREAM
        A datagram socket is bound; it needs no listening.
    backlog : int, default 128
        Connections that may wait for `Socket.accept`; further ones are refused.
    require, rings, node
        As in `create_connection`, for every connection accepted.

    Returns
    -------
    Socket
        Listening.

    Raises
    ------
    PortInUse, WildcardNeedsRule, UnknownDomain, LimitReached, NoBroker, BrokerLost
        Nothing was leased.
    """
    if isinstance(address, int):
        address = ("", address)
    elif isinstance(address, str) and address.startswith(":"):
        address = ("", int(address[1:]))
    sock = Socket(type, node=node, require=require, rings=rings)
    try:
        sock.bind(read_address(address, "create_server"))
        if sock.type != _socket.SOCK_DGRAM:
            sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock
