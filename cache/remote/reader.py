"""Read rows of a remote space: from the local row cache, else by ranged requests, several at a time.

Only the requested rows are fetched, adjacent ones by one request. Each row is compared with the crc32c of its
commit before it is returned, so damage on the way is found. A row that fails is fetched again on its own, and
after `RetryPolicy.damage_tries` attempts an error names it.
"""

from __future__ import annotations

import threading
from concurrent.futures import wait
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cache.errors import UnreachableError
from cache.format.checksums import crc32c
from cache.remote.retry import RetryPolicy
from cache.remote.row_cache import RowCache
from cache.remote.stores import Store, read_range
from cache.store.paths import SpacePaths
from cache.store.reader import FeatureReader, adjacent_runs

REQUEST_BYTES = 8 << 20
"""The most bytes of adjacent rows in one request; longer runs are shared among the connections."""

_Run = dict[int, tuple[int, memoryview]]
"""Adjacent rows of one shard, ascending: row number -> its crc32c, and where its bytes go."""


@dataclass(kw_only=True)
class ReadStats:
    """Counts of what one reader has read."""

    rows_fetched: int = 0
    """Rows that came over the network."""
    rows_cached: int = 0
    """Rows that came from the local row cache."""
    requests: int = 0
    """Ranges requested, without repeated attempts."""
    nbytes: int = 0
    """Bytes of these ranges."""


class RemoteReader(FeatureReader):
    """A FeatureReader of a remote space. It verifies every row."""

    def __init__(
        self, paths: SpacePaths, store: Store, policy: RetryPolicy, rows: RowCache
    ) -> None:
        """Open the local tables of a space.

        Args:
            paths: the local tables.
            store: the store that has the shards.
            policy: limits.
            rows: the local row cache.
        """
        super().__init__(paths, mapped=False, threads=policy.connections + 1)
        self._store, self._policy, self._rows = store, policy, rows
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._names: dict[tuple[str, int], str] = {}
        self.stats = ReadStats()

    def cancel_reads(self) -> None:
        """Make the reads under way in other threads raise UnreachableError soon."""
        self._stop.set()
        self._stop = threading.Event()

    def read_into(
        self, array: str, rows: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]
    ) -> None:
        """Read the stored bytes of rows (n,) into `out` (n, row_bytes) uint8, in that order.

        Raises:
            UnreachableError: a row cannot be fetched, or is damaged in the remote cache.
            IndexError: a row number is not committed (as -1).
            ValueError: `out` is not contiguous uint8 of that shape.
        """
        geometry, index = self.geometry[array], self.index[array]
        size, rows = geometry.row_bytes, np.asarray(rows, np.int64)
        if out.shape != (len(rows), size) or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype} {out.shape}, not uint8 {(len(rows), size)}")
        if not len(rows):
            return
        crcs: list[int] = index.crcs[index.positions(rows)].tolist()
        numbers: list[int] = rows.tolist()
        flat = out.data.cast("B")
        first = {number: i for i, number in reversed(list(enumerate(numbers)))}
        places = {number: (crcs[i], flat[i * size : (i + 1) * size]) for number, i in first.items()}
        missing = [n for n in sorted(places) if not self._rows.get(array, n, *places[n])]
        with self._lock:
            self.stats.rows_cached += len(places) - len(missing)
            self.stats.rows_fetched += len(missing)
        limit = max(1, REQUEST_BYTES // geometry.slot_bytes)
        runs = adjacent_runs(missing, geometry.slots, limit)
        self._fetch_all(array, [{missing[i]: places[missing[i]] for i in run} for run in runs])
        for i, number in enumerate(numbers):
            if i != first[number]:
                out[i] = out[first[number]]

    def _fetch_all(self, array: str, runs: list[_Run]) -> None:
        """Fetch runs, several at a time. No fetch is under way any more when this returns or raises."""
        stop = self._stop
        if len(runs) < 2:
            for run in runs:
                self._fetch(array, run, stop)
            return
        pool = self._threads_here()
        futures = [pool.submit(self._fetch, array, run, stop) for run in runs]
        try:
            for future in futures:
                future.result()
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C: a request may have minutes left
                self.cancel_reads()
            raise
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def _fetch(self, array: str, run: _Run, stop: threading.Event) -> None:
        """Fetch adjacent rows by one request, and each row that fails its checksum by another one."""
        for _ in range(self._policy.damage_tries):
            self._request(array, run, stop)
            bad = {n: place for n, place in run.items() if crc32c(place[1]) != place[0]}
            for number, (crc, row) in run.items():
                if number not in bad:
                    self._rows.put(array, number, crc, row)
            if not bad:
                return
            number, *others = bad
            for other in others:
                self._fetch(array, {other: bad[other]}, stop)
            run = {number: bad[number]}
        name = self._name(array, number // self.geometry[array].slots)
        raise UnreachableError(
            f"{self._store.url}/{name}: row {number} fails its checksum, {self._policy.damage_tries} times; "
            "it is damaged there (python -m cache.verify --deep --features DIR), or something on the way "
            "changes it"
        )

    def _request(self, array: str, run: _Run, stop: threading.Event) -> None:
        """Fetch adjacent rows by one request, unverified."""
        geometry = self.geometry[array]
        shard, slot = divmod(next(iter(run)), geometry.slots)
        stride, size = geometry.slot_bytes, geometry.row_bytes
        nbytes = (len(run) - 1) * stride + size
        targets = [row for _, row in run.values()]
        data = targets[0] if len(run) == 1 else memoryview(bytearray(nbytes))
        read_range(
            self._store,
            self._policy,
            self._name(array, shard),
            geometry.row_offset(slot),
            data,
            self.index[array].nbytes[shard],
            stop,
        )
        if len(run) > 1:
            for i, target in enumerate(targets):
                target[:] = data[i * stride : i * stride + size]
        with self._lock:
            self.stats.requests += 1
            self.stats.nbytes += nbytes

    def _name(self, array: str, shard: int) -> str:
        """Return the name of a shard's file, relative to the root of the cache."""
        # Kept, since each row asks for it and pathlib is slow.
        if (array, shard) not in self._names:
            path = self.paths.shard(array, shard).relative_to(self.path.parent.parent)
            self._names[array, shard] = path.as_posix()
        return self._names[array, shard]
