"""`isthmus explain`"""

from __future__ import annotations

import click

from .client import ask
from .output import dir_option, json_option, runtime_dir, say_json, wants_json


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

    Exit code 1 if no port is open.
    """
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
    if not any(entry["path"] for entry in answer["ranges"]):
        ctx.exit(1)
