"""Runs in a guest: turns the pieces that `guest._Feed` sends over a serial line into a stream that ends."""

from __future__ import annotations

import os
import struct

#: In front of each piece: its length. An empty one is the end.
LENGTH = struct.Struct("<I")


def take(size: int) -> bytes:
    found = b""
    while len(found) < size:
        more = os.read(0, size - len(found))
        if not more:
            raise SystemExit(0)
        found += more
    return found


def main() -> None:
    while size := LENGTH.unpack(take(LENGTH.size))[0]:
        data = take(size)
        while data:
            data = data[os.write(1, data) :]


if __name__ == "__main__":
    main()
