"""MX between nodes: two brokers and two cards, and a virtual cable between them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from conftest import becomes, started
from test_death import lanes

import isthmus
from isthmus import errors, mx
from isthmus.bench.bridge import BridgeError
from isthmus.bench.cable import Cable
from isthmus.bench.transports.mx import start_card
from isthmus.testing import PrivateBroker

pytestmark = pytest.mark.system

LIMIT_S = 60.0
KEY = 7
LENGTHS = (0, 1, 32, 33, 128, 129, 4095, 4096, 4097, 8192, 32767, 32768, 32769, 131072, 131073, 1048577)


class Nodes:
    """Two nodes: `left` with the domains a and b, `right` with c, and a card each."""

    domains: ClassVar = {"left": ("a", "b", "card"), "right": ("c", "card")}

    def __init__(self, *options: str, mtu: int = 9000, policy: str | None = None) -> None:
        self.options = options
        self._stack = contextlib.ExitStack()
        self._policy = policy
        self.cable = Cable(mtu=mtu)
        self.cards: dict[str, int] = {}
        self._nodes: dict[str, isthmus.Node] = {}
        self.doors: dict[str, str] = {}

    def __enter__(self) -> Nodes:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(self.cable)
            except BridgeError as error:
                pytest.skip(f"no networks: {error}")
            self.brokers = {}
            for side, names in self.domains.items():
                broker = self.brokers[side] = stack.enter_context(PrivateBroker(names, self._policy))
                for name in names:
                    self.doors.setdefault(name, broker.door(name))
                self.start_card(side, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start_card(self, side: str, stack: contextlib.ExitStack | None = None) -> None:
        door = self.brokers[side].door("card")
        self.cards[side] = start_card(stack or self._stack, self.cable, side, door, *self.options)

    def endpoint(self, domain: str, **options: object) -> mx.Endpoint:
        if domain not in self._nodes:
            self._nodes[domain] = isthmus.attach(self.doors[domain])
        return mx.Endpoint(key=KEY, node=self._nodes[domain], **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with Nodes() as nodes:
        yield nodes


def content(length: int) -> bytes:
    return (os.urandom(4099) * (length // 4099 + 1))[:length]


def exchange(sender: mx.Endpoint, receiver: mx.Endpoint, peer: mx.Peer, length: int, sync: bool) -> None:
    """A message that is expected, and one that is not."""
    data, buffer = content(length), bytearray(length)
    receive = receiver.irecv(length, buffer)
    send = (sender.issend if sync else sender.isend)(peer, length, data)
    status = receive.wait(LIMIT_S)
    assert status is not None
    assert (status.code, status.length, status.transferred) == (mx.Code.SUCCESS, length, length)
    assert buffer == data
    ended = send.wait(LIMIT_S)
    assert ended is not None
    assert ended.check().transferred == length
    send = sender.isend(peer, length, data)
    found = receiver.probe(length, mx.ALL, LIMIT_S)
    assert found is not None
    assert found.length == length
    buffer = bytearray(length)
    late = receiver.irecv(length, buffer).wait(LIMIT_S)
    assert late is not None
    assert late.check().peer is not None
    assert buffer == data
    ended = send.wait(LIMIT_S)
    assert ended is not None
    ended.check()


def everything(a: mx.Endpoint, c: mx.Endpoint) -> None:
    """All lengths, both ways; the second way answers whoever sent."""
    peer = a.connect(c.nic, c.id, KEY, LIMIT_S)
    assert (peer.nic, peer.endpoint) == (c.nic, c.id)
    for length in LENGTHS:
        exchange(a, c, peer, length, length % 2 == 0)
    mark = c.irecv(99, None)
    a.isend(peer, 99, None)
    status = mark.wait(LIMIT_S)
    assert status is not None
    assert status.peer is not None
    back = status.peer
    assert (back.nic, back.endpoint) == (a.nic, a.id)
    for length in LENGTHS:
        exchange(c, a, back, length, length % 2 == 1)


def test_every_length_arrives_both_ways(nodes: Nodes) -> None:
    with nodes.endpoint("a") as a, nodes.endpoint("c") as c:
        assert a.has_card
        assert c.has_card
        everything(a, c)


@pytest.mark.parametrize("ppm", [10_000, 100_000])
def test_frames_that_are_lost_come_again(ppm: int) -> None:
    with Nodes("--lose", str(ppm)) as nodes, nodes.endpoint("a") as a, nodes.endpoint("c") as c:
        everything(a, c)


@pytest.mark.parametrize("mtu", [65535, 9000, 1500])
def test_the_other_dialect_works_too(mtu: int) -> None:
    with Nodes("--own", str(mtu), mtu=mtu) as nodes, nodes.endpoint("a") as a, nodes.endpoint("c") as c:
        everything(a, c)


def test_a_cable_that_carries_too_little_is_no_way(nodes: Nodes) -> None:
    with Nodes(mtu=1500) as small, small.endpoint("a") as a:
        assert not a.has_card
        with pytest.raises(errors.MXError) as caught:
            a.connect(0x02_0000_0000_01, 0, KEY, 5)
        assert caught.value.code == 36


def test_messages_of_all_classes_keep_their_order(nodes: Nodes) -> None:
    with nodes.endpoint("a") as a, nodes.endpoint("c") as c:
        peer = a.connect(c.nic, c.id, KEY, LIMIT_S)
        lengths = [3, 200_000, 0, 9000, 100, 70_000, 33] * 10
        sends = [a.isend(peer, 5, bytes([n]) * length) for n, length in enumerate(lengths)]
        for n, length in enumerate(lengths):
            buffer = bytearray(200_000)
            status = c.irecv(5, buffer).wait(LIMIT_S)
            assert status is not None
            assert status.check().length == length
            assert bytes(buffer[:length]) == bytes([n]) * length
        for send in sends:
            ended = send.wait(LIMIT_S)
            assert ended is not None
            ended.check()


def test_domains_of_a_node_have_endpoints_of_their_own(nodes: Nodes) -> None:
    """Both are endpoint 0 of different cards, and each hears what is for it."""
    with nodes.endpoint("a", id=0) as a, nodes.endpoint("b", id=0) as b, nodes.endpoint("c") as c:
        assert a.nic != b.nic
        buffers = {}
        for own, word in ((a, b"for a"), (b, b"for b")):
            peer = c.connect(own.nic, own.id, KEY, LIMIT_S)
            buffers[word] = bytearray(5)
            receive = own.irecv(1, buffers[word])
            c.isend(peer, 1, word)
            status = receive.wait(LIMIT_S)
            assert status is not None
            status.check()
        assert all(bytes(buffer) == word for word, buffer in buffers.items())


def test_who_is_not_there_is_told_apart(nodes: Nodes) -> None:
    with nodes.endpoint("a") as a, nodes.endpoint("c") as c:
        for number, key, code in ((c.id, KEY + 1, 34), (c.id + 1, KEY, 33), (200, KEY, 32)):
            with pytest.raises(errors.MXError) as caught:
                a.connect(c.nic, number, key, LIMIT_S)
            assert caught.value.code == code
        with pytest.raises(errors.MXError) as caught:
            a.connect(0x02_0000_0000_01, 0, KEY, 0.3)
        assert caught.value.code == 30


def test_an_endpoint_that_is_closed_ends_what_is_sent_to_it(nodes: Nodes) -> None:
    with nodes.endpoint("a") as a:
        with nodes.endpoint("c") as c:
            peer = a.connect(c.nic, c.id, KEY, LIMIT_S)
            send = a.isend(peer, 1, content(1 << 20))
        status = send.wait(LIMIT_S)
        assert status is not None
        assert status.code is mx.Code.ENDPOINT_CLOSED
        # Another that opens it is somebody else.
        with nodes.endpoint("c", id=c.id):
            status = a.issend(peer, 1, b"x").wait(LIMIT_S)
            assert status is not None
            assert status.code is mx.Code.BAD_SESSION


#: Opens an endpoint, says where, and does what it is told with a large message.
VICTIM = """
import sys, time
from isthmus import mx
endpoint = mx.Endpoint(key=7)
print(endpoint.nic, endpoint.id, flush=True)
nic, number = map(int, sys.stdin.readline().split())
if sys.argv[1] == "receiver":
    endpoint.irecv(1, bytearray(1 << 30))
