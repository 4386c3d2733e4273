"""Read the files of a run, which somebody else may have made: regular files below it, bounded and typed.

    refuse_links(Path("runs/theirs/stage1"))                       # before anything in it is read or written
    facts = read_json(folder / "run.json", Facts, "copy it again")

What does not fit is a UserError: one line with the file's name and what to do.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated, Any

import msgspec

from cache.format.gate import fit, parse_json, read_regular, what_is
from configs import UserError

META = "nanomolmo2.json"
"""The file that makes a folder a finished model."""
MOST = 64 << 20
"""Bytes of a JSON file, at most."""
MOST_METRICS = 2 << 30
"""Bytes of metrics.jsonl, at most: five million steps."""
BESIDE = ("card.json", "config.yaml", "evaluation-", "lock", "metrics.jsonl", "report.", "run.json")
"""Beginnings of the names of what a stage has beside `final`."""
LINKED = ("wandb",)
"""Folders that other programs write with links in them."""

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
"""A number of things."""
Name = Annotated[str, msgspec.Meta(pattern=r"^[^/\x00]{1,255}$")]
"""A name that becomes one part of a path."""


def refuse_links(folder: Path) -> None:
    """Check that what a folder contains, at any depth, are files and folders.

    A link would let whoever made the folder choose which file a command reads, or writes over.

    Raises:
        UserError: it, or something in it, is a link, a FIFO, a socket or a device.
    """
    pending = [folder]
    if folder.is_symlink():
        _refuse(folder, stat.S_IFLNK)
    while pending:
        here = pending.pop()
        try:
            with os.scandir(here) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        for entry in entries:
            try:
                mode = entry.stat(follow_symlinks=False).st_mode
            except FileNotFoundError:  # a training goes on there, and removes an old checkpoint
                continue
            if stat.S_ISDIR(mode):
                if entry.name not in LINKED:
                    pending.append(Path(entry.path))
            elif not stat.S_ISREG(mode):
                _refuse(Path(entry.path), mode)


def refuse_links_beside(final: Path) -> None:
    """Check those files beside a `final` folder that commands read or write; see `refuse_links`.

    What else is there may be the user's own.
    """
    try:
        with os.scandir(final.parent) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        mode = entry.stat(follow_symlinks=False).st_mode
        if entry.name.startswith(BESIDE) and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            _refuse(Path(entry.path), mode)


def _refuse(path: Path, mode: int) -> None:
    raise UserError(
        f"{path}: {what_is(mode)}; a run has files and folders alone: put what it leads to in its place, "
        "or remove it"
    )


def read_bytes(path: Path, way_out: str, *, most: int = MOST) -> bytes:
    """Return the bytes of a file of a run.

    Raises:
        UserError: it is no file, cannot be read or is larger than `most`. The message ends with `way_out`.
        FileNotFoundError: it does not exist.
    """
    try:
        return read_regular(path, most=most)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {way_out}") from None


def read_json(path: Path, kind: Any, way_out: str, *, not_finite: bool = False) -> Any:
    """Return the values of a JSON file of a run, with keys that `kind` does not have.

    Args:
        path: the file.
        kind: a type of `msgspec.convert` that the values fit.
        way_out: what to do about a file that does not.
        not_finite: whether NaN and Infinity are numbers.

    Raises:
        UserError: see `read_bytes`; or it is no JSON, or no `kind`.
        FileNotFoundError: it does not exist.
    """
    data = read_bytes(path, way_out)
    try:
        values = parse_json(data, not_finite=not_finite)
        fit(values, kind)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({str(error)[:200]}); {way_out}") from None
    return values
