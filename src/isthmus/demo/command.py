"""Conducts the demo: a broker, two neighbours, their work, the paths, a short benchmark."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from isthmus.cli.output import EXIT_FAILED, Problem
from isthmus.demo import sandbox
from isthmus.demo.guests import show as show_guests
from isthmus.testing import PrivateBroker

__all__ = ["main"]

GIB = 1 << 30
MIB = 1 << 20
DOMAINS = ("web", "client")


class Neighbour:
    """One isolated program, and the events it prints."""

    def __init__(self, broker: PrivateBroker, domain: str, module: str, *arguments: str) -> None:
        words = [sys.executable, "-m", module, *arguments]
        self.process = subprocess.Popen(
            sandbox.command(broker.door(domain), words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.domain = domain

    def events(self) -> Iterator[dict[str, Any]]:
        """Its events until it ends.

        Raises
        ------
        Problem
            It failed; what it said is on standard error.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield json.loads(line)
        if self.process.wait() != 0:
            raise Problem(
                f"the neighbour {self.domain} ended with status {self.process.returncode}", EXIT_FAILED
            )

    def wait_for(self, event: str) -> dict[str, Any]:
        """Its next event of this name."""
        for said in self.events():
            if said["event"] == event:
                return said
        raise Problem(f"the neighbour {self.domain} ended early", EXIT_FAILED)

    def finish(self) -> None:
        """Let it go and wait for it."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        if self.domain == "web":
            self.process.kill()
        self.process.wait(20)
        if self.process.stdout is not None:
            self.process.stdout.close()


@click.command("demo")
@click.option(
    "--file-size", default="1GiB", help="Size of the file that crosses (MiB, GiB).", show_default=True
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("out"),
    show_default=True,
    help="Where the figures and the plots go.",
)
@click.option("--bench/--no-bench", default=True, help="End with a short benchmark.")
@click.option("--guests/--no-guests", default=True, help="Begin with two virtual machines.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end and nothing else.")
def main(file_size: str, out: Path, bench: bool, guests: bool, as_json: bool) -> None:
    """Two virtual machines, then two isolated neighbours, at work.

    Boots two small guests where this machine can, and shows sockets between them. Then starts a broker of its
    own, makes two containers that share nothing but their door, and moves a web page, a file and NumPy arrays
    between them, hashed at both ends. Says which path each connection took and why, and how fast that is
    beside what is used today.
    """
    size = _bytes(file_size)
    if reason := sandbox.missing():
        raise Problem(f"demo: {reason}", EXIT_FAILED)
    free = shutil.disk_usage("/dev/shm").free
    if free < 2 * size:
        raise Problem(
            f"demo: {2 * size // MIB} MiB of memory needed, {free // MIB} MiB free; use --file-size"
        )
    console = Console(quiet=as_json)
    summary: dict[str, Any] = {}
    if guests:
        summary["guests"] = show_guests(console, bench=bench)
    with ExitStack() as stack:
        broker = stack.enter_context(PrivateBroker(DOMAINS))
        console.print(f"[bold]broker[/] {broker.pid}, one door for each of {' and '.join(DOMAINS)}")
        web = Neighbour(broker, "web", "isthmus.demo.server")
        stack.callback(web.finish)
        ready = web.wait_for("ready")
        client = Neighbour(broker, "client", "isthmus.demo.client", str(size))
        stack.callback(client.finish)
        summary["namespaces"] = _check_isolation(console, ready, client.wait_for("started"))
        summary["work"], summary["paths"] = _watch(console, client, as_json)
        _show_paths(console, summary["paths"], broker.ask("status"))
    if bench:
        summary["bench"] = _bench(console, out, as_json)
    if as_json:
        click.echo(json.dumps(summary))


def _check_isolation(console: Console, web: dict[str, Any], client: dict[str, Any]) -> dict[str, Any]:
    """Compare the namespaces of both neighbours and of this process."""
    table = Table("namespace", "host", *DOMAINS, title="Three parties, no namespace in common")
    host = sandbox.namespaces()
    for name, here in host.items():
        found = [here, web["namespaces"][name], client["namespaces"][name]]
        if len(set(found)) != len(found):
            raise Problem(f"demo: a {name} namespace is shared", EXIT_FAILED)
        table.add_row(name, *(entry.partition(":")[2] for entry in found))
    console.print(table)
    return {"host": host, "web": web["namespaces"], "client": client["namespaces"]}


def _watch(console: Console, client: Neighbour, quiet: bool) -> tuple[list[Any], list[Any]]:
    """Show the client's progress until its work is done."""
    work: list[Any] = []
    paths: list[Any] = []
    columns = (TextColumn("{task.description:18}"), BarColumn(), DownloadColumn(True), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=quiet) as progress:
        tasks: dict[str, TaskID] = {}
        for event in client.events():
            if event["event"] == "progress":
                task = tasks.get(event["what"])
                if task is None:
                    task = tasks[event["what"]] = progress.add_task(event["what"], total=event["of"])
                progress.update(task, completed=event["done"])
            elif event["event"] == "http":
                progress.console.print(f"[green]✓[/] urllib3 got {event['status']}: {event['text']!r}")
            elif event["event"] == "checked":
                work.append(event)
                speed = f", {event['bytes'] / event['seconds'] / 1e9:.2f} GB/s" if event["seconds"] else ""
                progress.console.print(
                    f"[green]✓[/] {event['what']}: {event['bytes'] / MIB:,.0f} MiB, same SHA-256 at both "
                    f"ends{speed}{' with hashing' if speed else ''}"
                )
            elif event["event"] == "path":
                paths.append(event)
            elif event["event"] == "done":
                return work, paths
    raise Problem("the neighbour client ended early", EXIT_FAILED)


def _show_paths(console: Console, paths: list[Any], status: dict[str, Any]) -> None:
    """The path of each connection, as the programs saw it, and what the broker counted."""
    table = Table("connection", "to", "path", "why", title="Which path each connection took")
    for path in paths:
        table.add_row(path["what"], path["peer"], path["path"], path["why"])
    console.print(table)
    console.print(
        f"the broker counts {len(status.get('connections', []))} connection open now, no byte of it its own"
    )


def _bench(console: Console, out: Path, quiet: bool) -> list[Any]:
    """A short benchmark with plots."""
    console.print(
        "[bold]benchmark[/]: the same loops over what you use today, interleaved (about two minutes)"
    )
    words = [sys.executable, "-m", "isthmus", "bench", "all", "--quick", "--out", str(out)]
    if quiet:
        words.append("--json")
    done = subprocess.run(words, stdout=subprocess.PIPE if quiet else None, check=False, text=True)
    if done.returncode != 0:
        raise Problem(f"the benchmark ended with status {done.returncode}", EXIT_FAILED)
    return list(json.loads(done.stdout)) if quiet else []


def _bytes(text: str) -> int:
    """A size such as 64MiB."""
    for suffix, unit in (("GiB", GIB), ("MiB", MIB)):
        number = text.removesuffix(suffix)
        if number != text and number.isdigit() and int(number) > 0:
            return int(number) * unit
    raise click.BadParameter(f"{text}: write 64MiB or 1GiB", param_hint="--file-size")
