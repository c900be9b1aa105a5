"""What is around the bytes of an `isthmus.Socket`: duplicates, files, options, statistics and views."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import pickle
import random
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import LIMIT_S, Domains, becomes, descriptors

import isthmus
from isthmus import errors

Pair = tuple[isthmus.Socket, isthmus.Socket]


# ---- handles


def test_a_duplicate_keeps_the_connection(pair: Pair) -> None:
    one, other = pair
    twin = one.dup()
    assert twin.gettimeout() == one.gettimeout()
    assert twin.fileno() == one.fileno()
    one.close()
    twin.sendall(b"alive")
    assert other.recv(9) == b"alive"
    twin.close()
    assert other.recv(9) == b""


def test_a_duplicate_made_before_the_connection_has_it_too(domains: Domains) -> None:
    with domains.server() as server, isthmus.Socket(node=domains["a"]) as one, one.dup() as twin:
        one.connect(server.getsockname())
        twin.sendall(b"x")
        other, _ = server.accept()
        with other:
            assert other.recv(9) == b"x"


def test_files_over_sockets(pair: Pair) -> None:
    one, other = pair
    with one.makefile("w", encoding="utf-8", newline="\n") as text, other.makefile("rb") as lines:
        text.write("größe\nzwei\n")
        text.flush()
        assert lines.readline() == "größe\n".encode()
        assert lines.readline() == b"zwei\n"
    with other.makefile("rwb", buffering=0) as raw:
        assert isinstance(raw, io.RawIOBase)
        raw.write(b"raw")
        assert one.recv(9) == b"raw"
        other.settimeout(0.01)
        with pytest.raises(TimeoutError):
            raw.read(1)
    with pytest.raises(ValueError, match="mode"):
        one.makefile("x")
    with pytest.raises(ValueError, match="unbuffered"):
        one.makefile("r", buffering=0)


def test_a_file_keeps_its_socket_open(pair: Pair) -> None:
    one, other = pair
    file = one.makefile("rwb")
    one.close()
    file.write(b"late")
    file.flush()
    assert other.recv(9) == b"late"
    file.close()
    assert other.recv(9) == b""


@pytest.mark.parametrize("kind", ["mapped", "read"])
def test_sendfile(pair: Pair, pool: ThreadPoolExecutor, tmp_path: Path, kind: str) -> None:
    one, other = pair
    data = random.Random(4).randbytes(3_000_000)
    path = tmp_path / "file"
    path.write_bytes(data)
    for offset, count, expected in ((0, None, data), (1000, None, data[1000:]), (5, 70_000, data[5:70_005])):
        with path.open("rb") if kind == "mapped" else io.BytesIO(data) as file:
            sending = pool.submit(one.sendfile, file, offset, count)
            assert other.recv(len(expected), socket.MSG_WAITALL) == expected
            assert sending.result() == len(expected)
            assert file.tell() == offset + len(expected)
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as empty:
        assert one.sendfile(empty) == 0
    with path.open() as text, pytest.raises(ValueError, match="binary"):
        one.sendfile(text)  # type: ignore[arg-type]


def test_there_is_no_descriptor_to_take_away(pair: Pair) -> None:
    one, other = pair
    with pytest.raises(errors.Unsupported, match="fileno"):
        one.detach()
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(one)
    assert one.get_inheritable() is False
    one.set_inheritable(False)
    with pytest.raises(errors.Unsupported):
        one.set_inheritable(True)
    assert not os.get_inheritable(one.fileno())
    one.sendall(b"works")
    assert other.recv(9) == b"works"


def test_a_socket_that_is_forgotten_says_so_and_closes(domains: Domains) -> None:
    one, other = domains.pair()
    with pytest.warns(ResourceWarning, match="unclosed <isthmus.Socket"):
        del one
    assert other.recv(1) == b""
    other.close()


def test_a_closed_socket_holds_nothing_even_if_it_is_remembered(domains: Domains) -> None:
    remembered = []
    with domains.server() as server, server.dup():
        pass
    before = descriptors()
    for type in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        for sock in domains.pair(type):
            sock.fileno()
            sock.close()
            remembered.append(sock)
    for name in "ab":
        with domains.datagram(name) as sock:
            sock.fileno()
            remembered.append(sock)
    becomes(lambda: descriptors() <= before, f"{descriptors() - before} descriptors are held")
    assert all("closed" in repr(sock) for sock in remembered)


def test_short_connections_leave_nothing(domains: Domains) -> None:
    _short_connections(domains, 250)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_ten_thousand_short_connections_leave_nothing(domains: Domains) -> None:
    _short_connections(domains, 10_000)


def _short_connections(domains: Domains, count: int) -> None:
    with domains.server() as server:
        address = server.getsockname()

        def one_connection(i: int) -> None:
            with isthmus.create_connection(address, LIMIT_S, node=domains["a"]) as one:
                other, _ = server.accept()
                with other:
                    if i % 3 == 0:
                        one.fileno()
                    one.sendall(b"%d" % i)
                    assert other.recv(20) == b"%d" % i

        for i in range(5):
            one_connection(i)
        before = descriptors()
        for i in range(count):
            one_connection(i)
        becomes(lambda: descriptors() <= before, f"{descriptors() - before} descriptors were left")


# ---- options


def test_options_answer_honestly(any_pair: Pair) -> None:
    one, _ = any_pair
    get = one.getsockopt
    assert get(socket.SOL_SOCKET, socket.SO_TYPE) == one.type
    assert get(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    assert get(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 0
    assert get(socket.SOL_SOCKET, socket.SO_DOMAIN) == socket.AF_VSOCK == one.family
    assert get(socket.SOL_SOCKET, socket.SO_PROTOCOL) == one.proto == 0
    assert get(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 << 20
    assert struct.unpack("i", get(socket.SOL_SOCKET, socket.SO_RCVBUF, 4)) == (2 << 20,)
    for level, option, value in (
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.SOL_SOCKET, socket.SO_REUSEADDR, 1),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    ):
        one.setsockopt(level, option, value)
        assert get(level, option) == value
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 5))
    assert struct.unpack("ii", get(socket.SOL_SOCKET, socket.SO_LINGER, 8)) == (1, 5)
    for level, option, name in (
        (socket.SOL_SOCKET, socket.SO_MARK, "SO_MARK"),
        (socket.IPPROTO_TCP, socket.TCP_CORK, "TCP_CORK"),
        (socket.IPPROTO_IP, socket.IP_TTL, "level 0"),
    ):
        with pytest.raises(errors.Unsupported, match=name) as caught:
            one.setsockopt(level, option, 1)
        assert caught.value.errno == errno.ENOPROTOOPT
        with pytest.raises(errors.Unsupported, match=name):
            get(level, option)
    with pytest.raises(errors.Unsupported):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_TYPE, 1)


@pytest.mark.parametrize(
    ("wanted", "given"), [(1, 4096), (50_000, 53_248), (300_000, 303_104), (1 << 30, 64 << 20)]
)
def test_buffer_sizes_choose_rings(domains: Domains, wanted: int, given: int) -> None:
    with domains.server() as server, isthmus.Socket(node=domains["a"]) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, wanted)
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == given
        one.connect(server.getsockname())
        other, _ = server.accept()
        with other:
            own = (one, socket.SO_SNDBUF, other, socket.SO_RCVBUF)
            if domains.carrier == "put":
                own = (one, socket.SO_RCVBUF, other, socket.SO_SNDBUF)
            assert own[0].getsockopt(socket.SOL_SOCKET, own[1]) == given
            assert own[2].getsockopt(socket.SOL_SOCKET, own[3]) == given
            data = random.Random(wanted).randbytes(1 << 20)
            threading.Thread(target=one.sendall, args=(data,)).start()
            assert other.recv(len(data), socket.MSG_WAITALL) == data


def test_statistics_count(pair: Pair) -> None:
    one, other = pair
    one.sendall(bytes(1000))
    assert other.stats().pending == 1000
    other.recv(2000)
    assert one.stats()[:2] == (1000, 1)
    assert other.stats()[2:4] == (1000, 1)


def test_ways_to_wait(pair: Pair, pool: ThreadPoolExecutor) -> None:
    one, other = pair
    assert one.wait == "adaptive"
    for mode in ("block", "spin", "adaptive"):
        other.wait = mode
        got = pool.submit(other.recv, 10)
        one.sendall(mode.encode())
        assert got.result() == mode.encode()
    with pytest.raises(ValueError, match="adaptive"):
        one.wait = "now"


# ---- views


def test_a_view_shows_what_is_in_the_ring(any_pair: Pair) -> None:
    one, other = any_pair
    one.sendall(b"look here")
    with other.recv_view() as view:
        assert view == b"look here"
        assert view.readonly
        kept = view[:4]
    assert kept.nbytes == 4
    with pytest.raises(ValueError, match="released"):
        bytes(view)
    one.sendall(b"next")
    assert other.recv(100) == b"next"
    one.close()
    with other.recv_view() as view:
        assert not view
    other.close()
    del one, other
    gc.collect()
    bytes(kept)


def test_a_view_of_nothing_waits_like_a_receive(pair: Pair) -> None:
    one, _ = pair
    one.setblocking(False)
    with pytest.raises(BlockingIOError), one.recv_view():
        pass


def test_what_fills_a_view_is_sent_at_its_end(any_pair: Pair) -> None:
    one, other = any_pair
    sizes = [1, 15, 16, 1024, 1025, 4096, 60_000, 200_000] * 20
    random.Random(1).shuffle(sizes)

    def send() -> None:
        for number, size in enumerate(sizes):
            if number % 5 == 4:
                one.sendall(bytes([number % 251]) * size)
                continue
            with one.send_view(size) as view:
                assert (view.nbytes, view.readonly) == (size, False)
                view[:] = bytes([number % 251]) * size

    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(send)
        for number, size in enumerate(sizes):
            got = bytearray()
            while len(got) < size:
                got += other.recv(size - len(got))
            assert got == bytes([number % 251]) * size
        sent.result()
    assert one.stats().bytes_sent == sum(sizes)


def test_a_view_for_sending_is_sent_whole_or_not_at_all(pair: Pair) -> None:
    one, other = pair
    with contextlib.suppress(KeyError), one.send_view(100) as view:
        view[:50] = bytes(50)
        raise KeyError
    with one.send_view(2) as view:
        view[:] = b"ok"
        with pytest.raises(errors.WrongState, match="being filled"):
            one.sendall(b"between")
        with pytest.raises(errors.WrongState), one.send_view(1):
            pass
    assert other.recv(200) == b"ok"
    with pytest.raises(ValueError, match="released"):
        view[:] = b"no"
    with one.send_view(0):
        pass
    one.sendall(b"end")
    assert other.recv(200) == b"end"
    with pytest.raises(ValueError, match="negative"):
        one.send_view(-1)


def test_a_view_for_sending_has_a_size_that_the_ring_can_have(pair: Pair) -> None:
    one, other = pair
    most = one.connection.message_max
    with one.send_view(most) as view:
        view[-1:] = b"!"
    assert other.recv(most, socket.MSG_WAITALL)[-1:] == b"!"
    with pytest.raises(errors.MessageTooLarge), one.send_view(most + 1):
        pass
    one.setblocking(False)
    with one.send_view(most):
        pass
    with contextlib.suppress(BlockingIOError):
        for _ in range(4):
            with one.send_view(most):
                pass
    with pytest.raises(BlockingIOError), one.send_view(most):
        pass
    one.settimeout(0.05)
    with pytest.raises(TimeoutError), one.send_view(most):
        pass


def test_a_view_for_sending_when_the_other_side_goes(pair: Pair) -> None:
    one, other = pair
    views = one.send_view(10)
    views.__enter__()
    other.close()
    with pytest.raises(BrokenPipeError):
        views.send()
    with pytest.raises(OSError, match=r"takes nothing more|died"), one.send_view(10):
        pass


def test_a_view_for_sending_outlives_its_socket(pair: Pair) -> None:
    one, other = pair
    views = one.send_view(1000)
    view = views.__enter__()
    kept = view[:10]
    one.close()
    with pytest.raises(errors.Closed):
        views.send()
    del one, views, view
    gc.collect()
    kept[:] = b"0123456789"
    assert other.recv(10) == b""
