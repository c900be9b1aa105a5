"""Sockets in `select`, `poll`, `epoll` and asyncio: the descriptor follows the socket."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import random
import select
import selectors
import socket
import threading
from pathlib import Path

import pytest
from conftest import LIMIT_S, Domains, becomes

import isthmus
from isthmus import errors

Pair = tuple[isthmus.Socket, isthmus.Socket]


def ready(sock: isthmus.Socket, limit_s: float = 0) -> tuple[bool, bool]:
    """Readable, writable, says select."""
    readable, writable, _ = select.select([sock], [sock], [], limit_s)
    return bool(readable), bool(writable)


def fill(sock: isthmus.Socket, piece: int = 1000) -> int:
    sent = 0
    try:
        while True:
            sent += sock.send(bytes(piece), socket.MSG_DONTWAIT)
    except BlockingIOError:
        return sent


def test_the_descriptor_follows_the_socket(any_pair: Pair) -> None:
    one, other = any_pair
    assert ready(one) == ready(other) == (False, True)
    one.sendall(b"x")
    becomes(lambda: ready(other) == (True, True))
    other.recv(1)
    assert ready(other) == (False, True)
    sent = fill(one)
    assert ready(one) == (False, False)
    becomes(lambda: ready(other) == (True, True))
    while sent:
        sent -= len(other.recv(1 << 20))
    becomes(lambda: ready(one) == (False, True))
    one.close()
    becomes(lambda: ready(other) == (True, True))
    assert other.recv(1) == b""


@pytest.mark.parametrize(
    "selector", [selectors.SelectSelector, selectors.PollSelector, selectors.EpollSelector]
)
def test_an_echo_server_over_selectors(domains: Domains, selector: type[selectors.BaseSelector]) -> None:
    clients = 8
    message = random.Random(5).randbytes(100_000)

    def client(address: tuple[str, int], results: list[bool]) -> None:
        with isthmus.create_connection(address, LIMIT_S, node=domains["a"]) as sock:
            sending = threading.Thread(target=lambda: (sock.sendall(message), sock.shutdown(socket.SHUT_WR)))
            sending.start()
            got = b"".join(iter(lambda: sock.recv(1 << 16), b""))
            sending.join()
            results.append(got == message)

    results: list[bool] = []
    with selector() as poll, domains.server() as server:
        server.setblocking(False)
        poll.register(server, selectors.EVENT_READ)
        threads = [
            threading.Thread(target=client, args=(server.getsockname(), results)) for _ in range(clients)
        ]
        for thread in threads:
            thread.start()
        waiting: dict[isthmus.Socket, bytearray] = {}
        served = 0
        while served < clients:
            events = poll.select(LIMIT_S)
            assert events, "nothing happens any more"
            for key, mask in events:
                sock = key.fileobj
                assert isinstance(sock, isthmus.Socket)
                if sock is server:
                    made, _ = server.accept()
                    made.setblocking(False)
                    waiting[made] = bytearray()
                    poll.register(made, selectors.EVENT_READ)
                    continue
                if mask & selectors.EVENT_READ:
                    data = sock.recv(10_000)
                    waiting[sock] += data
                    if not data:
                        sock.setblocking(True)
                        sock.sendall(waiting.pop(sock))
                        poll.unregister(sock)
                        sock.close()
                        served += 1
        for thread in threads:
            thread.join()
    assert results == [True] * clients


def test_edge_triggered_epoll(any_pair: Pair) -> None:
    one, other = any_pair
    other.setblocking(False)
    with select.epoll() as epoll:
        epoll.register(other, select.EPOLLIN | select.EPOLLET)
        assert epoll.poll(0) == []
        for _ in range(100):
            one.sendall(b"abc")
            assert epoll.poll(LIMIT_S) == [(other.fileno(), select.EPOLLIN)]
            assert epoll.poll(0) == [], "an edge is told once"
            with pytest.raises(BlockingIOError):
                drain(other)
        epoll.modify(other, select.EPOLLOUT | select.EPOLLET)
        assert epoll.poll(0) == [(other.fileno(), select.EPOLLOUT)]
        sent = fill(other)
        assert epoll.poll(0) == []
        while sent:
            sent -= len(one.recv(1 << 20))
        assert epoll.poll(LIMIT_S) == [(other.fileno(), select.EPOLLOUT)]


def drain(sock: isthmus.Socket) -> None:
    while sock.recv(2):
        pass


def test_ends_are_seen_as_hang_ups(any_pair: Pair) -> None:
    one, other = any_pair
    with select.epoll() as epoll:
        epoll.register(other, select.EPOLLRDHUP)
        assert epoll.poll(0) == []
        one.shutdown(socket.SHUT_WR)
        assert epoll.poll(LIMIT_S) == [(other.fileno(), select.EPOLLRDHUP)]
        other.sendall(b"still open this way")
        one.recv(100)
        one.close()
        becomes(lambda: epoll.poll(0) == [(other.fileno(), select.EPOLLRDHUP | select.EPOLLHUP)])


def test_a_listener_is_readable_while_a_connection_waits(domains: Domains) -> None:
    with domains.server() as server:
        assert not select.select([server], [], [], 0)[0]
        one = isthmus.create_connection(server.getsockname(), node=domains["a"])
        assert select.select([server], [], [], LIMIT_S)[0]
        server.accept()[0].close()
        assert not select.select([server], [], [], 0)[0]
        one.close()


def test_connecting_without_waiting(domains: Domains) -> None:
    with domains.server() as server, isthmus.Socket(node=domains["a"]) as sock:
        sock.setblocking(False)
        assert sock.connect_ex(server.getsockname()) == errno.EINPROGRESS
        fd = sock.fileno()
        assert select.select([], [sock], [], LIMIT_S)[1]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        assert sock.connect_ex(server.getsockname()) in (0, errno.EISCONN)
        assert sock.connect_ex(server.getsockname()) == errno.EISCONN
        assert sock.fileno() == fd
        other, _ = server.accept()
        with other:
            other.sendall(b"x")
            assert select.select([sock], [], [], LIMIT_S)[0]
            assert sock.recv(1) == b"x"


def test_connecting_without_waiting_to_nobody(domains: Domains) -> None:
    with isthmus.Socket(node=domains["a"]) as sock:
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.connect(("b", 7))
        assert select.select([], [sock], [], LIMIT_S)[1]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        with pytest.raises(errors.NotConnected):
            sock.send(b"x")
        with domains.server() as server:
            sock.connect_ex(server.getsockname())
            sock.setblocking(True)
            sock.sendall(b"waits until there is a connection")


def test_a_descriptor_asked_for_before_connecting_stays(domains: Domains) -> None:
    with domains.server() as server, isthmus.Socket(node=domains["a"]) as sock, select.epoll() as epoll:
        epoll.register(sock, select.EPOLLIN)
        sock.settimeout(LIMIT_S)
        sock.connect(server.getsockname())
        other, _ = server.accept()
        with other:
            other.sendall(b"x")
            assert epoll.poll(LIMIT_S) == [(sock.fileno(), select.EPOLLIN)]
        with pytest.raises(errors.AlreadyConnected):
            sock.connect(server.getsockname())


def test_datagrams_in_select(domains: Domains) -> None:
    with (
        isthmus.create_server(0, type=socket.SOCK_DGRAM, node=domains["b"]) as receiver,
        isthmus.Socket(socket.SOCK_DGRAM, node=domains["a"]) as sender,
    ):
        assert ready(receiver) == ready(sender) == (False, True)
        sender.sendto(b"one", receiver.getsockname())
        becomes(lambda: ready(receiver)[0])
        assert receiver.recv(9) == b"one"
        assert ready(receiver) == (False, True)
        sender.connect(receiver.getsockname())
        fill(sender, 1000)
        assert ready(sender) == (False, False), "the destination has no space"
        while True:
            try:
                receiver.recv(1000, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
        becomes(lambda: ready(sender) == (False, True))


# ---- asyncio


def test_the_loops_socket_calls(domains: Domains) -> None:
    data = random.Random(6).randbytes(3 << 20)

    async def serve(server: isthmus.Socket) -> None:
        loop = asyncio.get_running_loop()
        sock, who = await loop.sock_accept(server)  # type: ignore[arg-type]
        assert who[0] == "a"
        with sock:
            while got := await loop.sock_recv(sock, 1 << 16):
                await loop.sock_sendall(sock, got)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with domains.server() as server, isthmus.Socket(node=domains["a"]) as sock:
            server.setblocking(False)
            sock.setblocking(False)
            serving = asyncio.create_task(serve(server))
            await loop.sock_connect(sock, server.getsockname())  # type: ignore[arg-type]

            async def send() -> None:
                await loop.sock_sendall(sock, data)  # type: ignore[arg-type]
                sock.shutdown(socket.SHUT_WR)

            sending = asyncio.create_task(send())
            buffer = bytearray(len(data))
            view = memoryview(buffer)
            while view:
                got = await loop.sock_recv_into(sock, view)  # type: ignore[arg-type]
                assert got
                view = view[got:]
            await sending
            assert buffer == data
            assert await loop.sock_recv(sock, 1) == b""  # type: ignore[arg-type]
            await serving

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))


def test_connecting_to_nobody_in_a_loop(domains: Domains) -> None:
    async def main() -> None:
        with isthmus.Socket(node=domains["a"]) as sock:
            sock.setblocking(False)
            with pytest.raises(ConnectionRefusedError):
                await asyncio.get_running_loop().sock_connect(sock, ("b", 7))  # type: ignore[arg-type]

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))


def test_streams_over_our_sockets(domains: Domains) -> None:
    data = random.Random(7).randbytes(5 << 20)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert writer.get_extra_info("peername")[0] == "a"
        while got := await reader.read(1 << 16):
            writer.write(got)
            await writer.drain()
        writer.write_eof()
        writer.close()

    async def main() -> None:
        server = domains.server()
        server.setblocking(False)
        address = server.getsockname()
        async with await asyncio.start_server(echo, sock=server):  # type: ignore[arg-type]
            sock = isthmus.create_connection(address, node=domains["a"])
            sock.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=sock)  # type: ignore[arg-type]

            async def send() -> None:
                writer.write(data)
                await writer.drain()
                writer.write_eof()

            sending = asyncio.create_task(send())
            assert await reader.read() == data
            await sending
            writer.close()
            await writer.wait_closed()

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))


@pytest.mark.parametrize("call", ["sock_sendfile", "transport"])
def test_a_loop_sends_files_piece_by_piece(domains: Domains, tmp_path: Path, call: str) -> None:
    # Natively it would put the file into the descriptor that is for polling alone.
    data = random.Random(8).randbytes(2 << 20)
    (tmp_path / "file").write_bytes(data)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        one, other = domains.pair()
        with one, other, (tmp_path / "file").open("rb") as file:
            one.setblocking(False)
            got = loop.run_in_executor(None, other.recv, len(data), socket.MSG_WAITALL)
            if call == "transport":
                _, writer = await asyncio.open_connection(sock=one.dup())  # type: ignore[arg-type]
                assert await loop.sendfile(writer.transport, file) == len(data)
                writer.close()
            else:
                assert await loop.sock_sendfile(one, file) == len(data)  # type: ignore[arg-type]
            assert await got == data

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))


def test_waking_is_never_lost(domains: Domains) -> None:
    """A thread that selects for writing while another receives: each gets its own news."""
    one, other = domains.pair(rings=8192)
    rounds = 2000

    def echo(sock: isthmus.Socket) -> None:
        for _ in range(rounds):
            sock.sendall(sock.recv(4000, socket.MSG_WAITALL))

    def feed() -> None:
        for _ in range(rounds):
            view = memoryview(bytes(4000))
            while view:
                assert select.select([], [one], [], LIMIT_S)[1], "the news that there is space was lost"
                try:
                    view = view[one.send(view, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    continue

    with one, other:
        threads = [threading.Thread(target=echo, args=(other,)), threading.Thread(target=feed)]
        for thread in threads:
            thread.start()
        got = 0
        while got < rounds * 4000:
            got += len(one.recv(1 << 16))
        for thread in threads:
            thread.join()


def test_hashes_agree_over_unbuffered_files(pair: Pair) -> None:
    one, other = pair
    data = random.Random(9).randbytes(1 << 20)
    with one.makefile("wb", buffering=0) as out, other.makefile("rb") as back:
        sending = threading.Thread(target=lambda: io.BufferedWriter(out, 4096).write(data))
        sending.start()
        assert hashlib.sha256(back.read(len(data))).digest() == hashlib.sha256(data).digest()
        sending.join()
