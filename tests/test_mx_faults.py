"""MX endpoints and peers that die, fork, or say what cannot be: only what they are part of ends."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import LIMIT_S, becomes, started
from endpoints import LONG, ended, fails, fine, joined, noise
from test_death import lanes
from test_mx import rules

import isthmus
from isthmus import errors, mx
from isthmus.testing import PrivateBroker

# Of docs/formats/mx-lane.md.
PORT, VERSION, BAD_KEY = 0x4D580000, 1, 11
HEADER = struct.Struct("<BBHIQII")
HELLO, WELCOME, MESSAGE, ANNOUNCE, PULL, DATA, PLACED = range(1, 8)
EAGER = 32 * 1024


@dataclass
class Record:
    kind: int
    flags: int = 0
    reserved: int = 0
    length: int = 0
    match: int = 0
    id: int = 0
    more: int = 0
    data: bytes = b""

    def encode(self) -> bytes:
        fields = (self.kind, self.flags, self.reserved, self.length, self.match, self.id, self.more)
        return HEADER.pack(*fields) + self.data


class Raw:
    """The other end of a lane to an endpoint, which says what the test wants it to."""

    def __init__(self, sock: isthmus.Socket) -> None:
        self.sock = sock
        sock.settimeout(LIMIT_S)

    def say(self, kind: int, data: bytes = b"", **fields: int) -> None:
        self.sock.send(Record(kind, data=data, **fields).encode())

    def hear(self) -> Record:
        said = self.sock.recv(1 << 20)
        assert len(said) >= HEADER.size, "the lane has ended"
        kind, flags, reserved, length, match, id, more = HEADER.unpack(said[: HEADER.size])
        return Record(kind, flags, reserved, length, match, id, more, said[HEADER.size :])

    def hello(self, endpoint: int = 40, session: int = 7, key: int = 0, version: int = VERSION) -> None:
        self.say(HELLO, flags=version, length=key, match=endpoint, id=session)

    def greet(self) -> Raw:
        self.hello()
        welcome = self.hear()
        assert (welcome.kind, welcome.flags) == (WELCOME, 0)
        return self

    def ends(self) -> None:
        """The endpoint has closed this lane."""
        with contextlib.suppress(ConnectionError):
            while self.sock.recv(1 << 20):
                pass

    def lives(self, session: int) -> None:
        """The endpoint has not: it answers."""
        self.hello(session=session)
        while self.hear().kind != WELCOME:
            pass


@contextlib.contextmanager
def raw(node: isthmus.Node, endpoint: mx.Endpoint, to: str = "a") -> Iterator[Raw]:
    """A lane to an endpoint."""
    address = (to, PORT + endpoint.id)
    with isthmus.create_connection(address, LIMIT_S, type=socket.SOCK_SEQPACKET, node=node) as sock:
        yield Raw(sock)


@contextlib.contextmanager
def victim(broker: PrivateBroker) -> Iterator[tuple[mx.Endpoint, isthmus.Node, isthmus.Node]]:
    """An endpoint of a, and the nodes a and c. In the end it works with an honest peer as ever."""
    with joined(broker) as (a, b, to_a):
        yield a, isthmus.attach(broker.door("a")), isthmus.attach(broker.door("c"))
        for length in 5, LONG:
            place = bytearray(length)
            receive, request = a.irecv(0xAFFE, place), b.isend(to_a, 0xAFFE, noise(length))
            fine(receive)
            fine(request)
            assert place == noise(length)


# ---- who says what cannot be

#: From whoever has not said who it is.
STRANGERS = {
    "nothing": b"",
    "too little": Record(HELLO, flags=VERSION, match=40).encode()[:-1],
    "bytes behind a hello": Record(HELLO, flags=VERSION, match=40, data=b"x").encode(),
    "another version": Record(HELLO, flags=VERSION + 1, match=40).encode(),
    "an endpoint that is no byte": Record(HELLO, flags=VERSION, match=256).encode(),
    "a message": Record(MESSAGE, match=1, data=b"x").encode(),
    "an announcement": Record(ANNOUNCE, match=1, length=5).encode(),
    "a pull": Record(PULL, length=1).encode(),
    "data": Record(DATA, data=b"x").encode(),
    "a welcome": Record(WELCOME).encode(),
    "a refusal": Record(WELCOME, flags=BAD_KEY).encode(),
    "an unknown kind": Record(8).encode(),
    "that something was placed": Record(PLACED, length=1).encode(),
    "kind 0": Record(0).encode(),
    "zeros": bytes(HEADER.size),
    "ones": b"\xff" * 100,
}
#: From one that has.
KNOWN = {
    "another session": Record(HELLO, flags=VERSION, match=40, id=8).encode(),
    "another endpoint": Record(HELLO, flags=VERSION, match=41, id=7).encode(),
    "a welcome unasked": Record(WELCOME, id=7).encode(),
    "a refusal unasked": Record(WELCOME, flags=BAD_KEY, id=7).encode(),
    "a message that is too long": Record(MESSAGE, data=bytes(EAGER + 1)).encode(),
    "a message of a mebibyte less a little": Record(MESSAGE, data=bytes(900_000)).encode(),
    "an announcement with bytes": Record(ANNOUNCE, length=5, data=b"x").encode(),
    "an announcement with an offset and no window": Record(ANNOUNCE, length=5, data=bytes(8)).encode(),
    "an announcement with a window and no offset": Record(ANNOUNCE, length=5, more=1).encode(),
    "an announcement with half an offset": Record(ANNOUNCE, length=5, more=1, data=bytes(4)).encode(),
    "an announcement with a window, an offset and more": Record(
        ANNOUNCE, length=5, more=1, data=bytes(9)
    ).encode(),
    "that nothing was placed": Record(PLACED, id=12345, length=1).encode(),
    "that the largest number was placed": Record(PLACED, id=2**32 - 1, length=2**32 - 1).encode(),
    "that bytes were placed": Record(PLACED, length=1, data=b"x").encode(),
    "a pull of nothing": Record(PULL, id=12345, length=1).encode(),
    "a pull with bytes": Record(PULL, data=b"x").encode(),
    "data for nobody": Record(DATA, id=12345, data=b"x").encode(),
    "data for the largest ticket": Record(DATA, id=2**32 - 1, match=2**32 - 1, data=b"x").encode(),
    "data at an offset that is no offset": Record(DATA, match=2**32, data=b"x").encode(),
    "less than a header": b"\x03",
    "a message with flags": Record(MESSAGE, flags=1).encode(),
    "a message with a reserved bit": Record(MESSAGE, reserved=1).encode(),
    "an unknown kind": Record(200).encode(),
}


@pytest.mark.parametrize("said", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_who_says_what_cannot_be_is_left(broker: PrivateBroker, said: bytes) -> None:
    with victim(broker) as (a, _, c), raw(c, a) as hostile:
        hostile.sock.send(said)
        hostile.ends()
        assert a.test_any() is None
        assert a.iprobe() is None


@pytest.mark.parametrize("said", KNOWN.values(), ids=KNOWN)
def test_a_peer_that_says_what_cannot_be_is_left(broker: PrivateBroker, said: bytes) -> None:
    with victim(broker) as (a, _, c), raw(c, a) as hostile:
        hostile.greet()
        place = bytearray(EAGER * 2)
        receive = a.irecv(0, place)
        hostile.sock.send(said)
        hostile.ends()
        assert receive.test() is None
        assert receive.cancel()
        assert place == bytes(EAGER * 2)
        assert a.iprobe() is None


@pytest.mark.parametrize(
    "wrong",
    [
        [Record(DATA, match=1, data=b"x")],
        [Record(DATA, match=2**32 - 1, data=b"x")],
        [Record(DATA)],
        [Record(DATA, data=bytes(1001))],
        [Record(DATA, data=b"x" * 600), Record(DATA, data=b"x" * 400)],
        [Record(DATA, data=b"x" * 600), Record(DATA, match=600, data=b"x" * 401)],
        [Record(DATA, data=b"x" * 600), Record(DATA, match=601, data=b"x" * 399)],
        [Record(PULL, length=1)],
    ],
)
def test_wrong_parts_end_the_receive_and_touch_nothing_else(
    broker: PrivateBroker, wrong: list[Record]
) -> None:
    with victim(broker) as (a, _, c), raw(c, a) as hostile:
        hostile.greet()
        place = bytearray(3000)
        receive = a.irecv(5, memoryview(place)[1000:2000])
        hostile.say(ANNOUNCE, match=5, length=5000, id=77)
        pull = hostile.hear()
        assert (pull.kind, pull.id, pull.length) == (PULL, 77, 1000)
        for record in wrong:
            record.id = pull.more
            hostile.sock.send(record.encode())
        hostile.ends()
        assert ended(receive).code is mx.Code.ENDPOINT_CLOSED
        assert place[:1000] == place[2000:] == bytes(1000)


def test_parts_over_another_lane_are_not_taken(broker: PrivateBroker) -> None:
    with victim(broker) as (a, _, c), raw(c, a) as owner, raw(c, a) as thief:
        owner.greet()
        thief.hello(41)
        assert thief.hear().kind == WELCOME
        place = bytearray(100)
        receive = a.irecv(5, place)
        owner.say(ANNOUNCE, match=5, length=100, id=1)
        pull = owner.hear()
        thief.say(DATA, b"x" * 100, id=pull.more)
        thief.ends()
        assert receive.test() is None
        assert place == bytes(100)
        owner.say(DATA, b"y" * 100, id=pull.more)
        assert fine(receive).transferred == 100
        assert place == b"y" * 100
        # Once more, of what has ended.
        owner.say(DATA, b"z" * 100, id=pull.more)
        owner.ends()
        assert place == b"y" * 100


@pytest.mark.parametrize("wrong", ["twice", "longer", "of a receive", "twice nothing"])
def test_a_wrong_pull_ends_the_send(broker: PrivateBroker, wrong: str) -> None:
    with victim(broker) as (a, _, c), raw(c, a) as hostile:
        hostile.greet()
        hostile.say(MESSAGE)
        peer = fine(a.irecv(0, None)).peer
        assert peer is not None
        receive = a.irecv(99, bytearray(1))
        # More than a lane holds, so that it is not done in between.
        length = 2**24
        request = a.isend(peer, 5, bytes(length))
        announced = hostile.hear()
        assert (announced.kind, announced.match, announced.length) == (ANNOUNCE, 5, length)
        if wrong == "longer":
            hostile.say(PULL, id=announced.id, length=length + 1, more=3)
        elif wrong == "of a receive":
            hostile.say(PULL, id=receive._id % 2**24 - 1, length=1, more=3)
        elif wrong == "twice":
            hostile.say(PULL, id=announced.id, length=length, more=3)
            hostile.say(PULL, id=announced.id, length=length, more=4)
        else:
            hostile.say(PULL, id=announced.id)
            hostile.say(PULL, id=announced.id)
        hostile.ends()
        code = ended(request).code
        assert code is (mx.Code.TRUNCATED if wrong == "twice nothing" else mx.Code.ENDPOINT_CLOSED)
        assert receive.cancel()


def test_a_stranger_cannot_pass_for_the_endpoint_itself(broker: PrivateBroker) -> None:
    """Of the same domain, as another program of it may be."""
    with victim(broker) as (a, node, _), raw(node, a) as hostile:
        hostile.hello(a.id, session=1)
        hostile.ends()
        request = a.isend(a.peer, 1, b"own")
        fine(a.irecv(1, bytearray(3)))
        fine(request)


def test_random_records_end_no_other_lane(broker: PrivateBroker) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    with victim(broker) as (a, _, c):
        place = bytearray(3000)
        receives = [a.irecv(n, memoryview(place)[1000:2000]) for n in range(4)]
        for _ in range(150):
            with raw(c, a) as hostile:
                hostile.greet()
                with contextlib.suppress(ConnectionError):
                    for _ in range(20):
                        record = Record(
                            chance.choice([HELLO, WELCOME, MESSAGE, ANNOUNCE, PULL, DATA, PLACED]),
                            flags=chance.randrange(3),
                            length=chance.choice([0, 1, 1000, 2**32 - 1]),
                            match=chance.randrange(6),
                            id=chance.choice([chance.randrange(8), 7]),
                            more=chance.randrange(8),
                            data=bytes(chance.choice([0, 1, 8, 999, EAGER, EAGER + 1])),
                        )
                        hostile.sock.send(record.encode())
        assert place[:1000] == place[2000:] == bytes(1000)
        for receive in receives:
            receive.forget()


def test_who_asks_again_and_again_without_listening_is_left(broker: PrivateBroker) -> None:
    with victim(broker) as (a, _, c), raw(c, a) as hostile:
        hostile.greet()
        with contextlib.suppress(ConnectionError):
            for _ in range(500_000):
                hostile.hello()
            raise AssertionError("it takes them all")


def test_a_peer_may_ask_for_thousands_before_it_takes_any(broker: PrivateBroker) -> None:
    count, length = 6000, EAGER + 1
    with victim(broker) as (a, _, c), raw(c, a) as slow:
        slow.greet()
        slow.say(MESSAGE)
        peer = fine(a.irecv(0, None)).peer
        assert peer is not None
        data = noise(length)
        requests = [a.isend(peer, 5, data) for _ in range(count)]
        ids = []
        for _ in requests:
            record = slow.hear()
            assert record.kind == ANNOUNCE
            ids.append(record.id)
        for id in ids:
            slow.say(PULL, id=id, length=length, more=id)
        left = {id: b"" for id in ids}
        while left:
            record = slow.hear()
            assert (record.kind, record.match) == (DATA, len(left[record.id]))
            left[record.id] += record.data
            if len(left[record.id]) == length:
                assert left.pop(record.id) == data
        for request in requests:
            fine(request)


def test_a_refused_key_can_be_followed_by_the_right_one(broker: PrivateBroker) -> None:
    node = isthmus.attach(broker.door("c"))
    with mx.Endpoint(key=5, node=isthmus.attach(broker.door("a"))) as a, raw(node, a) as peer:
        peer.hello(key=4)
        assert peer.hear().flags == BAD_KEY
        peer.hello(key=5)
        assert peer.hear().flags == 0
        peer.hello(key=4)
        assert peer.hear().flags == BAD_KEY
        peer.say(MESSAGE, b"x")
        fine(a.irecv(0, bytearray(1)))


# ---- who answers late, or not


@contextlib.contextmanager
def impostor(broker: PrivateBroker, endpoint: mx.Endpoint) -> Iterator[tuple[Raw, mx.Peer]]:
    """A listener in the place of endpoint 40 of c, to which an endpoint has connected."""
    node = isthmus.attach(broker.door("c"))
    with isthmus.create_server(PORT + 40, type=socket.SOCK_SEQPACKET, node=node) as listener:
        listener.settimeout(LIMIT_S)
        request = endpoint.iconnect("c", 40, key=3)
        with listener.accept()[0] as sock:
            peer = Raw(sock)
            said = peer.hear()
            assert (said.kind, said.flags, said.length, said.match) == (HELLO, VERSION, 3, endpoint.id)
            peer.say(WELCOME, id=9)
            to = fine(request).peer
            assert to is not None
            assert to.session == 9
            yield peer, to


def test_forgetting_a_peer_ends_connects_to_it(broker: PrivateBroker) -> None:
    with victim(broker) as (a, _, _), impostor(broker, a) as (_, to):
        request = a.iconnect("c", 40, key=3)
        a.disconnect(to)
        assert ended(request).code is mx.Code.ENDPOINT_UNREACHABLE


def test_an_answer_to_a_connect_that_was_taken_back_ends_nothing_else(broker: PrivateBroker) -> None:
    for flags in 0, BAD_KEY:
        with victim(broker) as (a, _, _), impostor(broker, a) as (peer, _):
            request = a.iconnect("c", 40, key=3)
            assert peer.hear().kind == HELLO
            assert request.cancel()
            # These have its number now.
            receives = [a.irecv(n, bytearray(1)) for n in range(10)]
            peer.say(WELCOME, flags=flags, id=9)
            peer.lives(9)
            assert [receive.test() for receive in receives] == [None] * 10
            for receive in receives:
                assert receive.cancel()


def test_a_lane_that_ends_before_the_answer_ends_the_connect(broker: PrivateBroker) -> None:
    with victim(broker) as (a, _, _), impostor(broker, a) as (peer, to):
        request = a.iconnect("c", 40, key=3)
        peer.sock.close()
        assert ended(request).code is mx.Code.ENDPOINT_CLOSED
        assert ended(a.isend(to, 1, b"x")).code is mx.Code.ENDPOINT_CLOSED


def test_a_message_before_the_answer_is_none(broker: PrivateBroker) -> None:
    node = isthmus.attach(broker.door("c"))
    with (
        victim(broker) as (a, _, _),
        isthmus.create_server(PORT + 40, type=socket.SOCK_SEQPACKET, node=node) as listener,
    ):
        listener.settimeout(LIMIT_S)
        request = a.iconnect("c", 40)
        with listener.accept()[0] as sock:
            peer = Raw(sock)
            peer.say(MESSAGE, b"x")
            peer.ends()
        assert ended(request).code is mx.Code.ENDPOINT_CLOSED
        assert a.iprobe() is None


def test_what_the_instance_before_left_in_its_lane_is_not_the_next_one_s(broker: PrivateBroker) -> None:
    """Whichever lane is looked at first."""
    with victim(broker) as (a, _, c), raw(c, a) as first, raw(c, a) as second:
        for one, session in (first, 1), (second, 2):
            one.hello(session=session)
            assert one.hear().kind == WELCOME
        first.ends()
        second.say(MESSAGE, b"new", match=1)
        place = bytearray(3)
        status = fine(a.irecv(1, place))
        assert place == b"new"
        assert status.peer is not None
        assert status.peer.session == 2


# ---- death


def lanes_now() -> int:
    """Lane memory of this process."""
    gc.collect()
    return lanes(os.getpid())


@pytest.fixture
def dying(broker: PrivateBroker) -> Iterator[subprocess.Popen[str]]:
    """A program of the domain c: it reads Python from us, line by line, and says what it prints."""
    environment = {
        **os.environ,
        "ISTHMUS_DOOR": broker.door("c"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    program = "import sys\nfor line in sys.stdin: exec(line)"
    command = [sys.executable, "-uc", program]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def tell(process: subprocess.Popen[str], *lines: str) -> None:
    """It does so, and we wait until it has."""
    assert process.stdin is not None
    assert process.stdout is not None
    for line in lines:
        process.stdin.write(line + "\n")
    process.stdin.write("print('done')\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"


CONNECT_RAW = (
    "import isthmus, socket",
    "from test_mx_faults import *",
    "sock = isthmus.create_connection(('a', PORT), 30, type=socket.SOCK_SEQPACKET)",
    "peer = Raw(sock).greet()",
)


def test_a_sender_that_dies_in_the_middle_ends_the_receive(
    broker: PrivateBroker, dying: subprocess.Popen[str]
) -> None:
    with mx.Endpoint(0, node=isthmus.attach(broker.door("a"))) as a:
        before = lanes_now()
        tell(dying, *CONNECT_RAW)
        place = bytearray(LONG)
        receive = a.irecv(5, place)
        tell(
            dying,
            f"peer.say(ANNOUNCE, match=5, length={LONG}, id=1)",
            "pull = peer.hear()",
            "peer.say(DATA, b'x' * 60_000, id=pull.more)",
        )
        becomes(lambda: place[59_999] == ord("x"))
        assert receive.test() is None
        dying.send_signal(signal.SIGKILL)
        status = ended(receive)
        assert (status.code, status.length, status.match) == (mx.Code.ENDPOINT_CLOSED, LONG, 5)
        becomes(lambda: lanes_now() <= before, "memory of the lane is left")
        # The buffer is ours again.
        place.clear()


def test_a_receiver_that_dies_in_the_middle_ends_the_send(
    broker: PrivateBroker, dying: subprocess.Popen[str]
) -> None:
    with mx.Endpoint(0, node=isthmus.attach(broker.door("a"))) as a:
        before = lanes_now()
        tell(dying, *CONNECT_RAW, "peer.say(MESSAGE)")
        peer = fine(a.irecv(0, None)).peer
        assert peer is not None
        data = bytearray(2**24)
        requests = [a.isend(peer, n, data) for n in range(3)]
        # The first fills the lane, the second was never asked for, and behind them short ones wait.
        tell(dying, "said = peer.hear()", "peer.say(PULL, id=said.id, length=said.length)", "peer.hear()")
        requests += [a.isend(peer, 9, bytes(EAGER)) for _ in range(1000)]
        dying.send_signal(signal.SIGKILL)
        codes = [ended(request).code for request in requests]
        assert codes[:3] == [mx.Code.ENDPOINT_CLOSED] * 3
        assert set(codes[3:]) <= {mx.Code.ENDPOINT_CLOSED, mx.Code.SUCCESS}
        becomes(lambda: lanes_now() <= before, "memory of the lane is left")
        data.clear()
        assert ended(a.isend(peer, 1, b"x")).code is mx.Code.ENDPOINT_CLOSED


def test_programs_that_die_at_any_moment_leave_the_other_whole(broker: PrivateBroker) -> None:
    """It is killed while 16 MiB go one way and 16 MiB the other."""
    program = (
        "from isthmus import mx\n"
        "a = mx.Endpoint()\n"
        "to = a.connect('a', 0)\n"
        "place = bytearray(1 << 24)\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    one, other = a.irecv(2, place), a.isend(to, 1, bytes(1 << 24))\n"
        "    one.wait(), other.wait()\n"
    )
    environment = {**os.environ, "ISTHMUS_DOOR": broker.door("c")}
    chance = random.Random(4)
    with mx.Endpoint(0, node=isthmus.attach(broker.door("a"))) as a:
        before = lanes_now()
        for _ in range(6):
            command = [sys.executable, "-c", program]
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                process.stdout.readline()
                end = time.monotonic() + chance.random() / 20
                data, code = bytes(2**24), mx.Code.SUCCESS
                place = bytearray(2**24)
                while code is mx.Code.SUCCESS and process.poll() is None:
                    if time.monotonic() > end:
                        process.kill()
                    receive = a.irecv(1, place)
                    while (status := receive.wait(0.01)) is None and process.poll() is None:
                        pass
                    # It may have died before it sent anything.
                    if status is None and receive.cancel():
                        break
                    status = ended(receive)
                    code = status.code
                    if code is mx.Code.SUCCESS:
                        assert status.peer is not None
                        code = ended(a.isend(status.peer, 2, data)).code
                assert code in (mx.Code.SUCCESS, mx.Code.ENDPOINT_CLOSED)
                process.kill()
            becomes(lambda: lanes_now() <= before, "memory of the lane is left")


def test_a_program_that_ends_in_order_has_sent_what_it_sent(
    broker: PrivateBroker, dying: subprocess.Popen[str]
) -> None:
    with mx.Endpoint(0, node=isthmus.attach(broker.door("a"))) as a:
        tell(
            dying,
            "from isthmus import mx",
            "end = mx.Endpoint()",
            "to = end.connect('a', 0)",
            "requests = [end.isend(to, n, bytes([n]) * 30_000) for n in range(200)]",
        )
        assert dying.stdin is not None
        dying.stdin.write("end.close(); sys.exit()\n")
        dying.stdin.flush()
        place = bytearray(30_000)
        for n in range(200):
            fine(a.irecv(n, place))
            assert place == bytes([n]) * 30_000


def test_a_lane_that_is_cut_ends_what_is_under_way() -> None:
    with PrivateBroker(("a", "b", "c"), policy=rules("accept")) as broker, joined(broker) as (a, _, _):
        node = isthmus.attach(broker.door("c"))
        with raw(node, a) as peer:
            peer.greet()
            receive, untouched = a.irecv(1, bytearray(LONG)), a.irecv(2, bytearray(1))
            peer.say(ANNOUNCE, match=1, length=LONG, id=1)
            assert peer.hear().kind == PULL
            broker.policy_file.write_text(rules("refuse"))
            broker.ask("reload")
            assert ended(receive).code is mx.Code.ENDPOINT_CLOSED
            assert untouched.test() is None


def test_lanes_outlive_the_broker(broker: PrivateBroker) -> None:
    with PrivateBroker(("a", "b")) as own, joined(own) as (a, b, to_a):
        own.kill()
        place = bytearray(LONG)
        receive, request = a.irecv(1, place), b.isend(to_a, 1, noise(LONG))
        fine(receive)
        fine(request)
        assert place == noise(LONG)
        with pytest.raises(errors.IsthmusError):
            b.connect("a", 7, timeout=LIMIT_S)
        own.start()
        with fails(33):
            becomes(lambda: isthmus.attach(own.door("b")).attached)
            b.connect("a", 7, timeout=LIMIT_S)


# An endpoint that accepts nobody until it is told to.
LATE = """
import ctypes, sys
from isthmus.cli.mx import MYRIEXPRESS
mx = ctypes.CDLL(str(MYRIEXPRESS / "lib" / "libmyriexpress.so"))
endpoint = ctypes.c_void_p()
assert mx.mx__init_api(0x301) == 0
assert mx.mx_open_endpoint(ctypes.c_uint32(-1), 3, 7, None, 0, ctypes.byref(endpoint)) == 0
assert mx.mx_disable_progression(endpoint) == 0
print("open", flush=True)
sys.stdin.readline()
assert mx.mx_reenable_progression(endpoint) == 0
print("awake", flush=True)
sys.stdin.readline()
"""


def test_who_connects_while_the_broker_is_gone_is_met_when_it_is_back() -> None:
    """Nobody else knows which card a domain has that was never heard of."""
    with PrivateBroker(("a", "b")) as own, mx.Endpoint(node=isthmus.attach(own.door("a"))) as a:
        environment = os.environ | {"ISTHMUS_DOOR": own.door("b")}
        command = [sys.executable, "-c", LATE]
        with started(command, env=environment, stdin=subprocess.PIPE) as late:
            assert late.stdin is not None
            assert late.stdout is not None
            assert late.stdout.readline() == "open\n"
            connect = a.iconnect("b", 3, 7)

            def is_open() -> bool:
                connections = own.ask("status", domain="b")["domain"]["connections"]
                return [one["state"] for one in connections] == ["open"]

            becomes(is_open)
            own.kill()
            late.stdin.write("accept\n")
            late.stdin.flush()
            assert late.stdout.readline() == "awake\n"
            assert connect.test() is None
            own.start()
            fine(connect)
            late.stdin.close()


# ---- fork


def end_in_time() -> None:
    """Whatever this process hangs in."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S / 2)


