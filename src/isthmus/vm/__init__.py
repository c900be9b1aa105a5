"""Virtual machines on this node: what to tell a monitor, and small guests for trying things.

An operator's own guests are started by whatever starts them today; `lines` says what goes on their command
line. `Guest` starts a small one that shares this machine's root file system, for tests, the demo and
`isthmus vm run`.
"""

from __future__ import annotations

from .guest import Guest, GuestError
from .kernels import MONITORS, Missing, choose_monitor
from .lines import FORMATS, attachment_lines

__all__ = ["FORMATS", "MONITORS", "Guest", "GuestError", "Missing", "attachment_lines", "choose_monitor"]
