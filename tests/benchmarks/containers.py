"""The two on-disk formats side by side: what a tar costs where Zarr does not, in bytes and in time.

python -m tests.benchmarks.containers            # a minute, 1 GB of disk below the folder for temporary files

Rows of noise in int8, page cache warm, formats in turn, medians. Prints a requirement a line (`name
measured  required  ok|short`), a summary last, and exits 0 either way.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset

from cache.format.space_info import slot_bytes
from cache.format.spec import CONTAINERS, FeatureSpec
from cache.maintenance.checks import verify
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import Space
from cache.store.writer import ShardWriter
from tests.support.spaces import SPEC, key

ROUNDS = 5
LIBRARY = "the webdataset library, decoding"
SLOW = ("write + fsync + commit", "verify --deep", LIBRARY)
"""Once a round; the others three times."""

ROWS = {"image": 256, "frame": 2048}
RUN = 32
"""Adjacent rows of one read."""

BASE = dataclasses.replace(
    SPEC, image_size=336, patch_size=14, width=1024, pool_frame=3, encoder="bench"
)
"""576 x 1024 an image, 64 x 1024 a frame."""


def write(folder: Path, spec: FeatureSpec, kind: str, rows: np.ndarray) -> Space:
    """One shard of these rows, committed."""
    space = Space.create(CacheRoot(folder), spec, {}, shard_bytes=1 << 28)
    shard = ShardWriter(space, kind, space.next_shard(kind))
    for number, row in enumerate(rows):
        shard.append(key(number), "full", row.data)
    shard.commit()
    return space


def read(reader: FeatureReader, kind: str, count: int, out: np.ndarray) -> None:
    """Every row once, in a random order of stretches of `count`."""
    starts = np.arange(0, ROWS[kind], count)
    for start in np.random.default_rng(0).permutation(starts):
        reader.read_into(kind, start + np.arange(count), out[:count])


def stream(space: Space, kind: str) -> None:
    """All of it, by the library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        path = str(space.paths.shard(kind, 0))
        assert sum(1 for _ in webdataset.WebDataset(path, shardshuffle=False).decode()) > 0


def seconds(step: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


Steps = dict[str, dict[str, Callable[[], object]]]
"""Step -> container -> what to do."""


def steps(folder: Path, kind: str) -> Steps:
    """All that is measured of one array."""
    noise = np.random.default_rng(0)
    rows = noise.integers(0, 256, (ROWS[kind], BASE.row_bytes(kind)), dtype=np.uint8)
    out = np.empty((RUN, BASE.row_bytes(kind)), np.uint8)
    found: Steps = {}
    for name in CONTAINERS:
        spec = dataclasses.replace(BASE, container=name)
        space = write(folder / name, spec, kind, rows)
        plain, checked = (FeatureReader(space.paths, check) for check in (False, True))
        again = itertools.count()
        for step, what in {
            "write + fsync + commit": lambda s=spec, n=again, c=name: write(
                folder / f"{c}-{next(n)}", s, kind, rows
            ),
            "single rows, unchecked": lambda r=plain: read(r, kind, 1, out),
            "single rows, checked": lambda r=checked: read(r, kind, 1, out),
            f"runs of {RUN}, unchecked": lambda r=plain: read(r, kind, RUN, out),
            f"runs of {RUN}, checked": lambda r=checked: read(r, kind, RUN, out),
            "verify --deep": lambda c=name: verify(CacheRoot(folder / c), deep=True),
            LIBRARY: lambda s=space: stream(s, kind),
        }.items():
            if step != LIBRARY or name == "webdataset":
                found.setdefault(step, {})[name] = what
    return found


def measure(all_steps: Steps) -> dict[str, dict[str, list[float]]]:
    """Step -> container -> seconds, one a round; the formats by turns first, for a busy machine's sake."""
    taken: dict[str, dict[str, list[float]]] = {}
    for number in range(ROUNDS):
        for step, by in all_steps.items():
            for _ in range(1 if step in SLOW else 3):
                for name in list(by)[:: 1 if number % 2 else -1]:
                    times = taken.setdefault(step, {}).setdefault(name, [])
                    times.append(seconds(by[name]))
    return taken


def main() -> None:
    """Measure and print."""
    verdicts = []

    def line(name: str, measured: float, required: float, at_most: bool = False) -> None:
        ok = measured <= required if at_most else measured >= required
        verdicts.append(ok)
        said = f"{name:<44}{measured:>10.4f}  {'<=' if at_most else '>='} {required:<8}"
        print(said + ("ok" if ok else "short"), flush=True)

    for kind, most in (("image", 0.004), ("frame", 0.031)):
        sizes = [slot_bytes(dataclasses.replace(BASE, container=c), kind) for c in CONTAINERS]
        row = BASE.row_bytes(kind)
        print(f"{kind}: {row:,} B a row; {sizes[0]:,} B in a Zarr shard, {sizes[1]:,} B in a tar")
        line(f"{kind}: tar, bytes beside the row / row", sizes[1] / row - 1, most, at_most=True)
        with tempfile.TemporaryDirectory() as folder:
            taken = measure(steps(Path(folder), kind))
        total = ROWS[kind] * row / 1e9
        for step, by in taken.items():
            rates = (f"{name} {total / statistics.median(times):.2f}" for name, times in by.items())
            print(f"    {step}: {', '.join(rates)} GB/s")
            if step != LIBRARY:
                pairs = zip(by["zarr"], by["webdataset"], strict=True)
                ratio = statistics.median(zarr / tar for zarr, tar in pairs)
                line(f"{kind}: {step}, tar / Zarr", ratio, 0.9)
    print(f"containers: {sum(verdicts)}/{len(verdicts)} ok")


if __name__ == "__main__":
    sys.exit(main())
