"""`isthmus bench programs`: programs that know nothing of Isthmus, over the bridge and under `isthmus run`.

Stock servers and their stock load generators, in two networks joined by a bridge, three ways: TCP over the
bridge, both under ``isthmus run``, and over a Unix socket of the file system where both programs can, which
two containers could not have. The ways take turns, and each figure is the median of the turns.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.bench import machine
from isthmus.bench.bridge import Bridge

__all__ = ["AS_ORDINARY_USER", "MPI_WAYS", "PROGRAMS", "WAYS", "Bench", "Figures"]
__all__ += ["find", "measure", "record_of", "redis_client"]

#: Over the bridge, under `isthmus run`, over a Unix socket; and with an adapter of ours, over lanes.
WAYS = ("bridge", "run", "unix", "lanes")
START_S = 20.0
#: A client that takes this much longer than it was asked to is stuck.
PATIENCE_S = 30.0

Figures = dict[str, float]


@dataclass(frozen=True)
class Bench:
    """A server and a client.

    Attributes
    ----------
    needs : tuple of str
        Programs that must be installed.
    server : callable
        Its words: given a directory of its own, and the way.
    client : callable
        Its words: given the server's address or, for ``unix``, its socket, or, for ``lanes``, its domain; and
        for how long to work, s.
    read : callable
        Figures from what the client printed.
    port : int
        Where the server listens.
    ways : tuple of str
        Of `WAYS`: over a Unix socket where both can, over lanes where there is an adapter.
    modules : tuple of str
        Python's, that must be installed.
    before : tuple of str
        What starts the server, and `isthmus run` in front of it.
    """

    needs: tuple[str, ...]
    server: Callable[[Path, str], list[str]]
    client: Callable[[str, float], list[str]]
    read: Callable[[str], Figures]
    port: int
    ways: tuple[str, ...] = ("bridge", "run")
    modules: tuple[str, ...] = ()
    before: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Which programs and modules that it needs are not installed."""
        programs = [program for program in self.needs if find(program) is None]
        return programs + [module for module in self.modules if importlib.util.find_spec(module) is None]


#: What runs a command as somebody who is not root, for programs that root may not run. Files stay readable.
AS_ORDINARY_USER = ("unshare", "--user", "--map-user=1000", "--map-group=1000", "--")

