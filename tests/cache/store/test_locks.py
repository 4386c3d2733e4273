"""A space has one driver at a time. One that is killed or frozen never blocks the next, on any node.

with DriverLock(paths, holder_text("encode.run")) as driver:
    with WorkerLease(paths, driver.token, "w1") as lease:
        lease.fence()

Processes look and beat ten times as often here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cache.errors import CorruptError, InUseError, StaleJobError
from cache.store import locks
from cache.store.locks import (
    DriverLock,
    WorkerLease,
    driver_holder,
    driver_token,
    wait_for_exit,
)
from cache.store.paths import SpacePaths
from cache.store.writer import ShardWriter
from tests.support.spaces import fill, key, make_space, row

pytestmark = pytest.mark.slow


BEAT_S = 0.05

HOLD = """
import contextlib, sys, time
from pathlib import Path
from cache.errors import StaleJobError
from cache.store import locks
from cache.store.paths import SpacePaths
locks.BEAT_S = 0.05
time.time = lambda: 0.0  # the clock of another node
paths, what = SpacePaths(Path(sys.argv[1])), sys.argv[2]
lock = locks.DriverLock(paths, "job 1") if what == "driver" else locks.WorkerLease(paths, what, "w1")
with lock:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            lock.fence()
            print("ours", flush=True)
        except StaleJobError as error:
            print(error, flush=True)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_S", BEAT_S)
    monkeypatch.setattr(
        locks, "STALE_LOOKS", 400
    )  # a busy machine is not mistaken for a frozen driver
    monkeypatch.setattr(locks, "ORPHANS_S", 0.3)
    monkeypatch.setattr(locks, "GUARD_S", 0.3)


@pytest.fixture
def paths(tmp_path: Path) -> SpacePaths:
    return SpacePaths(tmp_path / "spaces" / "toy")


