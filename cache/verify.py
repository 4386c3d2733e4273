"""Check a cache for damage, and remove damaged rows.

python -m cache.verify                       # check every checksum, size and index; takes seconds
python -m cache.verify --deep                # read every row, and print the logical hash
python -m cache.verify --deep --no-hash      # faster: no sha256, so no logical hash
python -m cache.verify --space clip --json   # one space, as JSON
python -m cache.verify --deep --repair       # move damaged files to cache/damaged/; then run encode.run again

Prints one line for each finding, and exits with 1 when something is broken. A note is not a breakage: it
names files that a crash left behind, or rows with a far larger codec error than the others. Spaces with
equal logical hashes have equal content. `--repair` keeps every intact row, deletes nothing, and prints
which rows encode.run must create again. Do not use it while a training run reads the cache; it refuses
while a job writes to it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cache.errors import CacheError, command_line
from cache.maintenance.checks import Report, bytes_to_read, verify
from cache.maintenance.encode_command import encode_command
from cache.maintenance.repair import Repair, Repaired
from cache.store.paths import CacheRoot
from cache.store.samples import dataset_names
from cache.store.space import find_space, read_info
from configs import command, load, parse
from configs.console import bytes_text
from configs.progress import Meter
from configs.text import json_text, say


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to check."""

    features: Path = Path("cache")
    """Folder of the cache."""
    space: str | None = None
    """Check only this space (its name, or the start of it), and neither samples nor media."""
    deep: bool = False
    """Also read every row."""
    hash: bool = True
    """With --deep: compute the logical hash. --no-hash is faster, because sha256 limits the speed."""
    repair: bool = False
    """Set damaged files aside, keep intact rows, and print what encode.run must create again."""
    json: bool = False
    """Print one JSON object instead of lines."""


def main() -> int:
    """Run the command; return 1 when something is broken, else 0."""
    options = parse(Options, prog="python -m cache.verify", description=__doc__)
    root = CacheRoot.existing(options.features)

    def tell(line: str) -> None:
        say(f"REPAIR: {line}", file=sys.stderr if options.json else sys.stdout, flush=True)

    done = None
    with Meter("read", bytes_to_read(root, options.space, options.deep)) as meter:
        if options.repair:
            repair = Repair(root, deep=options.deep, tell=tell, progress=meter.add)
            report = repair.run(None if options.space is None else find_space(root, options.space))
            done = repair.done
        else:
            report = verify(
                root,
                space=options.space,
                deep=options.deep,
                hashed=options.hash,
                progress=meter.add,
            )
    if options.json:
        values = {"broken": report.broken, **asdict(report)}
        if done is not None:
            values["repaired"] = asdict(done)
        print(json_text(values, 2, default=sorted))  # sets become lists
    else:
        say(*_report_lines(report), *(_repair_lines(done, root) if done else []))
    print(meter.total_text(), file=sys.stderr)
    return 1 if report.broken else 0


def _repair_lines(done: Repaired, root: CacheRoot) -> list[str]:
    """Return the lines that sum up a repair, and name the next commands."""
    if not (done.steps or done.tails):
        return ["nothing to repair"]
    kept, lost = sum(done.kept.values()), sum(done.lost.values())
    lines = [f"repaired: {done.steps} findings, {kept:,} rows kept, {lost:,} removed"]
    if root.damaged_dir.is_dir():
        remove = command_line("cache.gc", "--damaged", "--delete", "--features", root.path)
        lines[0] += f"; damaged files are in {root.damaged_dir} (remove them: {remove})"
    again = dataset_names(root) if done.media else sorted(done.datasets)
    if again:
        what = (
            "part of the media table was" if done.media else f"samples of {', '.join(again)} were"
        )
        lines.append(f"{what} lost; to read them again, run")
        lines += _encode_lines(root, again)
    for name in sorted(done.spaces):
        lines.append(f"{name} lacks rows now; to create them again, run")
        lines += _encode_lines(root, dataset_names(root), name)
    for name in sorted(done.tails - done.spaces):
        lines.append(f"{name} lacks its tail now; to write it again, run")
        lines += _encode_lines(root, dataset_names(root)[:1] or [None], name)
    return lines


def _encode_lines(root: CacheRoot, datasets: Sequence[str | None], space: str = "") -> list[str]:
    """Return the command lines that encode data sets again, into one space or the last one."""
    info = None
    if space:
        with contextlib.suppress(CacheError):
            info = read_info(root.space(space))
    return [f"    {encode_command(root, name, info, load('encoders'))}" for name in datasets]


def _report_lines(report: Report) -> list[str]:
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
    return lines


if __name__ == "__main__":
    command(main, errors=(CacheError,))
