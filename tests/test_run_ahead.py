"""Connections that `isthmus run` makes ahead: for programs that connect to one place again and again."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from broker_client import Program as Speaker
from conftest import becomes
from networks import POLICY, Net

from isthmus._native import FEATURE_SOCKETS
from isthmus.bench.bridge import Bridge

#: Says to everybody where it sees it from, and ends.
SERVER = """
import contextlib, socket
server = socket.create_server(("0.0.0.0", {port}), backlog={backlog})
print("listening")
while True:
    sock, (address, port) = server.accept()
    with sock, contextlib.suppress(OSError):
        sock.sendall(f"{{address}} {{port}} ".encode() + sock.recv(100))
"""
#: Connects so many times, one after the other, and checks what it hears.
CLIENT = """
import socket, sys, time
where = ("{to}", {port})
def ask(word):
    with socket.create_connection(where, 20) as sock:
        sock.sendall(word)
        heard = b""
        while part := sock.recv(100):
            heard += part
        address, port, said = heard.split(b" ", 2)
        assert said == word, (said, word)
        assert (address.decode(), int(port)) == sock.getsockname(), (heard, sock.getsockname())
        assert sock.getpeername() == where
    return int(port)
ports = [ask(b"word %d" % n) for n in range({times})]
print(len(set(ports)))
"""


def server(net: Net, port: int, backlog: int = 128) -> Any:
    return net.server(SERVER.format(port=port, backlog=backlog))


def ask(net: Net, port: int, times: int) -> Any:
    return net.python("left", CLIENT.format(to=Bridge.right_address, port=port, times=times))


def opened(net: Net) -> int:
    """Connections by kernel sockets so far."""
    traffic = net.broker.ask("status", domain="a")["domain"]["traffic"]
    return int(traffic.get("socket", {"connections": 0})["connections"])


def holds(net: Net) -> int:
    return int(net.broker.ask("status", domain="a")["domain"]["holds"]["connections"][0])


def test_a_burst_is_what_it_would_be_one_by_one(net: Net) -> None:
    """Each has a port of its own that both sides see, none is counted twice, and nothing is left."""
    server(net, 7200)
    before = opened(net)
    code = CLIENT.format(to=Bridge.right_address, port=7200, times=300)
    client = net.python("left", code, options="--verbose")
    assert client.line() == "300"
    status, _, err = client.end()
    assert status == 0
    assert err.count("made ahead") > 200
    assert opened(net) - before == 300
    assert net.fallbacks() == {}
    becomes(lambda: holds(net) == 0, "the broker keeps connections")


def test_what_is_not_used_is_given_up_while_both_programs_go_on(net: Net) -> None:
    listener = server(net, 7201)
    client = net.python(
        "left",
        CLIENT.format(to=Bridge.right_address, port=7201, times=20) + "time.sleep(100)\n",
    )
    assert client.line() == "20"

    def sockets(pid: int) -> int:
        found = 0
        for process in [pid, *_descendants(pid)]:
            links = Path(f"/proc/{process}/fd").iterdir()
            found += sum(os.readlink(link).startswith("socket:") for link in links)
        return found

    def settled() -> int:
        """Sockets of both sides, once they change no more."""
        before = -1
        while (now := sockets(client.process.pid) + sockets(listener.process.pid)) != before:
            before = now
            time.sleep(0.3)
        return now

    idle = settled()
    client.stop()
    again = ask(net, 7201, 1)
    assert again.line() == "1"
    # The listening side has what it had before anybody came: its listener, and its line to the broker.
    assert idle <= 12, idle
    assert holds(net) <= 20
    becomes(lambda: holds(net) == 0)


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *_descendants(int(child))]
    return found


def test_many_at_once_at_a_listener_with_little_room(net: Net) -> None:
    """Whoever came through a connection that was made ahead waits for room, as in TCP's backlog."""
    server(net, 7202, backlog=2)
    code = (
        CLIENT.format(to=Bridge.right_address, port=7202, times=10)
        + """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(40) as pool:
    ports = list(pool.map(lambda n: ask(b"at once %d" % n), range(400)))
print(len(ports))
"""
    )
    client = net.python("left", code)
    assert [client.line(), client.line()] == ["10", "400"]
    assert client.end()[0] == 0


def test_a_listener_that_closes_in_the_middle(net: Net) -> None:
    """Who comes then is refused or reset at once, and never left waiting; who comes later is refused."""
    listener = net.server("""
        import socket, time
        server = socket.create_server(("0.0.0.0", 7203), backlog=128)
        print("listening")
        for n in range(100):
            sock, _ = server.accept()
            sock.close()
        server.close()
        print("closed")
        time.sleep(30)
    """)
    client = net.python(
        "left",
        f"""
        import socket, time
        seen = []
        for n in range(160):
            sock = socket.socket()
            sock.settimeout(20)
            try:
                sock.connect(("{Bridge.right_address}", 7203))
                seen.append(sock.recv(1))
            except (ConnectionRefusedError, ConnectionResetError) as error:
                seen.append(type(error).__name__)
            sock.close()
        # The first hundred ended in order.
        print(seen[:100].count(b""))
        # What had been made ahead was reset or ended; then everybody is refused.
        print(set(seen[-20:]))
        """,
    )
    assert client.line() == "100"
    assert client.line() == "{'ConnectionRefusedError'}"
    assert listener.line() == "closed"


