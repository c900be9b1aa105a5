"""MX endpoints inside a node: what a program sees of sending, receiving, matching, connecting."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest
from conftest import LIMIT_S, becomes, started
from endpoints import LENGTHS, LONG, Ends, ended, fails, fine, joined, noise
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import isthmus
from isthmus import errors, mx
from isthmus.testing import PrivateBroker

#: Where a message changes its class, on lanes or on the wire, and one beside each.


# ---- messages


@pytest.mark.parametrize("synchronous", [False, True])
@pytest.mark.parametrize("posted", ["before", "after"])
def test_messages_of_every_length_arrive_whole(every_ends: Ends, posted: str, synchronous: bool) -> None:
    a, b, to_a = every_ends
    send = b.issend if synchronous else b.isend
    for length in LENGTHS:
        data, place = noise(length), bytearray(length)
        if posted == "before":
            receive = a.irecv(length, place)
            request = send(to_a, length, data)
        else:
            request = send(to_a, length, data)
            assert a.probe(length, mx.ALL, LIMIT_S) is not None
            receive = a.irecv(length, place)
        got, sent = fine(receive), fine(request)
        assert place == data
        assert (got.match, got.length, got.transferred) == (length, length, length)
        assert (sent.match, sent.length, sent.transferred) == (length, length, length)
        assert sent.peer == to_a
        assert got.peer is not None
        assert (got.peer.nic, got.peer.endpoint) == (b.nic, b.id)


def test_a_message_of_64_mib_arrives_whole(ends: Ends) -> None:
    a, b, to_a = ends
    data = noise(2**20) * 64
    place = bytearray(len(data))
    receive, request = a.irecv(1, place), b.isend(to_a, 1, data)
    assert fine(receive).transferred == fine(request).transferred == len(data)
    assert place == data


@pytest.mark.parametrize("length", [10, 1000, LONG])
@pytest.mark.parametrize("reverse", [False, True])
def test_lists_of_buffers_are_one_message(ends: Ends, length: int, reverse: bool) -> None:
    a, b, to_a = ends
    data = noise(length)
    cuts = sorted(random.Random(length).randrange(length) for _ in range(7))
    edges = [0, *cuts, cuts[-1], length, length]
    pieces = [data[one:other] for one, other in pairwise(edges)]
    assert b"" in pieces
    places = [bytearray(3), bytearray(), bytearray(length - 5), bytearray(), bytearray(2)]
    if reverse:
        request = b.isend(to_a, 1, pieces)
        assert a.probe(1, mx.ALL, LIMIT_S)
        receive = a.irecv(1, places)
    else:
        receive = a.irecv(1, tuple(places))
        request = b.isend(to_a, 1, pieces)
    assert fine(receive).transferred == length
    assert b"".join(places) == data
    fine(request)


@pytest.mark.parametrize("nothing", [None, [], b"", [b"", b""]])
def test_messages_may_be_empty(ends: Ends, nothing: mx.Data) -> None:
    a, b, to_a = ends
    for send in b.isend, b.issend:
        receive, request = a.irecv(3, bytearray(5)), send(to_a, 3, nothing)
        assert fine(receive).length == fine(request).length == 0
        request, receive = send(to_a, 3, nothing), a.irecv(3, None)
        fine(receive)
        fine(request)


@pytest.mark.parametrize("length", [50, 5000, LONG])
@pytest.mark.parametrize("room", [0, 1, 49])
@pytest.mark.parametrize("unexpected", [False, True])
def test_what_does_not_fit_a_receive_is_lost_and_both_sides_may_know(
    every_ends: Ends, length: int, room: int, unexpected: bool
) -> None:
    a, b, to_a = every_ends
    data, place = noise(length), bytearray(60)
    view = memoryview(place)[:room]
    if unexpected:
        request = b.isend(to_a, 1, data)
        assert a.probe(1, mx.ALL, LIMIT_S)
        receive = a.irecv(1, view)
    else:
        receive = a.irecv(1, view)
        request = b.isend(to_a, 1, data)
    got, sent = ended(receive), ended(request)
    assert (got.code, got.length, got.transferred) == (mx.Code.TRUNCATED, length, room)
    assert place == data[:room] + bytes(60 - room)
    # Nobody tells a sender what became of a short message.
    told = (mx.Code.TRUNCATED, room) if length == LONG else (mx.Code.SUCCESS, length)
    assert (sent.code, sent.length, sent.transferred) == (told[0], length, told[1])
    with fails(5):
        got.check()
    # What comes next is not disturbed by it.
    receive = a.irecv(2, place)
    fine(b.isend(to_a, 2, b"next"))
    assert fine(receive).transferred == 4
    assert place[:4] == b"next"


@pytest.mark.parametrize("length", [0, 1, 32769])
def test_a_synchronous_send_ends_when_it_is_matched(ends: Ends, length: int) -> None:
    a, b, to_a = ends
    request = b.issend(to_a, 1, bytes(length))
    assert a.probe(1, mx.ALL, LIMIT_S)
    assert request.test() is None
    fine(a.irecv(1, bytearray(length)))
    fine(request)


def test_messages_are_matched_in_the_order_in_which_they_were_sent(every_ends: Ends) -> None:
    a, b, to_a = every_ends
    lengths = [1, LONG, 2, 200_000, 0, 40_000, 3, 32_768, 32_769, 4]
    requests = [b.isend(to_a, 7, bytes([n]) * length) for n, length in enumerate(lengths)]
    places = [bytearray(200_000) for _ in lengths]
    receives = [a.irecv(7, place) for place in places]
    for n, (length, place, receive) in enumerate(zip(lengths, places, receives, strict=True)):
        assert fine(receive).length == length
        assert place[:length] == bytes([n]) * length
    for request in requests:
        fine(request)


def test_masks_say_which_bits_count(ends: Ends) -> None:
    a, b, to_a = ends
    places = [bytearray(1) for _ in range(4)]
    any_of_5 = a.irecv(0x0500, places[0], 0xFF00)
    exactly = a.irecv(0x0501, places[1])
    anything = a.irecv(0, places[2], 0)
    upper = a.irecv(1 << 63, places[3], 1 << 63)
    for n, match in enumerate((0x0501, 0x0501, mx.ALL, 0x8000_0000_0000_0007)):
        fine(b.isend(to_a, match, bytes([n])))
    assert [fine(r).match for r in (any_of_5, exactly, anything, upper)] == [
        0x0501,
        0x0501,
        mx.ALL,
        0x8000_0000_0000_0007,
    ]
    assert [place[0] for place in places] == [0, 1, 2, 3]


def test_patterns_that_cannot_be_are_refused(ends: Ends) -> None:
    a, _, _ = ends
    with fails(14):
        a.irecv(3, bytearray(1), 1)
    with fails(14):
        a.wait_any(3, 1, 0)
    with fails(14):
        a.iprobe(3, 1)


def test_unexpected_messages_wait_and_the_oldest_that_fits_is_taken(ends: Ends) -> None:
    a, b, to_a = ends
    for n, match in enumerate((1, 2, 1, 3)):
        fine(b.isend(to_a, match, bytes([n])))
    assert a.probe(3, mx.ALL, LIMIT_S)
    found = a.iprobe()
    assert found is not None
    assert (found.match, found.length, found.transferred, found.code) == (1, 1, 1, mx.Code.SUCCESS)
    assert found.peer is not None
    assert found.peer.nic == b.nic
    assert a.iprobe(2, 3) == a.iprobe(2, mx.ALL) == a.iprobe(2)
    assert a.iprobe(4, mx.ALL) is None
    assert a.iprobe(4) is None
    place = bytearray(1)
    order = []
    for match, mask in (1, mx.ALL), (0, 0), (1, 1), (1, 1):
        fine(a.irecv(match, place, mask))
        order.append(place[0])
    assert order == [0, 1, 2, 3]
    assert a.iprobe() is None


def test_many_messages_that_nobody_waits_for_are_kept(ends: Ends) -> None:
    a, b, to_a = ends
    requests = [b.isend(to_a, n, n.to_bytes(2, "little") * 5000) for n in range(1000)]
    assert a.probe(999, mx.ALL, LIMIT_S)
    place = bytearray(10_000)
    for n in reversed(range(1000)):
        fine(a.irecv(n, place))
        assert place == n.to_bytes(2, "little") * 5000
    for request in requests:
        fine(request)


def test_when_no_more_is_kept_senders_wait_and_nothing_is_lost(ends: Ends) -> None:
    """64 MiB are kept, and each message costs 128 bytes more than it is long."""
    a, b, to_a = ends
    data, place = noise(32_768 - 128), bytearray(32_768)
    requests = [b.isend(to_a, 1, data) for _ in range(2048)]
    requests += [b.issend(to_a, 2, b"announced")]
    requests += [b.isend(to_a, 1, data) for _ in range(100)]
    for request in requests[:2048]:
        fine(request)
    assert a.wait_any(timeout=0.2) is None
    assert a.iprobe(2, mx.ALL) is None
    for _ in range(2148):
        assert fine(a.irecv(1, place)).transferred == len(data)
        assert place[: len(data)] == data
    assert fine(a.irecv(2, place)).transferred == 9
    for request in requests[2048:]:
        fine(request)


def test_thousands_of_long_messages_may_be_asked_for_at_once(ends: Ends) -> None:
    a, b, to_a = ends
    data = noise(LONG)
    requests = [b.isend(to_a, n, data) for n in range(6000)]
    assert a.probe(5999, mx.ALL, LIMIT_S)
    places = [bytearray(40_000) for _ in range(100)]
    # They have room for less: 40,000 bytes are more than one of them sends at a time.
    receives = [a.irecv(n, places[n % 100]) for n in range(6000)]
    for receive in receives:
        assert ended(receive).transferred == 40_000
    for place in places:
        assert place == data[:40_000]
    for request in requests:
        assert ended(request).code is mx.Code.TRUNCATED


# ---- whom


def test_an_endpoint_is_a_peer_of_its_own(ends: Ends) -> None:
    a, _, _ = ends
    own = a.connect("a", a.id, timeout=LIMIT_S)
    assert own == a.peer
    assert (own.nic, own.endpoint) == (a.nic, a.id)
    for length in 0, 1, 5000, LONG:
        data, place = noise(length), bytearray(length)
        request = a.isend(own, 1, data)
        # Sends to oneself end when they are matched, whatever their length.
        assert request.test() is None
        found = a.iprobe(1, mx.ALL)
        assert found is not None
        assert (found.peer, found.length) == (own, length)
        assert fine(a.irecv(1, place)).peer == own
        assert place == data
        fine(request)
        place = bytearray(length)
        receive, request = a.irecv(1, place), a.issend(own, 1, data)
        fine(receive)
        fine(request)
        assert place == data
    short = a.irecv(1, bytearray(2))
    request = a.isend(own, 1, b"three")
    assert (ended(short).transferred, ended(request).code) == (2, mx.Code.TRUNCATED)
    with fails(34):
        a.connect("a", a.id, key=9, timeout=LIMIT_S)


def test_endpoints_of_one_domain_reach_each_other(broker: PrivateBroker) -> None:
    node = isthmus.attach(broker.door("c"))
    with mx.Endpoint(node=node) as one, mx.Endpoint(node=node) as other:
        assert (one.id, other.id, one.nic) == (0, 1, other.nic)
        to_other = one.connect("c", 1, timeout=LIMIT_S)
        request = one.isend(to_other, 1, b"x" * LONG)
        place = bytearray(LONG)
        assert fine(other.irecv(1, place)).peer == other.connect("c", 0, timeout=LIMIT_S)
        assert place == b"x" * LONG
        fine(request)


def test_connecting_says_why_it_failed(broker: PrivateBroker) -> None:
    nodes = [isthmus.attach(broker.door(name)) for name in "ab"]
    with mx.Endpoint(key=7, node=nodes[0]) as a, mx.Endpoint(node=nodes[1]) as b:
        with fails(34):
            b.connect("a", a.id, key=8, timeout=LIMIT_S)
        with fails(33):
            b.connect("a", 50, key=7, timeout=LIMIT_S)
        with fails(32):
            b.connect("a", 200, key=7, timeout=LIMIT_S)
        with fails(36):
            b.connect(0x0200_0000_0001, 0, timeout=LIMIT_S)
        with fails(36):
            b.iconnect("02:00:00:00:00:01")
        with pytest.raises(errors.UnknownDomain):
            b.connect("nobody")
        assert ended(b.iconnect("a", a.id, 8)).code is mx.Code.BAD_KEY
        assert ended(b.iconnect("a", 50, 8)).code is mx.Code.ENDPOINT_CLOSED
        # None of it stands in the way of one that is right.
        request = b.iconnect("a", a.id, 7, match=0x77)
        status = fine(request)
        assert status.match == 0x77
        assert status.peer == b.connect("a", a.id, 7, LIMIT_S) == b.connect(a.nic, a.id, 7, LIMIT_S)
        assert b.connect(mx.format_nic(a.nic), a.id, 7, LIMIT_S) == b.connect("a:0", a.id, 7, LIMIT_S)
        with fails(34):
            b.connect("a", a.id, key=8, timeout=LIMIT_S)
        assert status.peer is not None
        fine(b.isend(status.peer, 1, b"x"))
        assert a.probe(1, mx.ALL, LIMIT_S)


def test_numbers_are_taken_once(broker: PrivateBroker) -> None:
    node = isthmus.attach(broker.door("c"))
    with mx.Endpoint(5, node=node), fails(20):
        mx.Endpoint(5, node=node)
    mx.Endpoint(5, node=node).close()
    with fails(9):
        mx.Endpoint(64, node=node)
    with pytest.raises(OverflowError):
        mx.Endpoint(256, node=node)


def test_a_domain_has_64_endpoints(broker: PrivateBroker) -> None:
    node, other = isthmus.attach(broker.door("c")), isthmus.attach(broker.door("d"))
    with contextlib.ExitStack() as stack:
        all_of_them = [stack.enter_context(mx.Endpoint(node=node)) for _ in range(64)]
        assert [one.id for one in all_of_them] == list(range(64))
        with fails(20):
            mx.Endpoint(node=node)
        # The next domain has its own.
        sender = stack.enter_context(mx.Endpoint(node=other))
        for one in all_of_them:
            fine(sender.isend(sender.connect("c", one.id, timeout=LIMIT_S), one.id, bytes([one.id])))
        for one in all_of_them:
            place = bytearray(1)
            assert fine(one.irecv(0, place, 0)).match == one.id
            assert place[0] == one.id


def test_peers_are_met_by_receiving(ends: Ends) -> None:
    """Whoever receives can answer without connecting."""
    a, b, to_a = ends
    fine(b.isend(to_a, 1, b"question"))
    asked = fine(a.irecv(1, bytearray(8)))
    assert asked.peer is not None
    fine(a.isend(asked.peer, 2, b"answer"))
    place = bytearray(6)
    assert fine(b.irecv(2, place)).peer == to_a
    assert place == b"answer"


def test_both_may_connect_at_once(broker: PrivateBroker) -> None:
    nodes = [isthmus.attach(broker.door(name)) for name in "ab"]
    for _ in range(30):
        with mx.Endpoint(node=nodes[0]) as a, mx.Endpoint(node=nodes[1]) as b:
            requests = [a.iconnect("b", b.id), b.iconnect("a", a.id)]
            to_b, to_a = (fine(request).peer for request in requests)
            assert to_a is not None
            assert to_b is not None
            for n in range(20):
                fine(a.isend(to_b, 1, bytes([n])))
                fine(b.isend(to_a, 1, bytes([n])))
            for end in a, b:
                place = bytearray(1)
                for n in range(20):
                    fine(end.irecv(1, place))
                    assert place[0] == n


def test_a_peer_can_be_forgotten_and_met_again(ends: Ends) -> None:
    a, b, to_a = ends
    waiting = b.issend(to_a, 1, b"x")
    assert a.probe(1, mx.ALL, LIMIT_S)
    b.disconnect(to_a)
    assert ended(waiting).code is mx.Code.ENDPOINT_UNREACHABLE
    assert ended(b.isend(to_a, 1, b"x")).code is mx.Code.BAD_SESSION
    with fails(9):
        b.disconnect(to_a)
    with fails(9):
        b.disconnect(b.peer)
    again = b.connect("a", a.id, timeout=LIMIT_S)
    assert again != to_a
    request = b.issend(again, 2, b"y" * LONG)
    place = bytearray(LONG)
    fine(a.irecv(2, place))
    fine(request)
    assert place == b"y" * LONG


def test_a_forgotten_peer_with_two_lanes_is_forgotten_whole(broker: PrivateBroker) -> None:
    """Both have connected at once, so that there may be two lanes: nothing comes over either."""
    nodes = [isthmus.attach(broker.door(name)) for name in "abc"]
    for _ in range(10):
        with contextlib.ExitStack() as stack:
            a, b, c = (stack.enter_context(mx.Endpoint(node=node)) for node in nodes)
            requests = [a.iconnect("b", b.id), b.iconnect("a", a.id)]
            to_b, to_a = (fine(request).peer for request in requests)
            assert to_a is not None
            assert to_b is not None
            b.disconnect(to_a)
            # It may have the number of the one that was forgotten.
            to_c = b.connect("c", c.id, timeout=LIMIT_S)
            ended(a.isend(to_b, 1, b"late"))
            fine(b.isend(to_c, 2, b"x"))
            receive = b.irecv(3, bytearray(4))
            met = fine(c.irecv(2, bytearray(1))).peer
            assert met is not None
            fine(c.isend(met, 3, b"soon"))
            status = fine(receive)
            assert status.peer == to_c
            late = b.iprobe(1, mx.ALL)
            assert late is None or (late.peer is not None and late.peer.nic == a.nic)


def test_an_endpoint_that_is_opened_again_is_another(broker: PrivateBroker) -> None:
    nodes = [isthmus.attach(broker.door(name)) for name in "ab"]
    with mx.Endpoint(node=nodes[1]) as b:
        first = mx.Endpoint(9, node=nodes[0])
        to_first = b.connect("a", 9, timeout=LIMIT_S)
        back = first.connect("b", b.id, timeout=LIMIT_S)
        fine(first.isend(back, 1, b"old"))
        assert b.probe(1, mx.ALL, LIMIT_S)
        waiting = b.issend(to_first, 1, b"x")
        first.close()
        assert ended(waiting).code is mx.Code.ENDPOINT_CLOSED
        assert ended(b.isend(to_first, 1, b"x")).code is mx.Code.ENDPOINT_CLOSED
        with fails(33):
            b.connect("a", 9, timeout=LIMIT_S)
        with mx.Endpoint(9, node=nodes[0]) as second:
            to_second = b.connect("a", 9, timeout=LIMIT_S)
            assert to_second != to_first
            assert (to_second.nic, to_second.endpoint) == (to_first.nic, to_first.endpoint)
            assert to_second.session != to_first.session
            assert ended(b.isend(to_first, 2, b"stale")).code is mx.Code.BAD_SESSION
            fine(b.isend(to_second, 3, b"fresh"))
            assert fine(second.irecv(0, bytearray(5), 0)).match == 3
            # What the one before had sent went with it.
            assert b.iprobe() is None


def test_what_was_sent_arrives_although_the_sender_closes(every_ends: Ends) -> None:
    a, b, to_a = every_ends
    for n in range(200):
        b.isend(to_a, n, bytes([n]) * 30_000)
    closing = threading.Thread(target=b.close)
    closing.start()
    place = bytearray(30_000)
    for n in range(200):
        fine(a.irecv(n, place))
        assert place == bytes([n]) * 30_000
    closing.join()


def test_what_was_announced_by_one_that_is_gone_is_gone(broker: PrivateBroker) -> None:
    """Also when another peer has come since, whom nobody may take for it."""
    nodes = [isthmus.attach(broker.door(name)) for name in "ab"]
    with mx.Endpoint(node=nodes[0]) as a:
        with mx.Endpoint(node=nodes[1]) as b:
            b.issend(b.connect("a", a.id, timeout=LIMIT_S), 1, b"never")
            assert a.probe(1, mx.ALL, LIMIT_S)
        becomes(lambda: a.iprobe(1, mx.ALL) is None)
        with mx.Endpoint(8, node=nodes[1]) as c:
            to_a = c.connect("a", a.id, timeout=LIMIT_S)
            other = c.issend(to_a, 2, b"other")
            assert a.probe(2, mx.ALL, LIMIT_S)
            place = bytearray(5)
            receive = a.irecv(1, place)
            assert receive.wait(0.05) is None
            assert other.test() is None
            fine(a.irecv(2, bytearray(5)))
            fine(other)
            fine(c.isend(to_a, 1, b"still"))
            fine(receive)
            assert place == b"still"


def test_a_closed_endpoint_takes_no_calls(ends: Ends) -> None:
    a, b, to_a = ends
    receive = b.irecv(1, bytearray(1))
    b.close()
    b.close()
    assert receive.test() is None
    assert receive.wait(0.01) is None
    with fails(9):
        b.isend(to_a, 1, b"x")
    with fails(9):
        b.irecv(1, bytearray(1))
    with fails(9):
        b.connect("a", a.id, timeout=LIMIT_S)


def test_buffers_are_held_until_requests_end_and_then_let_go(ends: Ends) -> None:
    a, b, to_a = ends
    place = bytearray(LONG)
    receive = a.irecv(1, place)
    with pytest.raises(BufferError):
        place.clear()
    fine(b.isend(to_a, 1, bytes(LONG)))
    fine(receive)
    place.clear()
    cancelled = bytearray(1)
    assert a.irecv(2, cancelled).cancel()
    cancelled.clear()
    left = bytearray(1)
    a.irecv(3, left)
    a.close()
    left.clear()
    with pytest.raises((BufferError, TypeError, ValueError)):
        b.irecv(1, b"read-only")


# ---- processes

CHILD = """
import sys
from isthmus import mx
with mx.Endpoint(3, key=1) as endpoint:
    print("open", flush=True)
    while True:
        place = bytearray(1 << 21)
        status = endpoint.irecv(0, place, 0).wait().check()
        if status.match == 0:
            break
        endpoint.isend(status.peer, status.match, place[:status.transferred]).wait().check()
