"""Read embedded bytes from the columns of Parquet and Arrow files, row by row, with bounded memory.

Each thread of an encoder asks for the next rows, so requests arrive nearly in order. One cursor for each file
and column reads ahead in batches of a few MiB, and keeps the last ones for threads that are a little behind.
A row before those, or in another row group, starts the pass at the beginning of its row group. A large row
group is never held whole.
"""

from __future__ import annotations

import mmap
import os
import stat
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cache.errors import EmbeddedMediaError
from cache.format.gate import open_regular

TABLES = ("parquet", "arrow")
"""Formats of tables."""

BATCH_BYTES = 8 << 20
"""Bytes of a batch of rows of average size."""
MAX_BATCH_ROWS = 256
"""Rows of a batch, at most."""
MAX_BATCH_BYTES = 64 << 20
"""Bytes of a batch, at most, whatever the sizes of its rows; a single row may exceed it."""
KEPT_ROWS = 32
"""Rows behind the newest that stay in memory: more than the threads that read at the same time."""
BUFFER_BYTES = 1 << 20
"""Bytes of a column that are read from the disk at a time."""
MAX_CURSORS = 8
"""Cursors that stay open. Each holds the batches of its last rows."""

Array = Any
"""A pyarrow.Array or ChunkedArray, which has no types of its own."""


class _Stamp(NamedTuple):
    """What changes when a file is written again."""

    size: int
    mtime_ns: int
    inode: int


class _Batch(NamedTuple):
    start: int
    """Row of the file."""
    column: Array