else:
    peer = endpoint.connect(nic, number, 7, 60)
    endpoint.isend(peer, 1, bytes(1 << 30))
print("under way", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("part", ["receiver", "sender"])
def test_a_peer_that_is_killed_in_the_middle_ends_the_message(nodes: Nodes, part: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(VICTIM), part]
    environment = os.environ | {"ISTHMUS_DOOR": nodes.doors["c"]}
    before = lanes(nodes.cards["right"])
    with started(command, stdin=subprocess.PIPE, env=environment) as victim, nodes.endpoint("a") as a:
        assert victim.stdin is not None
        assert victim.stdout is not None
        nic, number = map(int, victim.stdout.readline().split())
        victim.stdin.write(f"{a.nic} {a.id}\n")
        victim.stdin.flush()
        buffer = bytearray(1 << 30)
        if part == "receiver":
            peer = a.connect(nic, number, KEY, LIMIT_S)
            request = a.isend(peer, 1, buffer)
        else:
            request = a.irecv(1, buffer)
        assert victim.stdout.readline() == "under way\n"
        time.sleep(0.1)
        assert request.test() is None
        assert lanes(nodes.cards["right"]) > before
        os.kill(victim.pid, signal.SIGKILL)
        status = request.wait(LIMIT_S)
        assert status is not None
        assert status.code is mx.Code.ENDPOINT_CLOSED
        # The buffer is ours again, and its station holds nothing for it.
        buffer.clear()
        becomes(lambda: lanes(nodes.cards["right"]) <= before, "memory of the lane is left")


def test_a_card_may_end_in_the_middle(nodes: Nodes) -> None:
    """What is under way goes on with the next one."""
    with Nodes() as nodes, nodes.endpoint("a") as a, nodes.endpoint("c") as c:
        peer = a.connect(c.nic, c.id, KEY, LIMIT_S)
        data, buffer = content(200 << 20), bytearray(200 << 20)
        receive, send = c.irecv(1, buffer), a.isend(peer, 1, data)
        time.sleep(0.1)
        os.kill(nodes.cards["left"], signal.SIGKILL)
        becomes(lambda: not a.has_card, "nobody hears that the card is gone")
        nodes.start_card("left")
        status = receive.wait(LIMIT_S)
        assert status is not None
        status.check()
        assert buffer == data
        ended = send.wait(LIMIT_S)
        assert ended is not None
        ended.check()
        exchange(a, c, peer, 100, sync=True)


def ends(request: mx.Request) -> mx.Code:
    status = request.wait(LIMIT_S)
    assert status is not None
    return status.code


def test_what_was_sent_arrives_although_the_sender_closes() -> None:
    with Nodes("--lose", "50000") as nodes, nodes.endpoint("c") as c:
        with nodes.endpoint("a") as a:
            peer = a.connect(c.nic, c.id, KEY, LIMIT_S)
            for n in range(100):
                a.isend(peer, n, bytes([n]) * 30_000)
        # Nobody is there any more.
        place = bytearray(30_000)
        for n in range(100):
            assert ends(c.irecv(n, place)) is mx.Code.SUCCESS
            assert place == bytes([n]) * 30_000


def test_a_peer_can_be_forgotten_and_met_again(nodes: Nodes) -> None:
    with nodes.endpoint("a") as a, nodes.endpoint("c") as c:
        for forgets, other in [(a, c), (c, a)] * 3:
            to_c = a.connect(c.nic, c.id, KEY, LIMIT_S)
            to_a = c.connect(a.nic, a.id, KEY, LIMIT_S)
            for n in range(30):
                exchange(a, c, to_c, n, sync=False)
                exchange(c, a, to_a, n, sync=True)
            # Nobody takes these, nor will.
            unseen = [other.isend(to_c if other is a else to_a, 1000 + n, b"old") for n in range(30)]
            assert forgets.probe(1029, timeout=LIMIT_S) is not None
            forgets.disconnect(to_c if forgets is a else to_a)
            assert forgets.iprobe() is None
            assert {ends(send) for send in unseen} == {mx.Code.SUCCESS}


@contextlib.contextmanager
def silent(card: int) -> Iterator[None]:
    """Nothing comes from that node, nor goes there."""
    os.kill(card, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(card, signal.SIGCONT)


def test_a_request_has_a_timeout_of_its_own() -> None:
    with Nodes() as nodes, nodes.endpoint("a") as a, nodes.endpoint("b") as b, nodes.endpoint("c") as c:
        assert a.timeout == mx.TIMEOUT
        peer, neighbour = a.connect(c.nic, c.id, KEY, LIMIT_S), a.connect(b.nic, b.id, KEY, LIMIT_S)
        exchange(a, c, peer, 100, sync=True)
        with silent(nodes.cards["right"]):
            patient, beside = a.issend(peer, 1, b"x"), a.issend(neighbour, 1, b"x")
            request = a.isend(peer, 2, bytes(1 << 20))
            connect = a.iconnect(c.nic, c.id, KEY)
            request.timeout, beside.timeout = 0.5, 0.1
            assert (request.timeout, patient.timeout) == (0.5, mx.TIMEOUT)
            before = time.monotonic()
            # The peer is given up, and with it all that is under way.
            assert [ends(one) for one in (request, patient, connect)] == [mx.Code.ENDPOINT_UNREACHABLE] * 3
            assert 0.4 < time.monotonic() - before < 5
            # Between neighbours nothing gets lost: whoever is not ready is waited for.
            assert beside.test() is None
            with pytest.raises(errors.MXError) as caught:
                request.timeout = 1
            assert caught.value.code == 13
        exchange(a, c, a.connect(c.nic, c.id, KEY, LIMIT_S), 100, sync=True)


def test_an_endpoint_has_a_timeout_for_its_requests() -> None:
    with Nodes() as nodes, nodes.endpoint("a", timeout=0.5) as a, nodes.endpoint("c") as c:
        peer = a.connect(c.nic, c.id, KEY, LIMIT_S)
        with silent(nodes.cards["right"]):
            a.timeout = None
            patient = a.issend(peer, 1, b"x")
            time.sleep(1.5)
            assert patient.test() is None
            # It has ended for the program, and goes on for the peer.
            early = a.isend(peer, 1, b"x")
            early.timeout = 0.5
            assert ends(early) is mx.Code.SUCCESS
            assert a.lost == 0
            assert ends(patient) is mx.Code.ENDPOINT_UNREACHABLE
            assert a.lost == 1
            a.timeout = 0.5
            connect = a.iconnect(c.nic, c.id, KEY)
            assert connect.timeout == 0.5
            assert ends(connect) is mx.Code.ENDPOINT_UNREACHABLE
            # Whoever says how long to wait waits for so long.
            for timeout, least in ((None, 0.4), (2, 1.9)):
                before = time.monotonic()
                with pytest.raises(errors.MXError) as caught:
                    a.connect(c.nic, c.id, KEY, timeout)
                assert caught.value.code == 30
                assert time.monotonic() - before > least


def test_a_receive_that_is_not_continued_ends_alone() -> None:
    with Nodes() as nodes, nodes.endpoint("a") as a, nodes.endpoint("c") as c:
        peer = a.connect(c.nic, c.id, KEY, LIMIT_S)
        receive = c.irecv(1, bytearray(400 << 20))
        receive.timeout = 0.5
        a.isend(peer, 1, bytes(400 << 20))
        time.sleep(0.1)
        with silent(nodes.cards["left"]):
            waiting = c.irecv(2, bytearray(5))
            waiting.timeout = 0.1
            assert ends(receive) is mx.Code.ENDPOINT_UNREACHABLE
            # Nothing has come that it could wait for.
            assert waiting.test() is None
        a.isend(peer, 2, b"later")
        assert ends(waiting) is mx.Code.SUCCESS


def test_a_timeout_that_is_none_is_refused(nodes: Nodes) -> None:
    for timeout in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="seconds"):
            nodes.endpoint("a", timeout=timeout)


def test_timeouts_run_while_there_is_no_card() -> None:
    with Nodes() as nodes, nodes.endpoint("a") as a, nodes.endpoint("c") as c:
        peer = a.connect(c.nic, c.id, KEY, LIMIT_S)
        os.kill(nodes.cards["left"], signal.SIGKILL)
        becomes(lambda: not a.has_card, "nobody hears that the card is gone")
        request = a.issend(peer, 1, b"x")
        request.timeout = 0.5
        before = time.monotonic()
        assert ends(request) is mx.Code.ENDPOINT_UNREACHABLE
        assert time.monotonic() - before < 5


def test_it_goes_on_while_the_program_computes(nodes: Nodes) -> None:
    with nodes.endpoint("a") as a, nodes.endpoint("c") as c:
        peer = a.connect(c.nic, c.id, KEY, LIMIT_S)
        data, buffer = content(8 << 20), bytearray(8 << 20)
        receive = c.irecv(1, buffer)
        send = a.isend(peer, 1, data)
        # Nobody calls.
        becomes(lambda: buffer[-4099:] == data[-4099:], "nothing moves")
        for request in (receive, send):
            status = request.wait(LIMIT_S)
            assert status is not None
            status.check()


RULES = """
[[rule]]
from = "b"
to = "card"
action = "refuse"

[[rule]]
from = "*"
to = "*"
action = "accept"
"""


def test_a_domain_that_no_rule_lets_has_no_card() -> None:
    with Nodes(policy=RULES) as nodes, nodes.endpoint("b") as b, nodes.endpoint("a") as a:
        assert a.has_card
        assert not b.has_card


def ask(nodes: Nodes, domain: str, *words: str) -> Any:
    command = [sys.executable, "-m", "isthmus", "mx", *words, "--json"]
    environment = os.environ | {"ISTHMUS_DOOR": nodes.doors[domain]}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=LIMIT_S)
    return json.loads(done.stdout)


