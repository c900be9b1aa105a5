"""`isthmus forward`: programs that know nothing of Isthmus, over ports of domains."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import LIMIT_S, becomes

import isthmus
from isthmus.forward import Endpoint, Forwarder, endpoint
from isthmus.testing import PrivateBroker

needs_redis = pytest.mark.skipif(
    not (shutil.which("redis-server") and shutil.which("redis-cli")), reason="redis is not installed"
)


@pytest.fixture(scope="module")
def broker() -> Iterator[PrivateBroker]:
    with PrivateBroker(("a", "b")) as broker:
        yield broker


@contextlib.contextmanager
def forward(broker: PrivateBroker, domain: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`isthmus forward` in a domain, ready."""
    command = [sys.executable, "-m", "isthmus", "forward", "--ready", "--json", *words]
    environment = {**os.environ, "ISTHMUS_DOOR": str(broker.door(domain))}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.stderr and process.stderr.read()
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LIMIT_S)
            process.kill()


def unix_server(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(path))
    server.listen()
    server.settimeout(LIMIT_S)
    return server


def unix_client(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(LIMIT_S)
    sock.connect(str(path))
    return sock


def all_of(sock: socket.socket | isthmus.Socket) -> bytes:
    """Everything until the end."""
    data = bytearray()
    while part := sock.recv(1 << 20):
        data += part
    return bytes(data)


@needs_redis
def test_redis_between_two_domains(broker: PrivateBroker, tmp_path: Path) -> None:
    """A stock server and a stock client, in two domains, neither of which knows."""
    server = ["redis-server", "--port", "0", "--unixsocket", str(tmp_path / "redis.sock"), "--save", ""]
    with subprocess.Popen(server, stdout=subprocess.DEVNULL, cwd=tmp_path) as redis:
        try:
            becomes(lambda: (tmp_path / "redis.sock").exists())
            there = f"unix:{tmp_path}/redis.sock"
            here = f"unix:{tmp_path}/a.sock"
            with forward(broker, "b", ":6379", there), forward(broker, "a", here, "b:6379"):

                def client(*words: str, text: str | None = None) -> str:
                    command = ["redis-cli", "-s", str(tmp_path / "a.sock"), *words]
                    return subprocess.run(
                        command, capture_output=True, text=True, check=True, timeout=LIMIT_S, input=text
                    ).stdout.strip()

                assert client("set", "key", "value") == "OK"
                assert client("get", "key") == "value"
                assert client("-x", "set", "long", text="x" * 3_000_000) == "OK"
                assert client("strlen", "long") == "3000000"
                assert client("get", "long") == "x" * 3_000_000
                assert client(text="".join("incr count\n" for _ in range(500))).splitlines()[-1] == "500"
        finally:
            redis.terminate()


def test_each_direction_ends_by_itself(broker: PrivateBroker, tmp_path: Path) -> None:
    data = os.urandom(5_000_000)
    with (
        unix_server(tmp_path / "there") as server,
        forward(broker, "b", ":7001", f"unix:{tmp_path}/there") as there,
        isthmus.create_connection(("b", 7001), LIMIT_S, node=isthmus.attach(broker.door("a"))) as client,
    ):
        other, _ = server.accept()
        with other, ThreadPoolExecutor(1) as pool:
            sent = pool.submit(lambda: (client.sendall(data), client.shutdown(socket.SHUT_WR)))
            assert all_of(other) == data
            sent.result()
            sent = pool.submit(lambda: (other.sendall(data[::-1]), other.shutdown(socket.SHUT_WR)))
            assert all_of(client) == data[::-1]
            sent.result()
        assert there.stdout is not None
        ended = json.loads(there.stdout.readline())
        assert (ended["number"], ended["forth"], ended["back"], ended["error"]) == (
            1,
            len(data),
            len(data),
            None,
        )


def test_what_breaks_on_one_side_breaks_on_the_other(broker: PrivateBroker, tmp_path: Path) -> None:
    """Half an answer does not look like a whole one."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(LIMIT_S)
    port = listener.getsockname()[1]
    with listener, forward(broker, "b", ":7002", f"tcp:127.0.0.1:{port}") as process:
        client = isthmus.create_connection(("b", 7002), LIMIT_S, node=isthmus.attach(broker.door("a")))
        other, _ = listener.accept()
        other.sendall(b"half")
        assert client.recv(10) == b"half"
        other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        other.close()
        with pytest.raises(ConnectionResetError):
            client.recv(10)
        client.close()
        assert process.stdout is not None
        assert "reset" in json.loads(process.stdout.readline())["error"].lower()

        client = isthmus.create_connection(("b", 7002), LIMIT_S, node=isthmus.attach(broker.door("a")))
        other, _ = listener.accept()
        other.settimeout(LIMIT_S)
        client.connection.abort()
        with pytest.raises(ConnectionResetError):
            other.recv(10)
        other.close()
        client.close()


def test_a_hybrid_socket_asks_for_the_port(broker: PrivateBroker, tmp_path: Path) -> None:
    node = isthmus.attach(broker.door("b"))
    path = tmp_path / "hybrid"
    with (
        isthmus.create_server(("", 7003), node=node) as server,
        forward(broker, "a", f"hybrid:{path}", "b") as process,
    ):
        server.settimeout(LIMIT_S)
        with unix_client(path) as client:
            # What follows the line belongs to the server.
            client.sendall(b"CONNECT 7003\nhello")
            assert client.recv(100) == b"OK 7003\n"
            sock, _ = server.accept()
            with sock:
                assert sock.recv(100) == b"hello"
                sock.sendall(b"back")
            assert all_of(client) == b"back"
        for line in (
            b"CONNECT 7004\n",
            b"GET / HTTP/1.1\r\n\r\n",
            b"CONNECT x\n",
            b"CONNECT " + b"9" * 40,
            b"CON",
        ):
            with unix_client(path) as client:
                client.sendall(line)
                client.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    assert all_of(client) == b""
        assert process.stdout is not None
        # What ended first may be told of last.
        said = [json.loads(process.stdout.readline())["error"] for _ in range(6)]
        said.remove(None)
        assert sum("nobody listens" in text for text in said) == 1
        assert sum("CONNECT" in text for text in said) == 4


def test_a_socket_that_was_left_behind_is_replaced_and_one_in_use_is_not(
    broker: PrivateBroker, tmp_path: Path
) -> None:
    path = tmp_path / "here"
    unix_server(path).close()
    with forward(broker, "a", f"unix:{path}", "b:1"):
        command = [sys.executable, "-m", "isthmus", "forward", f"unix:{path}", "b:1"]
        environment = {**os.environ, "ISTHMUS_DOOR": str(broker.door("a"))}
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (1, f"isthmus: unix:{path}: Address already in use\n")
        # What is refused leaves it serving.
        for _ in range(3):
            with unix_client(path) as client, contextlib.suppress(ConnectionResetError):
                assert client.recv(10) == b""
    assert not path.exists()


def test_it_ends_cleanly_with_connections_open(broker: PrivateBroker, tmp_path: Path) -> None:
    path = tmp_path / "here"
    with (
        isthmus.create_server(("", 7005), node=isthmus.attach(broker.door("b"))) as server,
        forward(broker, "a", f"unix:{path}", "b:7005") as process,
        unix_client(path) as client,
    ):
        server.settimeout(LIMIT_S)
        sock, _ = server.accept()
        with sock:
            sock.settimeout(LIMIT_S)
            process.send_signal(signal.SIGTERM)
            assert process.wait(LIMIT_S) == 0
            # What was cut short does not look like everything.
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
            assert client.recv(1) == b""
    assert not path.exists()


def test_no_more_than_the_limit_at_once(broker: PrivateBroker, tmp_path: Path) -> None:
    path = tmp_path / "here"
    with (
        isthmus.create_server(("", 7006), node=isthmus.attach(broker.door("b"))) as server,
        forward(broker, "a", "--limit", "2", f"unix:{path}", "b:7006"),
    ):
        server.settimeout(LIMIT_S)
        clients = [unix_client(path) for _ in range(3)]
        first, second = server.accept()[0], server.accept()[0]
        server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.accept()
        server.settimeout(LIMIT_S)
        first.close()
        clients[0].close()
        third, _ = server.accept()
        clients[2].sendall(b"third")
        third.settimeout(LIMIT_S)
        assert third.recv(9) == b"third"
        for sock in (second, third, *clients[1:]):
            sock.close()


@pytest.mark.parametrize(
    ("text", "kind", "host", "port"),
    [
        ("unix:/run/a.sock", "unix", "/run/a.sock", None),
        ("hybrid:x", "hybrid", "x", None),
        ("tcp:localhost:80", "tcp", "localhost", 80),
        ("tcp:[::1]:80", "tcp", "::1", 80),
        ("tcp::80", "tcp", "127.0.0.1", 80),
        ("web:80", "domain", "web", 80),
        ("7:80", "domain", "7", 80),
        (":80", "domain", "", 80),
        ("web", "domain", "web", None),
    ],
)
def test_endpoints(text: str, kind: str, host: str, port: int | None) -> None:
    assert endpoint(text) == Endpoint(kind, host, port)


@pytest.mark.parametrize(
    "text",
    [
        "unix:",
        "hybrid:",
        "tcp:80",
        "tcp:host:x",
        "tcp:host:70000",
        ":x",
        ":4294967296",
        "web:x",
        "unix:" + "x" * 120,
    ],
)
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        endpoint(text)


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("unix:x", "web"),
        ("hybrid:x", "web:80"),
        (":80", ":81"),
        ("unix:x", "hybrid:y"),
        ("web", "unix:x"),
        ("web:80", "hybrid:x"),
    ],
)
def test_endpoints_that_do_not_go_together(here: str, there: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Forwarder(endpoint(here), endpoint(there))
