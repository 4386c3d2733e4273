"""The steps on spaces of many rows: write commits, open them with and without an index, schedule an epoch.

The commits are real files, sealed as a job seals them. The shards they name do not exist, because nothing
here reads a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.store.commits import SCHEMA, commit_bytes
from cache.store.index_file import save_index
from cache.store.paths import CacheRoot, SpacePaths
from cache.store.reader import FeatureReader
from cache.store.space import Space, find_space
from tests.benchmarks.bench import CLIP
from tests.benchmarks.scale.memory import memory_mb

ROWS_A_SHARD = 500
NEW_COMMITS = 40
"""Shards committed after the index was saved; a reader adds them to the index in memory."""
LOOKUPS = 1_000_000
"""Keys looked up."""
SAMPLES_A_STEP = 128


def keys_of(shard: int) -> npt.NDArray[np.uint8]:
    """Return (500, 32) random keys."""
    return np.random.default_rng(shard).integers(0, 256, (ROWS_A_SHARD, 32), np.uint8)


def write_commits(space: Space, shards: range) -> None:
    """Write the commits of shards without their files, and without fsync."""
    slots = space.rows_per_shard("image")
    nbytes = space.info.geometry("image").file_bytes(ROWS_A_SHARD)
    errors = np.linspace(0.004, 0.006, ROWS_A_SHARD, dtype=np.float32)
    for shard in shards:
        keys = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(32), ROWS_A_SHARD, [None, pa.py_buffer(keys_of(shard).tobytes())]
        )
        rows = np.arange(shard * slots, shard * slots + ROWS_A_SHARD)
        columns = {
            "key": keys,
            "view": pa.array(["full"] * ROWS_A_SHARD),
            "time_s": pa.nulls(ROWS_A_SHARD, pa.float64()),
            "row": rows,
            "crc": (rows * 2654435761 % 2**32).astype(np.uint32),
            "error": errors,
        }
        data = commit_bytes(
            pa.table(columns, SCHEMA),
            fingerprint=space.spec.fingerprint,
            array="image",
            shard=shard,
            nbytes=nbytes,
            index_crc=shard,
        )
        space.paths.commit("image", shard).write_bytes(data)


# ---- steps, each in a process of its own


def build(root: CacheRoot, rows: int) -> dict[str, float]:
    """Write the commits of a new space."""
    write_commits(Space.create(root, CLIP, {}), range(rows // ROWS_A_SHARD))
    return {}


def add(root: CacheRoot, rows: int) -> dict[str, float]:
    """Write a few more commits."""
    first = rows // ROWS_A_SHARD
    write_commits(Space.open(find_space(root, None)), range(first, first + NEW_COMMITS))
    return {}


def open_space(root: CacheRoot, rows: int) -> dict[str, float]:
    """Open the space with the index it has, count its rows, each (key, view) once, then look keys up."""
    paths = find_space(root, None)
    before, started = memory_mb(), time.perf_counter()
    reader = FeatureReader(paths)
    assert rows <= reader.rows("image") <= rows + NEW_COMMITS * ROWS_A_SHARD
    seconds = time.perf_counter() - started
    found = {"seconds": seconds, "rss": memory_mb() - before, "peak": memory_mb("VmHWM") - before}
    draw = np.random.default_rng(7)
    shards = draw.permutation(rows // ROWS_A_SHARD)[: -(-LOOKUPS // ROWS_A_SHARD)]
    wanted = np.concatenate([keys_of(shard) for shard in shards.tolist()])
    wanted = wanted[draw.permutation(len(wanted))]
    index, started = reader.index["image"], time.perf_counter()
    rows_found = index.lookup(wanted, "full")
    found["lookup_us"] = (time.perf_counter() - started) / len(wanted) * 1e6
    assert (rows_found >= 0).all(), "a key is not found"
    assert np.array_equal(index.keys[index.positions(rows_found)], wanted), "another key is found"
    assert (index.lookup(wanted ^ 1, "full") == -1).all(), "a key that is not stored is found"
    some = [key.tobytes() for key in wanted[:20_000]]
    started = time.perf_counter()
    assert all(index.contains(key, "full") for key in some)
    found["contains_us"] = (time.perf_counter() - started) / len(some) * 1e6
    return found


def save(root: CacheRoot, rows: int) -> dict[str, float]:
    """Write the index file from the commits."""
    space, before, started = Space.open(find_space(root, None)), memory_mb(), time.perf_counter()
    save_index(space.paths, space.info)
    seconds = time.perf_counter() - started
    size = space.paths.index("image").stat().st_size
    return {"seconds": seconds, "bytes": size / rows, "peak": memory_mb("VmHWM") - before}


def touch(root: CacheRoot, rows: int) -> dict[str, float]:
    """Change the modification times of all commits, as copying does."""
    paths: SpacePaths = find_space(root, None)
    for number in paths.committed("image"):
        paths.commit("image", number).touch()
    return {}


def schedule(root: CacheRoot, rows: int) -> dict[str, float]:
    """Build an epoch of about `rows` samples: two data sets, trees of one or two samples."""
    from train.data.choices import Choices
    from train.data.message_trees import MessageTrees
    from train.data.schedule import (
        TrainingSchedule,  # imports torch, which the other steps need no memory for
    )

    trees = max(2, rows * 2 // 3)
    starts = np.concatenate([[0], np.cumsum(1 + np.arange(trees) % 2)]).astype(np.int64)
    samples = int(starts[-1])
    nothing: Any = None  # a schedule needs no texts and no media
    message_trees = MessageTrees(
        samples=nothing,
        tokens=nothing,
        names=("captions", "points"),
        mix=(0.6, 0.4),
        members=np.arange(samples),
        choices=Choices.none(),
        starts=starts,
        dataset=(np.arange(trees) > trees // 3).astype(np.int16),
        prefix=np.zeros(trees, np.int32),
        first_row=np.random.default_rng(0).permutation(trees),
        length=np.full(samples, 700, np.int32),
        loss_weight=np.ones(samples),
        placeholders=nothing,
        max_tokens=4096,
    )
    found = {}
    for order in ("random", "blocks"):
        before, started = memory_mb(), time.perf_counter()
        steps = TrainingSchedule(message_trees, SAMPLES_A_STEP, seed=1, order=order)  # type: ignore[arg-type]
        steps.step(0)
        found[f"{order}_seconds"] = time.perf_counter() - started
        found[f"{order}_rss"] = memory_mb() - before
    return found


STEPS: dict[str, Callable[[CacheRoot, int], dict[str, float]]] = {
    "build": build,
    "rebuild": open_space,
    "save": save,
    "open_space": open_space,
    "add": add,
    "extend": open_space,
    "touch": touch,
    "copied": open_space,
    "schedule": schedule,
}
"""The steps, in the order in which they need each other's files."""
