"""`isthmus run`: an unmodified program, whose TCP connections to neighbours do not touch the network.

Three processes. The *front* is what was started: it passes signals on and ends as the program ends. Its
child is the *supervisor*, which starts the program behind a filter, answers its calls, and is its parent,
which is all the right to look into it that is needed. If the supervisor dies, the front takes its place and
lets every call go on as if nobody had asked: connections live on, new ones take the network.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct
import sys
import threading
from dataclasses import dataclass
from typing import NoReturn

from isthmus import _native
from isthmus.node import DOOR_DEFAULT, DOOR_ENV

__all__ = ["NotStarted", "door_of", "run"]

_PR_SET_CHILD_SUBREAPER = 36
#: Signals that the front passes on when somebody sends them to it.
_PASSED = frozenset(
    {
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGALRM,
        signal.SIGWINCH,
    }
)
#: What the supervisor tells the front: the program's process, then how it ended. And an errno instead of
#: the first.
_STARTED, _ENDED, _FAILED = b"s", b"e", b"f"
_WORD = struct.Struct("=ci")


class NotStarted(OSError):
    """The program could not be executed."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How the program ended: as `os.waitpid` says it."""

    status: int

    def imitate(self) -> NoReturn:
        """End this process in the same way."""
        if os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            # The program's core, if it left one, is the one that matters.
            with contextlib.suppress(ImportError, OSError, ValueError):
                import resource

                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
            os.kill(os.getpid(), number)
            os._exit(128 + number)
        sys.stdout.flush()
        os._exit(os.waitstatus_to_exitcode(self.status))


def door_of(door: str | None) -> str:
    """Where the broker answers, or will."""
    named = door or os.environ.get(DOOR_ENV) or DOOR_DEFAULT
    return os.path.join(named, "door") if os.path.isdir(named) else named


def run(
    words: list[str], door: str, *, require: bool = False, verbose: bool = False, rings: bool = False
) -> Ended:
    """Run a program to its end, and pass on what signals come meanwhile.

    Raises
    ------
    NotStarted
        It could not be executed, or this kernel is older than Linux 5.14.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED | {signal.SIGCHLD})
    unblocked = [int(number) for number in (_PASSED | {signal.SIGCHLD}) - before]
    _become_subreaper()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # What the supervisor has taken and not answered, should it die.
    ledger = os.memfd_create("isthmus run")
    supervisor = os.fork()
    if supervisor == 0:
        ours.close()
        _supervise(words, unblocked, door, theirs, ledger, require, verbose, rings)
    theirs.close()
    kind, value, calls = _hear(ours)
    if kind == _FAILED:
        os.waitpid(supervisor, 0)
        raise NotStarted(value, os.strerror(value))
    if kind != _STARTED or calls is None:
        os.waitpid(supervisor, 0)
        raise NotStarted(0, "the supervisor died at once")
    return _Front(value, calls, ledger, ours).wait()


class _Front:
    """The process that was started, while the program runs."""

    def __init__(self, program: int, calls: int, ledger: int, words: socket.socket) -> None:
        self._program = program
        self._calls = calls
        self._ledger = ledger
        self._words = words
        self._ended: Ended | None = None
        self._main = threading.get_ident()

    def wait(self) -> Ended:
        listener = threading.Thread(target=self._listen, daemon=True)
        listener.start()
        while self._ended is None:
            info = signal.sigwaitinfo(_PASSED | {signal.SIGCHLD})
            if info.si_signo == signal.SIGCHLD:
                self._reap()
            elif info.si_code <= 0:
                # Somebody sent it. What a terminal sends, it sends to the program as well.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._program, info.si_signo)
        return self._ended

    def _listen(self) -> None:
        kind, value, _ = _hear(self._words)
        if kind == _ENDED:
            self._ended = Ended(value)
            signal.pthread_kill(self._main, signal.SIGCHLD)
            return
        print(
            "isthmus run: the supervisor died; connections go on, new ones take the network", file=sys.stderr
        )
        signal.pthread_kill(self._main, signal.SIGCHLD)
        _native.pass_calls(self._calls, self._ledger)

    def _reap(self) -> None:
        """The program becomes our child when the supervisor has died."""
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == self._program:
                    self._ended = Ended(found[1])


def _supervise(
    words: list[str],
    unblocked: list[int],
    door: str,
    front: socket.socket,
    ledger: int,
    require: bool,
    verbose: bool,
    rings: bool,
) -> NoReturn:
    """The supervisor's whole life."""
    try:
        _become_subreaper()
        try:
            # Python ignores it; the program need not.
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            program, calls = _native.spawn_supervised(words, unblocked)
        except OSError as error:
            front.send(_WORD.pack(_FAILED, error.errno or 0))
            os._exit(0)
        socket.send_fds(front, [_WORD.pack(_STARTED, program)], [calls])
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1):
            os.dup2(null, fd)
        waiter = threading.Thread(target=_wait_for_all, args=(program, front), daemon=True)
        waiter.start()
        name = f"isthmus run {os.path.basename(words[0])}"
        _native.supervise(calls, ledger, door, name, require=require, verbose=verbose, rings=rings)
        waiter.join()
        os._exit(0)
    except BaseException as error:
        print(f"isthmus run: {error}", file=sys.stderr)
        os._exit(1)


def _wait_for_all(program: int, front: socket.socket) -> None:
    """Tell how the program ended, and bury whatever it left behind."""
    ended = threading.Event()
    threading.Thread(target=_outlive_not, args=(program, front, ended), daemon=True).start()
    while True:
        try:
            found, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return
        if found == program:
            ended.set()
            with contextlib.suppress(OSError):
                front.send(_WORD.pack(_ENDED, status))
            # Whoever reads what the front wrote must not wait for daemons that the program left.
            os.dup2(0, 2)


def _outlive_not(program: int, front: socket.socket, ended: threading.Event) -> None:
    """The front was killed: so is the program, as if it had been started without us."""
    front.recv(1)
    if not ended.is_set():
        with contextlib.suppress(ProcessLookupError):
            os.kill(program, signal.SIGKILL)


def _hear(words: socket.socket) -> tuple[bytes, int, int | None]:
    """One word of the supervisor; an empty one when it is gone."""
    try:
        data, fds, _, _ = socket.recv_fds(words, _WORD.size, 1)
    except OSError:
        return b"", 0, None
    if len(data) < _WORD.size:
        return b"", 0, None
    kind, value = _WORD.unpack(data)
    return kind, value, fds[0] if fds else None


def _become_subreaper() -> None:
    """Orphans of the program become our children, and so stay within our reach."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
