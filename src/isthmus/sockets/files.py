"""Sending files through a stream socket."""

from __future__ import annotations

import io
import mmap
import os
import stat
from typing import IO, TYPE_CHECKING

from isthmus import errors

if TYPE_CHECKING:
    from .socket import Socket

#: Bytes that `sendfile` sends at a time where the file cannot be mapped.
SENDFILE_PIECE = 256 * 1024


def send_file(sock: Socket, file: IO[bytes], offset: int, count: int | None) -> int:
    """Send a file from `offset` on, to its end or `count` bytes; return the bytes sent.

    The file's position is then behind what was sent, also when an error ends it.
    """
    mapped = _map(file)
    if mapped is None:
        return _send_pieces(sock, file, offset, count)
    sent = 0
    with mapped, memoryview(mapped) as whole:
        end = len(whole) if count is None else min(len(whole), offset + count)
        try:
            with whole[offset:end] as part:
                sock.sendall(part)
                sent = len(part)
        except errors.IsthmusError as error:
            sent = error.done
            raise
        finally:
            file.seek(offset + sent)
    return sent


def _send_pieces(sock: Socket, file: IO[bytes], offset: int, count: int | None) -> int:
    if offset:
        file.seek(offset)
    sent = 0
    while count is None or sent < count:
        piece = file.read(SENDFILE_PIECE if count is None else min(SENDFILE_PIECE, count - sent))
        if not piece:
            break
        sock.sendall(piece)
        sent += len(piece)
    return sent


def _map(file: IO[bytes]) -> mmap.mmap | None:
    """A regular file that is not empty, mapped; None for anything else."""
    try:
        descriptor = file.fileno()
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            return None
        return mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
    except (AttributeError, OSError, ValueError, io.UnsupportedOperation):
        return None
