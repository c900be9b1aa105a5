"""`isthmus bench programs --between vm`: programs that know nothing of Isthmus, in two guests of one kind.

A stock server and its stock load generator, two ways in turns: TCP over the guests' network cards and a
bridge, and both under ``isthmus run``. All ways and programs are measured between the same two guests, from
one boot. How many requests make a turn of so many seconds is found by a turn that does not count, because
guests differ in speed a hundredfold.

In each guest :mod:`.guest_runner` starts the programs and says when their work begins and ends: an emulated
guest spends seconds on starting `isthmus run`, which are not counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from isthmus.bench import machine
from isthmus.bench.guest_runner import START_S
from isthmus.bench.guests import Guests, GuestWorker
from isthmus.bench.programs import PATIENCE_S, PROGRAMS, Figures, record_of, redis_client

__all__ = ["PROGRAMS_BETWEEN_GUESTS", "WAYS_BETWEEN_GUESTS", "measure_between_guests"]

#: A client's words, given the server's address, for how long to work, s, and how many requests a second
#: it is expected to make.
PROGRAMS_BETWEEN_GUESTS: dict[str, Callable[[str, float, float], list[str]]] = {
    "redis": lambda to, seconds, per_second: redis_client(to, max(1, int(seconds * per_second))),
    "iperf3": lambda to, seconds, _: PROGRAMS["iperf3"].client(to, seconds),
}
#: Programs that are told how much to do, and not for how long; and what they do in the turn that does not
#: count, requests, about s.
COUNTED = ("redis",)
FIRST_REQUESTS = 500
FIRST_S = 1.0
#: A directory of a guest's own.
DIRECTORY = Path("/run")
SERVER, CLIENT = "right-0", "left-0"

JOB = "exec {python} -m isthmus.bench.guest_runner"
#: What starts a program, by way.
WAYS_BETWEEN_GUESTS: dict[str, list[str]] = {
    "bridge": [],
    "run": [sys.executable, "-m", "isthmus", "run", "--require", "--"],
}


class Pair:
    """Two guests that run programs. A context that ends them.

    Raises
    ------
    BridgeError, Missing, GuestError, WorkerError
        On entry, when guests or their agents cannot be started. Nothing is left.
    """

    def __init__(self, monitor: str) -> None:
        self.guests = Guests(monitor, 1)
        self._workers: dict[str, GuestWorker] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Pair:
        with ExitStack() as stack:
            stack.enter_context(self.guests)
            for name in self.guests.names:
                self._workers[name] = GuestWorker(self.guests, name, JOB)
                stack.callback(self._workers[name].end)
            for worker in self._workers.values():
                worker.wait_ready()
            for name in self.guests.names:
                self._expect(name, "ready", START_S)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def turn(self, name: str, way: str, seconds: float, per_second: float) -> Figures:
        """Run a program once, for about so many seconds, and return its figures.

        Raises
        ------
        WorkerError
            It failed; says what it printed. The guest has been ended.
        """
        bench = PROGRAMS[name]
        self.start_server(way, bench.server(DIRECTORY, way), bench.port)
        client = PROGRAMS_BETWEEN_GUESTS[name](self.guests.address(SERVER), seconds, per_second)
        text, busy = self.work(way, client, seconds + PATIENCE_S)
        self._workers[SERVER].say({"end": True})
        self._expect(SERVER, "over", START_S)
        return {**bench.read(text), "cpu_s": busy}

    def start_server(self, way: str, words: list[str], port: int) -> None:
        """Start a program in the guest `SERVER`, and wait until it listens and can be reached that way."""
        self._workers[SERVER].say({"serve": words, "before": WAYS_BETWEEN_GUESTS[way], "port": port})
        self._expect(SERVER, "listening", 2 * START_S)
        until = time.monotonic() + START_S
        while way == "run" and port not in self._exchanged_ports():
            if time.monotonic() > until:
                raise RuntimeError(f"{words[0]}: the broker does not know of port {port}")
            time.sleep(0.02)

    def _exchanged_ports(self) -> set[int]:
        domain = self.guests.broker.ask("status", domain=SERVER)["domain"]
        return {entry["port"] for entry in domain["ports"]}

    def work(self, way: str, words: list[str], limit_s: float) -> tuple[str, float]:
        """What a client printed, and how many processors monitors and switch kept busy while it worked."""
        limit_s += START_S
        client = self._workers[CLIENT]
        client.say({"work": words, "before": WAYS_BETWEEN_GUESTS[way], "limit_s": limit_s})
        self._expect(CLIENT, "began", limit_s)
        began, used = time.perf_counter(), self.guests.cpu_seconds()
        self._expect(CLIENT, "ended", limit_s + START_S)
        took, used = time.perf_counter() - began, self.guests.cpu_seconds() - used
        return str(self._expect(CLIENT, "text", START_S)["text"]), used / took

    def _expect(self, name: str, key: str, limit_s: float) -> dict[str, Any]:
        return self._workers[name].expect(key, time.monotonic() + limit_s)


def measure_between_guests(
    names: Sequence[str], monitor: str, *, repeat: int, seconds: float, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run each program in each way between two guests, in turns.

    Parameters
    ----------
    monitor : {"uml", "qemu"}
        What runs the guests.
    seconds : float, s
        What a turn takes, about.

    Returns
    -------
    list of dict
        As of `programs.measure`, except: ``monitor``; ``machine`` has ``guests``, which says what they are;
        ``cpu_s`` is what monitors and switch used for each second of work.

    Raises
    ------
    ValueError
        A name that is none of `PROGRAMS_BETWEEN_GUESTS`.
    BridgeError, Missing, GuestError
        The guests cannot be started here.
    RuntimeError
        A program failed; says which, and what it printed.
    """
    if unknown := sorted(set(names) - set(PROGRAMS_BETWEEN_GUESTS)):
        raise ValueError(f"{unknown[0]}: between guests, one of {', '.join(PROGRAMS_BETWEEN_GUESTS)}")
    present = []
    for name in names:
        if missing := PROGRAMS[name].missing():
            tell(f"{name}: {', '.join(missing)} is not installed")
        else:
            present.append(name)
    if not present:
        return []
    found = []
    with Pair(monitor) as pair:
        described = {**machine.describe(), "guests": pair.guests.described}
        tell(f"2 guests: {pair.guests.described}")
        for name in present:
            runs = _turns(pair, name, repeat, seconds, tell)
            found += [record_of(name, way, runs[way], described, monitor) for way in WAYS_BETWEEN_GUESTS]
    return found


def _turns(
    pair: Pair, name: str, repeat: int, seconds: float, tell: Callable[[str], None]
) -> dict[str, list[Figures]]:
    """The figures of each turn, by way. How many requests a turn makes follows from the turn before."""
    per_second = dict.fromkeys(WAYS_BETWEEN_GUESTS, FIRST_REQUESTS / FIRST_S)
    if name in COUNTED:
        tell(f"{name}: a turn that does not count")
        per_second = {way: pair.turn(name, way, FIRST_S, per_second[way])["per_second"] for way in per_second}
    runs: dict[str, list[Figures]] = {way: [] for way in WAYS_BETWEEN_GUESTS}
    for turn in range(repeat):
        tell(f"{name}: turn {turn + 1} of {repeat}")
        for way in WAYS_BETWEEN_GUESTS:
            figures = pair.turn(name, way, seconds, per_second[way])
            per_second[way] = figures.get("per_second", 0.0)
            runs[way].append(figures)
    return runs
