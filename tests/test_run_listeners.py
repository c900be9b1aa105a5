"""`isthmus run` and programs that listen again, or change their mind while they do."""

from __future__ import annotations

import os
import signal

from conftest import becomes
from networks import Net

from isthmus.bench.bridge import Bridge

CALL = f"""
import socket
with socket.create_connection(("{Bridge.right_address}", {{port}}), 20) as sock:
    print(sock.recv(20).decode())
"""


def test_a_listener_that_listens_again_goes_on_to_accept(net: Net) -> None:
    """With a longer backlog, as programs do; once while nobody accepts, once while a thread does."""
    server = net.server(
        """
        import socket, threading, time
        server = socket.create_server(("0.0.0.0", 7130), backlog=5)
        answered = threading.Semaphore(0)
        def answer():
            sock, _ = server.accept()
            with sock:
                sock.sendall(b"accepted")
            answered.release()
        threading.Thread(target=answer).start()
        print("listening")
        answered.acquire()
        server.listen(10)
        answer()
        print("again")
        threading.Thread(target=answer).start()
        time.sleep(0.3)
        server.listen(20)
        print("and again")
        """
    )
    for _ in range(2):
        assert net.python("left", CALL.format(port=7130)).line() == "accepted"
    assert [server.line(), server.line()] == ["again", "and again"]
    assert net.python("left", CALL.format(port=7130)).line() == "accepted"
    assert server.end()[0] == 0
    assert net.fallbacks() == {}


def test_a_listen_whose_socket_is_closed_meanwhile_returns(net: Net) -> None:
    """It waits for a slow broker; others of the program come and go."""
    program = net.python(
        "right",
        """
        import os, socket, sys, threading
        def bound(port):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(("0.0.0.0", port))
            return sock
        first = bound(7131)
        first.listen()
        print("ready")
        sys.stdin.readline()
        waits = bound(7132)
        thread = threading.Thread(target=waits.listen)
        thread.start()
        thread.join(0.5)
        os.close(waits.detach())
        # So many that whoever supervises looks which of them are there still.
        more = [bound(7131) for _ in range(80)]
        for sock in more:
            sock.listen()
        thread.join(50)
        print(thread.is_alive())
        """,
        stdin=True,
    )
    assert program.line() == "ready"
    os.kill(net.broker.pid, signal.SIGSTOP)
    try:
        program.say("go")
        assert program.line() == "False"
    finally:
        os.kill(net.broker.pid, signal.SIGCONT)
    becomes(lambda: net.broker.ask("status") is not None)
