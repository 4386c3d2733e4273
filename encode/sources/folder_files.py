"""The files below a folder: which are images and videos, and why each other one is not used.

    for file in walk(folder, leave_out=cache):
        file.path       # "sub/a.jpg", relative to the folder
        file.problem    # "" for a file to look at; else why it is not: hidden, linked folder, ...
    why_unused(found, "sub/a.heic")             # ".heic (HEIC; install its reader: ...)"

Every file is yielded once, except those of `leave_out`. Links to folders are not followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from cache.format.gate import what_is
from encode.plan.numbering import Texts
from encode.records.media_files import kind_by_suffix, suffix_of
from model.media.kinds import Recognised

UNREADABLE = "folder that cannot be read"
LINKED = "linked folder"
BROKEN = "broken link"
OUTSIDE = "link to a file outside the folder"
HIDDEN = "hidden"


class FolderFile(NamedTuple):
    """One file, one linked folder, or one folder that cannot be read."""

    path: str
    """Relative to the folder that is walked, with slashes. Names that are not UTF-8 contain surrogates."""
    problem: str
    """Why it is not looked at; empty for a regular file or a link to one."""


class FileList:
    """The files of a folder, in their order. Ten million of them take 100 MB."""

    def __init__(self, files: Iterable[FolderFile]):
        self._paths = Texts()
        self._problems: dict[int, str] = {}
        for number, (path, problem) in enumerate(files):
            self._paths.extend([path])
            if problem:
                self._problems[number] = problem

    def __iter__(self) -> Iterator[FolderFile]:
        for number, path in enumerate(self._paths):
            yield FolderFile(path, self._problems.get(number, ""))


def walk(folder: Path, leave_out: Path) -> Iterator[FolderFile]:
    """Yield everything below `folder` that is not a folder: files first, then each subfolder, sorted.

    Args:
        folder: absolute path.
        leave_out: absolute path of a folder of which nothing is yielded.
    """
    skipped = str(leave_out)
    pending = [("", False)]  # a stack, since folders may be nested deeper than Python's calls
    while pending:
        inside, hidden = pending.pop()
        try:
            with os.scandir(os.path.join(folder, inside)) as found:  # noqa: PTH118 - for every folder
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            yield FolderFile(inside.rstrip("/"), UNREADABLE)
            continue
        folders = []
        for entry in entries:
            path = inside + entry.name
            is_hidden = hidden or entry.name.startswith(".")
            if entry.is_dir(follow_symlinks=False):
                if entry.path != skipped:
                    folders.append((f"{path}/", is_hidden))
            else:
                yield FolderFile(path, _problem(entry, folder) or (HIDDEN if is_hidden else ""))
        pending += reversed(folders)


def _problem(entry: os.DirEntry[str], folder: Path) -> str:
    if entry.is_file(follow_symlinks=False):
        return ""
    if not entry.is_symlink():
        return what_is(entry.stat(follow_symlinks=False).st_mode)
    if os.path.isdir(entry.path):  # noqa: PTH112 - follows the link
        return LINKED
    if not os.path.exists(entry.path):  # noqa: PTH110
        return BROKEN
    if not Path(entry.path).resolve().is_relative_to(folder):
        return OUTSIDE
    return what_is(entry.stat().st_mode)


def why_unused(found: Recognised | None, name: str) -> str:
    """Return the reason why a file that is neither an image nor a video is not used."""
    suffix = suffix_of(name)
    # Numbers are no types of files, and there may be thousands of them.
    label = "without a suffix" if suffix[1:].isdigit() or not suffix else suffix
    if found is None:
        return f"{label} (cannot be read)"
    # Of texts and unknown formats the suffix says more.
    is_media = bool(kind_by_suffix(name))
    if not is_media and (not found.format or found.format.endswith("text")):
        return label
    advice = f"; {found.advice}" if found.advice else ""
    return f"{label} ({found.format or 'unknown format'}{advice})"
