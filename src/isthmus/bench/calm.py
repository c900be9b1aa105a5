"""Waiting, before a run, for the machine to be what it was for the others: a moment, and in vain at worst."""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Sequence

from isthmus.bench import machine, native

__all__ = ["Calm"]

#: How long a run waits at most.
PATIENCE_S, QUICK_PATIENCE_S = 3.0, 0.05

#: A line that takes no longer comes from the other thread of one core, microseconds: the two share what a
#: core can copy, and whatever keeps both busy has half of it.
ONE_CORE_US = 0.05
#: Cores count as near while a line takes at most this many times the least it took between two cores.
NEAR = 1.5

#: How long others are watched, and what part of the machine they may be using. `/proc/stat` counts 10 ms.
WATCH_S = 0.03
QUIET = 0.2

#: About what the sockets of a few pairs hold.
TOUCHED_BYTES = 32 << 20


class Calm:
    """Knows how near the cores have been, and waits for them to be as near again, and for others to be idle.

    Parameters
    ----------
    cpus : sequence of int
        Processors that runs are pinned to; the first two are looked at.
    quick : bool
        Whether there is hardly any time, and none to watch others.
    """

    def __init__(self, cpus: Sequence[int], *, quick: bool) -> None:
        self._cpus = (cpus[0], cpus[1]) if len(cpus) > 1 else None
        self._quick = quick
        self._best_line_us = math.inf

    def wait(self) -> float | None:
        """Wait a moment if need be; return what a cache line takes from core to core now, in microseconds.

        A virtual machine's processors move: two that share a cache now may not in a second, and then a line
        takes four times as long and everything that goes through memory is ten times slower; or they may be
        the two threads of one core.
        """
        touch_memory()
        until = time.monotonic() + (QUICK_PATIENCE_S if self._quick else PATIENCE_S)
        while True:
            line_us = self._line_us()
            calm = line_us is None or ONE_CORE_US < line_us <= NEAR * self._best_line_us
            if (calm and (self._quick or others_are_idle())) or time.monotonic() >= until:
                return line_us
            time.sleep(0.01)

    def _line_us(self) -> float | None:
        """None without the native loops, or with one core."""
        if self._cpus is None or native.missing() is not None:
            return None
        found = native.cacheline(0.002, self._cpus)["p50_us"] or math.inf
        if found > ONE_CORE_US:
            self._best_line_us = min(self._best_line_us, found)
        return found


def others_are_idle() -> bool:
    """Whether hardly anything runs while this process sleeps."""
    before, started = machine.busy_seconds(), time.monotonic()
    time.sleep(WATCH_S)
    watched_s = (time.monotonic() - started) * machine.cpu_count()
    return machine.busy_seconds() - before <= QUIET * watched_s


def touch_memory() -> None:
    """Have some memory that the machine really has.

    A virtual machine may give memory that nobody uses back to its host; the next to allocate it, as socket
    buffers for one, waits for the host at 0.4 GB/s.
    """
    with mmap.mmap(-1, TOUCHED_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[::4096] = bytes(TOUCHED_BYTES // 4096)
