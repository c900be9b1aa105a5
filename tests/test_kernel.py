"""`isthmus.kernel_socket` and `kernel_server`, with those who insist on a descriptor."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import connection as multiprocessing_connection
from pathlib import Path

import pytest
from broker_client import Program, Refused
from conftest import LIMIT_S, becomes

import isthmus
from isthmus import errors
from isthmus._native import FEATURE_SOCKETS
from isthmus.testing import PrivateBroker


@pytest.fixture(scope="module")
def broker() -> Iterator[PrivateBroker]:
    with PrivateBroker(("a", "b")) as broker:
        yield broker


@pytest.fixture
def a(broker: PrivateBroker) -> isthmus.Node:
    return isthmus.attach(broker.door("a"))


@pytest.fixture
def b(broker: PrivateBroker) -> isthmus.Node:
    return isthmus.attach(broker.door("b"))


def test_they_are_sockets_like_any(broker: PrivateBroker, a: isthmus.Node, b: isthmus.Node) -> None:
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        with (
            isthmus.kernel_server(0, node=b, type=kind) as server,
            isthmus.kernel_socket(("b", server.port), LIMIT_S, node=a, type=kind) as client,
        ):
            server.settimeout(LIMIT_S)
            sock, _ = server.accept()
            with sock:
                assert type(client) is socket.socket
                assert (client.family, client.type) == (socket.AF_UNIX, kind)
                client.sendall(b"there")
                assert sock.recv(9) == b"there"
                sock.sendall(b"and back")
                assert client.recv(9) == b"and back"
                (seen,) = broker.ask("status", domain="a")["domain"]["connections"]
                assert (seen["path"], seen["peer"], seen["kind"]) == (
                    "socket",
                    "b",
                    "stream" if kind == socket.SOCK_STREAM else "seqpacket",
                )
                client.close()
                assert sock.recv(1) == b""
        becomes(lambda: not broker.ask("status", domain="a")["domain"]["connections"])
        becomes(lambda: not broker.ask("status", domain="b")["domain"]["ports"])


def test_what_is_refused(broker: PrivateBroker, a: isthmus.Node, b: isthmus.Node) -> None:
    with pytest.raises(errors.NobodyListens):
        isthmus.kernel_socket(("b", 4999), LIMIT_S, node=a)
    with pytest.raises(errors.UnknownDomain):
        isthmus.kernel_socket(("nobody", 4999), LIMIT_S, node=a)
    with (
        isthmus.create_server(0, node=b) as lanes,
        pytest.raises(errors.PathUnavailable, match="create_conn"),
    ):
        isthmus.kernel_socket(("b", lanes.getsockname()[1]), LIMIT_S, node=a)
    with isthmus.kernel_server(0, node=b) as server:
        with pytest.raises(errors.PathUnavailable, match="kernel_socket"):
            isthmus.create_connection(("b", server.port), LIMIT_S, node=a)
        with pytest.raises(errors.WrongKind):
            isthmus.kernel_socket(("b", server.port), LIMIT_S, node=a, type=socket.SOCK_SEQPACKET)
        with pytest.raises(errors.PortInUse):
            isthmus.kernel_server(server.port, node=b)
    with isthmus.kernel_server(0, node=b, backlog=1) as server:
        # Linux has room for one more than was asked for.
        waiting = [isthmus.kernel_socket(("b", server.port), LIMIT_S, node=a) for _ in range(2)]
        with pytest.raises(errors.BacklogFull):
            isthmus.kernel_socket(("b", server.port), LIMIT_S, node=a)
        for sock in waiting:
            sock.close()


def test_a_file_that_is_a_listener_no_more(a: isthmus.Node, b: isthmus.Node) -> None:
    """Closed by its number, so that nobody tells: whoever comes is refused."""
    server = isthmus.kernel_server(0, node=b)
    os.close(server.detach())
    with pytest.raises(errors.NobodyListens):
        isthmus.kernel_socket(("b", server.port), LIMIT_S, node=a)


def test_the_broker_comes_back(a: isthmus.Node, b: isthmus.Node, broker: PrivateBroker) -> None:
    with isthmus.kernel_server(0, node=b) as server:
        first = isthmus.kernel_socket(("b", server.port), LIMIT_S, node=a)
        broker.kill()
        sock, _ = server.accept()
        first.sendall(b"x")
        assert sock.recv(1) == b"x"
        broker.start()

        def again() -> socket.socket | None:
            try:
                return isthmus.kernel_socket(("b", server.port), LIMIT_S, node=a)
            except (errors.BrokerLost, errors.NobodyListens):
                return None

        becomes(again).close()
        first.close()
        sock.close()


def test_a_fork_has_sockets_of_its_own(broker: PrivateBroker, b: isthmus.Node) -> None:
    code = """if True:
        import os, isthmus, sys
        port = int(sys.argv[1])
        isthmus.kernel_socket(("b", port), 20).close()
        if os.fork() == 0:
            with isthmus.kernel_socket(("b", port), 20) as sock:
                sock.sendall(b"child")
            os._exit(0)
        assert os.wait()[1] == 0
    """
    with isthmus.kernel_server(0, node=b) as server:
        server.settimeout(LIMIT_S)
        subprocess.run(
            [sys.executable, "-c", code, str(server.port)],
            env={**os.environ, "ISTHMUS_DOOR": broker.door("a")},
            check=True,
            timeout=LIMIT_S,
        )
        for wanted in (b"", b"child"):
            sock, _ = server.accept()
            with sock:
                assert sock.recv(9) == wanted


@pytest.mark.program(
    "CPython ssl",
    "python3 --version",
    "`kernel_socket`",
    "asyncio streams over TLS",
)
def test_asyncio_and_tls(a: isthmus.Node, b: isthmus.Node, tmp_path: Path) -> None:
    """Streams of asyncio over TLS: they take the descriptor away from us."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=b -addext subjectAltName=DNS:b"
    files = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert")]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    ours = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ours.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    theirs = ssl.create_default_context(cafile=str(tmp_path / "cert"))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readline()).upper())
        await writer.drain()
        writer.close()

    async def talk() -> bytes:
        server = await asyncio.start_server(serve, sock=isthmus.kernel_server(7443, node=b), ssl=ours)
        async with server:
            sock = await asyncio.to_thread(isthmus.kernel_socket, ("b", 7443), LIMIT_S, node=a)
            reader, writer = await asyncio.open_connection(sock=sock, ssl=theirs, server_hostname="b")
            writer.write(b"secret\n")
            line = await reader.readline()
            writer.close()
            return line

    assert asyncio.run(asyncio.wait_for(talk(), LIMIT_S)) == b"SECRET\n"


