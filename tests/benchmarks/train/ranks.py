"""Processes that each load the rows of one device, whose computing is a sleep.

A rank is forked, as it costs nothing to start, and reads the same cache as the others. Its device takes
images / rate seconds for a micro-batch. As on a GPU, the rank asks for the next one while the device
computes: as soon as it has begun. The clock runs from the first micro-batch after as many as the loader reads
ahead, until the time is over or no row is left that has not been read before.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.store.reader import FeatureReader
from train.data.loader import FeatureLoader
from train.data.schedule import TrainingSchedule

START_S = 120.0
"""Seconds within which all ranks must be ready, and more than any of them may wait for rows."""
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What the ranks load, and how fast it is taken."""

    schedule: TrainingSchedule
    """Each step has one micro-batch for every rank."""
    open_reader: Callable[[], FeatureReader]
    """Called in each process."""
    ranks: int
    """Processes."""
    rate: float | None
    """Images a second that each device takes; None: it takes no time."""
    window: int
    """Tokens of a micro-batch."""
    threads: int
    """Threads of each loader."""
    ahead: int
    """Micro-batches that each loader reads ahead."""
    seconds: float
    """Seconds that are measured, at most."""
    steps: int
    """Steps without a row twice."""


@dataclass(frozen=True, kw_only=True)
class Fed:
    """What one rank measured."""

    images: int
    """Images that its device took."""
    wall_s: float
    """Seconds in which it took them."""
    wait_s: float
    """Seconds in which it waited for the loader."""
    idle_s: float
    """Seconds in which its device had nothing to do."""
    cpu_s: float
    """Seconds of processor time of the process, all threads."""
    disk_bytes: int
    """Bytes that came from a disk."""

    @property
    def waits(self) -> float:
        """Share of the time in which the rank waited for rows."""
        return self.wait_s / self.wall_s

    @property
    def idle(self) -> float:
        """Share of the time in which the device had nothing to do."""
        return self.idle_s / self.wall_s


def feed(wanted: Feed) -> tuple[list[Fed], float]:
    """Run the ranks; return what each measured, and the share of all cores that was busy meanwhile."""
    barrier = FORK.Barrier(wanted.ranks + 1)
    results = FORK.SimpleQueue()
    processes = [
        FORK.Process(target=_rank, args=(wanted, rank, barrier, results))
        for rank in range(wanted.ranks)
    ]
    for process in processes:
        process.start()
    with contextlib.suppress(threading.BrokenBarrierError):  # its rank says why
        barrier.wait(START_S)
    before = cpu_times()
    found = [results.get() for _ in processes]
    busy = np.subtract(cpu_times(), before)
    for process in processes:
        process.join()
    if failed := [text for text in found if isinstance(text, str)]:
        raise SystemExit(failed[0])
    return found, float(busy[0] / max(1, busy.sum()))


def cpu_times() -> tuple[int, int]:
    """Return the ticks in which the machine's cores were busy, and those in which they were not."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = ticks[3] + ticks[4]  # idle, and waiting for a disk
    return sum(ticks) - idle, idle


def _rank(wanted: Feed, rank: int, barrier: threading.Barrier, results: object) -> None:
    """Load and sleep, in a forked process; put a Fed, or the text of an error, into `results`."""
    try:
        found: Fed | str = load(wanted, rank, lambda: barrier.wait(START_S))
    except BaseException:
        barrier.abort()
        found = traceback.format_exc()
    results.put(found)  # type: ignore[attr-defined]


def load(wanted: Feed, rank: int, ready: Callable[[], object]) -> Fed:
    """Load one rank's micro-batches at the pace of its device."""
    loader = FeatureLoader(
        wanted.schedule,
        wanted.open_reader(),
        max_tokens=wanted.window,
        stop=wanted.steps,
        rank=rank,
        world_size=wanted.ranks,
        threads=wanted.threads,
        ahead=wanted.ahead,
    )
    assert wanted.steps >= 3, "too few rows to measure with"
    first = min(wanted.ahead, wanted.steps // 2)
    images, waits, idle, started, received = 0, 0.0, 0.0, 0.0, 0.0
    done = 0.0  # when the device has computed what it was given
    cpu = disk = taken = 0.0
    ready()
    with loader:
        for number, micro in enumerate(loader):
            received = time.perf_counter()
            if number == first:
                started, cpu, disk = received, time.process_time(), disk_bytes()
            elif number > first:
                images, waits = images + int(taken), waits + micro.wait_s
                idle += max(0.0, received - done)
                if received - started >= wanted.seconds:
                    break
            taken = sum(map(len, micro.codes.values()))
            if wanted.rate:
                begun = max(done, received)
                done = begun + taken / wanted.rate
                time.sleep(max(0.0, begun - time.perf_counter()))
        used, read = time.process_time() - cpu, disk_bytes() - disk
    return Fed(
        images=images,
        wall_s=received - started,
        wait_s=waits,
        idle_s=idle,
        cpu_s=used,
        disk_bytes=int(read),
    )


def disk_bytes() -> int:
    """Return the bytes that this process has read from disks, and not from the page cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def in_a_process(work: Callable[[], object]) -> None:
    """Call `work` in a forked process, so that no connection or thread of it stays in this one."""
    process = FORK.Process(target=work)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"exit code {process.exitcode}")
