"""What Python's `socket` lacks for ``AF_VSOCK``: larger buffers, the flag for siblings, a guest's own number.

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

__all__ = ["connect", "local_cid", "set_buffer"]

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


def connect(sock: socket.socket, address: tuple[int, int], *, to_host: bool = False) -> None:
    """Connect to ``(cid, port)``, as `socket.connect` does, with a flag that it cannot set.

    Parameters
    ----------
    to_host : bool, default False
        Send to the host's side even if this guest could have guests of its own: a guest that has loaded
        ``vhost_vsock`` reaches its siblings only so.

    Raises
    ------
    OSError
        As `socket.connect`; the socket may then be closed.
    """
    if not to_host:
        sock.connect(address)
        return
    cid, port = address
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
