"""Records as tables, with how they compare to TCP over the bridge."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from isthmus.bench.cable import LOST
from isthmus.bench.calm import ONE_CORE_US
from isthmus.bench.cases import CLIENTS
from isthmus.bench.records import Record

__all__ = ["BASELINE", "print_programs", "print_tables", "programs_title", "ratio", "size_word"]

#: The part of the machine that others may use before it is worth a word.
FOREIGN_LOAD = 0.1

#: What every ratio is against.
BASELINE = "tcp-bridge"


def print_tables(records: Sequence[Record], console: Console) -> None:
    """Print the machine and one table for each bench."""
    if not records:
        return
    for key, value in records[0].machine.items():
        if value is not None:
            console.print(f"[dim]{key}[/dim] {value}", highlight=False)
    tables: list[tuple[str, Callable[[Record], bool], Callable[[Sequence[Record]], Table]]] = [
        ("pingpong", lambda record: record.bench == "pingpong", _latency),
        ("stream", lambda record: record.bench == "stream", _throughput),
        ("pairs", lambda record: record.bench == "pairs" and record.beside is None, _pairs),
        ("beside", lambda record: record.beside is not None, _beside),
        ("connect", lambda record: record.bench == "connect", _connects),
        ("rate", lambda record: record.bench == "rate", _rates),
        ("overlap", lambda record: record.bench == "overlap", _overlaps),
        ("loss", lambda record: record.bench == "loss", _losses),
        ("endpoints", lambda record: record.bench == "endpoints", _endpoints),
    ]
    for _, wanted, build in tables:
        chosen = [record for record in records if wanted(record)]
        if chosen:
            console.print()
            console.print(build(chosen))
    for warning in _warnings(records):
        console.print(warning, style="yellow", highlight=False)


def print_programs(records: Sequence[dict[str, Any]], console: Console) -> None:
    """Print what `isthmus bench programs` measured, each way beside the bridge."""
    table = Table(title=programs_title(records), title_justify="left")
    for column in ("program", "way"):
        table.add_column(column)
    for column in ("a second", "GB/s", "p50 µs", "p99 µs", "of bridge", "busy CPUs"):
        table.add_column(column, justify="right")
    bridges = {record["program"]: record for record in records if record["way"] == "bridge"}
    for record in records:
        bridge = bridges[record["program"]]
        main = next(name for name in ("per_second", "gbytes_per_s", "p50_us") if record[name] is not None)
        times = record[main] / bridge[main]
        table.add_row(
            record["program"],
            record["way"],
            *(
                "" if record[name] is None else f"{record[name]:,.{digits}f}"
                for name, digits in (("per_second", 0), ("gbytes_per_s", 2), ("p50_us", 1), ("p99_us", 1))
            ),
            f"{times:.2f} x" + (" (time)" if main == "p50_us" else ""),
            f"{record['cpu_s']:.2f}",
        )
    console.print(table)


def programs_title(records: Sequence[dict[str, Any]]) -> str:
    """Return what `isthmus bench programs` measured, and between which guests if it was between guests."""
    guests = records[0]["machine"].get("guests")
    return f"Unmodified programs between guests\n{guests}" if guests else "Unmodified programs"


def ratio(record: Record, records: Iterable[Record], figure: str, wait: str | None = None) -> float | None:
    """Return how many times better `record` is than TCP over the bridge in the same situation.

    Parameters
    ----------
    figure : str
        ``p50_us`` (smaller is better), ``gbytes_per_s`` or ``per_second`` (larger is better).
    wait : str, optional
        How the baseline waits; the first one measured when not given.
    """
    ours = getattr(record, figure)
    for other in records:
        if (
            other.transport == BASELINE
            and _situation(other) == _situation(record)
            and wait in (None, other.wait)
        ):
            theirs = getattr(other, figure)
            if ours and theirs:
                return float(theirs / ours if figure == "p50_us" else ours / theirs)
            return None
    return None


def _warnings(records: Sequence[Record]) -> list[str]:
    """What about the machine makes these figures worth less."""
    found = []
    foreign = statistics.median(record.detail.get("foreign_load") or 0.0 for record in records)
    if foreign > FOREIGN_LOAD:
        found.append(
            f"Others used {foreign:.0%} of the machine meanwhile (median): repeat this when they do not."
        )
    lines = [line for record in records for line in record.detail.get("line_us", ()) if line]
    one_core = sum(line <= ONE_CORE_US for line in lines)
    near = min((line for line in lines if line > ONE_CORE_US), default=0.0)
    far = sum(line > 2 * near for line in lines if line > ONE_CORE_US)
    if one_core or far:
        found.append(
            f"This machine's processors move: two cores were {near:.3f} µs apart at best, more than twice "
            f"that before {far / len(lines):.0%} of the runs, and one core's two threads before "
            f"{one_core / len(lines):.0%}."
        )
    return found


def _situation(record: Record) -> tuple[Any, ...]:
    """What two records must share to be compared. What only some have compares with the native baseline."""
    client = "native" if record.client in ("asyncio", "in-place") else record.client
    return (
        record.bench,
        client,
        record.size,
        record.pairs,
        record.data,
        record.pages,
        record.pinned,
        record.beside,
    )


def size_word(size: int | None) -> str:
    """Return 64, 4K, 1M."""
    if size is None:
        return ""
    for shift, letter in ((20, "M"), (10, "K")):
        if size >= 1 << shift and size % (1 << shift) == 0:
            return f"{size >> shift}{letter}"
    return str(size)


def _number(value: float | None) -> str:
    """Three significant digits, never in scientific notation."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 10 else f"{value:.3g}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{_number(value)} ×"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _tenths(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in texts:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _conditions(record: Record) -> str:
    words = [record.data if record.data != "hot" else "", "huge pages" if record.pages == "huge" else ""]
    words += ["" if record.pinned else "unpinned"]
    return " ".join(word for word in words if word)