def read_cell(
    table_format: str, path: str, column: str, row: int, index: int | None, max_bytes: int
) -> bytes | str:
    """Return what one row of a column holds: binary, struct<bytes, ...>, text, or an item of a list of these.

    Args:
        table_format: parquet or arrow.
        path: of the file.
        column: name of a column.
        row: row of the file, from 0.
        index: item of the row's list, from 0; None for a column without lists.
        max_bytes: bytes that are returned at most; of text, twice as many, since it is base64.

    Raises:
        EmbeddedMediaError: there is no such file, column, row or item, it has no bytes or more than
            `max_bytes`, or the file is damaged.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - called for every row; a Path would double the cost
        if not stat.S_ISREG(status.st_mode):
            raise EmbeddedMediaError("not a regular file")
        cursor = _cursor(table_format, path, column, _stamp(status))
        try:
            return _content(cursor.cell(row), index, max_bytes)
        except EmbeddedMediaError:
            raise
        except BaseException:
            _forget(cursor)
            raise
    except FileNotFoundError:
        raise EmbeddedMediaError("no such file") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        text = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise EmbeddedMediaError(f"damaged {table_format} file ({text[:120]})") from None


def _stamp(status: os.stat_result) -> _Stamp:
    return _Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


# ---- cursors


class _Cursor(ABC):
    """The last batches of one column. Subclasses read further batches."""

    def __init__(self, key: tuple[str, str, str], stamp: _Stamp) -> None:
        self.key, self.stamp = key, stamp
        self._lock = threading.Lock()
        self._kept: deque[_Batch] = deque()
        self._starts: list[int] = [0]
        """First row of each block, which is a row group or a record batch; last, the number of rows."""
        self._block = -1
        self._rest: Iterator[Array] = iter(())
        self._next = 0

    def cell(self, row: int) -> Any:
        """Return the pyarrow scalar of one row."""
        with self._lock:
            if not 0 <= row < self._starts[-1]:
                raise EmbeddedMediaError(f"row {row} of a file of {self._starts[-1]} rows")
            while (batch := self._find(row)) is None:
                self._advance(row)
            return batch.column[row - batch.start]

    def _find(self, row: int) -> _Batch | None:
        for batch in reversed(self._kept):
            if batch.start <= row < batch.start + len(batch.column):
                return batch
        return None

    def _advance(self, row: int) -> None:
        """Read one more batch on the way to `row`."""
        block = bisect_right(self._starts, row) - 1
        if block != self._block or row < self._next:
            if row < self._next:
                self._kept.clear()
            self._block, self._rest, self._next = block, self._read(block), self._starts[block]
        column = next(self._rest, None)
        if column is None or not len(column):
            self._block = -1
            raise EmbeddedMediaError("the file has fewer rows than it states")
        self._kept.append(_Batch(self._next, column))
        self._next += len(column)
        while len(self._kept) > 1 and self._next - self._kept[1].start >= KEPT_ROWS:
            self._kept.popleft()

    @abstractmethod
    def _read(self, block: int) -> Iterator[Array]:
        """Yield the column of one block in batches."""


class _ParquetCursor(_Cursor):
    def __init__(self, key: tuple[str, str, str], stamp: _Stamp) -> None:
        super().__init__(key, stamp)
        _, path, column = key
        self._file = open_parquet(path)
        self._leaf, self._number = bytes_leaf(self._file, column)
        self._starts = block_starts(self._file)

    def _read(self, block: int) -> Iterator[Array]:
        group = self._file.metadata.row_group(block)
        rows = batch_rows(group.column(self._number), group.num_rows)
        for batch in self._file.iter_batches(
            rows, row_groups=[block], columns=[self._leaf], use_threads=False
        ):
            yield batch.column(0)


def format_of(path: Path) -> str:
    """Return parquet or arrow, by the first bytes of a file. Raises OSError."""
    with open_regular(path) as file:
        return "parquet" if file.read(4) == b"PAR1" else "arrow"


def open_parquet(path: str) -> Any:
    """Open a file of which row groups are not read whole; return a pyarrow.parquet.ParquetFile."""
    try:
        path.encode()
        place: Any = path
    except UnicodeEncodeError:  # pyarrow opens no path that is not UTF-8
        place = _mapped(path)
    return pq.ParquetFile(
        place, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
    )


def _mapped(path: str) -> Any:
    """Return a pyarrow.BufferReader of a file that is mapped into memory."""
    with open_regular(path) as file:
        return pa.BufferReader(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def block_starts(file: Any) -> list[int]:
    """Return the first row of each row group of a Parquet file, then the number of rows."""
    groups = file.metadata
    return [0, *accumulate(groups.row_group(n).num_rows for n in range(groups.num_row_groups))]


def leaves(file: Any) -> list[tuple[str, str, int]]:
    """Return column of the table, path and number of each column that a Parquet file stores."""
    names = [field.name for field in file.schema_arrow for _ in range(_stored(field.type))]
    return [(name, file.schema.column(n).path, n) for n, name in enumerate(names)]


def _stored(type_: Any) -> int:
    """Return how many Parquet columns a type takes."""
    if isinstance(type_, pa.BaseExtensionType):
        type_ = type_.storage_type
    if pa.types.is_map(type_):
        return _stored(type_.key_type) + _stored(type_.item_type)
    if pa.types.is_struct(type_):
        return sum(_stored(field.type) for field in type_)
    if (
        pa.types.is_list(type_)
        or pa.types.is_large_list(type_)
        or pa.types.is_fixed_size_list(type_)
    ):
        return _stored(type_.value_type)
    return 1


def bytes_leaf(file: Any, column: str) -> tuple[str, int]:
    """Return path and number of the Parquet column that has the bytes of a column of the table."""
    own = {path: number for name, path, number in leaves(file) if name == column}
    if not own:
        raise EmbeddedMediaError(f"no column {column!r}")
    found = [path for path in own if len(own) == 1 or path.endswith(".bytes")]
    if len(found) != 1:
        raise EmbeddedMediaError(f"column {column!r} has no bytes")
    return found[0], own[found[0]]


def batch_rows(chunk: Any, rows: int) -> int:
    """Return how many rows to read at a time of one column of a row group."""
    total = max(1, chunk.total_uncompressed_size)
    wanted = min(MAX_BATCH_ROWS, max(1, BATCH_BYTES * rows // total))
    if chunk.has_dictionary_page:
        # A value of the dictionary may be in every row, which `total` counts once.
        stored = max(1, chunk.data_page_offset - chunk.dictionary_page_offset)
        largest = min(total, 8 * stored)  # compressed 8 to 1 at most: images are compressed already
        wanted = min(wanted, max(1, MAX_BATCH_BYTES // largest))
    return wanted


class _ArrowCursor(_Cursor):
    """A memory-mapped file: its batches are views, so only rows that are asked for are read from the disk."""

    def __init__(self, key: tuple[str, str, str], stamp: _Stamp) -> None:
        super().__init__(key, stamp)
        _, path, column = key
        self._batches = ArrowBatches(path)
        names = self._batches.schema.names
        if names.count(column) != 1:
            raise EmbeddedMediaError(f"no column {column!r}")
        self._column = names.index(column)
        self._starts = self._batches.starts

    def _read(self, block: int) -> Iterator[Array]:
        column = self._batches.get(block).column(self._column)
        # A file may state offsets beyond its buffers. Reading those would end the process.
        column.validate(full=True)
        yield column


class ArrowBatches:
    """The record batches of an Arrow file: the stream that `save_to_disk` writes, or the file format.

    A batch is found without reading those before it.
    """

    def __init__(self, path: str) -> None:
        """Map the file into memory and find its batches.

        Raises:
            pyarrow.ArrowException, OSError, ValueError: it is missing or damaged.
            EmbeddedMediaError: a column is dictionary-encoded in a stream.
        """
        source = self._source = _mapped(path)
        self._file, self._offsets = None, list[int]()
        rows = []
        if source.read(6) == b"ARROW1":
            self._file = pa.ipc.open_file(source)
            self.schema = self._file.schema
            count = self._file.num_record_batches
            rows = [self._file.get_batch(number).num_rows for number in range(count)]
        else:
            source.seek(0)
            messages = pa.ipc.MessageReader.open_stream(source)
            first = next(iter(messages), None)
            if first is None:
                raise EmbeddedMediaError("not an Arrow file")
            self.schema = pa.ipc.read_schema(first)
            if any(pa.types.is_dictionary(type_) for type_ in self.schema.types):
                raise EmbeddedMediaError("a dictionary-encoded column in an Arrow stream")
            offset = source.tell()
            for message in messages:
                rows.append(pa.ipc.read_record_batch(message, self.schema).num_rows)
                self._offsets.append(offset)
                offset = source.tell()
        self.starts: list[int] = [0, *accumulate(rows)]
        """First row of each batch, then the number of rows."""

    def get(self, number: int) -> Any:
        """Return one pyarrow.RecordBatch, a view of the file."""
        if self._file is not None:
            return self._file.get_batch(number)
        self._source.seek(self._offsets[number])
        return pa.ipc.read_record_batch(pa.ipc.read_message(self._source), self.schema)


_cursors: OrderedDict[tuple[str, str, str], _Cursor] = OrderedDict()
_lock = threading.Lock()


def _cursor(table_format: str, path: str, column: str, stamp: _Stamp) -> _Cursor:
    """Return the cursor of a column, opened again if its file has changed."""
    key = (table_format, path, column)
    with _lock:
        cursor = _cursors.get(key)
        if cursor is None or cursor.stamp != stamp:
            made = _ParquetCursor if table_format == "parquet" else _ArrowCursor
            cursor = _cursors[key] = made(key, stamp)
        _cursors.move_to_end(key)
        while len(_cursors) > MAX_CURSORS:
            _cursors.popitem(last=False)
        return cursor


def _forget(cursor: _Cursor) -> None:
    """Close a cursor after an error: it may be in the middle of a damaged batch."""
    with _lock:
        if _cursors.get(cursor.key) is cursor:
            del _cursors[cursor.key]


# ---- one cell


def _content(cell: Any, index: int | None, max_bytes: int) -> bytes | str:
    """Return the bytes or the text that a scalar holds."""
    cell = _plain(cell)
    is_list = isinstance(cell, (pa.ListScalar, pa.LargeListScalar, pa.FixedSizeListScalar))
    if is_list != (index is not None):
        raise EmbeddedMediaError("a list, and no item is named" if is_list else "not a list")
    if index is not None:
        items = cell.values if cell.is_valid else ()
        if index >= len(items):
            raise EmbeddedMediaError(f"item {index} of a list of {len(items)}")
        cell = _plain(items[index])
    if isinstance(cell, pa.StructScalar):
        if cell.is_valid and "bytes" not in cell.type.names:
            raise EmbeddedMediaError("a struct without bytes")
        cell = _plain(cell["bytes"]) if cell.is_valid else cell
    if not cell.is_valid:
        raise EmbeddedMediaError("no bytes here")
    if not isinstance(
        cell, (pa.BinaryScalar, pa.LargeBinaryScalar, pa.StringScalar, pa.LargeStringScalar)
    ):
        raise EmbeddedMediaError(f"{cell.type} instead of bytes")
    buffer = cell.as_buffer()
    is_text = pa.types.is_string(cell.type) or pa.types.is_large_string(cell.type)
    if buffer.size > max_bytes * (2 if is_text else 1):
        raise EmbeddedMediaError(f"{buffer.size} bytes, more than {max_bytes}")
    data: bytes = buffer.to_pybytes()
    return data.decode() if is_text else data


def _plain(scalar: Any) -> Any:
    """Return the scalar inside an extension type or a dictionary."""
    if isinstance(scalar, (pa.ExtensionScalar, pa.DictionaryScalar)):
        return scalar.value if scalar.is_valid else pa.scalar(None, pa.binary())
    return scalar
