"""Long MX messages that lie in windows: one copy where that can be, and as ever where it cannot."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import LIMIT_S, Domains, becomes, descriptors
from test_mx import ended, fine, joined, noise, rules
from test_mx_faults import ANNOUNCE, DATA, EAGER, MESSAGE, PLACED, PORT, PULL, Raw, dying, raw, tell, victim

import isthmus
from isthmus import _native, mx
from isthmus.testing import PrivateBroker

__all__ = ["dying"]

#: The shortest message that is taken from a window, and others.
SHORTEST = EAGER + 1
LENGTHS = [SHORTEST, 2**16, 2**16 + 1, 10**6, 2**20, 3 * 2**20 + 5]
WINDOWS_MAX = _native.WINDOWS_MAX
PAGE = 4096

Ends = tuple[mx.Endpoint, mx.Endpoint, mx.Peer]


@pytest.fixture
def ends(broker: PrivateBroker) -> Iterator[Ends]:
    with joined(broker) as found:
        yield found


def lane_of(endpoint: mx.Endpoint) -> dict[str, Any]:
    """What the broker shows of the one connection that this endpoint has."""
    lanes = [
        lane
        for lane in endpoint._node.status()["connections"]
        if lane["peer_port"] >= PORT or lane["port"] >= PORT
    ]
    assert len(lanes) == 1, lanes
    return dict(lanes[0])


def pass_on(ends: Ends, data: memoryview, room: int | None = None, match: int = 5) -> tuple[bool, mx.Status]:
    """Send `data`, and check what comes. Was it taken where it lies? That makes one record of it."""
    a, b, to_a = ends
    before = lane_of(b)
    place = bytearray(len(data) if room is None else room)
    receive, request = a.irecv(match, place), b.isend(to_a, match, data)
    got, sent = ended(receive), ended(request)
    assert place == data[: len(place)]
    assert (got.code, got.length, got.transferred) == (sent.code, sent.length, sent.transferred)
    after = lane_of(b)
    assert after["sent_bytes"] - before["sent_bytes"] >= got.transferred, "bytes that nobody counts"
    return after["sent_messages"] - before["sent_messages"] == 1, got


def comes_to_be_taken(ends: Ends, data: memoryview) -> None:
    """The first message lends the window; some later one is taken from it."""
    becomes(lambda: pass_on(ends, data)[0], "it is never taken where it lies")


def filled(size: int, seed: int = 0) -> memoryview:
    view = mx.buffer(size)
    view[:] = noise(size, seed)
    return view


def windows_mapped() -> int:
    """Mappings of windows in this process: of its own and of others."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("isthmus-window")


# ---- what a program sees


def test_a_buffer_is_memory_like_any_other() -> None:
    for size in 0, 1, PAGE, 2**21 + 1:
        view = mx.buffer(size)
        assert len(view) == size
        assert view.format == "B"
        assert not view.readonly
        assert view == bytes(size)
        view[:] = noise(size)
        assert view == noise(size)
    numpy = pytest.importorskip("numpy")
    array = numpy.frombuffer(mx.buffer(800), dtype="f8")
    array += 1
    assert array.sum() == 100


@pytest.mark.parametrize("size", [-1, 2**32 + 1])
def test_a_buffer_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        mx.buffer(size)


def test_messages_are_taken_where_they_lie(ends: Ends) -> None:
    view = filled(2 * max(LENGTHS))
    comes_to_be_taken(ends, view[:SHORTEST])
    chance = random.Random(7)
    for length in LENGTHS * 2:
        at = chance.choice([0, 1, PAGE, len(view) - length, chance.randrange(len(view) - length)])
        assert pass_on(ends, view[at : at + length])[0], (at, length)


def test_the_first_message_goes_through_the_lane(ends: Ends) -> None:
    """Nobody waits for a window to be lent."""
    assert not pass_on(ends, filled(10**6))[0]


