"""Read and write commits: the small sealed tables that make shards exist.

Nothing else makes a row visible. A space has `slots` rows in each full shard of an array, and row number
`shard * slots + slot` is the row in that slot. `cache.store.row_index` looks up the rows that commits name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import CorruptError
from cache.format.checksums import UNSEALED, check_seal, seal
from cache.format.gate import read_file
from cache.format.parquet import (
    Limits,
    footer_metadata,
    open_parquet,
    parquet_errors,
    read_metadata,
)
from cache.format.shard import MAX_VIEW_BYTES, Geometry
from cache.format.space_info import MAX_SLOTS, SpaceInfo
from cache.store.paths import SHARD_NUMBER, SpacePaths

KEY_BYTES = 32
"""Bytes of a key: the sha256 of the bytes of one media item."""

SCHEMA = pa.schema(
    {
        "key": pa.binary(KEY_BYTES),  # sha256 of the media item's bytes
        "view": pa.string(),  # full, or t:<microseconds>
        "time_s": pa.float64(),  # time of the frame in its video, null for images
        "row": pa.int64(),  # row number in the array
        "crc": pa.uint32(),  # crc32c of the stored row
        "error": pa.float32(),  # relative error of the row codec
    }
)

ROW_BYTES = KEY_BYTES + MAX_VIEW_BYTES + 64
"""Bytes that a row takes in a commit, at most."""
COMMIT_BYTES = 1 << 20
"""Bytes that everything but the rows takes, at most. A commit may replace a hundred thousand shards."""

MAX_COMMIT_BYTES = MAX_SLOTS * ROW_BYTES + COMMIT_BYTES
"""Bytes of a commit with the most rows."""

_KEY, _VIEW, _TIME, _ROW, _CRC, _ERROR = range(len(SCHEMA))
_NEVER_NULL = (_KEY, _VIEW, _ROW, _CRC, _ERROR)
_VIEWS_CODED = [
    field.with_type(pa.dictionary(pa.int32(), field.type)) if field.name == "view" else field
    for field in SCHEMA
]
_CODED: dict[tuple[str, ...], pa.Schema] = {
    own: pa.schema([*_VIEWS_CODED, *(pa.field(name, pa.int64()) for name in own)])
    for own in ((), ("offset",))
}
"""Columns that a geometry adds -> the columns of a commit, with views that are read as a dictionary."""

_CRC_TEXT = re.compile("0|[1-9][0-9]{0,9}")
_SHARDS = re.compile(rf"(?:{SHARD_NUMBER}(?: {SHARD_NUMBER})*)?")


@dataclass(frozen=True, kw_only=True, eq=False)
class Commit:
    """The rows of one shard, in slot order."""

    shard: int
    """Number of the shard."""
    nbytes: int
    """Size of the shard's file."""
    index_crc: int
    """crc32c of the shard's last bytes: its index, or the end of the tar."""
    table: pa.Table
    """The rows, with the columns of SCHEMA."""
    replaces: tuple[int, ...] = ()
    """Shards that stopped existing when this one began to. Their rows were copied here, or dropped."""
    seal: bytes = b""
    """Seal of the commit's file: sha256, 32 bytes."""


