"""TCP between two network namespaces that a virtual cable joins: two nodes, as with MX over the same cable.

The kernel may not hand packets across that no cable carries; between virtual cards it would hand over 64 KiB
at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import ClassVar

from isthmus.bench.bridge import BridgeError
from isthmus.bench.cable import LOST, Cable
from isthmus.bench.cases import Settings
from isthmus.bench.transports import Setup
from isthmus.bench.transports.tcp_bridge import TRANSPORT as OverBridge

__all__ = ["LIMITED", "LOSSY", "TRANSPORT"]


class TRANSPORT(OverBridge):
    """As fast as the machine is."""

    name = "tcp-cable"
    benches: ClassVar[tuple[str, ...]] = ("pingpong", "stream", "rate", "loss")
    usual_waits: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **OverBridge.usual_waits,
        "rate": ("spin", "block"),
        "loss": ("block",),
    }
    gigabits: ClassVar[int | None] = None
    lost: ClassVar[float] = 0.0

    def missing(self) -> str | None:
        """Try it."""
        try:
            with self._cable():
                return None
        except (BridgeError, OSError) as error:
            return f"no cables here ({error})"

    def prepare(self, stack: ExitStack, settings: Settings) -> Setup:
        """Lay the cable."""
        cable = stack.enter_context(self._cable())
        return Setup(
            prefix={"server": cable.prefix("right"), "client": cable.prefix("left")},
            options={"server": {"host": cable.right_address}},
        )

    def _cable(self) -> Cable:
        return Cable(gigabits=self.gigabits, offloads=False, lost=self.lost)


class LIMITED(TRANSPORT):
    """With 10 Gbit/s."""

    name = "tcp-cable-10G"
    benches = ("pingpong", "stream")
    gigabits = 10


class LOSSY(TRANSPORT):
    """With a cable that loses frames."""

    name = "tcp-cable-lossy"
    benches = ("loss",)
    lost = LOST
