"""A space has one driver at a time; the next one waits for the workers of a dead one, which write nothing.

with DriverLock(paths, holder_text("encode.run")) as driver:
    with WorkerLease(paths, driver.token, "w1") as lease:
        lease.fence()
"""

from __future__ import annotations

import errno
import fcntl
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cache.errors import CacheError, InUseError, StaleJobError
from cache.store.locks import DriverLock, WorkerLease, driver_holder, wait_for_exit
from cache.store.paths import SpacePaths
from cache.store.writer import ShardWriter
from tests.support.spaces import key, make_space, row

pytestmark = pytest.mark.slow


HOLD = """
import sys
from cache.store.paths import SpacePaths
from cache.store.locks import DriverLock, WorkerLease
from pathlib import Path
paths, what = SpacePaths(Path(sys.argv[1])), sys.argv[2]
lock = DriverLock(paths, "job 1") if what == "driver" else WorkerLease(paths, what, "w1")
with lock:
    print("held", flush=True)
    sys.stdin.read()
"""


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


def test_the_error_of_a_second_driver_names_the_first(paths: SpacePaths) -> None:
    assert driver_holder(paths) is None
    with process(paths, "driver") as first:
        assert driver_holder(paths) == "job 1"
        with pytest.raises(InUseError, match=r"spaces/toy is being written by job 1; wait"):
            DriverLock(paths, "job 2").__enter__()
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert driver_holder(paths) is None
    with DriverLock(paths, "job 2"):
        assert driver_holder(paths) == "job 2"
    assert driver_holder(paths) is None


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


def test_a_new_driver_waits_for_the_last_worker_of_a_dead_one(
    paths: SpacePaths, caplog: pytest.LogCaptureFixture
) -> None:
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
        orphan.send_signal(signal.SIGKILL)
        thread.join(10)
        assert entered.is_set()


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
        space.paths.driver_lock.write_text('{"holder": "job 2", "token": "another"}')
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


def test_a_file_system_without_locks_is_named(
    paths: SpacePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(fd: int, how: int) -> None:
        if how != fcntl.LOCK_UN:
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(
        CacheError, match=r"driver\.lock: this file system cannot lock files \(No locks"
    ):
        DriverLock(paths, "job").__enter__()


def test_a_refused_lease_holds_no_lock(paths: SpacePaths) -> None:
    with pytest.raises(StaleJobError), WorkerLease(paths, "no such token", "w1"):
        pass
    with DriverLock(paths, "job"):  # would wait for ever
        pass
