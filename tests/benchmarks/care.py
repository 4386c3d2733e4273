"""The speed of `cache.verify`, compared with reading the same files, with and without sha256.

python -m tests.benchmarks.care                    # 1 GB in a temporary folder, half a minute
python -m tests.benchmarks.care --folder DISK      # on another disk

Every figure is the median of several rounds, in which all operations take turns. *Cold*: the files are not in
the page cache; *warm*: they are. Plain reading uses as many threads as `cache.verify`.
"""

from __future__ import annotations

import hashlib
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from cache.format.checksums import crc32c
from cache.format.codec import row_parts
from cache.maintenance.checks import THREADS, verify
from cache.store.paths import CacheRoot
from cache.store.space import Space
from tests.benchmarks import bench
from tests.benchmarks.bench import CLIP, Requirements, forget, run, take_turns
from tests.support.spaces import write_rows

PIECE = 2 << 20
"""Bytes read at a time."""


@dataclass(frozen=True, kw_only=True)
class Options(bench.Options):
    """What to measure."""

    shards: int = 4
    """Number of shards, of about 256 MB each."""
    rounds: int = 5
    """Rounds; each figure is their median."""


def build(folder: Path, shards: int) -> tuple[CacheRoot, list[Path]]:
    """Make a space of int8 rows of random codes; return its cache and its shards."""
    root = CacheRoot(folder)
    space = Space.create(root, CLIP, {})
    rows = np.random.default_rng(0).integers(0, 127, (8, CLIP.row_bytes("image")), np.uint8)
    codes_end = row_parts(CLIP.codec, CLIP.tokens("image"), CLIP.width)[0]
    rows[:, codes_end:] = 0x2C  # scales and mean token: small numbers
    write_rows(space, islice(cycle(rows), shards * space.rows_per_shard("image")))
    space.grow("image")
    return root, [space.paths.shard("image", number) for number in range(shards)]


def read_through(path: Path, use: Callable[[memoryview], object] | None = None) -> None:
    """Read a file in pieces into one buffer, and pass each piece to `use`."""
    buffer = memoryview(bytearray(PIECE))
    fd = os.open(path, os.O_RDONLY)
    try:
        at = 0
        while got := os.preadv(fd, [buffer], at):
            if use is not None:
                use(buffer[:got])
            at += got
    finally:
        os.close(fd)


def measure(options: Options, folder: Path, requirements: Requirements) -> None:
    """Time reading and verifying, and compare them."""
    root, paths = build(folder / "cache", options.shards)
    nbytes = sum(path.stat().st_size for path in paths)

    def in_threads(use: Callable[[memoryview], object] | None) -> None:
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(lambda path: read_through(path, use), paths))

    def check(hashed: bool) -> None:
        assert not verify(root, deep=True, hashed=hashed).broken

    cold = {
        "read, cold": lambda: in_threads(None),
        "verify --deep, cold": lambda: check(True),
        "... --no-hash, cold": lambda: check(False),
    }
    warm = {
        "read, warm": lambda: in_threads(None),
        "read and sha256, warm": lambda: in_threads(hashlib.sha256),
        "read and crc32c, warm": lambda: in_threads(crc32c),
        "verify --deep, warm": lambda: check(True),
        "... --no-hash, warm": lambda: check(False),
        "verify (quick)": lambda: verify(root),
    }
    taken = take_turns(
        cold | warm, options.rounds, lambda task: forget(paths if task in cold else ())
    )
    median = {task: statistics.median(found) for task, found in taken.items()}
    print(
        f"{nbytes / 1e9:.2f} GB in {len(paths)} shards, {THREADS} threads, {os.cpu_count()} cores"
    )
    for task, spent in median.items():
        print(f"{task:<24}{spent:8.3f} s{nbytes / 1e6 / spent:10,.0f} MB/s")
    for what, beside in (
        ("... --no-hash, cold", "read, cold"),
        ("... --no-hash, warm", "read and crc32c, warm"),
        ("verify --deep, warm", "read and sha256, warm"),
    ):
        requirements.at_least(f"{what} / {beside}", median[beside] / median[what], 0.9)


if __name__ == "__main__":
    run("care", __doc__, measure, Options)
