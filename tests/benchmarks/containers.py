"""The two on-disk formats compared: what a tar costs more than Zarr, in bytes and in time.

python -m tests.benchmarks.containers            # a minute, 1 GB of disk below --folder

Rows of int8 noise, in the page cache. The formats take turns; figures are medians.
"""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import webdataset

from cache.format.space_info import slot_bytes
from cache.format.spec import CONTAINERS, FeatureSpec
from cache.maintenance.checks import verify
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import Space
from tests.benchmarks.bench import CLIP, Options, Requirements, run, take_turns
from tests.support.spaces import write_rows

ROUNDS = 5
LIBRARY = "the webdataset library, decoding"
SLOW = ("write + fsync + commit", "verify --deep", LIBRARY)
"""Steps measured once a round; the others are measured three times."""

ROWS = {"image": 256, "frame": 2048}
RUN = 32
"""Adjacent rows read at a time."""


def write(folder: Path, spec: FeatureSpec, kind: str, rows: np.ndarray) -> Space:
    """Write one shard of rows and commit it."""
    space = Space.create(CacheRoot(folder), spec, {}, shard_bytes=1 << 28)
    write_rows(space, rows, kind)
    return space


def read(reader: FeatureReader, kind: str, count: int, out: np.ndarray) -> None:
    """Read every row once, `count` adjacent rows at a time, in random order."""
    starts = np.arange(0, ROWS[kind], count)
    for start in np.random.default_rng(0).permutation(starts):
        reader.read_into(kind, start + np.arange(count), out[:count])


def stream(space: Space, kind: str) -> None:
    """Read a shard with the webdataset library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        path = str(space.paths.shard(kind, 0))
        assert sum(1 for _ in webdataset.WebDataset(path, shardshuffle=False).decode()) > 0


Steps = dict[str, dict[str, Callable[[], object]]]
"""Step -> container -> the function to measure."""


def steps(folder: Path, kind: str) -> Steps:
    """Return all measurements of one array."""
    noise = np.random.default_rng(0)
    rows = noise.integers(0, 256, (ROWS[kind], CLIP.row_bytes(kind)), dtype=np.uint8)
    out = np.empty((RUN, CLIP.row_bytes(kind)), np.uint8)
    found: Steps = defaultdict(dict)
    for name in CONTAINERS:
        spec = replace(CLIP, container=name)
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
                found[step][name] = what
    return found


def measure(_: Options, folder: Path, requirements: Requirements) -> None:
    """Compare the formats, array by array."""
    for kind, most in (("image", 0.004), ("frame", 0.031)):
        sizes = [slot_bytes(replace(CLIP, container=c), kind) for c in CONTAINERS]
        row = CLIP.row_bytes(kind)
        print(f"{kind}: {row:,} B a row; {sizes[0]:,} B in a Zarr shard, {sizes[1]:,} B in a tar")
        requirements.at_most(f"{kind}: tar, bytes beside the row / row", sizes[1] / row - 1, most)
        total = ROWS[kind] * row / 1e9
        for step, by in steps(folder / kind, kind).items():
            taken = take_turns(by, ROUNDS * (1 if step in SLOW else 3))
            rates = (f"{name} {total / statistics.median(t):.2f}" for name, t in taken.items())
            print(f"    {step}: {', '.join(rates)} GB/s")
            if step != LIBRARY:
                pairs = zip(taken["zarr"], taken["webdataset"], strict=True)
                ratio = statistics.median(zarr / tar for zarr, tar in pairs)
                requirements.at_least(f"{kind}: {step}, tar / Zarr", ratio, 0.9)


if __name__ == "__main__":
    run("containers", __doc__, measure, Options)
