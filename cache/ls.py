"""List the content of a cache.

python -m cache.ls                           # spaces and their codec errors; data sets and what they lack
python -m cache.ls --failures                # media that failed, by reason, host and data set
python -m cache.ls --notes                   # media that are used although they are cut short, HDR, ...
python -m cache.ls --json                    # as JSON, for a script

A space covers a sample when it has features of all the sample's media. It covers every sample without media.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from cache.errors import CacheError
from cache.maintenance.encode_command import encode_command
from cache.maintenance.inventory import (
    DatasetSummary,
    Failures,
    Notes,
    SpaceSummary,
    list_failures,
    list_notes,
    open_spaces,
    summarise_datasets,
)
from cache.remote.open import RemoteOptions, local_root
from cache.store.ledger import STAGES
from cache.store.paths import CacheRoot, is_url
from configs import UserError, command, load, parse
from configs.command_line import command_text
from configs.console import bytes_text, counts_text, table_text
from configs.text import json_text, lines_text, quoted

LEGEND = (
    "pass: bytes of features that one pass over the data set reads\n"
    "missing, add: media without features that have not failed, and the most bytes that they would add"
)
SHOWN = 5
"""The most sources printed for each group of failures."""


@dataclass(frozen=True, kw_only=True)
class Options(RemoteOptions):
    """What to list."""

    features: str = "cache"
    """The cache: a folder, or a URL (https://, s3://, hf://)."""
    config: Path | None = None
    """Your own file of encoders, over ours. Default: nanomolmo2.yaml in this folder, if there is one."""
    failures: bool = False
    """List the media that failed, by reason, host and data set, and nothing else."""
    notes: bool = False
    """List the media that are used and have a note, such as `ends early`, and nothing else."""
    json: bool = False
    """Print one JSON object instead of tables."""

    def __post_init__(self) -> None:
        if self.failures and self.notes:
            raise ValueError("--failures and --notes are two lists: use one of them")


def main() -> None:
    """Run the command."""
    options = parse(Options, prog="python -m cache.ls", description=__doc__)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("cache").setLevel(logging.INFO)  # shows the progress of copying remote tables
    root = local_root(options.features, options)
    if not root.path.is_dir():
        raise UserError(f"no cache at {options.features}/ (say where: --features DIR)")
    if options.failures:
        failures = list_failures(root, load("encoders"))
        values = {"failures": list(map(asdict, failures))}
        text = _failures_text(failures)
    elif options.notes:
        notes = list_notes(root)
        values = {"notes": list(map(asdict, notes))}
        text = _notes_text(notes)
    else:
        spaces, readers = open_spaces(root, errors=True)
        datasets = summarise_datasets(root, readers, load("encoders"))
        values = {"spaces": list(map(asdict, spaces)), "datasets": list(map(asdict, datasets))}
        tables = (
            _spaces_text(spaces, root, options.features),
            _errors_text(spaces),
            _datasets_text(datasets, options.features),
            _needs_text(datasets),
        )
        text = "\n\n".join(filter(None, tables))
    print(json_text(values, 2) if options.json else text)


def _spaces_text(spaces: list[SpaceSummary], root: CacheRoot, features: str) -> str:
    if not spaces:
        return f"no spaces; create one: {encode_command(root)}"
    header = ("space", "encoder", "codec", "blocks", "pool", "format", "images", "frames", "size")
    rows = [
        (
            space.name,
            space.encoder,
            space.codec,
            ",".join(map(str, space.blocks)),
            "/".join(map(str, space.pool.values())),
            space.container,
            f"{space.rows['image']:,}",
            f"{space.rows['frame']:,}",
            bytes_text(space.nbytes),
        )
        for space in spaces
        if not space.damage
    ]
    lines = table_text(header, rows, right="images frames size").split("\n")
    collect = command_text("python -m cache.gc", ["--delete", "--features", features])
    way_out = "" if is_url(features) else f"; free their bytes: {collect}"
    lines += [
        f"{space.name}: {again:,} rows are stored twice and count once{way_out}"
        for space in spaces
        if (again := sum(space.doubled.values()))
    ]
    lines += [f"{space.name}: being written by {space.writer}" for space in spaces if space.writer]
    lines += [f"{space.name}: DAMAGED: {space.damage}" for space in spaces if space.damage]
    return lines_text(lines)


def _errors_text(spaces: list[SpaceSummary]) -> str:
    """Return a table of the relative errors measured when rows were packed; '' without rows."""
    header = ("codec error", "rows of", "codec", "mean", "median", "99%", "largest")
    rows = [
        (
            space.name,
            f"{space.rows[array]:,} {array}s",
            space.codec,
            *(f"{value:.5f}" for value in (error.mean, error.median, error.p99, error.largest)),
        )
        for space in spaces
        for array, error in space.error.items()
    ]
    return table_text(header, rows, right="mean median 99% largest") if rows else ""


def _datasets_text(datasets: list[DatasetSummary], features: str) -> str:
    if not datasets:
        return "no data sets"
    header = ("data set", "samples", "media", "failed")
    rows = [(d.name, f"{d.samples:,}", f"{d.media:,}", f"{d.failed:,}") for d in datasets]
    lines = table_text(header, rows, right="samples media failed").split("\n")
    for dataset in datasets:
        if dataset.mismatched:
            lines.append(
                f"{dataset.name}: samples whose source has another sha256 than they state: "
                f"{dataset.mismatched:,}"
            )
    lines += [dataset.said for dataset in datasets if dataset.said]
    for dataset in datasets:
        if dataset.notes:
            lines.append(f"{dataset.name}: used with a note: {counts_text(dataset.notes)}")
    if any(dataset.failed for dataset in datasets):
        lines.append(f"why media failed: {_list_command('--failures', features)}")
    if any(dataset.notes for dataset in datasets):
        lines.append(f"which media have notes: {_list_command('--notes', features)}")
    return lines_text(lines)


def _list_command(option: str, features: str) -> str:
    """Return the command line that lists failures or notes."""
    return command_text("python -m cache.ls", [option, "--features", features])


def _needs_text(datasets: list[DatasetSummary]) -> str:
    """Return a table of the coverage and the missing media of each data set in each space."""
    header = ("data set", "in space", "covered", "pass", "missing", "add")
    rows = [
        (
            dataset.name,
            space,
            f"{dataset.coverage[space]:.1%}",
            bytes_text(need.reads),
            f"{need.media:,}",
            bytes_text(need.nbytes),
        )
        for dataset in datasets
        for space, need in dataset.needs.items()
    ]
    if not rows:
        return ""
    commands = [need.command for d in datasets for need in d.needs.values() if need.command]
    lines = table_text(header, rows, right="covered pass missing add").split("\n")
    complete = (f"complete: {command}" for command in dict.fromkeys(commands))
    return lines_text([*lines, *LEGEND.split("\n"), *complete])


def _failures_text(failures: list[Failures]) -> str:
    if not failures:
        return "no failures"
    by_stage: dict[str, set[str]] = {stage: set() for stage in STAGES}
    for group in failures:
        by_stage[group.stage].update(group.sources)
    lines = [f"{stage:<8}{len(found):>10,} media" for stage, found in by_stage.items() if found]
    for group in failures:
        dataset = group.dataset or "no data set"
        where = f" ({group.host})" if group.host else ""
        lines += ["", f"{len(group.sources):,} in {dataset}{where}: {group.stage}: {group.error}"]
        lines += _source_lines(group.sources)
    commands = dict.fromkeys(group.command for group in failures if group.command)
    lines += ["", *(f"try them again: {command}" for command in commands)]
    return lines_text(lines)


def _notes_text(notes: list[Notes]) -> str:
    if not notes:
        return "no notes"
    lines = []
    for group in notes:
        dataset = group.dataset or "no data set"
        lines += [f"{len(group.sources):,} in {dataset}: {group.note}"]
        lines += [*_source_lines(group.sources), ""]
    return lines_text(lines[:-1])


def _source_lines(sources: list[str]) -> list[str]:
    """Return the first sources, one a line, and the number of the others."""
    # A name may hold a line break, or not be UTF-8.
    lines = [f"    {quoted(source)}" for source in sources[:SHOWN]]
    if len(sources) > SHOWN:
        lines.append(f"    and {len(sources) - SHOWN:,} more (all: --json)")
    return lines


if __name__ == "__main__":
    command(main, errors=(CacheError,))
