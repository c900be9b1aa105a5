"""What `status` shows: plain values for JSON. Long lists are cut short; the totals are always there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from isthmus._native import ANY_PORT, ANYBODY

from .connection import SOCKET, Connection, Side
from .directory import Domain, Traffic

if TYPE_CHECKING:
    from .core import Broker

#: Programs, ports and connections that one report lists.
ENTRIES_MAX = 1000


def traffic_now(
    domains: Iterable[Domain], connections: Iterable[Connection]
) -> dict[tuple[str, str], Traffic]:
    """What has gone over each path for each domain: what is accounted for, and what is still under way."""
    found: dict[tuple[str, str], Traffic] = {}
    for domain in domains:
        for path, account in domain.traffic.items():
            found[domain.name, path] = account.copy()
    for connection in connections:
        for side in (connection.opener, connection.accepter):
            if side.counters is not None:
                found.setdefault((side.domain.name, connection.carrier), Traffic()).add(side.counters.read())
    return found


def describe_domain(broker: Broker, domain: Domain) -> dict[str, Any]:
    """A domain, its programs, its ports and its connections. Nothing of any other domain but its name."""
    attachments = sorted(domain.attachments, key=lambda a: a.number)
    listeners = sorted(domain.listeners(), key=lambda b: (b.port, b.partner))
    sides = [side for attachment in attachments for side in attachment.sides if not side.connection.ahead]
    sides += [s for s in domain.sockets if s.attachment is None and not s.connection.ahead]
    traffic = traffic_now([domain], {side.connection for side in sides})
    return {
        **summarise_domain(broker, domain),
        "traffic": {
            path: traffic[name, path].as_dict() for name, path in sorted(traffic) if name == domain.name
        },
        "programs": [
            {
                "program": a.program,
                "pid": a.pid,
                "uid": a.uid,
                "ports": len(a.leases),
                "connections": len(a.sides),
            }
            for a in attachments[:ENTRIES_MAX]
        ],
        "ports": [
            {
                "port": b.port if b.port != ANY_PORT else "any",
                "kind": b.kind if b.port != ANY_PORT else "stream or seqpacket",
                "partner": _partner_name(broker, b.partner),
                "pid": b.attachment.pid,
            }
            for b in listeners[:ENTRIES_MAX]
        ],
        "connections": [describe_side(broker, side) for side in sides[:ENTRIES_MAX]],
        "fallbacks": describe_fallbacks(domain),
    }


def describe_fallbacks(domain: Domain) -> list[dict[str, Any]]:
    """What took the ordinary network, or was refused it, and why; the newest last."""
    return [
        {
            "domain": domain.name,
            "to": to,
            "to_port": port,
            "refused": refused,
            "why": why,
            "count": entry.count,
            "last": entry.last,
        }
        for (to, port, refused, why), entry in domain.fallbacks.items()
    ]


def summarise_domain(broker: Broker, domain: Domain) -> dict[str, Any]:
    limits = domain.limits
    return {
        "node": broker.node,
        "epoch": broker.epoch,
        "domain": domain.name,
        "number": domain.number,
        "group": domain.group,
        "kind": domain.kind,
        **({"device": broker.switch.state_of(domain)} if domain.kind == "vm" else {}),
        "switch_cpu_s": broker.switch.cpu_seconds_of(domain),
        "holds": {
            "attachments": [len(domain.attachments), limits.attachments],
            "ports": [domain.bound, limits.ports],
            "connections": [domain.connections, limits.connections],
            "lanes": [domain.lanes, limits.lanes],
            "memory": [domain.memory, limits.memory],
            "pending": [domain.pending, limits.pending],
        },
        "refused": dict(sorted(domain.refusals.items())),
    }


def describe_side(broker: Broker, side: Side) -> dict[str, Any]:
    connection = side.connection
    other = connection.accepter if side is connection.opener else connection.opener
    # Nobody counts what goes through a kernel socket.
    unknown = None if connection.carrier == SOCKET else 0
    counters = side.counters.read() if side.counters is not None else (unknown,) * 4
    return {
        "connection": f"{connection.number:016x}",
        "opener": side is connection.opener,
        "port": side.port,
        "peer": other.domain.name,
        "peer_port": other.port,
        "kind": connection.kind,
        "path": connection.carrier,
        "why": connection.why,
        "rule": connection.rule,
        "state": "pending" if connection.pending else "open" if other.held else "half",
        "seconds": round(broker.clock() - connection.since, 3),
        "windows": len(side.windows),
        "sent_bytes": counters[0],
        "sent_messages": counters[1],
        "received_bytes": counters[2],
        "received_messages": counters[3],
    }


def describe_connections(broker: Broker) -> Iterator[dict[str, Any]]:
    """Every connection, seen from its opener, or from its accepter where the opener has gone."""
    for connection in broker.introductions.connections.values():
        if connection.ahead:
            continue
        side = connection.opener if connection.opener.held else connection.accepter
        yield {"domain": side.domain.name, **describe_side(broker, side)}


def _partner_name(broker: Broker, partner: int) -> str | None:
    if partner == ANYBODY:
        return None
    domain = broker.domain_numbered(partner)
    return domain.name if domain is not None else str(partner)
