"""Where the bytes of a space's shards come from: files here, or anything else that reads at an offset.

Reads are positioned (`preadv`), so any number of threads and forked processes may share one object; nothing
is locked, nothing written. Files are opened when first needed; the least recently used close themselves. Of a
file that was read as often as it is long, what is in memory is copied from there (`cache.store.mapped`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from cache.errors import CorruptError
from cache.store.mapped import SMALL, MappedFile, can_map
from cache.store.paths import SpacePaths


class ShardFiles(Protocol):
    """What a FeatureReader reads from. All methods may be called from many threads at a time."""

    def read(self, array: str, shard: int, offset: int, targets: Sequence[memoryview]) -> None:
        """Fill `targets`, one after the other, with what stands at `offset` of a shard.

        Raises:
            CorruptError: the shard is missing, of another size than its commit says, or ends early.
        """


@runtime_checkable
class AheadFiles(ShardFiles, Protocol):
    """Shard files that can begin several reads at once."""

    def read_now(self, array: str, shard: int, offset: int, targets: Sequence[memoryview]) -> bool:
        """As `read` if that needs no waiting; else False, and what is in `targets` is meaningless."""

    def begin(self, array: str, places: Iterable[tuple[int, int, int]]) -> None:
        """Begin to fetch (shard, offset, bytes), each of which will be read soon."""


class LocalFiles:
    """The shards below a folder."""

    def __init__(
        self, paths: SpacePaths, sizes: Mapping[str, Mapping[int, int]], *, mapped: bool = True
    ):
        """Nothing is opened yet.

        Args:
            paths: of the space.
            sizes: array -> shard -> bytes, as committed.
            mapped: whether shards that are read again and again are mapped.
        """
        self._paths = paths
        can_tell = hasattr(os, "RWF_NOWAIT") and hasattr(os, "posix_fadvise")
        self._nowait: int = os.RWF_NOWAIT if can_tell else 0
        # No method of ours inside: files close with the last reference, not with the next collection.
        self._file = functools.lru_cache(open_files())(
            functools.partial(_open, paths, sizes, mapped)
        )

    def read(self, array: str, shard: int, offset: int, targets: Sequence[memoryview]) -> None:
        """See ShardFiles. One system call, unless it is interrupted."""
        file = self._file(array, shard)
        length = len(targets[0]) if len(targets) == 1 else _length(targets)
        if length > SMALL and file.copy(offset, targets, length):
            return
        try:
            if os.preadv(file.fd, targets, offset) == length:
                return
            whole = file.read(targets, offset)
        except OSError as error:  # a dying disk
            why = error.strerror or str(error)
            raise corrupt_shard(self._paths, array, shard, why) from error
        if not whole:
            raise corrupt_shard(self._paths, array, shard, "it ends early")

    def read_now(self, array: str, shard: int, offset: int, targets: Sequence[memoryview]) -> bool:
        """See AheadFiles: from the page cache, at no more cost than `read`."""
        if self._nowait:
            try:
                file = self._file(array, shard)  # open until it is read
                length = len(targets[0]) if len(targets) == 1 else _length(targets)
                if length > SMALL and file.copy(offset, targets, length):
                    return True
                return os.preadv(file.fd, targets, offset, self._nowait) == length
            except BlockingIOError:
                return False
            except OSError:  # this file system cannot tell; or `read` meets it again, and says so
                self._nowait = 0
        self.read(array, shard, offset, targets)
        return True

    def begin(self, array: str, places: Iterable[tuple[int, int, int]]) -> None:
        """See AheadFiles: the disk works on all of them at a time."""
        for shard, offset, nbytes in places:
            with contextlib.suppress(CorruptError, KeyError, OSError):  # whoever reads it says so
                file = self._file(array, shard)
                os.posix_fadvise(file.fd, offset, nbytes, os.POSIX_FADV_WILLNEED)


def _open(
    paths: SpacePaths, sizes: Mapping[str, Mapping[int, int]], mapped: bool, array: str, shard: int
) -> _ShardFile:
    try:
        file = _ShardFile(os.fspath(paths.shard(array, shard)), mapped)
    except FileNotFoundError:
        raise corrupt_shard(paths, array, shard, "missing") from None
    expected = sizes[array][shard]
    if file.nbytes != expected:
        raise corrupt_shard(paths, array, shard, f"{file.nbytes} bytes, not {expected}")
    return file


class _ShardFile:
    """An open shard; closes itself when the last reader lets go of it."""

    def __init__(self, path: str, mapped: bool):
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY)
        self.nbytes = os.fstat(self.fd).st_size
        self.mapped: MappedFile | None = None
        # Who reads everything once gains nothing by a mapping (the first touch costs what it saves), and
        # would find all that it read in its memory.
        self._until_mapped = self.nbytes if mapped and can_map(path) else None

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def copy(self, offset: int, targets: Sequence[memoryview], length: int) -> bool:
        """As `MappedFile.copy`; until it is mapped, False."""
        if self.mapped is not None:
            return self.mapped.copy(offset, targets, length)
        left = self._until_mapped
        if left is not None:  # threads may count less than they read, or map it twice: no harm
            left -= length
            self._until_mapped = left if left > 0 else None
            if left <= 0:
                with contextlib.suppress(OSError, ValueError):
                    self.mapped = MappedFile(self.fd, self.nbytes)
        return False

    def read(self, targets: Sequence[memoryview], offset: int) -> bool:
        """Fill `targets`, in as many calls as it takes; False at the file's end."""
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
    """What is left of `buffers` behind their first `skip` bytes."""
    rest = []
    for buffer in buffers:
        rest.append(buffer[min(skip, len(buffer)) :])
        skip = max(0, skip - len(buffer))
    return rest


def open_files() -> int:
    """Shards to keep open: a quarter of the files this process may have; a mapped one counts twice."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else max(8, min(4096, soft // 4))


def corrupt_shard(paths: SpacePaths, array: str, shard: int, what: str) -> CorruptError:
    """Damage to a shard, and how to get its rows back."""
    return CorruptError(paths.shard(array, shard), what)
