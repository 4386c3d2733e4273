"""Find the files of a Hugging Face data set: in a local copy, or on the hub.

    found = open_local(Path("/data/the_cauldron"), "ai2d")
    found = open_hub("the_cauldron-ai2d", "HuggingFaceM4/the_cauldron", "ai2d", source=None)
    found.files                     # its Parquet or Arrow files of training splits, sorted

A repository may have several data sets, its configs. The card, README.md, says which files each of them has;
without that, each folder with files is one. A folder that `save_to_disk` wrote has one, as Arrow files. Only
training files are used: others measure results on the validation and test splits.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub

from cache.errors import EmbeddedMediaError
from cache.format.gate import check_regular, open_regular
from configs import UserError, nearest, one_line, yaml_text
from model.io.hub import unreachable
from model.language.files import hub_error

log = logging.getLogger(__name__)

OTHER_SPLITS = ("validation", "valid", "val", "test", "dev")
"""Beginnings of the names of splits that are not for training."""
TABLES = (".parquet", ".arrow")
"""Suffixes of the files that are read."""
CARD = "README.md"
LFS_POINTER = b"version https://git-lfs"
MAX_CARD_BYTES = 8 << 20
SHOWN = 30
"""Names of configs that an error lists."""

MAX_SHARDS = 1_000_000
"""Files that a name states, at most. More are not looked for."""

_SHARD = re.compile(r"(.*)-(\d+)-of-(\d+)", re.DOTALL)
_BESIDE = re.compile(
    r"README.*|LICEN[CS]E.*|.*\.(?:md|lock|metadata|gitattributes)|dataset_infos?\.json"
    r"|dataset_dict\.json|state\.json|\..*|cache-.*\.arrow",
    re.IGNORECASE,
)
"""Names of files beside the data."""
_SPLIT = re.compile(
    rf"(?:.*[-_.])?(?P<split>{'|'.join((*OTHER_SPLITS, 'testing', 'eval', 'evaluation'))})"
    r"(?:[-_.]?\d.*|[-_.].*)?",
    re.IGNORECASE,
)
_TRAIN = re.compile(r"(?:.*[-_.])?train(?:ing)?(?:[-_.].*|\d.*)?", re.IGNORECASE)

Patterns = list[tuple[str, str]]
"""Split, or '' where the name of the file tells, and pattern of files below the repository's folder."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The files of one data set."""

    folder: Path
    """Folder of the repository, or of the file."""
    files: tuple[Path, ...]
    """Its training files, sorted; absolute."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason -> files that are not used."""


def open_local(path: Path, config: str = "") -> Found:
    """Return the files of a local copy of a data set, or of one file.

    Args:
        path: a folder, or a file.
        config: which of the repository's data sets; empty: the only one.

    Raises:
        UserError: there is no such folder, config or training file.
    """
    path = path.absolute()
    if path.is_file():
        hint = _other_kind(path)
        if hint:
            raise UserError(f"hf:{path}: no Parquet or Arrow file{hint}")
        return Found(folder=path.parent, files=(path,))
    if not path.is_dir():
        raise UserError(f"hf:{path}: {_why_no_folder(path)}")
    found = _choose(path, config, f"hf:{path}")
    _log_missing(path, found.files)
    return found


def _why_no_folder(path: Path) -> str:
    try:
        check_regular(path)
    except FileNotFoundError:
        return "no such folder or file"
    except OSError as error:
        return str(error.strerror)
    return "not a folder"


def open_hub(name: str, repository: str, config: str, source: Path | None) -> Found | None:
    """Return the files of a data set of the hub.

    Args:
        name: the data set, for messages.
        repository: ORG/NAME.
        config: which of the repository's data sets; empty: the only one.
        source: folder with local copies; None: it is downloaded unless it is on this machine.

    Returns:
        None if `source` has no copy.

    Raises:
        UserError: it cannot be downloaded, or there is no such config or training file.
    """
    if source is not None:
        copy = _local_copy(source, repository)
        if copy is None:
            return None
        found = _choose(copy, config, f"hf:{repository}")
        _log_missing(copy, found.files)
        return found
    spec = f"hf:{repository}"
    folder = _download(name, repository, config, [CARD])
    configs = _declared(folder)
    if not configs:
        configs = _by_folder(_listing(name, repository, config, folder))
    chosen = [(s or _split_of(Path(p)), p) for s, p in configs[_config(configs, config, spec)]]
    training = _training_splits(split for split, _ in chosen)
    patterns = [pattern for split, pattern in chosen if split in training]
    if not patterns:
        splits = ", ".join(dict.fromkeys(split for split, _ in chosen))
        raise UserError(f"{spec} has no training files, only {splits}")
    folder = _download(name, repository, config, [CARD, *patterns, *(f"{p}/**" for p in patterns)])
    found = _choose(folder, config, spec, configs)
    _log_missing(folder, found.files)
    return found


