"""``getsockopt`` and ``setsockopt``: honest answers, and a clear refusal of what lanes do not have."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from isthmus.errors import Unsupported

if TYPE_CHECKING:
    from .handle import Handle

__all__ = ["get_option", "option_name", "ring_sizes", "set_option"]

Key: TypeAlias = tuple[int, int]

#: A small ring begins every connection; a wanted size up to this is one ring that never grows.
SMALL_MAX = 64 * 1024
RING_MULTIPLE = 4096
RING_MAX = 64 * 1024 * 1024
_TIMEVAL = "ll"
_LINGER = "ii"
_SOL, _TCP = socket.SOL_SOCKET, socket.IPPROTO_TCP
# Known to Linux, not to every build of Python.
SO_PROTOCOL = getattr(socket, "SO_PROTOCOL", 38)
SO_DOMAIN = getattr(socket, "SO_DOMAIN", 39)
SO_RCVLOWAT = getattr(socket, "SO_RCVLOWAT", 18)
SO_SNDLOWAT = getattr(socket, "SO_SNDLOWAT", 19)

#: Taken, remembered and without effect, because what they ask for holds anyway: a dead peer is known at once
#: (the broker and the kernel say so, no timer), a port is free as soon as it is closed, what was sent is
#: delivered after a close.
_REMEMBERED: dict[Key, str] = {
    (_SOL, socket.SO_KEEPALIVE): "i",
    (_SOL, socket.SO_REUSEADDR): "i",
    (_SOL, socket.SO_BROADCAST): "i",
    (_SOL, socket.SO_LINGER): _LINGER,
    (_TCP, socket.TCP_KEEPIDLE): "i",
    (_TCP, socket.TCP_KEEPINTVL): "i",
    (_TCP, socket.TCP_KEEPCNT): "i",
}
#: Without effect and always the same: nothing here ever waits to fill a packet.
_FIXED: dict[Key, int] = {
    (_TCP, socket.TCP_NODELAY): 1,
    (_SOL, SO_RCVLOWAT): 1,
    (_SOL, SO_SNDLOWAT): 1,
    (_SOL, socket.SO_OOBINLINE): 0,
}
_MAY_SET = {(_TCP, socket.TCP_NODELAY)}


def option_name(level: int, option: int) -> str:
    """The option as its documentation spells it."""
    prefix = {_SOL: "SO_", _TCP: "TCP_"}.get(level)
    if prefix:
        for name in dir(socket):
            if name.startswith(prefix) and getattr(socket, name) == option:
                return name
    return f"option {option} of level {level}"


def ring_sizes(size: int, limit: int = RING_MAX) -> tuple[int, int]:
    """Small and large ring for a wanted buffer of `size` bytes, as the engine takes them."""
    size = max(RING_MULTIPLE, min(size, limit, RING_MAX))
    size = (size + RING_MULTIPLE - 1) // RING_MULTIPLE * RING_MULTIPLE
    if size > min(limit, RING_MAX):
        size -= RING_MULTIPLE
    if size <= SMALL_MAX:
        return size, 0
    return 32 * 1024, size


def _timeval(seconds: float | None) -> bytes:
    whole = int(seconds or 0)
    return struct.pack(_TIMEVAL, whole, int(((seconds or 0) - whole) * 1_000_000))


def _read(sock: Handle, key: Key) -> int | bytes | None:
    end = sock._end
    answers: dict[Key, Callable[[], int | bytes]] = {
        (_SOL, socket.SO_TYPE): lambda: int(end.type),
        (_SOL, socket.SO_ERROR): end.take_error,
        (_SOL, socket.SO_SNDBUF): lambda: end.buffers()[0],
        (_SOL, socket.SO_RCVBUF): lambda: end.buffers()[1],
        (_SOL, socket.SO_RCVTIMEO): lambda: _timeval(sock._recv_limit),
        (_SOL, socket.SO_SNDTIMEO): lambda: _timeval(sock._send_limit),
        (_SOL, socket.SO_ACCEPTCONN): lambda: int(end.listening),
        (_SOL, SO_DOMAIN): lambda: int(sock.family),
        (_SOL, SO_PROTOCOL): lambda: 0,
    }
    if key in answers:
        return answers[key]()
    if key in _REMEMBERED:
        return end.remembered.get(key, bytes(struct.calcsize(_REMEMBERED[key])))
    return _FIXED.get(key)


def get_option(sock: Handle, level: int, option: int, room: int = 0) -> int | bytes:
    """As `socket.socket.getsockopt`."""
    if not 0 <= room <= 1024:
        raise OSError(errno.EINVAL, "getsockopt buflen out of range")
    value = _read(sock, (level, option))
    if value is None:
        raise Unsupported(
            errno.ENOPROTOOPT,
            f"getsockopt: {option_name(level, option)} has no meaning here; see docs/reference/sockets.md",
        )
    if isinstance(value, int):
        value = struct.pack("i", value)
    return value[:room] if room else int(struct.unpack_from("i", value)[0])


def set_option(sock: Handle, level: int, option: int, value: int | bytes | None, room: int | None) -> None:
    """As `socket.socket.setsockopt`."""
    key = (level, option)
    if value is None:
        value = bytes(room or 0)
    if key in ((_SOL, socket.SO_RCVTIMEO), (_SOL, socket.SO_SNDTIMEO)):
        sock._set_limit(option == socket.SO_RCVTIMEO, _seconds(value))
        return
    if key in _REMEMBERED:
        layout = _REMEMBERED[key]
        packed = struct.pack("i", value) if isinstance(value, int) else bytes(value)
        if len(packed) < struct.calcsize(layout):
            raise OSError(errno.EINVAL, f"setsockopt: {option_name(level, option)} takes struct {layout!r}")
        sock._end.remembered[key] = packed
        return
    if key in ((_SOL, socket.SO_SNDBUF), (_SOL, socket.SO_RCVBUF)):
        sock._end.choose_rings(_integer(value))
        return
    if key in _MAY_SET:
        _integer(value)
        return
    raise Unsupported(
        errno.ENOPROTOOPT,
        f"setsockopt: {option_name(level, option)} cannot be set here; see docs/reference/sockets.md",
    )


def _integer(value: int | bytes) -> int:
    if isinstance(value, int):
        return value
    if len(value) < 4:
        raise OSError(errno.EINVAL, f"setsockopt: an integer of 4 bytes is wanted, not {len(value)}")
    return int(struct.unpack_from("i", value)[0])


def _seconds(value: int | bytes) -> float | None:
    if isinstance(value, int) or len(value) < struct.calcsize(_TIMEVAL):
        raise OSError(errno.EINVAL, "setsockopt: a time limit is a struct timeval, struct.pack('ll', s, us)")
    seconds, micros = struct.unpack_from(_TIMEVAL, value)
    if not 0 <= micros < 1_000_000:
        raise OSError(errno.EDOM, f"setsockopt: {micros} microseconds of a second")
    return seconds + micros / 1_000_000 or None
