"""Rows of one space into another: what `cache.merge` and `cache.convert` have in common.

Rows are read a few MB at a time, each checked against the crc32c of its commit, changed where a caller
wants them changed, by several threads, and appended in their order to shards of the target. A shard exists
once its commit does, so a copy that was killed is finished by doing it again: only what is missing is copied.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from cache.errors import CorruptError, DiskError
from cache.store.reader import RUN_BYTES, FeatureReader
from cache.store.space import Space
from cache.store.writer import ShardWriter

BATCH_BYTES = 4 << 20
"""Read and changed by one thread at a time."""

ROW_OVERHEAD = 160
"""Bytes beside a row: its checksum and index entry, and its line in the commit."""

SPARE_BYTES = 64 << 20
"""What must stay free on the disk."""

_LOOKUP = 65536

T = TypeVar("T")
R = TypeVar("R")
Rows = npt.NDArray[np.uint8]
Change = Callable[[Rows], tuple[Rows, npt.NDArray[np.float32]]]
"""Stored rows (n, row_bytes) -> rows as the target stores them, and the relative error (n,) of its codec."""


def missing(
    source: FeatureReader, target: FeatureReader | None, array: str
) -> npt.NDArray[np.int64]:
    """Positions in `source` of the rows that `target` has not, in row order; of twins the first."""
    index = source.index[array]
    wanted = []
    for start in range(0, len(index), _LOOKUP):
        positions = np.arange(start, min(start + _LOOKUP, len(index)))
        identities = index.keys[positions], index.columns.views[positions]
        first = index.lookup_coded(*identities) == index.rows(positions)
        if target is not None:
            first &= target.index[array].lookup_coded(*identities) < 0
        wanted.append(positions[first])
    return np.concatenate([np.empty(0, np.int64), *wanted])


def check_room(folder: Path, nbytes: int, what: str) -> None:
    """Refuse what the disk cannot hold.

    Raises:
        CacheError: says how much is needed and how much there is.
    """
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if nbytes and nbytes + SPARE_BYTES > free:
        raise DiskError(
            f"{what} needs {nbytes / 1e6:,.0f} MB in {folder}, where {free / 1e6:,.0f} MB are free: make room"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """Some rows on their way: the intact ones."""

    places: npt.NDArray[np.int64]
    """(n,) which of the rows asked for."""
    rows: Rows
    """(n, row_bytes) as the target stores them."""
    errors: npt.NDArray[np.float32]
    """(n,) relative error of the target's codec."""
    damaged: list[CorruptError]
    """What is wrong with the others."""
    nbytes: int
    """Read, damaged rows included."""


