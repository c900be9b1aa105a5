"""AF_UNIX stream sockets: the honest baseline, one kernel copy in and one out, and no network at all."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from typing import ClassVar

from isthmus.bench import aio, connects, loops, native
from isthmus.bench.native import Report
from isthmus.bench.transports import Job, Transport
from isthmus.bench.worker import Control

__all__ = ["TRANSPORT"]

#: With the default buffers of 208 KiB, throughput at 512 KiB ranges from 0.5 to 8.5 GB/s; with these it is
#: about 16.
BUFFER_BYTES = 1 << 20

# asm-generic/socket.h; not in Python's socket module.
_SO_SNDBUFFORCE = 32


class TRANSPORT(Transport):
    """A stream socket in a directory that both ends see."""

    name = "unix"
    clients = ("native", "python", "asyncio")
    usual_waits: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "pingpong": ("spin", "block"),
        "stream": ("block",),
        "pairs": ("block",),
        "connect": ("block",),
    }

    def server(self, job: Job, control: Control) -> Report:
        """Accept one connection, or as many as come."""
        path = os.path.join(job.directory, "unix")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            listener.listen(128)
            control.ready(path)
            if job.load == "connect":
                return connects.serve(job, listener)
            connection, _ = listener.accept()
        with connection:
            return play(job, connection, control)

    def client(self, job: Job, control: Control) -> Report:
        """Connect once, or again and again."""
        path = control.address()
        if job.load == "connect":
            control.go()
            return connects.visit(job, path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(path)
            control.go()
            return play(job, connection, control)

    def alone(self, job: Job, control: Control) -> Report:
        """Both ends in one event loop."""
        control.go()
        return asyncio.run(aio.unix_round_trips(job, os.path.join(job.directory, "unix")))


def play(job: Job, connection: socket.socket, control: Control) -> Report:
    """Play the job's part over an AF_UNIX connection."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, BUFFER_BYTES)
    except PermissionError:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    # The kernel reports twice what is usable.
    control.detail["send_buffer"] = connection.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2
    if job.case.client == "native":
        return native.over_fd(connection.fileno(), job.case.wait, job.part, job.plan())
    return loops.play(job, loops.SocketChannel(connection, job.case.wait))