def missing_from(source: Path, repositories: Mapping[str, str]) -> UserError:
    """Return the error for a `--source` that has none of the data sets asked for.

    Args:
        source: the folder.
        repositories: data set -> its repository, ORG/NAME.
    """
    if not source.is_dir():
        return UserError(f"--source {source}: no such folder")
    names = list(dict.fromkeys(one.rpartition("/")[2] for one in repositories.values()))
    first = next(iter(repositories.values()))
    copy = ""
    if any(next(source.glob(pattern), None) for pattern in ("*.parquet", "*/*.parquet")):
        word = shlex.quote(f"hf:{source.resolve()}")
        copy = f" If it is a copy itself: --dataset {word} (:CONFIG) without --source."
    return UserError(
        f"--source {source} has none of the data sets asked for (looked for the folders "
        f"{', '.join(names)}).{copy} Get one: {_command(first, str(source))}"
    )


def _local_copy(source: Path, repository: str) -> Path | None:
    """Return the folder of a repository's copy: in `source`, or `source` itself."""
    org, _, name = repository.rpartition("/")
    places = [source / name, source / org / name, source / f"{org}__{name}"]
    stored = f"datasets--{org}--{name}"  # as the hub's client stores it
    snapshots = (source if source.name == stored else source / stored) / "snapshots"
    if source.parent.parent.name == stored:
        places.append(source)
    elif snapshots.is_dir():
        places += sorted(snapshots.iterdir(), key=lambda path: path.stat().st_mtime)[-1:]
    if source.name in (name, f"{org}__{name}"):
        places.append(source)
    return next((place.absolute() for place in places if place.is_dir()), None)


# ---- the hub


