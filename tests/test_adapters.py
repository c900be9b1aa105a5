"""Libraries over Isthmus, with real servers."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import LIMIT_S, becomes

import isthmus
from isthmus.testing import PrivateBroker

BODY = os.urandom(300_000)
_PORTS = itertools.count(8100)


@pytest.fixture(scope="module")
def broker() -> Iterator[PrivateBroker]:
    with PrivateBroker(("a", "b")) as broker:
        yield broker


@pytest.fixture(autouse=True)
def _door(broker: PrivateBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_DOOR", broker.door("a"))


class Page(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[::-1])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=["lanes", "kernel"])
def web(request: pytest.FixtureRequest, broker: PrivateBroker) -> Iterator[str]:
    """A web server in the domain b: its address."""
    node = isthmus.attach(broker.door("b"))
    # Those that the broker chooses do not fit into a URL.
    port = next(_PORTS)
    server = http.server.ThreadingHTTPServer(("", 0), Page, bind_and_activate=False)
    server.socket.close()
    if request.param == "lanes":
        listener: Any = isthmus.create_server(port, node=node)
    else:
        listener = isthmus.kernel_server(port, node=node)
    server.socket = listener
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://b:{port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.program(
    "requests",
    "requests",
    "adapter",
    "sessions, kept connections, posts, errors; urllib3's pools",
)
def test_urllib3_and_requests(web: str) -> None:
    requests = pytest.importorskip("requests")
    from isthmus.adapters.urllib3 import Adapter, PoolManager

    with PoolManager(timeout=LIMIT_S) as pool:
        assert pool.request("GET", web).data == BODY
        assert pool.request("POST", web, body=b"abc").data == b"cba"
    with requests.Session() as session:
        session.mount("http://", Adapter())
        for _ in range(3):
            assert session.get(web, timeout=LIMIT_S).content == BODY
        assert session.post(web, data=b"abc", timeout=LIMIT_S).content == b"cba"
        with pytest.raises(requests.exceptions.ConnectionError, match="nobody listens"):
            session.get("http://b:1/", timeout=LIMIT_S)
        session.mount("https://", Adapter())
        with pytest.raises(requests.exceptions.InvalidURL, match="https"):
            session.get(web.replace("http", "https"), timeout=LIMIT_S)


@pytest.mark.program(
    "httpx",
    "httpx",
    "adapter",
    "clients, streams, errors",
)
def test_httpx(web: str) -> None:
    httpx = pytest.importorskip("httpx")
    from isthmus.adapters.httpx import Transport

    with httpx.Client(transport=Transport(), timeout=LIMIT_S) as client:
        for _ in range(3):
            assert client.get(web).content == BODY
        assert client.post(web, content=b"abc").content == b"cba"
        with client.stream("GET", web) as answer:
            assert b"".join(answer.iter_bytes()) == BODY
        with pytest.raises(httpx.ConnectError, match="nobody listens"):
            client.get("http://b:1/")


@pytest.mark.program(
    "httpx",
    "httpx",
    "adapter",
    "clients, streams, errors",
)
@pytest.mark.parametrize("web", ["lanes"], indirect=True)
def test_httpx_and_asyncio(web: str) -> None:
    httpx = pytest.importorskip("httpx")
    from isthmus.adapters.httpx import AsyncTransport

    async def talk() -> None:
        async with httpx.AsyncClient(transport=AsyncTransport(), timeout=LIMIT_S) as client:
            answers = await asyncio.gather(*(client.get(web) for _ in range(8)))
            assert all(answer.content == BODY for answer in answers)
            assert (await client.post(web, content=b"abc")).content == b"cba"
            with pytest.raises(httpx.ConnectError):
                await client.get("http://b:1/")

    asyncio.run(talk())


@pytest.mark.program(
    "redis-py",
    "redis",
    "adapter",
    "pipelines, 300 kB values, asyncio",
)
@pytest.mark.skipif(not shutil.which("redis-server"), reason="redis is not installed")
def test_redis(broker: PrivateBroker, tmp_path: Path) -> None:
    redis = pytest.importorskip("redis")
    from isthmus.adapters.redis import AsyncConnection, Connection

    words = ["redis-server", "--port", "7391", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""]
    command = [sys.executable, "-m", "isthmus", "run", "--door", broker.door("b"), "--", *words]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as server:
        try:
            becomes(lambda: broker.ask("status", domain="b")["domain"]["ports"])
            pool = redis.ConnectionPool(Connection, host="b", port=7391, socket_timeout=LIMIT_S)
            with redis.Redis(connection_pool=pool) as client:
                client.set("key", BODY)
                assert client.get("key") == BODY
                with client.pipeline() as pipe:
                    for _ in range(100):
                        pipe.incr("count")
                    assert pipe.execute()[-1] == 100
                (mine,) = [c for c in client.client_list() if c["cmd"].startswith("client")]
                assert mine["laddr"].endswith(":7391")
            pool.disconnect()

            async def talk() -> None:
                pool = redis.asyncio.ConnectionPool(AsyncConnection, host="b", port=7391)
                async with redis.asyncio.Redis(connection_pool=pool) as client:
                    assert await client.get("key") == BODY
                    values = await asyncio.gather(*(client.incr("count") for _ in range(20)))
                    assert max(values) == 120
                await pool.disconnect()

            asyncio.run(asyncio.wait_for(talk(), LIMIT_S))
        finally:
            server.terminate()


@pytest.mark.program(
    "anyio",
    "anyio",
    "adapter",
    "streams and listeners on asyncio",
)
def test_anyio() -> None:
    anyio = pytest.importorskip("anyio")
    from isthmus.adapters.anyio import connect, create_listener

    async def main() -> None:
        async def echo(stream: Any) -> None:
            async with stream:
                async for data in stream:
                    await stream.send(data.upper())

        with anyio.fail_after(LIMIT_S):
            listener = await create_listener(7392)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listener.serve, echo)
                async with await connect(("a", 7392)) as stream:
                    await stream.send(b"hello")
                    assert await stream.receive() == b"HELLO"
                    await stream.send_eof()
                    with pytest.raises(anyio.EndOfStream):
                        await stream.receive()
                tasks.cancel_scope.cancel()
            await listener.aclose()

    anyio.run(main)


def test_multiprocessing() -> None:
    from isthmus.adapters.multiprocessing import Client, Listener

    with Listener(authkey=b"secret") as listener, ThreadPoolExecutor(1) as pool:

        def serve() -> Any:
            with listener.accept() as connection:
                found = connection.recv()
                connection.send({"got": found})
                return found

        served = pool.submit(serve)
        with Client(listener.address, b"secret") as client:
            client.send([1, BODY])
            assert client.recv() == {"got": [1, BODY]}
        assert served.result(LIMIT_S) == [1, BODY]
        refused = pool.submit(serve)
        with contextlib.suppress(EOFError, OSError), pytest.raises(multiprocessing.AuthenticationError):
            Client(listener.address, b"wrong")
        with pytest.raises((multiprocessing.AuthenticationError, EOFError, OSError)):
            refused.result(LIMIT_S)
