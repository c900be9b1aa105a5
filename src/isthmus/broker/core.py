"""The broker of one node: its domains, their doors, programs and ports, and what each message does.

Connections have a module of their own, `introductions`.

Format: docs/formats/control.md.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isthmus._native import ANY_PORT, ANYBODY, FEATURE_SOCKETS, FEATURE_WINDOWS

from .addresses import Addresses, parse
from .answers import Fault, Refuse, bounded, shown
from .attachment import Attachment, OutOfDescriptors
from .connection import SOCKET, Connection, path_text
from .descriptors import WAITING_MAX, Descriptors
from .directory import Binding, Domain, Lease
from .doors import Door, DoorError
from .introductions import ANSWER_S, Introductions
from .kernel_sockets import KernelSockets
from .log import Log
from .policy import Kind, Network, Policy, parse_network
from .report import ENTRIES_MAX, describe_domain
from .state import State
from .switch import Switch
from .tickets import Tickets
from .windows import Windows

FEATURES = FEATURE_SOCKETS | FEATURE_WINDOWS
#: How long a new program may take to say `hello`.
HELLO_S = 10.0
#: A program that has read nothing for so long while messages wait loses its attachment; it may come again.
BLOCKED_S = 30.0
#: Between looks at what waits for time to pass; none are taken while nothing does.
SWEEP_S = 0.05
#: Characters of a report in one message.
REPORT_PIECE = 3000


class Broker:
    """Domains, connections and rules of one node, without the process around them (see `service`)."""

    def __init__(
        self,
        directory: Path,
        state: State,
        policy: Policy,
        log: Log,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
    ) -> None:
        self.loop = loop
        self.log = log
        self.node = socket.gethostname()
        self.policy = policy
        self.domains: dict[str, Domain] = {}
        self.refusals: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self._directory = directory
        self._state = state
        self.clock = clock
        self.introductions = Introductions(self, Tickets(state.key), log, clock)
        self.kernel_sockets = KernelSockets(self)
        self.windows = Windows(self)
        self.addresses = Addresses(self.domains.values, loop.time)
        self.switch = Switch(directory, log, loop)
        self._numbers: dict[int, Domain] = {}
        self._doors: dict[str, Door] = {}
        self._strangers: deque[Attachment] = deque()
        self._paused: set[Attachment] = set()
        self._blocked: set[Attachment] = set()
        self._sweeping = False
        self._last_attachment = 0
        self._handlers: dict[str, Callable[[Attachment, int, dict[str, Any], Descriptors], None]] = {
            "bind": self._bind,
            "unbind": self._unbind,
            "addresses": self.kernel_sockets.handle_addresses,
            "connect": self.introductions.handle_connect,
            "connect-socket": self.kernel_sockets.handle_connect,
            "fallback": self.kernel_sockets.handle_fallback,
            "find-nic": self._find_nic,
            "lend-window": self.windows.handle_lend,
            "take-back-window": self.windows.handle_take_back,
            "accept": self.introductions.handle_accept,
            "refuse": self.introductions.handle_refuse,
            "close": self.introductions.handle_close,
            "resolve": self._resolve,
            "resume": self.introductions.handle_resume,
            "resume-socket": self.kernel_sockets.handle_resume,
            "take-socket": self.kernel_sockets.handle_take,
            "status": self._status,
        }

    # Domains.

    @property
    def epoch(self) -> int:
        return self._state.epoch

    def door_path(self, name: str) -> Path:
        return self._directory / "doors" / name

    def start(self) -> None:
        """Open the doors of all known domains."""
        for name, entry in self._state.added.items():
            domain = self._add(name, entry["group"], entry["uid"], "operator", entry["kind"])
            domain.addresses = tuple(parse_network(text) for text in entry["addresses"])
        self._take_over_domains(self.policy)
        for name in [name for name in self._state.numbers if name not in self.domains]:
            del self._state.numbers[name]
        self._state.save()
        self._remove_stale_doors()

    def _remove_stale_doors(self) -> None:
        doors = self._directory / "doors"
        for path in doors.iterdir():
            if path.name not in self.domains:
                try:
                    (path / "door").unlink(missing_ok=True)
                    path.rmdir()
                except OSError:
                    self.log.warning(
                        "door", path=str(path), text="belongs to no domain and cannot be removed"
                    )

    def add_domain(
        self,
        name: str,
        group: str,
        uid: int | None,
        kind: Kind = "container",
        addresses: tuple[Network, ...] = (),
    ) -> Domain:
        """Add a domain at run time, kept over restarts.

        Raises
        ------
        Refuse, DoorError
            Nothing was changed.
        """
        if name in self.domains:
            raise Refuse("bad-request", f"domain {name}: exists already")
        door = None
        try:
            domain = self._add(name, group, uid, "operator", kind)
            door = self._doors.get(name)
            if door is None:
                raise DoorError(f"domain {name}: its door could not be opened; see the broker's log")
            domain.addresses = addresses
            texts = [str(network) for network in addresses]
            self._state.added[name] = {"group": group, "uid": uid, "kind": kind, "addresses": texts}
            self._state.save()
        except BaseException:
            self._forget(name)
            self._state.added.pop(name, None)
            raise
        return domain

    def _add(self, name: str, group: str, uid: int | None, origin: str, kind: Kind) -> Domain:
        entry = self.policy.domains.get(name)
        limits = entry.limits if entry is not None else self.policy.limits
        domain = Domain(name, self._state.number_of(name), group, uid, limits, origin, kind)
        domain.refilled_at = self.loop.time()
        domain.start_ports_at(self.epoch * 65_537)
        self.domains[name] = domain
        self._numbers[domain.number] = domain
        self.policy.forget()
        try:
            self._doors[name] = door = Door(domain, self._directory / "doors", self._let_in, self.arm)
            if kind == "vm":
                self.switch.add(domain, door)
        except DoorError as error:
            # One broken door must not close the others.
            self.log.error("door", domain=name, text=str(error))
            if origin == "operator" and name not in self._state.added:
                raise
        return domain

    def remove_domain(self, name: str) -> None:
        """End a domain: its connections are cut, its programs sent away, its door is taken down."""
        domain = self.domains.get(name)
        if domain is None:
            raise Refuse("unknown-domain", f"domain {name}: there is none; see `isthmus domain list`")
        if domain.origin == "policy":
            raise Refuse("bad-request", f"domain {name}: the policy file declares it; remove it there")
        self._remove(domain)
        self._state.added.pop(name, None)
        self._state.save()

    def _remove(self, domain: Domain) -> None:
        text = f"domain {domain.name} was removed"
        for connection in list(self.introductions.connections.values()):
            if domain in (connection.opener.domain, connection.accepter.domain):
                self.introductions.cut(connection, "domain-removed", text)
        for attachment in list(domain.attachments):
            attachment.close("domain removed")
        self._forget(domain.name)
        self.log.forget(domain.name)

    def _forget(self, name: str) -> None:
        door = self._doors.pop(name, None)
        if door is not None:
            door.close(remove=True)
        domain = self.domains.pop(name, None)
        if domain is not None:
            self._numbers.pop(domain.number, None)
            if domain.kind == "vm":
                self.switch.remove(domain)
        self._state.numbers.pop(name, None)
        self.policy.forget()

    def find_domain(self, text: str) -> Domain | None:
        """By name, decimal number or IP address.

        Raises
        ------
        Refuse
            It is an address that more than one domain may have.
        """
        domain = self.domains.get(text)
        if domain is not None:
            return domain
        if text.isascii() and text.isdigit() and len(text) <= 10:
            return self._numbers.get(int(text))
        try:
            return self.addresses.owner(parse(text))
        except ValueError:
            return None

    def answer_deadline(self) -> float:
        """When a listener's program that is asked now must have answered, by the loop's clock."""
        return self.loop.time() + ANSWER_S

    def domain_numbered(self, number: int) -> Domain | None:
        return self._numbers.get(number)

    # Policy.

    def take_over(self, policy: Policy) -> int:
        """Use another policy from now on. Returns how many connections it cut."""
        policy.forget()
        self.policy = policy
        self._take_over_domains(policy)
        self._state.save()
        before = self.introductions.cuts
        for connection in list(self.introductions.connections.values()):
            self._judge(connection)
        return self.introductions.cuts - before

    def _take_over_domains(self, policy: Policy) -> None:
        for domain in list(self.domains.values()):
            if domain.name not in policy.domains:
                if domain.origin == "policy":
                    self._remove(domain)
                else:
                    domain.limits = policy.limits
        for entry in policy.domains.values():
            known = self.domains.get(entry.name)
            if known is not None and (known.uid, known.kind) != (entry.uid, entry.kind):
                self._remove(known)
                self._state.added.pop(entry.name, None)
                known = None
            if known is None:
                known = self._add(entry.name, entry.group, entry.uid, "policy", entry.kind)
                known.addresses = entry.addresses
                continue
            known.group = entry.group
            known.addresses = entry.addresses
            known.limits = entry.limits
            if known.origin == "operator":
                known.origin = "policy"
                self._state.added.pop(entry.name, None)
        policy.forget()

    def _judge(self, connection: Connection) -> None:
        """Cut a connection that today's rules would not let be."""
        opener, accepter = connection.opener, connection.accepter
        decision = self.policy.look(opener.domain, accepter.domain, accepter.port)
        if decision.action == "drop":
            self.introductions.cut(connection, "peer-gone", "the other side is gone", decision.rule)
        elif not decision.accepted:
            where = f"{opener.domain.name} to {accepter.domain.name}:{accepter.port}"
            self.introductions.cut(connection, "refused-by-rule", f"{where}: {decision.why}", decision.rule)
        elif decision.strict and connection.carrier == "sealed":
            text = f"{decision.why} but is strict now; this connection is {connection.carrier}, connect again"
            self.introductions.cut(connection, "refused-by-rule", text, decision.rule)
        else:
            connection.rule = decision.rule
            connection.why = path_text(decision, connection.carrier, opener.domain, accepter.domain)
            for side in (opener, accepter):
                if side.attachment is not None and connection.pending is None:
                    self.introductions.tell_terms(side.attachment, connection, decision)

    # Attachments.

    def _let_in(self, domain: Domain, sock: socket.socket) -> None:
        reason = None
        if len(domain.attachments) >= domain.limits.attachments:
            reason = f"attachments: domain {domain.name} may hold {domain.limits.attachments}"
        elif domain.undertaker.waiting > WAITING_MAX:
            reason = f"descriptors that domain {domain.name} sent cannot be closed"
        try:
            self._last_attachment += 1
            attachment = Attachment(self, domain, sock, self._last_attachment, self.loop.time())
        except OSError:
            sock.close()
            return
        domain.attachments.add(attachment)
        if reason is not None:
            self.count_refusal(domain, "limit-reached")
            attachment.send("refused", 0, refusal="limit-reached", rule=0, text=reason)
            attachment.close(f"refused: {reason}")
            return
        self._strangers.append(attachment)
        self.arm()

    def handle_message(
        self,
        attachment: Attachment,
        kind: str,
        request: int,
        fields: dict[str, Any],
        descriptors: Descriptors,
    ) -> None:
        """Do what one message asks. Never raises."""
        attachment.domain.control_messages += 1
        try:
            if not attachment.greeted:
                self._hello(attachment, kind, request, fields)
                return
            handler = self._handlers.get(kind)
            if handler is None:
                raise Fault(f"{kind} is not for a program to send here")
            handler(attachment, request, fields, descriptors)
        except Refuse as refused:
            self.count_refusal(attachment.domain, refused.refusal)
            attachment.send(
                "refused", request, refusal=refused.refusal, rule=refused.rule, text=bounded(refused.text)
            )
        except Fault as fault:
            attachment.close(f"fault: {fault}")
        except OutOfDescriptors:
            self.log.error(
                "descriptors", domain=attachment.domain.name, text="no more descriptors can be sent"
            )
            attachment.send("refused", request, refusal="limit-reached", rule=0, text="descriptors in flight")
        except Exception:
            # A mistake of ours is no reason to fail everybody else.
            self.log.error("bug", message=kind, domain=attachment.domain.name, text=traceback.format_exc())
            attachment.close("a mistake of the broker's; see its log")

    def handle_paused(self, attachment: Attachment) -> None:
        attachment.domain.throttled += 1
        self._paused.add(attachment)
        self.arm()

    def handle_blocked(self, attachment: Attachment) -> None:
        self._blocked.add(attachment)
        self.arm()

    def handle_detached(self, attachment: Attachment, reason: str) -> None:
        """A program is gone: so is everything it held."""
        domain = attachment.domain
        domain.attachments.discard(attachment)
        self._paused.discard(attachment)
        self._blocked.discard(attachment)
        self.addresses.forget(attachment)
        for lease in list(attachment.leases.values()):
            for binding in list(lease.bindings.values()):
                self._drop_binding(lease, binding)
        for side in list(attachment.sides):
            connection = side.connection
            if not side.held:
                continue
            if connection.pending is not None:
                if side is connection.opener:
                    self.introductions.end_pending(connection)
                else:
                    self.introductions.fail_pending(connection, "nobody-listens", "the listener is gone")
            elif connection.carrier == SOCKET:
                # Whoever has the socket need not be who asked for it.
                attachment.sides.discard(side)
                side.attachment = None
            else:
                self.introductions.end_side(side, "the program is gone")
        if reason.startswith(("fault", "slow")):
            name = reason.partition(":")[0]
            self.dropped[name] = self.dropped.get(name, 0) + 1
        self.log.tenant(
            domain.name,
            "detach",
            program=attachment.program,
            pid=attachment.pid,
            uid=attachment.uid,
            why=reason,
        )

    def _hello(self, attachment: Attachment, kind: str, request: int, fields: dict[str, Any]) -> None:
        if kind != "hello":
            raise Fault(f"{kind} before hello")
        domain = attachment.domain
        attachment.greeted = True
        attachment.program = str(fields["program"])[:80]
        attachment.brings_sockets = bool(fields["features"] & FEATURE_SOCKETS)
        attachment.takes_windows = bool(fields["features"] & FEATURE_WINDOWS)
        attachment.send(
            "welcome",
            request,
            features=FEATURES & fields["features"],
            domain=domain.number,
            domain_name=domain.name,
            node=self.node,
            ring_max=domain.limits.ring,
            epoch=self.epoch,
        )
        self.log.tenant(
            domain.name, "attach", program=attachment.program, pid=attachment.pid, uid=attachment.uid
        )

    # Ports.

    def _bind(self, attachment: Attachment, request: int, fields: dict[str, Any], _: Descriptors) -> None:
        domain = attachment.domain
        port, partner = fields["port"], fields["partner"]
        if partner != ANYBODY and partner not in self._numbers:
            raise Refuse("unknown-domain", f"bind: partner: there is no domain {partner}")
        if domain.bound >= domain.limits.ports:
            raise Refuse("limit-reached", f"ports: domain {domain.name} may hold {domain.limits.ports}")
        if port == 0:
            port = domain.choose_port()
        elif port == ANY_PORT and domain.kind != "vm":
            raise Refuse("bad-request", f"bind: port {port} is not a port")
        lease = domain.leases.get(port)
        if lease is not None and lease.attachment is not attachment and lease.attachment.is_gone():
            # Its end is known but not yet read; a program that starts again must not trip over itself.
            lease.attachment.close("gone")
            lease = domain.leases.get(port)
        if port in domain.chosen or (
            lease is not None and (lease.attachment is not attachment or partner in lease.bindings)
        ):
            raise Refuse("port-in-use", f"{domain.name}:{port} is in use")
        if partner == ANYBODY and port != ANY_PORT and not self.policy.reachable(domain, port):
            raise Refuse(
                "wildcard-needs-rule",
                f"no rule lets anybody reach {domain.name}:{port}; add one, or bind for one partner",
            )
        if lease is None:
            lease = Lease(attachment, port)
            domain.leases[port] = attachment.leases[port] = lease
        lease.bindings[partner] = Binding(
            domain, attachment, port, partner, fields["kind"], fields["backlog"]
        )
        domain.bound += 1
        attachment.send("bound", request, port=port)

    def _unbind(self, attachment: Attachment, request: int, fields: dict[str, Any], _: Descriptors) -> None:
        lease = attachment.leases.get(fields["port"])
        binding = lease.bindings.get(fields["partner"]) if lease is not None else None
        if lease is None or binding is None:
            raise Refuse("not-yours", f"unbind: port {fields['port']} is not bound by this program")
        self._drop_binding(lease, binding)
        attachment.send("done", request)

    def _drop_binding(self, lease: Lease, binding: Binding) -> None:
        del lease.bindings[binding.partner]
        domain = binding.domain
        domain.bound -= 1
        if not lease.bindings:
            del domain.leases[lease.port]
            del lease.attachment.leases[lease.port]
        for connection in list(binding.waiting):
            self.introductions.fail_pending(connection, "nobody-listens", "the listener is gone")

    def _resolve(self, attachment: Attachment, request: int, fields: dict[str, Any], _: Descriptors) -> None:
        domain = self.find_domain(fields["name"])
        if domain is None:
            raise Refuse("unknown-domain", f"there is no domain {shown(fields['name'])} on this node")
        attachment.send("resolved", request, domain=domain.number, name=domain.name)

    def nic(self, domain: Domain) -> int:
        """The address of a domain's virtual network card: 48 bits, as lasting as the node's key."""
        digest = hmac.digest(self._state.key, b"nic\0" + domain.name.encode(), "sha256")
        return 0x02 << 40 | int.from_bytes(digest[:5], "big")

    def _find_nic(self, attachment: Attachment, request: int, fields: dict[str, Any], _: Descriptors) -> None:
        if fields["nic"]:
            domain = next((d for d in self.domains.values() if self.nic(d) == fields["nic"]), None)
        elif fields["name"]:
            domain = self.find_domain(fields["name"])
        else:
            domain = attachment.domain
        if domain is None:
            meant = f"card {fields['nic']:012x}" if fields["nic"] else f"domain {shown(fields['name'])}"
            raise Refuse("unknown-domain", f"there is no {meant} on this node")
        attachment.send("nic", request, nic=self.nic(domain), domain=domain.number, name=domain.name)

    # Connections.

    # Status.

    def _status(self, attachment: Attachment, request: int, fields: dict[str, Any], _: Descriptors) -> None:
        offset = fields["offset"]
        if offset == 0 or not attachment.report:
            self.kernel_sockets.sweep_for_tenants()
            # It costs as much as many messages, so it counts as many.
            entries = len(attachment.domain.leases) + attachment.domain.connections
            attachment.domain.tokens -= 10 + min(entries, ENTRIES_MAX) / 8
            attachment.report = json.dumps(describe_domain(self, attachment.domain), separators=(",", ":"))
        report = attachment.report
        piece = report[offset : offset + REPORT_PIECE]
        if offset + len(piece) >= len(report):
            attachment.report = ""
        attachment.send("report", request, offset=offset, total=len(report), text=piece)

    # Time.

    def arm(self) -> None:
        if not self._sweeping:
            self._sweeping = True
            self.loop.call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """Everything that waits for time to pass, in one place; runs only while something does."""
        self._sweeping = False
        now = self.loop.time()
        waiting = self.introductions.handle_timeout(now)
        while self._strangers:
            stranger = self._strangers[0]
            if not (stranger.greeted or stranger.closed):
                if stranger.opened_at + HELLO_S > now:
                    break
                stranger.close("fault: no hello")
            self._strangers.popleft()
        paused, self._paused = self._paused, set()
        for attachment in paused:
            attachment.resume()
        for attachment in list(self._blocked):
            since = attachment.blocked_since()
            if since is None:
                self._blocked.discard(attachment)
            elif since + BLOCKED_S < now:
                attachment.close("slow: it has not read for a while")
        for door in self._doors.values():
            if door.paused:
                if door.domain.refill(now) >= 1:
                    door.resume()
                else:
                    waiting = True
        if waiting or self._strangers or self._paused or self._blocked:
            self.arm()

    # Logs and counts.

    def count_refusal(self, domain: Domain, refusal: str) -> None:
        self.refusals[refusal] = self.refusals.get(refusal, 0) + 1
        domain.refusals[refusal] = domain.refusals.get(refusal, 0) + 1

    def stop(self) -> None:
        """Close every door and attachment. Connections live on without the broker, and so does the switch."""
        self.switch.close()
        for door in self._doors.values():
            door.close(remove=False)
        self._doors.clear()
        for domain in self.domains.values():
            for attachment in list(domain.attachments):
                attachment.close("the broker stops")