def test_rules_hold_for_what_was_made_ahead(net: Net) -> None:
    server(net, 7204)
    client = net.python(
        "left",
        CLIENT.format(to=Bridge.right_address, port=7204, times=20)
        + """
import os
sys.stdin.readline()
# A rule takes hold of a connection made ahead when somebody uses it: it may end at once, no more.
lost = 0
for n in range(30):
    try:
        ask(b"now over TCP")
    except (ValueError, ConnectionError, AssertionError):
        lost += 1
print("lost few" if lost <= 9 else f"lost {lost}")
""",
        stdin=True,
    )
    assert client.line() == "20"
    try:
        net.broker.policy_file.write_text(
            POLICY + '[[rule]]\nfrom = "a"\nto = "b"\nports = 7204\naction = "refuse"\n'
        )
        net.broker.ask("reload")
        before = opened(net)
        client.say("the rule holds")
        assert client.line() == "lost few"
        assert client.end()[0] == 0
        assert any("refuse" in why for why in net.fallbacks())
        assert opened(net) == before
    finally:
        net.broker.policy_file.write_text(POLICY)
        net.broker.ask("reload")


def test_the_broker_dies_in_the_middle_of_a_burst(net: Net) -> None:
    server(net, 7205)
    client = net.python(
        "left",
        CLIENT.format(to=Bridge.right_address, port=7205, times=20)
        + """
import select
while not select.select([sys.stdin], [], [], 0.002)[0]:
    ask(b"more")
print("all")
""",
        stdin=True,
    )
    assert client.line() == "20"
    net.broker.kill()
    net.broker.start()
    becomes(lambda: opened(net) > 20, "nothing is exchanged any more")
    client.say("enough")
    assert client.line() == "all"
    assert client.end()[0] == 0


@pytest.mark.parametrize("side", ["opener", "listener"])
def test_a_supervisor_dies_in_the_middle_of_a_burst(net: Net, side: str) -> None:
    port = 7206 + (side == "opener")
    listener = server(net, port)
    client = net.python(
        "left",
        CLIENT.format(to=Bridge.right_address, port=port, times=20)
        + """
import select
def plainly(word):
    # Names are the supervisor's to tell.
    with socket.create_connection(where, 20) as sock:
        sock.sendall(word)
        heard = b""
        while part := sock.recv(100):
            heard += part
        assert heard.endswith(word), heard
lost = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    try:
        plainly(b"more")
    except (OSError, AssertionError):
        lost += 1
for n in range(50):
    plainly(b"after %d" % n)
print("all", lost <= 9)
""",
        stdin=True,
    )
    assert client.line() == "20"
    victim = client if side == "opener" else listener
    (supervisor,) = [
        pid
        for pid in _descendants(victim.process.pid)
        if b"isthmus" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(supervisor, signal.SIGKILL)
    becomes(lambda: not Path(f"/proc/{supervisor}").exists())
    client.say("now")
    # What was just being made, or had been made ahead, may be lost with who made it.
    assert client.line() == "all True", client.end()


def test_a_listener_s_supervisor_is_not_fooled(net: Net) -> None:
    """Somebody who makes connections ahead, and keeps to nothing."""
    listener = server(net, 7208)
    door = Path(net.broker.door("a"))

    def ahead(speaker: Speaker) -> int:
        request = speaker.send(
            "connect-socket",
            to=Bridge.right_address,
            to_port=7208,
            kind="stream",
            source=Bridge.left_address,
            source_port=0,
            ahead=1,
        )
        _, answer = speaker.answer(request)
        (fd,) = answer["fds"]
        return int(fd)

    with Speaker(door, features=FEATURE_SOCKETS) as hostile:
        for first in (b"", b"x"):
            fd = ahead(hostile)
            if first:
                os.write(fd, first)
            os.close(fd)
        # Two bytes and a word at once: the word is the program's.
        fd = ahead(hostile)
        os.write(fd, (4242).to_bytes(2, "little") + b"word")
        heard = b""
        while part := os.read(fd, 100):
            heard += part
        os.close(fd)
        assert heard == f"{Bridge.left_address} 4242 word".encode()
        # What it uses without a word about it is shown all the same: the other side says so.
        before = opened(net)
        fd = ahead(hostile)
        assert (opened(net), net.connections()) == (before, [])
        os.write(fd, (4243).to_bytes(2, "little"))
        becomes(lambda: opened(net) == before + 1 and len(net.connections()) == 1)
        os.close(fd)
        # What it does not use is in nobody's list; held for ever it holds nobody up.
        idle = [ahead(hostile) for _ in range(20)]
        assert ask(net, 7208, 5).line() == "5"
        for fd in idle:
            os.close(fd)
    assert listener.process.poll() is None
    becomes(lambda: holds(net) == 0)
