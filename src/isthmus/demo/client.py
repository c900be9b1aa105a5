"""The neighbour that asks: urllib3 against the web server, then a file, then arrays."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import isthmus
from isthmus.demo import sandbox
from isthmus.demo.server import read
from isthmus.demo.talk import ARRAY_PORT, FILE_PORT, HTTP_PORT, digest, tell

SERVER = "web"
PIECE = 1 << 20


def ask_the_web_server() -> None:
    """A page and an upload, through urllib3 on our sockets."""
    import urllib3

    class Connection(urllib3.connection.HTTPConnection):
        """urllib3's own connection; only where its socket comes from differs."""

        def _new_conn(self) -> isthmus.Socket:  # type: ignore[override]  # a socket in all but name
            socket = isthmus.create_connection((self.host, self.port))
            tell("path", what="http", peer=f"{self.host}:{self.port}", path=socket.path, why=socket.why)
            return socket

    class Pool(urllib3.HTTPConnectionPool):
        ConnectionCls = Connection

    with Pool(SERVER, HTTP_PORT) as pool:
        page = pool.request("GET", "/")
        tell("http", status=page.status, text=page.data.decode().strip())
        body = os.urandom(8 << 20)
        expected = digest()
        expected.update(body)
        answer = pool.request("POST", "/upload", body=body)
        check("upload over HTTP", answer.data.decode() == expected.hexdigest(), len(body))


def send_a_file(size: int) -> None:
    """A file of random bytes, in pieces of 1 MiB, hashed at both ends."""
    started = time.perf_counter()
    with open("/tmp/file", "wb") as file:
        block = os.urandom(PIECE)
        for i in range(size // PIECE):
            file.write(i.to_bytes(8, "little") + block[8:])
            progress("making the file", (i + 1) * PIECE, size)
    started, expected, sent = time.perf_counter(), digest(), 0
    with open("/tmp/file", "rb") as file, isthmus.create_connection((SERVER, FILE_PORT)) as connection:
        tell("path", what="file", peer=f"{SERVER}:{FILE_PORT}", path=connection.path, why=connection.why)
        connection.sendall(size.to_bytes(8, "little"))
        buffer = bytearray(PIECE)
        while got := file.readinto(buffer):
            piece = memoryview(buffer)[:got]
            connection.sendall(piece)
            expected.update(piece)
            sent += got
            progress("sending the file", sent, size)
        same = read(connection, 32) == expected.digest()
    check("file", same, size, seconds=time.perf_counter() - started)


def send_arrays() -> None:
    """Arrays of several shapes and types, each with one gathered send and no copy of ours."""
    import numpy as np

    rng = np.random.default_rng(2014)
    arrays: list[np.ndarray[Any, Any]] = [
        rng.standard_normal((4096, 4096)),
        rng.integers(0, 255, (1080, 1920, 3), dtype=np.uint8),
        rng.standard_normal(10_000_000).astype(np.float32),
        np.arange(1_000_003, dtype=np.int64),
    ]
    total, same, started = 0, True, time.perf_counter()
    size = sum(array.nbytes for array in arrays)
    with isthmus.create_connection((SERVER, ARRAY_PORT)) as connection:
        tell("path", what="arrays", peer=f"{SERVER}:{ARRAY_PORT}", path=connection.path, why=connection.why)
        for array in arrays:
            about = json.dumps({"shape": array.shape, "dtype": array.dtype.str}).encode()
            connection.sendmsg([len(about).to_bytes(4, "little"), about, array.data])
            answer = json.loads(read(connection, int.from_bytes(read(connection, 4), "little")))
            expected = digest()
            expected.update(array.data)
            same &= answer["hash"] == expected.hexdigest() and answer["sum"] == float(array.sum(dtype="f8"))
            total += array.nbytes
            progress("sending arrays", total, size)
    check("NumPy arrays", same, total, seconds=time.perf_counter() - started)


def progress(what: str, done: int, of: int) -> None:
    """Report how far a piece of work is."""
    tell("progress", what=what, done=done, of=of)


def check(what: str, same: bool, size: int, seconds: float | None = None) -> None:
    """Report whether both hashes are the same, and stop if they are not."""
    tell("checked", what=what, same=same, bytes=size, seconds=seconds)
    if not same:
        sys.exit(f"{what}: what arrived is not what was sent")


def main() -> None:
    """Do all of it once."""
    tell("started", namespaces=sandbox.namespaces(), pid=os.getpid())
    ask_the_web_server()
    send_a_file(int(sys.argv[1]))
    send_arrays()
    # The connections of the work are closed; hold one for whoever looks at `isthmus status` now.
    with isthmus.create_connection((SERVER, FILE_PORT)) as connection:
        tell("done", path=connection.path)
        sys.stdin.read()
        connection.sendall(bytes(8))
        read(connection, 32)


if __name__ == "__main__":
    main()
