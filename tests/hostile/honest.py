"""Honest programs, for the company of `tenant.py`.

    python honest.py pair DOOR DOOR   a verified stream between two domains, again and again
    python honest.py partner DOOR     takes connections of strangers (port 7), echoes for friends (port 8)

Both print one JSON object a line and go on until their input ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import threading
from typing import Any

from isthmus import _native as n

#: Far longer than anything takes here.
LIMIT_S = 60.0
#: How long a stranger may keep a partner waiting.
PATIENCE_S = 1.0
ROUND = 2 << 20


def say(word: str, **facts: Any) -> None:
    sys.stdout.write(json.dumps({"event": word, **facts}) + "\n")
    sys.stdout.flush()


def pair(first: str, second: str) -> None:
    listening, connecting = n.Node(second, "honest"), n.Node(first, "honest")
    listener = listening.listen(9, "stream")
    to = listening.identity["domain_name"]
    rng = random.Random(5)
    for number in range(1 << 30):
        data = rng.randbytes(ROUND)
        received = hashlib.sha256()

        def read(received: Any = received) -> None:
            connection = listener.accept(LIMIT_S)
            buffer = bytearray(100_000)
            while got := connection.recv_into(buffer, LIMIT_S)[0]:
                received.update(memoryview(buffer)[:got])
            connection.close()

        reader = threading.Thread(target=read)
        reader.start()
        connection = connecting.connect(to, 9, "stream", timeout=LIMIT_S)
        at = 0
        while at < ROUND:
            size = rng.choice([1, 63, 1000, 4096, 100_000, 700_000])
            at += connection.send(memoryview(data)[at : at + size], LIMIT_S)
        connection.close()
        reader.join()
        if received.digest() != hashlib.sha256(data).digest():
            raise SystemExit("other bytes arrived than were sent")
        say("round", number=number)


def partner(door: str) -> None:
    node = n.Node(door, "partner")
    strangers, friends = node.listen(7, "stream"), node.listen(8, "stream")

    def outcome(what: Any) -> str:
        try:
            return str(what())
        except OSError as error:
            return type(error).__name__

    def take(connection: Any) -> None:
        def receive() -> str:
            buffer = bytearray(50_000)
            total = 0
            # One that talks without end is left at some point.
            while total < 4 << 20:
                got = connection.recv_into(buffer, PATIENCE_S)[0]
                if got == 0:
                    return "end"
                total += got
            return "enough"

        answers = threading.Thread(
            target=lambda: answered.append(outcome(lambda: connection.send(bytes(300_000), PATIENCE_S)))
        )
        answered: list[str] = []
        answers.start()
        received = outcome(receive)
        answers.join()
        connection.close()
        say("stranger", received=received, sent=answered[0], totals=connection.totals)

    def echo(connection: Any) -> None:
        buffer = bytearray(50_000)
        while got := connection.recv_into(buffer, LIMIT_S)[0]:
            connection.send(memoryview(buffer)[:got], LIMIT_S)
        connection.close()

    def serve(listener: Any, what: Any) -> None:
        while True:
            connection = listener.accept(None)
            threading.Thread(target=what, args=(connection,), daemon=True).start()

    for listener, what in ((strangers, take), (friends, echo)):
        threading.Thread(target=serve, args=(listener, what), daemon=True).start()
    say("ready")
    threading.Event().wait()


def until_the_input_ends() -> None:
    sys.stdin.read()
    say("stopped")
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=until_the_input_ends, daemon=True).start()
    {"pair": pair, "partner": partner}[sys.argv[1]](*sys.argv[2:])
