"""Find the file that crashes or hangs its worker.

When a worker crashes or hangs, the files it was decoding are retried one at a time, by a worker that decodes
no other file meanwhile. A file is rejected when its worker crashes twice in this way (one crash may have
another cause: the out-of-memory killer, an operator), or hangs once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from configs import UserError
from encode.download.urls import is_url
from encode.worker.decode_log import DecodeEntry
from encode.worker.local_files import read_local, unreadable
from encode.worker.messages import Outcome, SourceTask
from model.media.images import BadMediaError, Failure

CRASHES_ALONE = 2
"""Crashes of a worker that was decoding only this file, before the file is rejected."""

CRASHES_WITHOUT_PROGRESS = 6
"""Crashes in a row without a finished source, before the job stops: then no single file is the cause."""


class HangWatch:
    """Finds decodes without progress. It measures with one clock, since those of workers may differ."""

    def __init__(self, timeout_s: float):
        """Find what makes no progress for `timeout_s` seconds."""
        self._timeout_s = timeout_s
        self._since: dict[int, dict[tuple[str, float], float]] = {}  # worker -> entry -> first seen

    def hanging(self, worker: int, entries: Sequence[DecodeEntry]) -> list[DecodeEntry]:
        """Return which of the entries in a worker's log have not changed for too long."""
        now, before = time.monotonic(), self._since.get(worker, {})
        seen = {(e.source, e.since): before.get((e.source, e.since), now) for e in entries}
        self._since[worker] = seen
        return [e for e in entries if now - seen[e.source, e.since] > self._timeout_s]

    def forget(self, worker: int) -> None:
        """Forget a worker that has ended."""
        self._since.pop(worker, None)


class Culprits:
    """Counts the crashes of one job."""

    def __init__(self) -> None:
        self._crashes_alone: Counter[str] = Counter()
        self._without_progress = 0
        self._settled = -1

    def judge(
        self, decoding: Sequence[SourceTask], alone: SourceTask | None, *, hung: bool
    ) -> tuple[list[SourceTask], list[SourceTask]]:
        """Return which files of a dead worker are rejected, and which are retried alone.

        Args:
            decoding: the files it was decoding.
            alone: the only file it had been given, if it had been given only one.
            hung: whether it was ended because it made no progress.
        """
        rejected: list[SourceTask] = []
        retried: list[SourceTask] = []
        for task in decoding:
            was_alone = alone is not None and task.source == alone.source
            self._crashes_alone[task.source] += was_alone
            enough = hung or self._crashes_alone[task.source] >= CRASHES_ALONE
            (rejected if was_alone and enough else retried).append(task)
        return rejected, retried

    def count_crash(self, settled: int, why: str) -> None:
        """Count one crash, at which `settled` sources of the job were finished.

        Raises:
            UserError: too many crashes in a row, with no source finished between them.
        """
        self._without_progress = self._without_progress + 1 if settled == self._settled else 1
        self._settled = settled
        if self._without_progress >= CRASHES_WITHOUT_PROGRESS:
            raise UserError(
                f"stopped: {self._without_progress} workers in a row ended without finishing a source, the "
                f"last one: {why}; there may be too little memory for this many workers: use --workers 1, "
                "or --workers 0 to see the error"
            )


def rejection(task: SourceTask, key: str, *, hung: bool) -> Outcome:
    """Return the outcome of a rejected file. It is valid until the file changes, or a URL's `key` does."""
    try:
        _, record = read_local(task)
    except BadMediaError:
        record = unreadable(task)
        if is_url(task.source):
            record = replace(record, key=key or None)
    how = f"{'hung' if hung else 'crashed'} its worker, also when decoded alone"
    return Outcome(task=task, record=record, result="failed", failure=Failure("decode", how))
