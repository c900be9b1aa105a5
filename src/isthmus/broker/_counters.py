"""The native check of a lane's descriptors, imported in one place."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus import _native


class _FakeCounters:
    def __init__(self, carrier: str, fds: Sequence[int], small: int, large: int) -> None:
        pass

    def read(self) -> tuple[int, int, int, int]:
        return (0, 0, 0, 0)


Counters = getattr(_native, "Counters", None) or _FakeCounters
