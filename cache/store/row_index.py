"""Look up the row number of (key, view) among the rows of one array.

A *position* counts the committed rows in row order, from 0 to n - 1. Row numbers have gaps, where a shard is
not full or was never committed. There are n rows in m shards.

Two jobs may have committed the same (key, view), where one was frozen while the other took over. Of such rows
the one with the lowest number counts. The others are *doubled*: no lookup finds them, and `len`, `numbered`
and `counting` leave them out. `cache.gc` removes them.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.format.checksums import GOLDEN, mix64
from cache.store.commits import KEY_BYTES, SCHEMA, Commit

LOOKUP_ROWS = 1 << 18
"""Keys that are looked up together. It bounds the memory of a lookup."""
COMPARED = 1 << 23
"""Hashes that are compared together. It bounds the memory of looking for doubled rows."""

ByHash = tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]
"""Positions (n,) in the order of their hashes, for equal hashes in row order; and these hashes (n,)."""


class RowIndex:
    """The rows of one array, found by a sorted 64-bit hash. The whole key confirms each hit."""

    @staticmethod
    def of(commits: Sequence[Commit], slots: int) -> RowIndex:
        """Index the rows of commits in the order of their numbers, with `slots` rows in a full shard."""
        return RowIndex(Columns.of(commits), slots)

    def __init__(self, columns: Columns, slots: int, by_hash: ByHash | None = None):
        """Index the rows of `columns`; `by_hash` is that of an earlier index of the same columns."""
        self.columns, self.slots = columns, slots
        self.keys, self.crcs, self.times = columns.keys, columns.crcs, columns.times
        self.shards, self.counts = columns.shards, columns.counts
        self.starts = np.concatenate([[0], np.cumsum(columns.counts)])
        shards = columns.shards.tolist()
        self.nbytes = dict(zip(shards, columns.nbytes.tolist(), strict=True))
        spans = zip(self.starts[:-1].tolist(), columns.counts.tolist(), strict=True)
        self.spans = dict(zip(shards, spans, strict=True))
        """Shard -> (position of its first row, number of its rows)."""
        self.by_hash = by_hash or _sorted(_hashes(columns.keys, columns.views))
        self._order, self._hashes = self.by_hash
        self.crc_of = np.ascontiguousarray(columns.crcs).data
        """crc32c by position; an element is a Python integer."""
        self._bisected = self._hashes.data  # an element is a Python integer

    def with_rows(self, more: Columns) -> RowIndex:
        """Return an index of these rows and of `more`: at least one shard, and none of these."""
        if not self.stored:
            return RowIndex(more, self.slots)
        both = self.columns.merged(more)
        if more.shards[0] < self.shards[-1]:
            return RowIndex(both, self.slots)
        order, hashes = _sorted(_hashes(more.keys, more.views))
        at = np.searchsorted(self._hashes, hashes, side="right")  # after equal hashes of older rows
        order = np.insert(self._order, at, order + np.uint32(self.stored))
        return RowIndex(both, self.slots, (order, np.insert(self._hashes, at, hashes)))

    @property
    def stored(self) -> int:
        """n, the number of positions: the rows that count, and the doubled ones."""
        return len(self.keys)

    def __len__(self) -> int:
        """Return the number of rows that count: each (key, view) once."""
        return self.stored - len(self.doubled)

    @functools.cached_property
    def doubled(self) -> npt.NDArray[np.int64]:
        """(d,) positions of the rows that do not count, ascending."""
        again, shared = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
        for start in range(0, self.stored - 1, COMPARED):
            hashes = self._hashes[start : start + COMPARED + 1]
            same = start + np.flatnonzero(hashes[1:] == hashes[:-1])
            for some in np.split(same, range(LOOKUP_ROWS, len(same), LOOKUP_ROWS)):
                before, after = (self._order[at].astype(np.int64) for at in (some, some + 1))
                equal = self.columns.views[before] == self.columns.views[after]
                equal &= (key_words(self.keys[before]) == key_words(self.keys[after])).all(axis=1)
                again.append(after[equal])
                shared.append(self._hashes[some[~equal]])
        if len(of_several := np.concatenate(shared)):
            again.append(self._doubled_among(np.unique(of_several)))
        return np.unique(np.concatenate(again))

    def _doubled_among(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Return the doubled positions among the rows with hashes that several identities share.

        Odds 3e-6 at 10 M rows, unless somebody made such keys: then a sort takes less time than lookups.
        """
        positions = self._order[np.isin(self._hashes, hashes)].astype(np.int64)
        identities = [*key_words(self.keys[positions]).T, self.columns.views[positions]]
        order = np.lexsort((positions, *identities))
        equal = np.logical_and.reduce([one[order][1:] == one[order][:-1] for one in identities])
        return positions[order[1:][equal]]

    def numbered(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the positions (k,) of rows that count, given by their numbers (k,) from 0 to len - 1."""
        before = self.doubled - np.arange(
            len(self.doubled)
        )  # rows that count before each doubled one
        return numbers + np.searchsorted(before, numbers, side="right")

    def counting(self, column: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the values of a column (n, ...) for the rows that count, (len, ...)."""
        return np.delete(column, self.doubled, axis=0) if len(self.doubled) else column

    @property
    def errors(self) -> npt.NDArray[np.float32]:
        """(len,) relative error of the row codec, for the rows that count."""
        return self.counting(self.columns.errors)

    def lookup(self, keys: npt.NDArray[np.uint8], view: str) -> npt.NDArray[np.int64]:
        """Return the row numbers (k,) of keys (k, 32) with one view; -1 where there is no row."""
        code = np.int64(view_code(view))
        return self.lookup_coded(keys, np.broadcast_to(code, len(keys)))

    def lookup_pairs(
        self, keys: npt.NDArray[np.uint8], views: Sequence[str]
    ) -> npt.NDArray[np.int64]:
        """Return the row numbers (k,) of keys (k, 32), each with its own view; -1 where there is no row."""
        return self.lookup_coded(keys, np.array([view_code(view) for view in views], np.int64))

    def lookup_coded(
        self, keys: npt.NDArray[np.uint8], codes: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Return the row numbers (k,) of keys (k, 32) with views (k,) as `view_code` numbers them, or -1."""
        found = np.full(len(keys), -1, np.int64)
        for start in range(0, len(keys), LOOKUP_ROWS):
            part = slice(start, start + LOOKUP_ROWS)
            self._lookup_some(keys[part], codes[part], found[part])
        return found

    def contains(self, key: bytes, view: str) -> bool:
        """Return whether there is such a row: 3 microseconds, where `lookup` takes 30 for a single key."""
        code = view_code(view)
        wanted = int.from_bytes(key[:8], "little") ^ _mixed_one(code)
        at = bisect.bisect_left(self._bisected, wanted)
        while at < len(self._bisected) and self._bisected[at] == wanted:
            position = self._order[at]
            if self.columns.views[position] == code and self.keys[position].tobytes() == key:
                return True
            at += 1
        return False

    def _lookup_some(
        self,
        keys: npt.NDArray[np.uint8],
        codes: npt.NDArray[np.int64],
        found: npt.NDArray[np.int64],
    ) -> None:
        wanted = _hashes(keys, codes)
        open_ = np.argsort(wanted)  # in hash order, neighbours are found in the processor's cache
        at = np.empty(len(wanted), np.int64)
        at[open_] = np.searchsorted(self._hashes, wanted[open_])
        while True:  # a second round only when two identities share a hash: odds 3e-6 at 10 M rows
            open_ = open_[at[open_] < len(self._hashes)]
            open_ = open_[self._hashes[at[open_]] == wanted[open_]]
            if not len(open_):
                return
            position = self._order[at[open_]].astype(np.int64)
            hit = self.columns.views[position] == codes[open_]
            hit &= (key_words(self.keys[position]) == key_words(keys[open_])).all(axis=1)
            found[open_[hit]] = self.rows(position[hit])
            open_ = open_[~hit]
            at[open_] += 1

    def rows(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the row numbers of positions (k,)."""
        shard = np.searchsorted(self.starts, positions, side="right") - 1
        return self.shards[shard] * self.slots + positions - self.starts[shard]

    def positions(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the positions of row numbers (k,).

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
        """Return the positions of the rows that count, sorted by (key, view)."""
        codes, inverse = np.unique(self.columns.views, return_inverse=True)
        names = [self._view(code) for code in codes.tolist()]
        rank = np.argsort(np.argsort(np.array(names, dtype=np.str_)))
        order = np.lexsort((rank[inverse], self.keys.view(f"S{KEY_BYTES}").reshape(-1)))
        return order[~np.isin(order, self.doubled)] if len(self.doubled) else order

    def identity(self, position: int) -> tuple[str, str]:
        """Return the (key, view) of one row, the key as 64 hex digits."""
        view = self._view(int(self.columns.views[position]))
        return self.keys[position].tobytes().hex(), view

    def _view(self, code: int) -> str:
        return f"t:{code}" if code >= 0 else self.columns.names[code]


class Identities(Set[tuple[str, str]]):
    """The (key, view) of all rows of an index, as a set. It stores no strings."""

    def __init__(self, index: RowIndex):
        self._index = index

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> Any:  # the result of `&`, `|` and `-`
        return set(it)

    def __contains__(self, identity: Any) -> bool:
        key, view = identity
        try:
            return self._index.contains(bytes.fromhex(key), view)
        except ValueError:  # not a key, so not in the set
            return False

    def __iter__(self) -> Iterator[tuple[str, str]]:
        again = set(self._index.doubled.tolist())
        return (self._index.identity(i) for i in range(self._index.stored) if i not in again)

    def __len__(self) -> int:
        return len(self._index)


def _sorted(hashes: npt.NDArray[np.uint64]) -> ByHash:
    """Sort positions by hash. Of two rows with the same identity, the older is always first."""
    order = np.argsort(hashes)  # not stable, so several times faster; equal hashes are few
    ordered = hashes[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(same):
        at = np.union1d(same, same + 1)
        order[at] = order[at][np.lexsort((order[at], ordered[at]))]
    return order.astype(np.uint32), ordered


def _hashes(keys: npt.NDArray[np.uint8], codes: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Return the hash (n,) of each (key, view). Keys are sha256, so any 8 bytes of one are a good hash."""
    first = np.ascontiguousarray(keys[:, :8]).view("<u8").reshape(-1)
    if codes.strides == (0,) and len(codes):
        codes = codes[:1]
    return first ^ mix64(codes.astype(np.uint64) + GOLDEN)


@functools.lru_cache(1024)
def _mixed_one(code: int) -> int:
    return int(mix64(np.array([code], np.int64).astype(np.uint64) + GOLDEN)[0])


def key_words(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return keys (k, 32) as (k, 4) integers: numpy compares eight bytes at a time."""
    return np.ascontiguousarray(keys).view(np.uint64)


_TIME = re.compile(r"t:(0|[1-9]\d{0,17})")


def view_code(view: str) -> int:
    """Return a view as a number: the time of `t:<microseconds>`, or a negative hash of any other name."""
    time = _TIME.fullmatch(view)
    return int(time[1]) if time else _name_code(view)


@functools.lru_cache(4096)
def _name_code(view: str) -> int:
    return -1 - (int.from_bytes(hashlib.sha256(view.encode()).digest()[:8]) >> 1)


def view_names(names: Iterable[str]) -> dict[int, str]:
    """Return code -> view for the names of views that are no times."""
    return {view_code(name): name for name in names}


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """The content of commits in row order. A column of n equal values takes the memory of one."""

    shards: npt.NDArray[np.int64]
    """(m,) numbers of the shards, ascending."""
    counts: npt.NDArray[np.int64]
    """(m,) rows of each shard."""
    nbytes: npt.NDArray[np.int64]
    """(m,) size of each shard's file."""
    keys: npt.NDArray[np.uint8]
    """(n, 32) sha256 of the media item's bytes."""
    views: npt.NDArray[np.int64]
    """(n,) views, as `view_code` numbers them."""
    crcs: npt.NDArray[np.uint32]
    """(n,) crc32c of the stored row."""
    times: npt.NDArray[np.float64]
    """(n,) time of a frame in its video, in seconds; NaN for images."""
    errors: npt.NDArray[np.float32]
    """(n,) relative error of the row codec."""
    names: Mapping[int, str]
    """Code -> view, for all views here that are no times, and perhaps more."""

    @staticmethod
    def of(commits: Sequence[Commit]) -> Columns:
        """Return the columns of `commits`, in their order."""
        table = pa.concat_tables([c.table for c in commits] or [SCHEMA.empty_table()])
        coded = table["view"].combine_chunks().dictionary_encode()
        views = coded.dictionary.to_pylist()
        codes = np.array([view_code(view) for view in views], np.int64)
        return Columns(
            shards=np.array([c.shard for c in commits], np.int64),
            counts=np.array([c.table.num_rows for c in commits], np.int64),
            nbytes=np.array([c.nbytes for c in commits], np.int64),
            keys=_fixed_bytes(table["key"]),
            views=_compact(codes[coded.indices.to_numpy()]),
            crcs=table["crc"].to_numpy(),
            times=_compact(table["time_s"].to_numpy()),
            errors=_compact(table["error"].to_numpy()),
            names=view_names(view for view in views if not _TIME.fullmatch(view)),
        )

    def take(self, shards: npt.NDArray[np.int64]) -> Columns:
        """Return the columns of the shards at these places (k,), in the order given."""
        lengths = self.counts[shards]
        skipped = (np.cumsum(self.counts) - self.counts)[shards] - (np.cumsum(lengths) - lengths)
        rows = np.repeat(skipped, lengths)
        rows += np.arange(len(rows))
        taken = {name: getattr(self, name)[shards] for name in SHARD_COLUMNS}
        taken |= {name: _compact(getattr(self, name)[rows]) for name in ROW_COLUMNS}
        return replace(self, **taken)

    def merged(self, other: Columns) -> Columns:
        """Return the columns of both, by shard number. Each has rows, and no shard is in both."""
        parts: dict[str, Any] = {
            name: _compact(np.concatenate([getattr(self, name), getattr(other, name)]))
            for name in (*SHARD_COLUMNS, *ROW_COLUMNS)
        }
        both = Columns(**parts, names={**self.names, **other.names})
        return both.take(np.argsort(both.shards)) if self.shards[-1] > other.shards[0] else both


SHARD_COLUMNS = ("shards", "counts", "nbytes")
ROW_COLUMNS = ("keys", "views", "crcs", "times", "errors")


def _compact(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return `values`; if all are equal, one of them broadcast to n, which takes the memory of one."""
    if values.ndim > 1 or len(values) < 2:
        return values
    same = (values == values[0]) | (values[0] != values[0]) & (values != values)
    return np.broadcast_to(values[:1].copy(), values.shape) if same.all() else values


def _fixed_bytes(column: pa.ChunkedArray) -> npt.NDArray[np.uint8]:
    """Return a column of 32-byte values as (n, 32), without a Python object for each."""
    if not len(column):
        return np.empty((0, KEY_BYTES), np.uint8)
    values = column.combine_chunks()
    first, nbytes = values.offset * KEY_BYTES, len(values) * KEY_BYTES
    return np.frombuffer(values.buffers()[1], np.uint8, nbytes, first).reshape(-1, KEY_BYTES)
