"""What carries the bytes: one small module for each transport, and this contract between them and the runner.

A transport is a class with a few facts (which paths, clients, waits and benches it has) and three pieces of
code, which run in two places:

`prepare`
    In the runner, once for a whole bench. Makes what the workers need (namespaces, a broker), registers its
    undoing on the `ExitStack`, and returns a :class:`Setup`: a command prefix for each role (as ``nsenter
    ...``, to put the worker where it belongs), options handed to the workers as JSON, and the pids of
    processes that stand between the two ends, whose CPU time is counted as theirs.
`server`, `client`
    In two fresh worker processes, pinned already. The server listens, calls ``control.ready(address)`` with
    any JSON value and accepts; the client is handed that value by ``control.address()``, connects, and calls
    ``control.go()``, which returns when every pair of the run is connected. Then both play their loop and
    return its report.
`alone`
    Instead of these two, for cases whose `roles` are ``("alone",)``: limits, programs that start both ends
    themselves, and both ends in one event loop (``client="asyncio"``).

To add a transport, write a module here with a class ``TRANSPORT`` derived from :class:`Transport` and add its
name to `NAMES`, at the place where tables should show it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from isthmus.bench import native
from isthmus.bench.cases import WAITS, Case, Settings
from isthmus.bench.native import PlanDict, Report

if TYPE_CHECKING:
    from isthmus.bench.worker import Control

__all__ = ["BETWEEN_NODES", "NAMES", "Job", "Setup", "Transport", "load", "why_not_importable"]

#: Each transport and its module, in the order of the tables. A module is loaded when its transport is asked
#: for.
NAMES: dict[str, str] = {
    "isthmus": "isthmus",
    "mx": "mx",
    "tcp-bridge": "tcp_bridge",
    "tcp-cable": "tcp_cable",
    "tcp-cable-10G": "tcp_cable:LIMITED",
    "tcp-cable-lossy": "tcp_cable:LOSSY",
    "vsock": "vsock",
    "unix": "unix",
    "mapped-ring": "mapped_ring",
    "pyzmq": "zeromq",
    "mpi4py": "mpi",
    "ucx": "ucx",
    "iceoryx2": "iceoryx",
    "memcpy": "limits:Memcpy",
    "cacheline": "limits:Cacheline",
}

#: The path of messages that are sent from windows.
WINDOW = "window"
#: What `isthmus bench mx` measures, and no other unless it is named.
BETWEEN_NODES = ("mx", "tcp-cable", "tcp-cable-10G", "tcp-cable-lossy")


@dataclass(frozen=True)
class Job:
    """What one worker is told.

    Attributes
    ----------
    case : Case
        The case this run belongs to.
    role : str
        ``server``, ``client`` or ``alone``.
    load : str
        The loop to play: ``pingpong``, ``stream``, ``overlap`` or ``connect``. Most others play one of the
        first two.
    size : int, bytes
        Of a message; 1 where messages are not the point.
    cpus : list of int
        Processors to keep to; empty for all. Workers with the role ``alone`` are given two.
    warmup_s, duration_s, gap_s : float, seconds
        Phases of the loop, and the pause after each round trip.
    directory : str
        A private directory for sockets, new for each run.
    options : dict
        What `prepare` returned for this role.
    """

    case: Case
    role: str
    load: str
    size: int
    cpus: list[int]
    warmup_s: float
    duration_s: float
    gap_s: float
    directory: str
    options: dict[str, Any]

    @property
    def part(self) -> str:
        """What the native loops call this end of the load."""
        return f"{self.load}-{self.role}"

    @property
    def port(self) -> int:
        """Where to listen: a port of a higher class, if there is one and this is measured beside others."""
        return int(self.options.get("urgent_port", 0)) if self.case.beside is not None else 0

    def plan(self) -> PlanDict:
        """Return what the native loops want to know."""
        return PlanDict(
            size=self.size,
            warmup_s=self.warmup_s,
            duration_s=self.duration_s,
            gap_s=self.gap_s,
            pages=self.case.pages,
            data=self.case.data,
            windows=self.case.path == WINDOW,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the job as JSON can carry it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Job:
        """Undo `as_dict`."""
        return cls(**{**fields, "case": Case(**fields["case"])})


@dataclass
class Setup:
    """What `Transport.prepare` made.

    Attributes
    ----------
    prefix : dict of str to list of str
        Command in front of the worker of each role; nothing for roles left out.
    options : dict of str to dict
        For each role, what its job is to hold as `options`.
    mediators : sequence of int
        Pids between the two ends.
    detail : dict
        Settings for the record's `detail`.
    """

    prefix: dict[str, list[str]] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    mediators: Sequence[int] = ()
    detail: dict[str, Any] = field(default_factory=dict)

    def prefix_of(self, role: str, pair: int) -> list[str]:
        """The command in front of the worker that plays this role of a pair."""
        return self.prefix.get(role, [])


class Transport:
    """A transport's facts and code; this base class is one that has no ends of its own and no demands."""

    name: ClassVar[str]
    #: What `path` of a record may be.
    paths: ClassVar[tuple[str | None, ...]] = (None,)
    clients: ClassVar[tuple[str, ...]] = ("native", "python")
    benches: ClassVar[tuple[str, ...]] = ("pingpong", "stream", "pairs", "connect")
    #: Every wait it can do, and those measured when the user named none.
    waits: ClassVar[tuple[str, ...]] = WAITS
    usual_waits: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    #: What starting its ends takes, beyond a fork.
    start_s: ClassVar[float] = 0.0

    def missing(self) -> str | None:
        """Return why it cannot be measured on this machine, or None."""
        return None

    def paths_for(self, bench: str) -> tuple[str | None, ...]:
        """Return the paths that this bench is about."""
        return self.paths

    def waits_for(self, bench: str, client: str) -> tuple[str, ...]:
        """Return the waits to measure when the user named none."""
        if client == "asyncio":
            return ("block",)
        return self.usual_waits.get(bench, self.waits)

    def normal(self, case: Case) -> Case:
        """Return the case without what makes no difference here; equal ones are measured once."""
        return case

    def refuses(self, case: Case) -> str | None:
        """Return why this case makes no sense here, or None."""
        if case.bench not in self.benches:
            return f"{self.name} has no figure for {case.bench}"
        if case.client not in self.clients:
            return f"{self.name} has no {case.client} client"
        if case.client in ("native", "in-place") and (reason := native.missing()):
            return reason
        if case.client == "asyncio":
            if case.bench != "pingpong":
                return "an event loop is measured by its round trip alone"
            if case.wait != "block":
                return "an event loop sleeps in epoll: its wait is block"
        elif case.wait not in self.waits:
            return f"{self.name} waits {' or '.join(self.waits)}"
        if case.bench == "overlap" and case.client != "python":
            return "a transfer takes long enough for Python to measure"
        if case.client == "in-place" and case.bench != "stream":
            return "messages that stay in the rings are measured as a stream alone"
        if case.client != "native" and case.data != "hot":
            return "cold data is walked by the native client only"
        if case.bench == "pairs" and case.client != "native" and self.clients[0] == "native":
            return "pairs are measured with the native client, so that the interpreter is not the figure"
        return None

    def prepare(self, stack: ExitStack, settings: Settings) -> Setup:
        """Make what the workers need, in the runner. `stack` undoes it."""
        return Setup()

    def roles(self, case: Case) -> tuple[str, ...]:
        """Return the processes a pair consists of."""
        return ("alone",) if case.client == "asyncio" else ("server", "client")

    def server(self, job: Job, control: Control) -> Report:
        """Listen, say where, accept, and play the server's part."""
        raise NotImplementedError

    def client(self, job: Job, control: Control) -> Report:
        """Connect, wait for the word, and play the client's part."""
        raise NotImplementedError

    def alone(self, job: Job, control: Control) -> Report:
        """Play both parts, or the only one."""
        raise NotImplementedError


def why_not_importable(module: str, package: str) -> str | None:
    """Return why a peer's module cannot be used, or None. It is not imported: some start threads then."""
    if importlib.util.find_spec(module) is None:
        return f"{package} is not installed"
    return None


def load(name: str) -> Transport:
    """Return the transport of that name.

    Raises
    ------
    ValueError
        There is none; the message lists those there are.
    """
    if name not in NAMES:
        raise ValueError(f"transport {name!r}: one of {', '.join(NAMES)}")
    module, _, attribute = NAMES[name].partition(":")
    kind = getattr(importlib.import_module(f"{__name__}.{module}"), attribute or "TRANSPORT")
    transport = kind()
    assert isinstance(transport, Transport)
    return transport
