"""Asking a broker: through the operator's socket, or through a domain's door."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from .output import EXIT_NO_BROKER, Problem

ANSWER_S = 30.0


def connect_at(path: Path, kind: int) -> socket.socket:
    """Connect to a Unix socket whose path may be longer than a socket address."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock = socket.socket(socket.AF_UNIX, kind)
        try:
            sock.settimeout(ANSWER_S)
            sock.connect(f"/proc/self/fd/{directory}/{path.name}")
        except BaseException:
            sock.close()
            raise
        return sock
    finally:
        os.close(directory)


def ask(directory: Path, do: str, **what: Any) -> dict[str, Any]:
    """Send one request to the operator's socket and return the answer.

    Raises
    ------
    Problem
        There is no broker, or it said no.
    """
    path = directory / "operator"
    try:
        sock = connect_at(path, socket.SOCK_STREAM)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        raise Problem(f"{path}: no broker serves there; start one: isthmus broker", EXIT_NO_BROKER) from None
    except PermissionError:
        raise Problem(
            f"{path}: only the broker's own user and root may ask; or choose --dir", EXIT_NO_BROKER
        ) from None
    except OSError as error:
        raise Problem(f"{path}: {error.strerror or error}", EXIT_NO_BROKER) from None
    try:
        with sock, sock.makefile("rb") as answers:
            sock.sendall(json.dumps({"do": do, **what}).encode() + b"\n")
            line = answers.readline()
    except TimeoutError:
        raise Problem(f"{path}: no answer in {ANSWER_S:.0f} s", EXIT_NO_BROKER) from None
    except OSError as error:
        raise Problem(f"{path}: {error.strerror or error}", EXIT_NO_BROKER) from None
    if not line:
        raise Problem(f"{path}: the broker hung up", EXIT_NO_BROKER)
    answer = json.loads(line)
    if not answer.pop("ok"):
        raise Problem(answer["error"])
    return dict(answer)


def door_here() -> Path | None:
    """The door of the domain that this is in: the one that ISTHMUS_DOOR names, by itself or by its directory,
    or else the usual one if it is there."""
    from isthmus.node import DOOR_DEFAULT, DOOR_ENV

    named = os.environ.get(DOOR_ENV)
    path = Path(named or DOOR_DEFAULT)
    if not named:
        return path if path.exists() else None
    return path / "door" if path.is_dir() else path


class DoorClient:
    """The few messages that the command line sends through a door."""

    def __init__(self, door: Path, program: str = "isthmus cli") -> None:
        try:
            self._sock = connect_at(door, socket.SOCK_SEQPACKET)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            raise Problem(f"{door}: no broker behind this door; ask the operator", EXIT_NO_BROKER) from None
        except OSError as error:
            raise Problem(f"{door}: {error.strerror or error}", EXIT_NO_BROKER) from None
        self.door = door
        self.welcome = self.ask("hello", "welcome", features=0, program=program)

    def __enter__(self) -> DoorClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def ask(self, kind: str, wanted: str, **fields: Any) -> dict[str, Any]:
        from isthmus._native import CONTROL_MESSAGE_MAX, control_decode, control_encode

        try:
            self._sock.send(control_encode(kind, 1, **fields))
            packet = self._sock.recv(CONTROL_MESSAGE_MAX)
        except OSError as error:
            raise Problem(f"{self.door}: {error.strerror or error}", EXIT_NO_BROKER) from None
        if not packet:
            raise Problem(f"{self.door}: the broker hung up", EXIT_NO_BROKER)
        try:
            answer, _, found = control_decode(packet)
        except ValueError as error:
            raise Problem(f"{self.door}: a broker of another version ({error})") from None
        if answer == "refused":
            raise Problem(str(found["text"]))
        if answer != wanted:
            raise Problem(f"{self.door}: {answer} where {wanted} must be")
        return dict(found)

    def status(self) -> dict[str, Any]:
        """What the broker says about this domain."""
        text = ""
        while True:
            piece = self.ask("status", "report", offset=len(text))
            text += piece["text"]
            if len(text) >= piece["total"] or not piece["text"]:
                return dict(json.loads(text))
