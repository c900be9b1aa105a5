"""`isthmus run` in guests: unmodified programs of guests and containers, past their network cards."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import networks
import pytest
from conftest import becomes
from guests import Inner, Machine, Node, Program, needs, switch_of

import isthmus
from isthmus import errors
from isthmus.bench.bridge import Bridge, BridgeError

MONITORS = [pytest.param("uml", marks=needs("uml")), pytest.param("qemu", marks=needs("qemu"))]
#: Addresses of the guests a and b, each in a network of its own from which no other can be reached.
A, B = "10.0.0.7", "10.0.0.8"
DOOR = "/run/isthmus/door/door"
SUPERVISED = [sys.executable, "-m", "isthmus", "run", "--"]


class Both:
    """The guests a and b, and the container c in a network of its own."""

    def __init__(self, node: Node, bridge: Bridge) -> None:
        self.node = node
        self._bridge = bridge
        self._programs: list[networks.Program] = []
        self._started: list[Program] = []
        #: Of each guest: what runs under `isthmus run`, to start Python programs there.
        self._inner: dict[str, Inner] = {}

    def guest(self, name: str, *words: str) -> Program:
        """Start a program of a guest under an `isthmus run` of its own."""
        program = self._machine(name).run([*SUPERVISED, *words], ISTHMUS_DOOR=DOOR)
        self._started.append(program)
        return program

    def plain(self, name: str, code: str) -> Program:
        """Start a Python program of a guest as it is."""
        program = self._machine(name).python(code, ISTHMUS_DOOR=DOOR)
        self._started.append(program)
        return program

    def python(self, where: str, code: str) -> Program | networks.Program:
        """Start a Python program under `isthmus run`; in a guest all of them are children of one."""
        if where == "c":
            return self.container(sys.executable, "-u", "-c", textwrap.dedent(code))
        machine = self._machine(where)
        if where not in self._inner:
            self._inner[where] = Inner(machine, SUPERVISED, "threading", ISTHMUS_DOOR=DOOR)
        program = self._inner[where].python(code)
        self._started.append(program)
        return program

    def _machine(self, name: str) -> Machine:
        if self.node[name].stopped:
            self._inner.pop(name, None)
            return self.node.boot_again(name)
        return self.node[name]

    def container(self, *words: str) -> networks.Program:
        command = [*self._bridge.prefix("left"), *SUPERVISED, *words]
        program = networks.Program(command, {"ISTHMUS_DOOR": self.node.broker.door("c")})
        self._programs.append(program)
        return program

    def address(self, where: str) -> str:
        return {"a": A, "b": B, "c": Bridge.left_address}[where]

    def connections(self, domain: str) -> list[dict[str, Any]]:
        status = self.node.broker.ask("status", domain=domain)
        return [c for c in status["domain"]["connections"] if c["path"] == "socket"]

    def reasons(self, domain: str) -> set[str]:
        """Why connections of a domain were not exchanged."""
        return {
            entry["why"] for entry in self.node.broker.ask("status", domain=domain)["domain"]["fallbacks"]
        }

    def listens(self, domain: str, port: int) -> None:
        """Wait until the broker knows of a listener."""
        becomes(lambda: self.node.listens(domain, port), f"nobody listens at {domain}:{port}")

    def end(self) -> None:
        for program in self._programs:
            program.stop()
        self._programs.clear()
        for program in self._started:
            with contextlib.suppress(OSError):  # Its guest was stopped.
                program.kill()
        self._started.clear()
        for name in "abc":
            becomes(lambda name=name: not self.connections(name), f"{name} keeps connections")  # type: ignore[misc]


@pytest.fixture(params=MONITORS, scope="module")
def guests(request: pytest.FixtureRequest) -> Iterator[Both]:
    policy = f'[[domain]]\nname = "c"\naddresses = ["{Bridge.left_address}"]\n'
    with contextlib.ExitStack() as stack:
        try:
            bridge = stack.enter_context(Bridge())
        except BridgeError as error:
            pytest.skip(f"no networks: {error}")
        node = Node(request.param, policy=policy, agents=True, addresses={"a": A, "b": B})
        yield Both(stack.enter_context(node), bridge)


@pytest.fixture
def both(guests: Both) -> Iterator[Both]:
    try:
        yield guests
    finally:
        guests.end()


#: Serves for ever: the SHA-256 and the length of what it gets up to the end, as many bytes, then the end.
DIGEST = """
import hashlib, os, socket, threading
server = socket.create_server(("0.0.0.0", {port}), backlog=64)
print("listening")
def serve(sock):
    with sock:
        digest, size = hashlib.sha256(), 0
        while data := sock.recv(1 << 16):
            digest.update(data)
            size += len(data)
        sock.sendall(digest.digest() + size.to_bytes(8, "little") + bytes(size))
while True:
    sock, address = server.accept()
    print(sock.family.name, address[0])
    threading.Thread(target=serve, args=(sock,), daemon=True).start()