def test_the_commands_say_what_the_card_knows(nodes: Nodes) -> None:
    with nodes.endpoint("a") as a, nodes.endpoint("c") as c:
        peer = a.connect(c.nic, c.id, KEY, LIMIT_S)
        exchange(a, c, peer, 1000, sync=False)
        own = ask(nodes, "a", "info")
        assert own == {"domain": "a", "nic": mx.format_nic(a.nic), "card": True, "why": None}
        known = {entry["nic"]: entry["name"] for entry in ask(nodes, "a", "peers")}
        assert known[mx.format_nic(a.nic)] == "a:0"
        assert mx.format_nic(c.nic) in known
        counted = ask(nodes, "a", "counters")
        assert counted["sent_frames"] > 0
        assert counted["received_frames"] > 0


def test_a_domain_of_another_node_is_found_by_name(nodes: Nodes) -> None:
    with nodes.endpoint("a") as a, nodes.endpoint("c") as c:
        for name in ("c", "c:0"):
            exchange(a, c, a.connect(name, c.id, KEY, LIMIT_S), 1000, sync=False)
        with pytest.raises(errors.UnknownDomain):
            a.connect("nobody", c.id, KEY, LIMIT_S)


def test_a_program_in_c_finds_another_node_by_name_before_anything_else() -> None:
    """Its node's card has had nobody who could ask until then."""
    ask = """
        import ctypes
        from isthmus.cli.mx import MYRIEXPRESS
        mx = ctypes.CDLL(str(MYRIEXPRESS / "lib" / "libmyriexpress.so"))
        assert mx.mx__init_api(0x301) == 0
        nic, name = ctypes.c_uint64(), ctypes.create_string_buffer(80)
        assert mx.mx_hostname_to_nic_id(b"c:0", ctypes.byref(nic)) == 0
        assert mx.mx_nic_id_to_hostname(nic, name) == 0
        print(nic.value, name.value.decode())
    """
    with Nodes() as nodes, nodes.endpoint("c") as c:
        environment = os.environ | {"ISTHMUS_DOOR": nodes.doors["a"]}
        words = [sys.executable, "-c", textwrap.dedent(ask)]
        done = subprocess.run(words, env=environment, text=True, capture_output=True, timeout=LIMIT_S)
        assert done.stdout.split() == [str(c.nic), "c:0"], done.stderr


