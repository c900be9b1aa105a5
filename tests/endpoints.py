"""Pairs of MX endpoints in two domains, and what tests say of their requests."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import pytest
from conftest import LIMIT_S, Domains

import isthmus
from isthmus import errors, mx
from isthmus.testing import PrivateBroker

LENGTHS = [0, 1, 32, 33, 128, 129, 4095, 4096, 4097, 8192, 32767, 32768, 32769, 131072, 131073, 2**20 + 1]
#: Longer than anything that is sent without being asked for.
LONG = 100_000

Ends = tuple[mx.Endpoint, mx.Endpoint, mx.Peer]


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(f"{seed} {length}").randbytes(length)


def ended(request: mx.Request) -> mx.Status:
    status = request.wait(LIMIT_S)
    assert status is not None, "it did not end"
    return status


def fine(request: mx.Request) -> mx.Status:
    return ended(request).check()


@contextlib.contextmanager
def fails(code: int) -> Iterator[None]:
    with pytest.raises(errors.MXError) as caught:
        yield
    assert caught.value.code == code


@contextlib.contextmanager
def joined(domains: Domains | PrivateBroker, **options: object) -> Iterator[Ends]:
    """An endpoint of b, one of a, and the latter as the former knows it."""
    nodes = [isthmus.attach(domains.door(name)) for name in "ab"]
    with mx.Endpoint(node=nodes[0], **options) as a, mx.Endpoint(node=nodes[1], **options) as b:  # type: ignore[arg-type]
        yield a, b, b.connect(nodes[0].name, a.id, timeout=LIMIT_S)
