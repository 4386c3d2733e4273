"""List what is in a cache.

python -m cache.ls                           # spaces; data sets, and how much of each has features
python -m cache.ls --failures                # what could not be had: why, of which host, for which data set
python -m cache.ls --json                    # the same, for a script

A sample is covered by a space when all its media have features there; one without media always is.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from cache.layout import CacheRoot
from cache.printing import bytes_text, table_text
from cache.remote import Elsewhere, local_root
from cache.survey import (
    DatasetSummary,
    Failures,
    SpaceSummary,
    list_failures,
    open_spaces,
    summarise_datasets,
)
from cache.tables import STAGES
from configs import UserError, command, parse

SHOWN = 5
"""Sources printed of each group of failures."""


@dataclass(frozen=True, kw_only=True)
class Options(Elsewhere):
    """What to list."""

    features: str = "cache"
    """The cache: a folder, or a URL as train.run takes it."""
    failures: bool = False
    """List the media that failed instead, by reason, host and data set."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main() -> None:
    """The command."""
    options = parse(Options, prog="python -m cache.ls", description=__doc__)
    root = local_root(options.features, options)
    if not root.path.is_dir():
        raise UserError(f"no cache at {options.features}/ (say where: --features DIR)")
    if options.failures:
        failures = list_failures(root)
        if options.json:
            print(json.dumps({"failures": list(map(asdict, failures))}, indent=2))
        else:
            print(_failures_text(failures))
        return
    spaces, readers = open_spaces(root)
    datasets = summarise_datasets(root, readers)
    if options.json:
        values = {"spaces": list(map(asdict, spaces)), "datasets": list(map(asdict, datasets))}
        print(json.dumps(values, indent=2))
    else:
        print(_spaces_text(spaces, root))
        print()
        print(_datasets_text(datasets))


def _spaces_text(spaces: list[SpaceSummary], root: CacheRoot) -> str:
    if not spaces:
        return f"no spaces; make one: python -m encode.run --dataset demo --features {root.path}"
    header = ("space", "encoder", "codec", "blocks", "pool", "pictures", "frames", "size")
    rows = [
        (
            space.name,
            space.encoder,
            space.codec,
            ",".join(map(str, space.blocks)),
            "/".join(map(str, space.pool.values())),
            f"{space.rows['picture']:,}",
            f"{space.rows['frame']:,}",
            bytes_text(space.nbytes),
        )
        for space in spaces
        if not space.damage
    ]
    lines = [table_text(header, rows, right="pictures frames size")]
    lines += [f"{space.name}: being written by {space.writer}" for space in spaces if space.writer]
    lines += [f"{space.name}: DAMAGED: {space.damage}" for space in spaces if space.damage]
    return "\n".join(lines)


def _datasets_text(datasets: list[DatasetSummary]) -> str:
    if not datasets:
        return "no data sets"
    spaces = list(datasets[0].coverage)
    header = ("data set", "samples", "media", "failed", *(f"in {space}" for space in spaces))
    rows = [
        (
            dataset.name,
            f"{dataset.samples:,}",
            f"{dataset.media:,}",
            f"{dataset.failed:,}",
            *(f"{dataset.coverage[space]:.1%}" for space in spaces),
        )
        for dataset in datasets
    ]
    text = table_text(header, rows, right="samples media failed")
    if any(dataset.failed for dataset in datasets):
        text += "\nwhy media failed: python -m cache.ls --failures"
    return text


def _failures_text(failures: list[Failures]) -> str:
    if not failures:
        return "no failures"
    by_stage: dict[str, set[str]] = {stage: set() for stage in STAGES}
    for group in failures:
        by_stage[group.stage].update(group.sources)
    lines = [f"{stage:<8}{len(found):>10,} media" for stage, found in by_stage.items() if found]
    for group in failures:
        dataset = group.dataset or "no data set any more"
        where = f" ({group.host})" if group.host else ""
        lines += ["", f"{len(group.sources):,} in {dataset}{where}: {group.stage}: {group.error}"]
        lines += [f"    {source}" for source in group.sources[:SHOWN]]
        if len(group.sources) > SHOWN:
            lines.append(f"    and {len(group.sources) - SHOWN:,} more (all: --json)")
    lines += ["", "ask again for them: python -m encode.run --dataset NAME --retry-failed"]
    return "\n".join(lines)


if __name__ == "__main__":
    command(main)
