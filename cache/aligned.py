"""A file written from front to back in large calls that begin and end at huge pages.

The page cache keeps what one such call writes in pieces of 2 MB. They cost less to write, to read and, when
mapped, to find (docs/BENCHMARKS.md); rows of 1.18 MB, each by a call of its own, leave pieces of all sizes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

HUGE_PAGE = 2 << 20
"""On x86-64, and on arm64 with pages of 4 KB."""

CALL_BYTES = 4 << 20
"""Bytes written by one call. Those of 16 MB are no faster (2026-11-24, ext4, Linux 6.18)."""

CALL_BUFFERS = 1000
"""Pieces of one call at most: Linux takes 1,024."""


class AlignedFile:
    """A new file. What does not fill a huge page yet waits in memory. Not for several threads at once."""

    def __init__(self, path: Path):
        """Make it.

        Raises:
            FileExistsError: it is there; or another OSError.
        """
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._written = 0
        self._waiting = memoryview(
            bytearray(HUGE_PAGE)
        )  # used over and over: new memory costs page faults
        self._count = 0

    def extend(self, buffers: Sequence[Buffer]) -> None:
        """Write contiguous buffers behind what is there; they may be changed afterwards.

        Raises:
            OSError: it could not be written; the file is as if nothing had been asked.
        """
        pieces = [self._waiting[: self._count], *(memoryview(b).cast("B") for b in buffers)]
        total = sum(map(len, pieces))
        whole = total - total % HUGE_PAGE
        written = self._written
        for call in _calls(pieces, whole):
            _pwrite(self._fd, call, written)
            written += sum(map(len, call))
        count = 0 if whole else self._count
        for piece in _cut(pieces, whole or count, total):
            self._waiting[count : count + len(piece)] = piece
            count += len(piece)
        self._written, self._count = written, count

    def finish(self, tail: Buffer) -> None:
        """Write what waits, then `tail`, and wait for the disk.

        Raises:
            OSError: it could not be written; `finish` may be tried again.
        """
        os.ftruncate(self._fd, self._written)  # what failed half-way may lie there
        _pwrite(self._fd, [self._waiting[: self._count], tail], self._written)
        os.fsync(self._fd)

    def close(self) -> None:
        """Let go of it, whatever was written."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _calls(pieces: Sequence[memoryview], end: int) -> Iterator[list[memoryview]]:
    """What each call writes of the first `end` bytes of `pieces`."""
    for start in range(0, end, CALL_BYTES):
        call = list(_cut(pieces, start, min(start + CALL_BYTES, end)))
        yield call if len(call) <= CALL_BUFFERS else [memoryview(b"".join(call))]


def _cut(pieces: Sequence[memoryview], start: int, end: int) -> Iterator[memoryview]:
    """Bytes `start` to `end` of what `pieces` are together, without a copy."""
    at = 0
    for piece in pieces:
        some = piece[max(0, start - at) : max(0, end - at)]
        if len(some):
            yield some
        at += len(piece)


def _pwrite(fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    """Write all of `buffers` at `offset`."""
    written = os.pwritev(fd, buffers, offset)
    rest = b""
    total = sum(memoryview(b).nbytes for b in buffers)
    while written < total:  # a full disk, or an interrupted call: go on, or learn why not
        rest = rest or b"".join(buffers)
        written += os.pwrite(fd, rest[written:], offset + written)
