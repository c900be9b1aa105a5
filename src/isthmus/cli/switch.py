"""`isthmus switch`"""

from __future__ import annotations

import math

import click

from .output import Problem, dir_option, runtime_dir


def _poll(_: click.Context, __: click.Parameter, value: str) -> float:
    if value == "always":
        return math.inf
    if not value.isdigit():
        raise click.BadParameter(f'{value}: microseconds, or "always"')
    return int(value) / 1e6


@click.command()
@dir_option
@click.option("--stay", is_flag=True, help="Stay also while there is neither a broker nor a guest.")
@click.option("--no-sandbox", is_flag=True, help="For kernels without seccomp, and for debuggers.")
@click.option(
    "--poll",
    metavar="US",
    default="0",
    callback=_poll,
    help='Look at lanes for so many microseconds after something was moved, or "always".',
)
@click.pass_context
def switch(ctx: click.Context, directory: str | None, stay: bool, no_sandbox: bool, poll: float) -> None:
    """Run the switch: the socket device of all guests.

    The broker starts it when there is a guest, and it outlives the broker: guests keep their connections
    while the broker is away, but they lose their device for good when the switch ends. It confines itself:
    once it serves, it can start no program, open no file and reach no network.

    A program of a guest rings for the switch when that sleeps. With --poll it sleeps later, or never: for a
    machine with a processor to spare. To choose, start it yourself, before the broker: isthmus switch --stay
    --poll always. On few processors this makes everything slower.
    """
    from isthmus.broker.switch import ServeError, serve

    try:
        serve(runtime_dir(ctx, directory), stay=stay, confined=not no_sandbox, poll_s=poll)
    except ServeError as error:
        raise Problem(str(error)) from None
