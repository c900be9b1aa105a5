"""Guests whose memory becomes more and less while what lies in it is in use."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guests import LIMIT_S, Node, needs

from isthmus.vm.kernels import qemu_kernel

pytestmark = needs("qemu")

MIB = 1 << 20
MEMORY_MIB = 384
ECHO = """
    import isthmus, threading
    def serve(sock):
        with sock:
            while data := sock.recv(1 << 20):
                sock.sendall(data)
    with isthmus.create_server(("", 9400)) as listener:
        print("listening")
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""


class Monitor:
    """QEMU, asked over its machine protocol (QMP: one JSON object a line)."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(LIMIT_S)
        self._sock.connect(str(path))
        self._lines = self._sock.makefile("rb")
        self._lines.readline()
        self.events: list[str] = []
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        asked = {"execute": command, "arguments": arguments}
        self._sock.sendall(json.dumps(asked).encode() + b"\n")
        while "return" not in (answer := json.loads(self._lines.readline())):
            assert "error" not in answer, answer
            self.events.append(answer["event"])
        return answer["return"]

    def await_event(self, name: str) -> None:
        until = time.monotonic() + LIMIT_S
        while name not in self.events:
            assert time.monotonic() < until, f"no {name}, only {self.events}"
            self.ask("query-status")
            time.sleep(0.1)

    def close(self) -> None:
        self._lines.close()
        self._sock.close()


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Path]]:
    """A guest, and the socket of its monitor."""
    path = tmp_path_factory.mktemp("monitor") / "qmp"
    options = ("-qmp", f"unix:{path},server=on,wait=off", "-device", "virtio-balloon-pci")
    options += ("-m", "slots=2,maxmem=1G")
    with Node(
        "qemu", guests=("b",), containers=("c",), agents=True, memory_mib=MEMORY_MIB, options=options
    ) as node:
        yield node, path


@pytest.fixture
def node(booted: tuple[Node, Path]) -> Iterator[Node]:
    """The guest, with all its memory: it boots again after each test."""
    node, _ = booted
    if node["b"].stopped:
        node.boot_again("b")
    yield node
    node["b"].stop()


@pytest.fixture
def monitor(node: Node, booted: tuple[Node, Path]) -> Iterator[Monitor]:
    monitor = Monitor(booted[1])
    yield monitor
    monitor.close()


def echoes(sock: socket.socket) -> bool:
    """Does everything come back as it went, more than a ring of it?"""
    for turn in range(6):
        sent = bytes([turn + 1, 7, 99, 254]) * (MIB // 4)
        sock.sendall(sent)
        got = bytearray()
        while len(got) < len(sent):
            data = sock.recv(len(sent) - len(got))
            if not data:
                return False
            got += data
        if got != sent:
            return False
    return True


def ballooned(monitor: Monitor, mib: int) -> None:
    monitor.ask("balloon", value=mib * MIB)
    until = time.monotonic() + LIMIT_S
    while monitor.ask("query-balloon")["actual"] != mib * MIB:
        assert time.monotonic() < until, "the balloon stays as it is"
        time.sleep(0.05)


def test_a_balloon_takes_nothing_that_a_lane_lies_in(node: Node, monitor: Monitor) -> None:
    module = qemu_kernel().module("virtio_balloon")
    assert module is not None
    assert node["b"].run(["insmod", str(module)]).code() == 0
    assert node["b"].python(ECHO).line() == "listening"
    with node.connect("c", "b", 9400) as sock:
        assert sock.path == "switch"
        for mib in (MEMORY_MIB - 128, MEMORY_MIB, MEMORY_MIB - 128):
            ballooned(monitor, mib)
            assert echoes(sock)
        # What is registered while the balloon is large is as good.
        with node.connect("c", "b", 9400) as another:
            assert echoes(another)
            ballooned(monitor, MEMORY_MIB)
            assert echoes(another)
        assert echoes(sock)


def test_memory_that_is_plugged_and_unplugged_cuts_no_lane(node: Node, monitor: Monitor) -> None:
    guest = node["b"]
    more = guest.python("""
        from pathlib import Path
        Path("/sys/devices/system/memory/auto_online_blocks").write_text("online_movable")
        def total():
            return int(Path("/proc/meminfo").read_text().split()[1])
        import time
        before = total()
        print("ready")
        while total() == before:
            time.sleep(0.05)
        print("more")
        while total() != before:
            time.sleep(0.05)
        print("less")
    """)
    assert more.line() == "ready"
    assert guest.python(ECHO).line() == "listening"
    with node.connect("c", "b", 9400) as sock:
        assert echoes(sock)
        backend = {"qom-type": "memory-backend-memfd", "id": "extra", "size": 128 * MIB, "share": True}
        monitor.ask("object-add", **backend)
        monitor.ask("device_add", driver="pc-dimm", id="dimm", memdev="extra")
        assert more.line() == "more"
        assert echoes(sock)
        with node.connect("c", "b", 9400) as another:
            assert echoes(another)
            monitor.ask("device_del", id="dimm")
            monitor.await_event("DEVICE_DELETED")
            assert more.line() == "less"
            assert echoes(another)
            assert echoes(sock)
