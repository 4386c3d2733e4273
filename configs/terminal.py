"""Lines that a command draws at the end of what it has printed, and draws again in place.

    with Block(sys.stderr, lambda columns, rows: ["encode  43%"]):
        print("a line")             # is printed above the block, which stays whole
        log.warning("another")      # so is this, whichever stream its handler has

Only for a terminal for which `can_redraw` is true. The environment decides as elsewhere: `TERM`, `COLUMNS`,
`NO_COLOR` and `FORCE_COLOR`. The cursor is not hidden and no mode is set, so a killed job leaves a terminal
that works.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TextIO, cast

from configs.console import columns_of
from configs.text import unguarded

TICK_S = 0.25
"""Seconds between two looks at what is to be drawn, and so the delay after the window was resized."""

ERASE = "\r\x1b[J"
"""Moves the cursor to the start of its line, and erases from there to the end of the screen."""

STYLES = {"": "", "bold": "1", "green": "32", "red": "31", "dim": "2"}
"""Name -> parameter of the escape sequence."""


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether the stream is a terminal; one that is closed or missing is none."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def can_redraw(stream: TextIO) -> bool:
    """Return whether the stream is a terminal on which a line can be drawn again."""
    # A terminal without a TERM counts as dumb, as it does for git.
    return is_terminal(stream) and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def has_colors(stream: TextIO) -> bool:
    """Return whether text on this stream may have colours: `NO_COLOR` is asked first, then `FORCE_COLOR`."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return can_redraw(stream)


def styled(text: str, style: str) -> str:
    """Return text in one of the `STYLES`."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if style and text else text


def size_of(stream: TextIO) -> tuple[int, int]:
    """Return the columns and lines of a terminal: 80 and 24 if nothing says more."""
    try:
        columns, lines = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):  # not a terminal
        columns = lines = 0
    # The smaller one: an exported COLUMNS is that of the window before it was resized, and a line that is too
    # long wraps, so that it can no longer be drawn over.
    columns = min(filter(None, (columns, _number("COLUMNS"))), default=80)
    return columns, min(filter(None, (lines, _number("LINES"))), default=24)


def in_background(stream: TextIO) -> bool:
    """Return whether the shell has given the terminal to another program, as after `command &`."""
    try:
        group = os.tcgetpgrp(stream.fileno())
    except (OSError, ValueError):  # not the terminal that controls this process
        return False
    return group not in (0, os.getpgrp())  # 0: a group outside this container


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 6 else 0


def cut(text: str, columns: int) -> str:
    """Return text that takes at most this many columns of a terminal; cut text ends in `...`."""
    if columns_of(text) <= columns:
        return text
    mark = "..." if columns > 6 else ""
    room = max(0, columns - len(mark))
    for at, character in enumerate(text):
        room -= columns_of(character)
        if room < 0:
            return text[:at] + mark
    return text


class Block:
    """Lines at the end of a terminal. Output of this process to the same terminal is printed above them.

    The cursor waits behind the first line. What other processes or libraries write to the terminal is
    therefore never erased: it is appended to that line.
    """

    _active: Block | None = None
    """The block that is drawn now. One that is started inside another draws nothing."""

    def __init__(self, stream: TextIO, draw: Callable[[int, int], Sequence[str]]) -> None:
        """Start drawing, every `TICK_S` seconds, in a thread.

        Args:
            stream: a terminal.
            draw: returns the lines for this many columns and lines. It is called from several threads.
        """
        self._stream, self._draw = unguarded(stream), draw
        self._lock = threading.RLock()
        self._shown: tuple[str, ...] = ()
        self._at_start = True  # whether other output has ended with a line break
        self._ended = threading.Event()
        self._restore = contextlib.ExitStack()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._tick, name="progress", daemon=True)
        self._installed = Block._active is None
        if not self._installed:
            self._ended.set()
            return
        Block._active = self
        self._restore.enter_context(_streams_above(self))
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None
    ) -> None:
        self.close(keep=kind is not None)

    def close(self, *, keep: bool = False) -> None:
        """Erase the block, or leave its last lines. The cursor is at the start of a line."""
        if not self._installed:
            return
        self._installed = False
        with self._lock:
            if keep:
                self.paint()
            self._ended.set()
            if self._shown and not self._away():
                self._write(ERASE + "".join(f"{line}\n" for line in self._shown if keep))
                self._shown = ()
        self._restore.close()
        Block._active = None
        self._thread.join(1.0)

    def paint(self) -> None:
        """Draw the lines as they are now."""
        with self._lock:
            if self._ended.is_set() or not self._at_start or self._away():
                return
            lines = tuple(self._draw(*size_of(self._stream)))
            if lines == self._shown:
                return
            text = ERASE + "\n".join(lines)
            if len(lines) > 1:
                text += f"\x1b[{len(lines) - 1}A\r{lines[0]}"
            self._write(text)
            self._shown = lines

    def above(self, stream: TextIO, text: str) -> int:
        """Write text to a stream above the block."""
        if os.getpid() != self._process:  # forked, perhaps while the lock was held
            return stream.write(text)
        with self._lock:
            if self._shown and not self._away():
                self._write(ERASE)
                self._shown = ()
            count = stream.write(text)
            stream.flush()
            if text:
                self._at_start = text.endswith("\n")
            self.paint()
        return count

    def _away(self) -> bool:
        """Whether this program is in the background, where the cursor is behind what another has written."""
        if in_background(self._stream):
            self._shown = ()
            return True
        return False

    def _tick(self) -> None:
        while not self._ended.wait(TICK_S):
            self.paint()

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal is gone, and the job need not end with it
            self._ended.set()


class _Above:
    """A text stream whose output is printed above a block."""

    def __init__(self, stream: TextIO, block: Block) -> None:
        self.stream, self.block = stream, block

    def write(self, text: str) -> int:
        return self.block.above(self.stream, text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def _streams_above(block: Block) -> Iterator[None]:
    """Let `sys.stdout`, `sys.stderr` and the handlers of logs print above a block, if they are a terminal."""
    before: dict[str, TextIO] = {}
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if is_terminal(stream):
            before[name] = stream
            setattr(sys, name, _Above(stream, block))
    handlers = list(_handlers_of(before.values()))
    for handler, stream in handlers:
        handler.setStream(cast(TextIO, _Above(stream, block)))
    try:
        yield
    finally:
        for handler, stream in handlers:
            handler.setStream(stream)
        for name, stream in before.items():
            current = getattr(sys, name)
            if isinstance(current, _Above) and current.block is block:
                setattr(sys, name, stream)


def _handlers_of(
    streams: Iterable[TextIO],
) -> Iterator[tuple[logging.StreamHandler[TextIO], TextIO]]:
    """Yield the handlers of all loggers that write to one of the streams, with the stream of each."""
    wanted = {id(unguarded(stream)) for stream in streams}
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    found = {
        id(handler): handler
        for logger in loggers
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
    }
    for handler in found.values():
        # Not the handler of `logging.lastResort`, which looks up sys.stderr for each record.
        if type(handler) is logging.StreamHandler and id(unguarded(handler.stream)) in wanted:
            yield handler, handler.stream
