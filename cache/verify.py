"""Look for damage in a cache.

python -m cache.verify                       # every seal, size and index; seconds
python -m cache.verify --deep                # every byte, at the speed of the disk
python -m cache.verify --space clip --json   # one space, for a script

Prints a line for each finding, and exits 1 when something is broken. Notes break nothing: they name what a
crash left behind. `--deep` ends with each space's logical hash: equal hashes mean equal content.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cache.damage import Report, verify
from cache.layout import CacheRoot
from cache.printing import Meter, bytes_text
from cache.spec import KINDS
from configs import UserError, command, parse


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to look at."""

    features: Path = Path("cache")
    """Folder of the cache."""
    space: str | None = None
    """Look at this space alone (its name, or how it begins), not at samples and media."""
    deep: bool = False
    """Read every row, too."""
    json: bool = False
    """Print one JSON object instead of lines."""


def main() -> int:
    """The command; 1 when something is broken."""
    options = parse(Options, prog="python -m cache.verify", description=__doc__)
    root = CacheRoot(options.features)
    if not options.features.is_dir():
        raise UserError(f"no cache at {options.features}/ (say where: --features DIR)")
    meter = Meter("read", _shard_bytes(root) if options.deep else 0)
    report = verify(root, space=options.space, deep=options.deep, progress=meter.add)
    meter.close()
    print(_json(report) if options.json else _text(report))
    return 1 if report.broken else 0


def _shard_bytes(root: CacheRoot) -> int:
    spaces = map(root.space, root.space_names())
    return sum(
        space.shard(kind, number).stat().st_size
        for space in spaces
        for kind in KINDS
        for number in space.committed(kind)
        if space.shard(kind, number).exists()
    )


def _json(report: Report) -> str:
    return json.dumps({"broken": report.broken, **asdict(report)}, indent=2)


def _text(report: Report) -> str:
    lines = [
        f"{'BROKEN' if finding.broken else 'note'}: {finding.path}: {finding.what}; {finding.way_out}"
        for finding in report.all_findings
    ]
    for space in report.spaces:
        rows = ", ".join(f"{count} {kind} rows" for kind, count in space.rows.items() if count)
        broken = sum(finding.broken for finding in space.findings)
        state = f"{broken} findings" if broken else "intact"
        lines.append(f"{space.name}: {rows or 'no rows'}, {bytes_text(space.nbytes)}: {state}")
        if space.logical_hash:
            lines.append(f"logical hash: {space.logical_hash}")
    if not report.spaces:
        lines.append("no spaces")
    return "\n".join(lines)


if __name__ == "__main__":
    command(main)
