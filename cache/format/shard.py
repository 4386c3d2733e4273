"""What a shard's file is made of, whichever of the two on-disk formats a space has.

A shard is slots of one size, one row in each, then a tail. What stands around a row in its slot, and the
tail, follow from the shard's commit: they are never read to find anything, and `cache.verify --deep` makes
them anew and compares. `cache.format.zarr_shard` and `cache.format.tar_shard` are the two;
`SpaceInfo.container` is the one of a space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.format.spec import FeatureSpec


class RowFacts(NamedTuple):
    """What a commit says of one row."""

    key: str
    """Its media's key, 64 hex digits."""
    view: str
    """Which view of it."""
    time_s: float | None
    """Where in its video, seconds; None for images."""
    crc: int
    """crc32c of the stored row."""
    error: float
    """Relative error of the row codec, a float32."""


def row_facts(table: pa.Table) -> Iterator[RowFacts]:
    """The rows of a commit's table, in slot order."""
    columns = (table[name].to_pylist() for name in ("key", "view", "time_s", "crc", "error"))
    for key, *rest in zip(*columns, strict=True):
        yield RowFacts(key.hex(), *rest)


@dataclass(frozen=True, kw_only=True)
class Geometry(ABC):
    """Where things stand in the shards of one array, and what stands around its rows."""

    row_bytes: int
    """Bytes of one row as the codec packs it."""
    slots: int
    """Rows a full shard holds."""

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
        """Bytes behind the last slot that is used."""

    @abstractmethod
    def check_view(self, view: str) -> None:
        """Raise ValueError when a row of this view has no place in such a shard."""

    @abstractmethod
    def around(self, facts: RowFacts) -> tuple[bytes, bytes]:
        """What stands before and behind a row in its slot."""

    @abstractmethod
    def tail_with_crc(self, rows: int) -> tuple[bytes, int]:
        """The last bytes of a shard of `rows` rows, and the crc32c that its commit has of them."""

    @abstractmethod
    def commit_columns(self, rows: int) -> Mapping[str, npt.NDArray[np.int64]]:
        """What the commits of such shards say of their rows beside `cache.store.commits.SCHEMA`, each
        (rows,)."""

    @property
    def gap_bytes(self) -> int:
        """Bytes between the end of one row and the start of the next."""
        return self.slot_bytes - self.row_bytes

    def row_offset(self, slot: int) -> int:
        """Where the row of a slot starts in its file."""
        return slot * self.slot_bytes + self.lead_bytes

    def file_bytes(self, rows: int) -> int:
        """Size of a shard that holds `rows` rows."""
        return rows * self.slot_bytes + self.tail_bytes


class Container(Protocol):
    """One on-disk format."""

    def geometry(self, spec: FeatureSpec, array: str, slots: int) -> Geometry:
        """Of the shards of one array, `slots` rows each."""
        ...

    def group_values(self) -> Mapping[str, Any] | None:
        """What the file beside all arrays says to other tools; None: such spaces have none."""
        ...

    def array_values(
        self, spec: FeatureSpec, array: str, slots: int, rows: int
    ) -> Mapping[str, Any] | None:
        """What the file beside one array says of `rows` row numbers; None: such spaces have none."""
        ...
