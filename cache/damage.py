"""What is wrong with a cache: the checks behind `cache.verify`.

Quick checks read all metadata (every seal), and of each shard its size and index. Deep ones read every
byte: each row against the crc32c in its commit and against the one beside it. Together they cover every
byte of a space exactly because a space holds nothing that is not under a seal or a crc.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.checksum import crc32c
from cache.commits import Commit, RowIndex, current, read_commit
from cache.container import Geometry, row_facts
from cache.index import check_index
from cache.layout import (
    MAKE_ANEW,
    PARTIAL,
    CacheRoot,
    Corrupt,
    SpacePaths,
    check_seal_file,
    read_sealed_json,
)
from cache.reader import RUN_BYTES, find_space, logical_hash, row_digests
from cache.shard_files import corrupt_shard
from cache.space import SpaceInfo, read_info
from cache.spec import KINDS
from configs import UserError

THREADS = 4
"""Shards read at a time: reading and hashing both let other threads run."""

GC = "python -m cache.gc --delete removes it"
"""The way out for what a crash left behind."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as it should be."""

    path: str
    """The file."""
    what: str
    """What is wrong with it."""
    way_out: str
    """What to do."""
    broken: bool = True
    """Whether something is lost; else a note."""


@dataclass(kw_only=True)
class SpaceReport:
    """What was seen of one space."""

    name: str
    """The space's name."""
    rows: dict[str, int] = field(default_factory=dict)
    """Kind -> committed rows."""
    nbytes: int = 0
    """Size of the committed shards."""
    logical_hash: str | None = None
    """sha256 (hex) of its content; None unless all of it was read and found intact."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong with it."""


@dataclass(kw_only=True)
class Report:
    """What was seen of a cache."""

    findings: list[Finding] = field(default_factory=list)
    """What is wrong outside the spaces."""
    spaces: list[SpaceReport] = field(default_factory=list)
    """One for each space looked at."""

    @property
    def all_findings(self) -> list[Finding]:
        """What is wrong anywhere."""
        return self.findings + [f for space in self.spaces for f in space.findings]

    @property
    def broken(self) -> bool:
        """Whether anything is lost."""
        return any(finding.broken for finding in self.all_findings)


Progress = Callable[[int], None]
"""Called with the number of bytes just read."""


def verify(
    root: CacheRoot,
    *,
    space: str | None = None,
    deep: bool = False,
    progress: Progress | None = None,
) -> Report:
    """All of a cache, or one space of it; with `deep`, every byte."""
    progress = progress or (lambda _: None)
    if space is not None:
        return Report(spaces=[check_space(find_space(root, space), deep, progress)])
    report = Report(findings=list(_check_tables(root)))
    for folder in sorted(root.spaces_dir.glob("*/")):
        report.spaces.append(check_space(SpacePaths(folder), deep, progress))
    return report


def check_space(paths: SpacePaths, deep: bool, progress: Progress) -> SpaceReport:
    """One space."""
    report = SpaceReport(name=paths.name)
    try:
        info = read_info(paths)
    except UserError as error:  # Corrupt, too: without it, nothing else here can be understood
        if any(map(paths.committed, KINDS)) or paths.space_json.exists():
            report.findings.append(_finding(error, paths.space_json))
        return report
    index, digests = {}, {}
    for kind in KINDS:
        commits, findings = _check_commits(paths, info, kind)
        with ThreadPoolExecutor(THREADS) as threads:
            shards = [
                threads.submit(check_shard, paths, info, kind, commit, deep, progress)
                for commit in commits
            ]
            for shard in shards:
                findings += shard.result()[0]
        index[kind] = RowIndex(commits, info.slots[kind])
        digests[kind] = np.concatenate([_NO_DIGESTS, *(shard.result()[1] for shard in shards)])
        findings += _check_array_json(paths, info, kind, commits)
        findings += _check_duplicates(paths, kind, index[kind])
        sound = None if findings else index[kind]
        if derived := check_index(paths, info, kind, deep=deep, rebuilt=sound):
            findings.append(_finding(derived, derived.path))
        report.findings += findings
        report.rows[kind] = len(index[kind])
        report.nbytes += sum(commit.nbytes for commit in commits)
    if (group := info.container.group_values()) is not None:
        report.findings += _check_values(paths.group_json, group)
    report.findings += _check_names(paths, info)
    if deep and not any(finding.broken for finding in report.findings):
        report.logical_hash = logical_hash(index, digests)
    return report


_NO_DIGESTS = np.empty((0, 32), np.uint8)


def check_shard(
    paths: SpacePaths, info: SpaceInfo, kind: str, commit: Commit, deep: bool, progress: Progress
) -> tuple[list[Finding], npt.NDArray[np.uint8]]:
    """What is wrong with one shard; and, with `deep`, the sha256 (n, 32) of its rows."""
    path, geometry = paths.shard(kind, commit.shard), info.geometry(kind)
    findings: list[Finding] = []

    def broken(what: str) -> None:
        error = corrupt_shard(paths, kind, commit.shard, what)
        findings.append(_finding(error, path))

    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != commit.nbytes:
                broken(f"{size} bytes, not {commit.nbytes}")
                return findings, _NO_DIGESTS
            rows = commit.table.num_rows
            tail, tail_crc = geometry.tail_with_crc(rows)
            found = os.pread(file.fileno(), len(tail), rows * geometry.slot_bytes)
            if found != tail or tail_crc != commit.index_crc:
                broken("its last bytes are damaged: the index, or the end of the tar")
            digests = _NO_DIGESTS
            if deep:
                bad, digests = _check_rows(file.fileno(), geometry, commit, progress)
                if bad:
                    broken(f"{len(bad)} of {rows} rows fail their checksum (row {bad[0]} first)")
    except OSError as error:
        broken(error.strerror or str(error))
        return findings, _NO_DIGESTS
    return findings, digests


