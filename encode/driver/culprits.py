"""Who killed the worker: media that were being decoded when it died or hung, until they are tried alone.

A media is found guilty when it kills a worker that decodes nothing else, twice (one death alone may be
bad luck: the out-of-memory killer, an operator), or when it hangs one that decodes nothing else, once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from configs import UserError
from encode.download.urls import is_url
from encode.worker.local_files import hash_local, unreadable
from encode.worker.messages import Outcome, SourceTask
from model.media.images import BadMediaError, Failure

SOLO_DEATHS = 2
DEATHS_IN_VAIN = 6
"""Deaths in a row without a single source finished: then it is no image's fault."""


class Culprits:
    """The record of one job's deaths."""

    def __init__(self) -> None:
        self._solo_deaths: Counter[str] = Counter()
        self._in_vain = 0
        self._settled = -1

    def judge(
        self, culprits: Sequence[SourceTask], alone: SourceTask | None, *, hung: bool
    ) -> tuple[list[SourceTask], list[SourceTask]]:
        """Sort what a dead worker was decoding into guilty and to be tried (again).

        Args:
            culprits: what it was decoding.
            alone: what it had been given alone, if it had.
            hung: it was ended because it did not go on.
        """
        guilty: list[SourceTask] = []
        again: list[SourceTask] = []
        for task in culprits:
            on_trial = alone is not None and task.source == alone.source
            self._solo_deaths[task.source] += on_trial
            enough = hung or self._solo_deaths[task.source] >= SOLO_DEATHS
            (guilty if on_trial and enough else again).append(task)
        return guilty, again

    def count(self, settled: int, why: str) -> None:
        """One more death, with `settled` sources finished so far.

        Raises:
            UserError: too many, and none of them brought anything.
        """
        self._in_vain = self._in_vain + 1 if settled == self._settled else 1
        self._settled = settled
        if self._in_vain >= DEATHS_IN_VAIN:
            raise UserError(
                f"stopped: {self._in_vain} workers in a row ended without finishing anything, the last "
                f"one: {why}; too little memory for so many? --workers 1, or --workers 0 to see the error"
            )


def rejection(task: SourceTask, key: str, *, hung: bool) -> Outcome:
    """The outcome of a guilty media: it stands until its file changes, or has another `key`."""
    try:
        record = hash_local(task)
    except BadMediaError:
        record = unreadable(task)
        if is_url(task.source):
            record = replace(record, key=key or None)
    how = "hung its worker, alone too" if hung else "killed its worker, alone too"
    return Outcome(task=task, record=record, result="failed", failure=Failure("decode", how))
