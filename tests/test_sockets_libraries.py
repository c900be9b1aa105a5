"""Libraries that were written for kernel sockets work over ours."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import http.server
import random
import socketserver
import ssl
import subprocess
import threading
import xmlrpc.client
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import LIMIT_S, Domains

import isthmus
from isthmus import errors

Pair = tuple[isthmus.Socket, isthmus.Socket]

BODY = random.Random(11).randbytes(12 << 20)


class OverIsthmus(socketserver.TCPServer):
    """A stock server over our sockets: the one method that a program overrides."""

    node: isthmus.Node

    def server_bind(self) -> None:
        self.socket.close()
        self.socket = isthmus.Socket(node=self.node)  # type: ignore[assignment]
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address  # type: ignore[misc]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = hashlib.sha256(body).hexdigest().encode()
        self.send_response(200)
        self.send_header("X-From", self.address_string())
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in (answer[:10], answer[10:], b""):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[tuple[str, int]]:
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address  # type: ignore[misc]
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def web(domains: Domains) -> Iterator[tuple[str, int]]:
    class Server(OverIsthmus, http.server.ThreadingHTTPServer):
        node = domains["b"]

    with serving(Server(("", 0), Handler)) as address:
        yield address


def test_http_client_and_server(domains: Domains, web: tuple[str, int]) -> None:
    class Connection(http.client.HTTPConnection):
        def connect(self) -> None:
            address = (self.host, self.port)
            self.sock = isthmus.create_connection(address, self.timeout, node=domains["a"])  # type: ignore[assignment]

    connection = Connection(*web, timeout=LIMIT_S)
    for _ in range(2):
        connection.request("GET", "/")
        assert connection.getresponse().read() == BODY
        connection.request("POST", "/", BODY)
        answer = connection.getresponse()
        assert answer.read().decode() == hashlib.sha256(BODY).hexdigest()
        assert answer.headers["X-From"] == "a"
    connection.close()


def test_urllib3(domains: Domains, web: tuple[str, int]) -> None:
    urllib3 = pytest.importorskip("urllib3")

    class Connection(urllib3.connection.HTTPConnection):  # type: ignore[misc]
        def _new_conn(self) -> isthmus.Socket:
            return isthmus.create_connection((self._dns_host, self.port), LIMIT_S, node=domains["a"])

    class Pool(urllib3.HTTPConnectionPool):  # type: ignore[misc]
        ConnectionCls = Connection

    with Pool(*web, maxsize=4, timeout=LIMIT_S) as pool:
        digest = hashlib.sha256(BODY).hexdigest()

        def work() -> None:
            assert pool.request("GET", "/").data == BODY
            assert pool.request("POST", "/", body=BODY).data.decode() == digest

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert pool.request("GET", "/", preload_content=False).read(1000) == BODY[:1000]


def test_socketserver(domains: Domains) -> None:
    class Echo(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            for line in self.rfile:
                self.wfile.write(line.upper())

    class Server(OverIsthmus, socketserver.ThreadingMixIn, socketserver.TCPServer):
        node = domains["b"]
        daemon_threads = True

    with serving(Server(("", 0), Echo)) as address:
        for _ in range(3):
            with (
                isthmus.create_connection(address, LIMIT_S, node=domains["a"]) as sock,
                sock.makefile("rw", encoding="ascii") as file,
            ):
                for word in ("one\n", "two\n"):
                    file.write(word)
                    file.flush()
                    assert file.readline() == word.upper()


def test_xmlrpc(domains: Domains) -> None:
    from xmlrpc.server import SimpleXMLRPCServer

    class Server(OverIsthmus, SimpleXMLRPCServer):
        node = domains["b"]

    class Connection(http.client.HTTPConnection):
        def connect(self) -> None:
            self.sock = isthmus.create_connection((self.host, self.port), LIMIT_S, node=domains["a"])  # type: ignore[assignment]

    class Transport(xmlrpc.client.Transport):
        def make_connection(self, host: Any) -> http.client.HTTPConnection:
            return Connection(host)

    server = Server(("", 0), logRequests=False)
    server.register_function(pow)
    with (
        serving(server) as (name, port),
        xmlrpc.client.ServerProxy(f"http://{name}:{port}", Transport()) as far,
    ):
        assert far.pow(2, 10) == 1024


# ---- TLS


@pytest.fixture(scope="session")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A client's and a server's context around a certificate made for this session."""
    path = tmp_path_factory.mktemp("tls")
    key, certificate = path / "key.pem", path / "certificate.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    command += ["-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=worker-7"]
    command += ["-addext", "subjectAltName=DNS:worker-7"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    client = ssl.create_default_context(cafile=str(certificate))
    return client, server


class Tls:
    """TLS over any socket, by `SSLContext.wrap_bio`."""

    def __init__(self, sock: isthmus.Socket, context: ssl.SSLContext, **options: Any) -> None:
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, **options)
        self.call(self.tls.do_handshake)

    def call(self, what: Callable[..., Any], *args: Any) -> Any:
        while True:
            try:
                result = what(*args)
            except ssl.SSLWantReadError:
                self.sock.sendall(self.outgoing.read())
                data = self.sock.recv(1 << 16)
                self.incoming.write(data) if data else self.incoming.write_eof()
            else:
                self.sock.sendall(self.outgoing.read())
                return result


