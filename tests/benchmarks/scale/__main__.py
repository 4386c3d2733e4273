"""Ten million: rows in twenty thousand shards, and sources of an encode job.

python -m tests.benchmarks.scale                          # 5-10 minutes, 2 GB of disk, 4 GB of memory
python -m tests.benchmarks.scale --rows 400000            # seconds; fewer rows get no index
python -m tests.benchmarks.scale --only plan              # rows: open, look up, schedule; plan: an encode job

Everything is also done with a tenth of the rows or sources, to show how it grows. Every step runs in a
process of its own, so that its memory can be measured.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cache.store.paths import CacheRoot
from tests.benchmarks import bench
from tests.benchmarks.bench import Requirements, run
from tests.benchmarks.scale import plan, rows

Step = Callable[[CacheRoot, int], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Options(bench.Options):
    """What to measure."""

    rows: int = 10_000_000
    """Rows of the large space, and sources of the large job; the small ones have a tenth of them."""
    only: Literal["rows", "plan"] | None = None
    """Measure only this."""


def all_steps(
    folder: Path, count: int, steps: Mapping[str, Step], what: str
) -> dict[str, dict[str, float]]:
    """Run each step in a process of its own; return their figures."""
    found = {}
    for name, step in steps.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found[name] = process.submit(step, CacheRoot(folder), count).result()
        figures = {k: round(v, 2) for k, v in found[name].items()}
        print(f"  {count:>10,} {what:8}{name:12}{figures}", flush=True)
    return found


def measure_rows(options: Options, folder: Path, requirements: Requirements) -> None:
    """Measure a small and a large space, and compare them."""
    small = all_steps(folder / "small", options.rows // 10, rows.STEPS, "rows")
    large = all_steps(folder / "large", options.rows, rows.STEPS, "rows")
    for name, step, field, required in (
        ("open with its index, s", "open_space", "seconds", 2.0),
        ("memory of the index, MB", "open_space", "peak", 1000.0),
        ("schedule an epoch, random, s", "schedule", "random_seconds", 10.0),
        ("schedule an epoch, blocks, s", "schedule", "blocks_seconds", 10.0),
        ("look up one of many keys, us", "open_space", "lookup_us", 5.0),
    ):
        requirements.at_most(name, large[step][field], required)
    for name, step, field in (
        ("open", "open_space", "seconds"),
        ("memory", "open_space", "peak"),
        ("rebuild", "rebuild", "seconds"),
    ):
        ratio = large[step][field] / small[step][field]
        requirements.at_most(f"{name}: x for 10 x rows", ratio, 13.0)


def measure_plan(options: Options, folder: Path, requirements: Requirements) -> None:
    """Measure the plans of a small and of a large job, and compare them."""
    small = all_steps(folder / "few", options.rows // 10, plan.STEPS, "sources")["plan"]
    large = all_steps(folder / "many", options.rows, plan.STEPS, "sources")["plan"]
    requirements.at_most("plan an encode job, s of CPU", large["seconds"], 120.0)
    requirements.at_most("memory of planning it, MB", large["peak"], 1000.0)
    requirements.at_most("plan: x for 10 x sources", large["seconds"] / small["seconds"], 13.0)


def measure(options: Options, folder: Path, requirements: Requirements) -> None:
    """Measure what was asked for."""
    if options.only != "plan":
        measure_rows(options, folder, requirements)
    if options.only != "rows":
        measure_plan(options, folder, requirements)


if __name__ == "__main__":
    run("scale", __doc__, measure, Options)
