"""Dask over lanes: `isthmus://`, with stock schedulers, workers and clients of `distributed`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from conftest import LIMIT_S

pytest.importorskip("distributed", reason="distributed is not installed")

import numpy as np
from distributed import Client, LocalCluster
from distributed.comm import CommClosedError, connect, listen
from distributed.comm.core import Comm
from distributed.protocol import to_serialize

from isthmus.testing import PrivateBroker

ADDRESS = "isthmus://"


@pytest.fixture(scope="module")
def broker() -> Iterator[PrivateBroker]:
    with PrivateBroker(("a", "b", "c")) as broker:
        yield broker


@pytest.fixture(autouse=True)
def _door(broker: PrivateBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_DOOR", broker.door("a"))


def run(
    talk: Callable[[Comm, asyncio.Queue[Comm]], Awaitable[None]],
    serve: Callable[[Comm], Awaitable[None]] | None = None,
) -> None:
    """A listener and a comm to it; what the listener accepts comes out of the queue, or is served."""

    async def main() -> None:
        accepted: asyncio.Queue[Comm] = asyncio.Queue()
        async with listen(ADDRESS, serve or accepted.put) as listener:
            comm = await connect(listener.contact_address)
            try:
                await talk(comm, accepted)
            finally:
                comm.abort()

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))


async def becomes_closed(comm: Comm) -> None:
    for _ in range(1000):
        if comm.closed():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it is not closed")


def test_messages_of_every_size_in_both_directions() -> None:
    async def echo(comm: Comm) -> None:
        try:
            while True:
                await comm.write(await comm.read())
        except CommClosedError:
            pass

    async def talk(comm: Comm, _: Any) -> None:
        for message in (
            {"op": "ping"},
            [],
            {"x": b"y" * 100_000, "list": list(range(1000))},
            {"empty": np.empty(0), "large": np.arange(3_000_000), "small": [np.ones(3)] * 500},
        ):
            sent: Any = message
            if isinstance(message, dict):
                arrays = {k: to_serialize(v) for k, v in message.items() if isinstance(v, np.ndarray)}
                sent = {**message, **arrays}
            await comm.write(sent)
            got = await comm.read()
            if isinstance(message, dict) and "large" in message:
                assert np.array_equal(got["large"], message["large"])
                assert got["empty"].size == 0
            elif isinstance(message, dict):
                assert set(got) == set(message)
            else:
                assert list(got) == message
        assert comm.same_host
        assert comm.extra_info["path"] == "sealed"
        assert comm.peer_address.startswith("isthmus://a:")

    run(talk, echo)


def test_who_closes_is_heard() -> None:
    async def talk(comm: Comm, accepted: asyncio.Queue[Comm]) -> None:
        other = await accepted.get()
        await comm.write("last words")
        await comm.close()
        assert comm.closed()
        with pytest.raises(CommClosedError):
            await comm.write("more")
        # What was written before is delivered.
        assert not other.closed()
        assert await other.read() == "last words"
        await becomes_closed(other)
        with pytest.raises(CommClosedError):
            await other.read()
        await other.close()
        await comm.close()
        other.abort()

    run(talk)


def test_an_idle_comm_that_was_aborted_is_closed() -> None:
    async def talk(comm: Comm, accepted: asyncio.Queue[Comm]) -> None:
        other = await accepted.get()
        other.abort()
        await becomes_closed(comm)
        with pytest.raises(CommClosedError):
            await comm.read()

    run(talk)


def test_a_read_that_was_cancelled_ends_the_comm() -> None:
    """As with TCP: nobody knows how much of a message was read."""

    async def talk(comm: Comm, accepted: asyncio.Queue[Comm]) -> None:
        other = await accepted.get()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(other.read(), 0.05)
        assert other.closed()
        with pytest.raises(CommClosedError):
            await comm.read()

    run(talk)


def test_a_listener_that_stops_keeps_what_is_open() -> None:
    async def main() -> None:
        accepted: asyncio.Queue[Comm] = asyncio.Queue()
        listener = await listen(ADDRESS, accepted.put)
        address = listener.contact_address
        comm = await connect(address)
        other = await accepted.get()
        listener.stop()
        with pytest.raises(OSError, match="Timed out trying to connect"):
            await connect(address, timeout=0.3)
        await comm.write({"still": "open"})
        assert await other.read() == {"still": "open"}
        await comm.close()
        await other.close()

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))


def test_nonsense_ends_the_comm_and_nothing_else() -> None:
    async def talk(comm: Comm, accepted: asyncio.Queue[Comm]) -> None:
        other = await accepted.get()
        connection: Any = comm
        await connection._connection.send(b"\xff" * 64)
        with pytest.raises(CommClosedError, match="frames"):
            await other.read()

    run(talk)


@pytest.mark.timeout(180)
def test_a_local_cluster() -> None:
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, protocol=ADDRESS, dashboard_address=None, processes=True
        ) as cluster,
        Client(cluster) as client,
    ):
        assert cluster.scheduler_address.startswith(ADDRESS)
        first, second = client.scheduler_info()["workers"]
        made = client.submit(np.arange, 2_000_000, workers=[first])
        assert client.submit(np.sum, made, workers=[second]).result(LIMIT_S) == 1_999_999_000_000
        assert client.gather(client.map(lambda n: n * n, range(200)))[-1] == 199 * 199


@pytest.mark.program(
    "Dask distributed",
    "distributed",
    "`isthmus://`",
    "a stock scheduler, workers in other domains, closing, cancelling, broken messages",
)
@pytest.mark.timeout(180)
def test_workers_in_other_domains(broker: PrivateBroker) -> None:
    """A scheduler in one domain, a stock `dask worker` in each of two others."""

    def start(domain: str, *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "distributed.cli." + words[0], *words[1:]],
            env={**os.environ, "ISTHMUS_DOOR": broker.door(domain)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    processes = [start("a", "dask_scheduler", "--protocol", ADDRESS, "--port", "8786", "--no-dashboard")]
    try:
        for domain in ("b", "c"):
            worker = (
                "dask_worker",
                "isthmus://a:8786",
                "--no-dashboard",
                "--nthreads",
                "1",
                "--name",
                domain,
            )
            processes.append(start(domain, *worker))
        with Client("isthmus://a:8786", timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
            workers = {w["name"]: address for address, w in client.scheduler_info()["workers"].items()}
            assert {address.split(":")[1] for address in workers.values()} == {"//b", "//c"}
            made = client.submit(np.arange, 2_000_000, workers=[workers["b"]])
            assert client.submit(np.sum, made, workers=[workers["c"]]).result(60) == 1_999_999_000_000
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(LIMIT_S)
