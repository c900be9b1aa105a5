"""Brokers with the domains `a` to `d`, one for each carrier, and pairs of sockets between them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

import isthmus
from isthmus.testing import PrivateBroker

if TYPE_CHECKING:
    from endpoints import Ends
    from networks import Net

DOMAINS = ("a", "b", "c", "d")
#: What makes a broker give one carrier or the other.
POLICIES = {
    "sealed": None,
    "put": '[[rule]]\nfrom = "*"\nto = "*"\naction = "accept"\nstrict = true\n',
}
#: No test waits longer for what must happen.
LIMIT_S = 60.0
#: A test with emulated guests may take this long, their boot included, on a machine that others use too.
EMULATED_S = 900.0

T = TypeVar("T")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and "qemu" in item.name
            and not item.get_closest_marker("timeout")
        ):
            item.add_marker(pytest.mark.timeout(EMULATED_S))


class Domains:
    """The domains of one broker, and sockets between them."""

    def __init__(self, broker: PrivateBroker, carrier: str) -> None:
        self.broker = broker
        self.carrier = carrier
        self._nodes: dict[str, isthmus.Node] = {}

    def door(self, name: str) -> str:
        return self.broker.door(name)

    def __getitem__(self, name: str) -> isthmus.Node:
        """The attachment of this process as that domain."""
        node = self._nodes.get(name)
        if node is None:
            node = self._nodes[name] = isthmus.attach(self.door(name))
        return node

    def server(
        self, type: int = socket.SOCK_STREAM, *, domain: str = "b", **options: object
    ) -> isthmus.Socket:
        server = isthmus.create_server(("", 0), type=type, node=self[domain], **options)  # type: ignore[arg-type]
        server.settimeout(LIMIT_S)
        return server

    def pair(
        self, type: int = socket.SOCK_STREAM, rings: int | tuple[int, int] | None = None
    ) -> tuple[isthmus.Socket, isthmus.Socket]:
        """Two connected sockets of the domains a and b; calls on them end after `LIMIT_S`."""
        with self.server(type, rings=rings) as server:
            one = isthmus.create_connection(
                server.getsockname(), LIMIT_S, type=type, node=self["a"], rings=rings
            )
            other, _ = server.accept()
        other.settimeout(LIMIT_S)
        assert one.path == other.path == self.carrier
        return one, other

    def datagram(self, name: str, bound: bool = True) -> isthmus.Socket:
        sock = isthmus.Socket(socket.SOCK_DGRAM, node=self[name])
        if bound:
            sock.bind(("", 0))
        sock.settimeout(LIMIT_S)
        return sock


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture(scope="session")
def brokers() -> Iterator[Callable[[str], Domains]]:
    """Call it with a carrier: the domains between which that carrier is used."""
    with contextlib.ExitStack() as stack:
        made: dict[str, Domains] = {}

        def get(carrier: str) -> Domains:
            if carrier not in made:
                broker = stack.enter_context(PrivateBroker(DOMAINS, POLICIES[carrier]))
                made[carrier] = Domains(broker, carrier)
            return made[carrier]

        yield get


@pytest.fixture(scope="session")
def broker(brokers: Callable[[str], Domains]) -> PrivateBroker:
    """A broker of the built-in policy with the domains `a` to `d`."""
    return brokers("sealed").broker


@pytest.fixture(params=sorted(POLICIES))
def domains(request: pytest.FixtureRequest, brokers: Callable[[str], Domains]) -> Domains:
    """The domains of a broker; the test runs once for each carrier."""
    return brokers(request.param)


@pytest.fixture
def pair(domains: Domains) -> Iterator[tuple[isthmus.Socket, isthmus.Socket]]:
    one, other = domains.pair()
    with one, other:
        yield one, other


@pytest.fixture
def ends(broker: PrivateBroker) -> Iterator[Ends]:
    """Endpoints of two domains."""
    from endpoints import joined

    with joined(broker) as found:
        yield found


@pytest.fixture
def every_ends(domains: Domains) -> Iterator[Ends]:
    """The same, once for each carrier."""
    from endpoints import joined

    with joined(domains) as found:
        yield found


@pytest.fixture(params=[socket.SOCK_STREAM, socket.SOCK_SEQPACKET], ids=["stream", "seqpacket"])
def any_pair(
    request: pytest.FixtureRequest, domains: Domains
) -> Iterator[tuple[isthmus.Socket, isthmus.Socket]]:
    one, other = domains.pair(request.param)
    with one, other:
        yield one, other


def descriptors() -> int:
    """Descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A program that we read from; it is killed in the end, also by a test that fails."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def becomes(what: Callable[[], T], why: str = "it did not happen") -> T:
    """Ask until the answer is true."""
    end = time.monotonic() + LIMIT_S
    while not (found := what()):
        assert time.monotonic() < end, why
        time.sleep(0.005)
    return found


@pytest.fixture(scope="module")
def networks() -> Iterator[Net]:
    """Two networks joined by a bridge, of the domains a and b."""
    from networks import POLICY, Net

    from isthmus.bench.bridge import Bridge, BridgeError

    try:
        with PrivateBroker((), policy=POLICY) as broker, Bridge() as bridge:
            yield Net(broker, bridge)
    except BridgeError as error:
        pytest.skip(f"no networks: {error}")


@pytest.fixture
def net(networks: Net) -> Iterator[Net]:
    networks.begin()
    try:
        yield networks
    finally:
        networks.stop()
