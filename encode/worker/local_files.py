"""Local files: their bytes, their key, and the identity by which a file is known without reading it again.

A file whose size, times and inode are all as recorded is taken to hold the bytes that were hashed. That
is safe only when a later change cannot leave them as they are, so a file is read no sooner than its
newest time stamp is older than the clock the file system stamps with.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

from PIL import Image

from cache.store.ledger import MediaRecord
from encode.worker.messages import SourceTask
from model.media.images import FORMATS, BadMediaError

MAX_BYTES = 1 << 30
"""Larger files are refused: no image we decode needs as much, and threads read several at once."""

MAX_VIDEO_BYTES = 1 << 40
"""Videos are read twice instead: for their hash, then by the decoder."""

TICK_S = 0.02
"""Linux stamps files with a clock of 1 to 10 ms (CONFIG_HZ), so two writes within that look alike."""

COARSE_TICK_S = 2.0
"""The same where stamps are whole seconds: FAT, some network file systems."""

TRIES = 3

_ORIENTATION_TAG = 0x0112
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What `stat` says of a file's content."""

    size: int
    """Bytes."""
    mtime_ns: int
    """Last change of the content; a program may set it."""
    ctime_ns: int
    """Last change of content or inode; the kernel's alone."""
    inode: int
    """Inode number; 0: the stamps cannot be trusted, never equal to a real file's."""

    @staticmethod
    def of(status: os.stat_result) -> Identity:
        """The identity in a stat result."""
        return Identity(
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            ctime_ns=status.st_ctime_ns,
            inode=status.st_ino,
        )

    def matches(self, record: MediaRecord) -> bool:
        """Whether the file is the one `record` was made from."""
        known = (record.size, record.mtime_ns, record.ctime_ns, record.inode)
        return (self.size, self.mtime_ns, self.ctime_ns, self.inode) == known

    def stamp(self, record: MediaRecord) -> MediaRecord:
        """`record`, made from this very file."""
        return replace(record, **vars(self))

    def settle_s(self) -> float:
        """Seconds until another write would get another stamp; below 0 when stamps are of the future."""
        newest = max(self.mtime_ns, self.ctime_ns)
        tick = COARSE_TICK_S if newest % 1_000_000_000 == 0 else TICK_S
        age = (time.time_ns() - newest) / 1e9
        return -1.0 if age < 0 else max(0.0, tick - age)


def identify(source: str) -> Identity | None:
    """The identity of a file; None when there is no file that could be read."""
    try:
        status = os.stat(source)  # noqa: PTH116 - called once a media, a Path costs as much again
    except (OSError, ValueError):
        return None
    return Identity.of(status) if stat.S_ISREG(status.st_mode) else None


def read_local(task: SourceTask) -> tuple[bytes, MediaRecord]:
    """The bytes of a source, and its record: key, length, identity; width and height to be filled in.

    Raises:
        BadMediaError: at stage fetch, when the file is missing or cannot be read.
    """
    found: list[bytes] = []

    def whole(file: FileIO) -> tuple[str, int]:
        data = file.readall()
        found[:] = [data]
        return hashlib.sha256(data).hexdigest(), len(data)

    record = _settled(task, MAX_BYTES, whole)
    return found[0], record


def hash_local(task: SourceTask) -> MediaRecord:
    """The record of a file that may be too large for memory: as `read_local`, without the bytes.

    Raises:
        BadMediaError: as `read_local`.
    """

    def streamed(file: FileIO) -> tuple[str, int]:
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()

    return _settled(task, MAX_VIDEO_BYTES, streamed)


def _settled(task: SourceTask, most: int, read: Callable[[FileIO], tuple[str, int]]) -> MediaRecord:
    """Read a file that does not change meanwhile; `read` returns sha256 and length of what it read."""
    try:
        for _ in range(TRIES):
            # O_NONBLOCK: a named pipe would wait for a writer, for ever.
            fd = os.open(task.source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with FileIO(fd, "rb") as file:
                before = _regular(os.fstat(fd), most)
                wait_s = before.settle_s()
                if wait_s > 0:
                    time.sleep(wait_s)
                    before = _regular(os.fstat(fd), most)
                key, length = read(file)
                if _regular(os.fstat(fd), most) == before and length == before.size:
                    trusted = before if wait_s >= 0 else replace(before, inode=0)
                    return trusted.stamp(
                        MediaRecord(source=task.source, key=key, kind=task.kind, bytes=length)
                    )
    except FileNotFoundError:
        raise BadMediaError("no such file", "fetch") from None
    except (OSError, ValueError) as error:
        raise BadMediaError(getattr(error, "strerror", None) or str(error), "fetch") from error
    raise BadMediaError("the file changes while it is read", "fetch")


def check_unchanged(path: Path, record: MediaRecord) -> None:
    """A file that was read a second time is still the one `record` was made from.

    Raises:
        BadMediaError: at stage fetch; what was read is nobody's.
    """
    now = identify(str(path))
    if now is None or not now.matches(replace(record, inode=record.inode or now.inode)):
        raise BadMediaError("the file changes while it is read", "fetch")


def unreadable(task: SourceTask) -> MediaRecord:
    """The record of a source that could not be read: until its file changes, nobody tries again."""
    record = MediaRecord(source=task.source, kind=task.kind)
    identity = identify(task.source)
    return record if identity is None else identity.stamp(record)


def size_in_header(data: bytes) -> tuple[int, int]:
    """Width and height of an image, upright, without decoding; (0, 0) when the header does not say."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION_TAG) in _TURNED
    except Exception:  # asked only of a media that is in the space already, so a sound one
        return 0, 0
    return (height, width) if turned else (width, height)


def _regular(status: os.stat_result, most: int) -> Identity:
    if not stat.S_ISREG(status.st_mode):
        raise BadMediaError("not a regular file", "fetch")
    if status.st_size > most:
        raise BadMediaError(f"{status.st_size} bytes, more than {most}", "fetch")
    return Identity.of(status)
