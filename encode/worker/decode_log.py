"""What each thread of a worker is decoding, where it survives the worker: who killed it, and who hangs.

One small file a worker, a slot a thread, rewritten in place before and after each decode. Nothing is
fsynced: a killed process loses none of what it wrote, and after a power cut nobody asks.
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

from cache.store.paths import SpacePaths

SUFFIX = ".decoding"
SLOT_BYTES = 8192  # a path has at most 4096 bytes
ALIVE_S = 1.0


@dataclass(frozen=True, kw_only=True)
class DecodeEntry:
    """One decode under way."""

    source: str
    """What is being decoded."""
    key: str
    """Its sha256."""
    since: float
    """Start, or when it last got on; seconds since the epoch."""

    @property
    def age_s(self) -> float:
        """How long it has been going on."""
        return time.time() - self.since


def decode_log_file(paths: SpacePaths, worker: int) -> Path:
    """Beside the worker's lock: a space itself holds only what is checked."""
    return paths.worker_lock(str(worker)).with_suffix(SUFFIX)


def clear_decode_log(paths: SpacePaths) -> list[DecodeEntry]:
    """Remove what earlier jobs left, for whoever holds the driver's lock; returns it."""
    files = list(paths.locks_dir.glob(f"worker-*{SUFFIX}"))
    left = [entry for path in files for entry in read_entries(path)]
    for path in files:
        path.unlink()
    return left


class DecodeLog:
    """The writing side, one a worker, for `threads` threads."""

    def __init__(self, path: Path, threads: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb", buffering=0)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(threads):
            self._free.put(slot)

    @contextlib.contextmanager
    def decoding(self, source: str, key: str) -> Iterator[Callable[[], None]]:
        """Leave a entry while the block runs; what it yields is called now and then by long decodes
        that get on, whose time then counts anew."""
        slot = self._free.get()
        said = 0.0

        def alive() -> None:
            nonlocal said
            if time.time() - said > ALIVE_S:
                said = time.time()
                entry = asdict(DecodeEntry(source=source, key=key, since=said))
                text = json.dumps(entry, ensure_ascii=False)
                self._write(slot, text.encode()[:SLOT_BYTES])

        try:
            alive()
            yield alive
        finally:
            self._write(slot, b"")
            self._free.put(slot)

    def _write(self, slot: int, text: bytes) -> None:
        # The blank tail overwrites what a longer entry left; an empty slot needs only its first byte.
        os.pwrite(self._file.fileno(), text.ljust(SLOT_BYTES if text else 1), slot * SLOT_BYTES)

    def close(self) -> None:
        """No thread decodes any more."""
        self._file.close()
        Path(self._file.name).unlink(missing_ok=True)


def read_entries(path: Path) -> list[DecodeEntry]:
    """What the worker was decoding when it last wrote."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    entries = []
    for at in range(0, len(data), SLOT_BYTES):
        # A slot that is just being written may be torn: the next look will see it whole.
        with contextlib.suppress(ValueError, TypeError):
            entries.append(DecodeEntry(**json.loads(data[at : at + SLOT_BYTES])))
    return entries
