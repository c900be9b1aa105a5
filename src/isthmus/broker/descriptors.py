"""Descriptors that a stranger sent: closed on every path, and never closed where closing can hurt.

Closing a descriptor can wait for ever: `close` asks the file's system to flush, and a tenant may send a
file of a FUSE file system that it runs itself and that never answers. So a descriptor that is not a memfd
is closed by a thread of its domain's own, and a domain whose thread is stuck gets no further attachments
until it is free again. Asking whether it *is* a memfd (`F_GET_SEALS`) asks no file system.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections import deque
from collections.abc import Iterable

F_GET_SEALS = 1034
#: Descriptors of one domain that may wait to be closed before its door is shut, for now.
WAITING_MAX = 64


def is_memfd(fd: int) -> bool:
    try:
        fcntl.fcntl(fd, F_GET_SEALS)
    except OSError:
        return False
    return True


class Undertaker:
    """Closes what could block, for one domain, in a thread that exists while there is something to close."""

    def __init__(self) -> None:
        self._waiting: deque[int] = deque()
        self._lock = threading.Lock()
        self._running = False
        self._busy = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting) + self._busy

    def bury(self, fds: Iterable[int]) -> None:
        with self._lock:
            self._waiting.extend(fds)
            if self._running or not self._waiting:
                return
            self._running = True
        threading.Thread(target=self._run, name="undertaker", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._busy = 0
                if not self._waiting:
                    self._running = False
                    return
                fd = self._waiting.popleft()
                self._busy = 1
            with contextlib.suppress(OSError):
                os.close(fd)


class Descriptors:
    """The descriptors of one packet. Whoever receives them closes them; to keep one, duplicate it."""

    __slots__ = ("_checked", "_undertaker", "fds")

    def __init__(self, fds: list[int], undertaker: Undertaker) -> None:
        self.fds = fds
        self._undertaker = undertaker
        self._checked = False

    def __len__(self) -> int:
        return len(self.fds)

    def all_memfds(self) -> bool:
        """Whether every one is a memfd, and so harmless to stat, map and close."""
        if not self._checked:
            self._checked = all(map(is_memfd, self.fds))
        return self._checked

    def close(self) -> None:
        fds, self.fds = self.fds, []
        if not fds:
            return
        if self._checked:
            for fd in fds:
                os.close(fd)
            return
        strange = []
        for fd in fds:
            if is_memfd(fd):
                os.close(fd)
            else:
                strange.append(fd)
        self._undertaker.bury(strange)
