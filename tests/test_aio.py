"""Awaitable connections: what they move, what cancelling leaves behind, and that they wake."""

from __future__ import annotations

import asyncio
import os
import selectors
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import isthmus
from isthmus import aio, errors
from isthmus.testing import PrivateBroker

STRICT = '[[rule]]\nfrom = "*"\nto = "*"\naction = "accept"\nstrict = true\n'


@pytest.fixture(scope="module", params=["sealed", "put"])
def neighbours(request: pytest.FixtureRequest) -> Iterator[PrivateBroker]:
    with PrivateBroker(("a", "b"), STRICT if request.param == "put" else None) as broker:
        yield broker


@asynccontextmanager
async def pair(
    broker: PrivateBroker, kind: aio.Kind = "stream"
) -> AsyncIterator[tuple[aio.Connection, aio.Connection]]:
    left, right = isthmus.attach(broker.door("a")), isthmus.attach(broker.door("b"))
    async with await aio.listen(0, kind=kind, node=right) as listener:
        opening = asyncio.create_task(aio.connect(("b", listener.port), kind=kind, node=left))
        server = await listener.accept()
        async with await opening as client, server:
            yield client, server


def test_a_question_and_its_answer(neighbours: PrivateBroker) -> None:
    async def talk() -> None:
        async with pair(neighbours) as (client, server):

            async def echo() -> None:
                while data := await server.recv(4096):
                    await server.send(data)

            answering = asyncio.create_task(echo())
            for i in range(300):
                await client.send(b"%d" % i)
                assert await client.recv(100) == b"%d" % i
            client.shut_send()
            await answering
            server.shut_send()
            assert await client.recv(1) == b""

    asyncio.run(talk())


def test_more_than_a_ring_crosses_while_both_ends_share_a_loop(neighbours: PrivateBroker) -> None:
    data = os.urandom(1 << 20) * 9

    async def talk() -> None:
        async with pair(neighbours) as (client, server):
            sending = asyncio.create_task(client.send(data))
            assert bytes(await server.recv_exactly(len(data))) == data
            await sending

    asyncio.run(talk())


@asynccontextmanager
async def called_by(broker: PrivateBroker, program: str) -> AsyncIterator[aio.Connection]:
    """A connection from another process, which runs `program` with its end in `c` and ends well."""
    opening = (
        "import sys, time, isthmus\n"
        "node = isthmus.attach(sys.argv[1])\n"
        "c = isthmus.create_connection(('b', int(sys.argv[2])), node=node)\n"
    )
    async with await aio.listen(0, node=isthmus.attach(broker.door("b"))) as listener:
        words = [sys.executable, "-c", opening + program, broker.door("a"), str(listener.port)]
        process = await asyncio.create_subprocess_exec(*words, stderr=subprocess.PIPE)
        async with await asyncio.wait_for(listener.accept(), 20) as server:
            yield server
        _, complaint = await process.communicate()
        assert process.returncode == 0, complaint.decode()


def test_a_parked_receiver_is_woken_by_another_process(neighbours: PrivateBroker) -> None:
    program = (
        "for i in range(20):\n"
        "    time.sleep(0.005)\n"
        "    c.sendall(b'%2d' % i)\n"
        "    assert c.recv(2) == b'ok'\n"
        "c.close()\n"
    )

    async def talk() -> None:
        async with called_by(neighbours, program) as server:
            for i in range(20):
                assert await asyncio.wait_for(server.recv_exactly(2), 20) == b"%2d" % i
                await server.send(b"ok")
            assert await asyncio.wait_for(server.recv(1), 20) == b""

    asyncio.run(talk())


def test_long_pieces_of_another_process_are_received_while_they_are_written(
    neighbours: PrivateBroker,
) -> None:
    """A receiver that looks while half a record is there has received nothing yet, and no error either."""
    total = 64 << 20
    program = f"for _ in range({total >> 20}):\n    c.sendall(bytes(range(256)) * 4096)\nc.close()\n"

    async def talk() -> None:
        got, buffer = 0, bytearray(1 << 20)
        async with called_by(neighbours, program) as server:
            while count := await asyncio.wait_for(server.recv_into(buffer), 20):
                assert buffer[0] == got % 256
                got += count
        assert got == total

    asyncio.run(talk())


def test_a_cancelled_receive_has_received_nothing(neighbours: PrivateBroker) -> None:
    async def talk() -> None:
        async with pair(neighbours) as (client, server):
            receiving = asyncio.create_task(server.recv(100))
            await asyncio.sleep(0.01)
            receiving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await receiving
            await client.send(b"all of it")
            assert await server.recv(100) == b"all of it"

    asyncio.run(talk())


