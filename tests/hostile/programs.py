"""Programs that a test starts, listens to, and sees out."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).parent
#: No test waits longer for what must happen.
LIMIT_S = 90.0

Event = dict[str, Any]


class Program:
    """A Python program of this directory, in a process of its own."""

    def __init__(self, script: str, *arguments: str, around: Sequence[str] = ()) -> None:
        self.name = " ".join((script, *arguments[:1]))
        self.events: list[Event] = []
        self._news: queue.Queue[Event | None] = queue.Queue()
        command = [*around, sys.executable, str(HERE / script), *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._errors: list[str] = []
        self._threads = [
            threading.Thread(target=self._listen, daemon=True),
            threading.Thread(target=self._complaints, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._news.put(json.loads(line))
        self._news.put(None)

    def _complaints(self) -> None:
        assert self.process.stderr is not None
        self._errors.extend(self.process.stderr)

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_for(self, word: str, where: Callable[[Event], bool] = lambda _: True) -> Event:
        """The next such event."""
        while True:
            try:
                event = self._news.get(timeout=LIMIT_S)
            except queue.Empty:
                raise AssertionError(f"{self.name}: no {word!r} after {self.events[-3:]}") from None
            if event is None:
                self._threads[1].join()
                text = "".join(self._errors)[-2000:]
                raise AssertionError(f"{self.name} ended ({self.process.wait()}) before {word!r}: {text}")
            self.events.append(event)
            if event["event"] == word and where(event):
                return event

    def kill(self) -> None:
        self.process.kill()

    def stop(self) -> None:
        """An orderly end; fails if the program ended by itself, for that is a mistake."""
        assert self.process.poll() is None, f"{self.name} ended by itself: {''.join(self._errors)[-2000:]}"
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.wait_for("stopped")
        assert self.process.wait(LIMIT_S) == 0

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def memfds(pid: int) -> int:
    """Mapped memory of lanes."""
    return Path(f"/proc/{pid}/maps").read_text().count("/memfd:")
