"""Merging caches and converting spaces, compared with copying the same bytes.

python -m tests.benchmarks.move                  # some minutes, 2 GB of disk below --folder
python -m tests.benchmarks.move --rows 100       # smaller

Rows of CLIP ViT-L/14@336 (576 x 1024). Each figure is the median of several rounds, in which the two
operations that are compared take turns.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cache.convert import Options as ConvertOptions
from cache.convert import convert, find_source
from cache.format import codec
from cache.format.spec import FeatureSpec
from cache.maintenance.copy_rows import BATCH_BYTES
from cache.merge import Options as MergeOptions
from cache.merge import merge
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import Space
from tests.benchmarks import bench
from tests.benchmarks.bench import Requirements, run, seconds, take_turns
from tests.support.spaces import write_rows

CLIP = replace(bench.CLIP, codec="fp16")
DIFFERENT = 16
"""Rows with different contents."""


@dataclass(frozen=True, kw_only=True)
class Options(bench.Options):
    """What to measure."""

    rows: int = 300
    """Rows of the fp16 space."""
    rounds: int = 3
    """Rounds of each comparison, at most 3 of converting."""


def note(name: str, text: str) -> None:
    """Print a figure without a requirement."""
    print(f"{name:<60}{text:>12}", flush=True)


def make_space(folder: Path, spec: FeatureSpec, rows: int) -> Space:
    """Make a space of `rows` rows."""
    shape = (DIFFERENT, spec.tokens("image"), spec.width)
    features = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    contents = codec.pack(features, spec.codec)
    space = Space.create(CacheRoot(folder), spec, {})
    write_rows(space, itertools.islice(itertools.cycle(contents), rows))
    return space


def plain_copy(space: Space, target: Path) -> None:
    """Copy the shards a few MB at a time, and fsync each file."""
    target.mkdir()
    buffer = memoryview(bytearray(BATCH_BYTES))
    for number in space.paths.committed("image"):
        source = space.paths.shard("image", number)
        with source.open("rb", buffering=0) as read, (target / str(number)).open("wb", 0) as write:
            while count := read.readinto(buffer):
                write.write(buffer[:count])
            os.fsync(write.fileno())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what is printed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def compare(
    folder: Path, rounds: int, ours: Callable[[Path], object], copied: Space
) -> tuple[float, float]:
    """Run `ours` and a plain copy in turns, on new folders; return copy / ours and our seconds, medians."""
    target = folder / "target"

    def remove(_: str) -> None:
        shutil.rmtree(target, ignore_errors=True)
        os.sync()

    tasks = {"ours": lambda: ours(target), "copy": lambda: plain_copy(copied, target)}
    with quiet():
        taken = take_turns(tasks, rounds, remove)
    remove("")
    ratios = [copy / own for own, copy in zip(taken["ours"], taken["copy"], strict=True)]
    return statistics.median(ratios), statistics.median(taken["ours"])


def merge_into(source: Path, target: Path) -> None:
    """Merge as the command does."""
    merge(CacheRoot(target), CacheRoot(source), MergeOptions(source=(source,)))


def measure(options: Options, folder: Path, requirements: Requirements) -> None:
    """Merge into an empty cache and into one with half of the rows, then convert."""
    rows = options.rows
    for name, count in (("int8", 2 * rows), ("fp16", rows)):  # about as many bytes
        source = folder / f"source-{name}"
        space = make_space(source, replace(CLIP, codec=name), count)
        nbytes = count * space.spec.row_bytes("image")
        work = functools.partial(merge_into, source)
        ratio, spent = compare(folder, options.rounds, work, space)
        requirements.at_least(f"merge / plain copy + fsync, {name}", ratio, 0.8)
        note(f"merge, {name}", f"{nbytes / spent / 1e6:.0f} MB/s")

    target = folder / "target"
    make_space(target, CLIP, rows // 2)
    with quiet():
        first, second = (seconds(lambda: merge_into(source, target)) for _ in range(2))
    nbytes = (rows - rows // 2) * space.spec.row_bytes("image")
    note("merge, half of the rows exist", f"{nbytes / first / 1e6:.0f} MB/s")
    requirements.at_least("seconds: merging that half / again, nothing to do", first / second, 5)
    readers = [FeatureReader(CacheRoot(root).space(space.spec.name)) for root in (source, target)]
    assert readers[0].logical_hash() == readers[1].logical_hash(), "the merge lost something"

    reader = find_source(CacheRoot(source), None)
    for name, pool in (("int8", None), ("int8", 2), ("fp16", 2), ("int4", None)):
        wanted = ConvertOptions(codec=name, pool=pool)  # type: ignore[arg-type]

        def convert_into(target: Path, wanted: ConvertOptions = wanted) -> None:
            convert(CacheRoot(target), reader, wanted)

        ratio, spent = compare(folder, min(3, options.rounds), convert_into, space)
        name = f"convert to {name}" + (f" pool {pool}" if pool else "")
        note(f"{name} / plain copy of the fp16 space", f"{ratio:.2f}")
        note(name, f"{rows / spent:.0f} rows/s")


if __name__ == "__main__":
    run("move", __doc__, measure, Options)
