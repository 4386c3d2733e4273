"""Packed rows -> committed shards, in a thread of its own, so that the disk never waits for the encoder.

A full disk ends the job: what is committed stays, what is in the open shard is done again. Any other
refusal of the disk costs that shard's pictures, which go to the ledger at stage `write`.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cache.tables import MediaRecord
from cache.writer import ShardWriter, Space
from configs import UserError
from encode.local import failed
from encode.tasks import VIEW, Outcome, SourceTask

ROWS_AHEAD = 64
"""Rows waiting for the disk: 75 MB of the largest ones."""

POLL_S = 0.5


class DiskFull(UserError):  # noqa: N818 - a state
    """No space left on the disk of the cache."""


def disk_full(error: OSError, where: object) -> DiskFull | None:
    """`error` as a DiskFull, if that is what it means."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return DiskFull(
        f"disk full ({where}); everything committed is kept: free some space and run the same "
        "command again, it goes on from there"
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One packed row on its way to the disk."""

    task: SourceTask
    """Where it came from."""
    record: MediaRecord
    """What the ledger will say once it is committed."""
    payload: npt.NDArray[np.uint8]
    """(row_bytes,) as stored."""
    lost: float
    """Relative error of the row codec."""


class RowWriter:
    """Fills shards, one after another. `put`, `commit`, `check`, `close` belong to one thread."""

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
        self._queue: queue.Queue[Row | threading.Event | None] = queue.Queue(ROWS_AHEAD)
        self._shard: ShardWriter | None = None
        self._kind = ""
        self._opened = 0.0
        self._rows: list[Row] = []  # in the open shard
        self._error: BaseException | None = None
        self.seconds = 0.0
        """Spent appending and committing."""
        self._thread = threading.Thread(target=self._loop, name="write", daemon=True)
        self._thread.start()

    def put(self, row: Row) -> None:
        """Write this row soon."""
        self.check()
        self._queue.put(row)

    def commit(self) -> None:
        """Return once everything put so far is committed."""
        written = threading.Event()
        self._queue.put(written)
        written.wait()
        self.check()

    def check(self) -> None:
        """Raise what stopped the thread: DiskFull, StaleJob."""
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
                self._guard(self._commit_if_due)
                continue
            if item is None:
                self._drop()
                return
            start = time.perf_counter()
            if isinstance(item, threading.Event):
                self._guard(self._commit)
                item.set()
            elif self._error is None:
                self._rows.append(item)
                self._guard(self._append, item)
            self.seconds += time.perf_counter() - start

    def _guard(self, step: Callable[..., None], *args: Row) -> None:
        """Run one step; what it raises is kept for `check`, or costs the open shard."""
        if self._error is not None:
            return
        try:
            step(*args)
        except OSError as error:
            self._error = disk_full(error, self._space.paths.root)
            rows = self._drop()
            if self._error is None:
                why = f"{self._space.spec.name}: {error.strerror or error}"
                for row in rows:
                    record = failed(row.record, row.task.attempts, "write", why)
                    self._done(Outcome(task=row.task, result="failed", record=record))
        except BaseException as error:  # `check` raises it in the worker's own thread
            self._error = error
            self._drop()

    def _append(self, row: Row) -> None:
        if self._shard is not None and self._kind != row.task.kind:
            self._rows.pop()
            self._commit()
            self._rows.append(row)
        if self._shard is None:
            self._kind, self._opened = row.task.kind, time.monotonic()
            number = self._next_shard(self._kind)
            self._shard = ShardWriter(self._space, self._kind, number, self._fence)
        assert row.record.key is not None, "a row without a key"
        self._shard.append(row.record.key, VIEW, row.payload.data, error=row.lost)
        if self._shard.full:
            self._commit()
        else:
            self._commit_if_due()

    def _commit_if_due(self) -> None:
        if self._shard is not None and time.monotonic() - self._opened > self._commit_every_s:
            self._commit()

    def _commit(self) -> None:
        if self._shard is None:
            return
        self._shard.commit()
        self._shard = None
        for row in self._rows:
            self._done(Outcome(task=row.task, result="ok", record=row.record))
        self._rows = []

    def _drop(self) -> list[Row]:
        """Forget the open shard; returns its rows."""
        shard, self._shard = self._shard, None
        rows, self._rows = self._rows, []
        if shard is not None:
            with contextlib.suppress(OSError):  # a disk that refuses this too: cache.gc removes it
                shard.abort()
        return rows