@pytest.mark.program(
    "multiprocessing",
    "python3 --version",
    "`kernel_socket`, adapter",
    "connections, with and without keys",
)
def test_connections_of_multiprocessing(a: isthmus.Node, b: isthmus.Node) -> None:
    with isthmus.kernel_server(0, node=b) as server, ThreadPoolExecutor(1) as pool:

        def serve() -> object:
            sock, _ = server.accept()
            with multiprocessing_connection.Connection(sock.detach()) as connection:
                found = connection.recv()
                connection.send({"got": found})
                return found

        served = pool.submit(serve)
        sock = isthmus.kernel_socket(("b", server.port), node=a)
        with multiprocessing_connection.Connection(sock.detach()) as connection:
            connection.send([1, "two", b"x" * 1_000_000])
            assert connection.recv() == {"got": [1, "two", b"x" * 1_000_000]}
        assert served.result(LIMIT_S)


def test_many_come_and_go(a: isthmus.Node, b: isthmus.Node, broker: PrivateBroker) -> None:
    """No descriptor is left, nor a connection that the broker believes in."""
    with isthmus.kernel_server(0, node=b) as server:
        isthmus.kernel_socket(("b", server.port), LIMIT_S, node=a).close()
        server.accept()[0].close()
        before = len(os.listdir("/proc/self/fd"))

        def serve() -> None:
            for _ in range(2000):
                server.accept()[0].close()

        thread = threading.Thread(target=serve)
        thread.start()
        for _ in range(2000):
            with isthmus.kernel_socket(("b", server.port), LIMIT_S, node=a) as sock:
                assert sock.recv(1) == b""
        thread.join()
        becomes(lambda: len(os.listdir("/proc/self/fd")) <= before)
        becomes(lambda: not broker.ask("status", domain="a")["domain"]["connections"])