def test_a_cancelled_send_says_how_much_is_in_the_lane(neighbours: PrivateBroker) -> None:
    async def talk() -> None:
        async with pair(neighbours) as (client, server):
            data = os.urandom(20 << 20)
            sending = asyncio.create_task(client.send(data))
            # Let it fill the ring and park; the receiver takes a little, so that it grew.
            got = bytearray(await server.recv(100_000))
            await asyncio.sleep(0.05)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError) as cancelled:
                await sending
            done = cancelled.value.done  # type: ignore[attr-defined]
            assert 0 < done < len(data)
            client.shut_send()
            while piece := await server.recv(1 << 20):
                got += piece
            assert len(got) == done
            assert got == data[:done]

    asyncio.run(talk())


def test_messages_keep_their_borders(neighbours: PrivateBroker) -> None:
    async def talk() -> None:
        async with pair(neighbours, "seqpacket") as (client, server):
            for size in (1, 64, 5000, 100_000, 5):
                await client.send(bytes([size % 251]) * size)
            for size in (1, 64, 5000, 100_000, 5):
                assert await server.recv(1 << 20) == bytes([size % 251]) * size
            with pytest.raises(errors.MessageTooLarge, match="at most"):
                await client.send(bytes(64 << 20))

    asyncio.run(talk())


def test_two_tasks_may_not_receive_at_once(neighbours: PrivateBroker) -> None:
    async def talk() -> None:
        async with pair(neighbours) as (client, server):
            first = asyncio.create_task(server.recv(1))
            await asyncio.sleep(0.01)
            with pytest.raises(RuntimeError, match="another task"):
                await server.recv(1)
            await client.send(b"x")
            assert await first == b"x"

    asyncio.run(talk())


def test_nobody_listens(neighbours: PrivateBroker) -> None:
    async def talk() -> None:
        with pytest.raises(errors.NobodyListens):
            await aio.connect("b:4711", node=isthmus.attach(neighbours.door("a")))
        with pytest.raises(errors.UnknownDomain):
            await aio.connect("nowhere:1", node=isthmus.attach(neighbours.door("a")))

    asyncio.run(talk())


def test_hundreds_of_connections_are_served_by_one_loop(neighbours: PrivateBroker) -> None:
    count = 200

    async def talk() -> None:
        left, right = isthmus.attach(neighbours.door("a")), isthmus.attach(neighbours.door("b"))
        async with await aio.listen(0, backlog=count, node=right) as listener:

            async def serve(connection: aio.Connection) -> None:
                async with connection:
                    while data := await connection.recv(100):
                        await connection.send(data)

            async def ask(i: int) -> None:
                async with await aio.connect(("b", listener.port), node=left) as connection:
                    for j in range(5):
                        await connection.send(b"%d.%d" % (i, j))
                        assert await connection.recv(100) == b"%d.%d" % (i, j)

            async def accept() -> None:
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(count):
                        tasks.create_task(serve(await listener.accept()))

            accepting = asyncio.create_task(accept())
            await asyncio.gather(*(ask(i) for i in range(count)))
            await accepting

    if sys.version_info < (3, 11):
        pytest.skip("asyncio.TaskGroup came with Python 3.11")
    before = len(list(Path("/proc/self/fd").iterdir()))
    asyncio.run(talk())
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 8


def test_a_program_may_be_connected_to_itself(neighbours: PrivateBroker) -> None:
    node = isthmus.attach(neighbours.door("a"))
    listener = node.native.listen(0, "stream")
    client = node.native.connect("a", listener.port, "stream", timeout=10)
    server = listener.accept(10)
    assert client.id == server.id
    for end, other in ((client, server), (server, client)):
        # Each end's descriptor follows its own end.
        with selectors.DefaultSelector() as selector:
            selector.register(end.fileno(), selectors.EVENT_READ)
            assert not selector.select(0)
            other.send(b"x", 1.0)
            assert selector.select(20)
            assert end.recv(1, 1.0)[0] == b"x"
    client.close()
    server.close()
    until = time.monotonic() + 20
    while node.status()["connections"]:
        assert time.monotonic() < until


def test_a_connection_that_is_closed_at_once_ends_in_order(neighbours: PrivateBroker) -> None:
    """Its opener has it as soon as the engine hands it over: no reset comes in the place of the end."""

    async def main() -> None:
        left, right = isthmus.attach(neighbours.door("a")), isthmus.attach(neighbours.door("b"))
        async with await aio.listen(0, node=right) as listener:
            for _ in range(500):
                client = await aio.connect(("b", listener.port), node=left)
                await client.send(b"last")
                client.close()
                async with await listener.accept() as server:
                    assert await server.recv_exactly(4) == b"last"
                    assert await server.recv(1) == b""

    asyncio.run(asyncio.wait_for(main(), 60))
