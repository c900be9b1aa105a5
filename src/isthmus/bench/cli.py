"""`isthmus bench`: measure, then tables, JSON and plots."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from isthmus.bench import machine, transports
from isthmus.bench.cases import BENCHES, CLIENTS, MX_BENCHES, WAITS, Settings, parse_sizes
from isthmus.bench.plots import write_plots
from isthmus.bench.records import Record, records_as_json
from isthmus.bench.runner import measure
from isthmus.bench.table import print_tables

__all__ = ["bench_group"]

#: A quick run promises to end within 40 s; plots and the last group's overrun are inside that.
QUICK_S = 29.0

#: What the widest table needs.
TABLE_WIDTH = 120

CHOICES = {
    "transports": tuple(transports.NAMES),
    "clients": CLIENTS,
    "waits": WAITS,
    "data": ("hot", "cold"),
    "pages": ("4k", "huge"),
}

#: Options of what can also be measured between guests.
BETWEEN = (
    click.option("--between", type=click.Choice(["vm"]), help="Both ends are in virtual machines."),
    click.option(
        "--monitor", type=click.Choice(["qemu", "uml"]), help="What runs them [qemu with KVM, else uml]."
    ),
)


def _words(_: click.Context, option: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Split a list at its commas and check every word."""
    if not value:
        return ()
    choices = CHOICES[option.name or ""]
    words = tuple(word.strip() for word in value.split(","))
    for word in words:
        if word not in choices:
            raise click.BadParameter(f"{word}: one of {', '.join(choices)}")
    return words


