"""PostgreSQL and its clients under `isthmus run`, in two networks joined by a bridge."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import LIMIT_S, becomes
from networks import Net, Program

import isthmus
from isthmus.bench.bridge import Bridge
from isthmus.bench.programs import AS_ORDINARY_USER, find

PORT = 5432
ROWS = 500_000

pytestmark = pytest.mark.skipif(
    not (find("postgres") and find("initdb") and find("pgbench")), reason="PostgreSQL is not installed"
)


class Server:
    """A stock server on the right, and clients of it."""

    def __init__(self, net: Net, directory: Path) -> None:
        self.net = net
        self._directory = directory
        self._program: Program | None = None

    def start(self) -> None:
        words = f"-D {self._directory} -k {self._directory} -p {PORT} -c listen_addresses=* -c fsync=off"
        postgres = find("postgres") or ""
        self._program = self.net.start("right", postgres, *words.split(), before=AS_ORDINARY_USER)
        becomes(lambda: self.net.broker.ask("status", domain="b")["domain"]["ports"])
        # It listens before it has recovered.
        becomes(lambda: self.psql("select 1", run=False).end()[0] == 0)

    def stop(self) -> None:
        """As `pg_ctl stop -m fast` does: open connections end."""
        assert self._program is not None
        self._program.process.send_signal(signal.SIGINT)
        assert self._program.end()[0] == 0
        becomes(lambda: not self.net.broker.ask("status", domain="b")["domain"]["ports"])

    def client(self, program: str, *words: str, **more: bool) -> Program:
        where = ["-h", Bridge.right_address, "-p", str(PORT), "-U", "postgres"]
        return self.net.start("left", find(program) or program, *where, *words, **more)

    def psql(self, command: str, **more: bool) -> Program:
        return self.client("psql", "-d", "postgres", "-XAtqc", command, **more)

    def answer(self, command: str) -> str:
        code, out, err = self.psql(command).end()
        assert code == 0, err
        return out.strip()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("postgres")
    initdb = [find("initdb") or "", "-A", "trust", "-U", "postgres", "-N", "--no-locale"]
    command = [*AS_ORDINARY_USER, *initdb, "-D", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with (directory / "pg_hba.conf").open("a") as file:
        file.write(f"host all all {Bridge.left_address}/32 trust\n")
        # A kernel socket goes to a port, not to an address: the listener of IPv6 may take it.
        file.write(f"host all all ::ffff:{Bridge.left_address}/128 trust\n")
    return directory


@pytest.fixture
def server(net: Net, cluster: Path) -> Iterator[Server]:
    server = Server(net, cluster)
    server.start()
    net.begin()
    yield server
    server.stop()


def mark(what: str) -> pytest.MarkDecorator:
    return pytest.mark.program(
        "PostgreSQL", f"{find('postgres') or 'postgres'} --version", "`isthmus run`", what
    )


@mark("psql, `COPY` of 40 MB both ways, addresses as the server sees them; a TCP client beside it")
def test_postgresql_copies_large_tables(server: Server, tmp_path: Path) -> None:
    net = server.net
    ask = "select inet_client_addr(), inet_server_addr(), inet_server_port()"
    ends = f"{Bridge.left_address}|{Bridge.right_address}|{PORT}"
    code, out, _ = server.psql(ask, run=False).end()
    assert (code, out.strip()) == (0, ends)
    assert net.sockets() == 0
    before = net.bytes_on_the_bridge()
    assert server.answer(ask) == ends
    table = tmp_path / "table"
    rows = f"select n, repeat(md5(n::text), 2) from generate_series(1, {ROWS}) n"
    assert server.answer("drop table if exists big; create table big (n int, words text)") == ""
    assert server.answer(f"\\copy ({rows}) to '{table}'") == ""
    assert table.stat().st_size > 35_000_000
    assert server.answer(f"\\copy big from '{table}'") == ""
    assert server.answer("select count(*), sum(n) from big") == f"{ROWS}|{ROWS * (ROWS + 1) // 2}"
    assert net.bytes_on_the_bridge() - before < 10_000
    assert net.sockets() == 5
    assert net.fallbacks() == {}


@mark("pgbench, 20 clients at once in 2 threads, and a new connection for each of 200 transactions")
def test_pgbench_with_many_clients(server: Server) -> None:
    def pgbench(*words: str) -> str:
        code, out, err = server.client("pgbench", *words, "postgres").end()
        assert code == 0, err
        return out

    net = server.net
    pgbench("-i", "-q", "-s", "1")
    before = net.bytes_on_the_bridge()
    taken = net.sockets()
    assert "10000/10000" in pgbench("-n", "-S", "-M", "prepared", "-c", "20", "-j", "2", "-t", "500")
    assert net.sockets() - taken >= 20
    taken = net.sockets()
    assert "200/200" in pgbench("-n", "-C", "-c", "4", "-t", "50")
    assert net.sockets() - taken >= 200
    assert net.bytes_on_the_bridge() - before < 10_000
    assert net.fallbacks() == {}


@mark("a query that is cancelled, over a second connection that psql makes while it handles a signal")
def test_a_query_is_cancelled(server: Server) -> None:
    sleep = "select pg_sleep(100)"
    patient = server.psql(sleep)
    active = f"select count(*) from pg_stat_activity where state = 'active' and query = '{sleep}'"
    becomes(lambda: server.answer(active) == "1")
    before = server.net.sockets()
    patient.process.send_signal(signal.SIGINT)
    code, _, err = patient.end()
    assert code == 1
    assert "canceling statement due to user request" in err
    assert server.net.sockets() - before == 1
    assert server.net.fallbacks() == {}


CLIENT = """
import os, sys, psycopg
where = sys.argv[1]
def tcp(connection):
    inode = str(os.fstat(connection.fileno()).st_ino)
    return inode in [line.split()[9] for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}")]
