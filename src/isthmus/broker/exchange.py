"""Would a program under `isthmus run` be exchanged? As far as the broker can know before one tries.

What only the programs' kernels know stays open: from which address a program would come, and whether the
listener's network has the address that the directory gives it. Whoever has tried has left a fallback behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from isthmus._native import ANY_PORT

from .addresses import owns, parse
from .answers import Refuse
from .report import describe_fallbacks

if TYPE_CHECKING:
    from .core import Broker
    from .directory import Binding, Domain

#: What the supervisor of a listener that got no port writes in the place of an address.
_ANYWHERE = ("0.0.0.0", "::")
_GIVE_IT = "isthmus domain add --address, or addresses in the policy"


def exchange(broker: Broker, source: Domain, destination: Domain, port: int | None) -> dict[str, Any]:
    """Whether connections of unmodified programs to this port, or to some port, become sockets.

    ``exchanged`` is None where that depends on what the broker does not know.
    """
    addresses = _addresses(broker, destination)
    ports = _ports(broker, source, destination, port)
    against = list(_against(broker, source, destination, port, addresses, ports))
    notes = []
    unsure = not against and not source.addresses
    if unsure:
        notes.append(
            f"{source.name} has no address: its programs are refused where they come from one; {_GIVE_IT}"
        )
    if addresses:
        notes.append(f"{destination.name} has {', '.join(addresses)}")
    return {
        "exchanged": False if against else None if unsure else True,
        "addresses": addresses,
        "ports": ports,
        "notes": [*against, *notes],
        "fallbacks": _fallbacks(broker, source, destination, port),
    }


def _addresses(broker: Broker, domain: Domain) -> list[str]:
    """The addresses that lead to this domain now."""
    found = []
    for address in broker.addresses.of(domain):
        try:
            if broker.addresses.owner(address) is domain:
                found.append(str(address))
        except Refuse:
            pass  # Another one claims it too, so it leads nowhere.
    return found


def _ports(broker: Broker, source: Domain, destination: Domain, port: int | None) -> list[int]:
    """Where programs take kernel sockets, of those ports that the policy opens."""
    leased = sorted(destination.leases) if port is None else [port]
    found = ((number, destination.listener(number, source.number)) for number in leased)
    return [
        number
        for number, binding in found
        if binding is not None
        and _takes_streams(binding)
        and broker.policy.look(source, destination, number).accepted
    ]


def _takes_streams(binding: Binding) -> bool:
    """Is it the listener of an unmodified program, or of `isthmus.kernel_server`?"""
    return binding.attachment.brings_sockets and binding.kind == "stream" and binding.port != ANY_PORT


def _against(
    broker: Broker,
    source: Domain,
    destination: Domain,
    port: int | None,
    addresses: list[str],
    ports: list[int],
) -> Iterator[str]:
    """Why they take the network, in words."""
    name = destination.name
    if source is destination:
        yield "a container's connections to itself are left as they are"
    if not destination.addresses:
        yield f"{name} has no address that a program could connect to; {_GIVE_IT}"
    elif not addresses:
        networks = ", ".join(str(network) for network in destination.addresses)
        yield f"{name} may have addresses in {networks}, and no program of it alone says that it has one"
    if port is not None:
        decision = broker.policy.look(source, destination, port)
        binding = destination.listener(port, source.number)
        if not decision.accepted:
            yield decision.why
        elif binding is None or binding.port == ANY_PORT:
            yield f"nobody listens at {name}:{port} under isthmus run"
        elif binding.kind != "stream":
            yield f"{name}:{port}: a {binding.kind} listener, not stream"
        elif not _takes_streams(binding):
            yield f"whoever listens at {name}:{port} uses Isthmus itself and takes no kernel sockets"
    elif not ports:
        yield f"nobody listens at {name} under isthmus run where the policy lets {source.name}"
    over = source.over(destination, 0, 0) or destination.over(source, 0, 0)
    if over is not None:
        yield f"limit reached: {over}"


def _fallbacks(broker: Broker, source: Domain, destination: Domain, port: int | None) -> list[dict[str, Any]]:
    """What took the network between the two; the last to happen is last."""

    def meant(entry: dict[str, Any]) -> bool:
        return port in (None, entry["to_port"])

    def came_over_tcp(entry: dict[str, Any]) -> bool:
        return entry["why"].startswith("accept:") and _leads_to(broker, source, entry["to"])

    found = [e for e in describe_fallbacks(source) if meant(e) and _leads_to(broker, destination, e["to"])]
    if source is not destination:
        # Of a listener that got no port, and of what came to one although it must not.
        theirs = describe_fallbacks(destination)
        found += [e for e in theirs if (e["to"] in _ANYWHERE and meant(e)) or came_over_tcp(e)]
    return sorted(found, key=lambda entry: float(entry["last"]))


def _leads_to(broker: Broker, domain: Domain, text: str) -> bool:
    try:
        address = parse(text)
        return owns(domain, address) and broker.addresses.owner(address) in (None, domain)
    except (ValueError, Refuse):
        return False
