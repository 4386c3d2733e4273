"""Kill or freeze a driver at random moments, then run the same command: no row is lost, none counts twice.

process = start(folder, workers=2)          # tests.support.encode_jobs
process.kill()
encode(folder / "cache", f"folder:{folder / 'images'}")
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cache import gc
from cache.maintenance.checks import verify
from cache.store import locks
from cache.store.ledger import MediaRecord, read_media
from cache.store.locks import driver_holder
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from encode.driver.ray_session import remove_dead
from encode.worker.worker import Worker
from tests.support.encode_jobs import (
    Result,
    committed,
    draw,
    encode,
    shoot,
    space,
    start,
    wait_for_rows,
)

IMAGES = 60
VIDEOS = (2, 5, 16, 3, 8, 7) * 3
"""Frames of each video."""


def assert_whole(folder: Path, like: Result) -> None:
    reader = FeatureReader(space(folder))
    assert reader.rows("image") == IMAGES
    assert reader.rows("frame") == sum(VIDEOS)
    assert all(index.doubled.size == 0 for index in reader.index.values())
    assert reader.logical_hash() == like.reader.logical_hash()


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The drivers' folder of temporary files: pytest's own has too long a path for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="g", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.mark.soak_counted
@pytest.mark.parametrize("workers", [0, 2])
def test_a_driver_killed_at_any_moment(
    tmp_path: Path, temporary: Path, workers: int, soak: Callable[[int, int], int]
) -> None:
    draw(tmp_path / "images", IMAGES)
    shoot(tmp_path / "images", VIDEOS)
    whole = encode(tmp_path / "whole", f"folder:{tmp_path / 'images'}")
    total = len(whole.ledger)  # a commit for each source, at least
    dice = random.Random(workers)
    in_the_middle = 0
    for i in range(soak(3, 20)):
        if in_the_middle >= soak(2 if workers == 0 else 1, 20):
            break
        folder = tmp_path / f"job-{i}"
        folder.mkdir()
        (folder / "images").symlink_to(tmp_path / "images")
        process = start(folder, workers)
        # Waits for rows, not for seconds, so most kills hit a working job on any machine.
        wait_for_rows(folder, process, rows=dice.randrange(total // 2))
        assert len(list(temporary.glob("nm2-*"))) <= 1, (
            "a driver removes what a killed one has left"
        )
        time.sleep(dice.uniform(0.0, 0.05))
        process.kill()
        process.communicate()
        in_the_middle += committed(folder) < total
        # The first run continues the killed one; the second has nothing to do.
        result = encode(folder / "cache", f"folder:{folder / 'images'}")
        assert result.code == 0
        assert result.failures() == {}
        assert_whole(folder, whole)
        assert len(result.ledger) == len(whole.ledger)
        assert encode(folder / "cache", f"folder:{folder / 'images'}").plan.todo == ()
    assert in_the_middle, "no kill hit a working job, so nothing was tested"
    remove_dead(temporary)  # as the next driver would
    assert list(temporary.glob("nm2-*")) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_keeps_encoded_rows_and_exits_with_130(tmp_path: Path, workers: int) -> None:
    draw(tmp_path / "images", IMAGES)
    process = start(tmp_path, workers)
    wait_for_rows(tmp_path, process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to every process of the job
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in err
    kept = FeatureReader(space(tmp_path)).rows("image")
    last = out.splitlines()[-1]
    assert last.startswith(f"interrupted: {kept} encoded and kept, {IMAGES - kept} left")
    assert driver_holder(space(tmp_path)) is None
    result = encode(tmp_path / "cache", f"folder:{tmp_path / 'images'}")
    assert result.plan.reused == kept
    assert result.reader.rows("image") == IMAGES


@pytest.mark.soak_counted
def test_a_driver_that_is_frozen_through_a_takeover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soak: Callable[[int, int], int]
) -> None:
    """It wakes when the next job has done its work, or in the middle of it."""
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    monkeypatch.setattr(locks, "STALE_LOOKS", 8)
    monkeypatch.setattr(locks, "ORPHANS_S", 0.2)
    draw(tmp_path / "images", IMAGES)
    whole = encode(tmp_path / "whole", f"folder:{tmp_path / 'images'}")
    dice = random.Random(0)
    for i in range(soak(1, 20)):
        folder = tmp_path / f"job-{i}"
        folder.mkdir()
        (folder / "images").symlink_to(tmp_path / "images")
        process = start(folder, 0)
        wait_for_rows(folder, process, rows=dice.randrange(1, IMAGES // 2))
        time.sleep(dice.uniform(0.0, 0.05))
        process.send_signal(signal.SIGSTOP)
        wakes = threading.Timer(dice.choice([0.0, 60.0]), process.send_signal, [signal.SIGCONT])
        worker_class = type("Waking", (Worker,), {"__init__": waking(wakes)})
        result = encode(folder / "cache", f"folder:{folder / 'images'}", worker_class=worker_class)
        wakes.cancel()
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate(timeout=120)
        assert (result.code, process.returncode) == (0, 1), said
        assert "belongs to another job now (test)" in said
        reader = FeatureReader(space(folder))
        assert reader.rows("image") == IMAGES
        assert reader.logical_hash() == whole.reader.logical_hash()
        root = CacheRoot(folder / "cache")
        assert not verify(root, deep=True).broken
        gc.run(gc.Options(features=root.path, delete=True))
        assert verify(root, deep=True).all_findings == []
        assert FeatureReader(space(folder)).logical_hash() == whole.reader.logical_hash()
        ledger = {name: record.status for name, record in read_ledger(root).items()}
        assert ledger == dict.fromkeys(whole.ledger, "ok")


def waking(timer: threading.Timer) -> Callable[..., None]:
    """An `__init__` of a worker that starts a timer when it begins to work."""

    def begin(self: Worker, *arguments: Any, **options: Any) -> None:
        Worker.__init__(self, *arguments, **options)
        timer.start()

    return begin


def read_ledger(root: CacheRoot) -> dict[str, MediaRecord]:
    return {Path(source).name: record for source, record in read_media(root).items()}
