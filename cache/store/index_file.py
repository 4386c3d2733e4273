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
import mmap
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.errors import CorruptError
from cache.format.checksums import UNSEALED, check_seal, crc32c, seal
from cache.format.space_info import SpaceInfo
from cache.format.spec import ARRAYS
from cache.store.commits import read_commit
from cache.store.files import new_file
from cache.store.paths import SpacePaths
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
        _load(path, info, array, deep)
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
    old = _load_sound(paths.index(array), info, array)
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
        return check_seal(path.read_bytes(), path) == expected
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


def _load_sound(path: Path, info: SpaceInfo, array: str) -> Snapshot:
    """Return the content of the file; an empty snapshot where it is missing or damaged."""
    try:
        return _load(path, info, array, deep=True)
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


def _load(path: Path, info: SpaceInfo, array: str, deep: bool) -> Snapshot:
    """Return the content of the file; `deep` compares its arrays with their checksums."""
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
        check_seal(header, path)
        values = json.loads(header)
        found = [values["format"], values["space"], values["array"], values["slots"]]
        if found != [FORMAT, info.spec.fingerprint, array, info.slots[array]]:
            raise CorruptError(path, "it is of another space, array or version", WAY_OUT)
        size = os.fstat(file.fileno()).st_size
        if size != values["nbytes"]:
            raise CorruptError(path, f"{size} bytes, not {values['nbytes']}", WAY_OUT)
        # Let the system read the whole file ahead, where it can.
        flags = mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if deep else 0)
        data = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ)
    arrays = {
        name: _array(data, entry, path, name, deep or name == "names")
        for name, entry in values["arrays"].items()
    }
    columns = Columns(
        **{name: arrays[name] for name in (*SHARD_COLUMNS, *ROW_COLUMNS)},
        names=view_names(json.loads(arrays["names"].tobytes())),
    )
    return Snapshot(
        index=RowIndex(columns, info.slots[array], (arrays["order"], arrays["hashes"])),
        files=arrays["files"],
        seals=arrays["seals"],
        replaces=arrays["replaces"],
    )


def _array(
    data: mmap.mmap, entry: Mapping[str, Any], path: Path, name: str, checked: bool
) -> npt.NDArray[Any]:
    dtype, shape, offset = np.dtype(entry["dtype"]), tuple(entry["shape"]), entry["offset"]
    stored = (entry["stored"], *shape[1:])
    nbytes = dtype.itemsize * int(np.prod(stored))
    if checked:
        with memoryview(data) as whole:
            if crc32c(whole[offset : offset + nbytes + -nbytes % ALIGN_BYTES]) != entry["crc32c"]:
                raise CorruptError(path, f"its {name} fail their checksum", WAY_OUT)
    array = np.frombuffer(data, dtype, int(np.prod(stored)), offset).reshape(stored)
    return np.broadcast_to(array, shape) if stored != shape else array
