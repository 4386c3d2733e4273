"""Look for damage in a cache, and take it out.

python -m cache.verify                       # every seal, size and index; seconds
python -m cache.verify --deep                # every byte; ends with the logical hash
python -m cache.verify --deep --no-hash      # without sha256, so without a logical hash: faster yet
python -m cache.verify --space clip --json   # one space, for a script
python -m cache.verify --deep --repair       # what is damaged goes to cache/damaged/; then encode.run again

Prints a line for each finding, and exits 1 when something is broken. Notes break nothing: they name what a
crash left behind, and rows that their codec holds far worse than the others. `--deep` ends with each space's
logical hash: equal hashes mean equal content. `--repair` keeps every row that is intact, deletes nothing, and
says what encode.run has to do again; not while a job writes to the cache, nor while a training reads it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from cache.maintenance.checks import Report, bytes_to_read, verify
from cache.maintenance.repair import Repair, Repaired
from cache.store.paths import CacheRoot
from cache.store.space import find_space
from configs import command, parse
from configs.console import Meter, bytes_text


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to look at."""

    features: Path = Path("cache")
    """Folder of the cache."""
    space: str | None = None
    """Look at this space alone (its name, or how it begins), not at samples and media."""
    deep: bool = False
    """Read every row, too."""
    hash: bool = True
    """With --deep: compute the logical hash, too. sha256 is what bounds the speed: --no-hash is faster."""
    repair: bool = False
    """Set aside what is damaged, keep what is not, and say what encode.run must do again."""
    json: bool = False
    """Print one JSON object instead of lines."""


def main() -> int:
    """The command; 1 when something is broken."""
    options = parse(Options, prog="python -m cache.verify", description=__doc__)
    root = CacheRoot.existing(options.features)
    meter = Meter("read", bytes_to_read(root, options.space, options.deep))
    if options.repair:
        return _repair(root, options, meter)
    report = verify(
        root, space=options.space, deep=options.deep, hashed=options.hash, progress=meter.add
    )
    meter.close()
    print(_json(report) if options.json else _text(report))
    print(meter.total_text(), file=sys.stderr)
    return 1 if report.broken else 0


def _repair(root: CacheRoot, options: Options, meter: Meter) -> int:
    def tell(line: str) -> None:
        meter.close()
        print(f"REPAIR: {line}", file=sys.stderr if options.json else sys.stdout, flush=True)

    repair = Repair(root, deep=options.deep, tell=tell, progress=meter.add)
    space = find_space(root, options.space) if options.space is not None else None
    report = repair.run(space)
    meter.close()
    if options.json:
        done = {**asdict(repair.done), "datasets": sorted(repair.done.datasets)}
        print(_json(report, repaired={**done, "spaces": sorted(repair.done.spaces)}))
    else:
        print("\n".join([_text(report), *_after(repair.done, root)]))
    print(meter.total_text(), file=sys.stderr)
    return 1 if report.broken else 0


def _after(done: Repaired, root: CacheRoot) -> list[str]:
    """What was done in all, and what the user has to do now."""
    if not done.steps:
        return ["nothing to repair"]
    kept, lost = sum(done.kept.values()), sum(done.lost.values())
    lines = [f"repaired: {done.steps} things, {kept:,} rows kept, {lost:,} taken out"]
    if root.damaged_dir.is_dir():
        lines[0] += f"; what was set aside is in {root.damaged_dir} (python -m cache.gc --damaged)"
    if done.media:
        lines.append("run encode.run again for every data set: part of the media table was lost")
    elif done.datasets:
        lines.append(
            f"run encode.run again for {', '.join(sorted(done.datasets))}: the samples were lost"
        )
    lines += [
        f"run encode.run again for {name}: it makes good the rows that are missing"
        for name in sorted(done.spaces)
    ]
    return lines


def _json(report: Report, **more: object) -> str:
    return json.dumps({"broken": report.broken, **asdict(report), **more}, indent=2)


def _text(report: Report) -> str:
    lines = [
        f"{'BROKEN' if finding.broken else 'note'}: {finding.path}: {finding.what}; {finding.way_out}"
        for finding in report.all_findings
    ]
    for space in report.spaces:
        rows = ", ".join(f"{count} {array} rows" for array, count in space.rows.items() if count)
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
