"""The progress of a command: a bar on a terminal, and lines with the time of day elsewhere.

    encode  43% [=======>        ]  2,150/5,000  24.1/s  2 min 00 s left  bound by decode  3 failed
    2026-11-26 14:03:21  encode 43%  2,150/5,000  24.1/s  2 min 00 s left  bound by decode  3 failed

    with Meter("read", nbytes) as meter:        # counts bytes, from any thread
        meter.add(len(block))

A terminal without cursor movements (TERM=dumb) counts as "elsewhere". A narrow terminal gets the parts that
matter most. Lines elsewhere have growing intervals: the first is printed after 5 seconds, later ones once a
minute, and at each twentieth of the work. The bar of a command that ends is erased; the bar of one that fails
or is interrupted stays as it was.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO, TypeVar

from configs.console import aligned, bytes_text, columns_of, duration_text
from configs.terminal import Block, can_redraw, cut, has_colors, styled
from configs.text import unguarded, visible

T = TypeVar("T")

WINDOW_S = 60.0
"""The rate is that of this many seconds, or of longer if little was done in them."""

LEAST_MARKS = 10
"""Changes that a rate covers, if there were as many: slow batches end one by one."""

MARK_S = 1.0
"""Seconds between two changes that a rate remembers."""

EVIDENCE = 2
"""Changes before a rate says how long the rest takes."""

EVIDENCE_S = 3.0
"""Seconds before a rate says how long the rest takes."""

FIRST_LINE_S = 5.0
"""Seconds before the first line, if there is no terminal. The next intervals double."""

LINE_S = 60.0
"""Longest interval of such lines."""

STEP, STEP_S = 0.05, 10.0
"""A line is also printed at each multiple of this share of the work, if the last one is this old, seconds."""

FIRST_BAR_S = 0.5
"""Seconds before a bar is drawn: a command that takes less shows none."""

UPDATE_S = 0.2
"""Seconds between two updates of a `Meter`, which may count blocks much faster."""

LEAST_BAR, MOST_BAR = 7, 42
"""Columns of a bar with its brackets."""


def number_text(number: float) -> str:
    """Return a count as `1,200`."""
    return f"{number:,.0f}"


def rate_text(rate: float) -> str:
    """Return items a second as text: `1,234/s`, `24.1/s`, `0.33/s`, `2.4/min`."""
    if 0 < rate < 0.1:
        return f"{rate * 60:.2g}/min"
    return f"{rate:,.0f}/s" if rate >= 99.95 else f"{rate:.3g}/s"


class Pace:
    """The recent speed of some work, from what was done at several times."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, float]] = deque()
        self._now = 0.0

    def add(self, now: float, done: float) -> None:
        """Record what was done. The first call is the start: what was done by then is no part of the rate."""
        self._now = now
        if not self._marks or (
            done > self._marks[-1][1] and now - self._marks[-1][0] >= (MARK_S if self._known else 0)
        ):
            self._marks.append((now, done))
        while len(self._marks) > LEAST_MARKS and self._marks[1][0] < now - WINDOW_S:
            self._marks.popleft()

    @property
    def rate(self) -> float:
        """What is done in a second; 0.0 before the first change."""
        if len(self._marks) < 2:
            return 0.0
        (then, before), (last, done) = self._marks[0], self._marks[-1]
        # Work that ends in batches is measured from one end to another. A pause that is much longer than the
        # others before it counts as time.
        pause, usual = self._now - last, (last - then) / (len(self._marks) - 1)
        passed = last - then + (pause if pause > 3 * max(usual, MARK_S) else 0.0)
        return (done - before) / passed if passed > 0 else 0.0

    def seconds(self, left: float) -> float | None:
        """Return how long the rest takes; None while nothing says it."""
        if not (self._known and self.rate):
            return None
        return max(0.0, left) / self.rate

    @property
    def _known(self) -> bool:
        return len(self._marks) > EVIDENCE and self._now - self._marks[0][0] >= EVIDENCE_S


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a progress shows at one moment."""

    count: str
    """What is done, and of how much: `2,150/5,000`."""
    share: float | None = None
    """The share of the work that is done, 0 to 1; None if nobody can say."""
    rate: str = ""
    """`24.1/s`."""
    left: str = ""
    """`2 min 00 s left`."""
    bound: str = ""
    """What limits the speed: `bound by decode`."""
    failed: str = ""
    """`3 failed`."""
    note: str = ""
    """Anything else."""
    rows: tuple[tuple[str, ...], ...] = ()
    """Lines below the bar, as cells of columns, on a terminal."""

    @property
    def percent(self) -> str:
        """The share as `43%`, rounded down: `100%` is the end. '' without a share."""
        return "" if self.share is None else f"{int(min(1.0, self.share) * 100 + 1e-9)}%"


def log_line(what: str, status: Status) -> str:
    """Return one line without a bar."""
    head = f"{what} {status.percent}".rstrip()
    rest = (status.count, status.rate, status.left, status.bound, status.failed, status.note)
    return "  ".join(filter(None, (head, *rest)))


def bar_line(what: str, status: Status, columns: int, *, colors: bool = False) -> str:
    """Return one line with a bar that takes at most `columns`.

    If there is no room for all, parts are left out in this order: note, bar, rate, count, bound, failed,
    left, name. The last part is cut.
    """
    parts = {
        "name": what,
        "percent": status.percent and status.percent.rjust(4),
        "bar": "" if status.share is None else " " * LEAST_BAR,
        "count": status.count,
        "rate": status.rate,
        "left": status.left,
        "bound": status.bound,
        "failed": status.failed,
        "note": status.note,
    }
    parts = {name: text for name, text in parts.items() if text}
    for name in ("note", "bar", "rate", "count", "bound", "failed", "left", "name"):
        if (spare := columns - _width(parts)) >= 0 or len(parts) == 1:
            break
        parts.pop(name, None)
    spare = max(0, columns - _width(parts))
    if "bar" in parts and status.share is not None:
        parts["bar"] = _bar(status.share, min(MOST_BAR, LEAST_BAR + spare))
    shown = [
        (_gap(name), styled(cut(text, columns), STYLE_OF.get(name, "") if colors else ""))
        for name, text in parts.items()
    ]
    return "".join(gap * bool(at) + text for at, (gap, text) in enumerate(shown))


STYLE_OF = {"name": "bold", "bar": "green", "failed": "red"}
"""Part of the line -> its style, where colours are wanted."""


def _gap(name: str) -> str:
    return " " if name in ("percent", "bar") else "  "


def _width(parts: Mapping[str, str]) -> int:
    """Return the columns that the parts take with the gaps between them."""
    first = next(iter(parts), "")
    return sum(columns_of(text) + len(_gap(name)) for name, text in parts.items()) - len(
        _gap(first)
    )


def _bar(share: float, columns: int) -> str:
    inner = columns - 2
    full = int(min(1.0, share) * inner)
    return f"[{'=' * full}]" if full == inner else f"[{('=' * full + '>')[:inner]:<{inner}}]"


def row_lines(rows: Sequence[Sequence[str]], columns: int, most: int) -> list[str]:
    """Return rows of cells as aligned and indented lines of at most `columns`; `most` lines.

    A cell may hold text from outside: see `configs.text.visible`. The last line counts the rows that have no
    line.
    """
    if most < 1 or not rows:
        return []
    shown = rows if len(rows) <= most else rows[: most - 1]
    lines = [f"  {line}" for line in aligned([[visible(cell) for cell in row] for row in shown])]
    if len(shown) < len(rows):
        lines.append(f"  and {len(rows) - len(shown):,} more")
    return [cut(line, columns) for line in lines]


class Display:
    """Shows the progress of a command on standard error, in one of the two ways."""

    def __init__(self, what: str, *, out: TextIO | None = None, lines: bool = True) -> None:
        """Show nothing yet.

        Args:
            what: the name of the work. May hold text from outside.
            out: instead of standard error.
            lines: whether lines are printed where no bar can be drawn.
        """
        self._what, self._lines = visible(what), lines
        stream = sys.stderr if out is None else out
        self._out = None if stream is None else unguarded(stream)  # None: the process has none
        self._colors = self._out is not None and has_colors(self._out)
        self._status: Status | None = None
        self._started = self._printed = time.monotonic()
        self._wait_s, self._step = FIRST_LINE_S, 0
        self._block: Block | None = None
        if self._out is not None and can_redraw(self._out):
            self._block = Block(self._out, self._draw)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None
    ) -> None:
        self.close(keep=kind is not None)

    def update(self, status: Status) -> None:
        """Show this from now on. Elsewhere than on a terminal, print a line if it is time for one."""
        self._status = status
        if self._block is None and self._lines and self._out is not None:
            self._print(status, self._out)

    def paint(self) -> None:
        """Draw the bar now, and not only at the next look."""
        if self._block is not None:
            self._block.paint()

    def close(self, *, keep: bool = False) -> None:
        """Erase the bar, or leave it with a line break behind it."""
        if self._block is not None:
            self._block.close(keep=keep)

    def _draw(self, columns: int, lines: int) -> list[str]:
        status = self._status
        if status is None or time.monotonic() - self._started < FIRST_BAR_S:
            return []
        # A line that fills the last column may wrap, and the block may not be as high as the window.
        line = bar_line(self._what, status, columns - 1, colors=self._colors)
        return [line, *row_lines(status.rows, columns - 1, lines - 2)]

    def _print(self, status: Status, out: TextIO) -> None:
        now, step = time.monotonic(), int((status.share or 0.0) / STEP + 1e-9)
        passed = now - self._printed
        if passed < self._wait_s and not (step > self._step and passed >= STEP_S):
            return
        if passed >= self._wait_s:
            self._wait_s = min(LINE_S, 2 * self._wait_s)
        self._printed, self._step = now, step
        text = log_line(self._what, status)
        if self._colors and status.failed:
            text = text.replace(status.failed, styled(status.failed, "red"))
        moment = styled(time.strftime("%Y-%m-%d %H:%M:%S"), "dim" if self._colors else "")
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            out.write(f"{moment}  {text}\n")
            out.flush()


class Meter:
    """Counts work as it is done, and shows it until it is closed. Threads may call its methods."""

    def __init__(
        self,
        what: str,
        total: int | None,
        *,
        text: Callable[[float], str] = bytes_text,
        start: int = 0,
        lines: bool = True,
        out: TextIO | None = None,
    ) -> None:
        """Show nothing yet.

        Args:
            what: the name of the work.
            total: how much it is; None if that is not known.
            start: how much of it was done before. It is no part of the rate.
            text: how an amount is printed: `bytes_text` or `number_text`.
            lines: whether lines are printed where no bar can be drawn.
            out: instead of standard error.
        """
        self._what, self._total, self._text = what, total, text
        self._lock = threading.Lock()
        self._done, self._bound = start, ""
        self._pace = Pace()
        self._start = self._updated = time.monotonic()
        self._pace.add(self._start, start)
        self._display = Display(what, out=out, lines=lines)
        self._display.update(self._status())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None
    ) -> None:
        self.close(keep=kind is not None)

    def add(self, amount: int = 1, *, bound: str = "") -> None:
        """Count this much more as done; `bound` is what limits the speed, if somebody can say."""
        with self._lock:
            self._done += amount
            self._bound = bound
            now = time.monotonic()
            if now - self._updated >= UPDATE_S:
                self._updated = now
                self._pace.add(now, self._done)
                self._display.update(self._status())

    def _status(self) -> Status:
        done, total, text = self._done, self._total, self._text
        left_s = self._pace.seconds(total - done) if total else None
        rate = self._pace.rate
        if self._text is bytes_text:
            speed = f"{bytes_text(rate)}/s" if rate else ""
        else:
            speed = rate_text(rate) if rate else ""
        return Status(
            count=f"{text(done)}/{text(total)}" if total else text(done),
            share=min(1.0, done / total) if total else None,
            rate=speed,
            left=left_text(left_s),
            bound=f"bound by {self._bound}" if self._bound else "",
        )

    def total_text(self) -> str:
        """Return what is done so far, as `read 12.3 GB in 4.1 s: 3 GB/s`."""
        seconds = time.monotonic() - self._start
        rate = self._text(self._done / max(seconds, 1e-9))
        return f"{self._what} {self._text(self._done)} in {seconds:.1f} s: {rate}/s"

    def close(self, *, keep: bool = False) -> None:
        """Erase the bar, or leave it with a line break behind it."""
        self._display.close(keep=keep)


def left_text(seconds: float | None) -> str:
    """Return the time that is left, as `2 min 00 s left`; '' if it is not known."""
    return "" if seconds is None else f"{duration_text(seconds)} left"


def counted(items: Iterable[T], meter: Meter) -> Iterator[T]:
    """Yield the items, and count them."""
    # In groups: a lock for each of millions of samples would take as long as some readers do.
    waiting = 0
    for item in items:
        yield item
        waiting += 1
        if waiting == GROUP:
            meter.add(waiting)
            waiting = 0


GROUP = 64
"""Items that `counted` counts at once."""
