"""Plain ``AF_VSOCK`` between two guests: packets through the switch, nothing of ours in the guests."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import ClassVar

from isthmus import vsock
from isthmus.bench import loops, native
from isthmus.bench.native import Report
from isthmus.bench.transports import Job, Transport
from isthmus.bench.worker import Control

__all__ = ["TRANSPORT"]

#: Of both ends. Without it a guest has 256 KiB in flight.
BUFFER = 4 << 20


class TRANSPORT(Transport):
    """Measured with its buffers raised, as `isthmus.vsock` does."""

    name = "vsock"
    benches = ("pingpong", "stream", "pairs")
    usual_waits: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "pingpong": ("spin", "block"),
        "stream": ("block",),
        "pairs": ("block",),
    }

    def missing(self) -> str | None:
        """It needs guests."""
        return "it is measured between guests (--between vm)"

    def server(self, job: Job, control: Control) -> Report:
        """Accept one connection."""
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
            vsock.set_buffer(listener, BUFFER)
            listener.bind((socket.VMADDR_CID_ANY, job.port or socket.VMADDR_PORT_ANY))
            listener.listen(8)
            control.ready([vsock.local_cid(), listener.getsockname()[1]])
            connection, _ = listener.accept()
        with connection:
            return play(job, connection)

    def client(self, job: Job, control: Control) -> Report:
        """Connect once."""
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as connection:
            vsock.set_buffer(connection, BUFFER)
            cid, port = control.address()
            connection.connect((cid, port))
            control.go()
            return play(job, connection)


def play(job: Job, connection: socket.socket) -> Report:
    """Play the job's part over a connection."""
    if job.case.client == "native":
        return native.over_fd(connection.fileno(), job.case.wait, job.part, job.plan())
    return loops.play(job, loops.SocketChannel(connection, job.case.wait))
