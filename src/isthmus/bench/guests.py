"""Pairs of guests to measure between: a broker, a switch, and a bridge that joins the guests' network cards.

Every guest runs one worker, which plays one job after the other as a worker on the host does; all transports
are measured between the same guests, from one boot.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from isthmus.bench.cases import Settings
from isthmus.bench.namespaces import BridgeError, Holder, find_tool, run_ip
from isthmus.bench.process import Pool, Worker
from isthmus.bench.transports import Setup, Transport
from isthmus.testing import PrivateBroker
from isthmus.vm import Guest
from isthmus.vm.guest import descendants
from isthmus.vm.kernels import kvm_works

__all__ = ["GuestPool", "GuestWorker", "Guests", "between_guests"]

#: Where a guest's agent has its door.
DOOR = "/run/isthmus/door/door"
#: Huge pages that a guest of QEMU sets aside, for the lanes of three connections.
HUGE_PAGES = 12
MEMORY_MIB = {"uml": 192, "qemu": 512}
NETWORK = "10.78.0"
#: Where a ping listens that is measured beside others: its class is the highest.
URGENT_PORT = 7777
POLICY = f"""
[[rule]]
from = "*"
to = "*"
ports = {URGENT_PORT}
action = "accept"
class = 7

[[rule]]
from = "*"
to = "*"
action = "accept"
"""
#: What a guest does before anything else: its network card.
CARD = """
ip link set {card} up
ip address add {address}/24 dev {card}
"""
#: Its agent, and its worker.
WORKER = """
{python} -m isthmus agent >/dev/null 2>&1 &
exec {python} -m isthmus.bench.worker
"""


class Guests:
    """`pairs` pairs of guests of one monitor. A context that ends them all.

    Raises
    ------
    BridgeError, Missing, GuestError
        On entry, when namespaces or guests cannot be made. Nothing is left.
    """

    def __init__(self, monitor: str, pairs: int) -> None:
        self.monitor = monitor
        self.names = [f"{side}-{pair}" for pair in range(pairs) for side in ("left", "right")]
        self._stack = ExitStack()
        self._guests: dict[str, Guest] = {}
        self._devices: dict[str, str] = {}
        self._inside: list[str] = []

    def __enter__(self) -> Guests:
        with ExitStack() as stack:
            self._build(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _build(self, stack: ExitStack) -> None:
        if os.geteuid() != 0:
            raise BridgeError("tap devices for the guests' network cards can be made by root alone")
        holder = Holder([find_tool("unshare"), "-n", "--"])
        stack.callback(holder.close)
        self._inside = [find_tool("nsenter"), "-t", str(holder.pid), "-n", "--"]
        batch = ["link add bridge type bridge", "link set bridge up"]
        for name in self.names:
            batch += [f"tuntap add dev {_tap(name)} mode tap", f"link set {_tap(name)} master bridge up"]
        run_ip([*self._inside, find_tool("ip")], batch)
        self.broker = stack.enter_context(PrivateBroker((), POLICY))
        for name in self.names:
            new: dict[str, Any] = {"name": name, "group": None, "uid": None, "kind": "vm"}
            domain = self.broker.ask("domain-add", **new, addresses=[self.address(name)])
            self._devices[name] = domain["socket"]
        while any(d["device"] == "no switch" for d in self.broker.ask("domain-list")["domains"]):
            time.sleep(0.01)
        stack.callback(self._stop)

    def _stop(self) -> None:
        for guest in self._guests.values():
            guest.stop()

    def address(self, name: str) -> str:
        """The address of a guest's network card, which is its domain's."""
        return f"{NETWORK}.{self.names.index(name) + 1}"

    def boot(self, name: str, job: str = WORKER) -> tuple[Guest, int, int]:
        """Start a guest, again if it ran; returns it and the descriptors of its job's input and output.

        `job` is a shell script, in which ``{python}`` is the interpreter.
        """
        if name in self._guests:
            self._guests.pop(name).stop()
        number = self.names.index(name) + 1
        address = self.address(name)
        card = "vec0" if self.monitor == "uml" else "eth0"
        script = (CARD + job).format(card=card, address=address, python=sys.executable)
        heard, say = os.pipe2(os.O_CLOEXEC)
        hear, said = os.pipe2(os.O_CLOEXEC)
        try:
            guest = Guest(
                name,
                self._devices[name],
                ["sh", "-c", script],
                self.broker.directory / "vm" / name,
                monitor=self.monitor,
                memory_mib=MEMORY_MIB[self.monitor],
                environment={
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                    "ISTHMUS_BENCH_HOST": address,
                },
                stdin=heard,
                stdout=said,
                tap=_tap(name),
                mac=f"02:00:00:00:01:{number:02x}",
                huge_pages=HUGE_PAGES,
                within=self._inside,
            )
        finally:
            os.close(heard)
            os.close(said)
        self._guests[name] = guest
        return guest, say, hear

    def cpu_seconds(self) -> float:
        """What the guests' monitors and the switch have used, children that ended among them."""
        switch = [int(word) for word in _pids_of(self.broker.directory)]
        roots = [guest.pid for guest in self._guests.values()]
        pids = {pid for root in roots for pid in descendants(root)} | set(switch)
        ticks = 0
        for pid in pids:
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            ticks += sum(int(field) for field in fields[11:15])
        return ticks / os.sysconf("SC_CLK_TCK")

    @property
    def described(self) -> str:
        """What the guests are, for every table and record."""
        if self.monitor == "uml":
            return "user-mode Linux: user code at full speed, system calls slow; only ratios mean anything"
        if kvm_works():
            return "QEMU with KVM"
        return "QEMU, EMULATED (tcg): only ratios between these guests mean anything"