"""


@pytest.fixture
def echo(broker: PrivateBroker) -> Iterator[subprocess.Popen[str]]:
    """Another program, of the domain a, that sends everything back."""
    environment = {**os.environ, "ISTHMUS_DOOR": broker.door("a")}
    command = [sys.executable, "-c", CHILD]
    with started(command, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process


def test_another_program_sends_everything_back(broker: PrivateBroker, echo: subprocess.Popen[str]) -> None:
    with mx.Endpoint(node=isthmus.attach(broker.door("b"))) as b:
        peer = b.connect("a", 3, key=1, timeout=LIMIT_S)
        for send in b.isend, b.issend:
            for length in LENGTHS:
                data, place = noise(length), bytearray(length)
                back = b.irecv(length + 1, place)
                fine(send(peer, length + 1, data))
                assert fine(back).peer == peer
                assert place == data
        fine(b.isend(peer, 0, None))
        assert echo.wait(LIMIT_S) == 0


# ---- rules


def rules(action: str) -> str:
    return f'[[rule]]\nfrom = "*"\nto = "*"\naction = "{action}"\n'


def test_rules_decide_who_connects_and_cut_what_is_connected() -> None:
    with PrivateBroker(("a", "b"), policy=rules("accept")) as broker, joined(broker) as (a, b, to_a):
        long = b.isend(to_a, 1, bytes(LONG))
        assert a.probe(1, mx.ALL, LIMIT_S)
        broker.policy_file.write_text(rules("refuse"))
        broker.ask("reload")
        assert ended(long).code is mx.Code.ENDPOINT_CLOSED
        assert ended(b.isend(to_a, 1, b"x")).code is mx.Code.ENDPOINT_CLOSED
        with pytest.raises(errors.RefusedByRule) as refused:
            b.connect("a", a.id, timeout=LIMIT_S)
        assert refused.value.rule == 1
        assert ended(b.iconnect("a", a.id)).code is mx.Code.ENDPOINT_UNREACHABLE
        broker.policy_file.write_text(rules("accept"))
        broker.ask("reload")
        to_a = b.connect("a", a.id, timeout=LIMIT_S)
        fine(b.isend(to_a, 3, b"x"))
        fine(a.irecv(3, bytearray(1)))


# ---- matching, against a model


class Model:
    """Two lists, looked through from the front."""

    def __init__(self) -> None:
        self.posted: list[tuple[int, int, int]] = []
        self.unexpected: list[tuple[int, int]] = []
        #: Which receive got which message.
        self.met: dict[int, int] = {}

    def post(self, receive: int, match: int, mask: int) -> None:
        for at, (value, message) in enumerate(self.unexpected):
            if value & mask == match:
                del self.unexpected[at]
                self.met[receive] = message
                return
        self.posted.append((match, mask, receive))

    def arrive(self, message: int, value: int) -> None:
        for at, (match, mask, receive) in enumerate(self.posted):
            if value & mask == match:
                del self.posted[at]
                self.met[receive] = message
                return
        self.unexpected.append((value, message))

    def probe(self, match: int, mask: int) -> int | None:
        return next((message for value, message in self.unexpected if value & mask == match), None)

    def cancel(self, receive: int) -> bool:
        before = len(self.posted)
        self.posted = [one for one in self.posted if one[2] != receive]
        return len(self.posted) < before


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers(0, 3), st.sampled_from([0, 3, 4000, 40_000]), st.booleans()),
        st.tuples(st.just("receive"), st.integers(0, 3), st.integers(0, 3)),
        st.tuples(st.just("probe"), st.integers(0, 3), st.integers(0, 3)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
@pytest.mark.parametrize("context", [(0, 0), (1, 1)])
def test_messages_and_receives_meet_as_in_the_model(
    broker: PrivateBroker, context: tuple[int, int], steps: list[tuple[object, ...]]
) -> None:
    """One sender, one receiver: after each send the receiver has seen it before the next step."""
    with joined(broker, context=context) as (a, b, to_a):
        model = Model()
        receives: list[tuple[mx.Request, bytearray]] = []
        messages: list[tuple[mx.Request, bytes]] = []
        cancelled = set()
        always = ((1 << context[0]) - 1) << context[1]
        for step in steps:
            match step:
                case "send", int(value), int(length), bool(synchronous):
                    number = len(messages)
                    data = number.to_bytes(4, "little") + bytes(length)
                    send = b.issend if synchronous else b.isend
                    messages.append((send(to_a, value, data), data))
                    model.arrive(number, value)
                    fine(b.isend(to_a, 1 << 32 | number, None))
                    # Whatever was sent before has come.
                    fine(a.irecv(1 << 32 | number, None))
                case "receive", int(value), int(mask):
                    mask |= always
                    place = bytearray(50_000)
                    receives.append((a.irecv(value & mask, place, mask | ~3 & mx.ALL), place))
                    model.post(len(receives) - 1, value & mask, mask)
                case "probe", int(value), int(mask):
                    found = a.iprobe(value & mask, mask | ~3 & mx.ALL)
                    expected = model.probe(value & mask, mask)
                    assert (found and found.length) == (
                        None if expected is None else len(messages[expected][1])
                    )
                case "cancel", int(which) if receives:
                    which %= len(receives)
                    if which not in cancelled and receives[which][0].test() is None:
                        if which in model.met:
                            # Matched, and its bytes are coming.
                            assert not receives[which][0].cancel()
                        else:
                            assert receives[which][0].cancel() == model.cancel(which)
                            cancelled.add(which)
        for number, (receive, place) in enumerate(receives):
            if number in model.met:
                request, data = messages[model.met[number]]
                assert fine(receive).length == len(data)
                assert place[: len(data)] == data
                fine(request)
            elif number not in cancelled:
                assert receive.test() is None
        left = [messages[message][1] for _, message in model.unexpected]
        for data in left:
            found = a.iprobe(0, ~3 & mx.ALL)
            assert found is not None
            if context == (0, 0):
                assert found.length == len(data)
            fine(a.irecv(found.match, bytearray(50_000)))
        assert a.iprobe() is None
