"""TCP between two network namespaces over veth and a bridge: what two containers have today."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from typing import ClassVar

from isthmus.bench import connects, loops, native
from isthmus.bench.bridge import Bridge, BridgeError
from isthmus.bench.cases import Settings
from isthmus.bench.machine import CONGESTION_CONTROL
from isthmus.bench.native import Report
from isthmus.bench.transports import Job, Setup, Transport
from isthmus.bench.worker import Control

__all__ = ["TRANSPORT"]


class TRANSPORT(Transport):
    """The baseline of every ratio. It is measured spinning as well: most of a blocking figure is the wake."""

    name = "tcp-bridge"
    usual_waits: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "pingpong": ("spin", "block"),
        "stream": ("spin", "block"),
        "pairs": ("block",),
        "connect": ("block",),
    }

    def missing(self) -> str | None:
        """Try it: whether namespaces may be made depends on more than can be asked for."""
        try:
            with Bridge():
                return None
        except (BridgeError, OSError) as error:
            return f"no network namespaces here ({error})"

    def prepare(self, stack: ExitStack, settings: Settings) -> Setup:
        """Build the bridge."""
        bridge = stack.enter_context(Bridge())
        return Setup(
            prefix={"server": bridge.prefix("right"), "client": bridge.prefix("left")},
            options={"server": {"host": bridge.right_address}},
        )

    def server(self, job: Job, control: Control) -> Report:
        """Accept one connection, or as many as come."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            control.detail["congestion_control"] = set_congestion_control(listener)
            # A guest knows its own address.
            listener.bind((job.options["host"] or os.environ["ISTHMUS_BENCH_HOST"], 0))
            listener.listen(128)
            control.ready(listener.getsockname())
            if job.load == "connect":
                return connects.serve(job, listener)
            connection, _ = listener.accept()
        with connection:
            return play(job, connection)

    def client(self, job: Job, control: Control) -> Report:
        """Connect once, or again and again."""
        host, port = control.address()
        if job.load == "connect":
            control.go()
            return connects.visit(job, (host, port))
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
            set_congestion_control(connection)
            connection.connect((host, port))
            control.go()
            return play(job, connection)


def play(job: Job, connection: socket.socket) -> Report:
    """Play the job's part over a TCP connection."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if job.case.client == "native":
        return native.over_fd(connection.fileno(), job.case.wait, job.part, job.plan())
    return loops.play(job, loops.SocketChannel(connection, job.case.wait))


def set_congestion_control(connection: socket.socket) -> str:
    """Ask for the congestion control of every baseline, and return the one that is in force."""
    # A user namespace may be allowed fewer than the kernel has; the record then names the other one.
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION_CONTROL.encode())
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()
