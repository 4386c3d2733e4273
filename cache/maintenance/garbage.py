"""Find what `cache.gc` may remove: files that nothing refers to, and rows stored twice or mentioned nowhere.

Files are removed in an order in which a crash between any two of them leaves a valid space.
"""

from __future__ import annotations

import contextlib
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cache.errors import CacheError
from cache.format.gate import kind_of
from cache.format.spec import ARRAYS
from cache.maintenance.compaction import (
    KeptRows,
    deleter,
    remove_shard_files,
    remove_shards,
    rewrite_shards,
)
from cache.store.commits import KEY_BYTES, Commit, current, read_commit, read_commits
from cache.store.files import (
    PARTIAL,
    Fence,
    entries,
    regular_files,
    remove_file,
    remove_tree,
    strangers,
)
from cache.store.ledger import media_table
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.reader import RUN_BYTES, FeatureReader
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


def find_strangers(root: CacheRoot) -> list[Garbage]:
    """Return the links, FIFOs, sockets and devices in a cache, of which no program of ours makes any.

    Nothing else can be judged before they are removed: what is behind a link is not this cache.
    """
    return [
        Garbage(path=path, what=f"{kind_of(mode)}; a cache has none", nbytes=0)
        for path, mode in strangers(root.path)
    ]


def find_garbage(root: CacheRoot, spaces: Sequence[SpacePaths]) -> list[Garbage]:
    """Return the garbage among samples, media and these spaces. No job may be writing to them.

    Raises:
        CacheError: the commits of a space are missing or damaged, so that its shards cannot be judged.
    """
    old = time.time() - UNFINISHED_S
    tables = (root.samples_dir, root.media_dir)
    partial = [path for folder in tables for path in _partial(folder, root.path)]
    found = [
        _garbage(path, "never finished", root.path)
        for path in partial
        if path.stat().st_mtime < old
    ]
    removed = sorted(root.garbage_dir.glob("*"))
    found += [_garbage(path, "half removed", root.path) for path in removed]
    for space in spaces:
        found += _space_garbage(space)
    return found


def _space_garbage(paths: SpacePaths) -> Iterator[Garbage]:
    # Unfinished commits before shards without one: a worker that was frozen just before it renamed a commit
    # can then no longer make a shard exist whose files are being removed.
    shards = tuple(map(paths.shards_dir, ARRAYS))
    for path in _partial(paths.root, paths.cache_root):
        if not any(path.is_relative_to(folder) for folder in shards):
            yield _garbage(path, "never finished", paths.cache_root)
    for array in ARRAYS:
        orphans = sorted(set(paths.started(array)) - set(paths.committed(array)))
        if orphans and not paths.commits_dir.is_dir():
            raise CacheError(
                f"{paths.commits_dir} is missing, so every shard looks uncommitted; "
                f"put it back, or delete {paths.root} yourself"
            )
        for number in orphans:
            folder = paths.shard_dir(array, number)
            if regular_files(folder, paths.cache_root):
                remove_files = partial(_remove_uncommitted, paths, array, number)
                yield _garbage(folder, "shard, never committed", paths.cache_root, remove_files)
    if paths.space_json.exists() and paths.has_commits:
        yield from _replaced(paths)


def _remove_uncommitted(paths: SpacePaths, array: str, number: int) -> None:
    # A worker that was frozen may have committed it a moment ago.
    if not paths.commit(array, number).exists():
        remove_shard_files(paths, array, number, deleter(paths.cache_root))


def _replaced(paths: SpacePaths) -> Iterator[Garbage]:
    """Yield shards that newer ones replaced, in ascending order, so that removing one revives no other."""
    info, dispose = read_info(paths), deleter(paths.cache_root)
    for array in ARRAYS:
        commits = [read_commit(paths, info, array, number) for number in paths.committed(array)]
        alive = {commit.shard for commit in current(commits)}
        for number in sorted({commit.shard for commit in commits} - alive):
            found = _garbage(
                paths.shard_dir(array, number),
                "shard, replaced by a newer one",
                paths.cache_root,
                partial(remove_shards, paths, info, array, [number], dispose),
            )
            of_commit = paths.commit(array, number).stat().st_size
            yield replace(found, nbytes=found.nbytes + of_commit)


def _partial(folder: Path, root: Path) -> list[Path]:
    return [path for path in regular_files(folder, root) if path.name.endswith(PARTIAL)]


def _garbage(
    path: Path, what: str, root: Path, remove_shard: Callable[[], None] | None = None
) -> Garbage:
    nbytes = tree_bytes(path, root)
    return Garbage(path=path, what=what, nbytes=nbytes, remove_shard=remove_shard)


