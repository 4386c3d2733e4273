"""The part of a JSON file that is in memory, and the objects in it, one after the other.

    window = Window(file)
    for piece in elements(window): ...        # behind `[`: the elements of a list
    piece = window.piece()                    # the value at the position

Memory holds one object and one block of the file. A broken object is a `Piece` with a fault. Reading goes on
behind it if its end is certain, or else at the next line that starts as its line did. If there is none, the
fault says that the rest of the file is not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from encode.records.account import FaultError
from encode.records.strict_json import MAX_BYTES, check_depth, find_end

BLOCK = 1 << 20
"""Bytes read at once, at least."""
BOM = b"\xef\xbb\xbf"

_SPACE = re.compile(rb"[ \t\r\n]*+")
_SCALAR = re.compile(rb'"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"|[^\s,\[\]{}":]++')
REST = "rest of a file"
"""Kind of a fault behind which a file is not read."""
MOST_SKIPPED = 256 << 20
"""Bytes behind a fault in which the next line or object is looked for."""
_INDENT = 256
"""Spaces before an object in its line, at most, to find others like it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes of one value, or what is wrong with them."""

    data: bytes
    offset: int
    """Where it starts in the file, in bytes."""
    line: int
    """Number of the line in which it starts, from 1."""
    fault: FaultError | None = None


class Window:
    """A block of a file, and a position in it."""

    def __init__(self, file: BinaryIO, *, offset: int = 0, line: int = 1) -> None:
        file.seek(offset)
        self._file = file
        self._base = offset  # of data[0] in the file
        self._counted = 0  # line breaks before this position of data are in _line
        self._line = line
        self.data = b""
        self.at = 0
        """Position in `data`."""
        self.indent: bytes | None = None
        """White space before the position in its line; None if there is something else before it."""
        self.last = False
        """Whether `data` ends where the file ends."""
        if offset == 0 and self.peek(len(BOM)) == BOM:
            self.at = len(BOM)

    @property
    def offset(self) -> int:
        """Position in the file, in bytes."""
        return self._base + self.at

    @property
    def line(self) -> int:
        """Number of the line at the position."""
        self._line += self.data.count(b"\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def more(self) -> bool:
        """Read on, and forget what is before the position; False at the end of the file."""
        if self.last:
            return False
        _ = self.line
        kept = self.data[self.at :]
        # As much again, so that a long object is searched for its end a few times only.
        block = self._file.read(max(BLOCK, len(kept)))
        self._base += self.at
        self.data, self.at, self._counted = kept + block, 0, 0
        self.last = not block
        return not self.last

    def peek(self, size: int = 1) -> bytes:
        """Return the next bytes: fewer at the end of the file."""
        while len(self.data) - self.at < size and self.more():
            pass
        return self.data[self.at : self.at + size]

    def skip_space(self) -> bytes:
        """Move to the next byte that is not white space, and return it; empty at the end of the file."""
        space = b""
        while True:
            match = _SPACE.match(self.data, self.at)
            assert match is not None
            space = (space + match.group())[-_INDENT:]
            self.at = match.end()
            if self.at < len(self.data) or not self.more():
                _, line_break, indent = space.rpartition(b"\n")
                self.indent = indent if line_break else None
                return self.data[self.at : self.at + 1]

    def skip_object(self) -> bool:
        """Move to the next line that starts as the line of the position does, with an object.

        Returns:
            False if there is none; the position is then at the end of the file.
        """
        start = b"" if self.indent is None else b"\n" + self.indent + b"{"
        most = self.offset + MOST_SKIPPED
        while start and self.offset < most:
            found = self.data.find(start, self.at + 1)
            if found >= 0:
                self.at = found + len(start) - 1
                return True
            self.at = max(self.at, len(self.data) - len(start))
            if not self.more():
                break
        self.finish()
        return False

    def piece(self) -> Piece:
        """Return the value at the position, and move behind it.

        Raises:
            FaultError: its end is not certain. The position is then where the value starts.
        """
        line = self.line
        while not (found := self._end()):
            if len(self.data) - self.at > MAX_BYTES:
                raise FaultError("too large", f"a value of more than {MAX_BYTES >> 20} MiB")
            if self.last:
                raise _fault("a value without an end")
            self.more()
        end, depth = found
        start, offset = self.at, self.offset
        self.at = end
        try:
            if end - start > MAX_BYTES:
                raise FaultError("too large", f"a value of more than {MAX_BYTES >> 20} MiB")
            check_depth(depth)
        except FaultError as fault:
            return Piece(b"", offset, line, fault)
        return Piece(self.data[start:end], offset, line)

    def _end(self) -> tuple[int, int] | None:
        """Return the end of the value at the position, and its depth; None if it is not in memory.

        Raises:
            FaultError: there is no value, or its end is not certain.
        """
        first = self.data[self.at : self.at + 1]
        if first in (b"[", b"{"):
            return find_end(self.data, self.at, last=self.last)
        match = _SCALAR.match(self.data, self.at)
        if match and (match.end() < len(self.data) or self.last):
            return match.end(), 0
        if match or not first or (first == b'"' and self.data.find(b"\n", self.at) < 0):
            return None
        raise _fault(f"{first.decode('latin-1')!r} instead of a value")

    def broken(self, fault: FaultError) -> Piece:
        """Return a piece for a fault at the position, and move to the next object that is certain."""
        offset, line = self.offset, self.line
        if self.skip_object():
            fault = FaultError(fault.kind, f"{fault}; reading goes on at line {self.line:,}")
        else:
            fault = FaultError(REST, f"{fault}; the rest of the file is not read")
        return Piece(b"", offset, line, fault)

    @property
    def finished(self) -> bool:
        """Whether the position is at the end of the file."""
        return self.last and self.at == len(self.data)

    def finish(self) -> None:
        """Move to the end of the file."""
        self.at = len(self.data)
        self.last = True


def elements(window: Window) -> Iterator[Piece]:
    """Yield the elements of a list; the position is behind its `[`, and then behind its `]`."""
    comma = True  # a value may follow
    first = True
    while True:
        byte = window.skip_space()
        if byte == b"]":
            if comma and not first:
                yield Piece(
                    b"", window.offset, window.line, _fault("a comma before the end of a list")
                )
            window.at += 1
            return
        if not byte:
            yield Piece(b"", window.offset, window.line, _fault("a list without an end"))
            return
        if byte == b",":
            if comma:
                yield Piece(b"", window.offset, window.line, _fault("a comma without a value"))
            comma = True
            window.at += 1
            continue
        if not comma:
            yield Piece(b"", window.offset, window.line, _fault("no comma between two values"))
        try:
            yield window.piece()
        except FaultError as fault:
            yield window.broken(fault)
            comma, first = True, False
            if window.finished:
                return
            continue
        comma = first = False


def _fault(what: str) -> FaultError:
    return FaultError("not JSON", f"not JSON: {what}")
