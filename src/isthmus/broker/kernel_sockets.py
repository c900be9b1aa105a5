"""Connections whose ends are kernel sockets: what unmodified programs get, and all who insist on a
descriptor.

The broker makes both ends and keeps neither, so it is never told when one closes; its `Living` says which
ends still exist, and is asked when somebody wants to know. A side belongs to the attachment that asked for
it only for what the broker has to say to it: the connection outlives it.

Format: docs/formats/control.md.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from isthmus._native import ANY_PORT, Living, unix_socket_kind

from .addresses import owns, parse
from .answers import Refuse, shown
from .attachment import Attachment, OutOfDescriptors
from .connection import SOCKET, Connection, Pending, Side, path_text
from .descriptors import Descriptors
from .directory import Binding, Domain, Fallback

if TYPE_CHECKING:
    from .core import Broker
    from .policy import Decision

#: How often the broker looks which ends still exist while nobody asks.
SWEEP_S = 5.0
#: A look takes a while; for so many times as long there is no other one because of limits.
REST = 10
#: Different reasons for taking the ordinary network that are kept for each domain.
FALLBACKS_MAX = 64
#: Do not let the other side pass descriptors (Linux 6.16).
SO_PASSRIGHTS = 83

_TYPES = {"stream": socket.SOCK_STREAM, "seqpacket": socket.SOCK_SEQPACKET}


class KernelSockets:
    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._living = Living()
        self._sides: dict[int, Side] = {}
        self._armed = False
        self._rest_until = 0.0

    def handle_connect(
        self, attachment: Attachment, request: int, fields: dict[str, Any], _: Descriptors
    ) -> None:
        source, port = attachment.domain, fields["to_port"]
        destination, binding, decision = self._broker.introductions.admit(
            source, fields["to"], port, fields["kind"]
        )
        where = f"{destination.name}:{port}"
        if binding.port == ANY_PORT:
            # A guest. Whatever listens at this port of its socket device need not be what listens on TCP.
            if _is_address(fields["to"]):
                raise Refuse("nobody-listens", f"{where}: nobody listens there")
        elif not binding.attachment.brings_sockets:
            raise Refuse(
                "path-unavailable",
                f"{where}: its program uses Isthmus itself and takes no kernel sockets; "
                "connect with isthmus.create_connection",
                decision.rule,
            )
        origin = (self.source_address(source, fields["source"]), fields["source_port"])
        named = fields["to"] if _is_address(fields["to"]) else ""
        admitted = (destination, binding, decision)
        ahead = bool(fields["ahead"])
        self.introduce(attachment, request, fields["kind"], admitted, port, origin, named, ahead=ahead)

    def introduce(
        self,
        attachment: Attachment,
        request: int,
        kind: str,
        admitted: tuple[Domain, Binding, Decision],
        port: int,
        origin: tuple[str, int],
        named: str = "",
        from_port: int = 0,
        *,
        ahead: bool = False,
    ) -> None:
        """Make a pair of sockets, and ask the listener's program to take its end.

        Parameters
        ----------
        admitted : the listener, as `Introductions.admit` found it
        port : int
            Of the listener's domain.
        origin : address and port
            What the listener is told of where the connection comes from; may be empty.
        named : str
            The address that the opener asked for, if it was one.
        from_port : int
            A port that the opener has leased; 0 lets the broker choose one.
        ahead : bool
            Ahead of its use: it is shown and counted as opened once the opener takes it.
        """
        source = attachment.domain
        introductions = self._broker.introductions
        destination, binding, decision = admitted
        if kind not in _TYPES:
            raise Refuse("wrong-kind", f"there are no kernel sockets for {kind}")
        if kind != "stream" and "vm" in (source.kind, destination.kind):
            raise Refuse("wrong-kind", "kernel sockets of guests are streams")
        self._sweep_at_limits(source, destination)
        listener = introductions.room_for(source, destination, binding, 0, decision.rule, lanes=0)
        connection = Connection(
            introductions.new_number(),
            kind,
            SOCKET,
            decision.rule,
            path_text(decision, SOCKET, source, destination),
            self._broker.clock(),
            (source, from_port or source.choose_port()),
            (destination, port),
        )
        connection.ahead = ahead
        try:
            ours, theirs = (end.detach() for end in _pair(_TYPES[kind]))
        except OSError as error:
            raise Refuse("limit-reached", f"the broker is out of descriptors: {error.strerror}") from None
        try:
            introductions.tell_terms(listener, connection, decision)
            listener.send(
                "incoming-socket",
                0,
                (theirs,),
                connection=connection.number,
                **{"from": source.number},
                from_name=source.name,
                from_port=connection.opener.port,
                source=origin[0],
                source_port=origin[1],
                port=port,
                partner=binding.partner,
                destination=named,
                kind=kind,
                ahead=ahead,
                why=connection.why,
                ticket=introductions.ticket(connection, "accepter"),
            )
            self._watch(connection.accepter, theirs)
            self._watch(connection.opener, ours)
        except BaseException:
            os.close(ours)
            for side in (connection.opener, connection.accepter):
                self._sides.pop(_token(side), None)
            raise
        finally:
            os.close(theirs)
        introductions.enter(connection, attachment, binding, 0, from_port)
        for side in (connection.opener, connection.accepter):
            side.domain.sockets.add(side)
        connection.pending = Pending(request, binding, ours, 0, 0, 0, self._broker.answer_deadline())

    def accepted(self, connection: Connection, descriptors: Descriptors) -> None:
        """The listener's program has taken its end, or brings one for the opener."""
        introductions = self._broker.introductions
        opener, accepter, pending = connection.opener, connection.accepter, connection.pending
        assert opener.attachment is not None
        assert pending is not None
        end = pending.bell
        if len(descriptors) and opener.domain.kind == "vm":
            # The switch would read it, which serves all guests and must not wait; but whoever keeps a copy of
            # a socket can make others wait who use it.
            introductions.fail_pending(
                connection,
                "path-unavailable",
                "a program that listens with isthmus.kernel_server takes nobody in from a guest; "
                "start it with `isthmus run`, or listen with isthmus.create_server",
            )
            return
        if len(descriptors):
            end = descriptors.fds[0]
            if unix_socket_kind(end) != connection.kind:
                text = "the listener answered with what is no connected Unix socket"
                introductions.fail_pending(connection, "peer-gone", text)
                return
            self._watch_only(connection, end)
        decision = self._broker.policy.look(opener.domain, accepter.domain, accepter.port)
        try:
            introductions.tell_terms(opener.attachment, connection, decision)
            opener.attachment.send(
                "connected-socket",
                pending.request,
                (end,),
                connection=connection.number,
                to=accepter.domain.number,
                to_name=accepter.domain.name,
                to_port=accepter.port,
                from_port=opener.port,
                why=connection.why,
                ticket=introductions.ticket(connection, "opener"),
            )
        except OutOfDescriptors:
            introductions.fail_pending(connection, "limit-reached", "no more descriptors can be in flight")
            return
        introductions.settle(connection)
        if not connection.ahead:
            introductions.opens(connection)

    def handle_take(self, attachment: Attachment, _: int, fields: dict[str, Any], __: Descriptors) -> None:
        """A connection that was made ahead is used: either side says so."""
        connection = self._broker.introductions.connections.get(fields["connection"])
        if connection is not None and connection.side_of(attachment) is not None:
            self._take(connection)

    def _take(self, connection: Connection) -> None:
        if connection.ahead and connection.pending is None:
            connection.ahead = False
            self._broker.introductions.opens(connection)

    def handle_resume(
        self, attachment: Attachment, request: int, fields: dict[str, Any], descriptors: Descriptors
    ) -> None:
        """After a restart: a program shows an end that it, or a program it looks after, holds."""
        if len(descriptors) != 1:
            raise Refuse("bad-request", f"resume-socket: it needs 1 descriptor, not {len(descriptors)}")
        side = self._broker.introductions.resumed_side(attachment, {**fields, "carrier": SOCKET})
        if side.held:
            # It was this program's before, and the broker never forgot.
            side.belong_to(attachment)
            # And whoever shows it uses it.
            self._take(side.connection)
            attachment.send("done", request)
            return
        over = side.domain.over(side.peer, 0, 0)
        if over is not None:
            raise Refuse("limit-reached", over)
        if unix_socket_kind(descriptors.fds[0]) != side.connection.kind:
            raise Refuse("bad-request", "resume-socket: the descriptor is not the Unix socket")
        self._watch(side, descriptors.fds[0])
        self._broker.introductions.resume(attachment, side, 0)
        side.domain.sockets.add(side)
        attachment.send("done", request)

    def handle_fallback(
        self, attachment: Attachment, _: int, fields: dict[str, Any], __: Descriptors
    ) -> None:
        """For the operator: a program took the ordinary network, or was refused it."""
        known = attachment.domain.fallbacks
        to, why = _printable(fields["to"], 64), _printable(fields["why"], 300)
        key = (to, fields["to_port"], bool(fields["refused"]), why)
        # Taken out and put back, so that the newest are last.
        entry = known.pop(key, None) or Fallback()
        entry.count += fields["count"]
        entry.last = self._broker.clock()
        known[key] = entry
        if len(known) > FALLBACKS_MAX:
            del known[next(iter(known))]

    def handle_addresses(
        self, attachment: Attachment, request: int, fields: dict[str, Any], _: Descriptors
    ) -> None:
        self._broker.addresses.claim(attachment, fields["list"])
        attachment.send("done", request)

    def sweep(self) -> None:
        """Look which ends still exist, and end the sides of those that do not."""
        if not self._sides:
            return
        began = self._broker.loop.time()
        connections = self._broker.introductions.connections
        living = set(self._living.tokens())
        for token in [token for token in self._sides if token not in living]:
            side = self._sides[token]
            if side.connection.pending is not None:
                continue
            del self._sides[token]
            if side.connection.number not in connections:
                side.release()
            elif side.held:
                self._broker.introductions.end_side(side, "closed")
        ended = self._broker.loop.time()
        self._rest_until = ended + REST * (ended - began)

    def sweep_for_tenants(self) -> None:
        """The same, but no tenant can make us do it all the time."""
        if self._broker.loop.time() >= self._rest_until:
            self.sweep()

    def _watch(self, side: Side, fd: int) -> None:
        self._living.add(fd, _token(side))
        self._sides[_token(side)] = side
        if not self._armed:
            self._armed = True
            self._broker.loop.call_later(SWEEP_S, self._sweep_again)

    def _watch_only(self, connection: Connection, fd: int) -> None:
        """Nobody but the listener's kernel knows its end; both sides end with the opener's."""
        copy = os.dup(fd)
        try:
            self._watch(connection.opener, fd)
            self._watch(connection.accepter, copy)
        finally:
            os.close(copy)

    def _sweep_again(self) -> None:
        self.sweep()
        self._armed = bool(self._sides)
        if self._armed:
            self._broker.loop.call_later(SWEEP_S, self._sweep_again)

    def _sweep_at_limits(self, source: Domain, destination: Domain) -> None:
        """Nobody meets a limit because of connections that are over."""
        if source.over(destination, 0, 0) or destination.over(source, 0, 0):
            self.sweep_for_tenants()

    def source_address(self, source: Domain, text: str) -> str:
        """What the listener is told of where the connection comes from.

        Raises
        ------
        Refuse
            It is not one of the domain's.
        """
        if not text:
            return next((str(address) for address in self._broker.addresses.of(source)), "")
        try:
            address = parse(text)
        except ValueError:
            raise Refuse("bad-request", f"connect-socket: {shown(text)} is not an address") from None
        if not owns(source, address):
            raise Refuse(
                "wrong-address", f"the operator did not give {address} to domain {source.name} (addresses)"
            )
        if self._broker.addresses.owner(address) not in (None, source):
            raise Refuse("wrong-address", f"{address} is another domain's now, not {source.name}'s")
        return text


def _printable(text: str, limit: int) -> str:
    """A tenant's words, for the operator's terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:limit])


def _is_address(text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True


def _token(side: Side) -> int:
    return side.connection.number << 1 | (side is side.connection.opener)


def _pair(kind: socket.SocketKind) -> tuple[socket.socket, socket.socket]:
    ends = socket.socketpair(socket.AF_UNIX, kind)
    for end in ends:
        try:
            end.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        except OSError:
            break
    return ends