def _download(name: str, repository: str, config: str, patterns: Sequence[str]) -> Path:
    """Return the folder of a hub repository's files on this machine, after downloading missing ones.

    Args:
        name: the data set, for messages.
        repository: ORG/NAME.
        config: for messages.
        patterns: of the files to download.

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
                ignore_patterns=[
                    f"{at}{split}-*-of-*" for split in OTHER_SPLITS for at in ("", "*/")
                ],
                local_files_only=bool(why),
            )
        )
    # The client raises its own errors, those of its HTTP library and those of its Rust library.
    except Exception as error:
        reason = f"it is not on this machine, and {why}" if why else hub_error(error)
        raise UserError(
            f"data set {name} ({repository} on the hub): {reason}; {_without_hub(repository, config)}"
        ) from error


def _without_hub(repository: str, config: str) -> str:
    """Return how to read a data set of the hub without a connection to it, the end of an error."""
    return f"download it where that works ({_command(repository, 'DIR', config)}) and give --source DIR"


def _command(repository: str, folder: str, config: str = "") -> str:
    """Return the command that makes a local copy in `folder`, for --source."""
    target = shlex.quote(f"{folder}/{repository.rpartition('/')[2]}")
    part = f" --include {CARD} --include {shlex.quote(f'{config}/*')}" if config else ""
    return f"hf download {repository} --repo-type dataset{part} --local-dir {target}"


# ---- configs


def _choose(
    folder: Path, config: str, spec: str, configs: Mapping[str, Patterns] | None = None
) -> Found:
    """Return the files of one config of the copy in `folder`."""
    if saved := _saved(folder):
        if config:
            folder = folder / config
            saved = _saved(folder)
            if not saved:
                raise UserError(f"{spec}: no data set {config!r} in {folder.parent}")
        return _training(folder, saved, spec)
    configs = configs or _declared(folder)
    others: Counter[str] = Counter()
    if not configs:
        paths = _walk(folder)
        configs = _by_folder(paths)
        if len(configs) == 1:
            others = _not_tables(map(Path, paths))
    if not configs:
        raise _no_tables(folder, spec)
    chosen = configs[_config(configs, config, spec)]
    files: dict[Path, str] = {}
    for split, pattern in chosen:
        for path in _matches(folder, pattern):
            files.setdefault(path, split or _split_of(path.relative_to(folder)))
    others += _not_tables(files)
    tables = {path: split for path, split in files.items() if _is_table(path)}
    if not tables:
        raise _no_tables(folder, spec)
    return _training(folder, tables, spec, others)


def _config(configs: Mapping[str, Patterns], config: str, spec: str) -> str:
    """Return the name of the config that is meant."""
    if config in configs:
        return config
    names = list(configs)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    listed = f"{', '.join(names[:SHOWN])}{more}"
    if config:
        raise UserError(f"{spec} has no {config!r}; there are {listed}{nearest(config, names)}")
    if len(names) == 1:
        return names[0]
    if "default" in configs:
        return "default"
    raise UserError(
        f"{spec} has {len(names)} data sets: {listed}; name one: "
        f"--dataset {shlex.quote(f'{spec}:{names[0]}')}"
    )


def _declared(folder: Path) -> dict[str, Patterns]:
    """Return config -> its files, as the card says; empty if it does not."""
    try:
        with open_regular(folder / CARD) as file:
            text = file.read(MAX_CARD_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(
            f"{folder / CARD}: cannot be read ({error.strerror}); it may name the files, so put the card of "
            "the data set in its place, or remove it"
        ) from None
    header = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    try:
        values = yaml_text.parse(header[1], strict=False) if header else None
    except ValueError:
        return {}
    listed = values.get("configs") if isinstance(values, dict) else None
    found: dict[str, Patterns] = {}
    for entry in listed if isinstance(listed, list) else ():
        if not isinstance(entry, dict) or not isinstance(entry.get("config_name"), str):
            continue
        patterns = list(_patterns(entry.get("data_files"), ""))
        if not patterns and isinstance(entry.get("data_dir"), str):
            patterns = [("", entry["data_dir"])]
        if patterns:
            found[entry["config_name"]] = [(s, p) for s, p in patterns if _is_inside(p)]
    return found


def _patterns(value: Any, split: str) -> Iterator[tuple[str, str]]:
    """Yield split and pattern of each entry of `data_files`."""
    if isinstance(value, str):
        yield split, value
    elif isinstance(value, list):
        for item in value:
            yield from _patterns(item, split)
    elif isinstance(value, dict) and "path" in value:
        yield from _patterns(value["path"], str(value.get("split") or split))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _patterns(item, str(key))


def _is_inside(pattern: str) -> bool:
    """Return whether a pattern of the card names files of the repository."""
    path = PurePosixPath(pattern)
    return bool(path.parts) and not path.is_absolute() and not {"..", "~"} & set(path.parts)


def _by_folder(paths: Sequence[str]) -> dict[str, Patterns]:
    """Return config -> its files, a folder being a config unless it is `data` or named as a split."""
    found: dict[str, Patterns] = {}
    for path in paths:
        if not path.endswith(TABLES):
            continue
        folders = [part for part in PurePosixPath(path).parts[:-1] if part != "data"]
        while folders and (_SPLIT.fullmatch(folders[-1]) or _TRAIN.fullmatch(folders[-1])):
            folders.pop()
        found.setdefault("/".join(folders) or "default", []).append(("", _literal(path)))
    return found


def _literal(path: str) -> str:
    """Return a pattern that matches one path."""
    return re.sub(r"([*?[])", r"[\1]", path)


def _listing(name: str, repository: str, config: str, folder: Path) -> list[str]:
    """Return the paths of a repository's files, on the hub or, without network, on this machine."""
    if unreachable():
        return _walk(folder)
    try:
        found = huggingface_hub.HfApi().list_repo_files(repository, repo_type="dataset")
    except Exception as error:  # as in `download`
        raise UserError(
            f"data set {name} ({repository} on the hub): {hub_error(error)}; "
            f"{_without_hub(repository, config)}"
        ) from error
    if not any(path.endswith(TABLES) for path in found):
        raise UserError(
            f"data set {name}: {repository} on the hub has no Parquet files. The hub may have converted "
            f"it: hf download {repository} --repo-type dataset --revision refs/convert/parquet "
            f"--local-dir DIR/{repository.rpartition('/')[2]}, then --source DIR"
        )
    return sorted(found)


