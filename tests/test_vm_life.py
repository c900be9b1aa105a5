"""Guests and the switch that stop, die and come back, and rules that hold between guests."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from guests import LIMIT_S, Node, Program, needs, switch_of

import isthmus

#: Sixteen guests at once, or a broker that starts six times beside busy guests, take a slow machine minutes.
pytestmark = [needs("uml"), pytest.mark.timeout(600)]

ECHO = """
    import isthmus
    with isthmus.create_server(("", {port})) as listener:
        print("listening")
        sock, _ = listener.accept()
        while data := sock.recv(1 << 16):
            sock.sendall(data)
"""
PLAIN_ECHO = """
    import socket
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((socket.VMADDR_CID_ANY, {port}))
        listener.listen(8)
        print("listening")
        sock, _ = listener.accept()
        while data := sock.recv(1 << 16):
            sock.sendall(data)
"""


@pytest.fixture(scope="module")
def booted() -> Iterator[Node]:
    with Node("uml", guests=("a", "b"), containers=("c",), agents=True) as node:
        yield node


@pytest.fixture
def node(booted: Node) -> Node:
    """The guests a and b, and the container c; a guest that a test before has stopped boots again."""
    for name in "ab":
        if booted[name].stopped:
            booted.boot_again(name)
    return booted


def connected(node: Node, code: str, port: int) -> socket.socket:
    """A connection of the container c to a program of the guest b that sends back what it gets."""
    assert node["b"].python(code.format(port=port)).line() == "listening"
    sock = node.connect("c", "b", port)
    sock.sendall(b"before")
    assert sock.recv(100) == b"before"
    return sock  # type: ignore[return-value]  # a socket in all but name


@pytest.mark.parametrize("code", [ECHO, PLAIN_ECHO], ids=["isthmus", "plain"])
def test_a_killed_guest_s_peers_are_told_and_it_can_boot_again(node: Node, code: str) -> None:
    sock = connected(node, code, 9300)
    with sock:
        node["b"].stop()
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
    node.boot_again("b")
    connected(node, code, 9301).close()


def test_a_paused_guest_goes_on_where_it_was_and_stalls_nobody(node: Node) -> None:
    plain, fast = connected(node, PLAIN_ECHO, 9310), connected(node, ECHO, 9311)
    with plain, fast:
        node["b"].guest.signal(signal.SIGSTOP)
        for sock in (plain, fast):
            sock.sendall(b"x" * 200_000)
        # Meanwhile others are served.
        listener = node.listen("c", 7300)
        client = node["a"].python("""
            import isthmus
            with isthmus.create_connection(("c", 7300), 30) as sock:
                sock.sendall(b"hello")
                print(sock.recv(100))
        """)
        with listener:
            other, _ = listener.accept()
            with other:
                other.sendall(other.recv(100))
                assert client.line() == "b'hello'"
        time.sleep(10)
        node["b"].guest.signal(signal.SIGCONT)
        for sock in (plain, fast):
            got = b""
            while len(got) < 200_000:
                got += sock.recv(1 << 20)
            assert got == b"x" * 200_000


def test_a_killed_switch_is_told_at_once_and_another_one_serves_new_guests(node: Node) -> None:
    fast = connected(node, ECHO, 9320)
    client = node["a"].python("""
        import isthmus, time
        sock = isthmus.create_connection(("c", 7320), 30)
        print("connected")
        try:
            sock.recv(1)
        except OSError as error:
            print("told")
    """)
    with fast, node.listen("c", 7320) as listener:
        other, _ = listener.accept()
        with other:
            assert client.line() == "connected"
            os.kill(switch_of(node.broker.directory), signal.SIGKILL)
            began = time.monotonic()
            for sock in (fast, other):
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)
            assert client.line() == "told"
            assert time.monotonic() - began < LIMIT_S / 2
    for name in "ab":
        node[name].stop()
    node.boot_again("b")
    connected(node, ECHO, 9321).close()


#: Sends ever larger numbers until it is told to end, in pieces of ever other sizes: 16 KB at most, because a
#: small guest's kernel may not find more in one piece, and then a plain socket says so.
COUNT = """
    import array, isthmus, signal, socket
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    def connect():
        if {plain}:
            sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            sock.connect(({number}, {port}))
            return sock
        return isthmus.create_connection(("{to}", {port}), 30)
    with connect() as sock:
        print("connected")
        count = 0
        while not told:
            size = 1 + count * 7919 % 1999
            sock.sendall(array.array("Q", range(count, count + size)))
            count += size
        sock.shutdown(socket.SHUT_WR)
        print(count)
        assert sock.recv(1) == b""
"""
#: Checks that each number comes once, in its turn.
CHECK = """
    import array, isthmus, socket
    def listen():
        if {plain}:
            listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            listener.bind((socket.VMADDR_CID_ANY, {port}))
            listener.listen(8)
            return listener
        return isthmus.create_server(("", {port}))
    with listen() as listener:
        print("listening")
        sock, _ = listener.accept()
    with sock:
        count, rest = 0, b""
        while data := sock.recv(1 << 18):
            data = rest + data
            whole = len(data) // 8 * 8
            got, rest = array.array("Q", data[:whole]), data[whole:]
            assert got == array.array("Q", range(count, count + len(got))), count
            count += len(got)
        assert not rest
        print(count)
