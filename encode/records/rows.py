"""Rows of CSV, TSV and Parquet files as lines of records."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from encode.records.account import Account, FaultError
from encode.records.keys import is_known
from encode.records.record import Line
from encode.records.strict_json import MAX_BYTES, parse

BATCH = 1000
"""Rows of a Parquet file in memory."""


class _Lines:
    """The lines of a file as text, with the number of bytes and lines read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.offset = 0
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(MAX_BYTES + 1):
            if len(line) > MAX_BYTES:
                raise FaultError("too large", f"a line of more than {MAX_BYTES >> 20} MiB")
            self.offset += len(line)
            self.count += 1
            try:
                yield line.decode("utf-8-sig" if self.count == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise FaultError("not UTF-8", f"not UTF-8 (byte {error.start + 1:,})") from None


def read_table(file: BinaryIO, path: Path, account: Account) -> Iterator[Line]:
    """Yield the rows of a CSV or TSV file, whose first row has the names of the columns.

    All cells are text, and an empty cell is absent. A cell that starts with a bracket in a column of lists is
    JSON. The delimiter is a tab for .tsv; otherwise it is the one among comma, semicolon and tab that occurs
    most often in the first line.
    """
    # The limit is one for the whole process. `data:` URIs are longer than its default.
    csv.field_size_limit(MAX_BYTES)
    start = file.readline(1 << 20).decode("utf-8", "replace")
    file.seek(0)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=start.count)
    lines = _Lines(file)
    rows = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    columns: list[str] | None = None
    while True:
        offset, number = lines.offset, lines.count + 1
        where = f"{path}:{number}"
        try:
            row = next(rows)
            if columns is None:
                if any(row):
                    columns = _header(row)
            elif row:
                value = _row(columns, row)
                length = lines.offset - offset
                yield Line(where=where, value=value, offset=offset, length=length)
        except StopIteration:
            return
        except csv.Error as error:
            # The reader cannot say where the next row starts.
            message = f"not CSV: {error}; the rest of the file is not read"
            account.fault(where, FaultError("not CSV", message))
            return
        except FaultError as fault:
            account.fault(where, fault)
            if columns is None or fault.kind in ("not UTF-8", "too large"):
                return


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
        if cell[0] in "[{" and is_known(name, lists=True):
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


def read_parquet(path: Path, account: Account) -> Iterator[Line]:
    """Yield the rows of a Parquet file that has no bytes of media."""
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield Line(where=f"{path}:{number}", value=value)
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        account.fault(f"{path}:{number + 1}", FaultError("not Parquet", f"not Parquet: {reason}"))
