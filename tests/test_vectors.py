"""vectors/record.txt, made again from docs/formats/lane.md and found again in the rings of connections."""

from __future__ import annotations

import ctypes
import socket
import struct
from pathlib import Path

import pytest

import isthmus
from isthmus.testing import PrivateBroker

GOLDEN = Path(__file__).resolve().parent.parent / "vectors" / "record.txt"
KINDS = {"stream": 1, "message": 2, "skip": 3, "grow": 4}
LENGTHS = (0, 5, 48, 1024, 1025)
SECRET, POSITION = 0x0123456789ABCDEF, 640
U64 = 2**64 - 1


def trailer(commit: int, made: bytes, length: int) -> int:
    if length > 256:
        return ~commit & U64
    factor, total = ((commit << 32 | commit >> 32) & U64) | 1, commit
    for (word,) in struct.iter_unpack("<Q", made[8:]):
        product = (total ^ word) * factor
        total = (product & U64) ^ (product >> 64)
    return ~total & U64


def record(carrier: str, kind: str, length: int, commit: int) -> bytes:
    """A record as docs/formats/lane.md draws it, in a fresh ring."""
    put = carrier == "put"
    payload = bytes(i * 7 % 251 for i in range(length))
    made = struct.pack("<QIBBH", commit, length, KINDS[kind], put, 0)
    made += bytes((16 if length <= 1024 else 64) - len(made)) + payload
    if put:
        made += bytes(-len(made) % 8)
        made += struct.pack("<Q", trailer(commit, made, length))
    return made + bytes(-len(made) % 64)


def golden() -> dict[str, bytes]:
    lines = [line for line in GOLDEN.read_text().splitlines() if line and not line.startswith("#")]
    return {name: bytes.fromhex(data) for name, data in (line.rsplit(" ", 1) for line in lines)}


def test_the_golden_records_are_those_of_the_page() -> None:
    commit = SECRET + POSITION
    cases = [(kind, length) for kind in ("stream", "message") for length in LENGTHS]
    cases += [("skip", 0), ("grow", 0)]
    made = {f"{c} {k} {n}": record(c, k, n, commit) for c in ("sealed", "put") for k, n in cases}
    assert golden() == made


@pytest.mark.parametrize("carrier", ["sealed", "put"])
@pytest.mark.parametrize("kind", ["stream", "message"])
def test_real_lanes_hold_the_golden_records(carrier: str, kind: str) -> None:
    """All but the commit, which holds a secret: that one is compared from record to record."""
    strict = "strict = true" if carrier == "put" else ""
    policy = f'[[rule]]\nfrom = "*"\nto = "*"\naction = "accept"\n{strict}\n'
    kind_of_socket = socket.SOCK_STREAM if kind == "stream" else socket.SOCK_SEQPACKET
    records = golden()
    with (
        PrivateBroker(["a"], policy) as broker,
        isthmus.attach(broker.door("a")) as node,
        isthmus.create_server(0, type=kind_of_socket, node=node) as listener,
        isthmus.create_connection(listener.getsockname(), type=kind_of_socket, node=node) as sender,
        listener.accept()[0] as receiver,
    ):
        assert receiver.path == carrier
        assert receiver.connection is not None
        first, position = None, 0
        for length in LENGTHS[1:] if kind == "stream" else LENGTHS:
            expected = records[f"{carrier} {kind} {length}"]
            sender.send(bytes(i * 7 % 251 for i in range(length)))
            front = receiver.connection.front(5.0)
            assert front is not None
            address = front[0] - (16 if length <= 1024 else 64)
            found = ctypes.string_at(address, len(expected))
            receiver.connection.release_front()
            commit = int.from_bytes(found[:8], "little")
            first = commit if first is None else first
            assert (commit - first) & U64 == position
            position += len(expected)
            assert found == record(carrier, kind, length, commit)
