"""The tables of a cache that lies elsewhere, as local files: copied once, compared at each start.

Everything that reads a cache then works on them as on any other; only the rows stay where they are. What is
copied is checked: its sha256 where the other side says it, and its seal, as always.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from cache.errors import CorruptError, DiskError, NotFoundError, UnreachableError
from cache.format.checksums import check_seal, check_seal_file
from cache.remote.listing import MOST_BYTES, as_tables, is_sealed, is_table, read_listing
from cache.remote.retry import Entry, RetryPolicy, Store, patiently, read_range
from cache.store.files import new_file, write_atomic
from cache.store.paths import LISTING, CacheRoot

log = logging.getLogger(__name__)

PIECE_BYTES = 8 << 20
"""Large tables come in pieces of this size, several at a time."""

LOG_EVERY_S = 10
"""Seconds between two log lines about a copy under way."""


class Mirror:
    """The local copy of one cache's tables."""

    def __init__(self, store: Store, rules: RetryPolicy, folder: Path) -> None:
        """Nothing is copied yet.

        Args:
            store: where the cache lies.
            rules: limits.
            folder: where the copies of all caches are; this one's has a name made of its place.
        """
        self._store, self._rules = store, rules
        digest = hashlib.sha256(store.place.encode()).hexdigest()[:16]
        slug = re.sub("[^A-Za-z0-9]+", "-", store.place).strip("-")[:40]
        self.folder = folder / f"{slug}-{digest}"
        self.root = CacheRoot(self.folder / "tables")
        self._entries: dict[str, Entry] | None = None

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The tables there, as they are now: asked for once.

        Raises:
            CacheError: it cannot be said, or makes no sense.
        """
        if self._entries is None:
            self._entries = self._listed() or self._found()
        return self._entries

    def refresh(self, wanted: Callable[[str], bool]) -> None:
        """Make the local tables with these names what they are there: new and changed ones come, others go.

        Raises:
            CacheError: a table cannot be had, or is damaged there.
        """
        entries = {name: entry for name, entry in self.entries.items() if wanted(name)}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("a") as file:
            fcntl.flock(
                file, fcntl.LOCK_EX
            )  # another process does the same: wait, then find it done
            known = self._known()
            here = {name for name in self._local() if wanted(name)}
            stale = {
                name: entry
                for name, entry in entries.items()
                if name not in here or known.get(name) != entry or not self._intact(name, entry)
            }
            if stale:
                self._copy(stale)
            for name in here - entries.keys():
                (self.root.path / name).unlink(missing_ok=True)
            kept = {n: e for n, e in known.items() if not wanted(n)} | entries
            self._remember(kept, known)

    # ---- what is there

    def _listed(self) -> dict[str, Entry] | None:
        """What `listing.json` says; None where there is none and none is needed."""
        place = self._store.place
        try:
            data = patiently(
                self._rules, f"{place}/{LISTING}", lambda: self._store.whole(LISTING, MOST_BYTES)
            )
        except UnreachableError as error:
            if not error.missing:
                raise
            data = None
        if data is not None:
            path = self.folder / LISTING
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)
            return read_listing(path, place)
        if self._store.needs_listing:
            raise NotFoundError(
                f"{place}: no {LISTING}, and a web server cannot be asked what it has; where the cache is: "
                "python -m cache.share --features cache, and serve that file with it"
            )
        return None

    def _found(self) -> dict[str, Entry]:
        entries = as_tables(patiently(self._rules, self._store.place, self._store.names))
        if not entries:
            raise NotFoundError(
                f"{self._store.place}: no feature cache there (looked for its tables)"
            )
        return entries

    # ---- what is here

    def _local(self) -> Iterator[str]:
        for path in self.root.path.rglob("*"):
            name = path.relative_to(self.root.path).as_posix()
            if is_table(name):
                yield name

    def _known(self) -> dict[str, Entry]:
        """What the local tables were copied from; nothing when that cannot be told any more."""
        try:
            values = json.loads((self.folder / "copied.json").read_bytes())
            return {name: Entry(nbytes=nbytes, tag=tag) for name, (nbytes, tag) in values.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def _remember(self, entries: Mapping[str, Entry], before: Mapping[str, Entry]) -> None:
        if entries != before:
            values = {name: [entry.nbytes, entry.tag] for name, entry in entries.items()}
            write_atomic(self.folder / "copied.json", json.dumps(values).encode())

    def _intact(self, name: str, entry: Entry) -> bool:
        path = self.root.path / name
        try:
            if is_sealed(name):
                check_seal_file(path)
            return path.stat().st_size == entry.nbytes
        except (OSError, CorruptError):
            return False

    # ---- copying

    def _copy(self, entries: Mapping[str, Entry]) -> None:
        total = sum(entry.nbytes for entry in entries.values())
        room = shutil.disk_usage(self.folder).free
        if total > room:
            raise DiskError(
                f"{self.folder}: the tables of {self._store.place} need {total / 1e9:.2f} GB, "
                f"{room / 1e9:.2f} free; choose another place: --mirror DIR"
            )
        log.info("%s: copying %d tables, %.1f MB", self._store.place, len(entries), total / 1e6)
        started = logged = time.monotonic()
        copied = 0
        with ThreadPoolExecutor(self._rules.connections) as threads:
            for nbytes in self._fetch_all(entries, threads):
                copied += nbytes
                if time.monotonic() - logged > LOG_EVERY_S:
                    logged = time.monotonic()
                    log.info("copied %.1f of %.1f MB", copied / 1e6, total / 1e6)
        log.info("%s: copied in %.1f s", self._store.place, time.monotonic() - started)

    def _fetch_all(
        self, entries: Mapping[str, Entry], threads: ThreadPoolExecutor
    ) -> Iterator[int]:
        """Copy the large tables one by one, then the small ones side by side; yield each one's bytes."""
        small = {n: e for n, e in entries.items() if e.nbytes <= PIECE_BYTES}
        for name, entry in entries.items():
            if name not in small:
                yield self._fetch(name, entry, threads)
        done = [threads.submit(self._fetch, n, e, None) for n, e in small.items()]
        try:
            for future in as_completed(done):
                yield future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, name: str, entry: Entry, threads: ThreadPoolExecutor | None) -> int:
        """One table; what comes damaged is asked for again a few times."""
        path = self.root.path / name
        # Not durable: a torn file fails its seal and is fetched again.
        with new_file(path, durable=False) as file:
            file.truncate(entry.nbytes)
            with mmap.mmap(file.fileno(), entry.nbytes) as data, memoryview(data) as whole:
                self._fill(name, entry, whole, threads)
        return entry.nbytes

    def _fill(
        self, name: str, entry: Entry, whole: memoryview, threads: ThreadPoolExecutor | None
    ) -> None:
        def piece(start: int) -> None:
            with whole[start : start + PIECE_BYTES] as target:
                read_range(self._store, self._rules, name, start, target, entry.nbytes)

        for _ in range(self._rules.damage_tries):
            starts = range(0, entry.nbytes, PIECE_BYTES)
            for _done in threads.map(piece, starts) if threads else map(piece, starts):
                pass
            if (what := _damage(name, entry, whole)) is None:
                return
        raise UnreachableError(
            f"{self._store.place}/{name}: {what}, {self._rules.damage_tries} times; it has changed since "
            f"{LISTING} was made (there: python -m cache.share), or is damaged (python -m cache.verify)"
        )


def _damage(name: str, entry: Entry, data: memoryview) -> str | None:
    if entry.tag.startswith("sha256:") and hashlib.sha256(data).hexdigest() != entry.tag[7:]:
        return "its sha256 is another than listed"
    if is_sealed(name):
        try:
            check_seal(bytes(data), Path(name))
        except CorruptError as error:
            return error.what
    return None
