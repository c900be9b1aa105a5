"""The machine a figure belongs to, and who else was using it."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["CONGESTION_CONTROL", "busy_seconds", "cpu_count", "cpu_seconds", "describe", "huge_shared_memory"]
__all__ += ["pick_cpus"]

#: What every TCP baseline sets on its sockets. Under bbr the same machine is three times slower over a
#: bridge, which would flatter everything it is compared with.
CONGESTION_CONTROL = "cubic"

_CPU = Path("/sys/devices/system/cpu")
_THP = Path("/sys/kernel/mm/transparent_hugepage")


def describe() -> dict[str, Any]:
    """Return what a reader has to know to believe, or to repeat, a figure."""
    return {
        "cpu_model": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "governor": _read(_CPU / "cpu0/cpufreq/scaling_governor"),
        "idle_governor": _read(_CPU / "cpuidle/current_governor_ro")
        or _read(_CPU / "cpuidle/current_governor"),
        "hypervisor": _read(Path("/sys/hypervisor/type"))
        or ("yes" if "hypervisor" in _cpu_flags() else "no"),
        "thp_enabled": _chosen(_THP / "enabled"),
        "shmem_enabled": _chosen(_THP / "shmem_enabled"),
        "congestion_control": CONGESTION_CONTROL,
        "system_congestion_control": _read(Path("/proc/sys/net/ipv4/tcp_congestion_control")),
        "python": platform.python_version(),
    }


def pick_cpus() -> list[int]:
    """Return the processors to pin to, one for each core this process may use, siblings left out."""
    allowed = sorted(os.sched_getaffinity(0))
    taken: set[int] = set()
    cpus = []
    for cpu in allowed:
        if cpu not in taken:
            cpus.append(cpu)
            taken |= _siblings(cpu)
    return cpus


def cpu_count() -> int:
    """Return how many processors `busy_seconds` adds up."""
    return os.cpu_count() or 1


def busy_seconds() -> float:
    """Return the seconds all processors together have spent not idle since boot."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU seconds of every thread of these processes; one that is gone counts 0.

    `schedstat` counts nanoseconds where `stat` counts ticks of 10 ms.
    """
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            try:
                total += int(task.read_text().split()[0])
            except (OSError, ValueError, IndexError):
                continue
    return total * 1e-9


def _siblings(cpu: int) -> set[int]:
    words = _read(_CPU / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu)
    siblings: set[int] = set()
    for word in words.split(","):
        first, _, last = word.partition("-")
        siblings |= set(range(int(first), int(last or first) + 1))
    return siblings


def _cpu_info(key: str) -> str:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _cpu_model() -> str:
    family, model = _cpu_info("cpu family"), _cpu_info("model")
    name = _cpu_info("model name") or platform.machine()
    return f"{name} (family {family}, model {model})" if family else name


def _cpu_flags() -> list[str]:
    return _cpu_info("flags").split()


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _chosen(path: Path) -> str | None:
    """Return the word in brackets, as `[never]` in ``always [never]``."""
    text = _read(path) or ""
    return text.partition("[")[2].partition("]")[0] or None


@contextlib.contextmanager
def huge_shared_memory() -> Iterator[None]:
    """Let shared memory have huge pages where it is asked for, as an operator of strict domains would.

    Raises
    ------
    PermissionError
        Only root may.
    """
    setting = _THP / "shmem_enabled"
    before = _chosen(setting)
    setting.write_text("advise")
    try:
        yield
    finally:
        setting.write_text(before or "never")
