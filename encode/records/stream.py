"""Read a file of records, object by object: JSON Lines, JSON, CSV, TSV, Parquet.

    for line in read_lines(Path("photos/metadata.jsonl"), account):
        line.where, line.value                  # "photos/metadata.jsonl:7", {"image": "a.jpg", ...}

What a JSON file contains is seen from its bytes: one object a line, one list of objects, one or several
objects that span lines, or one object around a list (`encode.records.one_object`). Memory holds one object
and one block of the file (COCO: the captions too). An object that cannot be read is a fault, and reading goes
on behind it.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cache.format.gate import open_regular
from configs import UserError
from encode.records.account import Account, FaultError
from encode.records.json_window import BOM, MOST_SKIPPED, REST, Piece, Window, elements
from encode.records.keys import LISTS, is_known
from encode.records.one_object import as_object, find_sections, read_sections
from encode.records.record import Line
from encode.records.strict_json import MAX_BYTES, find_end, parse

SUFFIXES = frozenset({".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"})
"""Suffixes of the files that `read_lines` reads."""
_SPACE = b" \t\r\n"
_HEADER = 1 << 20
"""Bytes of the first line of a table, at most."""
BATCH = 1000
"""Rows of a Parquet file in memory."""


def read_lines(path: Path, account: Account) -> Iterator[Line]:
    """Yield the objects of a file in order; count in `account` those that cannot be read.

    The suffix says whether the file is CSV, TSV or Parquet. A file of another suffix is a table, too, if its
    first line names a column that is known, beside others. All other files are read as JSON.

    Raises:
        UserError: the file cannot be opened or read.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet(path, account)
            return
        with open_regular(path) as file:
            if suffix in (".csv", ".tsv") or is_table(file):
                yield from _table(file, path, account)
                return
            sections, lines = find_sections(file), None
            if sections is not None:
                lines = read_sections(file, str(path), sections, account)
            yield from _read(_pieces(file), path, account) if lines is None else lines
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read(pieces: Iterator[Piece], path: Path, account: Account) -> Iterator[Line]:
    for piece in pieces:
        where = f"{path}:{piece.line}"
        try:
            value = as_object(piece)
        except FaultError as fault:
            account.fault(where, fault)
            continue
        yield Line(where=where, value=value, offset=piece.offset, length=len(piece.data))


def _pieces(file: BinaryIO) -> Iterator[Piece]:
    window = Window(file)
    if window.peek(2) in (b"\xff\xfe", b"\xfe\xff"):
        fault = FaultError(REST, "not UTF-8 but UTF-16; save the file as UTF-8")
        yield Piece(b"", 0, 1, fault)
    elif window.skip_space() == b"[":
        window.at += 1
        yield from elements(window)
        if window.skip_space():
            fault = FaultError(
                REST, "not JSON: text behind the list; the rest of the file is not read"
            )
            yield Piece(b"", window.offset, window.line, fault)
    else:
        yield from _json_lines(file)


def _json_lines(file: BinaryIO) -> Iterator[Piece]:
    """Yield one piece for each line, or for an object that goes on in the lines after it.

    After a broken object of several lines, reading goes on at the next line that starts with a brace and is
    not indented further than the object. The fault says which lines that leaves out.
    """
    file.seek(0)
    offset, number = 0, 0
    broken: _Broken | None = None
    while line := file.readline(MAX_BYTES + 1):
        number += 1
        start, size = offset, len(line)
        fault = None
        if size > MAX_BYTES and not line.endswith(b"\n"):
            fault = _too_long()
            line = b""
            rest = _skip_line(file)
            if rest is None:
                yield Piece(b"", start, number, _endless())
                return
            size += rest
        offset += size
        if number == 1 and line.startswith(BOM):
            line, start = line[len(BOM) :], len(BOM)
        data = line.lstrip(_SPACE)
        indent = line[: len(line) - len(data)]
        start += len(indent)
        data = data.rstrip(_SPACE)
        if broken is not None:
            if not (data.startswith(b"{") and len(indent) <= len(broken.indent)):
                broken.last = number if data else broken.last
                continue
            yield broken.piece()
            broken = None
        if data[:1] == b"{" and not fault and _goes_on(data, file):
            window = Window(file, offset=start, line=number)
            try:
                piece = window.piece()
                if piece.fault:
                    raise piece.fault
                parse(piece.data, number)  # if it is broken, it may have taken others in
            except FaultError as error:
                broken = _Broken(indent, start, number, number, error)
                file.seek(offset)
                continue
            offset, number = window.offset, window.line
            file.seek(offset)
            rest_of_line = file.readline(MAX_BYTES + 1)
            if rest_of_line.strip(_SPACE):
                number -= 1  # the next line of this loop is the rest of this one
                file.seek(offset)
            else:
                offset += len(rest_of_line)
            yield piece
        elif data or fault:
            yield Piece(data, start, number, fault)
    if broken is not None:
        yield broken.piece()


@dataclass
class _Broken:
    """An object of several lines that cannot be read."""

    indent: bytes
    """White space before its first brace."""
    offset: int
    """Where it starts in the file, in bytes."""
    first: int
    """Number of its first line."""
    last: int
    """Number of the last line that is not read because of it."""
    fault: FaultError
    """What is wrong with it."""

    def piece(self) -> Piece:
        """Return it as a piece whose fault names all of its lines."""
        fault = self.fault
        if self.last > self.first:
            text = f"{fault}; lines {self.first} to {self.last} are not read"
            fault = FaultError(fault.kind, text)
        return Piece(b"", self.offset, self.first, fault)


