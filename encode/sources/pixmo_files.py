"""Find PixMo's Parquet files below `--source DIR`, or download them from the Hugging Face hub.

In both places a data set is a folder with the files of its repository: `data/train-00000-of-00004.parquet`
and so on. Only training files are used: the validation and test splits of pixmo-count have no points, and
others measure results on them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub

from configs import UserError, one_line
from model.io.hub import unreachable

log = logging.getLogger(__name__)

PATTERN = "data/*.parquet"
TRAIN = "train"
"""Beginning of the names of training files."""
OTHER_SPLITS = ("validation", "valid", "val", "test", "dev")

MAX_SHARDS = 1_000_000
"""Files that a name states, at most. More are not looked for."""

_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)")


def local_files(source: Path, name: str) -> tuple[Path, ...]:
    """Return the training files of the folder `source`/`name`, sorted."""
    return _training_files(source / name)


def missing_from(source: Path, names: list[str]) -> UserError:
    """Return the error for a `--source` that has none of the data sets `names`."""
    if not source.is_dir():
        return UserError(f"--source {source}: no such folder")
    hint = ""
    if any(source.glob(PATTERN)) and source.name in names:
        hint = f"; it seems to be {source.name} itself: --source {source.parent}"
    looked = ", ".join(f"{name}/{PATTERN}" for name in names)
    return UserError(
        f"--source {source} has none of the data sets asked for (looked for {looked}){hint}. "
        f"Get one: {_command(f'allenai/{names[0]}', str(source / names[0]))}"
    )


def hub_files(name: str, repository: str) -> tuple[Path, ...]:
    """Return the training files of a hub repository, downloaded unless they are on this machine.

    Raises:
        UserError: they cannot be downloaded; the message says how to do without the hub.
    """
    ignore = [f"data/{split}-*" for split in OTHER_SPLITS]
    folder = download(name, repository, [PATTERN], ignore)
    files = _training_files(folder)
    if not files:
        way_out = without_hub(name, repository)
        raise UserError(f"data set {name}: {repository} on the hub has no {PATTERN}; {way_out}")
    return files


def download(
    name: str, repository: str, patterns: Sequence[str], ignore: Sequence[str] = ()
) -> Path:
    """Return the folder of a hub repository's files on this machine, after downloading missing ones.

    Args:
        name: the data set, for messages.
        repository: ORG/NAME.
        patterns: of the files to download.
        ignore: patterns of files among them that are not downloaded.

    Raises:
        UserError: they cannot be downloaded; the message says how to do without the hub.
    """
    why = unreachable()
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                repo_type="dataset",
                allow_patterns=list(patterns),
                ignore_patterns=list(ignore),
                local_files_only=bool(why),
            )
        )
    # The client raises its own errors, those of its HTTP library and those of its Rust library.
    except Exception as error:
        reason = f"it is not on this machine, and {why}" if why else one_line(error)
        raise UserError(
            f"data set {name} ({repository} on the hub): {reason}; {without_hub(name, repository)}"
        ) from error


def without_hub(name: str, repository: str) -> str:
    """Return how to read a data set of the hub without a connection to it, the end of an error."""
    command = _command(repository, f"DIR/{name}")
    return f"download it where that works ({command}) and give --source DIR"


def _training_files(folder: Path) -> tuple[Path, ...]:
    """Return the training files of `folder`, sorted, and log missing ones."""
    found = sorted(folder.glob(PATTERN))
    files = [path for path in found if path.name.startswith(TRAIN)] or [
        path for path in found if not path.name.startswith(OTHER_SPLITS)
    ]
    log_missing(folder, files)
    return tuple(path.absolute() for path in files)


def log_missing(folder: Path, files: Sequence[Path]) -> None:
    """Log which of numbered files are missing. Half a download would look like a small data set."""
    here = {str(path.with_suffix("")) for path in files}
    wanted = {
        f"{shard[1]}-{number:0{len(shard[2])}}-of-{shard[3]}"
        for shard in map(_SHARD.fullmatch, sorted(here))
        if shard
        for number in range(min(int(shard[3]), MAX_SHARDS))
    }
    if missing := sorted(wanted - here):
        log.warning(
            "%s: %d of %d files are missing (first %s); using the others",
            folder,
            len(missing),
            len(wanted),
            Path(missing[0]).name + files[0].suffix,
        )


def _command(repository: str, folder: str) -> str:
    return f"hf download {repository} --repo-type dataset --local-dir {folder}"
