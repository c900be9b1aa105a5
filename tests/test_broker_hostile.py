"""Tenants that do their worst: they spoil their own attachment, and nobody else's."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import socket
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker_client import SMALL, Node, Program, Refused, eventually, sealed_ring
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isthmus._native import CONTROL_VERSION, control_decode, control_encode
from isthmus.broker import attachment as attachment_module
from isthmus.broker.descriptors import WAITING_MAX, Descriptors, Undertaker


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    directory = tmp_path_factory.mktemp("hostile")
    limits = "control_messages_per_second = 1000000, control_messages_burst = 1000000"
    names = ("good", "listener", "hostile")
    policy = "".join(f'[[domain]]\nname = "{name}"\nlimits = {{ {limits} }}\n' for name in names)
    with Node(directory / "run", policy) as node:
        yield node


@pytest.fixture
def neighbours(node: Node) -> Iterator[tuple[Program, Program]]:
    """Two others with a connection, before and after whatever the test does."""
    with node.attach("good") as good, node.attach("listener") as listener:
        listener.bind(7)
        ours, _ = good.connect("listener", 7, listener)
        yield good, listener
        good.connect("listener", 7, listener)
        ours.close()
        good.ask("resolve", name="good")


def open_descriptors(node: Node) -> int:
    """Counted by the broker's own thread, so that it is in the middle of nothing."""
    return node.do(lambda: len(os.listdir("/proc/self/fd")))


def descriptors_at_rest(node: Node, attached: int) -> int:
    """How many are open once the broker has noticed everybody who left."""

    def at_rest() -> bool:
        domains = node.broker.domains.values()
        waiting = sum(d.undertaker.waiting for d in domains)
        return sum(len(d.attachments) for d in domains) == attached and not waiting

    eventually(at_rest)
    # What other tests of this process have left behind may be closed at any moment.
    gc.collect()
    return open_descriptors(node)


@pytest.mark.parametrize(
    "packet",
    [
        control_encode(
            "connect", 1, to="good", to_port=1, from_port=0, kind="stream", carrier="sealed", require=0,
            small=SMALL, large=0,
        ),
        control_encode("welcome", 1, features=0, domain=1, domain_name="good", node="x", ring_max=1, epoch=1),
        b"\x01",
        b"\x01" * 12,
        bytes(4096),
    ],
    ids=["not hello", "not for programs", "short", "garbage", "zeros"],
)  # fmt: skip
def test_what_is_not_a_greeting_ends_the_attachment(
    node: Node, neighbours: tuple[Program, Program], packet: bytes
) -> None:
    with node.attach("hostile", hello=False) as hostile:
        hostile.send_raw(packet)
        assert hostile.ended()


@pytest.mark.parametrize("kind", ["hello", "welcome", "incoming", "cut", "report", "bound"])
def test_messages_out_of_place_end_the_attachment(
    node: Node, neighbours: tuple[Program, Program], kind: str
) -> None:
    fields: dict[str, dict[str, object]] = {
        "hello": {"features": 0, "program": "again"},
        "welcome": {"features": 0, "domain": 1, "domain_name": "a", "node": "x", "ring_max": 1, "epoch": 1},
        "incoming": {
            "connection": 1, "secret": 1, "from": 1, "from_name": "a", "from_port": 1, "port": 1,
            "partner": 1, "kind": "stream", "carrier": "sealed", "small": 1, "large": 1, "why": "",
            "ticket": bytes(32),
        },
        "cut": {"connection": 1, "refusal": "version", "text": ""},
        "report": {"offset": 0, "total": 0, "text": ""},
        "bound": {"port": 1},
    }  # fmt: skip
    with node.attach("hostile") as hostile:
        hostile.send_raw(control_encode(kind, 1, **fields[kind]))
        assert hostile.ended()


def test_another_version_is_told_so(node: Node) -> None:
    with node.attach("hostile", hello=False) as program:
        program.send_raw(
            bytes([CONTROL_VERSION + 1]) + control_encode("hello", 1, features=0, program="x")[1:]
        )
        kind, _, fields = program.receive()
        assert (kind, fields["refusal"]) == ("refused", "version")
        assert program.ended()


