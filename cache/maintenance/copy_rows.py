"""Copy rows of one space into another, for `cache.merge` and `cache.convert`.

    positions = missing(source, target, "image")
    damaged = copy_rows(source, space, "image", positions, change=convert)

Threads read a few MB of rows at a time, compare each row with its crc32c, and change it if the caller wants
that. The rows are appended to shards of the target in their order. A shard exists once its commit does, so a
copy that was killed is completed by running it again: it copies only the missing rows.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from cache.errors import CorruptError, command_line, features_words
from cache.store.reader import RUN_BYTES, FeatureReader
from cache.store.space import Space
from cache.store.writer import NewRow, ShardWriter

BATCH_BYTES = 4 << 20
"""Bytes that one thread reads and changes at a time."""

ROW_OVERHEAD = 160
"""Bytes that a row needs in addition: its checksum and index entry, and its row in the commit."""

_LOOKUP = 65536
"""Rows looked up together. It bounds the memory of a lookup."""

T = TypeVar("T")
R = TypeVar("R")
Rows = npt.NDArray[np.uint8]
Change = Callable[[Rows], tuple[Rows, npt.NDArray[np.float32]]]
"""Stored rows (n, row_bytes) -> rows as the target stores them, and the relative error (n,) of its codec."""


def missing(
    source: FeatureReader, target: FeatureReader | None, array: str
) -> npt.NDArray[np.int64]:
    """Return the positions in `source` of the rows that `target` lacks, in row order.

    Of a row that is stored twice, the first counts.
    """
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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """Rows that were read and changed; the damaged ones are left out."""

    places: npt.NDArray[np.int64]
    """(n,) which of the requested rows these are."""
    rows: Rows
    """(n, row_bytes) as the target stores them."""
    errors: npt.NDArray[np.float32]
    """(n,) relative error of the target's codec."""
    damaged: list[CorruptError]
    """One error for each damaged row."""


def copy_rows(
    source: FeatureReader,
    target: Space,
    array: str,
    positions: npt.NDArray[np.int64],
    *,
    change: Change | None = None,
    done: Callable[[int], None] = lambda _: None,
) -> list[CorruptError]:
    """Append rows to `target` and commit them. The caller holds the driver lock of `target`.

    Args:
        source: a checked reader.
        target: the space to write to.
        array: image or frame.
        positions: (n,) rows of the source, in the order in which they are to be stored.
        change: converts rows; None: they are copied as they are.
        done: called with the number of bytes just read.

    Returns:
        One error for each damaged row; these rows are not copied.
    """
    index = source.index[array]
    stored = index.columns.errors[positions] if change is None else None
    room = _room_wanted(index.keys[positions], target.rows_per_shard(array))
    # Unchanged rows are written while the processor's cache still holds them, so fewer are read at a time.
    row_bytes = source.geometry[array].row_bytes
    step = max(1, (BATCH_BYTES if change else RUN_BYTES) // row_bytes)
    read = partial(_read, source, array, positions, change)
    batches = np.split(np.arange(len(positions)), range(step, len(positions), step))
    damaged: list[CorruptError] = []
    filler = _Filler(target, array)
    try:
        for batch in (_in_order if change else map)(read, batches):
            damaged += batch.damaged
            errors = batch.errors if stored is None else stored[batch.places]
            for place, row, error in zip(
                batch.places.tolist(), batch.rows, errors.tolist(), strict=True
            ):
                key, view = index.identity(positions[place])
                time_s = float(index.times[positions[place]])
                new = NewRow(
                    key=key,
                    view=view,
                    payload=row.data,
                    time_s=None if np.isnan(time_s) else time_s,
                    error=error,
                )
                filler.append(new, int(room[place]))
            done((len(batch.rows) + len(batch.damaged)) * row_bytes)
        filler.finish()
    finally:
        filler.close()
    target.grow(array)
    return damaged


class _Filler:
    """Fill one shard after another. While the disk commits one, the next is filled."""

    def __init__(self, space: Space, array: str):
        self._space, self._array = space, array
        self._next = space.next_shard(array)
        self._shard: ShardWriter | None = None
        self._closing: tuple[ShardWriter, Future[int]] | None = None
        self._thread = ThreadPoolExecutor(1, "commit")

    def append(self, row: NewRow, room: int) -> None:
        """Append a row to a shard into which `room` rows still fit."""
        if self._shard is not None and self._shard.left < room:
            self._commit()
        if self._shard is None:
            self._shard = ShardWriter(self._space, self._array, self._next)
            self._next += 1
        self._shard.extend([row])

    def finish(self) -> None:
        """Commit everything."""
        self._commit()
        self._wait()

    def close(self) -> None:
        """Remove the shards that are not committed."""
        self._thread.shutdown()
        with contextlib.suppress(OSError):  # cache.gc removes what remains
            if self._shard is not None:
                self._shard.abort()
            if self._closing is not None:
                self._closing[0].abort()  # does nothing once it is committed

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
    """Return the room (n,) in rows that a shard needs before each row is appended, for keys (n, 32) in order.

    Before the first row of a media item it is the number of all its rows, so that they share a shard, unless
    they exceed one. It is 1 otherwise.
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
    change: Change | None,
    places: npt.NDArray[np.int64],
) -> _Batch:
    """Read the intact rows at positions[places], and change them."""
    rows = source.index[array].rows(positions[places])
    out = np.empty((len(rows), source.geometry[array].row_bytes), np.uint8)
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
    return _Batch(places=places, rows=out, errors=errors, damaged=damaged)


def _in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield `work(item)` of each item in order. Threads compute a few of them ahead."""
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
    """Return a line about rows that were not copied."""
    first = damaged[0]
    return (
        f"{len(damaged):,} damaged rows were not copied, the first: {first.path}: {first.what}; "
        f"find all: {command_line('cache.verify', '--deep', *features_words(first.path))}; once they are "
        "repaired, run the same command again"
    )
