"""Two network namespaces and a cable between them: two nodes, without their machines."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack

from isthmus.bench.namespaces import BridgeError, Sides, find_tool, run_ip

__all__ = ["LOST", "Cable"]

#: What a lossy cable loses.
LOST = 0.01

_TIMEOUT_S = 10


class Cable(Sides):
    """A context in which the namespaces `left` and `right` are joined by a virtual cable.

    Parameters
    ----------
    mtu : int, default 9000
        Of both ends, bytes.
    gigabits : int, optional
        What passes in each direction, Gbit/s of whole frames; else what the machine can do.
    lost : float, default 0
        The part of all frames that the kernel drops where they arrive, 0 to 1.
    offloads : bool, default True
        Whether the kernel may hand larger packets across than the cable carries, as it does between virtual
        cards. Real cables carry none.

    Attributes
    ----------
    left_address, right_address : str
        IPv4 addresses, in these namespaces only.
    interface : str
        Name of the card in both.

    Raises
    ------
    BridgeError
        On entry, when a tool is missing or namespaces may not be made.
    """

    left_address = "10.78.0.1"
    right_address = "10.78.0.2"
    interface = "cable0"

    def __init__(
        self, mtu: int = 9000, gigabits: int | None = None, offloads: bool = True, lost: float = 0.0
    ) -> None:
        super().__init__()
        self._mtu = mtu
        self._gigabits = gigabits
        self._offloads = offloads
        self._lost = lost

    def _build(self, stack: ExitStack) -> None:
        if os.geteuid() != 0:
            raise BridgeError("a card is opened by root")
        self._enter = [find_tool("nsenter"), "-n"]
        for side in ("left", "right"):
            self._pids[side] = self._hold(stack, [find_tool("unshare"), "-n", "--"])
        right = self._pids["right"]
        ip = find_tool("ip")
        pair = f"type veth peer name {self.interface} netns {right} mtu {self._mtu}"
        run_ip([*self.prefix("left"), ip], [f"link add {self.interface} mtu {self._mtu} {pair}"])
        self._set_up()
        for side in ("left", "right"):
            if not self._offloads:
                run_ip([*self.prefix(side), ip], [f"link set {self.interface} gso_max_segs 1"])
            if self._gigabits is not None:
                shape = ["tbf", "rate", f"{self._gigabits}gbit", "burst", "128kb", "latency", "20ms"]
                self._run(side, "tc", "qdisc", "add", "dev", self.interface, "root", *shape)
            if self._lost:
                self._run(side, "tc", "qdisc", "add", "dev", self.interface, "clsact")
                chance = ["bpf", "direct-action", "bytecode", _dropping(self._lost)]
                self._run(side, "tc", "filter", "add", "dev", self.interface, "ingress", *chance)

    def _run(self, side: str, tool: str, *words: str) -> None:
        command = [*self.prefix(side), find_tool(tool), *words]
        done = subprocess.run(command, text=True, capture_output=True, timeout=_TIMEOUT_S)
        if done.returncode:
            raise BridgeError(f"{tool}: {done.stderr.strip()}")


def _dropping(part: float) -> str:
    """A classifier that drops at random, as `tc` wants it; netem, which is made for this, many kernels lack.

    It loads a random word (at an offset of its own: linux/filter.h, SKF_AD_RANDOM) and returns, up to
    the limit, TC_ACT_SHOT, else TC_ACT_UNSPEC.
    """
    limit = min(int(part * 2**32), 2**32 - 1)
    return f"4,32 0 0 {2**32 - 0x1000 + 56},37 1 0 {limit},6 0 0 2,6 0 0 {2**32 - 1}"
