"""Read the bytes of a space's shards: files in a folder, or anything else that reads at an offset.

Reads are positioned (`preadv`), so any number of threads and forked processes may share one object. Nothing
is locked, nothing is written. Files are opened when first needed, and the least recently used are closed.

A shard that was read as often as it is long is mapped, and rows that the page cache holds are copied from
the mapping: a copy moves a row of 1 MB at 11 GB/s, the kernel at 8 (docs/BENCHMARKS.md). A mapped file is
dangerous where a page must be read from disk when it is touched: if the disk fails, or the file was cut
short, the process dies by SIGBUS, and no error names the shard. So a page is touched only after `mincore`
reported it in memory. Everything else is read by `preadv`, which can fail. One risk remains: a page that is
evicted, and cannot be read again, within the microseconds of the copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import resource
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from cache.errors import CorruptError
from cache.format.gate import open_descriptor
from cache.store.paths import SpacePaths

PAGE = mmap.PAGESIZE
PAGES = 4096
"""Pages that `mincore` is asked about at a time: 16 MB, more than any row or run of rows. A longer read is
not copied."""

COPIED_BYTES = 256 << 10
"""A read of more bytes is copied from the mapping. For fewer, asking `mincore` costs more than that saves:
1.7 microseconds."""

LOCKED_BYTES = 256 << 10
"""A copy of at most this many bytes keeps the interpreter's lock: it ends before another thread would run."""


class ShardFiles(Protocol):
    """Where a FeatureReader reads from. Many threads may call every method at the same time."""

    def read(self, array: str, shard: int, offset: int, targets: Sequence[memoryview]) -> None:
        """Fill `targets`, one after the other, with the bytes at `offset` of a shard.

        Raises:
            CorruptError: the shard is missing, of another size than its commit says, or ends early.
        """


@runtime_checkable
class AheadFiles(ShardFiles, Protocol):
    """Shard files that can begin several reads before the first is finished."""

    def read_now(self, array: str, shard: int, offset: int, targets: Sequence[memoryview]) -> bool:
        """Read as `read` does, if that needs no waiting.

        Returns:
            False when it would wait; the content of `targets` is then meaningless.
        """

    def begin(self, array: str, places: Iterable[tuple[int, int, int]]) -> None:
        """Begin to fetch places (shard, offset, bytes), each of which will be read soon."""


class LocalFiles:
    """The shards below a folder."""

    def __init__(
        self, paths: SpacePaths, sizes: Mapping[str, Mapping[int, int]], *, mapped: bool = True
    ):
        """Open nothing yet.

        Args:
            paths: the files of the space.
            sizes: array -> shard -> bytes, as committed.
            mapped: whether shards that are read repeatedly are mapped.
        """
        self._paths = paths
        can_tell = hasattr(os, "RWF_NOWAIT") and hasattr(os, "posix_fadvise")
        self._nowait: int = os.RWF_NOWAIT if can_tell else 0
        # The cache holds no bound method of this object: with one, files would be closed by the garbage
        # collector and not with the last reference.
        self._file = functools.lru_cache(open_files())(
            functools.partial(_open, paths, sizes, mapped)
        )

    def read(self, array: str, shard: int, offset: int, targets: Sequence[memoryview]) -> None:
        """Fill `targets` as `ShardFiles.read` does, by one system call unless it is interrupted."""
        file = self._file(array, shard)
        length = len(targets[0]) if len(targets) == 1 else _length(targets)
        if length > COPIED_BYTES and file.copy(offset, targets, length):
            return
        try:
            if os.preadv(file.fd, targets, offset) == length:
                return
            whole = file.read(targets, offset)
        except OSError as error:  # a dying disk
            why = error.strerror or str(error)
            raise CorruptError(self._paths.shard(array, shard), why) from error
        if not whole:
            raise CorruptError(self._paths.shard(array, shard), "it ends early")

    def read_now(self, array: str, shard: int, offset: int, targets: Sequence[memoryview]) -> bool:
        """Read as `AheadFiles.read_now` does: from the page cache, at no more cost than `read`."""
        if self._nowait:
            try:
                file = self._file(array, shard)  # open until it is read
                length = len(targets[0]) if len(targets) == 1 else _length(targets)
                if length > COPIED_BYTES and file.copy(offset, targets, length):
                    return True
                return os.preadv(file.fd, targets, offset, self._nowait) == length
            except BlockingIOError:
                return False
            except OSError:  # this file system lacks the flag; any other error is raised by `read`
                self._nowait = 0
        self.read(array, shard, offset, targets)
        return True

    def begin(self, array: str, places: Iterable[tuple[int, int, int]]) -> None:
        """Begin to fetch as `AheadFiles.begin` does: the disk works on all places at the same time."""
        for shard, offset, nbytes in places:
            with contextlib.suppress(CorruptError, KeyError, OSError):  # `read` raises it
                file = self._file(array, shard)
                os.posix_fadvise(file.fd, offset, nbytes, os.POSIX_FADV_WILLNEED)


