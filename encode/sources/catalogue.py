"""Open data sets by the names that `--dataset` accepts.

A name is an entry or a group of configs/datasets.yaml, or `folder:PATH`. The module of a kind of data set is
imported only when one of that kind is opened.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import configs
from cache.store.samples import Sample
from configs import UserError, nearest
from encode.records.account import Account

log = logging.getLogger(__name__)

_FOLDER = re.compile(r"(?:([A-Za-z0-9][A-Za-z0-9._-]*)=)?folder:(.*)", re.DOTALL)


class Dataset(Protocol):
    """A source of samples."""

    @property
    def name(self) -> str:
        """Name of the data set in the cache."""
        ...

    @property
    def needs_sizes(self) -> bool:
        """Whether `samples` gives more text once the sizes of images are known."""
        ...

    def samples(
        self, sizes: Mapping[str, tuple[int, int]] = {}, account: Account | None = None
    ) -> Iterator[Sample]:
        """Yield all samples, in the same order and with the same ids each time.

        Args:
            account: counts what is used, ignored, left out and refused.
            sizes: source -> width and height in pixels, of the images whose size is known.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One data set in configs/datasets.yaml."""

    source: Literal["demo", "folder", "pixmo"]
    """Module of encode/sources that reads it."""
    about: str = ""
    """One line for `--list`."""
    path: str = ""
    """source folder: the folder."""
    hub: str = ""
    """source pixmo: the repository on the Hugging Face hub."""

    def __post_init__(self) -> None:
        for source, field in (("folder", "path"), ("pixmo", "hub")):
            if (self.source == source) != bool(getattr(self, field)):
                raise ValueError(f"{field} goes with source: {source}, and only with it")


def read_catalogue() -> tuple[dict[str, Entry], dict[str, tuple[str, ...]]]:
    """Return the data sets and the groups of configs/datasets.yaml.

    Raises:
        UserError: an entry is invalid, or a group names an unknown data set.
    """
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


def open_datasets(
    specs: Sequence[str], features: Path, source: Path | None = None
) -> list[Dataset]:
    """Return the data sets that `--dataset` arguments name, each once.

    Args:
        specs: names or groups of configs/datasets.yaml, `folder:PATH`, or `NAME=folder:PATH`.
        features: the feature cache, where data sets that draw their own images keep them.
        source: folder with downloaded data sets. A data set that is missing there is left out and logged.

    Raises:
        UserError: no such data set or folder, `source` has none of the data sets, or two different folders
            have one name.
    """
    entries, groups = read_catalogue()
    source = source and source.expanduser()
    opened: dict[str, Dataset] = {}
    missing: dict[str, None] = {}
    for spec in specs:
        for name, dataset in _open(spec, entries, groups, features, source):
            if dataset is None:
                missing[name] = None
                continue
            other = opened.setdefault(name, dataset)
            if _identity(other) != _identity(dataset):
                raise UserError(
                    f"{_identity(other)} and {_identity(dataset)} would both be the data set {name!r}; "
                    f"name one of them: --dataset NAME=folder:{_identity(dataset)}"
                )
    if source is not None:
        found = any(name in entries and entries[name].source == "pixmo" for name in opened)
        if not found and not missing:
            raise UserError(f"--source {source}: no data set named by --dataset is read from there")
        if not found:
            from encode.sources.pixmo_files import missing_from

            raise missing_from(source, list(missing))
        for name in missing:
            log.warning("data set %s is not below --source %s: left out", name, source)
    return list(opened.values())


def _identity(dataset: Dataset) -> str:
    return str(getattr(dataset, "folder", dataset.name))


def _open(
    spec: str,
    entries: Mapping[str, Entry],
    groups: Mapping[str, tuple[str, ...]],
    features: Path,
    source: Path | None,
) -> Iterator[tuple[str, Dataset | None]]:
    """Yield the data sets of one argument by name; None for one that is missing in `source`."""
    if folder := _FOLDER.fullmatch(spec):
        from encode.sources.folder import FolderDataset

        dataset = FolderDataset.open(folder[2], name=folder[1], leave_out=features)
        if dataset.name in entries or dataset.name in groups:
            raise UserError(
                f"folder:{folder[2]}: the name {dataset.name!r} belongs to a data set of "
                f"configs/datasets.yaml; give it another: --dataset NAME=folder:{folder[2]}"
            )
        yield dataset.name, dataset
    elif spec in groups or spec in entries:
        for name in groups.get(spec, (spec,)):
            yield name, _open_entry(name, entries[name], features, source)
    else:
        known = [*entries, *groups]
        hint = nearest(spec, known)
        if Path(spec).expanduser().is_dir():
            hint = f"; for a folder of images: --dataset folder:{spec}"
        raise UserError(f"--dataset {spec}: no such data set; there are {', '.join(known)}{hint}")


def _open_entry(name: str, entry: Entry, features: Path, source: Path | None) -> Dataset | None:
    """Return a data set of the catalogue; None if it is missing in `source`."""
    if entry.source == "folder":
        from encode.sources.folder import FolderDataset

        return FolderDataset.open(entry.path, name=name, leave_out=features)
    if entry.source == "demo":
        from encode.sources.demo import DemoDataset

        return DemoDataset.open(name, features)
    from encode.sources.pixmo import PixmoDataset

    return PixmoDataset.open(name, entry.hub, source)
