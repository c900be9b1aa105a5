"""Isthmus itself: both carriers, through the product's own calls and a broker of its own."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar, Literal

from isthmus import _native
from isthmus.bench import aio, loops, native
from isthmus.bench.cases import Case, Settings
from isthmus.bench.native import Report, report
from isthmus.bench.transports import Job, Setup, Transport
from isthmus.bench.worker import Control

__all__ = ["TRANSPORT"]

#: One broker serves both paths: these two domains talk strictly, the others do not.
POLICY = """
[[rule]]
from = "strict-left"
to = "strict-right"
action = "accept"
strict = true

[[rule]]
from = "*"
to = "*"
action = "accept"
"""

LIMIT_S = 10.0


class TRANSPORT(Transport):
    """Two programs of two domains."""

    name = "isthmus"
    paths = ("sealed", "put")
    clients = ("native", "in-place", "python", "asyncio")
    benches = ("pingpong", "stream", "pairs", "connect", "rate")
    usual_waits: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "pingpong": ("spin", "adaptive", "block"),
        "stream": ("spin", "adaptive"),
        "pairs": ("adaptive",),
        "rate": ("spin", "adaptive"),
        "connect": ("block",),
    }

    def refuses(self, case: Case) -> str | None:
        """Connections are made by the product's Python calls whoever uses them."""
        if case.bench == "connect" and case.client == "native":
            return "connections are opened by a Python program"
        if case.client == "in-place" and case.path != "switch":
            return "nothing at all would be copied on this path"
        return super().refuses(case)

    def prepare(self, stack: ExitStack, settings: Settings) -> Setup:
        """Start a broker with four domains."""
        from isthmus.testing import PrivateBroker

        domains = ("left", "right", "strict-left", "strict-right")
        broker = stack.enter_context(PrivateBroker(domains, POLICY))
        doors = {name: broker.door(name) for name in domains}
        return Setup(
            options={role: {"doors": doors} for role in ("server", "client", "alone")},
            mediators=(broker.pid,),
        )

    def server(self, job: Job, control: Control) -> Report:
        """Listen on a port that the broker chooses."""
        node = attach(job, "right")
        listener = node.listen(job.port, "stream", backlog=128)
        control.ready([node.identity["domain_name"], listener.port])
        if job.load == "connect":
            return serve(listener)
        return play(job, listener.accept(LIMIT_S))

    def client(self, job: Job, control: Control) -> Report:
        """Connect once, or again and again."""
        domain, port = control.address()
        node = attach(job, "left")
        if job.load == "connect":
            control.go()
            return visit(job, node, domain, port)
        connection = node.connect(domain, port, "stream", timeout=LIMIT_S)
        control.detail["why"] = connection.why
        control.go()
        return play(job, connection)

    def alone(self, job: Job, control: Control) -> Report:
        """Both ends in one event loop."""
        control.go()
        return asyncio.run(round_trips(job))


def prefix(job: Job) -> str:
    """The domains whose rule gives this path."""
    return "strict-" if job.case.path == "put" else ""


def attach(job: Job, side: Literal["left", "right"]) -> _native.Node:
    """Attach to the broker as one of the domains."""
    door = job.options["doors"][prefix(job) + side]
    until = time.monotonic() + LIMIT_S
    # A guest's agent may still be starting.
    while not os.path.exists(door) and time.monotonic() < until:
        time.sleep(0.05)
    return _native.Node(door, "bench")


def play(job: Job, connection: _native.Connection) -> Report:
    """Play the job's part over a connection."""
    try:
        if job.case.client in ("native", "in-place"):
            in_place = job.case.client == "in-place"
            return native.over_connection(connection, job.case.wait, job.part, job.plan(), in_place=in_place)
        connection.wait = {"spin": 0, "adaptive": 1, "block": 2}[job.case.wait]
        return loops.play(job, Channel(connection))
    finally:
        connection.close()


class Channel:
    """Whole messages over a connection, by the same calls as `isthmus.Socket` makes."""

    def __init__(self, connection: _native.Connection) -> None:
        self._send, self._recv = connection.send, connection.recv_into
        self._recv_exactly = connection.recv_exactly_into

    def send(self, message: bytearray) -> None:
        """Send all of `message`."""
        self._send(message, None)

    def recv_into(self, message: bytearray) -> None:
        """Fill all of `message`."""
        got = self._recv(message, None)[0]
        if got < len(message):
            got += self._recv_exactly(memoryview(message)[got:], None)
            if got < len(message):
                raise EOFError(f"the other end left after {got} of {len(message)} bytes")


def serve(listener: _native.Listener) -> Report:
    """Accept until the client is done; as `isthmus.bench.connects`."""
    cpu = started = 0.0
    count = 0
    while True:
        connection = listener.accept(LIMIT_S)
        byte, _ = connection.recv(1, LIMIT_S)
        connection.close()
        if count == 0:
            cpu, started = time.process_time(), time.perf_counter()
        count += 1
        if byte != b"\0":
            break
    if byte != b"\1":
        raise EOFError("a client left without its byte")
    return report(count=count, seconds=time.perf_counter() - started, cpu_s=time.process_time() - cpu)


def visit(job: Job, node: _native.Node, domain: str, port: int) -> Report:
    """Connect for the job's time; as `isthmus.bench.connects`."""

    def once(byte: bytes) -> None:
        connection = node.connect(domain, port, "stream", timeout=LIMIT_S)
        connection.send(byte, None)
        if connection.recv(1, LIMIT_S)[0]:
            raise ValueError("the server sent something")
        connection.close()

    count, seconds, cpu_s = 0, 0.0, 0.0
    for duration_s in (job.warmup_s, job.duration_s):
        cpu, started, count = time.process_time(), time.perf_counter(), 0
        while not count or seconds < duration_s:
            once(b"\0")
            count += 1
            seconds = time.perf_counter() - started
        cpu_s = time.process_time() - cpu
    once(b"\1")
    return report(count=count, seconds=seconds, cpu_s=cpu_s)


async def round_trips(job: Job) -> Report:
    """Measure `isthmus.aio` between two domains whose programs are one process."""
    from isthmus import aio as isthmus_aio
    from isthmus.node import attach as attach_to

    doors: dict[str, Any] = job.options["doors"]
    left = attach_to(doors[prefix(job) + "left"])
    right = attach_to(doors[prefix(job) + "right"])
    listener = await isthmus_aio.listen(0, node=right)
    opening = asyncio.create_task(isthmus_aio.connect((right.name, listener.port), node=left))
    server = await listener.accept()
    client = await opening

    async def echo() -> None:
        while data := await server.recv(job.size):
            await server.send(data)

    answering = asyncio.create_task(echo())

    async def once(message: bytes) -> bytes:
        await client.send(message)
        data = await client.recv(job.size)
        while len(data) < job.size:
            data += await client.recv(job.size - len(data))
        return data

    try:
        return await aio.round_trips(job, once)
    finally:
        client.close()
        await answering
        server.close()
        listener.close()
