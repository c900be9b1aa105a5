"""Isolated neighbours: processes that share no namespace and no writable file with anybody.

Made by bubblewrap: own user, network, PID, IPC, UTS, cgroup and mount namespace; the system's programs
read-only, a private /tmp, and one thing more: the directory of the domain's door.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["DOOR", "command", "missing", "namespaces"]

#: Where a neighbour finds its door; `isthmus.attach()` looks there by itself.
DOOR = "/run/isthmus/door"

_NAMESPACES = ("user", "net", "pid", "ipc", "uts", "mnt")


def missing() -> str | None:
    """Return why neighbours cannot be made here, or None."""
    if shutil.which("bwrap") is None:
        return "bwrap is not installed: apt install bubblewrap"
    tried = subprocess.run(
        [*_prefix(Path("/"), {}), "true"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        text=True,
    )
    return None if tried.returncode == 0 else f"bwrap cannot make namespaces here: {tried.stderr.strip()}"


def command(door: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the command that runs `arguments` as the neighbour behind `door`."""
    return [*_prefix(Path(door).parent, environment or {}), *arguments]


def _prefix(door: Path, environment: Mapping[str, str]) -> list[str]:
    words = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    # First, because what is bound below may lie in one of these.
    words += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", "/run"]
    seen: set[str] = set()
    for path in ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc", *_python()):
        if path not in seen and os.path.exists(path):
            seen.add(path)
            words += (
                ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
            )
    if door != Path("/"):
        words += ["--bind", str(door), DOOR]
    words += ["--chdir", "/tmp", "--setenv", "PATH", os.environ.get("PATH", "/usr/bin:/bin")]
    for name, value in environment.items():
        words += ["--setenv", name, value]
    return words


def _python() -> list[str]:
    """Where this interpreter and its packages lie."""
    paths = {sys.prefix, sys.base_prefix, sysconfig.get_path("purelib"), str(Path(__file__).parents[2])}
    paths.add(os.path.dirname(os.path.realpath(sys.executable)))
    system = ("/usr", "/bin", "/lib")
    outside = sorted(path for path in paths if not path.startswith(system))
    # A directory within one that is bound already needs no bind of its own.
    return [p for p in outside if not any(p != other and p.startswith(other + "/") for other in outside)]


def namespaces(pid: int | str = "self") -> dict[str, str]:
    """Return the identity of each namespace of a process."""
    return {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in _NAMESPACES}
