"""The monitors and kernels that this machine has, as its packages brought them. Nothing is downloaded."""

from __future__ import annotations

import functools
import os
import platform
import select
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

#: Debian's names of what each monitor needs.
PACKAGES = {
    "uml": "user-mode-linux",
    "qemu": "qemu-system-x86 qemu-system-common linux-image-cloud-amd64 busybox-static",
}
MONITORS = tuple(PACKAGES)
#: Where it works, a kernel speaks within half a second.
KVM_TRIAL_S = 3.0


class Missing(Exception):
    """A program, kernel or module is not there; the text says which, and what to install."""

    def __init__(self, what: str, monitor: str) -> None:
        super().__init__(f"{what}; install {PACKAGES[monitor]} (Debian names)")


@dataclass(frozen=True)
class Kernel:
    """A guest kernel: what to boot, and where its modules are."""

    image: Path
    modules: Path

    def module(self, name: str) -> Path | None:
        """A module's file, or None if it is built in or not there."""
        return self._files().get(name.replace("-", "_"))

    def _files(self) -> dict[str, Path]:
        files = {}
        for path in self.modules.rglob("*.ko*"):
            files[path.name.partition(".ko")[0].replace("-", "_")] = path
        return files


def uml_kernel() -> Kernel:
    """User-mode Linux and the modules of its version.

    Raises
    ------
    Missing
    """
    image = shutil.which("linux.uml")
    if image is None:
        raise Missing("there is no user-mode Linux (linux.uml)", "uml")
    modules = sorted(Path("/usr/lib/uml/modules").glob("*/kernel"))
    if not modules:
        raise Missing("user-mode Linux has no modules in /usr/lib/uml/modules", "uml")
    return Kernel(Path(image), modules[-1])


def qemu_kernel() -> Kernel:
    """The newest kernel in /boot whose modules are here, a cloud kernel if there is one: it boots sooner.

    Raises
    ------
    Missing
    """
    found = []
    for image in Path("/boot").glob("vmlinuz-*"):
        version = image.name.removeprefix("vmlinuz-")
        modules = Path("/lib/modules") / version / "kernel"
        if modules.is_dir() and os.access(image, os.R_OK):
            found.append(("cloud" in version, version, Kernel(image, modules)))
    if not found:
        raise Missing("there is no kernel for guests in /boot", "qemu")
    return max(found, key=lambda entry: entry[:2])[2]


def qemu_program() -> str:
    """The emulator for this machine's kind of processor.

    Raises
    ------
    Missing
    """
    program = f"qemu-system-{platform.machine()}"
    path = shutil.which(program)
    if path is None:
        raise Missing(f"there is no {program}", "qemu")
    return path


@functools.cache
def kvm_works() -> bool:
    """Can this user run guests on the processor itself?

    `/dev/kvm` alone does not say so: some machines have it and cannot make a stock processor with it, others
    make one on which a stock kernel does not start. So one is started, which takes a fraction of a second,
    up to its first words, and what came of it is remembered.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    try:
        command = [qemu_program(), "-M", "q35,accel=kvm", "-cpu", "host", "-m", "256M", "-no-reboot"]
        command += ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
        command += ["-kernel", str(qemu_kernel().image), "-append", "earlyprintk=ttyS0 panic=-1"]
        return _says(command, b"Linux version", KVM_TRIAL_S)
    except (Missing, OSError):
        return False


def _says(command: list[str], words: bytes, seconds: float) -> bool:
    """Whether a program has these words in its output within that time. It is killed then."""
    until = time.monotonic() + seconds
    said = b""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        try:
            while words not in said:
                left = until - time.monotonic()
                if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                    return False
                more = os.read(process.stdout.fileno(), 1 << 16)
                if not more:
                    return False
                said += more
            return True
        finally:
            process.kill()


def choose_monitor() -> str:
    """``qemu`` where it is fast or alone, else ``uml``.

    Raises
    ------
    Missing
        There is neither.
    """
    problems = []
    for monitor, needs in (("qemu", (qemu_program, qemu_kernel)), ("uml", (uml_kernel,))):
        if monitor == "qemu" and not kvm_works() and shutil.which("linux.uml"):
            continue
        try:
            for need in needs:
                need()
            return monitor
        except Missing as error:
            problems.append(error)
    raise problems[-1]
