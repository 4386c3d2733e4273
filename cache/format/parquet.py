"""Read a Parquet file that somebody else may have made: what it takes is known before anything is allocated.

    with open_parquet(data, path, SCHEMA, Limits(rows=4096, nbytes=8 << 20)) as file:
        table = file.read()

The footer of such a file, and the header of each page, state how many values there are and how many bytes
they take. A few kilobytes can state terabytes, and pyarrow allocates what is stated; it even ends the process
at some statistics. So the footer and all page headers are read here first, by a reader of Thrift's compact
protocol that allocates nothing for what is not there. They are compared with the limits, with the size of the
file and with what our writers make. Only then does pyarrow see the file. Any error on the way is a
CorruptError.
"""

from __future__ import annotations

import contextlib
import mmap
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache.errors import CorruptError

Data = bytes | mmap.mmap

MAGIC = b"PAR1"
TAIL_BYTES = len(MAGIC) + 4
"""At the end: four bytes with the length of the footer, and the magic word."""

_DATA_PAGE, _DICTIONARY_PAGE = 0, 2
_PLAIN, _OLD_DICTIONARY, _RLE, _DICTIONARY = 0, 2, 3, 8
_BY_NUMBER = (_OLD_DICTIONARY, _DICTIONARY)

_MOST_ITEMS = 1 << 15
"""Items of one list in a footer: row groups of 8,192 samples each make 268 million samples."""
_MOST_COLUMNS = 64
"""More columns than a table has: none of them takes more than this share of a limit by a rough bound."""
_MOST_DEPTH = 16
_PAGE_HEADER_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a file may have."""

    rows: int
    """Rows."""
    nbytes: int
    """Bytes that all of it takes once it is decoded."""
    values: int | None = None
    """Values of one column in one row group, where it has lists; None: as many as rows."""
    footer: int = 8 << 20
    """Bytes of the footer."""
    codecs: Collection[str] = ("UNCOMPRESSED", "SNAPPY", "ZSTD")
    """Codecs of the columns, as pyarrow calls them."""


def table_limits(data: Data) -> Limits:
    """Return limits for a table of any size that has these bytes.

    A row takes a byte at least, and text is compressed a hundredfold at most; small files may do better.
    """
    size = len(data)
    return Limits(
        rows=(1 << 20) + 8 * size, values=(1 << 22) + 8 * size, nbytes=(256 << 20) + 256 * size
    )


@contextlib.contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """Turn what pyarrow and the checks here raise about the file at `path` into a CorruptError."""
    try:
        yield
    except CorruptError:
        raise
    # pyarrow's errors are subclasses of these, and those that it takes from the system have a number.
    except (
        pa.ArrowException,
        ValueError,
        LookupError,
        TypeError,
        ArithmeticError,
        MemoryError,
    ) as error:
        raise CorruptError(path, f"not what this program writes: {_one_line(error)}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise CorruptError(path, f"not what this program writes: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def open_parquet(
    data: Data, path: Path, schema: pa.Schema, limits: Limits, *, coded: Sequence[str] = ()
) -> Iterator[pq.ParquetFile]:
    """Open a file as pyarrow does, and check that it has these columns and stays within the limits.

    Args:
        data: all of its bytes.
        path: where they are from, for messages.
        schema: its columns; those of `coded` have the type of a dictionary.
        limits: what it may have.
        coded: columns of strings that are read as dictionaries, so that a long string that occurs often
            takes its bytes once.

    Raises:
        CorruptError: it is another kind of file, or reading it in the block fails.
    """
    with parquet_errors(path), _opened(data, limits.footer, coded) as file:
        if not (found := file.schema_arrow).equals(schema):
            raise ValueError(f"its columns are {', '.join(f'{c.name} {c.type}' for c in found)}")
        _check(data, file.metadata, limits, coded)
        yield file


def read_metadata(data: Data, most: int = Limits.footer) -> dict[str, str]:
    """Return the key-value metadata of a file, whose footer has at most `most` bytes, and nothing else of it.

    Raises what `parquet_errors` turns into a CorruptError.
    """
    with _opened(data, most) as file:
        return footer_metadata(file)


def column_names(data: Data, most: int = Limits.footer) -> list[str]:
    """Return the names of a file's columns; see `read_metadata`."""
    with _opened(data, most) as file:
        return list(file.schema_arrow.names)


def footer_metadata(file: pq.ParquetFile) -> dict[str, str]:
    """Return the key-value metadata of a file."""
    return {key.decode(): value.decode() for key, value in (file.metadata.metadata or {}).items()}