#: The environment in which MPICH speaks TCP between hosts, by the library of its that does it.
MPI_WAYS = {
    "libfabric": {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"},
    "ucx": {"MPIR_CVAR_CH4_NETMOD": "ucx", "UCX_TLS": "tcp,self"},
}


def find(program: str) -> str | None:
    """Return the path of an installed program.

    Wheels put theirs beside Python, and Debian those of PostgreSQL's server in a directory for each version.
    Both are preferred to what is on `PATH`.
    """
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    for place in (Path(sys.executable).parent, *reversed(places)):
        if found := shutil.which(program, path=str(place)):
            return found
    return shutil.which(program)


def _redis_server(directory: Path, _: str) -> list[str]:
    options = "--port 6379 --bind 0.0.0.0 --protected-mode no --save"
    return ["redis-server", *options.split(), "", "--dir", str(directory), "--unixsocket", f"{directory}/s"]


def redis_client(to: str, count: int) -> list[str]:
    """Words of a load generator that makes so many requests."""
    where = ["-s", to] if "/" in to else ["-h", to]
    return ["redis-benchmark", *where, "--csv", "-c", "50", "-n", str(count), "-t", "get"]


def _read_redis(text: str) -> Figures:
    names, values = (re.findall(r'"([^"]*)"', line) for line in text.strip().splitlines()[-2:])
    found = dict(zip(names, values, strict=True))
    return {
        "per_second": float(found["rps"]),
        "p50_us": float(found["p50_latency_ms"]) * 1e3,
        "p99_us": float(found["p99_latency_ms"]) * 1e3,
    }


def _read_iperf3(text: str) -> Figures:
    return {"gbytes_per_s": json.loads(text)["end"]["sum_received"]["bits_per_second"] / 8e9}


_NGINX = """
user root;
daemon off;
worker_processes 1;
pid {0}/pid;
error_log stderr;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {0}/1; proxy_temp_path {0}/2; fastcgi_temp_path {0}/3;
    uwsgi_temp_path {0}/4; scgi_temp_path {0}/5;
    keepalive_requests 1000000;
    sendfile on; tcp_nopush on;
    server {{ listen 0.0.0.0:8080; location / {{ root {0}; }} }}
}}
"""


def _nginx_server(directory: Path, _: str) -> list[str]:
    (directory / "conf").write_text(_NGINX.format(directory))
    (directory / "page").write_bytes(b"x" * 10_000)
    return ["nginx", "-p", str(directory), "-e", "stderr", "-c", str(directory / "conf")]


def _wrk(to: str, seconds: float) -> list[str]:
    duration = f"{max(1, round(seconds))}s"
    return ["wrk", "-t", "1", "-c", "16", "-d", duration, "--latency", f"http://{to}:8080/page"]


def _read_wrk(text: str) -> Figures:
    units = {"us": 1.0, "ms": 1e3, "s": 1e6}

    def latency(percent: int) -> float:
        found = re.search(rf"^\s+{percent}%\s+([0-9.]+)(us|ms|s)$", text, re.MULTILINE)
        assert found is not None, text
        return float(found[1]) * units[found[2]]

    found = re.search(r"Requests/sec:\s+([0-9.]+)", text)
    assert found is not None, text
    return {"per_second": float(found[1]), "p50_us": latency(50), "p99_us": latency(99)}


_CONNECT_SERVER = """
import socket
server = socket.create_server(("0.0.0.0", 7100), backlog=1024)
while True:
    server.accept()[0].close()
"""

_CONNECT_CLIENT = """
import socket, sys, time
until, taken = time.perf_counter() + float(sys.argv[2]), []
while (began := time.perf_counter()) < until:
    with socket.socket() as sock:
        began = time.perf_counter()
        sock.connect((sys.argv[1], 7100))
        taken.append((time.perf_counter() - began) * 1e6)
    time.sleep(0.0005)
taken.sort()
print(taken[len(taken) // 2], taken[len(taken) * 99 // 100])
"""


def _read_connect(text: str) -> Figures:
    p50, p99 = map(float, text.split())
    return {"p50_us": p50, "p99_us": p99}


#: What has nothing to do with connections: calls that the filter lets pass.
_FILES = """
import os, socket, sys, time
ours, theirs = socket.socketpair()
file = os.open("/dev/zero", os.O_RDONLY)
read, write = os.pipe()
until, count = time.perf_counter() + float(sys.argv[2]), 0
while time.perf_counter() < until:
    for _ in range(100):
        os.write(write, b"x" * 100); os.read(read, 100)
        ours.send(b"x" * 100); theirs.recv(100)
        os.read(file, 4096); os.fstat(file)
    count += 600
print(count / float(sys.argv[2]))
"""


_DASK_SERVER = """
import asyncio, sys
from distributed import Scheduler, Worker
async def main():
    where = {"protocol": "isthmus://"} if sys.argv[1] == "lanes" else {"host": "0.0.0.0"}
    async with Scheduler(port=8786, dashboard=False, **where) as scheduler:
        async with Worker(sys.argv[2], name="right", nthreads=1, memory_limit=0, dashboard=False):
            await scheduler.finished()
asyncio.run(main())
"""

#: Sixteen arrays of 64 MiB, made by one worker and needed by the other.
_DASK_CLIENT = """
import asyncio, sys, time
import numpy as np
from distributed import Client, Worker
def make(n): return np.full(1 << 23, float(n))
def total(arrays): return sum(array[0] for array in arrays)
async def main():
    async with Worker(sys.argv[1], name="left", nthreads=1, memory_limit=0, dashboard=False):
        async with Client(sys.argv[1], asynchronous=True) as client:
            await client.wait_for_workers(2)
            arrays = client.map(make, range(16), workers=["right"], pure=False)
            await asyncio.gather(*arrays)
            began = time.perf_counter()
            assert await client.submit(total, arrays, workers=["left"]) == sum(range(16))
            print((1 << 30) / (time.perf_counter() - began) / 1e9)
asyncio.run(main())
"""


def _postgres_server(directory: Path, _: str) -> list[str]:
    data, options = directory / "data", f"-k {directory} -p {_POSTGRES_PORT} -c fsync=off"

    def ordinary(program: str, *words: str | Path) -> None:
        command = [*AS_ORDINARY_USER, find(program) or program, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr.strip()}")

    ordinary("initdb", "-A", "trust", "-U", "postgres", "-N", "--no-locale", "-D", data)
    with (data / "pg_hba.conf").open("a") as file:
        file.write(f"host all all {Bridge.left_address}/32 trust\n")
    ordinary("pg_ctl", "-D", data, "-l", directory / "log", "-w", "-o", f"{options} -h ''", "start")
    try:
        ordinary(
            "pgbench", "-i", "-q", "-h", directory, "-p", str(_POSTGRES_PORT), "-U", "postgres", "postgres"
        )
    finally:
        ordinary("pg_ctl", "-D", data, "-w", "stop")
    return [find("postgres") or "postgres", "-D", str(data), *options.split(), "-h", "*"]


_POSTGRES_PORT = 5432

#: pgbench tells how long a transaction took, in microseconds, only in its log; each twentieth is enough.
_PGBENCH = f"""
where="-h $2 -p {_POSTGRES_PORT} -U postgres"
directory=$(mktemp -d) && cd "$directory" && trap 'rm -r "$directory"' EXIT
until "$0" -d postgres $where -q; do sleep 0.05; done
"$1" $where -n -S -c 8 -j 2 -T "$3" -l --sampling-rate=0.05 postgres && cut -d ' ' -f 3 pgbench_log.*
"""


def _pgbench(to: str, seconds: float) -> list[str]:
    where = str(Path(to).parent) if "/" in to else to
    programs = [find(program) or program for program in ("pg_isready", "pgbench")]
    return ["sh", "-c", _PGBENCH, *programs, where, str(max(1, round(seconds)))]


def _read_pgbench(text: str) -> Figures:
    found = re.search(r"^tps = ([0-9.]+)", text, re.MULTILINE)
    assert found is not None, text
    taken = sorted(float(line) for line in re.findall(r"^[0-9]+$", text, re.MULTILINE))
    return {"per_second": float(found[1]), **_percentiles(taken)}


def _percentiles(taken: Sequence[float]) -> Figures:
    """Of sorted times, µs."""
    return {"p50_us": taken[len(taken) // 2], "p99_us": taken[len(taken) * 99 // 100]}


_MPI_PORT = 7200

#: What `sshd` is elsewhere: runs the line that comes.
_MPI_SERVER = f"""
import socket, subprocess
server = socket.create_server(("0.0.0.0", {_MPI_PORT}))
while True:
    sock, _ = server.accept()
    with sock, sock.makefile() as file:
        subprocess.Popen(["sh", "-c", file.read()])
"""

#: Starts a rank here and one there, and prints what they do. MPICH's `manual` launcher only says how.
_MPI_CLIENT = f"""
import socket, subprocess, sys
here, there, mpiexec, *work = sys.argv[1:]
hosts = ["-launcher", "manual", "-localhost", here, "-hosts", here + "," + there, "-n", "2", "-ppn", "1"]
launcher = subprocess.Popen([mpiexec, *hosts, *work], stdout=subprocess.PIPE, text=True)
told = iter(launcher.stdout.readline, "HYDRA_LAUNCH_END\\n")
lines = [line.partition("HYDRA_LAUNCH: ")[2] for line in told]
local = subprocess.Popen(["sh", "-c", lines[0]])
with socket.create_connection((there, {_MPI_PORT}), 20) as sock:
    sock.sendall(lines[1].encode())
print(launcher.communicate()[0])
sys.exit(launcher.wait() or local.wait())
"""

#: Half the time 8 bytes to and fro, the other half 1 MiB one way, of which each 16th is answered.
_MPI_RANK = """
import sys, time
import numpy as np
from mpi4py import MPI
world = MPI.COMM_WORLD
first, seconds = world.Get_rank() == 0, float(sys.argv[1]) / 2
ping, empty, taken = np.zeros(8, "u1"), np.zeros(0, "u1"), []
world.Barrier()
until, more = time.perf_counter() + seconds, True
while more:
    if first:
        began = time.perf_counter()
        ping[0] = more = began < until
        world.Send(ping, 1)
        world.Recv(ping, 1)
        taken.append((time.perf_counter() - began) * 1e6 / 2)
    else:
        world.Recv(ping, 0)
        more = ping[0]
        world.Send(ping, 0)
message, count = np.zeros(1 << 20, "u1"), 0
world.Barrier()
began, more = time.perf_counter(), True
while more:
    if first:
        message[0] = more = time.perf_counter() < began + seconds
        for _ in range(16):
            world.Send(message, 1)
        world.Recv(empty, 1)
        count += 16
    else:
        for _ in range(16):
            world.Recv(message, 0)
        more = message[0]
        world.Send(empty, 0)
if first:
    taken.sort()
    gbytes = count * len(message) / (time.perf_counter() - began) / 1e9
    print(taken[len(taken) // 2], taken[len(taken) * 99 // 100], gbytes)
"""


def _mpi(to: str, seconds: float) -> list[str]:
    variables = [f"{name}={value}" for name, value in MPI_WAYS["libfabric"].items()]
    work = _python(_MPI_RANK, str(seconds))
    client = _python(_MPI_CLIENT, Bridge.left_address, to, find("mpiexec") or "mpiexec", *work)
    return ["env", *variables, *client]


def _read_mpi(text: str) -> Figures:
    p50, p99, gbytes = map(float, text.split())
    return {"p50_us": p50, "p99_us": p99, "gbytes_per_s": gbytes}


def _python(code: str, *words: str) -> list[str]:
    return [sys.executable, "-c", code, *words]


def _dask_address(host: str, way: str) -> str:
    return "isthmus://right:8786" if way == "lanes" else f"tcp://{host}:8786"


#: By name, in the order in which they run.
PROGRAMS: dict[str, Bench] = {
    "redis": Bench(
        ("redis-server", "redis-benchmark"),
        _redis_server,
        lambda to, seconds: redis_client(to, int(60_000 * seconds)),
        _read_redis,
        6379,
        ("bridge", "run", "unix"),
    ),
    "nginx": Bench(("nginx", "wrk"), _nginx_server, _wrk, _read_wrk, 8080),
    "iperf3": Bench(
        ("iperf3",),
        lambda *_: ["iperf3", "-s"],
        lambda to, seconds: ["iperf3", "-c", to, "-J", "-t", str(max(1, round(seconds)))],
        _read_iperf3,
        5201,
    ),
    "postgres": Bench(
        ("postgres", "initdb", "pgbench"),
        _postgres_server,
        _pgbench,
        _read_pgbench,
        _POSTGRES_PORT,
        ("bridge", "run", "unix"),
        before=AS_ORDINARY_USER,
    ),
    "mpi": Bench(
        ("mpiexec",),
        lambda *_: _python(_MPI_SERVER),
        _mpi,
        _read_mpi,
        _MPI_PORT,
        modules=("mpi4py", "numpy"),
    ),
    "connect": Bench(
        (),
        lambda *_: _python(_CONNECT_SERVER),
        lambda to, seconds: _python(_CONNECT_CLIENT, to, str(seconds)),
        _read_connect,
        7100,
    ),
    "files": Bench(
        (),
        lambda *_: _python(_CONNECT_SERVER),
        lambda to, seconds: _python(_FILES, to, str(seconds)),
        lambda text: {"per_second": float(text)},
        7100,
    ),
    "dask": Bench(
        (),
        lambda _, way: _python(_DASK_SERVER, way, _dask_address(Bridge.right_address, way)),
        lambda to, _: _python(_DASK_CLIENT, _dask_address(to, "lanes" if to == "right" else "bridge")),
        lambda text: {"gbytes_per_s": float(text)},
        8786,
        ("bridge", "run", "lanes"),
        modules=("distributed", "numpy"),
    ),
}

_POLICY = f"""
[[domain]]
name = "left"
addresses = "{Bridge.left_address}"

[[domain]]
name = "right"
addresses = "{Bridge.right_address}"
"""


def measure(
    names: Sequence[str], *, repeat: int, seconds: float, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run each program in each way that it has, in turns.

    Returns
    -------
    list of dict
        ``program``, ``way``, ``monitor`` (null), the medians ``per_second``, ``gbytes_per_s``, ``p50_us``,
        ``p99_us`` (null where a program has no such figure), ``cpu_s`` (processor seconds of the whole
        machine for each second of work), ``runs``, ``values`` (of the main figure) and ``machine``.

    Raises
    ------
    ValueError
        A name that is none of `PROGRAMS`.
    BridgeError
        The networks cannot be made here.
    RuntimeError
        A program failed; says which, and what it printed.
    """
    from isthmus.testing import PrivateBroker

    described = machine.describe()
    found = []
    if unknown := sorted(set(names) - set(PROGRAMS)):
        raise ValueError(f"{unknown[0]}: one of {', '.join(PROGRAMS)}")
    with PrivateBroker((), policy=_POLICY) as broker, Bridge() as bridge:
        doors = {side: broker.door(side) for side in ("left", "right")}
        for name in names:
            bench = PROGRAMS[name]
            if missing := bench.missing():
                tell(f"{name}: {', '.join(missing)} is not installed")
                continue
            runs: dict[str, list[Figures]] = {way: [] for way in bench.ways}
            for turn in range(repeat):
                tell(f"{name}: turn {turn + 1} of {repeat}")
                for way in bench.ways:
                    runs[way].append(_run(bench, way, bridge, doors, seconds))
            found += [record_of(name, way, runs[way], described) for way in bench.ways]
    return found


def record_of(
    name: str, way: str, runs: list[Figures], described: dict[str, Any], monitor: str | None = None
) -> dict[str, Any]:
    """The medians of a program's turns in one way, with what they belong to."""
    record: dict[str, Any] = {"bench": "programs", "program": name, "way": way, "monitor": monitor}
    for figure in ("per_second", "gbytes_per_s", "p50_us", "p99_us", "cpu_s"):
        values = [run[figure] for run in runs if figure in run]
        record[figure] = float(f"{statistics.median(values):.6g}") if values else None
    main = next(figure for figure in ("per_second", "gbytes_per_s", "p50_us") if record[figure] is not None)
    record["runs"] = len(runs)
    record["values"] = [float(f"{run[main]:.6g}") for run in runs]
    record["machine"] = described
    return record


def _run(bench: Bench, way: str, bridge: Bridge, doors: dict[str, str], seconds: float) -> Figures:
    def words(side: str, command: list[str]) -> list[str]:
        before = [*bridge.prefix(side), *(bench.before if side == "right" else ())]
        if way != "run":
            return [*before, "env", f"ISTHMUS_DOOR={doors[side]}", *command]
        supervised = [sys.executable, "-m", "isthmus", "run", "--door", doors[side], "--require", "--"]
        return [*before, *supervised, *command]

    with tempfile.TemporaryDirectory() as text:
        directory = Path(text)
        with _server(words("right", bench.server(directory, way))):
            to = {"unix": f"{directory}/s", "lanes": "right"}.get(way, Bridge.right_address)
            if way != "lanes":
                _wait_for(bridge, bench.port)
            busy = machine.busy_seconds()
            began = time.perf_counter()
            done = subprocess.run(
                words("left", bench.client(to, seconds)),
                capture_output=True,
                text=True,
                timeout=seconds + PATIENCE_S,
                check=False,
            )
            took = time.perf_counter() - began
            busy = machine.busy_seconds() - busy
    if done.returncode:
        raise RuntimeError(f"{' '.join(done.args[:12])} …: {done.stderr.strip() or done.stdout.strip()}")
    return {**bench.read(done.stdout), "cpu_s": busy / took}


@contextlib.contextmanager
def _server(words: list[str]) -> Iterator[None]:
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(START_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_for(bridge: Bridge, port: int) -> None:
    """Wait until somebody listens at the port on the right."""
    until = time.monotonic() + START_S
    listening = re.compile(rf"^\s*\d+: [0-9A-F]+:{port:04X} [0-9A-F]+:0000 0A ", re.MULTILINE)
    while True:
        table = subprocess.run(
            [*bridge.prefix("right"), "cat", "/proc/net/tcp", "/proc/net/tcp6"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        if listening.search(table):
            # Whoever listens under `isthmus run` has its port a moment later.
            time.sleep(0.1)
            return
        if time.monotonic() > until:
            raise RuntimeError(f"nobody listens at port {port}")
        time.sleep(0.02)
