"""How many rows of 576 x 1024 `cache.convert` converts in a second, for each core.

python -m tests.benchmarks.codecs.convert --rows 600        # a minute, 0.7 GB of disk below --folder

The time from the first row read to the last one committed, with a process on every core. Starting the
processes takes the same time for any number of rows; it is measured apart and subtracted. Images are not
pooled (576 tokens), or pooled 2 x 2 (144) and 3 x 3 (64).
"""

from __future__ import annotations

import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cache.convert import Options as ConvertOptions
from cache.convert import convert, find_source
from cache.maintenance.convert_rows import Conversion
from cache.maintenance.processes import Converters, cores
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from tests.benchmarks import bench
from tests.benchmarks.bench import Requirements, seconds
from tests.benchmarks.move import CLIP, make_space, note, quiet

WANTED: dict[tuple[Literal["int4", "int8"], int], float] = {
    ("int4", 1): 40,
    ("int8", 1): 150,
    ("int4", 2): 400,
    ("int8", 2): 1500,
    ("int4", 3): 400,
    ("int8", 3): 1500,
}
"""Codec and pooling -> rows a second for each core."""


@dataclass(frozen=True, kw_only=True)
class Options(bench.Options):
    """What to measure."""

    rows: int = 600
    """Rows of the fp16 space."""
    rounds: int = 3
    """Conversions of each kind, of which the median counts."""


def start_seconds(conversion: Conversion, workers: int) -> float:
    """Return the seconds until every process has converted a row."""

    def work() -> None:
        with Converters(conversion, batch_rows=1, slots=1, workers=workers) as converters:
            for _ in range(workers):
                converters.convert(0, 1)

    return 0.0 if workers == 1 else statistics.median(seconds(work) for _ in range(3))


def conversions(folder: Path, requirements: Requirements, options: Options) -> None:
    """Print the rows a second of every conversion, for each core."""
    workers = cores()
    source = folder / "source"
    make_space(source, CLIP, options.rows)
    reader: FeatureReader = find_source(CacheRoot(source), None)
    target = folder / "target"
    for (name, pool), wanted in WANTED.items():
        taken = []
        spec = replace(CLIP, codec=name, pool_image=pool)
        start = start_seconds(Conversion.between(CLIP, spec, "image"), workers)
        for _ in range(options.rounds):
            with quiet():
                how = ConvertOptions(codec=name, pool=pool, workers=workers)
                taken.append(seconds(lambda how=how: convert(CacheRoot(target), reader, how)))  # type: ignore[misc]
            shutil.rmtree(target)
        spent = max(statistics.median(taken) - start, 1e-9)
        tokens = CLIP.tokens("image") // pool**2
        requirements.at_least(
            f"convert to {name}, {tokens} tokens, rows/s a core",
            options.rows / spent / workers,
            wanted,
        )
    note(f"convert: start of {workers} processes, s", f"{start:.2f}")
    shutil.rmtree(source)


def measure(options: Options, folder: Path, requirements: Requirements) -> None:
    """Convert as the command does."""
    conversions(folder, requirements, options)


if __name__ == "__main__":
    bench.run("codecs.convert", __doc__, measure, Options)
