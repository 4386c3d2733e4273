"""A terminal for tests: a pseudo-terminal, and a model of what its window shows.

with Terminal(columns=80) as terminal:
    print("a", file=terminal.stream)
    terminal.screen().text()        # ["a"]
    terminal.resize(40)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import termios
from types import TracebackType
from typing import Self, TextIO

from configs.console import columns_of

_TOKEN = re.compile(r"\x1b\[(\d*)([AJKm])|([\r\n])|([^\x00-\x1f\x7f])|(\Z|.)", re.DOTALL)


class Screen:
    """A window of a terminal: what a person sees after some output. An unknown sequence is an error."""

    def __init__(self, columns: int = 80, lines: int = 24) -> None:
        self.columns, self.lines = columns, lines
        self.cells: list[list[str]] = [[]]
        """Every line that was ever written, those above the window too. A wide character fills two cells."""
        self.row = self.column = 0
        self.colors = 0
        """Sequences that set a colour or a style."""

    def feed(self, text: str) -> None:
        for found in _TOKEN.finditer(text):
            number, command, control, character, unknown = found.groups()
            if command == "A":
                top = max(0, len(self.cells) - self.lines)
                self.row = max(top, self.row - int(number or 1))
                self.column = min(self.column, self.columns - 1)
            elif command in ("K", "J"):
                assert number in ("", "0"), found[0]
                del self.cells[self.row][self.column :]
                if command == "J":
                    del self.cells[self.row + 1 :]
            elif command == "m":
                self.colors += number not in ("", "0")
            elif control == "\r":
                self.column = 0
            elif control == "\n":
                self._down()
            elif character:
                self._put(character)
            else:
                assert not unknown, f"the model does not know {unknown!r}"

    def resize(self, columns: int, lines: int = 24, *, wraps: bool = False) -> None:
        """Change the size of the window. Many terminals wrap the lines that are too long then."""
        self.columns, self.lines = columns, lines
        if not wraps:  # others hide what is beyond the edge
            self.column = min(self.column, columns)
            return
        cells: list[list[str]] = []
        for number, line in enumerate(self.cells):
            if number == self.row:
                row, column = len(cells) + self.column // columns, self.column % columns
            cells += [line[at : at + columns] for at in range(0, max(1, len(line)), columns)]
        cells += [[] for _ in range(row + 1 - len(cells))]
        self.cells, self.row, self.column = cells, row, column

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.cells):
            self.cells.append([])

    def _put(self, character: str) -> None:
        width = columns_of(character)
        if self.column + width > self.columns:  # a terminal wraps when the next character comes
            self._down()
            self.column = 0
        line = self.cells[self.row]
        line.extend(" " * (self.column - len(line)))
        line[self.column : self.column + width] = [character, *[""] * (width - 1)]
        self.column += width

    def text(self) -> list[str]:
        """Return the lines with text, spaces at their ends left out."""
        lines = ["".join(line).rstrip() for line in self.cells]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def fresh(self) -> bool:
        """Whether the next output is the first of its line."""
        return self.column == 0 and not any(map("".join, self.cells[self.row :]))


class Terminal:
    """A pseudo-terminal and the text stream of a program on it."""

    def __init__(self, columns: int = 80, lines: int = 24) -> None:
        self.master, self.slave = pty.openpty()
        self.stream: TextIO = os.fdopen(os.dup(self.slave), "w", encoding="utf-8")
        self.output = ""
        """All that was written to it."""
        self.window = Screen(columns, lines)
        self._set_size(columns, lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for fd in (self.master, self.slave):
            with contextlib.suppress(OSError):  # a test may have closed it
                os.close(fd)
        with contextlib.suppress(OSError):
            self.stream.close()

    def resize(self, columns: int, lines: int = 24, *, wraps: bool = False) -> None:
        self.read()
        if columns:
            self.window.resize(columns, lines, wraps=wraps)
        self._set_size(columns, lines)

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self, timeout_s: float = 0.0) -> str:
        """Return what was written since the last call; wait up to `timeout_s` for anything."""
        data = b""
        while select.select([self.master], [], [], 0.02 if data else timeout_s)[0]:
            try:
                more = os.read(self.master, 1 << 16)
            except OSError:  # no process has it open
                break
            if not more:
                break
            data += more
        text = data.decode()
        self.output += text
        self.window.feed(text)
        return text

    def screen(self) -> Screen:
        """Return the window after all output."""
        self.read()
        return self.window
