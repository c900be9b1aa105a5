"""Connections per second over socket addresses: connect, one byte across, close at both ends.

The byte proves that the connection worked, and is 1 in the last one. Same rules as `connect_client` in
crates/bench.
"""

from __future__ import annotations

import socket
import time

from isthmus.bench import native
from isthmus.bench.native import Report, report
from isthmus.bench.transports import Job

__all__ = ["serve", "visit"]


def serve(job: Job, listener: socket.socket) -> Report:
    """Accept until the client is done."""
    if job.case.client == "native":
        return native.connect_server(listener.fileno())
    cpu = started = 0.0
    count = 0
    while True:
        connection, _ = listener.accept()
        with connection:
            byte = connection.recv(1)
        if count == 0:
            cpu, started = time.process_time(), time.perf_counter()
        count += 1
        if byte != b"\0":
            break
    if byte != b"\1":
        raise EOFError("a client left without its byte")
    return report(count=count, seconds=time.perf_counter() - started, cpu_s=time.process_time() - cpu)


def visit(job: Job, address: tuple[str, int] | str) -> Report:
    """Connect to a path or to (host, port) for the job's time."""
    if job.case.client == "native":
        text = address if isinstance(address, str) else f"{address[0]}:{address[1]}"
        return native.connect_client(text, job.warmup_s, job.duration_s)
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET

    def once(byte: bytes) -> None:
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.connect(address)
            connection.sendall(byte)
            if connection.recv(1):
                raise ValueError("the server sent something")

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
