"""The driver's accounts: what is still to do, who has it, what became of it, and what the ledger is told.

Every source leaves the tracker exactly once, as in the space or as failed. A worker's word counts only for
rows it has committed; of a worker that is gone, the commits on disk are believed and nothing else.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot
from configs import UserError
from encode.worker.messages import OWN_STAGES, Outcome, SourceTask, media_id
from model.media.images import Failure

LEDGER_EVERY_S = 30.0
LEDGER_EVERY_RECORDS = 8192


class TooManyFailuresError(UserError):
    """The job stops: what fails is not the images."""


@dataclass(frozen=True, kw_only=True)
class FailureBudget:
    """How many failures of our own (stages encode and write) a job bears."""

    probation: int = 20
    """Sources finished before the rate is looked at."""
    rate: float = 0.1
    """Share of the finished sources that may fail so."""

    def check(self, own: int, finished: int, last: MediaRecord) -> None:
        """Raise TooManyFailuresError when the budget is spent; `last` is the newest such failure."""
        if finished >= self.probation and own > self.rate * finished:
            raise TooManyFailuresError(
                f"stopped: {own} of {finished} images failed in our own code, the last one "
                f"{last.source} at stage {last.stage}: {last.error}; what is encoded is kept, "
                "mend the cause and run the same command again"
            )


class Ledger:
    """Media records on their way to the media table, part by part."""

    def __init__(self, root: CacheRoot, job: str):
        self._root, self._job = root, job
        self._records: list[MediaRecord] = []
        self._since = time.monotonic()

    def add(self, record: MediaRecord) -> None:
        """Write `record` soon."""
        self._records.append(record)
        late = time.monotonic() - self._since > LEDGER_EVERY_S
        if late or len(self._records) >= LEDGER_EVERY_RECORDS:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting, now."""
        append_media(self._root, self._records, self._job)
        self._records.clear()
        self._since = time.monotonic()


class Tracker:
    """See above. Workers are numbers, each used once: a replacement gets a new one."""

    def __init__(
        self,
        tasks: Iterable[SourceTask],
        *,
        already: Collection[str],
        tell: Callable[[MediaRecord], None],
        budget: FailureBudget | None = None,
    ):
        """Account for `tasks`.

        Args:
            tasks: what the job has to do; sources are distinct.
            already: keys of images in the space before the job.
            tell: called with each final record, once a source.
            budget: when to give up.
        """
        self._waiting = deque(tasks)
        self._already = already
        self._tell = tell
        self._budget = budget or FailureBudget()
        self._with: dict[int, dict[str, SourceTask]] = {}
        self._after: dict[
            str, list[Outcome]
        ] = {}  # duplicates, until the media they repeat is final
        self._failures: dict[str, Failure] = {}
        self._committed: set[str] = set()
        self._found: set[str] = set()  # videos that turned out to be in the space
        self._stages: Counter[str] = Counter()
        self.total = len(self._waiting)
        self.settled = 0
        """Sources that have left the tracker."""
        self.last_failure: MediaRecord | None = None

    @property
    def encoded(self) -> int:
        """Media this job has committed."""
        return len(self._committed)

    @property
    def failed(self) -> int:
        """Sources that went to the ledger as failed."""
        return self._stages.total()

    @property
    def reused(self) -> int:
        """Sources whose media was, or by another name became, part of the space."""
        return self.settled - self.failed - self.encoded

    @property
    def failures(self) -> dict[str, int]:
        """Stage -> how many sources failed there."""
        return dict(self._stages)

    @property
    def waiting(self) -> int:
        """Sources that no worker has."""
        return len(self._waiting)

    def finished(self) -> bool:
        """Whether every source is accounted for."""
        return self.settled == self.total

    def held(self, worker: int) -> int:
        """How many sources this worker still owes."""
        return len(self._with.get(worker, ()))

    def take(self, worker: int, count: int) -> list[SourceTask]:
        """Up to `count` sources, now this worker's."""
        if not self._waiting and not any(self._with.values()):
            # Repeats of bytes that a file no longer had when it was read a second time.
            self._waiting.extend(o.task for repeats in self._after.values() for o in repeats)
            self._after.clear()
        tasks = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        self.give(worker, tasks)
        return tasks

    def give(self, worker: int, tasks: Iterable[SourceTask]) -> None:
        """These sources are this worker's (those set aside by `lost`)."""
        self._with.setdefault(worker, {}).update((task.source, task) for task in tasks)

    def settle(self, worker: int, outcomes: Sequence[Outcome]) -> None:
        """Write down what a worker has finished.

        Raises:
            TooManyFailuresError: after everything is written down.
        """
        for outcome in outcomes:
            del self._with[worker][outcome.task.source]
            if outcome.result == "failed":
                self.fail(outcome)
                continue
            name = _media_id(outcome.record)
            if outcome.result == "duplicate":
                self._after.setdefault(name, []).append(outcome)
                continue
            (self._committed if outcome.result == "ok" else self._found).add(name)
            self._leave(outcome.record)
        self._release_duplicates()
        own = sum(self._stages[stage] for stage in OWN_STAGES)
        if own and self.last_failure is not None:
            self._budget.check(own, self.settled, self.last_failure)

    def fail(self, outcome: Outcome) -> None:
        """One source has failed for good; duplicates of its bytes fail as it did."""
        record, failure = outcome.failed_record(), outcome.failure
        assert failure is not None, "it has not failed"
        if record.key is not None:
            self._failures[_media_id(record)] = failure
        if failure.stage in OWN_STAGES or self.last_failure is None:
            self.last_failure = record
        self._stages[failure.stage] += 1
        self._leave(record)

    def lost(self, worker: int, committed: Collection[str], released: Collection[str]) -> None:
        """A worker is gone. Its sources are to do again, but for those the caller sets aside before.

        Args:
            worker: which one.
            committed: claims it had committed wholly, by what is on disk.
            released: claims that are anybody's again; duplicates of these are to do again too.
        """
        self._committed.update(committed)
        owed = reversed(self._with.pop(worker, {}).values())
        self._waiting.extendleft(replace(task, reassigned=True) for task in owed)
        for key in released:
            repeats = self._after.pop(key, ())
            self._waiting.extend(replace(outcome.task, reassigned=True) for outcome in repeats)
        self._release_duplicates()

    def set_aside(self, worker: int, sources: Collection[str]) -> list[SourceTask]:
        """Take these sources back from a worker that is gone, to `give` or `fail` them later."""
        owed = self._with.get(worker, {})
        return [replace(owed.pop(source), reassigned=True) for source in sources if source in owed]

    def _release_duplicates(self) -> None:
        there = (self._committed, self._found, self._already)
        present = {key for key in self._after if any(key in keys for keys in there)}
        final = present | {key for key in self._after if key in self._failures}
        for key in sorted(final):
            for outcome in self._after.pop(key):
                if key in present:
                    self._leave(outcome.record)
                    continue
                self.fail(replace(outcome, result="failed", failure=self._failures[key]))

    def _leave(self, record: MediaRecord) -> None:
        self.settled += 1
        self._tell(record)


def _media_id(record: MediaRecord) -> str:
    assert record.key is not None, "only what was read can be claimed"
    return media_id(record.kind, record.key)