def tree_bytes(path: Path, root: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    return sum(found.st_size for _, found in entries(path, root))


def remove(garbage: Garbage, root: CacheRoot) -> None:
    """Remove one piece of garbage, durably. Of a link, that is the link itself."""
    if garbage.remove_shard is not None:
        garbage.remove_shard()
        return
    with contextlib.suppress(FileNotFoundError):  # its owner, frozen until now, has just removed it
        if stat.S_ISDIR(garbage.path.lstat().st_mode):
            remove_tree(garbage.path, root.path)
        else:
            remove_file(garbage.path, root.path)


# ---- rows that are stored twice, or that no sample mentions


@dataclass(frozen=True, kw_only=True)
class Removal:
    """Rows of one array that can be removed."""

    space: Space
    """The space that has them."""
    array: str
    """The array that has them."""
    doubled: int
    """Number of these rows that do not count: an older shard has the same (key, view)."""
    unreferenced: int
    """Number of the others, which no sample mentions."""
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


def find_removals(
    paths: SpacePaths, wanted: pa.Array, *, unreferenced: bool
) -> tuple[list[Removal], list[Removal]]:
    """Return what can be removed from each array of a space.

    Args:
        paths: the space.
        wanted: keys (32 bytes each) that samples mention.
        unreferenced: whether rows with other keys are removed, too.

    Returns:
        What to remove; and what `unreferenced` would remove in addition.

    Raises:
        CacheError: the space is damaged, so that its rows cannot be judged.
    """
    space = Space.open(paths)
    found: list[Removal | None] = []
    others: list[Removal | None] = []
    for array in ARRAYS:
        rows = _judge(space, array, wanted)
        found.append(_removal(space, array, rows, doubled=True, unreferenced=unreferenced))
        if not unreferenced:
            others.append(_removal(space, array, rows, doubled=False, unreferenced=True))
    return [one for one in found if one], [one for one in others if one]


Judged = tuple[Commit, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]
"""A shard, which of its rows (n,) count, and which (n,) a sample mentions."""


def _judge(space: Space, array: str, wanted: pa.Array) -> list[Judged]:
    commits = read_commits(space.paths, space.info, array)
    index = RowIndex.of(commits, space.rows_per_shard(array))
    counts = np.ones(index.stored, bool)
    counts[index.doubled] = False
    parts = np.split(counts, index.starts[1:-1])
    return [
        (commit, part, np.asarray(pc.is_in(commit.table["key"], wanted), bool))
        for commit, part in zip(commits, parts, strict=False)
    ]


def _removal(
    space: Space, array: str, rows: Sequence[Judged], *, doubled: bool, unreferenced: bool
) -> Removal | None:
    kept: list[KeptRows] = []
    again = unmentioned = 0
    for commit, counts, mentioned in rows:
        keep = (counts | (not doubled)) & (mentioned | (not unreferenced))
        if not keep.all():
            kept.append((commit, keep))
            again += int((~counts).sum()) if doubled else 0
            unmentioned += int((counts & ~mentioned).sum()) if unreferenced else 0
    if not kept:
        return None
    return Removal(
        space=space,
        array=array,
        doubled=again,
        unreferenced=unmentioned,
        groups=_groups(kept, space.rows_per_shard(array)),
    )


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


def remove_rows(
    found: Removal, fence: Fence | None = None, done: Callable[[int], object] = lambda _: None
) -> None:
    """Copy the other rows to new shards, and delete the old shards. An error loses none of the other rows.

    Args:
        found: the rows to remove.
        fence: raises StaleJobError once the lock of the space is lost.
        done: called with the bytes of old shards, after each group of them.

    Raises:
        CorruptError: a row to keep is damaged, or the row that counts instead of one to remove.
        DiskError: a file cannot be written or removed.
        StaleJobError: another job has taken over the space.
    """
    if found.doubled:
        _check_counting(found)
    dispose = deleter(found.space.paths.cache_root)
    for group in reversed(found.groups):
        rewrite_shards(found.space, found.array, group, dispose, fence)
        done(sum(commit.nbytes for commit, _ in group))


def _check_counting(found: Removal) -> None:
    """Read the rows that count instead of doubled ones: their other copies are about to be removed."""
    reader, array = FeatureReader(found.space.paths), found.array
    index, row_bytes = reader.index[array], reader.geometry[array].row_bytes
    step = max(1, RUN_BYTES // row_bytes)
    buffer = np.empty((step, row_bytes), np.uint8)
    for start in range(0, len(index.doubled), step):
        some = index.doubled[start : start + step]
        rows = index.lookup_coded(index.keys[some], index.columns.views[some])
        reader.read_into(array, rows, buffer[: len(rows)])
