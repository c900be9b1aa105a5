"""Two networks joined by a bridge, a domain in each, and programs in them, for tests of `isthmus run`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from conftest import LIMIT_S

from isthmus.bench.bridge import Bridge
from isthmus.testing import PrivateBroker

POLICY = f"""
[[domain]]
name = "a"
addresses = ["{Bridge.left_address}", "fd00:77::1"]

[[domain]]
name = "b"
addresses = ["{Bridge.right_address}", "fd00:77::2"]

[[domain]]
name = "c"
"""


class Program:
    """A program that runs in a network, perhaps under `isthmus run`; its lines are read one by one."""

    def __init__(self, command: list[str], environment: Mapping[str, str], *, stdin: bool = False) -> None:
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
            start_new_session=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise EOFError(self.process.stderr.read())
        return line.rstrip("\n")

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str, str]:
        """Wait for its end: how it ended, and what it wrote that was not read."""
        out, err = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, out, err

    def stop(self) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(LIMIT_S)
        # Whatever it left behind is in its session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


class Net:
    """Two networks, `left` of the domain a and `right` of the domain b, and a broker."""

    def __init__(self, broker: PrivateBroker, bridge: Bridge) -> None:
        self.broker = broker
        self._bridge = bridge
        self._programs: list[Program] = []
        self._before: dict[str, int] = {}
        self._sockets = 0

    def begin(self) -> None:
        """From now on `fallbacks` and `sockets` count."""
        self._before = self._fallbacks("a")
        self._sockets = self._socket_connections()

    def command(
        self,
        side: str,
        *words: str,
        run: bool = True,
        door: str = "",
        options: str = "",
        before: Sequence[str] = (),
    ) -> list[str]:
        """What starts a program; the words `before` start `isthmus run`, perhaps as another user."""
        door = self.broker.door(door or {"left": "a", "right": "b"}[side])
        supervised = [sys.executable, "-m", "isthmus", "run", *options.split(), "--"] if run else []
        return [*self._bridge.prefix(side), "env", f"ISTHMUS_DOOR={door}", *before, *supervised, *words]

    def start(
        self,
        side: str,
        *words: str,
        stdin: bool = False,
        environment: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Program:
        program = Program(self.command(side, *words, **more), environment or {}, stdin=stdin)
        self._programs.append(program)
        return program

    def python(self, side: str, code: str, **more: Any) -> Program:
        return self.start(side, sys.executable, "-u", "-c", textwrap.dedent(code), **more)

    def output(self, side: str, *words: str, **more: Any) -> str:
        code, out, err = self.start(side, *words, **more).end()
        assert code == 0, err
        return out

    def server(self, code: str = "", port: int = 7000, **more: Any) -> Program:
        """A server on the right that echoes, one connection in each thread."""
        program = self.python("right", code or ECHO.format(port=port), **more)
        assert program.line() == "listening"
        return program

    def connections(self, domain: str = "a") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.broker.ask("status", domain=domain)["domain"]["connections"]
        return found

    def fallbacks(self) -> dict[str, int]:
        """Why connections of the domain a were not exchanged in this test, and how many."""
        found = self._fallbacks("a")
        return {
            why: n - self._before.get(why, 0) for why, n in found.items() if n != self._before.get(why, 0)
        }

    def sockets(self) -> int:
        """How many connections of the domain a were exchanged in this test."""
        return self._socket_connections() - self._sockets

    def _socket_connections(self) -> int:
        traffic = self.broker.ask("status", domain="a")["domain"]["traffic"]
        return int(traffic.get("socket", {}).get("connections", 0))

    def _fallbacks(self, domain: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for entry in self.broker.ask("status", domain=domain)["domain"]["fallbacks"]:
            found[entry["why"]] = found.get(entry["why"], 0) + entry["count"]
        return found

    def bytes_on_the_bridge(self) -> int:
        text = subprocess.run(
            [*self._bridge.prefix("left"), "cat", "/proc/net/dev"], capture_output=True, text=True, check=True
        ).stdout
        line = next(line for line in text.splitlines() if line.strip().startswith("eth0:"))
        received, sent = line.split(":")[1].split()[0], line.split(":")[1].split()[8]
        return int(received) + int(sent)

    def stop(self) -> None:
        for program in self._programs:
            program.stop()
        self._programs.clear()


ECHO = """
import socket, threading
server = socket.create_server(("0.0.0.0", {port}), backlog=128)
print("listening")
def echo(sock):
    with sock:
        while data := sock.recv(1 << 16):
            sock.sendall(data)
while True:
    sock, address = server.accept()
    print(sock.family.name, *address)
    threading.Thread(target=echo, args=(sock,), daemon=True).start()
"""

#: Talks to the echo, and says whether that took a socket of this kernel or TCP.
TALK = """
import os, socket
sock = socket.create_connection(("{to}", {port}), 20)
sock.sendall(b"hello")
assert sock.recv(5) == b"hello"
# Only the kernel's own list of TCP sockets does not believe that it is one.
inode = str(os.fstat(sock.fileno()).st_ino)
tcp = [line.split()[9] for name in ("tcp", "tcp6") for line in open(f"/proc/net/{{name}}")]
print("tcp" if inode in tcp else "socket", sock.getpeername()[0])
"""


def exchanged(net: Net, domain: str = "a") -> int:
    return sum(c["path"] == "socket" for c in net.connections(domain))
