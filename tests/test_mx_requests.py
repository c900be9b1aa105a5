"""Requests of MX endpoints: waiting for them, taking them back, awaiting them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import LIMIT_S, becomes
from endpoints import LONG, Ends, fails, fine, joined, noise

import isthmus
from isthmus import errors, mx
from isthmus.testing import PrivateBroker

#: Where a message changes its class, on lanes or on the wire, and one beside each.


# ---- waiting


def test_the_end_of_a_wait_is_no_error(ends: Ends) -> None:
    a, _, _ = ends
    receive = a.irecv(1, bytearray(1))
    assert receive.test() is None
    for timeout in 0, 0.01:
        assert receive.wait(timeout) is None
        assert a.wait_any(timeout=timeout) is None
        assert a.peek(timeout) is None
        assert a.probe(timeout=timeout) is None
    assert a.test_any() is None
    assert a.iprobe() is None


def test_any_gives_the_request_that_ended_first_of_those_that_fit(ends: Ends) -> None:
    a, b, to_a = ends
    receives = {match: a.irecv(match, bytearray(1)) for match in (1, 2, 3, 4)}
    for match in 3, 1, 4, 2:
        fine(b.isend(to_a, match, b"x"))
    becomes(lambda: a._native.peek(0) is not None)
    assert a.wait_any(2, mx.ALL, LIMIT_S) is receives[2]
    for match in 3, 1, 4:
        peeked = a.peek(LIMIT_S)
        assert peeked is receives[match]
        assert a.peek(0) is peeked
        assert a.test_any() is peeked
        status = peeked.test()
        assert status is not None
        assert status.match == match
    assert a.peek(0) is None
    assert a.test_any() is None


def test_what_is_peeked_at_ends_at_once(ends: Ends) -> None:
    a, b, to_a = ends
    receive = a.irecv(1, bytearray(1))
    fine(b.isend(to_a, 1, b"x"))
    assert a.peek(LIMIT_S) is receive
    assert receive.wait(0) is not None


def test_contexts_are_queues_of_their_own_that_any_may_span(broker: PrivateBroker) -> None:
    with joined(broker, context=(8, 56)) as (a, b, to_a):
        with fails(42):
            a.irecv(1, bytearray(1), 0xFF)
        for context in 2, 1, 2:
            fine(b.isend(to_a, context << 56 | 5, bytes([context])))
        assert a.probe(0, 0, LIMIT_S)
        becomes(lambda: a.iprobe(1 << 56, 0xFF << 56))
        spanning = a.iprobe(5, 0xFF)
        assert spanning is not None
        assert spanning.match == 2 << 56 | 5
        places = [bytearray(1), bytearray(1)]
        one = a.irecv(1 << 56, places[0], 0xFF << 56)
        other = a.irecv(2 << 56 | 5, places[1])
        assert a.wait_any(1 << 56, 0xFF << 56, LIMIT_S) is one
        assert a.wait_any(5, 0xFF, LIMIT_S) is other
        assert (places[0][0], places[1][0]) == (1, 2)


@pytest.mark.parametrize("bits", [(17, 0), (16, 49), (1, 64)])
def test_contexts_that_are_no_field_are_refused(broker: PrivateBroker, bits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="at most 16 bits"):
        mx.Endpoint(context=bits, node=isthmus.attach(broker.door("a")))


def test_everybody_who_waits_is_woken_up(ends: Ends, pool: ThreadPoolExecutor) -> None:
    a, _, _ = ends
    receive = a.irecv(1, bytearray(1))
    calls: list[Callable[[], object]] = [
        lambda: receive.wait(LIMIT_S),
        lambda: a.wait_any(timeout=LIMIT_S),
        lambda: a.peek(LIMIT_S),
        lambda: a.probe(timeout=LIMIT_S),
    ]
    waiting = [pool.submit(call) for call in calls]

    def woken() -> bool:
        # One that has not come yet is not woken.
        a.wake_up()
        return all(one.done() for one in waiting)

    begun = time.monotonic()
    becomes(woken)
    assert [one.result() for one in waiting] == [None] * 4
    assert time.monotonic() - begun < LIMIT_S
    # Nothing of it is left for those who wait later.
    assert receive.wait(0.05) is None


def test_a_connect_that_is_woken_up_has_no_answer_in_time(broker: PrivateBroker) -> None:
    """The other side is a listener that accepts and says nothing."""
    nodes = [isthmus.attach(broker.door(name)) for name in "ab"]
    with silent(nodes[0]) as number, mx.Endpoint(node=nodes[1]) as b:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(b.connect, "a", number, 0, LIMIT_S)

            def woken() -> bool:
                b.wake_up()
                return waiting.done()

            becomes(woken)
            with fails(30):
                waiting.result()
        with fails(30):
            b.connect("a", number, timeout=0.05)


def test_twelve_threads_may_wait_at_one_endpoint(ends: Ends) -> None:
    a, b, to_a = ends
    done: dict[int, bytes] = {}

    def work(n: int) -> None:
        for round in range(20):
            place = bytearray(LONG if n % 3 == 0 else 8)
            fine(a.irecv(n << 16 | round, place))
            done[n << 16 | round] = bytes(place)

    with ThreadPoolExecutor(12) as pool:
        working = [pool.submit(work, n) for n in range(12)]
        sent = {}
        for round in range(20):
            for n in range(12):
                data = noise(LONG if n % 3 == 0 else 8, n << 16 | round)
                sent[n << 16 | round] = data
                fine(b.isend(to_a, n << 16 | round, data))
        for one in working:
            one.result()
    assert done == sent


def test_calls_may_come_from_every_thread_at_once(ends: Ends) -> None:
    a, b, to_a = ends
    to_b = a.connect("b", b.id, timeout=LIMIT_S)

    def echo(n: int) -> None:
        data, place = noise(5000, n), bytearray(5000)
        for match in range(n << 8, (n << 8) + 50):
            there = a.irecv(match, place)
            back = bytearray(5000)
            here = b.irecv(match, back)
            fine(b.isend(to_a, match, data))
            fine(there)
            fine(a.isend(to_b, match, place))
            fine(here)
            assert back == data

    with ThreadPoolExecutor(6) as pool:
        for one in [pool.submit(echo, n) for n in range(6)]:
            one.result()


def test_a_receiver_that_computes_makes_progress(ends: Ends) -> None:
    """Nobody calls: neither the receiver, which sleeps, nor the sender, whose process does something else."""
    a, b, to_a = ends
    data = noise(2**20) * 32
    place = bytearray(len(data))
    request = b.issend(to_a, 1, data)
    assert a.probe(1, mx.ALL, LIMIT_S)
    a.irecv(1, place)
    end = time.monotonic() + LIMIT_S
    while place[-1000:] != data[-1000:]:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert place == data
    assert request.wait(LIMIT_S)


# ---- taking back


def test_a_receive_that_nothing_matched_can_be_taken_back(ends: Ends) -> None:
    a, b, to_a = ends
    place = bytearray(1)
    first, second = a.irecv(1, place), a.irecv(1, bytearray(1))
    assert first.cancel()
    status = first.test()
    assert status is not None
    assert status.code is mx.Code.CANCELLED
    assert first.wait(0) is status
    fine(b.isend(to_a, 1, b"x"))
    fine(second)
    assert place == b"\0"
    # Nothing is told of it later.
    assert a.test_any() is None
    with fails(13):
        first.cancel()


def test_it_is_too_late_to_take_back_what_was_matched(ends: Ends) -> None:
    a, b, to_a = ends
    receive = a.irecv(1, bytearray(1))
    fine(b.isend(to_a, 1, b"x"))
    assert a.peek(LIMIT_S) is receive
    assert not receive.cancel()
    fine(receive)


def test_a_send_cannot_be_taken_back(ends: Ends) -> None:
    a, b, to_a = ends
    request = b.issend(to_a, 1, b"x")
    with fails(40):
        request.cancel()
    fine(a.irecv(1, bytearray(1)))
    fine(request)


@contextlib.contextmanager
def silent(node: isthmus.Node) -> Iterator[int]:
    """A listener in the place of an endpoint, which accepts and never says a word."""
    with isthmus.create_server(0x4D580000 + 60, type=socket.SOCK_SEQPACKET, node=node):
        yield 60


def test_a_connect_without_answer_can_be_taken_back(broker: PrivateBroker) -> None:
    nodes = [isthmus.attach(broker.door(name)) for name in "ab"]
    with silent(nodes[0]) as number, mx.Endpoint(node=nodes[1]) as b:
        request = b.iconnect("a", number, match=5)
        assert request.wait(0.05) is None
        assert request.cancel()
        # Its number is used again for something else, which is not ended by what comes late.
        receives = [b.irecv(n, bytearray(1)) for n in range(5)]
    assert [receive.test() for receive in receives] == [None] * 5


def test_what_is_forgotten_ends_unseen(ends: Ends) -> None:
    a, b, to_a = ends
    place = bytearray(LONG)
    receive = a.irecv(1, place)
    receive.forget()
    request = b.issend(to_a, 1, b"y" * LONG)
    fine(request)
    becomes(lambda: place == b"y" * LONG)
    assert a.test_any() is None
    with fails(13):
        receive.test()
    # One that has ended already.
    receive = a.irecv(2, bytearray(1))
    fine(b.isend(to_a, 2, b"x"))
    assert a.peek(LIMIT_S) is receive
    receive.forget()
    assert a.test_any() is None


# ---- asyncio


def test_requests_can_be_awaited(ends: Ends) -> None:
    a, b, to_a = ends

    async def talk() -> None:
        place = bytearray(LONG)
        receive = a.irecv(1, place)
        status = await b.isend(to_a, 1, b"z" * LONG)
        assert status.code is mx.Code.SUCCESS
        assert (await receive).transferred == LONG
        assert await receive is receive.test()

    asyncio.run(asyncio.wait_for(talk(), LIMIT_S))
    # Another loop later.
    asyncio.run(asyncio.wait_for(talk(), LIMIT_S))


def test_coroutines_await_beside_each_other(ends: Ends) -> None:
    a, b, to_a = ends

    async def one(match: int) -> None:
        for n in range(20):
            place = bytearray(5000 * (match % 3))
            status = await a.irecv(match, place)
            assert status.match == match
            assert place == bytes([n]) * len(place)

    async def other(match: int) -> None:
        for n in range(20):
            await b.isend(to_a, match, bytes([n]) * 5000 * (match % 3))

    async def all_of_them() -> None:
        await asyncio.gather(*(one(n) for n in range(6)), *(other(n) for n in range(6)))

    asyncio.run(asyncio.wait_for(all_of_them(), LIMIT_S))


def test_a_cancelled_coroutine_takes_no_other_with_it(ends: Ends) -> None:
    a, b, to_a = ends

    async def wait(request: mx.Request) -> mx.Status:
        return await request

    async def main() -> None:
        requests = [a.irecv(match, bytearray(1)) for match in (1, 2, 3)]
        tasks = [asyncio.create_task(wait(request)) for request in requests]
        await asyncio.sleep(0)
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        assert [task.done() for task in tasks] == [False, True, False]
        await b.isend(to_a, 3, b"x")
        await b.isend(to_a, 1, b"x")
        assert [(await tasks[n]).match for n in (0, 2)] == [1, 3]
        # The request itself is still there.
        await b.isend(to_a, 2, b"x")
        assert (await requests[1]).match == 2

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))


def test_awaiting_one_request_does_not_turn_in_circles_for_another(ends: Ends) -> None:
    """One that has ended and that nobody asks about is no reason to look again and again."""
    a, b, to_a = ends

    async def main() -> None:
        b.isend(to_a, 1, b"ended and not asked about")
        a.irecv(1, bytearray(30))
        assert a.peek(LIMIT_S) is not None
        looks = 0
        receive = a.irecv(2, bytearray(1))
        test = receive.test

        class Counted(mx.Request):
            __slots__ = ()

            def test(self) -> mx.Status | None:
                nonlocal looks
                looks += 1
                return test()

        waiting = asyncio.ensure_future(asyncio.wait_for(_awaited(Counted(a, receive._id)), LIMIT_S))
        for _ in range(100):
            await asyncio.sleep(0)
        before = looks
        assert before < 10
        b.isend(to_a, 2, b"x")
        await waiting

    asyncio.run(main())


async def _awaited(request: mx.Request) -> mx.Status:
    return await request


def test_closing_ends_what_is_awaited(ends: Ends) -> None:
    a, _, _ = ends

    async def main() -> None:
        task = asyncio.ensure_future(_awaited(a.irecv(1, bytearray(1))))
        await asyncio.sleep(0)
        a.close()
        with pytest.raises(errors.Closed):
            await task

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))
