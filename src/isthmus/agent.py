"""The agent of a guest: a door for its programs, and memory for their lanes.

Programs in a guest find the same door as programs in a container. The agent passes what they say on to the
broker, through the guest's socket device and the switch; and where a program on the host would bring
descriptors of memory, it gives a *seat*: memory of the guest whose pages it has named to the switch, so that
the program's lanes lie where both can reach them, and a message needs no system call. Where one on the host
would be brought a kernel socket, it is given one of the guest's own, ``AF_VSOCK``, which the switch joins to
that one.

It is root, because only root may know where pages are. The programs need not be. It owns the memory: a seat
is given to nobody else, and freed, only when the switch has said that it touches it no more.

Format: docs/formats/control.md, "Agents of guests".
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import mmap
import os
import socket
import struct
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from isthmus import _native
from isthmus._native import (
    BELL_PORT,
    CONTROL_MESSAGE_MAX,
    CONTROL_PORT,
    LARGE_DEFAULT,
    PRIVILEGED_PORT_MAX,
    SEATS_PORT,
    SMALL_DEFAULT,
    SOCKETS_PORT,
    control_decode,
    control_encode,
)

#: Where programs look for their door.
DOOR = Path("/run/isthmus/door")
#: Longest that the switch may take to answer.
ANSWER_S = 10.0
#: Runs of pages that one message names.
RUNS = 250
#: Between attempts to reach a switch or broker that is gone.
RETRY_S = 0.2
#: The queue of a socket device with which its guest transmits.
TRANSMIT_QUEUE = 1
#: Source ports of the agent are above this.
PRIVILEGED_PORT_MIN = 100
#: The largest ring a program gets; it is pinned memory of the guest.
RING_MAX = 16 << 20

_INT = array("i").itemsize


#: One after the other, so that what is still said about an old connection meets no new one.
_ports = itertools.cycle(range(PRIVILEGED_PORT_MAX, PRIVILEGED_PORT_MIN, -1))


class AgentError(Exception):
    """The agent cannot start; the text says what to do."""


def vsock_connect(port: int, kind: int, *, privileged: bool = False) -> socket.socket:
    """A connection to the switch.

    Raises
    ------
    OSError
        There is no socket device, or nobody listens behind it.
    """
    sock = socket.socket(socket.AF_VSOCK, kind)
    try:
        if privileged:
            for _ in range(PRIVILEGED_PORT_MAX - PRIVILEGED_PORT_MIN):
                try:
                    sock.bind((socket.VMADDR_CID_ANY, next(_ports)))
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        raise
                else:
                    break
        sock.settimeout(ANSWER_S)
        sock.connect((socket.VMADDR_CID_HOST, port))
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


class Seat:
    """A seat, and the bell of whoever sits there."""

    def __init__(self, number: int, small: int, large: int) -> None:
        self.number = number
        self.small = small
        self.large = large
        try:
            self.memory = _native.Seat(small, large, huge=True)
        except OSError:
            # The guest has no huge pages left that it reserved; pinned ordinary ones serve as well.
            self.memory = _native.Seat(small, large)
        self.bell: socket.socket | None = None
        #: The switch touches it no more.
        self.free = True
        #: A program has it, and may still write there.
        self.given = False
        #: Its program will not say when it is done: for no other connection.
        self.last = False


class Seats:
    """The agent's talk with the switch about memory."""

    def __init__(self) -> None:
        self._sock = vsock_connect(SEATS_PORT, socket.SOCK_SEQPACKET, privileged=True)
        self._loop = asyncio.get_running_loop()
        self._answers: dict[int, asyncio.Future[None]] = {}
        self._last = 0
        self._in_use: dict[int, Callable[[], None]] = {}
        self._dropping: set[asyncio.Task[None]] = set()
        self.lost = self._loop.create_future()
        self._loop.add_reader(self._sock.fileno(), self._handle_readable)

    def _handle_readable(self) -> None:
        while not self.lost.done():
            try:
                packet = self._sock.recv(CONTROL_MESSAGE_MAX)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self._lose()
                return
            kind, request, fields = control_decode(packet)
            if kind == "seat-free":
                free = self._in_use.pop(int(fields["seat"]), None)
                if free is not None:
                    free()
                continue
            answer = self._answers.pop(request, None)
            if answer is not None and not answer.done():
                if kind == "done":
                    answer.set_result(None)
                else:
                    answer.set_exception(AgentError(str(fields.get("text", kind))))

    def _lose(self) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(AgentError("the switch is gone"))
        self.lost.set_result(None)

    async def _ask(self, *packets: tuple[str, dict[str, Any]]) -> None:
        self._last += 1
        answer = self._answers[self._last] = self._loop.create_future()
        for kind, fields in packets:
            await self._loop.sock_sendall(self._sock, control_encode(kind, self._last, **fields))
        await asyncio.wait_for(answer, ANSWER_S)

    async def make(self, small: int, large: int) -> Seat:
        """A new seat with a bell.

        Raises
        ------
        AgentError, OSError
            There is no memory, or the switch does not take it.
        """
        self._last += 1
        number = self._last
        seat = await asyncio.to_thread(Seat, number, small, large)
        count = seat.memory.count
        packets: list[tuple[str, dict[str, Any]]] = [
            ("seat", {"seat": number, "small": small, "large": large, "runs": count})
        ]
        packets += [("pages", {"runs": seat.memory.runs(first, RUNS)}) for first in range(0, count, RUNS)]
        try:
            await self._ask(*packets)
            await self.hang_bell(seat)
        except BaseException:
            self.drop_soon(seat)
            raise
        return seat

    async def hang_bell(self, seat: Seat) -> None:
        """Connect the bell of a seat that has none."""
        sock = await asyncio.to_thread(vsock_connect, BELL_PORT, socket.SOCK_STREAM, privileged=True)
        try:
            await self._loop.sock_sendall(sock, struct.pack("<I", seat.number))
            if not await asyncio.wait_for(self._loop.sock_recv(sock, 1), ANSWER_S):
                raise AgentError("the switch does not take a bell")
        except BaseException:
            sock.close()
            raise
        seat.bell = sock

    def watch(self, seat: Seat, free: Callable[[], None]) -> None:
        """Call `free` when the switch says that nobody sits there any more."""
        seat.free = False
        self._in_use[seat.number] = free

    def drop_soon(self, seat: Seat) -> None:
        """As `drop`, without waiting for it."""
        task = self._loop.create_task(self.drop(seat))
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)

    async def drop(self, seat: Seat) -> None:
        """Give the memory back, once the switch has let go of it."""
        if seat.bell is not None:
            seat.bell.close()
            seat.bell = None
        with contextlib.suppress(AgentError, OSError, asyncio.TimeoutError, TimeoutError):
            await self._ask(("seat-gone", {"seat": seat.number}))


