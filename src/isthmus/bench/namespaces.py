"""Two network namespaces that something joins: what a bridge and a cable between two nodes have in common.

Nothing is named on the machine and nothing of it is touched. Each namespace is held by a process of ours that
reads a pipe; when the pipe closes, because the `with` block ended or because this process died in whatever
way, the holder ends, and the kernel takes the namespace and the virtual cards in it with it. So there is
nothing to sweep up.
"""

from __future__ import annotations

import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["BridgeError", "Holder", "Sides", "find_tool", "run_ip"]

_TIMEOUT_S = 30


class BridgeError(RuntimeError):
    """The namespaces cannot be made here. Nothing of them is left."""


class Holder:
    """A process that keeps a new network namespace alive while it reads its standard input."""

    def __init__(self, command: Sequence[str]) -> None:
        # `cat` says that it stands in its namespace by echoing a line.
        self._process = subprocess.Popen(
            [*command, "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
            stands = self._process.stdout.readline() == b"\n"
        except BrokenPipeError:
            stands = False
        if not stands:
            _, complaint = self._process.communicate(timeout=_TIMEOUT_S)
            raise BridgeError(f"{' '.join(command)}: {complaint.decode(errors='replace').strip()}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=_TIMEOUT_S)


class Sides(ABC):
    """A context in which the namespaces `left` and `right` are there, and joined by what `_build` makes.

    Attributes
    ----------
    left_address, right_address : str
        IPv4 addresses of the two, in these namespaces only.
    interface : str
        Name of the card in both.
    """

    left_address: str
    right_address: str
    interface: str

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._enter: list[str] = []
        self._pids: dict[str, int] = {}

    def __enter__(self) -> Self:
        # What fails half-way is undone here: `__exit__` is not called when `__enter__` raises.
        with ExitStack() as stack:
            self._build(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def prefix(self, side: str) -> list[str]:
        """Return the command that runs another one in the namespace `left` or `right`."""
        return self._inside(self._pids[side])

    def _inside(self, pid: int) -> list[str]:
        return [*self._enter, "-t", str(pid), "--"]

    @abstractmethod
    def _build(self, stack: ExitStack) -> None:
        """Hold the namespaces until the stack is closed, put a card in each, and join them."""

    @staticmethod
    def _hold(stack: ExitStack, command: Sequence[str]) -> int:
        """The process that holds a namespace that `command` makes."""
        holder = Holder(command)
        stack.callback(holder.close)
        return holder.pid

    def _set_up(self) -> None:
        """Give the cards their addresses."""
        for side, address in (("left", self.left_address), ("right", self.right_address)):
            lines = ["link set lo up", f"address add {address}/24 dev {self.interface}"]
            run_ip([*self.prefix(side), find_tool("ip")], [*lines, f"link set {self.interface} up"])


def run_ip(command: list[str], lines: list[str]) -> None:
    done = subprocess.run(
        [*command, "-batch", "-"], input="\n".join(lines), text=True, capture_output=True, timeout=_TIMEOUT_S
    )
    if done.returncode:
        raise BridgeError(f"ip: {done.stderr.strip()}")


def find_tool(tool: str) -> str:
    # `ip` is often not on an ordinary user's path.
    found = shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")
    if found is None:
        raise BridgeError(f"{tool} is not installed (packages iproute2 and util-linux)")
    return found
