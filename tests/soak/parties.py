"""The parties of `test_death.py`: brokers, senders and receivers, forked from one process that has imported
everything already, so that a new one takes milliseconds.

Reads one command a line (``broker DIRECTORY LOG``, ``sender DOOR PAUSE``, ``receiver DOOR``) and forks. Every
process prints its events as JSON, a line each, with its process id.

A stream is its length and a number (8 bytes each) and then bytes that follow from the number, so that its
receiver can tell a prefix from anything else, and whether an orderly end came too early.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import json
import os
import random
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import isthmus.errors as errors
from isthmus import _native as n
from isthmus.broker.log import Log
from isthmus.broker.service import Service

LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
STREAM, MESSAGES, LIFELINE = 7, 8, 9
#: Far longer than anything takes here.
LIMIT_S = 60.0
RAMP = bytes(range(256)) * 5
#: How a connection may end that the other side did not finish.
TOLD = (errors.PeerReset, errors.PeerClosed)
#: What a connect may meet while the receiver or the broker is away.
AWAY = (
    errors.NobodyListens, errors.BrokerLost, errors.NoBroker, errors.BacklogFull, errors.LimitReached,
    errors.PeerReset, errors.TimedOut, errors.UnknownDomain,
)  # fmt: skip


def say(word: str, **facts: Any) -> None:
    os.write(1, json.dumps({"event": word, "pid": os.getpid(), **facts}).encode() + b"\n")


def body(number: int, at: int, size: int) -> bytes:
    """`size` bytes of the stream with this number, from `at`."""
    start = (number + at) % 256
    return (RAMP * (size // 1000 + 2))[start : start + size]


def threads(*work: Callable[[], None]) -> None:
    """Run each in a thread; one that fails fails the process."""

    def run(what: Callable[[], None]) -> None:
        try:
            what()
        except BaseException as error:
            say("failed", text=f"{type(error).__name__}: {error}", where=str(what))

    for what in work:
        threading.Thread(target=run, args=(what,), daemon=True).start()


# ---- the receiver


def take_stream(connection: Any) -> str:
    buffer = bytearray(30_000)
    view = memoryview(buffer)
    head = bytearray(16)
    if connection.recv_exactly_into(head, LIMIT_S) < 16:
        return "nothing"
    number, total = struct.unpack("<QQ", head)
    rng = random.Random(number)
    slow = number % 5 == 0
    at = 0
    while got := connection.recv_into(view[: rng.choice([100, 3000, 30_000])], LIMIT_S)[0]:
        assert view[:got] == body(number, at, got), f"stream {number}: other bytes at {at}"
        at += got
        if slow:
            time.sleep(0.001)
    assert at == total, f"stream {number}: an orderly end after {at} of {total} bytes"
    return "whole"


def take_messages(connection: Any) -> str:
    buffer = bytearray(1 << 20)
    for count in itertools.count():
        stored, whole = connection.recv_into(buffer, LIMIT_S)
        if whole == 0:
            return "whole"
        number, size = struct.unpack_from("<QQ", buffer)
        assert (number, size) == (count, whole), f"message {count}: {number} of {size}, {whole} bytes"
        assert memoryview(buffer)[16:stored] == body(count, 0, stored - 16), f"message {count}: other bytes"


def echo(connection: Any) -> str:
    buffer = bytearray(1000)
    while got := connection.recv_into(buffer, LIMIT_S)[0]:
        connection.send(memoryview(buffer)[:got], LIMIT_S)
    return "whole"


def receiver(door: str) -> None:
    node = attached(door, "receiver")

    def serve(port: int, kind: str, take: Callable[[Any], str]) -> Callable[[], None]:
        listener = leased(lambda: node.listen(port, kind))

        def one(connection: Any) -> None:
            say("opened", id=connection.id)
            try:
                end = take(connection)
            except TOLD as error:
                end = type(error).__name__
            except errors.ConnectionCut as error:
                # Its opener died before the broker could tell it that we accepted.
                if "the opener is gone" not in str(error):
                    raise
                end = "opener gone"
            connection.close()
            say("ended", id=connection.id, end=end)

        def accept() -> None:
            while True:
                threads(partial(one, listener.accept(None)))

        return accept

    work = [serve(STREAM, "stream", take_stream), serve(MESSAGES, "seqpacket", take_messages)]
    threads(*work, serve(LIFELINE, "stream", echo))
    say("ready", role="receiver")
    threading.Event().wait()


# ---- the sender


def send_stream(connection: Any, rng: random.Random, number: int) -> None:
    total = rng.choice([0, 10, 5000, 40_000, 400_000])
    connection.send(struct.pack("<QQ", number, total), LIMIT_S)
    at = 0
    while at < total:
        size = min(rng.choice([1, 700, 20_000, 300_000]), total - at)
        at += connection.send(body(number, at, size), LIMIT_S)


def send_messages(connection: Any, rng: random.Random, _: int) -> None:
    for count in range(rng.choice([1, 10, 40])):
        size = 16 + rng.choice([0, 100, 10_000, connection.message_max - 16])
        connection.send(struct.pack("<QQ", count, size) + body(count, 0, size - 16), LIMIT_S)


def sender(door: str, pause: str) -> None:
    node = attached(door, "sender")
    peer = "b"

    def worker(port: int, kind: str, send: Callable[[Any, random.Random, int], None]) -> Callable[[], None]:
        def work() -> None:
            rng = random.Random(os.getpid() + port)
            for turn in itertools.count():
                while os.path.exists(pause):
                    say("paused", port=port)
                    time.sleep(0.02)
                try:
                    connection = node.connect(peer, port, kind, timeout=10)
                except AWAY as error:
                    say("away", port=port, error=type(error).__name__)
                    time.sleep(0.005)
                    continue
                number = turn * 10 + port
                try:
                    send(connection, rng, number)
                    end = "done"
                except TOLD as error:
                    end = type(error).__name__
                connection.close()
                # Its memory goes with the last reference.
                del connection
                say("sent", port=port, end=end)
                time.sleep(rng.random() / 200)

        return work

    def beat() -> None:
        """One connection that lives as long as both ends do, whatever becomes of the broker."""
        while True:
            while os.path.exists(pause):
                say("paused", port=LIFELINE)
                time.sleep(0.02)
            try:
                connection = node.connect(peer, LIFELINE, "stream", timeout=10)
            except AWAY:
                time.sleep(0.005)
                continue
            buffer = bytearray(8)
            try:
                for count in itertools.count():
                    connection.send(struct.pack("<Q", count), LIMIT_S)
                    if connection.recv_exactly_into(buffer, LIMIT_S) < 8:
                        break
                    assert struct.unpack("<Q", buffer)[0] == count
                    say("beat", id=connection.id, count=count)
                    if os.path.exists(pause):
                        break
                    time.sleep(0.003)
            except TOLD:
                pass
            connection.close()
            del connection

    threads(worker(STREAM, "stream", send_stream), worker(MESSAGES, "seqpacket", send_messages), beat)
    say("ready", role="sender")
    threading.Event().wait()


# ---- everybody


def attached(door: str, name: str) -> Any:
    """Attached, once there is a broker."""
    until = time.monotonic() + LIMIT_S
    while True:
        try:
            return n.Node(door, name)
        except (errors.NoBroker, errors.BrokerLost):
            assert time.monotonic() < until
            time.sleep(0.005)


def leased(listen: Callable[[], Any]) -> Any:
    """A port, once the broker has noticed that its last owner is dead."""
    until = time.monotonic() + LIMIT_S
    while True:
        try:
            return listen()
        except (errors.PortInUse, errors.BrokerLost):
            assert time.monotonic() < until
            time.sleep(0.005)


def broker(directory: str, log: str) -> None:
    async def serve() -> None:
        with open(log, "a") as out:
            service = Service(Path(directory), log=Log(out, style="json"))
            asyncio.get_running_loop().call_later(0, lambda: say("ready", role="broker"))
            await service.run()

    asyncio.run(serve())


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        role, *arguments = line.split()
        pid = os.fork()
        if pid:
            say("started", child=pid, role=role)
            continue
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # Not longer than the test, however it ends.
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            {"broker": broker, "sender": sender, "receiver": receiver}[role](*arguments)
        except BaseException as error:
            say("failed", text=f"{type(error).__name__}: {error}", where=role)
        os._exit(1)


if __name__ == "__main__":
    main()
