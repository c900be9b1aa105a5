"""Three parties, each killed with SIGKILL at any moment: the others are told, and nothing of it remains.

300 deaths here; ``pytest -m soak`` does 10,000 (``ISTHMUS_SOAK_KILLS``). The order and the moments come from
a seed, which a failure names.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isthmus.cli.client import ask

SCRIPT = Path(__file__).parent / "soak" / "parties.py"
#: No test waits longer for what must happen.
LIMIT_S = 60.0
#: Deaths between two looks for what was left behind.
LOOK_EVERY = 50
WORKERS = (7, 8)

Event = dict[str, Any]


def gone(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def held(pid: int) -> list[str]:
    """What a process has open."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    # Opened once, when somebody first waits in vain, and kept.
    return [name for name in found if name != "/proc/loadavg"]


def descriptors(pid: int) -> int:
    return len(held(pid))


def lanes(pid: int) -> int:
    """Lane memory that a process has mapped or holds."""
    mapped = Path(f"/proc/{pid}/maps").read_text().count("/memfd:isthmus")
    return mapped + sum("/memfd:isthmus" in name for name in held(pid))


def eventually(what: Callable[[], Any], why: Callable[[], str] | str) -> None:
    end = time.monotonic() + LIMIT_S
    while not what():
        assert time.monotonic() < end, why if isinstance(why, str) else why()
        time.sleep(0.005)