def test_a_packet_that_is_too_long_ends_the_attachment(
    node: Node, neighbours: tuple[Program, Program]
) -> None:
    with node.attach("hostile") as hostile:
        hostile.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        hostile.send_raw(bytes(5000))
        assert hostile.ended()


@pytest.mark.parametrize("count", [1, 3, 4, 200])
def test_descriptors_that_nobody_asked_for_are_closed(
    node: Node, neighbours: tuple[Program, Program], count: int
) -> None:
    before = descriptors_at_rest(node, 2)
    mine = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
    with node.attach("hostile") as hostile:
        hostile.send_raw(control_encode("resolve", 9, name="good"), mine)
        if count <= 3:
            assert hostile.answer(9)[0] == "resolved"
        else:
            assert hostile.ended()
    for fd in mine:
        os.close(fd)
    eventually(lambda: open_descriptors(node) == before)


def test_descriptors_before_the_greeting_and_beside_nothing_are_closed(node: Node) -> None:
    before = descriptors_at_rest(node, 0)
    for packet in (b"\x00", b""):
        with node.attach("hostile", hello=False) as hostile:
            fds = sealed_ring()
            hostile.send_raw(packet, fds)
            os.close(fds[0])
            assert hostile.ended()
    eventually(lambda: open_descriptors(node) == before)


def test_being_out_of_descriptors_is_not_the_programs_fault(node: Node) -> None:
    with node.attach("hostile") as program:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        fds = sealed_ring()
        packet = control_encode(
            "connect", 5, to="good", to_port=1, from_port=0, kind="stream", carrier="sealed", require=0,
            small=SMALL, large=0,
        )  # fmt: skip
        # This process is the broker as well: leave it no room for the descriptor that is under way. Whoever
        # left before makes none.
        descriptors_at_rest(node, 1)
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        fillers = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 4, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    fillers.append(os.dup(fds[0]))
            program.send_raw(packet, fds)
            refused = program.refused(5)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in fillers + fds:
                os.close(fd)
        assert refused.refusal == "limit-reached"
        assert "descriptors" in refused.text
        program.ask("resolve", name="good")


packets = st.one_of(
    st.binary(max_size=80),
    st.binary(max_size=60).map(lambda body: bytes([CONTROL_VERSION]) + body),
    st.tuples(st.integers(0, 30), st.binary(max_size=90)).map(
        lambda p: bytes([CONTROL_VERSION, p[0], 0, 0, 1, 0, 0, 0]) + len(p[1]).to_bytes(4, "little") + p[1]
    ),
    st.builds(
        lambda port, partner, backlog: control_encode(
            "bind", 1, port=port, kind="stream", partner=partner, backlog=backlog
        ),
        st.integers(0, 3) | st.integers(0, 2**32 - 1),
        st.integers(0, 4) | st.just(2**32 - 1),
        st.integers(0, 2**32 - 1),
    ),
    st.builds(
        lambda to, port, small, large, carrier: control_encode(
            "connect", 1, to=to, to_port=port, from_port=0, kind="stream", carrier=carrier, require=0,
            small=small, large=large,
        ),
        st.sampled_from(["good", "listener", "hostile", "1", "x"]),
        st.sampled_from([1, 7]),
        st.sampled_from([0, 1, SMALL, 2**32 - 1]),
        st.sampled_from([0, 2**32 - 1]),
        st.sampled_from(["sealed", "put"]),
    ),
    st.builds(
        lambda kind, number: control_encode(
            kind,
            1,
            connection=number,
            **{"close": {}, "refuse": {"refusal": "version"}, "accept": {"small": SMALL, "large": 0}}[kind],
        ),
        st.sampled_from(["close", "refuse", "accept"]),
        st.integers(0, 2**64 - 1),
    ),
    st.builds(lambda offset: control_encode("status", 1, offset=offset), st.integers(0, 2**32 - 1)),
)  # fmt: skip


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.tuples(packets, st.integers(0, 4)), max_size=8))
def test_random_packets_hurt_nobody_else(
    node: Node, neighbours: tuple[Program, Program], script: list[tuple[bytes, int]]
) -> None:
    good, listener = neighbours
    ring = sealed_ring()
    with node.attach("hostile") as hostile:
        for packet, count in script:
            try:
                hostile.send_raw(packet, ring * count)
            except (BrokenPipeError, ConnectionResetError):
                break
    os.close(ring[0])
    assert good.ask("resolve", name="listener")[0] == "resolved"
    while not listener.quiet():
        kind, _, fields = listener.receive()
        assert kind in ("incoming", "cut")
        for fd in fields["fds"]:
            os.close(fd)
    eventually(lambda: not node.broker.domains["hostile"].attachments)
    assert node.holds("hostile") == (0, 0, 0, 0, 0)