def program(broker: PrivateBroker, domain: str) -> Program:
    """One that speaks to the broker by itself, and need not be honest."""
    return Program(Path(broker.door(domain)), features=FEATURE_SOCKETS)


def connect(opener: Program, to: str, port: int, source: str = "") -> int:
    fields = {"to": to, "to_port": port, "kind": "stream", "source": source, "source_port": 1, "ahead": 0}
    return opener.send("connect-socket", **fields)


def test_what_is_no_socket_is_refused_and_not_kept(broker: PrivateBroker, tmp_path: Path) -> None:
    """A program that answers with some file: the opener hears of it, and the broker keeps nothing."""
    (tmp_path / "file").touch()
    with program(broker, "b") as hostile, program(broker, "a") as opener:
        port = hostile.bind()
        before = len(os.listdir(f"/proc/{broker.pid}/fd"))
        for _ in range(20):
            request = connect(opener, "b", port)
            incoming = hostile.next("incoming-socket")
            for fd in incoming["fds"]:
                os.close(fd)
            file = os.open(tmp_path / "file", os.O_RDONLY)
            hostile.send("accept", [file], connection=incoming["connection"], small=0, large=0)
            assert opener.refused(request).refusal == "peer-gone"
        becomes(lambda: len(os.listdir(f"/proc/{broker.pid}/fd")) <= before)
        becomes(lambda: not broker.ask("status", domain="b")["domain"]["holds"]["connections"][0])


def test_a_socket_that_is_refused_counts_until_it_is_closed(broker: PrivateBroker) -> None:
    with program(broker, "b") as hostile, program(broker, "a") as opener:
        port = hostile.bind()
        kept: list[int] = []
        for _ in range(10):
            request = connect(opener, "b", port)
            incoming = hostile.next("incoming-socket")
            kept += incoming["fds"]
            hostile.send("refuse", connection=incoming["connection"], refusal="nobody-listens")
            assert opener.refused(request).refusal == "nobody-listens"

        def held() -> int:
            return int(broker.ask("status", domain="b")["domain"]["holds"]["connections"][0])

        assert held() == 10
        for fd in kept:
            os.close(fd)
        becomes(lambda: held() == 0)


def test_an_address_of_ones_own_is_nobody_elses() -> None:
    """Whoever may have addresses of a network cannot claim one that is another's alone, or come from it."""
    policy = """
        domain = [
            {name = "a", addresses = "10.0.0.7"},
            {name = "b", addresses = "10.0.0.0/24"},
            {name = "c", addresses = "10.0.0.0/24"},
        ]
    """
    with PrivateBroker((), policy=policy) as broker, program(broker, "c") as c:

        def owner(address: str) -> str | None:
            try:
                return str(c.ask("resolve", name=address)[1]["name"])
            except Refused:
                return None

        with program(broker, "b") as b:
            assert b.ask("addresses", list="10.0.0.7 10.0.0.9 10.1.0.1")[0] == "done"
            assert (owner("10.0.0.7"), owner("10.0.0.9"), owner("10.1.0.1")) == ("a", "b", None)
            c.bind(80)
            for source in ("10.0.0.7", "10.1.0.1", "nonsense"):
                assert b.refused(connect(b, "c", 80, source)).refusal in ("wrong-address", "bad-request")
            # Two claim it: neither has it.
            c.ask("addresses", list="10.0.0.9")
            assert owner("10.0.0.9") is None
            b.ask("addresses", list="")
            assert owner("10.0.0.9") == "c"
            c.ask("addresses", list="")
            assert owner("10.0.0.9") is None
