"""Everything Isthmus raises on purpose.

Each class says whose fault it was and what state the world is in afterwards, and has the built-in exception
that socket code expects as its second base: ``except ConnectionRefusedError`` works for people who never read
this page. All are ``OSError``; ``errno`` is set to what a kernel socket would give.
"""

from __future__ import annotations

import errno as _errno

__all__ = [
    "AlreadyConnected",
    "BacklogFull",
    "BrokerLost",
    "Closed",
    "ConnectionCut",
    "DomainRemoved",
    "Forked",
    "Interrupted",
    "IsthmusError",
    "LaneFailed",
    "LimitReached",
    "MXError",
    "MessageTooLarge",
    "NoBroker",
    "NobodyListens",
    "NotConnected",
    "NotYours",
    "PathUnavailable",
    "PeerClosed",
    "PeerFault",
    "PeerReset",
    "PortInUse",
    "ProtocolFault",
    "Refused",
    "RefusedByRule",
    "TimedOut",
    "UnknownDomain",
    "Unsupported",
    "WildcardNeedsRule",
    "WouldBlock",
    "WrongKind",
    "WrongState",
]


class IsthmusError(OSError):
    """Anything this package raises on purpose."""

    #: Bytes that went through before the error: they are in the lane, or in the caller's buffer.
    done: int = 0


class NoBroker(IsthmusError, ConnectionRefusedError):
    """No broker answers at the door. Nothing was sent."""


class BrokerLost(IsthmusError, ConnectionAbortedError):
    """The broker went away while it was asked. Ask again; established connections live on."""


class ProtocolFault(IsthmusError):
    """The broker or a peer's engine answered something that cannot be. Nothing was opened."""


class Refused(IsthmusError):
    """The broker refused. Nothing was opened; `rule` is the number of the rule that decided, 0 for none."""

    rule: int = 0
    #: The refusal's word, as in ``isthmus status`` and the logs.
    refusal: str = ""


class UnknownDomain(Refused):
    """No domain has this name or number. ``isthmus domain list`` shows those there are."""


class RefusedByRule(Refused, PermissionError):
    """A rule of the policy, or the lack of one, forbids it."""


class WildcardNeedsRule(Refused, PermissionError):
    """Listening for anybody needs a rule that lets somebody in."""


class NotYours(Refused, PermissionError):
    """The source port is not leased by this program."""


class NobodyListens(Refused, ConnectionRefusedError):
    """Nobody listens there."""


class BacklogFull(Refused, ConnectionRefusedError):
    """The listener has as many connections waiting as it takes. Try again."""


class PortInUse(Refused):
    """Another program of this domain leases the port."""


class LimitReached(Refused):
    """A limit that the operator set is reached; the text says which."""


class PathUnavailable(Refused):
    """The path that was required is not the one that policy gives."""


class WrongKind(Refused):
    """The listener's sockets are of another kind."""


class DomainRemoved(Refused, ConnectionAbortedError):
    """The operator removed the domain."""


class MessageTooLarge(IsthmusError):
    """The message can never fit this connection. Nothing was sent."""


class WouldBlock(IsthmusError, BlockingIOError):
    """It would have to wait."""


class TimedOut(IsthmusError, TimeoutError):
    """The time ran out. `done` bytes went through before."""


class Interrupted(IsthmusError, InterruptedError):
    """A signal ended the wait. `done` bytes went through before."""


class PeerClosed(IsthmusError, BrokenPipeError):
    """The other side takes nothing more. `done` bytes were put into the lane before."""


class PeerReset(IsthmusError, ConnectionResetError):
    """The other side died, or closed while data for it lay unread. What it sent before was delivered."""


class ConnectionCut(IsthmusError, ConnectionAbortedError):
    """The broker cut the connection: a rule changed, or a domain was removed."""


class PeerFault(IsthmusError, ConnectionAbortedError):
    """The other side broke the lane. This connection is useless; nothing else is."""


class LaneFailed(IsthmusError):
    """The lane's memory failed. This connection is useless."""


class MXError(IsthmusError):
    """A call of `isthmus.mx` failed, or a request ended badly. `code` is what the C interface calls it."""

    #: A number of ``mx_return_t``, or of ``mx_status_code_t`` where a request ended badly.
    code: int = 0


class Closed(IsthmusError):
    """This object was closed."""


class NotConnected(IsthmusError):
    """The socket has no other side yet. Nothing was sent or received."""


class AlreadyConnected(IsthmusError):
    """The socket has its other side already, and keeps it."""


class WrongState(IsthmusError):
    """The call does not fit what the socket was used for before. Nothing changed."""


class Unsupported(IsthmusError):
    """A flag, an option or a call that has no meaning on lanes. Nothing changed."""


class Forked(IsthmusError):
    """This object was made before ``fork()`` and belongs to the parent process."""


_REFUSALS: dict[str, tuple[type[Refused], int]] = {
    "unknown-domain": (UnknownDomain, _errno.EHOSTUNREACH),
    "refused-by-rule": (RefusedByRule, _errno.EPERM),
    "nobody-listens": (NobodyListens, _errno.ECONNREFUSED),
    "port-in-use": (PortInUse, _errno.EADDRINUSE),
    "limit-reached": (LimitReached, _errno.ENOBUFS),
    "backlog-full": (BacklogFull, _errno.ECONNREFUSED),
    "not-yours": (NotYours, _errno.EPERM),
    "wildcard-needs-rule": (WildcardNeedsRule, _errno.EPERM),
    "path-unavailable": (PathUnavailable, _errno.ENETUNREACH),
    "wrong-kind": (WrongKind, _errno.EPROTOTYPE),
    "wrong-address": (UnknownDomain, _errno.EHOSTUNREACH),
    "domain-removed": (DomainRemoved, _errno.ECONNABORTED),
}


#: What a kernel socket would give for some codes of MX.
_MX_ERRNO = {
    9: _errno.EBADF,
    13: _errno.EBADF,
    14: _errno.EINVAL,
    20: _errno.EADDRINUSE,
    30: _errno.ETIMEDOUT,
    33: _errno.ECONNREFUSED,
    34: _errno.EACCES,
    36: _errno.EHOSTUNREACH,
    42: _errno.EINVAL,
}


def refused(refusal: str, rule: int, text: str) -> IsthmusError:
    """The exception for a refusal of the broker, by its word."""
    if refusal == "timed-out":
        return TimedOut(_errno.ETIMEDOUT, text)
    if refusal == "peer-gone":
        return PeerReset(_errno.ECONNRESET, text)
    cls, number = _REFUSALS.get(refusal, (Refused, _errno.EPROTO))
    error = cls(number, text)
    error.rule = rule
    error.refusal = refusal
    return error


def mx_error(code: int, text: str) -> MXError:
    """A failure of the MX interface."""
    error = MXError(_MX_ERRNO.get(code, _errno.EIO), text)
    error.code = code
    return error
