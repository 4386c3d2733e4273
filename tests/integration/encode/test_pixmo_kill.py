"""Drivers and workers are killed at random while they download: the cache is that of an undisturbed job."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.store.ledger import MediaRecord, read_media
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import find_space
from tests.support import ROOT
from tests.support.pixmo_lists import write_pixmo
from tests.support.web_server import TroubleServer

MARK = "NANOMOLMO2_TEST_JOB"
"""Environment variable of every process of a job, which identifies its workers."""


def start(
    lists: Path, features: Path, mark: str, *more: str, count: int = 2
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "encode.run", "--dataset", "pixmo", "--source", str(lists)]
    command += ["--features", str(features), "--encoder", "demo", "--device", "cpu"]
    command += ["--workers", str(count), "--allow-private", "--fetch-timeout-s", "0.7"]
    command += ["--commit-every-s", "0.2", *more]
    return subprocess.Popen(
        command,
        env={**os.environ, MARK: mark, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )


def workers(mark: str) -> list[int]:
    """Return the worker processes of the job with this mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = f"{MARK}={mark}".encode() in (folder / "environ").read_bytes()
            if ours and b"RemoteWorker" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def commits(features: Path) -> int:
    return len(list(features.glob("spaces/*/commits/*.parquet")))


def finish(process: subprocess.Popen[bytes]) -> None:
    _, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err.decode()


def outcome(record: MediaRecord) -> tuple[str, str | None, str | None]:
    return record.status, record.stage, record.key


@pytest.mark.soak_counted
def test_killed_drivers_and_workers_lose_nothing(
    tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    photos, kills = soak(12, 1950), soak(1, 30)  # 2,000 URLs together with the failing kinds
    dice = random.Random(7)
    with TroubleServer(photos) as server:
        # `make test` omits the slow failing kinds, which are last.
        entries = server.entries()[: soak(44, 1_000_000)]
        urls = [(server.base + entry.path, entry.sha256) for entry in entries]
        lists = write_pixmo(tmp_path / "lists", urls)
        calm, killed_often = tmp_path / "calm", tmp_path / "killed"
        finish(start(lists, calm, "calm", count=0))
        killed = {"driver": 0, "worker": 0}
        mark = secrets.token_hex(8)
        process = start(lists, killed_often, mark)
        while sum(killed.values()) < kills:
            before = commits(killed_often)
            deadline = time.monotonic() + 120
            # The first kill comes with the first commit: the few URLs of `make test` are soon done.
            more, pause_s = dice.randrange(1, 3), dice.uniform(0, 0.3)
            if not any(killed.values()):
                more, pause_s = 1, 0.0
            while process.poll() is None and commits(killed_often) < before + more:
                assert time.monotonic() < deadline, "the job makes no progress"
                time.sleep(0.01)
            time.sleep(pause_s)
            if process.poll() is not None:
                break  # the job ended first
            found = workers(mark)
            if found and dice.random() < 0.5:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(dice.choice(found), signal.SIGKILL)
                    killed["worker"] += 1
                continue
            killed["driver"] += 1
            process.kill()
            process.communicate()
            mark = secrets.token_hex(8)
            process = start(lists, killed_often, mark)
        finish(process)
        # URLs that failed because of a kill get another attempt.
        finish(start(lists, killed_often, "again", "--retry-failed", count=0))
        print(f"{len(urls)} URLs, killed: {killed}")
        assert sum(killed.values()) >= soak(1, kills), "the job ended before enough kills"

        ledgers = [read_media(CacheRoot(folder)) for folder in (calm, killed_often)]
        for entry, (url, _) in zip(entries, urls, strict=True):
            (status, stage, key), after = (outcome(ledger[url]) for ledger in ledgers)
            assert status == after[0] == ("ok" if entry.expected == "ok" else "failed"), entry
            assert stage == after[1] == (None if entry.expected == "ok" else entry.expected), entry
            assert key == after[2], entry
        readers = [
            FeatureReader(find_space(CacheRoot(folder), None)) for folder in (calm, killed_often)
        ]
        assert readers[1].index["image"].doubled.size == 0
        assert readers[0].logical_hash() == readers[1].logical_hash()
