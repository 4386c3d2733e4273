"""Make files appear whole: write beside the final name, flush to the disk, rename.

with new_file(path) as file:
    file.write(data)                 # `path` exists once the block has ended without an error
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from cache.errors import DiskError

PARTIAL = ".partial"
"""Suffix of a file that is still being written. Readers ignore it; `cache.gc` removes those left behind."""

ROW_GROUP = 8192
"""Samples or media records that are written, and read back, at a time."""

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
    """Create `folder` and its parents durably, where they are missing."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


@contextlib.contextmanager
def new_file(path: Path, fence: Fence | None = None, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a file to write and read back. It becomes `path` when the block ends without an error.

    Args:
        path: final name. An existing file is replaced; after an error it is unchanged.
        fence: called before the rename.
        durable: whether the file must survive a power cut. Without, it costs no wait for the disk; then the
            reader must notice a torn file, by its seal or hash.

    Raises:
        OSError: the file cannot be written.
    """
    if durable:
        make_folder(path.parent)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with temporary.open("x+b") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if fence is not None:
            fence()
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync_folder(path.parent)


def write_atomic(path: Path, data: bytes, fence: Fence | None = None) -> None:
    """Write `data` to `path` atomically and durably."""
    with new_file(path, fence) as file:
        file.write(data)


def disk_full(error: OSError, where: object) -> DiskError | None:
    """Return `error` as a DiskError if it reports a full disk or quota, else None."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return DiskError(
        f"disk full ({where}); everything committed is kept: free some space and run the same command again"
    )


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn an OSError of the block into a DiskError: one line that says what to do."""
    try:
        yield
    except OSError as error:
        place = error.filename or where
        if error.errno == errno.EXDEV:
            why = f"{place} and {error.filename2} are on different disks: make one a link to the other's"
        else:
            why = (
                f"{place}: {error.strerror or error}; everything committed is kept: "
                "run the same command again"
            )
        raise disk_full(error, place) or DiskError(why) from error
