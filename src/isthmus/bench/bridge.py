"""Two network namespaces joined by a bridge: the network that two containers on one node have.

Nothing is named on the machine and nothing of it is touched. Each namespace is held by a process of ours that
reads a pipe; when the pipe closes, because the `with` block ended or because this process died in whatever
way, the holder ends, and the kernel takes the namespace, the virtual cards and the bridge with it. So there
is nothing to sweep up.

Root makes the namespaces directly; everybody else makes a user namespace around them, where the system allows
that.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType

__all__ = ["Bridge", "BridgeError", "Holder", "find_tool", "run_ip"]

_TIMEOUT_S = 10


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


class Bridge:
    """A context in which two namespaces, `left` and `right`, reach each other through a bridge in a third.

    Attributes
    ----------
    left_address, right_address : str
        IPv4 addresses of the two, in 10.0.0.0/8 and in these namespaces only.

    Raises
    ------
    BridgeError
        On entry, when `ip`, `unshare` or `nsenter` is missing, or when namespaces may not be made.
    """

    left_address = "10.77.0.1"
    right_address = "10.77.0.2"

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._enter: list[str] = []
        self._pids: dict[str, int] = {}

    def __enter__(self) -> Bridge:
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

    def _build(self, stack: ExitStack) -> None:
        ip, nsenter, unshare = (find_tool(tool) for tool in ("ip", "nsenter", "unshare"))
        root = os.geteuid() == 0
        # A user namespace owns the network namespaces made inside it.
        user = [] if root else ["-U", "--preserve-credentials"]
        self._enter = [nsenter, *user, "-n"]

        def hold(command: list[str]) -> int:
            holder = Holder(command)
            stack.callback(holder.close)
            return holder.pid

        middle = hold([unshare, "-n", "--"] if root else [unshare, "-U", "-r", "-n", "--"])
        beside = [*self._inside(middle), unshare, "-n", "--"]
        self._pids = {side: hold(beside) for side in ("left", "right")}

        batch = ["link add bridge type bridge", "link set bridge up"]
        for side, pid in self._pids.items():
            batch += [
                f"link add {side} type veth peer name eth0 netns {pid}",
                f"link set {side} master bridge",
                f"link set {side} up",
            ]
        run_ip([*self._inside(middle), ip], batch)
        for side, address in (("left", self.left_address), ("right", self.right_address)):
            lines = ["link set lo up", f"address add {address}/24 dev eth0", "link set eth0 up"]
            run_ip([*self.prefix(side), ip], lines)


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
