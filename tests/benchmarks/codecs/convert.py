"""How many rows of 576 x 1024 `cache.convert` converts in a second, for each core.

python -m tests.benchmarks.codecs.convert --rows 600        # a minute, 1 GB of disk below --folder

A short and a long space are converted in turns, with a process on every core, from the first row read to the
last one committed. The slope between the two is the speed; the rest is start-up. Images are not pooled (576
tokens), or pooled 2 x 2 (144) and 3 x 3 (64).
"""

from __future__ import annotations

import functools
import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from cache.convert import Options as ConvertOptions
from cache.convert import convert, find_source
from cache.store.paths import CacheRoot
from configs.hardware import cores
from tests.benchmarks import bench
from tests.benchmarks.bench import Requirements, seconds
from tests.benchmarks.move import CLIP, make_space, note, quiet

CASES = (
    (ConvertOptions(codec="int4"), 40),
    (ConvertOptions(codec="int8"), 150),
    (ConvertOptions(codec="int4", pool=2), 400),
    (ConvertOptions(codec="int8", pool=2), 1500),
    (ConvertOptions(codec="int4", pool=3), 400),
    (ConvertOptions(codec="int8", pool=3), 1500),
)
"""What the rows become, and the rows a second that a core must make."""


@dataclass(frozen=True, kw_only=True)
class Options(bench.Options):
    """What to measure."""

    rows: int = 600
    """Rows of the long fp16 space."""
    rounds: int = 3
    """Conversions of each kind, of which the median counts."""


def measure_conversion(folder: Path, rows: int, rounds: int, requirements: Requirements) -> None:
    """Print the rows a second of every conversion, for each core."""
    short, long, workers = max(1, rows // 4), rows, cores()
    for count in (short, long):
        make_space(folder / str(count), CLIP, count)
    target, starts = folder / "target", []
    for options, required in CASES:
        slopes = []
        for _ in range(rounds):
            taken = {}
            for count in (short, long):
                source = find_source(CacheRoot(folder / str(count)), None)
                wanted = replace(options, workers=workers)
                work = functools.partial(convert, CacheRoot(target), source, wanted)
                with quiet():
                    taken[count] = seconds(work)
                shutil.rmtree(target)
            slopes.append(max((taken[long] - taken[short]) / (long - short), 1e-9))
            starts.append(taken[short] - short * slopes[-1])
        tokens = CLIP.tokens("image") // (options.pool or 1) ** 2
        requirements.at_least(
            f"cache.convert to {options.codec}, {tokens} tokens, rows/s a core",
            1 / statistics.median(slopes) / workers,
            required,
        )
    note("cache.convert: start-up, s", f"{statistics.median(starts):.2f}")
    for count in (short, long):
        shutil.rmtree(folder / str(count))


def measure(options: Options, folder: Path, requirements: Requirements) -> None:
    """Convert as the command does."""
    measure_conversion(folder, options.rows, options.rounds, requirements)


if __name__ == "__main__":
    bench.run("codecs.convert", __doc__, measure, Options)