"""


def listening(node: Node, port: int) -> isthmus.Socket:
    """A listening socket of the container c, as soon as it has found the broker again."""
    while True:
        try:
            return node.listen("c", port)
        except isthmus.errors.BrokerLost:
            time.sleep(0.01)


def test_a_broker_killed_again_and_again_is_not_noticed(node: Node) -> None:
    """What flows goes on, every number once and in order; and new connections can be made each time."""
    flows: list[tuple[Program, Program]] = []
    for port, plain in ((9340, True), (9341, False), (9342, True), (9343, False)):
        here, there = ("a", "b") if port % 4 < 2 else ("b", "a")
        checks = node[there].python(CHECK.format(plain=plain, port=port))
        assert checks.line() == "listening"
        words = {"plain": plain, "port": port, "to": there, "number": node.number(there)}
        counts = node[here].python(COUNT.format(**words))
        assert counts.line() == "connected"
        flows.append((counts, checks))
    for turn in range(5):
        time.sleep(0.5)
        node.broker.kill()
        time.sleep(0.3)
        node.broker.start()
        client = node["a"].python(
            """
            import isthmus, sys, time
            from isthmus import errors
            while True:
                try:
                    sock = isthmus.create_connection(("c", int(sys.argv[1])), 30)
                    break
                except (errors.NoBroker, errors.NobodyListens, errors.BrokerLost):
                    time.sleep(0.05)
            with sock:
                print(sock.recv(100))
        """,
            7340 + turn,
        )
        with listening(node, 7340 + turn) as listener:
            sock, _ = listener.accept()
            with sock:
                sock.sendall(b"new")
            assert client.line() == "b'new'"
    for counts, checks in flows:
        counts.kill(signal.SIGTERM)
        count = counts.line()
        assert int(count) > 0
        assert checks.line() == count
        assert counts.code() == checks.code() == 0


def test_a_removed_domain_s_connections_are_cut(node: Node) -> None:
    with connected(node, ECHO, 9330) as fast, connected(node, PLAIN_ECHO, 9331) as plain:
        node.broker.ask("domain-remove", name="b")
        for sock in (fast, plain):
            with pytest.raises(ConnectionAbortedError):
                sock.recv(1)


RATE = """
[[rule]]
from = "a"
to = "c"
action = "accept"
rate = "80Mbit"

[[rule]]
from = "*"
to = "*"
action = "accept"
"""


#: Sends, and receives as much.
RATED = {
    "lanes": 'sock = isthmus.create_connection(("c", 7340), 60)',
    "plain": 'sock = socket.socket(socket.AF_VSOCK); vsock.connect(sock, ("c", 7340))',
}


@pytest.mark.parametrize("connect", RATED.values(), ids=list(RATED))
def test_a_rate_holds_each_way_of_a_guest_s_connection(connect: str) -> None:
    size = 15_000_000
    with Node("uml", guests=("a",), containers=("c",), policy=RATE, agents=True) as node:
        explained = node.broker.ask("explain", **{"from": "a", "to": "c", "port": 7340})["ranges"][0]
        assert explained["path"] == "switch"
        assert not any("not enforced" in note for note in explained["notes"])
        with node.listen("c", 7340) as listener:
            program = node["a"].python(f"""
                import isthmus, socket
                from isthmus import vsock
                {connect}
                with sock:
                    for turn in range({size // 15_000}):
                        sock.sendall(bytes(15_000))
                    got = 0
                    while got < {size}:
                        got += len(sock.recv(1 << 20))
                print("got all")
            """)
            sock, _ = listener.accept()
            with sock:
                began, got = time.monotonic(), 0
                while got < size:
                    got += len(sock.recv(1 << 20))
                there = time.monotonic() - began
                began = time.monotonic()
                sock.sendall(bytes(size))
                assert program.line() == "got all"
                back = time.monotonic() - began
        # 10 MB a second; what was in the rings and the bucket at the beginning came at once.
        assert min(there, back) > 0.8, (there, back)


def test_sixteen_guests_at_once_cost_the_switch_little() -> None:
    names = tuple(f"g{number}" for number in range(16))
    with Node("uml", guests=names, containers=("c",)) as node:
        with node.listen("c", 7350) as listener:
            programs = [
                node[name].python(f"""
                    import socket
                    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
                        sock.connect(({node.number("c")}, 7350))
                        sock.sendall(b"{name}")
                        print(sock.recv(100).decode())
                """)
                for name in names
            ]
            for _ in names:
                sock, (who, _) = listener.accept()
                with sock:
                    assert sock.recv(100).decode() == who
                    sock.sendall(f"hello {who}".encode())
            assert [program.line() for program in programs] == [f"hello {name}" for name in names]
        status = Path(f"/proc/{switch_of(node.broker.directory)}/status").read_text()
        anonymous_kib = int(status.partition("RssAnon:")[2].split()[0])
        # What the interpreter takes is in it.
        assert anonymous_kib < 16 * 4 * 1024
