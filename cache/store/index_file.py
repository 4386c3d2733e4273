"""Keep the content of all commits of an array in one file of flat arrays, which opens faster.

    index = open_index(paths, info, "image")     # any reader
    save_index(paths, info)                      # the holder of the driver lock, at the end of its work

The file is derived from the commits and never overrules them. It lists the commits it was made from (size,
time of change, seal). A reader compares that list with the commits that exist, and reads only those that are
new, or have changed. A commit with another time and the same seal, as after a copy, has not changed. The
arrays are mapped into memory and compared with their checksums at opening; a damaged file is ignored.

The file begins with 4096 bytes of sealed JSON, which give the place and the crc32c of each array. The arrays
follow.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from cache.errors import CorruptError
from cache.format.checksums import UNSEALED, check_seal, crc32c, seal
from cache.format.gate import decode, fit, open_file, parse_json, read_file
from cache.format.shard import Geometry
from cache.format.space_info import SpaceInfo
from cache.format.spec import ARRAYS
from cache.store.commits import KEY_BYTES, MAX_COMMIT_BYTES, read_commit
from cache.store.files import new_file
from cache.store.paths import MAX_SHARD, SpacePaths
from cache.store.row_index import ROW_COLUMNS, SHARD_COLUMNS, Columns, RowIndex, view_names

log = logging.getLogger(__name__)

FORMAT = 1
HEADER_BYTES = 4096
ALIGN_BYTES = 64

WORTH_COMMITS = 64
"""A new file is written when it saves readers from reading at least this many commits."""

RACY_NS = 2_000_000_000
"""A commit that changed less than this before it was read may change again within one tick of the file
system's clock. Its time is therefore not recorded, and readers compare its seal."""

