"""What the checks of a cache found: plain values, for people, for scripts, and for the repair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cache.store.paths import MAKE_ANEW, Corrupt
from configs import UserError

Progress = Callable[[int], None]
"""Called with the number of bytes just read. Threads may call it."""

GC = "python -m cache.gc --delete removes it"
"""The way out for what a crash left behind."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as it should be."""

    path: str
    """The file."""
    what: str
    """What is wrong with it."""
    way_out: str
    """What to do."""
    broken: bool = True
    """Whether something is lost; else a note."""
    array: str | None = None
    """The array whose rows it concerns: image or frame."""
    shard: int | None = None
    """The committed shard whose rows it concerns."""


@dataclass(kw_only=True)
class SpaceReport:
    """What was seen of one space."""

    name: str
    """The space's name."""
    rows: dict[str, int] = field(default_factory=dict)
    """Kind -> committed rows."""
    nbytes: int = 0
    """Size of the committed shards."""
    logical_hash: str | None = None
    """sha256 (hex) of its content; None unless all of it was read and found intact."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong with it."""

    @property
    def broken(self) -> bool:
        """Whether anything is lost."""
        return any(finding.broken for finding in self.findings)


@dataclass(kw_only=True)
class Report:
    """What was seen of a cache."""

    findings: list[Finding] = field(default_factory=list)
    """What is wrong outside the spaces."""
    spaces: list[SpaceReport] = field(default_factory=list)
    """One for each space looked at."""

    @property
    def all_findings(self) -> list[Finding]:
        """What is wrong anywhere."""
        return self.findings + [f for space in self.spaces for f in space.findings]

    @property
    def broken(self) -> bool:
        """Whether anything is lost."""
        return any(finding.broken for finding in self.all_findings)


def damage(
    error: UserError, path: Path, *, array: str | None = None, shard: int | None = None
) -> Finding:
    """An error met on the way, as a finding about `path`."""
    what, way_out = str(error), MAKE_ANEW
    if isinstance(error, Corrupt):
        what, way_out = error.what, error.way_out
    return Finding(path=str(path), what=what, way_out=way_out, array=array, shard=shard)


def note(path: Path, what: str, way_out: str) -> Finding:
    """Something that breaks nothing."""
    return Finding(path=str(path), what=what, way_out=way_out, broken=False)
