"""mpi4py: two ranks of whichever MPI is installed, started by its own launcher.

The loops in Python go through mpi4py, the native ones are a C program that MPI's own compiler makes first.

MPI matches tags and polls many peers, which the rings do not; and its ranks map each other's memory or read
it through the kernel, which strangers may not.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from isthmus.bench import loops
from isthmus.bench.cases import Case, Settings
from isthmus.bench.native import Report, report
from isthmus.bench.transports import Job, Setup, Transport, why_not_importable
from isthmus.bench.worker import Control

__all__ = ["TRANSPORT", "main"]

TIMEOUT_S = 12
COMPILE_S = 60
#: Small messages that are under way at a time.
MANY = 32


class TRANSPORT(Transport):
    """Blocking calls, or many under way; both libraries spin while they wait."""

    name = "mpi4py"
    clients = ("native", "python")
    benches = ("pingpong", "stream", "rate", "overlap")
    waits = ("spin",)
    start_s = 0.8

    def missing(self) -> str | None:
        """Whether it, an MPI and a launcher are installed."""
        if reason := why_not_importable("mpi4py", "mpi4py"):
            return reason
        if launcher() is None:
            return "no mpiexec; install MPICH or Open MPI (pip install mpich does)"
        probe = subprocess.run(
            [sys.executable, "-c", "from mpi4py import MPI"],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        return probe.stderr.strip().splitlines()[-1] if probe.returncode else None

    def refuses(self, case: Case) -> str | None:
        """The native loops must be compiled, and have one kind of buffer."""
        if case.client == "native" and compiler() is None:
            return "no mpicc, or no C compiler for it, to make the native loops"
        if case.client == "native" and (case.data != "hot" or case.pages != "4k"):
            return "the native loops of MPI have hot buffers on ordinary pages only"
        return super().refuses(case)

    def prepare(self, stack: ExitStack, settings: Settings) -> Setup:
        """Compile the native loops, if anybody may want them."""
        mpicc = compiler()
        if mpicc is None or (settings.clients and "native" not in settings.clients):
            return Setup()
        program = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="isthmus-mpi-")), "mpi_loops")
        source = Path(__file__).with_name("mpi_loops.c")
        done = subprocess.run(
            [mpicc, "-O2", "-o", program, source], capture_output=True, text=True, timeout=COMPILE_S
        )
        failure = (done.stderr or done.stdout).strip()[-300:] if done.returncode else ""
        return Setup(options={"alone": {"loops": str(program), "failure": failure}})

    def roles(self, case: Case) -> tuple[str, ...]:
        """The launcher starts both ends."""
        return ("alone",)

    def alone(self, job: Job, control: Control) -> Report:
        """Launch the two ranks and wait for what rank 0 prints."""
        ranks = [sys.executable, "-m", __name__, json.dumps(job.as_dict())]
        if job.case.client == "native":
            if job.options["failure"]:
                raise RuntimeError(f"mpicc: {job.options['failure']}")
            ahead = MANY if job.case.bench == "rate" else 0
            figures = [job.size, job.warmup_s, job.duration_s, ahead, *job.cpus[:2]]
            ranks = [job.options["loops"], job.load, *map(str, figures)]
        command = [launcher() or "mpiexec", "-n", "2", *ranks]
        # Open MPI refuses root otherwise, and binds both ranks to one core of two.
        extra = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        extra |= {"OMPI_MCA_hwloc_base_binding_policy": "none", "HYDRA_TOPO_DEBUG": "0"}
        control.go()
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | extra, timeout=TIMEOUT_S, check=False
        )
        if done.returncode:
            raise RuntimeError(f"mpiexec: {(done.stderr or done.stdout).strip()[-300:]}")
        told = json.loads(done.stdout)
        control.detail["mpi"] = " ".join(told["library"].split())
        control.detail["launcher_cpu_s"] = children_cpu_seconds()
        return cast(Report, {**report(), **told["report"]})


def launcher() -> str | None:
    """Return MPI's launcher, if it is installed."""
    return beside("mpiexec")


def compiler() -> str | None:
    """Return MPI's compiler, if it and the one that it calls are installed."""
    return beside("mpicc") if shutil.which("cc") or shutil.which("gcc") else None


def beside(tool: str) -> str | None:
    """Return the tool beside this Python, or the one on the path."""
    own = os.path.join(os.path.dirname(sys.executable), tool)
    return own if os.access(own, os.X_OK) else shutil.which(tool)


def children_cpu_seconds() -> float:
    """Return the CPU seconds of every child that was waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Channel:
    """Send to, and receive from, the other rank."""

    def __init__(self, mpi: Any) -> None:
        self._comm = mpi.COMM_WORLD
        self._peer = 1 - self._comm.Get_rank()
        self._byte = mpi.BYTE

    def send(self, message: bytearray) -> None:
        """Return when the message may be overwritten."""
        self._comm.Send([message, self._byte], self._peer)

    def recv_into(self, message: bytearray) -> None:
        """Return when all of it is here."""
        self._comm.Recv([message, self._byte], self._peer)

    def isend(self, message: bytearray) -> Any:
        """Begin to send."""
        return self._comm.Isend([message, self._byte], self._peer)

    def irecv(self, message: bytearray) -> Any:
        """Post a receive."""
        return self._comm.Irecv([message, self._byte], self._peer)

    def wait(self, request: Any) -> None:
        """Wait for it."""
        request.Wait()

    def cancel(self, request: Any) -> None:
        """Take a receive back."""
        request.Cancel()
        request.Wait()


def play(job: Job, channel: Channel) -> Report:
    """Play the job's part with the other rank."""
    if job.load == "overlap":
        return loops.overlap(job, channel)
    if job.case.bench == "rate":
        return loops.play(job, loops.Ahead(channel, job.size, MANY))
    return loops.play(job, channel)


def main() -> None:
    """One rank: 0 is the client, and prints what both found."""
    fields = json.loads(sys.argv[1])
    mpi: Any = importlib.import_module("mpi4py.MPI")
    comm = mpi.COMM_WORLD
    rank = comm.Get_rank()
    job = Job.from_dict({**fields, "role": ("client", "server")[rank]})
    if job.cpus:
        os.sched_setaffinity(0, [job.cpus[rank % len(job.cpus)]])
    comm.Barrier()
    reports = comm.gather(play(job, Channel(mpi)), root=0)
    if rank == 0:
        client, server = reports
        found = client if job.load == "pingpong" else server
        both = {**found, "cpu_s": client["cpu_s"] + server["cpu_s"]}
        library = mpi.Get_library_version().split("\n")[0].strip("\0 ")
        print(json.dumps({"report": both, "library": library}))


if __name__ == "__main__":
    main()
