"""What `socket` lacks for ``AF_VSOCK``: names, larger buffers, the flag for siblings, one's own number.

For programs in guests that speak plain ``AF_VSOCK`` sockets, with nothing else of Isthmus there. Numbers are
those of ``linux/vm_sockets.h``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct

from isthmus import errors
from isthmus._native import CONTROL_MESSAGE_MAX, CONTROL_PORT, control_decode, control_encode

__all__ = ["connect", "local_cid", "resolve", "set_buffer"]

_BUFFER_SIZE, _BUFFER_MAX_SIZE = 0, 2
_GET_LOCAL_CID = 0x7B9
_TO_HOST = 1
#: family, reserved, port, cid, flags, zeros
_ADDRESS = struct.Struct("=HHIIB3x")


def set_buffer(sock: socket.socket, size: int) -> None:
    """Let a socket hold `size` bytes that it has received; the usual buffer is 256 KiB.

    Before connecting or listening: what the other side may send is told when the connection begins. Linux
    sends no more than its own buffer holds either, so raise both ends'.

    Parameters
    ----------
    sock : socket
        Of family ``AF_VSOCK``.
    size : int, bytes

    Raises
    ------
    OSError
        The kernel refuses. The buffer is as it was.
    """
    for option in (_BUFFER_MAX_SIZE, _BUFFER_SIZE):
        # For this family Python makes 64 bits of the number.
        sock.setsockopt(socket.AF_VSOCK, option, size)


def resolve(name: str, timeout: float = 10.0) -> int:
    """The number of a domain, asked of the switch: for guests and containers of this node it is a CID.

    Needs no agent, and no privilege.

    Parameters
    ----------
    name : str
    timeout : float, seconds

    Raises
    ------
    UnknownDomain
        The rules know no such domain, or do not show it to this guest.
    NoBroker
        There is no switch behind this guest's socket device, or no broker behind the switch.
    """
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_SEQPACKET) as sock:
            sock.settimeout(timeout)
            sock.connect((socket.VMADDR_CID_HOST, CONTROL_PORT))
            _ask(sock, "hello", features=0, program="isthmus.vsock")
            return int(_ask(sock, "resolve", name=name)["domain"])
    except errors.IsthmusError:
        raise
    except OSError as error:
        text = f"no broker behind this guest's socket device ({error.strerror or error})"
        raise errors.NoBroker(errno.ECONNREFUSED, text) from None


def _ask(sock: socket.socket, kind: str, **fields: int | str | bytes) -> dict[str, int | str | bytes]:
    sock.send(control_encode(kind, 1, **fields))
    packet = sock.recv(CONTROL_MESSAGE_MAX)
    if not packet:
        raise ConnectionAbortedError(errno.ECONNABORTED, "it hung up")
    answer, _, found = control_decode(packet)
    if answer == "refused":
        raise errors.refused(str(found["refusal"]), int(found["rule"]), str(found["text"]))
    return dict(found)


def connect(sock: socket.socket, address: tuple[int | str, int], *, to_host: bool = False) -> None:
    """Connect to ``(cid, port)``, as `socket.connect` does, by name and with a flag that it cannot set.

    Parameters
    ----------
    address : (int or str, int)
        A number, or a name for `resolve`; and a port.
    to_host : bool, default False
        Send to the host's side even if this guest could have guests of its own: a guest that has loaded
        ``vhost_vsock`` reaches its siblings only so.

    Raises
    ------
    OSError
        As `socket.connect`, or `resolve`; the socket may then be closed.
    """
    cid, port = address
    if isinstance(cid, str):
        cid = resolve(cid)
    if not to_host:
        sock.connect((cid, port))
        return
    packed = _ADDRESS.pack(socket.AF_VSOCK, 0, port, cid, _TO_HOST)
    libc = ctypes.CDLL(None, use_errno=True)
    while libc.connect(sock.fileno(), packed, len(packed)) < 0:
        error = ctypes.get_errno()
        if error == errno.EINTR:
            continue
        if error == errno.EISCONN:
            return
        raise OSError(error, os.strerror(error))


def local_cid() -> int:
    """The number of this guest: that of its domain.

    Raises
    ------
    OSError
        There is no socket device.
    """
    with open("/dev/vsock", "rb") as device:
        found = fcntl.ioctl(device, _GET_LOCAL_CID, b"\0" * 4)
    return int(struct.unpack("=I", found)[0])
