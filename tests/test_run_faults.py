"""`isthmus run` when programs do what few programs do, and when domains go while they are connected."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from conftest import becomes
from networks import POLICY, TALK, Net, exchanged

from isthmus.bench.bridge import Bridge

#: Takes another user, who may not read the modules of Python: they are there before.
DROP = "import encodings.idna, os, socket; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
#: In front of `isthmus run`: a root that may not trace the programs of others, as in most containers.
NO_TRACE = ("setpriv", "--bounding-set", "-sys_ptrace")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its user")


@contextmanager
def policy(net: Net, text: str) -> Iterator[None]:
    """Another policy for a while."""
    net.broker.policy_file.write_text(text)
    net.broker.ask("reload")
    try:
        yield
    finally:
        net.broker.policy_file.write_text(POLICY)
        net.broker.ask("reload")


@needs_root
def test_a_client_that_cannot_be_looked_into_takes_the_network(net: Net) -> None:
    net.server(port=7100)
    talk = DROP + TALK.format(to=Bridge.right_address, port=7100)
    client = net.python("left", talk, before=NO_TRACE, options="--verbose")
    assert client.line() == f"tcp {Bridge.right_address}"
    code, _, err = client.end()
    assert code == 0
    assert "CAP_SYS_PTRACE" in err
    becomes(lambda: any("CAP_SYS_PTRACE" in why for why in net.fallbacks()))


@needs_root
def test_a_client_that_cannot_be_looked_into_is_refused_where_exchange_is_required(net: Net) -> None:
    net.server(port=7101)
    talk = DROP + TALK.format(to=Bridge.right_address, port=7101)
    code, out, err = net.python("left", talk, before=NO_TRACE, options="--require").end()
    assert (code, out) == (1, "")
    assert "ConnectionRefusedError" in err


@needs_root
@pytest.mark.parametrize("traces", [True, False])
def test_a_server_whose_workers_have_another_user(net: Net, traces: bool) -> None:
    """Root listens, its workers accept: neighbours too, or TCP alone where they cannot be looked into."""
    port = 7102 + traces
    server = net.server(
        f"""
        import os, socket
        server = socket.create_server(("0.0.0.0", {port}))
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        print("listening")
        while True:
            sock, address = server.accept()
            data = sock.recv(5)
            print(data)
            sock.sendall(data)
            sock.close()
        """,
        before=() if traces else NO_TRACE,
    )
    client = net.python("left", TALK.format(to=Bridge.right_address, port=port))
    assert server.line() == "b'hello'"
    assert client.line() == f"{'socket' if traces else 'tcp'} {Bridge.right_address}"


#: The address as connect(2) takes it.
WHERE = """
where = struct.pack("=H", socket.AF_INET) + struct.pack("!H", {port})
where += socket.inet_aton("{address}") + bytes(8)
"""

HOLD = """
import socket
sock = socket.create_connection(("{to}", {port}), 20)
print("connected")
print(sock.recv(1))
"""


def test_a_domain_that_is_removed_while_it_is_connected(net: Net) -> None:
    """Both ends see the end; whoever comes then takes the network, and hears why."""
    server = net.server("""
        import socket
        server = socket.create_server(("0.0.0.0", 7104))
        print("listening")
        for _ in range(2):
            sock, _ = server.accept()
            print("accepted")
            data = sock.recv(5)
            print(data)
            if data:
                sock.sendall(data)
    """)
    client = net.python("left", HOLD.format(to=Bridge.right_address, port=7104))
    assert (client.line(), server.line()) == ("connected", "accepted")
    assert exchanged(net) == 1
    with policy(net, '[[domain]]\nname = "a"\naddresses = "10.77.0.1"\n'):
        assert (client.line(), server.line()) == ("b''", "b''")
        assert exchanged(net) == 0
        talk = net.python("left", TALK.format(to=Bridge.right_address, port=7104))
        assert talk.line() == f"tcp {Bridge.right_address}"
        assert (server.line(), server.line()) == ("accepted", "b'hello'")
        becomes(lambda: any("there is no domain" in why for why in net.fallbacks()))


def test_a_domain_whose_address_goes_to_another_while_it_is_connected(net: Net) -> None:
    """What is open goes on: its two domains may still talk. What is new finds nobody at the new place."""
    net.server(port=7105)
    client = net.python(
        "left",
        f"""
        import socket
        sock = socket.create_connection(("{Bridge.right_address}", 7105), 20)
        while True:
            sock.sendall(b"hello")
            assert sock.recv(5) == b"hello"
            print("again")
            input()
        """,
        stdin=True,
    )
    assert client.line() == "again"
    moved = POLICY.replace(f'addresses = ["{Bridge.right_address}", "fd00:77::2"]', "").replace(
        'name = "c"', f'name = "c"\naddresses = "{Bridge.right_address}"'
    )
    with policy(net, moved):
        client.say("go on")
        assert client.line() == "again"
        talk = net.python("left", TALK.format(to=Bridge.right_address, port=7105))
        assert talk.line() == f"tcp {Bridge.right_address}"
        becomes(lambda: any("c:7105: nobody listens" in why for why in net.fallbacks()))
        assert {c["peer"] for c in net.connections()} == {"b"}


#: A server that says which it is, and reads until the end.
NAMED = """
import socket
server = socket.create_server(("{address}", {port}), backlog=128)
print("listening")
while True:
    sock, _ = server.accept()
    sock.sendall(b"{address}")
    sock.close()
