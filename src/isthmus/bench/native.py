"""The native loops: the only module that knows what `isthmus._native` calls them.

Everything else asks :func:`missing` first, and gets a reason to print when the extension module is not there.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol, TypedDict, cast

__all__ = ["PlanDict", "Report", "Ring", "cacheline", "connect_client", "connect_server", "memcpy", "missing"]
__all__ += ["over_connection", "over_fd", "over_mx", "over_mx_many", "over_ring", "report", "ring"]
__all__ += ["ring_memory"]


class PlanDict(TypedDict):
    """What both ends of a loop are told; see `Plan` in crates/bench."""

    size: int
    warmup_s: float
    duration_s: float
    gap_s: float
    pages: str
    data: str
    windows: bool


class _Report(TypedDict):
    """What one end found; see `Report` in crates/bench."""

    p50_us: float | None
    p99_us: float | None
    count: int
    bytes: int
    seconds: float | None
    cpu_s: float
    total_bytes: int


class Report(_Report, total=False):
    """The same, with what only some loops find."""

    #: See `Record.overlap`: of a receiver that computes, of a sender that does.
    overlap: tuple[float, float]
    #: Bytes a second of each of many endpoints.
    rates: list[float]


class Ring(Protocol):
    """One end of a ring that both sides can write."""

    def send(self, message: bytearray, /) -> None:
        """Send all of `message`."""

    def recv_into(self, message: bytearray, /) -> None:
        """Fill all of `message`."""


def report(
    *,
    p50_us: float | None = None,
    p99_us: float | None = None,
    count: int = 0,
    bytes: int = 0,
    seconds: float | None = None,
    cpu_s: float = 0.0,
    total_bytes: int | None = None,
) -> Report:
    """Make a report in Python, of the same shape as those of the native loops."""
    return Report(
        p50_us=p50_us,
        p99_us=p99_us,
        count=count,
        bytes=bytes,
        seconds=seconds,
        cpu_s=cpu_s,
        total_bytes=bytes if total_bytes is None else total_bytes,
    )


def missing() -> str | None:
    """Return why there are no native loops, or None when there are."""
    try:
        module = importlib.import_module("isthmus._native")
    except ImportError as error:
        return f"the extension module is not built ({error})"
    return None if hasattr(module, "bench_fd") else "the extension module was built without its bench loops"


def _native() -> Any:
    return importlib.import_module("isthmus._native")


def over_fd(fd: int, wait: str, part: str, plan: PlanDict) -> Report:
    """Play `part` (``pingpong-client``, ``stream-server`` ...) over a connected stream socket."""
    return cast(Report, _native().bench_fd(fd, wait, part, plan))


def over_connection(
    connection: Any, wait: str, part: str, plan: PlanDict, *, in_place: bool = False
) -> Report:
    """Play `part` over a connection of ours; `in_place` leaves the messages in the rings."""
    return cast(Report, _native().bench_connection(connection, wait, part, plan, in_place))


def over_mx(endpoint: Any, peer: tuple[int, int], wait: str, part: str, plan: PlanDict, ahead: int) -> Report:
    """Play `part` between endpoints of MX, with so many messages of a stream under way."""
    return cast(Report, _native().bench_mx(endpoint, peer, wait, part, plan, ahead))


def over_mx_many(
    endpoints: Sequence[Any],
    peers: Sequence[tuple[int, int]],
    wait: str,
    part: str,
    plan: PlanDict,
    ahead: int,
) -> tuple[list[Report], list[int], float]:
    """The same at many endpoints at once, each in a thread of its own.

    Returns
    -------
    list of Report
        Of each.
    list of int, float
        Bytes that each moved, and the seconds, from when all were at work until the first was through.
    """
    found = _native().bench_mx_many(endpoints, peers, wait, part, plan, ahead)
    return cast("tuple[list[Report], list[int], float]", found)


def over_ring(fd: int, wait: str, part: str, plan: PlanDict, *, left: bool, streaming: bool) -> Report:
    """Play `part` over a ring that both sides can write; `streaming` copies out past the caches."""
    return cast(Report, _native().bench_ring(fd, left, streaming, wait, part, plan))


def ring_memory() -> int:
    """Return a new memfd that holds such a ring. The caller closes it."""
    return cast(int, _native().bench_ring_memory())


def ring(fd: int, wait: str, *, left: bool) -> Ring:
    """Open one end of such a ring for a loop in Python."""
    return cast(Ring, _native().BenchRing(fd, left, wait, False))


def connect_client(address: str, warmup_s: float, duration_s: float) -> Report:
    """Connect to ``ip:port`` or a path again and again; `count` is connections."""
    return cast(Report, _native().bench_connect_client(address, warmup_s, duration_s))


def connect_server(listener: int) -> Report:
    """Accept until the client is done."""
    return cast(Report, _native().bench_connect_server(listener))


def memcpy(size: int, duration_s: float, pages: str, data: str, copy: str) -> Report:
    """Copy messages of `size` bytes with one thread; `copy` is ``libc``, ``string`` or ``streaming``."""
    return cast(Report, _native().bench_memcpy(size, duration_s, pages, data, copy))


def cacheline(duration_s: float, cpus: tuple[int, int] | None) -> Report:
    """Pass a cache line back and forth between two threads."""
    return cast(Report, _native().bench_cacheline(duration_s, cpus))