WAY_OUT = "delete it: opening takes longer until the next encode.run writes it again"
"""Advice for a damaged index file."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """An index, and the k commits it was made from, including those that others replace."""

    index: RowIndex
    """The rows of the shards that exist."""
    files: npt.NDArray[np.int64]
    """(k, 3) number, bytes and time of change (ns; -1: compare the seal) of each commit."""
    seals: npt.NDArray[np.uint8]
    """(k, 32) the seal of each commit."""
    replaces: npt.NDArray[np.int64]
    """(r, 2) pairs (by, of): shard `by` replaces shard `of`."""


def open_index(paths: SpacePaths, info: SpaceInfo, array: str) -> RowIndex:
    """Return the rows that the commits of one array name.

    Raises:
        CorruptError: a commit that had to be read is damaged.
    """
    return _current(paths, info, array)[0].index


def save_index(paths: SpacePaths, info: SpaceInfo) -> None:
    """Write the index files of a space, where that saves readers enough. The caller holds the driver lock.

    Raises:
        CorruptError: a commit is damaged.
        OSError: the file cannot be written; an existing one is unchanged.
    """
    for array in ARRAYS:
        snapshot, saved = _current(paths, info, array)
        path = paths.index(array)
        # A useless file is damaged, or made from other commits.
        useless = path.exists() and saved >= len(snapshot.files)
        if saved >= WORTH_COMMITS or useless:
            _write(paths, snapshot, info, array)


def check_index(
    paths: SpacePaths, info: SpaceInfo, array: str, *, deep: bool, rebuilt: RowIndex | None = None
) -> CorruptError | None:
    """Return what is wrong with the index file of an array, or None.

    A file that only lacks the newest commits is intact.

    Args:
        paths: files of the space.
        info: description of the space.
        array: image or frame.
        deep: whether to compare the arrays with their checksums.
        rebuilt: an index made from the commits alone, all of them intact; `deep` compares the file with it.
    """
    path = paths.index(array)
    try:
        _load(paths, info, array, deep)
        if deep and rebuilt is not None and not _same(open_index(paths, info, array), rebuilt):
            return CorruptError(path, "it differs from the commits", WAY_OUT)
    except FileNotFoundError:
        return None
    except CorruptError as error:
        return error
    return None


def _same(one: RowIndex, other: RowIndex) -> bool:
    names = (*SHARD_COLUMNS, *ROW_COLUMNS)
    pairs = [(getattr(one.columns, name), getattr(other.columns, name)) for name in names]
    pairs += zip(one.by_hash, other.by_hash, strict=True)
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)


def _current(paths: SpacePaths, info: SpaceInfo, array: str) -> tuple[Snapshot, int]:
    """Return what the commits say now; and how many of them a reader of the file must read."""
    now = time.time_ns()
    stats = paths.commit_stats(array)
    old = _load_sound(paths, info, array)
    same = _unchanged(old, paths, array, stats)
    fresh = {n: read_commit(paths, info, array, n) for n in sorted(stats.keys() - same.keys())}
    replaces = [pair for pair in old.replaces.tolist() if pair[0] in same]
    replaces += [[by, of] for by, commit in fresh.items() for of in commit.replaces]
    exist = stats.keys() - {of for _, of in replaces}
    kept = np.array([n in exist and n in same for n in old.index.shards.tolist()], bool)
    missing = sorted(exist - set(old.index.shards[kept].tolist()))
    if not fresh and not missing and kept.all():
        return old, 0
    # A commit that is missing in `fresh` was replaced when the file was written, by one removed since.
    commits = [fresh.get(n) or read_commit(paths, info, array, n) for n in missing]
    index = old.index
    if not kept.all():
        index = RowIndex(index.columns.take(np.flatnonzero(kept)), info.slots[array])
    # A recent time of change is not recorded: see RACY_NS.
    files = [(n, size, ns if ns < now - RACY_NS else -1) for n, (size, ns) in sorted(stats.items())]
    seals = [old.seals[same[n]].tobytes() if n in same else fresh[n].seal for n in sorted(stats)]
    snapshot = Snapshot(
        index=index.with_rows(Columns.of(commits)) if commits else index,
        files=np.array(files, np.int64).reshape(-1, 3),
        seals=np.frombuffer(b"".join(seals), np.uint8).reshape(-1, 32),
        replaces=np.array(replaces, np.int64).reshape(-1, 2),
    )
    return snapshot, len(fresh.keys() | set(missing)) + int((~kept).sum())


def _unchanged(
    old: Snapshot, paths: SpacePaths, array: str, stats: Mapping[int, tuple[int, int]]
) -> dict[int, int]:
    """Return the commits that have not changed since the file was made: number -> place in its list."""
    same = {}
    for at, (number, size, mtime_ns) in enumerate(old.files.tolist()):
        now_bytes, now_ns = stats.get(number, (-1, 0))
        if now_bytes == size and (
            now_ns == mtime_ns or _sealed_so(paths.commit(array, number), old.seals[at].tobytes())
        ):
            same[number] = at
    return same


def _sealed_so(path: Path, expected: bytes) -> bool:
    try:
        return check_seal(read_file(path, most=MAX_COMMIT_BYTES), path) == expected
    except CorruptError:
        return False  # reading it raises the error


# ---- the file


def _write(paths: SpacePaths, snapshot: Snapshot, info: SpaceInfo, array: str) -> None:
    columns = snapshot.index.columns
    order, hashes = snapshot.index.by_hash
    arrays: dict[str, npt.NDArray[Any]] = {
        "files": snapshot.files,
        "seals": snapshot.seals,
        "replaces": snapshot.replaces,
        "names": np.frombuffer(json.dumps(list(columns.names.values())).encode(), np.uint8),
        **{name: getattr(columns, name) for name in (*SHARD_COLUMNS, *ROW_COLUMNS)},
        "order": order,
        "hashes": hashes,
    }
    entries = {}
    with new_file(paths.index(array), root=paths.cache_root) as file:
        file.seek(HEADER_BYTES)
        for name, values in arrays.items():
            once = values[:1] if values.strides[0] == 0 else values  # one value, broadcast to n
            data = np.ascontiguousarray(once)
            padding = bytes(-data.nbytes % ALIGN_BYTES)
            entries[name] = {
                "dtype": data.dtype.str,
                "shape": list(values.shape),
                "stored": len(data),
                "offset": file.tell(),
                "crc32c": crc32c(padding, crc32c(data.data)),
            }
            file.write(data.data)
            file.write(padding)
        header = {
            "format": FORMAT,
            "space": info.spec.fingerprint,
            "array": array,
            "slots": info.slots[array],
            "nbytes": file.tell(),
            "arrays": entries,
            "seal": UNSEALED,
        }
        text = json.dumps(header).encode().ljust(HEADER_BYTES)
        assert len(text) == HEADER_BYTES, "the header needs more than HEADER_BYTES"
        file.seek(0)
        file.write(seal(text))


def _load_sound(paths: SpacePaths, info: SpaceInfo, array: str) -> Snapshot:
    """Return the content of the file; an empty snapshot where it is missing or damaged."""
    try:
        return _load(paths, info, array, deep=True)
    except FileNotFoundError:
        pass
    except (CorruptError, OSError) as error:
        log.warning("reading all commits instead: %s", error)
    return Snapshot(
        index=RowIndex.of([], info.slots[array]),
        files=np.empty((0, 3), np.int64),
        seals=np.empty((0, 32), np.uint8),
        replaces=np.empty((0, 2), np.int64),
    )


def _load(paths: SpacePaths, info: SpaceInfo, array: str, deep: bool) -> Snapshot:
    """Return the content of the file; `deep` compares its arrays with their checksums.

    Raises:
        CorruptError: it is damaged, or not what this program writes.
        FileNotFoundError: there is none.
    """
    path = paths.index(array)
    with open_file(path, paths.cache_root) as file:
        text = file.read(HEADER_BYTES)
        check_seal(text, path)
        try:
            header = decode(text, _Header, path)
        except CorruptError as error:
            raise CorruptError(path, error.what, WAY_OUT) from None
        found = [header.format, header.space, header.array, header.slots]
        if found != [FORMAT, info.spec.fingerprint, array, info.slots[array]]:
            raise CorruptError(path, "it is of another space, array or version", WAY_OUT)
        size = os.fstat(file.fileno()).st_size
        if size != header.nbytes:
            raise CorruptError(path, f"{size} bytes, not {header.nbytes}", WAY_OUT)
        # Let the system read the whole file ahead, where it can.
        flags = mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if deep else 0)
        data = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ)
    try:
        arrays = {
            name: _array(data, header.arrays[name], name, deep or name == "names")
            for name in _KINDS
        }
        names = fit(parse_json(arrays["names"].tobytes()), list[str])
        _check_values(arrays, names, info.geometry(array))
    except (ValueError, LookupError) as error:
        raise CorruptError(path, str(error), WAY_OUT) from None
    columns = Columns(
        **{name: arrays[name] for name in (*SHARD_COLUMNS, *ROW_COLUMNS)}, names=view_names(names)
    )
    return Snapshot(
        index=RowIndex(columns, info.slots[array], (arrays["order"], arrays["hashes"])),
        files=arrays["files"],
        seals=arrays["seals"],
        replaces=arrays["replaces"],
    )


Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """Where an array is in the file."""

    dtype: str
    shape: Annotated[list[Size], msgspec.Meta(min_length=1, max_length=2)]
    stored: Size
    """Items that are stored: one, where all are equal."""
    offset: Size
    crc32c: Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON at the beginning of the file."""

    format: int
    space: str
    array: str
    slots: int
    nbytes: Size
    arrays: dict[str, _Entry]
    seal: str