"""

#: Connects while another thread changes the address that it connects to, and says whom it reached: as that
#: one says, and as the socket says.
FLIP = """
import ctypes, socket, struct, threading
libc = ctypes.CDLL(None, use_errno=True)
addresses = {addresses}
words = [struct.unpack("=I", socket.inet_aton(a))[0] for a in addresses]
begin = struct.pack("=H", socket.AF_INET) + struct.pack("!H", {port})
memory = ctypes.create_string_buffer(begin + bytes(12))
word = ctypes.c_uint32.from_buffer(memory, 4)
done = False
def flip():
    while not done:
        for value in words:
            word.value = value
thread = threading.Thread(target=flip)
word.value = words[0]
thread.start()
for _ in range(500):
    with socket.socket() as sock:
        assert libc.connect(sock.fileno(), memory, 16) == 0, ctypes.get_errno()
        sock.settimeout(20)
        reached = b""
        while data := sock.recv(100):
            reached += data
        print(reached.decode(), sock.getpeername()[0])
done = True
thread.join()
"""


def test_an_address_that_another_thread_changes_meanwhile(net: Net) -> None:
    """Whatever is reached, it is what the socket says; and what a rule forbids only a network leads to."""
    neighbour, forbidden, stranger = Bridge.right_address, "10.77.0.3", "10.77.0.4"
    for address in (forbidden, stranger):
        words = ("ip", "address", "replace", f"{address}/24", "dev", "eth0")
        net.output("right", *words, run=False)
    rules = """
        [[rule]]
        from = "a"
        to = "c"
        action = "refuse"
        [[rule]]
        from = "*"
        to = "*"
        action = "accept"
    """
    with policy(net, POLICY + f'addresses = "{forbidden}"\n' + rules):
        for address, how in ((neighbour, {}), (forbidden, {"door": "c"}), (stranger, {"run": False})):
            net.server(NAMED.format(address=address, port=7106), **how)
        before = net.broker.ask("status", domain="b")["domain"]["traffic"].get("socket", {})
        client = net.python("left", FLIP.format(addresses=[neighbour, forbidden, stranger], port=7106))
        seen = [client.line().split() for _ in range(500)]
        assert client.end()[0] == 0
        assert all(reached == named for reached, named in seen)
        assert {reached for reached, _ in seen} == {neighbour, forbidden, stranger}
        traffic = {d: net.broker.ask("status", domain=d)["domain"]["traffic"] for d in "bc"}
        assert traffic["c"] == {}
        assert traffic["b"]["socket"]["connections"] > before.get("connections", 0)
        becomes(lambda: any("rule 1 refuses" in why for why in net.fallbacks()))
        becomes(lambda: any("there is no domain" in why for why in net.fallbacks()))


#: Signals for the thread that calls; another one hears of each at once.
SIGNALS = """
import ctypes, errno, os, select, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGALRM, lambda *_: None)
signal.siginterrupt(signal.SIGALRM, {interrupts})
def say(line):
    # At once: two threads do.
    os.write(1, line.encode() + b"\\n")
