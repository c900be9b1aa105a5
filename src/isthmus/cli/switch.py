"""`isthmus switch`"""

from __future__ import annotations

import click

from .output import Problem, dir_option, runtime_dir


@click.command()
@dir_option
@click.option("--stay", is_flag=True, help="Stay also while there is neither a broker nor a guest.")
@click.option("--no-sandbox", is_flag=True, help="For kernels without seccomp, and for debuggers.")
@click.pass_context
def switch(ctx: click.Context, directory: str | None, stay: bool, no_sandbox: bool) -> None:
    """Run the switch: the socket device of all guests.

    The broker starts it when there is a guest, and it outlives the broker: guests keep their connections
    while the broker is away, but they lose their device for good when the switch ends. It confines itself:
    once it serves, it can start no program, open no file and reach no network.
    """
    from isthmus.broker.switch import ServeError, serve

    try:
        serve(runtime_dir(ctx, directory), stay=stay, confined=not no_sandbox)
    except ServeError as error:
        raise Problem(str(error)) from None