_KINDS: Mapping[str, tuple[str, int]] = {
    "files": ("<i8", 3),
    "seals": ("|u1", KEY_BYTES),
    "replaces": ("<i8", 2),
    "names": ("|u1", 0),
    **dict.fromkeys(SHARD_COLUMNS, ("<i8", 0)),
    "keys": ("|u1", KEY_BYTES),
    "views": ("<i8", 0),
    "crcs": ("<u4", 0),
    "times": ("<f8", 0),
    "errors": ("<f4", 0),
    "order": ("<u4", 0),
    "hashes": ("<u8", 0),
}
"""Name of an array -> its dtype, and the numbers in each item; 0 for an item that is one number."""


def _array(data: mmap.mmap, entry: _Entry, name: str, checked: bool) -> npt.NDArray[Any]:
    """Return one array of a mapped file.

    Raises:
        ValueError: it is not in the file, of another kind, or fails its checksum.
    """
    kind, width = _KINDS[name]
    shape = tuple(entry.shape)
    if entry.dtype != kind or shape[1:] != ((width,) if width else ()):
        raise ValueError(f"its {name} are {entry.dtype} {shape}")
    # Only a column of numbers is stored as one that stands for all.
    if entry.stored != shape[0] and (entry.stored != 1 or name not in ROW_COLUMNS or width):
        raise ValueError(f"its {name} are {entry.stored} of {shape[0]}")
    stored = (entry.stored, *shape[1:])
    nbytes = np.dtype(kind).itemsize * math.prod(stored)
    end = entry.offset + nbytes + -nbytes % ALIGN_BYTES
    if entry.offset < HEADER_BYTES or entry.offset % ALIGN_BYTES or end > len(data):
        raise ValueError(f"its {name} are outside of the file")
    if checked:
        with memoryview(data) as whole:
            if crc32c(whole[entry.offset : end]) != entry.crc32c:
                raise ValueError(f"its {name} fail their checksum")
    array = np.frombuffer(data, kind, math.prod(stored), entry.offset).reshape(stored)
    return np.broadcast_to(array, shape) if stored != shape else array


