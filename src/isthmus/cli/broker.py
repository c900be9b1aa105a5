"""`isthmus broker`"""

from __future__ import annotations

from pathlib import Path

import click

from .output import Problem, dir_option, runtime_dir


@click.command()
@dir_option
@click.option(
    "--policy", type=click.Path(path_type=Path), help="Policy file; the default is the machine's or none."
)
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="Where to keep domains and the ticket key [STATE_DIRECTORY, else --dir].",
)
@click.option(
    "--metrics-http", metavar="ADDRESS:PORT", help="Serve figures on this loopback address as well."
)
@click.option(
    "--log", "style", type=click.Choice(["auto", "json", "text"]), default="auto", show_default=True
)
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
@click.pass_context
def broker(
    ctx: click.Context,
    directory: str | None,
    policy: Path | None,
    state: Path | None,
    metrics_http: str | None,
    style: str,
    log_level: str,
) -> None:
    """Run the broker of this node in the foreground.

    Without a policy, members of one group may talk to each other.
    """
    import asyncio

    from isthmus.broker.log import Log
    from isthmus.broker.metrics import parse_address
    from isthmus.broker.places import policy_file, state_directory
    from isthmus.broker.service import Service, ServiceError

    try:
        http = parse_address(metrics_http) if metrics_http is not None else None
    except ValueError as error:
        raise click.UsageError(f"--metrics-http: {error}") from None

    async def serve() -> None:
        service = Service(
            runtime_dir(ctx, directory),
            policy_path=policy if policy is not None else policy_file(),
            state_directory=state if state is not None else state_directory(),
            metrics_http=http,
            log=Log(style=style, level=log_level),
        )
        await service.run()

    try:
        asyncio.run(serve())
    except ServiceError as error:
        raise Problem(str(error)) from None
