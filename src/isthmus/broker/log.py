"""Structured logs on stderr: one JSON object a line, or something readable on a terminal.

What tenants cause is limited for each domain, so that none can fill a disk; what was left out is counted in
the next line that gets through.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

#: Lines that one domain may cause.
LINES_PER_SECOND = 200
LINES_BURST = 1000

_LEVELS = ("debug", "info", "warning", "error")


class Log:
    """Where the broker says what happens."""

    def __init__(
        self,
        stream: TextIO | None = None,
        style: str = "auto",
        level: str = "info",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._json = style == "json" or (style == "auto" and not self._stream.isatty())
        self._least = _LEVELS.index(level)
        self._clock = clock
        #: For each domain: lines it may still cause, when that was, lines left out.
        self._buckets: dict[str, list[float]] = {}

    def debug(self, event: str, **what: Any) -> None:
        self._write(0, event, what)

    def info(self, event: str, **what: Any) -> None:
        self._write(1, event, what)

    def warning(self, event: str, **what: Any) -> None:
        self._write(2, event, what)

    def error(self, event: str, **what: Any) -> None:
        self._write(3, event, what)

    def tenant(self, domain: str, event: str, **what: Any) -> None:
        """Say what a tenant did, unless it does too much."""
        if self.admits(domain):
            self.admitted(domain, event, **what)

    def admits(self, domain: str) -> bool:
        """Whether a line about this tenant may be written now: ask before making an expensive one.

        A yes is one line's permission, for `admitted`.
        """
        if self._least > 1:
            return False
        now = self._clock()
        bucket = self._buckets.get(domain)
        if bucket is None:
            bucket = self._buckets[domain] = [LINES_BURST, now, 0]
        bucket[0] = min(LINES_BURST, bucket[0] + max(0.0, now - bucket[1]) * LINES_PER_SECOND)
        bucket[1] = now
        if bucket[0] < 1:
            bucket[2] += 1
            return False
        bucket[0] -= 1
        return True

    def admitted(self, domain: str, event: str, **what: Any) -> None:
        """Write the line that `admits` allowed."""
        bucket = self._buckets[domain]
        if bucket[2]:
            what["left_out"] = int(bucket[2])
            bucket[2] = 0
        self._write(1, event, {"domain": domain, **what})

    def forget(self, domain: str) -> None:
        self._buckets.pop(domain, None)

    def _write(self, level: int, event: str, what: dict[str, Any]) -> None:
        if level < self._least:
            return
        now = self._clock()
        if self._json:
            line = json.dumps(
                {"time": round(now, 6), "level": _LEVELS[level], "event": event, **what}, default=str
            )
        else:
            stamp = time.strftime("%H:%M:%S", time.localtime(now))
            rest = " ".join(f"{key}={_readable(value)}" for key, value in what.items())
            line = f"{stamp} {_LEVELS[level]:7} {event:12} {rest}"
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            pass  # Nobody reads the log; that must not stop the node.


def _readable(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text and text else json.dumps(text)