def test_a_fork_has_no_endpoint_and_disturbs_none(broker: PrivateBroker) -> None:
    with joined(broker) as (a, b, to_a):
        receive = a.irecv(1, bytearray(5))
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            said = "nothing"
            try:
                end_in_time()
                calls: list[Callable[[], object]] = [
                    lambda: b.isend(to_a, 1, b"child"),
                    lambda: a.irecv(1, bytearray(1)),
                    receive.test,
                    lambda: receive.wait(1),
                    lambda: a.wait_any(timeout=1),
                    lambda: a.probe(timeout=1),
                    lambda: a.peek(1),
                    lambda: b.connect(a.nic, a.id),
                    lambda: b.disconnect(to_a),
                    receive.cancel,
                    receive.forget,
                    lambda: a.has_card,
                    lambda: a.peer,
                ]
                said = ""
                for call in calls:
                    try:
                        call()
                    except errors.Forked:
                        said += "F"
                a.wake_up()
                a.close()
                b.__exit__()
                del a, b, receive, calls
                gc.collect()
                said += " closed"
            except BaseException as error:
                said += repr(error)
            finally:
                os.write(writing, said.encode())
                os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(reading, 1000) == b"F" * 13 + b" closed"
        os.close(reading)
        os.close(writing)
        fine(b.isend(to_a, 1, b"alive"))
        fine(receive)


def test_a_child_of_fork_may_open_its_own(broker: PrivateBroker) -> None:
    with joined(broker) as (a, _, _):
        number = a.id
        pid = os.fork()
        if pid == 0:
            try:
                end_in_time()
                with mx.Endpoint(node=isthmus.attach(broker.door("b"))) as own:
                    fine(own.isend(own.connect("a", number, timeout=LIMIT_S), 4, b"child"))
            finally:
                os._exit(0)
        place = bytearray(5)
        fine(a.irecv(4, place))
        assert place == b"child"
        os.waitpid(pid, 0)
