"""Threads that share everything: under the GIL here, and without one where such an interpreter is found."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import isthmus
from isthmus.testing import PrivateBroker

ROOT = Path(__file__).parents[1]
SENDERS, EACH, SIZE = 4, 300, 700


def exchange() -> None:
    """Several threads send on one connection and several receive from it; nothing is lost or torn."""
    with PrivateBroker(("a", "b")) as broker:
        listener = isthmus.attach(broker.door("b")).native.listen(0, "seqpacket")
        client = isthmus.attach(broker.door("a")).native.connect("b", listener.port, "seqpacket", timeout=10)
        server = listener.accept(10)
        got: list[bytes] = []
        failed: list[BaseException] = []

        def send(who: int) -> None:
            try:
                for i in range(EACH):
                    assert client.send(bytes([who]) + i.to_bytes(2, "big") + bytes([who]) * SIZE, 30.0)
            except BaseException as error:
                failed.append(error)

        def receive() -> None:
            try:
                while data := server.recv(2000, 30.0)[0]:
                    got.append(data)
            except BaseException as error:
                failed.append(error)

        senders = [threading.Thread(target=send, args=[who]) for who in range(SENDERS)]
        receivers = [threading.Thread(target=receive) for _ in range(2)]
        for thread in senders + receivers:
            thread.start()
        for thread in senders:
            thread.join(60)
        client.shut_send()
        for thread in receivers:
            thread.join(60)
        assert not failed, failed
        expected = {
            bytes([who]) + i.to_bytes(2, "big") + bytes([who]) * SIZE
            for who in range(SENDERS)
            for i in range(EACH)
        }
        assert len(got) == len(expected)
        assert set(got) == expected


def test_many_threads_on_one_connection() -> None:
    exchange()


def free_threaded_python() -> str | None:
    for name in ("python3.15t", "python3.14t", "python3.13t"):
        if found := shutil.which(name):
            return found
    return None


def test_the_same_without_a_gil(tmp_path: Path) -> None:
    python = free_threaded_python()
    if python is None:
        pytest.skip("no free-threaded interpreter on PATH (python3.13t, python3.14t)")
    subprocess.run([python, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=60)
    inside = str(tmp_path / "venv/bin/python")
    subprocess.run([inside, "-m", "pip", "install", "-q", f"{ROOT}[cli]", "pytest"], check=True, timeout=600)
    program = (
        "import sys, test_threads, isthmus._native\n"
        "assert not sys._is_gil_enabled(), 'importing the module switched the GIL on'\n"
        "test_threads.exchange()\n"
    )
    subprocess.run([inside, "-c", program], check=True, timeout=200, cwd=ROOT / "tests")


if __name__ == "__main__":
    exchange()
    print(
        "exchanged,", "without a GIL" if not getattr(sys, "_is_gil_enabled", lambda: True)() else "with a GIL"
    )