class Program:
    """One program behind the door: its packets, and the seats it has."""

    def __init__(self, agent: Agent, sock: socket.socket) -> None:
        self._agent = agent
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._control: socket.socket | None = None
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
        self._uid = struct.unpack("iII", credentials)[1]
        #: By the request of a `connect`.
        self._asked: dict[int, Seat] = {}
        #: By the number of a connection: one seat, or two of a program that is connected to itself.
        self._held: dict[int, list[Seat]] = {}
        #: How often the program has closed such a connection.
        self._closes: dict[int, int] = {}
        self._spare: list[Seat] = []
        self._tasks: set[asyncio.Task[None]] = set()
        #: Two packets that belong together are sent together.
        self._turn = asyncio.Lock()
        self.closed = False

    async def run(self) -> None:
        """Pass packets on until one side is gone."""
        seats = self._agent.seats
        try:
            self._control = await asyncio.to_thread(vsock_connect, CONTROL_PORT, socket.SOCK_SEQPACKET)
            ways = [asyncio.create_task(self._from_program()), asyncio.create_task(self._from_broker())]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError, ValueError):
                    await way
        except OSError:
            pass  # No broker: the program sees its door close, and comes again.
        finally:
            self.closed = True
            for task in list(self._tasks):
                task.cancel()
            self._sock.close()
            if self._control is not None:
                self._control.close()
            for seat in self._asked.values():
                self._silence(seat)
            mine = [*self._asked.values(), *(seat for held in self._held.values() for seat in held)]
            for seat in self._spare + [seat for seat in mine if seat.free]:
                await seats.drop(seat)

    async def _from_program(self) -> None:
        assert self._control is not None
        while packet := await self._loop.sock_recv(self._sock, CONTROL_MESSAGE_MAX):
            kind, request, fields = control_decode(packet)
            if kind == "connect":
                # Not in the way of what else the program says.
                self._start(self._connect(packet, request, fields))
            elif kind == "accept":
                # The newest: its other end, in a program connected to itself, is told of later.
                seats = self._held.get(int(fields["connection"]))
                await self._send(("use-seat", {"seat": seats[-1].number if seats else 0}), packet)
            else:
                await self._send(None, packet)
                if kind in ("close", "refuse"):
                    self._leave(int(fields["connection"]))

    def _start(self, work: Any) -> None:
        async def quietly() -> None:
            with contextlib.suppress(OSError):  # The switch or the program is gone, and everybody is told.
                await work

        task = self._loop.create_task(quietly())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, before: tuple[str, dict[str, Any]] | None, packet: bytes) -> None:
        assert self._control is not None
        async with self._turn:
            if before is not None:
                await self._loop.sock_sendall(self._control, control_encode(before[0], 0, **before[1]))
            await self._loop.sock_sendall(self._control, packet)

    async def _connect(self, packet: bytes, request: int, fields: dict[str, Any]) -> None:
        try:
            seat = await self._take(int(fields["small"]), int(fields["large"]))
        except (AgentError, OSError, asyncio.TimeoutError, TimeoutError) as error:
            text = f"the agent of this guest has no memory for lanes: {error}"
            self._answer(
                control_encode("refused", request, refusal="limit-reached", rule=0, text=text[:500]), ()
            )
            return
        self._asked[request] = seat
        await self._send(("use-seat", {"seat": seat.number}), packet)

    async def _take(self, small: int, large: int) -> Seat:
        """A seat for this program: one it had, or a new one."""
        seats = self._agent.seats
        large = min(large, RING_MAX)
        for seat in self._spare:
            if (seat.small, seat.large) == (small, large):
                self._spare.remove(seat)
                seat.memory.clear()
                try:
                    await seats.hang_bell(seat)
                except BaseException:
                    seats.drop_soon(seat)
                    raise
                break
        else:
            seat = await seats.make(small, large)
        seats.watch(seat, lambda: self._free(seat))
        return seat

    def _free(self, seat: Seat) -> None:
        """The switch touches it no more. If its program is done with it too, that one may have it again."""
        seat.free = True
        if self.closed or seat.last:
            self._agent.seats.drop_soon(seat)
        # Over before its program was told that it began? What was sent to it lies there, and it is told.
        elif not seat.given and seat not in self._asked.values():
            self._keep(seat)

    def _keep(self, seat: Seat) -> None:
        """Nobody uses it: for the next connection of this program."""
        self._silence(seat)
        self._spare.append(seat)

    def _silence(self, seat: Seat) -> None:
        if seat.bell is not None:
            seat.bell.close()
            seat.bell = None

    def _leave(self, connection: int) -> None:
        """The program has closed a connection: it writes no more where that sat.

        The word "closed" is the last that it writes there. A seat is not used again before that, or it would
        be read as a word of the next connection.
        """
        seats = self._held.get(connection, [])
        closes = self._closes.pop(connection, 0) + 1
        if closes < len(seats):
            self._closes[connection] = closes
            return
        self._held.pop(connection, None)
        for seat in seats:
            seat.given = False
            if seat.free:
                self._keep(seat)

    def _forget(self, connection: int) -> None:
        """The broker has cut a connection: the program will not say when it has closed it."""
        self._closes.pop(connection, None)
        for seat in self._held.pop(connection, []):
            seat.last = True
            if seat.free:
                self._agent.seats.drop_soon(seat)

    async def _from_broker(self) -> None:
        assert self._control is not None
        while packet := await self._loop.sock_recv(self._control, CONTROL_MESSAGE_MAX):
            kind, request, fields = control_decode(packet)
            if kind == "incoming":
                self._start(self._incoming(request, fields))
            elif kind in ("incoming-socket", "connected-socket"):
                self._start(self._bring(kind, request, int(fields["connection"]), packet))
            elif kind == "welcome":
                self._answer(packet, ())
                if self._agent.doorbell is not None and self._uid == 0:
                    registers, offset, value = self._agent.doorbell
                    self._answer(control_encode("doorbell", 0, offset=offset, value=value), (registers,))
            elif kind == "connected" and request in self._asked:
                self._give(kind, request, fields, self._asked.pop(request))
            else:
                refused = self._asked.pop(request, None)
                if refused is not None and refused.free:
                    self._keep(refused)
                elif refused is not None:
                    # If the connection never sat there, the end of the bell is what the switch hears of it.
                    self._silence(refused)
                if kind == "cut":
                    self._forget(int(fields["connection"]))
                self._answer(packet, ())

    async def _incoming(self, request: int, fields: dict[str, Any]) -> None:
        connection = int(fields["connection"])
        try:
            seat = await self._take(SMALL_DEFAULT, LARGE_DEFAULT)
        except (AgentError, OSError, asyncio.TimeoutError, TimeoutError):
            await self._send(
                None, control_encode("refuse", 0, connection=connection, refusal="limit-reached")
            )
            return
        self._give("incoming", request, fields, seat)

    async def _bring(self, kind: str, request: int, connection: int, packet: bytes) -> None:
        """A message with a kernel socket."""
        opener = kind == "connected-socket"
        try:
            sock = await asyncio.wait_for(self._ask_for(connection << 1 | opener), ANSWER_S)
        except (OSError, asyncio.TimeoutError, TimeoutError) as error:
            if opener:
                text = f"the agent of this guest has no socket for it: {error}"
                self._answer(
                    control_encode("refused", request, refusal="peer-gone", rule=0, text=text[:500]), ()
                )
            else:
                refuse = control_encode("refuse", 0, connection=connection, refusal="limit-reached")
                await self._send(None, refuse)
            return
        with sock:
            self._answer(packet, (sock.fileno(),))

    async def _ask_for(self, end: int) -> socket.socket:
        """A socket that the switch joins to the end of a connection that was brought there."""
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await self._loop.sock_connect(sock, (socket.VMADDR_CID_HOST, SOCKETS_PORT))
            await self._loop.sock_sendall(sock, struct.pack("<Q", end))
            sock.setblocking(True)
        except BaseException:
            sock.close()
            raise
        return sock

    def _give(self, kind: str, request: int, fields: dict[str, Any], seat: Seat) -> None:
        """A message with the memory and the bell of a connection."""
        fields["small"], fields["large"] = seat.small, seat.large
        assert seat.bell is not None
        seat.given = True
        self._held.setdefault(int(fields["connection"]), []).append(seat)
        self._answer(control_encode(kind, request, **fields), (seat.memory.fd, seat.bell.fileno()))
        # From here on it is the program's: its end is the program's end.
        seat.bell.close()
        seat.bell = None

    def _answer(self, packet: bytes, fds: tuple[int, ...]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        try:
            self._sock.sendmsg([packet], rights, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except OSError:
            # A program that does not read its answers is none.
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)


def find_doorbell() -> tuple[int, int, int] | None:
    """The register by which this guest kicks its socket device: a descriptor, the offset, the value to store.

    A store there reaches the switch without a system call. None where there is none (user-mode Linux) or the
    kernel lets nobody map it, as Debian's does without ``iomem=relaxed``. Whoever has the descriptor can do
    anything to the device, so it is for root alone.

    Source: virtio 1.2, section 4.1.4 (the capabilities of a device on PCI).
    """
    for device in Path("/sys/bus/virtio/drivers/vmw_vsock_virtio_transport").glob("virtio*"):
        place = device.resolve().parent
        try:
            config = (place / "config").read_bytes()
        except OSError:
            continue
        found = _notify_capability(config)
        if found is None:
            continue
        bar, offset, multiplier = found
        try:
            registers = os.open(place / f"resource{bar}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        # Queue 1 is the one that the guest transmits with; kicking it for nothing does no harm.
        at = offset + TRANSMIT_QUEUE * multiplier
        try:
            mmap.mmap(registers, mmap.PAGESIZE, offset=at & ~(mmap.PAGESIZE - 1)).close()
        except (OSError, ValueError):
            os.close(registers)
            continue
        return registers, at, TRANSMIT_QUEUE
    return None


def _notify_capability(config: bytes) -> tuple[int, int, int] | None:
    """BAR, offset and multiplier of the notification registers, from a PCI device's configuration space."""
    vendor_specific, notify = 0x09, 2
    at, seen = config[0x34] if len(config) >= 256 else 0, 0
    while 0 < at <= 256 - 20 and seen < 48:
        seen += 1
        if config[at] == vendor_specific and config[at + 3] == notify:
            offset, _, multiplier = struct.unpack_from("<III", config, at + 8)
            return config[at + 4], offset, multiplier
        at = config[at + 1]
    return None


class Agent:
    """The agent of this guest.

    Parameters
    ----------
    door : path
        The directory in which programs find their door.
    """

    def __init__(self, door: Path = DOOR) -> None:
        self.door = door
        self.doorbell: tuple[int, int, int] | None = None
        self._programs: set[asyncio.Task[None]] = set()

    async def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until cancelled, or until the switch is gone.

        Raises
        ------
        AgentError
            There is no socket device, or no switch behind it.
        """
        loop = asyncio.get_running_loop()
        if os.geteuid() != 0:
            raise AgentError("the agent is root of its guest: it must know where pages are")
        try:
            self.seats = Seats()
        except OSError as error:
            raise AgentError(
                f"no switch behind this guest's socket device: {error.strerror or error}. Is this a guest "
                "that was attached as `isthmus vm lines` says, with the module vmw_vsock_virtio_transport?"
            ) from None
        self.doorbell = find_doorbell()
        self.door.mkdir(parents=True, exist_ok=True)
        path = self.door / "door"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with listener:
            listener.bind(str(path))
            path.chmod(0o666)
            listener.listen(256)
            listener.setblocking(False)
            ready()
            serving = asyncio.create_task(self._serve(loop, listener))
            try:
                await asyncio.wait([serving, self.seats.lost], return_when=asyncio.FIRST_COMPLETED)
            finally:
                serving.cancel()
                for program in list(self._programs):
                    program.cancel()
                path.unlink(missing_ok=True)
        raise AgentError("the switch is gone: this guest's device is of no use until it boots again")

    async def _serve(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        while True:
            sock, _ = await loop.sock_accept(listener)
            sock.setblocking(False)
            task = loop.create_task(Program(self, sock).run())
            self._programs.add(task)
            task.add_done_callback(self._programs.discard)
