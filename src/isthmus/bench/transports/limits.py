"""What no transport can pass: one core's copy, and one cache line from core to core."""

from __future__ import annotations

from dataclasses import replace

from isthmus.bench import native
from isthmus.bench.cases import Case
from isthmus.bench.native import Report
from isthmus.bench.transports import Job, Transport
from isthmus.bench.worker import Control

__all__ = ["Cacheline", "Memcpy"]


class Limit(Transport):
    """Both limits run in one process, with the native loops."""

    clients = ("native",)
    waits = ("spin",)

    def missing(self) -> str | None:
        """There is no limit without the native loops."""
        return native.missing()

    def roles(self, case: object) -> tuple[str, ...]:
        """One process."""
        return ("alone",)


class Memcpy(Limit):
    """Bytes one core copies a second, by the best of three ways."""

    name = "memcpy"
    benches = ("stream",)

    def alone(self, job: Job, control: Control) -> Report:
        """Try each way for a moment, then measure the best."""
        case = job.case

        def rate(copy: str) -> float:
            found = native.memcpy(job.size, job.warmup_s / 3, case.pages, case.data, copy)
            return found["bytes"] / (found["seconds"] or 1)

        best = max(("libc", "string", "streaming"), key=rate)
        control.detail["copy"] = best
        control.go()
        return native.memcpy(job.size, job.duration_s, case.pages, case.data, best)


class Cacheline(Limit):
    """One way of a cache line that two cores pass back and forth."""

    name = "cacheline"
    benches = ("pingpong",)

    def normal(self, case: Case) -> Case:
        """A line is 64 bytes, whatever messages are."""
        return replace(case, size=64, data="hot", pages="4k")

    def alone(self, job: Job, control: Control) -> Report:
        """Two threads on two processors."""
        control.go()
        return native.cacheline(job.duration_s, (job.cpus[0], job.cpus[1]) if len(job.cpus) > 1 else None)
