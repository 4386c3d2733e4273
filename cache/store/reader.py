"""Read a space: which rows exist, and their bytes.

    reader = FeatureReader(find_space(root, None))
    rows = reader.lookup("image", keys)                  # (n,) int64, -1 = missing
    reader.read_into("image", rows, buffer)              # (n, row_bytes) uint8, packed
    features = reader.read("image", key)                 # (tokens, width) float16, unpacked

Opening reads the commits, or the index file made from them, but no shard. Each row that is read is compared
with the crc32c in its commit, which also detects an intact row in a wrong place. Any number of threads and
forked processes may share one reader.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cache.errors import CorruptError
from cache.format import codec
from cache.format.checksums import crc32c
from cache.format.shard import Geometry
from cache.format.spec import ARRAYS
from cache.store.commits import key_bytes
from cache.store.index_file import open_index
from cache.store.paths import SpacePaths
from cache.store.row_index import RowIndex
from cache.store.shard_files import AheadFiles, LocalFiles, ShardFiles
from cache.store.space import read_info

RUN_ROWS = 512
"""Adjacent rows that one call reads: with the bytes between them 1,023 buffers, and Linux accepts 1,024."""

RUN_BYTES = 2 << 20
"""Bytes that one call reads, few enough to be still in the processor's cache when they are checked."""

AHEAD_RUNS = 64
"""Reads that are begun together when the first must wait for the disk, which serves many as fast as a few."""

THREAD_BYTES = 1 << 20
"""Another thread is worth waking for this many bytes."""

Keys = Sequence[str] | npt.NDArray[np.uint8]
"""Keys of media: n strings of 64 hex digits, or (n, 32) bytes."""


