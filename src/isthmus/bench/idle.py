"""`isthmus bench idle`: what connections cost that nobody uses.

Two programs and a broker. Memory is what all three hold more than before: pages (proportional set size, so
that a page both ends map is counted once) and page tables. The kernel's own records of sockets and
mappings, a few KiB a connection, are not in it. CPU is what all three use in ten seconds of silence.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["measure", "memory_kib"]

SILENCE_S = 10.0

_END = """
import sys
from isthmus import _native
node = _native.Node(sys.argv[1], "idle")
count = int(sys.argv[2])
held = []
if sys.argv[3] == "server":
    listener = node.listen(0, "stream", backlog=count)
    print(listener.port, flush=True)
    sys.stdin.readline()
    for _ in range(count):
        held.append(listener.accept(60.0))
else:
    print("ready", flush=True)
    port = int(sys.stdin.readline())
    for _ in range(count):
        held.append(node.connect("right", port, "stream", timeout=60.0))
print("open", flush=True)
sys.stdin.readline()
for connection in held:
    connection.send(b"x", 1.0)
    assert connection.recv(1, 10.0)[0] == b"x"
print("alive", flush=True)
sys.stdin.readline()
"""


def measure(count: int, silence_s: float = SILENCE_S) -> dict[str, Any]:
    """Open `count` connections, leave them alone, and say what they cost.

    Returns
    -------
    dict
        ``connections``; ``memory_mib`` in all and by party; ``cpu_s`` of all parties in ``silence_s``;
        ``alive``, whether every one still carried a byte each way afterwards.
    """
    from isthmus.testing import PrivateBroker

    with PrivateBroker(("left", "right")) as broker:
        server = _start(broker.door("right"), count, "server")
        client = _start(broker.door("left"), count, "client")
        with server, client:
            port, _ = _line(server), _line(client)
            parties = {"server": server.pid, "client": client.pid, "broker": broker.pid}
            before = {name: memory_kib([pid]) for name, pid in parties.items()}
            _say(client, port)
            _say(server, "")
            for end in (client, server):
                _line(end)
            time.sleep(0.5)
            after = {name: memory_kib([pid]) for name, pid in parties.items()}
            cpu = sum(_cpu_s(pid) for pid in parties.values())
            time.sleep(silence_s)
            cpu = sum(_cpu_s(pid) for pid in parties.values()) - cpu
            for end in (client, server):
                _say(end, "")
            alive = _line(server) == "alive" and _line(client) == "alive"
    grown = {name: (after[name] - before[name]) / 1024 for name in parties}
    return {
        "bench": "idle",
        "connections": count,
        "memory_mib": round(sum(grown.values()), 1),
        "memory_by_party_mib": {name: round(value, 1) for name, value in grown.items()},
        "silence_s": silence_s,
        "cpu_s": round(cpu, 3),
        "alive": alive,
    }


def _start(door: str, count: int, role: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", _END, door, str(count), role]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise RuntimeError("one of the two programs ended; what it said is above")
    return line


def _say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def memory_kib(pids: Iterable[int]) -> int:
    """Pages (proportional set size) and page tables of processes, KiB."""
    total = 0
    for pid in pids:
        fields = {}
        for name in ("smaps_rollup", "status"):
            for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
                key, _, value = line.partition(":")
                fields[key] = value.split()
        total += int(fields["Pss"][0]) + int(fields["VmPTE"][0])
    return total


def _cpu_s(pid: int) -> float:
    """CPU seconds of a process, its threads included."""
    total = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
    return total / 1e9