def alarms(interval):
    signal.setitimer(signal.ITIMER_REAL, interval, interval)
def tell_alarms():
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
    def hear():
        signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGALRM}})
        while ours.recv(1):
            say("alarm")
    threading.Thread(target=hear, daemon=True).start()
"""

#: `disturbed(call, ...)`: a call that one signal disturbs, each time a little later after its beginning.
DISTURB = (
    SIGNALS
    + """
sys.setswitchinterval(1e-5)
main = threading.get_ident()
begin, over = threading.Semaphore(0), threading.Semaphore(0)
delay = 0
def disturb():
    signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGALRM}})
    while True:
        begin.acquire()
        until = time.perf_counter() + delay
        while time.perf_counter() < until:
            pass
        signal.pthread_kill(main, signal.SIGALRM)
        over.release()
threading.Thread(target=disturb, daemon=True).start()
def disturbed(call, *arguments):
    global delay
    delay = (delay + 7e-6) % 1e-3
    begin.release()
    result = call(*arguments)
    error = ctypes.get_errno()
    over.acquire()
    return result, error
"""
)


@pytest.mark.parametrize("interrupts", [True, False])
def test_signals_during_a_blocking_accept(net: Net, interrupts: bool) -> None:
    """With SA_RESTART it goes on to wait, without it it fails with EINTR; nobody who comes is lost."""
    port = 7108 + interrupts
    server = net.server(
        SIGNALS.format(interrupts=interrupts)
        + f"""
tell_alarms()
server = socket.create_server(("0.0.0.0", {port}))
print("listening")
alarms(0.02)
while (fd := libc.accept(server.fileno(), None, None)) < 0:
    say(os.strerror(ctypes.get_errno()))
alarms(0)
with socket.socket(fileno=fd) as sock:
    sock.sendall(sock.recv(5))
say("done")
"""
    )
    expected = ["alarm", "Interrupted system call"] if interrupts else ["alarm"]
    heard: list[str] = []
    while any(heard.count(line) < 3 for line in expected):
        heard.append(server.line())
    client = net.python("left", TALK.format(to=Bridge.right_address, port=port))
    assert client.line() == f"socket {Bridge.right_address}"
    while (line := server.line()) != "done":
        heard.append(line)
    assert set(heard) == set(expected)
    assert net.fallbacks() == {}


def test_an_accept_without_room_for_a_descriptor_loses_nobody_who_comes(net: Net) -> None:
    server = net.server("""
        import resource, socket
        server = socket.create_server(("0.0.0.0", 7115))
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (server.fileno() + 1, before[1]))
        print("listening")
        try:
            server.accept()
        except OSError as error:
            print(error.strerror)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        sock, _ = server.accept()
        sock.sendall(sock.recv(5))
        sock.recv(1)
    """)
    client = net.python("left", TALK.format(to=Bridge.right_address, port=7115))
    assert server.line() == "Too many open files"
    assert client.line() == f"socket {Bridge.right_address}"


def test_an_accept_that_is_interrupted_loses_nobody_who_comes(net: Net) -> None:
    server = net.server(
        DISTURB.format(interrupts=True)
        + """