def _check_rows(
    fd: int, geometry: Geometry, commit: Commit, progress: Progress
) -> tuple[list[int], npt.NDArray[np.uint8]]:
    """Row numbers whose payload has changed, or what stands around it; and the sha256 (n, 32) of all."""
    numbers, facts = commit.table["row"].to_pylist(), list(row_facts(commit.table))
    lead, end = geometry.lead_bytes, geometry.lead_bytes + geometry.row_bytes
    step = max(1, RUN_BYTES // geometry.slot_bytes)
    buffer = np.empty((step, geometry.slot_bytes), np.uint8)
    bad, digests = [], []
    for start in range(0, len(numbers), step):
        slots = buffer[: len(numbers) - start]
        nbytes = os.preadv(fd, [slots.data], start * geometry.slot_bytes)
        progress(nbytes)
        for slot, number, fact in zip(slots, numbers[start:], facts[start:], strict=False):
            around = slot[:lead].tobytes(), slot[end:].tobytes()
            if crc32c(slot[lead:end]) != fact.crc or around != geometry.around(fact):
                bad.append(number)
        digests.append(row_digests(slots[:, lead:end]))
    return bad, np.concatenate(digests)


def _check_tables(root: CacheRoot) -> Iterator[Finding]:
    """Samples and media: their seals, and what a crash left among them."""
    for path in [*_files(root.samples_dir), *_files(root.media_dir)]:
        if path.name.endswith(PARTIAL):
            yield _note(path, "was never finished", GC)
        else:
            try:
                check_seal_file(path)
            except Corrupt as error:
                yield _finding(error, path)


def _check_commits(
    paths: SpacePaths, info: SpaceInfo, kind: str
) -> tuple[list[Commit], list[Finding]]:
    commits, findings = [], []
    for number in paths.committed(kind):
        try:
            commits.append(read_commit(paths, info, kind, number))
        except Corrupt as error:
            findings.append(_finding(error, error.path))
    return current(commits), findings


def _check_duplicates(paths: SpacePaths, kind: str, index: RowIndex) -> Iterator[Finding]:
    for pair in index.duplicates():
        key, view = index.identity(pair[0])
        first, again = index.rows(np.array(pair)).tolist()
        shard = again // index.slots
        what = f"row {again} is {key} {view}, and so is row {first}"
        yield _finding(corrupt_shard(paths, kind, shard, what), paths.shard(kind, shard))


def _check_array_json(
    paths: SpacePaths, info: SpaceInfo, kind: str, commits: Sequence[Commit]
) -> Iterator[Finding]:
    path, slots = paths.array_json(kind), info.slots[kind]
    if info.container.array_values(info.spec, kind, slots, 0) is None:
        return
    needed = (commits[-1].shard + 1) * slots if commits else 0
    try:
        covered = read_sealed_json(path)["shape"][0]
    except Corrupt as error:
        yield _finding(error, path)
        return
    expected = info.container.array_values(info.spec, kind, slots, covered)
    assert expected is not None
    yield from _check_values(path, expected)
    if covered < needed:
        yield _note(path, "does not cover the newest shards", "the next encode.run puts it right")


def _check_values(path: Path, expected: Mapping[str, Any]) -> Iterator[Finding]:
    """A zarr.json that is intact, but says something else, misleads as much as a damaged one."""
    try:
        found = read_sealed_json(path)
        if {**found, "attributes": None} != {**expected, "attributes": None}:
            raise Corrupt(path, "it does not describe the data beside it")
    except Corrupt as error:
        yield _finding(error, path)


def _check_names(paths: SpacePaths, info: SpaceInfo) -> Iterator[Finding]:
    """Files that no commit knows."""
    known = {paths.space_json, *map(paths.index, KINDS)}
    if info.container.group_values() is not None:
        known |= {paths.group_json, *map(paths.array_json, KINDS)}
    for kind in KINDS:
        for number in paths.committed(kind):
            known |= {paths.commit(kind, number), paths.shard(kind, number)}
    for path in _files(paths.root):
        if path.name.endswith(PARTIAL):
            yield _note(path, "was never finished", GC)
        elif path not in known and path.is_relative_to(paths.root / "features"):
            yield _note(path, "no commit names it", GC)
        elif path not in known:
            yield _note(path, "is no file of ours", "nothing reads it: move it away")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _finding(error: UserError, path: Path) -> Finding:
    if isinstance(error, Corrupt):
        return Finding(path=str(path), what=error.what, way_out=error.way_out)
    return Finding(path=str(path), what=str(error), way_out=MAKE_ANEW)


def _note(path: Path, what: str, way_out: str) -> Finding:
    return Finding(path=str(path), what=what, way_out=way_out, broken=False)
