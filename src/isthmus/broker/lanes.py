"""The descriptors of lanes: what a program brings is checked here before anybody else gets it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from isthmus import _native

from .answers import Refuse
from .descriptors import Descriptors


class Counters(Protocol):
    """A read-only mapping of the page where one side counts; freed with the object."""

    def read(self) -> tuple[int, int, int, int]:
        """Bytes and messages sent, bytes and messages received, as their owner says."""


class _NoCounters:
    def __init__(self, carrier: str, fds: Sequence[int], small: int, large: int) -> None:
        pass

    def read(self) -> tuple[int, int, int, int]:
        return (0, 0, 0, 0)


_Native = getattr(_native, "Counters", None) or _NoCounters


def check_lane(what: str, carrier: str, descriptors: Descriptors, small: int, large: int) -> Counters:
    """Check what comes with `connect` and `accept`: the lane, and for `put` the counters page.

    Raises
    ------
    Refuse
        They are not what the carrier says they must be; says why.
    """
    wanted = 1 if carrier == "sealed" else 2
    if len(descriptors) != wanted:
        raise Refuse("bad-request", f"{what}: {carrier} needs {wanted} descriptors, not {len(descriptors)}")
    return _checked(what, carrier, descriptors, small, large)


def check_page(what: str, carrier: str, descriptors: Descriptors, small: int, large: int) -> Counters:
    """Check what comes with `resume`: the ring itself for `sealed`, only the counters page for `put`.

    Raises
    ------
    Refuse
        As in `check_lane`.
    """
    if len(descriptors) != 1:
        raise Refuse("bad-request", f"{what}: it needs 1 descriptor, not {len(descriptors)}")
    return _checked(what, carrier, descriptors, small, large)


def _checked(what: str, carrier: str, descriptors: Descriptors, small: int, large: int) -> Counters:
    # Nothing that could block may be asked of a descriptor before this.
    if not descriptors.all_memfds():
        raise Refuse("bad-request", f"{what}: a lane's descriptors are memfds")
    try:
        counters: Counters = _Native(carrier, descriptors.fds, small, large)
    except (ValueError, OSError) as error:
        raise Refuse("bad-request", f"{what}: {carrier}: {error}") from None
    return counters
