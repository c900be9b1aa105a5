"""`isthmus.Socket` does what `socket.socket` does."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import random
import socket
import struct
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import LIMIT_S, Domains, becomes

import isthmus
from isthmus import errors

Pair = tuple[isthmus.Socket, isthmus.Socket]


def receive_all(sock: isthmus.Socket, piece: int = 1 << 16) -> bytes:
    return b"".join(iter(lambda: sock.recv(piece), b""))


def fill(sock: isthmus.Socket) -> int:
    """Send until a non-blocking socket takes no more; how many bytes it took."""
    sent = 0
    try:
        while True:
            sent += sock.send(bytes(10_000))
    except BlockingIOError:
        return sent


# ---- connecting


def test_both_sides_know_each_other(domains: Domains) -> None:
    with domains.server() as server:
        name, port = server.getsockname()
        assert name == "b"
        with isthmus.create_connection((name, port), node=domains["a"]) as one:
            other, who = server.accept()
            with other:
                assert one.getpeername() == other.getsockname() == ("b", port)
                assert other.getpeername() == one.getsockname() == who
                assert who[0] == "a"
                assert one.path == other.path == domains.carrier
                assert one.why
                assert domains.carrier in repr(one)
                assert f"to b:{port}" in repr(one)


@pytest.mark.parametrize("address", ["b:{}", ("b", "{}")])
def test_addresses_are_text_or_pairs(domains: Domains, address: str | tuple[str, str]) -> None:
    with domains.server() as server:
        port = server.getsockname()[1]
        wanted = address.format(port) if isinstance(address, str) else (address[0], port)
        with isthmus.create_connection(wanted, node=domains["a"]) as one:
            assert one.getpeername() == ("b", port)
        with isthmus.create_connection((str(domains["b"].domain), port), node=domains["a"]) as one:
            assert one.getpeername() == ("b", port), "a domain's number is as good as its name"


def test_a_bound_port_does_not_listen_yet(domains: Domains) -> None:
    with isthmus.Socket(node=domains["b"]) as server:
        assert server.getsockname() == ("", 0)
        server.bind(("", 0))
        address = server.getsockname()
        assert address[1] > 0
        with pytest.raises(errors.NobodyListens):
            isthmus.create_connection(address, node=domains["a"])
        server.listen(1)
        server.listen(2)
        isthmus.create_connection(address, node=domains["a"]).close()


def test_the_source_port_is_the_one_that_was_bound(domains: Domains) -> None:
    with domains.server() as server, isthmus.Socket(node=domains["a"]) as one:
        one.bind(("", 0))
        mine = one.getsockname()
        one.connect(server.getsockname())
        assert one.getsockname() == mine
        other, who = server.accept()
        with other:
            assert who == mine


def test_a_port_for_one_partner_comes_before_the_port_for_anybody(domains: Domains) -> None:
    with domains.server() as anybody:
        port = anybody.getsockname()[1]
        with isthmus.create_server(("a", port), node=domains["b"]) as only_a:
            for name, expected in (("a", only_a), ("c", anybody)):
                with isthmus.create_connection(("b", port), node=domains[name]):
                    expected.settimeout(LIMIT_S)
                    other, who = expected.accept()
                    other.close()
                    assert who[0] == name


def test_connecting_to_nobody_is_refused_at_once(domains: Domains) -> None:
    with isthmus.Socket(node=domains["a"]) as sock:
        assert sock.connect_ex(("b", 7)) == errno.ECONNREFUSED
        with pytest.raises(ConnectionRefusedError, match="b:7"):
            sock.connect(("b", 7))
        with domains.server() as server:
            address = server.getsockname()
            sock.connect(address)
            with pytest.raises(errors.AlreadyConnected):
                sock.connect(address)


def test_a_closed_listener_refuses(domains: Domains) -> None:
    server = domains.server()
    address = server.getsockname()
    server.close()
    with pytest.raises(errors.NobodyListens):
        isthmus.create_connection(address, node=domains["a"])


def test_the_backlog_is_bounded_and_empties(domains: Domains) -> None:
    with domains.server(backlog=2) as server:
        address = server.getsockname()
        waiting = [isthmus.create_connection(address, node=domains["a"]) for _ in range(2)]
        with pytest.raises(errors.BacklogFull):
            isthmus.create_connection(address, node=domains["a"])
        server.accept()[0].close()
        waiting.append(isthmus.create_connection(address, node=domains["a"]))
        for sock in waiting:
            sock.close()


def test_data_sent_before_accept_is_there_after_it(domains: Domains) -> None:
    with domains.server() as server:
        with isthmus.create_connection(server.getsockname(), node=domains["a"]) as one:
            one.sendall(b"early")
        other, _ = server.accept()
        with other:
            assert receive_all(other) == b"early"


def test_a_required_path_is_the_path_or_nothing(domains: Domains) -> None:
    other = {"sealed": "put", "put": "sealed"}[domains.carrier]
    with domains.server() as server:
        with pytest.raises(errors.PathUnavailable, match=other):
            isthmus.create_connection(server.getsockname(), require=other, node=domains["a"])
        with isthmus.create_connection(
            server.getsockname(), require=domains.carrier, node=domains["a"]
        ) as one:
            assert one.path == domains.carrier
    with domains.server(require=other) as picky:
        picky.settimeout(0)
        with isthmus.create_connection(picky.getsockname(), LIMIT_S, node=domains["a"]) as one:
            with pytest.raises(BlockingIOError):
                picky.accept()
            assert one.recv(1) == b"", "the listener closed what came another way"


def test_a_stream_does_not_connect_to_a_packet_listener(domains: Domains) -> None:
    with domains.server(socket.SOCK_SEQPACKET) as server, pytest.raises(errors.WrongKind) as caught:
        isthmus.create_connection(server.getsockname(), node=domains["a"])
    assert caught.value.errno == errno.EPROTOTYPE


def test_a_domain_connects_to_itself(domains: Domains) -> None:
    with (
        domains.server() as server,
        isthmus.create_connection(server.getsockname(), node=domains["b"]) as one,
    ):
        other, who = server.accept()
        with other:
            one.sendall(b"me")
            assert other.recv(9) == b"me"
            assert who[0] == "b"


# ---- bytes


@pytest.mark.parametrize("size", [1, 63, 64, 4096, 65_536, 3_000_001])
def test_bytes_arrive_as_they_were_sent(any_pair: Pair, pool: ThreadPoolExecutor, size: int) -> None:
    one, other = any_pair
    limit = one.connection.message_max if one.type == socket.SOCK_SEQPACKET else size
    data = random.Random(size).randbytes(min(size, limit))
    sent = pool.submit(one.sendall, data)
    got = bytearray()
    while len(got) < len(data):
        got += other.recv(len(data))
    sent.result()
    assert got == data


def test_both_directions_at_once(pair: Pair, pool: ThreadPoolExecutor) -> None:
    size = 20 << 20
    data = random.Random(1).randbytes(size)

    def exchange(sock: isthmus.Socket) -> bytes:
        sending = pool.submit(lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR)))
        digest = hashlib.sha256(receive_all(sock, 1 << 18)).digest()
        sending.result()
        return digest

    one, other = (pool.submit(exchange, sock) for sock in pair)
    assert one.result() == other.result() == hashlib.sha256(data).digest()


def test_a_hundred_thousand_writes_of_one_byte(pair: Pair, pool: ThreadPoolExecutor) -> None:
    one, other = pair
    count = 100_000

    def write() -> None:
        for i in range(count):
            one.send(bytes((i & 0xFF,)))
        one.close()

    writing = pool.submit(write)
    got = receive_all(other)
    writing.result()
    assert got == bytes(i & 0xFF for i in range(count))


def test_small_pieces_are_received_and_peeked_together(pair: Pair) -> None:
    one, other = pair
    for piece in (b"a", b"bc", b"def"):
        one.sendall(piece)
    assert other.recv(100, socket.MSG_PEEK) == b"abcdef"
    assert other.recv(2) == b"ab"
    assert other.recv(3, socket.MSG_PEEK) == b"cde"
    assert other.recv(100) == b"cdef"


def test_messages_keep_their_boundaries(domains: Domains) -> None:
    one, other = domains.pair(socket.SOCK_SEQPACKET)
    with one, other:
        for message in (b"first", b"", b"second" * 1000):
            assert one.send(message) == len(message)
        assert other.recv(3, socket.MSG_PEEK) == b"fir"
        assert other.recv(100) == b"first"
        assert other.recv(100) == b""
        buffer = bytearray(7)
        assert other.recv_into(buffer, 0, socket.MSG_TRUNC) == 6000
        assert buffer == b"seconds"
        one.send(b"longer")
        assert other.recvmsg(4) == (b"long", [], socket.MSG_TRUNC, one.getsockname())


def test_a_message_that_can_never_fit_is_refused(domains: Domains, pool: ThreadPoolExecutor) -> None:
    one, other = domains.pair(socket.SOCK_SEQPACKET)
    with one, other:
        longest = one.connection.message_max
        with pytest.raises(errors.MessageTooLarge, match=str(longest)) as caught:
            one.send(bytes(longest + 1))
        assert caught.value.errno == errno.EMSGSIZE
        sent = pool.submit(one.send, bytes(longest))
        assert len(other.recv(longest + 1)) == longest
        assert sent.result() == longest


@pytest.mark.parametrize("count", [0, 1, 2, 17, 1024])
def test_vectors_of_any_number_and_length(any_pair: Pair, count: int) -> None:
    one, other = any_pair
    rng = random.Random(count)
    buffers = [rng.randbytes(rng.choice((0, 0, 1, 7, 64, 100))) for _ in range(count)]
    whole = b"".join(buffers)
    if not whole:
        buffers, whole = [*buffers, b"x"], b"x"
    assert one.sendmsg(iter(buffers)) == len(whole)
    into = [bytearray(len(b)) for b in buffers]
    count_got, ancillary, flags, who = other.recvmsg_into(into)
    assert (count_got, ancillary, flags, who) == (len(whole), [], 0, one.getsockname())
    assert b"".join(into) == whole


def test_receiving_into_a_part(any_pair: Pair) -> None:
    one, other = any_pair
    one.sendall(b"abcdef")
    buffer = bytearray(b"--------")
    assert other.recv_into(memoryview(buffer)[2:], 3) == 3
    assert buffer == b"--abc---"
    with pytest.raises(ValueError, match="too small"):
        other.recv_into(buffer, 9)
    with pytest.raises(ValueError, match="negative"):
        other.recv_into(buffer, -1)
    with pytest.raises(ValueError, match="negative"):
        other.recv(-1)
    with pytest.raises((TypeError, BufferError)):
        other.recv_into(b"read-only")
    with pytest.raises(TypeError, match="bytes-like"):
        one.send("text")  # type: ignore[arg-type]


def test_anything_with_a_buffer_is_sent(pair: Pair) -> None:
    from array import array

    one, other = pair
    for data in (b"x", bytearray(b"yy"), memoryview(b"abcd")[1:3], array("d", [1.0, 2.0])):
        one.sendall(data)
        assert other.recv(100) == bytes(data)
    with pytest.raises(BufferError):
        one.sendall(memoryview(b"abcd")[::2])


def test_wait_all_waits_for_all(pair: Pair, pool: ThreadPoolExecutor) -> None:
    one, other = pair
    got = pool.submit(other.recv, 300_000, socket.MSG_WAITALL)
    for _ in range(3):
        one.sendall(bytes(100_000))
    assert got.result() == bytes(300_000)
    one.sendall(b"rest")
    one.shutdown(socket.SHUT_WR)
    assert other.recv(10, socket.MSG_WAITALL) == b"rest"


@pytest.mark.parametrize("flag", ["MSG_OOB", "MSG_ERRQUEUE", "MSG_MORE"])
def test_flags_without_meaning_are_refused_by_name(pair: Pair, flag: str) -> None:
    one, _ = pair
    for call in (
        lambda value: one.send(b"x", value),
        lambda value: one.recv(1, value),
        lambda value: one.sendmsg([b"x"], [], value),
        lambda value: one.recv_into(bytearray(1), 0, value),
        lambda value: one.recvmsg(1, 0, value),
    ):
        with pytest.raises(errors.Unsupported, match=flag) as caught:
            call(getattr(socket, flag))
        assert caught.value.errno == errno.EOPNOTSUPP


def test_ancillary_data_is_refused(pair: Pair) -> None:
    one, other = pair
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", 0))]
    with pytest.raises(errors.Unsupported, match="ancillary"):
        one.sendmsg([b"x"], rights)
    with pytest.raises(BlockingIOError):
        other.recv(1, socket.MSG_DONTWAIT)


# ---- waiting


def test_nothing_to_receive_and_nowhere_to_send(any_pair: Pair) -> None:
    one, other = any_pair
    with pytest.raises(errors.WouldBlock) as caught:
        one.recv(1, socket.MSG_DONTWAIT)
    assert caught.value.errno == errno.EAGAIN
    one.setblocking(False)
    assert one.gettimeout() == 0.0
    assert not one.getblocking()
    with pytest.raises(BlockingIOError):
        one.recv(1)
    sent = fill(one)
    one.setblocking(True)
    got = 0
    while got < sent:
        got += len(other.recv(1 << 20))
    assert got == sent


def test_time_limits(any_pair: Pair) -> None:
    one, _ = any_pair
    one.settimeout(0.01)
    with pytest.raises(TimeoutError) as caught:
        one.recv(1)
    assert isinstance(caught.value, errors.TimedOut)
    one.setblocking(False)
    fill(one)
    one.settimeout(0.01)
    with pytest.raises(TimeoutError):
        one.sendall(bytes(10_000))
    for bad in (-1, float("nan")):
        with pytest.raises(ValueError, match="range"):
            one.settimeout(bad)
    with pytest.raises(TypeError):
        one.settimeout("soon")  # type: ignore[arg-type]
    one.settimeout(1e300)
    assert one.gettimeout() > 1e6


def test_sendall_says_how_much_went_through(pair: Pair) -> None:
    one, other = pair
    one.settimeout(0.01)
    data = random.Random(3).randbytes(8 << 20)
    with pytest.raises(errors.TimedOut) as caught:
        one.sendall(data)
    done = caught.value.done
    assert 0 < done < len(data)
    one.close()
    assert receive_all(other) == data[:done]


def test_kernel_time_limits_end_as_the_kernels_do(pair: Pair) -> None:
    one, _ = pair
    one.settimeout(None)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 10_000))
    assert struct.unpack("ll", one.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)) == (0, 10_000)
    with pytest.raises(BlockingIOError):
        one.recv(1)
    one.settimeout(0.01)
    with pytest.raises(TimeoutError):
        one.recv(1)


def test_the_default_time_limit_is_that_of_socket(domains: Domains) -> None:
    socket.setdefaulttimeout(12.5)
    try:
        with (
            domains.server() as server,
            isthmus.create_connection(server.getsockname(), node=domains["a"]) as one,
        ):
            other, _ = server.accept()
            with other:
                assert one.gettimeout() == other.gettimeout() == 12.5
    finally:
        socket.setdefaulttimeout(None)
    with isthmus.Socket(socket.SOCK_STREAM | socket.SOCK_NONBLOCK, node=domains["a"]) as sock:
        assert sock.gettimeout() == 0.0
        assert sock.type == socket.SOCK_STREAM


@pytest.mark.parametrize("call", ["recv", "recv_into", "recvmsg"])
def test_closing_ends_a_receive_in_another_thread(
    any_pair: Pair, pool: ThreadPoolExecutor, call: str
) -> None:
    one, _ = any_pair
    ended = pool.submit(
        {
            "recv": lambda: one.recv(1),
            "recv_into": lambda: one.recv_into(bytearray(1)),
            "recvmsg": lambda: one.recvmsg(1),
        }[call]
    )
    becomes(lambda: ended.running())
    one.close()
    with pytest.raises(OSError, match="closed"):
        ended.result()


def test_shutting_down_ends_a_receive_in_another_thread(any_pair: Pair, pool: ThreadPoolExecutor) -> None:
    one, _ = any_pair
    one.settimeout(None)
    ended = pool.submit(one.recv, 1)
    becomes(lambda: ended.running())
    one.shutdown(socket.SHUT_RDWR)
    assert ended.result() == b""


def test_closing_a_listener_ends_accept(domains: Domains, pool: ThreadPoolExecutor) -> None:
    with domains.server() as server:
        ended = pool.submit(server.accept)
        becomes(lambda: ended.running())
        server.shutdown(socket.SHUT_RD)
        with pytest.raises(errors.WrongState, match="shut down"):
            ended.result()
    server = domains.server()
    ended = pool.submit(server.accept)
    becomes(lambda: ended.running())
    server.close()
    with pytest.raises(errors.Closed):
        ended.result()


def test_many_threads_share_one_socket(pair: Pair, pool: ThreadPoolExecutor) -> None:
    one, other = pair
    count, size = 200, 1000
    senders = [
        pool.submit(lambda i=i: [one.sendall(bytes((i,)) * size) for _ in range(count)]) for i in range(3)
    ]
    receivers = [pool.submit(receive_all, other, 700) for _ in range(3)]
    for sender in senders:
        sender.result()
    one.shutdown(socket.SHUT_WR)
    got = b"".join(receiver.result() for receiver in receivers)
    assert sorted(got) == sorted(bytes(range(3)) * (count * size))


def test_a_slow_sibling_stalls_nobody(domains: Domains, pool: ThreadPoolExecutor) -> None:
    with domains.server() as server:
        slow, quick = (
            isthmus.create_connection(server.getsockname(), LIMIT_S, node=domains["a"]) for _ in "12"
        )
        at_slow, at_quick = (server.accept()[0] for _ in "12")
        with slow, quick, at_slow, at_quick:
            slow.setblocking(False)
            fill(slow)
            for i in range(1000):
                quick.sendall(b"%d" % i)
                assert at_quick.recv(100) == b"%d" % i


# ---- ending


def test_half_close_echo(pair: Pair, pool: ThreadPoolExecutor) -> None:
    one, other = pair
    data = random.Random(2).randbytes(1 << 20)

    def echo() -> None:
        while got := other.recv(10_000):
            other.sendall(got)
        other.shutdown(socket.SHUT_WR)

    echoing = pool.submit(echo)
    sending = pool.submit(lambda: (one.sendall(data), one.shutdown(socket.SHUT_WR)))
    assert receive_all(one) == data
    sending.result()
    echoing.result()
    with pytest.raises(BrokenPipeError):
        one.send(b"after the end")


def test_an_orderly_close_delivers_everything(any_pair: Pair) -> None:
    one, other = any_pair
    for i in range(100):
        one.sendall(b"%02d" % i)
    one.close()
    got = b""
    while piece := other.recv(100):
        got += piece
    assert got == b"".join(b"%02d" % i for i in range(100))
    assert other.recv(1) == b""
    with pytest.raises(BrokenPipeError):
        other.send(b"x")


def test_closing_over_unread_data_resets(any_pair: Pair) -> None:
    one, other = any_pair
    one.sendall(b"never read")
    other.close()
    with pytest.raises(ConnectionResetError):
        one.recv(1)
    assert one.recv(1) == b""
    with pytest.raises(BrokenPipeError):
        one.send(b"x")


def test_closing_after_the_last_byte_was_read_is_the_end(any_pair: Pair) -> None:
    one, other = any_pair
    one.sendall(b"read")
    other.recv(100)
    other.close()
    assert one.recv(1) == b""


def test_both_close_at_once(domains: Domains, pool: ThreadPoolExecutor) -> None:
    for _ in range(50):
        sockets = domains.pair()
        barrier = threading.Barrier(2)

        def close(sock: isthmus.Socket, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            sock.close()

        ends = [pool.submit(close, sock) for sock in sockets]
        for end in ends:
            end.result()


def test_what_arrived_can_be_received_after_shut_rd(any_pair: Pair) -> None:
    one, other = any_pair
    one.sendall(b"before")
    other.shutdown(socket.SHUT_RD)
    assert other.recv(100) == b"before"
    assert other.recv(100) == b""
    with pytest.raises(BrokenPipeError):
        one.send(b"after")
    other.sendall(b"still")
    assert one.recv(100) == b"still"


def test_the_state_of_a_socket_is_minded(domains: Domains) -> None:
    with isthmus.Socket(node=domains["a"]) as sock:
        for call in (
            lambda: sock.send(b"x"),
            lambda: sock.recv(1),
            lambda: sock.recv_into(bytearray(1)),
            lambda: sock.recvmsg(1),
            lambda: sock.shutdown(socket.SHUT_WR),
            lambda: sock.getpeername(),
            lambda: sock.stats(),
        ):
            with pytest.raises(errors.NotConnected) as caught:
                call()
            assert caught.value.errno == errno.ENOTCONN
        with pytest.raises(errors.WrongState, match="listen"):
            sock.accept()
        sock.bind(("", 0))
        with pytest.raises(errors.WrongState):
            sock.bind(("", 0))
        sock.listen()
        with pytest.raises(errors.WrongState):
            sock.connect(("b", 1))
        with pytest.raises(OSError, match="SHUT_RD"):
            sock.shutdown(9)
    assert sock.fileno() == -1
    for call in (
        lambda: sock.send(b"x"),
        lambda: sock.recv(1),
        lambda: sock.listen(),
        lambda: sock.getsockname(),
        lambda: sock.recvmsg(1),
        lambda: sock.bind(("", 0)),
        lambda: sock.connect(("b", 1)),
        sock.accept,
    ):
        with pytest.raises(errors.Closed) as caught:
            call()
        assert caught.value.errno == errno.EBADF
    sock.close()
    assert "closed" in repr(sock)


@pytest.mark.parametrize("address", [None, "b", 5, ("b",), ("b", "5"), (None, 5), ("b", -1), ("b", 1 << 32)])
def test_addresses_that_cannot_be(domains: Domains, address: object) -> None:
    with isthmus.Socket(node=domains["a"]) as sock, pytest.raises((TypeError, ValueError, OverflowError)):
        sock.connect(address)  # type: ignore[arg-type]


# ---- datagrams


def test_datagrams_come_from_whom_they_say(domains: Domains) -> None:
    with (
        domains.datagram("b") as receiver,
        domains.datagram("a") as a,
        domains.datagram("c", bound=False) as c,
    ):
        a.sendto(b"from a", receiver.getsockname())
        assert receiver.recvfrom(100) == (b"from a", a.getsockname())
        c.sendto(b"from c", receiver.getsockname())
        data, who = receiver.recvfrom(100)
        assert data == b"from c"
        assert who[0] == "c"
        receiver.sendto(b"back", who)
        assert c.recvfrom(100) == (b"back", receiver.getsockname())
        a.sendto(b"", receiver.getsockname())
        assert receiver.recvfrom(100) == (b"", a.getsockname())
        a.sendto(b"too long", receiver.getsockname())
        assert receiver.recvmsg(3) == (b"too", [], socket.MSG_TRUNC, a.getsockname())


def test_a_connected_datagram_socket_hears_only_its_other_side(domains: Domains) -> None:
    with domains.datagram("b") as b, domains.datagram("a") as a, domains.datagram("c") as c:
        with pytest.raises(errors.NotConnected) as caught:
            a.send(b"where to?")
        assert caught.value.errno == errno.EDESTADDRREQ
        a.connect(b.getsockname())
        assert a.getpeername() == b.getsockname()
        assert a.path == domains.carrier
        a.send(b"question")
        c.sendto(b"noise", a.getsockname())
        _, who = b.recvfrom(100)
        b.sendto(b"answer", who)
        assert a.recv(100, socket.MSG_PEEK) == b"answer"
        assert a.recv(100) == b"answer"
        with pytest.raises(BlockingIOError):
            a.recv(100, socket.MSG_DONTWAIT)


def test_a_datagram_to_nobody_is_refused_at_once(domains: Domains) -> None:
    with domains.datagram("a") as a:
        with pytest.raises(ConnectionRefusedError):
            a.sendto(b"x", ("b", 9))
        for call in (a.listen, a.accept):
            with pytest.raises(errors.Unsupported) as caught:
                call()
            assert caught.value.errno == errno.EOPNOTSUPP
        with pytest.raises(BlockingIOError):
            a.recvfrom(1, socket.MSG_DONTWAIT)


def test_streams_go_to_their_other_side_only(any_pair: Pair) -> None:
    one, _ = any_pair
    with pytest.raises(errors.AlreadyConnected):
        one.sendto(b"x", ("c", 1))


# ---- who and what


def test_types_that_are_not(domains: Domains) -> None:
    with pytest.raises(errors.Unsupported, match="SOCK_STREAM"):
        isthmus.Socket(socket.SOCK_RAW, node=domains["a"])
    with pytest.raises(ValueError, match="sealed"):
        isthmus.Socket(require="fast", node=domains["a"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gc.collect()


def test_one_attachment_for_a_door(domains: Domains) -> None:
    with (
        isthmus.attach(domains.door("d")) as one,
        isthmus.attach(os.path.dirname(domains.door("d"))) as other,
    ):
        assert one.native is other.native
        assert (one.name, one.resolve("a")) == ("d", (domains["a"].domain, "a"))
        assert one.resolve(str(one.domain)) == (one.domain, "d")
        assert "connections" in one.status() or one.status()
    with pytest.raises(errors.Closed, match="attach"):
        one.resolve("a")


def test_the_door_is_found(domains: Domains, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ISTHMUS_DOOR", domains.door("c"))
    with isthmus.attach() as node, isthmus.Socket() as sock:
        assert node.name == sock.node.name == "c"
    for door in (tmp_path / "none", tmp_path):
        monkeypatch.setenv("ISTHMUS_DOOR", str(door))
        with pytest.raises(errors.NoBroker, match="ISTHMUS_DOOR"):
            isthmus.create_server(0)
    monkeypatch.delenv("ISTHMUS_DOOR")
    with pytest.raises(errors.NoBroker, match="isthmus domain add"):
        isthmus.attach()


def test_unknown_domains_are_named(domains: Domains) -> None:
    with pytest.raises(errors.UnknownDomain, match="nowhere"):
        isthmus.create_connection(("nowhere", 1), node=domains["a"])
    with pytest.raises(errors.UnknownDomain, match="nowhere"):
        isthmus.create_server(("nowhere", 1), node=domains["a"])


def test_a_port_is_leased_once(domains: Domains) -> None:
    with domains.server() as server, pytest.raises(errors.PortInUse) as caught:
        isthmus.create_server(server.getsockname(), node=domains["b"])
    assert caught.value.errno == errno.EADDRINUSE