def _sizes(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        return parse_sizes(value) if value else ()
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _counts(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...]:
    words = value.split(",") if value else []
    if not all(word.strip().isdigit() and 1 <= int(word) <= 64 for word in words):
        raise click.BadParameter(f"{value}: give numbers from 1 to 64, as in 1,4,8")
    return tuple(int(word) for word in words)


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that every bench has."""
    options = [
        click.option("--sizes", callback=_sizes, metavar="LIST", help="Message sizes, as in 64,4K,1M."),
        click.option(
            "--transports", callback=_words, metavar="LIST", help=f"Of {', '.join(transports.NAMES)}."
        ),
        click.option("--clients", callback=_words, metavar="LIST", help=f"Of {', '.join(CLIENTS)}."),
        click.option("--waits", callback=_words, metavar="LIST", help=f"Of {', '.join(WAITS)}."),
        click.option("--data", callback=_words, metavar="LIST", help="Of hot, cold."),
        click.option("--pages", callback=_words, metavar="LIST", help="Application buffers: of 4k, huge."),
        click.option("--pairs", callback=_counts, metavar="LIST", help="Numbers of pairs, as in 1,2,4,8."),
        click.option("--pinned/--unpinned", default=None, help="Keep each process on one processor, or not."),
        click.option("--repeat", type=click.IntRange(1, 100), metavar="N", help="Runs of each case."),
        click.option("--quick", is_flag=True, help="End within 40 s, with fewer cases and shorter runs."),
        click.option(
            "--huge-shmem",
            is_flag=True,
            help="Set shmem_enabled to advise meanwhile (root), which strict paths need for their best.",
        ),
        *BETWEEN,
        click.option(
            "--out", type=click.Path(path_type=Path), metavar="DIR", help="Write plots and records here."
        ),
        click.option(
            "--json", "as_json", is_flag=True, help="Print one JSON list of records and nothing else."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group("bench")
def bench_group() -> None:
    """Measure Isthmus beside TCP, AF_UNIX, shared memory and installed peers, interleaved in one run."""


def _run(benches: tuple[str, ...], out: Path | None, as_json: bool, **asked: Any) -> None:
    started = time.monotonic()
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    pinned, huge_shmem = asked.pop("pinned"), asked.pop("huge_shmem")
    between = _monitor(asked.pop("between"), asked.pop("monitor"))
    usual = tuple(name for name in transports.NAMES if name not in transports.BETWEEN_NODES)
    names = asked["transports"] or usual
    settings = Settings(pinned=() if pinned is None else (pinned,), **asked)
    try:
        with machine.huge_shared_memory() if huge_shmem else nullcontext():
            records = measure(
                benches,
                settings,
                [transports.load(name) for name in names],
                tell=lambda line: notes.print(line, style="dim", markup=False),
                deadline=started + QUICK_S if settings.quick and between is None else None,
                between=between,
            )
    except PermissionError as error:
        raise click.ClickException(f"--huge-shmem: {error.filename}: only root may change it") from None
    if as_json:
        click.echo(records_as_json(records))
    else:
        print_tables(records, _wide())
    for path in _write(records, out, notes) if out is not None else ():
        click.echo(str(path), err=as_json)
    if not records:
        raise click.ClickException("nothing was measured; the lines above say why")


def _wide() -> Console:
    """A console for tables: figures cut off at the 80 columns of a pipe help nobody."""
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    return console


def _monitor(between: str | None, monitor: str | None) -> str | None:
    """The monitor of the guests to measure between, if it is to be between guests."""
    if between is None:
        if monitor is not None:
            raise click.UsageError("--monitor goes with --between vm")
        return None
    from isthmus.vm import Missing, choose_monitor

    try:
        return monitor or choose_monitor()
    except Missing as error:
        raise click.ClickException(str(error)) from None


def _write(records: list[Record], out: Path, notes: Console) -> list[Path]:
    """Write the records and the plots, and return the files."""
    out.mkdir(parents=True, exist_ok=True)
    listing = out / "records.json"
    listing.write_text(records_as_json(records) + "\n")
    try:
        return [listing, *write_plots(records, out)]
    except ImportError as error:
        notes.print(f"no plots: {error}; pip install 'isthmus[bench]'", markup=False)
        return [listing]


def _add(name: str, benches: tuple[str, ...], summary: str) -> None:
    @_options
    def command(**asked: Any) -> None:
        _run(benches, **asked)

    bench_group.add_command(click.command(name, help=summary)(command))


@bench_group.command("idle")
@click.option("--connections", type=click.IntRange(1, 100_000), default=1000, show_default=True)
@click.option(
    "--seconds", type=click.FloatRange(0.1, 600), default=10.0, show_default=True, help="Of silence."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def idle(connections: int, seconds: float, as_json: bool) -> None:
    """Memory and CPU of connections that nobody uses."""
    from isthmus.bench.idle import measure as measure_idle

    found = measure_idle(connections, seconds)
    if as_json:
        click.echo(json.dumps(found))
    else:
        click.echo(
            f"{found['connections']} idle connections: {found['memory_mib']} MiB in all "
            f"({', '.join(f'{k} {v}' for k, v in found['memory_by_party_mib'].items())}), "
            f"{found['cpu_s'] * 1e3:.1f} ms of CPU in {found['silence_s']:g} s; "
            f"{'all' if found['alive'] else 'NOT all'} still alive"
        )
    if not found["alive"]:
        raise click.ClickException("some connections did not carry a byte afterwards")


@bench_group.command("programs")
@click.argument("names", nargs=-1)
@click.option(
    "--repeat", type=click.IntRange(1, 100), default=5, show_default=True, help="Turns of each way."
)
@click.option(
    "--seconds", type=click.FloatRange(0.1, 60), default=2.0, show_default=True, help="Of each turn."
)
@BETWEEN[0]
@BETWEEN[1]
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Write a plot and the records here."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list of records and nothing else.")
def programs(
    names: tuple[str, ...],
    between: str | None,
    monitor: str | None,
    out: Path | None,
    as_json: bool,
    **turns: Any,
) -> None:
    """Programs that know nothing of Isthmus, under `isthmus run` and over the bridge.

    NAMES: redis, nginx, iperf3, postgres, mpi (messages between two ranks), dask, connect (the time that
    connect takes), files (calls that are no concern of ours); between guests redis and iperf3. All that are
    installed by default.
    """
    from isthmus.bench.plots import plot_programs
    from isthmus.bench.table import print_programs

    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    records = _programs(names, _monitor(between, monitor), notes, **turns)
    if not records:
        raise click.ClickException("nothing was measured; the lines above say why")
    if as_json:
        click.echo(json.dumps(records))
    else:
        print_programs(records, _wide())
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "programs.json").write_text(json.dumps(records, indent=1) + "\n")
        try:
            click.echo("\n".join(map(str, plot_programs(records, out))), err=as_json)
        except ImportError as error:
            notes.print(f"no plots: {error}; pip install 'isthmus[bench]'", markup=False)


def _programs(
    names: tuple[str, ...], monitor: str | None, notes: Console, **turns: Any
) -> list[dict[str, Any]]:
    """Measure programs between two networks or, given a monitor, between two of its guests."""
    from isthmus.bench.bridge import BridgeError
    from isthmus.bench.programs import PROGRAMS, measure
    from isthmus.bench.programs_guests import PROGRAMS_BETWEEN_GUESTS, measure_between_guests
    from isthmus.vm import GuestError, Missing

    turns["tell"] = lambda line: notes.print(line, style="dim", markup=False)
    try:
        if monitor is None:
            return measure(names or tuple(PROGRAMS), **turns)
        return measure_between_guests(names or tuple(PROGRAMS_BETWEEN_GUESTS), monitor, **turns)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except (BridgeError, RuntimeError, Missing, GuestError) as error:
        raise click.ClickException(str(error)) from None


#: What MX is compared with: our own lanes, TCP over the same cables, and whoever else matches tags.
MX = ("isthmus", *transports.BETWEEN_NODES, "mpi4py", "ucx")


#: Sizes of a ping and of a stream: a small message, one of the largest that is sent at once, a large one.
MX_USUAL = dict.fromkeys(("pingpong", "stream"), (64, 64 << 10, 1 << 20))


@bench_group.command("mx")
@click.argument("names", nargs=-1, type=click.Choice(MX_BENCHES), metavar="[NAME]...")
@_options
def mx(names: tuple[str, ...], **asked: Any) -> None:
    """MX inside a node and over a cable between two, beside lanes, TCP over the same cable, MPI and UCX.

    NAMES: pingpong, stream, rate (small messages, many under way), overlap (how much of a transfer happens
    while a program computes), loss (a stream of which the cable loses 1 % of the frames), endpoints (up to 64
    of one card at once). All by default.
    """
    asked["transports"] = asked["transports"] or MX
    _run(names or MX_BENCHES, usual=MX_USUAL, **asked)


_add("pingpong", ("pingpong",), "One-way latency: half a round trip, median and 99th percentile.")
_add("stream", ("stream",), "Throughput into the receiver's own buffer, and the CPU time it costs.")
_add("pairs", ("pairs",), "Many pairs at the same time, and a ping beside them.")
_add("connect", ("connect",), "Connections made and closed per second.")
_add("all", BENCHES, "All of them.")
