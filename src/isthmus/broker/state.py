"""What the broker keeps between its lives: a key, the numbers of domains, the domains added at run time.

All of it fits one JSON file that is written beside the old one and renamed over it, and a key file of 32
bytes. Both are for the broker's eyes only (mode 0600).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isthmus._native import check_name

from .policy import KINDS, parse_network

KEY_BYTES = 32
#: The first number of a domain. A guest's number is its CID, and smaller ones mean the host.
NUMBER_MIN = 3
#: The layout of state.json.
FORMAT = 1


class StateError(Exception):
    """The state directory cannot be used."""


class State:
    """The state directory.

    Attributes
    ----------
    key : bytes
        For tickets.
    epoch : int
        Grows by one with each life of a broker on this directory.
    numbers : dict of str to int
        The number of each domain that exists. A number is never used for another domain.
    added : dict of str to dict
        Domains that the operator added: ``{"group": str, "uid": int or None, "kind": str,
        "addresses": list of str}``.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.epoch = 0
        self.next_number = NUMBER_MIN
        self.numbers: dict[str, int] = {}
        self.added: dict[str, dict[str, Any]] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.key = self._load_key()
            self._load()
        except OSError as error:
            raise StateError(f"{error.filename or directory}: {error.strerror}") from None

    def number_of(self, name: str) -> int:
        """The number of this domain, a new one if it has none. Not kept until `save`."""
        number = self.numbers.get(name)
        if number is None:
            number = self.numbers[name] = self.next_number
            self.next_number += 1
        return number

    def save(self) -> None:
        content = {
            "format": FORMAT,
            "epoch": self.epoch,
            "next_number": self.next_number,
            "numbers": self.numbers,
            "added": self.added,
        }
        write_atomically(self.directory / "state.json", json.dumps(content, indent=1).encode())

    def _load_key(self) -> bytes:
        path = self.directory / "key"
        try:
            key = path.read_bytes()
        except FileNotFoundError:
            key = secrets.token_bytes(KEY_BYTES)
            write_atomically(path, key)
        if len(key) != KEY_BYTES:
            raise StateError(
                f"{path}: {len(key)} bytes where {KEY_BYTES} must be; remove it to get a new key"
            )
        return key

    def _load(self) -> None:
        path = self.directory / "state.json"
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT:
                raise StateError(
                    f"{path}: written by another version of the broker (format {content['format']})"
                )
            self.epoch = int(content["epoch"])
            self.next_number = int(content["next_number"])
            self.numbers = {str(name): int(number) for name, number in content["numbers"].items()}
            self.added = {str(name): _entry(entry) for name, entry in content["added"].items()}
            for name in (*self.numbers, *self.added):
                check_name(name)
            self.next_number = max([self.next_number, *(number + 1 for number in self.numbers.values())])
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateError(f"{path}: damaged ({error}); restore it, or remove it to start afresh") from None


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    uid = entry.get("uid")
    kind = entry.get("kind", "container")
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}")
    return {
        "group": str(entry["group"]),
        "uid": None if uid is None else int(uid),
        "kind": kind,
        "addresses": [str(parse_network(text)) for text in entry.get("addresses", [])],
    }


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file: readers see the old or the new content, whatever happens."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
