"""Name and read media inside other files: a table, a tar, or a line of JSON.

    parquet:/data/train.parquet#image:17            row 17 of the column `image`
    arrow:/data/data-00000-of-00002.arrow#images:17:0   item 0 of the list in row 17
    tar:/data/000.tar#1536+20480:000000001.jpg      20480 bytes at offset 1536, and the member's name
    json:/data/chat.jsonl#0+9120:1                  data: URI 1 of the object in the first 9120 bytes

Such a name is the source of a media item, as paths and URLs are. Rows and items are counted from 0. In the
path of the container, `%`, `#`, control characters and bytes that are not UTF-8 are percent-encoded. In the
name of a column, `:` is too.

    source = member_source("/data/000.tar", 1536, 20480, "000000001.jpg")
    data = read_embedded(source, max_bytes=1 << 30)

Nothing that a name or a container states is trusted: sizes are compared with the limit and with the
container before memory is allocated.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import stat
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote, unquote_to_bytes

from cache.errors import EmbeddedMediaError
from cache.format.embedded.rows import TABLES, read_cell

PREFIXES = ("parquet:/", "arrow:/", "tar:/", "json:/")
"""First characters of every such name. A path begins with `/`, a URL with its scheme and `//`."""

MAX_JSON_BYTES = 1 << 30
"""Bytes of the largest JSON object that is parsed for its data: URIs."""

MAX_JSON_TEXT = 64 << 20
"""Bytes of text that a JSON object may have beside its data: URIs."""

_NOT_PLAIN = re.compile("[%#\x00-\x1f\x7f\udc80-\udcff]")
_NOT_PLAIN_IN_COLUMN = re.compile("[%#:\x00-\x1f\x7f\udc80-\udcff]")
_SOURCE = re.compile(r"(parquet|arrow|tar|json):(/[^#]*)#(.*)", re.DOTALL)
_CELL = re.compile(r"([^:]*):(\d{1,18})(?::(\d{1,18}))?")
_MEMBER = re.compile(r"(\d{1,18})\+(\d{1,18}):(.*)", re.DOTALL)
_DATA_URI_PLACE = re.compile(r"(\d{1,18})\+(\d{1,18}):(\d{1,9})")
_DATA_URI = re.compile(r"data:([^,\s]{0,200}),", re.IGNORECASE)


class Place(NamedTuple):
    """Where the bytes of one embedded media item are."""

    format: str
    """parquet, arrow, tar or json."""
    container: str
    """Absolute path of the file that contains them."""
    column: str = ""
    """Of a table: the name of the column."""
    row: int = 0
    """Of a table: the row in the file, from 0."""
    item: int | None = None
    """Of a table: the item in the list of this row, from 0; None if the column has no lists. Of JSON: the
    data: URI in the object, from 0, in document order."""
    offset: int = 0
    """Of a tar: the first byte of the member. Of JSON: the first byte of the object."""
    size: int = 0
    """Of a tar: bytes of the member. Of JSON: bytes of the object."""
    member: str = ""
    """Of a tar: name of the member."""


def row_source(
    table_format: str, path: str, column: str, row: int, index: int | None = None
) -> str:
    """Return the name of bytes in a table; `table_format` is `parquet` or `arrow`."""
    item = "" if index is None else f":{index}"
    return f"{table_format}:{_quoted(path)}#{_quoted_column(column)}:{row}{item}"


def member_source(path: str, offset: int, size: int, member: str) -> str:
    """Return the name of a member of a tar: `size` bytes at `offset`."""
    return f"tar:{_quoted(path)}#{offset}+{size}:{_NOT_PLAIN.sub(_escape, member)}"


def data_uri_source(path: str, offset: int, length: int, number: int) -> str:
    """Return the name of data: URI `number` of the JSON object in the `length` bytes at `offset`."""
    return f"json:{_quoted(path)}#{offset}+{length}:{number}"


def is_embedded(source: str) -> bool:
    """Return whether a source names bytes inside another file, rather than a file or a URL."""
    return source.startswith(PREFIXES)


def container_of(source: str) -> str:
    """Return the path of the file that contains an embedded media item."""
    quoted = source[source.index(":") + 1 :].partition("#")[0]
    return unquote(quoted, errors="surrogateescape") if "%" in quoted else quoted


def in_container(source: str, path: str) -> str:
    """Return the name of the same place in the file at another path, for one without links."""
    return f"{source[: source.index(':')]}:{_quoted(path)}#{source.partition('#')[2]}"


def parse(source: str) -> Place:
    """Return the parts of a source.

    Raises:
        EmbeddedMediaError: it is no name of embedded bytes.
    """
    whole = _SOURCE.fullmatch(source)
    if whole is not None:
        kind, place = whole[1], whole[3]
        container = container_of(source)
        if kind in TABLES and (cell := _CELL.fullmatch(place)):
            index = None if cell[3] is None else int(cell[3])
            return Place(kind, container, unquote(cell[1]), int(cell[2]), index)
        if kind == "tar" and (found := _MEMBER.fullmatch(place)):
            name = unquote(found[3], errors="surrogateescape")
            return Place(kind, container, offset=int(found[1]), size=int(found[2]), member=name)
        if kind == "json" and (found := _DATA_URI_PLACE.fullmatch(place)):
            offset, size, number = map(int, found.groups())
            return Place(kind, container, item=number, offset=offset, size=size)
    raise EmbeddedMediaError("no name of embedded media")


def read_embedded(source: str, max_bytes: int) -> bytes:
    """Return the bytes of an embedded media item. Threads may call it at the same time.

    The rows of a column are read fastest in their order: a pass then reads the column once.

    Raises:
        EmbeddedMediaError: there is no such container or place in it, the place has no bytes, or more than
            `max_bytes`.
    """
    place = parse(source)
    if place.format in TABLES:
        found = read_cell(*place[:5], max_bytes)
        if isinstance(found, bytes):
            return found
        is_uri = found[:5].lower() == "data:"
        return (decode_data_uri if is_uri else decode_base64)(found, max_bytes)
    if place.format == "tar":
        return _read_member(place, max_bytes)
    return _read_data_uri(place, max_bytes)


# ---- data: URIs


def data_uris(value: Any) -> Iterator[str]:
    """Yield the data: URIs among the strings of a JSON value, in document order."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            if _DATA_URI.match(one):
                yield one
        elif isinstance(one, list):
            waiting.extend(reversed(one))
        elif isinstance(one, dict):
            waiting.extend(reversed(one.values()))


