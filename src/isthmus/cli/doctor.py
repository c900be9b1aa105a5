"""`isthmus doctor`: what this machine offers, what is missing, and what to do about it."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

from .client import DoorClient, ask, door_here
from .output import EXIT_FAILED, Problem, dir_option, json_option, runtime_dir, say_json, table, wants_json

#: The oldest kernel that this is tested for, and the first with MADV_COLLAPSE.
KERNEL_LEAST = (5, 14)
KERNEL_COLLAPSE = (6, 1)
#: Enough descriptors for a few hundred connections at once.
DESCRIPTORS_LEAST = 4096
#: The smallest number of a guest, and the huge pages that one connection in it takes.
GUEST_CID_MIN = 3
SEAT_HUGE_PAGES = 4
HUGE = 2 << 20

_F_ADD_SEALS = 1033
_SEALS = {"SEAL": 1, "SHRINK": 2, "GROW": 4, "FUTURE_WRITE": 0x10}
_MADV_COLLAPSE = 25
_THP = Path("/sys/kernel/mm/transparent_hugepage")


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    state: Literal["ok", "warn", "fail"]
    what: str
    do: str = ""


Check = Callable[[], Iterator[Finding]]


def check_kernel() -> Iterator[Finding]:
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version >= KERNEL_LEAST:
        yield Finding("kernel", "ok", f"Linux {platform.release()}")
    else:
        least = ".".join(map(str, KERNEL_LEAST))
        yield Finding("kernel", "fail", f"Linux {platform.release()}", f"use {least} or newer")


def check_seals() -> Iterator[Finding]:
    try:
        fd = os.memfd_create("isthmus-doctor", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    except OSError as error:
        yield Finding(
            "memfd", "fail", f"memfd_create: {error.strerror}", "allow memfd_create (a seccomp filter?)"
        )
        return
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        fcntl.fcntl(fd, _F_ADD_SEALS, sum(_SEALS.values()))
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        os.close(reader)
    except FileNotFoundError:
        yield Finding("memfd", "fail", "sealed memory cannot be opened again", "mount /proc in the container")
        return
    except OSError as error:
        yield Finding("memfd", "fail", f"sealing memory: {error.strerror}", "use Linux 5.1 or newer")
        return
    finally:
        os.close(fd)
    yield Finding("memfd", "ok", f"seals {', '.join(_SEALS)} hold")


def check_collapse() -> Iterator[Finding]:
    error = _collapse()
    if error is None:
        yield Finding("huge pages", "ok", "MADV_COLLAPSE makes huge pages of a ring")
    else:
        need = ".".join(map(str, KERNEL_COLLAPSE))
        do = f"large messages are slower without; use Linux {need} or newer with transparent huge pages"
        yield Finding("huge pages", "warn", f"MADV_COLLAPSE: {error}", do)


def _collapse() -> str | None:
    """Make a huge page of a memfd, as a ring does. Returns why it does not work."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    fixed = 0x10
    fd = os.memfd_create("isthmus-doctor", os.MFD_CLOEXEC)
    failed = ctypes.c_void_p(-1).value
    space = libc.mmap(None, 2 * HUGE, 0, anonymous, -1, 0)
    try:
        os.ftruncate(fd, HUGE)
        if space == failed:
            return os.strerror(ctypes.get_errno())
        aligned = (space + HUGE - 1) // HUGE * HUGE
        if libc.mmap(aligned, HUGE, protection, mmap.MAP_SHARED | fixed, fd, 0) == failed:
            return os.strerror(ctypes.get_errno())
        ctypes.memset(aligned, 1, HUGE)
        if libc.madvise(aligned, HUGE, _MADV_COLLAPSE) != 0:
            return os.strerror(ctypes.get_errno())
        return None
    finally:
        os.close(fd)
        if space != failed:
            libc.munmap(space, 2 * HUGE)


