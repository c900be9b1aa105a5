"""The descriptors of lanes: what a program brings is checked here before anybody else gets it."""

from __future__ import annotations

from isthmus._native import Counters

from .answers import Refuse
from .descriptors import Descriptors


def check_lane(what: str, carrier: str, descriptors: Descriptors, small: int, large: int) -> Counters:
    """Check what comes with `connect` and `accept`: the lane, and for `put` the counters page.

    Raises
    ------
    Refuse
        They are not what the carrier says they must be; says why.
    """
    wanted = 2 if carrier == "put" else 1
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
    # The page alone says nothing about the inbox, whose size is then the program's word; a ring is checked.
    return _checked(what, carrier, descriptors, small, large, page_only=carrier == "put")


def _checked(
    what: str, carrier: str, descriptors: Descriptors, small: int, large: int, *, page_only: bool = False
) -> Counters:
    # Nothing that could block may be asked of a descriptor before this.
    if not descriptors.all_memfds():
        raise Refuse("bad-request", f"{what}: a lane's descriptors are memfds")
    try:
        return Counters(carrier, descriptors.fds, small, large, page_only)
    except ValueError as error:
        raise Refuse("bad-request", f"{what}: {carrier}: {error}") from None
