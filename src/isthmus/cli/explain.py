"""`isthmus explain`"""

from __future__ import annotations

import re
import time
from typing import Any

import click

from .client import ask
from .output import address_and_port, dir_option, json_option, runtime_dir, say_json, wants_json

#: ``cache:6379``, ``10.0.0.7:6379``, ``[fd00::7]:6379``; an address of IPv6 without brackets has no port.
_WITH_PORT = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<name>[^:\[\]]+)):(?P<port>\d{1,10})")


@click.command()
@click.argument("source", metavar="FROM")
@click.argument("destination", metavar="TO")
@click.option("--port", type=int, help="The port at TO; without it, every range that is treated alike.")
@json_option
@dir_option
@click.pass_context
def explain(
    ctx: click.Context, source: str, destination: str, port: int | None, as_json: bool, directory: str | None
) -> None:
    """Which path a connection FROM one domain TO another would take, by which rule, and why no other.

    A domain is named by its name, its number or an address of it; TO may have a port, as in
    10.0.0.7:6379. What is said of isthmus run is for unmodified programs. Exit code 1 if no port is open.
    """
    if found := _WITH_PORT.fullmatch(destination):
        destination, named = found["v6"] or found["name"], int(found["port"])
        if port not in (None, named):
            raise click.UsageError(f"--port {port}: TO names port {named}")
        port = named
    answer = ask(runtime_dir(ctx, directory), "explain", **{"from": source, "to": destination, "port": port})
    if wants_json(ctx, as_json):
        say_json(answer)
    else:
        for entry in answer["ranges"]:
            where = f"{answer['to']}:{entry['ports']}" if entry["ports"] != "1-4294967295" else answer["to"]
            outcome = f"path {entry['path']}" if entry["path"] else entry["action"]
            click.echo(f"{answer['from']} -> {where}: {outcome}")
            click.echo(f"  because {entry['why']}")
            for note in entry["notes"]:
                click.echo(f"  {note}")
        _show_run(answer["run"])
    if not any(entry["path"] for entry in answer["ranges"]):
        ctx.exit(1)


def _show_run(run: dict[str, Any]) -> None:
    """What becomes of unmodified programs."""
    ports = f" at {', '.join(map(str, run['ports']))}" if run["ports"] else ""
    outcome = {True: f"path socket{ports}", None: f"path socket{ports}, if it comes from no address"}
    click.echo(f"under isthmus run: {outcome.get(run['exchanged'], 'TCP')}")
    for note in run["notes"]:
        click.echo(f"  {note}")
    for entry in run["fallbacks"]:
        what = "refused" if entry["refused"] else "took the network"
        ago = max(0, round(time.time() - entry["last"]))
        where = address_and_port(entry["to"], entry["to_port"])
        times = "once" if entry["count"] == 1 else f"{entry['count']} times"
        click.echo(f"  {entry['domain']}, {where}: {what} {times}, {ago} s ago: {entry['why']}")