def _check_values(
    arrays: Mapping[str, npt.NDArray[Any]], names: Sequence[str], geometry: Geometry
) -> None:
    """Check that arrays fit together, and that each number that counts rows or shards is in its range.

    Raises:
        ValueError: they do not.
    """
    shards, counts, rows = arrays["shards"], arrays["counts"], len(arrays["keys"])
    if len({len(arrays[name]) for name in SHARD_COLUMNS}) > 1:
        raise ValueError("its columns of shards differ in length")
    if any(len(arrays[name]) != rows for name in (*ROW_COLUMNS, "order", "hashes")):
        raise ValueError("its columns of rows differ in length")
    if len(arrays["seals"]) != len(arrays["files"]):
        raise ValueError("it has other seals than commits")
    for numbers in (shards, arrays["files"][:, 0]):
        if not _within(numbers, 0, MAX_SHARD) or (numbers[1:] <= numbers[:-1]).any():
            raise ValueError("its shards are not in ascending order")
    if not _within(counts, 1, geometry.slots) or int(counts.sum()) != rows:
        raise ValueError("its shards have other rows than it lists")
    if (arrays["nbytes"] != counts * geometry.slot_bytes + geometry.tail_bytes).any():
        raise ValueError("its shards have other sizes than shards of this space")
    if not _within(arrays["order"], 0, rows - 1):
        raise ValueError("its order has a row that it does not list")
    if np.isinf(_distinct(arrays["times"])).any():
        raise ValueError("a row has no valid time")
    for name in names:
        geometry.check_view(name)
    views = _distinct(arrays["views"])
    if not np.isin(np.unique(views[views < 0]), list(view_names(names))).all():
        raise ValueError("a view has no name")


def _within(numbers: npt.NDArray[Any], low: int, high: int) -> bool:
    return not len(numbers) or (int(numbers.min()) >= low and int(numbers.max()) <= high)


def _distinct(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the values of a column; of one that stands for all, that one."""
    return column[:1] if column.strides[0] == 0 else column