def _opened(data: Data, most: int, coded: Sequence[str] = ()) -> pq.ParquetFile:
    footer = int.from_bytes(data[-TAIL_BYTES : -len(MAGIC)], "little")
    if footer > most:
        raise ValueError(f"its footer has {footer:,} bytes, at most {most:,} are read")
    return pq.ParquetFile(
        pa.BufferReader(data if isinstance(data, bytes) else pa.py_buffer(data)),
        read_dictionary=coded,
        thrift_string_size_limit=most,
        thrift_container_size_limit=_MOST_ITEMS,
    )


def _check(data: Data, found: pq.FileMetaData, limits: Limits, coded: Sequence[str]) -> None:
    """Check what the footer states, and the headers of all pages."""
    if not 0 <= found.num_rows <= limits.rows:
        raise ValueError(f"{found.num_rows:,} rows, at most {limits.rows:,} are read")
    rows = nbytes = 0
    for number in range(found.num_row_groups):
        group = found.row_group(number)
        rows += group.num_rows
        if group.num_rows < 0 or group.num_columns != found.num_columns:
            raise ValueError(f"{group.num_rows:,} rows in {group.num_columns} columns")
        for place in range(found.num_columns):
            column = group.column(place)
            nbytes += _check_column(data, column, group.num_rows, limits, coded)
            if nbytes > limits.nbytes:
                raise ValueError(
                    f"rows of {nbytes:,} bytes or more, at most {limits.nbytes:,} are read"
                )
    if rows != found.num_rows:
        raise ValueError(f"{found.num_rows:,} rows, but {rows:,} in its row groups")


def _check_column(
    data: Data, column: pq.ColumnChunkMetaData, rows: int, limits: Limits, coded: Sequence[str]
) -> int:
    """Check the pages of one column in one row group. Return the most bytes that its values take."""
    codec, count, name = column.compression, column.num_values, column.path_in_schema
    # A column without lists has a value for each row.
    if (count != rows) if "." not in name else not 0 <= count <= (limits.values or rows):
        raise ValueError(f"{name} has {count:,} values in {rows:,} rows")
    if codec not in limits.codecs:
        raise ValueError(f"{name} has codec {codec}")
    at = first if (first := column.dictionary_page_offset) else column.data_page_offset
    stop = at + column.total_compressed_size
    if not len(MAGIC) <= at <= stop <= len(data):
        raise ValueError(f"{name} is outside of the file")
    nbytes = seen = numbered = 0
    dictionary: tuple[int, int, int] | None = None
    while at < stop:
        (kind, unpacked, packed, values, encoding), at = _page(data, at)
        if unpacked < 0 or not 0 <= packed <= stop - at or values < 0:
            raise ValueError(f"{name} has a page larger than itself")
        if codec == "UNCOMPRESSED" and packed != unpacked:
            raise ValueError(f"{name} has a page of two sizes")
        nbytes += unpacked
        if nbytes > limits.nbytes:
            return nbytes
        if kind == _DATA_PAGE:
            seen += values
            if encoding in _BY_NUMBER and dictionary is not None:
                numbered += values
            elif encoding != _PLAIN:
                raise ValueError(f"{name} has a page of encoding {encoding}")
        elif dictionary is not None or seen or encoding not in (_PLAIN, _OLD_DICTIONARY):
            raise ValueError(f"{name} has a second dictionary, or one of encoding {encoding}")
        elif values > min(count, unpacked):
            raise ValueError(f"{name} has a dictionary of {values:,} values")
        else:
            dictionary = at, packed, unpacked
        at += packed
    if seen != count:
        raise ValueError(f"{name} has {count:,} values in pages of {seen:,}")
    nbytes += 16 * count  # numbers, offsets and nulls
    if dictionary is not None and column.physical_type == "BYTE_ARRAY" and name not in coded:
        # If its longest value occurred each time; of a small column, if the whole dictionary did.
        small = numbered * dictionary[2] * _MOST_COLUMNS <= limits.nbytes
        nbytes += numbered * (dictionary[2] if small else _longest(data, dictionary, codec))
    return nbytes


def _longest(data: Data, dictionary: tuple[int, int, int], codec: str) -> int:
    """Return the bytes of the longest string in the page of a dictionary: (offset, bytes, bytes unpacked)."""
    at, packed, unpacked = dictionary
    page = bytes(data[at : at + packed])
    if codec != "UNCOMPRESSED":
        page = pa.Codec(codec.lower()).decompress(page, unpacked).to_pybytes()
    longest = at = 0
    while at < len(page):
        length = int.from_bytes(page[at : at + 4], "little")
        at += 4 + length
        longest = max(longest, length)
    return longest


# ---- values


def all_true(values: pa.ChunkedArray) -> bool:
    """Return whether all values that are not null are true."""
    return pc.all(values).as_py() is not False


def all_hex(values: pa.ChunkedArray, digits: int = 64) -> bool:
    """Return whether all strings that are not null are this many hex digits in lower case."""
    return all_true(pc.match_substring_regex(values, rf"\A[0-9a-f]{{{digits}}}\z"))


