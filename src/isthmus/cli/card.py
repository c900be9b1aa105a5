"""`isthmus card`"""

from __future__ import annotations

import secrets
import signal
from types import FrameType

import click

from .output import Problem


def _own(_: click.Context, __: click.Parameter, value: int) -> int:
    if value and not 576 <= value <= 65535:
        raise click.BadParameter(f"{value}: from 576 to 65535, or 0 for the dialect of MX")
    return value


def _peer(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[tuple[int, str]]:
    peers = []
    for value in values:
        mac, found, name = value.partition("=")
        try:
            octets = bytes.fromhex(mac.replace(":", ""))
        except ValueError:
            octets = b""
        if not found or len(octets) != 6 or not 0 < len(name.encode()) <= 80:
            raise click.BadParameter(f"{value}: MAC=NAME, as in 02:00:00:00:00:07=node7:0")
        peers.append((int.from_bytes(octets, "big"), name))
    return peers


@click.command()
@click.option("--interface", required=True, metavar="NAME", help="The network interface to own.")
@click.option(
    "--door", metavar="PATH", help="Door of the card's domain [the environment's, or the usual one]."
)
@click.option("--own", type=int, default=0, metavar="MTU", callback=_own, help="Open-MX's own dialect.")
@click.option("--peer", "peers", multiple=True, metavar="MAC=NAME", callback=_peer, help="Name a station.")
@click.option(
    "--poll", type=click.IntRange(0), default=0, metavar="US", help="Look for so long before sleeping."
)
@click.option("--ready", is_flag=True, help='Print "ready" when programs can connect.')
# Of a million frames so many are lost on purpose: for tests and benches where the kernel has no netem.
@click.option("--lose", type=click.IntRange(0, 1_000_000), default=0, metavar="PPM", hidden=True)
def card(
    interface: str,
    door: str | None,
    own: int,
    peers: list[tuple[int, str]],
    poll: int,
    ready: bool,
    lose: int,
) -> None:
    """Own a network interface and lend it to domains, for MX between nodes.

    Each domain that may connect to the card's domain has a virtual network card there, with an address and
    endpoints of its own. Nobody hears another's frames or speaks in another's name.
    """
    from isthmus import _native
    from isthmus.node import find_door

    def stop(_: int, __: FrameType | None) -> None:
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        _native.run_card(
            interface,
            find_door(door),
            lambda: click.echo("ready") if ready else None,
            poll_us=poll,
            own_mtu=own,
            peers=peers,
            serial=secrets.randbits(32),
            lost=lose,
        )
    except OSError as error:
        raise Problem(f"{interface}: {error.strerror or error}") from None
