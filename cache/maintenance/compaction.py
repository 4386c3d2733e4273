"""Remove rows from shards: the kept rows are copied to a new shard, which replaces the old ones in one step.

    kept = [(commit, intact_rows(space.paths, space.info, "image", commit))]
    rewrite_shards(space, "image", kept, dispose)     # the other rows no longer exist

The caller holds the driver lock of the space (`lock_spaces`). The commit of the new shard `replaces` the old
shards, so a crash leaves either the old rows or the kept ones, never both and never fewer. `dispose` takes
the files of the old shards out of the cache: `cache.gc` deletes them, a repair sets them aside.

Kept rows get higher numbers, and of doubled rows the lowest number counts. So shards are rewritten from the
newest to the oldest: when a row moves, no other row has its (key, view) any more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cache.errors import CorruptError
from cache.format.checksums import crc32c
from cache.format.gate import open_file, refuse_links
from cache.format.shard import row_facts
from cache.format.space_info import SpaceInfo
from cache.maintenance.row_checks import Finite
from cache.store.commits import Commit, read_commit
from cache.store.files import Fence, disk_errors, entries, move, remove_file, remove_tree
from cache.store.locks import DriverLock, holder_text
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.space import Space
from cache.store.writer import ShardWriter

Dispose = Callable[[Path], object]
"""Take one file out of the cache, durably."""

KeptRows = tuple[Commit, npt.NDArray[np.bool_]]
"""A shard, and which of its rows (n,) are kept."""


@contextlib.contextmanager
def lock_spaces(spaces: Sequence[SpacePaths], command: str) -> Iterator[Fence]:
    """Hold the driver locks of spaces, so that no job can write to them.

    Yields a function that raises StaleJobError once another job has taken over one of them.

    Raises:
        InUseError: a job writes to one of them; the message names the job.
    """
    with contextlib.ExitStack() as stack:
        locks = [stack.enter_context(DriverLock(space, holder_text(command))) for space in spaces]

        def fence() -> None:
            for lock in locks:
                lock.fence()

        yield fence


def intact_rows(
    paths: SpacePaths, info: SpaceInfo, array: str, commit: Commit
) -> npt.NDArray[np.bool_]:
    """Return which rows (n,) of a shard are as committed and finite. The file may be damaged or missing."""
    geometry, finite = info.geometry(array), Finite(info.spec, array)
    intact = np.zeros(commit.table.num_rows, bool)
    row = np.empty(geometry.row_bytes, np.uint8)
    path = paths.shard(array, commit.shard)
    with contextlib.suppress(OSError, CorruptError), open_file(path, paths.cache_root) as file:
        for slot, crc in enumerate(commit.table["crc"].to_pylist()):
            with contextlib.suppress(OSError):  # an unreadable sector: the row is lost
                got = os.preadv(file.fileno(), [row.data], geometry.row_offset(slot))
                intact[slot] = got == len(row) and crc32c(row.data) == crc and finite(row)
    return intact


def rewrite_shards(
    space: Space,
    array: str,
    kept: Sequence[KeptRows],
    dispose: Dispose,
    fence: Fence | None = None,
) -> int | None:
    """Replace shards by one new shard that has only their kept rows. After any error, these still exist once.

    Returns:
        The number of the new shard; None if no row is kept.

    Raises:
        CorruptError: a row to keep is damaged.
        DiskError: a file cannot be written or removed.
        StaleJobError: `fence` says that another job has taken over the space.
    """
    with disk_errors(space.paths.root):
        number = None
        if any(keep.any() for _, keep in kept):
            number = _copy(space, array, kept, fence)
        elif fence is not None:
            fence()
        remove_shards(space.paths, space.info, array, [commit.shard for commit, _ in kept], dispose)
    return number


def _copy(space: Space, array: str, kept: Sequence[KeptRows], fence: Fence | None) -> int:
    number = space.next_shard(array)
    writer = ShardWriter(space, array, number, fence)
    try:
        for commit, keep in kept:
            _append(space, array, commit, keep, writer)
        writer.commit(replaces=[commit.shard for commit, _ in kept])
    except BaseException:
        with contextlib.suppress(OSError):  # where this fails too, cache.gc removes the shard
            writer.abort()
        raise
    return number


def _append(
    space: Space, array: str, commit: Commit, keep: npt.NDArray[np.bool_], writer: ShardWriter
) -> None:
    geometry, facts = space.info.geometry(array), list(row_facts(commit.table))
    row = np.empty(geometry.row_bytes, np.uint8)
    path = space.paths.shard(array, commit.shard)
    with open_file(path, space.paths.cache_root) as file:
        for slot in np.flatnonzero(keep).tolist():
            key, view, time_s, crc, error = facts[slot]
            os.preadv(file.fileno(), [row.data], geometry.row_offset(slot))
            if crc32c(row.data) != crc:
                what = f"row {commit.shard * geometry.slots + slot} fails its checksum"
                raise CorruptError(path, what)
            writer.append(key, view, row.data, time_s=time_s, error=error)


def remove_shards(
    paths: SpacePaths, info: SpaceInfo, array: str, numbers: Sequence[int], dispose: Dispose
) -> None:
    """Remove shards, and those that they replaced earlier.

    They are removed in ascending order: a shard would exist again if the one that replaced it were removed
    first.
    """
    drop_index(paths)
    going, new = set(numbers), list(numbers)
    while new:
        path = paths.commit(array, number := new.pop())
        if path.exists():
            # The shards that a damaged commit replaced exist again already.
            with contextlib.suppress(CorruptError):
                more = set(read_commit(paths, info, array, number).replaces) - going
                going |= more
                new += more
    for number in sorted(going):
        if paths.commit(array, number).exists():
            dispose(paths.commit(array, number))
        remove_shard_files(paths, array, number, dispose)


def remove_shard_files(paths: SpacePaths, array: str, number: int, dispose: Dispose) -> None:
    """Remove the files of a shard that no commit names.

    The empty folder of the newest shard stays, so that its number, which readers may remember, is not used
    again.
    """
    home = paths.shard_dir(array, number)
    if not home.is_dir():
        return
    for path in sorted(path for path, _ in entries(home, paths.cache_root)):
        dispose(path)
    if not _newest(paths, array, number):
        remove_tree(home, paths.cache_root)


def _newest(paths: SpacePaths, array: str, number: int) -> bool:
    """Return whether no shard with a higher number was ever begun."""
    after = number + 1  # usually exists, which saves listing thousands of files
    if paths.commit(array, after).exists() or paths.shard_dir(array, after).exists():
        return False
    return number >= max([*paths.committed(array), *paths.started(array)], default=-1)


def drop_index(paths: SpacePaths) -> None:
    """Remove the index files: the commits are about to change, and the files are derived from them."""
    if paths.index_dir.is_dir():
        remove_tree(paths.index_dir, paths.cache_root)


def deleter(root: Path) -> Dispose:
    """Return the Dispose that deletes files of the cache at `root`."""
    return lambda path: remove_file(path, root)


def set_aside(root: CacheRoot, path: Path) -> Path:
    """Move one file to the folder `damaged/` of the cache, at the same relative path. Return its new path."""
    target = wanted = root.damaged_dir / path.relative_to(root.path)
    again = 0
    refuse_links(target.parent, root.path)
    while os.path.lexists(target):
        again += 1
        target = wanted.with_name(f"{wanted.name}.{again}")
    move(path, target, root.path)
    return target
