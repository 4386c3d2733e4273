"""Keep account of a job's sources: which are waiting, which worker has which, and what became of each.

Every source leaves the tracker exactly once, with one ledger record: its rows are in the space, or it failed.
Results count only once their rows are committed. For a dead worker, only the commits on disk count.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from cache.store.ledger import MediaRecord, append_media, note_subjects
from cache.store.paths import CacheRoot
from encode.errors import TooManyFailuresError
from encode.plan.numbering import TextSet
from encode.worker.messages import OWN_STAGES, Outcome, SourceTask, media_id
from model.media.images import Failure

LEDGER_EVERY_S = 30.0
"""Seconds after which waiting records are written, so the most that a crash can lose."""

LEDGER_EVERY_RECORDS = 8192
"""Records that wait at most before they are written as one part of the media table."""


@dataclass(frozen=True, kw_only=True)
class FailureBudget:
    """How many failures of our own (stages encode and write) a job tolerates."""

    probation: int = 20
    """Settled sources before the rate counts."""
    rate: float = 0.1
    """Share of the settled sources that may fail in our own code."""

    def check(self, own: int, settled: int, last: MediaRecord) -> None:
        """Raise TooManyFailuresError if the budget is exceeded; `last` is the newest failure of our own."""
        if settled >= self.probation and own > self.rate * settled:
            raise TooManyFailuresError(
                f"stopped: {own} of {settled} sources failed in our own code, the last one "
                f"{last.source} at stage {last.stage}: {last.error}; encoded rows are kept: "
                "fix the cause and run the same command again"
            )


class Ledger:
    """Collects media records and writes them to the media table, one part at a time."""

    def __init__(self, root: CacheRoot, job: str):
        self._root, self._job = root, job
        self._records: list[MediaRecord] = []
        self._flushed_s = time.monotonic()

    def add(self, record: MediaRecord) -> None:
        """Write `record` with the next part."""
        self._records.append(record)
        late = time.monotonic() - self._flushed_s > LEDGER_EVERY_S
        if late or len(self._records) >= LEDGER_EVERY_RECORDS:
            self.flush()

    def flush(self) -> None:
        """Write the records collected so far."""
        append_media(self._root, self._records, self._job)
        self._records.clear()
        self._flushed_s = time.monotonic()


class Tracker:
    """Accounts for the sources of one job. A worker is a number that no other worker of the job has."""

    def __init__(
        self,
        tasks: Sequence[SourceTask],
        *,
        present: Collection[str],
        on_record: Callable[[MediaRecord], None],
        budget: FailureBudget | None = None,
    ):
        """Account for `tasks`.

        Args:
            tasks: the sources to encode, each once. A task is taken when it is assigned, so that a sequence
                that makes them then needs no memory for the others.
            present: keys of the images that were in the space before the job.
            on_record: called once for each source, with its final record.
            budget: when to stop the job.
        """
        self._tasks, self._next = tasks, 0
        self._again: deque[SourceTask] = deque()  # they wait again, and come first
        self._present = present
        self._on_record = on_record
        self._budget = budget or FailureBudget()
        self._assigned: dict[int, dict[str, SourceTask]] = {}
        # Duplicates, by media id, until the source with the same bytes is settled.
        self._duplicates: dict[str, list[Outcome]] = {}
        self._failures: dict[str, Failure] = {}
        self._notes: dict[str, str] = {}  # by media id: equal bytes have the same note
        self._committed = TextSet()
        self._found = TextSet()  # videos whose rows turned out to be in the space
        self._last_own_failure: MediaRecord | None = None
        self.total = len(tasks)
        """Sources of the job."""
        self.settled = 0
        """Sources with a final record."""
        self.failures: Counter[str] = Counter()
        """Stage -> number of sources that failed there."""
        self.notes: Counter[str] = Counter()
        """Subject of a note -> number of sources that have it and are used."""

    @property
    def encoded(self) -> int:
        """Media items that this job has committed."""
        return len(self._committed)

    @property
    def failed(self) -> int:
        """Sources recorded as failed."""
        return self.failures.total()

    @property
    def reused(self) -> int:
        """Settled sources whose bytes the space has from an earlier job or from another source."""
        return self.settled - self.failed - self.encoded

    def finished(self) -> bool:
        """Return whether every source is settled."""
        return self.settled == self.total

    def num_assigned(self, worker: int) -> int:
        """Return how many sources this worker has not settled yet."""
        return len(self._assigned.get(worker, ()))

    def assign_next(self, worker: int, count: int) -> list[SourceTask]:
        """Assign up to `count` waiting sources to a worker, and return them."""
        waiting = len(self._again) + len(self._tasks) - self._next
        if not waiting and not any(self._assigned.values()):
            # The file they are duplicates of changed before it was decoded, so nobody encodes their bytes.
            self._again.extend(o.task for repeats in self._duplicates.values() for o in repeats)
            self._duplicates.clear()
        tasks = [self._again.popleft() for _ in range(min(count, len(self._again)))]
        more = list(self._tasks[self._next : self._next + count - len(tasks)])
        self._next += len(more)
        self.assign(worker, tasks + more)
        return tasks + more

    def assign(self, worker: int, tasks: Iterable[SourceTask]) -> None:
        """Assign sources that `withdraw` took from another worker."""
        self._assigned.setdefault(worker, {}).update((task.source, task) for task in tasks)

    def settle(self, worker: int, outcomes: Sequence[Outcome]) -> None:
        """Record what a worker has finished.

        Raises:
            TooManyFailuresError: the failure budget is exceeded. Everything is recorded before.
        """
        for outcome in outcomes:
            del self._assigned[worker][outcome.task.source]
            if outcome.result == "failed":
                self.fail(outcome)
                continue
            name = _media_id(outcome.record)
            if outcome.result == "duplicate":
                self._duplicates.setdefault(name, []).append(outcome)
                continue
            (self._committed if outcome.result == "ok" else self._found).add(name)
            if outcome.record.note is not None:
                self._notes[name] = outcome.record.note
            self._record(outcome.record)
        self._settle_duplicates()
        if self._last_own_failure is not None:
            own = sum(self.failures[stage] for stage in OWN_STAGES)
            self._budget.check(own, self.settled, self._last_own_failure)

    def fail(self, outcome: Outcome) -> None:
        """Record a failure. Duplicates of its bytes will fail in the same way."""
        record, failure = outcome.failed_record(), outcome.failure
        assert failure is not None, "it has not failed"
        if record.key is not None:
            self._failures[_media_id(record)] = failure
        if failure.stage in OWN_STAGES:
            self._last_own_failure = record
        self.failures[failure.stage] += 1
        self._record(record)

    def worker_died(
        self, worker: int, committed: Collection[str], released: Collection[str]
    ) -> None:
        """Return a dead worker's sources to the waiting ones, except those that `withdraw` took before.

        Args:
            worker: the dead worker.
            committed: ids of the images it has committed, read from the disk.
            released: ids of media that it had reserved and not committed. Their duplicates wait again too.
        """
        self._committed.update(committed)
        unsettled = reversed(self._assigned.pop(worker, {}).values())
        self._again.extendleft(replace(task, reassigned=True) for task in unsettled)
        for name in released:
            repeats = self._duplicates.pop(name, ())
            self._again.extend(replace(outcome.task, reassigned=True) for outcome in repeats)
        self._settle_duplicates()

    def withdraw(self, worker: int, sources: Collection[str]) -> list[SourceTask]:
        """Take sources from a dead worker, to `assign` or `fail` them later."""
        unsettled = self._assigned.get(worker, {})
        return [
            replace(unsettled.pop(source), reassigned=True)
            for source in sources
            if source in unsettled
        ]

    def _settle_duplicates(self) -> None:
        """Record the duplicates of bytes that are in the space now, or have failed."""
        for name in list(self._duplicates):
            if name in self._committed or name in self._found or name in self._present:
                for outcome in self._duplicates.pop(name):
                    note = outcome.record.note or self._notes.get(name)
                    self._record(replace(outcome.record, note=note))
            elif (failure := self._failures.get(name)) is not None:
                for outcome in self._duplicates.pop(name):
                    self.fail(replace(outcome, result="failed", failure=failure))

    def _record(self, record: MediaRecord) -> None:
        self.settled += 1
        if record.status == "ok" and record.note:
            self.notes.update(note_subjects(record.note))
        self._on_record(record)


def _media_id(record: MediaRecord) -> str:
    assert record.key is not None, "it has no key, so it was never read"
    return media_id(record.kind, record.key)
