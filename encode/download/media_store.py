"""Keep media as files named by the sha256 of their bytes: FOLDER/ab/abcd...

A file is complete or absent while the machine runs. Nothing is flushed to the disk, because on many disks
that takes longer than downloading again. Damage by a power cut is detected by the hash at the next `get`,
and the file then counts as absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import time
from pathlib import Path

from cache.errors import CorruptError
from cache.format.gate import open_file
from cache.store.files import PARTIAL, new_file

log = logging.getLogger(__name__)

STALE_S = 3600
"""Age in seconds at which a temporary file is removed: no write takes this long."""

MAX_BYTES = 1 << 30
"""Bytes of a kept file, at most: more than any download may have."""

_KEY = re.compile(r"[0-9a-f]{64}")


class MediaStore:
    """A folder of media that any number of threads, processes and machines may share."""

    def __init__(self, folder: Path) -> None:
        """Create the folder if it is missing, and remove temporary files of killed processes."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        newest = time.time() - STALE_S
        for folder_here in folder.glob("[0-9a-f][0-9a-f]"):
            if folder_here.is_symlink():  # `put` refuses it
                continue
            for partial in folder_here.glob(f"*{PARTIAL}"):
                with contextlib.suppress(FileNotFoundError):  # another process removed it
                    if partial.lstat().st_mtime < newest:
                        partial.unlink()

    def put(self, key: str, data: bytes) -> None:
        """Keep `data`, whose sha256 is `key`; a damaged file is replaced.

        Raises:
            OSError: the file cannot be written. An existing file is unchanged.
            CorruptError: a link or special file has its name, or that of its folder.
        """
        path = self._path(key)
        with contextlib.suppress(FileNotFoundError), open_file(path, self._folder) as file:
            if file.read(len(data) + 1) == data:
                return
        with new_file(path, root=self._folder, durable=False) as file:
            file.write(data)

    def has(self, key: str) -> bool:
        """Return whether a file exists for `key`. Only `get` checks its bytes."""
        return self._path(key).exists()

    def get(self, key: str) -> bytes | None:
        """Return the bytes whose sha256 is `key`; None if they are absent or damaged.

        Raises:
            OSError: the file exists and cannot be read.
        """
        path = self._path(key)
        try:
            with open_file(path, self._folder, most=MAX_BYTES) as file:
                data = file.read()
        except FileNotFoundError:
            return None
        except CorruptError as error:
            log.warning("%s; it is not used", error)
            return None
        if hashlib.sha256(data).hexdigest() != key:
            log.warning("%s is damaged: its sha256 differs from its name; it is not used", path)
            return None
        return data

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not a key: 64 hex digits in lower case")
        return self._folder / key[:2] / key