"""
ASK = """
import hashlib, os, socket
def ask(size):
    data = os.urandom(size)
    with socket.create_connection(("{to}", {port}), 40) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        back = bytearray()
        while part := sock.recv(1 << 16):
            back += part
        assert back[:32] == hashlib.sha256(data).digest(), len(back)
        assert len(back) == 40 + size, len(back)
        return sock.getpeername()
"""


@pytest.mark.parametrize(("server", "client"), ["ab", "ac", "cb"])
def test_bytes_arrive_whole_both_ways_and_end(both: Both, server: str, client: str) -> None:
    port = 7100
    listener = both.python(server, DIGEST.format(port=port))
    assert listener.line() == "listening"
    both.listens(server, port)
    code = ASK.format(to=both.address(server), port=port) + "print(*ask(3_000_000))\nask(0)\nask(1)\n"
    talk = both.python(client, code + 'print("all")')
    assert talk.line() == f"{both.address(server)} {port}"
    assert talk.line() == "all"
    for _ in range(3):
        assert listener.line() == f"AF_INET {both.address(client)}"
    for name in (server, client):
        traffic = both.node.broker.ask("status", domain=name)["domain"]["traffic"]
        assert traffic["socket"]["connections"] >= 3


@pytest.mark.program("Redis", "redis-server", "`isthmus run`", "server and client in two guests")
def test_redis_between_guests(both: Both) -> None:
    both.guest(
        "a", "redis-server", "--port", "6400", "--bind", "0.0.0.0", "--save", "", "--protected-mode", "no"
    )
    both.listens("a", 6400)
    ping = both.guest("b", "redis-cli", "-h", A, "-p", "6400", "client", "list")
    words = dict(word.split("=", 1) for word in ping.line().split() if "=" in word)
    assert (words["addr"].split(":")[0], words["laddr"]) == (B, f"{A}:6400")
    assert ping.code() == 0
    command = ["redis-benchmark", "-h", A, "-p", "6400", "-t", "set,get", "-n", "300", "-c", "8", "-q"]
    bench = both.guest("b", *command)
    assert bench.code() == 0, both.node["b"].text(bench.number)
    assert not any("6400" in why for why in both.reasons("b"))


def test_many_at_once_and_no_descriptor_is_left(both: Both) -> None:
    switch = switch_of(both.node.broker.directory)

    def descriptors() -> int:
        return len(os.listdir(f"/proc/{switch}/fd"))

    both.python("a", DIGEST.format(port=7101))
    both.listens("a", 7101)
    code = (
        ASK.format(to=A, port=7101)
        + """
from concurrent.futures import ThreadPoolExecutor
ask(10)
print("first")
with ThreadPoolExecutor(8) as pool:
    list(pool.map(ask, [1000 * n for n in range(48)]))
