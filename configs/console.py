"""Text for people: sizes, durations and tables."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs import UserError
from configs.text import visible

SPARE_BYTES = 64 << 20
"""Bytes that a job leaves free on a disk."""

SPARE_TEXT = f"{SPARE_BYTES >> 20} MiB to spare"
"""How messages say it."""


def bytes_text(nbytes: float) -> str:
    """Return a size as `1.18 MB` or `512 B`: three digits, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if nbytes < 999.5 or unit == "TB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 99.95 else f"{nbytes:.3g} {unit}"


def duration_text(seconds: float) -> str:
    """Return a duration as text: `under a second`, `4 s`, `3 min 20 s`, `2 h 05 min`, `6 d 4 h`."""
    s = round(seconds)
    if s < 1:
        return "under a second"
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk that holds, or will hold, `folder`."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_room(folder: Path, nbytes: int, what: str) -> None:
    """Check that the disk of `folder` has room for the `nbytes` that `what` needs.

    Raises:
        UserError: it has not.
    """
    free = free_bytes(folder)
    if nbytes and nbytes + SPARE_BYTES > free:
        raise UserError(
            f"{what} needs {bytes_text(nbytes)} and {SPARE_TEXT} in {folder}, where {bytes_text(free)} are "
            "free; "
            "free some space, or choose another disk"
        )


def columns_of(text: str) -> int:
    """Return the columns of a terminal that `text` takes: East Asian characters take two, accents none."""
    return sum(
        2
        if unicodedata.east_asian_width(c) in "WF"
        else unicodedata.category(c) not in ("Mn", "Me", "Cf")
        for c in text
    )


def _padded(text: str, width: int, right: bool) -> str:
    spaces = " " * (width - columns_of(text))
    return spaces + text if right else text + spaces


def table_text(header: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Return rows as lines with aligned columns; the columns named in `right` are flush right.

    A cell may hold text from outside: see `configs.text.visible`.
    """
    flush_right = [title in right.split() for title in header]
    return "\n".join(
        aligned([header, *([visible(cell) for cell in row] for row in rows)], flush_right)
    )


def aligned(rows: Sequence[Sequence[str]], flush_right: Sequence[bool] = ()) -> list[str]:
    """Return rows as lines with aligned columns; `flush_right` says which columns are."""
    widths = [max(map(columns_of, column)) for column in zip(*rows, strict=True)]
    flush_right = flush_right or [False] * len(widths)
    return [
        "  ".join(
            _padded(cell, width, is_right)
            for cell, width, is_right in zip(row, widths, flush_right, strict=True)
        ).rstrip()
        for row in rows
    ]


def counts_text(counts: Mapping[str, int]) -> str:
    """Return counts with their names in one line: `3 ends early, 1 HDR`."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())
