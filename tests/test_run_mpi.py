"""MPI between two containers: the ranks under `isthmus run`, in two networks joined by a bridge."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from networks import Net

from isthmus.bench.bridge import Bridge
from isthmus.bench.programs import MPI_WAYS, find

#: What one rank does; the other does the same.
WORK = """
import numpy as np
from mpi4py import MPI
world = MPI.COMM_WORLD
rank, size = world.Get_rank(), world.Get_size()
assert size == 2
other = 1 - rank
for length in (0, 1, 100, 70_001, 5_000_000):
    data = np.random.default_rng(rank).integers(256, size=length, dtype="u1")
    wanted = np.random.default_rng(other).integers(256, size=length, dtype="u1")
    got = np.empty_like(data)
    for _ in range(5):
        requests = [world.Isend(data, other), world.Irecv(got, other)]
        MPI.Request.Waitall(requests)
        assert (got == wanted).all()
for turn in range(1000):
    if rank == turn % 2:
        world.send({"turn": turn}, other)
    else:
        assert world.recv(source=other) == {"turn": turn}
numbers = np.arange(1_000_000.0) * (rank + 1)
total = np.empty_like(numbers)
world.Allreduce(numbers, total)
assert (total == np.arange(1_000_000.0) * 3).all()
assert world.alltoall([f"{rank} to {n}" for n in range(size)]) == [f"{n} to {rank}" for n in range(size)]
memory = np.zeros(1_000_000)
window = MPI.Win.Create(memory, comm=world)
window.Fence()
window.Put(numbers, other)
window.Fence()
assert (memory == np.arange(1_000_000.0) * (other + 1)).all()
window.Free()
if world.gather(rank) == [0, 1]:
    print("done")
"""


def why_not() -> str:
    if find("mpiexec") is None or not importlib.util.find_spec("mpi4py"):
        return "MPICH or mpi4py is not installed"
    told = subprocess.run([find("mpiexec") or "", "--version"], capture_output=True, text=True, check=False)
    return "" if "HYDRA" in told.stdout else "the launcher is not MPICH's"


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.mark.program(
    "MPICH",
    "mpich",
    "`isthmus run`",
    "mpi4py: messages of up to 5 MB, collectives, one-sided writes; libfabric's and UCX's TCP",
)
@pytest.mark.parametrize("way", MPI_WAYS)
def test_ranks_in_two_containers(net: Net, way: str) -> None:
    """Started by hand, as one does where no shell leads from one container into the other."""
    before = net.bytes_on_the_bridge()
    hosts = f"{Bridge.left_address},{Bridge.right_address}"
    words = f"-launcher manual -localhost {Bridge.left_address} -hosts {hosts} -n 2 -ppn 1"
    environment = {**MPI_WAYS[way], "OMP_NUM_THREADS": "1"}
    work = [sys.executable, "-c", WORK]
    launcher = net.start("left", find("mpiexec") or "", *words.split(), *work, environment=environment)
    commands = []
    while (line := launcher.line()) != "HYDRA_LAUNCH_END":
        commands.append(line.removeprefix("HYDRA_LAUNCH: "))
    assert len(commands) == 2
    for side, command in zip(("left", "right"), commands, strict=True):
        net.start(side, "sh", "-c", f"exec {command}")
    code, out, err = launcher.end()
    assert code == 0, err
    assert out.strip() == "done"
    # A hundred times as much was said.
    assert net.bytes_on_the_bridge() - before < 500_000
    assert net.sockets() >= 2


def test_ranks_started_from_outside(net: Net, tmp_path: Path) -> None:
    """Without `isthmus run` for the launcher, and a script in the place of `docker exec`."""
    enter = tmp_path / "enter"
    left, right = (shlex.join(net.command(side, "sh", "-c")) for side in ("left", "right"))
    enter.write_text(f'#!/bin/sh\nhost=$1; shift\n[ $host = a ] && exec {left} "$*"\nexec {right} "$*"\n')
    enter.chmod(0o755)
    before = net.bytes_on_the_bridge()
    words = f"-launcher rsh -launcher-exec {enter} -localhost {Bridge.left_address} -hosts a,b -n 2 -ppn 1"
    work = [find("mpiexec") or "", *words.split(), sys.executable, "-c", WORK]
    assert net.output("left", *work, run=False, environment=MPI_WAYS["libfabric"]).strip() == "done"
    # What the launcher says to the ranks goes over TCP.
    assert net.bytes_on_the_bridge() - before < 500_000
    assert net.sockets() >= 2
