"""What goes on a monitor's command line, or into its configuration, to attach a guest."""

from __future__ import annotations

from collections.abc import Callable

#: What is said to each kind of monitor; `{socket}` is where the switch listens for it.
_QEMU = """\
-object memory-backend-memfd,id=isthmus-memory,size=SIZE,share=on
-machine memory-backend=isthmus-memory
-chardev socket,id=isthmus,path={socket}
-device vhost-user-vsock-pci,chardev=isthmus
"""
_LIBVIRT = """\
<!-- inside <domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'> -->
<memoryBacking>
  <source type='memfd'/>
  <access mode='shared'/>
</memoryBacking>
<qemu:commandline>
  <qemu:arg value='-chardev'/>
  <qemu:arg value='socket,id=isthmus,path={socket}'/>
  <qemu:arg value='-device'/>
  <qemu:arg value='vhost-user-vsock-pci,chardev=isthmus'/>
</qemu:commandline>
"""
_CLOUD_HYPERVISOR = """\
--memory size=SIZE,shared=on
--generic-vhost-user socket={socket},virtio_id=19,queue_sizes=[128,128,128]
"""
_UML = """\
virtio_uml.device={socket}:19
"""

_TEXTS = {"qemu": _QEMU, "libvirt": _LIBVIRT, "cloud-hypervisor": _CLOUD_HYPERVISOR, "uml": _UML}

#: The words for `format`.
FORMATS = tuple(_TEXTS)


def attachment_lines(socket: str, format: str = "qemu") -> str:
    """The lines that attach a guest whose device is at `socket`.

    Parameters
    ----------
    socket : str
        Path of the device's socket, as `isthmus domain list --json` shows it.
    format : {"qemu", "libvirt", "cloud-hypervisor", "uml"}

    Returns
    -------
    str
        One argument or element a line. ``SIZE`` stands for the guest's memory, the same in all places.

    Raises
    ------
    ValueError
        There is no such format.
    """
    text = _TEXTS.get(format)
    if text is None:
        raise ValueError(f"{format!r} is not one of {', '.join(FORMATS)}")
    escape: Callable[[str], str] = _xml if format == "libvirt" else _commas if format == "qemu" else str
    return text.format(socket=escape(socket))


def _xml(text: str) -> str:
    for plain, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("'", "&apos;")):
        text = text.replace(plain, escaped)
    return _commas(text)


def _commas(text: str) -> str:
    """QEMU's options are separated by commas; one in a value is written twice."""
    return text.replace(",", ",,")