def test_without_a_card_the_commands_say_so() -> None:
    with PrivateBroker(("a",)) as broker:
        environment = os.environ | {"ISTHMUS_DOOR": broker.door("a")}
        done = subprocess.run(
            [sys.executable, "-m", "isthmus", "mx", "peers"],
            env=environment,
            text=True,
            capture_output=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == 1
        assert "this node has no card" in done.stderr


def test_another_dialect_ends_what_was_under_way() -> None:
    """Both cards come again and speak otherwise: nothing that was pending can arrive, and it is said."""
    with Nodes() as nodes, nodes.endpoint("a") as a, nodes.endpoint("c") as c:
        peer = a.connect(c.nic, c.id, KEY, LIMIT_S)
        send = a.issend(peer, 1, b"nobody receives this")
        assert c.probe(1, timeout=LIMIT_S) is not None
        for side in ("left", "right"):
            os.kill(nodes.cards[side], signal.SIGKILL)
        becomes(lambda: not a.has_card and not c.has_card, "nobody hears that the cards are gone")
        nodes.options = ("--own", "9000")
        for side in ("left", "right"):
            nodes.start_card(side)
        status = send.wait(LIMIT_S)
        assert status is not None
        assert status.code is mx.Code.ENDPOINT_UNREACHABLE
        becomes(lambda: a.has_card and c.has_card, "nobody finds the new cards")
        exchange(a, c, a.connect(c.nic, c.id, KEY, LIMIT_S), 100_000, sync=False)


@pytest.mark.parametrize("mtu", ["1", "575", "65536", "-1"])
def test_a_dialect_of_no_sense_is_refused(mtu: str) -> None:
    words = [sys.executable, "-m", "isthmus", "card", "--interface", "lo", "--own", mtu]
    done = subprocess.run(words, text=True, capture_output=True, timeout=LIMIT_S)
    assert done.returncode == 2
    assert "from 576 to 65535" in done.stderr