def test_it_costs_the_lender_memory_once(ends: Ends) -> None:
    _, b, _ = ends

    def held() -> int:
        return int(b._node.status()["holds"]["memory"][0])

    rings = held()
    view = filled(10**6)
    size = -(-len(view) // PAGE) * PAGE
    comes_to_be_taken(ends, view)
    assert held() == rings + size
    assert lane_of(b)["windows"] == 1
    with mx.Endpoint(node=ends[0]._node) as another:
        to_another = b.connect("a", another.id, timeout=LIMIT_S)
        receive, request = another.irecv(1, bytearray(10**6)), b.isend(to_another, 1, view)
        fine(receive)
        fine(request)
        becomes(lambda: sum(side["windows"] for side in b._node.status()["connections"]) == 2)
        assert held() == 2 * rings + size
    becomes(lambda: held() == rings + size)
    view.release()
    becomes(lambda: held() == rings)


def test_a_receive_that_is_too_short_takes_what_it_has_room_for(ends: Ends) -> None:
    view = filled(10**6)
    comes_to_be_taken(ends, view)
    for room in 1, EAGER, SHORTEST, 10**6 - 1:
        taken, status = pass_on(ends, view, room)
        assert taken
        assert (status.code, status.transferred, status.length) == (mx.Code.TRUNCATED, room, 10**6)
    status = pass_on(ends, view, 0)[1]
    assert (status.code, status.transferred) == (mx.Code.TRUNCATED, 0)


def test_receives_may_come_late_and_in_pieces(ends: Ends) -> None:
    a, b, to_a = ends
    view = filled(10**6)
    comes_to_be_taken(ends, view)
    for send in b.isend, b.issend:
        request = send(to_a, 9, view)
        assert a.probe(9, mx.ALL, LIMIT_S) is not None
        assert request.test() is None
        places = [bytearray(n) for n in (1, 0, 70_000, 10**6 - 70_001)]
        fine(a.irecv(9, places))
        fine(request)
        assert b"".join(places) == view


def test_short_synchronous_messages_are_as_ever(ends: Ends) -> None:
    a, b, to_a = ends
    view = filled(10**6)
    comes_to_be_taken(ends, view)
    for length in 0, 1, EAGER:
        place = bytearray(length)
        request = b.issend(to_a, 3, view[:length])
        fine(a.irecv(3, place))
        fine(request)
        assert place == view[:length]


def test_lists_of_buffers_go_through_the_lane(ends: Ends) -> None:
    a, b, to_a = ends
    view, other = filled(10**6), noise(10**5)
    comes_to_be_taken(ends, view)
    for parts in [view[:500_000], other], [other, view], [view[:400_000], view[400_000:]]:
        place = bytearray(sum(map(len, parts)))
        receive, request = a.irecv(5, place), b.isend(to_a, 5, parts)
        fine(receive)
        fine(request)
        assert place == b"".join(parts)
    # One with nothing in the others is one.
    before = lane_of(b)["sent_messages"]
    place = bytearray(10**6)
    receive, request = a.irecv(5, place), b.isend(to_a, 5, [b"", view, b""])
    fine(receive)
    fine(request)
    assert place == view
    assert lane_of(b)["sent_messages"] == before + 1


def test_what_is_beside_a_buffer_is_not_in_it(ends: Ends) -> None:
    view = filled(10**6)
    comes_to_be_taken(ends, view)
    assert not pass_on(ends, memoryview(noise(10**6, 3)))[0]


def test_many_messages_at_a_time_and_both_ways(ends: Ends) -> None:
    a, b, to_a = ends
    to_b = a.connect("b", b.id, timeout=LIMIT_S)
    views = [filled(2**21, seed) for seed in range(4)]
    for _ in range(5):
        receives, requests, places = [], [], []
        for n in range(40):
            view = views[n % 4][n : n + 200_000 + n]
            one, other, to = (a, b, to_a) if n % 2 else (b, a, to_b)
            place = bytearray(len(view))
            places.append((place, view))
            receives.append(one.irecv(n, place))
            requests.append(other.isend(to, n, view))
        for request in receives + requests:
            fine(request)
        for place, view in places:
            assert place == view


def test_an_endpoint_of_the_same_program_takes_them_too(broker: PrivateBroker) -> None:
    """Both sides of the connection are one attachment's."""
    node = isthmus.attach(broker.door("d"))
    with mx.Endpoint(node=node) as one, mx.Endpoint(node=node) as other:
        to_one = other.connect("d", one.id, timeout=LIMIT_S)
        to_other = one.connect("d", other.id, timeout=LIMIT_S)
        views = {one: filled(10**6, 1), other: filled(10**6, 2)}
        taken = set()

        def sent() -> dict[bool, int]:
            return {bool(lane["opener"]): int(lane["sent_messages"]) for lane in node.status()["connections"]}

        def both() -> bool:
            for source, target, to in (one, other, to_other), (other, one, to_one):
                before = sent()
                place = bytearray(10**6)
                receive, request = target.irecv(1, place), source.isend(to, 1, views[source])
                fine(receive)
                fine(request)
                assert place == views[source]
                opener = source is other
                if sent()[opener] - before[opener] == 1:
                    taken.add(source)
            return len(taken) == 2

        becomes(both)


def test_every_carrier_delivers(domains: Domains) -> None:
    with joined(domains) as ends:
        view = filled(10**6)
        taken = [pass_on(ends, view)[0] for _ in range(20)]
        if domains.carrier == "put":
            assert not any(taken), "a page was shared where a rule says that none is"
            assert lane_of(ends[1])["windows"] == 0


def test_a_message_is_whole_when_its_sender_closes_at_once(broker: PrivateBroker) -> None:
    for _ in range(5):
        with joined(broker) as ends:
            a, b, to_a = ends
            view = filled(3 * 2**22)
            comes_to_be_taken(ends, view)
            place = bytearray(len(view))
            receive = a.irecv(1, place)
            b.isend(to_a, 1, view).forget()
            b.close()
            fine(receive)
            assert place == view


# ---- nothing stays


def test_windows_go_with_what_was_made_of_them(ends: Ends) -> None:
    pass_on(ends, memoryview(noise(10**5)))
    before, mapped = descriptors(), windows_mapped()
    for n in range(3 * WINDOWS_MAX):
        view = filled(10**5, n)
        pass_on(ends, view)
        if n % 16 == 0:
            comes_to_be_taken(ends, view[: SHORTEST + n])
        part = view[5:]
        view.release()
        del view
        assert windows_mapped() > mapped
        part.release()
        del part
    becomes(lambda: windows_mapped() == mapped, "something is mapped for ever")
    # Memory for lanes to come is kept for a while: there may be less than before.
    becomes(lambda: descriptors() <= before, "descriptors stay")
    assert lane_of(ends[1])["windows"] == 0


def test_a_buffer_that_is_dropped_while_it_is_sent_stays_until_the_end(ends: Ends) -> None:
    a, b, to_a = ends
    view = filled(10**6)
    data = bytes(view)
    comes_to_be_taken(ends, view)
    before = windows_mapped()
    request = b.isend(to_a, 5, view)
    del view
    assert windows_mapped() == before
    place = bytearray(len(data))
    fine(a.irecv(5, place))
    fine(request)
    assert place == data
    becomes(lambda: windows_mapped() == 0)


def test_windows_go_with_the_connection(broker: PrivateBroker) -> None:
    view = filled(10**6)
    for _ in range(5):
        with joined(broker) as ends:
            comes_to_be_taken(ends, view)
            assert windows_mapped() == 2
        becomes(lambda: windows_mapped() == 1, "the peer's mapping stays")


def test_more_windows_than_a_connection_may_lend(ends: Ends) -> None:
    views = [filled(SHORTEST, n) for n in range(WINDOWS_MAX + 5)]
    for _ in range(2):
        for view in views:
            pass_on(ends, view)
    becomes(lambda: lane_of(ends[1])["windows"] == WINDOWS_MAX)
    assert sum(pass_on(ends, view)[0] for view in views) <= WINDOWS_MAX
    comes_to_be_taken(ends, views[0])
    # Their places are free again.
    last = views[-1]
    views.clear()
    gc.collect()
    comes_to_be_taken(ends, last)


def test_a_domain_at_its_limit_sends_through_the_lane() -> None:
    limits = '[limits]\nmemory = "6MiB"\n'
    with PrivateBroker(("a", "b"), limits + rules("accept")) as broker, joined(broker) as ends:
        small, large = filled(10**6), filled(8 * 10**6)
        for _ in range(5):
            assert not pass_on(ends, large)[0]
        comes_to_be_taken(ends, small)
        assert lane_of(ends[1])["windows"] == 1


# ---- death


SEND_FROM_A_WINDOW = (
    "from isthmus import mx",
    "endpoint = mx.Endpoint()",
    "peer = endpoint.connect('a', NUMBER, timeout=30)",
    "view = mx.buffer(64 << 20)",
    "view[:] = bytes([7]) * len(view)",
    "endpoint.isend(peer, 1, view[:100_000]).wait()",
)


def test_a_sender_that_dies_while_its_message_is_taken(broker: PrivateBroker, dying: Any) -> None:
    with victim(broker) as (a, _, _):
        first = a.irecv(1, bytearray(100_000))
        tell(dying, *(line.replace("NUMBER", str(a.id)) for line in SEND_FROM_A_WINDOW))
        fine(first)
        becomes(lambda: windows_mapped() == 1, "it was not lent")
        tell(dying, "request = endpoint.isend(peer, 2, view)")
        place = bytearray(64 << 20)
        receive = a.irecv(2, place)
        dying.kill()
        dying.wait()
        status = ended(receive)
        # Whatever came first.
        assert status.code in (mx.Code.SUCCESS, mx.Code.ENDPOINT_CLOSED)
        assert set(place) <= {0, 7}
        becomes(lambda: windows_mapped() == 0, "the mapping of a dead peer's memory stays")


def test_a_receiver_that_dies_while_it_takes_a_message(broker: PrivateBroker, dying: Any) -> None:
    with victim(broker) as (a, _, _):
        view = filled(64 << 20)
        tell(
            dying,
            "from isthmus import mx",
            "endpoint = mx.Endpoint()",
            f"peer = endpoint.connect('a', {a.id}, timeout=30)",
            "endpoint.isend(peer, 1, b'here').wait()",
            "place = bytearray(64 << 20)",
        )
        peer = fine(a.irecv(1, bytearray(4))).peer
        assert peer is not None
        for _ in range(3):
            request = a.isend(peer, 2, view[:100_000])
            tell(dying, "endpoint.irecv(2, place).wait().check()")
            fine(request)
        request = a.isend(peer, 3, view)
        tell(dying, "receive = endpoint.irecv(3, place)")
        dying.kill()
        dying.wait()
        assert ended(request).code in (mx.Code.SUCCESS, mx.Code.ENDPOINT_CLOSED)
        becomes(
            lambda: a._node.status()["holds"]["memory"][0] < len(view), "it is lent to nobody and counted"
        )


def test_windows_outlive_the_broker() -> None:
    with PrivateBroker(("a", "b")) as broker, joined(broker) as ends:
        a, b, to_a = ends
        views = [filled(10**6, n) for n in range(3)]
        for view in views[:2]:
            comes_to_be_taken(ends, view)
        held = b._node.status()["holds"]["memory"][0]
        broker.kill()
        for view in views:
            place = bytearray(len(view))
            receive, request = a.irecv(1, place), b.isend(to_a, 1, view)
            fine(receive)
            fine(request)
            assert place == view
        # Gone while there is nobody to be told.
        views.pop(0).release()
        broker.start()
        becomes(lambda: _attached(b))
        becomes(lambda: lane_of(b)["windows"] == 1)
        assert b._node.status()["holds"]["memory"][0] < held
        for view in views:
            comes_to_be_taken(ends, view)
        becomes(lambda: lane_of(b)["windows"] == 2)
        del view
        views.clear()
        becomes(lambda: windows_mapped() == 0, "the peer never heard of it")
        becomes(lambda: lane_of(b)["windows"] == 0)


def _attached(endpoint: mx.Endpoint) -> bool:
    try:
        return bool(endpoint._node.status()["connections"])
    except isthmus.errors.IsthmusError:
        return False


# ---- who says what cannot be


def lent(peer: Raw, size: int) -> tuple[_native.MxWindow, int]:
    """A window of the raw side's that the endpoint has."""
    window = _native.MxWindow(size)
    lane = peer.sock._lane("lend")
    number = becomes(lambda: lane.lend(window), "it is not lent")
    return window, number


def announce(peer: Raw, window: int, offset: int, length: int = 10**5, id: int = 77) -> None:
    peer.say(ANNOUNCE, offset.to_bytes(8, "little"), match=5, length=length, id=id, more=window)


def is_known(a: mx.Endpoint, peer: Raw, window: int) -> None:
    """The endpoint's attachment has heard of it: asked until it takes something there."""

    def taken() -> bool:
        receive = a.irecv(5, bytearray(10**5))
        announce(peer, window, 0)
        answer = peer.hear()
        assert answer.id == 77
        if answer.kind == PLACED:
            assert answer.length == fine(receive).transferred == 10**5
            return True
        assert answer.kind == PULL
        peer.say(DATA, bytes(10**5), id=answer.more)
        fine(receive)
        return False

    becomes(taken)


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (1, 2**20),
        (2**20, 1),
        (2**20 - 10**5 + 1, 10**5),
        (2**32, 10**5),
        (2**63, 10**5),
        (2**64 - 1, 10**5),
        (2**64 - 10**5, 10**5),
        (0, 2**32 - 1),
        (0, 2**20 + 1),
    ],
)
@pytest.mark.parametrize("posted", [True, False])
def test_who_names_what_is_outside_of_its_window_is_left(
    broker: PrivateBroker, offset: int, length: int, posted: bool
) -> None:
    with victim(broker) as (a, _, c), raw(c, a) as hostile:
        hostile.greet()
        _window, number = lent(hostile, 2**20)
        is_known(a, hostile, number)
        place = bytearray(10**5)
        receive = a.irecv(5 if posted else 6, place)
        announce(hostile, number, offset, length)
        hostile.ends()
        assert receive.test() is None
        assert receive.cancel()
        assert place == bytes(10**5)
        assert a.iprobe() is None