class FeatureReader:
    """The rows of one space that were committed when it was opened."""

    def __init__(
        self,
        space_path: Path | SpacePaths,
        checked: bool = True,
        files: ShardFiles | None = None,
        *,
        threads: int = 1,
        mapped: bool = True,
    ):
        """Open a space.

        Args:
            space_path: its folder.
            checked: whether every row that is read is compared with its crc32c.
            files: where the shards are read from, if not from that folder.
            threads: threads that read the rows of one call, including the caller's. A caller with several
                threads of its own (`train.data.loader`) needs no more than 1.
            mapped: whether shards that are read repeatedly are mapped. It is the fastest way to read rows
                that the page cache holds; they then count as memory of this process too.

        Raises:
            NotFoundError: there is no space at `space_path`.
            CorruptError: space.json or a commit is damaged.
        """
        paths = space_path if isinstance(space_path, SpacePaths) else SpacePaths(Path(space_path))
        info = read_info(paths)
        self.paths = paths
        self.path = paths.root
        self.spec = info.spec
        self.load = info.load
        self.checked = checked
        self.geometry = {array: info.geometry(array) for array in ARRAYS}
        self.index = {array: open_index(paths, info, array) for array in ARRAYS}
        sizes = {array: index.nbytes for array, index in self.index.items()}
        self._files = files or LocalFiles(paths, sizes, mapped=mapped)
        self._ahead = self._files if isinstance(self._files, AheadFiles) else None
        self._layout = {
            array: _Layout.of(self.geometry[array], self.index[array]) for array in ARRAYS
        }
        self.threads = threads
        """Threads that read the rows of one call; may be changed between calls."""
        self._pool: ThreadPoolExecutor | None = None
        self._pool_pid = 0

    def cancel_reads(self) -> None:
        """Abort reads under way that may take minutes, as over a network; there are none on a local disk."""

    def rows(self, array: str) -> int:
        """Return the number of rows in `array`: each (key, view) once."""
        return len(self.index[array])

    def contains(self, array: str, key: str, view: str = "full") -> bool:
        """Return whether this view of this media item is stored."""
        return bool(self.lookup(array, [key], view)[0] >= 0)

    def lookup(self, array: str, keys: Keys, view: str = "full") -> npt.NDArray[np.int64]:
        """Return the row numbers (n,) of n keys, -1 where there is no row."""
        return self.index[array].lookup(key_bytes(keys), view)

    def lookup_pairs(self, array: str, keys: Keys, views: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the row numbers (n,) of n keys, each with its own view; -1 where there is no row."""
        return self.index[array].lookup_pairs(key_bytes(keys), views)

    def times(self, array: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the times of frames (n,) in their videos, in seconds after the first; NaN for images.

        Raises:
            IndexError: a row number that is not committed (as -1).
        """
        index = self.index[array]
        return index.times[index.positions(np.asarray(rows, np.int64))]

    def read_into(
        self, array: str, rows: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]
    ) -> None:
        """Read the stored bytes of rows (n,) into `out` (n, row_bytes) uint8, in that order.

        The disk is read in its own order, and one system call reads adjacent rows. After an exception, the
        content of `out` is meaningless.

        Raises:
            CorruptError: a row has changed since it was written, or its file is missing or has another size.
            IndexError: a row number that is not committed (as -1).
            ValueError: `out` is not contiguous uint8 of that shape.
        """
        size, slots, _, spans, crcs, start_offset, slot_bytes, _ = self._layout[array]
        count = len(rows)
        if out.shape != (count, size) or out.dtype != _UINT8 or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype} {out.shape}, not uint8 {(count, size)}")
        if not count:
            return
        flat = out.data.cast("B")
        if count > 1:
            self._read_many(array, np.asarray(rows, np.int64).tolist(), flat)
            return
        # What `_read_runs` does, in half of its Python code, which bounds the speed of reading small rows
        # one by one.
        number = int(rows[0])
        shard, slot = divmod(number, slots)
        start, committed = spans.get(shard, _NO_SPAN)
        if slot >= committed:
            raise IndexError("a row number that is not committed")
        self._files.read(array, shard, start_offset + slot * slot_bytes, (flat,))
        if self.checked and crc32c(flat) != crcs[start + slot]:
            raise self._damaged(array, number)

    def _read_many(self, array: str, numbers: Sequence[int], flat: memoryview) -> None:
        """Read rows in the order of the disk, by as many threads as pay off."""
        layout = self._layout[array]
        runs = adjacent_runs(numbers, layout.slots, layout.run_rows)
        parts = 1
        if self.threads > 1:
            parts = min(self.threads, len(runs), 1 + len(flat) // THREAD_BYTES)
        if parts == 1:
            self._read_runs(array, numbers, runs, flat)
            return
        pool, step = self._threads_here(), -(-len(runs) // parts)
        others = [
            pool.submit(self._read_runs, array, numbers, runs[start : start + step], flat)
            for start in range(step, len(runs), step)
        ]
        try:
            self._read_runs(array, numbers, runs[:step], flat)
        finally:
            wait(others)  # no thread writes to `flat` after this call, even if it fails
        for other in others:
            other.result()

    def _damaged(self, array: str, number: int) -> CorruptError:
        shard = number // self.geometry[array].slots
        return CorruptError(self.paths.shard(array, shard), f"row {number} fails its checksum")

    def _read_runs(
        self, array: str, numbers: Sequence[int], runs: Sequence[Sequence[int]], flat: memoryview
    ) -> None:
        """Read and check runs of adjacent rows, each given by its positions in `numbers` and `flat`.

        A row of 64 KB is read in 8 microseconds, so each microsecond of Python counts.
        """
        files, ahead, begun = self._files, self._ahead if len(runs) > 1 else None, 0
        size, slots, _, spans, crcs, start_offset, slot_bytes, gap = self._layout[array]
        for number, run in enumerate(runs):
            shard, slot = divmod(numbers[run[0]], slots)
            start, count = spans.get(shard, _NO_SPAN)
            if slot + len(run) > count:
                raise IndexError("a row number that is not committed")
            if len(run) == 1:
                places = targets = [flat[run[0] * size : (run[0] + 1) * size]]
            else:
                targets = [flat[i * size : (i + 1) * size] for i in run]
                places = [gap] * (2 * len(run) - 1)
                places[::2] = targets
            offset = start_offset + slot * slot_bytes
            # Once a read must wait for the disk, begin those that follow.
            if begun or ahead is None or not ahead.read_now(array, shard, offset, places):
                if ahead is not None and number >= begun:
                    begun = number + AHEAD_RUNS
                    ahead.begin(array, _extents(self._layout[array], numbers, runs[number:begun]))
                files.read(array, shard, offset, places)
            if self.checked:
                for position, target in enumerate(targets, start + slot):
                    if crc32c(target) != crcs[position]:
                        raise self._damaged(array, shard * slots + position - start)

    def _threads_here(self) -> ThreadPoolExecutor:
        """Return the other threads. A forked child needs its own."""
        if self._pool is None or self._pool_pid != os.getpid():
            self._pool = ThreadPoolExecutor(self.threads - 1, thread_name_prefix="rows")
            self._pool_pid = os.getpid()
        return self._pool

    def read(self, array: str, key: str, view: str = "full") -> npt.NDArray[np.float16]:
        """Return the features (tokens, width) float16 of one view.

        Raises:
            KeyError: it is not in this space.
            CorruptError: the row has changed since it was written.
        """
        rows = self.lookup(array, [key], view)
        if rows[0] < 0:
            raise KeyError(f"no {array} {key} {view} in {self.path}")
        out = np.empty((1, self.geometry[array].row_bytes), np.uint8)
        self.read_into(array, rows, out)
        return codec.unpack(out[0], self.spec.codec, self.spec.tokens(array), self.spec.width)

    def logical_hash(self) -> str:
        """Return the sha256 (hex) of the content. It does not depend on how rows are cut into shards."""
        digests = {}
        for array, index in self.index.items():
            step = max(1, RUN_BYTES // self.geometry[array].row_bytes)
            buffer = np.empty((step, self.geometry[array].row_bytes), np.uint8)
            digests[array] = np.empty((index.stored, 32), np.uint8)
            for start in range(0, len(index), step):
                positions = index.numbered(np.arange(start, min(start + step, len(index))))
                rows = buffer[: len(positions)]
                self.read_into(array, index.rows(positions), rows)
                digests[array][positions] = row_digests(rows)
        return logical_hash(self.index, digests)


_NO_SPAN = (0, 0)
_UINT8 = np.dtype(np.uint8)


class _Layout(NamedTuple):
    """Values that every read of one array needs, looked up once."""

    row_bytes: int
    slots: int
    run_rows: int
    """Most rows that one call reads."""
    spans: Mapping[int, tuple[int, int]]
    crcs: memoryview
    start_offset: int
    """Offset of the row in slot 0, in bytes."""
    slot_bytes: int
    gap: memoryview
    """Buffer for the bytes between adjacent rows, which are not used."""

    @staticmethod
    def of(geometry: Geometry, index: RowIndex) -> _Layout:
        return _Layout(
            row_bytes=geometry.row_bytes,
            slots=geometry.slots,
            run_rows=max(1, min(RUN_ROWS, RUN_BYTES // geometry.row_bytes)),
            spans=index.spans,
            crcs=index.crc_of,
            start_offset=geometry.row_offset(0),
            slot_bytes=geometry.slot_bytes,
            gap=memoryview(bytearray(geometry.gap_bytes)),
        )


def adjacent_runs(numbers: Sequence[int], slots: int, limit: int) -> list[list[int]]:
    """Cut row numbers into runs of adjacent rows of one shard, in the order of the disk.

    Args:
        numbers: row numbers in any order.
        slots: rows of a full shard.
        limit: most rows of one run.

    Returns:
        For each run, the positions of its rows in `numbers`.
    """
    runs: list[list[int]] = []
    last = 0
    for i in sorted(range(len(numbers)), key=numbers.__getitem__):
        number = numbers[i]
        if runs and number == last + 1 and number % slots and len(runs[-1]) < limit:
            runs[-1].append(i)
        else:
            runs.append([i])
        last = number
    return runs


def _extents(
    layout: _Layout, numbers: Sequence[int], runs: Sequence[Sequence[int]]
) -> Iterator[tuple[int, int, int]]:
    """Yield (shard, offset, bytes) of runs."""
    for run in runs:
        shard, slot = divmod(numbers[run[0]], layout.slots)
        yield shard, layout.start_offset + slot * layout.slot_bytes, len(run) * layout.slot_bytes


def row_digests(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the sha256 of each row: (n, row_bytes) -> (n, 32)."""
    digests = b"".join(hashlib.sha256(row).digest() for row in rows)
    return np.frombuffer(digests, np.uint8).reshape(-1, 32)


def logical_hash(
    index: Mapping[str, RowIndex], digests: Mapping[str, npt.NDArray[np.uint8]]
) -> str:
    """Return the sha256 (hex) over the sorted (array, key, view, sha256 of the stored row).

    Args:
        index: array -> its rows. Doubled ones do not count.
        digests: array -> `row_digests` of the rows that count, by position among all.
    """
    whole = hashlib.sha256()
    for array in sorted(index):
        for position in index[array].by_identity().tolist():
            key, view = index[array].identity(position)
            digest = digests[array][position].tobytes().hex()
            whole.update(f"{array}\t{key}\t{view}\t{digest}\n".encode())
    return whole.hexdigest()
