"""Runs programs in a guest for :mod:`.programs_guests`: `python -m isthmus.bench.guest_runner`.

It starts the guest's agent, and then does what it is asked, one thing after the other, a JSON line each way:

==================================== ==================================================================
asked                                answered
==================================== ==================================================================
(at the start)                       ``{"ready": true}``: the agent serves
``{"serve": words, "port": 6379}``   ``{"listening": 6379}``, once somebody listens there
``{"work": words, "limit_s": 30.0}`` ``{"began": true}``, ``{"ended": true}``, ``{"text": output}``
``{"end": true}``                    ``{"over": true}``, once the server is gone
==================================== ==================================================================

or ``{"error": "..."}``, with what the program printed. Who asks for a program can name what starts it, as
``before``. Programs read nothing, and each has a process group of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from isthmus.bench.worker import Control

__all__ = ["START_S", "main"]

#: Lines of an output that are not the program's: its work begins, and is over.
BEGAN, ENDED = "isthmus bench: began", "isthmus bench: ended"
#: Runs its words between the two.
BETWEEN_LINES = f'echo "{BEGAN}"; "$0" "$@"; code=$?; echo "{ENDED}"; exit $code'
#: An emulated guest takes seconds to start an interpreter.
START_S = 60.0
END_S = 10.0
#: So much of what a program printed is told, in bytes: its end.
TOLD = 4000


class Failed(Exception):
    """A program did not do what it was started for; the text says which, and what it printed."""


class Program:
    """A program that runs, and what it prints.

    Parameters
    ----------
    before : sequence of str
        What starts it; not part of its name.
    stdout : bool, default False
        Whether its output is for `output`; else it is kept with its errors.
    """

    def __init__(self, words: list[str], before: Sequence[str] = (), *, stdout: bool = False) -> None:
        self._words = words
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115  # `end` closes it
        self._process = subprocess.Popen(
            [*before, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if stdout else self._printed,
            stderr=self._printed,
            start_new_session=True,
        )

    @property
    def output(self) -> IO[bytes]:
        """What it writes to its standard output."""
        assert self._process.stdout is not None
        return self._process.stdout

    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        return self._process.wait()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to all of its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def end(self) -> None:
        """End it, politely at first, and whatever it left running. Harmless when it has ended."""
        self.kill(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self.kill()
        self._process.wait()
        self._printed.close()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def failed(self, how: str, printed: str = "") -> Failed:
        """An error that says how it failed and what it printed, `printed` to begin with."""
        self._printed.seek(0)
        text = (printed + self._printed.read().decode(errors="replace")).strip()
        return Failed(f"{' '.join(self._words)}: {how}: {text[-TOLD:] or '(it printed nothing)'}")


@contextlib.contextmanager
def agent() -> Iterator[None]:
    """The guest's agent, serving.

    Raises
    ------
    Failed
        It ended before.
    """
    program = Program([sys.executable, "-m", "isthmus", "agent", "--ready"], stdout=True)
    try:
        if not program.output.readline():
            raise program.failed(f"ended with {program.wait()}")
        yield
    finally:
        program.end()


def await_port(server: Program, port: int) -> None:
    """Wait until somebody listens at a TCP port.

    Raises
    ------
    Failed
        The server ended before, or `START_S` passed.
    """
    listening = re.compile(rf"^\s*\d+: [0-9A-F]+:{port:04X} [0-9A-F]+:0000 0A ", re.MULTILINE)
    until = time.monotonic() + START_S
    while not any(listening.search(table.read_text()) for table in Path("/proc/net").glob("tcp*")):
        if (code := server.ended()) is not None:
            raise server.failed(f"ended with {code}")
        if time.monotonic() > until:
            raise server.failed(f"nobody listens at port {port} after {START_S:.0f} s")
        time.sleep(0.05)


def work(asked: dict[str, Any], control: Control) -> str:
    """Run a program and return what it printed. When its work begins and ends, that is told.

    Raises
    ------
    Failed
        Its exit code was not 0, or it still ran after ``limit_s`` and was ended.
    """
    limit_s = asked["limit_s"]
    program = Program(asked["work"], [*asked["before"], "sh", "-c", BETWEEN_LINES], stdout=True)
    late = threading.Event()

    def give_up() -> None:
        late.set()
        program.kill()

    patience = threading.Timer(limit_s, give_up)
    patience.start()
    try:
        text = _read(program.output, control)
        code = program.wait()
        if late.is_set():
            raise program.failed(f"had not ended after {limit_s:.0f} s", text)
        if code:
            raise program.failed(f"ended with {code}", text)
    finally:
        patience.cancel()
        program.end()
    return text


def _read(output: IO[bytes], control: Control) -> str:
    said = {BEGAN: "began", ENDED: "ended"}
    found = []
    for data in output:
        line = data.decode(errors="replace")
        if word := said.get(line.strip()):
            control.say({word: True})
        else:
            found.append(line)
    return "".join(found)


def serve(asked: dict[str, Any]) -> Program:
    """Start a server that listens at a port."""
    server = Program(asked["serve"], asked["before"])
    try:
        await_port(server, asked["port"])
    except Failed:
        server.end()
        raise
    return server


def main() -> None:
    """Do what is asked until nothing more is, or a program fails."""
    control = Control()
    server: Program | None = None
    try:
        with agent():
            control.say({"ready": True})
            while (asked := control.hear()) is not None:
                if "serve" in asked:
                    server = serve(asked)
                    control.say({"listening": asked["port"]})
                elif "work" in asked:
                    control.say({"text": work(asked, control)})
                elif server is not None:
                    server.end()
                    control.say({"over": True})
    except (Failed, OSError) as error:
        control.say({"error": str(error)})


if __name__ == "__main__":
    main()
