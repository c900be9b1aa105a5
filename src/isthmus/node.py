"""A program's attachment to the broker of its node.

The door decides who a program is: each domain has its own, and a container sees the one that was mounted into
it. All sockets of a process that came through one door share one attachment, which is made when it is first
needed and made anew in a child of `os.fork`.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import sys
import threading
import types
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from isthmus import _native, errors

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DOOR_DEFAULT", "Node", "attach", "find_door", "program_name"]

#: Where a container finds its door unless it was told otherwise: the domain's directory, mounted.
DOOR_DEFAULT = "/run/isthmus/door/door"
#: Names the door, or the directory it is in.
DOOR_ENV = "ISTHMUS_DOOR"


class _Attachment:
    """What all `Node` handles of one door share: the engine's object. It detaches when these
    and all connections and listeners made through it are gone."""

    __slots__ = ("__weakref__", "door", "native")

    def __init__(self, door: str) -> None:
        self.door = door
        self.native = _native.Node(door, program_name())


_lock = threading.Lock()
_attachments: WeakValueDictionary[str, _Attachment] = WeakValueDictionary()
#: The attachment of the default door is kept: programs connect, close and connect again.
_kept: _Attachment | None = None


def _forget_after_fork() -> None:
    global _lock, _kept
    _lock = threading.Lock()
    _attachments.clear()
    _kept = None


def _finish() -> None:
    """What was sent is followed by the end, as when the kernel closes the sockets of a program that ends."""
    for attachment in list(_attachments.values()):
        attachment.native.finish()


os.register_at_fork(after_in_child=_forget_after_fork)
atexit.register(_finish)


def program_name() -> str:
    """What this program calls itself."""
    return os.path.basename(sys.argv[0] if getattr(sys, "argv", None) else "") or "python"


def find_door(door: str | os.PathLike[str] | None) -> str:
    """The path of the door: the argument, the environment's, or the usual one.

    Raises
    ------
    NoBroker
        There is none, or it is another user's.
    """
    if door is not None:
        named, whence = os.fspath(door), "the argument `door`"
    elif os.environ.get(DOOR_ENV):
        named, whence = os.environ[DOOR_ENV], f"the environment variable {DOOR_ENV}"
    else:
        named, whence = DOOR_DEFAULT, f"the usual place; {DOOR_ENV} is not set"
    path = os.path.join(named, "door") if os.path.isdir(named) else named
    try:
        os.stat(path)
    except PermissionError:
        raise errors.NoBroker(
            errno.EACCES,
            f"the door at {path} ({whence}) is another user's: the operator gives it to you with "
            "isthmus domain add NAME --uid UID",
        ) from None
    except OSError:
        raise errors.NoBroker(
            errno.ECONNREFUSED,
            f"no door at {path} ({whence}). In a container: mount the directory of its door there, or set "
            f"{DOOR_ENV}. On the host: isthmus broker, isthmus domain add NAME, {DOOR_ENV}=<dir>/doors/NAME",
        ) from None
    return path


class Node:
    """This program, as its node's broker knows it. Made by `attach`.

    A handle: all handles of one door share one attachment, which ends when the last handle is closed or gone.
    Sockets hold handles of their own.
    """

    __slots__ = ("_attachment", "_identity")

    def __init__(self, attachment: _Attachment) -> None:
        self._attachment: _Attachment | None = attachment
        self._identity = attachment.native.identity

    @property
    def native(self) -> _native.Node:
        """The engine's attachment.

        Raises
        ------
        Closed
            The handle was closed.
        """
        attachment = self._attachment
        if attachment is None:
            raise errors.Closed(errno.EBADF, "this Node was closed; isthmus.attach() makes another")
        return attachment.native

    @property
    def name(self) -> str:
        """Name of this program's domain."""
        return str(self._identity["domain_name"])

    @property
    def domain(self) -> int:
        """Number of this program's domain."""
        return int(self._identity["domain"])

    @property
    def node(self) -> str:
        """Name of the physical node."""
        return str(self._identity["node"])

    @property
    def ring_max(self) -> int:
        """Largest ring that a connection of this domain may have, bytes."""
        return int(self._identity["ring_max"])

    @property
    def door(self) -> str:
        """Path of the door it came through."""
        return "" if self._attachment is None else self._attachment.door

    @property
    def attached(self) -> bool:
        """Does a broker answer now? It attaches again by itself; connections live on meanwhile."""
        return self._attachment is not None and self.native.attached

    def resolve(self, name: str, timeout: float | None = None) -> tuple[int, str]:
        """Number and name of a domain.

        Parameters
        ----------
        name : str
            Name, or number in decimal.
        timeout : float or None, seconds, default None

        Raises
        ------
        UnknownDomain, BrokerLost, TimedOut
        """
        return self.native.resolve(name, timeout)

    def status(self, timeout: float | None = None) -> dict[str, Any]:
        """What the broker knows of this domain: ports, connections, accounts, limits.

        Raises
        ------
        BrokerLost, TimedOut
        """
        report: dict[str, Any] = json.loads(self.native.status(timeout))
        return report

    def close(self) -> None:
        """Give the handle back. Sockets made with it live on. Harmless when repeated."""
        self._attachment = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._attachment is None else f"at {self.door}"
        return f"<isthmus.Node {self.name} on {self.node}, {state}>"

    def _again(self) -> Node:
        """Another handle of the same attachment."""
        if self._attachment is None:
            self.native  # noqa: B018  # says that it was closed
        assert self._attachment is not None
        return Node(self._attachment)


def attach(door: str | os.PathLike[str] | None = None) -> Node:
    """Attach this program to its node's broker.

    Sockets do this by themselves. Call it to learn who you are, or to come through several doors.

    Parameters
    ----------
    door : path, optional
        The door, or the directory it is in. By default what ``ISTHMUS_DOOR`` names, or else
        ``/run/isthmus/door/door``, where a container finds the door that was mounted into it.

    Returns
    -------
    Node
        A handle. One process has one attachment for each door, however often it asks.

    Raises
    ------
    NoBroker
        There is no door, or nobody answers behind it. Nothing was opened.
    """
    global _kept
    path = find_door(door)
    with _lock:
        attachment = _attachments.get(path)
        if attachment is None or not attachment.native.ours:
            attachment = _attachments[path] = _Attachment(path)
        if door is None:
            _kept = attachment
    return Node(attachment)