def _too_long() -> FaultError:
    return FaultError("too large", f"a line of more than {MAX_BYTES >> 20} MiB")


def _endless() -> FaultError:
    text = f"a line of more than {MOST_SKIPPED >> 20} MiB; the rest of the file is not read"
    return FaultError(REST, text)


def _skip_line(file: BinaryIO) -> int | None:
    """Read to the end of the line; return the number of bytes, None if they are more than MOST_SKIPPED."""
    size = 0
    while rest := file.readline(1 << 20):
        size += len(rest)
        if rest.endswith(b"\n"):
            break
        if size > MOST_SKIPPED:
            return None
    return size


def _goes_on(data: bytes, file: BinaryIO) -> bool:
    """Return whether the object that starts in a line ends in a later one. `file` is behind the line."""
    if data.endswith(b"}") and data.count(b"{") == data.count(b"}"):
        return False
    try:
        if find_end(data, 0) is not None:
            return False
    except FaultError:
        return False
    place = file.tell()
    following = file.readline(2)
    file.seek(place)
    # Within an object a key comes next, which a brace cannot start: that is the next object.
    return following[:1] not in (b"{", b"")


# ---- CSV, TSV, Parquet


class _Lines:
    """The lines of a file as text, with the number of bytes and lines read, and what is wrong with them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.offset = 0
        self.count = 0
        self.fault: FaultError | None = None

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(MAX_BYTES + 1):
            self.count += 1
            self.offset += len(line)
            if len(line) > MAX_BYTES and not line.endswith(b"\n"):
                rest = _skip_line(self._file)
                self.fault = _endless() if rest is None else _too_long()
                if rest is None:
                    yield "\n"
                    return
                self.offset += rest
                line = b"\n"
            if self.count == 1:
                line = line.removeprefix(BOM)
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                self.fault = FaultError("not UTF-8", f"not UTF-8 (byte {error.start + 1:,})")
                yield line.decode(errors="replace")


def is_table(file: BinaryIO) -> bool:
    """Return whether the first line of a file is the header of a table: names of columns, one of them known.

    The position is then at the beginning of the file.
    """
    file.seek(0)
    start = file.readline(_HEADER).removeprefix(BOM).decode("utf-8", "replace").strip()
    file.seek(0)
    names = [name.strip() for name in start.split(_delimiter(start))]
    return start[:1] not in ("{", "[") and len(names) > 1 and any(map(is_known, names))


def _delimiter(header: str) -> str:
    return max(",;\t|", key=header.count)


def _table(file: BinaryIO, path: Path, account: Account) -> Iterator[Line]:
    """Yield the rows of a CSV or TSV file, whose first row has the names of the columns.

    All cells are text, and an empty cell is absent. A cell that starts with a bracket in a column of lists is
    JSON. The delimiter is a tab for .tsv; otherwise it is the one among comma, semicolon, tab and bar that
    occurs most often in the first line.
    """
    # The limit is one for the whole process. `data:` URIs are longer than its default.
    csv.field_size_limit(MAX_BYTES)
    start = file.readline(_HEADER).decode("utf-8", "replace")
    file.seek(0)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(start)
    lines = _Lines(file)
    rows = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    while True:
        number = lines.count + 1
        where = f"{path}:{number}"
        lines.fault = None
        try:
            row = next(rows)
            if lines.fault:
                raise lines.fault
            if columns is None:
                if any(row):
                    columns = _header(row)
            elif row:
                yield Line(where=where, value=_row(columns, row))
        except StopIteration:
            return
        except csv.Error as error:
            # Reading goes on at the next line, unless a quote without an end took all of them.
            at_end = lines.offset == os.fstat(file.fileno()).st_size and lines.count > number
            kind = REST if at_end else "not CSV"
            account.fault(where, FaultError(kind, f"not CSV: {error}"))
        except FaultError as fault:
            if columns is None:  # then no row can be read
                account.fault(where, FaultError(REST, f"{fault}; the file is not read"))
                return
            account.fault(where, fault)


def _header(row: list[str]) -> list[str]:
    columns = [name.strip() for name in row]
    if twice := [name for name, times in Counter(columns).items() if times > 1 and name]:
        raise FaultError("duplicate key", f"two columns named {twice[0]!r}")
    if not any(is_known(name) for name in columns):
        found = ", ".join(columns)[:80]
        raise FaultError("no header", f"the first line names no known column ({found})")
    return columns


def _row(columns: list[str], row: list[str]) -> dict[str, Any]:
    if len(row) != len(columns):
        raise FaultError(
            "number of cells",
            f"{len(row)} cells for {len(columns)} columns; quote cells with commas",
        )
    value: dict[str, Any] = {}
    for name, cell in zip(columns, row, strict=True):
        if not cell:
            continue
        if cell[0] in "[{" and name in LISTS:
            value[name] = parse(cell.encode("utf-8", "surrogatepass"))
        elif name == "weight":
            value[name] = _number(cell)
        else:
            value[name] = cell
    return value


def _number(cell: str) -> Any:
    try:
        return float(cell)
    except ValueError:
        return cell


def _parquet(path: Path, account: Account) -> Iterator[Line]:
    """Yield the rows of a Parquet file that has no bytes of media."""
    number = 0
    with open_regular(path) as opened:
        try:
            file = pq.ParquetFile(opened)
            for batch in file.iter_batches(batch_size=BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield Line(where=f"{path}:{number}", value=value)
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            fault = FaultError(REST, f"not Parquet: {reason}; the rest of the file is not read")
            account.fault(f"{path}:{number + 1}", fault)
