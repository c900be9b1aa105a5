"""`isthmus agent`"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

import click

from .output import Problem


@click.command()
@click.option(
    "--door",
    type=click.Path(path_type=Path),
    help="Directory in which programs find their door [/run/isthmus/door].",
)
@click.option("--ready", is_flag=True, help='Print "ready" when programs can come.')
def agent(door: Path | None, ready: bool) -> None:
    """Run the agent of a guest: a door for its programs, and memory for their lanes.

    Runs in a virtual machine, as root; the programs it serves need not be.
    """
    from isthmus.agent import DOOR, Agent, AgentError

    async def serve() -> None:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await Agent(door or DOOR).run(lambda: click.echo("ready") if ready else None)

    try:
        asyncio.run(serve())
    except AgentError as error:
        raise Problem(str(error)) from None
