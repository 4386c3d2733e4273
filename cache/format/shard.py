"""What the two shard formats have in common: `cache.format.zarr.shard` and `cache.format.tar_shard`.

    geometry = info.geometry("image")
    offset = geometry.row_offset(slot)          # where the row in a slot starts in its file

A shard consists of slots of one size with one row each, and then a tail. The bytes around a row in its slot,
and the tail, follow from the shard's commit. Readers never need them; `cache.verify --deep` computes them
again and compares.
"""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.format.spec import FeatureSpec

MAX_VIEW_BYTES = 100
"""Longest name of a view."""
_VIEW = re.compile(rf"[!-~]{{1,{MAX_VIEW_BYTES}}}")


class RowFacts(NamedTuple):
    """What a commit records about one row."""

    key: str
    """The key of its media item, 64 hex digits."""
    view: str
    """The view of the media item."""
    time_s: float | None
    """Time of the frame in its video, seconds; None for images."""
    crc: int
    """crc32c of the stored row."""
    error: float
    """Relative error of the row codec, a float32."""


def row_facts(table: pa.Table) -> Iterator[RowFacts]:
    """Yield the rows of a commit's table in slot order."""
    columns = (table[name].to_pylist() for name in ("key", "view", "time_s", "crc", "error"))
    for key, *rest in zip(*columns, strict=True):
        yield RowFacts(key.hex(), *rest)


@dataclass(frozen=True, kw_only=True)
class Geometry(ABC):
    """The positions of rows in the shards of one array, and the bytes around them."""

    spec: FeatureSpec
    """How the rows were made, and how they are packed."""
    array: str
    """The array: `image` or `frame`."""
    slots: int
    """Rows of a full shard."""

    @functools.cached_property
    def row_bytes(self) -> int:
        """Bytes of one packed row."""
        return self.spec.row_bytes(self.array)

    @property
    @abstractmethod
    def lead_bytes(self) -> int:
        """Bytes of a slot before its row."""

    @property
    @abstractmethod
    def slot_bytes(self) -> int:
        """Bytes from one row's start to the next one's."""

    @property
    @abstractmethod
    def tail_bytes(self) -> int:
        """Bytes after the last used slot."""

    def check_view(self, view: str) -> None:
        """Raise ValueError if a shard of this format cannot hold a row of this view."""
        if not _VIEW.fullmatch(view):
            raise ValueError(
                f"view {view[:MAX_VIEW_BYTES]!r}: at most {MAX_VIEW_BYTES} printable ASCII characters"
            )

    @abstractmethod
    def around(self, facts: RowFacts) -> tuple[bytes, bytes]:
        """Return the bytes before a row in its slot, and those after it."""

    @abstractmethod
    def tail_with_crc(self, rows: int) -> tuple[bytes, int]:
        """Return the tail of a shard with `rows` rows, and the crc32c that its commit records of the tail."""

    @abstractmethod
    def commit_columns(self, rows: int) -> Mapping[str, npt.NDArray[np.int64]]:
        """Return the columns (rows,) that a commit has in addition to `cache.store.commits.SCHEMA`."""

    @property
    def gap_bytes(self) -> int:
        """Bytes between the end of one row and the start of the next."""
        return self.slot_bytes - self.row_bytes

    def row_offset(self, slot: int) -> int:
        """Return the byte at which the row of a slot starts in its file."""
        return slot * self.slot_bytes + self.lead_bytes

    def file_bytes(self, rows: int) -> int:
        """Return the bytes of a shard with `rows` rows."""
        return rows * self.slot_bytes + self.tail_bytes
