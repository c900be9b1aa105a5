"""UCX over POSIX shared memory, by its own `ucx_perftest`: tag matching, no isolation, ordinary pages."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import time

from isthmus.bench.cases import Case
from isthmus.bench.native import Report, report
from isthmus.bench.transports import Job, Transport
from isthmus.bench.worker import Control

__all__ = ["TRANSPORT", "parse_final"]

TIMEOUT_S = 12

#: `ucx_perftest` counts iterations, not seconds. What it manages about, to make a run last as long as the
#: others'.
ROUND_TRIPS_A_SECOND = 2_000_000
BYTES_A_SECOND = 15e9


class TRANSPORT(Transport):
    """Both ends are processes of ucx_perftest."""

    name = "ucx"
    clients = ("native",)
    benches = ("pingpong", "stream", "rate")
    waits = ("spin",)
    start_s = 0.3

    def missing(self) -> str | None:
        """Whether it is installed."""
        return None if shutil.which("ucx_perftest") else "ucx_perftest is not installed (Debian: ucx-utils)"

    def refuses(self, case: Case) -> str | None:
        """It brings its own buffers."""
        if case.data != "hot" or case.pages != "4k":
            return "ucx_perftest has hot buffers on ordinary pages only"
        return super().refuses(case)

    def roles(self, case: Case) -> tuple[str, ...]:
        """One worker starts both ends."""
        return ("alone",)

    def alone(self, job: Job, control: Control) -> Report:
        """Run the server and the client, and read the client's last line."""
        pingpong = job.load == "pingpong"
        rate = (
            ROUND_TRIPS_A_SECOND / (1 + job.size / 2000) if pingpong else BYTES_A_SECOND / (job.size + 1000)
        )
        iterations = max(100, int(rate * job.duration_s))
        # Asked for port 0 it would not say which it got; the one the kernel would give next is free for now.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        tool = shutil.which("ucx_perftest") or "ucx_perftest"
        test = "tag_lat" if pingpong else "tag_bw"
        common = [
            "-p",
            port,
            "-t",
            test,
            "-s",
            str(job.size),
            "-n",
            str(iterations),
            "-w",
            str(iterations // 10 + 1),
        ]
        environment = os.environ | {
            "UCX_TLS": "posix,self",
            "UCX_WARN_UNUSED_ENV_VARS": "n",
            "UCX_LOG_LEVEL": "error",
        }
        control.go()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)

        def start(address: list[str], cpu: int | None) -> subprocess.Popen[str]:
            pin = [] if cpu is None else ["-c", str(cpu)]
            return subprocess.Popen(
                [tool, *address, *common, *pin, "-f"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )

        cpus: list[int | None] = [*job.cpus] if len(job.cpus) > 1 else [None, None]
        server = start([], cpus[1])
        try:
            wait_until_listening(int(port))
            client = start(["127.0.0.1"], cpus[0])
            try:
                output, _ = client.communicate(timeout=TIMEOUT_S)
            finally:
                client.kill()
        finally:
            server.kill()
            server.communicate()
        if client.returncode:
            raise RuntimeError(f"ucx_perftest: {output.strip()[-300:]}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        median_us, mebibytes_per_s = parse_final(output)
        if pingpong:
            return report(
                p50_us=median_us, count=iterations, seconds=iterations * median_us * 2e-6, cpu_s=cpu_s
            )
        moved = iterations * job.size
        warm = moved + moved // 10
        seconds = moved / (mebibytes_per_s * (1 << 20))
        return report(count=iterations, bytes=moved, seconds=seconds, cpu_s=cpu_s, total_bytes=warm)


def parse_final(output: str) -> tuple[float, float]:
    """Return median latency (us, one way) and bandwidth (MiB/s) from ucx_perftest's last line.

    Raises
    ------
    ValueError
        There is no such line.
    """
    for line in reversed(output.splitlines()):
        words = line.replace("Final:", "").split()
        if len(words) == 8:
            # Iterations; latency: median, average, overall; bandwidth: average, overall; rate: average,
            # overall.
            return float(words[1]), float(words[5])
    raise ValueError(f"no figures from ucx_perftest: {output.strip()[-300:]}")


def wait_until_listening(port: int) -> None:
    """Wait until somebody listens on a TCP port; a connection to try it would be taken for the client."""
    entry = f":{port:04X} 00000000:0000 0A"
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with open("/proc/net/tcp") as table:
            if entry in table.read():
                return
        time.sleep(0.01)
    raise TimeoutError("ucx_perftest does not listen")
