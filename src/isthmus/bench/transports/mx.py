"""MX endpoints: inside a node on lanes, and between two nodes that a virtual cable joins."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import ClassVar

from isthmus import attach, errors, mx
from isthmus.bench import loops, native
from isthmus.bench.bridge import BridgeError
from isthmus.bench.cable import LOST, Cable
from isthmus.bench.cases import MX_BENCHES, Case, Settings
from isthmus.bench.idle import memory_kib
from isthmus.bench.native import Report
from isthmus.bench.transports import WINDOW, Job, Setup, Transport
from isthmus.bench.worker import Control
from isthmus.card import Card

__all__ = ["TRANSPORT"]

LIMIT_S = 10.0
#: Messages of a stream that are under way at a time over a cable.
AHEAD = 4
#: Small messages that are under way at a time.
MANY = 32
#: Messages of each of many endpoints that are under way at a time.
EACH_AHEAD = 2
#: The largest MTU of a virtual cable; no real one has it.
LONGEST = 65535
#: Paths and their cables.
CABLES: dict[str, Callable[[], Cable]] = {
    "wire": Cable,
    "wire-10G": lambda: Cable(gigabits=10),
    "wire-own": Cable,
    "wire-own-10G": lambda: Cable(gigabits=10),
    "wire-64K": lambda: Cable(LONGEST),
    "wire-64K-10G": lambda: Cable(LONGEST, gigabits=10),
    "wire-lossy": lambda: Cable(lost=LOST),
    "wire-1G": lambda: Cable(gigabits=1),
}
#: Cards with Open-MX's own dialect, in frames as long as the cable takes.
OWN = {
    path: ("--own", str(mtu))
    for name, mtu in (("wire-own", 9000), ("wire-64K", LONGEST))
    for path in (name, f"{name}-10G")
}
#: Paths inside a node.
INSIDE = ("sealed", WINDOW)
PATHS = {
    "pingpong": ("sealed", "wire", "wire-10G"),
    "stream": ("sealed", WINDOW, "wire", "wire-10G", "wire-own", "wire-own-10G", "wire-64K", "wire-64K-10G"),
    "rate": ("sealed", "wire"),
    "overlap": ("sealed", "wire"),
    "loss": ("wire", "wire-lossy"),
    "endpoints": ("wire", "wire-1G"),
}
KEY = 0x15
#: Time in which what was opened finds its rest, before its memory is looked at.
REST_S = 0.3
#: Time in which the last frames arrive.
SETTLE_S = 0.05


class TRANSPORT(Transport):
    """Two endpoints: of two domains of a node, or of two nodes."""

    name = "mx"
    paths = (*INSIDE, *CABLES)
    clients = ("native", "python")
    benches = MX_BENCHES
    usual_waits: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "pingpong": ("spin", "adaptive", "block"),
        "stream": ("spin", "adaptive"),
        "rate": ("spin", "adaptive"),
        "overlap": ("adaptive",),
        "loss": ("adaptive",),
        "endpoints": ("adaptive",),
    }

    def paths_for(self, bench: str) -> tuple[str | None, ...]:
        """Most benches need not every cable."""
        return PATHS.get(bench, ())

    def refuses(self, case: Case) -> str | None:
        """Some need threads of their own."""
        if case.bench == "endpoints" and case.client == "python":
            return "many endpoints at once are measured with the native client"
        return super().refuses(case)

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
        cards: list[int] = []
        detail: dict[str, str] = {}
        for path, lay in CABLES.items():
            if path not in settings.paths:
                continue
            options: tuple[str, ...] = OWN.get(path, ())
            try:
                cable = stack.enter_context(lay())
            except BridgeError:
                if path != "wire-lossy":
                    raise
                # This kernel drops nothing on demand; the cards do.
                cable, options = stack.enter_context(Cable()), ("--lose", str(round(LOST * 1e6)))
            if path == "wire-lossy":
                detail["frames_lost_by"] = "card" if options else "cable"
            doors[path] = {}
            for side in ("left", "right"):
                node = stack.enter_context(PrivateBroker((side, "card")))
                doors[path][side] = node.door(side)
                cards.append(start_card(stack, cable, side, node.door("card"), *options))
                mediators += [node.pid, cards[-1]]
        ends = {role: {"doors": doors, "cards": cards} for role in ("server", "client")}
        return Setup(options=ends, mediators=tuple(mediators), detail=detail)

    def server(self, job: Job, control: Control) -> Report:
        """Wait for whoever connects."""
        if job.case.bench == "endpoints":
            return serve_many(job, control)
        with endpoint(job, "right") as own:
            control.ready([own.nic, own.id])
            mark = own.irecv(KEY, None).wait(LIMIT_S)
            if mark is None or mark.peer is None:
                raise TimeoutError("nobody came")
            return play(job, own, mark.peer)

    def client(self, job: Job, control: Control) -> Report:
        """Connect, and say so."""
        if job.case.bench == "endpoints":
            return stream_many(job, control)
        nic, number = control.address()
        with endpoint(job, "left") as own:
            peer = connect(own, nic, number)
            control.go()
            own.isend(peer, KEY, None).wait(LIMIT_S)
            if job.case.bench != "loss":
                return play(job, own, peer)
            with frames_lost(job, control):
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
    channel = Channel(own, peer)
    if job.load == "overlap":
        return loops.overlap(job, channel)
    if job.case.client == "native":
        ahead = AHEAD if job.case.path not in INSIDE and job.load == "stream" else 0
        ahead = MANY if job.case.bench == "rate" else ahead
        return native.over_mx(own._native, peer._words, job.case.wait, job.part, job.plan(), ahead)
    if job.case.bench == "rate":
        return loops.play(job, loops.Ahead(channel, job.size, MANY))
    return loops.play(job, channel)


def serve_many(job: Job, control: Control) -> Report:
    """Receive at many endpoints at once, each from a peer of its own."""
    before = memory_kib([os.getpid(), *job.options["cards"]])
    with ExitStack() as stack:
        ends = [stack.enter_context(endpoint(job, "right")) for _ in range(job.case.pairs)]
        control.ready(
            {"nic": ends[0].nic, "ids": [end.id for end in ends], "pid": os.getpid(), "kib": before}
        )
        peers = []
        for end in ends:
            mark = end.irecv(KEY, None).wait(LIMIT_S)
            if mark is None or mark.peer is None:
                raise TimeoutError("nobody came")
            peers.append(mark.peer)
        return play_many(job, ends, peers)


def stream_many(job: Job, control: Control) -> Report:
    """Stream from many endpoints at once, each to a peer of its own, once their memory is known."""
    server = control.address()
    own = memory_kib([os.getpid()])
    with ExitStack() as stack:
        ends = [stack.enter_context(endpoint(job, "left")) for _ in range(job.case.pairs)]
        peers = [connect(end, server["nic"], number) for end, number in zip(ends, server["ids"], strict=True)]
        time.sleep(REST_S)
        grown = memory_kib([os.getpid(), server["pid"], *job.options["cards"]]) - own - server["kib"]
        # There are two of each: programs, cards and endpoints of a pair.
        control.detail["idle_endpoint_kib"] = round(grown / (2 * job.case.pairs), 1)
        control.go()
        for end, peer in zip(ends, peers, strict=True):
            end.isend(peer, KEY, None).wait(LIMIT_S)
        with frames_lost(job, control):
            return play_many(job, ends, peers)


@contextmanager
def frames_lost(job: Job, control: Control) -> Iterator[None]:
    """Ask both cards what they sent for these domains meanwhile, and what arrived."""
    doors = job.options["doors"][job.case.path]
    with Card(attach(doors["left"])) as left, Card(attach(doors["right"])) as right:

        def told() -> tuple[int, int]:
            both = left.counters(), right.counters()
            # Those that a card drops on purpose it does not send.
            sent = sum(each["sent_frames"] + each["faults"] for each in both)
            return sent, sum(each["received_frames"] for each in both)

        before = told()
        yield
        time.sleep(SETTLE_S)
        sent, arrived = (now - then for now, then in zip(told(), before, strict=True))
        control.detail["frames_lost"] = round(1 - arrived / sent, 4)


def play_many(job: Job, ends: list[mx.Endpoint], peers: list[mx.Peer]) -> Report:
    """Play the job's part at all of them, and add up what they moved while all of them were at work."""
    cpu_s = time.process_time()
    natives, words = [end._native for end in ends], [peer._words for peer in peers]
    each, moved, seconds = native.over_mx_many(
        natives, words, job.case.wait, job.part, job.plan(), EACH_AHEAD
    )
    receives = any(found["seconds"] for found in each)
    total = native.report(
        count=sum(moved) // job.size,
        bytes=sum(moved),
        seconds=seconds if receives else None,
        cpu_s=time.process_time() - cpu_s,
        total_bytes=sum(found["total_bytes"] for found in each),
    )
    total["rates"] = [size / seconds for size in moved] if receives and seconds else []
    return total


class Channel:
    """Whole messages, one at a time or several."""

    def __init__(self, own: mx.Endpoint, peer: mx.Peer) -> None:
        self._own, self._peer = own, peer

    def send(self, message: bytearray) -> None:
        """Send all of `message`."""
        self._own.isend(self._peer, KEY, message).wait()

    def recv_into(self, message: bytearray) -> None:
        """Fill all of `message`."""
        self._own.irecv(KEY, message).wait()

    def isend(self, message: bytearray) -> mx.Request:
        """Begin to send."""
        return self._own.isend(self._peer, KEY, message)

    def irecv(self, message: bytearray) -> mx.Request:
        """Post a receive."""
        return self._own.irecv(KEY, message)

    def wait(self, request: mx.Request) -> None:
        """Wait for it."""
        request.wait()

    def cancel(self, request: mx.Request) -> None:
        """Take a receive back."""
        request.cancel()