server = socket.create_server(("0.0.0.0", 7110))
print("listening")
n = interrupted = 0
while n < 3000:
    fd, error = disturbed(libc.accept, server.fileno(), None, None)
    if fd < 0:
        assert error == errno.EINTR, os.strerror(error)
        interrupted += 1
        continue
    with socket.socket(fileno=fd) as sock:
        sock.settimeout(20)
        sock.sendall(sock.recv(5))
    n += 1
print("done", interrupted > 0)
"""
    )
    client = net.python(
        "left",
        f"""
        import socket
        for number in range(3000):
            with socket.create_connection(("{Bridge.right_address}", 7110), 20) as sock:
                sock.sendall(b"hello")
                sock.settimeout(20)
                try:
                    assert sock.recv(5) == b"hello"
                except OSError as error:
                    raise AssertionError(f"connection {{number}} of 3000") from error
        print("done")
        """,
    )
    assert client.line() == "done"
    assert server.line() == "done True"
    assert net.fallbacks() == {}


def test_an_accept_that_is_interrupted_loses_nobody_who_comes_over_tcp(net: Net) -> None:
    """Whoever was accepted in vain is put behind others, for whom the backlog has little room."""
    server = net.server(
        DISTURB.format(interrupts=True)
        + """
server = socket.create_server(("0.0.0.0", 7111), backlog=1)
print("listening")
n = 0
while n < 1200:
    fd, error = disturbed(libc.accept, server.fileno(), None, None)
    if fd < 0:
        assert error == errno.EINTR, os.strerror(error)
        continue
    with socket.socket(fileno=fd) as sock:
        sock.settimeout(20)
        sock.sendall(sock.recv(5))
    n += 1
