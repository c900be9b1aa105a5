"""The ping-pong and the stream in Python: what a Python program gets, the interpreter included.

The same two loops as in ``crates/bench``, over anything with `send` and `recv_into` for whole messages. Byte
0 of a message is its mark; the last one is checked byte by byte.
"""

from __future__ import annotations

import ctypes
import mmap
import select
import socket
import time
from typing import Protocol

from isthmus import mx
from isthmus.bench.native import Report, report
from isthmus.bench.transports import WINDOW, Job

__all__ = ["Channel", "SocketChannel", "percentile_us", "play"]

WARM, COUNTED, LAST = 1, 2, 3

#: How long `adaptive` asks again before it sleeps; the same as in crates/bench.
ADAPTIVE_SPIN_NS = 20_000

#: Bytes between two looks at the clock.
BURST_BYTES = 32 * 1024

HUGE_PAGE = 2 << 20


class Channel(Protocol):
    """What the loops need of a connection."""

    def send(self, message: bytearray, /) -> object:
        """Send all of `message`."""

    def recv_into(self, message: bytearray, /) -> object:
        """Fill all of `message`."""


def play(job: Job, channel: Channel) -> Report:
    """Play this job's part over `channel`.

    Raises
    ------
    ValueError
        The last message does not hold what was sent.
    """
    parts = {
        "pingpong-client": pingpong_client,
        "pingpong-server": pingpong_server,
        "stream-client": stream_client,
        "stream-server": stream_server,
    }
    return parts[job.part](job, channel)


def pingpong_client(job: Job, channel: Channel) -> Report:
    """Send a message, wait for its echo, and again."""
    message = buffer(job)
    send, recv_into, clock = channel.send, channel.recv_into, time.perf_counter_ns
    message[0] = WARM
    until = clock() + int(job.warmup_s * 1e9)
    while True:
        send(message)
        recv_into(message)
        if clock() >= until:
            break
    times: list[int] = []
    keep = times.append
    gap_s = job.gap_s
    message[0] = COUNTED
    cpu = time.process_time()
    started = before = clock()
    until = started + int(job.duration_s * 1e9)
    while True:
        send(message)
        recv_into(message)
        now = clock()
        keep(now - before)
        before = now
        if now >= until:
            break
        if gap_s:
            time.sleep(gap_s)
            before = clock()
    cpu_s = time.process_time() - cpu
    message[0] = LAST
    send(message)
    recv_into(message)
    check(message)
    return report(
        p50_us=percentile_us(times, 0.5) / 2,
        p99_us=percentile_us(times, 0.99) / 2,
        count=len(times),
        seconds=(before - started) * 1e-9,
        cpu_s=cpu_s,
    )


def pingpong_server(job: Job, channel: Channel) -> Report:
    """Echo every message until the last."""
    message = buffer(job)
    send, recv_into = channel.send, channel.recv_into
    recv_into(message)
    cpu = time.process_time()
    send(message)
    count = 1
    while message[0] != LAST:
        recv_into(message)
        send(message)
        count += 1
    return report(count=count, bytes=count * job.size, cpu_s=time.process_time() - cpu)


