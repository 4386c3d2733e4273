"""Read a Parquet or Arrow file row by row without the bytes of its media.

    with TableFile(Path("train.parquet")) as table:
        media = media_columns(table.schema)
        for part in table.scan(0, media):       # block 0: a row group, or a record batch
            part.rows                           # a RecordBatch of all other columns
            part.media["image"]                 # for each row: None, an item, or a list of items

A column of media is a binary column, a struct with a binary field `bytes` (and a `path`: the type `Image` of
the library `datasets`), or a list of either. Of a struct only the field `path` is read, which shows how many
media each row has. The bytes are read where nothing else tells whether they are null.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.compute as pc

from cache.format.embedded.rows import (
    ArrowBatches,
    batch_rows,
    block_starts,
    bytes_leaf,
    format_of,
    leaves,
    open_parquet,
)

ROWS = 512
"""Rows of one part, at most."""


class Item(NamedTuple):
    """One media item in a cell."""

    path: str | None
    """What the file says of its name; None if nothing."""
    has_bytes: bool
    """Whether its bytes are in the cell."""


@dataclass(frozen=True, kw_only=True)
class MediaColumn:
    """A column whose cells contain media."""

    name: str
    """Name of the column."""
    is_list: bool
    """Whether each cell is a list."""
    is_struct: bool
    """Whether an item is a struct with a field `bytes`, rather than the bytes."""
    has_path: bool
    """Whether the struct has a field `path` of text."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some adjacent rows."""

    first: int
    """Number of the first row in the file, from 0."""
    rows: Any
    """pyarrow.RecordBatch of the columns without media."""
    media: dict[str, list[Item | list[Item] | None]]
    """Column of media -> what each row has; None for a null."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self.rows.num_rows)


def media_columns(schema: Any) -> list[MediaColumn]:
    """Return the columns of a pyarrow.Schema that can contain media: binary ones and those of `Image`."""
    found = []
    for field in schema:
        type_, is_list = _storage(field.type), False
        if _is_list(type_):
            type_, is_list = _storage(type_.value_type), True
        is_struct = pa.types.is_struct(type_)
        fields = {f.name: f.type for f in type_} if is_struct else {"bytes": type_}
        if "bytes" in fields and _is_binary(fields["bytes"]):
            found.append(
                MediaColumn(
                    name=field.name,
                    is_list=is_list,
                    is_struct=is_struct,
                    has_path=_is_text(fields.get("path")),
                )
            )
    return found


def declared_types(schema: Any) -> dict[str, str]:
    """Return column -> Image, Video, Audio, ... as the library `datasets` declares it in the metadata."""
    try:
        text = (schema.metadata or {}).get(b"huggingface", b"{}")
        features = json.loads(text)["info"]["features"]
        return {str(name): _feature(value) for name, value in features.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _feature(value: Any) -> str:
    """Return the type in a feature; of a list, that of its items."""
    while isinstance(value, list | dict):
        if isinstance(value, list):
            value = value[0] if value else None
        elif value.get("_type") in ("Sequence", "List", "LargeList"):
            value = value.get("feature")
        else:
            return str(value.get("_type", ""))
    return ""


class TableFile:
    """An open Parquet or Arrow file."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            pyarrow.ArrowException, OSError, ValueError: it is missing or damaged.
            EmbeddedMediaError: it is no such file.
        """
        self.format = format_of(path)
        self._parquet: Any = None
        self._arrow: ArrowBatches | None = None
        if self.format == "parquet":
            self._parquet = open_parquet(str(path))
            self.schema = self._parquet.schema_arrow
            self.starts = block_starts(self._parquet)
            """First row of each block, then the number of rows."""
        else:
            self._arrow = ArrowBatches(str(path))
            self.schema, self.starts = self._arrow.schema, self._arrow.starts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._parquet is not None:
            self._parquet.close()

    @property
    def blocks(self) -> int:
        """Number of row groups or record batches."""
        return len(self.starts) - 1

    def first_bytes(self, column: MediaColumn, size: int) -> bytes:
        """Return the first bytes of the first media item in the first block; b"" if it has none there."""
        for batch in self._batches(0, [column], {}, alone=True) if self.blocks else ():
            array = _bytes(_flat(batch.column(column.name), column), column).drop_null()
            if len(array):
                return bytes(array[0].as_buffer()[:size])
        return b""

    def scan(
        self, block: int, media: Sequence[MediaColumn], skip: Collection[str] = ()
    ) -> Iterator[Part]:
        """Yield the rows of one block, without the bytes of the columns `media`.

        Args:
            block: number of the block.
            media: columns whose bytes are not read.
            skip: columns that are not read at all.

        Raises:
            pyarrow.ArrowException, OSError, ValueError: the block is damaged.
        """
        first = self.starts[block]
        left = {column.name: self._leave_out(block, column) for column in media}
        names = set(left)
        left.update(dict.fromkeys(skip, "all"))
        for batch in self._batches(block, media, left):
            others = batch.select([name for name in batch.schema.names if name not in names])
            yield Part(
                first=first,
                rows=others,
                media={c.name: _items(batch, c, sure=bool(left[c.name])) for c in media},
            )
            first += batch.num_rows

    def _leave_out(self, block: int, column: MediaColumn) -> str:
        """Return what need not be read of a column of media: its `bytes`, `all` of it, or nothing.

        Without reading, only the statistics of a Parquet file say how many bytes are null.
        """
        if self._parquet is None:
            return ""  # mapped into memory: looking at the nulls reads no bytes
        leaf, number = bytes_leaf(self._parquet, column.name)
        chunk = self._parquet.metadata.row_group(block).column(number)
        known = chunk.is_stats_set and chunk.statistics.has_null_count
        if not known or (column.is_list and not column.has_path):
            return ""
        if not chunk.statistics.null_count:
            return "bytes" if column.has_path else "all"
        if not column.has_path:
            return ""
        absent = 0  # rows without a list or an item: they count as nulls, too
        paths = [leaf.removesuffix("bytes") + "path"]
        for batch in self._parquet.iter_batches(
            ROWS, row_groups=[block], columns=paths, use_threads=False
        ):
            array = batch.column(0)
            if column.is_list:
                lengths = pc.fill_null(pc.list_value_length(array), 0)
                absent += pc.sum(pc.equal(lengths, 0)).as_py() or 0
            absent += _flat(array, column).null_count
        return "bytes" if absent == chunk.statistics.null_count else ""

    def _batches(
        self,
        block: int,
        media: Sequence[MediaColumn],
        left: Mapping[str, str],
        *,
        alone: bool = False,
    ) -> Iterator[Any]:
        """Yield the record batches of a block, without what is `left` out; with `alone`, only `media`."""
        if self._arrow is not None:
            batch = self._arrow.get(block)
            batch = batch.select([name for name in batch.schema.names if left.get(name) != "all"])
            for start in range(0, batch.num_rows, ROWS):
                part = batch.slice(start, ROWS)
                # A file may state offsets beyond its buffers. Reading those would end the process.
                part.validate(full=True)
                yield part
            return
        columns, rows = [], ROWS
        group = self._parquet.metadata.row_group(block)
        wanted = {column.name for column in media}
        for name, path, number in leaves(self._parquet):
            how = left.get(name, "")
            if name not in wanted:
                columns += [] if alone or how else [path]
            elif how != "all" and not (how and path.endswith(".bytes")):
                columns.append(path)
                if not how:
                    rows = min(rows, batch_rows(group.column(number), group.num_rows))
        if columns:
            yield from self._parquet.iter_batches(
                rows, row_groups=[block], columns=columns, use_threads=False
            )
            return
        for start in range(0, group.num_rows, ROWS):  # nothing but bytes, which are all there
            yield pa.record_batch({"": pa.nulls(min(ROWS, group.num_rows - start))}).select([])


def _items(batch: Any, column: MediaColumn, *, sure: bool) -> list[Item | list[Item] | None]:
    """Return what each row has; `sure` if no item lacks its bytes."""
    if column.name not in batch.schema.names:
        return [Item(None, True)] * batch.num_rows
    whole = _storage_of(batch.column(column.name))
    items = _flat(whole, column)
    valid = items.is_valid().to_pylist()
    there = valid
    if not sure:
        there = pc.and_(items.is_valid(), _bytes(items, column).is_valid()).to_pylist()
    paths: list[str | None] = [None] * len(items)
    if column.has_path:
        paths = pc.struct_field(items, "path").to_pylist()
    found = list(map(Item, paths, there))
    if not column.is_list:
        return [item if is_valid else None for item, is_valid in zip(found, valid, strict=True)]
    at, rows = 0, list[Item | list[Item] | None]()
    for length in pc.list_value_length(whole).to_pylist():
        rows.append(None if length is None else found[at : at + length])
        at += length or 0
    return rows


def _flat(array: Any, column: MediaColumn) -> Any:
    """Return the items of a column, one after the other."""
    array = _storage_of(array)
    return _storage_of(pc.list_flatten(array)) if column.is_list else array


def _bytes(items: Any, column: MediaColumn) -> Any:
    return _storage_of(pc.struct_field(items, "bytes")) if column.is_struct else items


def _storage_of(array: Any) -> Any:
    return array.storage if isinstance(array, pa.ExtensionArray) else array


def _storage(type_: Any) -> Any:
    return type_.storage_type if isinstance(type_, pa.BaseExtensionType) else type_


def _is_list(type_: Any) -> bool:
    types = pa.types
    return bool(
        types.is_list(type_) or types.is_large_list(type_) or types.is_fixed_size_list(type_)
    )


def _is_binary(type_: Any) -> bool:
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def _is_text(type_: Any) -> bool:
    return type_ is not None and bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))
