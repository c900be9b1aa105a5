"""What the switch can still do once it serves, should a guest take it over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import becomes
from guests import switch_of

from isthmus.testing import PrivateBroker

#: Runs inside the sandbox: the switch asks it whether to stop.
TRY = """
import ctypes, json, mmap, os, signal, socket, sys
from isthmus import _native

libc = ctypes.CDLL(None, use_errno=True)
listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listener.bind(sys.argv[1] + "/switch")
listener.listen()
listener.setblocking(False)
secret = open(sys.argv[1] + "/secret", "w+")
mine = os.getpid()
PROCESS_VM_READV, BPF = (310, 321) if os.uname().machine == "x86_64" else (270, 280)

def raw(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

ATTEMPTS = {
    "read a file": lambda: open(sys.argv[1] + "/secret"),
    "read a directory": lambda: os.listdir(sys.argv[1]),
    "write a file": lambda: open(sys.argv[1] + "/made", "w"),
    "remove a file": lambda: os.unlink(sys.argv[1] + "/secret"),
    "another program": lambda: os.execv("/bin/true", ["true"]),
    "another process": lambda: os.fork(),
    "a network": lambda: socket.socket(socket.AF_INET),
    "kernel messages": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    "a signal": lambda: os.kill(os.getppid(), signal.SIGTERM),
    "memory to execute": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
    "another's memory": lambda: raw(PROCESS_VM_READV, os.getppid(), 0, 0, 0, 0, 0),
    "mount": lambda: libc.mount(b"none", b"/mnt", b"tmpfs", 0, None) and raw(-1),
    "another user": lambda: os.setuid(1000),
    "io_uring": lambda: raw(425, 1, 0),
    "bpf": lambda: raw(BPF, 0, 0, 0),
}
found = {}

def stop():
    for name, attempt in ATTEMPTS.items():
        try:
            attempt()
            found[name] = "done"
        except OSError as error:
            found[name] = type(error).__name__
    # What it needs still works.
    ours, theirs = socket.socketpair()
    ours.send(b"x")
    os.memfd_create("x")
    return True

_native.run_switch(listener.detach(), True, sys.argv[2] == "confined", 0.0, stop)
assert os.getpid() == mine
print(json.dumps(found))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="root has the most to lose")
def test_a_switch_that_was_taken_over_can_do_little(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRY, str(tmp_path), "confined"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 15
    assert {name: what for name, what in found.items() if what != "PermissionError"} == {}
    assert set(os.listdir(tmp_path)) == {"switch", "secret"}


def test_the_switch_of_a_node_is_confined() -> None:
    with PrivateBroker(()) as broker:
        broker.ask("domain-add", name="guest", group=None, uid=None, kind="vm")
        becomes(lambda: broker.ask("status", domain="guest")["domain"]["device"] == "waiting")
        switch = switch_of(broker.directory)
        lines = Path(f"/proc/{switch}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines)
        assert (status["NoNewPrivs"], status["Seccomp"], status["Threads"]) == ("1", "2", "1")
        dac_read_search = 1 << 2
        for kind in ("CapEff", "CapPrm", "CapInh"):
            assert int(status[kind], 16) & ~dac_read_search == 0
        limits = Path(f"/proc/{switch}/limits").read_text().splitlines()
        assert next(line.split()[4:6] for line in limits if line.startswith("Max core")) == ["0", "0"]
