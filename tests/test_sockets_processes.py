"""Sockets between processes, under signals, and across `os.fork`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import LIMIT_S, Domains

import isthmus
from isthmus import errors

Pair = tuple[isthmus.Socket, isthmus.Socket]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(domains: Domains) -> Iterator[Start]:
    """Run a program as a domain: ``start("b", code, *arguments)``."""
    with contextlib.ExitStack() as stack:

        def run(domain: str, code: str, *arguments: object) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
                stdout=subprocess.PIPE,
                stdin=subprocess.PIPE,
                env={**os.environ, "ISTHMUS_DOOR": domains.door(domain)},
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield run


SERVER = """
import hashlib, isthmus, sys
with isthmus.create_server(0) as server:
    print(server.getsockname()[1], flush=True)
    for _ in range(int(sys.argv[1])):
        sock, who = server.accept()
        with sock:
            digest = hashlib.sha256()
            while data := sock.recv(1 << 18):
                digest.update(data)
            sock.sendall(digest.digest())
"""


def test_processes_exchange_data(domains: Domains, start: Start) -> None:
    server = start("b", SERVER, 3)
    assert server.stdout is not None
    port = int(server.stdout.readline())
    for i in range(3):
        data = random.Random(i).randbytes(10 << 20)
        with isthmus.create_connection(("b", port), LIMIT_S, node=domains["a"]) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(32, socket.MSG_WAITALL) == hashlib.sha256(data).digest()
    assert server.wait(LIMIT_S) == 0


def test_a_program_that_ends_without_closing_delivers_everything(domains: Domains, start: Start) -> None:
    with domains.server() as server:
        program = start(
            "a",
            "import isthmus, sys, warnings; s = isthmus.create_connection(('b', int(sys.argv[1])));"
            "s.sendall(bytes(30_000)); warnings.simplefilter('ignore')",
            server.getsockname()[1],
        )
        other, _ = server.accept()
        with other:
            other.settimeout(LIMIT_S)
            assert other.recv(1 << 20, socket.MSG_WAITALL) == bytes(30_000)
            assert other.recv(1) == b""
        assert program.wait(LIMIT_S) == 0


def test_a_killed_program_is_a_reset_after_what_it_sent(domains: Domains, start: Start) -> None:
    with domains.server() as server:
        program = start(
            "a",
            "import isthmus, sys; s = isthmus.create_connection(('b', int(sys.argv[1])));"
            "s.sendall(b'last words'); s.recv(1)",
            server.getsockname()[1],
        )
        other, _ = server.accept()
        with other:
            other.settimeout(LIMIT_S)
            assert other.recv(10, socket.MSG_WAITALL) == b"last words"
            program.kill()
            with pytest.raises(ConnectionResetError):
                other.recv(1)
            assert other.recv(1) == b""
            with pytest.raises(BrokenPipeError):
                other.send(b"x")


def test_a_child_of_fork_has_its_own_attachment(domains: Domains) -> None:
    one, other = domains.pair()
    with one, other, domains.server() as server:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:  # pragma: no cover  # the child
            try:
                said = []
                for call in (lambda: one.send(b"x"), lambda: one.recv(1), server.accept):
                    try:
                        call()
                    except errors.Forked:
                        said.append("forked")
                node = isthmus.attach(domains.door("a"))
                with isthmus.create_connection(server.getsockname(), LIMIT_S, node=node) as mine:
                    mine.sendall(b"from the child")
                    said.append("sent")
                one.close()
                other.close()
                server.close()
                os.write(writing, " ".join(said).encode())
            finally:
                os._exit(0)
        os.close(writing)
        child, _ = server.accept()
        with child:
            assert child.recv(100, socket.MSG_WAITALL) == b"from the child"
        assert os.waitpid(pid, 0)[1] == 0
        assert os.read(reading, 100) == b"forked forked forked sent"
        os.close(reading)
        one.sendall(b"the parent's still works")
        assert other.recv(100) == b"the parent's still works"
        isthmus.create_connection(server.getsockname(), LIMIT_S, node=domains["a"]).close()


class Woken(Exception):
    pass


@pytest.fixture
def alarm() -> Iterator[Callable[[], None]]:
    """Send this process signals until one has ended what it waits for."""
    stop = threading.Event()

    def handler(number: int, frame: object) -> None:
        stop.set()
        raise Woken

    def ring() -> None:
        time.sleep(0.02)
        while not stop.wait(0.05):
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    threads: list[threading.Thread] = []

    def set_off() -> None:
        stop.clear()
        threads.append(threading.Thread(target=ring))
        threads[-1].start()

    yield set_off
    stop.set()
    for thread in threads:
        thread.join()
    signal.signal(signal.SIGUSR1, before)


def test_a_signal_handler_ends_a_wait(domains: Domains, alarm: Callable[[], None]) -> None:
    one, other = domains.pair(rings=8192)
    with (
        one,
        other,
        domains.server() as server,
        isthmus.create_server(0, type=socket.SOCK_DGRAM, node=domains["b"]) as datagrams,
    ):
        one.settimeout(None)
        server.settimeout(None)
        datagrams.settimeout(None)
        for wait in ("adaptive", "block", "spin"):
            one.wait = wait
            for call in (
                lambda: one.recv(1),
                lambda: one.recv_into(bytearray(1)),
                lambda: one.recv(100, socket.MSG_WAITALL),
                lambda: one.sendall(bytes(100_000)),
                server.accept,
                lambda: datagrams.recvfrom(1),
            ):
                alarm()
                with pytest.raises(Woken):
                    call()


def test_a_signal_handler_that_does_not_raise_ends_nothing(pair: Pair) -> None:
    one, other = pair
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:

        def ring() -> None:
            for _ in range(10):
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.005)
            other.sendall(b"at last")

        thread = threading.Thread(target=ring)
        thread.start()
        assert one.recv(100) == b"at last"
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen


def test_the_import_is_cheap() -> None:
    code = "import sys; import isthmus; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"click", "rich", "asyncio", "ssl", "numpy", "socket", "typing_extensions", "isthmus._native"}
    assert not heavy & set(loaded.stdout.split())
