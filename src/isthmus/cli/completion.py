"""`isthmus completion`"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell, for example: eval "$(isthmus completion bash)"."""
    from .app import root

    made = get_completion_class(shell)
    assert made is not None  # click knows all three
    click.echo(made(root, {}, "isthmus", "_ISTHMUS_COMPLETE").source())
