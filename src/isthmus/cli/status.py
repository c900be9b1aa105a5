"""`isthmus status`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .client import DoorClient, ask, door_here
from .output import (
    EXIT_NO_BROKER,
    Problem,
    address_and_port,
    dir_option,
    json_option,
    runtime_dir,
    say_json,
    size,
    table,
    wants_json,
)


@click.command()
@click.argument("domain", required=False)
@json_option
@dir_option
@click.pass_context
def status(ctx: click.Context, domain: str | None, as_json: bool, directory: str | None) -> None:
    """Show domains, connections and their paths.

    The operator sees the node, or one DOMAIN closely. Who is not the operator sees the domain behind the
    door that ISTHMUS_DOOR names, or the one in the usual place.
    """
    try:
        answer = ask(runtime_dir(ctx, directory), "status", domain=domain)
    except Problem as problem:
        door = door_here()
        if problem.exit_code != EXIT_NO_BROKER or door is None:
            raise
        answer = {"domain": _through_door(door, domain)}
    if wants_json(ctx, as_json):
        say_json(answer)
    elif "domains" in answer:
        _show_node(answer)
    else:
        _show_domain(answer["domain"])


def _through_door(door: Path, domain: str | None) -> dict[str, Any]:
    with DoorClient(door) as client:
        if domain not in (None, client.welcome["domain_name"], str(client.welcome["domain"])):
            name = client.welcome["domain_name"]
            raise Problem(f"domain {domain}: through {door} only domain {name} can be seen; ask the operator")
        return client.status()


def _show_node(answer: dict[str, Any]) -> None:
    policy = answer["policy"] or "built-in: members of one group may talk to each other"
    click.echo(f"node {answer['node']}  broker {answer['pid']}  {answer['dir']}")
    click.echo(f"policy {policy}")
    if answer["policy_error"]:
        click.echo(f"  NOT IN FORCE: {answer['policy_error']}")
    for note in answer["notes"]:
        click.echo(f"  note: {note}")
    click.echo()
    rows = (
        (d["number"], d["domain"], d["group"], *map(_held, d["holds"].items())) for d in answer["domains"]
    )
    columns = (
        ">number",
        "domain",
        "group",
        ">attachments",
        ">ports",
        ">connections",
        ">lanes",
        ">memory",
        ">pending",
    )
    table(None, columns, rows)
    if answer["connections"]:
        click.echo()
        _show_connections(answer["connections"], with_domain=True)
        left = answer["connections_total"] - len(answer["connections"])
        if left > 0:
            click.echo(f"and {left} more")
    _show_fallbacks(answer["fallbacks"], with_domain=True)
    if answer["refused"] or answer["cut"]:
        click.echo(f"\nrefused: {_counts(answer['refused'])}   cut: {answer['cut']}")


def _show_domain(domain: dict[str, Any]) -> None:
    click.echo(
        f"domain {domain['domain']} ({domain['number']}), group {domain['group']}, on node {domain['node']}"
    )
    rows = (
        (name, _held((name, [held, most])), _most(name, most))
        for name, (held, most) in domain["holds"].items()
    )
    table(None, ("", ">holds", ">may hold"), rows)
    if domain["ports"]:
        click.echo()
        rows_ = ((p["port"], p["kind"], p["partner"] or "anybody", p["pid"]) for p in domain["ports"])
        table(None, (">port", "kind", "for", ">process"), rows_)
    if domain["connections"]:
        click.echo()
        _show_connections(domain["connections"], with_domain=False)
    _show_fallbacks(domain["fallbacks"], with_domain=False)
    if domain["traffic"]:
        click.echo()
        rows_ = (
            (path, t["connections"], *_moved(t if path != "socket" else None))
            for path, t in domain["traffic"].items()
        )
        table(None, ("path", ">connections", ">sent", ">received"), rows_)
    if domain["switch_cpu_s"]:
        click.echo(f"\nprocessor time of the switch: {domain['switch_cpu_s']:.3g} s")
    if domain["refused"]:
        click.echo(f"\nrefused: {_counts(domain['refused'])}")


def _counts(refused: dict[str, int]) -> str:
    return "  ".join(f"{name} {count}" for name, count in refused.items()) or "none"


def _show_connections(connections: list[dict[str, Any]], *, with_domain: bool) -> None:
    def row(c: dict[str, Any]) -> tuple[object, ...]:
        here = f"{c['domain']}:{c['port']}" if with_domain else c["port"]
        arrow = "->" if c["opener"] else "<-"
        peer = f"{c['peer']}:{c['peer_port']}"
        moved = _moved(c if c["sent_bytes"] is not None else None)
        return here, arrow, peer, c["kind"], c["path"], c["state"], *moved, c["why"]

    columns = ("here", "", "peer", "kind", "path", "state", ">sent", ">received", "why")
    table(None, columns, map(row, connections))


def _moved(counters: dict[str, Any] | None) -> tuple[str, str]:
    """Bytes sent and received; nobody counts those of kernel sockets."""
    return (
        ("-", "-") if counters is None else (size(counters["sent_bytes"]), size(counters["received_bytes"]))
    )


def _show_fallbacks(fallbacks: list[dict[str, Any]], *, with_domain: bool) -> None:
    """What `isthmus run` left on the ordinary network, or refused with --require."""
    if not fallbacks:
        return

    def row(f: dict[str, Any]) -> tuple[object, ...]:
        domain = (f["domain"],) if with_domain else ()
        return (
            *domain,
            address_and_port(f["to"], f["to_port"]),
            f["count"],
            "refused" if f["refused"] else "tcp",
            f["why"],
        )

    click.echo()
    domain = ("domain",) if with_domain else ()
    table(None, (*domain, "not exchanged", ">times", "path", "why"), map(row, fallbacks))


def _held(entry: tuple[str, list[int]]) -> str:
    name, (held, _) = entry
    return size(held) if name == "memory" else str(held)


def _most(name: str, most: int) -> str:
    return size(most) if name == "memory" else str(most)