def test_tls_by_memory_bio(pair: Pair, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    one, other = pair
    client, server = contexts

    def serve() -> None:
        tls = Tls(other, server, server_side=True)
        tls.call(tls.tls.write, tls.call(tls.tls.read, 100).upper())

    thread = threading.Thread(target=serve)
    thread.start()
    tls = Tls(one, client, server_hostname="worker-7")
    tls.call(tls.tls.write, b"secret")
    assert tls.call(tls.tls.read, 100) == b"SECRET"
    thread.join()


def test_tls_in_asyncio(domains: Domains, contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> None:
    import asyncio

    client, server = contexts

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readline()).upper())
        await writer.drain()
        writer.close()
        with contextlib.suppress(ssl.SSLError, OSError):
            await writer.wait_closed()
        served.set()

    served = asyncio.Event()

    async def main() -> None:
        listener = domains.server()
        listener.setblocking(False)
        address = listener.getsockname()
        async with await asyncio.start_server(echo, sock=listener, ssl=server):  # type: ignore[arg-type]
            sock = isthmus.create_connection(address, node=domains["a"])
            sock.setblocking(False)
            reader, writer = await asyncio.open_connection(
                sock=sock,  # type: ignore[arg-type]
                ssl=client,
                server_hostname="worker-7",
            )
            writer.write(b"secret\n")
            assert await reader.readline() == b"SECRET\n"
            writer.close()
            with contextlib.suppress(ssl.SSLError, OSError):
                await writer.wait_closed()
            await served.wait()

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))


def test_wrap_socket_is_refused_before_it_does_harm(
    pair: Pair, contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    one, other = pair
    fd = one.fileno()
    with pytest.raises(errors.Unsupported, match="wrap_bio"):
        contexts[0].wrap_socket(one, server_hostname="worker-7")  # type: ignore[arg-type]
    assert one.fileno() == fd
    one.sendall(b"unharmed")
    assert other.recv(100) == b"unharmed"


def test_a_file_is_served(domains: Domains, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(BODY)

    class Files(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(OverIsthmus, http.server.ThreadingHTTPServer):
        node = domains["b"]

    with (
        serving(Server(("", 0), Files)) as address,
        isthmus.create_connection(address, LIMIT_S, node=domains["a"]) as sock,
        sock.makefile("rwb") as file,
    ):
        file.write(b"GET /file.bin HTTP/1.0\r\n\r\n")
        file.flush()
        head, _, body = file.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200")
    assert body == BODY
