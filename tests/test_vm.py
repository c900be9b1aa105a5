"""Guests with stock kernels, and what they say to each other: real kernels, booted here."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import LIMIT_S, becomes
from guests import Node, needs, switch_of
from test_forward import all_of, forward, unix_client

import isthmus
from isthmus.testing import PrivateBroker
from isthmus.vm import FORMATS, Guest, attachment_lines

MONITORS = [pytest.param("uml", marks=needs("uml")), pytest.param("qemu", marks=needs("qemu"))]


@pytest.fixture(params=MONITORS, scope="module")
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    """A broker with the guests a and b of one monitor, the container c, and programs of the host."""
    with Node(request.param, guests=("a", "b"), containers=("c", "host")) as node:
        yield node


SERVER = """
    import socket
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((socket.VMADDR_CID_ANY, {port}))
        listener.listen(8)
        print("listening", flush=True)
        sock, (cid, port) = listener.accept()
        with sock:
            received = bytearray()
            while data := sock.recv(1 << 16):
                received += data
            sock.sendall(bytes(reversed(received)))
        print(cid, len(received), flush=True)
"""
CLIENT = """
    import socket, sys
    data = bytes(range(256)) * {times}
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
        sock.connect(({cid}, {port}))
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        received = bytearray()
        while part := sock.recv(1 << 16):
            received += part
    assert bytes(received) == bytes(reversed(data)), len(received)
    print("good", flush=True)
