"""A tenant that does its worst, with the descriptors that a real tenant has.

    python tenant.py ATTACK DOOR [PARTNER]

It speaks the control protocol itself and writes its lanes itself; of Isthmus it uses the codec alone. Each
attack is a function below. Attacks that end print ``done`` and what they found; the others go on until they
are killed. Before that, all print ``ready`` when the worst of it is under way.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import json
import mmap
import os
import random
import socket
import struct
import sys
import threading
from array import array
from collections.abc import Callable
from typing import Any

from isthmus._native import ANYBODY, CONTROL_MESSAGE_MAX, CONTROL_VERSION, control_decode, control_encode

# The layout of a lane, as docs/formats/lane.md has it.
CREDIT, CREDIT_CHECK, ARM_DATA, ARM_SPACE, FIN, RECEIVE_STATE = 64, 72, 128, 132, 192, 200
SMALL_AT = 64 * 1024
SMALL = 64 * 1024
SIZE = SMALL_AT + SMALL
STREAM, MESSAGE, SKIP, GROW = 1, 2, 3, 4

F_ADD_SEALS = 1033
SEAL, SHRINK, GROW_SEAL, WRITE, FUTURE_WRITE = 1, 2, 4, 8, 0x10
SIZE_SEALS = SEAL | SHRINK | GROW_SEAL
ALL = (1 << 64) - 1


def say(word: str, **facts: Any) -> None:
    print(json.dumps({"event": word, **facts}), flush=True)


def word(value: int) -> bytes:
    return struct.pack("<Q", value & ALL)


def header(kind: int, length: int, trailer: bool = False, reserved: int = 0) -> bytes:
    return struct.pack("<IBBH", length, kind, trailer, reserved)


class Control:
    """The socket to the broker."""

    def __init__(self, door: str, *, hello: bool = True) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        directory = os.open(os.path.dirname(door), os.O_RDONLY | os.O_DIRECTORY)
        self.sock.connect(f"/proc/self/fd/{directory}/{os.path.basename(door)}")
        os.close(directory)
        self.request = 0
        if hello:
            self.ask("hello", features=0, program="hostile")

    def raw(self, packet: bytes, fds: list[int] | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        self.sock.sendmsg([packet], rights)

    def send(self, kind_: str, fds: list[int] | None = None, /, **fields: Any) -> int:
        self.request += 1
        self.raw(control_encode(kind_, self.request, **fields), fds)
        return self.request

    def receive(self) -> tuple[str, int, dict[str, Any], list[int]]:
        data, ancillary, _, _ = self.sock.recvmsg(CONTROL_MESSAGE_MAX, socket.CMSG_SPACE(64))
        fds = array("i")
        for _, _, content in ancillary:
            fds.frombytes(content)
        if not data:
            raise ConnectionResetError("the broker hung up")
        kind, request, fields = control_decode(data)
        return kind, request, fields, fds.tolist()

    def ask(
        self, kind_: str, fds: list[int] | None = None, /, **fields: Any
    ) -> tuple[dict[str, Any], list[int]]:
        return self.wait(self.send(kind_, fds, **fields))

    def wait(self, number: int) -> tuple[dict[str, Any], list[int]]:
        while True:
            kind, request, answer, got = self.receive()
            if request == number:
                if kind == "refused":
                    raise PermissionError(answer["refusal"])
                return answer, got


class Lane:
    """Both directions of a connection, as a hostile end holds them."""

    def __init__(self, carrier: str, seals: int | None = None) -> None:
        self.carrier = carrier
        fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(fd, SIZE)
        #: What this end owns: with `sealed` its peer reads it, with `put` its peer writes it.
        self.own = mmap.mmap(fd, SIZE)
        sealed = carrier == "sealed"
        wanted = SIZE_SEALS | FUTURE_WRITE if sealed else SIZE_SEALS
        fcntl.fcntl(fd, F_ADD_SEALS, wanted if seals is None else seals)
        self.fds = [os.open(f"/proc/self/fd/{fd}", os.O_RDONLY if sealed else os.O_WRONLY)]
        os.close(fd)
        if not sealed:
            page = os.memfd_create("page", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
            os.ftruncate(page, 4096)
            fcntl.fcntl(page, F_ADD_SEALS, SIZE_SEALS | FUTURE_WRITE)
            self.fds.append(os.open(f"/proc/self/fd/{page}", os.O_RDONLY))
            os.close(page)
        self.secret = 0
        self.theirs = -1
        self.bell: socket.socket | None = None

    def join(self, secret: int, fds: list[int]) -> Lane:
        self.secret = secret | 1
        self.theirs, bell = fds
        self.bell = socket.socket(fileno=bell)
        self.bell.setblocking(False)
        return self

    def write(self, at: int, data: bytes) -> None:
        """Where the peer reads."""
        data = data[: SIZE - at]
        if self.carrier == "sealed":
            self.own[at : at + len(data)] = data
        else:
            os.pwrite(self.theirs, data, at)

    def commit(self, position: int) -> bytes:
        return word(self.secret + position)

    def record(self, position: int, kind: int, payload: bytes, length: int | None = None) -> None:
        """A record, with a length that may be a lie."""
        length = len(payload) if length is None else length
        at = SMALL_AT + position % SMALL
        put = self.carrier == "put"
        lead = 16 if length <= 1024 else 64
        self.write(at + lead, payload[: SMALL - lead])
        self.write(at + 8, header(kind, length, put))
        if put and lead + length + 8 <= SMALL:
            self.write(at + (lead + length + 7 & ~7), word(~(self.secret + position)))
        self.write(at, self.commit(position))

    def credit(self, position: int) -> None:
        self.write(CREDIT, word(position))
        self.write(CREDIT_CHECK, word((position & ALL) ^ self.secret))

    def ring(self) -> None:
        if self.bell is not None:
            with contextlib.suppress(OSError):
                self.bell.send(b"\x01")


def connect(
    door: str, partner: str, *, carrier: str = "sealed", lane: Lane | None = None
) -> tuple[Control, Lane]:
    """A connection to the partner's port 7, of which both ends know that it is there."""
    control = Control(door)
    lane = lane or Lane(carrier)
    answer, fds = control.ask(
        "connect", lane.fds, to=partner, to_port=7, from_port=0, kind="stream", carrier=carrier, require=1,
        small=SMALL, large=0,
    )  # fmt: skip
    return control, lane.join(answer["secret"], fds)


