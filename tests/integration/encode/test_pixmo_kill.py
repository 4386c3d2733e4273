"""Drivers and workers killed at random while they fetch from a troubled web: the store of a calm run."""

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
"""In the environment of every process of a job, so that its workers are found."""


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
    """Processes that encode for the job so marked."""
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
def test_drivers_and_workers_killed_while_they_fetch(
    tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    photos, kills = soak(12, 1950), soak(2, 30)  # with the troubles 2,000 URLs
    dice = random.Random(7)
    with TroubleServer(photos) as server:
        # In `make test` without the troubles that cost time: they come last.
        entries = server.entries()[: soak(44, 1_000_000)]
        urls = [(server.base + entry.path, entry.sha256) for entry in entries]
        lists = write_pixmo(tmp_path / "lists", urls)
        calm, wild = tmp_path / "calm", tmp_path / "wild"
        finish(start(lists, calm, "calm", count=0))
        killed = {"driver": 0, "worker": 0}
        mark = secrets.token_hex(8)
        process = start(lists, wild, mark)
        while sum(killed.values()) < kills:
            before = commits(wild)
            deadline = time.monotonic() + 120
            more = dice.randrange(1, 3)
            while process.poll() is None and commits(wild) < before + more:
                assert time.monotonic() < deadline, "the job does not get on"
                time.sleep(0.01)
            time.sleep(dice.uniform(0, 0.3))
            if process.poll() is not None:
                break  # it was faster
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
            process = start(lists, wild, mark)
        finish(process)
        # What failed while things were killed around it gets the try it would have had.
        finish(start(lists, wild, "again", "--retry-failed", count=0))
        print(f"{len(urls)} URLs, killed: {killed}")
        assert sum(killed.values()) >= soak(1, kills), "the job ended before it was killed so often"

        ledgers = [read_media(CacheRoot(folder)) for folder in (calm, wild)]
        for entry, (url, _) in zip(entries, urls, strict=True):
            (status, stage, key), after = (outcome(ledger[url]) for ledger in ledgers)
            assert status == after[0] == ("ok" if entry.expected == "ok" else "failed"), entry
            assert stage == after[1] == (None if entry.expected == "ok" else entry.expected), entry
            assert key == after[2], entry
        readers = [FeatureReader(find_space(CacheRoot(folder), None)) for folder in (calm, wild)]
        assert readers[1].index["image"].duplicates() == []
        assert readers[0].logical_hash() == readers[1].logical_hash()