def decode_data_uri(text: str, max_bytes: int) -> bytes:
    """Return the bytes of a data: URI.

    Raises:
        EmbeddedMediaError: it is none, its base64 is damaged, or it has more than `max_bytes`.
    """
    head = _DATA_URI.match(text)
    if head is None:
        raise EmbeddedMediaError("not a data: URI")
    body = text[head.end() :]
    if head[1].lower().endswith(";base64"):
        return decode_base64(body, max_bytes)
    if len(body) > 3 * max_bytes:
        raise EmbeddedMediaError(f"more than {max_bytes} bytes")
    data = unquote_to_bytes(body)
    if len(data) > max_bytes:
        raise EmbeddedMediaError(f"{len(data)} bytes, more than {max_bytes}")
    return data


def decode_base64(text: str, max_bytes: int) -> bytes:
    """Return the bytes of base64 with any line breaks, and with or without its padding.

    Raises:
        EmbeddedMediaError: it is damaged, or has more than `max_bytes`.
    """
    if len(text) > 2 * max_bytes + 64:
        raise EmbeddedMediaError(f"more than {max_bytes} bytes")
    plain = "".join(unquote(text).split()).rstrip("=")
    try:
        data = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise EmbeddedMediaError("damaged base64") from None
    if len(data) > max_bytes:
        raise EmbeddedMediaError(f"{len(data)} bytes, more than {max_bytes}")
    return data


# ---- reading


def _read_member(place: Place, max_bytes: int) -> bytes:
    """Return the bytes of a tar's member, after checking that its header precedes them."""
    before = tarfile.BLOCKSIZE
    if place.size > max_bytes:
        raise EmbeddedMediaError(f"{place.size} bytes, more than {max_bytes}")
    if place.offset < before:
        raise EmbeddedMediaError("no member of a tar begins here")
    header, data = _read_parts(
        place.container, (place.offset - before, before), (place.offset, place.size)
    )
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        found = None
    # A pax header may state the size of a large member instead.
    if found is None or not found.isreg() or found.size not in (0, place.size):
        raise EmbeddedMediaError("the tar has another member here: it has changed")
    return data


def _read_data_uri(place: Place, max_bytes: int) -> bytes:
    assert place.item is not None, "parse sets it"
    if place.size > min(MAX_JSON_BYTES, 8 * max_bytes + MAX_JSON_TEXT):
        raise EmbeddedMediaError(f"a JSON object of {place.size} bytes")
    (data,) = _read_parts(place.container, (place.offset, place.size))
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise EmbeddedMediaError("no JSON object here: the file has changed") from None
    for number, uri in enumerate(data_uris(value)):
        if number == place.item:
            return decode_data_uri(uri, max_bytes)
    raise EmbeddedMediaError(f"the object has no data: URI {place.item}: the file has changed")


def _read_parts(path: str, *parts: tuple[int, int]) -> list[bytes]:
    """Return the bytes of a file at each (offset, size)."""
    try:
        # O_NONBLOCK: opening a named pipe would wait for a writer forever.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise EmbeddedMediaError(_reason(error)) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise EmbeddedMediaError("not a regular file")
        found = []
        for offset, size in parts:
            if offset + size > status.st_size:
                raise EmbeddedMediaError(
                    f"bytes {offset} to {offset + size} of a file of {status.st_size}: it is cut short"
                )
            found.append(os.pread(fd, size, offset))  # at most 2 GiB: callers bound the size
            if len(found[-1]) < size:
                raise EmbeddedMediaError("the file changes while it is read")
        return found
    except OSError as error:
        raise EmbeddedMediaError(_reason(error)) from None
    finally:
        os.close(fd)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return getattr(error, "strerror", None) or str(error)


def _escape(found: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in found[0].encode(errors="surrogateescape"))


@lru_cache(maxsize=256)
def _quoted(path: str) -> str:
    return _NOT_PLAIN.sub(_escape, path)


@lru_cache(maxsize=256)
def _quoted_column(column: str) -> str:
    return _NOT_PLAIN_IN_COLUMN.sub(_escape, column)
