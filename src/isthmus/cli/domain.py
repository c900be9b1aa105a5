"""`isthmus domain`"""

from __future__ import annotations

import click

from isthmus.vm.lines import FORMATS, attachment_lines

from .client import ask
from .output import dir_option, json_option, runtime_dir, say_json, table, wants_json


@click.group()
def domain() -> None:
    """Add, list and remove domains."""


@domain.command()
@click.argument("name")
@click.option(
    "--group", help="Group; members of one group may talk to each other unless a policy says otherwise."
)
@click.option(
    "--kind",
    type=click.Choice(["container", "vm"]),
    default="container",
    show_default=True,
    help="What it is.",
)
@click.option("--for", "monitor", type=click.Choice(FORMATS), default="qemu", help="Of a vm: its monitor.")
@click.option(
    "--address",
    "addresses",
    multiple=True,
    help="An IP address that is the domain's alone, or a network it may have addresses of. Again for more.",
)
@click.option("--uid", type=int, help="The user whose programs may use the door (a broker run by root).")
@json_option
@dir_option
@click.pass_context
def add(
    ctx: click.Context,
    name: str,
    group: str | None,
    kind: str,
    monitor: str,
    addresses: tuple[str, ...],
    uid: int | None,
    as_json: bool,
    directory: str | None,
) -> None:
    """Add a domain and open its door.

    Mount the directory that is printed into the container; or give the lines to the monitor of the guest.
    """
    answer = ask(
        runtime_dir(ctx, directory),
        "domain-add",
        name=name,
        group=group,
        uid=uid,
        kind=kind,
        addresses=list(addresses),
    )
    if wants_json(ctx, as_json):
        say_json(answer)
    else:
        click.echo(
            answer["door"] if kind == "container" else attachment_lines(answer["socket"], monitor).rstrip()
        )


@domain.command("list")
@json_option
@dir_option
@click.pass_context
def list_(ctx: click.Context, as_json: bool, directory: str | None) -> None:
    """List the domains of this node."""
    answer = ask(runtime_dir(ctx, directory), "domain-list")
    if wants_json(ctx, as_json):
        say_json(answer["domains"])
        return
    rows = (
        (
            d["number"],
            d["name"],
            d["group"],
            d["kind"],
            "" if d["uid"] is None else d["uid"],
            d["origin"],
            d["attachments"],
            d["connections"],
            d["door"],
        )
        for d in answer["domains"]
    )
    table(
        None, (">number", "name", "group", "kind", ">uid", "from", ">programs", ">connections", "door"), rows
    )


@domain.command()
@click.argument("name")
@json_option
@dir_option
@click.pass_context
def remove(ctx: click.Context, name: str, as_json: bool, directory: str | None) -> None:
    """Remove a domain: its connections are cut, its programs are sent away."""
    answer = ask(runtime_dir(ctx, directory), "domain-remove", name=name)
    if wants_json(ctx, as_json):
        say_json(answer)
    else:
        click.echo(f"{name} is removed; {answer['cut']} connections were cut")