def _open(
    paths: SpacePaths, sizes: Mapping[str, Mapping[int, int]], mapped: bool, array: str, shard: int
) -> _ShardFile:
    try:
        file = _ShardFile(paths.shard(array, shard), paths.cache_root, mapped)
    except FileNotFoundError:
        raise CorruptError(paths.shard(array, shard), "missing") from None
    except OSError as error:
        why = error.strerror or str(error)
        raise CorruptError(paths.shard(array, shard), why) from None
    expected = sizes[array][shard]
    if file.nbytes != expected:
        raise CorruptError(paths.shard(array, shard), f"{file.nbytes} bytes, not {expected}")
    return file


class _ShardFile:
    """An open shard. It is closed with the last reference to it."""

    def __init__(self, path: Path, root: Path, mapped: bool):
        self.fd = -1
        self.fd, self.nbytes = open_descriptor(path, root)
        self.mapped: MappedFile | None = None
        # A program that reads everything once gains nothing by a mapping (the first touch of a page costs
        # what it saves), and all that it read would count as its memory.
        self._until_mapped = self.nbytes if mapped and can_map(path) else None

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def copy(self, offset: int, targets: Sequence[memoryview], length: int) -> bool:
        """Copy as `MappedFile.copy` does; return False while the file is not mapped."""
        if self.mapped is not None:
            return self.mapped.copy(offset, targets, length)
        left = self._until_mapped
        if left is not None:
            # Threads may count less than they read, or map it twice. Both are harmless.
            left -= length
            self._until_mapped = left if left > 0 else None
            if left <= 0:
                with contextlib.suppress(OSError, ValueError):
                    self.mapped = MappedFile(self.fd, self.nbytes)
        return False

    def read(self, targets: Sequence[memoryview], offset: int) -> bool:
        """Fill `targets` by as many calls as it takes. Return False at the end of the file."""
        wanted, got = _length(targets), 0
        while got < wanted:  # an interrupted call, or a file cut short since it was opened
            more = os.preadv(self.fd, _after(targets, got), offset + got)
            if not more:
                return False
            got += more
        return True


def _length(targets: Sequence[memoryview]) -> int:
    return sum(map(len, targets))


def _after(buffers: Sequence[memoryview], skip: int) -> list[memoryview]:
    """Return the rest of `buffers` behind their first `skip` bytes."""
    rest = []
    for buffer in buffers:
        rest.append(buffer[min(skip, len(buffer)) :])
        skip = max(0, skip - len(buffer))
    return rest


def open_files() -> int:
    """Return how many shards to keep open: a quarter of the files that this process may open.

    A mapped shard counts twice.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else max(8, min(4096, soft // 4))


# ---- mapped files


class MappedFile:
    """A file that is open for reading, mapped. Any number of threads may copy from it."""

    def __init__(self, fd: int, nbytes: int):
        """Map the whole file.

        Raises:
            OSError, ValueError: the file system cannot map it, or the address space has no room.
        """
        memory = mmap.mmap(fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
        self._bytes = memoryview(memory)
        self._array = np.frombuffer(memory, np.uint8)
        self._address: int = self._array.ctypes.data
        self._length = nbytes

    def copy(self, offset: int, targets: Sequence[memoryview], length: int) -> bool:
        """Fill `targets`, `length` bytes in all, with the bytes at `offset`, if all are in memory.

        Returns:
            False when they are not; `targets` are then unchanged.
        """
        first = offset & -PAGE
        nbytes = offset + length - first
        pages = (nbytes + PAGE - 1) // PAGE
        if pages > PAGES or offset + length > self._length or _mincore is None:
            return False
        answer = _answer
        if _mincore(self._address + first, nbytes, answer.address) != 0:
            return False
        if answer.pages.find(0, 0, pages) >= 0:
            return False
        for target in targets:
            end = offset + len(target)
            if len(target) <= LOCKED_BYTES:
                target[:] = self._bytes[offset:end]
            else:
                np.frombuffer(target, np.uint8)[:] = self._array[offset:end]
            offset = end
        return True


def can_map(path: str | Path) -> bool:
    """Return whether the kernel reports which pages of a file are in memory.

    It reports them to the owner of the file and to those who may write it. To everybody else it reports that
    all pages are in memory (Linux 5.2, mm/mincore.c).
    """
    if _mincore is None:
        return False
    return Path(path).stat().st_uid == os.geteuid() or os.access(path, os.W_OK)


class _Answer(threading.local):
    """The buffer into which `mincore` writes a byte for each page. Each thread has its own."""

    def __init__(self) -> None:
        self.pages = bytearray(PAGES)
        self.address = ctypes.addressof((ctypes.c_char * PAGES).from_buffer(self.pages))


_answer = _Answer()
_mincore = None
if sys.platform == "linux":
    _mincore = ctypes.CDLL(None).mincore
    _mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    _mincore.restype = ctypes.c_int
