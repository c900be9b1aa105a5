"""The ping-pong and the stream in Python: what a Python program gets, the interpreter included.

The same two loops as in ``crates/bench``, over anything with `send` and `recv_into` for whole messages. Byte
0 of a message is its mark; the last one is checked byte by byte.
"""

from __future__ import annotations

import ctypes
import mmap
import select
import socket
import statistics
import struct
import time
import zlib
from collections import deque
from typing import Any, Protocol

from isthmus import mx
from isthmus.bench.native import Report, report
from isthmus.bench.transports import WINDOW, Job

__all__ = ["Ahead", "Channel", "Posts", "SocketChannel", "overlap", "percentile_us", "play"]

WARM, COUNTED, LAST = 1, 2, 3

#: How long `adaptive` asks again before it sleeps; the same as in crates/bench.
ADAPTIVE_SPIN_NS = 20_000

#: Transfers of each phase of `overlap`, however long they take.
OVERLAP_LEAST = 6

#: Bytes between two looks at the clock.
BURST_BYTES = 32 * 1024

HUGE_PAGE = 2 << 20


class Channel(Protocol):
    """What the loops need of a connection."""

    def send(self, message: bytearray, /) -> object:
        """Send all of `message`."""

    def recv_into(self, message: bytearray, /) -> object:
        """Fill all of `message`."""


class Posts(Channel, Protocol):
    """What also takes a message now and says later that it is done with it."""

    def isend(self, message: bytearray, /) -> Any:
        """Begin to send; a handle."""

    def irecv(self, message: bytearray, /) -> Any:
        """Say where a message is to go; a handle."""

    def wait(self, handle: Any, /) -> object:
        """Wait for the end of what a handle stands for."""

    def cancel(self, handle: Any, /) -> object:
        """Take back what nothing was received into."""


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


class Ahead:
    """A channel whose stream has many messages under way, each in a buffer of its own.

    The receiver's are posted before it waits for the first. As `Ahead` of `bench_mx.rs`.
    """

    def __init__(self, posts: Posts, size: int, depth: int) -> None:
        self._posts, self._size, self._depth = posts, size, depth
        self._under_way: deque[tuple[Any, bytearray]] = deque()

    def send(self, message: bytearray) -> None:
        """Begin to send `message`, once there is room."""
        if len(message) != self._size:
            self._posts.send(message)
            return
        under_way = self._under_way
        if len(under_way) < self._depth:
            own = bytearray(message)
        else:
            handle, own = under_way.popleft()
            self._posts.wait(handle)
            own[:] = message
        under_way.append((self._posts.isend(own), own))
        if message[0] == LAST:
            while under_way:
                self._posts.wait(under_way.popleft()[0])

    def recv_into(self, message: bytearray) -> None:
        """Wait for the oldest, and post its buffer again."""
        if len(message) != self._size:
            self._posts.recv_into(message)
            return
        posts, under_way = self._posts, self._under_way
        while len(under_way) < self._depth:
            own = bytearray(self._size)
            under_way.append((posts.irecv(own), own))
        handle, own = under_way.popleft()
        posts.wait(handle)
        message[:] = own
        if message[0] == LAST:
            while under_way:
                # Nothing will meet them.
                posts.cancel(under_way.popleft()[0])
        else:
            under_way.append((posts.irecv(own), own))


#: What a receiver of `overlap` asks its sender to do next.
ALONE, RECEIVER, SENDER, END = 1, 2, 3, 4
#: What is computed over and over: from the first level of the cache, so that it takes as long beside a
#: transfer as alone.
WORK = bytes(2048)


def compute(rounds: int) -> None:
    """Keep a processor busy and nothing else."""
    for _ in range(rounds):
        zlib.crc32(WORK)


def timed(rounds: int) -> float:
    """Seconds that so much work takes."""
    started = time.perf_counter()
    compute(rounds)
    return time.perf_counter() - started


def rounds_for(seconds: float) -> int:
    """How often to compute for so long, by the fastest of a few tries."""
    fastest = min(timed(200) for _ in range(10))
    return max(1, round(seconds * 200 / fastest))


def overlap(job: Job, posts: Posts) -> Report:
    """Transfer with both ends idle, with the receiver computing, and with the sender computing.

    Work is a number of rounds, those that take as long as a transfer; both are timed alone first. The
    receiver asks for each message, so that both begin together; each end times what it waits for itself.
    """
    return {"client": overlap_sender, "server": overlap_receiver}[job.role](job, posts)


def hidden(transfer_s: float, work_s: float, both_s: float) -> float:
    """The part of the shorter that happened at the same time as the other."""
    return min(1.0, max(0.0, (transfer_s + work_s - both_s) / min(transfer_s, work_s)))


def overlap_sender(job: Job, posts: Posts) -> Report:
    """Send whenever asked to, and say at the end what became of own work."""
    message, word = buffer(job), bytearray(1)
    times: dict[int, list[float]] = {ALONE: [], RECEIVER: [], SENDER: []}
    rounds, work_s = 0, 0.0
    posts.recv_into(word)
    while (phase := word[0]) != END:
        if phase == SENDER and not rounds:
            rounds = rounds_for(statistics.median(times[ALONE]))
            work_s = statistics.median(timed(rounds) for _ in range(5))
        started = time.perf_counter()
        handle = posts.isend(message)
        if phase == SENDER:
            compute(rounds)
        posts.wait(handle)
        times[phase].append(time.perf_counter() - started)
        posts.recv_into(word)
    found = hidden(statistics.median(times[ALONE]), work_s, statistics.median(times[SENDER]))
    posts.send(bytearray(struct.pack("<d", found)))
    return report(cpu_s=time.process_time())


def overlap_receiver(job: Job, posts: Posts) -> Report:
    """Ask for messages, phase after phase."""
    message, cpu = buffer(job), time.process_time()
    times: dict[int, list[float]] = {}
    rounds, work_s, started_at = 0, 0.0, time.perf_counter()
    for phase in (ALONE, RECEIVER, SENDER):
        if phase == RECEIVER:
            rounds = rounds_for(statistics.median(times[ALONE]))
            work_s = statistics.median(timed(rounds) for _ in range(5))
        # The first of a phase warms up; that of SENDER also lets the sender find out how much to compute.
        times[phase] = []
        until = time.perf_counter() + job.duration_s / 3
        while len(times[phase]) < OVERLAP_LEAST or time.perf_counter() < until:
            started = time.perf_counter()
            handle = posts.irecv(message)
            posts.send(bytearray([phase]))
            if phase == RECEIVER:
                compute(rounds)
            posts.wait(handle)
            times[phase].append(time.perf_counter() - started)
        del times[phase][0]
    posts.send(bytearray([END]))
    of_sender = bytearray(8)
    posts.recv_into(of_sender)
    check(message)
    count = sum(map(len, times.values()))
    transfer_s, both_s = statistics.median(times[ALONE]), statistics.median(times[RECEIVER])
    found = report(
        p50_us=transfer_s * 1e6,
        p99_us=percentile_us([int(each * 1e9) for each in times[ALONE]], 0.99),
        count=count,
        bytes=count * job.size,
        seconds=time.perf_counter() - started_at,
        cpu_s=time.process_time() - cpu,
    )
    found["overlap"] = (hidden(transfer_s, work_s, both_s), *struct.unpack("<d", of_sender))
    return found


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
