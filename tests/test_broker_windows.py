"""Windows that programs lend: what the broker passes on, counts and refuses."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from broker_client import Node, Program, Refused, eventually
from test_mx import rules

from isthmus import _native

WINDOWS_MAX = _native.WINDOWS_MAX
F_ADD_SEALS = 1033
SEAL_SEAL, SEAL_SHRINK, SEAL_GROW, SEAL_FUTURE_WRITE = 1, 2, 4, 0x10
SEALS = SEAL_SEAL | SEAL_SHRINK | SEAL_GROW | SEAL_FUTURE_WRITE
PAGE = 4096


def memory(size: int = PAGE, seals: int = SEALS, *, holes: bool = False, flags: int = os.O_RDONLY) -> int:
    """A descriptor of something like a window."""
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    if not holes:
        os.posix_fallocate(fd, 0, size)
    fcntl.fcntl(fd, F_ADD_SEALS, seals)
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    finally:
        os.close(fd)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path / "run", state=tmp_path / "state") as node:
        node.add("a", "b", "c")
        yield node


class Joined:
    """A connection from a to b of raw programs, who may know windows or not."""

    def __init__(
        self, node: Node, *, features: int = _native.FEATURE_WINDOWS, carrier: str = "sealed"
    ) -> None:
        self.a = node.attach("a", features=_native.FEATURE_WINDOWS)
        self.b = node.attach("b", features=features)
        port = self.b.bind()
        self.ours, self.theirs = self.a.connect("b", port, self.b, carrier=carrier)
        self.last = 0

    def close(self) -> None:
        for side in self.ours, self.theirs:
            side.forget()
        self.a.close_socket()
        self.b.close_socket()

    def lend(self, fd: int | None = None, by: Program | None = None, **other: int) -> str:
        """Lend a page, or something else; returns the kind of the answer."""
        self.last += 1
        fields = {"connection": self.ours.number, "opener": 1, "window": self.last, "size": PAGE, "again": 0}
        fds = [memory() if fd is None else fd]
        return (by or self.a).ask("lend-window", fds, **{**fields, **other})[0]

    def take_back(self, window: int, by: Program | None = None) -> None:
        (by or self.a).send("take-back-window", connection=self.ours.number, opener=1, window=window)


Join = Callable[..., Joined]


@pytest.fixture
def join() -> Iterator[Join]:
    """Make connections that are closed in the end."""
    with contextlib.ExitStack() as stack:
        yield lambda node, **how: stack.enter_context(contextlib.closing(Joined(node, **how)))


def refused(refusal: str) -> contextlib.AbstractContextManager[object]:
    return pytest.raises(Refused, match=f"^{refusal} ")


def test_the_other_side_gets_what_is_lent(join: Join, node: Node) -> None:
    joined = join(node)
    before = node.holds("a")[2]
    assert joined.lend() == "done"
    window = joined.b.next("window")
    assert (window["connection"], window["opener"], window["window"], window["size"]) == (
        joined.ours.number,
        0,
        1,
        PAGE,
    )
    (fd,) = window["fds"]
    assert os.fstat(fd).st_size == PAGE
    os.close(fd)
    assert node.holds("a")[2] == before + PAGE
    joined.take_back(1)
    gone = joined.b.next("window-gone")
    assert (gone["opener"], gone["window"]) == (0, 1)
    assert node.holds("a")[2] == before


def test_one_file_counts_once(join: Join, node: Node) -> None:
    joined = join(node)
    before = node.holds("a")[2]
    fd = memory()
    for _ in range(3):
        joined.lend(os.dup(fd))
    assert node.holds("a")[2] == before + PAGE
    joined.take_back(1)
    joined.take_back(1)
    joined.take_back(77)
    joined.take_back(2)
    joined.lend()
    assert node.holds("a")[2] == before + 2 * PAGE
    os.close(fd)
    joined.ours.close()
    eventually(lambda: node.holds("a")[2] == 0)
    assert node.do(lambda: node.broker.domains["a"].windows) == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"holes": True},
        {"seals": SEALS & ~SEAL_FUTURE_WRITE},
        {"seals": SEALS & ~SEAL_SHRINK},
        {"seals": SEALS & ~SEAL_GROW},
        {"seals": SEALS & ~SEAL_SEAL},
        {"seals": 0},
        {"flags": os.O_RDWR},
        {"size": 2 * PAGE},
        {"size": 0},
        {"size": PAGE + 1},
    ],
    ids=str,
)
def test_what_is_no_window_is_not_passed_on(join: Join, node: Node, wrong: dict[str, Any]) -> None:
    joined = join(node)
    before = node.holds("a")[2]
    if wrong.get("size") == 0:
        wrong = {**wrong, "holes": True}
    with refused("bad-request"):
        joined.lend(memory(**wrong))
    if wrong.get("size") == PAGE + 1:
        with refused("bad-request"):
            joined.lend(memory(**wrong), size=PAGE + 1)
    assert joined.lend() == "done"
    assert joined.b.next("window")["window"] == joined.last
    assert node.holds("a")[2] == before + PAGE


def test_other_files_are_no_windows(join: Join, node: Node, tmp_path: Path) -> None:
    joined = join(node)
    (tmp_path / "file").write_bytes(bytes(PAGE))
    one, other = socket.socketpair()
    for fd in os.open(tmp_path / "file", os.O_RDONLY), one.detach(), os.open("/dev/zero", os.O_RDONLY):
        with refused("bad-request"):
            joined.lend(fd)
    other.close()
    for fds in [], [memory(), memory()]:
        with refused("bad-request"):
            joined.a.ask(
                "lend-window", fds, connection=joined.ours.number, opener=1, window=9, size=PAGE, again=0
            )


def test_only_who_holds_a_connection_lends_for_it(join: Join, node: Node) -> None:
    joined = join(node)
    with node.attach("c") as stranger, node.attach("a") as sibling:
        for by, opener in (stranger, 1), (stranger, 0), (sibling, 1), (joined.a, 0), (joined.b, 1):
            with refused("not-yours"):
                joined.lend(by=by, opener=opener)
        with refused("not-yours"):
            joined.lend(connection=joined.ours.number ^ 1)
        assert joined.lend() == "done"
        number = joined.last
        joined.take_back(number, stranger)
        joined.take_back(number, sibling)
        joined.take_back(number, joined.b)
        for program in stranger, sibling, joined.b:
            program.status()
    assert node.do(lambda: len(node.broker.domains["a"].windows)) == 1
    joined.ours.close()
    joined.a.status()
    with refused("not-yours"):
        joined.lend()


def test_numbers_are_used_once_at_a_time(join: Join, node: Node) -> None:
    joined = join(node)
    assert joined.lend(window=5) == "done"
    for number in 5, 0:
        with refused("bad-request"):
            joined.lend(window=number)


def test_a_side_lends_so_many_and_no_more(join: Join, node: Node) -> None:
    joined = join(node)
    for _ in range(WINDOWS_MAX):
        assert joined.lend() == "done"
    with refused("limit-reached"):
        joined.lend()
    joined.take_back(3)
    assert joined.lend() == "done"


def test_the_memory_of_a_domain_is_limited(join: Join, tmp_path: Path) -> None:
    with Node(tmp_path / "run", '[limits]\nmemory = "1MiB"\n' + rules("accept")) as node:
        node.add("a", "b")
        joined = join(node)
        free = 2**20 - node.holds("a")[2]
        with refused("limit-reached"):
            joined.lend(memory(free + PAGE), size=free + PAGE)
        assert joined.lend(memory(free), size=free) == "done"
        with refused("limit-reached"):
            joined.lend()
        with refused("limit-reached"):
            joined.lend(again=1)


def test_who_knows_no_windows_gets_none(join: Join, node: Node) -> None:
    joined = join(node, features=0)
    with refused("path-unavailable"):
        joined.lend()
    joined.take_back(1)
    joined.a.status()
    assert joined.b.quiet()


def test_no_page_is_lent_where_none_is_shared(join: Join, tmp_path: Path) -> None:
    policy = '[[rule]]\nfrom = "*"\nto = "*"\naction = "accept"\nstrict = true\n'
    with Node(tmp_path / "run", policy) as node:
        node.add("a", "b")
        joined = join(node, carrier="put")
        with refused("path-unavailable"):
            joined.lend()


def test_a_window_is_shown_to_the_next_broker_and_to_nobody_else(join: Join, node: Node) -> None:
    joined = join(node)
    joined.lend()
    joined.b.next("window")
    node.restart()
    features = _native.FEATURE_WINDOWS
    with node.attach("a", features=features) as a, node.attach("b", features=features) as b:
        joined.ours.resume(a)
        with refused("peer-gone"):
            joined.lend(by=a)
        before = node.holds("a")[2]
        assert joined.lend(by=a, again=1) == "done"
        # Taken back before the other side is there.
        joined.take_back(77, a)
        joined.theirs.resume(b)
        assert b.next("window-gone")["window"] == 77
        assert node.holds("a")[2] == before + PAGE
        assert joined.lend(by=a) == "done"
        assert b.next("window")["window"] == joined.last
        joined.take_back(1, a)
        assert b.next("window-gone")["window"] == 1


def test_who_does_not_read_is_lent_no_more(join: Join, node: Node) -> None:
    joined = join(node)

    def full() -> bool:
        try:
            joined.lend()
        except Refused as error:
            return error.refusal in ("backlog-full", "limit-reached")
        joined.take_back(joined.last)
        return False

    eventually(full)
    # The lender is not stopped by that.
    joined.a.status()
