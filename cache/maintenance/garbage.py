"""Find what `cache.gc` may remove: files that nothing refers to, and rows that no sample mentions.

Files are removed in an order in which a crash between any two of them leaves a valid space.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache.errors import CacheError, command_line, features_words
from cache.format.spec import ARRAYS
from cache.maintenance.compaction import (
    KeptRows,
    delete,
    remove_shard_files,
    remove_shards,
    rewrite_shards,
)
from cache.store.commits import KEY_BYTES, current, read_commit, read_commits
from cache.store.files import PARTIAL, fsync_folder
from cache.store.ledger import media_table
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.references import References
from cache.store.row_index import RowIndex
from cache.store.samples import dataset_names, samples_table
from cache.store.space import Space, read_info

UNFINISHED_S = 3600.0
"""Seconds without a change after which an unfinished file of samples or media is garbage. No lock guards
these files, so a younger one may still be in progress."""


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """A file or folder that nothing refers to."""

    path: Path
    """The file or folder."""
    what: str
    """Why it is garbage, in words."""
    nbytes: int
    """Its size on disk."""
    remove_shard: Callable[[], None] | None = None
    """Removes a shard; None for anything else."""


def find_garbage(root: CacheRoot, spaces: Sequence[SpacePaths]) -> list[Garbage]:
    """Return the garbage among samples, media and these spaces. No job may be writing to them.

    Raises:
        CacheError: the commits of a space are missing or damaged, so that its shards cannot be judged.
    """
    old = time.time() - UNFINISHED_S
    partial = [p for folder in (root.samples_dir, root.media_dir) for p in _partial(folder)]
    found = [_garbage(path, "never finished") for path in partial if path.stat().st_mtime < old]
    found += [_garbage(path, "half removed") for path in sorted(root.garbage_dir.glob("*"))]
    for space in spaces:
        found += _space_garbage(space)
    return found


def _space_garbage(paths: SpacePaths) -> Iterator[Garbage]:
    for array in ARRAYS:
        orphans = sorted(set(paths.started(array)) - set(paths.committed(array)))
        if orphans and not paths.commits_dir.is_dir():
            raise CacheError(
                f"{paths.commits_dir} is missing, so every shard looks uncommitted; "
                f"put it back, or delete {paths.root} yourself"
            )
        for number in orphans:
            if any(path.is_file() for path in paths.shard_dir(array, number).rglob("*")):
                remove_files = partial(remove_shard_files, paths, array, number, delete)
                yield _garbage(
                    paths.shard_dir(array, number), "shard, never committed", remove_files
                )
    if paths.space_json.exists() and paths.has_commits:
        yield from _replaced(paths)
    shards = tuple(map(paths.shards_dir, ARRAYS))
    for path in _partial(paths.root):
        if not any(path.is_relative_to(folder) for folder in shards):
            yield _garbage(path, "never finished")


def _replaced(paths: SpacePaths) -> Iterator[Garbage]:
    """Yield shards that newer ones replaced, in ascending order, so that removing one revives no other."""
    info = read_info(paths)
    for array in ARRAYS:
        commits = [read_commit(paths, info, array, number) for number in paths.committed(array)]
        alive = {commit.shard for commit in current(commits)}
        for number in sorted({commit.shard for commit in commits} - alive):
            found = _garbage(
                paths.shard_dir(array, number),
                "shard, replaced by a newer one",
                partial(remove_shards, paths, info, array, [number], delete),
            )
            yield replace(found, nbytes=found.nbytes + _size(paths.commit(array, number)))


def _partial(folder: Path) -> list[Path]:
    return sorted(folder.rglob(f"*{PARTIAL}"))


def _garbage(path: Path, what: str, remove_shard: Callable[[], None] | None = None) -> Garbage:
    return Garbage(path=path, what=what, nbytes=_size(path), remove_shard=remove_shard)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(file.stat().st_size for file in files)


def remove(garbage: Garbage) -> None:
    """Remove one piece of garbage, durably."""
    if garbage.remove_shard is not None:
        garbage.remove_shard()
    elif garbage.path.is_dir():
        shutil.rmtree(garbage.path)
        fsync_folder(garbage.path.parent)
    else:
        delete(garbage.path)


# ---- rows that no sample mentions


@dataclass(frozen=True, kw_only=True)
class Unreferenced:
    """Rows of one array that no sample mentions."""

    space: Space
    """The space that has them."""
    array: str
    """The array that has them."""
    rows: int
    """Number of these rows."""
    groups: list[list[KeptRows]]
    """Shards that hold some of them, with the rows to keep. The kept rows of one group fit into one shard."""

    @property
    def shards(self) -> int:
        """Shards that would be replaced or removed."""
        return sum(map(len, self.groups))

    @property
    def copied(self) -> int:
        """Bytes that would be written."""
        geometry = self.space.info.geometry(self.array)
        rows = (sum(int(keep.sum()) for _, keep in group) for group in self.groups)
        return sum(geometry.file_bytes(n) for n in rows if n)

    @property
    def nbytes(self) -> int:
        """Bytes that would be freed."""
        old = sum(commit.nbytes for group in self.groups for commit, _ in group)
        return old - self.copied


def wanted_keys(root: CacheRoot) -> pa.Array:
    """Return the keys (32 bytes) of all media that a sample mentions, under any source.

    Where a sample states another sha256 than the bytes of its source have, both keys are wanted.
    """
    table = media_table(root)
    mentioned = np.zeros(len(table), bool)
    wanted: set[str] = set()
    for name in dataset_names(root):
        media = samples_table(root, name, ["media"])["media"]
        source = References.of(media, table).source
        mentioned[source[source < len(table)]] = True
        stated = pc.struct_field(pc.list_flatten(media), "sha256")
        wanted.update(stated.drop_null().unique().to_pylist())
    wanted.update(table["key"].filter(pa.array(mentioned)).drop_null().unique().to_pylist())
    return pa.array(sorted(map(bytes.fromhex, wanted)), pa.binary(KEY_BYTES))


def find_unreferenced(paths: SpacePaths, wanted: pa.Array) -> list[Unreferenced]:
    """Return the rows of a space whose key is not among `wanted` (32 bytes each), for each array with any.

    Raises:
        CacheError: the space is damaged, so that its rows cannot be judged.
    """
    space = Space.open(paths)
    found = []
    for array in ARRAYS:
        slots = space.rows_per_shard(array)
        commits = read_commits(paths, space.info, array)
        kept: list[KeptRows] = []
        for commit in commits:
            keep = np.asarray(pc.is_in(commit.table["key"], wanted), bool)
            if not keep.all():
                kept.append((commit, keep))
        if not kept:
            continue
        if RowIndex.of(commits, slots).duplicates():
            repair = command_line(
                "cache.verify", "--deep", "--repair", *features_words(paths.space_json)
            )
            raise CacheError(f"{paths.root} holds rows twice: {repair}")
        rows = sum(int((~keep).sum()) for _, keep in kept)
        groups = _groups(kept, slots)
        found.append(Unreferenced(space=space, array=array, rows=rows, groups=groups))
    return found


def _groups(kept: Sequence[KeptRows], slots: int) -> list[list[KeptRows]]:
    """Group adjacent shards whose kept rows fit into one shard.

    A shard is never divided, because it is replaced in one step. So the rows of a video stay adjacent.
    """
    groups: list[list[KeptRows]] = []
    room = 0
    for shard in kept:
        rows = int(shard[1].sum())
        if rows > room or not groups:
            groups.append([])
            room = slots
        groups[-1].append(shard)
        room -= rows
    return groups


def remove_unreferenced(found: Unreferenced) -> None:
    """Copy the other rows to new shards, and delete the old shards. An error loses none of the other rows.

    Raises:
        CorruptError: a row to keep is damaged.
        DiskError: a file cannot be written or removed.
    """
    for group in found.groups:
        rewrite_shards(found.space, found.array, group, delete)
