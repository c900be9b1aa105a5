"""Runs in a guest: starts programs, tells their lines and exit codes. One JSON object a line, both ways.

A Python program is a child of this one that goes on with its code: an emulated processor takes seconds to
start an interpreter. Modules that are named on the command line are imported once, for all of them.
"""

from __future__ import annotations

import codecs
import importlib
import io
import json
import os
import select
import subprocess
import sys
from typing import Any

#: How often one is asked whether it has ended that says nothing more.
ENDING_MS = 20


class Child:
    """A child of ours, as `subprocess.Popen` shows its own."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        done, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if done else None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Program:
    """A program that runs, and what it says, to which a line may be missing its end."""

    def __init__(self, number: int, process: Child | subprocess.Popen[bytes], output: int) -> None:
        self.number = number
        self.process = process
        self.output = output
        self._decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), True)
        self._rest = ""

    def hear(self) -> bool:
        """Tell what lines have come. Returns False at the end."""
        data = os.read(self.output, 1 << 16)
        *lines, self._rest = (self._rest + self._decoder.decode(data, not data)).split("\n")
        if not data and self._rest:
            lines.append(self._rest)
        for line in lines:
            tell(number=self.number, line=line)
        return bool(data)


class Shell:
    """All programs that run, and who asks for them."""

    def __init__(self) -> None:
        self._programs: dict[int, Program] = {}
        self._inputs: dict[int, int] = {}
        self._asked = b""
        self._poll = select.poll()
        self._poll.register(0, select.POLLIN)

    def serve(self) -> dict[str, Any] | None:
        """Do what is asked until the input ends; but in a child, return what it is to run."""
        while True:
            heard = {program.output: program for program in self._programs.values() if program.output >= 0}
            ending = len(heard) < len(self._programs)
            for fd, _ in self._poll.poll(ENDING_MS if ending else None):
                if fd in heard and not heard[fd].hear():
                    self._poll.unregister(fd)
                    os.close(fd)
                    heard[fd].output = -1
                elif fd == 0:
                    data = os.read(0, 1 << 16)
                    if not data:
                        return None
                    *lines, self._asked = (self._asked + data).split(b"\n")
                    for line in lines:
                        if (code := self._do(json.loads(line))) is not None:
                            return code
            for program in [program for program in self._programs.values() if program.output < 0]:
                if (code := program.process.poll()) is not None:
                    del self._programs[program.number]
                    if (fd := self._inputs.pop(program.number, None)) is not None:
                        os.close(fd)
                    tell(number=program.number, exit=code)

    def _do(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        if "run" in asked:
            self._run(asked)
        elif "python" in asked:
            return self._fork(asked)
        elif "kill" in asked and asked["kill"] in self._programs:
            self._programs[asked["kill"]].process.send_signal(asked["signal"])
        elif "tell" in asked and asked["tell"] in self._inputs:
            os.write(self._inputs[asked["tell"]], asked["line"].encode() + b"\n")
        return None

    def _run(self, asked: dict[str, Any]) -> None:
        hear, said = os.pipe2(os.O_CLOEXEC)
        stdin = subprocess.DEVNULL
        if asked["told"]:
            stdin, self._inputs[asked["number"]] = os.pipe2(os.O_CLOEXEC)
        try:
            process = subprocess.Popen(
                asked["run"],
                stdin=stdin,
                stdout=said,
                stderr=said,
                env={**os.environ, **asked["environment"]},
            )
        finally:
            os.close(said)
            if stdin >= 0:
                os.close(stdin)
        self._start(asked["number"], process, hear)

    def _fork(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        hear, said = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid:
            os.close(said)
            self._start(asked["number"], Child(pid), hear)
            return None
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, of in (null, 0), (said, 1), (said, 2):
            os.dup2(fd, of)
        for fd in null, said, hear, *self._inputs.values():
            os.close(fd)
        for program in self._programs.values():
            if program.output >= 0:
                os.close(program.output)
        os.environ.update(asked["environment"])
        return asked

    def _start(self, number: int, process: Child | subprocess.Popen[bytes], output: int) -> None:
        self._programs[number] = Program(number, process, output)
        self._poll.register(output, select.POLLIN)


def tell(**what: Any) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    asked = Shell().serve()
    if asked is not None:
        sys.argv = ["-c", *asked["arguments"]]
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        exec(compile(asked["python"], "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
