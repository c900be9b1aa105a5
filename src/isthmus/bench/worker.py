"""The process in which one end of a measurement runs: `python -m isthmus.bench.worker`.

Jobs come in on standard input, a JSON line each, and every job is played in a fresh child: the interpreter
starts once, and no run inherits another's memory. What both sides say while a job lasts, a JSON line each:

====================== ====================================================================
runner to worker       a job; then ``{"address": ...}`` to clients; then ``{"go": true}``
worker to runner       ``{"ready": address}`` (server); ``{"connected": true}`` (client, alone);
                       ``{"report": {...}, "detail": {...}}`` or ``{"error": "..."}``; and when the child is
                       gone ``{"done": exit status}``
====================== ====================================================================

End of input ends the worker, and the kernel ends it with its runner.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from typing import Any, cast

from isthmus.bench import transports
from isthmus.bench.native import Report

__all__ = ["Control", "main"]

_PR_SET_PDEATHSIG = 1


class Control:
    """A worker's end of the talk with its runner."""

    def __init__(self, read_fd: int = 0, write_fd: int = 1) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd
        self._unread = b""
        #: What this end wants to have in the record's `detail`.
        self.detail: dict[str, Any] = {}

    def ready(self, address: Any) -> None:
        """Say where this server listens: any JSON value, handed to the client as it is."""
        self.say({"ready": address})

    def address(self) -> Any:
        """Return what the server said."""
        return self._expect("address")

    def go(self) -> None:
        """Say that the connection stands, and wait until all others do."""
        self.say({"connected": True})
        self._expect("go")

    def say(self, message: dict[str, Any]) -> None:
        """Send one line to the runner."""
        os.write(self._write_fd, json.dumps(message).encode() + b"\n")

    def hear(self) -> dict[str, Any] | None:
        """Return the runner's next line, or None when there will be no more."""
        while b"\n" not in self._unread:
            more = os.read(self._read_fd, 65536)
            if not more:
                return None
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return cast("dict[str, Any]", json.loads(line))

    def forget(self) -> None:
        """Drop what was read ahead: a child has dealt with it."""
        self._unread = b""

    def _expect(self, key: str) -> Any:
        message = self.hear()
        if message is None or key not in message:
            raise EOFError(f"the runner said {message} where {key!r} was due")
        return message[key]


def play(job: transports.Job, control: Control) -> Report:
    """Play one job in this process."""
    if job.cpus:
        os.sched_setaffinity(0, job.cpus)
    transport = transports.load(job.case.transport)
    part = {"server": transport.server, "client": transport.client, "alone": transport.alone}[job.role]
    return part(job, control)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _child(fields: dict[str, Any], control: Control) -> None:
    """Play a job and tell what came of it; never returns to the caller's stack."""
    status = 1
    try:
        _die_with_parent()
        report = play(transports.Job.from_dict(fields), control)
        control.say({"report": report, "detail": control.detail})
        status = 0
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(place.filename)}:{place.lineno}"
        control.say({"error": f"{type(error).__name__}: {error} ({where})"})
    finally:
        sys.stdout.flush()
        os._exit(status)


def main() -> None:
    """Take jobs until there are no more."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = Control()
    while (fields := control.hear()) is not None:
        child = os.fork()
        if child == 0:
            _child(fields, control)
        _, status = os.waitpid(child, 0)
        control.forget()
        control.say({"done": os.waitstatus_to_exitcode(status)})


if __name__ == "__main__":
    main()