def work(connection):
    with connection.cursor() as cursor:
        data = os.urandom(1_000_000)
        assert cursor.execute("select %b::bytea", (data,)).fetchone()[0] == data
        with cursor.copy("copy (select generate_series(1, 100000)) to stdout") as rows:
            assert sum(int(row) for (row,) in rows.rows()) == 5000050000
    with connection.pipeline():
        answers = [connection.execute("select %s::int", (n,)) for n in range(500)]
    assert [answer.fetchone()[0] for answer in answers] == list(range(500))
first = psycopg.connect(where, autocommit=True)
work(first)
print("tcp" if tcp(first) else "socket")
input()
try:
    first.execute("select 1")
except psycopg.OperationalError:
    print("ended")
input()
second = psycopg.connect(where, autocommit=True)
work(second)
print("tcp" if tcp(second) else "socket")
import asyncio
async def one(n):
    async with await psycopg.AsyncConnection.connect(where) as connection:
        found = await connection.execute("select %s::int, pg_sleep(0.1)", (n,))
        return (await found.fetchone())[0]
async def many():
    assert await asyncio.gather(*(one(n) for n in range(20))) == list(range(20))
    async with await psycopg.AsyncConnection.connect(where) as connection:
        asleep = asyncio.create_task(connection.execute("select pg_sleep(100)"))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(connection.cancel)
        try:
            await asleep
        except psycopg.errors.QueryCanceled:
            print("cancelled")
asyncio.run(many())
"""


def python_with_psycopg() -> str:
    """Ours or the system's: its licence is not one that a development environment of ours may need."""
    for python in (sys.executable, "/usr/bin/python3"):
        command = [python, "-c", "import psycopg"]
        if Path(python).exists() and not subprocess.run(command, capture_output=True, check=False).returncode:
            return python
    return ""


PSYCOPG = python_with_psycopg()


@pytest.mark.program(
    "psycopg",
    f"{PSYCOPG or 'python3'} -c 'import psycopg; print(psycopg.__version__)'",
    "`isthmus run`",
    "1 MB values, `COPY`, pipelines, 20 connections in asyncio, a cancelled query, a restarted server",
)
@pytest.mark.skipif(not PSYCOPG, reason="psycopg is not installed")
def test_psycopg_and_a_server_that_is_restarted(server: Server) -> None:
    net = server.net
    before = net.bytes_on_the_bridge()
    where = f"host={Bridge.right_address} port={PORT} user=postgres dbname=postgres"
    client = net.start("left", PSYCOPG, "-u", "-c", CLIENT, where, stdin=True)
    assert client.line() == "socket"
    server.stop()
    client.say("go")
    assert client.line() == "ended"
    server.start()
    client.say("go")
    assert client.line() == "socket"
    assert client.line() == "cancelled"
    assert client.end()[0] == 0
    assert net.bytes_on_the_bridge() - before < 20_000
    # Two, twenty, and two for what is cancelled.
    assert net.sockets() >= 24
    # While the server was away its port was nobody's.
    assert all("nobody listens" in why for why in net.fallbacks())


@pytest.mark.program("pg8000", "pg8000", "`kernel_socket`", "1 MB values, to a server under `isthmus run`")
@pytest.mark.skipif(not importlib.util.find_spec("pg8000"), reason="pg8000 is not installed")
def test_pg8000_takes_a_kernel_socket(server: Server) -> None:
    import pg8000.native

    node = isthmus.attach(server.net.broker.door("a"))
    sock = isthmus.kernel_socket(("b", PORT), LIMIT_S, node=node)
    with sock, contextlib.closing(pg8000.native.Connection("postgres", sock=sock)) as connection:
        [[address]] = connection.run("select host(inet_client_addr())")
        assert address.removeprefix("::ffff:") == Bridge.left_address
        data = os.urandom(1_000_000)
        assert connection.run("select :data::bytea", data=data) == [[data]]
        (seen,) = server.net.connections()
        assert (seen["path"], seen["peer"]) == ("socket", "b")