# ---- against the broker


def garbage(door: str, _: str) -> None:
    """Random packets with random descriptors, from one attachment after the other."""
    rng = random.Random(7)
    kinds = range(24)
    strange = [os.open("/dev/null", os.O_RDWR), *os.pipe(), os.memfd_create("x"), socket.socket().detach()]
    for turn in itertools.count():
        if turn == 20:
            say("ready")
        with contextlib.suppress(OSError, PermissionError):
            control = Control(door, hello=turn % 3 > 0)
            for _ in range(30):
                body = rng.randbytes(rng.choice([0, 4, 11, 40, 300]))
                packet = struct.pack("<BBHII", CONTROL_VERSION, rng.choice(kinds), 0, 1, len(body)) + body
                if rng.random() < 0.3:
                    packet = rng.randbytes(rng.randrange(200))
                control.raw(packet, rng.sample(strange, rng.randrange(4)))


def too_many_descriptors(door: str, _: str) -> None:
    """As many descriptors beside a packet as the kernel lets pass."""
    fds = [os.memfd_create("x") for _ in range(100)]
    for turn in itertools.count():
        if turn == 20:
            say("ready")
        with contextlib.suppress(OSError, PermissionError):
            control = Control(door)
            for count in (4, 100, 250):
                control.raw(control_encode("resolve", 1, name="good"), (fds * 3)[:count])


def flood(door: str, _: str) -> None:
    """Questions without end; the answers are read and thrown away."""
    control = Control(door)

    def read() -> None:
        with contextlib.suppress(OSError):
            while control.sock.recv(65_536):
                pass

    threading.Thread(target=read, daemon=True).start()
    packet = control_encode("resolve", 1, name="good")
    for turn in itertools.count():
        if turn == 2000:
            say("ready")
        control.raw(packet)


def deaf(door: str, _: str) -> None:
    """Questions without end, and no answer is ever read."""
    packet = control_encode("status", 1, offset=0)
    for turn in itertools.count():
        control = Control(door)
        control.sock.settimeout(1.0)
        with contextlib.suppress(OSError):
            for _ in range(100_000):
                control.raw(packet)
        # The broker hung up, or reads no further either.
        if turn == 0:
            say("ready")


