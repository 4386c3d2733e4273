"""The tracker in a simulated job: whenever workers die, every source gets exactly one record.

tracker = Tracker(tasks, present=(), on_record=ledger.add)
tasks = tracker.assign_next(worker, 32)
tracker.settle(worker, outcomes)
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.store.ledger import MediaRecord, read_media
from cache.store.paths import CacheRoot
from encode.driver.tracker import LEDGER_EVERY_RECORDS, FailureBudget, Ledger, Tracker
from encode.errors import TooManyFailuresError
from encode.worker.messages import Outcome, Registrar, Result, SourceTask
from model.media.images import Failure


class World:
    """Workers that reserve, finish, commit and die at random. Several files may have equal bytes."""

    def __init__(self, seed: int, sources: int, contents: int, already: int):
        self.dice = random.Random(seed)
        self.bytes = {f"/{i}": f"{self.dice.randrange(contents):064x}" for i in range(sources)}
        self.broken = {k for k in set(self.bytes.values()) if self.dice.random() < 0.2}
        self.present = {f"{i:064x}" for i in range(already)} - self.broken
        self.rows: Counter[str] = Counter()
        self.recorded: dict[str, list[MediaRecord]] = {source: [] for source in self.bytes}
        self.registrar = Registrar(self.present, {"image": 0})
        self.tracker = Tracker(
            [SourceTask(source=source) for source in self.bytes],
            present=set(self.present),
            on_record=lambda record: self.recorded[record.source].append(record),
            budget=FailureBudget(probation=10**9),
        )
        self.open: dict[int, list[SourceTask]] = {1: [], 2: []}
        """Worker -> sources assigned to it that it has not read yet."""
        self.uncommitted: dict[int, list[Outcome]] = {1: [], 2: []}
        self.unsent: dict[int, list[Outcome]] = {1: [], 2: []}
        """Worker -> outcomes that it has not sent to the driver yet."""
        self.keys_of: dict[int, set[str]] = {}
        self.next_worker = 3

    def step(self, *, deaths: bool) -> None:
        worker = self.dice.choice(list(self.open))
        action = self.dice.choice(["assign", "work", "work", "commit", "send", "die"])
        if action == "assign":
            self.open[worker] += self.tracker.assign_next(worker, self.dice.randrange(1, 4))
        elif action == "work" and self.open[worker]:
            self.work(worker, self.open[worker].pop(0))
        elif action == "commit":
            self.commit(worker)
        elif action == "send":
            self.tracker.settle(worker, self.unsent[worker])
            self.unsent[worker] = []
        elif action == "die" and deaths:
            self.die(worker)

    def work(self, worker: int, task: SourceTask) -> None:
        key = self.bytes[task.source]
        record = MediaRecord(source=task.source, key=key)
        (mine,) = self.registrar.reserve(worker, [key])
        if not mine:
            self.unsent[worker].append(Outcome(task=task, result="duplicate", record=record))
        elif key in self.broken:
            why = Failure("decode", "broken")
            bad = Outcome(task=task, result="failed", record=record, failure=why)
            self.unsent[worker].append(bad)
        else:
            self.uncommitted[worker].append(Outcome(task=task, result="ok", record=record))

    def commit(self, worker: int) -> None:
        for outcome in self.uncommitted[worker]:
            assert outcome.record.key is not None
            self.rows[outcome.record.key] += 1
            self.keys_of.setdefault(worker, set()).add(outcome.record.key)
        self.unsent[worker] += self.uncommitted[worker]
        self.uncommitted[worker] = []

    def die(self, worker: int) -> None:
        decoding = {task.source for task in self.open[worker][: self.dice.randrange(2)]}
        withdrawn = self.tracker.withdraw(worker, decoding)
        committed = self.keys_of.get(worker, set())
        released = self.registrar.release(worker, committed)
        waiting = {self.bytes[task.source] for task in withdrawn}
        self.tracker.worker_died(worker, committed, set(released) - waiting)
        for table in (self.open, self.uncommitted, self.unsent):
            del table[worker]  # type: ignore[attr-defined]
        new, self.next_worker = self.next_worker, self.next_worker + 1
        self.open[new], self.uncommitted[new], self.unsent[new] = list(withdrawn), [], []
        self.tracker.assign(new, withdrawn)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sources=st.integers(1, 25),
    contents=st.integers(1, 20),
    already=st.integers(0, 5),
)
def test_every_source_is_recorded_once_and_every_row_exists_once(
    seed: int, sources: int, contents: int, already: int
) -> None:
    world = World(seed, sources, contents, already)
    for _ in range(200):
        world.step(deaths=True)
    for _ in range(100_000):
        if world.tracker.finished():
            break
        world.step(deaths=False)
    tracker = world.tracker
    assert tracker.finished()
    assert all(len(records) == 1 for records in world.recorded.values())
    wanted = set(world.bytes.values()) - world.broken
    assert set(world.rows) == wanted - world.present
    assert set(world.rows.values()) <= {1}
    for source, (record,) in world.recorded.items():
        assert (record.status == "failed") == (world.bytes[source] in world.broken)
    assert tracker.encoded == len(wanted - world.present)
    assert tracker.failed == sum(key in world.broken for key in world.bytes.values())
    assert tracker.encoded + tracker.failed + tracker.reused == sources == tracker.total


def outcome(source: str, stage: str | None) -> Outcome:
    record = MediaRecord(source=source, key=f"{int(source[1:]):064x}")
    task = SourceTask(source=source)
    if stage is None:
        return Outcome(task=task, result="ok", record=record)
    return Outcome(task=task, result="failed", record=record, failure=Failure(stage, "why"))


def settle(stages: list[str | None], budget: FailureBudget) -> Tracker:
    tasks = [SourceTask(source=f"/{i}") for i in range(len(stages))]
    tracker = Tracker(tasks, present=(), on_record=lambda record: None, budget=budget)
    for i, stage in enumerate(stages):
        tracker.assign_next(0, 1)
        tracker.settle(0, [outcome(f"/{i}", stage)])
    return tracker


def test_the_failure_budget_is_a_rate_after_a_probation_and_counts_only_our_own_errors() -> None:
    budget = FailureBudget(probation=10, rate=0.2)
    assert settle(["decode"] * 50, budget).failed == 50
    assert settle(["encode"] * 9, budget).failed == 9
    assert settle([None] * 8 + ["encode", "write"] + [None] * 5, budget).encoded == 13
    with pytest.raises(TooManyFailuresError, match=r"3 of 10 sources .* /9 at stage write: why"):
        settle([None] * 7 + ["encode", "write", "write"], budget)


class Counted(Sequence[SourceTask]):
    """Tasks that are made when they are asked for, and counted."""

    def __init__(self, count: int) -> None:
        self.count, self.made = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        self.made += 1
        return SourceTask(source=f"/{at}")


def test_a_task_is_made_once_and_only_when_it_is_assigned() -> None:
    tasks = Counted(10_000_000)
    tracker = Tracker(tasks, present=(), on_record=lambda _: None)
    assert (tracker.total, tasks.made) == (10_000_000, 0)
    assert [task.source for task in tracker.assign_next(1, 3)] == ["/0", "/1", "/2"]
    assert tracker.withdraw(1, ["/1"])
    tracker.worker_died(1, set(), set())
    again = tracker.assign_next(2, 4)
    assert [(task.source, task.reassigned) for task in again] == [
        ("/0", True),
        ("/2", True),
        ("/3", False),
        ("/4", False),
    ]
    assert tasks.made == 5


def test_notes_are_counted_of_media_that_are_used() -> None:
    tracker = Tracker(
        [SourceTask(source=f"/{n}") for n in range(3)], present=(), on_record=lambda _: None
    )
    tracker.assign_next(0, 3)
    tracker.settle(0, [noted("/0", "ok"), noted("/1", "present"), noted("/2", "failed")])
    assert tracker.notes == {"ends early": 2, "HDR": 2}


def test_a_duplicate_has_the_note_of_its_bytes() -> None:
    records: list[MediaRecord] = []
    tracker = Tracker(
        [SourceTask(source=f"/{n}") for n in range(2)], present=(), on_record=records.append
    )
    tracker.assign_next(0, 2)
    first = noted("/0", "ok")
    twin = MediaRecord(source="/1", key=first.record.key)  # its bytes were not decoded
    task = SourceTask(source="/1")
    tracker.settle(0, [Outcome(task=task, record=twin, result="duplicate"), first])
    assert {record.source: record.note for record in records} == dict.fromkeys(
        ("/0", "/1"), first.record.note
    )
    assert tracker.notes == {"ends early": 2, "HDR": 2}


def noted(source: str, result: Result) -> Outcome:
    note = "ends early: 1.0 s of 2.0 s; HDR (PQ), shown without tone mapping"
    record = MediaRecord(source=source, key=f"{int(source[1:]):064x}", note=note)
    why = Failure("decode", "why") if result == "failed" else None
    return Outcome(task=SourceTask(source=source), record=record, result=result, failure=why)


def test_duplicates_fail_with_the_source_they_duplicate() -> None:
    records: list[MediaRecord] = []
    tracker = Tracker(
        [SourceTask(source="/1"), SourceTask(source="/2", attempts=4)],
        present=(),
        on_record=records.append,
    )
    tracker.assign_next(0, 2)
    record = MediaRecord(source="/2", key=f"{1:064x}")
    task = SourceTask(source="/2", attempts=4)
    tracker.settle(0, [Outcome(task=task, result="duplicate", record=record)])
    assert (tracker.settled, records) == (0, []), "the other source is not settled yet"
    tracker.settle(0, [outcome("/1", "decode")])
    assert [(r.source, r.stage, r.error, r.attempts) for r in records] == [
        ("/1", "decode", "why", 1),
        ("/2", "decode", "why", 5),
    ]


def test_the_ledger_writes_a_part_when_enough_records_wait(tmp_path: Path) -> None:
    root = CacheRoot(tmp_path)
    ledger = Ledger(root, "job")
    ledger.flush()
    assert not root.media_dir.exists(), "no empty parts"
    for i in range(LEDGER_EVERY_RECORDS + 1):
        ledger.add(MediaRecord(source=f"/{i}"))
    assert len(read_media(root)) == LEDGER_EVERY_RECORDS
    ledger.flush()
    assert len(read_media(root)) == LEDGER_EVERY_RECORDS + 1
    assert len(list(root.media_dir.iterdir())) == 2
