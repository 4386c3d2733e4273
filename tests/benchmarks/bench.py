"""What benchmarks share: their command line and folder, the page cache, the rows they time, and requirements.

    requirements = Requirements("scale")
    requirements.at_most("open with its index, s", 1.2, 2.0)    # ...  1.2  <= 2  ok
    requirements.summary()                                      # scale: 1/1 ok

A requirement that is not met prints `short`. The exit code is 0 anyway, because a busy machine is no error.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, TypeVar

from configs import command, parse
from tests.support.spaces import SPEC

CLIP = replace(SPEC, encoder="bench", image_size=336, patch_size=14, width=1024, pool_frame=3)
"""The spec of int8 rows of CLIP ViT-L/14@336: images of 576 x 1024 values, frames of 64 x 1024."""


class Requirements:
    """Print requirements as they are measured, and count those that are met."""

    def __init__(self, benchmark: str) -> None:
        self.benchmark = benchmark
        self.met = self.total = 0

    def at_least(self, name: str, measured: float, required: float) -> None:
        """Print the requirement that a number is at least `required`."""
        self._add(name, f"{measured:.4g}", f">= {required:g}", measured >= required)

    def at_most(self, name: str, measured: float, required: float) -> None:
        """Print the requirement that a number is at most `required`."""
        self._add(name, f"{measured:.4g}", f"<= {required:g}", measured <= required)

    def equal(self, name: str, measured: object, required: object) -> None:
        """Print the requirement that something is `required`."""
        self._add(name, str(measured), str(required), measured == required)

    def _add(self, name: str, measured: str, required: str, ok: bool) -> None:
        self.met, self.total = self.met + ok, self.total + 1
        print(f"{name:<60}{measured:>12}  {required:>14}  {'ok' if ok else 'short'}", flush=True)

    def summary(self) -> None:
        """Print how many requirements are met."""
        print(f"{self.benchmark}: {self.met}/{self.total} ok")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where to measure."""

    folder: Path | None = None
    """Where files are made, and removed afterwards; the system's temporary folder by default."""


Given = TypeVar("Given", bound=Options)


def run(
    name: str,
    about: str | None,
    measure: Callable[[Given, Path, Requirements], None],
    options_class: type[Given],
) -> NoReturn:
    """Run a benchmark as a command: `measure(options, empty folder, requirements)`, then the summary."""

    def main() -> None:
        prog = f"python -m tests.benchmarks.{name}"
        options = parse(options_class, prog=prog, description=about)
        requirements = Requirements(name)
        if options.folder is not None:
            options.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            measure(options, Path(folder), requirements)
        requirements.summary()

    command(main)


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the seconds that one call takes."""
    started = clock()
    work()
    return clock() - started


def take_turns(
    tasks: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Callable[[str], object] = lambda _: None,
) -> dict[str, list[float]]:
    """Return the seconds of every task in every round.

    Each task is called once a round, so that a busy machine slows all of them. The order is reversed in every
    second round. `before` gets the name of a task, outside the measured time.
    """
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds):
        for name in list(tasks)[:: -1 if number % 2 else 1]:
            before(name)
            taken[name].append(seconds(tasks[name]))
    return taken


def forget(files: Iterable[Path]) -> None:
    """Write files out and remove them from the page cache; they must not be mapped."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
