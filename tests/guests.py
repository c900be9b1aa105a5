"""Guests for tests: booted once, then asked to run one program after the other."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import textwrap
import time
import types
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import becomes

import isthmus
from isthmus.testing import PrivateBroker
from isthmus.vm import Guest, Missing
from isthmus.vm.kernels import qemu_kernel, qemu_program, uml_kernel

if TYPE_CHECKING:
    from typing_extensions import Self

#: No test waits longer for a guest; emulation on a busy machine is slow.
LIMIT_S = 180.0
#: The program that runs the others; see `Runner`.
SHELL = Path(__file__).with_name("guest_shell.py")


def needs(monitor: str) -> pytest.MarkDecorator:
    """Skip, saying what is missing, where this machine cannot start such guests."""
    try:
        if monitor == "uml":
            uml_kernel()
        else:
            qemu_program()
            qemu_kernel()
    except Missing as error:
        return pytest.mark.skipif(True, reason=str(error))
    return pytest.mark.skipif(False, reason="")


def switch_of(directory: Path) -> int:
    """The process of a runtime directory's switch."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if b"switch" in words and os.fsencode(directory) in words:
                return int(entry.parent.name)
    raise AssertionError("there is no switch")


class Program:
    """A program that runs in a guest."""

    def __init__(self, shell: Shell, number: int) -> None:
        self._shell = shell
        self.number = number

    def line(self, timeout: float = LIMIT_S) -> str:
        """The next line of its output. Fails if it ends instead."""
        kind, text = self._shell.news(self.number, timeout)
        if kind == "line" and str(text).startswith("Traceback"):
            kind, text = "exit", self.code(timeout)
        assert kind == "line", f"program {self.number} ended with {text}:\n{self._shell.text(self.number)}"
        return str(text)

    def code(self, timeout: float = LIMIT_S) -> int:
        """Its exit code, once it has ended."""
        while True:
            kind, text = self._shell.news(self.number, timeout)
            if kind == "exit":
                return int(text)

    def tell(self, line: str) -> None:
        """A line for its input."""
        self._shell.say({"tell": self.number, "line": line})

    def kill(self, number: int = 9) -> None:
        self._shell.say({"kill": self.number, "signal": number})


