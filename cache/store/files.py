"""cache.store.files."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""Suffix of a file still being written. Readers never look at one; `cache.gc` removes those left."""


Fence = Callable[[], None]
"""Called just before a rename; raises when this process has lost the right to write."""


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is on disk only after this."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """`folder` and its parents, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


@contextlib.contextmanager
def new_file(path: Path, fence: Fence | None = None) -> Iterator[BinaryIO]:
    """A file to write and read back; it becomes `path` when the block ends well, else it is gone."""
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with temporary.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if fence is not None:
            fence()
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_atomic(path: Path, data: bytes, fence: Fence | None = None) -> None:
    """`path` holds `data` whole, or is as it was."""
    with new_file(path, fence) as file:
        file.write(data)


ROW_GROUP = 8192
"""Samples written, and read back, at a time."""
