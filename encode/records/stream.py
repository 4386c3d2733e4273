"""Read a file of records, object by object: JSON Lines, JSON, CSV, TSV, Parquet.

    for line in read_lines(Path("photos/metadata.jsonl"), account):
        line.where, line.value                  # "photos/metadata.jsonl:7", {"image": "a.jpg", ...}

What a JSON file contains is seen from its bytes: one object a line, one list of objects, one or several
objects that span lines, or COCO captions. Memory holds one object and one block of the file (COCO: the
captions too). An object that cannot be read is a fault, and reading goes on behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from configs import UserError
from encode.records.account import Account, FaultError
from encode.records.coco import as_object, find_sections, read_coco
from encode.records.json_window import BOM, Piece, Window, elements, objects
from encode.records.record import Line
from encode.records.rows import read_parquet, read_table
from encode.records.strict_json import MAX_BYTES

SUFFIXES = frozenset({".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"})
"""Suffixes of the files that `read_lines` reads."""


def read_lines(path: Path, account: Account) -> Iterator[Line]:
    """Yield the objects of a file in order; count in `account` those that cannot be read.

    The suffix says whether the file is CSV, TSV or Parquet. All other files are read as JSON.

    Raises:
        UserError: the file cannot be opened or read.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from read_parquet(path, account)
            return
        with path.open("rb") as file:
            if suffix in (".csv", ".tsv"):
                yield from read_table(file, path, account)
            elif (sections := find_sections(file)) is not None:
                yield from read_coco(file, str(path), sections, account)
            else:
                yield from _read(_pieces(file), path, account)
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
        fault = FaultError("not UTF-8", "not UTF-8 but UTF-16; save the file as UTF-8")
        yield window.broken(fault)
    elif window.skip_space() == b"[":
        window.at += 1
        yield from elements(window)
        if window.skip_space():
            yield window.broken(FaultError("not JSON", "not JSON: text behind the list"))
    elif _spans_lines(file):
        yield from objects(Window(file))
    else:
        yield from _json_lines(file)


def _spans_lines(file: BinaryIO) -> bool:
    """Return whether the first object of a file goes on in its second line."""
    window = Window(file)
    if window.skip_space() != b"{":
        return False
    start = window.offset
    try:
        several = b"\n" in window.piece().data
    except FaultError:
        several = True
    if not several:
        return False
    file.seek(start)
    file.readline(MAX_BYTES)
    # In an object that spans lines, the second line has a key, which a brace cannot start.
    return file.readline(MAX_BYTES)[:1] != b"{"


def _json_lines(file: BinaryIO) -> Iterator[Piece]:
    file.seek(0)
    offset, number = 0, 0
    while line := file.readline(MAX_BYTES + 1):
        number += 1
        start, size = offset, len(line)
        fault = None
        if size > MAX_BYTES and not line.endswith(b"\n"):
            fault = FaultError("too large", f"a line of more than {MAX_BYTES >> 20} MiB")
            line = b""
            while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                size += len(rest)
            size += len(rest)
        offset += size
        if number == 1 and line.startswith(BOM):
            line, start = line[len(BOM) :], len(BOM)
        data = line.lstrip(b" \t\r\n")
        start += len(line) - len(data)
        data = data.rstrip(b" \t\r\n")
        if data or fault:
            yield Piece(data, start, number, fault)
