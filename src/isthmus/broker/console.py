"""The operator's socket: one JSON request a line, one JSON answer a line.

``{"do": "status"}`` is answered ``{"ok": true, ...}`` or ``{"ok": false, "error": "what, where, what to
do"}``. Only root and the broker's own user get in: the socket's mode says so, and so does the kernel about
who connected.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from isthmus._native import check_name

from . import metrics
from .addresses import owns, parse
from .answers import Refuse
from .directory import Domain
from .doors import DEVICE, DoorError
from .explain import explain
from .policy import GROUP_DEFAULT, KINDS, PolicyError, parse_network
from .report import describe_connections, describe_domain, describe_fallbacks, summarise_domain

if TYPE_CHECKING:
    from .service import Service

REQUEST_MAX_BYTES = 64 * 1024
#: Connections that one `status` lists.
CONNECTIONS_SHOWN = 1000


class Wrong(Exception):
    """The request cannot be done; the text is for the operator."""


class Console:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._does: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "ping": lambda _: {"pid": os.getpid(), "epoch": service.broker.epoch},
            "domain-add": self._domain_add,
            "domain-list": self._domain_list,
            "domain-remove": self._domain_remove,
            "status": self._status,
            "explain": self._explain,
            "reload": self._reload,
            "metrics": lambda _: {"text": metrics.render(service)},
        }

    async def start(self, sock: socket.socket) -> None:
        self._server = await asyncio.start_unix_server(self._serve, sock=sock, limit=REQUEST_MAX_BYTES)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if not may_operate(_uid(writer.get_extra_info("socket"))):
                return
            while line := await reader.readline():
                writer.write(json.dumps(self.answer(line)).encode() + b"\n")
                await writer.drain()
        except (ValueError, ConnectionError, asyncio.CancelledError):
            pass  # A line that is too long, somebody who left, or the end.
        finally:
            self._tasks.discard(task)
            writer.close()

    def answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise Wrong("a request is a JSON object")
            do = self._does.get(str(request.get("do")))
            if do is None:
                raise Wrong(f"do: there is {', '.join(sorted(self._does))}")
            return {"ok": True, **do(request)}
        except (Wrong, PolicyError, DoorError) as error:
            return {"ok": False, "error": str(error)}
        except Refuse as refused:
            return {"ok": False, "error": refused.text, "refusal": refused.refusal}
        except (ValueError, RecursionError) as error:
            return {"ok": False, "error": f"not a request: {error}"}
        except OSError as error:
            return {"ok": False, "error": f"{error.filename or 'the broker'}: {error.strerror}"}

    def _domain_add(self, request: dict[str, Any]) -> dict[str, Any]:
        name = _name(request, "name", None)
        group = _name(request, "group", GROUP_DEFAULT)
        uid = request.get("uid")
        if uid is not None and (
            not isinstance(uid, int) or isinstance(uid, bool) or not 0 <= uid < 2**32 - 1
        ):
            raise Wrong(f"uid: {uid!r} is not the number of a user")
        kind = request.get("kind") or "container"
        if kind not in KINDS:
            raise Wrong(f"kind: {kind!r} is not one of {', '.join(KINDS)}")
        addresses = request.get("addresses") or []
        if not isinstance(addresses, list):
            raise Wrong(f"addresses: {addresses!r} is not a list")
        networks = tuple(parse_network(text) for text in addresses)
        domain = self._service.broker.add_domain(name, group, uid, kind, networks)
        self._service.log.info("domain", action="add", name=name, group=group, number=domain.number)
        return self._describe(domain)

    def _domain_list(self, _: dict[str, Any]) -> dict[str, Any]:
        domains = self._service.broker.domains.values()
        return {"domains": [self._describe(domain) for domain in sorted(domains, key=lambda d: d.number)]}

    def _domain_remove(self, request: dict[str, Any]) -> dict[str, Any]:
        name = _name(request, "name", None)
        before = self._service.broker.introductions.cuts
        self._service.broker.remove_domain(name)
        self._service.log.info("domain", action="remove", name=name)
        return {"name": name, "cut": self._service.broker.introductions.cuts - before}

    def _status(self, request: dict[str, Any]) -> dict[str, Any]:
        service = self._service
        broker = service.broker
        broker.kernel_sockets.sweep()
        only = request.get("domain")
        if only is not None:
            domain = broker.find_domain(str(only))
            if domain is None:
                raise Wrong(f"domain {only}: there is none; see `isthmus domain list`")
            return {"domain": describe_domain(broker, domain)}
        limit = CONNECTIONS_SHOWN
        connections: list[dict[str, Any]] = []
        for connection in describe_connections(broker):
            if len(connections) >= limit:
                break
            connections.append(connection)
        return {
            "node": broker.node,
            "pid": os.getpid(),
            "epoch": broker.epoch,
            "dir": str(service.directory),
            "started_at": service.started_at,
            "policy": str(service.policy_path) if service.policy_path else None,
            "policy_error": service.policy_error,
            "notes": broker.policy.notes(broker.domains),
            "domains": [
                summarise_domain(broker, d) for d in sorted(broker.domains.values(), key=lambda d: d.number)
            ],
            "connections_total": len(broker.introductions.connections),
            "connections": connections,
            "fallbacks": [entry for d in broker.domains.values() for entry in describe_fallbacks(d)],
            "refused": dict(sorted(broker.refusals.items())),
            "cut": broker.introductions.cuts,
        }

    def _explain(self, request: dict[str, Any]) -> dict[str, Any]:
        port = request.get("port")
        if port is not None and (not isinstance(port, int) or not 1 <= port < 2**32 - 1):
            raise Wrong(f"port: {port!r} is not a port")
        broker = self._service.broker
        broker.kernel_sockets.sweep()
        parties = [self._party(str(request.get(key))) for key in ("from", "to")]
        return explain(broker, parties[0], parties[1], port)

    def _party(self, text: str) -> Domain:
        """A domain by its name, its number or an address of it."""
        broker = self._service.broker
        domain = broker.find_domain(text)
        if domain is not None:
            return domain
        try:
            address = parse(text)
        except ValueError:
            raise Wrong(f"domain {text}: there is none; see `isthmus domain list`") from None
        named = sorted(domain.name for domain in broker.domains.values() if owns(domain, address))
        if named:
            raise Wrong(
                f"{address}: given to {' and '.join(named)} as part of a network, "
                "and no program there says that it has it"
            )
        raise Wrong(f"{address}: no domain has this address; isthmus domain add NAME --address {address}")

    def _reload(self, _: dict[str, Any]) -> dict[str, Any]:
        cut, notes = self._service.reload()
        path = self._service.policy_path
        return {"cut": cut, "notes": notes, "policy": str(path) if path else None}

    def _device(self, domain: Domain) -> dict[str, Any]:
        """Of a guest: where its monitor connects, and how far that has come."""
        if domain.kind != "vm":
            return {}
        broker = self._service.broker
        return {
            "socket": str(broker.door_path(domain.name) / DEVICE),
            "device": broker.switch.state_of(domain),
        }

    def _describe(self, domain: Domain) -> dict[str, Any]:
        return {
            "name": domain.name,
            "number": domain.number,
            "group": domain.group,
            "kind": domain.kind,
            **self._device(domain),
            "uid": domain.uid,
            "addresses": [str(network) for network in domain.addresses],
            "origin": domain.origin,
            "attachments": len(domain.attachments),
            "connections": domain.connections,
            "door": str(self._service.broker.door_path(domain.name)),
        }


def may_operate(uid: int) -> bool:
    return uid in (0, os.geteuid())


def _uid(sock: Any) -> int:
    """Who connected, as the kernel says."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    return int(struct.unpack("iII", credentials)[1])


def _name(request: dict[str, Any], key: str, default: str | None) -> str:
    value = request.get(key) or default
    if not isinstance(value, str):
        raise Wrong(f"{key}: is missing")
    try:
        check_name(value)
    except ValueError as error:
        raise Wrong(str(error)) from None
    return value
