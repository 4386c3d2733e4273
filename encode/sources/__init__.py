"""Data sets by the names `--dataset` takes: a name or group of configs/datasets.yaml, or `folder:PATH`.

A data set has a name and yields samples; a media in them is named by its URL or by the absolute path of its
file. What comes from the hub (PixMo) may as well lie below the folder that `--source` names.
One module per family of data sets, imported when it is asked for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import configs
from cache.store.samples import Sample
from configs import UserError, nearest

log = logging.getLogger(__name__)

FOLDER = "folder:"
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(folder:.*)", re.DOTALL)


class Dataset(Protocol):
    """What every source of samples offers."""

    @property
    def name(self) -> str:
        """Folder name of its samples in the cache."""
        ...

    @property
    def needs_sizes(self) -> bool:
        """Whether `samples` says more once it is told the sizes of images."""
        ...

    def samples(self, sizes: Mapping[str, tuple[int, int]] = {}) -> Iterator[Sample]:
        """All samples, in the same order and with the same ids each time.

        Args:
            sizes: source -> width and height in pixels, of the images whose size is known by now.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One data set in configs/datasets.yaml."""

    source: Literal["demo", "folder", "pixmo"]
    """Which module of encode/sources reads it."""
    about: str = ""
    """One line for `--list`."""
    path: str = ""
    """source folder: the folder."""
    hub: str = ""
    """source pixmo: the repository on the Hugging Face hub."""

    def __post_init__(self) -> None:
        if (self.source == "folder") != bool(self.path):
            raise ValueError("path goes with source: folder, and only with it")
        if (self.source == "pixmo") != bool(self.hub):
            raise ValueError("hub goes with source: pixmo, and only with it")


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


def open_dataset(spec: str, features: Path, source: Path | None = None) -> list[Dataset]:
    """The data sets that one `--dataset` argument names; see `open_datasets`."""
    return open_datasets([spec], features, source)


def open_datasets(
    specs: Sequence[str], features: Path, source: Path | None = None
) -> list[Dataset]:
    """The data sets of several arguments; one named twice is opened once.

    Args:
        specs: each a name or a group of configs/datasets.yaml, `folder:PATH`, or `NAME=folder:PATH`.
        features: the feature cache: where data sets that make their own images keep them.
        source: folder with the files of data sets that are otherwise downloaded. One that is not there is
            left out, and named in the log.

    Raises:
        UserError: no such data set or folder, nothing of what `source` should have, or two different
            folders that would share a name.
    """
    files = _Source(path=source and source.expanduser())
    opened: dict[str, tuple[str, Dataset]] = {}
    for spec in specs:
        for dataset in _open(spec, features, files):
            identity = str(getattr(dataset, "folder", dataset.name))
            other = opened.setdefault(dataset.name, (identity, dataset))
            if other[0] != identity:
                raise UserError(
                    f"{other[0]} and {identity} would both be the data set {dataset.name!r}; "
                    f"name one of them: --dataset NAME=folder:{identity}"
                )
    files.check()
    return [dataset for _, dataset in opened.values()]


@dataclass(kw_only=True)
class _Source:
    """What `--source` was asked for, and what of it was there."""

    path: Path | None
    """Its folder; None: everything comes from the hub."""
    found: dict[str, None] = field(default_factory=dict)
    """Names of the data sets that are read from it, in order."""
    absent: dict[str, None] = field(default_factory=dict)
    """Names of those that it lacks."""

    def check(self) -> None:
        """Name what is missing in the log; refuse a folder that is of no use at all."""
        if self.path is None:
            return
        if not self.found and not self.absent:
            raise UserError(
                f"--source {self.path}: no data set named by --dataset is read from there"
            )
        if not self.found:
            from encode.sources.pixmo_files import missing_from

            raise missing_from(self.path, list(self.absent))
        for name in self.absent:
            log.warning("data set %s is not below --source %s: left out", name, self.path)


def _open(spec: str, features: Path, files: _Source) -> Iterator[Dataset]:
    """The data sets that one `--dataset` argument names."""
    entries, groups = catalogue()
    named = _NAMED.fullmatch(spec)
    if spec.startswith(FOLDER) or named:
        path = (named[2] if named else spec).removeprefix(FOLDER)
        name = named[1] if named else None
        yield _open_folder(path, features, name, taken={*entries, *groups})
    elif spec in groups or spec in entries:
        for name in groups.get(spec, (spec,)):
            dataset = _open_entry(name, entries[name], features, files)
            if dataset is not None:
                yield dataset
    else:
        known = [*entries, *groups]
        hint = nearest(spec, known)
        if Path(spec).expanduser().is_dir():
            hint = f"; for a folder of images: --dataset folder:{spec}"
        raise UserError(f"--dataset {spec}: no such data set; there are {', '.join(known)}{hint}")


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


def _open_entry(name: str, entry: Entry, features: Path, files: _Source) -> Dataset | None:
    """A data set of the catalogue; None when it should be below `--source` and is not."""
    if entry.source == "folder":
        return _open_folder(entry.path, features, name)
    if entry.source == "demo":
        from encode.sources.demo import DemoDataset

        return DemoDataset.open(name, features)
    from encode.sources.pixmo import PixmoDataset

    dataset = PixmoDataset.open(name, entry.hub, files.path)
    (files.absent if dataset is None else files.found)[name] = None
    return dataset
