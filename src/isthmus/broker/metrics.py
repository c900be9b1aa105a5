"""Figures for Prometheus, in its text format. What each one means: docs/reference/metrics.md."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .report import traffic_now

if TYPE_CHECKING:
    from .service import Service

REQUEST_MAX_BYTES = 8 * 1024
REQUEST_S = 5.0
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Name, type, help. `render` refuses a name that is not here, and a test compares this list with its page.
FAMILIES: dict[str, tuple[str, str]] = {
    "isthmus_broker_info": ("gauge", "Always 1; which broker this is."),
    "isthmus_broker_epoch": ("gauge", "Lives of a broker on this state directory."),
    "isthmus_broker_start_time_seconds": ("gauge", "When the broker started, seconds since 1970."),
    "isthmus_broker_open_descriptors": ("gauge", "Descriptors the broker holds."),
    "isthmus_policy_reloads_total": ("counter", "Reloads of the policy by result."),
    "isthmus_policy_broken": (
        "gauge",
        "1 while the policy file cannot be used and an older one is in force.",
    ),
    "isthmus_rule_hits_total": ("counter", "Connections each rule decided about, since it was loaded."),
    "isthmus_rule_rejects_total": ("counter", "Connections refused or dropped by rules or for want of one."),
    "isthmus_domains": ("gauge", "Domains."),
    "isthmus_domain_attachments": ("gauge", "Programs attached."),
    "isthmus_domain_ports": ("gauge", "Listeners."),
    "isthmus_domain_connections": ("gauge", "Sides of connections held."),
    "isthmus_domain_pending": ("gauge", "Connections that wait for a listener's answer."),
    "isthmus_domain_lanes": ("gauge", "Lanes held."),
    "isthmus_domain_memory_bytes": ("gauge", "What the rings that the domain brought may grow to."),
    "isthmus_domain_limit": ("gauge", "What the domain may hold."),
    "isthmus_domain_control_messages_total": (
        "counter",
        "Messages from the domain's programs to the broker.",
    ),
    "isthmus_domain_throttled_total": (
        "counter",
        "Times a program was made to wait for sending too many of them.",
    ),
    "isthmus_domain_refused_total": ("counter", "Requests refused, by reason."),
    "isthmus_domain_connections_total": ("counter", "Connections opened or accepted, by path."),
    "isthmus_domain_sent_bytes_total": ("counter", "Bytes the domain's programs say they sent, by path."),
    "isthmus_domain_sent_messages_total": ("counter", "Messages they say they sent, by path."),
    "isthmus_domain_received_bytes_total": ("counter", "Bytes they say they received, by path."),
    "isthmus_domain_received_messages_total": ("counter", "Messages they say they received, by path."),
    "isthmus_domain_switch_cpu_seconds_total": (
        "counter",
        "Processor time of the switch spent for the domain.",
    ),
    "isthmus_connections_opened_total": ("counter", "Connections opened on this node, by path."),
    "isthmus_connections_open": ("gauge", "Connections the broker knows."),
    "isthmus_connections_cut_total": (
        "counter",
        "Connections cut by a change of the policy or of the domains.",
    ),
    "isthmus_sides_resumed_total": ("counter", "Sides of connections taken up again after a restart."),
    "isthmus_attachments_dropped_total": ("counter", "Programs sent away, by reason: fault or slow."),
}

Sample = tuple[str, dict[str, object], float]


def render(service: Service) -> str:
    """The whole page."""
    found: dict[str, list[str]] = {name: [] for name in FAMILIES}
    for name, labels, value in _samples(service):
        inner = ",".join(f'{key}="{_escaped(str(label))}"' for key, label in labels.items())
        number = repr(value) if isinstance(value, float) else str(value)
        found[name].append(f"{name}{{{inner}}} {number}" if inner else f"{name} {number}")
    lines: list[str] = []
    for name, (kind, text) in FAMILIES.items():
        lines += (f"# HELP {name} {text}", f"# TYPE {name} {kind}", *found[name])
    return "\n".join(lines) + "\n"


def _samples(service: Service) -> Iterable[Sample]:
    broker = service.broker
    policy = broker.policy
    yield "isthmus_broker_info", {"node": broker.node, "pid": os.getpid()}, 1
    yield "isthmus_broker_epoch", {}, broker.epoch
    yield "isthmus_broker_start_time_seconds", {}, round(service.started_at, 3)
    yield "isthmus_broker_open_descriptors", {}, len(os.listdir("/proc/self/fd"))
    for result, count in service.reloads.items():
        yield "isthmus_policy_reloads_total", {"result": result}, count
    yield "isthmus_policy_broken", {}, int(service.policy_error is not None)
    for rule in policy.rules:
        yield "isthmus_rule_hits_total", {"rule": rule.number, "action": rule.action}, rule.hits
    yield "isthmus_rule_rejects_total", {}, policy.rejects
    yield "isthmus_domains", {}, len(broker.domains)
    for domain in broker.domains.values():
        label: dict[str, object] = {"domain": domain.name}
        limits = domain.limits
        for what, held, most in (
            ("attachments", len(domain.attachments), limits.attachments),
            ("ports", domain.bound, limits.ports),
            ("connections", domain.connections, limits.connections),
            ("pending", domain.pending, limits.pending),
            ("lanes", domain.lanes, limits.lanes),
            ("memory_bytes", domain.memory, limits.memory),
        ):
            yield f"isthmus_domain_{what}", label, held
            yield "isthmus_domain_limit", {**label, "limit": what}, most
        yield "isthmus_domain_control_messages_total", label, domain.control_messages
        yield "isthmus_domain_throttled_total", label, domain.throttled
        yield "isthmus_domain_switch_cpu_seconds_total", label, broker.switch.cpu_seconds_of(domain)
        for refusal, count in sorted(domain.refusals.items()):
            yield "isthmus_domain_refused_total", {**label, "refusal": refusal}, count
    made = broker.introductions
    for (name, path), traffic in sorted(
        traffic_now(broker.domains.values(), made.connections.values()).items()
    ):
        for what, count in traffic.as_dict().items():
            yield f"isthmus_domain_{what}_total", {"domain": name, "path": path}, count
    for path, count in made.opened.items():
        yield "isthmus_connections_opened_total", {"path": path}, count
    yield "isthmus_connections_open", {}, len(made.connections)
    yield "isthmus_connections_cut_total", {}, made.cuts
    yield "isthmus_sides_resumed_total", {}, made.resumed
    for reason in ("fault", "slow"):
        yield "isthmus_attachments_dropped_total", {"reason": reason}, broker.dropped.get(reason, 0)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def parse_address(text: str) -> tuple[str, int]:
    """``HOST:PORT`` of a loopback address.

    Raises
    ------
    ValueError
        Says what is wrong with it.
    """
    host, _, port = text.rpartition(":")
    host = host.strip("[]")
    if not port.isdigit() or int(port) > 65_535:
        raise ValueError(f"{text!r}: write ADDRESS:PORT, for example 127.0.0.1:9477")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise ValueError(f"{text!r}: {host!r} is not an IP address") from None
    if not loopback:
        raise ValueError(f"{text!r}: figures are served on loopback only; put a proxy of your own in front")
    return host, int(port)


class Server:
    """Just enough HTTP for a scraper: ``GET /metrics``, one answer, done."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, sock: socket.socket) -> None:
        self._servers.append(await asyncio.start_unix_server(self._serve, sock=sock, limit=REQUEST_MAX_BYTES))

    async def start_http(self, host: str, port: int) -> int:
        server = await asyncio.start_server(self._serve, host, port, limit=REQUEST_MAX_BYTES)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), REQUEST_S)
            writer.write(self._answer(head))
            await asyncio.wait_for(writer.drain(), REQUEST_S)
        except (asyncio.LimitOverrunError, asyncio.TimeoutError, asyncio.CancelledError, EOFError, OSError):
            pass  # Whoever asks badly gets nothing.
        finally:
            self._tasks.discard(task)
            writer.close()

    def _answer(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        if method not in (b"GET", b"HEAD"):
            status, body, kind = "405 Method Not Allowed", b"only GET\n", "text/plain"
        elif path != b"/metrics":
            status, body, kind = "404 Not Found", b"the figures are at /metrics\n", "text/plain"
        else:
            status, body, kind = "200 OK", render(self._service).encode(), CONTENT_TYPE
        front = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        front += "Connection: close\r\n\r\n"
        return front.encode() + (b"" if method == b"HEAD" else body)