def _tap(name: str) -> str:
    side, _, pair = name.partition("-")
    return f"tap-{side[0]}{pair}"


def _pids_of(directory: Path) -> list[str]:
    """The switch of a runtime directory: who holds its lock."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"switch" in words and str(directory).encode() in words:
            found.append(entry.parent.name)
    return found


class GuestWorker(Worker):
    """The worker of a guest, or another job: the same talk, over the guest's serial line."""

    def __init__(self, guests: Guests, name: str, job: str = WORKER) -> None:
        self._guest, self._in, self._out = guests.boot(name, job)
        self._unread = b""
        self._ended = False

    def last_words(self, seconds: float) -> str | None:
        """Its error has come by now, or will not."""
        return None

    def wait_ready(self) -> None:
        """Wait until the job begins; see `Guest.wait_ready`."""
        self._guest.wait_ready()

    def fate(self) -> str:
        """What became of it, once it says nothing more."""
        return "is gone, or its guest is"

    def end(self) -> None:
        """Stop the guest."""
        if not self._ended:
            self._ended = True
            self._guest.stop()
            os.close(self._in)
            os.close(self._out)


class GuestPool(Pool):
    """Workers in guests, named where others have a command in front."""

    def __init__(self, guests: Guests) -> None:
        super().__init__()
        self._guests = guests

    def start(self, names: Sequence[str]) -> None:
        """Boot these guests together, and wait until their workers listen."""
        workers = [(name, GuestWorker(self._guests, name)) for name in names]
        self._all += [worker for _, worker in workers]
        for name, worker in workers:
            worker.wait_ready()
            self.give_back([name], worker)

    def take(self, prefix: Sequence[str]) -> Worker:
        idle = self._idle.setdefault(tuple(prefix), [])
        if not idle:
            self.start(prefix)
        return idle.pop()


class GuestSetup(Setup):
    """Which guest plays which role of which pair."""

    def prefix_of(self, role: str, pair: int) -> list[str]:
        return [f"{'right' if role == 'server' else 'left'}-{pair}"]


def between_guests(transport: Transport) -> Transport | None:
    """The transport as it is between guests; None for one that has no figure there."""
    kind = _BETWEEN.get(transport.name)
    return None if kind is None else kind()


def _adapt(name: str, module: str, paths: tuple[str | None, ...], options: dict[str, Any]) -> Any:
    import importlib

    base = importlib.import_module(f"isthmus.bench.transports.{module}").TRANSPORT

    class Between(base):  # type: ignore[misc, valid-type]  # the class is chosen by name
        """Both ends are in guests."""

        def missing(self) -> str | None:
            return None

        def refuses(self, case: Any) -> str | None:
            if case.bench == "connect" or case.client == "asyncio":
                return f"{self.name} is not measured so between guests"
            return super().refuses(case)  # type: ignore[no-any-return]  # so its base is unknown to mypy

        def prepare(self, stack: ExitStack, settings: Settings) -> Setup:
            return GuestSetup(options={role: options for role in ("server", "client")})

    Between.paths = paths
    return Between


_LANES = {"doors": {"left": DOOR, "right": DOOR}, "urgent_port": URGENT_PORT}
_BETWEEN = {
    "isthmus": lambda: _adapt("isthmus", "isthmus", ("switch",), _LANES)(),
    "tcp-bridge": lambda: _adapt("tcp-bridge", "tcp_bridge", (None,), {"host": ""})(),
    "vsock": lambda: _adapt("vsock", "vsock", (None,), {"urgent_port": URGENT_PORT})(),
}
