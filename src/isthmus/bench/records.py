"""One record per figure: what was measured, how, and what came out."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Record", "median", "records_as_json", "spread"]


@dataclass(frozen=True)
class Record:
    """The medians over all runs of one case.

    Attributes
    ----------
    bench : str
        ``pingpong``, ``stream``, ``pairs``, ``connect``, ``rate``, ``overlap``, ``loss`` or ``endpoints``.
    transport : str
        What carried the bytes; ``memcpy`` and ``cacheline`` are limits and carry none.
    path : str or None
        The path an Isthmus connection took; None for every baseline.
    client : str
        ``native``, ``python`` or ``asyncio``: what the loop is written in.
    wait : str
        ``spin``, ``adaptive`` or ``block``: what an end does while there is nothing to do.
    size : int or None, bytes
        Of one message; None where messages are not the point.
    pairs : int
        Pairs of processes, or of endpoints, that measured at the same time.
    data, pages : str
        ``hot`` or ``cold`` data; ``4k`` or ``huge`` pages under the application's buffers.
    pinned : bool
        Whether each process was kept on one processor.
    beside : int or None
        Pairs streaming in bulk beside a paced ping; None when nothing ran beside.
    p50_us, p99_us : float or None, microseconds
        One way: half a round trip. Of `overlap`: a transfer beside no work.
    gbytes_per_s : float or None, 1e9 bytes per second
        Payload that ended in the receivers' private buffers, all pairs together.
    per_second : float or None
        Messages (stream), round trips (pingpong) or connections (connect) per second.
    cpu_s_per_gb : float or None, seconds per 1e9 bytes
        CPU time of every process involved, mediators included.
    overlap : float or None, 0 to 1
        The part of a transfer, or of the work if that is shorter, that happened at the same time as the
        other; the lesser of a receiver's that computes and a sender's (both are in `detail`).
    runs : int
        How many runs the medians are over.
    spread : float or None
        (largest - smallest) / median of the main figure.
    detail : dict
        Settings a reader needs (congestion control, buffer sizes), the main figure of each run (``values``),
        what a cache line took from core to core just before it (``line_us``), and the part of the machine
        that others used meanwhile (``foreign_load``).
    machine : dict
        Where it was measured; see :func:`isthmus.bench.machine.describe`.
    """

    bench: str
    transport: str
    path: str | None
    client: str
    wait: str
    size: int | None
    pairs: int
    data: str
    pages: str
    pinned: bool
    beside: int | None
    p50_us: float | None
    p99_us: float | None
    gbytes_per_s: float | None
    per_second: float | None
    cpu_s_per_gb: float | None
    overlap: float | None
    runs: int
    spread: float | None
    detail: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Transport and path in one word, as tables and plots show it."""
        return self.transport if self.path is None else f"{self.transport} {self.path}"


def median(values: Iterable[float | None]) -> float | None:
    """Return the median of the values that are there, or None when none is."""
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None


def spread(values: Sequence[float]) -> float | None:
    """Return (largest - smallest) / median; None when there is nothing to divide by."""
    middle = median(values)
    return (max(values) - min(values)) / middle if middle else None


def records_as_json(records: Iterable[Record]) -> str:
    """Return one JSON list, a record a line. Absent figures are null, never NaN."""
    lines = [json.dumps(_rounded(asdict(record)), allow_nan=False) for record in records]
    return "[\n" + ",\n".join(lines) + "\n]" if lines else "[]"


def _rounded(value: Any) -> Any:
    """Cut floats to six significant digits: more is noise that looks like knowledge."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
