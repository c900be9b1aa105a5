"""The monitors and kernels that this machine has, as its packages brought them. Nothing is downloaded."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

#: Debian's names of what each monitor needs.
PACKAGES = {
    "uml": "user-mode-linux",
    "qemu": "qemu-system-x86 qemu-system-common linux-image-cloud-amd64 busybox-static",
}
MONITORS = tuple(PACKAGES)
KVM_TRIAL_S = 10.0


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

    `/dev/kvm` alone does not say so: some machines have it and cannot run a stock processor with it. So one
    is made, which takes a fraction of a second, and remembered.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    try:
        command = [qemu_program(), "-M", "q35,accel=kvm", "-cpu", "host", "-m", "64M", "-S"]
        command += ["-nodefaults", "-no-user-config", "-display", "none", "-monitor", "stdio"]
        tried = subprocess.run(
            command, input=b"quit\n", capture_output=True, timeout=KVM_TRIAL_S, check=False
        )
    except (Missing, OSError, subprocess.TimeoutExpired):
        return False
    return tried.returncode == 0


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
