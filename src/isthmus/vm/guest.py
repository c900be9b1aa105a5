"""A small guest that shares this machine's root file system, read-only, and writes to memory."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .guest_input import LENGTH
from .kernels import choose_monitor
from .monitors import PLANS, Setting

if TYPE_CHECKING:
    from typing_extensions import Self

MEMORY_MIB = {"uml": 128, "qemu": 384}
#: Longest that a guest may take until its job begins; emulation on a busy machine is slow.
BOOT_S = 180.0
#: What a job has written reaches us in this time.
PUMP_S = 0.1


class GuestError(Exception):
    """A guest did not start, or ended before its job did. The text holds the end of its console."""


class Guest:
    """A running guest and its job.

    Parameters
    ----------
    name : str
        What the guest calls itself.
    socket : str
        The device's socket, as `isthmus domain list --json` shows it for a domain of kind ``vm``.
    command : sequence of str
        The job: runs as root in the guest, which ends when it ends.
    directory : path
        Where the guest's files lie while it runs; removed afterwards.
    monitor : {"qemu", "uml"}, optional
        By default QEMU where it runs on the processor itself, else user-mode Linux.
    memory_mib : int, optional
        128 (uml) or 384 (qemu).
    environment : mapping of str to str, optional
        For the job, beside PATH.
    stdin, stdout : int, optional
        Descriptors of the job's input and output; by default nothing, and a pipe (`output`).
    tap, mac : str, optional
        A tap device of the host's for a network card, and its address.
    huge_pages : int, default 0
        Pages of 2 MiB that the guest's kernel sets aside (QEMU).
    extra : sequence of str
        Further arguments of the guest's kernel.
    options : sequence of str
        Further options of the monitor's command line, as it spells them.
    within : sequence of str
        A command that runs another one in the place where the monitor belongs, such as a network namespace.

    Raises
    ------
    Missing
        A program, kernel or module is not installed. Nothing was started.
    """

    def __init__(
        self,
        name: str,
        socket: str,
        command: Sequence[str],
        directory: Path,
        *,
        monitor: str | None = None,
        memory_mib: int | None = None,
        environment: Mapping[str, str] | None = None,
        working_directory: str | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        tap: str | None = None,
        mac: str | None = None,
        huge_pages: int = 0,
        extra: Sequence[str] = (),
        options: Sequence[str] = (),
        within: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.monitor = monitor if monitor is not None else choose_monitor()
        self.directory = directory
        self._within = list(within)
        #: The other end of the job's output, where no descriptor was given for it.
        self.output: int | None = None
        self._pumps: list[_Pump] = []
        self._kept: list[int] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._words: list[str] = []
        self._news = threading.Condition()
        memory = memory_mib if memory_mib is not None else MEMORY_MIB[self.monitor]
        directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        setting = Setting(directory, socket, memory, tap, mac, huge_pages=huge_pages)
        setting.extra, setting.options = tuple(extra), tuple(options)
        try:
            self._write_job(command, environment or {}, working_directory or os.getcwd())
            self._start(setting, stdin, stdout)
        except BaseException:
            self.stop()
            raise

    def _write_job(self, command: Sequence[str], environment: Mapping[str, str], where: str) -> None:
        exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in environment.items())
        job = f"{exports}cd {shlex.quote(where)} || exit 127\nexec {shlex.join(command)}\n"
        (self.directory / "job").write_text(job)
        (self.directory / "name").write_text(self.name + "\n")

    def _start(self, setting: Setting, stdin: int | None, stdout: int | None) -> None:
        with contextlib.ExitStack() as ours:

            def until_started(fd: int) -> int:
                ours.callback(os.close, fd)
                return fd

            console = until_started(
                os.open(
                    self.directory / "console", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
                )
            )
            null = until_started(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
            # Always through pipes, because not every monitor can use whatever a descriptor may be.
            setting.input, feed = os.pipe2(os.O_CLOEXEC)
            output, setting.output = os.pipe2(os.O_CLOEXEC)
            control, setting.control = os.pipe2(os.O_CLOEXEC)
            fds = (setting.input, setting.output, setting.control)
            for fd in fds:
                until_started(fd)
            if stdout is None:
                self.output = output
            else:
                self._pumps.append(_Pump(output, os.dup(stdout)))
            # Open for as long as the guest runs: a serial line that hangs up would end the job.
            self._kept.append(feed)
            if stdin is not None:
                pieces = not os.isatty(stdin)
                self._pumps.append(_Pump(os.dup(stdin), os.dup(feed), pieces=pieces))
            kind = "nothing" if stdin is None else "pieces" if pieces else "terminal"
            (self.directory / "input").write_text(kind)
            (self.directory / "python").write_text(sys.executable)
            plan = PLANS[self.monitor](setting)
            (self.directory / "modules").write_text("".join(f"{path}\n" for path in plan.modules))
            threading.Thread(target=self._listen, args=(control,), daemon=True).start()
            for helper in plan.helpers:
                self._spawn(helper, null, console, ())
            until = time.monotonic() + 10
            while not all(path.exists() for path in plan.awaited):
                if time.monotonic() > until:
                    raise GuestError(
                        f"guest {self.name}: {plan.helpers[0][0]} did not start: {self._console()}"
                    )
                time.sleep(0.01)
            self._spawn(plan.command, null, console, fds)
        record = {
            "pid": self._processes[-1].pid,
            "monitor": self.monitor,
            "since": time.time(),
            "name": self.name,
        }
        (self.directory / "guest.json").write_text(json.dumps(record))

    def _spawn(self, command: list[str], stdin: int, console: int, fds: tuple[int, ...]) -> None:
        # In a process namespace of its own: whoever kills its first process, or us, kills all of it.
        # User-mode Linux is many processes, and those that outlive their first one spin.
        unshare = [*self._within, "unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
        unshare += ["--pid", "--fork", "--kill-child=KILL", "--"]
        self._processes.append(
            subprocess.Popen(
                unshare + command,
                stdin=stdin,
                stdout=console,
                stderr=console,
                pass_fds=fds,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # one system call
            )
        )

    def _listen(self, control: int) -> None:
        with open(control, errors="replace") as lines:
            for line in lines:
                with self._news:
                    self._words.append(line.strip())
                    self._news.notify_all()
        with self._news:
            self._words.append("")
            self._news.notify_all()

    def _await(self, word: str, timeout: float | None) -> str | None:
        """The first line of the guest's that begins with `word`; None if the guest ended without one."""
        until = None if timeout is None else time.monotonic() + timeout
        with self._news:
            while True:
                found = next((said for said in self._words if said.startswith(word)), None)
                if found is not None or "" in self._words:
                    return found
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError
                self._news.wait(left)

    def wait_ready(self, timeout: float = BOOT_S) -> None:
        """Wait until the job begins.

        Raises
        ------
        GuestError
            The guest ended before, or the time ran out. It runs on.
        """
        try:
            ready = self._await("ready", timeout)
        except TimeoutError:
            raise GuestError(
                f"guest {self.name} did not boot in {timeout:.0f} s: {self._console()}"
            ) from None
        if ready is None:
            raise GuestError(f"guest {self.name} ended while it booted: {self._console()}")

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the job and return its exit code.

        Raises
        ------
        TimeoutError
            The time ran out; the guest runs on.
        GuestError
            The guest ended before its job did.
        """
        said = self._await("exit ", timeout)
        if said is None:
            raise GuestError(f"guest {self.name} ended before its job did: {self._console()}")
        for pump in self._pumps:
            pump.finish()
        return int(said.split()[1])

    @property
    def pid(self) -> int:
        """Process id of the monitor's namespace; signals for all of it go to its process group."""
        return self._processes[-1].pid

    def signal(self, number: int) -> None:
        """Send a signal to the monitor's processes: SIGSTOP pauses the guest, SIGCONT resumes it.

        In user-mode Linux programs are processes that its kernel traces: their signals would be the guest's.
        """
        for pid in descendants(self.pid):
            with contextlib.suppress(OSError):
                if "\nTracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
                    os.kill(pid, number)

    def stop(self) -> None:
        """End the guest at once, as by pulling its plug. Harmless when repeated."""
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pump in self._pumps:
            pump.finish(wait=False)
        for fd in (*self._kept, *([] if self.output is None else [self.output])):
            os.close(fd)
        self._kept.clear()
        self.output = None
        shutil.rmtree(self.directory, ignore_errors=True)

    def _console(self) -> str:
        try:
            text = (self.directory / "console").read_text(errors="replace")
        except OSError:
            return "(no console)"
        return text[-2000:].strip() or "(its console is empty)"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.stop()


class _Pump:
    """Copies one descriptor to another until told to finish, then closes both; what has come is copied.

    Unless nobody reads it, and the pump is told not to wait for that.
    """

    def __init__(self, source: int, sink: int, *, pieces: bool = False) -> None:
        self._pieces = pieces
        self._source = source
        self._sink = sink
        self._finishing = False
        self._patient = True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def finish(self, *, wait: bool = True) -> None:
        self._patient = wait
        self._finishing = True
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                readable = select.select([self._source], [], [], PUMP_S)[0]
                if not readable and self._finishing:
                    break
                data = os.read(self._source, 1 << 16) if readable else None
                if data is None:
                    continue
                self._write(LENGTH.pack(len(data)) + data if self._pieces else data)
                if not data:
                    break
        os.close(self._source)
        os.close(self._sink)

    def _write(self, data: bytes) -> None:
        while data:
            if select.select([], [self._sink], [], PUMP_S)[1]:
                # A pipe that has room has room for so much.
                data = data[os.write(self._sink, data[: select.PIPE_BUF]) :]
            elif not self._patient:
                return


def descendants(pid: int) -> list[int]:
    """A process and all that it started, itself last."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text().split():
                found += descendants(int(child))
    return [*found, pid]


def _die_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
