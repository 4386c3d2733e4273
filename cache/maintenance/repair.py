"""Damage taken out of a cache, so that the next encode makes good exactly what is missing.

No data is deleted: what is damaged goes to `<features>/damaged/`, at the same place as in the cache. Every
step is whole or not done; killed anywhere, the next repair goes on. In this order, so that one pass over the
rows is enough: tables, space.json, commits; then the rows of every shard; then what is made of these.

    samples, media, space.json           set aside; `encode.run` makes them anew
    commit                               set aside, with its shard: nobody knows whose rows they are
    shard                                its intact rows go to a new shard; it is set aside
    the same row twice                   the older stays
    zarr.json, index                     made anew
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import CacheError, CorruptError
from cache.format.checksums import check_seal_file, read_sealed_json
from cache.format.space_info import info_bytes
from cache.format.spec import ARRAYS
from cache.format.zarr_shard import zarr_json
from cache.maintenance.checks import (
    Finding,
    Progress,
    Report,
    SpaceReport,
    check_commits,
    check_shard,
    check_space,
    check_tables,
)
from cache.maintenance.compaction import (
    KeptRows,
    drop_index,
    intact_rows,
    lock_spaces,
    remove_shard_files,
    remove_shards,
    rewrite_shards,
    set_aside,
)
from cache.store.commits import read_commits
from cache.store.files import disk_errors, write_atomic
from cache.store.index_file import save_index
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.row_index import RowIndex
from cache.store.space import Space, read_info, rebuild_info

Tell = Callable[[str], None]
"""Called with one line for each thing that is about to be done."""

ASIDE = "set aside, with its shard: nobody knows whose rows it has"


@dataclass(kw_only=True)
class Repaired:
    """What a repair did."""

    kept: Counter[str] = field(default_factory=Counter)
    """Array -> rows that were saved from damaged shards."""
    lost: Counter[str] = field(default_factory=Counter)
    """Array -> rows known to be gone: the next encode makes them anew."""
    steps: int = 0
    """Things done."""
    datasets: set[str] = field(default_factory=set)
    """Data sets whose samples were set aside."""
    media: bool = False
    """Whether a part of the media table was set aside: every data set must be looked at again."""
    spaces: set[str] = field(default_factory=set)
    """Spaces that miss something now."""


class Repair:
    """One run of it, over a cache or one of its spaces."""

    def __init__(self, root: CacheRoot, *, deep: bool, tell: Tell, progress: Progress):
        self._root, self._deep, self._progress = root, deep, progress
        self._tell_line = tell
        self.done = Repaired()

    def run(self, space: SpacePaths | None) -> Report:
        """Repair everything, or one space, with every job kept away; what is left to say of it.

        Raises:
            CacheError: a job writes there, or the disk refused.
        """
        folders = [space] if space else self._root.space_folders()
        report = Report()
        with disk_errors(self._root.path), lock_spaces(folders, "cache.verify --repair"):
            if space is None:
                self._tables()
                report.findings += check_tables(self._root, lambda _: None)
            report.spaces += map(self._space, folders)
        return report

    def _tell(self, path: Path, what: str, todo: str) -> None:
        self.done.steps += 1
        self._tell_line(f"{path}: {what}; {todo}")

    def _aside(self, path: Path) -> None:
        set_aside(self._root, path)

    def _tables(self) -> None:
        for finding in list(check_tables(self._root, self._progress)):
            path = Path(finding.path)
            if not finding.broken:
                continue
            self._tell(path, finding.what, f"set aside in {self._root.damaged_dir}")
            place = set_aside(self._root, path)
            if _intact(place) and not path.exists():  # a job made it anew at this very moment
                place.rename(path)
            elif path.is_relative_to(self._root.media_dir):
                self.done.media = True
            else:
                self.done.datasets.add(path.parent.name)

    # ---- spaces

    def _space(self, paths: SpacePaths) -> SpaceReport:
        if not self._description(paths):
            if not paths.space_json.exists():
                self._seals(paths)
            return check_space(paths, False, lambda _: None)
        space = Space.open(paths)
        for array in ARRAYS:
            self._commits(space, array)
        report = check_space(paths, self._deep, self._progress)
        self._index(paths, report)
        if not report.broken:
            self._arrays(space, report)  # where an earlier repair was cut short, they lag behind
            save_index(paths, space.info)
            return report
        newest = {array: space.next_shard(array) for array in ARRAYS}
        for array in ARRAYS:
            self._shards(
                space, array, [f for f in report.findings if f.broken and f.array == array]
            )
            self._doubles(space, array)
        self._arrays(space, report)
        save_index(paths, space.info)
        left = check_space(paths, False, lambda _: None)
        for array in ARRAYS:  # what was written just now is read back
            for commit in read_commits(paths, space.info, array):
                if commit.shard >= newest[array]:
                    again = check_shard(paths, space.info, array, commit, True, self._progress)
                    left.findings += again[0]
        return left

    def _description(self, paths: SpacePaths) -> bool:
        """Make sure that space.json can be read. Return whether it can in the end."""
        try:
            read_info(paths)
            return True
        except CorruptError as error:
            damage = error.what
        except CacheError:  # none, or of another version: not ours to touch
            return False
        if (info := rebuild_info(paths)) is not None:
            self._tell(
                paths.space_json,
                damage,
                "written anew: its spec has the commits' fingerprint",
            )
            write_atomic(paths.space_json, info_bytes(info))
            return True
        self._tell(
            paths.space_json,
            damage,
            "set aside; encode.run with the same encoder and codec writes it anew, and keeps every row",
        )
        self._aside(paths.space_json)
        self.done.spaces.add(paths.name)
        return False

    def _seals(self, paths: SpacePaths) -> None:
        """Damaged commits of a space that lost its description: encode.run could not go on with them."""
        for array in ARRAYS:
            for number in paths.committed(array):
                path = paths.commit(array, number)
                try:
                    check_seal_file(path)
                except CorruptError as error:
                    self._tell(path, error.what, ASIDE)
                    self._aside(path)
                    remove_shard_files(paths, array, number, self._aside)

    def _commits(self, space: Space, array: str) -> None:
        """Damaged commits go, with their shards."""
        for finding in check_commits(space.paths, space.info, array, lambda _: None)[1]:
            path = Path(finding.path)
            self._tell(path, finding.what, ASIDE)
            number = next(
                n for n in space.paths.committed(array) if space.paths.commit(array, n) == path
            )
            remove_shards(space.paths, space.info, array, [number], self._aside)
            self.done.spaces.add(space.paths.name)

    def _shards(self, space: Space, array: str, findings: list[Finding]) -> None:
        """Damaged shards: their intact rows, in new ones."""
        commits = {c.shard: c for c in read_commits(space.paths, space.info, array)}
        why: dict[int, list[str]] = {}
        for finding in findings:
            if finding.shard is not None:
                why.setdefault(finding.shard, []).append(finding.what)
        for number, reasons in sorted(why.items()):
            commit = commits[number]
            keep = intact_rows(space.paths, space.info, array, commit)
            self._take_out(space, array, (commit, keep), " and ".join(reasons))

    def _doubles(self, space: Space, array: str) -> None:
        """Of rows with one identity, the oldest stays."""
        commits = read_commits(space.paths, space.info, array)
        index = RowIndex(commits, space.info.slots[array])
        again = index.rows(np.array([second for _, second in index.duplicates()], np.int64))
        for commit in commits:
            keep = ~np.isin(commit.table["row"].to_numpy(), again)
            if not keep.all():
                what = f"{int((~keep).sum())} of its rows are in older shards, too"
                self._take_out(space, array, (commit, keep), what, lost=False)

    def _take_out(
        self, space: Space, array: str, part: KeptRows, what: str, *, lost: bool = True
    ) -> None:
        commit, keep = part
        kept = int(keep.sum())
        todo = f"its {kept} good rows go to a new shard" if kept else "set aside, with its commit"
        self._tell(space.paths.shard(array, commit.shard), what, todo)
        rewrite_shards(space, array, [part], self._aside)
        self.done.kept[array] += kept
        if lost and kept < len(keep):
            self.done.lost[array] += len(keep) - kept
            self.done.spaces.add(space.paths.name)

    def _index(self, paths: SpacePaths, report: SpaceReport) -> None:
        """What is derived from the commits only goes: whoever needs it makes it anew."""
        folder = paths.root / "index"
        about = [f for f in report.findings if Path(f.path).is_relative_to(folder)]
        if about:
            self._tell(folder, about[0].what, "removed: it is derived, and made anew when needed")
            drop_index(paths)
            report.findings = [f for f in report.findings if f not in about]

    def _arrays(self, space: Space, report: SpaceReport) -> None:
        """Zarr's descriptions, which follow from what else is there."""
        files = {}
        if (group := space.info.container.group_values()) is not None:
            files[space.paths.group_json] = zarr_json(group)
        for array in ARRAYS:
            if (values := _array_values(space, array)) is not None:
                files[space.paths.array_json(array)] = zarr_json(values)
        why = {finding.path: finding.what for finding in report.findings if finding.broken}
        for path, data in files.items():
            if path.is_file() and path.read_bytes() == data:
                continue
            if str(path) in why:  # else it only lags behind
                self._tell(path, why[str(path)], "made anew")
            write_atomic(path, data)


def _array_values(space: Space, array: str) -> Mapping[str, Any] | None:
    """An array's zarr.json, if it has one: it covers every committed shard, and never shrinks."""
    slots = space.rows_per_shard(array)
    rows = max((number + 1 for number in space.paths.committed(array)), default=0) * slots
    with contextlib.suppress(CorruptError, KeyError, IndexError, TypeError):
        rows = max(rows, int(read_sealed_json(space.paths.array_json(array))["shape"][0]))
    return space.info.container.array_values(space.spec, array, slots, rows)


def _intact(path: Path) -> bool:
    try:
        check_seal_file(path)
    except CorruptError:
        return False
    return True