@contextmanager
def process(paths: SpacePaths, what: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the driver's lock, or the lease of the worker w1 with that token."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(paths.root), what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "held\n"
        try:
            yield running
        finally:
            running.kill()


def ask(running: subprocess.Popen[str]) -> str:
    """What the process's next look at its token says: `ours`, or the error."""
    assert running.stdin is not None and running.stdout is not None
    running.stdin.write("?\n")
    running.stdin.flush()
    return running.stdout.readline().strip()


def from_another_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this process is on another node than those that have taken the space before."""
    monkeypatch.setattr(locks, "_node", lambda: f"node {random.random()}")


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def flock(fd: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def lonely_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose locks are not seen by other nodes: here, by no other process."""
    monkeypatch.setattr(fcntl, "flock", lambda fd, how: None)


FILE_SYSTEMS = {"locks": lambda _: None, "no locks": without_flock, "own locks": lonely_flock}


# ---- drivers


def test_the_error_of_a_second_driver_names_the_first(
    paths: SpacePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert driver_holder(paths) is None
    with process(paths, "driver") as first:
        assert driver_holder(paths) == "job 1"
        with pytest.raises(InUseError, match=r"spaces/toy is being written by job 1; wait"):
            DriverLock(paths, "job 2").__enter__()
        assert ask(first) == "ours"
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert driver_holder(paths) is None
    monkeypatch.setattr(
        locks, "STALE_LOOKS", 10**9
    )  # a process that was killed here is noticed at once
    with DriverLock(paths, "job 2"):
        assert driver_holder(paths) == "job 2"
    assert driver_holder(paths) is None
    assert [path.name for path in paths.locks_dir.glob("alive-*")] == []


@pytest.mark.parametrize("system", ["no locks", "own locks"])
def test_a_driver_on_another_node_is_known_by_its_number(
    paths: SpacePaths, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    with process(paths, "driver") as first:
        from_another_node(monkeypatch)
        FILE_SYSTEMS[system](monkeypatch)
        assert driver_holder(paths) == "job 1"
        with pytest.raises(InUseError, match=r"spaces/toy is being written by job 1; wait"):
            DriverLock(paths, "job 2").__enter__()
        assert ask(first) == "ours"
        first.send_signal(signal.SIGKILL)
        first.wait()
        monkeypatch.setattr(locks, "STALE_LOOKS", 30)
        start = time.monotonic()
        with DriverLock(paths, "job 2") as second:
            assert time.monotonic() - start > 20 * BEAT_S, "it might have been slow"
            second.fence()
            assert driver_holder(paths) == "job 2"


@pytest.mark.parametrize("system", ["locks", "own locks"])
def test_a_frozen_driver_is_replaced_and_stops_when_it_wakes(
    paths: SpacePaths,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    system: str,
) -> None:
    with process(paths, "driver") as first:
        FILE_SYSTEMS[system](monkeypatch)
        if system == "own locks":
            from_another_node(monkeypatch)
        first.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(locks, "STALE_LOOKS", 30)
        with caplog.at_level(logging.WARNING), DriverLock(paths, "job 2") as second:
            assert "taken by job 1, which shows no sign of life; taking over in" in caplog.text
            first.send_signal(signal.SIGCONT)
            said = ask(first)
            assert said.startswith(
                f"{paths.root} belongs to another job now (job 2): this one showed"
            )
            time.sleep(4 * BEAT_S)
            second.fence()
            assert driver_token(paths) == second.token, "the woken one has written nothing"
            first.send_signal(signal.SIGCONT)
            assert first.stdin is not None
            first.stdin.close()
            assert first.wait() == 0
            second.fence()
            assert driver_holder(paths) == "job 2"
    assert driver_holder(paths) is None


def test_a_driver_that_is_only_slow_keeps_its_space(
    paths: SpacePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes a number for every 20 looks of the other."""
    with process(paths, "driver") as first:
        monkeypatch.setattr(locks, "BEAT_S", BEAT_S / 20)
        monkeypatch.setattr(locks, "STALE_LOOKS", 10_000)
        for _ in range(5):
            with pytest.raises(InUseError):
                DriverLock(paths, "job 2").__enter__()
        assert ask(first) == "ours"


def test_a_record_written_late_by_a_frozen_driver_is_corrected(tmp_path: Path) -> None:
    """It was frozen in the instant before its write, and another one has taken the space meanwhile."""
    space = make_space(tmp_path)
    with DriverLock(space.paths, "job 0"):
        old = space.paths.driver_lock.read_bytes()
    driver = DriverLock(space.paths, "job 1")
    with driver, WorkerLease(space.paths, driver.token, "w1") as lease:
        space.paths.driver_lock.write_bytes(old)
        lease.fence()
        driver.fence()
        deadline = time.monotonic() + 60
        while driver_token(space.paths) != driver.token and time.monotonic() < deadline:
            time.sleep(BEAT_S)
        assert driver_token(space.paths) == driver.token
        lease.fence()


@pytest.mark.parametrize("guard", [True, False])
def test_of_drivers_that_start_together_one_writes_at_a_time(
    paths: SpacePaths, monkeypatch: pytest.MonkeyPatch, guard: bool
) -> None:
    """Also where another one was frozen while it was taking the space, with the kernel's lock in its hand."""
    monkeypatch.setattr(locks, "BEAT_S", 0.01)
    monkeypatch.setattr(locks, "STALE_LOOKS", 1000)
    inside, most, refused, done = 0, 0, 0, 0
    counting = threading.Lock()

    def job(number: int) -> None:
        nonlocal inside, most, refused, done
        try:
            with DriverLock(paths, f"job {number}") as lock:
                with counting:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.1)
                lock.fence()
                with counting:
                    inside -= 1
                    done += 1
        except (InUseError, StaleJobError):
            with counting:
                refused += 1

    paths.locks_dir.mkdir(parents=True)
    with paths.driver_lock.open("wb") as frozen:
        if not guard:
            fcntl.flock(frozen, fcntl.LOCK_EX)
        jobs = [threading.Thread(target=job, args=[number]) for number in range(6)]
        for one in jobs:
            one.start()
        for one in jobs:
            one.join()
    assert done + refused == 6
    assert done >= 1
    if guard:
        assert most == 1


def test_asking_for_the_holder_does_not_block_a_driver(paths: SpacePaths) -> None:
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            driver_holder(paths)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(50):
            with DriverLock(paths, "job"):
                pass
    finally:
        stop.set()
        watcher.join()


BROKEN = {
    "empty": b"",
    "no JSON": b"\xff\xfe",
    "a list": b"[]",
    "without a token": b'{"holder": "x", "node": "y"}',
    "a token that leads elsewhere": b'{"holder": "x", "node": "y", "token": "../../../x"}',
    "a long name": json.dumps(
        {"holder": "x" * 501, "node": "y", "token": f"{7:012}-{'0' * 32}"}
    ).encode(),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_record_that_is_none_of_ours_holds_nothing(paths: SpacePaths, content: bytes) -> None:
    paths.locks_dir.mkdir(parents=True)
    paths.driver_lock.write_bytes(content)
    assert driver_holder(paths) is None
    with DriverLock(paths, "job") as lock:
        lock.fence()


def test_tokens_have_an_end(paths: SpacePaths) -> None:
    paths.locks_dir.mkdir(parents=True)
    token = f"{'9' * 12}-{'0' * 32}"
    paths.driver_lock.write_text(json.dumps({"holder": "x", "node": "y", "token": token}))
    with pytest.raises(CorruptError, match="no token can be higher; remove "):
        DriverLock(paths, "job").__enter__()


# ---- workers


def test_a_new_driver_waits_for_the_last_worker_of_a_dead_one(
    paths: SpacePaths, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "ORPHANS_S", 60.0)
    with DriverLock(paths, "job 1") as first:
        token = first.token
    with process(paths, token) as orphan:
        entered = threading.Event()

        def second() -> None:
            with DriverLock(paths, "job 2"):
                entered.set()

        thread = threading.Thread(target=second)
        with caplog.at_level(logging.WARNING):
            thread.start()
            assert not entered.wait(0.5)
        assert "waiting for workers of an earlier job" in caplog.text
        assert driver_holder(paths) == "job 2", "a third driver is turned away meanwhile"
        assert "belongs to another job now (job 2)" in ask(orphan)
        orphan.send_signal(signal.SIGKILL)
        thread.join(10)
        assert entered.is_set()


def test_a_frozen_worker_blocks_neither_the_next_job_nor_its_workers(
    paths: SpacePaths, caplog: pytest.LogCaptureFixture
) -> None:
    with DriverLock(paths, "job 1") as first:
        token = first.token
    with process(paths, token) as frozen:
        frozen.send_signal(signal.SIGSTOP)
        with caplog.at_level(logging.WARNING), DriverLock(paths, "job 2") as second:
            assert "going on without waiting" in caplog.text
            with WorkerLease(paths, second.token, "w1") as lease:
                frozen.send_signal(signal.SIGCONT)
                assert "belongs to another job now (job 2)" in ask(frozen)
                lease.fence()
                assert not wait_for_exit(paths, "w1", 0), "of its own workers, not of the other's"
        caplog.clear()
        with caplog.at_level(logging.WARNING), DriverLock(paths, "job 3"):
            assert caplog.text == "", "nobody waits for it a second time"


def test_a_worker_that_is_replaced_while_it_is_frozen_stops_when_it_wakes(
    paths: SpacePaths,
) -> None:
    with DriverLock(paths, "job") as driver, process(paths, driver.token) as frozen:
        assert ask(frozen) == "ours"
        frozen.send_signal(signal.SIGSTOP)
        assert not wait_for_exit(paths, "w1", 0.1)
        with WorkerLease(paths, driver.token, "w2") as other:
            frozen.send_signal(signal.SIGCONT)
            assert ask(frozen) == "worker w1 was replaced by its driver"
            other.fence()


def test_the_lowest_number_of_a_woken_worker_counts_once(tmp_path: Path) -> None:
    """It was frozen between its last look at the token and the rename of the commit."""
    space = make_space(tmp_path)
    with DriverLock(space.paths, "job 1") as first:
        worker = WorkerLease(space.paths, first.token, "w1")
        with worker:
            late = ShardWriter(space, "image", 0)  # without a fence: it has looked already
            late.append(key(1), "full", row(1))
    with DriverLock(space.paths, "job 2"):
        assert space.next_shard("image") == 1
        fill(space, [1, 2])
        late.commit()
        with pytest.raises(StaleJobError):
            worker.fence()
    index = space.index("image")
    assert (len(index), index.rows(index.doubled).tolist()) == (2, [4])


def test_a_shard_number_of_the_next_job_is_no_disk_error(tmp_path: Path) -> None:
    """A driver that was frozen gives out numbers that another job has used."""
    space = make_space(tmp_path)
    with DriverLock(space.paths, "job 1") as first:
        lease = WorkerLease(space.paths, first.token, "w1")
    with DriverLock(space.paths, "job 2"):
        fill(space, [1])
        with pytest.raises(StaleJobError, match="belongs to another job now"):
            ShardWriter(space, "image", 0, lease.fence)
    with pytest.raises(FileExistsError):
        ShardWriter(space, "image", 0, lambda: None)


def test_a_stale_worker_can_neither_start_nor_commit(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    with DriverLock(space.paths, "job 1") as first:
        token = first.token
    with WorkerLease(space.paths, token, "w1") as lease:
        writer = ShardWriter(space, "image", 0, lease.fence)
        writer.append(key(1), "full", row(1))
        late = ShardWriter(space, "image", 1, lease.fence)
        late.append(key(2), "full", row(2))
        assert writer.commit() == 1, "the job is over, but nobody else has begun"
        # What another node's driver would do, whose locks this one does not see:
        token_2 = f"{2:012}-{'0' * 32}"
        record = {"holder": "job 2", "node": "another", "token": token_2}
        space.paths.driver_lock.write_text(json.dumps(record))
        with pytest.raises(StaleJobError, match="belongs to another job now"):
            late.commit()
        assert not space.paths.shard("image", 1).exists()
        late.abort()
    with pytest.raises(StaleJobError), WorkerLease(space.paths, token, "w2"):
        pass
    assert space.keys("image") == {(key(1), "full")}
    assert space.next_shard("image") == 1


def test_the_right_to_write_may_be_lost_between_shard_and_commit(tmp_path: Path) -> None:
    space = make_space(tmp_path)
    calls = 0

    def fence() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise StaleJobError

    writer = ShardWriter(space, "image", 0, fence)
    writer.append(key(1), "full", row(1))
    with pytest.raises(StaleJobError):
        writer.commit()
    assert space.paths.shard("image", 0).exists()
    assert space.keys("image") == set()
    assert space.next_shard("image") == 1
    writer.abort()
    assert not space.paths.shard("image", 0).parent.parent.exists()


def test_a_killed_worker_is_noticed_and_cannot_start_again(paths: SpacePaths) -> None:
    with DriverLock(paths, "job") as driver:
        with process(paths, driver.token) as worker:
            start = time.monotonic()
            assert not wait_for_exit(paths, "w1", 0.2)
            assert time.monotonic() - start >= 0.2
            worker.send_signal(signal.SIGKILL)
            assert wait_for_exit(paths, "w1", 10)
        # An actor that was still importing when it was given up comes too late.
        with pytest.raises(StaleJobError, match="worker w1 was replaced"):
            WorkerLease(paths, driver.token, "w1").__enter__()
        with WorkerLease(paths, driver.token, "w2") as other:
            other.fence()
    with DriverLock(paths, "next job") as driver, WorkerLease(paths, driver.token, "w1") as lease:
        lease.fence()


def test_two_workers_cannot_share_an_id(paths: SpacePaths) -> None:
    with DriverLock(paths, "job") as driver, WorkerLease(paths, driver.token, "w1"):
        with pytest.raises(StaleJobError), WorkerLease(paths, driver.token, "w1"):
            pass
        assert not wait_for_exit(paths, "w1", 0)


def test_a_refused_lease_holds_no_lock(paths: SpacePaths) -> None:
    with pytest.raises(StaleJobError), WorkerLease(paths, "no such token", "w1"):
        pass
    with DriverLock(paths, "job"):  # would wait for ever
        pass
