"""Copy rows of one space into another, for `cache.merge` and `cache.convert`.

    positions = missing(source, target, "image")
    damaged = copy_rows(source, space, "image", positions, conversion=conversion, workers=8)

Rows are read a few MB at a time and compared with their crc32c. If they are to be converted, threads read
ahead and processes convert. Batches are taken in their order, and appended to shards of the target, so the
files do not depend on the number of processes. A shard exists once its commit does. A copy that was killed is
completed by running it again: it copies only the missing rows.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cache.errors import CorruptError, command_line, features_words
from cache.maintenance.convert_rows import Conversion, Rows
from cache.maintenance.processes import Converters
from cache.store.files import Fence
from cache.store.reader import RUN_BYTES, FeatureReader
from cache.store.space import Space
from cache.store.writer import NewRow, ShardWriter

BATCH_BYTES = 4 << 20
"""Bytes of the source that are read and converted together."""

ROW_OVERHEAD = 160
"""Bytes that a row needs in addition: its checksum and index entry, and its row in the commit."""

_LOOKUP = 65536
"""Rows looked up together. It bounds the memory of a lookup."""

Done = Callable[[int, int, str], None]
"""Called with the rows and the bytes of the source that were just copied, and with what bounds the speed:
`reading`, `packing`, `writing`, or '' while nobody can say."""


def missing(
    source: FeatureReader, target: FeatureReader | None, array: str
) -> npt.NDArray[np.int64]:
    """Return the positions in `source` of the rows that count and that `target` lacks, in row order."""
    index = source.index[array]
    wanted = []
    for start in range(0, len(index), _LOOKUP):
        positions = index.numbered(np.arange(start, min(start + _LOOKUP, len(index))))
        if target is not None:
            identities = index.keys[positions], index.columns.views[positions]
            positions = positions[target.index[array].lookup_coded(*identities) < 0]
        wanted.append(positions)
    return np.concatenate([np.empty(0, np.int64), *wanted])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """Rows that were read and converted; the damaged ones are left out."""

    places: npt.NDArray[np.int64]
    """(n,) which of the requested rows these are."""
    rows: Rows
    """(n, row_bytes) as the target stores them."""
    errors: npt.NDArray[np.float32] | None
    """(n,) relative error of the target's codec; None: as in the source."""
    damaged: list[CorruptError]
    """One error for each damaged row."""
    read_s: float
    """Seconds that a thread took to read them."""
    convert_s: float
    """Seconds that a process took to convert them."""


