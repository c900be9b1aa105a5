"""httpx, and httpcore below it.

httpx.Client(transport=Transport()).get("http://web:8000/")
httpx.AsyncClient(transport=AsyncTransport())
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import httpcore
import httpx

from isthmus import adapters, aio, errors

__all__ = ["AsyncBackend", "AsyncTransport", "Backend", "Transport"]


class _Stream(httpcore.NetworkStream):
    def __init__(self, sock: Any) -> None:
        self._sock = sock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _as_httpcore(httpcore.ReadTimeout, httpcore.ReadError):
            self._sock.settimeout(timeout)
            return bytes(self._sock.recv(max_bytes))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        with _as_httpcore(httpcore.WriteTimeout, httpcore.WriteError):
            self._sock.settimeout(timeout)
            self._sock.sendall(buffer)

    def close(self) -> None:
        self._sock.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        raise httpcore.ConnectError("nothing leaves the node that TLS could protect; use http://")

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":
            # A connection at rest that has something to say has been closed.
            with contextlib.suppress(OSError):
                self._sock.settimeout(0.0)
                self._sock.recv(1, 2)  # MSG_PEEK
                return True
            return False
        return self._sock if info == "socket" else None


class Backend(httpcore.NetworkBackend):
    """Connections of httpcore's pools, to domains."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        with _as_httpcore(httpcore.ConnectTimeout, httpcore.ConnectError):
            return _Stream(adapters.connect(host, port, timeout))


class _AsyncStream(httpcore.AsyncNetworkStream):
    def __init__(self, connection: aio.Connection) -> None:
        self._connection = connection

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _as_httpcore(httpcore.ReadTimeout, httpcore.ReadError):
            return await asyncio.wait_for(self._connection.recv(max_bytes), timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        with _as_httpcore(httpcore.WriteTimeout, httpcore.WriteError):
            await asyncio.wait_for(self._connection.send(buffer), timeout)

    async def aclose(self) -> None:
        self._connection.close()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        raise httpcore.ConnectError("nothing leaves the node that TLS could protect; use http://")

    def get_extra_info(self, info: str) -> Any:
        return self._connection.native.poll()[0] if info == "is_readable" else None


class AsyncBackend(httpcore.AsyncNetworkBackend):
    """The same for asyncio, over lanes alone."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        with _as_httpcore(httpcore.ConnectTimeout, httpcore.ConnectError):
            return _AsyncStream(await asyncio.wait_for(aio.connect((host, port)), timeout))

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Transport(httpx.BaseTransport):
    """For `httpx.Client`. `more` goes to httpcore's pool."""

    def __init__(self, **more: Any) -> None:
        self._pool = httpcore.ConnectionPool(network_backend=Backend(), **more)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        with _as_httpx(request):
            answer = self._pool.handle_request(_request(request))
        return httpx.Response(
            answer.status,
            headers=answer.headers,
            stream=_Body(answer, request),
            extensions=answer.extensions,
        )

    def close(self) -> None:
        self._pool.close()


class AsyncTransport(httpx.AsyncBaseTransport):
    """For `httpx.AsyncClient`, in an asyncio loop."""

    def __init__(self, **more: Any) -> None:
        self._pool = httpcore.AsyncConnectionPool(network_backend=AsyncBackend(), **more)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        with _as_httpx(request):
            answer = await self._pool.handle_async_request(_request(request))
        return httpx.Response(
            answer.status,
            headers=answer.headers,
            stream=_AsyncBody(answer, request),
            extensions=answer.extensions,
        )

    async def aclose(self) -> None:
        await self._pool.aclose()


class _Body(httpx.SyncByteStream):
    def __init__(self, answer: httpcore.Response, request: httpx.Request) -> None:
        self._answer = answer
        self._request = request

    def __iter__(self) -> Iterator[bytes]:
        with _as_httpx(self._request):
            yield from self._answer.iter_stream()

    def close(self) -> None:
        self._answer.close()


class _AsyncBody(httpx.AsyncByteStream):
    def __init__(self, answer: httpcore.Response, request: httpx.Request) -> None:
        self._answer = answer
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx(self._request):
            async for part in self._answer.aiter_stream():
                yield part

    async def aclose(self) -> None:
        await self._answer.aclose()


def _request(request: httpx.Request) -> httpcore.Request:
    url = request.url
    return httpcore.Request(
        method=request.method,
        url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
        headers=request.headers.raw,
        content=request.stream,
        extensions=request.extensions,
    )


@contextlib.contextmanager
def _as_httpcore(late: type[Exception], failed: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (TimeoutError, asyncio.TimeoutError) as error:
        raise late(str(error)) from error
    except (OSError, errors.IsthmusError) as error:
        raise failed(str(error)) from error


@contextlib.contextmanager
def _as_httpx(request: httpx.Request) -> Iterator[None]:
    """httpx has an exception of the same name for each of httpcore's."""
    try:
        yield
    except Exception as error:
        for cls in type(error).__mro__:
            if cls.__module__.startswith("httpcore") and hasattr(httpx, cls.__name__):
                raise getattr(httpx, cls.__name__)(str(error), request=request) from error
        raise