def test_five_hundred_connections_leave_no_descriptor(node: Node) -> None:
    def round_(good: Program, listener: Program, times: int) -> None:
        for turn in range(times):
            how = turn % 5
            if how < 2:
                ours, theirs = good.connect("listener", 7, listener)
                ours.close()
                theirs.close()
            elif how == 2:
                assert good.try_connect("listener", 8).refusal == "nobody-listens"
            elif how == 3:
                request = good.start_connect("listener", 7)
                incoming = listener.next("incoming")
                listener.send("refuse", connection=incoming["connection"], refusal="backlog-full")
                for fd in incoming["fds"]:
                    os.close(fd)
                assert good.refused(request).refusal == "backlog-full"
            else:
                bad = [os.open("/dev/null", os.O_RDONLY)]
                assert good.try_connect("listener", 7, fds=bad).refusal == "bad-request"

    with node.attach("good") as good, node.attach("listener") as listener:
        listener.bind(7)
        round_(good, listener, 10)
        good.ask("resolve", name="good")
        before = descriptors_at_rest(node, 2)
        round_(good, listener, 500)
        good.ask("resolve", name="good")
        listener.ask("resolve", name="good")
        eventually(lambda: open_descriptors(node) == before, "descriptors leak")
        assert node.holds("good") == (0, 0, 0, 0, 0)


def test_a_flood_is_slowed_down_and_stalls_nobody(tmp_path: Path) -> None:
    policy = (
        '[[domain]]\nname = "flood"\n'
        "limits = { control_messages_per_second = 200, control_messages_burst = 20 }\n"
        '[[domain]]\nname = "good"\n[[domain]]\nname = "listener"\n'
    )
    packet = control_encode("resolve", 1, name="good")
    with (
        Node(tmp_path / "run", policy) as node,
        node.attach("good") as good,
        node.attach("listener") as listener,
    ):
        listener.bind(7)
        flooding = node.attach("flood")
        stop = threading.Event()
        sent = 0

        def flood() -> None:
            nonlocal sent
            flooding.sock.settimeout(0.05)
            while not stop.is_set():
                try:
                    flooding.send_raw(packet)
                    sent += 1
                    flooding.sock.recv(4096, socket.MSG_DONTWAIT)
                except (TimeoutError, BlockingIOError):
                    continue

        thread = threading.Thread(target=flood)
        thread.start()
        eventually(lambda: node.broker.domains["flood"].throttled > 2)
        for _ in range(50):
            ours, theirs = good.connect("listener", 7, listener)
            ours.close()
            theirs.close()
        handled = node.broker.domains["flood"].control_messages
        stop.set()
        thread.join()
        assert handled < sent, "the rest waits in the flooder's own socket"
        assert node.broker.domains["flood"].attachments, "it is slowed down, not sent away"
        flooding.close_socket()


