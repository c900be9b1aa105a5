"""MX endpoints: inside a node on lanes, and between two nodes that a virtual cable joins."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import ClassVar

from isthmus import errors, mx
from isthmus.bench import loops, native
from isthmus.bench.bridge import BridgeError
from isthmus.bench.cable import Cable
from isthmus.bench.cases import Settings
from isthmus.bench.native import Report
from isthmus.bench.transports import WINDOW, Job, Setup, Transport
from isthmus.bench.worker import Control

__all__ = ["TRANSPORT"]

LIMIT_S = 10.0
#: Messages of a stream that are under way at a time over a cable.
AHEAD = 4
#: Paths and the Gbit/s of their cables.
CABLES: dict[str, int | None] = {"wire": None, "wire-10G": 10}
KEY = 0x15
#: Paths inside a node.
INSIDE = ("sealed", WINDOW)


class TRANSPORT(Transport):
    """Two endpoints: of two domains of a node, or of two nodes."""

    name = "mx"
    paths = (*INSIDE, *CABLES)
    clients = ("native", "python")
    benches = ("pingpong", "stream")
    usual_waits: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "pingpong": ("spin", "adaptive", "block"),
        "stream": ("spin", "adaptive"),
    }

    def missing(self) -> str | None:
        """A card takes root and a cable."""
        try:
            with Cable():
                return None
        except (BridgeError, OSError) as error:
            return f"no cables here ({error})"

    def prepare(self, stack: ExitStack, settings: Settings) -> Setup:
        """Start a node, and two more for each cable."""
        from isthmus.testing import PrivateBroker

        broker = stack.enter_context(PrivateBroker(("left", "right")))
        doors = {path: {"left": broker.door("left"), "right": broker.door("right")} for path in INSIDE}
        mediators = [broker.pid]
        for path, gigabits in CABLES.items():
            cable = stack.enter_context(Cable(gigabits=gigabits))
            doors[path] = {}
            for side in ("left", "right"):
                node = stack.enter_context(PrivateBroker((side, "card")))
                doors[path][side] = node.door(side)
                mediators += [node.pid, start_card(stack, cable, side, node.door("card"))]
        return Setup(
            options={role: {"doors": doors} for role in ("server", "client")}, mediators=tuple(mediators)
        )

    def server(self, job: Job, control: Control) -> Report:
        """Wait for whoever connects."""
        with endpoint(job, "right") as own:
            control.ready([own.nic, own.id])
            mark = own.irecv(KEY, None).wait(LIMIT_S)
            if mark is None or mark.peer is None:
                raise TimeoutError("nobody came")
            return play(job, own, mark.peer)

    def client(self, job: Job, control: Control) -> Report:
        """Connect, and say so."""
        nic, number = control.address()
        with endpoint(job, "left") as own:
            peer = connect(own, nic, number)
            control.go()
            own.isend(peer, KEY, None).wait(LIMIT_S)
            return play(job, own, peer)


def start_card(stack: ExitStack, cable: Cable, side: str, door: str, *options: str) -> int:
    """Start the card of one end of a cable; returns its pid."""
    command = [sys.executable, "-m", "isthmus", "card", "--interface", cable.interface]
    command = [*cable.prefix(side), *command, "--door", door, "--ready", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def stop() -> None:
        process.terminate()
        process.communicate(timeout=LIMIT_S)

    stack.callback(stop)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise BridgeError("the card does not start")
    return process.pid


def endpoint(job: Job, side: str) -> mx.Endpoint:
    """Open an endpoint of one side of this path."""
    from isthmus import attach

    path = job.case.path or "sealed"
    return mx.Endpoint(
        key=KEY,
        wire=path not in INSIDE,
        spin=job.case.wait == "spin",
        node=attach(job.options["doors"][path][side]),
    )


def connect(own: mx.Endpoint, nic: int, number: int) -> mx.Peer:
    """Connect as soon as somebody is there."""
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        with suppress(errors.MXError):
            return own.connect(nic, number, KEY, 1)
        time.sleep(0.05)
    raise TimeoutError("nobody is there")


def play(job: Job, own: mx.Endpoint, peer: mx.Peer) -> Report:
    """Play the job's part with a peer."""
    if job.case.client == "native":
        ahead = AHEAD if job.case.path not in INSIDE and job.load == "stream" else 0
        return native.over_mx(own._native, peer._words, job.case.wait, job.part, job.plan(), ahead)
    return loops.play(job, Channel(own, peer))


class Channel:
    """Whole messages, one at a time."""

    def __init__(self, own: mx.Endpoint, peer: mx.Peer) -> None:
        self._own, self._peer = own, peer

    def send(self, message: bytearray) -> None:
        """Send all of `message`."""
        self._own.isend(self._peer, KEY, message).wait()

    def recv_into(self, message: bytearray) -> None:
        """Fill all of `message`."""
        self._own.irecv(KEY, message).wait()
