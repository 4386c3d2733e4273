"""Bring another cache into this one: two that were made on two machines become one, nothing encoded again.

python -m cache.merge --source /mnt/other/cache               # into ./cache
python -m cache.merge --source a b --features c               # several, one after the other
python -m cache.merge --source /mnt/other/cache --plan        # say what it would do; writes nothing

Features: of every space there, the rows that the space of the same fingerprint here has not; their stored
bytes, times and codec errors stay as they are, each row is checked on the way, and one that is damaged is
reported, never copied. Media: what only the other ledger knows is added, `ok` beats `failed`, of two failures
the newer counts. Where one source gave different bytes on the two machines, the record here stands, and is
printed. Samples: data sets that are only there are copied.

Killed at any moment, the same command goes on; done twice, the second does nothing. Exit 1: rows were
damaged.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cache.errors import CorruptError
from cache.format.space_info import info_bytes
from cache.format.spec import ARRAYS
from cache.maintenance.copy_rows import (
    ROW_OVERHEAD,
    check_room,
    copy_rows,
    damage_text,
    full_disk_is_said,
    holder,
    missing,
)
from cache.maintenance.merge_tables import (
    MediaNews,
    SampleNews,
    Samples,
    append_news,
    compare_media,
    compare_samples,
    copy_samples,
    tables_bytes,
)
from cache.store.files import write_atomic
from cache.store.index_file import save_index
from cache.store.locks import DriverLock
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.reader import FeatureReader
from cache.store.space import Space, find_space, read_info
from configs import UserError, command, parse
from configs.console import Meter, bytes_text


@dataclass(frozen=True, kw_only=True)
class Options:
    """Bring other caches into this one."""

    source: tuple[Path, ...]
    """Folders of the other caches. Only read."""
    features: Path = Path("cache")
    """Folder of the cache that grows; made when it is not there."""
    space: str | None = None
    """Only this space of the others (its name, or how it begins); when not given, all of them."""
    samples: Samples | None = None
    """A data set that says something else there: keep ours, take theirs, or both (by id)."""
    plan: bool = False
    """Say what there is to do, and stop."""


@dataclass(kw_only=True)
class SpaceNews:
    """What one space of the other cache has that this one has not."""

    source: FeatureReader
    """The space there."""
    paths: SpacePaths
    """The space here, which need not exist yet."""
    positions: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    """Array -> positions of the rows to copy."""
    different: int = 0
    """Rows that are here too, with other bytes: another machine computed them."""

    @property
    def total(self) -> int:
        """Rows there."""
        return sum(map(self.source.rows, ARRAYS))

    @property
    def rows(self) -> int:
        """To copy."""
        return sum(map(len, self.positions.values()))

    @property
    def nbytes(self) -> int:
        """Of those rows, as stored."""
        size = {array: geometry.row_bytes for array, geometry in self.source.geometry.items()}
        return sum(len(rows) * size[array] for array, rows in self.positions.items())


def compare_space(source: SpacePaths, paths: SpacePaths) -> SpaceNews:
    """Look at one space of another cache, and at the one here that it belongs to.

    Raises:
        UserError: one of them cannot be opened.
    """
    news = SpaceNews(source=FeatureReader(source), paths=paths)
    here = FeatureReader(paths) if paths.space_json.exists() else None
    for array in ARRAYS:
        news.positions[array] = missing(news.source, here, array)
        if here is not None:
            news.different += _different(news.source, here, array)
    return news


def _same_space(root: CacheRoot, source: SpacePaths) -> SpacePaths:
    """The space here with the same fingerprint, whatever it is called; else where it will be."""
    spec = read_info(source).spec
    for name in root.space_names():
        if read_info(root.space(name)).spec.fingerprint == spec.fingerprint:
            return root.space(name)
    return root.space(spec.name)


def _different(there: FeatureReader, here: FeatureReader, array: str) -> int:
    """Rows that both have, with different checksums."""
    index, ours = there.index[array], here.index[array]
    rows = ours.lookup_coded(index.keys, index.columns.views)
    both = np.flatnonzero(rows >= 0)
    return int((index.crcs[both] != ours.crcs[ours.positions(rows[both])]).sum())


def merge_space(news: SpaceNews, meter: Meter) -> list[CorruptError]:
    """Copy the rows, with the driver lock held; what is wrong with those that could not be."""
    info = read_info(news.source.paths)
    paths = news.paths
    if not paths.space_json.exists():
        write_atomic(paths.space_json, info_bytes(info))  # shards of the same size as there
    target = Space.create(CacheRoot(paths.root.parent.parent), read_info(paths).spec, info.load)
    damaged = []
    for array, positions in news.positions.items():
        damaged += copy_rows(news.source, target, array, positions, done=meter.add)
    save_index(target.paths, target.info)
    return damaged


@dataclass(frozen=True, kw_only=True)
class News:
    """All that another cache has and this one has not."""

    spaces: list[SpaceNews]
    """One a space there."""
    media: MediaNews
    """Of the ledger."""
    samples: list[SampleNews]
    """One a data set there."""

    @property
    def nbytes(self) -> int:
        """Of the rows to copy."""
        return sum(space.nbytes for space in self.spaces)

    def text(self) -> str:
        """What is said before anything is done."""
        lines = [
            f"space    {s.paths.name}: {s.rows:,} of {s.total:,} rows to copy ({bytes_text(s.nbytes)})"
            + (f"; {s.different:,} are here with other bytes, which stand" if s.different else "")
            for s in self.spaces
        ]
        lines.append(f"media    {self.media.text()}")
        lines += [f"samples  {one.dataset}: {one.what}" for one in self.samples]
        return "\n".join(lines)


def merge(root: CacheRoot, other: CacheRoot, options: Options) -> int:
    """Bring `other` into `root`; how many rows of it were damaged.

    Raises:
        UserError: a job writes here; a space cannot be opened; data sets differ; too little room.
    """
    names = other.space_names()
    if options.space is not None:
        names = [find_space(other, options.space).name]
    pairs = [(other.space(name), _same_space(root, other.space(name))) for name in names]
    with contextlib.ExitStack() as locks:
        if not options.plan:
            for _, here in pairs:
                locks.enter_context(DriverLock(here, holder("cache.merge")))
        news = News(
            spaces=[compare_space(there, here) for there, here in pairs],
            media=compare_media(root, other),
            samples=compare_samples(root, other, options.samples),
        )
        print(news.text(), flush=True)
        if options.plan:
            return 0
        needed = news.nbytes + ROW_OVERHEAD * sum(space.rows for space in news.spaces)
        check_room(root.path, needed + tables_bytes(news.samples, news.media, other), "the merge")
        # Rows first: a media that the ledger has and a sample mentions shall be there.
        meter = Meter("merge", news.nbytes)
        damaged = [error for space in news.spaces for error in merge_space(space, meter)]
        meter.close()
        append_news(root, news.media)
        copy_samples(root, other, news.samples)
    if damaged:
        print(damage_text(damaged))
    rows = sum(space.rows for space in news.spaces) - len(damaged)
    print(f"merged {other.path}: {rows:,} rows, {len(news.media.table):,} media, ", end="")
    print(f"{sum(one.copies for one in news.samples)} data sets")
    return len(damaged)


def main() -> int:
    """The command; 1 when rows there were damaged."""
    options = parse(Options, prog="python -m cache.merge", description=__doc__)
    root = CacheRoot(options.features.expanduser().absolute())
    damaged = 0
    for folder in options.source:
        other = CacheRoot(folder.expanduser().absolute())
        if not (other.spaces_dir.is_dir() or other.samples_dir.is_dir()):
            raise UserError(f"no cache at {folder}/ (looked for spaces/ and samples/)")
        if root.path.is_dir() and other.path.samefile(root.path):
            raise UserError(f"{folder}/ is the cache that shall grow; say which: --features DIR")
        with full_disk_is_said(root.path):
            damaged += merge(root, other, options)
    return 1 if damaged else 0


if __name__ == "__main__":
    command(main)
