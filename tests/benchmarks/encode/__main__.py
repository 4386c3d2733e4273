"""Encode jobs beside what the machine allows, and beside other libraries.

python -m tests.benchmarks.encode                 # about an hour on 2 free cores; 3 GB of disk, memory
python -m tests.benchmarks.encode --only cheap    # or: vit-l, gpu, conversion
python -m tests.benchmarks.encode --small         # the same code, tiny: figures mean nothing

The photographs are real, saved with 400 to 2,000 pixels. Other libraries are used where they are installed:
peers.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from encode.worker.config import spin_briefly
from tests.benchmarks import bench
from tests.benchmarks.bench import Requirements, run
from tests.benchmarks.encode.photos import make_photos, make_small_files

SMALL_BYTES = 100_000
"""Size of a file for decoders that sleep, about: that of a photograph of 600 pixels."""


@dataclass(frozen=True, kw_only=True)
class Options(bench.Options):
    """Measure encode jobs."""

    only: Literal["", "vit-l", "cheap", "gpu", "conversion"] = ""
    """The part to measure; all by default."""
    small: bool = False
    """Measure a few small photographs."""
    rounds: int = 3
    """Turns of each case."""
    images: int = 900
    """Photographs of a long job."""


def measure(options: Options, folder: Path, requirements: Requirements) -> None:
    """Measure the parts."""
    spin_briefly()
    # Imported here: torch reads the environment once, and these import it.
    from tests.benchmarks.codecs.convert import measure_conversion
    from tests.benchmarks.encode import bound, peers
    from tests.benchmarks.encode.jobs import Photos

    count, largest = (16, 500) if options.small else (options.images, 2000)
    rounds = 1 if options.small else options.rounds
    paths = make_photos(folder / "photos", count, largest=largest)
    size = sum(path.stat().st_size for path in paths)
    print(f"{count} photographs, {size / count / 1e3:.0f} KB each", flush=True)
    if options.only in ("", "cheap"):
        photos = Photos.of(folder / "cheap", paths, count // 4, count)
        found = peers.available(photos, bound.CHEAP)
        bound.measure_cheap(photos, rounds, found, requirements)
    if options.only in ("", "gpu"):
        photos = Photos.of(folder / "gpu", paths, count // 4, count)
        small = min(paths, key=lambda path: abs(path.stat().st_size - SMALL_BYTES))
        files = make_small_files(folder / "files", small, 6 * count)
        many = Photos.of(folder / "many", files, count, 6 * count)
        bound.measure_gpu(photos, many, rounds, requirements)
    if options.only in ("", "vit-l"):
        # At most resources.MEASURE_BATCHES batches: of two jobs, neither measures one beforehand.
        photos = Photos.of(folder / "vit-l", paths, min(8, count // 2), min(32, count))
        bound.measure_vit_l(photos, paths, rounds, requirements)
    if options.only in ("", "conversion"):
        measure_conversion(
            folder / "conversion", 8 if options.small else 1000, rounds, requirements
        )


if __name__ == "__main__":
    run("encode", __doc__, measure, Options)