print("done")
"""
    )
    client = net.python(
        "left",
        f"""
        import socket, threading
        lost = []
        def go():
            for _ in range(150):
                with socket.create_connection(("{Bridge.right_address}", 7111), 60) as sock:
                    try:
                        sock.sendall(b"hello")
                        sock.settimeout(60)
                        assert sock.recv(5) == b"hello"
                    except OSError as error:
                        lost.append(repr(error))
                        return
        threads = [threading.Thread(target=go) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(lost or "done")
        """,
        run=False,
    )
    assert client.line() == "done"
    assert server.line() == "done"


@pytest.mark.parametrize(
    "interrupts",
    [
        pytest.param(
            True,
            marks=pytest.mark.xfail(
                strict=True,
                reason="after EINTR nothing is under way: the socket is not connected, nor will be",
            ),
        ),
        False,
    ],
)
def test_a_connect_that_is_interrupted(net: Net, interrupts: bool) -> None:
    """With SA_RESTART it is none of the program's business. Without it, as POSIX has it: a connect that was
    interrupted is under way, and whoever waits until it can be written to is connected."""
    port = 7111 + interrupts
    net.server(port=port)
    client = net.python(
        "left",
        DISTURB.format(interrupts=interrupts)
        + WHERE.format(address=Bridge.right_address, port=port)
        + """
interrupted = 0
for _ in range(500):
    with socket.socket() as sock:
        result, error = disturbed(libc.connect, sock.fileno(), where, 16)
        if result:
            assert error == errno.EINTR, os.strerror(error)
            interrupted += 1
            poll = select.poll()
            poll.register(sock, select.POLLOUT)
            poll.poll(20_000)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        sock.settimeout(20)
        sock.sendall(b"hello")
        assert sock.recv(5) == b"hello"
print("done", interrupted > 0)
""",
    )
    assert client.line() == f"done {interrupts}"
    assert client.end()[0] == 0
    assert net.fallbacks() == {}
    becomes(lambda: not net.connections())


@pytest.mark.soak
def test_a_connect_that_goes_on_after_a_signal_succeeds(net: Net) -> None:
    net.server("""
        import socket
        server = socket.create_server(("0.0.0.0", 7116), backlog=128)
        print("listening")
        while True:
            sock, _ = server.accept()
            # What was interrupted came too, and went.
            if data := sock.recv(5):
                sock.sendall(data)
            sock.close()
    """)
    client = net.python(
        "left",
        DISTURB.format(interrupts=False)
        + WHERE.format(address=Bridge.right_address, port=7116)
        + """
for n in range(20_000):
    with socket.socket() as sock:
        result, error = disturbed(libc.connect, sock.fileno(), where, 16)
        assert result == 0, str(n) + ": " + os.strerror(error)
        sock.sendall(b"hello")
        assert sock.recv(5) == b"hello"
print("done")
""",
    )
    assert client.line() == "done"


@pytest.mark.xfail(strict=True, reason="whatever waits for the supervisor can be interrupted")
def test_calls_that_no_signal_interrupts(net: Net) -> None:
    """signal(7) knows no EINTR of these."""
    net.server(port=7114)
    client = net.python(
        "left",
        DISTURB.format(interrupts=True)
        + f"""
sock = socket.create_connection(("{Bridge.right_address}", 7114), 20)
room, size, one = bytes(16), ctypes.c_int(16), ctypes.c_int(1)
tcp = (socket.IPPROTO_TCP, socket.TCP_NODELAY)
for _ in range(200):
    for call, *arguments in (
        (libc.getsockname, room, ctypes.byref(size)),
        (libc.getpeername, room, ctypes.byref(size)),
        (libc.getsockopt, *tcp, ctypes.byref(one), ctypes.byref(ctypes.c_int(4))),
        (libc.setsockopt, *tcp, ctypes.byref(one), 4),
    ):
        delay %= 2e-4
        result, error = disturbed(call, sock.fileno(), *arguments)
        assert result == 0, call.__name__ + ": " + os.strerror(error)
print("done")
""",
    )
    assert client.line() == "done"


MPTCP = """
import socket
try:
    {name} = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
except OSError as error:
    print(error.strerror)
    raise SystemExit from None
"""


def test_multipath_tcp_on_both_sides(net: Net) -> None:
    """Go's listeners are that by default."""
    server = net.python(
        "right",
        MPTCP.format(name="server")
        + """
server.bind(("0.0.0.0", 7113))
server.listen()
print("listening")
for _ in range(2):
    sock, address = server.accept()
    print(address[0])
    sock.sendall(sock.recv(5))
    sock.close()
""",
    )
    if (first := server.line()) != "listening":
        pytest.skip(f"no multipath TCP: {first}")
    client = net.python(
        "left",
        MPTCP.format(name="sock")
        + TALK.format(to=Bridge.right_address, port=7113).replace(
            f'sock = socket.create_connection(("{Bridge.right_address}", 7113), 20)',
            f'sock.connect(("{Bridge.right_address}", 7113))',
        ),
    )
    assert client.line() == f"socket {Bridge.right_address}"
    assert server.line() == Bridge.left_address
    plain = net.python("left", TALK.format(to=Bridge.right_address, port=7113), run=False)
    assert plain.line() == f"tcp {Bridge.right_address}"
    assert server.line() == Bridge.left_address
    assert net.fallbacks() == {}


@pytest.mark.parametrize("known", [True, False])
def test_an_event_poll_that_has_moved_is_found(net: Net, known: bool) -> None:
    """Also where the supervisor has seen it at another number before."""
    port = 7120 + known
    net.server(port=port)
    client = net.python(
        "left",
        f"""
        import fcntl, select, socket, time
        poll = select.epoll()
        time.sleep(0.3)
        if {known}:
            for _ in range(2):
                socket.create_connection(("{Bridge.right_address}", {port})).close()
        moved = fcntl.fcntl(poll.fileno(), fcntl.F_DUPFD, 100)
        poll.close()
        poll = select.epoll.fromfd(moved)
        sock = socket.socket()
        sock.setblocking(False)
        poll.register(sock.fileno(), select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        sock.connect_ex(("{Bridge.right_address}", {port}))
        ((fd, events),) = poll.poll(20)
        print(fd == sock.fileno(), events == select.EPOLLOUT)
        """,
    )
    assert client.line() == "True True"
