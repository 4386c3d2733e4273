"""Find what a path or URL was recorded as.

media = MediaTable(media_table(root))
record = media.row(media.find("/photos/cat.jpg"))    # {"source": ..., "key": ..., "kind": ..., ...}
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

HASHED_AT_ONCE = 1 << 16
"""Sources that are Python strings at the same time."""


class MediaTable:
    """The media table, searched by name: 16 bytes of memory for each of ten million sources."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()
        self._sources = self._table["source"]
        of_source = np.empty(len(table), np.int64)
        for start in range(0, len(table), HASHED_AT_ONCE):
            some = self._sources.slice(start, HASHED_AT_ONCE).to_pylist()
            of_source[start : start + len(some)] = list(map(hash, some))
        self._order = np.argsort(of_source, kind="stable")
        self._hashes = of_source[self._order]

    def __len__(self) -> int:
        return len(self._table)

    def find(self, source: str) -> int | None:
        """Return the row of a source."""
        wanted = hash(source)
        for at in range(int(np.searchsorted(self._hashes, wanted)), len(self._hashes)):
            if self._hashes[at] != wanted:
                return None
            if self._sources[int(self._order[at])].as_py() == source:
                return int(self._order[at])
        return None

    def row(self, number: int | None) -> dict[str, Any] | None:
        """Return the values of a row; None for None."""
        return None if number is None else self.row_of(self._table, number)

    @staticmethod
    def row_of(table: pa.Table, number: int) -> dict[str, Any]:
        """Return the values of a row of a table."""
        found: dict[str, Any] = table.slice(number, 1).to_pylist()[0]
        return found

    def ending(self, text: str) -> pa.Table:
        """Return the rows whose source ends with a text."""
        return self._table.filter(pc.ends_with(self._sources, text))

    def duration(self, key: str) -> float:
        """Return the length of a video in seconds; NaN where it is not known."""
        found = self._durations.get(key)
        return float("nan") if found is None else found

    @functools.cached_property
    def _durations(self) -> dict[str, float]:
        timed = self._table.filter(pc.is_valid(self._table["duration_s"]))
        return dict(zip(timed["key"].to_pylist(), timed["duration_s"].to_pylist(), strict=True))