def _by_size(records: Sequence[Record]) -> list[Record]:
    def place(record: Record) -> tuple[Any, ...]:
        return CLIENTS.index(record.client), record.size or 0, record.data != "hot", record.pages != "4k"

    return sorted(records, key=place)


def _latency(records: Sequence[Record]) -> Table:
    headings = ["p50 µs", "p99 µs", "vs TCP spin", "vs TCP block", "runs", "spread"]
    table = _table("Latency, one way", ["size", "transport", "client", "wait", ""], headings)
    for record in _by_size(records):
        table.add_row(
            size_word(record.size),
            record.name,
            record.client,
            record.wait,
            _conditions(record),
            _number(record.p50_us),
            _number(record.p99_us),
            _times(ratio(record, records, "p50_us", "spin")),
            _times(ratio(record, records, "p50_us", "block")),
            str(record.runs),
            _percent(record.spread),
        )
    return table


def _throughput(records: Sequence[Record]) -> Table:
    headings = ["GB/s", "vs TCP block", "messages/s", "CPU s/GB", "runs", "spread"]
    table = _table(
        "Throughput, into the receiver's own buffer", ["size", "transport", "client", "wait", ""], headings
    )
    for record in _by_size(records):
        table.add_row(
            size_word(record.size),
            record.name,
            record.client,
            record.wait,
            _conditions(record),
            _number(record.gbytes_per_s),
            _times(ratio(record, records, "gbytes_per_s", "block")),
            _number(record.per_second),
            _number(record.cpu_s_per_gb),
            str(record.runs),
            _percent(record.spread),
        )
    return table


def _pairs(records: Sequence[Record]) -> Table:
    headings = ["GB/s", "vs TCP", "uneven", "CPU s/GB", "runs", "spread"]
    table = _table(
        "Pairs at the same time, all together", ["pairs", "size", "transport", "wait", ""], headings
    )
    for record in sorted(records, key=lambda record: (not record.pinned, record.size or 0, record.pairs)):
        table.add_row(
            str(record.pairs),
            size_word(record.size),
            record.name,
            record.wait,
            _conditions(record),
            _number(record.gbytes_per_s),
            _times(ratio(record, records, "gbytes_per_s")),
            _percent(record.detail.get("uneven")),
            _number(record.cpu_s_per_gb),
            str(record.runs),
            _percent(record.spread),
        )
    return table