class Shell(ABC):
    """Asks `guest_shell.py` to run programs, and hears what it tells."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._last = 0
        self._news: dict[int, list[tuple[str, Any]]] = {}
        self._texts: dict[int, list[str]] = {}

    @abstractmethod
    def say(self, what: dict[str, Any]) -> None:
        """Ask for something."""

    @abstractmethod
    def listen(self, seconds: float) -> None:
        """Wait so long for something to `hear`."""

    def python(self, code: str, *arguments: object, **environment: str) -> Program:
        """Start a Python program; its output is told by lines."""
        words = {"python": textwrap.dedent(code), "arguments": [str(argument) for argument in arguments]}
        return self._start(words, environment)

    def run(self, command: list[str], *, told: bool = False, **environment: str) -> Program:
        """Start any program; if it is to be `told` something, it has an input."""
        return self._start({"run": command, "told": told}, environment)

    def _start(self, words: dict[str, Any], environment: dict[str, str]) -> Program:
        self._last += 1
        self._news[self._last] = []
        self._texts[self._last] = []
        self.say({**words, "number": self._last, "environment": environment})
        return Program(self, self._last)

    def text(self, number: int) -> str:
        return "\n".join(self._texts[number])

    def news(self, number: int, timeout: float) -> tuple[str, Any]:
        until = time.monotonic() + timeout
        waiting = self._news[number]
        while not waiting:
            left = until - time.monotonic()
            assert left > 0, f"guest {self.name}: nothing in {timeout:.0f} s; so far:\n{self.text(number)}"
            self.listen(left)
        return waiting.pop(0)

    def hear(self, line: bytes | str) -> None:
        try:
            said = json.loads(line)
        except ValueError:
            return  # The terminal's own noise while the guest boots.
        if "line" in said:
            self._texts[said["number"]].append(said["line"])
            self._news[said["number"]].append(("line", said["line"]))
        elif "exit" in said:
            self._news[said["number"]].append(("exit", said["exit"]))


class Machine(Shell):
    """A running guest that runs what it is asked to, over its serial line."""

    def __init__(self, name: str, device: str, directory: Path, monitor: str, **options: Any) -> None:
        super().__init__(name)
        ours, theirs = socket.socketpair()
        self._sock = ours
        self._buffer = b""
        self.stopped = False
        with theirs:
            self.guest = Guest(
                name,
                device,
                [sys.executable, str(SHELL), "isthmus", "threading"],
                directory,
                monitor=monitor,
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                environment={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                **options,
            )

    def say(self, what: dict[str, Any]) -> None:
        self._sock.sendall(json.dumps(what).encode() + b"\n")

    def listen(self, seconds: float) -> None:
        if select.select([self._sock], [], [], seconds)[0]:
            data = self._sock.recv(1 << 16)
            assert data, f"guest {self.name} is gone"
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                self.hear(line)

    def stop(self) -> None:
        self.stopped = True
        self.guest.stop()
        self._sock.close()


class Inner(Shell):
    """A shell that some command of a machine's runs, as `isthmus run` does: its programs are that one's."""

    def __init__(self, machine: Machine, before: list[str], *modules: str, **environment: str) -> None:
        super().__init__(machine.name)
        self._shell = machine.run([*before, sys.executable, str(SHELL), *modules], told=True, **environment)

    def say(self, what: dict[str, Any]) -> None:
        self._shell.tell(json.dumps(what))

    def listen(self, seconds: float) -> None:
        self.hear(self._shell.line(seconds))


class Node:
    """A broker with guests of one monitor, and containers (that is: doors)."""

    def __init__(
        self,
        monitor: str,
        guests: tuple[str, ...] = ("a", "b"),
        containers: tuple[str, ...] = (),
        policy: str | None = None,
        agents: bool = False,
        switch: tuple[str, ...] = (),
        addresses: dict[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.monitor = monitor
        self.broker = PrivateBroker(containers, policy)
        self._names = guests
        self._agents = agents
        #: Options of a switch of one's own, instead of the one that the broker starts.
        self._switch = switch
        #: Of guests: an IP address that each has in its own network.
        self._addresses = addresses or {}
        self._options = options
        self._domains: dict[str, dict[str, Any]] = {}
        self._machines: dict[str, Machine] = {}
        self._nodes: dict[str, isthmus.Node] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            self._stack.enter_context(self.broker)
            if self._switch:
                self._start_switch()
            for name in self._names:
                given = [self._addresses[name]] if name in self._addresses else []
                self.broker.ask("domain-add", name=name, group=None, uid=None, kind="vm", addresses=given)
            self._domains = {d["name"]: d for d in self.broker.ask("domain-list")["domains"]}
            self.await_devices("waiting")
            for name in self._names:
                self.boot(name)
            self._prepare(*self._names)
        except BaseException:
            self._stack.close()
            raise
        return self

    def _prepare(self, *names: str) -> None:
        """Wait for guests that boot, and for the agents in them."""
        for name in names:
            self._machines[name].guest.wait_ready()
            if name in self._addresses:
                words = ["ip", "address", "add", f"{self._addresses[name]}/32", "dev", "lo"]
                assert self._machines[name].run(words).code() == 0
        if self._agents:
            agents = [self._run_agent(name) for name in names]
            for agent in agents:
                assert agent.line() == "ready"

    def _start_switch(self) -> None:
        words = ["switch", "--stay", "--dir", str(self.broker.directory), *self._switch]
        process = subprocess.Popen([sys.executable, "-m", "isthmus", *words])
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)
        until = time.monotonic() + LIMIT_S
        while not (self.broker.directory / "switch").exists():
            assert time.monotonic() < until, "the switch does not start"
            time.sleep(0.01)

    def boot(self, name: str) -> Machine:
        """Start a guest."""
        directory = self.broker.directory / "vm" / name
        machine = Machine(name, self._domains[name]["socket"], directory, self.monitor, **self._options)
        self._stack.callback(machine.stop)
        self._machines[name] = machine
        return machine

    def boot_again(self, name: str) -> Machine:
        """Start a guest that was stopped, and its agent."""
        becomes(lambda: self.device(name) == "waiting")
        self.boot(name)
        self._prepare(name)
        return self._machines[name]

    def _run_agent(self, name: str) -> Program:
        return self._machines[name].run([sys.executable, "-m", "isthmus", "agent", "--ready"])

    def await_devices(self, state: str) -> None:
        until = time.monotonic() + LIMIT_S
        while any(self.device(name) != state for name in self._names):
            assert time.monotonic() < until, [self.device(name) for name in self._names]
            time.sleep(0.01)

    def device(self, name: str) -> str:
        """How far the device of a guest has come."""
        return str(self.broker.ask("status", domain=name)["domain"]["device"])

    def number(self, name: str) -> int:
        """The number of a domain: a guest's CID."""
        return int(self._domains[name]["number"])

    def listen(self, domain: str, port: int, type: int = socket.SOCK_STREAM) -> isthmus.Socket:
        """A listening socket of a container."""
        listener = isthmus.create_server(("", port), type=type, node=self.attach(domain))
        listener.settimeout(LIMIT_S)
        return listener

    def connect(self, domain: str, to: str, port: int, type: int = socket.SOCK_STREAM) -> isthmus.Socket:
        """A connection of a container's program."""
        sock = isthmus.create_connection((to, port), LIMIT_S, type=type, node=self.attach(domain))
        sock.settimeout(LIMIT_S)
        return sock

    def attach(self, domain: str) -> isthmus.Node:
        if domain not in self._nodes:
            self._nodes[domain] = isthmus.attach(self.broker.door(domain))
        return self._nodes[domain]

    def connections(self, domain: str) -> int:
        """How many connections a domain holds now."""
        return int(self.broker.ask("status", domain=domain)["domain"]["holds"]["connections"][0])

    def listens(self, domain: str, port: int) -> bool:
        """Whether the broker knows of a listener."""
        ports = self.broker.ask("status", domain=domain)["domain"]["ports"]
        return any(entry["port"] == port for entry in ports)

    def traffic(self, domain: str) -> dict[str, int]:
        """What went over the switch for a domain."""
        status = self.broker.ask("status", domain=domain)["domain"]
        return dict(status["traffic"].get("switch", {}))

    def __getitem__(self, name: str) -> Machine:
        return self._machines[name]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._stack.close()
