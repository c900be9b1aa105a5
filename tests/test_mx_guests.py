"""MX between programs of two guests, and between guests and containers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from guests import LIMIT_S, Node, needs

from isthmus import mx

MONITORS = [pytest.param("uml", marks=needs("uml")), pytest.param("qemu", marks=needs("qemu"))]

#: Endpoint 0: sends back what it gets.
ECHO = """
from isthmus import mx
with mx.Endpoint(0, key=7) as endpoint:
    print("open")
    while True:
        buffer = bytearray(1 << 21)
        status = endpoint.irecv(1, buffer).wait()
        peer = endpoint.connect(status.peer.nic, status.peer.endpoint, 0, 60)
        endpoint.isend(peer, 2, bytes(buffer[: status.length])).wait()
"""
ASK = """
import os, sys
from isthmus import mx
with mx.Endpoint() as endpoint:
    peer = endpoint.connect(sys.argv[1], 0, 7, 60)
    for length in (0, 5, 129, 32768, 32769, 1 << 20):
        data, buffer = os.urandom(length), bytearray(length)
        reply = endpoint.irecv(2, buffer)
        endpoint.isend(peer, 1, data).wait()
        reply.wait().check()
        assert buffer == data
    print("all")
"""


@pytest.fixture(params=MONITORS, scope="module")
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    with Node(request.param, containers=("c",), agents=True) as node:
        yield node


def test_guests_and_containers_exchange_messages(node: Node) -> None:
    server = node["a"].python(ECHO)
    assert server.line() == "open"
    client = node["b"].python(ASK, "a")
    assert client.line() == "all"
    with mx.Endpoint(key=0, node=node.attach("c")) as own:
        peer = own.connect("a", 0, 7, LIMIT_S)
        for length in (3, 200_000):
            data, buffer = bytes(range(3)) * (length // 3), bytearray(length // 3 * 3)
            reply = own.irecv(2, buffer)
            own.isend(peer, 1, data)
            status = reply.wait(LIMIT_S)
            assert status is not None
            status.check()
            assert buffer == data
        # One that is killed is noticed.
        request = own.irecv(2, bytearray(1))
        send = own.issend(peer, 3, b"nobody receives this")
        server.kill()
        ended = send.wait(LIMIT_S)
        assert ended is not None
        assert ended.code is mx.Code.ENDPOINT_CLOSED
        assert request.cancel()