def copy_rows(
    source: FeatureReader,
    target: Space,
    array: str,
    positions: npt.NDArray[np.int64],
    *,
    conversion: Conversion | None = None,
    workers: int = 1,
    fence: Fence | None = None,
    done: Done = lambda *_: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[CorruptError]:
    """Append rows to `target` and commit them. The caller holds the driver lock of `target`.

    Args:
        source: a checked reader.
        target: the space to write to.
        array: image or frame.
        positions: (n,) rows of the source, in the order in which they are to be stored.
        conversion: what is done to the rows; None: they are copied as they are.
        workers: processes that convert. The files do not depend on their number.
        fence: raises StaleJobError once the lock is lost.
        done: see `Done`.
        stop: asked after each batch; once it returns True, what was copied is committed, and the rest left.

    Returns:
        One error for each damaged row; these rows are not copied.

    Raises:
        LostProcessError: a process that converts has ended or failed. What is committed is kept.
    """
    if not len(positions):
        target.grow(array)  # which a killed run may have left undone
        return []
    index = source.index[array]
    room = _room_wanted(index.keys[positions], target.rows_per_shard(array))
    damaged: list[CorruptError] = []
    filler = _Filler(target, array, fence)
    pace = _Pace(workers)
    if conversion is None:
        batches = _read_in_order(source, array, positions)
    else:
        batches = _converted(source, array, positions, conversion, workers)
    try:
        with contextlib.closing(batches):
            for batch in pace.timed(batches):
                damaged += batch.damaged
                errors = batch.errors
                if errors is None:
                    errors = index.columns.errors[positions[batch.places]]
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
                filler.write()
                rows = len(batch.rows) + len(batch.damaged)
                done(rows, rows * source.geometry[array].row_bytes, pace.bound)
                if stop():
                    break
        filler.finish()
    finally:
        filler.close()
    target.grow(array)
    return damaged


class _Pace:
    """What the speed of a copy depends on."""

    def __init__(self, workers: int):
        self._workers = workers
        self._waited_s = self._written_s = self._read_s = self._convert_s = 0.0

    def timed(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
        """Pass on the batches, and measure how long each is waited for and used."""
        start = time.perf_counter()
        for batch in batches:
            there = time.perf_counter()
            yield batch
            self._waited_s += there - start
            start = time.perf_counter()
            self._written_s += start - there
            self._read_s += batch.read_s
            self._convert_s += batch.convert_s

    @property
    def bound(self) -> str:
        """What takes longest: reading, packing or writing; '' before the second batch."""
        if not self._waited_s:
            return ""
        if self._written_s > self._waited_s:
            return "writing"
        threads = _threads(self._workers)
        return "reading" if self._read_s / threads > self._convert_s / self._workers else "packing"


class _Filler:
    """Fill one shard after another. While the disk commits one, the next is filled."""

    # Rows of one batch that go to the same shard are written together.

    def __init__(self, space: Space, array: str, fence: Fence | None):
        self._space, self._array, self._fence = space, array, fence
        self._next = space.next_shard(array)
        self._shard: ShardWriter | None = None
        self._waiting: list[NewRow] = []
        self._closing: tuple[ShardWriter, Future[int]] | None = None
        self._thread = ThreadPoolExecutor(1, "commit")

    def append(self, row: NewRow, room: int) -> None:
        """Append a row to a shard into which `room` rows still fit. `write` must follow soon."""
        if self._shard is not None and self._shard.left - len(self._waiting) < room:
            self._commit()
        if self._shard is None:
            self._shard = ShardWriter(self._space, self._array, self._next, self._fence)
            self._next += 1
        self._waiting.append(row)

    def write(self) -> None:
        """Write the rows appended so far, whose bytes may change afterwards."""
        if self._waiting and self._shard is not None:
            self._shard.extend(self._waiting)
            self._waiting = []

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
        self.write()
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


def _read_in_order(
    source: FeatureReader, array: str, positions: npt.NDArray[np.int64]
) -> Generator[_Batch, None, None]:
    """Read all rows, in order."""
    # No threads: rows are written while the processor's cache still holds them, so few are read at a time.
    row_bytes = source.geometry[array].row_bytes
    step = max(1, RUN_BYTES // row_bytes)
    for start in range(0, len(positions), step):
        places = np.arange(start, min(start + step, len(positions)))
        out = np.empty((len(places), row_bytes), np.uint8)
        begin = time.perf_counter()
        damaged = _read(source, array, positions, places, out)
        intact = _without(len(places), damaged)
        yield _Batch(
            places=places[intact],
            rows=out[intact] if damaged else out,
            errors=None,
            damaged=list(damaged.values()),
            read_s=time.perf_counter() - begin,
            convert_s=0.0,
        )


def _threads(workers: int) -> int:
    """Return the threads that read, for a number of processes that convert."""
    # While as many wait for a process, the others read. With one worker, the thread that reads converts.
    return 1 if workers == 1 else workers + min(workers, 4)


def _converted(
    source: FeatureReader,
    array: str,
    positions: npt.NDArray[np.int64],
    conversion: Conversion,
    workers: int,
) -> Generator[_Batch, None, None]:
    """Read and convert all rows, in order. The rows of a batch are valid until the next is asked for."""
    step = max(1, min(BATCH_BYTES // conversion.source_bytes, -(-len(positions) // workers)))
    starts = range(0, len(positions), step)
    # A slot is used again once the batch in it was consumed.
    slots = 1 + 2 * _threads(workers)
    conversion.compile()  # here, so that not every process does

    def work(number: int) -> _Batch:
        places = np.arange(starts[number], min(starts[number] + step, len(positions)))
        slot = number % slots
        begin = time.perf_counter()
        damaged = _read(source, array, positions, places, converters.source(slot, len(places)))
        read_s = time.perf_counter() - begin
        rows, errors, convert_s = converters.convert(slot, len(places))
        for i in np.flatnonzero(np.isnan(errors)).tolist():
            damaged.setdefault(i, _not_finite(source, array, int(positions[places[i]])))
        intact = _without(len(places), damaged)
        return _Batch(
            places=places[intact],
            rows=rows[intact] if damaged else rows,
            errors=errors[intact],
            damaged=list(damaged.values()),
            read_s=read_s,
            convert_s=convert_s,
        )

    with (
        Converters(conversion, batch_rows=step, slots=slots, workers=workers) as converters,
        ThreadPoolExecutor(_threads(workers), "copy") as pool,
    ):
        ahead: deque[Future[_Batch]] = deque()
        try:
            for number in range(len(starts)):
                ahead.append(pool.submit(work, number))
                if len(ahead) == slots:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _without(count: int, damaged: dict[int, CorruptError]) -> npt.NDArray[np.int64]:
    """Return the numbers below `count` that are not in `damaged`."""
    return np.setdiff1d(np.arange(count), np.fromiter(damaged, np.int64))


def _read(
    source: FeatureReader,
    array: str,
    positions: npt.NDArray[np.int64],
    places: npt.NDArray[np.int64],
    out: Rows,
) -> dict[int, CorruptError]:
    """Read the rows at positions[places] into `out`; return the errors of damaged ones, by their place."""
    rows = source.index[array].rows(positions[places])
    damaged: dict[int, CorruptError] = {}
    try:
        source.read_into(array, rows, out)
    except CorruptError:
        for i in range(len(rows)):
            try:
                source.read_into(array, rows[i : i + 1], out[i : i + 1])
            except CorruptError as error:
                damaged[i] = error
    return damaged


def _not_finite(source: FeatureReader, array: str, position: int) -> CorruptError:
    row = int(source.index[array].rows(np.array([position]))[0])
    path = source.paths.shard(array, row // source.geometry[array].slots)
    return CorruptError(path, f"row {row} has NaN or Inf")


def damage_text(damaged: Sequence[CorruptError]) -> str:
    """Return a line about rows that were not copied."""
    first = damaged[0]
    return (
        f"{len(damaged):,} damaged rows were not copied, the first: {first.path}: {first.what}; "
        f"find all: {command_line('cache.verify', '--deep', *features_words(first.path))}; once they are "
        "repaired, run the same command again"
    )
