"""Kernel sockets between domains: real descriptors, for whatever insists on one.

`kernel_socket` and `kernel_server` give sockets of the standard library's own class, of the family
``AF_UNIX`` between containers and ``AF_VSOCK`` in guests. Event loops in C, TLS, gRPC and database
libraries take them as they are. The kernel copies their bytes; `isthmus.Socket` is faster, and for those
who can use it.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import weakref
from typing import TYPE_CHECKING

from isthmus import _native
from isthmus.node import find_door, program_name
from isthmus.sockets.address import read_address

if TYPE_CHECKING:
    from isthmus._native import _Kind
    from isthmus.node import Node
    from isthmus.sockets.address import Address

__all__ = ["kernel_server", "kernel_socket"]

_KINDS: dict[int, _Kind] = {socket.SOCK_STREAM: "stream", socket.SOCK_SEQPACKET: "seqpacket"}

_lock = threading.Lock()
#: One attachment for each door, apart from that of lanes; it is kept as long as the process lives.
_attachments: dict[str, _native.KernelSockets] = {}


def _forget_after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _attachments.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


def kernel_socket(
    address: Address | str,
    timeout: float | None = None,
    *,
    type: int = socket.SOCK_STREAM,
    node: Node | None = None,
) -> socket.socket:
    """Connect to a port of a domain whose program listens with `kernel_server` or under ``isthmus run``.

    Parameters
    ----------
    address : ("worker-7", 9000) or "worker-7:9000"
        The domain by name, number or IP address.
    timeout : float or None, seconds
        For connecting and for everything after.
    type : {SOCK_STREAM, SOCK_SEQPACKET}, default SOCK_STREAM
    node : Node, optional
        Whose door to use; by default that of `isthmus.attach`.

    Returns
    -------
    socket.socket
        Connected. Its file is nobody else's; it lives on without the broker.

    Raises
    ------
    NobodyListens, BacklogFull, RefusedByRule, UnknownDomain, LimitReached, WrongKind
        Refused, at once. Nothing was opened.
    PathUnavailable
        The program that listens there takes lanes: `isthmus.create_connection`. Or this program is a guest's
        and that one listens with `kernel_server` in a container.
    NoBroker, BrokerLost, TimedOut
        Nothing was opened.
    """
    host, port = read_address(address, "kernel_socket")
    attachment = _attachment(node)
    if attachment.guest:
        return _in_guest(host, port, timeout, type)
    fd, _ = attachment.connect(host, port, _kind(type), timeout=timeout)
    sock = socket.socket(socket.AF_UNIX, type, 0, fd)
    sock.settimeout(timeout)
    return sock


def kernel_server(
    address: Address | str | int,
    *,
    type: int = socket.SOCK_STREAM,
    backlog: int = 128,
    node: Node | None = None,
) -> KernelServer:
    """Lease a port and listen on it with a kernel socket.

    In a container it takes in programs of other containers, and nobody from a guest.

    Parameters
    ----------
    address : ("", 9000), ":9000" or the port alone
        Port 0 lets the broker choose; the server's `port` says which it was.
    type : {SOCK_STREAM, SOCK_SEQPACKET}, default SOCK_STREAM
    backlog : int, default 128
        Connections that may wait to be accepted; further ones are refused.
    node : Node, optional
        As in `kernel_socket`.

    Returns
    -------
    KernelServer
        Listening. Who connects has no name in ``accept``'s address, as ever with such sockets.

    Raises
    ------
    PortInUse, WildcardNeedsRule, LimitReached, NoBroker, BrokerLost
        Nothing was leased.
    """
    if isinstance(address, int):
        address = ("", address)
    elif isinstance(address, str) and address.startswith(":"):
        address = ("", int(address[1:]))
    host, port = read_address(address, "kernel_server")
    if host:
        raise ValueError(f"kernel_server: not for {host} alone; the policy says who may connect")
    attachment = _attachment(node)
    if attachment.guest:
        server = KernelServer(socket.AF_VSOCK, type)
        try:
            server.bind((socket.VMADDR_CID_ANY, port or socket.VMADDR_PORT_ANY))
            server.listen(backlog)
        except BaseException:
            server.close()
            raise
        server.port = server.getsockname()[1]
        return server
    server = KernelServer(socket.AF_UNIX, type)
    try:
        # A name for as long as it takes to open the file behind it; nobody else can reach it there.
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "s")
            server.bind(path)
            server.listen(backlog)
            file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        server.port = attachment.listen(port, _kind(type), backlog, file)
    except BaseException:
        server.close()
        raise
    server._leased_from(attachment)
    return server


class KernelServer(socket.socket):
    """A listening kernel socket, and the port of this domain that it stands for.

    Attributes
    ----------
    port : int
        Given back when the socket is closed.
    """

    port: int = 0
    _give_back: weakref.finalize[[int], KernelServer] | None = None

    def _leased_from(self, attachment: _native.KernelSockets) -> None:
        self._give_back = weakref.finalize(self, attachment.unlisten, self.port)

    def close(self) -> None:
        """Listen no more, and give the port back. Harmless when repeated."""
        super().close()
        if self._give_back is not None:
            self._give_back()


def _in_guest(host: str, port: int, timeout: float | None, type: int) -> socket.socket:
    from isthmus import vsock

    sock = socket.socket(socket.AF_VSOCK, type)
    try:
        sock.settimeout(timeout)
        vsock.connect(sock, (int(host) if host.isdecimal() else host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _kind(type: int) -> _Kind:
    kind = _KINDS.get(type)
    if kind is None:
        raise ValueError(f"kernel sockets are SOCK_STREAM or SOCK_SEQPACKET, not {type!r}")
    return kind


def _attachment(node: Node | None) -> _native.KernelSockets:
    door = node.door if node is not None else find_door(None)
    with _lock:
        known = _attachments.get(door)
        if known is None or not known.ours:
            known = _attachments[door] = _native.KernelSockets(door, program_name())
    return known
