"""Which path a connection would take, by which rule, and why not another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from isthmus._native import ANY_PORT

from .connection import SOCKET, path_of
from .exchange import exchange
from .policy import PORT_MAX, Decision

if TYPE_CHECKING:
    from .core import Broker
    from .directory import Binding, Domain


def explain(broker: Broker, source: Domain, destination: Domain, port: int | None) -> dict[str, Any]:
    """The answer to `isthmus explain`; without a port, one entry for each range of ports treated alike."""
    if port is not None:
        ranges = [(port, port, broker.policy.look(source, destination, port))]
    else:
        ranges = broker.policy.segments(source, destination)
    return {
        "from": source.name,
        "to": destination.name,
        "port": port,
        "ranges": [_entry(broker, source, destination, *found) for found in ranges],
        "run": exchange(broker, source, destination, port),
    }


def _entry(
    broker: Broker, source: Domain, destination: Domain, low: int, high: int, decision: Decision
) -> dict[str, Any]:
    path = path_of(decision, source, destination) if decision.accepted else None
    if low == high and path not in (None, "switch"):
        binding = destination.listener(low, source.number)
        if binding is not None and binding.attachment.brings_sockets and binding.port != ANY_PORT:
            path = SOCKET
    return {
        "ports": str(low) if low == high else f"{low}-{high}",
        "action": decision.action,
        "rule": decision.rule,
        "path": path,
        "why": decision.why,
        "notes": list(_notes(broker, source, destination, low, high, decision, path)),
    }


def _notes(
    broker: Broker,
    source: Domain,
    destination: Domain,
    low: int,
    high: int,
    decision: Decision,
    path: str | None,
) -> list[str]:
    notes = []
    if path == "switch":
        notes.append("a guest shares no page with anybody; switch is the only path inside a node for it")
    elif path == "sealed":
        notes.append("sealed is the best path inside one kernel; nothing better was passed over")
    elif path == "put":
        notes.append(
            f"not sealed, which is faster: rule {decision.rule} says strict, so no page may be shared"
        )
    elif path == SOCKET:
        notes.append("isthmus run and isthmus.kernel_socket lead there; isthmus.create_connection is refused")
    else:
        if decision.action == "drop":
            notes.append("the program that asks is told that nobody listens")
        later = [
            r for r in broker.policy.rules if r.action == "accept" and r.matches(source, destination, low)
        ]
        if decision.matched is not None and later:
            notes.append(f"{later[0].says} would accept it, but {decision.matched.says} comes first")
        elif decision.matched is None:
            rule = f'[[rule]]\nfrom = "{source.name}"\nto = "{destination.name}"\naction = "accept"'
            notes.append(f"to open it, add to the policy file:\n{rule}")
    if path is not None:
        matched = decision.matched
        if matched is not None and matched.unenforced and path != "switch":
            notes.append(
                f"{', '.join(matched.unenforced)} of {matched.says} not enforced here: "
                f"{_on(path)} nobody stands between the two ends"
            )
        for here, peer in ((source, destination), (destination, source)):
            over = here.over(peer, 0, 0) if path == SOCKET else here.over(peer, 0)
            if over is not None:
                notes.append(f"would be refused now: limit reached: {over}")
        if low == high:
            binding = destination.listener(low, source.number)
            if binding is None:
                notes.append(f"nobody listens at {destination.name}:{low} now")
            else:
                notes.append(
                    "the guest is asked whether a program of it listens there"
                    if binding.port == ANY_PORT
                    else f"process {binding.attachment.pid} listens there ({_taken(binding)})"
                )
        elif high != PORT_MAX or low != 1:
            notes.append("other ports are decided by other rules")
    return notes


def _on(path: str) -> str:
    return "on a socket" if path == SOCKET else f"on a {path} lane"


def _taken(binding: Binding) -> str:
    """What a listener takes."""
    return f"{binding.kind}, kernel sockets alone" if binding.attachment.brings_sockets else binding.kind
