"""Read and write commits: the small sealed tables that make shards exist.

Nothing else makes a row visible. A space has `slots` rows in each full shard of an array, and row number
`shard * slots + slot` is the row in that slot. `cache.store.row_index` looks up the rows that commits name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import CorruptError
from cache.format.checksums import UNSEALED, check_seal, seal
from cache.format.space_info import SpaceInfo
from cache.store.paths import SpacePaths

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
    path, slots = paths.commit(array, number), info.slots[array]
    data = path.read_bytes()
    sealed = check_seal(data, path)
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        meta = {k.decode(): v.decode() for k, v in file.metadata.metadata.items()}
        table = file.read(use_threads=False)
    expected = info.spec.fingerprint, array, str(number)
    if (meta["space"], meta["array"], meta["shard"]) != expected:
        raise CorruptError(
            path, f"it is the commit of {meta['array']} shard {meta['shard']}, or of another space"
        )
    rows = table["row"].to_numpy()
    if not 0 < len(rows) <= slots or (rows != number * slots + np.arange(len(rows))).any():
        raise CorruptError(path, "its row numbers are not those of its shard")
    nbytes, geometry = int(meta["nbytes"]), info.geometry(array)
    if nbytes != geometry.file_bytes(len(rows)):
        raise CorruptError(
            path, f"its shard was not made with {slots} rows a shard, as space.json says"
        )
    own = geometry.commit_columns(len(rows))
    if table.column_names != [*SCHEMA.names, *own]:
        raise CorruptError(path, f"its columns are not those of a {info.spec.container} space")
    if any((table[name].to_numpy() != values).any() for name, values in own.items()):
        raise CorruptError(path, "its rows are not where the shards of this space have them")
    return Commit(
        shard=number,
        nbytes=nbytes,
        index_crc=int(meta["index_crc"]),
        table=table.select(SCHEMA.names),
        replaces=tuple(map(int, meta.get("replaces", "").split())),
        seal=sealed,
    )


def read_commits(paths: SpacePaths, info: SpaceInfo, array: str) -> list[Commit]:
    """Return the commits of all shards that exist, by number."""
    return current([read_commit(paths, info, array, number) for number in paths.committed(array)])


def current(commits: Sequence[Commit]) -> list[Commit]:
    """Return `commits` without those that another of them replaces: at any moment a row exists once."""
    replaced = {number for commit in commits for number in commit.replaces}
    return [commit for commit in commits if commit.shard not in replaced]
