"""What each control message does.

The broker introduces two programs and remembers on what terms. A connection is *pending* from the opener's
`connect` until the listener's program answers `incoming`; then both ends hold their descriptors, the broker closes its own
copies and keeps only read-only counter pages for the accounts. Each side of a connection ends on its own: by
`close`, by the death of its program, or by the broker's `cut`.

Format: docs/formats/control.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from isthmus._native import ANYBODY, CONTROL_TEXT_MAX

from ._counters import Counters
from .attachment import Attachment, OutOfDescriptors
from .descriptors import WAITING_MAX, Descriptors
from .directory import CHOSEN_PORTS, Binding, Domain, Lease
from .doors import Door, DoorError
from .log import Log
from .policy import Decision, Policy, built_in_rule
from .state import State
from .tickets import Tickets

FEATURES = 0
#: How long a listener's program may take to answer `incoming`, and a new program to say `hello`.
ANSWER_S = 5.0
HELLO_S = 10.0
#: A program that has read nothing for so long while messages wait loses its attachment; it may come again.
BLOCKED_S = 30.0
#: A connect that gets as far as its descriptors is worth so many messages more.
CONNECT_COSTS = 3
#: Between looks at what waits for time to pass; none are taken while nothing does.
SWEEP_S = 0.05
#: Connections and ports that one `status` lists; the totals are always there.
REPORT_ENTRIES = 1000
REPORT_PIECE = 3000

#: Refusals that a `drop` rule must not be told apart from.
_NOBODY = "nobody listens there"


class Refuse(Exception):
    """The answer to a request is `refused`."""

    def __init__(self, refusal: str, text: str, rule: int = 0) -> None:
        super().__init__(text)
        self.refusal = refusal
        self.text = text
        self.rule = rule


class Fault(Exception):
    """The program broke the protocol; its attachment ends."""


class Side:
    """One end of a connection."""

    __slots__ = ("attachment", "chosen", "connection", "counters", "domain", "held", "memory", "peer", "port")

    def __init__(self, connection: Connection, domain: Domain, peer: Domain, port: int) -> None:
        self.connection = connection
        self.domain = domain
        self.peer = peer
        self.port = port
        self.attachment: Attachment | None = None
        self.counters: Counters | None = None
        self.memory = 0
        #: Whether it counts against its domain's limits.
        self.held = False
        #: Whether `port` was chosen by the broker for this connection.
        self.chosen = False

    def hold(self, memory: int) -> None:
        domain = self.domain
        self.held = True
        self.memory = memory
        domain.connections += 1
        domain.lanes += 2
        domain.memory += memory
        domain.peers[self.peer.number] = domain.peers.get(self.peer.number, 0) + 1

    def bring(self, memory: int) -> None:
        self.domain.memory += memory - self.memory
        self.memory = memory

    def release(self) -> None:
        """End this side: the account, the limits, the port. Again does nothing."""
        if not self.held:
            return
        self.held = False
        domain = self.domain
        domain.connections -= 1
        domain.lanes -= 2
        domain.memory -= self.memory
        left = domain.peers.get(self.peer.number, 1) - 1
        if left:
            domain.peers[self.peer.number] = left
        else:
            domain.peers.pop(self.peer.number, None)
        if self.chosen:
            domain.chosen.discard(self.port)
        if self.counters is not None:
            domain.account(self.connection.carrier).add(self.counters.read())
            self.counters = None
        if self.attachment is not None:
            self.attachment.sides.discard(self)
            self.attachment = None

    def belong_to(self, attachment: Attachment) -> None:
        self.attachment = attachment
        attachment.sides.add(self)


class Pending:
    """What is known of a connection only until its listener has answered."""

    __slots__ = ("bell", "binding", "deadline", "large", "request", "secret", "small")

    def __init__(
        self, request: int, binding: Binding, bell: int, secret: int, small: int, large: int, deadline: float
    ) -> None:
        self.request = request
        self.binding = binding
        #: The opener's end.
        self.bell = bell
        self.secret = secret
        self.small = small
        self.large = large
        self.deadline = deadline


class Connection:
    """A connection as far as the broker knows it."""

    __slots__ = ("accepter", "carrier", "kind", "number", "opener", "pending", "rule", "since", "why")

    def __init__(
        self,
        number: int,
        kind: str,
        carrier: str,
        rule: int,
        why: str,
        since: float,
        opener: tuple[Domain, int],
        accepter: tuple[Domain, int],
    ) -> None:
        self.number = number
        self.kind = kind
        self.carrier = carrier
        self.rule = rule
        self.why = why
        self.since = since
        self.opener = Side(self, opener[0], accepter[0], opener[1])
        self.accepter = Side(self, accepter[0], opener[0], accepter[1])
        self.pending: Pending | None = None

    def side_of(self, attachment: Attachment) -> Side | None:
        """The open side that this program holds; a program connected to itself closes the opener's first."""
        if self.opener.attachment is attachment:
            return self.opener
        if self.accepter.attachment is attachment:
            return self.accepter
        return None


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
        self.connections: dict[int, Connection] = {}
        self.refusals: dict[str, int] = {}
        self.opened: dict[str, int] = {"sealed": 0, "put": 0}
        self.cuts = 0
        self.resumed = 0
        self.dropped: dict[str, int] = {}
        self._directory = directory
        self._state = state
        self._tickets = Tickets(state.key)
        self._clock = clock
        self._numbers: dict[int, Domain] = {}
        self._doors: dict[str, Door] = {}
        self._pending: deque[Connection] = deque()
        self._strangers: deque[Attachment] = deque()
        self._paused: set[Attachment] = set()
        self._blocked: set[Attachment] = set()
        self._sweeping = False
        self._last_attachment = 0
        self._handlers: dict[str, Callable[[Attachment, int, dict[str, Any], Descriptors], None]] = {
            "bind": self._bind,
            "unbind": self._unbind,
            "connect": self._connect,
            "accept": self._accept,
            "refuse": self._refuse,
            "close": self._close,
            "resolve": self._resolve,
            "resume": self._resume,
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
            self._add(name, entry["group"], entry["uid"], "operator")
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

    def add_domain(self, name: str, group: str, uid: int | None) -> Domain:
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
            domain = self._add(name, group, uid, "operator")
            door = self._doors.get(name)
            if door is None:
                raise DoorError(f"domain {name}: its door could not be opened; see the broker's log")
            self._state.added[name] = {"group": group, "uid": uid}
            self._state.save()
        except BaseException:
            self._forget(name)
            self._state.added.pop(name, None)
            raise
        return domain

    def _add(self, name: str, group: str, uid: int | None, origin: str) -> Domain:
        entry = self.policy.domains.get(name)
        limits = entry.limits if entry is not None else self.policy.limits
        domain = Domain(name, self._state.number_of(name), group, uid, limits, origin)
        domain.refilled_at = self.loop.time()
        domain.start_ports_at(self.epoch * 65_537)
        self.domains[name] = domain
        self._numbers[domain.number] = domain
        self.policy.forget()
        try:
            self._doors[name] = Door(domain, self._directory / "doors", self._let_in, self._arm)
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
        for connection in list(self.connections.values()):
            if domain in (connection.opener.domain, connection.accepter.domain):
                self._cut(connection, "domain-removed", text)
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
        self._state.numbers.pop(name, None)
        self.policy.forget()

    def find_domain(self, text: str) -> Domain | None:
        """By name or decimal number."""
        domain = self.domains.get(text)
        if domain is None and text.isascii() and text.isdigit() and len(text) <= 10:
            domain = self._numbers.get(int(text))
        return domain

    # Policy.

    def take_over(self, policy: Policy) -> int:
        """Use another policy from now on. Returns how many connections it cut."""
        policy.forget()
        self.policy = policy
        self._take_over_domains(policy)
        self._state.save()
        before = self.cuts
        for connection in list(self.connections.values()):
            self._judge(connection)
        return self.cuts - before

    def _take_over_domains(self, policy: Policy) -> None:
        for domain in list(self.domains.values()):
            if domain.name not in policy.domains:
                if domain.origin == "policy":
                    self._remove(domain)
                else:
                    domain.limits = policy.limits
        for entry in policy.domains.values():
            known = self.domains.get(entry.name)
            if known is not None and known.uid != entry.uid:
                self._remove(known)
                self._state.added.pop(entry.name, None)
                known = None
            if known is None:
                self._add(entry.name, entry.group, entry.uid, "policy")
                continue
            known.group = entry.group
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
            self._cut(connection, "peer-gone", "the other side is gone", decision.rule)
        elif not decision.accepted:
            where = f"{opener.domain.name} to {accepter.domain.name}:{accepter.port}"
            self._cut(connection, "refused-by-rule", f"{where}: {decision.why}", decision.rule)
        elif decision.strict and connection.carrier != "put":
            text = f"{decision.why} but is strict now, and this connection is {connection.carrier}; connect again"
            self._cut(connection, "refused-by-rule", text, decision.rule)
        else:
            connection.rule = decision.rule
            connection.why = _why(decision)

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
            self._count_refusal(domain, "limit-reached")
            attachment.send("refused", 0, refusal="limit-reached", rule=0, text=reason)
            attachment.close(f"refused: {reason}")
            return
        self._strangers.append(attachment)
        self._arm()

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
            self._count_refusal(attachment.domain, refused.refusal)
            attachment.send(
                "refused", request, refusal=refused.refusal, rule=refused.rule, text=_bounded(refused.text)
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
        self._arm()

    def handle_blocked(self, attachment: Attachment) -> None:
        self._blocked.add(attachment)
        self._arm()

    def handle_detached(self, attachment: Attachment, reason: str) -> None:
        """A program is gone: so is everything it held."""
        domain = attachment.domain
        domain.attachments.discard(attachment)
        self._paused.discard(attachment)
        self._blocked.discard(attachment)
        for lease in list(attachment.leases.values()):
            for binding in list(lease.bindings.values()):
                self._drop_binding(lease, binding)
        for side in list(attachment.sides):
            connection = side.connection
            if not side.held:
                continue
            if connection.pending is not None:
                if side is connection.opener:
                    self._end_pending(connection)
                else:
                    self._fail_pending(connection, "nobody-listens", "the listener is gone")
            else:
                self._end_side(side, "the program is gone")
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
        elif port == ANYBODY:
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
        if partner == ANYBODY and not self.policy.reachable(domain, port):
            raise Refuse(
                "wildcard-needs-rule",
                f"no rule lets anybody reach {domain.name}:{port}; the operator can add one, or name a partner",
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
            self._fail_pending(connection, "nobody-listens", "the listener is gone")

    def _resolve(self, attachment: Attachment, request: int, fields: dict[str, Any], _: Descriptors) -> None:
        domain = self.find_domain(fields["name"])
        if domain is None:
            raise Refuse("unknown-domain", f"there is no domain {_shown(fields['name'])} on this node")
        attachment.send("resolved", request, domain=domain.number, name=domain.name)

    # Connections.

    def _connect(
        self, attachment: Attachment, request: int, fields: dict[str, Any], descriptors: Descriptors
    ) -> None:
        source = attachment.domain
        port, kind, carrier = fields["to_port"], fields["kind"], fields["carrier"]
        destination = self.find_domain(fields["to"])
        if destination is None:
            raise Refuse("unknown-domain", f"there is no domain {_shown(fields['to'])} on this node")
        where = f"{destination.name}:{port}"
        decision = self.policy.decide(source, destination, port)
        if not decision.accepted:
            self._log_refused(source, where, decision.why, decision.rule)
            if decision.action == "drop":
                raise Refuse("nobody-listens", f"{where}: {_NOBODY}")
            raise Refuse("refused-by-rule", f"{source.name} to {where}: {decision.why}", decision.rule)
        binding = destination.listener(port, source.number)
        if binding is None:
            raise Refuse("nobody-listens", f"{where}: {_NOBODY}")
        if binding.kind != kind:
            raise Refuse("wrong-kind", f"{where}: a {binding.kind} listener, not {kind}")
        wanted = "put" if decision.strict else "sealed"
        if carrier != wanted:
            if fields["require"]:
                raise Refuse(
                    "path-unavailable", f"{where}: {carrier} is required, but {_why(decision)}", decision.rule
                )
            raise Refuse("use-carrier", wanted, decision.rule)
        from_port = fields["from_port"]
        if from_port and from_port not in attachment.leases:
            raise Refuse("not-yours", f"connect: port {from_port} is not leased by this program")

        source.tokens -= CONNECT_COSTS
        small, large = fields["small"], fields["large"]
        memory = small + large
        if max(small, large) > source.limits.ring:
            raise Refuse(
                "limit-reached",
                f"ring: a ring of domain {source.name} has at most {source.limits.ring} bytes",
            )
        over = source.over(destination, memory) or destination.over(source, 0)
        if over is not None:
            self._log_refused(source, where, f"limit reached: {over}", decision.rule)
            raise Refuse("limit-reached", over)
        listener = binding.attachment
        if listener.crowded:
            raise Refuse("backlog-full", f"{where}: its program does not read")
        counters = self._check_lane("connect", carrier, descriptors, small, large)

        number = self._new_number()
        connection = Connection(
            number,
            kind,
            carrier,
            decision.rule,
            _why(decision),
            self._clock(),
            (source, from_port or source.choose_port()),
            (destination, port),
        )
        opener, accepter = connection.opener, connection.accepter
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise Refuse("limit-reached", f"the broker is out of descriptors: {error.strerror}") from None
        secret = int.from_bytes(os.urandom(8), "little") | 1
        with theirs:
            try:
                listener.send(
                    "incoming",
                    0,
                    (descriptors.fds[0], theirs.fileno()),
                    connection=number,
                    secret=secret,
                    **{"from": source.number},
                    from_name=source.name,
                    from_port=opener.port,
                    port=port,
                    partner=binding.partner,
                    kind=kind,
                    carrier=carrier,
                    small=small,
                    large=large,
                    why=connection.why,
                    ticket=self._ticket(connection, "accepter"),
                )
            except BaseException:
                ours.close()
                raise
        opener.hold(memory)
        opener.counters = counters
        opener.belong_to(attachment)
        if not from_port:
            opener.chosen = True
            source.chosen.add(opener.port)
        accepter.hold(0)
        accepter.belong_to(listener)
        source.pending += 1
        destination.pending += 1
        deadline = self.loop.time() + ANSWER_S
        connection.pending = Pending(request, binding, ours.detach(), secret, small, large, deadline)
        binding.waiting.add(connection)
        self.connections[number] = connection
        self._pending.append(connection)
        if not self._sweeping:
            self._arm()

    def _accept(
        self, attachment: Attachment, _: int, fields: dict[str, Any], descriptors: Descriptors
    ) -> None:
        connection = self.connections.get(fields["connection"])
        if (
            connection is None
            or connection.pending is None
            or connection.accepter.attachment is not attachment
        ):
            text = "the opener is gone, or has waited too long"
            attachment.send("cut", 0, connection=fields["connection"], refusal="peer-gone", text=text)
            return
        pending = connection.pending
        opener, accepter = connection.opener, connection.accepter
        small, large = fields["small"], fields["large"]
        limits = accepter.domain.limits
        try:
            if max(small, large) > limits.ring:
                raise Refuse(
                    "limit-reached",
                    f"ring: a ring of domain {accepter.domain.name} has at most {limits.ring} bytes",
                )
            if accepter.domain.memory + small + large > limits.memory:
                raise Refuse(
                    "limit-reached", f"memory: domain {accepter.domain.name} may hold {limits.memory}"
                )
            accepter.counters = self._check_lane("accept", connection.carrier, descriptors, small, large)
        except Refuse as refused:
            self._count_refusal(accepter.domain, refused.refusal)
            text = _bounded(refused.text)
            attachment.send("cut", 0, connection=connection.number, refusal=refused.refusal, text=text)
            if refused.refusal == "limit-reached":
                self._fail_pending(connection, "limit-reached", text)
            else:
                self._fail_pending(connection, "peer-gone", "the listener answered with a bad lane")
            return
        accepter.bring(small + large)
        assert opener.attachment is not None
        try:
            opener.attachment.send(
                "connected",
                pending.request,
                (descriptors.fds[0], pending.bell),
                connection=connection.number,
                secret=pending.secret,
                to=accepter.domain.number,
                to_name=accepter.domain.name,
                to_port=accepter.port,
                from_port=opener.port,
                carrier=connection.carrier,
                small=small,
                large=large,
                why=connection.why,
                ticket=self._ticket(connection, "opener"),
            )
        except OutOfDescriptors:
            text = "no more descriptors can be in flight"
            attachment.send("cut", 0, connection=connection.number, refusal="limit-reached", text=text)
            self._fail_pending(connection, "limit-reached", text)
            return
        self._settle(connection)
        self.opened[connection.carrier] += 1
        opener.domain.account(connection.carrier).connections += 1
        if accepter.domain is not opener.domain:
            accepter.domain.account(connection.carrier).connections += 1
        self._log_connection("open", connection, why=connection.why)

    def _refuse(self, attachment: Attachment, _: int, fields: dict[str, Any], __: Descriptors) -> None:
        connection = self.connections.get(fields["connection"])
        if (
            connection is None
            or connection.pending is None
            or connection.accepter.attachment is not attachment
        ):
            return
        # A listener may say that it has no room, and nothing else that the broker would then vouch for.
        refusal = fields["refusal"] if fields["refusal"] in _LISTENERS_MAY_SAY else "nobody-listens"
        accepter = connection.accepter
        self._fail_pending(
            connection, refusal, f"{accepter.domain.name}:{accepter.port}: {_LISTENERS_MAY_SAY[refusal]}"
        )

    def _close(self, attachment: Attachment, _: int, fields: dict[str, Any], __: Descriptors) -> None:
        connection = self.connections.get(fields["connection"])
        side = connection.side_of(attachment) if connection is not None else None
        # Unknown: it was cut while the message was under way.
        if connection is not None and side is not None and connection.pending is None:
            self._end_side(side, "closed")

    def _resume(
        self, attachment: Attachment, request: int, fields: dict[str, Any], descriptors: Descriptors
    ) -> None:
        domain = attachment.domain
        peer = self._numbers.get(fields["peer"])
        number, kind, carrier = fields["connection"], fields["kind"], fields["carrier"]
        here, there = (domain.number, fields["port"]), (fields["peer"], fields["peer_port"])
        is_opener = bool(fields["opener"])
        ends = (*here, *there) if is_opener else (*there, *here)
        role = "opener" if is_opener else "accepter"
        if not self._tickets.check(fields["ticket"], number, *ends, kind, carrier, role):
            raise Refuse("not-yours", "resume: the ticket is not for this connection")
        if peer is None:
            raise Refuse("domain-removed", f"resume: there is no domain {fields['peer']} any more")
        connection = self.connections.get(number)
        if connection is None:
            source, destination = (domain, peer) if is_opener else (peer, domain)
            decision = self.policy.look(source, destination, ends[3])
            if not decision.accepted:
                raise Refuse("refused-by-rule", f"resume: {decision.why}", decision.rule)
            if decision.strict and carrier != "put":
                raise Refuse("refused-by-rule", f"resume: {decision.why} but is strict now", decision.rule)
            connection = Connection(
                number,
                kind,
                carrier,
                decision.rule,
                _why(decision),
                self._clock(),
                (source, ends[1]),
                (destination, ends[3]),
            )
        side = connection.opener if is_opener else connection.accepter
        if side.held and side.attachment is not attachment and side.attachment is not None:
            if side.attachment.is_gone():
                side.attachment.close("gone")
                self._resume(attachment, request, fields, descriptors)
                return
            raise Refuse("not-yours", "resume: another program holds this connection")
        if side.held:
            attachment.send("done", request)
            return
        memory = fields["small"] + fields["large"]
        over = domain.over(peer, memory)
        if over is not None:
            raise Refuse("limit-reached", over)
        counters = self._check_counters(carrier, descriptors, fields["small"], fields["large"])
        self.connections[number] = connection
        side.hold(memory)
        side.counters = counters
        side.belong_to(attachment)
        if is_opener and side.port >= CHOSEN_PORTS and side.port not in domain.leases:
            if side.port not in domain.chosen:
                domain.chosen.add(side.port)
                side.chosen = True
        self.resumed += 1
        self._log_connection("resume", connection, side=role)
        attachment.send("done", request)

    def _check_lane(
        self, what: str, carrier: str, descriptors: Descriptors, small: int, large: int
    ) -> Counters:
        """Check the descriptors that a program brings to a connection before anybody else gets them."""
        wanted = 1 if carrier == "sealed" else 2
        if len(descriptors) != wanted:
            raise Refuse(
                "bad-request", f"{what}: {carrier} needs {wanted} descriptors, not {len(descriptors)}"
            )
        return self._check_counters(carrier, descriptors, small, large)

    def _check_counters(self, carrier: str, descriptors: Descriptors, small: int, large: int) -> Counters:
        if not descriptors.fds or not descriptors.all_memfds():
            raise Refuse("bad-request", "a lane's descriptors are memfds")
        try:
            return Counters(carrier, descriptors.fds, small, large)
        except (ValueError, OSError) as error:
            raise Refuse("bad-request", f"{carrier}: {error}") from None

    def _ticket(self, connection: Connection, role: str) -> bytes:
        opener, accepter = connection.opener, connection.accepter
        return self._tickets.make(
            connection.number,
            opener.domain.number,
            opener.port,
            accepter.domain.number,
            accepter.port,
            connection.kind,
            connection.carrier,
            role,
        )

    def _new_number(self) -> int:
        while True:
            number = int.from_bytes(os.urandom(8), "little") >> 1
            if number and number not in self.connections:
                return number

    def _settle(self, connection: Connection) -> None:
        """A pending connection is pending no more."""
        pending = connection.pending
        if pending is not None:
            connection.pending = None
            os.close(pending.bell)
            pending.binding.waiting.discard(connection)
            connection.opener.domain.pending -= 1
            connection.accepter.domain.pending -= 1

    def _end_pending(self, connection: Connection) -> None:
        """Nothing comes of a pending connection. If its listener answers yet, it is told by `cut`."""
        self._settle(connection)
        connection.opener.release()
        connection.accepter.release()
        self.connections.pop(connection.number, None)

    def _fail_pending(self, connection: Connection, refusal: str, text: str, rule: int = 0) -> None:
        pending, attachment = connection.pending, connection.opener.attachment
        self._end_pending(connection)
        if pending is not None and attachment is not None:
            self._count_refusal(attachment.domain, refusal)
            accepter = connection.accepter
            self._log_refused(
                attachment.domain, f"{accepter.domain.name}:{accepter.port}", text, connection.rule
            )
            attachment.send("refused", pending.request, refusal=refusal, rule=rule, text=_bounded(text))

    def _end_side(self, side: Side, why: str) -> None:
        connection = side.connection
        side.release()
        if not (connection.opener.held or connection.accepter.held):
            self.connections.pop(connection.number, None)
            self._log_connection(
                "close", connection, why=why, seconds=round(self._clock() - connection.since, 3)
            )

    def _cut(self, connection: Connection, refusal: str, text: str, rule: int = 0) -> None:
        """Tell both ends to drop a connection. What they do with what they hold, they do to themselves."""
        if connection.pending is not None:
            self._fail_pending(connection, refusal, text, rule)
            return
        self.cuts += 1
        for side in (connection.opener, connection.accepter):
            if side.attachment is not None:
                side.attachment.send(
                    "cut", 0, connection=connection.number, refusal=refusal, text=_bounded(text)
                )
            side.release()
        self.connections.pop(connection.number, None)
        self._log_connection("cut", connection, why=text, by=rule)

    # Status.

    def _status(self, attachment: Attachment, request: int, fields: dict[str, Any], _: Descriptors) -> None:
        offset = fields["offset"]
        if offset == 0 or not attachment.report:
            # It costs as much as many messages, so it counts as many.
            entries = len(attachment.domain.leases) + attachment.domain.connections
            attachment.domain.tokens -= 10 + min(entries, REPORT_ENTRIES) / 8
            attachment.report = json.dumps(self.describe_domain(attachment.domain), separators=(",", ":"))
        report = attachment.report
        piece = report[offset : offset + REPORT_PIECE]
        if offset + len(piece) >= len(report):
            attachment.report = ""
        attachment.send("report", request, offset=offset, total=len(report), text=piece)

    def describe_domain(self, domain: Domain) -> dict[str, Any]:
        """A domain, its ports and its connections, as JSON; long lists are cut short."""
        attachments = sorted(domain.attachments, key=lambda a: a.number)
        listeners = sorted(domain.listeners(), key=lambda b: (b.port, b.partner))
        sides = [side for attachment in attachments for side in attachment.sides]
        return {
            **self.summarise_domain(domain),
            "programs": [
                {
                    "program": a.program,
                    "pid": a.pid,
                    "uid": a.uid,
                    "ports": len(a.leases),
                    "connections": len(a.sides),
                }
                for a in attachments[:REPORT_ENTRIES]
            ],
            "ports": [
                {
                    "port": b.port,
                    "kind": b.kind,
                    "partner": self._partner_name(b.partner),
                    "pid": b.attachment.pid,
                }
                for b in listeners[:REPORT_ENTRIES]
            ],
            "connections": [self._describe_side(side) for side in sides[:REPORT_ENTRIES]],
        }

    def summarise_domain(self, domain: Domain) -> dict[str, Any]:
        limits = domain.limits
        return {
            "node": self.node,
            "epoch": self.epoch,
            "domain": domain.name,
            "number": domain.number,
            "group": domain.group,
            "holds": {
                "attachments": [len(domain.attachments), limits.attachments],
                "ports": [domain.bound, limits.ports],
                "connections": [domain.connections, limits.connections],
                "lanes": [domain.lanes, limits.lanes],
                "memory": [domain.memory, limits.memory],
                "pending": [domain.pending, limits.pending],
            },
            "refused": dict(sorted(domain.refusals.items())),
            "traffic": {path: self._traffic(domain, path) for path in sorted(domain.traffic)},
        }

    def _traffic(self, domain: Domain, path: str) -> dict[str, int]:
        traffic = domain.traffic[path]
        return {name: getattr(traffic, name) for name in traffic.__slots__}

    def traffic_now(self) -> dict[tuple[str, str], tuple[int, int, int, int, int]]:
        """For each domain and path: connections so far, bytes and messages sent, bytes and messages received."""
        found: dict[tuple[str, str], list[int]] = {}
        for domain in self.domains.values():
            for path, t in domain.traffic.items():
                found[domain.name, path] = [
                    t.connections, t.sent_bytes, t.sent_messages, t.received_bytes, t.received_messages
                ]  # fmt: skip
        for connection in self.connections.values():
            for side in (connection.opener, connection.accepter):
                sums = found.get((side.domain.name, connection.carrier))
                if side.counters is not None and sums is not None:
                    for index, value in enumerate(side.counters.read(), 1):
                        sums[index] += value
        return {key: (v[0], v[1], v[2], v[3], v[4]) for key, v in found.items()}

    def _partner_name(self, partner: int) -> str | None:
        if partner == ANYBODY:
            return None
        domain = self._numbers.get(partner)
        return domain.name if domain is not None else str(partner)

    def _describe_side(self, side: Side) -> dict[str, Any]:
        connection = side.connection
        other = connection.accepter if side is connection.opener else connection.opener
        counters = side.counters.read() if side.counters is not None else (0, 0, 0, 0)
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
            "seconds": round(self._clock() - connection.since, 3),
            "sent_bytes": counters[0],
            "sent_messages": counters[1],
            "received_bytes": counters[2],
            "received_messages": counters[3],
        }

    def describe_connections(self) -> Iterable[dict[str, Any]]:
        """Every connection, seen from its opener, or from its accepter where the opener has gone."""
        for connection in self.connections.values():
            side = connection.opener if connection.opener.held else connection.accepter
            yield {"domain": side.domain.name, **self._describe_side(side)}

    # Time.

    def _arm(self) -> None:
        if not self._sweeping:
            self._sweeping = True
            self.loop.call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        """Everything that waits for time to pass, in one place; runs only while something does."""
        self._sweeping = False
        now = self.loop.time()
        while self._pending:
            connection = self._pending[0]
            if connection.pending is not None:
                if connection.pending.deadline > now:
                    break
                self._fail_pending(connection, "timed-out", "the listener's program did not answer")
            self._pending.popleft()
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
        waiting_doors = False
        for door in self._doors.values():
            if door.paused:
                if door.domain.refill(now) >= 1:
                    door.resume()
                else:
                    waiting_doors = True
        if self._pending or self._strangers or self._paused or self._blocked or waiting_doors:
            self._arm()

    # Logs and counts.

    def _count_refusal(self, domain: Domain, refusal: str) -> None:
        self.refusals[refusal] = self.refusals.get(refusal, 0) + 1
        domain.refusals[refusal] = domain.refusals.get(refusal, 0) + 1

    def _log_refused(self, source: Domain, where: str, why: str, rule: int) -> None:
        self.log.tenant(source.name, "refuse", to=where, rule=rule, why=why)

    def _log_connection(self, event: str, connection: Connection, **more: Any) -> None:
        opener, accepter = connection.opener, connection.accepter
        self.log.tenant(
            opener.domain.name,
            event,
            connection=f"{connection.number:016x}",
            port=opener.port,
            peer=accepter.domain.name,
            peer_port=accepter.port,
            path=connection.carrier,
            rule=connection.rule,
            **more,
        )

    def stop(self) -> None:
        """Close every door and attachment. Connections live on without the broker."""
        for door in self._doors.values():
            door.close(remove=False)
        self._doors.clear()
        for domain in self.domains.values():
            for attachment in list(domain.attachments):
                attachment.close("the broker stops")


_LISTENERS_MAY_SAY = {
    "backlog-full": "its backlog is full",
    "limit-reached": "its program has reached a limit",
    "nobody-listens": _NOBODY,
    "path-unavailable": "its program cannot take this path",
}


def _why(decision: Decision) -> str:
    if decision.strict:
        return f"same kernel; {decision.why}; strict, so the kernel copies"
    return f"same kernel; {decision.why}; not strict"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 70 else text[:67] + "...")


def _bounded(text: str) -> str:
    data = text.encode("utf-8", "replace")
    return text if len(data) <= CONTROL_TEXT_MAX else data[: CONTROL_TEXT_MAX - 4].decode("utf-8", "ignore")


__all__ = ["Broker", "DoorError", "Fault", "Policy", "Refuse", "built_in_rule"]