def test_what_lies_in_no_known_window_is_pulled(broker: PrivateBroker) -> None:
    """It may be on its way, or was not taken."""
    with victim(broker) as (a, _, c), raw(c, a) as peer:
        peer.greet()
        for window, offset in (1, 0), (2**32 - 1, 2**64 - 1):
            place = bytearray(10**5)
            receive = a.irecv(5, place)
            announce(peer, window, offset)
            pull = peer.hear()
            assert (pull.kind, pull.id, pull.length) == (PULL, 77, 10**5)
            peer.say(DATA, b"x" * 10**5, id=pull.more)
            fine(receive)
            assert place == b"x" * 10**5


def test_a_window_is_of_one_lane_alone(broker: PrivateBroker) -> None:
    with victim(broker) as (a, _, c), raw(c, a) as owner, raw(c, a) as thief:
        owner.greet()
        thief.hello(41)
        thief.hear()
        _window, number = lent(owner, 2**20)
        is_known(a, owner, number)
        receive = a.irecv(5, bytearray(10**5))
        announce(thief, number, 0)
        assert thief.hear().kind == PULL
        thief.sock.close()
        assert ended(receive).code is mx.Code.ENDPOINT_CLOSED


def test_what_was_taken_back_is_read_no_more(broker: PrivateBroker) -> None:
    with victim(broker) as (a, _, c), raw(c, a) as peer:
        peer.greet()
        window, number = lent(peer, 2**20)
        is_known(a, peer, number)
        # Announced before, received after.
        announce(peer, number, 4096, id=5)
        assert a.probe(5, mx.ALL, LIMIT_S) is not None
        del window
        # Ours is the view that the message holds.
        becomes(lambda: windows_mapped() == 1)
        place = bytearray(10**5)
        fine(a.irecv(5, place))
        assert peer.hear().kind == PLACED
        becomes(lambda: windows_mapped() == 0)
        receive = a.irecv(5, place)
        announce(peer, number, 0, id=6)
        assert peer.hear().kind == PULL
        peer.sock.close()
        ended(receive)