def key_bytes(keys: Sequence[str] | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return n keys of 64 hex digits as (n, 32) bytes; such bytes are returned as they are.

    Raises:
        ValueError: a key has another length.
    """
    if isinstance(keys, np.ndarray):
        return keys
    if not all(len(key) == 2 * KEY_BYTES for key in keys):
        raise ValueError("a key has 64 hex digits")
    return np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, KEY_BYTES)


def commit_bytes(
    table: pa.Table,
    *,
    fingerprint: str,
    array: str,
    shard: int,
    nbytes: int,
    index_crc: int,
    replaces: Sequence[int] = (),
) -> bytes:
    """Return the file of a commit.

    Args:
        table: the rows, with the columns of SCHEMA and then those of the geometry (`commit_columns`).
        fingerprint: that of the space.
        array: image or frame.
        shard: number of the shard.
        nbytes: size of the shard's file.
        index_crc: crc32c of the shard's last bytes.
        replaces: shards that stop existing when this commit appears.
    """
    sink = pa.BufferOutputStream()
    # Keys do not compress. Plain columns open in 0.2 ms, a third of the time (512 rows, 2 cores).
    plain: dict[str, Any] = {"compression": "none", "use_dictionary": ["view"]}
    with pq.ParquetWriter(sink, table.schema, write_statistics=False, **plain) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(
            {
                "space": fingerprint,
                "array": array,
                "shard": str(shard),
                "nbytes": str(nbytes),
                "index_crc": str(index_crc),
                **({"replaces": " ".join(map(str, replaces))} if replaces else {}),
                "seal": UNSEALED,
            }
        )
    return seal(sink.getvalue().to_pybytes())


def read_commit(paths: SpacePaths, info: SpaceInfo, array: str, number: int) -> Commit:
    """Read one commit, and check its seal, its space, its array, its number and its rows.

    Raises:
        CorruptError: one of them is wrong.
    """
    path, slots, geometry = paths.commit(array, number), info.slots[array], info.geometry(array)
    nbytes = slots * ROW_BYTES + COMMIT_BYTES
    data = read_file(path, most=nbytes)
    sealed = check_seal(data, path)
    limits = Limits(rows=slots, nbytes=nbytes, footer=COMMIT_BYTES, codecs=("UNCOMPRESSED",))
    own = geometry.commit_columns(1)
    with open_parquet(data, path, _CODED[tuple(own)], limits, coded=("view",)) as file:
        meta, rows = footer_metadata(file), file.metadata.num_rows
        expected = info.spec.fingerprint, array, str(number)
        if (found := (meta["space"], meta["array"], meta["shard"])) != expected:
            raise CorruptError(
                path,
                f"it is the commit of {found[1][:8]} shard {found[2][:8]}, or of another space",
            )
        if not rows or file.metadata.num_row_groups > 1:
            raise ValueError(f"{rows} rows in {file.metadata.num_row_groups} row groups")
        if meta["nbytes"] != str(geometry.file_bytes(rows)):
            raise CorruptError(
                path, f"its shard was not made with {slots} rows a shard, as space.json says"
            )
        crc, replaces = meta["index_crc"], meta.get("replaces", "")
        if not _CRC_TEXT.fullmatch(crc) or int(crc) >> 32:
            raise ValueError("index_crc is no crc32c")
        if not _SHARDS.fullmatch(replaces):
            raise ValueError("replaces has what is no number of a shard")
        table = file.read(use_threads=False)
        first = number * slots
        if (table.column(_ROW).to_numpy() != np.arange(first, first + rows)).any():
            raise CorruptError(path, "its row numbers are not those of its shard")
        for name, values in geometry.commit_columns(rows).items() if own else ():
            if (table[name].to_numpy() != values).any():
                raise CorruptError(
                    path, "its rows are not where the shards of this space have them"
                )
        return Commit(
            shard=number,
            nbytes=geometry.file_bytes(rows),
            index_crc=int(crc),
            table=_checked(table if not own else table.select(SCHEMA.names), geometry),
            replaces=tuple(map(int, replaces.split())),
            seal=sealed,
        )


def _checked(table: pa.Table, geometry: Geometry) -> pa.Table:
    """Return rows whose views are a dictionary with the types of SCHEMA, after checking every value.

    Raises:
        ValueError: a value is missing, a view is none, or a time is no number of seconds.
    """
    if any(table.column(place).null_count for place in _NEVER_NULL):
        raise ValueError("a row has no key, view or checksum")
    times = table.column(_TIME)
    if times.null_count < len(times):
        seconds = times.drop_null().to_numpy()
        if not (np.isfinite(seconds) & (seconds >= 0)).all():
            raise ValueError("a row has no valid time")
    (views,) = table.column(_VIEW).chunks
    views.validate(full=True)  # each number is one of the dictionary
    for view in views.dictionary.to_pylist():
        geometry.check_view(view)
    return table.set_column(_VIEW, SCHEMA.field(_VIEW), views.dictionary_decode())


def commit_space(paths: SpacePaths, array: str, number: int) -> str:
    """Return the fingerprint of the space that a commit is of, without checking its rows.

    Raises:
        CorruptError: the file is damaged, or no commit.
    """
    path = paths.commit(array, number)
    data = read_file(path, most=MAX_COMMIT_BYTES)
    check_seal(data, path)
    with parquet_errors(path):
        return read_metadata(data, COMMIT_BYTES)["space"]


def read_commits(paths: SpacePaths, info: SpaceInfo, array: str) -> list[Commit]:
    """Return the commits of all shards that exist, by number."""
    return current([read_commit(paths, info, array, number) for number in paths.committed(array)])


def current(commits: Sequence[Commit]) -> list[Commit]:
    """Return `commits` without those that another of them replaces: at any moment a row exists once."""
    replaced = {number for commit in commits for number in commit.replaces}
    return [commit for commit in commits if commit.shard not in replaced]
