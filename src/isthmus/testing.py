"""A broker of your own, for tests and experiments.

    with PrivateBroker(domains=["web", "db"]) as broker:
        node = isthmus.attach(broker.door("web"))

It runs as a process of its own in a temporary directory, and both are gone afterwards.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PrivateBroker"]

START_LIMIT_S = 20.0


class PrivateBroker:
    """A broker with some domains, in a directory of its own.

    Parameters
    ----------
    domains : sequence of str
        Added at the start, in the default group.
    policy : str, optional
        Text of a policy file. Without one, members of one group may talk to each other.

    Raises
    ------
    RuntimeError
        The broker did not start; the message holds what it said.
    """

    def __init__(self, domains: Sequence[str] = ("a", "b"), policy: str | None = None) -> None:
        self._domains = tuple(domains)
        self._policy = policy
        self._root: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.directory = Path()

    @property
    def pid(self) -> int:
        """Process id of the broker."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> Path:
        """The file with the broker's log, one JSON object a line."""
        return self.directory.parent / "log"

    @property
    def policy_file(self) -> Path:
        """The policy file; change it and call `ask("reload")`."""
        return self.directory.parent / "policy.toml"

    def door(self, domain: str) -> str:
        """Path of a domain's door."""
        return str(self.directory / "doors" / domain / "door")

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """Ask the broker as its operator; see ``isthmus status --json`` for the shapes of answers."""
        from isthmus.cli.client import ask

        return ask(self.directory, do, **what)

    def start(self) -> None:
        """Start the broker, or start it again after `kill`; its directory and domains are kept."""
        command = [sys.executable, "-m", "isthmus", "broker", "--dir", str(self.directory)]
        if self._policy is not None:
            if not self.policy_file.exists():
                self.policy_file.write_text(self._policy)
            command += ["--policy", str(self.policy_file)]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until = time.monotonic() + START_LIMIT_S
        while True:
            with contextlib.suppress(Exception):
                if self.ask("ping").get("pid") == self._process.pid:
                    return
            if self._process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise RuntimeError(f"the broker did not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.01)

    def kill(self) -> None:
        """End the broker by SIGKILL, as a crash would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End the broker in order."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def __enter__(self) -> Self:
        # Short, because the path of a Unix socket is.
        self._root = tempfile.TemporaryDirectory(prefix="isthmus-", dir=os.environ.get("XDG_RUNTIME_DIR"))
        self.directory = Path(self._root.name) / "run"
        try:
            self.start()
            for name in self._domains:
                self.ask("domain-add", name=name, group=None, uid=None)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.stop()
        if self._root is not None:
            self._root.cleanup()