def _walk(folder: Path) -> list[str]:
    """Return the paths of the files below `folder`, relative to it, without hidden ones."""
    # Not `is_file`: a link whose target is gone is a file that is missing.
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(
        path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)
    )


def _matches(folder: Path, pattern: str) -> Iterator[Path]:
    literal = folder / pattern
    # `glob` does not find a link whose target is gone.
    found = [literal] if literal.is_symlink() else sorted(folder.glob(pattern))
    for path in found:
        for one in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if not one.is_dir() and not _BESIDE.fullmatch(one.name):
                yield one


# ---- splits


def _training(
    folder: Path, files: Mapping[Path, str], spec: str, others: Mapping[str, int] | None = None
) -> Found:
    """Return the training files among `files`, which maps each file to its split."""
    splits = Counter(files.values())
    training = _training_splits(splits)
    if not training:
        first = next(iter(files))
        raise UserError(
            f"{spec} has no training files, only {', '.join(sorted(splits))}; to use one: "
            f"--dataset {shlex.quote(f'hf:{first}')}"
        )
    left_out = Counter(others or {})
    left_out.update({f"file of split {s}": n for s, n in splits.items() if s not in training})
    chosen = sorted(path.absolute() for path, split in files.items() if split in training)
    return Found(folder=folder, files=tuple(chosen), left_out=left_out)


def _training_splits(splits: Iterable[str]) -> list[str]:
    """Return the splits to train on: those named so, or else all but those for validation and test."""
    names = list(dict.fromkeys(splits))
    return [name for name in names if name.startswith("train")] or [
        name for name in names if not name.startswith(OTHER_SPLITS)
    ]


def _split_of(path: Path) -> str:
    """Return the split of a file by its name, or by the name of its folder."""
    for name in (path.stem, *reversed(path.parts[:-1])):
        if _TRAIN.fullmatch(name):
            return "train"
        if found := _SPLIT.fullmatch(name):
            return found["split"].lower()
    return "train"


def _saved(folder: Path) -> dict[Path, str]:
    """Return the files that `save_to_disk` wrote, with their splits; empty if it did not."""
    if (folder / "state.json").is_file():
        return dict.fromkeys(
            sorted(folder.glob("data-*.arrow")) or sorted(folder.glob("*.arrow")), "train"
        )
    if not (folder / "dataset_dict.json").is_file():
        return {}
    return {
        path: state.parent.name
        for state in sorted(folder.glob("*/state.json"))
        for path in sorted(state.parent.glob("*.arrow"))
        if not _BESIDE.fullmatch(path.name)
    }


def _not_tables(files: Iterable[Path]) -> Counter[str]:
    """Count the files that are neither read nor text beside the data, by their suffix."""
    return Counter(
        f"{path.suffix or path.name} file"
        for path in files
        if not _is_table(path) and not _BESIDE.fullmatch(path.name)
    )


def _log_missing(folder: Path, files: Sequence[Path]) -> None:
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


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in TABLES


def _no_tables(folder: Path, spec: str) -> UserError:
    """Return the error for a folder without tables, with what it has instead."""
    files = [folder / name for name in _walk(folder)]
    kinds = _not_tables(files)
    there = [f"{times:,} {kind.removesuffix(' file')}" for kind, times in kinds.most_common(8)]
    hint = next(filter(None, map(_other_kind, files)), "")
    there_are = ", ".join(there) or "none"
    return UserError(f"{spec}: no Parquet or Arrow files in {folder} (there are {there_are}){hint}")


def _other_kind(path: Path) -> str:
    """Return how to read a file that is no table, the end of an error; empty if there is no way."""
    kinds = {".tar": "webdataset", **dict.fromkeys((".json", ".jsonl", ".csv", ".tsv"), "json")}
    kind = kinds.get(path.suffix.lower())
    return f"; for {path.name}: --dataset {shlex.quote(f'{kind}:{path}')}" if kind else ""


def why_unreadable(path: Path, error: Exception) -> str:
    """Return what is wrong with a downloaded file, in one line."""
    try:
        with open_regular(path) as file:
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as failed:
        return f"cannot be read ({failed.strerror})"
    if pointer:
        return "a Git LFS pointer, not the data: fetch it with git lfs pull"
    if isinstance(error, EmbeddedMediaError):
        return str(error)
    return f"damaged file ({one_line(error)}); download it again"