def stream_client(job: Job, channel: Channel) -> Report:
    """Send messages for a while, then wait until the receiver has them all."""
    message = buffer(job)
    send, clock = channel.send, time.perf_counter_ns
    burst = range(max(1, min(64, BURST_BYTES // job.size)))
    count = 1
    cpu = time.process_time()
    for mark, duration_s in ((WARM, job.warmup_s), (COUNTED, job.duration_s)):
        message[0] = mark
        until = clock() + int(duration_s * 1e9)
        while True:
            for _ in burst:
                send(message)
            count += len(burst)
            if clock() >= until:
                break
    message[0] = LAST
    send(message)
    channel.recv_into(bytearray(1))
    return report(count=count, bytes=count * job.size, cpu_s=time.process_time() - cpu)


def stream_server(job: Job, channel: Channel) -> Report:
    """Receive messages until the last, into one private buffer."""
    message = buffer(job)
    recv_into = channel.recv_into
    recv_into(message)
    cpu = time.process_time()
    warm = 0
    while message[0] == WARM:
        recv_into(message)
        warm += 1
    # The first counted message starts the clock and is not counted itself.
    started = time.perf_counter_ns()
    count = 0
    while message[0] != LAST:
        recv_into(message)
        count += 1
    seconds = (time.perf_counter_ns() - started) * 1e-9
    cpu_s = time.process_time() - cpu
    check(message)
    channel.send(bytearray(1))
    total = (warm + count) * job.size
    return report(count=count, bytes=count * job.size, seconds=seconds, cpu_s=cpu_s, total_bytes=total)


def pattern(size: int) -> bytes:
    """Return what a message holds behind its mark; 251 is prime, so no chunk looks like another."""
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def buffer(job: Job) -> bytearray:
    """Return a filled message on pages of the size asked for.

    Some are views of mappings, typed as the bytearrays that they behave like.
    """
    if job.case.path == WINDOW:
        view = mx.buffer(job.size)
        view[:] = pattern(job.size)
        return view  # type: ignore[return-value]
    if job.case.pages == "4k":
        return bytearray(pattern(job.size))
    length = -(-job.size // HUGE_PAGE) * HUGE_PAGE
    mapping = mmap.mmap(-1, length + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    ahead = -ctypes.addressof(ctypes.c_char.from_buffer(mapping)) % HUGE_PAGE
    view = memoryview(mapping)[ahead : ahead + job.size]
    view[:] = pattern(job.size)
    return view  # type: ignore[return-value]


def check(message: bytearray) -> None:
    """Compare all of `message` but its mark with what was sent."""
    expected = pattern(len(message))
    if bytes(message[1:]) != expected[1:]:
        offset = next(i for i in range(1, len(message)) if message[i] != expected[i])
        raise ValueError(
            f"byte {offset} of the last message is {message[offset]}, sent was {expected[offset]}"
        )


def percentile_us(times_ns: list[int], part: float) -> float:
    """Return the time below which `part` (0 to 1) of all lie, in microseconds."""
    ranked = sorted(times_ns)
    return ranked[min(len(ranked) - 1, int(len(ranked) * part))] / 1e3


class SocketChannel:
    """Whole messages over a connected stream socket, waiting as the case says."""

    def __init__(self, connection: socket.socket, wait: str) -> None:
        self._socket = connection
        self._spin_ns = {"spin": None, "adaptive": ADAPTIVE_SPIN_NS, "block": 0}[wait]
        connection.setblocking(wait == "block")
        if wait == "block":
            # Nothing stands between the loop and the socket where nothing has to.
            self.send = connection.sendall  # type: ignore[method-assign, assignment]

    def send(self, message: bytearray) -> None:
        """Send all of `message`."""
        rest = memoryview(message)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)

    def recv_into(self, message: bytearray) -> None:
        """Fill all of `message`."""
        recv_into, size, spin_ns = self._socket.recv_into, len(message), self._spin_ns
        filled, since = 0, 0
        rest: bytearray | memoryview = message
        while True:
            try:
                got = recv_into(rest)
            except BlockingIOError:
                if spin_ns is not None:
                    now = time.perf_counter_ns()
                    since = since or now
                    if now - since >= spin_ns:
                        self._wait(select.POLLIN)
                continue
            filled += got
            if filled == size:
                return
            if got == 0:
                raise EOFError(f"the other end left after {filled} of {size} bytes")
            rest = memoryview(message)[filled:]

    def _wait(self, event: int) -> None:
        """Sleep until the socket can go on; not at all when spinning."""
        if self._spin_ns is not None:
            poller = select.poll()
            poller.register(self._socket, event)
            poller.poll()
