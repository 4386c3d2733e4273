"""The options of `python -m train.compare`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cache.store.samples import Split
from train.compare.page import STYLES

PROG = "python -m train.compare"
MOST_RUNS = len(STYLES)
"""Runs on one page: each has a colour of its own."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare runs."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN")]
    """Names of runs in runs/, or paths of runs or of their stages; the others are compared with the first."""
    stage: int | None = None
    """Stage of runs that are given by name. Default: the newest that all of them have begun."""
    split: Split | None = None
    """Split of the scores. Default: `val`, or another one if no run has scores of `val`."""
    out: Path = Path("runs/compare.html")
    """The page to write."""

    def __post_init__(self) -> None:
        if not 2 <= len(self.runs) <= MOST_RUNS:
            raise ValueError(
                f"{len(self.runs)} runs; give 2 to {MOST_RUNS}, separated by spaces: {PROG} RUN RUN"
            )
