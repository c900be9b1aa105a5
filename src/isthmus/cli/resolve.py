"""`isthmus resolve`"""

from __future__ import annotations

from typing import Any

import click

from .client import DoorClient, door_here
from .output import EXIT_NO_BROKER, Problem, json_option, say_json, wants_json


@click.command()
@click.argument("name")
@json_option
@click.pass_context
def resolve(ctx: click.Context, name: str, as_json: bool) -> None:
    """Print the number of domain NAME: what AF_VSOCK calls its CID.

    Works in containers, and in guests also without an agent.

    \b
    socat - VSOCK-CONNECT:$(isthmus resolve store):9000
    """
    number = _number(name)
    if wants_json(ctx, as_json):
        say_json({"name": name, "number": number})
    else:
        click.echo(str(number))


def _number(name: str) -> int:
    door = door_here()
    if door is not None:
        with DoorClient(door) as client:
            found: dict[str, Any] = client.ask("resolve", "resolved", name=name)
            return int(found["domain"])
    from isthmus import errors, vsock
    from isthmus.node import DOOR_DEFAULT

    try:
        return vsock.resolve(name)
    except errors.NoBroker as error:
        raise Problem(f"no door at {DOOR_DEFAULT}, and {error.strerror}", EXIT_NO_BROKER) from None
    except errors.IsthmusError as error:
        raise Problem(str(error.strerror)) from None
