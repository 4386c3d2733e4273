"""Merge other caches into one, without encoding anything again.

python -m cache.merge --source /mnt/other/cache               # into ./cache
python -m cache.merge --source a b --features c               # several, one after the other
python -m cache.merge --source /mnt/other/cache --plan        # print what it would do; writes nothing

Features: for each space of the other cache, copy the rows that the local space of the same fingerprint lacks.
Stored bytes, times and codec errors stay as they are. Each row's checksum is verified; a damaged row is
reported and not copied. Media: add records of unknown sources; `ok` replaces `failed`, and the newer of two
failures counts. Where a source gave different bytes on the two machines, keep the local record and print it.
Samples: copy data sets that the local cache lacks.

The command can be interrupted and repeated; a row is never copied twice. The exit status is 1
when rows were damaged.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cache.errors import CacheError, CorruptError
from cache.format.space_info import info_bytes
from cache.format.spec import ARRAYS
from cache.maintenance.compaction import lock_spaces
from cache.maintenance.copy_rows import (
    ROW_OVERHEAD,
    copy_rows,
    damage_text,
    missing,
)
from cache.maintenance.local_media import remember, remembered
from cache.maintenance.merge_tables import (
    Samples,
    append_planned_media,
    copy_samples,
    plan_media,
    plan_samples,
    tables_bytes,
)
from cache.store.files import Fence, disk_errors, write_atomic
from cache.store.index_file import save_index
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.reader import FeatureReader
from cache.store.space import Space, find_space, read_info, tail_bytes, tail_difference, write_tail
from configs import UserError, command, parse
from configs.console import bytes_text, check_room
from configs.progress import Meter
from configs.text import say


@dataclass(frozen=True, kw_only=True)
class Options:
    """Merge other caches into one."""

    source: tuple[Path, ...]
    """Folders of the other caches, which are only read."""
    features: Path = Path("cache")
    """Folder of the cache to merge into; created if it does not exist."""
    space: str | None = None
    """Merge only this space of the others (its name, or the start of it); default: all of them."""
    samples: Samples | None = None
    """For data sets whose samples differ: keep ours, take theirs, or keep ours and add theirs by id."""
    plan: bool = False
    """Print what there is to do, and stop."""


@dataclass(frozen=True, kw_only=True)
class SpacePlan:
    """The rows to copy from one space of the other cache."""

    source: FeatureReader
    """The space of the other cache."""
    paths: SpacePaths
    """The local space, which need not exist yet."""
    positions: dict[str, npt.NDArray[np.int64]]
    """Array -> positions (n,) in the source of the rows to copy."""
    different: int
    """Rows that both spaces have with different bytes, because different machines computed them."""

    @property
    def rows(self) -> int:
        """Rows to copy."""
        return sum(map(len, self.positions.values()))

    @property
    def nbytes(self) -> int:
        """Stored bytes of the rows to copy."""
        size = {array: geometry.row_bytes for array, geometry in self.source.geometry.items()}
        return sum(len(rows) * size[array] for array, rows in self.positions.items())

    def text(self) -> str:
        """Return the line that is printed before anything is copied."""
        total, size = sum(map(self.source.rows, ARRAYS)), bytes_text(self.nbytes)
        line = f"{self.paths.name}: {self.rows:,} of {total:,} rows to copy ({size})"
        if self.different:
            line += f"; {self.different:,} are here with other bytes, which are kept"
        return line


def plan_space(source: SpacePaths, paths: SpacePaths) -> SpacePlan:
    """Find the rows that a local space lacks.

    Args:
        source: a space of the other cache.
        paths: the local space of the same fingerprint, which need not exist.

    Raises:
        CacheError: one of them cannot be opened.
    """
    there = FeatureReader(source)
    here = FeatureReader(paths) if paths.space_json.exists() else None
    ours, theirs = (None if here is None else here.spec.tail), there.spec.tail
    if ours is not None and theirs is not None and ours != theirs:
        raise CacheError(f"{source.space_json}: {tail_difference(ours, theirs)}")
    return SpacePlan(
        source=there,
        paths=paths,
        positions={array: missing(there, here, array) for array in ARRAYS},
        different=sum(_different(there, here, array) for array in ARRAYS if here is not None),
    )


def _same_space(root: CacheRoot, source: SpacePaths) -> SpacePaths:
    """Return the local space with the fingerprint of `source`, or the place where to create it."""
    spec = read_info(source).spec
    for name in root.space_names():
        if read_info(root.space(name)).spec.fingerprint == spec.fingerprint:
            return root.space(name)
    return root.space(spec.name)


def _different(there: FeatureReader, here: FeatureReader, array: str) -> int:
    """Count the rows that count in both spaces, with different checksums."""
    index, ours = there.index[array], here.index[array]
    rows = ours.lookup_coded(index.keys, index.columns.views)
    rows[index.doubled] = -1
    both = np.flatnonzero(rows >= 0)
    return int((index.crcs[both] != ours.crcs[ours.positions(rows[both])]).sum())


def merge_space(plan: SpacePlan, meter: Meter, fence: Fence) -> list[CorruptError]:
    """Copy the rows of one space while holding its driver lock; return one error for each damaged row."""
    info = read_info(plan.source.paths)
    paths, tail = plan.paths, tail_bytes(plan.source.paths, info.spec)
    if tail is not None:
        write_tail(paths, info.spec, info.load, tail)
    if not paths.space_json.exists():
        # Keeps the source's shard size.
        write_atomic(paths.space_json, info_bytes(info), root=paths.cache_root)
    target = Space.create(CacheRoot(paths.cache_root), read_info(paths).spec, info.load)
    damaged = []
    for array, positions in plan.positions.items():
        damaged += copy_rows(
            plan.source,
            target,
            array,
            positions,
            fence=fence,
            done=lambda _rows, nbytes, _bound: meter.add(nbytes),
        )
    save_index(target.paths, target.info)
    return damaged


def merge(root: CacheRoot, other: CacheRoot, options: Options) -> int:
    """Merge `other` into `root`; return how many of its rows were damaged.

    Raises:
        InUseError: a job writes to `root`.
        UserError: the disk is too small.
        CacheError: a space cannot be opened, or data sets differ and `options.samples` is not given.
    """
    names = other.space_names()
    if options.space is not None:
        names = [find_space(other, options.space).name]
    pairs = [(other.space(name), _same_space(root, other.space(name))) for name in names]
    with contextlib.ExitStack() as locks:
        if not options.plan:
            fence = locks.enter_context(lock_spaces([here for _, here in pairs], "cache.merge"))
        spaces = [plan_space(there, here) for there, here in pairs]
        media, samples = plan_media(root, other), plan_samples(root, other, options.samples)
        lines = [f"space    {space.text()}" for space in spaces]
        lines += [f"media    {media.text()}"]
        lines += [f"samples  {one.dataset}: {one.what}" for one in samples]
        say(*lines, flush=True)
        if options.plan:
            return 0
        nbytes = sum(space.nbytes for space in spaces)
        needed = nbytes + ROW_OVERHEAD * sum(space.rows for space in spaces)
        check_room(root.path, needed + tables_bytes(samples, media, other), "the merge")
        # Rows first: what the ledger and the samples refer to exists when they are written.
        with Meter("merge", nbytes) as meter:
            damaged = [error for space in spaces for error in merge_space(space, meter, fence)]
        fence()
        append_planned_media(root, media)
        copy_samples(root, other, samples)
    remember(root, remembered(other))  # of media that this machine encoded there
    if damaged:
        say(damage_text(damaged))
    rows = sum(space.rows for space in spaces) - len(damaged)
    copied = (
        f"{rows:,} rows, {len(media.table):,} media, {sum(s.copies for s in samples)} data sets"
    )
    say(f"merged {other.path}: {copied}")
    return len(damaged)


def main() -> int:
    """Run the command; return 1 when rows of a source were damaged, else 0."""
    options = parse(Options, prog="python -m cache.merge", description=__doc__)
    root = CacheRoot(options.features.expanduser().absolute())
    damaged = 0
    for folder in options.source:
        other = CacheRoot(folder.expanduser().absolute())
        if not other.has_files():
            raise UserError(f"no cache at {folder}/ (looked for spaces/ and samples/)")
        if root.path.is_dir() and other.path.samefile(root.path):
            raise UserError(
                f"{folder}/ is the cache to merge into; name another one: --features DIR"
            )
        with disk_errors(root.path):
            damaged += merge(root, other, options)
    return 1 if damaged else 0


if __name__ == "__main__":
    command(main, errors=(CacheError,))
