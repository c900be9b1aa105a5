"""The process around the broker: figures, logs, systemd, the operator's socket."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker_client import DEADLINE_S, Node, Program, eventually

from isthmus.broker import metrics, notify, places
from isthmus.broker.console import may_operate
from isthmus.broker.doors import DoorError
from isthmus.broker.log import LINES_BURST, Log


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with Node(tmp_path / "run") as node:
        node.add("a", "b")
        yield node


def http(path: Path, request: bytes) -> bytes:
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE_S)
            sock.connect(f"/proc/self/fd/{directory}/{path.name}")
            sock.sendall(request)
            return b"".join(iter(lambda: sock.recv(65_536), b""))
    finally:
        os.close(directory)


SAMPLE = re.compile(
    r'([a-z_]+)(\{[a-z]+="(?:[^"\\\n]|\\.)*"(?:,[a-z]+="(?:[^"\\\n]|\\.)*")*\})? ([0-9.e+-]+)'
)


def test_figures_are_prometheus_text_over_http(node: Node) -> None:
    with node.attach("a") as a, node.attach("b") as b:
        b.bind(5)
        a.connect("b", 5, b)
        a.try_connect("b", 6)
        answer = http(node.directory / "metrics", b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    seen = set()
    for line in body.decode().splitlines():
        if not line.startswith("#"):
            found = SAMPLE.fullmatch(line)
            assert found, line
            assert found[1] in metrics.FAMILIES
            seen.add(line)
    assert 'isthmus_domain_connections{domain="a"} 1' in seen
    assert 'isthmus_domain_connections_total{domain="b",path="sealed"} 1' in seen
    assert 'isthmus_domain_refused_total{domain="a",refusal="nobody-listens"} 1' in seen
    assert 'isthmus_rule_hits_total{rule="0",action="accept"} 2' in seen
    assert 'isthmus_connections_opened_total{path="sealed"} 1' in seen


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405"),
        (b"HEAD /metrics HTTP/1.0\r\n\r\n", b"200"),
        (b"\x00" * 20 + b"\r\n\r\n", b"405"),
    ],
)
def test_other_http_requests_are_answered_plainly(node: Node, request_: bytes, status: bytes) -> None:
    assert http(node.directory / "metrics", request_).split()[1] == status


def test_an_endless_http_request_gets_nothing(node: Node) -> None:
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        assert http(node.directory / "metrics", b"x" * 100_000) == b""


def test_every_figure_is_on_its_page() -> None:
    page = (Path(__file__).parents[1] / "docs/reference/metrics.md").read_text()
    on_page = set(re.findall(r"`(isthmus_[a-z_]+)`", page))
    assert on_page == set(metrics.FAMILIES)


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "10.0.0.1:80", "host:1", "127.0.0.1", "127.0.0.1:x", "[::]:1"]
)
def test_figures_are_served_on_loopback_only(address: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        metrics.parse_address(address)
    assert metrics.parse_address("[::1]:80") == ("::1", 80)


def test_each_step_of_a_connection_is_logged(tmp_path: Path) -> None:
    domains = '[[domain]]\nname = "a"\n[[domain]]\nname = "b"\n'
    rule = '[[rule]]\nfrom = "a"\nto = "b"\nports = 5\naction = "{}"\n'
    with Node(tmp_path / "run", domains + rule.format("accept")) as node:
        with node.attach("a") as a, node.attach("b") as b:
            b.bind(5)
            ours, theirs = a.connect("b", 5, b)
            a.connect("b", 5, b)
            ours.close()
            theirs.close()
            a.try_connect("b", 6)
            b.ask("resolve", name="a")
            node.change_policy(domains + rule.format("refuse"))
        lines = [json.loads(line) for line in node.log.getvalue().splitlines()]
    events = [line["event"] for line in lines if line.get("domain") == "a"]
    assert sorted(events[:6]) == ["attach", "close", "cut", "open", "open", "refuse"]
    assert events[0] == "attach"
    (refused,) = [line for line in lines if line["event"] == "refuse"]
    assert (refused["to"], refused["rule"]) == ("b:6", 0)
    opened = next(line for line in lines if line["event"] == "open")
    assert (opened["peer"], opened["peer_port"], opened["path"], opened["rule"]) == ("b", 5, "sealed", 1)
    (cut,) = [line for line in lines if line["event"] == "cut"]
    assert "rule 1 refuses" in cut["why"]


def test_a_tenant_cannot_fill_the_log() -> None:
    now = [1000.0]
    stream = io.StringIO()
    log = Log(stream, style="json", clock=lambda: now[0])
    for _ in range(LINES_BURST * 3):
        log.tenant("noisy", "refuse")
    log.tenant("quiet", "refuse")
    assert len(stream.getvalue().splitlines()) == LINES_BURST + 1
    now[0] += 1
    log.tenant("noisy", "refuse")
    assert json.loads(stream.getvalue().splitlines()[-1])["left_out"] == LINES_BURST * 2


def test_logs_for_people_keep_one_line_each() -> None:
    stream = io.StringIO()
    log = Log(stream, style="text", level="info")
    log.debug("hidden")
    log.info("attach", program='evil\n\x1b[2J"name"', domain="a")
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(DEADLINE_S)
        path = f"\0isthmus-test-{os.getpid()}"
        sock.bind(path)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + path[1:])
        monkeypatch.setenv("WATCHDOG_USEC", "4000000")
        assert notify.watchdog_s() == 2.0
        monkeypatch.setenv("WATCHDOG_PID", "1")
        assert notify.watchdog_s() is None
        process = start_broker(tmp_path / "run")
        heard = [sock.recv(256)]
        assert heard == [b"READY=1"]
        process.send_signal(signal.SIGHUP)
        assert sock.recv(256).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert sock.recv(256) == b"READY=1"
        process.send_signal(signal.SIGTERM)
        assert sock.recv(256) == b"STOPPING=1"
        assert process.wait(DEADLINE_S) == 0
    monkeypatch.setenv("NOTIFY_SOCKET", "nonsense")
    notify.notify("READY=1")


def start_broker(directory: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-c",
        "from isthmus.cli import main; main()",
        "broker",
        "--dir",
        str(directory),
        *more,
    ]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def answers(metrics_socket: Path) -> bytes:
    """What a broker says, or nothing while it is not up yet."""
    try:
        return http(metrics_socket, b"GET /metrics HTTP/1.0\r\n\r\n")
    except (FileNotFoundError, ConnectionRefusedError):
        return b""


def test_a_killed_broker_leaves_nothing_that_stops_the_next_one(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    for _ in range(2):
        process = start_broker(directory, "--metrics-http", "127.0.0.1:0")
        assert b"isthmus_broker_epoch" in eventually(lambda: answers(directory / "metrics"))
        process.kill()
        process.wait(DEADLINE_S)
        assert (directory / "operator").exists()


def test_a_signal_ends_the_broker_cleanly(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start_broker(tmp_path / "run")
        eventually(lambda: answers(tmp_path / "run" / "metrics"))
        process.send_signal(number)
        assert process.wait(DEADLINE_S) == 0
        assert not (tmp_path / "run" / "operator").exists()


def test_only_the_brokers_user_and_root_operate_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert [uid for uid in (0, 1, 999, 1000, 1001, 2**32 - 1) if may_operate(uid)] == [0, 1000]


def test_where_things_are_for_root_and_for_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ISTHMUS_DIR", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert places.runtime_directory() == Path("/run/isthmus")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert places.runtime_directory() == tmp_path / ".cache/isthmus/run"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert places.runtime_directory() == Path("/run/user/1000/isthmus")
    monkeypatch.setenv("ISTHMUS_DIR", "/else/where")
    assert places.runtime_directory() == Path("/else/where")
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert places.state_directory() is None
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/isthmus:/var/lib/more")
    assert places.state_directory() == Path("/var/lib/isthmus")
    assert places.policy_file() is None
    policy = tmp_path / ".config/isthmus/policy.toml"
    policy.parent.mkdir(parents=True)
    policy.write_text("")
    assert places.policy_file() == policy


def test_only_root_opens_doors_for_other_users(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        node.do(lambda: node.broker.add_domain("other", "default", 12_345))
        found = node.door("other").parent.stat()
        assert (found.st_uid, found.st_mode & 0o777) == (12_345, 0o700)
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine or 1000)
    with pytest.raises(
        DoorError, match="uid 54321: only a broker run by root can open doors for other users"
    ):
        node.do(lambda: node.broker.add_domain("another", "default", 54_321))
    assert "another" not in node.broker.domains
    assert not node.door("another").parent.exists()


def test_figures_over_loopback(tmp_path: Path) -> None:
    import asyncio

    from isthmus.broker.service import Service

    async def serve() -> bytes:
        service = Service(tmp_path / "run", metrics_http=("127.0.0.1", 0), log=Log(io.StringIO()))
        await service.start()
        try:
            url = f"http://127.0.0.1:{service.metrics_port}/metrics"
            return await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=DEADLINE_S).read())
        finally:
            await service.close()

    assert b"isthmus_domains 0" in asyncio.run(serve())


def test_a_program_that_dies_by_a_signal_is_noticed(node: Node) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from pathlib import Path; "
        "from broker_client import Program; p = Program(Path(sys.argv[2])); p.bind(9); "
        "print('bound', flush=True); time.sleep(60)"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(node.door("a"))]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"bound\n"
        assert node.holds("a")[4] == 1
        process.kill()
        process.wait(DEADLINE_S)
    eventually(lambda: node.holds("a")[4] == 0)
    with Program(node.door("a")) as program:
        program.bind(9)
