"""Check a cache for damage, for `cache.verify`.

Quick checks read all metadata with its seals, and the size and the index of each shard. Deep checks read
every byte: they compare each row with the crc32c in its commit and with the one beside it, and look for NaN
and Inf. Together they cover every byte of a space, because each is under a seal or a crc32c.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cache.errors import (
    CacheError,
    CorruptError,
    command_line,
    features_words,
    removal_advice,
    repair_advice,
)
from cache.format.checksums import crc32c, read_sealed_json
from cache.format.gate import open_file
from cache.format.shard import Geometry, row_facts
from cache.format.space_info import SpaceInfo
from cache.format.spec import ARRAYS
from cache.maintenance.row_checks import Finite, outliers
from cache.store.commits import Commit, current, key_bytes, read_commit
from cache.store.files import PARTIAL, refuse_strangers, regular_files
from cache.store.index_file import check_index
from cache.store.ledger import check_part
from cache.store.paths import CacheRoot, SpacePaths, is_dataset_name
from cache.store.reader import RUN_BYTES, logical_hash, row_digests
from cache.store.row_index import RowIndex
from cache.store.samples import check_samples
from cache.store.space import Space, find_space, read_info, tail_bytes

THREADS = max(4, os.cpu_count() or 1)
"""Shards that are read at the same time. Reading, sha256 and crc32c release the interpreter's lock, so every
core helps. There are at least four, so that the disk is never idle."""

LOST = "encode.run with the same encoder and codec writes it again, and keeps every row"
"""Advice for a space without space.json. Every commit has the fingerprint, so the rows are not lost."""

SHOWN = 10
"""Number of outliers that are listed for one array."""


Progress = Callable[[int], None]
"""Called with the number of bytes just read. Threads may call it."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Damage to one file, or a note about it."""

    path: str
    """The file."""
    what: str
    """What is wrong with it."""
    way_out: str
    """What to do about it."""
    broken: bool = True
    """Whether data is damaged; False for a note."""
    array: str | None = None
    """Array whose rows are concerned: image or frame."""
    shard: int | None = None
    """Committed shard whose rows are concerned."""


@dataclass(kw_only=True)
class SpaceReport:
    """Result of checking one space."""

    name: str
    """Name of the space."""
    rows: dict[str, int] = field(default_factory=dict)
    """Array -> committed rows, each (key, view) once."""
    nbytes: int = 0
    """Bytes of the committed shards."""
    logical_hash: str | None = None
    """sha256 (hex) of its content; None unless all of it was read and is intact."""
    findings: list[Finding] = field(default_factory=list)
    """Damage and notes."""

    @property
    def broken(self) -> bool:
        """Whether anything is damaged."""
        return any(finding.broken for finding in self.findings)


@dataclass(kw_only=True)
class Report:
    """Result of checking a cache."""

    findings: list[Finding] = field(default_factory=list)
    """Damage and notes outside of the spaces."""
    spaces: list[SpaceReport] = field(default_factory=list)
    """One report for each space that was checked."""

    @property
    def all_findings(self) -> list[Finding]:
        """All damage and notes."""
        return self.findings + [f for space in self.spaces for f in space.findings]

    @property
    def broken(self) -> bool:
        """Whether anything is damaged."""
        return any(finding.broken for finding in self.all_findings)


def damage(
    reason: Exception | str, path: Path, *, array: str | None = None, shard: int | None = None
) -> Finding:
    """Return an error, or a reason in words, as a finding about `path`."""
    what, way_out = str(reason), repair_advice(path)
    if isinstance(reason, CorruptError):
        what, way_out = reason.what, reason.way_out
    elif isinstance(reason, OSError):  # a dying disk
        what = reason.strerror or what
    return Finding(path=str(path), what=what, way_out=way_out, array=array, shard=shard)


def note(path: Path, what: str, way_out: str) -> Finding:
    """Return a finding that is no damage."""
    return Finding(path=str(path), what=what, way_out=way_out, broken=False)


# ---- a cache


