"""`isthmus forward`"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from pathlib import Path

import click

from .output import EXIT_NO_BROKER, Problem, json_option, size, wants_json


@click.command()
@click.argument("here", metavar="FROM")
@click.argument("there", metavar="TO")
@click.option(
    "--door", type=click.Path(path_type=Path), help="The door of the domain this is for [ISTHMUS_DOOR]."
)
@click.option("--limit", type=click.IntRange(1), default=1024, show_default=True, help="Connections at once.")
@click.option("--ready", is_flag=True, help='Print "ready" when connections can come.')
@click.option("-v", "--verbose", is_flag=True, help="A line for each connection that is over.")
@json_option
@click.pass_context
def forward(
    ctx: click.Context,
    here: str,
    there: str,
    door: Path | None,
    limit: int,
    ready: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Pass connections on between this domain and programs that know nothing of Isthmus.

    \b
    FROM  unix:PATH  tcp:HOST:PORT  :PORT (of this domain)  hybrid:PATH
    TO    unix:PATH  tcp:HOST:PORT  DOMAIN:PORT             DOMAIN (with hybrid)

    \b
    isthmus forward :5432 unix:/run/postgresql/.s.PGSQL.5432
    isthmus forward tcp:127.0.0.1:8080 web:80
    isthmus forward hybrid:/run/worker.sock worker

    Clients of a hybrid socket say "CONNECT port" first, as with the socket devices of other monitors. With
    --json each connection that is over is one object on a line.
    """
    from isthmus import errors
    from isthmus.forward import Ended, Forwarder, endpoint
    from isthmus.node import attach

    in_json = wants_json(ctx, as_json)

    def tell(ended: Ended) -> None:
        if in_json:
            click.echo(json.dumps(vars(ended)))
        elif verbose or ended.error is not None:
            moved = f"{size(ended.forth)} forth, {size(ended.back)} back in {ended.seconds:.3g} s"
            click.echo(f"connection {ended.number}: {ended.error or moved}", err=True)

    async def serve() -> None:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        ends = endpoint(here), endpoint(there)
        node = attach(door) if any(end.kind == "domain" for end in ends) else None
        async with Forwarder(*ends, node=node, limit=limit, ended=tell) as forwarder:
            if ready:
                click.echo("ready")
            with contextlib.suppress(asyncio.CancelledError):
                await forwarder.serve()

    try:
        asyncio.run(serve())
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except errors.NoBroker as error:
        raise Problem(str(error), EXIT_NO_BROKER) from None
    except OSError as error:
        raise Problem(f"{here}: {error.strerror or error}") from None
