"""Find PixMo's Parquet files below `--source DIR`, or download them from the Hugging Face hub.

In both places a data set is a folder with the files of its repository: `data/train-00000-of-00004.parquet`
and so on. Only training files are used: the validation and test splits of pixmo-count have no points, and
others measure results on them.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import huggingface_hub

from configs import UserError, one_line
from model.io.hub import unreachable

log = logging.getLogger(__name__)

PATTERN = "data/*.parquet"
TRAIN = "train"
"""Beginning of the names of training files."""
OTHER_SPLITS = ("validation", "valid", "val", "test", "dev")

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
    way_out = f"download it where that works ({_command(repository, f'DIR/{name}')}) and give --source DIR"
    why = unreachable()
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            repo_type="dataset",
            allow_patterns=[PATTERN],
            ignore_patterns=[f"data/{split}-*" for split in OTHER_SPLITS],
            local_files_only=bool(why),
        )
    # The client raises its own errors, those of its HTTP library and those of its Rust library.
    except Exception as error:
        reason = f"it is not on this machine, and {why}" if why else one_line(error)
        raise UserError(
            f"data set {name} ({repository} on the hub): {reason}; {way_out}"
        ) from error
    files = _training_files(Path(folder))
    if not files:
        raise UserError(f"data set {name}: {repository} on the hub has no {PATTERN}; {way_out}")
    return files


def _training_files(folder: Path) -> tuple[Path, ...]:
    """Return the training files of `folder`, sorted, and log missing ones.

    Without the log, half a download would look like a small data set.
    """
    found = sorted(folder.glob(PATTERN))
    files = [path for path in found if path.name.startswith(TRAIN)] or [
        path for path in found if not path.name.startswith(OTHER_SPLITS)
    ]
    here = {path.stem for path in files}
    wanted = {
        f"{shard[1]}-{number:0{len(shard[2])}}-of-{shard[3]}"
        for shard in map(_SHARD.fullmatch, sorted(here))
        if shard
        for number in range(int(shard[3]))
    }
    if missing := sorted(wanted - here):
        log.warning(
            "%s: %d of %d files are missing (first %s.parquet); using the others",
            folder,
            len(missing),
            len(wanted),
            missing[0],
        )
    return tuple(path.absolute() for path in files)


def _command(repository: str, folder: str) -> str:
    return f"hf download {repository} --repo-type dataset --local-dir {folder}"
