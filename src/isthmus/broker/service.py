"""The broker's process: one per runtime directory, in the foreground, until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import resource
import signal
import socket
import time
from pathlib import Path

from . import metrics
from .console import Console
from .core import Broker
from .doors import bind_at
from .log import Log
from .notify import notify, watchdog_s
from .policy import TEXT_MAX_BYTES, Policy, PolicyError, parse
from .state import State, StateError

#: Between looks at the policy file.
WATCH_S = 1.0


class ServiceError(Exception):
    """The broker cannot start."""


class Service:
    """Everything around a `Broker`: the directory, the lock, the sockets, the policy file, the signals."""

    def __init__(
        self,
        directory: Path,
        *,
        policy_path: Path | None = None,
        state_directory: Path | None = None,
        metrics_http: tuple[str, int] | None = None,
        log: Log | None = None,
    ) -> None:
        self.directory = directory
        self.policy_path = policy_path
        self.log = log if log is not None else Log()
        self.started_at = time.time()
        self.reloads = {"ok": 0, "failed": 0}
        self.policy_error: str | None = None
        self._state_directory = state_directory if state_directory is not None else directory
        self._metrics_http = metrics_http
        self._seen: tuple[int, int, int] | None = None
        self._stopping = asyncio.Event()
        self._lock = -1
        self._opened: list[socket.socket] = []
        self._directory_fd = -1
        self.metrics_port: int | None = None

    async def run(self) -> None:
        """Serve until a signal or `stop`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        await self.start()
        loop.add_signal_handler(signal.SIGHUP, self.reload_logged)
        notify("READY=1")
        try:
            await self._watch()
        finally:
            notify("STOPPING=1")
            await self.close()

    def stop(self) -> None:
        self._stopping.set()

    async def start(self) -> None:
        _raise_descriptor_limit()
        self._take_directory()
        try:
            policy = self._read_policy()
            state = State(self._state_directory)
        except PolicyError as error:
            raise ServiceError(str(error)) from None
        except StateError as error:
            raise ServiceError(str(error)) from None
        state.epoch += 1
        loop = asyncio.get_running_loop()
        self.broker = Broker(self.directory, state, policy, self.log, loop, time.time)
        self.broker.start()
        self._console = Console(self)
        await self._console.start(self._listen("operator", 0o600))
        self._metrics = metrics.Server(self)
        await self._metrics.start(self._listen("metrics", 0o660))
        if self._metrics_http is not None:
            try:
                self.metrics_port = await self._metrics.start_http(*self._metrics_http)
            except OSError as error:
                address = "{}:{}".format(*self._metrics_http)
                raise ServiceError(f"--metrics-http {address}: {error.strerror or error}") from None
        for note in policy.notes(self.broker.domains):
            self.log.warning("policy", text=note)
        self.log.info(
            "start",
            dir=str(self.directory),
            policy=str(self.policy_path) if self.policy_path else "built-in",
            domains=len(self.broker.domains),
            epoch=state.epoch,
            pid=os.getpid(),
        )

    def _take_directory(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o711)
            doors = self.directory / "doors"
            doors.mkdir(exist_ok=True, mode=0o711)
            doors.chmod(0o711)
            self._directory_fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            lock = self.directory / "lock"
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ServiceError(f"{error.filename or self.directory}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self._lock, 32, 0).decode("ascii", "replace").strip()
            holder = f" (process {holder})" if holder else ""
            raise ServiceError(
                f"{self.directory}: another broker{holder} serves this directory; "
                "stop it, or choose another one with --dir"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _listen(self, name: str, mode: int) -> socket.socket:
        try:
            sock = bind_at(self._directory_fd, name, socket.SOCK_STREAM, mode)
        except OSError as error:
            raise ServiceError(f"{self.directory / name}: {error.strerror}") from None
        self._opened.append(sock)
        return sock

    # The policy file.

    def _read_policy(self) -> Policy:
        path = self.policy_path
        if path is None:
            return Policy()
        try:
            with open(path, "rb") as file:
                self._seen = _identity(os.fstat(file.fileno()))
                data = file.read(TEXT_MAX_BYTES + 1)
            return parse(data.decode(), str(path))
        except OSError as error:
            raise PolicyError(f"{path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise PolicyError(f"{path}: not UTF-8 at byte {error.start}") from None

    def reload(self) -> tuple[int, list[str]]:
        """Read the policy again. Returns how many connections it cut, and notes.

        Raises
        ------
        PolicyError
            The new policy cannot be used; the old one stays.
        """
        notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        try:
            policy = self._read_policy()
        except PolicyError as error:
            self.reloads["failed"] += 1
            self.policy_error = str(error)
            self.log.error("policy", text=f"{error}; the old policy stays")
            raise
        finally:
            notify("READY=1")
        self.policy_error = None
        self.reloads["ok"] += 1
        cut = self.broker.take_over(policy)
        notes = policy.notes(self.broker.domains)
        self.log.info("policy", text="reloaded", rules=len(policy.rules), cut=cut)
        for note in notes:
            self.log.warning("policy", text=note)
        return cut, notes

    def reload_logged(self) -> None:
        # Logged where it was found.
        with contextlib.suppress(PolicyError):
            self.reload()

    async def _watch(self) -> None:
        """Look at the policy file now and then, and tell systemd that we live."""
        interval = min(WATCH_S, watchdog_s() or WATCH_S)
        watched = watchdog_s() is not None
        while not self._stopping.is_set():
            if watched:
                notify("WATCHDOG=1")
            self.look_at_policy()
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), interval)

    def look_at_policy(self) -> None:
        """Reload if the file has changed since it was read."""
        if self.policy_path is None:
            return
        try:
            now = _identity(os.stat(self.policy_path))
        except OSError:
            return  # Gone, or being replaced: the policy that was read stays.
        if now != self._seen:
            self._seen = now
            self.reload_logged()

    async def close(self) -> None:
        self.broker.stop()
        await self._console.close()
        await self._metrics.close()
        for name in ("operator", "metrics"):
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._directory_fd)
        self.log.info("stop", pid=os.getpid())
        os.close(self._directory_fd)
        # The lock file stays: removing it would let two brokers hold "the" lock.
        os.close(self._lock)


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_mtime_ns, found.st_size


def _raise_descriptor_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run(service: Service) -> None:
    """Run a service until it is told to stop."""
    # A message leaves no cycles behind; looking for them at the usual rate took a tenth of the time.
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)
    asyncio.run(service.run())