print("all")
"""
    )
    before = descriptors()
    talk = both.python("b", code)
    assert talk.line() == "first"
    assert talk.line() == "all"
    becomes(lambda: not both.connections("a") and not both.connections("b"))
    # Those of the two programs' attachments are there still.
    becomes(lambda: descriptors() <= before + 4, "descriptors are left in the switch")


def test_a_guest_where_nobody_listens(both: Both) -> None:
    code = """
        import socket
        try:
            socket.create_connection(("{to}", 7102), 10)
        except OSError as error:
            print(type(error).__name__)
    """
    # Its own network has no way there.
    assert both.python("b", code.format(to=A)).line() == "OSError"
    becomes(lambda: any("a:7102: nobody listens there" in why for why in both.reasons("b")))


def test_rules_cut_a_guests_connection(both: Both) -> None:
    both.python("a", networks.ECHO.format(port=7103))
    both.listens("a", 7103)
    talk = both.python(
        "b",
        f"""
        import errno, socket
        sock = socket.create_connection(("{A}", 7103), 40)
        sock.sendall(b"hello")
        print(sock.recv(5).decode())
        try:
            print(sock.recv(5))
        except OSError as error:
            print(errno.errorcode[error.errno])
    """,
    )
    assert talk.line() == "hello"
    broker = both.node.broker
    before = broker.policy_file.read_text()
    broker.policy_file.write_text('[[rule]]\nfrom = "b"\nto = "a"\naction = "refuse"\n' + before)
    try:
        broker.ask("reload")
        # The kernel of a guest tells only who waits already of the reset; for others there is no connection.
        assert talk.line() in ("b''", "ECONNRESET", "ENOTCONN")
    finally:
        broker.policy_file.write_text(before)
        broker.ask("reload")


def test_the_broker_may_die_meanwhile(both: Both) -> None:
    """Open connections go on, are known to the next broker, and new ones are exchanged again."""
    both.python("a", networks.ECHO.format(port=7104))
    both.listens("a", 7104)
    talk = both.python(
        "b",
        f"""
        import os, socket, time
        def speak(sock, word):
            sock.sendall(word)
            assert sock.recv(99) == word
        first = socket.create_connection(("{A}", 7104), 40)
        speak(first, b"one")
        print("open")
        while True:
            speak(first, b"still")
            try:
                with socket.create_connection(("{A}", 7104), 40) as second:
                    speak(second, b"again")
                    print("again")
            except OSError:
                pass  # There is no way but ours.
            time.sleep(0.05)
    """,
    )
    assert talk.line() == "open"
    assert talk.line() == "again"
    # The oldest: others come and go meanwhile.
    number = max(both.connections("b"), key=lambda connection: connection["seconds"])["connection"]
    both.node.broker.kill()
    both.node.broker.start()

    def known(domain: str) -> bool:
        return any(c["connection"] == number for c in both.connections(domain))

    becomes(lambda: known("a") and known("b"), "the connection is not known any more")
    # Not those that were printed before.
    for _ in range(3):
        assert talk.line() == "again"


def test_a_program_that_is_killed_ends_its_connections(both: Both) -> None:
    listener = both.python(
        "a",
        """
        import socket
        server = socket.create_server(("0.0.0.0", 7105))
        print("listening")
        sock, _ = server.accept()
        sock.sendall(b"x")
        try:
            while sock.recv(1 << 16):
                pass
            print("end")
        except OSError as error:
            print(type(error).__name__)
    """,
    )
    assert listener.line() == "listening"
    both.listens("a", 7105)
    talk = both.python(
        "c",
        f"""
        import socket
        sock = socket.create_connection(("{A}", 7105), 40)
        assert sock.recv(1) == b"x"
        print("open", flush=True)
        while True:
            sock.sendall(bytes(1000))
    """,
    )
    assert isinstance(talk, networks.Program)
    assert talk.line() == "open"
    os.killpg(talk.process.pid, signal.SIGKILL)
    assert listener.line() in ("end", "ConnectionResetError")


def test_a_guests_plain_sockets_reach_kernel_sockets(both: Both) -> None:
    """Those of a program under `isthmus run`; `kernel_server` would bring the switch sockets of its own."""
    code = """
        import isthmus
        try:
            with isthmus.kernel_socket(("c", {port}), 40) as sock:
                sock.sendall(b"hello")
                print(sock.family.name, sock.recv(5).decode())
        except OSError as error:
            print(type(error).__name__)
    """

    def talk(port: int) -> Program:
        return both.plain("a", code.format(port=port))

    listener = both.python("c", networks.ECHO.format(port=7107))
    assert listener.line() == "listening"
    both.listens("c", 7107)
    assert talk(7107).line() == "AF_VSOCK hello"
    node = isthmus.attach(both.node.broker.door("c"))
    with isthmus.kernel_server(7111, node=node):
        assert talk(7111).line() == "ConnectionResetError"
        becomes(
            lambda: both.node.broker.ask("status", domain="a")["domain"]["refused"].get("path-unavailable")
        )


def test_kernel_sockets_reach_a_guests_plain_sockets(both: Both) -> None:
    guest = both.plain(
        "b",
        """
        import isthmus, time
        with isthmus.kernel_server(7108) as server:
            print("listening")
            for _ in range(2):
                sock, _ = server.accept()
                with sock:
                    while data := sock.recv(1 << 16):
                        time.sleep(0.001)
                        sock.sendall(data)
    """,
    )
    assert guest.line() == "listening"
    node = isthmus.attach(both.node.broker.door("c"))
    sent = os.urandom(400_000)
    for _ in range(2):
        with isthmus.kernel_socket(("b", 7108), 60, node=node) as sock:
            assert sock.family.name == "AF_UNIX"
            writer = threading.Thread(
                target=lambda sock=sock: (sock.sendall(sent), sock.shutdown(socket.SHUT_WR))
            )
            writer.start()
            got = bytearray()
            while part := sock.recv(1 << 16):
                got += part
            writer.join()
            assert bytes(got) == sent
    with pytest.raises(errors.NobodyListens):
        isthmus.kernel_socket(("b", 7109), 60, node=node)
    with pytest.raises(errors.WrongKind):
        isthmus.kernel_socket(("b", 7108), 60, node=node, type=socket.SOCK_SEQPACKET)


def test_plain_programs_reach_supervised_ones(both: Both) -> None:
    """A program of a guest without an agent's help, and one in a container that knows only TCP."""
    listener = both.python("c", networks.ECHO.format(port=7110))
    assert listener.line() == "listening"
    both.listens("c", 7110)
    number = both.node.broker.ask("status", domain="c")["domain"]["number"]
    talk = both.plain(
        "a",
        f"""
        import socket
        sock = socket.socket(socket.AF_VSOCK)
        sock.settimeout(40)
        sock.connect(({number}, 7110))
        sock.sendall(b"hello")
        print(sock.recv(5).decode())
    """,
    )
    assert talk.line() == "hello"
    assert listener.line().startswith(f"AF_INET {A} ")


def test_a_guest_that_is_killed_ends_its_connections(both: Both) -> None:
    both.python("b", networks.ECHO.format(port=7106))
    both.listens("b", 7106)
    talk = both.python(
        "c",
        f"""
        import socket
        sock = socket.create_connection(("{B}", 7106), 40)
        sock.sendall(b"hello")
        print(sock.recv(5).decode(), flush=True)
        print(sock.recv(5))
    """,
    )
    assert talk.line() == "hello"
    both.node["b"].stop()
    assert talk.line() == "b''"
    becomes(lambda: not both.connections("c"))
