"""iceoryx2: zero-copy publish and subscribe over shared memory, without isolation.

Two services, one for each direction. A message is copied into a loaned sample and out of a received one, so
that, as everywhere else, it ends in the receiver's own buffer.
"""

from __future__ import annotations

import ctypes
import importlib
from typing import Any

from isthmus.bench import loops
from isthmus.bench.native import Report
from isthmus.bench.transports import Job, Transport, why_not_importable
from isthmus.bench.worker import Control

__all__ = ["TRANSPORT"]

#: Samples a subscriber may be behind.
DEPTH = 8


class TRANSPORT(Transport):
    """Publishers wait when a subscriber is behind; subscribers ask again and again."""

    name = "iceoryx2"
    clients = ("python",)
    benches = ("pingpong", "stream")
    waits = ("spin",)

    def missing(self) -> str | None:
        """Whether it is installed."""
        return why_not_importable("iceoryx2", "iceoryx2")

    def server(self, job: Job, control: Control) -> Report:
        """Create both services."""
        # The directory is new for each run, so its name is one that nobody else has.
        with Channel(job.directory, job.size, sends="right", receives="left") as channel:
            control.ready(job.directory)
            return loops.play(job, channel)

    def client(self, job: Job, control: Control) -> Report:
        """Open them."""
        with Channel(control.address(), job.size, sends="left", receives="right") as channel:
            control.go()
            return loops.play(job, channel)


class Channel:
    """A publisher and a subscriber."""

    def __init__(self, name: str, size: int, *, sends: str, receives: str) -> None:
        iox: Any = importlib.import_module("iceoryx2")
        iox.set_log_level(iox.LogLevel.Fatal)
        self._node = iox.NodeBuilder.new().create(iox.ServiceType.Ipc)

        def service(direction: str) -> Any:
            builder = self._node.service_builder(iox.ServiceName.new(f"{name}/{direction}"))
            builder = builder.publish_subscribe(iox.Slice[ctypes.c_uint8]).enable_safe_overflow(False)
            return builder.subscriber_max_buffer_size(DEPTH).open_or_create()

        self._services = [service(sends), service(receives)]
        publishers = self._services[0].publisher_builder().initial_max_slice_len(size)
        waiting = iox.BackpressureStrategy.RetryUntilDelivered
        self._publisher = publishers.backpressure_strategy(waiting).create()
        self._subscriber = self._services[1].subscriber_builder().create()
        #: Each buffer and its address, which costs more to ask for than a small message takes.
        self._known: dict[int, tuple[bytearray, int]] = {}

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        # What is not deleted stays in /dev/shm: a worker's child ends without running destructors.
        for port in (self._publisher, self._subscriber, *self._services, self._node):
            if hasattr(port, "delete"):
                port.delete()

    def _address(self, message: bytearray) -> int:
        known = self._known.get(id(message))
        if known is None:
            known = (message, ctypes.addressof(ctypes.c_char.from_buffer(message)))
            self._known[id(message)] = known
        return known[1]

    def send(self, message: bytearray) -> None:
        """Copy the message into a sample and send that."""
        size = len(message)
        sample = self._publisher.loan_slice_uninit(size)
        ctypes.memmove(sample.payload_ptr, self._address(message), size)
        sample.assume_init().send()

    def recv_into(self, message: bytearray) -> None:
        """Wait for a sample, copy it out and give it back."""
        receive = self._subscriber.receive
        while (sample := receive()) is None:
            pass
        ctypes.memmove(self._address(message), sample.payload_ptr, len(message))
        sample.delete()