def copy_rows(
    source: FeatureReader,
    target: Space,
    array: str,
    positions: npt.NDArray[np.int64],
    *,
    change: Change | None = None,
    done: Callable[[int], None] = lambda _: None,
) -> list[CorruptError]:
    """Append rows to `target`, whose driver lock the caller holds, and commit them.

    Args:
        source: a checked reader.
        target: the space to write to.
        array: which array.
        positions: (n,) which rows of the source, in the order they are to stand in.
        change: what becomes of them on the way; None: nothing.
        done: called with the bytes just read.

    Returns:
        One finding a damaged row; those rows were not copied.
    """
    index = source.index[array]
    stored = index.columns.errors[positions] if change is None else None
    room = _room_wanted(index.keys[positions], target.rows_per_shard(array))
    # Bytes that nothing is done to are written while the processor's cache still holds them.
    step = max(1, (BATCH_BYTES if change else RUN_BYTES) // source.geometry[array].row_bytes)

    def read(start: int) -> _Batch:
        return _read(
            source, array, positions, range(start, min(start + step, len(positions))), change
        )

    damaged: list[CorruptError] = []
    filler = _Filler(target, array)
    try:
        for batch in (_in_order if change else map)(read, range(0, len(positions), step)):
            damaged += batch.damaged
            errors = batch.errors if stored is None else stored[batch.places]
            for place, row, error in zip(
                batch.places.tolist(), batch.rows, errors.tolist(), strict=True
            ):
                key, view = index.identity(positions[place])
                time_s = float(index.times[positions[place]])
                filler.make_room(int(room[place]))
                filler.append(key, view, row, None if np.isnan(time_s) else time_s, error)
            done(batch.nbytes)
        filler.finish()
    finally:
        filler.close()
    target.grow(array)
    return damaged


class _Filler:
    """One shard after another: while the disk is waited for to commit one, the next is filled."""

    def __init__(self, space: Space, array: str):
        self._space, self._array = space, array
        self._next = space.next_shard(array)
        self._shard: ShardWriter | None = None
        self._closing: tuple[ShardWriter, Future[int]] | None = None
        self._thread = ThreadPoolExecutor(1, "commit")

    def make_room(self, rows: int) -> None:
        """Let so many rows more go into one shard."""
        if self._shard is not None and self._shard.left < rows:
            self._commit()

    def append(self, key: str, view: str, row: Rows, time_s: float | None, error: float) -> None:
        if self._shard is None:
            self._shard = ShardWriter(self._space, self._array, self._next)
            self._next += 1
        self._shard.append(key, view, row.data, time_s=time_s, error=error)

    def finish(self) -> None:
        """Everything is committed now."""
        self._commit()
        self._wait()

    def close(self) -> None:
        """Take back what is not committed."""
        self._thread.shutdown()
        with contextlib.suppress(OSError):  # what the disk refuses to remove, cache.gc will
            if self._shard is not None:
                self._shard.abort()
            if self._closing is not None:
                self._closing[0].abort()  # nothing, once it is committed

    def _commit(self) -> None:
        self._wait()
        if self._shard is not None:
            self._closing = self._shard, self._thread.submit(self._shard.commit)
            self._shard = None

    def _wait(self) -> None:
        if self._closing is not None:
            self._closing[1].result()
            self._closing = None


def _room_wanted(keys: npt.NDArray[np.uint8], slots: int) -> npt.NDArray[np.int64]:
    """Keys (n, 32) of rows in order -> (n,) how many rows must still fit into the shard when each comes.

    Before the first row of a media all of it, so that its views stay together, unless no shard holds it;
    else 1.
    """
    wanted = np.ones(len(keys), np.int64)
    if len(keys):
        starts = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]).any(axis=1)))
        sizes = np.diff(np.append(starts, len(keys)))
        wanted[starts] = np.where(sizes <= slots, sizes, 1)
    return wanted


def _read(
    source: FeatureReader,
    array: str,
    positions: npt.NDArray[np.int64],
    part: range,
    change: Change | None,
) -> _Batch:
    """The rows at positions[part] that are intact, changed."""
    places = np.arange(part.start, part.stop)
    rows = source.index[array].rows(positions[places])
    out = np.empty((len(rows), source.geometry[array].row_bytes), np.uint8)
    nbytes = out.nbytes
    damaged: list[CorruptError] = []
    try:
        source.read_into(array, rows, out)
    except CorruptError:
        intact = np.ones(len(rows), bool)
        for i in range(len(rows)):
            try:
                source.read_into(array, rows[i : i + 1], out[i : i + 1])
            except CorruptError as error:
                damaged.append(error)
                intact[i] = False
        out, places = out[intact], places[intact]
    errors = np.zeros(len(out), np.float32)
    if change is not None and len(out):
        out, errors = change(out)
    return _Batch(places=places, rows=out, errors=errors, damaged=damaged, nbytes=nbytes)


def _in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`work(item)` of each, in order; computed by threads, a few ahead."""
    threads = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, "copy") as pool:
        ahead: deque[Future[R]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def damage_text(damaged: Sequence[CorruptError]) -> str:
    """What to say of rows that were not copied."""
    first = damaged[0]
    return (
        f"{len(damaged):,} damaged rows were not copied, the first: {first.path}: {first.what}; "
        "find all: python -m cache.verify --deep; once they are mended, run the same command again"
    )
