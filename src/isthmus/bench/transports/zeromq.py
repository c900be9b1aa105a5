"""pyzmq: PAIR sockets over `ipc`, the way Python programs on one node often talk."""

from __future__ import annotations

import importlib
import os
from typing import Any

from isthmus.bench import loops
from isthmus.bench.native import Report
from isthmus.bench.transports import Job, Transport, why_not_importable
from isthmus.bench.worker import Control

__all__ = ["TRANSPORT"]


class TRANSPORT(Transport):
    """One PAIR socket each; libzmq's own thread moves the bytes."""

    name = "pyzmq"
    clients = ("python",)
    benches = ("pingpong", "stream")
    waits = ("block",)

    def missing(self) -> str | None:
        """Whether it is installed."""
        return why_not_importable("zmq", "pyzmq")

    def server(self, job: Job, control: Control) -> Report:
        """Bind."""
        with Channel() as channel:
            address = "ipc://" + os.path.join(job.directory, "zmq")
            channel.socket.bind(address)
            control.ready(address)
            return loops.play(job, channel)

    def client(self, job: Job, control: Control) -> Report:
        """Connect."""
        with Channel() as channel:
            channel.socket.connect(control.address())
            control.go()
            return loops.play(job, channel)


class Channel:
    """A PAIR socket; what its thread has not sent yet is sent before it closes."""

    def __init__(self) -> None:
        self._zmq: Any = importlib.import_module("zmq")
        self._context = self._zmq.Context()
        self.socket = self._context.socket(self._zmq.PAIR)

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self._context.term()

    def send(self, message: bytearray) -> None:
        """Copy the message into libzmq's queue."""
        # Without the copy, libzmq would send the buffer while the loop writes the next mark into it.
        self.socket.send(message, copy=True)

    def recv_into(self, message: bytearray) -> None:
        """Copy a message out of it."""
        frame = self.socket.recv(copy=False).buffer
        memoryview(message)[:] = frame