# ---- Thrift's compact protocol

_NOTHING: dict[int, Any] = {}


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Return the fields of a struct by number, and where it ends.

    Raises:
        ValueError: a value is of no known kind, or too long.
        IndexError: the data end before the struct does.
    """
    if depth > _MOST_DEPTH:
        raise ValueError("nested too deeply")
    head = data[at]
    at += 1
    if not head:
        return _NOTHING, at
    fields: dict[int, Any] = {}
    number = 0
    while head:
        if head < 16:
            raise ValueError("a field without its number")
        number += head >> 4
        kind = head & 15
        if 4 <= kind <= 6:  # an integer
            value = data[at]
            at += 1
            if value > 127:
                value, at = _varint(data, at - 1)
            fields[number] = (value >> 1) ^ -(value & 1)
        elif kind == 8:  # bytes
            fields[number], at = _bytes(data, at)
        elif kind == 12:
            fields[number], at = _struct(data, at, depth + 1)
        elif kind == 9:
            fields[number], at = _list(data, at, depth + 1)
        elif kind <= 2:  # the kind is the value
            fields[number] = kind == 1
        elif kind == 3:
            fields[number] = data[at]
            at += 1
        else:
            raise ValueError(f"a field of kind {kind}")
        head = data[at]
        at += 1
    return fields, at


def _list(data: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    """Return the items of a list, and where it ends; arguments and errors are those of `_struct`."""
    head = data[at]
    at += 1
    count, kind = head >> 4, head & 15
    if count == 15:
        count, at = _varint(data, at)
    if count > min(_MOST_ITEMS, len(data) - at):
        raise ValueError(f"a list of {count:,} items")
    items: list[Any] = []
    for _ in range(count):
        item: Any
        if kind == 12:
            item, at = _struct(data, at, depth)
        elif 4 <= kind <= 6:
            item, at = _varint(data, at)
            item = (item >> 1) ^ -(item & 1)
        elif kind == 8:
            item, at = _bytes(data, at)
        elif 1 <= kind <= 2:
            item, at = data[at] == 1, at + 1
        else:
            raise ValueError(f"a list of kind {kind}")
        items.append(item)
    return items, at


def _bytes(data: bytes, at: int) -> tuple[bytes, int]:
    """Return a string of bytes, and where it ends."""
    length, at = _varint(data, at)
    end = at + length
    if end > len(data):
        raise ValueError("it ends early")
    return data[at:end], end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return an unsigned number of at most 64 bits, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


# ---- headers of pages

Page = tuple[int, ...]
"""Kind, bytes unpacked, bytes, values, encoding."""

# A space has thousands of commits with seven pages each, and `_struct` takes 0.4 us for each number. So what
# parquet-cpp writes is matched as a whole: V is a number, S is one below 64.
_NUMBERS = {b"V": rb"[\x80-\xff]{0,9}[\x00-\x7f]", b"S": rb"[\x00-\x7f]"}
_OF_DATA = (
    rb"\x15\x00\x15(V)\x15(V)(?:\x15V\x1c|\x2c)\x15(V)\x15(S)\x15\x06\x15\x06(?:\x1c\x00)?\x00\x00"
)
_OF_DICTIONARY = rb"\x15\x04\x15(V)\x15(V)(?:\x15V\x3c|\x4c)\x15(V)\x15(S)[\x11\x12]?\x00\x00"
_match_data, _match_dictionary = (
    re.compile(text.replace(b"V", _NUMBERS[b"V"]).replace(b"S", _NUMBERS[b"S"])).match
    for text in (_OF_DATA, _OF_DICTIONARY)
)


def _page(data: Data, at: int) -> tuple[Page, int]:
    """Return what the header of the page at `at` of a file says, and where it ends."""
    if found := _match_data(data, at):
        return (_DATA_PAGE, *map(_integer, found.groups())), found.end()
    if found := _match_dictionary(data, at):
        return (_DICTIONARY_PAGE, *map(_integer, found.groups())), found.end()
    header, end = _struct(data[at : at + _PAGE_HEADER_BYTES], 0)
    which = {_DATA_PAGE: 5, _DICTIONARY_PAGE: 7}.get(header[1])
    if which is None or which not in header or header.keys() & ({5, 6, 7, 8} - {which}):
        raise ValueError(f"a page is of kind {header[1]}")
    inner = header[which]
    if which == 5 and not inner[3] == inner[4] == _RLE:
        raise ValueError("a page has levels of another encoding")
    return (header[1], header[2], header[3], inner[1], inner[2]), at + end


def _integer(data: bytes) -> int:
    """Return a signed number."""
    if len(data) == 1:
        value = data[0]
    elif len(data) == 2:
        value = data[0] & 127 | data[1] << 7
    else:
        value, _ = _varint(data, 0)
    return (value >> 1) ^ -(value & 1)
