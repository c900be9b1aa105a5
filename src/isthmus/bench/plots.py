"""Records as plots: latency by size, throughput by size, throughput by number of pairs. PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from isthmus.bench.records import Record
from isthmus.bench.table import programs_title, size_word

__all__ = ["plot_programs", "write_plots"]

#: A transport keeps its colour and marker, a wait its line.
MARKERS = "osD^vP*X<>"
STYLES = {"spin": "-", "adaptive": "--", "block": ":"}


def plot_programs(records: Sequence[dict[str, Any]], directory: Path) -> list[Path]:
    """Write one plot of what `isthmus bench programs` measured: each way, as a multiple of the bridge.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rated = [record for record in records if record["per_second"] or record["gbytes_per_s"]]
    names = list(dict.fromkeys(record["program"] for record in rated))
    ways = list(dict.fromkeys(record["way"] for record in rated))

    def rate(name: str, way: str) -> float:
        for record in rated:
            if (record["program"], record["way"]) == (name, way):
                return float(record["per_second"] or record["gbytes_per_s"])
        return 0.0

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / max(1, len(ways))
    for place, way in enumerate(ways):
        heights = [rate(name, way) / rate(name, "bridge") for name in names]
        axes.bar([x + place * width for x in range(len(names))], heights, width, label=way)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(names))], names)
    axes.set_ylabel("times TCP over the bridge")
    axes.set_title(programs_title(records), fontsize="medium")
    axes.legend()
    written = [directory / f"programs.{kind}" for kind in ("png", "svg")]
    for path in written:
        figure.savefig(path)
    return written


def write_plots(records: Sequence[Record], directory: Path) -> list[Path]:
    """Write every plot that the records have points for.

    Parameters
    ----------
    directory : Path
        Made when it is not there; files of an earlier run are replaced.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    written = []
    usual = [
        record
        for record in records
        if record.data == "hot" and record.pages == "4k" and record.beside is None
    ]
    for client in ("native", "python"):
        mine = [record for record in usual if record.client in (client, "asyncio")]
        tail = "" if client == "native" else f"-{client}"
        note = f" ({client} client)"
        latency = [record for record in mine if record.bench == "pingpong" and record.p50_us]
        stream = [record for record in mine if record.bench == "stream" and record.gbytes_per_s]
        written += _plot(
            latency,
            directory,
            f"latency{tail}",
            "One-way latency" + note,
            "µs, median",
            _size,
            _p50,
            log=True,
        )
        written += _plot(
            stream, directory, f"throughput{tail}", "Throughput" + note, "GB/s", _size, _gbytes, log=False
        )
        rate = [record for record in mine if record.bench == "rate" and record.per_second]
        loss = [record for record in mine if record.bench == "loss" and record.gbytes_per_s]
        written += _plot(
            rate,
            directory,
            f"rate{tail}",
            "Many messages under way" + note,
            "messages/s",
            _size,
            _per_second,
            log=True,
        )
        written += _plot(
            loss,
            directory,
            f"loss{tail}",
            "Throughput with lost frames" + note,
            "GB/s",
            _size,
            _gbytes,
            log=False,
        )
    overlap = [record for record in usual if record.overlap is not None]
    title = "Overlap of a transfer with work, the lesser of both ends"
    written += _plot(overlap, directory, "overlap", title, "part", _size, _overlap, log=False)
    endpoints = [record for record in usual if record.bench == "endpoints"]
    title = "Endpoints of one card: all together"
    written += _plot(endpoints, directory, "endpoints", title, "GB/s", _pairs, _gbytes, log=False)
    for pinned, word in ((True, "pinned"), (False, "unpinned")):
        pairs = [record for record in usual if record.bench == "pairs" and record.pinned is pinned]
        title = f"Pairs at the same time, {word}: all together"
        written += _plot(pairs, directory, f"pairs-{word}", title, "GB/s", _pairs, _gbytes, log=False)
    return written


def _size(record: Record) -> float:
    return float(record.size or 0)


def _pairs(record: Record) -> float:
    return float(record.pairs)


def _p50(record: Record) -> float:
    return record.p50_us or 0.0


def _gbytes(record: Record) -> float:
    return record.gbytes_per_s or 0.0


def _per_second(record: Record) -> float:
    return record.per_second or 0.0


def _overlap(record: Record) -> float:
    return record.overlap or 0.0


def _plot(
    records: Sequence[Record],
    directory: Path,
    name: str,
    title: str,
    unit: str,
    x: Callable[[Record], float],
    y: Callable[[Record], float],
    *,
    log: bool,
) -> list[Path]:
    """Draw one line for each transport and wait."""
    if not records:
        return []
    # Loading it takes a second, and the object interface needs neither a display nor a global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(record.name for record in records))
    lines: dict[str, list[Record]] = {}
    for record in records:
        lines.setdefault(_label(record), []).append(record)
    for label, line in lines.items():
        points = sorted((x(record), y(record)) for record in line)
        look = names.index(line[0].name)
        axes.plot(
            *zip(*points, strict=True),
            color=f"C{look % 10}",
            marker=MARKERS[look % len(MARKERS)],
            linestyle="-." if line[0].client == "asyncio" else STYLES[line[0].wait],
            linewidth=1.5,
            markersize=5,
            label=label,
        )
    ticks = sorted({x(record) for record in records})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [size_word(int(tick)) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("pairs" if x is _pairs else "message, bytes")
    axes.set_ylabel(unit)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_title(title, loc="left")
    machine = records[0].machine
    facts = [machine.get("cpu_model"), f"{machine.get('cores')} cores", f"Linux {machine.get('kernel')}"]
    facts += [f"TCP {machine.get('congestion_control')}"]
    figure.text(0.01, -0.02, ", ".join(str(fact) for fact in facts), fontsize=7, color="0.4")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=130, bbox_inches="tight")
    return paths


def _label(record: Record) -> str:
    asyncio = ", asyncio" if record.client == "asyncio" else ""
    return f"{record.name}, {record.wait}{asyncio}"