def test_who_does_not_read_loses_its_attachment_only(
    node: Node, neighbours: tuple[Program, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attachment_module, "QUEUE_MAX_MESSAGES", 50)
    packet = control_encode("status", 1, offset=0)
    before = node.broker.dropped.get("slow", 0)
    with node.attach("hostile") as hostile:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:
                hostile.send_raw(packet)
        assert hostile.ended()
    eventually(lambda: node.broker.dropped.get("slow", 0) == before + 1)


def test_others_cannot_fill_a_listeners_queue(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachment_module, "QUEUE_FOR_OTHERS", 3)
    with node.attach("hostile") as hostile, node.attach("listener") as listener:
        listener.bind(9)
        refusals = []
        while not refusals:
            request = hostile.start_connect("listener", 9)
            hostile.ask("resolve", name="good")
            if not hostile.quiet() or hostile._waiting:
                refusals.append(hostile.refused(request))
        assert refusals[0].refusal in ("backlog-full", "limit-reached")
        assert listener.ask("resolve", name="good")[0] == "resolved"
        for _, _, fields in listener._waiting:
            for fd in fields.pop("fds"):
                os.close(fd)


def test_descriptors_in_flight_are_limited_and_that_is_survived(
    node: Node, neighbours: tuple[Program, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel says to an unprivileged broker whose programs leave too many descriptors unread."""
    good, listener = neighbours
    real = attachment_module.Attachment._write
    full = True

    def write(self: attachment_module.Attachment, packet: bytes, fds: tuple[int, ...]) -> None:
        if fds and full:
            raise OSError(errno.ETOOMANYREFS, "too many references")
        real(self, packet, fds)

    monkeypatch.setattr(attachment_module.Attachment, "_write", write)
    assert good.try_connect("listener", 7).refusal == "limit-reached"
    full = False
    request = good.start_connect("listener", 7)
    incoming = listener.next("incoming")
    full = True
    listener.accept(incoming)
    assert good.refused(request).refusal == "limit-reached"
    assert listener.next("cut")["refusal"] == "limit-reached"
    full = False
    good.connect("listener", 7, listener)


def test_a_program_that_says_nothing_is_sent_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.broker.core.HELLO_S", 0.05)
    with Node(tmp_path / "run") as node:
        node.add("a")
        with node.attach("a") as spoken, node.attach("a", hello=False) as silent:
            assert silent.ended()
            spoken.ask("resolve", name="a")


def test_a_mistake_of_the_brokers_costs_one_attachment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path / "run")
    node.add("a")
    try:
        with node.attach("a") as good, node.attach("a") as unlucky:
            monkeypatch.setitem(node.broker._handlers, "resolve", lambda *_: 1 // 0)
            unlucky.send("resolve", name="a")
            assert unlucky.ended()
            good.bind(1)
        assert "ZeroDivisionError" in node.log.getvalue()
    finally:
        node.stop()


def test_descriptors_whose_closing_could_block_are_closed_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    undertaker = Undertaker()
    block = threading.Event()
    closed: list[tuple[int, str]] = []
    real = os.close

    def close(fd: int) -> None:
        name = threading.current_thread().name
        if name == "undertaker":
            assert block.wait(20)
        closed.append((fd, name))
        real(fd)

    monkeypatch.setattr(os, "close", close)
    strange, ring = os.open("/dev/null", os.O_RDONLY), sealed_ring()[0]
    Descriptors([strange, ring], undertaker).close()
    assert (ring, threading.current_thread().name) in closed
    assert undertaker.waiting == 1
    block.set()
    eventually(lambda: undertaker.waiting == 0)
    assert (strange, "undertaker") in closed


def test_a_domain_whose_descriptors_cannot_be_closed_waits_outside(node: Node) -> None:
    domain = node.broker.domains["hostile"]

    class Stuck:
        waiting = WAITING_MAX + 1

    real, domain.undertaker = domain.undertaker, Stuck()  # type: ignore[assignment]
    try:
        with node.attach("hostile", hello=False) as program, pytest.raises(Refused, match="cannot be closed"):
            program.answer(0)
    finally:
        domain.undertaker = real
    with node.attach("hostile"):
        pass


def test_a_foreign_protocol_on_the_operators_socket_is_answered_or_dropped(node: Node) -> None:
    for line in (
        b"GET / HTTP/1.1\r\n",
        b"[]\n",
        b'{"do": ["x"]}\n',
        b"null\n",
        b"{" * 2000 + b"\n",
        b"\xff\n",
    ):
        answer = node.do(lambda line=line: node.service._console.answer(line))  # type: ignore[misc]
        assert answer["ok"] is False
        assert answer["error"]


def test_the_kernel_puts_the_descriptors_where_the_client_says() -> None:
    """The test client itself: three descriptors arrive as three."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
        left.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))])
        _, ancillary, flags, _ = right.recvmsg(1, attachment_module._ANCILLARY)
        found = attachment_module._descriptors(ancillary)
        assert len(found) == 3
        assert not flags & socket.MSG_CTRUNC
        for fd in fds + found:
            os.close(fd)
    assert control_decode(control_encode("done", 1))[0] == "done"
