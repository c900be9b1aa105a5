"""`isthmus reload`"""

from __future__ import annotations

import click

from .client import ask
from .output import dir_option, json_option, runtime_dir, say_json, wants_json


@click.command()
@json_option
@dir_option
@click.pass_context
def reload(ctx: click.Context, as_json: bool, directory: str | None) -> None:
    """Read the policy file again, whole or not at all. Connections that it no longer allows are cut."""
    answer = ask(runtime_dir(ctx, directory), "reload")
    if wants_json(ctx, as_json):
        say_json(answer)
        return
    click.echo(
        f"{answer['policy'] or 'the built-in policy'} is in force; {answer['cut']} connections were cut"
    )
    for note in answer["notes"]:
        click.echo(f"note: {note}")
