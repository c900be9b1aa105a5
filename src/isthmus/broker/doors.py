"""Doors: one listening socket for each domain, in a directory of its own.

`DIR/doors/NAME/door`. The directory is what gets mounted into a container: a restarted broker makes a new
socket in it, and the mount still shows it. It belongs to the domain's user, who may therefore do anything
in it at any time; so nothing here follows a link in it, changes the mode of a path in it, or trusts what
lies there.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from .directory import Domain

NAME = "door"
#: Where the monitor of a guest connects.
DEVICE = "vsock"
BACKLOG = 256
#: Programs let in through one door before the others get their turn.
ACCEPTS_A_TURN = 16


class DoorError(Exception):
    """The door of a domain cannot be made."""


def bind_at(directory: int, name: str, kind: int, mode: int) -> socket.socket:
    """A listening Unix socket called `name` in an open directory; one that lies there is replaced.

    Goes through the directory's descriptor, so that the path may be longer than a socket address and cannot
    be swapped underneath; the mode comes from the mask, because chmod would follow whatever lies there by
    then.
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)
    sock = socket.socket(socket.AF_UNIX, kind)
    mask = os.umask(0o777 & ~mode)
    try:
        sock.bind(f"/proc/self/fd/{directory}/{name}")
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    finally:
        os.umask(mask)
    return sock


class Door:
    """The open door of one domain."""

    def __init__(
        self,
        domain: Domain,
        doors: Path,
        let_in: Callable[[Domain, socket.socket], None],
        handle_paused: Callable[[], None],
    ) -> None:
        self.domain = domain
        self.path = doors / domain.name
        self._let_in = let_in
        self._handle_paused = handle_paused
        self._loop = asyncio.get_running_loop()
        self.paused = False
        uid = domain.uid
        if uid is not None and uid != os.geteuid() and os.geteuid() != 0:
            raise DoorError(
                f"domain {domain.name}: uid {uid}: only a broker run by root can open doors for other users"
            )
        try:
            self._sock = self._open(uid)
        except OSError as error:
            raise DoorError(f"{self.path}: {error.strerror}") from None
        self._loop.add_reader(self._sock.fileno(), self._handle_readable)

    def _open(self, uid: int | None) -> socket.socket:
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path, 0o700)
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if uid is not None and os.fstat(directory).st_uid != uid:
                os.fchown(directory, uid, -1)
            if stat.S_IMODE(os.fstat(directory).st_mode) != 0o700:
                os.fchmod(directory, 0o700)
            return bind_at(directory, NAME, socket.SOCK_SEQPACKET, 0o666)
        finally:
            os.close(directory)

    def open_device(self) -> tuple[socket.socket, int]:
        """A new listening socket for the monitor of this domain's guest, beside the door, and the directory.

        The mode lets only the domain's user in (and root): a monitor hands over all memory of its guest.
        """
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            sock = bind_at(directory, DEVICE, socket.SOCK_STREAM, 0o666)
        except BaseException:
            os.close(directory)
            raise
        return sock, directory

    def _handle_readable(self) -> None:
        for _ in range(ACCEPTS_A_TURN):
            if self.domain.refill(self._loop.time()) < 1:
                self.pause()
                return
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self.pause()
                    return
                raise
            self.domain.tokens -= 1
            sock.setblocking(False)
            self._let_in(self.domain, sock)

    def pause(self) -> None:
        if not self.paused:
            self.paused = True
            self._loop.remove_reader(self._sock.fileno())
            self._handle_paused()

    def resume(self) -> None:
        if self.paused and self._sock.fileno() >= 0:
            self.paused = False
            self._loop.add_reader(self._sock.fileno(), self._handle_readable)

    def close(self, *, remove: bool) -> None:
        """Stop listening and take the socket away; with `remove`, the directory as well."""
        if not self.paused:
            self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        try:
            directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return
        # The device's socket stays while the broker restarts: the switch listens on it.
        for name in (NAME, DEVICE) if remove else (NAME,):
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=directory)
        os.close(directory)
        if remove:
            # Its user put something there, or it is mounted somewhere: an empty shell stays.
            with contextlib.suppress(OSError):
                os.rmdir(self.path)
