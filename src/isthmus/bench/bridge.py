"""Two network namespaces joined by a bridge: the network that two containers on one node have.

Root makes the namespaces directly; everybody else makes a user namespace around them, where the system allows
that.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from isthmus.bench.namespaces import BridgeError, Sides, find_tool, run_ip

__all__ = ["Bridge", "BridgeError"]


class Bridge(Sides):
    """A context in which two namespaces, `left` and `right`, reach each other through a bridge in a third.

    Attributes
    ----------
    left_address, right_address : str
        IPv4 addresses of the two, in 10.0.0.0/8 and in these namespaces only.

    Raises
    ------
    BridgeError
        On entry, when `ip`, `unshare` or `nsenter` is missing, or when namespaces may not be made.
    """

    left_address = "10.77.0.1"
    right_address = "10.77.0.2"
    interface = "eth0"

    def _build(self, stack: ExitStack) -> None:
        ip, nsenter, unshare = (find_tool(tool) for tool in ("ip", "nsenter", "unshare"))
        root = os.geteuid() == 0
        # A user namespace owns the network namespaces made inside it.
        user = [] if root else ["-U", "--preserve-credentials"]
        self._enter = [nsenter, *user, "-n"]
        middle = self._hold(stack, [unshare, "-n", "--"] if root else [unshare, "-U", "-r", "-n", "--"])
        beside = [*self._inside(middle), unshare, "-n", "--"]
        self._pids = {side: self._hold(stack, beside) for side in ("left", "right")}

        batch = ["link add bridge type bridge", "link set bridge up"]
        for side, pid in self._pids.items():
            batch += [
                f"link add {side} type veth peer name {self.interface} netns {pid}",
                f"link set {side} master bridge",
                f"link set {side} up",
            ]
        run_ip([*self._inside(middle), ip], batch)
        self._set_up()
