"""Copy the tables of a remote cache to the local disk, and update the copies at each start.

Everything that reads a cache then works on the copies; only the rows stay remote. Each copied table is
compared with its sha256, if the store has one, and with its seal.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import mmap
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from functools import cached_property
from pathlib import Path

from cache.errors import CorruptError, DiskError, NotFoundError, UnreachableError
from cache.format.checksums import check_seal
from cache.format.gate import decode, open_file, read_file
from cache.remote.listing import (
    MAX_LISTING_BYTES,
    FileInfo,
    is_sealed,
    is_table,
    is_tail,
    read_listing,
)
from cache.remote.retry import RetryPolicy, first_contact, with_retries
from cache.remote.stores import Store, read_range
from cache.store.files import PARTIAL, disk_errors, new_file, open_in_place, write_atomic
from cache.store.paths import LISTING, CacheRoot

log = logging.getLogger(__name__)

PIECE_BYTES = 4 << 20
"""Tables larger than this are fetched in pieces of this size, several at a time. Each is held in memory."""

SPARE_BYTES = 64 << 20
"""Bytes that a copy leaves free on the disk."""

LOG_EVERY_S = 10
"""Seconds between two log lines about a copy under way."""


COPIED = "copied.json"
"""File beside the copied tables: what they were copied from."""


def is_copy(root: CacheRoot) -> bool:
    """Return whether a folder has the copied tables of a remote cache. No command writes there."""
    return (root.path.parent / COPIED).is_file()


class Mirror:
    """The local copy of the tables of one remote cache."""

    def __init__(self, store: Store, policy: RetryPolicy, folder: Path) -> None:
        """Copy nothing yet.

        Args:
            store: the remote cache.
            policy: limits.
            folder: contains the copies of all remote caches, each in a folder named after its URL.
        """
        self._store, self._policy = store, policy
        digest = hashlib.sha256(store.url.encode()).hexdigest()[:16]
        slug = re.sub("[^A-Za-z0-9]+", "-", store.url).strip("-")[:40]
        self.folder = folder / f"{slug}-{digest}"
        self.root = CacheRoot(self.folder / "tables")

    @cached_property
    def remote_tables(self) -> Mapping[str, FileInfo]:
        """The tables of the remote cache, by name. The store is asked once.

        Raises:
            NotFoundError: the store has no cache, or no listing where it needs one.
            CacheError: the listing is invalid, or the store cannot be reached.
        """
        url = self._store.url
        try:
            with first_contact(self._policy, url):
                listing = with_retries(
                    self._policy,
                    f"{url}/{LISTING}",
                    lambda: self._store.read_file(LISTING, MAX_LISTING_BYTES),
                )
            return read_listing(listing, url)
        except UnreachableError as error:
            if not error.missing:
                raise
        found = with_retries(self._policy, url, self._store.list_files)
        tables = {name: info for name, info in found.items() if is_table(name) and info.nbytes > 0}
        if not tables:
            raise NotFoundError(f"{url}: no feature cache there (looked for its tables)")
        return tables

    def update(self, wanted: Callable[[str], bool]) -> None:
        """Copy new and changed tables, and remove those that the remote cache no longer has.

        Args:
            wanted: returns whether to handle the table of a name; others are left as they are.

        Raises:
            DiskError: the disk is too small for the copies.
            UnreachableError: a table cannot be fetched, or is damaged in the remote cache.
            CacheError: see `remote_tables`.
        """
        remote = {name: info for name, info in self.remote_tables.items() if wanted(name)}
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(open_in_place(self.folder / "lock", self.folder), "rb")
        with lock, disk_errors(self.folder):
            # Another process may be updating the same copies: wait, and then find nothing left to do.
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._remove_unfinished()
            copied = self._read_copied()
            local = {name for name in self._local_tables() if wanted(name)}
            stale = {
                name: info
                for name, info in remote.items()
                if name not in local or copied.get(name) != info or not self._is_intact(name, info)
            }
            if stale:
                self._copy(stale)
            for name in local - remote.keys():
                (self.root.path / name).unlink(missing_ok=True)
            now_copied = {n: info for n, info in copied.items() if not wanted(n)} | remote
            if now_copied != copied:
                values = {name: [info.nbytes, info.tag] for name, info in now_copied.items()}
                write_atomic(self.folder / COPIED, json.dumps(values).encode())

    # ---- local copies

    def _remove_unfinished(self) -> None:
        """Remove what processes that were killed have left. No other copies now: we hold the lock."""
        for path in self.root.path.rglob(f"*{PARTIAL}"):
            with contextlib.suppress(OSError):
                path.unlink()

    def _local_tables(self) -> Iterator[str]:
        for path in self.root.path.rglob("*"):
            name = path.relative_to(self.root.path).as_posix()
            if not is_table(name):
                continue
            if path.is_file() and not path.is_symlink():
                yield name
            elif not path.is_dir() or path.is_symlink():
                path.unlink()  # a link, a FIFO, a device: the table is copied again

    def _read_copied(self) -> dict[str, FileInfo]:
        """Return what the local tables were copied from; {} when the record is missing or damaged."""
        path = self.folder / COPIED
        try:
            values = decode(read_file(path), dict[str, tuple[int, str]], path)
        except (OSError, CorruptError):
            return {}
        return {name: FileInfo(nbytes=nbytes, tag=tag) for name, (nbytes, tag) in values.items()}

    def _is_intact(self, name: str, info: FileInfo) -> bool:
        path = self.root.path / name
        try:
            with open_file(path, self.root.path) as file:
                listed = info if is_tail(name) else None  # of others, the seal is enough
                return os.fstat(file.fileno()).st_size == info.nbytes and (
                    "/index/" in name or _damage(name, listed, file.fileno()) is None
                )
        except (OSError, CorruptError):
            return False

    # ---- copying

    def _copy(self, tables: Mapping[str, FileInfo]) -> None:
        total = sum(info.nbytes for info in tables.values())
        free = shutil.disk_usage(self.folder).free
        if total + SPARE_BYTES > free:
            raise DiskError(
                f"{self.folder}: the tables of {self._store.url} need {total / 1e9:.2f} GB, "
                f"{free / 1e9:.2f} free; choose another folder: --mirror DIR"
            )
        log.info("%s: copying %d tables, %.1f MB", self._store.url, len(tables), total / 1e6)
        started = logged = time.monotonic()
        copied = 0
        with ThreadPoolExecutor(self._policy.connections) as threads:
            for nbytes in self._fetch_all(tables, threads):
                copied += nbytes
                if time.monotonic() - logged > LOG_EVERY_S:
                    logged = time.monotonic()
                    log.info("copied %.1f of %.1f MB", copied / 1e6, total / 1e6)
        log.info("%s: copied in %.1f s", self._store.url, time.monotonic() - started)

    def _fetch_all(
        self, tables: Mapping[str, FileInfo], threads: ThreadPoolExecutor
    ) -> Iterator[int]:
        """Copy the large tables one by one, then the small ones side by side; yield each one's bytes.

        Nothing is under way any more when this ends, by Ctrl-C too: `stop` ends the requests soon.
        """
        stop = threading.Event()
        small = {name: info for name, info in tables.items() if info.nbytes <= PIECE_BYTES}
        try:
            for name, info in tables.items():
                if name not in small:
                    yield self._fetch(name, info, stop, threads)
            fetches = [threads.submit(self._fetch, name, small[name], stop) for name in small]
            for future in as_completed(fetches):
                yield future.result()
        finally:
            stop.set()
            threads.shutdown(wait=True, cancel_futures=True)

    def _fetch(
        self,
        name: str,
        info: FileInfo,
        stop: threading.Event,
        threads: ThreadPoolExecutor | None = None,
    ) -> int:
        """Copy one table, its pieces by several threads if given, again when it arrives damaged."""

        def fetch_piece(fd: int, start: int) -> None:
            data = memoryview(bytearray(min(PIECE_BYTES, info.nbytes - start)))
            read_range(self._store, self._policy, name, start, data, info.nbytes, stop)
            written = 0
            # Not through a mapping, where a full disk is a signal instead of an error.
            while written < len(data):
                written += os.pwrite(fd, data[written:], start + written)

        def fetch_all(fd: int) -> None:
            starts = range(0, info.nbytes, PIECE_BYTES)
            if threads is None:
                for start in starts:
                    fetch_piece(fd, start)
                return
            pieces = [threads.submit(fetch_piece, fd, start) for start in starts]
            try:
                for piece in pieces:
                    piece.result()
            except BaseException:  # no piece is written once the file is closed
                stop.set()
                for piece in pieces:
                    piece.cancel()
                wait(pieces)
                raise

        # Not durable: a torn table fails its seal and is fetched again.
        with new_file(self.root.path / name, root=self.folder, durable=False) as file:
            for _ in range(self._policy.damage_tries):
                fetch_all(file.fileno())
                if (damage := _damage(name, info, file.fileno())) is None:
                    return info.nbytes
            raise UnreachableError(
                f"{self._store.url}/{name}: {damage}, {self._policy.damage_tries} times; it has changed "
                f"since {LISTING} was written (there: python -m cache.share --features DIR), or is damaged "
                "(python -m cache.verify --features DIR)"
            )


def _damage(name: str, info: FileInfo | None, fd: int) -> str | None:
    """Return what is wrong with an open table, or None.

    Args:
        name: the table.
        info: has its sha256, if the store tells it; None: only its seal is checked.
        fd: the open file, which is not empty.
    """
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as data:
        kind, _, digest = info.tag.partition(":") if info else ("", "", "")
        if kind == "sha256" and hashlib.sha256(data).hexdigest() != digest:
            return "its sha256 differs from the listed one"
        if is_sealed(name):
            try:
                check_seal(data, Path(name))
            except CorruptError as error:
                return error.what
    return None
