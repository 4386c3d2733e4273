"""What the commits of one array say, as flat arrays: 40 bytes a picture, and 12 more to find it by.

n rows in m shards, in row order.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING:
    from cache.commits import Commit

KEY_BYTES = 32

_TIME = re.compile(r"t:(0|[1-9]\d{0,17})")


def view_code(view: str) -> int:
    """A view as a number: of `t:<microseconds>` the time, of any other a negative hash of its name."""
    time = _TIME.fullmatch(view)
    return int(time[1]) if time else _name_code(view)


@functools.lru_cache(4096)
def _name_code(view: str) -> int:
    return -1 - (int.from_bytes(hashlib.sha256(view.encode()).digest()[:8]) >> 1)


def view_names(names: Iterable[str]) -> dict[int, str]:
    """Code -> view, of those that are no times."""
    return {view_code(name): name for name in names}


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """What commits say, in row order. A column whose values are all the same takes no memory."""

    shards: npt.NDArray[np.int64]
    """(m,) numbers, ascending."""
    counts: npt.NDArray[np.int64]
    """(m,) rows of each."""
    nbytes: npt.NDArray[np.int64]
    """(m,) size of each file."""
    keys: npt.NDArray[np.uint8]
    """(n, 32) sha256 of the media's bytes."""
    views: npt.NDArray[np.int64]
    """(n,) see `view_code`."""
    crcs: npt.NDArray[np.uint32]
    """(n,) crc32c of the stored row."""
    times: npt.NDArray[np.float64]
    """(n,) where in its video, seconds; NaN for pictures."""
    errors: npt.NDArray[np.float32]
    """(n,) relative error of the row codec."""
    names: Mapping[int, str]
    """Code -> view, of at least those here that are no times."""

    @staticmethod
    def of(commits: Sequence[Commit]) -> Columns:
        """Those of `commits`, in their order."""
        names = ("key", "view", "crc", "time_s", "error")
        table = pa.concat_tables([c.table.select(names) for c in commits]) if commits else None
        if table is None:
            return _NO_COLUMNS
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

    def only(self, kept: npt.NDArray[np.bool_]) -> Columns:
        """Those of some shards, (m,)."""
        rows = np.repeat(kept, self.counts)
        return self._each(lambda a: a[kept], lambda a: _compact(a[rows]))

    def merged(self, other: Columns) -> Columns:
        """Both, by shard number; no shard is in both."""
        names = (*SHARD_COLUMNS, *ROW_COLUMNS)
        parts: dict[str, Any] = {f: _joined(getattr(self, f), getattr(other, f)) for f in names}
        both = Columns(**parts, names={**self.names, **other.names})
        if len(self.shards) and len(other.shards) and self.shards[-1] > other.shards[0]:
            order = np.argsort(both.shards)
            ends = np.cumsum(both.counts)
            lengths = both.counts[order]
            skip = np.repeat((ends - both.counts)[order] - (np.cumsum(lengths) - lengths), lengths)
            rows = np.arange(len(skip)) + skip
            both = both._each(lambda a: a[order], lambda a: _compact(a[rows]))
        return both

    def _each(self, of_shards: Any, of_rows: Any) -> Columns:
        shards = {f: of_shards(getattr(self, f)) for f in SHARD_COLUMNS}
        return replace(self, **shards, **{f: of_rows(getattr(self, f)) for f in ROW_COLUMNS})


SHARD_COLUMNS = ("shards", "counts", "nbytes")
ROW_COLUMNS = ("keys", "views", "crcs", "times", "errors")

_NO_COLUMNS = Columns(
    **{name: np.empty(0, np.int64) for name in (*SHARD_COLUMNS, "views")},
    keys=np.empty((0, KEY_BYTES), np.uint8),
    crcs=np.empty(0, np.uint32),
    times=np.empty(0, np.float64),
    errors=np.empty(0, np.float32),
    names={},
)


def _joined(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if not len(second):
        return first
    return _compact(np.concatenate([first, second])) if len(first) else second


def _compact(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`values`, or where all of them are the same, one of them seen n times."""
    if values.ndim > 1 or len(values) < 2:
        return values
    same = (values == values[0]) | (values[0] != values[0]) & (values != values)
    return np.broadcast_to(values[:1].copy(), values.shape) if same.all() else values


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