def verify(
    root: CacheRoot,
    *,
    space: str | None = None,
    deep: bool = False,
    hashed: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Check a cache.

    Args:
        root: the cache.
        space: check only the space with this name, or whose name begins with it; None: everything.
        deep: whether to read every row.
        hashed: whether deep checks compute the logical hash.
        progress: called with the bytes just read.

    Raises:
        CorruptError: the cache has a link or a special file.
    """
    refuse_strangers(root.path)
    progress = progress or (lambda _: None)
    if space is not None:
        return Report(spaces=[check_space(find_space(root, space), deep, progress, hashed)])
    report = Report(findings=list(check_tables(root, progress)))
    for paths in root.space_folders():
        report.spaces.append(check_space(paths, deep, progress, hashed))
    return report


def bytes_to_read(root: CacheRoot, space: str | None, deep: bool) -> int:
    """Return about how many bytes `verify` will read."""
    folders = [root.samples_dir, root.media_dir, root.spaces_dir]
    if space is not None:
        folders = [find_space(root, space).root]
    paths = [path for folder in folders for path in regular_files(folder, root.path)]
    always = (".parquet", ".safetensors")
    return sum(path.stat().st_size for path in paths if deep or path.suffix in always)


def check_space(
    paths: SpacePaths, deep: bool, progress: Progress, hashed: bool = False
) -> SpaceReport:
    """Check one space. The arguments are those of `verify`."""
    report = SpaceReport(name=paths.name)
    try:
        info = read_info(paths)
    except CacheError as error:  # without space.json, no other file can be checked
        if paths.space_json.exists():
            report.findings.append(damage(error, paths.space_json))
        elif paths.has_commits:
            lost = CorruptError(paths.space_json, "missing", LOST)
            report.findings.append(damage(lost, paths.space_json))
        return report
    space, index, digests = Space(paths, info), {}, {}
    for array in ARRAYS:
        commits, findings = check_commits(paths, info, array, progress)
        with ThreadPoolExecutor(THREADS) as threads:
            shards = [
                threads.submit(check_shard, paths, info, array, commit, deep, progress, hashed)
                for commit in commits
            ]
            for shard in shards:
                findings += shard.result()[0]
        index[array] = RowIndex.of(commits, info.slots[array])
        digests[array] = np.concatenate([_NO_DIGESTS, *(shard.result()[1] for shard in shards)])
        findings += _check_zarr_json(
            paths.array_json(array), space.array_json(array), paths.cache_root
        )
        findings += _check_doubled(paths, array, index[array])
        findings += _check_errors(paths, array, index[array])
        sound = None if any(f.broken for f in findings) else index[array]
        if derived := check_index(paths, info, array, deep=deep, rebuilt=sound):
            findings.append(damage(derived, derived.path))
        report.findings += findings
        report.rows[array] = len(index[array])
        report.nbytes += sum(commit.nbytes for commit in commits)
    report.findings += _check_zarr_json(paths.group_json, space.group_json(), paths.cache_root)
    report.findings += _check_tail(paths, info, progress)
    report.findings += _check_names(paths, info)
    if deep and hashed and not report.broken:
        report.logical_hash = logical_hash(index, digests)
    return report


_NO_DIGESTS = np.empty((0, 32), np.uint8)


def check_shard(
    paths: SpacePaths,
    info: SpaceInfo,
    array: str,
    commit: Commit,
    deep: bool,
    progress: Progress,
    hashed: bool = False,
) -> tuple[list[Finding], npt.NDArray[np.uint8]]:
    """Check one shard. The arguments are those of `verify`.

    Returns:
        What is wrong with it; and, with `deep` and `hashed`, the sha256 (n, 32) of its rows.
    """
    path, geometry = paths.shard(array, commit.shard), info.geometry(array)
    findings: list[Finding] = []
    digests = _NO_DIGESTS

    def broken(what: Exception | str) -> None:
        findings.append(damage(what, path, array=array, shard=commit.shard))

    try:
        with open_file(path, paths.cache_root) as file:
            fd, rows = file.fileno(), commit.table.num_rows
            size = os.fstat(fd).st_size
            if size != commit.nbytes:
                broken(f"{size} bytes, not {commit.nbytes}")
                return findings, digests
            tail, tail_crc = geometry.tail_with_crc(rows)
            found = os.pread(fd, len(tail), rows * geometry.slot_bytes)
            if found != tail or tail_crc != commit.index_crc:
                broken("its last bytes are damaged: the index, or the end of the tar")
            if deep:
                finite = Finite(info.spec, array)
                bad, odd, digests = _check_rows(fd, geometry, commit, finite, progress, hashed)
                if bad:
                    broken(f"{len(bad)} of {rows} rows fail their checksum (row {bad[0]} first)")
                if odd:
                    broken(f"{len(odd)} of {rows} rows hold NaN or Inf (row {odd[0]} first)")
    except (CorruptError, OSError) as error:
        broken(error)
    return findings, digests


def _check_rows(
    fd: int,
    geometry: Geometry,
    commit: Commit,
    finite: Finite,
    progress: Progress,
    hashed: bool,
) -> tuple[list[int], list[int], npt.NDArray[np.uint8]]:
    """Read all rows of a shard.

    Returns:
        Numbers of the rows whose bytes, or the bytes around them, have changed; numbers of other rows with a
        NaN or Inf; and the sha256 (n, 32) of all rows.
    """
    numbers, facts = commit.table["row"].to_pylist(), list(row_facts(commit.table))
    lead, end = geometry.lead_bytes, geometry.lead_bytes + geometry.row_bytes
    step = max(1, RUN_BYTES // geometry.slot_bytes)
    buffer = np.empty((step, geometry.slot_bytes), np.uint8)
    bad, odd, digests = [], [], [_NO_DIGESTS]
    for start in range(0, len(numbers), step):
        slots = buffer[: len(numbers) - start]
        nbytes = os.preadv(fd, [slots.data], start * geometry.slot_bytes)
        progress(nbytes)
        for slot, number, fact in zip(slots, numbers[start:], facts[start:], strict=False):
            around = slot[:lead].tobytes(), slot[end:].tobytes()
            if crc32c(slot[lead:end]) != fact.crc or around != geometry.around(fact):
                bad.append(number)
            elif not finite(slot[lead:end]):
                odd.append(number)
        if hashed:
            digests.append(row_digests(slots[:, lead:end]))
    return bad, odd, np.concatenate(digests)


def check_tables(root: CacheRoot, progress: Progress) -> Iterator[Finding]:
    """Check every value of samples and media, and find files that a crash left behind."""
    tables = (root.samples_dir, root.media_dir)
    for path in [path for folder in tables for path in regular_files(folder, root.path)]:
        if path.name.endswith(PARTIAL):
            yield note(path, "was never finished", removal_advice(path))
            continue
        try:
            if not check_table(path, root):
                yield note(path, "is no file of ours", "no command reads it: move it away")
        except (CorruptError, OSError) as error:
            yield damage(error, path)
        progress(path.stat().st_size)


def check_table(path: Path, root: CacheRoot) -> bool:
    """Check every value in a file of samples or media records, which may have been set aside.

    Returns:
        False if it is neither, by its name.

    Raises:
        CorruptError: it is damaged, or not what this program writes.
    """
    parts = path.relative_to(root.path).parts
    match parts[1:] if parts[0] == root.damaged_dir.name else parts:
        case [root.media_dir.name, _]:
            check_part(path, root)
        case [root.samples_dir.name, name, file] if is_dataset_name(name):
            if file != root.samples(name).name:
                return False
            check_samples(path, root)
        case _:
            return False
    return True


def check_commits(
    paths: SpacePaths, info: SpaceInfo, array: str, progress: Progress
) -> tuple[list[Commit], list[Finding]]:
    """Return the intact commits of all shards that exist, by number; and what is wrong with the others."""
    commits, findings = [], []
    for number in paths.committed(array):
        path = paths.commit(array, number)
        try:
            commits.append(read_commit(paths, info, array, number))
        except (CorruptError, OSError) as error:
            findings.append(damage(error, path, array=array, shard=number))
        progress(path.stat().st_size)
    return current(commits), findings


def _check_errors(paths: SpacePaths, array: str, index: RowIndex) -> Iterator[Finding]:
    """Find rows with a far larger codec error than the others."""
    errors = index.errors
    found = outliers(errors)
    for number, at in enumerate(found[:SHOWN].tolist(), 1):
        position = int(index.numbered(np.array([at]))[0])
        key, view = index.identity(position)
        what = f"{key} {view}: its codec's error is {errors[at]:.3g}"
        what += f", the median {np.median(errors):.3g}"
        if number == SHOWN < len(found):
            what += f", {len(found) - SHOWN} more like it"
        row = int(index.rows(np.array([position]))[0])
        shard = paths.shard(array, row // index.slots)
        yield note(shard, what, "stored as it was written; look at the image")


def _check_doubled(paths: SpacePaths, array: str, index: RowIndex) -> Iterator[Finding]:
    """Find rows that do not count, because an older shard has them too."""
    again = index.rows(index.doubled)
    shards, starts, counts = np.unique(again // index.slots, return_index=True, return_counts=True)
    for shard, start, count in zip(*map(np.ndarray.tolist, (shards, starts, counts)), strict=True):
        key, view = index.identity(int(index.doubled[start]))
        first = int(index.lookup(key_bytes([key]), view)[0])
        what = f"{count:,} of its rows are in older shards, too, and count once there"
        what += f" (row {again[start]} first: {key} {view} is row {first})"
        collect = command_line("cache.gc", "--delete", *features_words(paths.space_json))
        yield note(paths.shard(array, shard), what, f"{collect} frees their bytes")


def _check_zarr_json(path: Path, expected: bytes | None, root: Path) -> Iterator[Finding]:
    """Check a zarr.json. An intact one that describes something else is damage too."""
    if expected is None:  # the container has none
        return
    try:
        found, wanted = read_sealed_json(path, root), json.loads(expected)
    except CorruptError as error:
        yield damage(error, path)
        return
    differing = {name for name in found | wanted if found.get(name) != wanted.get(name)}
    differing -= {"attributes"}  # they contain the seal
    shape = found.get("shape")
    stated = shape if isinstance(shape, list) else [None]
    fits = stated[1:] == wanted.get("shape", [])[1:] and type(stated[0]) is int
    if differing == {"shape"} and fits:
        yield note(path, "does not cover the newest shards", "the next encode.run extends it")
    elif differing:
        yield damage("it does not describe the data beside it", path)


def _check_tail(paths: SpacePaths, info: SpaceInfo, progress: Progress) -> Iterator[Finding]:
    """Compare the weights of the blocks behind the stored one with space.json."""
    try:
        progress(len(tail_bytes(paths, info.spec) or b""))
    except (CorruptError, OSError) as error:
        yield damage(error, paths.tail)


def _check_names(paths: SpacePaths, info: SpaceInfo) -> Iterator[Finding]:
    """Find files that do not belong to the space."""
    known = {paths.space_json, *map(paths.index, ARRAYS)}
    known |= {paths.tail} if info.spec.tail is not None else set()
    if info.spec.container == "zarr":
        known |= {paths.group_json, *map(paths.array_json, ARRAYS)}
    for array in ARRAYS:
        for number in paths.committed(array):
            known |= {paths.commit(array, number), paths.shard(array, number)}
    for path in regular_files(paths.root, paths.cache_root):
        if path.name.endswith(PARTIAL):
            yield note(path, "was never finished", removal_advice(path))
        elif path not in known and path.is_relative_to(paths.root / "features"):
            yield note(path, "no commit names it", removal_advice(path))
        elif path not in known:
            yield note(path, "is no file of ours", "no command reads it: move it away")
