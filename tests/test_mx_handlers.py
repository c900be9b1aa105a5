"""Unexpected handlers of C programs, and senders that go while a message is shown."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from conftest import becomes, started
from endpoints import fine
from test_death import lanes
from test_mx_faults import ANNOUNCE, PORT, Raw

import isthmus
from isthmus import mx
from isthmus.testing import PrivateBroker

# Shows each message to a handler, which waits for a line; then looks for it, and says what it found.
VICTIM = """
import ctypes, sys, time
from isthmus.cli.mx import MYRIEXPRESS
mx = ctypes.CDLL(str(MYRIEXPRESS / "lib" / "libmyriexpress.so"))
class Address(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint64 * 2)]
class Status(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint32), ("source", Address), ("match", ctypes.c_uint64),
                ("length", ctypes.c_uint32), ("transferred", ctypes.c_uint32), ("context", ctypes.c_void_p)]
Handler = ctypes.CFUNCTYPE(
    ctypes.c_uint32, ctypes.c_void_p, Address, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p
)
endpoint, shown = ctypes.c_void_p(), []
assert mx.mx__init_api(0x301) == 0
assert mx.mx_open_endpoint(ctypes.c_uint32(-1), 0, 0, None, 0, ctypes.byref(endpoint)) == 0
def handle(context, source, match, length, data):
    print("shown", match, flush=True)
    if sys.stdin.readline() == "disconnect\\n":
        assert mx.mx_disconnect(endpoint, source) == 0
    shown.append(match)
    return 0
handler = Handler(handle)
assert mx.mx_register_unexp_handler(endpoint, handler, None) == 0
print("open", flush=True)
while True:
    while not shown:
        mx.mx_progress(endpoint)
        time.sleep(0.001)
    status, found = Status(), ctypes.c_uint32()
    match = ctypes.c_uint64(shown.pop())
    assert mx.mx_iprobe(endpoint, match, ctypes.c_uint64(-1), ctypes.byref(status), ctypes.byref(found)) == 0
    print("found", found.value, flush=True)
"""


@pytest.mark.parametrize("how", ["disconnect", "close"])
def test_a_message_whose_sender_goes_while_it_is_shown_is_void(how: str) -> None:
    """It was announced and not sent: whoever has the sender's lane next would be asked for it."""
    with PrivateBroker(("a", "b", "c")) as broker:
        environment = os.environ | {"ISTHMUS_DOOR": broker.door("a")}
        with started([sys.executable, "-c", VICTIM], env=environment, stdin=subprocess.PIPE) as victim:
            assert victim.stdin is not None
            assert victim.stdout is not None
            assert victim.stdout.readline() == "open\n"
            node = isthmus.attach(broker.door("c"))
            sock = isthmus.create_connection(("a", PORT), 60, type=socket.SOCK_SEQPACKET, node=node)
            stranger = Raw(sock).greet()
            stranger.say(ANNOUNCE, match=0x11, length=120_000, id=0)
            assert victim.stdout.readline() == f"shown {0x11}\n"
            if how == "close":
                sock.close()
                becomes(lambda: lanes(victim.pid) == 0, "the lane does not end")
            victim.stdin.write(f"{how}\n")
            victim.stdin.flush()
            assert victim.stdout.readline() == "found 0\n"
            # Somebody else is not taken for him.
            with mx.Endpoint(node=isthmus.attach(broker.door("b"))) as other:
                request = other.isend(other.connect("a", 0, timeout=60), 0x22, b"x" * 100)
                fine(request)
                assert victim.stdout.readline() == f"shown {0x22}\n"
                victim.stdin.write("go on\n")
                victim.stdin.flush()
                assert victim.stdout.readline() == "found 1\n"
            sock.close()
