"""`isthmus metrics`"""

from __future__ import annotations

import click

from .client import ask
from .output import dir_option, json_option, runtime_dir, say_json, wants_json


@click.command()
@json_option
@dir_option
@click.pass_context
def metrics(ctx: click.Context, as_json: bool, directory: str | None) -> None:
    """Print the figures for Prometheus."""
    text = ask(runtime_dir(ctx, directory), "metrics")["text"]
    if wants_json(ctx, as_json):
        samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        say_json({name: float(value) for name, _, value in samples})
    else:
        click.echo(text, nl=False)