def _beside(records: Sequence[Record]) -> Table:
    headings = ["p50 µs", "p99 µs", "vs TCP", "runs", "spread"]
    title = "A ping each 0.3 ms beside pairs that stream, one way"
    table = _table(title, ["beside", "size", "transport", "wait"], headings)
    for record in sorted(records, key=lambda record: record.beside or 0):
        table.add_row(
            f"{record.beside} pairs",
            size_word(record.size),
            record.name,
            record.wait,
            _number(record.p50_us),
            _number(record.p99_us),
            _times(ratio(record, records, "p50_us")),
            str(record.runs),
            _percent(record.spread),
        )
    return table


def _connects(records: Sequence[Record]) -> Table:
    headings = ["connections/s", "vs TCP", "runs", "spread"]
    table = _table("Connect, one byte, close", ["transport", "client", "wait"], headings)
    for record in _by_size(records):
        table.add_row(
            record.name,
            record.client,
            record.wait,
            _number(record.per_second),
            _times(ratio(record, records, "per_second")),
            str(record.runs),
            _percent(record.spread),
        )
    return table


def _rates(records: Sequence[Record]) -> Table:
    headings = ["messages/s", "CPU µs each", "runs", "spread"]
    title = "Small messages, many under way"
    table = _table(title, ["size", "transport", "client", "wait"], headings)
    for record in _by_size(records):
        each = record.cpu_s_per_gb and record.cpu_s_per_gb * (record.size or 0) / 1e3
        table.add_row(
            size_word(record.size),
            record.name,
            record.client,
            record.wait,
            _number(record.per_second),
            _number(each),
            str(record.runs),
            _percent(record.spread),
        )
    return table


def _overlaps(records: Sequence[Record]) -> Table:
    headings = ["transfer µs", "receiver computes", "sender computes", "runs"]
    title = "Overlap: the part of a transfer that happens while one end computes as long as it takes"
    table = _table(title, ["size", "transport", "client", "wait", ""], headings)
    for record in _by_size(records):
        table.add_row(
            size_word(record.size),
            record.name,
            record.client,
            record.wait,
            _conditions(record),
            _number(record.p50_us),
            _percent(record.detail["overlap_receiver"]),
            _percent(record.detail["overlap_sender"]),
            str(record.runs),
        )
    return table


#: What the names of those have that lose frames on purpose.
_LOSSY = "-lossy"


def _losses(records: Sequence[Record]) -> Table:
    headings = ["GB/s", "of lossless", "frames lost", "delivered", "CPU s/GB", "runs", "spread"]
    title = f"Throughput over a cable; {LOST:.0%} of the frames are lost where it says lossy"
    table = _table(title, ["size", "transport", "client", "wait"], headings)
    for record in _by_size(records):
        lossless = [
            other.gbytes_per_s
            for other in records
            if _situation(other) == _situation(record)
            and (other.wait, other.name + _LOSSY) == (record.wait, record.name)
            and other.gbytes_per_s
        ]
        table.add_row(
            size_word(record.size),
            record.name,
            record.client,
            record.wait,
            _number(record.gbytes_per_s),
            _percent((record.gbytes_per_s or 0) / lossless[0]) if lossless else "",
            _tenths(record.detail.get("frames_lost")),
            _percent(record.detail["delivered"]),
            _number(record.cpu_s_per_gb),
            str(record.runs),
            _percent(record.spread),
        )
    return table


def _endpoints(records: Sequence[Record]) -> Table:
    headings = ["GB/s", "uneven", "frames lost", "idle KiB", "CPU s/GB", "runs", "spread"]
    title = (
        "Endpoints of one card, each streaming to its own peer, all together;\n"
        "uneven: the furthest from the mean; idle: memory of one, its share of program and card"
    )
    table = _table(title, ["endpoints", "size", "transport", "wait"], headings)
    for record in sorted(records, key=lambda record: (record.size or 0, record.pairs)):
        table.add_row(
            str(record.pairs),
            size_word(record.size),
            record.name,
            record.wait,
            _number(record.gbytes_per_s),
            _percent(record.detail.get("uneven")),
            _tenths(record.detail.get("frames_lost")),
            _number(record.detail.get("idle_endpoint_kib")),
            _number(record.cpu_s_per_gb),
            str(record.runs),
            _percent(record.spread),
        )
    return table
