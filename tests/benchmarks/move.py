"""Moving features: merging caches and converting spaces, against copying the same bytes.

python -m tests.benchmarks.move                  # some minutes, 2 GB of disk below --folder
python -m tests.benchmarks.move --rows 100       # smaller

Rows of CLIP ViT-L/14@336 (576 x 1024). Each figure is the median of several rounds in which the two that are
compared take turns. Prints a requirement a line (`name  measured  required  ok|short`), figures without one
between, a summary last; exits 0 either way.
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
from cache.store.writer import ShardWriter
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


@dataclass
class Board:
    """The lines, and how many of them are met."""

    met: int = 0
    total: int = 0

    def line(self, name: str, measured: float, required: float) -> None:
        """One requirement: at least so much."""
        ok = measured >= required
        self.met, self.total = self.met + ok, self.total + 1
        print(
            f"{name:<58}{measured:>8.2f}  {required:>6.2f}  {'ok' if ok else 'short'}", flush=True
        )

    def note(self, name: str, text: str) -> None:
        """A figure without a requirement."""
        print(f"{name:<58}{text:>8}", flush=True)


def make_space(folder: Path, spec: FeatureSpec, rows: int, different: int = 16) -> Space:
    """A space of so many rows, of a few different contents."""
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
    """The shards' bytes, read and written a few MB at a time, each file fsynced."""
    target.mkdir()
    buffer = memoryview(bytearray(BATCH_BYTES))
    for number in space.paths.committed("image"):
        source = space.paths.shard("image", number)
        with source.open("rb", buffering=0) as read, (target / str(number)).open("wb", 0) as write:
            while count := read.readinto(buffer):
                write.write(buffer[:count])
            os.fsync(write.fileno())


def quietly(work: Callable[[], object]) -> float:
    """Seconds it takes."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start


def compare(
    folder: Path, rounds: int, ours: Callable[[Path], object], other: Callable[[Path], object]
) -> tuple[float, float]:
    """Median of the ratio other / ours in seconds, and of ours; they take turns, on fresh folders."""
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


def measure_merge(board: Board, folder: Path, rows: int, rounds: int) -> None:
    """Into nothing."""
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
        board.line(f"merge / plain copy + fsync, {name}", ratio, 0.8)
        board.note(f"merge, {name}", f"{nbytes / seconds / 1e6:.0f} MB/s")


def measure_again(board: Board, folder: Path, rows: int) -> None:
    """Into a cache that has half of it; and when there is nothing to do."""
    source, target = folder / "source-fp16", folder / "target"
    space = make_space(target, CLIP, rows // 2)
    first = quietly(lambda: merge_into(source, target))
    nbytes = (rows - rows // 2) * space.spec.row_bytes("image")
    board.note("merge, half of it there already", f"{nbytes / first / 1e6:.0f} MB/s")
    second = quietly(lambda: merge_into(source, target))
    board.line("seconds: merging that half / again, nothing to do", first / second, 5)
    readers = [FeatureReader(CacheRoot(root).space(space.spec.name)) for root in (source, target)]
    assert readers[0].logical_hash() == readers[1].logical_hash(), "the merge lost something"
    shutil.rmtree(target)


def merge_into(source: Path, target: Path) -> None:
    """As the command does."""
    merge(CacheRoot(target), CacheRoot(source), MergeOptions(source=(source,)))


def measure_convert(board: Board, folder: Path, rows: int, rounds: int) -> None:
    """Against copying the fp16 space, and against packing alone on as many threads."""
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
        board.note(f"{name} / plain copy of the fp16 space", f"{ratio:.2f}")
        board.note(name, f"{rows / seconds:.0f} rows/s")


def main() -> None:
    """Everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    board = Board()
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        measure_merge(board, folder, options.rows, options.rounds)
        measure_again(board, folder, options.rows)
        measure_convert(board, folder, options.rows, min(3, options.rounds))
    print(f"move: {board.met}/{board.total} ok")


if __name__ == "__main__":
    main()
