"""The kernel's own sockets as the model: the same calls on a Unix socket pair and on ours end alike.

What the model leaves out, because it differs on purpose (docs/reference/sockets.md): how much fits before a
sender has to wait, the order in which a reset and the data before it are told, and a receive of no bytes from
an empty stream.
"""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Callable
from typing import Any

import pytest
from conftest import LIMIT_S, Domains
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

#: Bytes on their way in one direction, at most: both kinds of sockets take so much at any time. A message
#: that would pass the end of its ring begins anew, so a ring is twice as large.
WINDOW = 4096
#: What a message is reckoned to take beside its bytes.
OVERHEAD = 64

which = st.integers(0, 1)
sizes = st.one_of(st.sampled_from([1, 2, 63, 64, 65, 1000, 1500]), st.integers(1, 1500))
lengths = st.one_of(st.sampled_from([1, 2, 64, 1500, 4096, 100_000]), st.integers(1, 3000))


class Pairs(RuleBasedStateMachine):
    """A pair of Unix sockets and a pair of ours, treated alike."""

    def __init__(self, domains: Domains, type: int, rings: tuple[int, int]) -> None:
        super().__init__()
        self.type = type
        self.real = socket.socketpair(socket.AF_UNIX, type)
        self.ours = domains.pair(type, rings)
        for sock in (*self.real, *self.ours):
            sock.setblocking(False)
        self.next = 0
        #: Towards each end: bytes, with the overhead of messages, that nobody received.
        self.coming: list[list[int]] = [[], []]
        self.closed = [False, False]
        self.reset = [False, False]

    def teardown(self) -> None:
        for sock in (*self.real, *self.ours):
            sock.close()

    # ---- doing the same to both

    def data(self, size: int) -> bytes:
        self.next += 1
        return bytes((self.next + i) & 0xFF for i in range(size))

    def outcome(self, end: int, call: Callable[[], Any]) -> tuple[str, Any]:
        try:
            return "gave", call()
        except OSError as error:
            if self.reset[end] and error.errno == errno.ECONNRESET:
                # Told once; when, before what arrived or after it, is another matter.
                return self.outcome(end, call)
            return "raised", error

    def same(self, end: int, call: Callable[[Any], Any]) -> Any:
        kind, real = self.outcome(end, lambda: call(self.real[end]))
        our_kind, ours = self.outcome(end, lambda: call(self.ours[end]))
        if kind == "raised":
            assert our_kind == "raised", f"the kernel raised {real!r}, we gave {ours!r}"
            assert real.errno == ours.errno, f"the kernel raised {real!r}, we raised {ours!r}"
            assert isinstance(ours, type(real))
            return None
        assert our_kind == "gave", f"the kernel gave {real!r}, we raised {ours!r}"
        assert real == ours
        return real

    def fits(self, end: int, size: int) -> bool:
        return sum(self.coming[1 - end]) + size + OVERHEAD <= WINDOW

    def sent(self, end: int, size: int | None) -> None:
        if size is not None and (size or self.type == socket.SOCK_SEQPACKET):
            self.coming[1 - end].append(size + OVERHEAD)

    def received(self, end: int, size: int | None) -> None:
        coming = self.coming[end]
        if self.type == socket.SOCK_SEQPACKET:
            if size is not None and coming:
                coming.pop(0)
            return
        while size and coming:
            part = min(size, coming[0] - OVERHEAD)
            size -= part
            coming[0] -= part
            if coming[0] <= OVERHEAD:
                coming.pop(0)

    def would_wait(self, end: int) -> bool:
        """A blocking receive would: the other end has to act first."""
        return not self.closed[end] and not select.select([self.real[end]], [], [], 0)[0]

    # ---- what may happen

    @rule(end=which, size=st.one_of(st.just(0), sizes))
    def send(self, end: int, size: int) -> None:
        if self.fits(end, size) and (size or self.type == socket.SOCK_SEQPACKET):
            data = self.data(size)
            self.sent(end, self.same(end, lambda sock: sock.send(data)))

    @rule(end=which, size=sizes)
    def sendall(self, end: int, size: int) -> None:
        if self.fits(end, size):
            data = self.data(size)
            if self.same(end, lambda sock: (sock.sendall(data), True)[1]):
                self.sent(end, size)

    @rule(end=which, parts=st.lists(st.one_of(st.just(0), st.integers(0, 300)), min_size=1, max_size=12))
    def sendmsg(self, end: int, parts: list[int]) -> None:
        size = sum(parts)
        if self.fits(end, size) and (size or self.type == socket.SOCK_SEQPACKET):
            data = [self.data(part) for part in parts]
            self.sent(end, self.same(end, lambda sock: sock.sendmsg(data)))

    @rule(end=which, length=lengths)
    def recv(self, end: int, length: int) -> None:
        if self.ours[end].getblocking() and self.would_wait(end):
            return
        got = self.same(end, lambda sock: sock.recv(length))
        self.received(end, None if got is None else len(got))

    @rule(end=which, length=lengths)
    def recv_into(self, end: int, length: int) -> None:
        if self.ours[end].getblocking() and self.would_wait(end):
            return

        def call(sock: Any) -> tuple[int, bytes]:
            buffer = bytearray(length)
            got = sock.recv_into(buffer)
            return got, bytes(buffer[:got])

        got = self.same(end, call)
        self.received(end, None if got is None else got[0])

    @rule(end=which, lengths=st.lists(st.integers(1, 700), min_size=1, max_size=5))
    def recvmsg_into(self, end: int, lengths: list[int]) -> None:
        if self.ours[end].getblocking() and self.would_wait(end):
            return

        def call(sock: Any) -> tuple[int, bytes, int]:
            buffers = [bytearray(length) for length in lengths]
            got, _, flags, _ = sock.recvmsg_into(buffers)
            return got, b"".join(buffers), flags & socket.MSG_TRUNC

        got = self.same(end, call)
        self.received(end, None if got is None else got[0])

    @rule(end=which, length=lengths)
    def peek(self, end: int, length: int) -> None:
        self.same(end, lambda sock: sock.recv(length, socket.MSG_PEEK | socket.MSG_DONTWAIT))

    @rule(end=which, length=st.integers(1, 2000))
    def recv_all(self, end: int, length: int) -> None:
        got = self.same(end, lambda sock: sock.recv(length, socket.MSG_WAITALL | socket.MSG_DONTWAIT))
        self.received(end, None if got is None else len(got))

    @rule(end=which)
    def whole_length(self, end: int) -> None:
        if self.type == socket.SOCK_SEQPACKET:
            buffer = bytearray(1)
            got = self.same(
                end, lambda sock: sock.recv_into(buffer, 0, socket.MSG_TRUNC | socket.MSG_DONTWAIT)
            )
            self.received(end, got)

    @rule(end=which, flag=st.booleans())
    def setblocking(self, end: int, flag: bool) -> None:
        if not self.closed[end]:
            self.same(end, lambda sock: (sock.setblocking(flag), sock.getblocking(), sock.gettimeout()))
            if flag:
                # A receive that waits although it should not is a failure, not a hang.
                self.ours[end].settimeout(LIMIT_S)

    @rule(end=which, how=st.sampled_from([socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR]))
    def shutdown(self, end: int, how: int) -> None:
        self.same(end, lambda sock: sock.shutdown(how))

    @precondition(lambda self: not all(self.closed))
    @rule(end=which)
    def close(self, end: int) -> None:
        if not self.closed[end] and self.coming[end]:
            self.reset[1 - end] = True
        self.closed[end] = True
        self.same(end, lambda sock: sock.close())

    @rule(end=which)
    def ready(self, end: int) -> None:
        """Readable when the kernel's is; the descriptor follows within a moment."""
        if not self.closed[end]:
            readable = bool(select.select([self.real[end]], [], [], 0)[0])
            limit = 10 if readable else 0
            assert bool(select.select([self.ours[end]], [], [], limit)[0]) == readable

    @rule(end=which)
    def error(self, end: int) -> None:
        if not self.reset[end]:
            self.same(end, lambda sock: sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


@pytest.mark.parametrize("type", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET], ids=["stream", "seqpacket"])
@pytest.mark.parametrize("rings", [(32_768, 0), (8192, 65_536)], ids=["one-ring", "growing"])
def test_our_sockets_do_what_the_kernels_do(domains: Domains, type: int, rings: tuple[int, int]) -> None:
    if domains.carrier == "put" and rings[1]:
        # On this path the receiver makes a ring grow, so a lone sender waits for it: a documented difference.
        rings = (32_768, 65_536)
    run_state_machine_as_test(
        lambda: Pairs(domains, type, rings),
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("type", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET], ids=["stream", "seqpacket"])
def test_our_sockets_do_what_the_kernels_do_for_long(domains: Domains, type: int) -> None:
    run_state_machine_as_test(
        lambda: Pairs(domains, type, (32_768, 0)),
        settings=settings(
            max_examples=3000,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
