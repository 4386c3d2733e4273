"""The speed of `cache.verify`, compared with reading the same files, with and without sha256.

python -m tests.benchmarks.care                    # 1 GB in a temporary folder, half a minute
python -m tests.benchmarks.care --dir /mnt/disk    # on another disk

Every figure is the median of several rounds, in which all operations take turns. *Cold*: the files are not in
the page cache; *warm*: they are. Plain reading uses as many threads as `cache.verify`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.format.checksums import crc32c
from cache.format.codec import row_parts
from cache.maintenance.checks import THREADS, verify
from cache.store.paths import CacheRoot
from cache.store.space import Space
from cache.store.writer import ShardWriter
from configs import command, parse
from tests.benchmarks.requirements import Requirements
from tests.support.spaces import SPEC, key

ROW = (576, 1024)
"""Tokens and width of a ViT-L/14@336 image."""

PIECE = 2 << 20
"""Bytes read at a time."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    dir: Path | None = None
    """Folder to work in; a temporary one by default."""
    shards: int = 4
    """Number of shards, of about 256 MB each."""
    rounds: int = 5
    """Rounds; each figure is their median."""


def build(folder: Path, shards: int) -> tuple[CacheRoot, list[Path]]:
    """Make a space of int8 rows of random codes; return its cache and its shards."""
    spec = dataclasses.replace(SPEC, image_size=336, patch_size=14, width=ROW[1], pool_frame=3)
    root = CacheRoot(folder)
    space = Space.create(root, spec, {})
    rows = np.random.default_rng(0).integers(0, 127, (8, spec.row_bytes("image")), np.uint8)
    rows[:, row_parts(spec.codec, *ROW)[0] :] = 0x2C  # scales and mean token: small numbers
    paths = []
    for _ in range(shards):
        writer = ShardWriter(space, "image", space.next_shard("image"))
        shard = space.next_shard("image") - 1
        while not writer.full:
            number = shard * space.rows_per_shard("image") + writer.rows
            writer.append(key(number), "full", rows[number % 8], error=0.005)
        writer.commit()
        paths.append(space.paths.shard("image", shard))
    space.grow("image")
    return root, paths


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


def drop(paths: list[Path]) -> None:
    """Remove files from the page cache."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def main() -> None:
    """Measure and print."""
    options = parse(Options, prog="python -m tests.benchmarks.care", description=__doc__)
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        root, paths = build(Path(name) / "cache", options.shards)
        nbytes = sum(path.stat().st_size for path in paths)

        def in_threads(use: Callable[[memoryview], object] | None) -> None:
            with ThreadPoolExecutor(THREADS) as threads:
                list(threads.map(lambda path: read_through(path, use), paths))

        def check(hashed: bool) -> None:
            assert not verify(root, deep=True, hashed=hashed).broken

        tasks: dict[str, tuple[Callable[[], None], bool]] = {
            "read, cold": (lambda: in_threads(None), True),
            "verify --deep, cold": (lambda: check(True), True),
            "... --no-hash, cold": (lambda: check(False), True),
            "read, warm": (lambda: in_threads(None), False),
            "read and sha256, warm": (lambda: in_threads(hashlib.sha256), False),
            "read and crc32c, warm": (lambda: in_threads(crc32c), False),
            "verify --deep, warm": (lambda: check(True), False),
            "... --no-hash, warm": (lambda: check(False), False),
            "verify (quick)": (lambda: verify(root) and None, False),
        }
        seconds: dict[str, list[float]] = {task: [] for task in tasks}
        for _ in range(options.rounds):
            for task, (run, cold) in tasks.items():
                if cold:
                    drop(paths)
                start = time.perf_counter()
                run()
                seconds[task].append(time.perf_counter() - start)
    median = {task: statistics.median(found) for task, found in seconds.items()}
    print(
        f"{nbytes / 1e9:.2f} GB in {len(paths)} shards, {THREADS} threads, {os.cpu_count()} cores"
    )
    for task, spent in median.items():
        print(f"{task:<24}{spent:8.3f} s{nbytes / 1e6 / spent:10,.0f} MB/s")
    requirements = Requirements("care")
    for what, beside in (
        ("... --no-hash, cold", "read, cold"),
        ("... --no-hash, warm", "read and crc32c, warm"),
        ("verify --deep, warm", "read and sha256, warm"),
    ):
        requirements.at_least(f"{what} / {beside}", median[beside] / median[what], 0.9)
    requirements.summary()


if __name__ == "__main__":
    command(main)
