"""Guests with stock kernels, and what they say to each other: real kernels, booted here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from guests import Node, needs

MONITORS = [pytest.param("uml", marks=needs("uml")), pytest.param("qemu", marks=needs("qemu"))]


@pytest.fixture(params=MONITORS, scope="module")
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    """A broker with the guests a and b of one monitor, and the container c."""
    with Node(request.param, guests=("a", "b"), containers=("c",)) as node:
        yield node


SERVER = """
    import socket
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((socket.VMADDR_CID_ANY, {port}))
        listener.listen(8)
        print("listening", flush=True)
        sock, (cid, port) = listener.accept()
        with sock:
            received = bytearray()
            while data := sock.recv(1 << 16):
                received += data
            sock.sendall(bytes(reversed(received)))
        print(cid, len(received), flush=True)
"""
CLIENT = """
    import socket, sys
    data = bytes(range(256)) * {times}
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
        sock.connect(({cid}, {port}))
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        received = bytearray()
        while part := sock.recv(1 << 16):
            received += part
    assert bytes(received) == bytes(reversed(data)), len(received)
    print("good", flush=True)
"""


def test_siblings_talk_by_number_and_half_close(node: Node) -> None:
    server = node["b"].python(SERVER.format(port=9000))
    assert server.line() == "listening"
    client = node["a"].python(CLIENT.format(cid=node.number("b"), port=9000, times=4000))
    assert client.line() == "good"
    assert server.line() == f"{node.number('a')} {256 * 4000}"


def test_nobody_listens_is_said_at_once(node: Node) -> None:
    code = """
        import errno, socket, time
        begin = time.monotonic()
        try:
            socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).connect(({cid}, 4321))
        except OSError as error:
            print(errno.errorcode[error.errno], time.monotonic() - begin < 1.5, flush=True)
    """
    for cid in (node.number("b"), node.number("c"), 2, 4_000_000):
        assert node["a"].python(code.format(cid=cid)).line() == "ECONNRESET True", cid
