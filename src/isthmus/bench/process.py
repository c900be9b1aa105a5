"""The runner's end of a worker process."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, cast

__all__ = ["Pool", "Worker", "WorkerError"]


class WorkerError(RuntimeError):
    """A worker failed, fell silent or died; the message says which and why. It has been ended."""


class Worker:
    """A process that plays jobs, one after the other, each in a fresh child of its own."""

    def __init__(self, prefix: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "isthmus.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._unread = b""

    def say(self, message: dict[str, Any]) -> None:
        """Send one line."""
        try:
            os.write(self._in, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            raise self._failed("the worker is gone") from None

    def expect(self, key: str, deadline: float) -> dict[str, Any]:
        """Wait for the line that has `key`.

        Raises
        ------
        WorkerError
            It said something else, died, or `deadline` (monotonic seconds) passed.
        """
        message = self._hear(deadline)
        if "error" in message:
            raise self._failed(str(message["error"]))
        if key not in message:
            raise self._failed(f"the worker said {message} where {key!r} was due")
        return message

    def last_words(self, seconds: float) -> str | None:
        """Return the error that it reports within so many seconds, if it lives and does."""
        deadline = time.monotonic() + seconds
        try:
            while self._process.poll() is None:
                if (error := self._hear(deadline).get("error")) is not None:
                    return str(error)
        except (WorkerError, OSError):
            pass
        return None

    def fate(self) -> str:
        """What became of it, once it says nothing more."""
        return f"died with status {self._process.wait()}"

    def end(self) -> None:
        """Kill it; its child, if it has one, goes with it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # Nothing is buffered: `say` writes to the descriptor.
                pipe.close()

    def _hear(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._out], [], [], left)[0]:
                raise self._failed("the worker fell silent")
            more = os.read(self._out, 65536)
            if not more:
                raise self._failed(f"the worker {self.fate()}")
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return cast("dict[str, Any]", json.loads(line))

    def _failed(self, reason: str) -> WorkerError:
        self.end()
        return WorkerError(reason)


class Pool:
    """Workers kept from run to run, by the command in front of them. A context that ends them all."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, ...], list[Worker]] = {}
        self._all: list[Worker] = []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.end()

    def take(self, prefix: Sequence[str]) -> Worker:
        """Return an idle worker, or a new one."""
        idle = self._idle.setdefault(tuple(prefix), [])
        if idle:
            return idle.pop()
        worker = Worker(prefix)
        self._all.append(worker)
        return worker

    def give_back(self, prefix: Sequence[str], worker: Worker) -> None:
        """Keep a worker that has done its job for the next one."""
        self._idle.setdefault(tuple(prefix), []).append(worker)

    def discard(self, worker: Worker) -> None:
        """End a worker whose state is unknown."""
        worker.end()
        self._all.remove(worker)
