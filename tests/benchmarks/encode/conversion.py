"""Rows a second that `cache.convert` makes of an fp16 space of CLIP ViT-L/14@336, for each core."""

from __future__ import annotations

import contextlib
import io
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

from cache.convert import Options, convert, find_source
from cache.store.paths import CacheRoot
from encode.driver.resources import cores
from tests.benchmarks.bench import Requirements, seconds
from tests.benchmarks.encode.jobs import Speed
from tests.benchmarks.move import CLIP, make_space

CASES = (
    ("int4", Options(codec="int4"), 40),
    ("int8", Options(codec="int8"), 150),
    ("int4, pooled 3 x 3", Options(codec="int4", pool=3), 400),
    ("int8, pooled 3 x 3", Options(codec="int8", pool=3), 1500),
)
"""What the rows become, the options of the command, and the rows/s that a core must make."""


def measure_conversion(folder: Path, rows: int, rounds: int, requirements: Requirements) -> None:
    """Convert a short and a long space in turns; print the rows of a core by the slope between the two."""
    counts = {"short": max(1, rows // 4), "long": rows}
    for name, count in counts.items():
        make_space(folder / name, CLIP, count)
    speeds: dict[str, list[Speed]] = {name: [] for name, _, _ in CASES}
    for _ in range(rounds):
        for name, options, _ in CASES:
            taken = {which: _convert(folder / which, options) for which in counts}
            short, long = ((counts[which], taken[which]) for which in counts)
            speeds[name].append(Speed.of(short, long))
    for name, _, required in CASES:
        image_s = statistics.median(speed.image_s for speed in speeds[name])
        requirements.at_least(
            f"cache.convert to {name}, rows/s a core", 1 / image_s / cores(), required
        )


def _convert(cache: Path, options: Options) -> float:
    """Convert the only space of a cache and remove the result; return the seconds."""
    root = CacheRoot(cache)
    before = set(root.spaces_dir.iterdir())
    with contextlib.redirect_stdout(io.StringIO()):
        source = find_source(root, None)
        taken = seconds(lambda: convert(root, source, replace(options, features=cache)))
    for made in set(root.spaces_dir.iterdir()) - before:
        shutil.rmtree(made)
    return taken
