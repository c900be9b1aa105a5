"""A broker in a thread and programs that speak to it: what the broker's tests are made of."""

from __future__ import annotations

import asyncio
import fcntl
import io
import json
import os
import select
import socket
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from isthmus._native import ANYBODY, CONTROL_MESSAGE_MAX, control_decode, control_encode
from isthmus.broker.core import Broker
from isthmus.broker.doors import bind_at
from isthmus.broker.log import Log
from isthmus.broker.service import Service

__all__ = ["ANYBODY", "Node", "Program", "Refused", "bind_at", "eventually", "inbox", "sealed_ring"]

DEADLINE_S = 20.0
F_ADD_SEALS = 1033
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_FUTURE_WRITE = 1, 2, 4, 0x10
PAGE = 4096
SMALL = 65_536

T = TypeVar("T")


def eventually(what: Callable[[], T], why: str = "") -> T:
    """Ask again until the answer is true."""
    end = time.monotonic() + DEADLINE_S
    while True:
        found = what()
        if found:
            return found
        assert time.monotonic() < end, why or "it did not happen"
        time.sleep(0.002)


def _memfd(size: int, seals: int) -> int:
    fd = os.memfd_create("isthmus-test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


def _reopen(fd: int, flags: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    finally:
        os.close(fd)


def ring_size(small: int, large: int) -> int:
    return (2 << 20) + large if large else SMALL + small


def sealed_ring(small: int = SMALL, large: int = 0) -> list[int]:
    """What a program brings to a `sealed` connection."""
    seals = F_SEAL_FUTURE_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL
    return [_reopen(_memfd(ring_size(small, large), seals), os.O_RDONLY)]


def inbox(small: int = SMALL, large: int = 0) -> list[int]:
    """What a program brings to a `put` connection."""
    ring = _memfd(ring_size(small, large), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
    page = _memfd(PAGE, F_SEAL_FUTURE_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
    return [_reopen(ring, os.O_WRONLY), _reopen(page, os.O_RDONLY)]


LANES = {"sealed": sealed_ring, "put": inbox}


class Refused(Exception):
    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__(f"{fields['refusal']} by rule {fields['rule']}: {fields['text']}")
        self.refusal: str = fields["refusal"]
        self.rule: int = fields["rule"]
        self.text: str = fields["text"]


class Program:
    """A program attached to its domain's door. Every wait has a deadline."""

    def __init__(self, door: Path, *, hello: bool = True, features: int = 0) -> None:
        directory = os.open(door.parent, os.O_RDONLY | os.O_DIRECTORY)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(f"/proc/self/fd/{directory}/{door.name}")
        os.close(directory)
        self.sock.settimeout(DEADLINE_S)
        self._request = 0
        self._waiting: list[tuple[str, int, dict[str, Any]]] = []
        self.welcome: dict[str, Any] = {}
        if hello:
            self.welcome = self.ask("hello", features=features, program="test")[1]

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_socket()

    def close_socket(self) -> None:
        for _, _, fields in self._waiting:
            _close(fields.get("fds", []))
        self._waiting.clear()
        self.sock.close()

    # Packets.

    def send_raw(self, packet: bytes, fds: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        self.sock.sendmsg([packet], rights)

    def send(self, kind_: str, fds: list[int] | None = None, /, **fields: Any) -> int:
        """Send a message; its descriptors are closed here."""
        self._request += 1
        try:
            self.send_raw(control_encode(kind_, self._request, **fields), fds)
        finally:
            _close(fds or [])
        return self._request

    def receive(self) -> tuple[str, int, dict[str, Any]]:
        """The next message; its descriptors are in ``fields["fds"]``. Kind "" is the end."""
        data, ancillary, _, _ = self.sock.recvmsg(CONTROL_MESSAGE_MAX, socket.CMSG_SPACE(3 * 4))
        fds = array("i")
        for _, _, content in ancillary:
            fds.frombytes(content)
        if not data:
            return "", 0, {"fds": []}
        kind, request, fields = control_decode(data)
        return kind, request, {**fields, "fds": fds.tolist()}

    def next(self, *kinds: str) -> dict[str, Any]:
        """The next message of these kinds; others wait for who asks for them."""
        for index, (kind, _, fields) in enumerate(self._waiting):
            if kind in kinds:
                del self._waiting[index]
                return fields
        while True:
            kind, request, fields = self.receive()
            if kind in kinds:
                return fields
            assert kind, f"the attachment ended while waiting for {kinds}"
            self._waiting.append((kind, request, fields))

    def answer(self, request: int) -> tuple[str, dict[str, Any]]:
        index = next((i for i, entry in enumerate(self._waiting) if entry[1] == request), None)
        if index is not None:
            kind, _, fields = self._waiting.pop(index)
        else:
            while True:
                kind, number, fields = self.receive()
                assert kind, "the attachment ended while waiting for an answer"
                if number == request:
                    break
                self._waiting.append((kind, number, fields))
        if kind == "refused":
            raise Refused(fields)
        return kind, fields

    def ask(self, kind_: str, fds: list[int] | None = None, /, **fields: Any) -> tuple[str, dict[str, Any]]:
        return self.answer(self.send(kind_, fds, **fields))

    def ended(self) -> bool:
        """Read until the broker hangs up."""
        while True:
            try:
                kind, _, fields = self.receive()
            except ConnectionError:
                return True
            if not kind:
                return True
            _close(fields["fds"])

    def quiet(self) -> bool:
        """Nothing waits to be read."""
        return not self._waiting and not select.select([self.sock], [], [], 0)[0]

    # What programs do.

    def bind(self, port: int = 0, *, partner: int = ANYBODY, kind: str = "stream", backlog: int = 16) -> int:
        return int(self.ask("bind", port=port, kind=kind, partner=partner, backlog=backlog)[1]["port"])

    def start_connect(
        self,
        to: str,
        port: int,
        *,
        from_port: int = 0,
        kind: str = "stream",
        carrier: str = "sealed",
        require: int = 0,
        small: int = SMALL,
        large: int = 0,
        fds: list[int] | None = None,
    ) -> int:
        return self.send(
            "connect",
            LANES[carrier](small, large) if fds is None else fds,
            to=to,
            to_port=port,
            from_port=from_port,
            kind=kind,
            carrier=carrier,
            require=require,
            small=small,
            large=large,
        )

    def accept(self, incoming: dict[str, Any] | None = None, *, fds: list[int] | None = None) -> Connection:
        """Answer the next `incoming`."""
        incoming = incoming or self.next("incoming")
        carrier = incoming["carrier"]
        self.send(
            "accept",
            LANES[carrier]() if fds is None else fds,
            connection=incoming["connection"],
            small=SMALL,
            large=0,
        )
        return Connection(self, incoming, opener=False)

    def connect(self, to: str, port: int, listener: Program, **how: Any) -> tuple[Connection, Connection]:
        """A whole connection: this side and the listener's."""
        request = self.start_connect(to, port, **how)
        try:
            theirs = listener.accept()
        except TimeoutError:
            self.answer(request)
            raise
        kind, fields = self.answer(request)
        assert kind == "connected"
        return Connection(self, fields, opener=True), theirs

    def refused(self, request: int) -> Refused:
        try:
            kind, _ = self.answer(request)
        except Refused as refused:
            return refused
        raise AssertionError(f"{kind} where a refusal must be")

    def try_connect(self, to: str, port: int, **how: Any) -> Refused:
        """A connect that must be refused without the listener's doing anything."""
        return self.refused(self.start_connect(to, port, **how))

    def status(self) -> dict[str, Any]:
        text = ""
        while True:
            piece = self.ask("status", offset=len(text))[1]
            text += piece["text"]
            if len(text) >= piece["total"]:
                return dict(json.loads(text))


class Connection:
    """One side of a connection, as its program holds it."""

    def __init__(self, program: Program, fields: dict[str, Any], *, opener: bool) -> None:
        self.program = program
        self.fields = fields
        self.opener = opener
        self.number: int = fields["connection"]
        self.fds: list[int] = fields["fds"]

    def close(self) -> None:
        self.program.send("close", connection=self.number)
        self.forget()

    def forget(self) -> None:
        _close(self.fds)
        self.fds = []

    def resume(self, program: Program, **other: Any) -> str:
        """Show the ticket to a broker; returns the answer's kind."""
        f = self.fields
        carrier = f["carrier"]
        fields = {
            "connection": self.number,
            "peer": f["to"] if self.opener else f["from"],
            "peer_port": f["to_port"] if self.opener else f["from_port"],
            "port": f["from_port"] if self.opener else f["port"],
            "kind": "stream",
            "carrier": carrier,
            "small": SMALL,
            "large": 0,
            "opener": int(self.opener),
            "ticket": f["ticket"],
            **other,
        }
        fds = LANES[carrier]()
        _close(fds[:-1])
        return program.ask("resume", fds[-1:], **fields)[0]


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


class Node:
    """A broker in a thread of this process."""

    def __init__(self, directory: Path, policy: str | None = None, *, state: Path | None = None) -> None:
        self.directory = directory
        self.policy_path = directory.parent / f"{directory.name}.toml" if policy is not None else None
        if self.policy_path is not None and policy is not None:
            self.policy_path.write_text(policy)
        self._state = state
        self.log = io.StringIO()
        self.start()

    def start(self) -> None:
        ready = threading.Event()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(DEADLINE_S)
        if self.failure is not None:
            raise self.failure

    def _run(self, ready: threading.Event) -> None:
        async def serve() -> None:
            try:
                self.service = Service(
                    self.directory,
                    policy_path=self.policy_path,
                    state_directory=self._state,
                    log=Log(self.log, style="json"),
                )
                await self.service.start()
            except BaseException as error:
                self.failure = error
                ready.set()
                return
            self.loop = asyncio.get_running_loop()
            self._end = asyncio.Event()
            ready.set()
            await self._end.wait()
            await self.service.close()

        asyncio.run(serve())

    def stop(self) -> None:
        if self._thread.is_alive() and self.failure is None:
            self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def restart(self) -> None:
        self.stop()
        self.start()

    def __enter__(self) -> Node:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.stop()
        assert '"event": "bug"' not in self.log.getvalue(), self.log.getvalue()

    @property
    def broker(self) -> Broker:
        return self.service.broker

    def do(self, what: Callable[[], T]) -> T:
        """Run something in the broker's own thread."""

        async def run() -> T:
            return what()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(DEADLINE_S)

    def add(self, *names: str, group: str = "default") -> None:
        for name in names:
            self.do(lambda name=name: self.broker.add_domain(name, group, None))  # type: ignore[misc]

    def door(self, name: str) -> Path:
        return self.directory / "doors" / name / "door"

    def attach(self, name: str, **how: Any) -> Program:
        return Program(self.door(name), **how)

    def change_policy(self, text: str) -> int:
        assert self.policy_path is not None
        self.policy_path.write_text(text)
        return self.do(self.service.reload)[0]

    def number(self, name: str) -> int:
        return self.do(lambda: self.broker.domains[name].number)

    def holds(self, name: str) -> tuple[int, int, int, int, int]:
        """Connections, lanes, memory, pending, ports."""
        d = self.broker.domains[name]
        return self.do(lambda: (d.connections, d.lanes, d.memory, d.pending, d.bound))
