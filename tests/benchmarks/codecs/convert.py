"""How many rows `cache.convert` converts in a second, for each core.

python -m tests.benchmarks.codecs.convert --rows 600        # five minutes, 2 GB of disk below --folder

A short and a long space are converted in turns, with a process on every core, from the first row read to the
last one committed. The slope between the two is the speed; the rest is start-up. They are packed by compiled
loops, as many rows are, and in turns by numpy, as few are. Rows of 576 x 1024 become another codec, or are
pooled 2 x 2 (144 tokens) or 3 x 3 (64) first: then all 576 tokens are still read, checked and added up. Rows
that are pooled already (64 tokens, a ninth of the values) must be ten times as fast.
"""

from __future__ import annotations

import functools
import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from cache.convert import Options as ConvertOptions
from cache.convert import convert, find_source
from cache.maintenance import convert_rows
from cache.store.paths import CacheRoot
from configs.hardware import cores
from tests.benchmarks import bench
from tests.benchmarks.bench import Requirements, seconds
from tests.benchmarks.move import CLIP, make_space, note, quiet

CASES = (
    (1, ConvertOptions(codec="int4"), 40),
    (1, ConvertOptions(codec="int8"), 150),
    (3, ConvertOptions(codec="int4"), 400),
    (3, ConvertOptions(codec="int8"), 1500),
    (1, ConvertOptions(codec="int4", pool=2), None),
    (1, ConvertOptions(codec="int8", pool=2), None),
    (1, ConvertOptions(codec="int4", pool=3), None),
    (1, ConvertOptions(codec="int8", pool=3), None),
)
"""The pooling of the source's images, what its rows become, and the rows a second that a core must make."""


COMPILED, BY_NUMPY = 0, 10**18
"""Values from which on rows are packed by compiled loops."""


@dataclass(frozen=True, kw_only=True)
class Options(bench.Options):
    """What to measure."""

    rows: int = 600
    """Rows of the long fp16 space."""
    rounds: int = 3
    """Conversions of each kind, of which the median counts."""


def measure_conversion(folder: Path, rows: int, rounds: int, requirements: Requirements) -> None:
    """Print the rows a second of every conversion, for each core."""
    workers, starts = cores(), []
    for pooled, options, required in CASES:
        long = rows * pooled**2  # as many values
        counts = (max(1, long // 4), long)
        for count in counts:
            if not (folder / f"{pooled}-{count}").exists():
                make_space(folder / f"{pooled}-{count}", replace(CLIP, pool_image=pooled), count)
        slopes: dict[int, list[float]] = {COMPILED: [], BY_NUMPY: []}
        for _ in range(rounds):
            for worth, found in slopes.items():
                taken = []
                for count in counts:
                    source = find_source(CacheRoot(folder / f"{pooled}-{count}"), None)
                    target = folder / "target"
                    wanted = replace(options, workers=workers)
                    work = functools.partial(convert, CacheRoot(target), source, wanted)
                    with quiet(), mock.patch.object(convert_rows, "WORTH_VALUES", worth):
                        taken.append(seconds(work))
                    shutil.rmtree(target)
                found.append(max((taken[1] - taken[0]) / (counts[1] - counts[0]), 1e-9))
                if worth == COMPILED:
                    starts.append(taken[0] - counts[0] * found[-1])
        before, after = (
            CLIP.tokens("image") // side**2 for side in (pooled, options.pool or pooled)
        )
        name = f"cache.convert, {before} tokens to {after} in {options.codec}, rows/s a core"
        rate, slow = (1 / statistics.median(found) / workers for found in slopes.values())
        if required is None:
            note(name, f"{rate:.0f}")
        else:
            requirements.at_least(name, rate, required)
        note("  by numpy, as few rows are", f"{slow:.0f}")
    note("cache.convert: start-up, s", f"{statistics.median(starts):.2f}")
    shutil.rmtree(folder)


def measure(options: Options, folder: Path, requirements: Requirements) -> None:
    """Convert as the command does."""
    measure_conversion(folder, options.rows, options.rounds, requirements)


if __name__ == "__main__":
    bench.run("codecs.convert", __doc__, measure, Options)
