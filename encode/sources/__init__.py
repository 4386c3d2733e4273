"""Data sets by the names `--dataset` takes: a name or group of configs/datasets.yaml, or `folder:PATH`.

A data set has a name and yields samples; a media in them is named by the absolute path of its file.
One module per family of data sets, imported when it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import configs
from cache.tables import Sample
from configs import UserError, nearest

FOLDER = "folder:"
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(folder:.*)", re.DOTALL)


class Dataset(Protocol):
    """What every source of samples offers."""

    @property
    def name(self) -> str:
        """Folder name of its samples in the cache."""
        ...

    def samples(self) -> Iterator[Sample]:
        """All samples, in the same order each time."""
        ...


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One data set in configs/datasets.yaml."""

    source: Literal["demo", "folder"]
    """Which module of encode/sources reads it."""
    about: str = ""
    """One line for `--list`."""
    path: str = ""
    """source folder: the folder."""

    def __post_init__(self) -> None:
        if (self.source == "folder") != bool(self.path):
            raise ValueError("path goes with source: folder, and only with it")


def catalogue() -> tuple[dict[str, Entry], dict[str, tuple[str, ...]]]:
    """The data sets and the groups that configs/datasets.yaml names."""
    values = configs.load("datasets")
    where = "configs/datasets.yaml"
    entries = {
        str(name): configs.build(Entry, entry, f"{where}: {name}")
        for name, entry in _mapping(values, "datasets").items()
    }
    groups = {str(name): tuple(members) for name, members in _mapping(values, "groups").items()}
    for group, members in groups.items():
        for member in members:
            if member not in entries:
                raise UserError(
                    f"{where}: group {group} names {member!r}, which is no data set there"
                    f"{nearest(member, entries)}"
                )
    return entries, groups


def _mapping(values: Mapping[str, object], key: str) -> Mapping[str, dict]:  # type: ignore[type-arg]
    found = values.get(key) or {}
    if not isinstance(found, Mapping):
        raise UserError(f"configs/datasets.yaml: {key}: expected names and their values")
    return found


def open_dataset(spec: str, features: Path) -> list[Dataset]:
    """The data sets that one `--dataset` argument names.

    Args:
        spec: a name or a group of configs/datasets.yaml, `folder:PATH`, or `NAME=folder:PATH`.
        features: the feature cache: where data sets that make their own pictures keep them.

    Raises:
        UserError: no such data set or folder.
    """
    named = _NAMED.fullmatch(spec)
    entries, groups = catalogue()
    if spec.startswith(FOLDER) or named:
        path = (named[2] if named else spec).removeprefix(FOLDER)
        return [
            _open_folder(path, features, named[1] if named else None, taken={*entries, *groups})
        ]
    if spec in groups:
        return [_open_entry(name, entries[name], features) for name in groups[spec]]
    if spec in entries:
        return [_open_entry(spec, entries[spec], features)]
    known = [*entries, *groups]
    hint = nearest(spec, known)
    if Path(spec).expanduser().is_dir():
        hint = f"; for a folder of pictures: --dataset folder:{spec}"
    raise UserError(f"--dataset {spec}: no such data set; there are {', '.join(known)}{hint}")


def open_datasets(specs: Sequence[str], features: Path) -> list[Dataset]:
    """The data sets of several arguments; one named twice is opened once.

    Raises:
        UserError: as `open_dataset`, or two different folders would share a name.
    """
    opened: dict[str, tuple[str, Dataset]] = {}
    for spec in specs:
        for dataset in open_dataset(spec, features):
            identity = str(getattr(dataset, "folder", dataset.name))
            other = opened.setdefault(dataset.name, (identity, dataset))
            if other[0] != identity:
                raise UserError(
                    f"{other[0]} and {identity} would both be the data set {dataset.name!r}; "
                    f"name one of them: --dataset NAME=folder:{identity}"
                )
    return [dataset for _, dataset in opened.values()]


def _open_folder(
    path: str, features: Path, name: str | None, taken: Collection[str] = ()
) -> Dataset:
    from encode.sources.folder import FolderDataset

    dataset = FolderDataset.open(path, name=name, leave_out=features)
    if dataset.name in taken:
        raise UserError(
            f"folder:{path}: the name {dataset.name!r} belongs to a data set of configs/datasets.yaml; "
            f"give it another: --dataset NAME=folder:{path}"
        )
    return dataset


def _open_entry(name: str, entry: Entry, features: Path) -> Dataset:
    if entry.source == "folder":
        return _open_folder(entry.path, features, name)
    from encode.sources.demo import DemoDataset

    return DemoDataset.open(name, features)
