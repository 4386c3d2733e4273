"""Merging caches and converting spaces, compared with copying the same bytes.

python -m tests.benchmarks.move                  # some minutes, 2 GB of disk below --folder
python -m tests.benchmarks.move --rows 100       # smaller

Rows of CLIP ViT-L/14@336 (576 x 1024). Each figure is the median of several rounds, in which the two
operations that are compared take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
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
from cache.store.writer import ShardWriter
from tests.benchmarks.requirements import Requirements
from tests.support.spaces import SPEC, key

CLIP: FeatureSpec = replace(
    SPEC,
    encoder="bench",
    image_size=336,
    patch_size=14,
    width=1024,
    pool_frame=3,
    codec="fp16",
)


def note(name: str, text: str) -> None:
    """Print a figure without a requirement."""
    print(f"{name:<60}{text:>12}", flush=True)


def make_space(folder: Path, spec: FeatureSpec, rows: int, different: int = 16) -> Space:
    """Make a space of `rows` rows with `different` different contents."""
    rng = np.random.default_rng(0)
    shape = (spec.tokens("image"), spec.width)
    contents = [
        codec.pack(rng.standard_normal(shape, dtype=np.float32), spec.codec)
        for _ in range(different)
    ]
    space = Space.create(CacheRoot(folder), spec, {})
    shard: ShardWriter | None = None
    for number in range(rows):
        shard = shard or ShardWriter(space, "image", space.next_shard("image"))
        shard.append(key(number), "full", contents[number % different].data, error=0.001)
        if shard.full or number == rows - 1:
            shard.commit()
            shard = None
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


def quietly(work: Callable[[], object]) -> float:
    """Run `work` without its output; return the seconds it takes."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


def compare(
    folder: Path, rounds: int, ours: Callable[[Path], object], other: Callable[[Path], object]
) -> tuple[float, float]:
    """Run both in turns, on new folders; return the medians of other / ours and of our seconds."""
    ratios, seconds = [], []
    for _ in range(rounds):
        times = []
        for work in (ours, other):
            target = folder / "target"
            times.append(quietly(lambda work=work, target=target: work(target)))
            shutil.rmtree(target)
            os.sync()
        ratios.append(times[1] / times[0])
        seconds.append(times[0])
    return statistics.median(ratios), statistics.median(seconds)


def measure_merge(requirements: Requirements, folder: Path, rows: int, rounds: int) -> None:
    """Merge into an empty cache."""
    for name in ("fp16", "int8"):
        count = rows if name == "fp16" else 2 * rows  # about as many bytes
        space = make_space(folder / f"source-{name}", replace(CLIP, codec=name), count)
        nbytes = count * space.spec.row_bytes("image")
        ratio, seconds = compare(
            folder,
            rounds,
            functools.partial(merge_into, folder / f"source-{name}"),
            functools.partial(plain_copy, space),
        )
        requirements.at_least(f"merge / plain copy + fsync, {name}", ratio, 0.8)
        note(f"merge, {name}", f"{nbytes / seconds / 1e6:.0f} MB/s")


def measure_again(requirements: Requirements, folder: Path, rows: int) -> None:
    """Merge into a cache that has half of the rows; then again, with nothing to do."""
    source, target = folder / "source-fp16", folder / "target"
    space = make_space(target, CLIP, rows // 2)
    first = quietly(lambda: merge_into(source, target))
    nbytes = (rows - rows // 2) * space.spec.row_bytes("image")
    note("merge, half of the rows exist", f"{nbytes / first / 1e6:.0f} MB/s")
    second = quietly(lambda: merge_into(source, target))
    requirements.at_least("seconds: merging that half / again, nothing to do", first / second, 5)
    readers = [FeatureReader(CacheRoot(root).space(space.spec.name)) for root in (source, target)]
    assert readers[0].logical_hash() == readers[1].logical_hash(), "the merge lost something"
    shutil.rmtree(target)


def merge_into(source: Path, target: Path) -> None:
    """Merge as the command does."""
    merge(CacheRoot(target), CacheRoot(source), MergeOptions(source=(source,)))


def measure_convert(requirements: Requirements, folder: Path, rows: int, rounds: int) -> None:
    """Convert, compared with copying the fp16 space."""
    root = CacheRoot(folder / "source-fp16")
    reader = find_source(root, None)
    space = Space.open(reader.paths)
    for options in (
        ConvertOptions(codec="int8"),
        ConvertOptions(codec="int8", pool=2),
        ConvertOptions(codec="fp16", pool=2),
        ConvertOptions(codec="int4"),
    ):

        def convert_into(target: Path, options: ConvertOptions = options) -> None:
            convert(CacheRoot(target), reader, options)

        ratio, seconds = compare(folder, rounds, convert_into, lambda t: plain_copy(space, t))
        name = f"convert to {options.codec}" + (f" pool {options.pool}" if options.pool else "")
        note(f"{name} / plain copy of the fp16 space", f"{ratio:.2f}")
        note(name, f"{rows / seconds:.0f} rows/s")


def main() -> None:
    """Measure and print everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    requirements = Requirements("move")
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        measure_merge(requirements, folder, options.rows, options.rounds)
        measure_again(requirements, folder, options.rows)
        measure_convert(requirements, folder, options.rows, min(3, options.rounds))
    requirements.summary()


if __name__ == "__main__":
    main()
