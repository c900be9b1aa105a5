"""`isthmus run`: what it does to a program's connections, and what may happen to it meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from broker_client import Program as Speaker
from conftest import LIMIT_S, becomes
from networks import ECHO, POLICY, TALK, Net, exchanged

from isthmus._native import FEATURE_SOCKETS
from isthmus.bench.bridge import Bridge


def test_names_and_options_are_those_of_tcp(net: Net) -> None:
    questions = """
        def ask(sock):
            import socket as s
            print(sock.getsockname()[0], sock.getpeername()[0], sock.family.name)
            tcp = s.IPPROTO_TCP
            print(sock.getsockopt(s.SOL_SOCKET, s.SO_DOMAIN), sock.getsockopt(s.SOL_SOCKET, s.SO_PROTOCOL))
            sock.setsockopt(tcp, s.TCP_NODELAY, 1)
            sock.setsockopt(tcp, s.TCP_KEEPIDLE, 77)
            print(sock.getsockopt(tcp, s.TCP_NODELAY), sock.getsockopt(tcp, s.TCP_KEEPIDLE))
            print(sock.getsockopt(tcp, s.TCP_INFO, 104)[0], sock.getsockopt(tcp, s.TCP_MAXSEG) > 0)
            try:
                sock.setsockopt(tcp, s.TCP_CONGESTION, b"nonsense")
            except FileNotFoundError:
                print("no such algorithm")
            sock.setsockopt(s.IPPROTO_IP, s.IP_TOS, 16)
            print(sock.getsockopt(s.SOL_SOCKET, s.SO_ERROR), sock.getsockopt(s.SOL_SOCKET, s.SO_TYPE))
    """
    server = net.server(
        textwrap.dedent(questions)
        + textwrap.dedent("""
            import socket
            server = socket.create_server(("0.0.0.0", 7001))
            print("listening")
            sock, address = server.accept()
            ask(sock)
            assert address == sock.getpeername()
            print(address[1])
            sock.recv(1)
        """)
    )
    client = net.python(
        "left",
        textwrap.dedent(questions)
        + textwrap.dedent(f"""
            import socket
            sock = socket.create_connection(("{Bridge.right_address}", 7001), 20)
            ask(sock)
            print(sock.getsockname()[1])
        """),
    )
    here, there = Bridge.left_address, Bridge.right_address
    same = ["2 6", "1 77", "1 True", "no such algorithm", "0 1"]
    assert [client.line() for _ in range(6)] == [f"{here} {there} AF_INET", *same]
    assert [server.line() for _ in range(6)] == [f"{there} {here} AF_INET", *same]
    assert server.line() == client.line()
    assert server.end()[0] == 0
    assert net.fallbacks() == {}


def test_one_listener_serves_both_kinds(net: Net) -> None:
    server = net.server(port=7002)
    for run in (True, False, True):
        talk = net.python("left", TALK.format(to=Bridge.right_address, port=7002), run=run)
        assert talk.line() == f"{'socket' if run else 'tcp'} {Bridge.right_address}"
        assert server.line().startswith(f"AF_INET {Bridge.left_address} ")
        assert talk.end()[0] == 0
    assert net.broker.ask("status", domain="a")["domain"]["traffic"]["socket"]["connections"] >= 2


def test_ipv6(net: Net) -> None:
    for side, address in (("left", "fd00:77::1"), ("right", "fd00:77::2")):
        net.output(side, "ip", "address", "replace", f"{address}/64", "dev", "eth0", "nodad", run=False)
    server = net.server("""
        import socket
        server = socket.create_server(("::", 7003), family=socket.AF_INET6, dualstack_ipv6=True)
        print("listening")
        for _ in range(2):
            sock, address = server.accept()
            print(sock.family.name, address[0], sock.getsockname()[0])
            sock.sendall(sock.recv(5))
            sock.recv(1)
    """)
    becomes(lambda: net.broker.ask("status", domain="b")["domain"]["ports"])
    for to, seen in (
        ("fd00:77::2", "fd00:77::1 fd00:77::2"),
        (Bridge.right_address, f"::ffff:{Bridge.left_address} ::ffff:{Bridge.right_address}"),
    ):
        client = net.python("left", TALK.format(to=to, port=7003))
        assert client.line() == f"socket {to}"
        assert server.line() == f"AF_INET6 {seen}"
        client.end()
    assert net.fallbacks() == {}


def test_who_is_not_supervised_is_reached_as_ever(net: Net) -> None:
    net.server(port=7004, run=False)
    client = net.python("left", TALK.format(to=Bridge.right_address, port=7004))
    assert client.line() == f"tcp {Bridge.right_address}"
    assert client.end()[0] == 0
    becomes(lambda: any("nobody listens there" in why for why in net.fallbacks()))


def test_require_refuses_and_says_why(net: Net) -> None:
    net.server(port=7005, run=False)
    client = net.python(
        "left", TALK.format(to=Bridge.right_address, port=7005), options="--require --verbose"
    )
    code, _, err = client.end()
    assert code == 1
    assert "ConnectionRefusedError" in err
    assert f"connect to {Bridge.right_address}:7005" in err
    assert "refused: b:7005: nobody listens there" in err


def test_a_socket_that_waits_in_an_event_poll_before_it_is_connected(net: Net) -> None:
    """As nginx does with its upstreams: registered first, edge-triggered, connected then."""
    server = net.server(port=7006)
    client = net.python(
        "left",
        f"""
        import select, socket
        poll = select.epoll()
        sock = socket.socket()
        sock.setblocking(False)
        other = socket.socketpair()
        poll.register(other[0], select.EPOLLIN)
        poll.register(sock, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET | select.EPOLLRDHUP)
        poll.poll(0)
        print(sock.connect_ex(("{Bridge.right_address}", 7006)))
        assert poll.poll(20) == [(sock.fileno(), select.EPOLLOUT)]
        sock.send(b"x")
        # That there is room again may be heard first.
        while not dict(poll.poll(20))[sock.fileno()] & select.EPOLLIN:
            pass
        assert sock.recv(9) == b"x"
        poll.modify(sock, select.EPOLLOUT)
        assert poll.poll(20) == [(sock.fileno(), select.EPOLLOUT)]
        poll.unregister(sock)
        assert poll.poll(0) == []
        sock.close()
        print("done")
        import time
        time.sleep(60)
        """,
    )
    assert client.line() == "0"
    server.line()
    assert client.line() == "done"
    # Nobody else holds it: the other side hears the end while the program goes on.
    becomes(lambda: not net.connections("b"))
    assert net.fallbacks() == {}


def test_threads_that_connect_at_once_and_descriptors_that_are_used_again(net: Net) -> None:
    net.server(port=7007)
    client = net.python(
        "left",
        f"""
        import os, socket, threading
        def talk(n):
            for turn in range(50):
                with socket.create_connection(("{Bridge.right_address}", 7007), 20) as sock:
                    text = f"{{n}} {{turn}}".encode()
                    sock.sendall(text)
                    assert sock.recv(100) == text
        before = len(os.listdir("/proc/self/fd"))
        threads = [threading.Thread(target=talk, args=(n,)) for n in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert len(os.listdir("/proc/self/fd")) == before
        print("done")
        """,
    )
    assert client.line() == "done"
    assert net.fallbacks() == {}
    becomes(lambda: not net.connections("a") and not net.connections("b"))


@pytest.mark.soak
def test_ten_thousand_short_connections_leave_nothing(net: Net) -> None:
    """No descriptor in the program, in either supervisor or in the broker; and no connection."""
    server = net.server("""
        import socket
        server = socket.create_server(("0.0.0.0", 7040), backlog=128)
        print("listening")
        while True:
            sock, _ = server.accept()
            sock.sendall(sock.recv(1))
            sock.close()
    """)
    client = net.python(
        "left",
        f"""
        import os, socket
        def talk():
            with socket.create_connection(("{Bridge.right_address}", 7040), 20) as sock:
                sock.sendall(b"x")
                assert sock.recv(1) == b"x"
        talk()
        before = len(os.listdir("/proc/self/fd"))
        print("begin")
        input()
        for _ in range(10_000):
            talk()
        assert len(os.listdir("/proc/self/fd")) == before
        print("done")
        input()
        """,
        stdin=True,
    )
    assert client.line() == "begin"

    def held() -> list[int]:
        """Descriptors of the broker and of both supervisors."""
        fronts = [program.process.pid for program in (server, client)]
        children = [Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0] for pid in fronts]
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (net.broker.pid, *children)]

    becomes(lambda: not net.connections("a") and not net.connections("b"))
    before = held()
    client.say("go")
    assert client.line() == "done"
    becomes(lambda: not net.connections("a") and not net.connections("b"))
    becomes(lambda: all(now <= then for now, then in zip(held(), before, strict=True)))
    assert net.fallbacks() == {}


def test_a_server_that_forks_and_one_that_hands_its_listener_down(net: Net) -> None:
    server = net.server("""
        import os, socket
        server = socket.create_server(("0.0.0.0", 7008))
        for _ in range(3):
            if os.fork() == 0:
                while True:
                    sock, _ = server.accept()
                    sock.sendall(b"%d" % os.getpid())
                    sock.close()
        print("listening")
        os.wait()
    """)
    client = net.python(
        "left",
        f"""
        import socket
        for _ in range(30):
            with socket.create_connection(("{Bridge.right_address}", 7008), 20) as sock:
                print(sock.recv(100).decode())
        """,
    )
    assert len({client.line() for _ in range(30)}) >= 1
    assert client.end()[0] == 0
    assert net.fallbacks() == {}
    server.stop()


def test_the_dead_supervisor_of_a_client_and_of_a_server(net: Net) -> None:
    """What is open lives on; what is new takes the network; nothing waits for ever."""
    server = net.server(port=7009)
    client = net.python(
        "left",
        f"""
        import os, socket, time
        def talk(sock):
            sock.sendall(b"hello")
            assert sock.recv(5) == b"hello"
        first = socket.create_connection(("{Bridge.right_address}", 7009), 20)
        talk(first)
        print(os.getppid())
        while True:
            talk(first)
            with socket.create_connection(("{Bridge.right_address}", 7009), 20) as second:
                talk(second)
            print("again")
            time.sleep(0.05)
        """,
    )
    supervisor = int(client.line())
    server.line()
    assert client.line() == "again"
    os.kill(supervisor, signal.SIGKILL)
    for _ in range(5):
        assert client.line() == "again"
    client.stop()
    # Its program sits in `accept`, which the supervisor has taken.
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    talk = net.python("left", TALK.format(to=Bridge.right_address, port=7009))
    assert talk.line() == f"tcp {Bridge.right_address}"
    assert talk.end()[0] == 0


def test_a_broker_that_is_gone_and_comes_back(net: Net) -> None:
    net.server(port=7010)
    client = net.python(
        "left",
        f"""
        import socket, time
        first = socket.create_connection(("{Bridge.right_address}", 7010), 20)
        for _ in range(1_000_000):
            for sock in (first, socket.create_connection(("{Bridge.right_address}", 7010), 20)):
                sock.sendall(b"hello")
                assert sock.recv(5) == b"hello"
            print("again")
            time.sleep(0.02)
        """,
    )
    assert client.line() == "again"
    number = {c["connection"] for c in net.connections()}
    net.broker.kill()
    for _ in range(5):
        assert client.line() == "again"
    net.broker.start()
    # The old connection is known again, and new ones are exchanged again.
    becomes(lambda: number & {c["connection"] for c in net.connections()})
    becomes(lambda: client.line() and exchanged(net) >= 2)
    becomes(lambda: any("no broker answers" in why or "went away" in why for why in net.fallbacks()))


def test_a_rule_that_forbids_what_is_open(net: Net) -> None:
    net.server(port=7011)
    client = net.python(
        "left",
        f"""
        import socket
        sock = socket.create_connection(("{Bridge.right_address}", 7011), 20)
        print("connected")
        print(sock.recv(1))
        """,
    )
    assert client.line() == "connected"
    assert exchanged(net) == 1
    try:
        net.broker.policy_file.write_text(
            POLICY + '[[rule]]\nfrom = "*"\nto = "*"\naction = "accept"\nports = 1\n'
        )
        assert net.broker.ask("reload")["cut"] == 1
        assert client.line() == "b''"
    finally:
        net.broker.policy_file.write_text(POLICY)
        net.broker.ask("reload")


def test_an_address_that_is_not_where_the_directory_says(net: Net) -> None:
    """The directory is wrong: the listener's network does not have the address. The handshake finds out."""
    net.server(port=7012, run=False)
    wrong = POLICY.replace('name = "c"', f'name = "c"\naddresses = "{Bridge.right_address}"').replace(
        f'"{Bridge.right_address}", "fd00:77::2"', '"fd00:77::2"'
    )
    try:
        net.broker.policy_file.write_text(wrong)
        net.broker.ask("reload")
        impostor = net.python("left", ECHO.format(port=7012), door="c")
        assert impostor.line() == "listening"
        client = net.python("left", TALK.format(to=Bridge.right_address, port=7012))
        assert client.line() == f"tcp {Bridge.right_address}"
        becomes(lambda: any("does not have this address" in why for why in net.fallbacks()))
        assert exchanged(net) == 0
    finally:
        net.broker.policy_file.write_text(POLICY)
        net.broker.ask("reload")


def test_it_ends_as_the_program_ends(net: Net, tmp_path: Path) -> None:
    assert net.start("left", "true").end()[0] == 0
    assert net.start("left", "sh", "-c", "exit 7").end()[0] == 7
    assert net.start("left", "sh", "-c", "kill -KILL $$").end()[0] == -signal.SIGKILL
    code, _, err = net.start("left", "/no/such/program").end()
    assert (code, err) == (127, "isthmus: /no/such/program: No such file or directory\n")
    assert net.start("left", str(tmp_path)).end()[0] == 126
    code, _, err = net.start("left", sys.executable, "-m", "isthmus", "run", "--", "true").end()
    assert code == 126
    assert err.startswith("isthmus: true: this already runs under `isthmus run`, or ")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        program = net.python(
            "left",
            f"""
            import signal, time
            def hear(number, frame):
                print("heard", number)
                raise SystemExit(3)
            signal.signal({number}, hear)
            print("ready")
            time.sleep(60)
            """,
        )
        assert program.line() == "ready"
        program.process.send_signal(number)
        assert program.line() == f"heard {int(number)}"
        assert program.end()[0] == 3


def test_what_the_program_leaves_behind_is_supervised_on(net: Net) -> None:
    """A daemon: the command returns, its output ends, and the daemon is reached directly."""
    server = net.python(
        "right",
        """
        import os, socket
        server = socket.create_server(("0.0.0.0", 7013))
        if os.fork():
            os._exit(0)
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        for _ in range(2):
            sock, _ = server.accept()
            sock.sendall(sock.recv(5))
            sock.recv(1)
        """,
    )
    assert server.end() == (0, "", "")
    for _ in range(2):
        client = net.python("left", TALK.format(to=Bridge.right_address, port=7013))
        assert client.line().startswith("socket ")
        client.end()
    assert net.fallbacks() == {}
    becomes(lambda: not net.broker.ask("status", domain="b")["domain"]["programs"])


def test_a_killed_front_takes_the_program_along(net: Net) -> None:
    program = net.python("left", "import os, time; print(os.getpid()); time.sleep(60)")
    pid = int(program.line())
    program.process.kill()
    becomes(lambda: not Path(f"/proc/{pid}").exists())


def test_a_blocked_accept_hears_signals_and_limits(net: Net) -> None:
    server = net.server("""
        import signal, socket, time
        server = socket.create_server(("0.0.0.0", 7014))
        print("listening")
        signal.signal(signal.SIGALRM, lambda *_: print("alarm"))
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        server.settimeout(None)
        sock, _ = server.accept()
        print("accepted", sock.recv(5))
        import struct
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 100_000))
        try:
            server.accept()
        except BlockingIOError:
            print("nobody")
    """)
    assert server.line() == "alarm"
    client = net.python("left", TALK.format(to=Bridge.right_address, port=7014))
    assert server.line() == "accepted b'hello'"
    assert server.line() == "nobody"
    client.end()


def test_an_address_of_the_other_family_hurts_nobody(net: Net) -> None:
    """A server of IPv4 alone, and somebody who tries IPv6 first."""
    for side, address in (("left", "fd00:77::1"), ("right", "fd00:77::2")):
        net.output(side, "ip", "address", "replace", f"{address}/64", "dev", "eth0", "nodad", run=False)
    net.server(port=7030)
    code = """
        import socket
        try:
            socket.create_connection(("fd00:77::2", 7030), 5)
        except ConnectionRefusedError:
            print("refused")
    """
    assert net.python("left", code).line() == "refused"
    for run in (True, False):
        talk = net.python("left", TALK.format(to=Bridge.right_address, port=7030), run=run)
        assert talk.line() == f"{'socket' if run else 'tcp'} {Bridge.right_address}"
    # And the second came past the bridge: no other reason was ever given.
    becomes(lambda: all("nobody listens" in why for why in net.fallbacks()) and net.fallbacks())


def test_a_listener_that_waits_for_data(net: Net) -> None:
    """TCP_DEFER_ACCEPT, as Apache has it."""
    server = net.server("""
        import socket
        server = socket.create_server(("0.0.0.0", 7031))
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)
        print("listening")
        sock, _ = server.accept()
        print(sock.recv(5).decode())
        sock.sendall(b"hello")
        sock.recv(1)
    """)
    client = net.python("left", TALK.format(to=Bridge.right_address, port=7031))
    assert server.line() == "hello"
    assert client.line().startswith("socket ")
    assert net.fallbacks() == {}


def test_knocks_leave_nothing_behind(net: Net) -> None:
    """Ports of a network are not endless: none of ours waits in the kernel's tables after its end."""
    net.server(port=7032)
    code = f"""
        import socket
        for _ in range(50):
            with socket.create_connection(("{Bridge.right_address}", 7032), 20) as sock:
                sock.sendall(b"x")
                assert sock.recv(1) == b"x"
        print("done")
    """
    assert net.python("left", code).line() == "done"
    left = net.output("right", "cat", "/proc/net/tcp", run=False)
    assert [line for line in left.splitlines() if line.split()[3] == "06" and ":1B78 " in line] == []


def test_a_listener_that_is_closed_with_somebody_in_its_queue(net: Net) -> None:
    server = net.python(
        "right",
        """
        import socket, sys
        server = socket.create_server(("0.0.0.0", 7033))
        print("listening")
        sys.stdin.readline()
        server.close()
        print("closed")
        sys.stdin.readline()
        """,
        stdin=True,
    )
    assert server.line() == "listening"
    client = net.python(
        "left",
        f"""
        import socket
        sock = socket.create_connection(("{Bridge.right_address}", 7033), 20)
        print("connected")
        try:
            print(sock.recv(1))
        except ConnectionResetError:
            print("reset")
        """,
    )
    assert client.line() == "connected"
    server.say("close")
    assert server.line() == "closed"
    assert client.line() in ("b''", "reset")


def test_an_accept_whose_listener_is_shut_down(net: Net) -> None:
    """A common way to end the thread that accepts."""
    server = net.server("""
        import socket, threading, time
        server = socket.create_server(("0.0.0.0", 7034))
        def accept():
            try:
                server.accept()
            except OSError as error:
                print(error.strerror)
        thread = threading.Thread(target=accept)
        thread.start()
        print("listening")
        time.sleep(0.3)
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        print("joined")
    """)
    assert server.line() == "Invalid argument"
    assert server.line() == "joined"


def test_a_program_that_makes_a_ring_is_reached_over_tcp(net: Net) -> None:
    """And whoever waits in `accept` meanwhile goes on."""
    server = net.server(
        """
        import ctypes, socket, threading
        server = socket.create_server(("0.0.0.0", 7035))
        def accept():
            sock, _ = server.accept()
            print(sock.recv(5).decode())
            sock.sendall(b"hello")
            sock.recv(1)
        thread = threading.Thread(target=accept)
        thread.start()
        import time
        time.sleep(0.3)
        IO_URING_SETUP = 425
        ctypes.CDLL(None).syscall(IO_URING_SETUP, 1, ctypes.create_string_buffer(120))
        print("listening")
        thread.join()
    """,
        options="--io-uring",
    )
    client = net.python("left", TALK.format(to=Bridge.right_address, port=7035))
    assert server.line() == "hello"
    assert client.line().startswith("tcp ")
    becomes(lambda: any("nobody listens" in why for why in net.fallbacks()))


def test_there_are_no_rings_unless_one_asks_for_them(net: Net) -> None:
    code = """
        import ctypes, errno, os
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.syscall(425, 1, ctypes.create_string_buffer(120))
        print("a ring" if done >= 0 else errno.errorcode[ctypes.get_errno()])
    """
    assert net.python("left", code).line() == "ENOSYS"
    assert net.python("left", code, options="--io-uring").line() == "a ring"


def test_a_neighbour_that_never_answers_stands_in_nobodys_way(net: Net) -> None:
    net.server(port=7037)
    try:
        net.broker.policy_file.write_text(POLICY.replace('name = "c"', 'name = "c"\naddresses = "10.77.0.3"'))
        net.broker.ask("reload")
        with Speaker(Path(net.broker.door("c")), features=FEATURE_SOCKETS) as silent:
            silent.bind(7038)
            client = net.python(
                "left",
                f"""
                import socket
                for _ in range(2):
                    try:
                        socket.create_connection(("10.77.0.3", 7038), 20)
                    except ConnectionRefusedError:
                        print("refused")
                    with socket.create_connection(("{Bridge.right_address}", 7037), 20) as sock:
                        sock.sendall(b"x")
                        print(sock.recv(1))
                """,
                options="--require",
            )
            assert [client.line() for _ in range(4)] == ["refused", "b'x'"] * 2
    finally:
        net.broker.policy_file.write_text(POLICY)
        net.broker.ask("reload")


def test_a_broker_that_is_stopped_holds_nobody_for_long(net: Net) -> None:
    net.server(port=7036, run=False)
    os.kill(net.broker.pid, signal.SIGSTOP)
    try:
        client = net.python("left", TALK.format(to=Bridge.right_address, port=7036))
        assert client.line().startswith("tcp ")
        assert client.end()[0] == 0
    finally:
        os.kill(net.broker.pid, signal.SIGCONT)


def test_without_any_broker(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "isthmus",
                "run",
                "--door",
                str(tmp_path / "no"),
                "--",
                sys.executable,
                "-c",
                code,
            ],
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0
