"""What caching gives a training: fed devices, speed beside other loops, and when a cache has paid.

python -m tests.benchmarks.train                # 10 to 20 minutes on 2 cores; 5 GB of disk, 7 of memory
python -m tests.benchmarks.train --only fed     # or: speed
python -m tests.benchmarks.train --small        # the same code, tiny: what `make test` runs
"""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.benchmarks import bench
from tests.benchmarks.bench import Requirements, run
from tests.benchmarks.train.break_even import measure_break_even
from tests.benchmarks.train.fed import measure_fed
from tests.benchmarks.train.models import FULL, SMALL
from tests.benchmarks.train.speed import measure_share, measure_speed


@dataclass(frozen=True, kw_only=True)
class Options(bench.Options):
    """Measure how a cache feeds and speeds up training."""

    only: Literal["", "fed", "speed"] = ""
    """The part to measure; both by default."""
    small: bool = False
    """Measure tiny sizes, in seconds: figures mean nothing."""
    rounds: int = 0
    """Turns of each case; 0: three, or one if small."""
    gigabytes: float = 0.0
    """Gigabytes of rows of each size; 0: 2.5."""


def measure(options: Options, folder: Path, requirements: Requirements) -> None:
    """Measure the parts."""
    scale = SMALL if options.small else FULL
    changes = {name: getattr(options, name) for name in ("rounds", "gigabytes")}
    scale = dataclasses.replace(scale, **{name: value for name, value in changes.items() if value})
    # First the forked ranks: this process has no threads yet.
    if options.only != "speed":
        measure_fed(scale, folder, requirements)
    if options.only != "fed":
        measure_share(scale, folder, requirements)
        gc.collect()  # before the other models
        speeds = measure_speed(scale, folder, requirements)
        measure_break_even(scale, folder, speeds, requirements)


if __name__ == "__main__":
    run("train", __doc__, measure, Options)
