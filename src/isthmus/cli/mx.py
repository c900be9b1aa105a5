"""`isthmus mx`"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import isthmus

from .output import EXIT_NO_BROKER, Problem, json_option, say_json, table, wants_json

if TYPE_CHECKING:
    from isthmus.card import Card
    from isthmus.node import Node

#: The headers and the library of MX, beside the rest of the package.
MYRIEXPRESS = Path(isthmus.__file__).parent / "_myriexpress"


@click.group()
def mx() -> None:
    """MX: message passing by matching, for C programs too."""


@mx.command()
@json_option
@click.pass_context
def cflags(ctx: click.Context, as_json: bool) -> None:
    """Print what a compiler must be told to find myriexpress.h.

    \b
    cc $(isthmus mx cflags) program.c $(isthmus mx libs)
    """
    include = _shipped("include", "myriexpress.h")
    _say(ctx, as_json, [f"-I{include}"])


@mx.command()
@json_option
@click.pass_context
def libs(ctx: click.Context, as_json: bool) -> None:
    """Print what a linker must be told to find libmyriexpress.so, now and when the program runs."""
    lib = _shipped("lib", "libmyriexpress.so")
    _say(ctx, as_json, [f"-L{lib}", f"-Wl,-rpath,{lib}", "-lmyriexpress"])


@mx.command()
@json_option
@click.pass_context
def info(ctx: click.Context, as_json: bool) -> None:
    """Show this domain's virtual network card, and whether it reaches other nodes."""
    from isthmus.mx import format_nic

    node = _node()
    nic, _, domain = node.native.find_nic(0, "")
    known: dict[str, Any] = {"domain": domain, "nic": format_nic(nic), "card": False, "why": None}
    try:
        with _card(node):
            known["card"] = True
    except Problem as problem:
        known["why"] = str(problem)
    if wants_json(ctx, as_json):
        return say_json(known)
    click.echo(f"{domain}: {known['nic']}")
    click.echo("other nodes: through the card" if known["card"] else f"other nodes: no; {known['why']}")


@mx.command()
@json_option
@click.pass_context
def peers(ctx: click.Context, as_json: bool) -> None:
    """List the stations that the card knows, the domains of this node among them."""
    from isthmus.mx import format_nic

    with _card(_node()) as card:
        stations = card.stations()
    if wants_json(ctx, as_json):
        return say_json([{"index": s.index, "nic": format_nic(s.nic), "name": s.name} for s in stations])
    table(None, ("index", "address", "name"), [(s.index, format_nic(s.nic), s.name or "?") for s in stations])


@mx.command()
@json_option
@click.pass_context
def counters(ctx: click.Context, as_json: bool) -> None:
    """Show what the card counted for this domain."""
    with _card(_node()) as card:
        counted = card.counters()
    if wants_json(ctx, as_json):
        return say_json(counted)
    table(None, ("what", "count"), [(name.replace("_", " "), value) for name, value in counted.items()])


def _node() -> Node:
    from isthmus import attach, errors

    try:
        return attach()
    except errors.NoBroker as error:
        raise Problem(str(error.strerror), EXIT_NO_BROKER) from None


@contextlib.contextmanager
def _card(node: Node) -> Iterator[Card]:
    """The card, asked through a line of our own."""
    from isthmus import errors
    from isthmus.card import Card

    try:
        with Card(node) as card:
            yield card
    except errors.UnknownDomain:
        raise Problem("this node has no card; see isthmus card --help") from None
    except errors.IsthmusError as error:
        raise Problem(f"the card: {error.strerror or error}") from None


def _shipped(directory: str, file: str) -> Path:
    there = MYRIEXPRESS / directory
    if not (there / file).is_file():
        raise Problem(
            f"{there / file}: not there; this isthmus was built without it. Build one with: make wheel"
        )
    return there


def _say(ctx: click.Context, as_json: bool, flags: list[str]) -> None:
    if wants_json(ctx, as_json):
        say_json(flags)
    else:
        click.echo(shlex.join(flags))
