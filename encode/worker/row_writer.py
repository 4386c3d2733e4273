"""Packed rows -> committed shards, in a thread of its own, so the encoder does not wait for the disk.

A full disk ends the job: committed rows are kept, those of the open shards are encoded again by the next job.
Any other disk error costs the open shards: their media items fail at stage `write`. The rows of a video are
adjacent: if they do not fit into the open shard, a new shard is started.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cache.format.spec import ARRAY_OF
from cache.store.files import disk_full
from cache.store.space import Space
from cache.store.writer import ShardWriter
from encode.worker.media_item import MediaItem
from encode.worker.messages import Outcome
from model.media.images import Failure

ROWS_AHEAD = 64
"""Rows that may wait for the disk: 75 MB of the largest rows (fp16, 576 x 1024). One video may exceed it."""

POLL_S = 0.5
"""Seconds between two looks for shards that are old enough to be committed."""


@dataclass(kw_only=True)
class _Open:
    """A shard that is being filled."""

    shard: ShardWriter
    since: float
    """When it was started, monotonic seconds."""
    items: list[MediaItem] = field(default_factory=list)
    """Media items whose last row is in it."""


class RowWriter:
    """Fills one shard of each array at a time. `put`, `commit`, `check`, `close` belong to one thread."""

    def __init__(
        self,
        space: Space,
        *,
        next_shard: Callable[[str], int],
        fence: Callable[[], None],
        done: Callable[[Outcome], None],
        commit_every_s: float,
    ):
        """Start the thread.

        Args:
            space: the space to write to.
            next_shard: returns a shard number of an array that was never used.
            fence: raises once this worker may no longer write.
            done: called from the thread with every outcome.
            commit_every_s: age in seconds at which a shard is committed although it is not full.
        """
        self._space, self._next_shard, self._fence, self._done = space, next_shard, fence, done
        self._commit_every_s = commit_every_s
        self._queue: queue.SimpleQueue[MediaItem | threading.Event | None] = queue.SimpleQueue()
        self._room = threading.Condition()
        self._waiting = 0  # rows in the queue
        self._open: dict[str, _Open] = {}  # by array
        self._current: MediaItem | None = None  # being appended
        self._error: BaseException | None = None
        self.seconds = 0.0
        """Seconds spent appending and committing."""
        self._thread = threading.Thread(target=self._loop, name="write", daemon=True)
        self._thread.start()

    def put(self, item: MediaItem) -> None:
        """Queue the rows of an item, which now belongs to the writer. Waits while the queue is full."""
        self.check()
        with self._room:
            self._room.wait_for(lambda: self._waiting < ROWS_AHEAD)
            self._waiting += len(item.rows)
        self._queue.put(item)

    def commit(self) -> None:
        """Commit everything put so far, and return once it is committed."""
        written = threading.Event()
        self._queue.put(written)
        written.wait()
        self.check()

    def check(self) -> None:
        """Raise the error that stopped the thread: DiskError or StaleJobError."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread. Rows that are not committed are lost."""
        self._queue.put(None)
        self._thread.join()

    def _loop(self) -> None:
        commit_old = functools.partial(self._commit_old, self._commit_every_s)
        while True:
            try:
                item = self._queue.get(timeout=POLL_S)
            except queue.Empty:
                self._guard(commit_old)
                continue
            if item is None:
                self._drop()
                return
            start = time.perf_counter()
            if isinstance(item, threading.Event):
                self._guard(functools.partial(self._commit_old, 0.0))
                item.set()
            else:
                with self._room:
                    self._waiting -= len(item.rows)
                    self._room.notify()
                self._current = item
                self._guard(functools.partial(self._append, item))
                self._current = None
                self._guard(commit_old)
            self.seconds += time.perf_counter() - start

    def _guard(self, step: Callable[[], None]) -> None:
        """Run one step. A disk error fails the items of the open shards; others are kept for `check`."""
        if self._error is not None:
            return
        try:
            step()
        except OSError as error:
            self._error = disk_full(error, self._space.paths.root)
            items = self._drop()
            if self._error is None:
                why = f"{self._space.spec.name}: {error.strerror or error}"
                for item in items:
                    item.failure = Failure("write", why)
                    self._done(item.outcome())
        except BaseException as error:  # `check` raises it in the worker's own thread
            self._error = error
            self._drop()

    def _append(self, item: MediaItem) -> None:
        array, rows = ARRAY_OF[item.record.kind], item.rows
        if (begun := self._open.get(array)) is not None:
            fits_a_shard = len(rows) <= self._space.rows_per_shard(array)
            if fits_a_shard and len(rows) > begun.shard.left:
                self._commit(array)
        while rows:
            here = self._open.get(array) or self._begin(array)
            part = rows[: here.shard.left]
            here.shard.extend(part)
            del rows[: len(part)]  # frees their memory before the shard is committed
            if not rows:
                here.items.append(item)
                self._current = None
            if here.shard.full:
                self._commit(array)

    def _begin(self, array: str) -> _Open:
        shard = ShardWriter(self._space, array, self._next_shard(array), self._fence)
        self._open[array] = _Open(shard=shard, since=time.monotonic())
        return self._open[array]

    def _commit_old(self, age_s: float) -> None:
        for array, here in list(self._open.items()):
            if time.monotonic() - here.since >= age_s:
                self._commit(array)

    def _commit(self, array: str) -> None:
        here = self._open[array]
        here.shard.commit()
        del self._open[array]
        for item in here.items:
            self._done(item.outcome())

    def _drop(self) -> list[MediaItem]:
        """Abort the open shards; return the media items that were in them."""
        items = [item for here in self._open.values() for item in here.items]
        if self._current is not None:
            items.append(self._current)
        for here in self._open.values():
            with contextlib.suppress(OSError):  # cache.gc removes what a failing disk leaves
                here.shard.abort()
        self._open, self._current = {}, None
        return items
