"""Bringing two programs together: from `connect` to the end of both sides.

A connection is *pending* from the opener's `connect` until the listener's program answers `incoming`. Then
both ends hold their descriptors, the broker closes its own copies, and keeps only read-only counter pages
for the accounts. Each side ends on its own: by `close`, by the death of its program, or by the broker's
`cut`.

Format: docs/formats/control.md.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from isthmus._native import ANY_PORT, CARRIERS, bell_pair

from .answers import Refuse, bounded, shown
from .attachment import Attachment, OutOfDescriptors
from .connection import SOCKET, Connection, Pending, Side, path_of, path_text
from .descriptors import Descriptors
from .directory import CHOSEN_PORTS, Binding, Domain
from .lanes import check_lane, check_page
from .log import Log
from .policy import WEIGHT_DEFAULT, Decision
from .tickets import Tickets

if TYPE_CHECKING:
    from .core import Broker

#: How long a listener's program may take to answer `incoming`.
ANSWER_S = 5.0
#: A connect that gets as far as its descriptors is worth so many messages more.
CONNECT_COSTS = 3

#: What a `drop` rule must not be told apart from.
_NOBODY = "nobody listens there"
_LISTENERS_MAY_SAY = {
    "backlog-full": "its backlog is full",
    "limit-reached": "its program has reached a limit",
    "nobody-listens": _NOBODY,
    "path-unavailable": "its program cannot take this path",
    "wrong-address": "its network does not have this address",
}


class Introductions:
    """All connections of the node."""

    def __init__(self, broker: Broker, tickets: Tickets, log: Log, clock: Callable[[], float]) -> None:
        self.connections: dict[int, Connection] = {}
        #: Connections opened, by path; cut; sides taken up again after a restart.
        self.opened: dict[str, int] = {path: 0 for path in sorted({*CARRIERS, SOCKET})}
        self.cuts = 0
        self.resumed = 0
        self._broker = broker
        self._tickets = tickets
        self._log = log
        self._clock = clock
        self._pending: deque[Connection] = deque()

    def handle_connect(
        self, attachment: Attachment, request: int, fields: dict[str, Any], descriptors: Descriptors
    ) -> None:
        source = attachment.domain
        port, kind, carrier = fields["to_port"], fields["kind"], fields["carrier"]
        destination, binding, decision = self.admit(source, fields["to"], port, kind)
        where = f"{destination.name}:{port}"
        if binding.attachment.brings_sockets and ANY_PORT in attachment.leases:
            # A guest's program that speaks plain AF_VSOCK: to it one is like the other.
            from_port = self._leased(attachment, fields["from_port"])
            admitted = (destination, binding, decision)
            origin = (self._broker.kernel_sockets.source_address(source, ""), from_port & 0xFFFF)
            self._broker.kernel_sockets.introduce(
                attachment, request, kind, admitted, port, origin, from_port=from_port
            )
            return
        if binding.attachment.brings_sockets:
            raise Refuse(
                "path-unavailable",
                f"{where}: an unmodified program under `isthmus run`, or one that listens with "
                "isthmus.kernel_server; connect with isthmus.kernel_socket",
                decision.rule,
            )
        wanted = path_of(decision, source, destination)
        if carrier != wanted:
            if fields["require"]:
                raise Refuse(
                    "path-unavailable",
                    f"{where}: {carrier} is required, but {path_text(decision, wanted, source, destination)}",
                    decision.rule,
                )
            raise Refuse("use-carrier", wanted, decision.rule)
        from_port = self._leased(attachment, fields["from_port"])
        source.tokens -= CONNECT_COSTS
        small, large = fields["small"], fields["large"]
        memory = small + large
        if max(small, large) > source.limits.ring:
            raise Refuse(
                "limit-reached",
                f"ring: a ring of domain {source.name} has at most {source.limits.ring} bytes",
            )
        listener = self.room_for(source, destination, binding, memory, decision.rule)
        counters = check_lane("connect", carrier, descriptors, small, large)

        number = self.new_number()
        connection = Connection(
            number,
            kind,
            carrier,
            decision.rule,
            path_text(decision, carrier, source, destination),
            self._clock(),
            (source, from_port or source.choose_port()),
            (destination, port),
        )
        try:
            ours, theirs = bell_pair()
        except OSError as error:
            raise Refuse("limit-reached", f"the broker is out of descriptors: {error.strerror}") from None
        secret = int.from_bytes(os.urandom(8), "little") | 1
        try:
            self.tell_terms(listener, connection, decision)
            listener.send(
                "incoming",
                0,
                (descriptors.fds[0], theirs),
                connection=number,
                secret=secret,
                **{"from": source.number},
                from_name=source.name,
                from_port=connection.opener.port,
                port=port,
                partner=binding.partner,
                kind=kind,
                carrier=carrier,
                small=small,
                large=large,
                why=connection.why,
                ticket=self.ticket(connection, "accepter"),
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        connection.opener.counters = counters
        self.enter(connection, attachment, binding, memory, from_port)
        deadline = self._broker.answer_deadline()
        connection.pending = Pending(request, binding, ours, secret, small, large, deadline)

    def admit(self, source: Domain, to: str, port: int, kind: str) -> tuple[Domain, Binding, Decision]:
        """Whom a connect is for: the domain, its listener, and what the policy says.

        Raises
        ------
        Refuse
            There is no such domain, nobody listens there for this one, or the policy does not have it.
        """
        destination = self._broker.find_domain(to)
        if destination is None:
            raise Refuse("unknown-domain", f"there is no domain {shown(to)} on this node")
        where = f"{destination.name}:{port}"
        decision = self._broker.policy.decide(source, destination, port)
        if not decision.accepted:
            self._log_refused(source, where, decision.why, decision.rule)
            if decision.action == "drop":
                raise Refuse("nobody-listens", f"{where}: {_NOBODY}")
            hint = f"the operator sees why: isthmus explain {source.name} {destination.name} --port {port}"
            raise Refuse(
                "refused-by-rule", f"{source.name} to {where}: {decision.why}; {hint}", decision.rule
            )
        binding = destination.listener(port, source.number)
        if binding is None:
            raise Refuse("nobody-listens", f"{where}: {_NOBODY}")
        if binding.kind != kind and (binding.port != ANY_PORT or kind == "datagram"):
            raise Refuse("wrong-kind", f"{where}: a {binding.kind} listener, not {kind}")
        return destination, binding, decision

    def _leased(self, attachment: Attachment, port: int) -> int:
        # Whoever stands for all ports of a guest knows the guest's ports.
        if port and port not in attachment.leases and ANY_PORT not in attachment.leases:
            raise Refuse("not-yours", f"connect: port {port} is not leased by this program")
        return port

    def room_for(
        self,
        source: Domain,
        destination: Domain,
        binding: Binding,
        memory: int,
        rule: int,
        lanes: int = 2,
    ) -> Attachment:
        """The listener's program, if both domains and it have room for one more connection.

        Raises
        ------
        Refuse
            They have not; says which limit.
        """
        where = f"{destination.name}:{binding.port}"
        over = source.over(destination, memory, lanes) or destination.over(source, 0, lanes)
        if over is not None:
            self._log_refused(source, where, f"limit reached: {over}", rule)
            raise Refuse("limit-reached", over)
        if binding.attachment.crowded:
            raise Refuse("backlog-full", f"{where}: its program does not read")
        return binding.attachment

    def enter(
        self, connection: Connection, attachment: Attachment, binding: Binding, memory: int, from_port: int
    ) -> None:
        """Count a connection whose listener has been asked. The caller sets `pending`."""
        opener, accepter = connection.opener, connection.accepter
        opener.hold(memory)
        opener.belong_to(attachment)
        if not from_port:
            opener.chosen = True
            opener.domain.chosen.add(opener.port)
        accepter.hold(0)
        accepter.belong_to(binding.attachment)
        opener.domain.wait_for(accepter.domain, 1)
        accepter.domain.wait_for(opener.domain, 1)
        binding.waiting.add(connection)
        self.connections[connection.number] = connection
        self._pending.append(connection)
        self._broker.arm()

    def handle_accept(
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
        if connection.carrier == SOCKET:
            self._broker.kernel_sockets.accepted(connection, descriptors)
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
            accepter.counters = check_lane("accept", connection.carrier, descriptors, small, large)
        except Refuse as refused:
            self._broker.count_refusal(accepter.domain, refused.refusal)
            text = bounded(refused.text)
            attachment.send("cut", 0, connection=connection.number, refusal=refused.refusal, text=text)
            if refused.refusal == "limit-reached":
                self.fail_pending(connection, "limit-reached", text)
            else:
                self.fail_pending(connection, "peer-gone", "the listener answered with a bad lane")
            return
        accepter.bring(small + large)
        assert opener.attachment is not None
        try:
            self.tell_terms(
                opener.attachment,
                connection,
                self._broker.policy.look(opener.domain, accepter.domain, accepter.port),
            )
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
                ticket=self.ticket(connection, "opener"),
            )
        except OutOfDescriptors:
            text = "no more descriptors can be in flight"
            attachment.send("cut", 0, connection=connection.number, refusal="limit-reached", text=text)
            self.fail_pending(connection, "limit-reached", text)
            return
        self.settle(connection)
        self.opens(connection)

    def opens(self, connection: Connection) -> None:
        """Count and log a connection that both ends have."""
        self.opened[connection.carrier] += 1
        for domain in {connection.opener.domain, connection.accepter.domain}:
            domain.account(connection.carrier).connections += 1
        self._log_connection("open", connection, why=connection.why)

    def handle_refuse(self, attachment: Attachment, _: int, fields: dict[str, Any], __: Descriptors) -> None:
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
        self.fail_pending(
            connection, refusal, f"{accepter.domain.name}:{accepter.port}: {_LISTENERS_MAY_SAY[refusal]}"
        )

    def handle_close(self, attachment: Attachment, _: int, fields: dict[str, Any], __: Descriptors) -> None:
        connection = self.connections.get(fields["connection"])
        side = connection.side_of(attachment) if connection is not None else None
        # Unknown: it was cut while the message was under way.
        # And whose kernel socket is closed, the broker sees by itself.
        if (
            connection is not None
            and side is not None
            and connection.pending is None
            and connection.carrier != SOCKET
        ):
            self.end_side(side, "closed")

    def handle_resume(
        self, attachment: Attachment, request: int, fields: dict[str, Any], descriptors: Descriptors
    ) -> None:
        side = self.resumed_side(attachment, fields)
        if side.held:
            attachment.send("done", request)
            return
        memory = fields["small"] + fields["large"]
        over = side.domain.over(side.peer, memory)
        if over is not None:
            raise Refuse("limit-reached", over)
        side.counters = check_page("resume", fields["carrier"], descriptors, fields["small"], fields["large"])
        self.resume(attachment, side, memory)
        attachment.send("done", request)

    def resumed_side(self, attachment: Attachment, fields: dict[str, Any]) -> Side:
        """The side that a program shows a ticket for: the one that is known, or a new one.

        Raises
        ------
        Refuse
            The ticket is not for that, another program has it, or today's policy would not have it.
        """
        domain = attachment.domain
        peer = self._broker.domain_numbered(fields["peer"])
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
            decision = self._broker.policy.look(source, destination, ends[3])
            if not decision.accepted:
                raise Refuse("refused-by-rule", f"resume: {decision.why}", decision.rule)
            if decision.strict and carrier == "sealed":
                raise Refuse("refused-by-rule", f"resume: {decision.why} but is strict now", decision.rule)
            connection = Connection(
                number,
                kind,
                carrier,
                decision.rule,
                path_text(decision, carrier, source, destination),
                self._clock(),
                (source, ends[1]),
                (destination, ends[3]),
            )
        side = connection.opener if is_opener else connection.accepter
        if side.held and side.attachment is not attachment and side.attachment is not None:
            if side.attachment.is_gone():
                side.attachment.close("gone")
                return self.resumed_side(attachment, fields)
            raise Refuse("not-yours", "resume: another program holds this connection")
        return side

    def resume(self, attachment: Attachment, side: Side, memory: int) -> None:
        """Count a side that was taken up again."""
        connection, domain = side.connection, side.domain
        is_opener = side is connection.opener
        self.connections[connection.number] = connection
        side.hold(memory)
        side.belong_to(attachment)
        taken = side.port in domain.leases or side.port in domain.chosen
        if is_opener and side.port >= CHOSEN_PORTS and not taken:
            domain.chosen.add(side.port)
            side.chosen = True
        self._broker.windows.tell(side.other)
        self.resumed += 1
        self._log_connection("resume", connection, side="opener" if is_opener else "accepter")

    def tell_terms(self, attachment: Attachment, connection: Connection, decision: Decision) -> None:
        """Tell the switch how to serve a connection of a guest."""
        rule = decision.matched
        if attachment.domain.kind != "vm" or rule is None:
            return
        attachment.send(
            "terms",
            0,
            connection=connection.number,
            **{"class": rule.priority or 0},
            weight=rule.weight or WEIGHT_DEFAULT,
            rate=(rule.rate or 0) // 8,
        )

    def ticket(self, connection: Connection, role: str) -> bytes:
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

    def new_number(self) -> int:
        while True:
            number = int.from_bytes(os.urandom(8), "little") >> 1
            if number and number not in self.connections:
                return number

    def settle(self, connection: Connection) -> None:
        """A pending connection is pending no more."""
        pending = connection.pending
        if pending is not None:
            connection.pending = None
            os.close(pending.bell)
            pending.binding.waiting.discard(connection)
            opener, accepter = connection.opener.domain, connection.accepter.domain
            opener.wait_for(accepter, -1)
            accepter.wait_for(opener, -1)

    def end_pending(self, connection: Connection) -> None:
        """Nothing comes of a pending connection. If its listener answers yet, it is told by `cut`."""
        self.settle(connection)
        connection.opener.release()
        if connection.carrier != SOCKET:
            # The listener's program has a socket in hand; it counts until that is closed.
            connection.accepter.release()
        self.connections.pop(connection.number, None)

    def fail_pending(self, connection: Connection, refusal: str, text: str, rule: int = 0) -> None:
        pending, attachment = connection.pending, connection.opener.attachment
        self.end_pending(connection)
        if pending is not None and attachment is not None:
            self._broker.count_refusal(attachment.domain, refusal)
            accepter = connection.accepter
            self._log_refused(
                attachment.domain, f"{accepter.domain.name}:{accepter.port}", text, connection.rule
            )
            attachment.send("refused", pending.request, refusal=refusal, rule=rule, text=bounded(text))

    def end_side(self, side: Side, why: str) -> None:
        connection = side.connection
        side.release()
        if not (connection.opener.held or connection.accepter.held):
            self.connections.pop(connection.number, None)
            if connection.ahead:
                return
            self._log_connection(
                "close", connection, why=why, seconds=round(self._clock() - connection.since, 3)
            )

    def cut(self, connection: Connection, refusal: str, text: str, rule: int = 0) -> None:
        """Tell both ends to drop a connection. What they do with what they hold, they do to themselves."""
        if connection.pending is not None:
            self.fail_pending(connection, refusal, text, rule)
            return
        self.cuts += 1
        for side in (connection.opener, connection.accepter):
            if side.attachment is not None:
                side.attachment.send(
                    "cut", 0, connection=connection.number, refusal=refusal, text=bounded(text)
                )
            side.release()
        self.connections.pop(connection.number, None)
        self._log_connection("cut", connection, why=text, by=rule)

    def handle_timeout(self, now: float) -> bool:
        """Give up on listeners that did not answer. Returns whether any answer is still due."""
        while self._pending:
            connection = self._pending[0]
            if connection.pending is not None:
                if connection.pending.deadline > now:
                    break
                self.fail_pending(connection, "timed-out", "the listener's program did not answer")
            self._pending.popleft()
        return bool(self._pending)

    def _log_refused(self, source: Domain, where: str, why: str, rule: int) -> None:
        self._log.tenant(source.name, "refuse", to=where, rule=rule, why=why)

    def _log_connection(self, event: str, connection: Connection, **more: Any) -> None:
        opener, accepter = connection.opener, connection.accepter
        if not self._log.admits(opener.domain.name):
            return
        self._log.admitted(
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
