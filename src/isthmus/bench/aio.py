"""Round trips awaited in one asyncio loop: both ends are coroutines of one process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from isthmus.bench.loops import pattern, percentile_us
from isthmus.bench.native import Report, report
from isthmus.bench.transports import Job

__all__ = ["round_trips", "unix_round_trips"]


async def round_trips(job: Job, once: Callable[[bytes], Awaitable[bytes]]) -> Report:
    """Await `once` (send a message, return its echo) for the job's time.

    Parameters
    ----------
    once : async callable
        Whatever answers it runs in the same loop.
    """
    message = pattern(job.size)
    until = time.perf_counter() + job.warmup_s
    while await once(message) == message and time.perf_counter() < until:
        pass
    times: list[int] = []
    cpu = time.process_time()
    started = before = time.perf_counter_ns()
    until_ns = started + int(job.duration_s * 1e9)
    echo = message
    while before < until_ns:
        echo = await once(message)
        now = time.perf_counter_ns()
        times.append(now - before)
        before = now
    cpu_s = time.process_time() - cpu
    if echo != message:
        raise ValueError(f"the last echo is not the message: {len(echo)} bytes for {len(message)}")
    return report(
        p50_us=percentile_us(times, 0.5) / 2,
        p99_us=percentile_us(times, 0.99) / 2,
        count=len(times),
        seconds=(before - started) * 1e-9,
        cpu_s=cpu_s,
    )


async def unix_round_trips(job: Job, path: str) -> Report:
    """Measure asyncio's own streams over AF_UNIX."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                writer.write(await reader.readexactly(job.size))
                await writer.drain()
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_unix_server(echo, path)
    reader, writer = await asyncio.open_unix_connection(path)

    async def once(message: bytes) -> bytes:
        writer.write(message)
        await writer.drain()
        return await reader.readexactly(job.size)

    try:
        return await round_trips(job, once)
    finally:
        writer.close()
        await writer.wait_closed()
        server.close()