"""


def test_siblings_talk_by_number_and_half_close(node: Node) -> None:
    server = node["b"].python(SERVER.format(port=9000))
    assert server.line() == "listening"
    client = node["a"].python(CLIENT.format(cid=node.number("b"), port=9000, times=4000))
    assert client.line() == "good"
    assert server.line() == f"{node.number('a')} {256 * 4000}"


def test_nobody_listens_is_said_at_once(node: Node) -> None:
    code = """
        import errno, socket, time
        begin = time.monotonic()
        try:
            socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).connect(({cid}, 4321))
        except OSError as error:
            print(errno.errorcode[error.errno], time.monotonic() - begin < 1.5, flush=True)
    """
    for cid in (node.number("b"), node.number("c"), 2, 4_000_000):
        assert node["a"].python(code.format(cid=cid)).line() == "ECONNRESET True", cid


def test_a_guest_reaches_a_container(node: Node) -> None:
    listener = node.listen("c", 7000)
    client = node["a"].python(CLIENT.format(cid=node.number("c"), port=7000, times=4000))
    sock, (who, _) = listener.accept()
    with listener, sock:
        assert (who, sock.path) == ("a", "switch")
        assert "switch" in sock.why
        data = bytearray()
        while part := sock.recv(1 << 16):
            data += part
        sock.sendall(bytes(reversed(data)))
    assert client.line() == "good"


def test_a_container_reaches_a_guest(node: Node) -> None:
    server = node["b"].python(SERVER.format(port=9001))
    assert server.line() == "listening"
    with node.connect("c", "b", 9001) as sock:
        assert sock.path == "switch"
        data = bytes(range(256)) * 20_000
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        received = bytearray()
        while part := sock.recv(1 << 16):
            received += part
        assert bytes(received) == bytes(reversed(data))
    assert server.line() == f"{node.number('c')} {len(data)}"


def test_each_buffer_is_the_ring_that_it_names(node: Node) -> None:
    server = node["b"].python(SERVER.format(port=9010))
    assert server.line() == "listening"
    with isthmus.create_connection(("b", 9010), 30, node=node.attach("c"), rings=(4096, 65536)) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 65536
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) > 65536


def test_nobody_listens_in_the_guest(node: Node) -> None:
    with pytest.raises(ConnectionRefusedError):
        node.connect("c", "b", 4321)


def test_seqpackets_keep_their_borders(node: Node) -> None:
    code = """
        import socket
        with socket.socket(socket.AF_VSOCK, socket.SOCK_SEQPACKET) as listener:
            listener.bind((socket.VMADDR_CID_ANY, {port}))
            listener.listen(8)
            print("listening", flush=True)
            sock, _ = listener.accept()
            while data := sock.recv(1 << 18):
                sock.send(data)
    """
    sizes = (1, 44, 3000, 3700, 4096, 10_000, 65_536, 100_000)
    server = node["b"].python(code.format(port=9002))
    assert server.line() == "listening"
    with node.connect("c", "b", 9002, socket.SOCK_SEQPACKET) as sock:
        for size in sizes:
            message = os.urandom(size)
            sock.send(message)
            assert sock.recv(1 << 18) == message, size
    server = node["b"].python(code.format(port=9003))
    assert server.line() == "listening"
    client = node["a"].python(f"""
        import os, socket
        with socket.socket(socket.AF_VSOCK, socket.SOCK_SEQPACKET) as sock:
            sock.connect(({node.number("b")}, 9003))
            for size in {sizes}:
                message = os.urandom(size)
                sock.send(message)
                assert sock.recv(1 << 18) == message, size
        print("good")
    """)
    assert client.line() == "good"


def test_the_accounts_know_what_guests_sent(node: Node) -> None:
    before = node.traffic("a")
    test_siblings_talk_by_number_and_half_close(node)
    after = becomes(lambda: node.traffic("a") if node.traffic("a") != before else None)
    sent = {key: after[key] - before.get(key, 0) for key in ("sent_bytes", "received_bytes", "connections")}
    assert sent == {"sent_bytes": 256 * 4000, "received_bytes": 256 * 4000, "connections": 1}


def test_what_a_guest_writes_is_gone_with_it_and_its_exit_code_is_returned(tmp_path: Path) -> None:
    with PrivateBroker(()) as broker:
        command = [
            sys.executable,
            "-m",
            "isthmus",
            "vm",
            "run",
            "--dir",
            str(broker.directory),
            "--name",
            "g",
            "--",
        ]
        script = f"read word; echo $word $(id -u); echo x > {tmp_path}/file && cat {tmp_path}/file; exit 7"
        done = subprocess.run(
            [*command, "sh", "-c", script],
            input="hello\n",
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert (done.stdout, done.returncode) == ("hello 0\nx\n", 7), done.stderr
        assert not (tmp_path / "file").exists()
        assert broker.ask("domain-list")["domains"] == []


@needs("uml")
def test_a_guest_whose_output_nobody_reads_can_be_stopped(tmp_path: Path) -> None:
    with PrivateBroker(()) as broker:
        added = broker.ask("domain-add", name="g", group=None, uid=None, kind="vm")
        becomes(lambda: broker.ask("status", domain="g")["domain"]["device"] == "waiting")
        output, theirs = os.pipe()
        guest = Guest("g", added["socket"], ["yes"], tmp_path / "g", monitor="uml", stdout=theirs)
        os.close(theirs)
        guest.wait_ready()

        def waiting() -> int:
            return int(struct.unpack("i", fcntl.ioctl(output, termios.FIONREAD, bytes(4)))[0])

        def is_full() -> bool:
            before = waiting()
            time.sleep(0.5)
            return 0 < before == waiting()

        becomes(is_full, "the pipe does not become full")
        stopping = threading.Thread(target=guest.stop, daemon=True)
        stopping.start()
        stopping.join(LIMIT_S)
        assert not stopping.is_alive()
        os.close(output)


def test_the_lines_of_each_monitor_name_the_socket_whatever_its_name() -> None:
    for format in FORMATS:
        assert "/run/a/vsock" in attachment_lines("/run/a/vsock", format)
    assert "path=/run/a,,b/vsock" in attachment_lines("/run/a,b/vsock", "qemu")
    assert "path=/run/a&apos;&amp;/vsock" in attachment_lines("/run/a'&/vsock", "libvirt")
    with pytest.raises(ValueError, match="hyper-v"):
        attachment_lines("/run/a/vsock", "hyper-v")


def test_a_guest_without_an_agent_finds_others_by_name(node: Node) -> None:
    server = node["b"].python(SERVER.format(port=9011))
    assert server.line() == "listening"
    client = node["a"].python("""
        import socket
        from isthmus import errors, vsock
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
            vsock.connect(sock, ("b", 9011))
            sock.sendall(b"by name")
            sock.shutdown(socket.SHUT_WR)
            print(sock.recv(100).decode())
        try:
            vsock.resolve("nobody")
        except errors.UnknownDomain as error:
            print(error.strerror)
    """)
    assert client.line() == "eman yb"
    assert server.line() == f"{node.number('a')} 7"
    assert "nobody" in client.line()
    asked = node["a"].run([sys.executable, "-m", "isthmus", "resolve", "b"])
    assert asked.line() == str(node.number("b"))
    asked = node["a"].run([sys.executable, "-m", "isthmus", "resolve", "nobody"])
    assert "nobody" in asked.line()
    assert asked.code() == 1


def test_the_switch_says_for_whom_it_worked(node: Node) -> None:
    def spent(name: str) -> float:
        return float(node.broker.ask("status", domain=name)["domain"]["switch_cpu_s"])

    before = spent("a"), spent("b")
    server = node["b"].python(SERVER.format(port=9012))
    assert server.line() == "listening"
    client = node["a"].python(CLIENT.format(cid=node.number("b"), port=9012, times=20_000))
    assert client.line() == "good"
    becomes(lambda: spent("a") > before[0] and spent("b") > before[1])
    # What is shared out is what the process used, and no more.
    switch = switch_of(node.broker.directory)
    ticks = Path(f"/proc/{switch}/stat").read_text().rpartition(")")[2].split()[11:13]
    used = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    assert sum(map(spent, ("a", "b", "c", "host"))) <= used + 0.05
    page = str(node.broker.ask("metrics")["text"])
    assert 'isthmus_domain_switch_cpu_seconds_total{domain="a"} 0.0\n' not in page
    node.broker.kill()
    node.broker.start()
    becomes(lambda: spent("a") > before[0])


needs_strangers = pytest.mark.skipif(
    not (shutil.which("redis-server") and shutil.which("redis-cli") and shutil.which("socat")),
    reason="redis or socat is not installed",
)


@needs_strangers
def test_a_guest_reaches_a_unix_socket_of_the_host(node: Node, tmp_path: Path) -> None:
    """A stock client in a guest, a stock server on the host; nothing of ours in the guest."""
    server = ["redis-server", "--port", "0", "--unixsocket", str(tmp_path / "redis.sock"), "--save", ""]
    with subprocess.Popen(server, stdout=subprocess.DEVNULL, cwd=tmp_path) as redis:
        try:
            becomes(lambda: (tmp_path / "redis.sock").exists())
            with forward(node.broker, "host", ":6379", f"unix:{tmp_path}/redis.sock"):
                relay = ["socat", "-t", "60", "UNIX-LISTEN:/tmp/redis.sock,fork", "VSOCK-CONNECT:2:6379"]
                socat = node["a"].run(relay)
                client = node["a"].run(
                    [
                        "sh",
                        "-c",
                        "while ! [ -e /tmp/redis.sock ]; do sleep 0.1; done; "
                        "redis-cli -s /tmp/redis.sock set from guest; redis-cli -s /tmp/redis.sock get from",
                    ]
                )
                assert [client.line(), client.line()] == ["OK", "guest"]
                socat.kill()
        finally:
            redis.terminate()


@needs_strangers
def test_the_host_reaches_a_guest_through_a_unix_socket(node: Node, tmp_path: Path) -> None:
    # It waits half a second, unless told otherwise, for what comes after the end of one direction.
    server = node["b"].run(["socat", "-t", "60", "VSOCK-LISTEN:7100,fork", "EXEC:rev"])
    with forward(node.broker, "host", f"hybrid:{tmp_path}/b.sock", "b"):

        def ask() -> bytes:
            with unix_client(tmp_path / "b.sock") as sock:
                sock.sendall(b"CONNECT 7100\nhello\n")
                sock.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    return all_of(sock)
                return b""

        assert becomes(ask) == b"OK 7100\nolleh\n"
    server.kill()
