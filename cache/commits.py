"""Commits: the small sealed tables that make shards exist, and the index of all rows they name.

Nothing else makes a row visible. Row `shard * slots + slot` is the slot-th row of its shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cache.layout import UNSEALED, Corrupt, SpacePaths, check_seal, seal
from cache.space import SpaceInfo

KEY_BYTES = 32

SCHEMA = pa.schema(
    {
        "key": pa.binary(KEY_BYTES),  # sha256 of the media's bytes
        "view": pa.string(),  # which view of it
        "time_s": pa.float64(),  # where in its video, null for pictures
        "row": pa.int64(),  # row number in the array
        "crc": pa.uint32(),  # crc32c of the stored row
        "error": pa.float32(),  # relative error of the row codec
    }
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Commit:
    """One shard's rows, in slot order."""

    shard: int
    """Number of the shard."""
    nbytes: int
    """Size of its file."""
    index_crc: int
    """crc32c of its index."""
    table: pa.Table
    """The rows, as SCHEMA."""
    replaces: tuple[int, ...] = ()
    """Shards that stopped existing at the instant this one began to; their rows are here, or given up."""


def key_bytes(keys: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Keys of 64 hex digits -> (n, 32) bytes."""
    if not all(len(key) == 2 * KEY_BYTES for key in keys):
        raise ValueError("a key has 64 hex digits")
    return np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, KEY_BYTES)


def commit_bytes(
    table: pa.Table,
    *,
    fingerprint: str,
    kind: str,
    shard: int,
    nbytes: int,
    index_crc: int,
    replaces: Sequence[int] = (),
) -> bytes:
    """The file of a commit. See `Commit` for what `replaces` means.

    `table` is as SCHEMA, and has the geometry's own columns (`commit_columns`) behind it.
    """
    sink = pa.BufferOutputStream()
    # Keys do not compress; plain columns open in 0.2 ms, a third of the time (512 rows, 2 cores).
    plain: dict[str, Any] = {"compression": "none", "use_dictionary": ["view"]}
    with pq.ParquetWriter(sink, table.schema, write_statistics=False, **plain) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(
            {
                "space": fingerprint,
                "array": kind,
                "shard": str(shard),
                "nbytes": str(nbytes),
                "index_crc": str(index_crc),
                **({"replaces": " ".join(map(str, replaces))} if replaces else {}),
                "seal": UNSEALED,
            }
        )
    return seal(sink.getvalue().to_pybytes())


def read_commit(paths: SpacePaths, info: SpaceInfo, kind: str, number: int) -> Commit:
    """One commit, checked: its seal, and that it belongs where it lies.

    Raises:
        Corrupt: it does not.
    """
    path, slots = paths.commit(kind, number), info.slots[kind]
    data = path.read_bytes()
    check_seal(data, path)
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        meta = {k.decode(): v.decode() for k, v in file.metadata.metadata.items()}
        table = file.read(use_threads=False)
    if (meta["space"], meta["array"], meta["shard"]) != (
        info.spec.fingerprint,
        kind,
        str(number),
    ):
        raise Corrupt(
            path, f"it is the commit of {meta['array']} shard {meta['shard']}, or of another space"
        )
    rows = table["row"].to_numpy()
    if not 0 < len(rows) <= slots or (rows != number * slots + np.arange(len(rows))).any():
        raise Corrupt(path, "its row numbers are not those of its shard")
    nbytes, geometry = int(meta["nbytes"]), info.geometry(kind)
    if nbytes != geometry.file_bytes(len(rows)):
        raise Corrupt(path, f"its shard was not made with {slots} rows a shard, as space.json says")
    own = geometry.commit_columns(len(rows))
    if table.column_names != [*SCHEMA.names, *own]:
        raise Corrupt(path, f"its columns are not those of a {info.spec.container} space")
    if any((table[name].to_numpy() != values).any() for name, values in own.items()):
        raise Corrupt(path, "its rows are not where the shards of this space have them")
    return Commit(
        shard=number,
        nbytes=nbytes,
        index_crc=int(meta["index_crc"]),
        table=table.select(SCHEMA.names),
        replaces=tuple(map(int, meta.get("replaces", "").split())),
    )


def read_commits(paths: SpacePaths, info: SpaceInfo, kind: str) -> list[Commit]:
    """The commits of all shards that exist, by number."""
    return current([read_commit(paths, info, kind, number) for number in paths.committed(kind)])


def current(commits: Sequence[Commit]) -> list[Commit]:
    """`commits` without those that another of them replaces: at any moment a row exists once."""
    replaced = {number for commit in commits for number in commit.replaces}
    return [commit for commit in commits if commit.shard not in replaced]


class RowIndex:
    """(key, view) -> row number, for the rows of one array: about 70 bytes a row, in flat arrays.

    A *position* counts the committed rows in row order, 0 to n-1; row numbers have gaps where shards
    end early or never came. Looked up by a 64-bit hash, sorted; a hit is confirmed by the whole key.
    """

    def __init__(self, commits: Sequence[Commit], slots: int):
        self.slots = slots
        self.shards = np.array([c.shard for c in commits], np.int64)
        self.nbytes = {c.shard: c.nbytes for c in commits}
        self.counts = np.array([c.table.num_rows for c in commits], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        table = pa.concat_tables([SCHEMA.empty_table(), *(c.table for c in commits)])
        self.keys = _fixed_bytes(table["key"])
        self.crcs = table["crc"].to_numpy()
        self.times = table["time_s"].to_numpy()  # seconds; NaN for pictures
        views = table["view"].combine_chunks().dictionary_encode()
        self.views: list[str] = views.dictionary.to_pylist()
        self._codes = {view: code for code, view in enumerate(self.views)}
        self.view_codes = views.indices.to_numpy()
        self._salts = np.array([_salt(view) for view in self.views], np.uint64)
        hashes = _first8(self.keys) ^ self._salts[self.view_codes]
        # Stable: of two rows with one identity, the older wins, always.
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def __len__(self) -> int:
        return len(self.keys)

    def lookup(self, keys: npt.NDArray[np.uint8], view: str) -> npt.NDArray[np.int64]:
        """Keys (m, 32) -> row numbers (m,); -1 where there is none."""
        return self.lookup_pairs(keys, [view] * len(keys))

    def lookup_pairs(
        self, keys: npt.NDArray[np.uint8], views: Sequence[str]
    ) -> npt.NDArray[np.int64]:
        """Keys (m, 32), each with a view of its own -> row numbers (m,); -1 where there is none."""
        found = np.full(len(keys), -1, np.int64)
        codes = np.array([self._codes.get(view, -1) for view in views], np.int64)
        salts = np.append(self._salts, np.uint64(0))  # the last: of views that are nowhere
        wanted = _first8(keys) ^ salts[codes]
        at = np.searchsorted(self._hashes, wanted)
        open_ = np.flatnonzero(codes >= 0)
        while True:  # a second round only when two identities share a hash: odds 3e-6 at 10 M rows
            open_ = open_[at[open_] < len(self._hashes)]
            open_ = open_[self._hashes[at[open_]] == wanted[open_]]
            if not len(open_):
                return found
            position = self._order[at[open_]]
            hit = self.view_codes[position] == codes[open_]
            hit &= (self.keys[position] == keys[open_]).all(axis=1)
            found[open_[hit]] = self.rows(position[hit])
            open_ = open_[~hit]
            at[open_] += 1

    def rows(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Positions -> row numbers."""
        shard = np.searchsorted(self.starts, positions, side="right") - 1
        return self.shards[shard] * self.slots + positions - self.starts[shard]

    def positions(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row numbers -> positions.

        Raises:
            IndexError: one of the rows is not committed.
        """
        shard, slot = np.divmod(rows, self.slots)
        at = np.searchsorted(self.shards, shard)
        known = at < len(self.shards)
        there = at[known]
        known[known] = (self.shards[there] == shard[known]) & (slot[known] < self.counts[there])
        if not known.all():
            raise IndexError("a row number that is not committed")
        return self.starts[at] + slot

    def by_identity(self) -> npt.NDArray[np.int64]:
        """All positions, sorted by (key, view)."""
        rank = np.argsort(np.argsort(np.array(self.views, dtype=np.str_)))
        return np.lexsort((rank[self.view_codes], self.keys.view(f"S{KEY_BYTES}").reshape(-1)))

    def identity(self, position: int) -> tuple[str, str]:
        """(key, view) of one row."""
        return self.keys[position].tobytes().hex(), self.views[self.view_codes[position]]

    def duplicates(self) -> list[tuple[int, int]]:
        """Pairs of positions, (first, again), whose (key, view) is the same."""
        pairs: list[tuple[int, int]] = []
        same = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        first: dict[tuple[str, str], int] = {}
        for at in np.unique(np.concatenate([same, same + 1])):
            position = int(self._order[at])
            seen = first.setdefault(self.identity(position), position)
            if seen != position:
                pairs.append((seen, position))
        return pairs


def _salt(view: str) -> int:
    return int.from_bytes(hashlib.sha256(view.encode()).digest()[:8])


def _first8(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Keys are sha256, so any 8 of their bytes are a good hash; these are the first."""
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64).reshape(-1)


def _fixed_bytes(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """A column of 32-byte values -> (n, 32), without a Python object a value."""
    chunks = [
        np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * KEY_BYTES :][
            : len(chunk) * KEY_BYTES
        ]
        for chunk in column.chunks
        if len(chunk)
    ]
    return np.concatenate([np.empty(0, np.uint8), *chunks]).reshape(-1, KEY_BYTES)
