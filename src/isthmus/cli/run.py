"""`isthmus run`"""

from __future__ import annotations

import errno
from pathlib import Path

import click

from .output import Problem

#: As shells have it: not found, and found but not to be executed.
_EXIT_NOT_FOUND = 127
_EXIT_NOT_EXECUTABLE = 126


@click.command(context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@click.argument("program", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--door", type=click.Path(path_type=Path), help="The door of the domain this is in [ISTHMUS_DOOR]."
)
@click.option("--require", is_flag=True, help="Refuse connections that would have to take the network.")
@click.option("--io-uring", is_flag=True, help="Let programs make rings; who has one is reached over TCP.")
@click.option("-v", "--verbose", is_flag=True, help="A line on standard error for each connection.")
def run(program: tuple[str, ...], door: Path | None, require: bool, io_uring: bool, verbose: bool) -> None:
    """Run an unmodified program; its TCP connections to neighbours do not touch the network.

    \b
    isthmus run -- redis-server --bind 0.0.0.0
    isthmus run -- redis-benchmark -h 10.0.0.7

    A connection whose other end is a program under `isthmus run` in another domain of this node becomes a
    socket of this kernel. Every other one is left as it is; `isthmus status` says why. It ends as the program
    ends.
    """
    from isthmus.run import NotStarted, door_of
    from isthmus.run import run as run_program

    try:
        ended = run_program(
            list(program),
            door_of(str(door) if door else None),
            require=require,
            verbose=verbose,
            rings=io_uring,
        )
    except NotStarted as error:
        if error.errno == errno.EBUSY:
            raise Problem(
                f"{program[0]}: this already runs under `isthmus run`, or a container runtime answers its "
                "system calls; start it without another `isthmus run`",
                _EXIT_NOT_EXECUTABLE,
            ) from None
        code = _EXIT_NOT_FOUND if error.errno == errno.ENOENT else _EXIT_NOT_EXECUTABLE
        raise Problem(f"{program[0]}: {error.strerror}", code) from None
    ended.imitate()