def check_shmem_enabled() -> Iterator[Finding]:
    chosen = _chosen(_THP / "shmem_enabled")
    name = "shmem_enabled"
    if chosen is None:
        yield Finding(
            name, "warn", "this kernel has no transparent huge pages", "strict connections stay slower"
        )
    elif chosen in ("never", "deny"):
        do = f"for strict connections of full speed: echo advise > {_THP}/shmem_enabled"
        yield Finding(name, "warn", f"{chosen}: sealed lanes do without, strict ones may get small pages", do)
    else:
        yield Finding(name, "ok", f"{chosen}: strict connections get huge pages as well")


def check_thp() -> Iterator[Finding]:
    chosen = _chosen(_THP / "enabled")
    if chosen in ("always", "madvise"):
        yield Finding("thp", "ok", f"{chosen}: application buffers can have huge pages")
    else:
        do = f"for large messages: echo madvise > {_THP}/enabled"
        yield Finding("thp", "warn", f"{chosen or 'absent'}: application buffers stay on small pages", do)


def _chosen(path: Path) -> str | None:
    try:
        found = re.search(r"\[(\w+)\]", path.read_text())
    except OSError:
        return None
    return found[1] if found else None


def check_descriptors() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard >= DESCRIPTORS_LEAST:
        yield Finding("open files", "ok", f"{soft}, may be raised to {hard}; a connection takes about 4")
    else:
        do = "raise the hard limit: LimitNOFILE= of the service, --ulimit nofile= of the container"
        yield Finding("open files", "warn", f"at most {hard}; a connection takes about 4", do)


def check_neighbours() -> Iterator[Finding]:
    """What programs of one user can do to each other, whatever Isthmus does."""
    try:
        options = next(
            line.split()[3]
            for line in Path("/proc/mounts").read_text().splitlines()
            if line.split()[1] == "/proc"
        )
    except (OSError, StopIteration, IndexError):
        yield Finding("/proc", "fail", "it is not mounted", "mount /proc; memory is sealed through it")
        return
    hidden = re.search(r"hidepid=(\w+)", options)
    what = f"hidepid={hidden[1]}" if hidden else "hidepid is not set: users see each other's processes"
    yield Finding(
        "/proc",
        "ok",
        what,
    )
    scope = _read("/proc/sys/kernel/yama/ptrace_scope")
    if scope in ("1", "2", "3"):
        yield Finding("ptrace", "ok", f"yama ptrace_scope is {scope}")
    else:
        what = "programs of one user in one PID namespace can trace each other" + (
            " (yama ptrace_scope is 0)" if scope == "0" else ""
        )
        do = "give domains users or PID namespaces of their own, or sysctl kernel.yama.ptrace_scope=1"
        yield Finding("ptrace", "warn", what, do)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def check_stalls() -> Iterator[Finding]:
    """What lets a receiver hold up its sender where the kernel copies: docs/howto/strict.md."""
    name = "strict receivers"
    ways = []
    if _read("/proc/sys/vm/unprivileged_userfaultfd") == "1":
        ways.append(("every program may use userfaultfd", "sysctl vm.unprivileged_userfaultfd=0"))
    if door_here() is not None:
        devices = [path for path in ("/dev/userfaultfd", "/dev/fuse") if os.access(path, os.R_OK | os.W_OK)]
        ways += [(f"this container has {path}", f"run it without {path}") for path in devices]
    for what, do in ways:
        yield Finding(name, "warn", f"{what}: a receiver can hold up its sender on strict connections", do)
    if not ways:
        yield Finding(name, "ok", "nothing found by which they could hold up their senders")


def check_namespaces() -> Iterator[Finding]:
    """Needed for isolated neighbours that an ordinary user makes, as in the demo; not for a broker."""
    tool = shutil.which("unshare")
    if tool is None:
        yield Finding(
            "user namespaces",
            "warn",
            "unshare is not installed",
            "install util-linux to check, and for the demo",
        )
    elif subprocess.run([tool, "-Ur", "true"], capture_output=True, check=False, timeout=20).returncode == 0:
        yield Finding("user namespaces", "ok", "this user can make them")
    else:
        do = "the demo needs them, or root: see sysctl user.max_user_namespaces"
        yield Finding("user namespaces", "warn", "this user cannot make them", do)
    bwrap = shutil.which("bwrap")
    if bwrap:
        yield Finding("bubblewrap", "ok", bwrap)
    else:
        yield Finding(
            "bubblewrap", "warn", "bwrap is not installed", "for the demo: apt-get install bubblewrap"
        )


