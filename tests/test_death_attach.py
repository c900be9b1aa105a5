"""A program whose broker went away while it was busy: the next broker is left with nothing that is over.

The broker here is the test itself, so that each message comes exactly when it hurts.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus import _native as n

LIMIT_S = 20.0
SMALL = 65_536
F_ADD_SEALS = 1033
READ_ONLY_SEALS = 0x10 | 4 | 2 | 1


class Door:
    """The broker's end of one attachment after the other."""

    def __init__(self, path: Path) -> None:
        self.listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listening.settimeout(LIMIT_S)
        self.listening.bind(str(path))
        self.listening.listen()
        self.sock: socket.socket | None = None

    def let_in(self) -> None:
        self.sock, _ = self.listening.accept()
        self.sock.settimeout(LIMIT_S)
        request, _ = self.expect("hello")
        self.send(
            "welcome", request, features=0, domain=1, domain_name="a", node="x", ring_max=1 << 30, epoch=1
        )

    def expect(self, kind: str) -> tuple[int, dict[str, Any]]:
        assert self.sock is not None
        data, ancillary, _, _ = self.sock.recvmsg(4096, socket.CMSG_SPACE(64))
        for _, _, content in ancillary:
            fds = array("i")
            fds.frombytes(content)
            for fd in fds:
                os.close(fd)
        got, request, fields = n.control_decode(data)
        assert got == kind
        return request, fields

    def send(self, kind: str, request: int, fds: tuple[int, ...] = (), /, **fields: Any) -> None:
        assert self.sock is not None
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        self.sock.sendmsg([n.control_encode(kind, request, **fields)], rights)
        for fd in fds:
            os.close(fd)

    def grant(self, request: int, number: int, carrier: str = "sealed") -> socket.socket:
        """A connection, whose other side is ours: its end of the bell."""
        ring = os.memfd_create("lane", os.MFD_ALLOW_SEALING)
        os.ftruncate(ring, 65_536 + SMALL)
        fcntl.fcntl(ring, F_ADD_SEALS, READ_ONLY_SEALS)
        lane = os.open(f"/proc/self/fd/{ring}", os.O_RDONLY)
        os.close(ring)
        ours, theirs = socket.socketpair()
        self.send(
            "connected", request, (lane, theirs.detach()), connection=number, secret=1, to=2, to_name="b",
            to_port=7, from_port=9, carrier=carrier, small=SMALL, large=0, why="", ticket=bytes(32),
        )  # fmt: skip
        return ours

    def lose(self) -> None:
        assert self.sock is not None
        self.sock.close()

    def close(self) -> None:
        self.lose()
        self.listening.close()


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    door = Door(tmp_path / "door")
    yield door
    door.close()


@pytest.fixture
def node(door: Door, tmp_path: Path) -> Iterator[n.Node]:
    welcoming = threading.Thread(target=door.let_in)
    welcoming.start()
    node = n.Node(tmp_path / "door", "program")
    welcoming.join()
    yield node
    node.stop()


def connected(door: Door, node: n.Node, number: int) -> tuple[n.Connection, socket.socket]:
    bells: list[socket.socket] = []

    def broker() -> None:
        request, _ = door.expect("connect")
        bells.append(door.grant(request, number))

    granting = threading.Thread(target=broker)
    granting.start()
    connection = node.connect("b", 7, "stream", timeout=LIMIT_S)
    granting.join()
    return connection, bells[0]


def test_a_connection_closed_while_its_program_attaches_again_is_closed(door: Door, node: n.Node) -> None:
    connection, bell = connected(door, node, 77)
    door.lose()
    door.let_in()
    request, fields = door.expect("resume")
    assert fields["connection"] == 77
    connection.close()
    door.send("done", request)
    assert door.expect("close") == (0, {"connection": 77})
    bell.close()


def test_a_port_given_back_while_its_program_attaches_again_is_given_back(door: Door, node: n.Node) -> None:
    def broker() -> None:
        request, _ = door.expect("bind")
        door.send("bound", request, port=5)

    leasing = threading.Thread(target=broker)
    leasing.start()
    listener = node.listen(5, "stream", timeout=LIMIT_S)
    leasing.join()
    door.lose()
    door.let_in()
    request, _ = door.expect("bind")
    listener.close()
    door.send("bound", request, port=5)
    assert door.expect("unbind")[1]["port"] == 5


def test_a_connection_that_nobody_waits_for_any_more_is_closed(door: Door, node: n.Node) -> None:
    """Its connect was told that the broker is lost, and reached the next one all the same."""
    bell = door.grant(999, 78)
    assert door.expect("close") == (0, {"connection": 78})
    assert bell.recv(1) == b""
    bell.close()


def test_a_connect_that_timed_out_leaves_no_connection(door: Door, node: n.Node) -> None:
    with pytest.raises(TimeoutError):
        node.connect("b", 7, "stream", timeout=0.01)
    request, _ = door.expect("connect")
    bell = door.grant(request, 79)
    assert door.expect("close") == (0, {"connection": 79})
    assert bell.recv(1) == b""
    bell.close()


def test_a_connection_that_cannot_be_joined_is_closed(door: Door, node: n.Node) -> None:
    bells: list[socket.socket] = []

    def broker() -> None:
        request, _ = door.expect("connect")
        bells.append(door.grant(request, 80, carrier="put"))

    granting = threading.Thread(target=broker)
    granting.start()
    with pytest.raises(OSError, match="another carrier"):
        node.connect("b", 7, "stream", timeout=LIMIT_S)
    granting.join()
    assert door.expect("close") == (0, {"connection": 80})
    bells[0].close()


def test_a_port_that_nobody_waits_for_any_more_is_given_back(door: Door, node: n.Node) -> None:
    with pytest.raises(TimeoutError):
        node.listen(5, "stream", timeout=0.01)
    request, _ = door.expect("bind")
    door.send("bound", request, port=5)
    assert door.expect("unbind")[1]["port"] == 5


@pytest.mark.parametrize("welcomes", [True, False])
def test_bells_are_heard_while_the_next_broker_says_nothing(door: Door, node: n.Node, welcomes: bool) -> None:
    connection, bell = connected(door, node, 81)
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLIN)
    assert not waiting.poll(0)
    door.lose()
    if welcomes:
        door.let_in()
        door.expect("resume")
    bell.close()
    # It would be heard once the program gives this broker up, too.
    assert waiting.poll(8_000)
    connection.close()
