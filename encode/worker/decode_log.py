"""A file that names what each thread of a worker is decoding. It outlives a worker that crashes.

The driver reads it to find the files that crash or hang a worker. Each thread has a slot, rewritten in place
before and after each decode. Nothing is fsynced: a killed process loses nothing it has written, and after a
power failure there is no driver left to read it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cache.errors import CorruptError
from cache.format.gate import decode, read_file
from cache.store.files import create_file, make_folder, remove_file
from cache.store.paths import SpacePaths

SUFFIX = ".decoding"
SLOT_BYTES = 256 << 10
"""Bytes between two slots: more than the longest URL or path takes. The file is sparse."""
MAX_SLOTS = 1024
"""Threads of a worker, at most, as far as its log is read."""
UPDATE_EVERY_S = 1.0
"""Seconds between two updates of a decode that makes progress."""


@dataclass(frozen=True, kw_only=True)
class DecodeEntry:
    """One decode in progress."""

    source: str
    """The source that is being decoded."""
    key: str
    """Its sha256."""
    since: float
    """Time of its start or of its last progress, seconds since the epoch by the worker's own clock."""


def decode_log_file(paths: SpacePaths, worker: int) -> Path:
    """Return the path of a worker's log: beside its lock, since a space holds only files with checksums."""
    return paths.worker_lock(str(worker)).with_suffix(SUFFIX)


def clear_decode_log(paths: SpacePaths) -> list[DecodeEntry]:
    """Remove the logs of earlier jobs; return their entries. The caller holds the driver's lock."""
    files = list(paths.locks_dir.glob(f"worker-*{SUFFIX}"))
    left = [entry for path in files for entry in read_entries(path, paths.cache_root)]
    for path in files:
        remove_file(path, paths.cache_root)
    return left


class DecodeLog:
    """The log of one worker, for `threads` decoding threads."""

    def __init__(self, path: Path, threads: int, root: Path | None = None):
        """Create the file; `root` is the cache's folder, below which no link is followed."""
        make_folder(path.parent, root, durable=False)
        with contextlib.suppress(FileNotFoundError):
            remove_file(path, root)
        self._path, self._root = path, root
        self._fd = create_file(path, root)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(threads):
            self._free.put(slot)

    @contextlib.contextmanager
    def decoding(self, source: str, key: str) -> Iterator[Callable[[], None]]:
        """Keep an entry in the log while the block runs.

        Yields a function that long decodes call when they make progress: it restarts the entry's age.
        """
        slot = self._free.get()
        written_at = 0.0

        def progress() -> None:
            nonlocal written_at
            if time.time() - written_at > UPDATE_EVERY_S:
                written_at = time.time()
                entry = asdict(DecodeEntry(source=source, key=key, since=written_at))
                text = json.dumps(entry, ensure_ascii=False)
                self._write(slot, text.encode())

        try:
            progress()
            yield progress
        finally:
            self._write(slot, b"")
            self._free.put(slot)

    def _write(self, slot: int, text: bytes) -> None:
        # The line break ends the entry, also before the rest of a longer one. JSON writes it as an escape.
        if len(text) < SLOT_BYTES:
            os.pwrite(self._fd, text + b"\n", slot * SLOT_BYTES)

    def close(self) -> None:
        """Remove the log. No thread may be decoding."""
        os.close(self._fd)
        with contextlib.suppress(FileNotFoundError):
            remove_file(self._path, self._root)


def read_entries(path: Path, root: Path | None = None) -> list[DecodeEntry]:
    """Return what a worker was decoding when it last wrote its log.

    Raises:
        CorruptError: the log is no file, or is larger than any.
    """
    try:
        data = read_file(path, root, most=MAX_SLOTS * SLOT_BYTES)
    except FileNotFoundError:
        return []
    entries = []
    for at in range(0, len(data), SLOT_BYTES):
        # A slot that is being written may be torn: the next read will find it complete.
        with contextlib.suppress(CorruptError):
            entry = data[at : at + SLOT_BYTES].partition(b"\n")[0]
            entries.append(decode(entry, DecodeEntry, path))
    return entries