def hoard(door: str, partner: str) -> None:
    """Everything that can be had: attachments, ports, connections to itself and to others."""
    counts = {"attachments": 0, "ports": 0, "connections": 0, "pending": 0}
    first, second = Control(door), Control(door)
    lane = Lane("sealed")
    held: list[Any] = []

    def connect(to: str, port: int) -> int:
        return first.send(
            "connect", lane.fds, to=to, to_port=port, from_port=0, kind="stream", carrier="sealed",
            require=0, small=SMALL, large=0,
        )  # fmt: skip

    with contextlib.suppress(OSError):
        while True:
            second.ask("bind", port=0, kind="stream", partner=ANYBODY, backlog=(1 << 32) - 1)
            counts["ports"] += 1
    with contextlib.suppress(OSError):
        # Each with a bell of its own, or the connection would be over.
        while counts["connections"] < 3000:
            held.append(first.wait(connect(partner, 7)))
            counts["connections"] += 1
    for _ in range(1000):
        # Nobody answers at the ports above.
        connect("hostile", 0x8000_0000)
        counts["pending"] += 1
    with contextlib.suppress(OSError):
        while True:
            held.append(Control(door))
            counts["attachments"] += 1
    say("ready", **counts)
    threading.Event().wait()


def never_answers(door: str, _: str) -> None:
    """Listens, and leaves every `incoming` without an answer."""
    control = Control(door)
    control.ask("bind", port=7, kind="stream", partner=ANYBODY, backlog=100)
    say("ready")
    while True:
        control.receive()


def answers_wrongly(door: str, _: str) -> None:
    """Listens, and accepts with lanes that are none."""
    control = Control(door)
    control.ask("bind", port=7, kind="stream", partner=ANYBODY, backlog=100)
    say("ready")
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, SIZE)
    wrong: list[list[int]] = [
        [],
        [os.open("/dev/null", os.O_RDONLY)],
        [unsealed],
        Lane("sealed", seals=SIZE_SEALS).fds,
        Lane("put").fds,
        Lane("sealed").fds * 3,
    ]
    for turn in itertools.count():
        while True:
            kind, _, fields, _ = control.receive()
            if kind == "incoming":
                break
        with contextlib.suppress(OSError):
            control.send(
                "accept", wrong[turn % len(wrong)], connection=fields["connection"], small=SMALL, large=0
            )


# ---- against a partner


def scribble(door: str, partner: str, carrier: str = "sealed") -> None:
    """Random words over everything that it may write, whatever the partner makes of it."""
    rng = random.Random(11)
    for turn in itertools.count():
        if turn == 8:
            say("ready")
        control, lane = connect(door, partner, carrier=carrier)
        lane.record(0, STREAM, b"x" * 100)
        for _ in range(400):
            position = rng.randrange(0, SMALL, 64)
            aim = rng.randrange(4)
            if aim == 0:
                lane.write(rng.randrange(0, 512, 8), word(rng.getrandbits(64)))
            elif aim == 1:
                lane.write(SMALL_AT + position, lane.commit(position) + word(rng.getrandbits(64)))
            elif aim == 2:
                lane.record(
                    position,
                    rng.randrange(6),
                    rng.randbytes(60),
                    rng.choice([0, 5, 60, SMALL, (1 << 32) - 1]),
                )
            else:
                lane.write(SMALL_AT + rng.randrange(0, SMALL - 4096, 8), rng.randbytes(4096))
            lane.ring()
        control.sock.close()


def scribble_put(door: str, partner: str) -> None:
    """The same where the lane is the partner's own memory."""
    scribble(door, partner, "put")


def lies_about_lengths(door: str, partner: str) -> None:
    """Each record that cannot be, alone at the front of a lane."""
    for turn in itertools.count():
        if turn == 3:
            say("ready")
        for kind, length in [
            (STREAM, (1 << 32) - 1),
            (STREAM, SMALL),
            (STREAM, SMALL - 63),
            (MESSAGE, 10),
            (GROW, 0),
            (0, 10),
            (77, 10),
        ]:
            control, lane = connect(door, partner)
            lane.record(0, kind, b"lies", length)
            lane.ring()
            control.sock.close()


def rewinds(door: str, partner: str) -> None:
    """Credit that jumps ahead, goes back, and is never given; ends that are none."""
    for turn in itertools.count():
        control, lane = connect(door, partner)
        lane.record(0, STREAM, b"talk to me")
        lane.ring()
        for credit in (1 << 40, 0, 64, ALL, 1 << 63, SMALL, 0):
            lane.credit(credit)
            lane.write(ARM_SPACE, struct.pack("<I", credit & 0xFFFFFFFF))
            lane.write(FIN, word(credit))
            lane.ring()
        if turn == 3:
            say("ready")
        if turn % 2:
            lane.write(RECEIVE_STATE, struct.pack("<I", 0xDEAD))
        control.sock.close()


