"""The switch, from the broker's side: it is started, told of the guests, and outlives the broker.

The switch owns the guests' vhost-user sockets, and no monitor of virtual machines connects again to a device
that died; so it is a process of its own, which a restarted broker finds again by its socket. What its guests'
programs want it asks through their doors, like any program.

Format: docs/formats/control.md, "Between broker and switch".
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
import subprocess
import sys
from array import array
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from isthmus import _native
from isthmus._native import CONTROL_MESSAGE_MAX, control_decode, control_encode

from .doors import bind_at
from .log import Log

if TYPE_CHECKING:
    from .directory import Domain
    from .doors import Door

NAME = "switch"
#: Between looks for a switch that is starting.
RETRY_S = 0.05
#: A switch that does not come up in this time is started once more.
START_S = 10.0


class Switch:
    """The broker's line to the switch of its node. Without guests there is none."""

    def __init__(self, directory: Path, log: Log, loop: asyncio.AbstractEventLoop) -> None:
        self._path = directory / NAME
        self._directory = directory
        self._log = log
        self._loop = loop
        self._guests: dict[int, tuple[Domain, Door]] = {}
        self._states: dict[int, str] = {}
        self._cpu_us: dict[int, int] = {}
        self._sock: socket.socket | None = None
        #: Numbers of guests that it has not been told of; the socket is watched for room while there are any.
        self._untold: deque[int] = deque()
        self._retry: asyncio.TimerHandle | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._give_up = 0.0

    def state_of(self, domain: Domain) -> str:
        """``waiting``, ``attached`` or ``running``; ``no switch`` while there is none."""
        return self._states.get(domain.number, "no switch")

    def cpu_seconds_of(self, domain: Domain) -> float:
        """Processor time that the switch spent for a domain, a guest or who speaks with one."""
        return self._cpu_us.get(domain.number, 0) / 1e6

    def add(self, domain: Domain, door: Door) -> None:
        self._guests[domain.number] = (domain, door)
        if self._sock is None:
            self._look()
        else:
            self._untold.append(domain.number)
            self._tell()

    def remove(self, domain: Domain) -> None:
        self._cpu_us.pop(domain.number, None)
        if self._guests.pop(domain.number, None) is not None:
            self._states.pop(domain.number, None)
            self._untold.append(domain.number)
            self._tell()

    def close(self) -> None:
        """Leave the switch alone; it goes on without us."""
        self._guests.clear()
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._hang_up()

    def _look(self) -> None:
        """Connect to the switch, starting it if there is none."""
        self._retry = None
        if self._sock is not None or not self._guests:
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(str(self._path))
        except OSError:
            sock.close()
            self._start()
            self._retry = self._loop.call_later(RETRY_S, self._look)
            return
        sock.setblocking(False)
        self._sock = sock
        self._loop.add_reader(sock.fileno(), self._handle_readable)
        self._untold = deque(self._guests)
        self._tell()

    def _start(self) -> None:
        now = self._loop.time()
        if self._process is not None and self._process.poll() is None and now < self._give_up:
            return
        self._give_up = now + START_S
        command = [sys.executable, "-m", "isthmus", "switch", "--dir", str(self._directory)]
        # A session of its own: what stops the broker does not stop the guests' device.
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        self._log.info("switch", text="started", pid=self._process.pid)

    def _tell(self) -> None:
        """Say which guests there are, and which there are no more, as far as there is room."""
        while self._sock is not None and self._untold:
            try:
                self._say(self._sock, self._untold[0])
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._tell)
                return
            except OSError as error:
                self._log.error("switch", text=f"it cannot be told: {error.strerror}")
                return self._lose()
            self._untold.popleft()
        if self._sock is not None:
            self._loop.remove_writer(self._sock.fileno())

    def _say(self, sock: socket.socket, number: int) -> None:
        domain, door = self._guests.get(number, (None, None))
        if domain is None or door is None:
            sock.send(control_encode("guest-gone", 1, cid=number), socket.MSG_NOSIGNAL)
            return
        try:
            listener, directory = door.open_device()
        except OSError as error:
            self._log.error("switch", domain=domain.name, text=f"{door.path}: {error.strerror}")
            return
        try:
            packet = control_encode("guest", 1, cid=number, name=domain.name)
            descriptors = array("i", (listener.fileno(), directory))
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)]
            sock.sendmsg([packet], rights, socket.MSG_NOSIGNAL)
        finally:
            listener.close()
            os.close(directory)

    def _handle_readable(self) -> None:
        while self._sock is not None:
            try:
                packet = self._sock.recv(CONTROL_MESSAGE_MAX)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self._log.error("switch", text="it ended; guests have no device until they boot again")
                self._lose()
                return
            kind, _, fields = control_decode(packet)
            if kind == "guest-state":
                self._note(int(fields["cid"]), str(fields["state"]), str(fields["text"]))
            elif kind == "guest-cpu":
                self._cpu_us[int(fields["cid"])] = int(fields["cpu_us"])

    def _note(self, cid: int, state: str, why: str) -> None:
        if cid in self._guests and self._states.get(cid) != state:
            self._states[cid] = state
            self._log.info("device", domain=self._guests[cid][0].name, state=state, why=why)

    def _lose(self) -> None:
        self._hang_up()
        if self._guests and self._retry is None:
            self._retry = self._loop.call_later(RETRY_S, self._look)

    def _hang_up(self) -> None:
        self._states.clear()
        # The next switch counts from nothing.
        self._cpu_us.clear()
        if self._sock is not None:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
            self._untold.clear()
            self._sock.close()
            self._sock = None


class ServeError(Exception):
    """The switch cannot start."""


def serve(directory: Path, *, stay: bool = False, confined: bool = True, poll_s: float = 0.0) -> None:
    """Be the switch of a runtime directory until a signal, or until neither broker nor guest is there.

    Parameters
    ----------
    directory : Path
    stay : bool
        Stay also while there is neither.
    confined : bool
        Give up every privilege and most system calls first.
    poll_s : float, seconds
        How long lanes are looked at after something was moved, before their programs have to ring;
        ``math.inf`` keeps a processor busy for ever.

    Raises
    ------
    ServeError
        The directory cannot be used, or has a switch already; or the kernel does not confine us.
    """
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    try:
        directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        lock = os.open(
            "switch.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=directory_fd
        )
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        sock = bind_at(directory_fd, NAME, socket.SOCK_SEQPACKET, 0o600)
    except BlockingIOError:
        raise ServeError(f"{directory}: has a switch already") from None
    except OSError as error:
        raise ServeError(f"{error.filename or directory}: {error.strerror}") from None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    # Whoever started us may be gone; what we print is for the journal.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        # Its socket stays behind: by the end it may remove nothing, and the next switch replaces it.
        _native.run_switch(sock.detach(), stay, confined, poll_s, lambda: stopped)
    except OSError as error:
        raise ServeError(f"the kernel does not let the switch run: {error.strerror or error}") from None