def test_data_for_what_is_being_taken_ends_the_lane(broker: PrivateBroker) -> None:
    with victim(broker) as (a, _, c), raw(c, a) as hostile:
        hostile.greet()
        size = 256 << 20
        window, number = lent(hostile, size)
        is_known(a, hostile, number)
        receive = a.irecv(5, bytearray(10**5))
        hostile.say(ANNOUNCE, match=5, length=10**5, id=1)
        ticket = hostile.hear().more
        hostile.say(DATA, bytes(10**5), id=ticket)
        fine(receive)
        # It has the same ticket.
        place = bytearray(size)
        receive = a.irecv(5, place)
        announce(hostile, number, 0, size)
        hostile.say(DATA, b"x", id=ticket)
        hostile.ends()
        # Whatever came first.
        assert ended(receive).code in (mx.Code.SUCCESS, mx.Code.ENDPOINT_CLOSED)
        assert place[0] == 0
        del window


@pytest.mark.parametrize("wrong", ["nothing", "longer", "twice", "after a pull", "of none in a window"])
def test_who_has_taken_what_cannot_be_is_left(broker: PrivateBroker, wrong: str) -> None:
    with victim(broker) as (a, _, c), raw(c, a) as hostile:
        hostile.greet()
        hostile.say(MESSAGE)
        peer = fine(a.irecv(0, None)).peer
        assert peer is not None
        view = filled(2**24)

        def announced() -> int:
            """A message of the window that is named, or (the last case) of other memory."""
            nonlocal request
            data = bytes(view) if wrong == "of none in a window" else view
            request = a.isend(peer, 5, data)
            record = hostile.hear()
            assert (record.kind, record.length, len(record.data)) == (
                ANNOUNCE,
                2**24,
                8 if record.more else 0,
            )
            if bool(record.more) == (wrong != "of none in a window"):
                return int(record.id) + 1
            hostile.say(PULL, id=record.id)
            ended(request)
            return 0

        request = a.irecv(77, None)
        id = becomes(announced) - 1
        code = mx.Code.ENDPOINT_CLOSED
        if wrong == "longer":
            hostile.say(PLACED, id=id, length=2**24 + 1)
        elif wrong == "twice":
            hostile.say(PLACED, id=id, length=2**24)
            hostile.say(PLACED, id=id, length=2**24)
            code = mx.Code.SUCCESS
        elif wrong == "after a pull":
            hostile.say(PULL, id=id, length=2**24, more=1)
            hostile.say(PLACED, id=id, length=2**24)
        else:
            hostile.say(PLACED, id=id, length=0 if wrong == "nothing" else 2**24)
        hostile.ends()
        assert ended(request).code is code


def test_parts_of_a_message_may_be_taken(broker: PrivateBroker) -> None:
    with victim(broker) as (a, _, c), raw(c, a) as other:
        other.greet()
        other.say(MESSAGE)
        peer = fine(a.irecv(0, None)).peer
        assert peer is not None
        view = filled(10**5)

        def takes_a_part() -> bool:
            request = a.isend(peer, 5, view)
            record = other.hear()
            other.say(PLACED if record.more else PULL, id=record.id, length=700 if record.more else 0)
            status = ended(request)
            assert status.code is mx.Code.TRUNCATED
            return status.transferred == 700

        becomes(takes_a_part)
