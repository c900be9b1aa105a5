"""The neighbour that serves: web pages by the standard library's server, files, and arithmetic on arrays."""

from __future__ import annotations

import http.server
import json
import os
import threading
from typing import Any

import isthmus
from isthmus.demo import sandbox
from isthmus.demo.talk import ARRAY_PORT, FILE_PORT, HTTP_PORT, digest, tell

PAGE = b"Hello from a neighbour that shares nothing with you.\n"
PIECE = 1 << 20


class Pages(http.server.BaseHTTPRequestHandler):
    """GET answers with a page, POST with the hash of what was sent."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(PAGE)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        found = digest()
        found.update(body)
        self._answer(found.hexdigest().encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        tell("request", text=format % args, client=self.client_address[0])


class WebServer(http.server.ThreadingHTTPServer):
    """The standard library's server, listening on one of our sockets."""

    def __init__(self, port: int) -> None:
        super().__init__(("", port), Pages, bind_and_activate=False)
        self.socket.close()
        self.socket = isthmus.create_server(("", port))  # type: ignore[assignment]  # a socket in all but name


def serve_files(listener: isthmus.Socket) -> None:
    """Receive files into /tmp and answer with their hash."""
    while True:
        connection, _ = listener.accept()
        with connection, open("/tmp/received", "wb") as file:
            size = int.from_bytes(read(connection, 8), "little")
            buffer = bytearray(PIECE)
            view = memoryview(buffer)
            left, found = size, digest()
            while left:
                got = connection.recv_into(view[: min(left, PIECE)])
                if got == 0:
                    raise EOFError(f"{left} bytes of the file are missing")
                found.update(view[:got])
                file.write(view[:got])
                left -= got
            connection.sendall(found.digest())
            tell("file", path=connection.path, why=connection.why, bytes=size)


def serve_arrays(listener: isthmus.Socket) -> None:
    """Receive arrays; answer with the hash and the sum of each."""
    import numpy as np

    while True:
        connection, _ = listener.accept()
        with connection:
            while header := connection.recv(4):
                header += read(connection, 4 - len(header))
                about = json.loads(read(connection, int.from_bytes(header, "little")))
                array = np.empty(about["shape"], about["dtype"])
                fill(connection, array.data.cast("B"))
                found = digest()
                found.update(array.data)
                answer = json.dumps({"hash": found.hexdigest(), "sum": float(array.sum(dtype="f8"))}).encode()
                connection.sendall(len(answer).to_bytes(4, "little") + answer)


def read(connection: isthmus.Socket, count: int) -> bytes:
    """Exactly `count` bytes."""
    data = bytearray(count)
    fill(connection, memoryview(data))
    return bytes(data)


def fill(connection: isthmus.Socket, view: memoryview) -> None:
    """Fill `view` from the stream."""
    while view:
        got = connection.recv_into(view)
        if got == 0:
            raise EOFError(f"{len(view)} bytes are missing")
        view = view[got:]


def main() -> None:
    """Serve until killed."""
    web = WebServer(HTTP_PORT)
    for serve, port in ((serve_files, FILE_PORT), (serve_arrays, ARRAY_PORT)):
        threading.Thread(target=serve, args=[isthmus.create_server(("", port))], daemon=True).start()
    tell("ready", namespaces=sandbox.namespaces(), pid=os.getpid())
    web.serve_forever()


if __name__ == "__main__":
    main()
