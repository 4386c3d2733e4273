"""Local files and media inside them: bytes, key, and the identity that makes reading again unnecessary.

A file whose size, times and inode equal the recorded ones is assumed to hold the bytes that were hashed. Two
writes within one tick of the file system's clock get the same time stamp, so a file is read only once its
newest time stamp is at least one tick old. The identity of a media item inside a file is that of the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from cache.errors import EmbeddedMediaError
from cache.format.embedded.names import container_of, is_embedded, read_embedded
from cache.format.gate import what_is
from cache.store.ledger import MediaRecord
from encode.worker.messages import SourceTask
from model.media.images import BadMediaError, image_size
from model.media.kinds import HEAD_BYTES, recognise

MAX_BYTES = 1 << 30
"""Larger images, and larger media inside files, are refused.

No image that `model.media` decodes needs 1 GiB, and each thread reads one.
"""

MAX_VIDEO_BYTES = 1 << 40
"""Larger videos are refused. A video is read twice, for its hash and by the decoder, and never held whole."""

TICK_S = 0.02
"""Seconds. Linux stamps files with a clock that ticks every 1 to 10 ms (CONFIG_HZ)."""

COARSE_TICK_S = 2.0
"""Seconds, where stamps are whole seconds: FAT, which counts in twos, and some network file systems."""

TRIES = 3
"""A file that changes during this many reads has failed."""


NO_FILE = "no such file"
CHANGES = "the file changes while it is read"


class Identity(NamedTuple):
    """The fields of `stat` that change when a file's content changes."""

    size: int
    """Bytes."""
    mtime_ns: int
    """Last change of the content. Programs may set it."""
    ctime_ns: int
    """Last change of content or inode. Only the kernel sets it."""
    inode: int
    """Inode number. 0 means that the stamps cannot be trusted; no real file has it."""

    @staticmethod
    def of(status: os.stat_result) -> Identity:
        """Return the identity in a stat result."""
        return Identity(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    def matches(self, record: MediaRecord) -> bool:
        """Return whether the file is still the one that `record` was made from."""
        return self == (record.size, record.mtime_ns, record.ctime_ns, record.inode)

    def stamp(self, record: MediaRecord) -> MediaRecord:
        """Return `record` with this identity."""
        return replace(record, **self._asdict())

    def settle_s(self) -> float:
        """Return the seconds until a write would get a newer stamp; -1 if the stamps are in the future."""
        newest = max(self.mtime_ns, self.ctime_ns)
        tick = COARSE_TICK_S if newest % 1_000_000_000 == 0 else TICK_S
        age = (time.time_ns() - newest) / 1e9
        return -1.0 if age < 0 else max(0.0, tick - age)


def identify(source: str) -> Identity | None:
    """Return the identity of a file, or of the file that contains the media item `source`.

    None if it does not exist or is not a regular file.
    """
    path = container_of(source) if is_embedded(source) else source
    try:
        status = os.stat(path)  # noqa: PTH116 - called for every source; a Path would double the cost
    except (OSError, ValueError):
        return None
    return Identity.of(status) if stat.S_ISREG(status.st_mode) else None


def why_no_file(source: str) -> str:
    """Return in words why `identify` found no file: there is none, or there is something else."""
    path = container_of(source) if is_embedded(source) else source
    try:
        return what_is(os.stat(path).st_mode) or NO_FILE  # noqa: PTH116
    except (OSError, ValueError):
        return "link to no file" if os.path.islink(path) else NO_FILE  # noqa: PTH114


class Identifier:
    """Identify many sources. It asks once about a file that contains many media."""

    def __init__(self) -> None:
        self._containers: dict[str, Identity | None] = {}

    def __call__(self, source: str) -> Identity | None:
        """Return what `identify` returns."""
        if not is_embedded(source):
            return identify(source)
        container = container_of(source)
        if container not in self._containers:
            self._containers[container] = identify(container)
        return self._containers[container]


def read_local(task: SourceTask) -> tuple[bytes | Path, MediaRecord]:
    """Read and hash a file, or a media item inside a file, that does not change meanwhile.

    Returns:
        the bytes of an image or of embedded media, or the path of a video, which may be larger than memory;
        and the record with key, length and identity, but no size in pixels.

    Raises:
        BadMediaError: at stage fetch: the file is missing, cannot be read, or changes during each read.
    """
    if is_embedded(task.source):
        return _read_inside(task)
    data: bytes | Path = Path(task.source)
    most = MAX_VIDEO_BYTES if task.kind == "video" else MAX_BYTES
    try:
        for _ in range(TRIES):
            with _opened(task.source) as fd:
                status = os.fstat(fd)
                if task.kind == "image" and status.st_size > most:
                    _refuse_video(fd)
                before = _regular(status, most)
                wait_s = before.settle_s()
                if wait_s > 0:
                    time.sleep(wait_s)
                    before = _regular(os.fstat(fd), most)
                if task.kind == "video":
                    with FileIO(fd, "rb", closefd=False) as file:
                        key, length = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
                else:
                    data = _read(fd, before.size)
                    key, length = hashlib.sha256(data).hexdigest(), len(data)
                if _regular(os.fstat(fd), most) == before and length == before.size:
                    trusted = before if wait_s >= 0 else before._replace(inode=0)
                    record = MediaRecord(source=task.source, key=key, kind=task.kind, bytes=length)
                    return data, trusted.stamp(record)
    except (OSError, ValueError) as error:
        raise _cannot_read(task, error) from error
    raise BadMediaError(CHANGES, "fetch")


def _read_inside(task: SourceTask) -> tuple[bytes, MediaRecord]:
    """Read and hash a media item inside a file, as `read_local` does."""
    container = container_of(task.source)
    for _ in range(TRIES):
        before = identify(container)
        wait_s = 0.0 if before is None else before.settle_s()
        if wait_s > 0:
            time.sleep(wait_s)
            before = identify(container)
        try:
            data = read_embedded(task.source, MAX_BYTES)
        except EmbeddedMediaError as error:
            raise BadMediaError(str(error), "fetch") from None
        if before is not None and identify(container) == before:
            key = hashlib.sha256(data).hexdigest()
            record = MediaRecord(source=task.source, key=key, kind=task.kind, bytes=len(data))
            trusted = before if wait_s >= 0 else before._replace(inode=0)
            return data, trusted.stamp(record)
    raise BadMediaError(CHANGES, "fetch")


def check_readable(task: SourceTask) -> None:
    """Check that this machine can read a file, without reading all of it.

    Raises:
        BadMediaError: at stage fetch, as `read_local`.
    """
    if is_embedded(task.source):
        _read_inside(task)
        return
    try:
        with _opened(task.source) as fd:
            _regular(os.fstat(fd), MAX_VIDEO_BYTES if task.kind == "video" else MAX_BYTES)
            os.read(fd, 1)
    except (OSError, ValueError) as error:
        raise _cannot_read(task, error) from error


@contextlib.contextmanager
def _opened(source: str) -> Iterator[int]:
    """Open a file for reading while the block runs."""
    # O_NONBLOCK: opening a named pipe would wait for a writer forever.
    fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _read(fd: int, size: int) -> bytes:
    """Return the next `size` bytes of a file, fewer if it ends before.

    In one system call if the file system allows it, as each call lets go of Python's lock, for which the
    threads that decode wait. A FileIO and its readall take five.
    """
    parts = []
    while size and (part := os.read(fd, size)):
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _cannot_read(task: SourceTask, error: OSError | ValueError) -> BadMediaError:
    why = why_no_file(task.source)
    if why == NO_FILE and not isinstance(error, FileNotFoundError):
        why = getattr(error, "strerror", None) or str(error)
    return BadMediaError(why, "fetch")


def check_unchanged(path: Path, record: MediaRecord) -> None:
    """Check that a file that was read a second time is still the one that `record` was made from.

    Raises:
        BadMediaError: at stage fetch: the file has changed, so what was decoded may not be what was hashed.
    """
    now = identify(str(path))
    if now is None or not now.matches(replace(record, inode=record.inode or now.inode)):
        raise BadMediaError(CHANGES, "fetch")


def unreadable(task: SourceTask) -> MediaRecord:
    """Return the record of a file that cannot be read. Its identity prevents a new try until it changes."""
    record = MediaRecord(source=task.source, kind=task.kind)
    identity = identify(task.source)
    return record if identity is None else identity.stamp(record)


def size_in_header(data: bytes) -> tuple[int, int]:
    """Return width and height of the upright image by its header; (0, 0) if they are not in it."""
    try:
        return image_size(data)
    except BadMediaError:
        return 0, 0  # a duplicate: if its bytes are bad, the source that is decoded reports it


def _refuse_video(fd: int) -> None:
    """Raise BadMediaError if a file that is too large for an image is a video."""
    found = recognise(os.read(fd, HEAD_BYTES))
    if found.kind == "video":
        raise BadMediaError(found.instead_of("image"))


def _regular(status: os.stat_result, most: int) -> Identity:
    if not stat.S_ISREG(status.st_mode):
        raise BadMediaError(what_is(status.st_mode), "fetch")
    if status.st_size > most:
        raise BadMediaError(f"{status.st_size} bytes, more than {most}", "fetch")
    return Identity.of(status)
