"""Rows that came from elsewhere, kept on the local disk: bounded, checked, shared by any number of processes.

A row is a file of its own, named by its number and its crc32c, so that another cache's row can never be
taken for it; its bytes are compared with that crc before they are kept and each time they are used. A file
has its name only when it is whole, and nothing is fsynced: what a power cut leaves fails its crc, and is
fetched again.

Who is full drops what was used longest ago, but nothing that was used within the last hours: an epoch that
does not fit would push out exactly the rows it needs next. By simulation with room for half of an epoch's
rows, plain LRU finds 15 % of them in the next epoch; keeping what came first finds 50 %.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cache.format.checksums import crc32c
from cache.store.files import PARTIAL

log = logging.getLogger(__name__)

FRESH_S = 6 * 3600.0
"""Rows used within so many seconds stay."""
LOOK_SHARE = 16
"""Who has added a 16th of the limit looks at the folder again: others may have added as much."""
LOW_WATER = 0.9
"""A folder that is full is emptied down to this share of its limit."""
FULL_S = 60.0
"""Seconds until a full folder is looked at again."""
ORPHAN_S = 600.0
"""A file unfinished for so long belongs to a process that has died."""


class RowCache:
    """Rows of one space. Any number of threads and processes may share a folder."""

    def __init__(self, folder: Path, limit_bytes: int, *, fresh_s: float = FRESH_S) -> None:
        """Nothing is written before the first row.

        Args:
            folder: for rows alone.
            limit_bytes: what they may take, at most; 0: nothing is kept.
            fresh_s: see FRESH_S.
        """
        self._folder, self._limit, self._fresh_s = folder, limit_bytes, fresh_s
        self._lock = threading.Lock()
        self._size: int | None = None  # as far as we know
        self._added = 0  # since we last looked
        self._full_until = 0.0

    def get(self, array: str, row: int, crc: int, target: memoryview) -> bool:
        """Fill `target` with a row; False when it is not here, or not intact."""
        if not self._limit:
            return False
        path = self._path(array, row, crc)
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError:
            return False
        try:
            whole = os.fstat(fd).st_size == len(target) == os.preadv(fd, [target], 0)
        except OSError:  # a dying disk
            whole = False
        finally:
            os.close(fd)
        if whole and crc32c(target) == crc:
            with contextlib.suppress(OSError):
                os.utime(path)
            return True
        with contextlib.suppress(OSError):
            path.unlink()
        return False

    def put(self, array: str, row: int, crc: int, data: memoryview) -> None:
        """Keep a row whose bytes have that crc32c, where there is room."""
        if not self._limit or time.monotonic() < self._full_until or not self._room(len(data)):
            return
        path = self._path(array, row, crc)
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb", buffering=0) as file:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            temporary.rename(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            # Training does without: the rows come from where they lie.
            log.warning("%s: %s; nothing more is kept here", self._folder, error.strerror)
            self._full_until = float("inf")

    def _path(self, array: str, row: int, crc: int) -> Path:
        return self._folder / array / f"{row >> 10:x}" / f"{row:x}-{crc:08x}"

    def _room(self, nbytes: int) -> bool:
        """Whether so many bytes more may be kept; they count from then on."""
        with self._lock:
            if (
                self._size is None
                or self._size + nbytes > self._limit
                or self._added * LOOK_SHARE > self._limit
            ):
                self._look(nbytes)
            if self._size is None or self._size + nbytes > self._limit:
                self._full_until = time.monotonic() + FULL_S
                return False
            self._size += nbytes
            self._added += nbytes
            return True

    def _look(self, nbytes: int) -> None:
        """See how much is there, and make room. One process at a time; the others keep nothing meanwhile."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._size = None
                return
            files = list(self._files())
            size = sum(found[1] for found in files)
            if size + nbytes > self._limit:
                size -= self._drop(files, size + nbytes - int(self._limit * LOW_WATER))
            self._size, self._added = size, 0

    def _drop(self, files: list[tuple[float, int, str]], nbytes: int) -> int:
        """Remove so many bytes of what was used longest ago, none of it lately; returns how many went."""
        dropped, before = 0, time.time() - self._fresh_s
        for used, size, path in sorted(files):
            if used > before or dropped >= nbytes:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108 - a million of them
                dropped += size
        return dropped

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """(last use, bytes, path) of every row; what the dead left unfinished goes."""
        stack = [os.fspath(self._folder)]
        while stack:
            with contextlib.suppress(FileNotFoundError), os.scandir(stack.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        stack.append(entry.path)
                        continue
                    with contextlib.suppress(OSError):
                        stat = entry.stat(follow_symlinks=False)
                        if entry.name.endswith(PARTIAL) and time.time() - stat.st_mtime > ORPHAN_S:
                            os.unlink(entry.path)  # noqa: PTH108
                        elif entry.name != "lock":
                            yield stat.st_mtime, stat.st_size, entry.path