def check_guest() -> Iterator[Finding]:
    """In a virtual machine: the socket device, and what makes lanes fast."""
    from isthmus.vsock import local_cid

    try:
        cid = local_cid()
    except OSError:
        return  # Not a guest with a socket device; nothing to say.
    if cid < GUEST_CID_MIN or cid > 0xFFFF_FFF0:
        return
    yield Finding("guest", "ok", f"a guest; its number is {cid}")
    door = Path("/run/isthmus/door/door")
    if not door.exists():
        yield Finding(
            "agent", "warn", "no agent: programs have plain AF_VSOCK only", "as root: isthmus agent &"
        )
        return
    yield Finding("agent", "ok", f"programs find their door at {door}")
    try:
        pages = int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())
    except (OSError, ValueError):
        pages = 0
    what = f"{pages} huge pages of 2 MiB are free"
    if pages >= SEAT_HUGE_PAGES:
        yield Finding("huge pages", "ok", what)
    else:
        yield Finding(
            "huge pages", "warn", what, "hugepages=16 on the kernel command line; four a connection"
        )
    if "iomem=relaxed" in Path("/proc/cmdline").read_text():
        yield Finding("doorbell", "ok", "programs of root may ring by a store, where the device is on PCI")
    elif Path("/sys/bus/pci/drivers/virtio-pci").exists():
        yield Finding(
            "doorbell", "warn", "each bell is a system call", "iomem=relaxed on the kernel command line"
        )


def check_broker(directory: Path) -> Iterator[Finding]:
    door = door_here()
    try:
        pid = ask(directory, "ping")["pid"]
        yield Finding("broker", "ok", f"process {pid} serves {directory}")
    except Problem as problem:
        what, _, do = problem.message.partition("; ")
        # Behind a door the operator's socket is out of reach, as it should be.
        yield Finding("broker", "ok" if door else "warn", what, "" if door else do)
    if door is None:
        return
    try:
        with DoorClient(door, "isthmus doctor") as client:
            name, node = client.welcome["domain_name"], client.welcome["node"]
        yield Finding("door", "ok", f"{door}: domain {name} on node {node}")
    except Problem as problem:
        yield Finding(
            "door", "fail", problem.message, "check ISTHMUS_DOOR and the mount of the door's directory"
        )


CHECKS: tuple[Check, ...] = (
    check_kernel,
    check_seals,
    check_collapse,
    check_shmem_enabled,
    check_thp,
    check_descriptors,
    check_neighbours,
    check_stalls,
    check_namespaces,
    check_guest,
)


def examine(directory: Path) -> list[Finding]:
    """Do every check; one that breaks is itself a finding."""
    found: list[Finding] = []
    checks: tuple[Check, ...] = (*CHECKS, lambda: check_broker(directory))
    for check in checks:
        try:
            found.extend(check())
        except (OSError, subprocess.SubprocessError) as error:
            name = getattr(check, "__name__", "check").removeprefix("check_")
            found.append(Finding(name, "warn", f"could not be checked: {error}"))
    return found


@click.command()
@json_option
@dir_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, directory: str | None) -> None:
    """Check this machine, and say what to do. Exit code 1 if something must be done."""
    found = examine(runtime_dir(ctx, directory))
    if wants_json(ctx, as_json):
        say_json([asdict(finding) for finding in found])
    else:
        rows = ((f.state, f.check, f"{f.what}\n-> {f.do}" if f.do else f.what) for f in found)
        table(None, ("", "check", "what, and what to do about it"), rows)
    if any(finding.state == "fail" for finding in found):
        ctx.exit(EXIT_FAILED)
