"""Rows of a space that lies elsewhere: what is not kept here comes by ranged requests, several at a time.

Nothing but the rows asked for is fetched, neighbours by one request. Each is compared with the crc32c of its
commit before anybody sees it, whatever stood between the disk there and the memory here; one that fails is
fetched again, and then named.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cache.errors import UnreachableError
from cache.format.checksums import crc32c
from cache.remote.retry import RetryPolicy, Store, read_range
from cache.remote.row_cache import RowCache
from cache.store.paths import SpacePaths
from cache.store.reader import FeatureReader, adjacent_runs

REQUEST_BYTES = 8 << 20
"""Neighbouring rows of one request at most: its latency is small, and the work is shared."""


@dataclass(kw_only=True)
class Traffic:
    """What a reader has done."""

    rows_fetched: int = 0
    """Rows that came over the network."""
    rows_kept: int = 0
    """Rows that were here already."""
    requests: int = 0
    """Ranges asked for, tries not counted."""
    nbytes: int = 0
    """Bytes of these ranges."""


class RemoteFiles:
    """Shards that lie elsewhere, as a FeatureReader reads them: bytes, neither kept nor checked."""

    def __init__(self, store: Store, rules: RetryPolicy, paths: SpacePaths) -> None:
        """Nothing is read yet; `paths` are those of the local tables."""
        self.store, self.rules, self._paths = store, rules, paths

    def name(self, array: str, shard: int) -> str:
        """Of a shard's file below the cache's root."""
        path = self._paths.shard(array, shard)
        return path.relative_to(self._paths.root.parent.parent).as_posix()

    def read(self, array: str, shard: int, offset: int, targets: Sequence[memoryview]) -> None:
        """See `cache.store.shard_files.ShardFiles`."""
        data = memoryview(bytearray(sum(map(len, targets))))
        read_range(self.store, self.rules, self.name(array, shard), offset, data, None)
        for target in targets:
            target[:], data = data[: len(target)], data[len(target) :]


class RemoteReader(FeatureReader):
    """A FeatureReader whose rows lie elsewhere. Always checked."""

    def __init__(self, paths: SpacePaths, store: Store, rules: RetryPolicy, rows: RowCache) -> None:
        """Open the local tables of a space.

        Args:
            paths: its tables, here.
            store: its shards, there.
            rules: limits.
            rows: where rows are kept.
        """
        self._remote = RemoteFiles(store, rules, paths)
        super().__init__(paths, files=self._remote)
        self._rows = rows
        self._stop = threading.Event()
        self._asking: ThreadPoolExecutor | None = None
        self._asking_pid = 0
        self._lock = threading.Lock()
        self.traffic = Traffic()

    def give_up(self) -> None:
        """Let reads that are under way end, with an error: nobody waits for them any more."""
        self._stop.set()
        self._stop = threading.Event()

    def read_into(
        self, array: str, rows: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]
    ) -> None:
        """As of FeatureReader.

        Raises:
            UnreachableError: a row cannot be had, or not intact.
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
            self.traffic.rows_kept += len(places) - len(missing)
            self.traffic.rows_fetched += len(missing)
        limit = max(1, REQUEST_BYTES // geometry.slot_bytes)
        runs = adjacent_runs(missing, geometry.slots, limit)
        self._together(array, [{missing[i]: places[missing[i]] for i in run} for run in runs])
        for i, number in enumerate(numbers):
            if i != first[number]:
                out[i] = out[first[number]]

    def _together(self, array: str, runs: list[_Run]) -> None:
        """Fetch runs, several at a time; none is under way any more when it returns or raises."""
        stop = self._stop
        if len(runs) < 2:
            for run in runs:
                self._fetch(array, run, stop)
            return
        pool = self._askers()
        futures: list[Future[None]] = [pool.submit(self._fetch, array, run, stop) for run in runs]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)

    def _fetch(self, array: str, run: _Run, stop: threading.Event) -> None:
        """Neighbouring rows, by one request; those that fail their checksum, each by another."""
        for _ in range(self._remote.rules.damage_tries):
            self._request(array, run, stop)
            bad = {n: place for n, place in run.items() if crc32c(place[1]) != place[0]}
            for number, (crc, row) in run.items():
                if number not in bad:
                    self._rows.put(array, number, crc, row)
            if not bad:
                return
            number, place = next(iter(bad.items()))
            for other in list(bad)[1:]:
                self._fetch(array, {other: bad[other]}, stop)
            run = {number: place}
        shard = number // self.geometry[array].slots
        raise UnreachableError(
            f"{self._remote.store.place}/{self._remote.name(array, shard)}: row {number} fails its checksum, "
            f"{self._remote.rules.damage_tries} times; it is damaged there (python -m cache.verify --deep), "
            "or something on the way changes it"
        )

    def _request(self, array: str, run: _Run, stop: threading.Event) -> None:
        geometry = self.geometry[array]
        shard, slot = divmod(next(iter(run)), geometry.slots)
        stride, size = geometry.slot_bytes, geometry.row_bytes
        nbytes = (len(run) - 1) * stride + size
        targets = [row for _, row in run.values()]
        data = targets[0] if len(run) == 1 else memoryview(bytearray(nbytes))
        read_range(
            self._remote.store,
            self._remote.rules,
            self._remote.name(array, shard),
            geometry.row_offset(slot),
            data,
            self.index[array].nbytes[shard],
            stop,
        )
        if len(run) > 1:
            for i, target in enumerate(targets):
                target[:] = data[i * stride : i * stride + size]
        with self._lock:
            self.traffic.requests += 1
            self.traffic.nbytes += nbytes

    def _askers(self) -> ThreadPoolExecutor:
        """Those that ask; a forked child needs its own."""
        with self._lock:
            if self._asking is None or self._asking_pid != os.getpid():
                connections = self._remote.rules.connections
                self._asking = ThreadPoolExecutor(connections, thread_name_prefix="remote")
                self._asking_pid = os.getpid()
            return self._asking


_Run = dict[int, tuple[int, memoryview]]
"""Row number -> its crc32c, and where its bytes go; ascending, neighbours in one shard."""
