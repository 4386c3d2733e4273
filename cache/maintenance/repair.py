"""Remove damage from a cache, so that the next encode run recreates exactly the missing rows.

    samples, media                       set aside; encode.run writes them again
    space.json                           rebuilt if the commits prove it; else as samples and media
    tail.safetensors                     set aside; encode.run writes it again
    commit                               set aside with its shard: it alone says which rows the shard has
    shard                                its intact rows are copied to a new shard; it is set aside
    a row that is stored twice           the oldest intact one is kept, if there is damage at all
    zarr.json, index                     written again

Nothing is deleted: damaged files are moved to `<features>/damaged/`, at the same relative path. Each step is
atomic, so a repair that was killed is completed by the next one. The order of the steps is that of the list
above, so one pass over the rows is enough.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cache.errors import CacheError, CorruptError
from cache.format.checksums import check_seal_file
from cache.format.space_info import info_bytes
from cache.format.spec import ARRAYS
from cache.maintenance.checks import (
    LOST,
    Finding,
    Progress,
    Report,
    SpaceReport,
    check_commits,
    check_shard,
    check_space,
    check_table,
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
from cache.store.files import Fence, disk_errors, move, refuse_strangers, write_atomic
from cache.store.index_file import save_index
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.row_index import RowIndex
from cache.store.space import Space, read_info, rebuild_info, write_if_changed

Tell = Callable[[str], None]
"""Called with one line for each step."""

ASIDE = "set aside with its shard, whose rows are unknown without it"


@dataclass(kw_only=True)
class Repaired:
    """What a repair did."""

    kept: Counter[str] = field(default_factory=Counter)
    """Array -> rows that were copied from damaged shards."""
    lost: Counter[str] = field(default_factory=Counter)
    """Array -> rows that were lost with damaged shards. The next encode run recreates them."""
    steps: int = 0
    """Number of steps."""
    datasets: set[str] = field(default_factory=set)
    """Data sets whose samples were set aside."""
    media: bool = False
    """Whether a part of the media table was set aside. Every data set must then be encoded again."""
    spaces: set[str] = field(default_factory=set)
    """Spaces that lack rows now."""
    tails: set[str] = field(default_factory=set)
    """Spaces that lack the file of their tail now."""


class Repair:
    """One repair of a cache, or of one of its spaces."""

    def __init__(self, root: CacheRoot, *, deep: bool, tell: Tell, progress: Progress):
        self._root, self._deep, self._progress = root, deep, progress
        self._tell_line = tell
        self._aside = partial(set_aside, root)
        self.done = Repaired()
        self._fence: Fence | None = None  # once the spaces are locked

    def run(self, space: SpacePaths | None) -> Report:
        """Repair one space, or everything if `space` is None. Return what is still damaged, and notes.

        Raises:
            CorruptError: the cache has a link or a special file.
            InUseError: a job writes to a space.
            DiskError: a file cannot be read, written or moved.
        """
        refuse_strangers(self._root.path)
        folders = [space] if space else self._root.space_folders()
        report = Report()
        locks = lock_spaces(folders, "cache.verify --repair")
        with disk_errors(self._root.path), locks as self._fence:
            if space is None:
                self._tables()
                report.findings += check_tables(self._root, lambda _: None)
            report.spaces += map(self._space, folders)
        return report

    def _tell(self, path: Path, what: str, todo: str) -> None:
        self.done.steps += 1
        self._tell_line(f"{path}: {what}; {todo}")

    def _tables(self) -> None:
        for finding in list(check_tables(self._root, self._progress)):
            path = Path(finding.path)
            if not finding.broken:
                continue
            self._tell(path, finding.what, f"set aside in {self._root.damaged_dir}")
            place = self._aside(path)
            if _intact(place, self._root) and not path.exists():  # a job replaced it a moment ago
                move(place, path, self._root.path)
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
        self._tail(paths, report)
        if not report.broken:
            # After a repair that was killed, zarr.json lacks the newest shards.
            self._arrays(space, report)
            save_index(paths, space.info)
            return report
        newest = {array: space.next_shard(array) for array in ARRAYS}
        for array in ARRAYS:
            self._shards(space, array, report.findings)
        self._arrays(space, report)
        save_index(paths, space.info)
        left = check_space(paths, False, lambda _: None)
        for array in ARRAYS:  # read back the new shards
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
        except CacheError:  # none, or of another version, which is left alone
            return False
        if (info := rebuild_info(paths)) is not None:
            todo = "written again: its spec has the commits' fingerprint"
            self._tell(paths.space_json, damage, todo)
            write_atomic(paths.space_json, info_bytes(info), root=self._root.path)
            return True
        self._tell(paths.space_json, damage, f"set aside; {LOST}")
        self._aside(paths.space_json)
        self.done.spaces.add(paths.name)
        return False

    def _seals(self, paths: SpacePaths) -> None:
        """Set aside damaged commits of a space without space.json. encode.run could not use them."""
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
        """Set aside damaged commits with their shards."""
        for finding in check_commits(space.paths, space.info, array, lambda _: None)[1]:
            assert finding.shard is not None, "a finding about a commit names its shard"
            self._tell(Path(finding.path), finding.what, ASIDE)
            remove_shards(space.paths, space.info, array, [finding.shard], self._aside)
            self.done.spaces.add(space.paths.name)

    def _shards(self, space: Space, array: str, findings: list[Finding]) -> None:
        """Copy the rows to keep of damaged shards, and of shards with doubled rows, to new shards.

        Of rows with the same (key, view), the oldest that is intact is kept, so all of them are read. The
        newest shard is first: see `cache.maintenance.compaction`.
        """
        commits = read_commits(space.paths, space.info, array)
        why: dict[int, list[str]] = defaultdict(list)
        for finding in findings:
            if finding.array == array and finding.shard is not None:
                why[finding.shard].append(finding.what)
        index = RowIndex.of(commits, space.info.slots[array])
        identities = index.keys[index.doubled], index.columns.views[index.doubled]
        rows = np.concatenate([index.rows(index.doubled), index.lookup_coded(*identities)])
        to_read = why.keys() | set((rows // index.slots).tolist())
        intact = np.ones(index.stored, bool)
        for commit in commits:
            if commit.shard in to_read:
                start, count = index.spans[commit.shard]
                found = intact_rows(space.paths, space.info, array, commit)
                intact[start : start + count] = found
                if commit.shard not in why and not found.all():
                    why[commit.shard].append(f"{int((~found).sum())} of {count} rows are damaged")
        keep, lost = _oldest_intact(index, intact)
        for commit in reversed(commits):
            start, count = index.spans[commit.shard]
            kept = keep[start : start + count]
            if commit.shard not in why and kept.all():
                continue
            reasons = why[commit.shard]
            if again := int((intact[start : start + count] & ~kept).sum()):
                reasons.append(f"{again} of its rows are in other shards, too")
            self._rewrite(space, array, (commit, kept), " and ".join(reasons))
        self.done.lost[array] += lost
        if lost:
            self.done.spaces.add(space.paths.name)

    def _rewrite(self, space: Space, array: str, part: KeptRows, what: str) -> None:
        commit, keep = part
        kept = int(keep.sum())
        todo = f"its {kept} intact rows are copied to a new shard"
        if not kept:
            todo = "set aside with its commit"
        self._tell(space.paths.shard(array, commit.shard), what, todo)
        rewrite_shards(space, array, [part], self._aside, self._fence)
        self.done.kept[array] += kept

    def _index(self, paths: SpacePaths, report: SpaceReport) -> None:
        """Remove damaged index files, which are derived from the commits."""
        folder = paths.index_dir
        about = [f for f in report.findings if Path(f.path).is_relative_to(folder)]
        if about:
            self._tell(folder, about[0].what, "removed: it is written again when needed")
            drop_index(paths)
            report.findings = [f for f in report.findings if f not in about]

    def _tail(self, paths: SpacePaths, report: SpaceReport) -> None:
        """Set aside a damaged file of weights. It counts as missing until encode.run has written it again."""
        for finding in report.findings:
            if finding.path == str(paths.tail) and finding.broken:
                self.done.tails.add(paths.name)
                if paths.tail.exists():
                    self._tell(paths.tail, finding.what, "set aside; encode.run writes it again")
                    self._aside(paths.tail)

    def _arrays(self, space: Space, report: SpaceReport) -> None:
        """Write the descriptions for zarr again, if they differ from what the other files imply."""
        why = {finding.path: finding.what for finding in report.findings if finding.broken}
        files = {space.paths.array_json(array): space.array_json(array) for array in ARRAYS}
        for path, data in {space.paths.group_json: space.group_json(), **files}.items():
            if data is None or not write_if_changed(path, data, self._root.path):
                continue
            if str(path) in why:
                self._tell(path, why[str(path)], "written again")


def _oldest_intact(
    index: RowIndex, intact: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], int]:
    """Return which rows (n,) to keep: of each (key, view) the oldest that is intact; and how many have none.

    Args:
        index: n rows.
        intact: (n,) which of them are intact.
    """
    keep = intact.copy()
    keep[index.doubled] = False
    gone = ~intact
    gone[index.doubled] = False
    damaged = {index.identity(at): at for at in np.flatnonzero(gone).tolist()}
    lost = len(damaged)
    for at in index.doubled[intact[index.doubled]].tolist() if damaged else ():
        if damaged.pop(index.identity(at), None) is not None:
            keep[at] = True
            lost -= 1
    return keep, lost


def _intact(path: Path, root: CacheRoot) -> bool:
    try:
        return check_table(path, root)
    except CorruptError:
        return False
