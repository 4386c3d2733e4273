"""Taking rows out of shards: what stays is copied into a new shard, which takes their place in one step.

    parts = [(commit, intact_rows(space.paths, space.info, "image", commit))]
    take_out(space, "image", parts, away)       # the other rows no longer exist

Whoever does so holds the space's `driver.lock` (see `alone`). The new shard's commit `replaces` the old
ones, so a crash leaves the old rows or the kept ones, never both and never less. What `away` does with the
files of what is gone is the caller's: `cache.gc` deletes them, the repair sets them aside.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cache.errors import CorruptError
from cache.format.checksums import crc32c
from cache.format.space_info import SpaceInfo
from cache.maintenance.row_checks import Finite
from cache.store.commits import Commit, read_commit
from cache.store.files import disk_errors, fsync_folder, make_folder
from cache.store.locks import DriverLock, holder_text
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.shard_files import corrupt_shard
from cache.store.space import Space
from cache.store.writer import ShardWriter

Away = Callable[[Path], None]
"""Takes one file out of the cache, durably."""

Part = tuple[Commit, npt.NDArray[np.bool_]]
"""A shard, and which of its rows (n,) stay."""


@contextlib.contextmanager
def alone(spaces: Sequence[SpacePaths], command: str) -> Iterator[None]:
    """Keep every job away from these spaces, or raise CacheError naming the one that is there."""
    with contextlib.ExitStack() as locks:
        for space in spaces:
            locks.enter_context(DriverLock(space, holder_text(command)))
        yield


def intact_rows(
    paths: SpacePaths, info: SpaceInfo, array: str, commit: Commit
) -> npt.NDArray[np.bool_]:
    """Which rows (n,) of a shard, whatever became of its file, are what was committed, and numbers."""
    geometry, finite = info.geometry(array), Finite(info.spec, array)
    intact = np.zeros(commit.table.num_rows, bool)
    row = np.empty(geometry.row_bytes, np.uint8)
    try:
        fd = os.open(paths.shard(array, commit.shard), os.O_RDONLY)
    except OSError:
        return intact
    try:
        for slot, crc in enumerate(commit.table["crc"].to_pylist()):
            with contextlib.suppress(OSError):  # a sector that is gone: so is this row
                whole = os.preadv(fd, [row.data], geometry.row_offset(slot)) == len(row)
                intact[slot] = whole and crc32c(row.data) == crc and finite(row)
    finally:
        os.close(fd)
    return intact


def take_out(space: Space, array: str, parts: Sequence[Part], away: Away) -> int | None:
    """Let only some rows of these shards stay, all in one new shard; its number, None if none stay.

    Raises:
        CorruptError: a row that should stay is damaged.
        CacheError: the disk refused.
        Whatever is raised, every row that should stay still exists, once.
    """
    with disk_errors(space.paths.root):
        number = _copy(space, array, parts) if any(keep.any() for _, keep in parts) else None
        retire(space.paths, space.info, array, [commit.shard for commit, _ in parts], away)
    return number


def _copy(space: Space, array: str, parts: Sequence[Part]) -> int:
    number = space.next_shard(array)
    writer = ShardWriter(space, array, number)
    try:
        for commit, keep in parts:
            _append(space, array, commit, keep, writer)
        writer.commit(replaces=[commit.shard for commit, _ in parts])
    except BaseException:
        with contextlib.suppress(OSError):  # a disk that refuses this too: cache.gc removes it
            writer.abort()
        raise
    return number


def _append(
    space: Space, array: str, commit: Commit, keep: npt.NDArray[np.bool_], writer: ShardWriter
) -> None:
    geometry = space.info.geometry(array)
    row = np.empty(geometry.row_bytes, np.uint8)
    fd = os.open(space.paths.shard(array, commit.shard), os.O_RDONLY)
    try:
        for slot in np.flatnonzero(keep).tolist():
            said = {name: commit.table[name][slot].as_py() for name in commit.table.column_names}
            os.preadv(fd, [row.data], geometry.row_offset(slot))
            if crc32c(row.data) != said["crc"]:
                what = f"row {said['row']} fails its checksum"
                raise corrupt_shard(space.paths, array, commit.shard, what)
            writer.append(
                said["key"].hex(),
                said["view"],
                row.data,
                time_s=said["time_s"],
                error=said["error"],
            )
    finally:
        os.close(fd)


def retire(
    paths: SpacePaths, info: SpaceInfo, array: str, numbers: Sequence[int], away: Away
) -> None:
    """End these shards, and those that they replaced before. Ascending: of two shards where one replaced
    the other, the older goes first, so that none comes back to life."""
    drop_index(paths)
    going, new = set(numbers), list(numbers)
    while new:
        path = paths.commit(array, number := new.pop())
        if path.exists():
            with contextlib.suppress(
                CorruptError
            ):  # what a damaged one replaced came back long ago
                more = set(read_commit(paths, info, array, number).replaces) - going
                going |= more
                new += more
    for number in sorted(going):
        if paths.commit(array, number).exists():
            away(paths.commit(array, number))
        clear_shard(paths, array, number, away)


def shard_home(paths: SpacePaths, array: str, number: int) -> Path:
    """The folder that holds one shard, or the beginnings of it, and nothing else."""
    return paths.shards_dir(array) / str(number)


def clear_shard(paths: SpacePaths, array: str, number: int, away: Away) -> None:
    """Take away the files of a shard that no commit names. The folder of the newest stays, empty: a number
    that readers may remember is never used again."""
    home = shard_home(paths, array, number)
    if not home.is_dir():
        return
    for path in sorted(path for path in home.rglob("*") if path.is_file()):
        away(path)
    if not _newest(paths, array, number):
        shutil.rmtree(home)
        fsync_folder(home.parent)


def _newest(paths: SpacePaths, array: str, number: int) -> bool:
    """Whether no shard with a higher number was ever begun."""
    after = number + 1  # mostly there, and found without listing thousands
    if paths.commit(array, after).exists() or shard_home(paths, array, after).exists():
        return False
    return number >= max([*paths.committed(array), *paths.started(array)], default=-1)


def drop_index(paths: SpacePaths) -> None:
    """Remove what is derived from the commits: they are about to change, and it is rebuilt freely."""
    if (folder := paths.root / "index").is_dir():
        shutil.rmtree(folder)
        fsync_folder(paths.root)


def delete(path: Path) -> None:
    """An `Away`: the file is gone."""
    path.unlink()
    fsync_folder(path.parent)


def set_aside(root: CacheRoot, path: Path) -> Path:
    """An `Away`, with its root: the file goes to `damaged/`, at the same place as in the cache.

    Returns:
        Where it is now.
    """
    target = wanted = root.damaged_dir / path.relative_to(root.path)
    again = 0
    while target.exists():
        again += 1
        target = wanted.with_name(f"{wanted.name}.{again}")
    make_folder(target.parent)
    path.rename(target)
    fsync_folder(target.parent)
    fsync_folder(path.parent)
    return target
