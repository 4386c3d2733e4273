"""Media kept as files, named by the sha256 of their bytes: folder/ab/abcd...

A file appears whole or not at all as long as the machine runs. What a power cut leaves is found by the hash
at the next `get`, and counts as not there: so nothing is waited for to reach the disk, which would cost
more than fetching on many disks.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import time
from pathlib import Path

__all__ = ["MediaStore"]

log = logging.getLogger(__name__)

STALE_S = 3600
"""A temporary file this old belongs to nobody: no write takes so long."""

_KEY = re.compile(r"[0-9a-f]{64}")
_PART = ".part"


class MediaStore:
    """See above. Any number of threads, processes and machines may share one folder."""

    def __init__(self, folder: Path) -> None:
        """Open, or make, the store; remove what killed processes left half-written."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        newest = time.time() - STALE_S
        for part in folder.glob(f"[0-9a-f][0-9a-f]/*{_PART}"):
            with contextlib.suppress(FileNotFoundError):  # another process is as tidy
                if part.stat().st_mtime < newest:
                    part.unlink()

    def put(self, key: str, data: bytes) -> None:
        """Keep `data`, whose sha256 is `key`; a damaged file is replaced.

        Raises:
            OSError: it cannot be written. What was there before still is.
        """
        path = self._path(key)
        if self._holds(path, data):
            return
        path.parent.mkdir(exist_ok=True)
        fd, name = tempfile.mkstemp(dir=path.parent, suffix=_PART)
        part = Path(name)
        try:
            with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor has no path
                os.fchmod(fd, 0o644)  # mkstemp's own is for the user alone
                file.write(data)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def has(self, key: str) -> bool:
        """Whether bytes are kept under this key; `get` says whether they are sound."""
        return self._path(key).exists()

    def get(self, key: str) -> bytes | None:
        """The bytes whose sha256 is `key`; None when they are not there, or damaged.

        Raises:
            OSError: they are there and cannot be read.
        """
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(data).hexdigest() != key:
            log.warning("%s is damaged: its bytes have another hash; taken as not there", path)
            return None
        return data

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key: 64 hex digits in lower case")
        return self._folder / key[:2] / key

    def _holds(self, path: Path, data: bytes) -> bool:
        try:
            return path.stat().st_size == len(data) and path.read_bytes() == data
        except FileNotFoundError:
            return False
