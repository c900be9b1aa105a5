"""A ring in memory that both ends can write: shared memory as it is without isolation.

No transport between strangers (either end can forge what the other wrote); it shows what isolation costs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import ClassVar

from isthmus.bench import loops, native
from isthmus.bench.native import Report
from isthmus.bench.transports import Job, Transport
from isthmus.bench.worker import Control

__all__ = ["TRANSPORT"]


class TRANSPORT(Transport):
    """Both directions in one memfd, which the server makes and passes over a socket."""

    name = "mapped-ring"
    benches = ("pingpong", "stream", "pairs")
    usual_waits: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "pingpong": ("spin", "adaptive"),
        "stream": ("spin", "adaptive"),
        "pairs": ("adaptive",),
    }

    def missing(self) -> str | None:
        """The ring itself is native, whoever plays over it."""
        return native.missing()

    def server(self, job: Job, control: Control) -> Report:
        """Make the memory and hand it over."""
        path = os.path.join(job.directory, "ring")
        memory = native.ring_memory()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            listener.listen(1)
            control.ready(path)
            connection, _ = listener.accept()
        with connection:
            socket.send_fds(connection, [b"ring"], [memory])
            return play(job, memory, left=False)

    def client(self, job: Job, control: Control) -> Report:
        """Take the memory."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(control.address())
            _, (memory,), _, _ = socket.recv_fds(connection, 16, 1)
            control.go()
            return play(job, memory, left=True)


def play(job: Job, memory: int, *, left: bool) -> Report:
    """Play the job's part over one end of the ring."""
    if job.case.client == "native":
        # Past the caches is better when the receiver's memory is not in them anyway; the baseline gets its
        # best.
        streaming = job.case.data == "cold"
        return native.over_ring(memory, job.case.wait, job.part, job.plan(), left=left, streaming=streaming)
    return loops.play(job, native.ring(memory, job.case.wait, left=left))
