"""Packed rows -> committed shards, in a thread of its own, so that the disk never waits for the encoder.

A full disk ends the job: what is committed stays, what is in the open shard is done again. Any other
refusal of the disk costs that shard's media, which go to the ledger at stage `write`. A video's rows stand
side by side: where they no longer fit into the open shard, a new one is begun.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cache.format.spec import ARRAY_OF
from cache.store.space import Space
from cache.store.writer import ShardWriter
from configs import UserError
from encode.worker.media_item import MediaItem
from encode.worker.messages import Outcome
from model.media.images import Failure

ROWS_AHEAD = 64
"""Rows waiting for the disk: 75 MB of the largest ones. One video may have more."""

POLL_S = 0.5


class DiskFullError(UserError):
    """No space left on the disk of the cache."""


def disk_full(error: OSError, where: object) -> DiskFullError | None:
    """`error` as a DiskFullError, if that is what it means."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return DiskFullError(
        f"disk full ({where}); everything committed is kept: free some space and run the same "
        "command again, it goes on from there"
    )


@dataclass(kw_only=True)
class _Open:
    """A shard being filled."""

    shard: ShardWriter
    since: float
    """When it was begun, monotonic seconds."""
    items: list[MediaItem] = field(default_factory=list)
    """Media items whose last row is in it."""


class RowWriter:
    """Fills shards, one an array at a time. `put`, `commit`, `check`, `close` belong to one thread."""

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
            space: where to.
            next_shard: a number never used before, for an array.
            fence: raises once this worker has lost the right to write.
            done: called from the thread with every outcome.
            commit_every_s: age at which a shard is committed though it is not full.
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
        """Spent appending and committing."""
        self._thread = threading.Thread(target=self._loop, name="write", daemon=True)
        self._thread.start()

    def put(self, item: MediaItem) -> None:
        """Write these rows soon."""
        self.check()
        with self._room:
            self._room.wait_for(lambda: self._waiting < ROWS_AHEAD)
            self._waiting += len(item.rows)
        self._queue.put(item)

    def commit(self) -> None:
        """Return once everything put so far is committed."""
        written = threading.Event()
        self._queue.put(written)
        written.wait()
        self.check()

    def check(self) -> None:
        """Raise what stopped the thread: DiskFullError, StaleJobError."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread; what is not committed is dropped."""
        self._queue.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while True:
            try:
                item = self._queue.get(timeout=POLL_S)
            except queue.Empty:
                self._guard(self._commit_old)
                continue
            if item is None:
                self._drop()
                return
            start = time.perf_counter()
            if isinstance(item, threading.Event):
                self._guard(self._commit_all)
                item.set()
            else:
                with self._room:
                    self._waiting -= len(item.rows)
                    self._room.notify()
                self._current = item
                self._guard(functools.partial(self._append, item))
                self._current = None
                self._guard(self._commit_old)
            self.seconds += time.perf_counter() - start

    def _guard(self, step: Callable[[], None]) -> None:
        """Run one step; what it raises is kept for `check`, or costs the open shards."""
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
            wholly = len(rows) <= self._space.rows_per_shard(array)
            if wholly and len(rows) > begun.shard.left:
                self._commit(array)
        while rows:
            here = self._open.get(array) or self._begin(array)
            part = rows[: here.shard.left]
            here.shard.extend(part)
            del rows[: len(part)]  # written: its memory is free before the shard is committed
            if not rows:
                here.items.append(item)
                self._current = None
            if here.shard.full:
                self._commit(array)

    def _begin(self, array: str) -> _Open:
        shard = ShardWriter(self._space, array, self._next_shard(array), self._fence)
        self._open[array] = _Open(shard=shard, since=time.monotonic())
        return self._open[array]

    def _commit_old(self) -> None:
        for array, here in list(self._open.items()):
            if time.monotonic() - here.since > self._commit_every_s:
                self._commit(array)

    def _commit_all(self) -> None:
        for array in list(self._open):
            self._commit(array)

    def _commit(self, array: str) -> None:
        here = self._open[array]
        here.shard.commit()
        del self._open[array]
        for item in here.items:
            self._done(item.outcome())

    def _drop(self) -> list[MediaItem]:
        """Forget the open shards; returns the media that were in them."""
        items = [item for here in self._open.values() for item in here.items]
        if self._current is not None:
            items.append(self._current)
        for here in self._open.values():
            with contextlib.suppress(OSError):  # a disk that refuses this too: cache.gc removes it
                here.shard.abort()
        self._open, self._current = {}, None
        return items