class Parties:
    """A broker, a sender in domain a, a receiver in domain b."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.directory = root / "run"
        self.pause = root / "pause"
        self.rng = random.Random(seed)
        self.pids: dict[str, int] = {}
        #: Connections that the receiver has, by its word.
        self.open: set[int] = set()
        self.kills = {"broker": 0, "sender": 0, "receiver": 0}
        self.ends: dict[str, int] = {}
        self.ready: set[int] = set()
        self._news: queue.Queue[Event] = queue.Queue()
        self._nursery = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()

    def _listen(self) -> None:
        assert self._nursery.stdout is not None
        for line in self._nursery.stdout:
            self._news.put(json.loads(line))

    def wait_for(self, word: str | None, where: Callable[[Event], bool] = lambda _: True) -> Event:
        end = time.monotonic() + LIMIT_S
        missing = f"no {word or 'work'!r}; {self.pids}, {self.open} open"
        while True:
            try:
                event = self._news.get(timeout=max(end - time.monotonic(), 0.001))
            except queue.Empty:
                raise AssertionError(missing) from None
            assert time.monotonic() < end, missing
            self._note(event)
            if word in (None, event["event"]) and where(event):
                return event

    def _note(self, event: Event) -> None:
        word = event["event"]
        assert word != "failed", event
        if word == "ready":
            self.ready.add(event["pid"])
        if word in ("ended", "sent"):
            self.ends[event["end"]] = self.ends.get(event["end"], 0) + 1
        if event["pid"] != self.pids.get("receiver"):
            return
        if word == "opened":
            self.open.add(event["id"])
        elif word == "ended":
            self.open.discard(event["id"])

    def catch_up(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._note(self._news.get_nowait())

    def start(self, role: str) -> None:
        arguments = {
            "broker": f"{self.directory} {self.root / 'log'}",
            "sender": f"{self.directory / 'doors' / 'a' / 'door'} {self.pause}",
            "receiver": f"{self.directory / 'doors' / 'b' / 'door'}",
        }[role]
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(f"{role} {arguments}\n")
        self._nursery.stdin.flush()
        pid = self.pids[role] = self.wait_for("started", lambda e: e["role"] == role)["child"]
        # A child may be faster than the word that there is one.
        if pid not in self.ready:
            self.wait_for("ready", lambda e: e["pid"] == pid)
        if role == "broker":
            eventually(self.answers, "the broker does not answer")

    def answers(self) -> bool:
        try:
            return bool(ask(self.directory, "ping")["pid"] == self.pids["broker"])
        except Exception:
            return False

    def kill(self, role: str) -> None:
        # What it said before, and is only heard now, is about nothing that exists.
        pid = self.pids.pop(role)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: gone(pid), f"{role} {pid} does not die")
        self.kills[role] += 1

    def works(self, sender: int) -> None:
        """Each worker of this sender finishes another connection, and the lifeline beats."""
        waiting = {*WORKERS, "beat"}

        def last(event: Event) -> bool:
            if event["pid"] == sender:
                if event["event"] == "beat":
                    waiting.discard("beat")
                elif event["event"] == "sent" and event["end"] == "done":
                    waiting.discard(event["port"])
            return not waiting

        self.wait_for(None, last)

    # Deaths.

    def death(self) -> None:
        victim = self.rng.choice(list(self.kills))
        time.sleep(self.rng.random() * 0.02)
        getattr(self, f"death_of_{victim}")()
        self.works(self.pids["sender"])

    def death_of_sender(self) -> None:
        self.kill("sender")
        self.catch_up()
        # Whatever it had open is ended at the receiver, by an end or by a reset.
        while True:
            if not self.open and self.connections("b") == 0:
                break
            with contextlib.suppress(queue.Empty):
                self._note(self._news.get(timeout=0.01))
                continue
            self._not_later()
        self.start("sender")

    def _not_later(self) -> None:
        oldest = getattr(self, "_oldest", None)
        state = (frozenset(self.open), self.kills["sender"])
        if oldest is None or oldest[1] != state:
            self._oldest = (time.monotonic(), state)
        else:
            assert time.monotonic() - oldest[0] < LIMIT_S, f"{self.open} were never told"

    def death_of_receiver(self) -> None:
        self.kill("receiver")
        self.catch_up()
        self.open.clear()
        self.start("receiver")

    def death_of_broker(self) -> None:
        beat = self.wait_for("beat")
        self.kill("broker")
        # Established connections live on.
        for _ in range(3):
            after = self.wait_for("beat")
            assert after["id"] == beat["id"], "the lifeline was cut"
        self.start("broker")
        again = self.wait_for("beat")
        assert again["id"] == beat["id"], "the lifeline was cut"

    # What is left.

    def domains(self) -> dict[str, dict[str, Any]]:
        return {d["name"]: d for d in ask(self.directory, "domain-list")["domains"]}

    def connections(self, name: str) -> int:
        return int(self.domains()[name]["connections"])

    def look(self) -> None:
        """Nobody has anything left of the dead, nor of what is over."""
        self.pause.touch()
        for port in (*WORKERS, 9):
            self.wait_for(
                "paused", lambda e, port=port: e["pid"] == self.pids["sender"] and e["port"] == port
            )
        for role in ("sender", "receiver"):
            self.settles(role)
        eventually(lambda: self.connections("a") == self.connections("b") == 0, "connections remain")
        self.settles("broker")
        self.pause.unlink()
        self.works(self.pids["sender"])

    def settles(self, role: str) -> None:
        pid = self.pids[role]
        most = self.baselines[role]
        eventually(lambda: lanes(pid) == 0, lambda: f"{role}: {lanes(pid)} lanes are left")
        eventually(lambda: descriptors(pid) <= most, lambda: f"{role}: {sorted(held(pid))}, {most} before")

    def __enter__(self) -> Parties:
        self.pause.touch()
        self.start("broker")
        for name in "ab":
            ask(self.directory, "domain-add", name=name, group=None, uid=None)
        self.start("receiver")
        self.start("sender")
        self.wait_for("paused")
        self.baselines = {role: descriptors(pid) for role, pid in self.pids.items()}
        self.files = sorted(str(path) for path in self.root.rglob("*"))
        self.pause.unlink()
        self.works(self.pids["sender"])
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.close()
        self._nursery.wait()
        self._listening.join()
        self._nursery.stdout.close()

    def nothing_is_left(self) -> None:
        """Without programs the broker has nothing, and the directory has what it had."""
        self.look()
        for role in ("sender", "receiver"):
            self.kill(role)
        eventually(
            lambda: all(d["attachments"] == d["connections"] == 0 for d in self.domains().values()),
            "attachments of the dead remain",
        )
        before = self.baselines["broker"] - 2
        pid = self.pids["broker"]
        eventually(
            lambda: descriptors(pid) <= before, lambda: f"{descriptors(pid)} descriptors, not {before}"
        )
        assert lanes(pid) == 0
        assert sorted(str(path) for path in self.root.rglob("*")) == [
            f for f in self.files if f != str(self.pause)
        ]
        log = (self.root / "log").read_text()
        assert "Traceback" not in log, log[-2000:]


def die(root: Path, seed: int, kills: int) -> None:
    print(f"seed {seed}: ISTHMUS_DEATH_SEED={seed} repeats it")
    with Parties(root, seed) as parties:
        for number in range(1, kills + 1):
            parties.death()
            if number % LOOK_EVERY == 0:
                parties.look()
        parties.nothing_is_left()
        print(f"killed {parties.kills}; connections ended {parties.ends}")
        assert parties.ends["done"] > 0


def seeds(count: int) -> Iterator[int]:
    chosen = os.environ.get("ISTHMUS_DEATH_SEED")
    first = int(chosen) if chosen else random.SystemRandom().randrange(1 << 31)
    return iter(range(first, first + count))


@pytest.mark.parametrize("part", range(6))
def test_death_is_heard_and_leaves_nothing(tmp_path: Path, part: int) -> None:
    die(tmp_path, next(seeds(1)), 50)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_thousands_of_deaths(tmp_path: Path) -> None:
    die(tmp_path, next(seeds(1)), int(os.environ.get("ISTHMUS_SOAK_KILLS", "10000")))
