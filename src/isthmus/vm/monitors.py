"""The command line of each monitor for a small guest."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from .kernels import Kernel, Missing, kvm_works, qemu_kernel, qemu_program, uml_kernel

#: In the order in which they are loaded.
VSOCK_MODULES = ("vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport")
#: What a PCI guest needs before anything else, and for its root file system.
_PCI_MODULES = ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci")
_ROOT_MODULES = {"virtiofs": ("fuse", "virtiofs"), "9p": ("netfs", "fscache", "9pnet", "9pnet_virtio", "9p")}
_NIC_MODULES = ("failover", "net_failover", "virtio_net")

INIT = Path(__file__).with_name("guest_init")


@dataclass
class Setting:
    """What a monitor is told."""

    directory: Path
    socket: str
    memory_mib: int
    #: A tap device for a network card, where one is wanted.
    tap: str | None = None
    mac: str | None = None
    #: Ends of pipes that the monitor inherits: the job's input and output, and what becomes of it.
    input: int = -1
    output: int = -1
    control: int = -1
    #: Huge pages of 2 MiB that the guest keeps for itself.
    huge_pages: int = 0
    #: Of the guest's kernel, and of the monitor.
    extra: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass
class Plan:
    """How to start a monitor: programs that must run beside it, and itself."""

    command: list[str]
    modules: list[Path]
    helpers: list[list[str]] = field(default_factory=list)
    #: Paths that must exist before the monitor starts: sockets of helpers.
    awaited: list[Path] = field(default_factory=list)


def _modules(kernel: Kernel, names: tuple[str, ...]) -> list[Path]:
    return [path for path in map(kernel.module, names) if path is not None]


def plan_uml(setting: Setting) -> Plan:
    """A user-mode Linux: boots in a second, user code at full speed, system calls slow, no isolation.

    Raises
    ------
    Missing
    """
    kernel = uml_kernel()
    command = [
        str(kernel.image),
        f"mem={setting.memory_mib}M",
        "root=/dev/root",
        "rootfstype=hostfs",
        "rootflags=/",
        "ro",
        f"init={INIT}",
        "con=null",
        "con0=null,fd:1",
        "ssl=null",
        f"ssl0=fd:{setting.input},fd:{setting.output}",
        f"ssl1=null,fd:{setting.control}",
        "quiet",
        "loglevel=1",
        f"virtio_uml.device={setting.socket}:19",
        f"isthmus.job={setting.directory}",
        "isthmus.data=ttyS0",
        "isthmus.control=ttyS1",
        *setting.extra,
    ]
    command += setting.options
    if setting.tap:
        mac = f",mac={setting.mac}" if setting.mac else ""
        command.append(f"vec0:transport=tap,ifname={setting.tap},depth=128,gro=1{mac}")
    return Plan(command, _modules(kernel, ("overlay", *VSOCK_MODULES)))


def plan_qemu(setting: Setting) -> Plan:
    """QEMU: on the processor where KVM works, else emulated, which proves function and never speed.

    Raises
    ------
    Missing
    """
    program, kernel = qemu_program(), qemu_kernel()
    kvm = kvm_works()
    daemon = shutil.which("virtiofsd") or next(
        (p for p in ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd") if os.access(p, os.X_OK)), None
    )
    filesystem = "9p" if kernel.module("9p") else "virtiofs"
    if filesystem == "virtiofs" and (daemon is None or not kernel.module("virtiofs")):
        raise Missing("there is no virtiofsd, or the kernel knows neither 9p nor virtiofs", "qemu")
    early = _modules(kernel, (*_PCI_MODULES, *_ROOT_MODULES[filesystem]))
    image = setting.directory / "initrd"
    image.write_bytes(_initrd(early, filesystem))
    size = f"{setting.memory_mib}M"
    command = [
        program,
        *("-M", "q35,memory-backend=memory," + ("accel=kvm" if kvm else "accel=tcg")),
        *("-cpu", "host" if kvm else "max"),
        # Never one processor alone under emulation: QEMU before 8.1 then drops the guest's fences.
        *("-smp", "1" if kvm else "1,maxcpus=2"),
        *("-m", size),
        *("-object", f"memory-backend-memfd,id=memory,size={size},share=on"),
        *("-chardev", f"socket,id=vsock,path={setting.socket.replace(',', ',,')}"),
        *("-device", "vhost-user-vsock-pci,chardev=vsock"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-serial", f"file:{setting.directory / 'console'}"),
        *_qemu_serial(setting),
        *("-kernel", str(kernel.image), "-initrd", str(image)),
    ]
    words = ["console=ttyS0", "quiet", "panic=-1", "iomem=relaxed", f"isthmus.job={setting.directory}"]
    words += ["isthmus.data=ttyS1", "isthmus.control=ttyS2", f"isthmus.init={INIT}"]
    if setting.huge_pages:
        words.append(f"hugepages={setting.huge_pages}")
    command += ["-append", " ".join((*words, *setting.extra)), *setting.options]
    plan = Plan(command, _modules(kernel, ("overlay", *VSOCK_MODULES)))
    if filesystem == "9p":
        share = "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"
        command += ["-fsdev", share, "-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]
    else:
        root = setting.directory / "root"
        command += [
            "-chardev",
            f"socket,id=root,path={root}",
            "-device",
            "vhost-user-fs-pci,chardev=root,tag=root",
        ]
        plan.helpers.append(
            [
                str(daemon),
                f"--socket-path={root}",
                "-f",
                "-o",
                "source=/",
                "-o",
                "sandbox=chroot",
                "-o",
                "cache=always",
            ]
        )
        plan.awaited.append(root)
    if setting.tap:
        mac = f",mac={setting.mac}" if setting.mac else ""
        command += ["-netdev", f"tap,id=n0,ifname={setting.tap},script=no,downscript=no,vhost=off"]
        command += ["-device", f"virtio-net-pci,netdev=n0{mac}"]
        plan.modules[:0] = _modules(kernel, _NIC_MODULES)
    return plan


def _qemu_serial(setting: Setting) -> list[str]:
    """The two serial lines behind the console's: the job's, and the one that tells what becomes of it."""
    # QEMU opens a pipe by the names PATH.in and PATH.out; these lead to what it inherits.
    for name, fd in (("in", setting.input), ("out", setting.output)):
        (setting.directory / f"data.{name}").symlink_to(f"/proc/self/fd/{fd}")
    words = ["-chardev", f"pipe,id=data,path={setting.directory / 'data'}", "-serial", "chardev:data"]
    words += ["-add-fd", f"fd={setting.control},set=1"]
    return [*words, "-chardev", "file,id=control,append=on,path=/dev/fdset/1", "-serial", "chardev:control"]


PLANS = {"uml": plan_uml, "qemu": plan_qemu}


def _initrd(modules: list[Path], filesystem: str) -> bytes:
    """A root that loads what the real one needs, mounts it and goes there."""
    busybox = shutil.which("busybox")
    if busybox is None or not _static(busybox):
        raise Missing("there is no statically linked busybox", "qemu")
    options = "trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro" if filesystem == "9p" else "ro"
    loads = "\n".join(f"busybox insmod /modules/{path.name}" for path in modules)
    init = f"""#!/busybox sh
{loads}
/busybox mount -t proc proc /proc
for word in $(/busybox cat /proc/cmdline); do
    case $word in isthmus.init=*) init=${{word#*=}} ;; esac
done
/busybox mount -t {filesystem} -o {options} root /root || exec /busybox poweroff -f
/busybox umount /proc
exec /busybox switch_root /root "$init"
"""
    out = io.BytesIO()
    archive = _Archive(out)
    for name in ("modules", "proc", "root", "dev"):
        archive.add(name, 0o040755, b"")
    archive.add("busybox", 0o100755, Path(busybox).read_bytes())
    archive.add("init", 0o100755, init.replace("busybox insmod", "/busybox insmod").encode())
    for path in modules:
        archive.add(f"modules/{path.name}", 0o100644, path.read_bytes())
    archive.end()
    return gzip.compress(out.getvalue(), 1)


def _static(program: str) -> bool:
    found = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    return "not a dynamic executable" in found.stderr + found.stdout


class _Archive:
    """A cpio archive of the kind the kernel unpacks ("newc")."""

    def __init__(self, out: io.BytesIO) -> None:
        self._out = out
        self._count = 0

    def add(self, name: str, mode: int, content: bytes) -> None:
        self._count += 1
        encoded = name.encode() + b"\0"
        fields = (self._count, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        self._out.write(b"070701" + b"".join(b"%08X" % value for value in fields) + encoded)
        self._pad()
        self._out.write(content)
        self._pad()

    def end(self) -> None:
        self.add("TRAILER!!!", 0, b"")

    def _pad(self) -> None:
        self._out.write(bytes(-self._out.tell() % 4))