def endless_nothing(door: str, partner: str) -> None:
    """A ringful of records that carry nothing."""
    _, lane = connect(door, partner)
    for position in range(0, SMALL, 64):
        lane.record(position, STREAM, b"")
    lane.ring()
    say("ready")
    threading.Event().wait()


def half_a_record(door: str, partner: str) -> None:
    """A record of which only the beginning is ever written, and then death."""
    for turn in itertools.count():
        control, lane = connect(door, partner, carrier="put")
        os.pwrite(lane.theirs, lane.commit(0) + header(STREAM, 1000, True), SMALL_AT)
        lane.ring()
        control.sock.close()
        if turn == 3:
            say("ready")


def endless_bell(door: str, partner: str) -> None:
    """The bell, without end."""
    control, lane = connect(door, partner)
    assert lane.bell is not None
    say("ready")
    while True:
        with contextlib.suppress(BlockingIOError):
            lane.bell.send(b"\x01" * 65_536)
        control.sock.setblocking(True)


def never_reads(door: str, partner: str) -> None:
    """A lane that its partner fills and nobody empties."""
    _, lane = connect(door, partner)
    lane.record(0, STREAM, b"talk to me")
    lane.ring()
    say("ready")
    threading.Event().wait()


def closes_bells(door: str, partner: str) -> None:
    """Connections whose bell is closed at once, with the broker left in the belief that they live."""
    held = []
    for turn in itertools.count():
        control, lane = connect(door, partner)
        assert lane.bell is not None
        lane.bell.close()
        held.append(control)
        if turn == 5:
            say("ready")
        if len(held) > 20:
            held.pop(0).sock.close()


# ---- with its descriptors


def attempts(fd: int) -> dict[str, str]:
    """Everything that could change a file through one descriptor, and what became of it."""

    def call(what: Callable[[], Any]) -> str:
        try:
            what()
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "done"

    def punch() -> None:
        keep_size_and_punch = 3
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(fd, keep_size_and_punch, ctypes.c_long(0), ctypes.c_long(4096)) != 0:
            raise OSError(ctypes.get_errno(), "fallocate")

    return {
        "write": call(lambda: os.write(fd, b"x")),
        "pwrite": call(lambda: os.pwrite(fd, b"x", SMALL_AT)),
        "truncate": call(lambda: os.ftruncate(fd, 0)),
        "shrink": call(lambda: os.ftruncate(fd, 4096)),
        "grow": call(lambda: os.ftruncate(fd, 1 << 30)),
        "punch": call(punch),
        "seal": call(lambda: fcntl.fcntl(fd, F_ADD_SEALS, WRITE)),
        "map": call(lambda: mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()),
        "read": call(lambda: os.pread(fd, 1, 0)),
    }


def descriptors(door: str, partner: str) -> None:
    """All of this through every descriptor of both carriers, and through each opened again."""
    report: dict[str, dict[str, str]] = {}
    held = []
    for carrier in ("sealed", "put"):
        control, lane = connect(
            door, partner if carrier == "sealed" else f"strict-{partner}", carrier=carrier
        )
        held.append((control, lane))
        lane.record(0, STREAM, b"still here")
        lane.ring()
        report[f"{carrier} given"] = attempts(lane.theirs)
        for name, flags in {
            "r": os.O_RDONLY,
            "w": os.O_WRONLY,
            "rw": os.O_RDWR,
            "rwt": os.O_RDWR | os.O_TRUNC,
        }.items():
            try:
                again = os.open(f"/proc/self/fd/{lane.theirs}", flags)
            except OSError as error:
                report[f"{carrier} {name}"] = {"open": os.strerror(error.errno or 0)}
                continue
            report[f"{carrier} {name}"] = attempts(again)
            os.close(again)
    say("done", report=report)
    threading.Event().wait()


ATTACKS: dict[str, Callable[[str, str], None]] = {
    attack.__name__: attack
    for attack in (
        garbage, too_many_descriptors, flood, deaf, hoard, never_answers, answers_wrongly, scribble,
        scribble_put, lies_about_lengths, rewinds, endless_nothing, half_a_record, endless_bell, never_reads,
        closes_bells, descriptors,
    )
}  # fmt: skip

if __name__ == "__main__":
    ATTACKS[sys.argv[1]](sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "")
