"""Open data sets by the names that `--dataset` accepts.

    holidays                        an entry or a group of configs/datasets.yaml, or of the user's own file
    folder:PATH                     a folder of images and videos
    json:FILE                       a file of conversations, questions or captions, which names its media
    hf:ORG/NAME[:CONFIG]            a data set of the Hugging Face hub
    webdataset:GLOB                 tars of images and texts
    NAME=folder:PATH, ...           each of these under a name of your choice

`choose` finds the entries, `open_datasets` opens them. The module of a kind of data set is imported only when
one of that kind is opened: `_OPENERS` has a function for each.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import configs
from cache.store.paths import DATASET_NAME, CacheRoot, as_dataset_name, is_dataset_name
from cache.store.samples import Sample, dataset_names, dataset_words
from configs import UserError, nearest, one_line
from configs.command_line import CommandLine, command_text, merge, with_options
from encode.records.account import Account

log = logging.getLogger(__name__)

Source = Literal["demo", "folder", "hf", "json", "pixmo", "webdataset"]


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

    @property
    def folders(self) -> Sequence[Path]:
        """Folders below which its media are, or the files that contain them; absolute paths."""
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

    source: Source
    """Kind of data set: a key of `_OPENERS`."""
    about: str = ""
    """One line for `--list`."""
    path: str = ""
    """source folder: the folder. json: the file. webdataset: a pattern of tars. hf: a local copy."""
    hub: str = ""
    """source pixmo, hf: the repository on the Hugging Face hub, ORG/NAME."""
    config: str = ""
    """source hf: which of the repository's data sets."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """source hf: what a column is for -> its name, where it is not detected: see `encode.sources.tables`."""
    where: tuple[str, ...] = ()
    """source hf: conditions on rows, such as `ratings >= 4`."""
    media: str = ""
    """source json, hf: folder of the media that it names."""
    rows: int | None = None
    """Rows, for `--list`."""
    text_bytes: float | None = None
    """Bytes of its text, for `--list`."""
    media_bytes: float | None = None
    """Bytes of its media, for `--list`."""
    images: int | None = None
    """Distinct images, or about as many, for `--list`."""

    def __post_init__(self) -> None:
        allowed = _FIELDS[self.source]
        for name in ("path", "hub", "config", "columns", "where", "media"):
            if getattr(self, name) and name not in allowed:
                raise ValueError(f"{name} does not go with source: {self.source}")
        needs = [name for name in allowed if name in ("path", "hub")]
        if needs and sum(bool(getattr(self, name)) for name in needs) != 1:
            raise ValueError(f"source: {self.source} needs {' or '.join(needs)}")

    @property
    def spec(self) -> str:
        """The `KIND:PLACE` that opens it without an entry; '' for kinds that need one."""
        place = self.path or self.hub
        place = f"{place}:{self.config}" if self.config else place
        return f"{self.source}:{place}" if self.source in SPEC_KINDS else ""


_FIELDS: Mapping[Source, tuple[str, ...]] = {
    "demo": (),
    "folder": ("path",),
    "hf": ("path", "hub", "config", "columns", "where", "media"),
    "json": ("path", "media"),
    "pixmo": ("hub",),
    "webdataset": ("path",),
}
"""Fields of an entry of each source."""

SPEC_KINDS: Mapping[str, str] = {
    "folder": "folder:PATH",
    "hf": "hf:ORG/NAME[:CONFIG]",
    "json": "json:FILE",
    "webdataset": "webdataset:GLOB",
}
"""Kind of a data set without an entry -> how `--dataset` writes it."""

COMMAND = CommandLine("python -m encode.run", ())
"""The command that is suggested, if the user's is not known."""
_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.+-]+))?", re.ASCII)
_SPEC = re.compile(
    rf"(?:(?P<name>(?!(?:{'|'.join(SPEC_KINDS)}):)[^=]*)=)?(?P<kind>\w+):(?P<place>.*)", re.DOTALL
)


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where data sets are opened."""

    features: Path
    """The feature cache: data sets that draw their own images keep them there, and folders leave it out."""
    source: Path | None = None
    """Folder with downloaded data sets, instead of the hub."""
    media: Path | None = None
    """Folder of the media that data sets name, instead of their own."""


# ---- the openers: one for each kind


def _open_demo(name: str, entry: Entry, places: Places) -> Dataset:  # noqa: ARG001
    from encode.sources.demo import DemoDataset

    return DemoDataset.open(name, places.features)


def _open_folder(name: str, entry: Entry, places: Places) -> Dataset:
    from encode.sources.folder import FolderDataset

    return FolderDataset.open(entry.path, name=name, leave_out=places.features)


def _open_json(name: str, entry: Entry, places: Places) -> Dataset:
    from encode.sources.json_file import JsonDataset

    media = places.media or (Path(entry.media) if entry.media else None)
    return JsonDataset.open(entry.path, name=name, media=media)


def _open_hf(name: str, entry: Entry, places: Places) -> Dataset | None:
    from encode.sources.hub_files import open_hub, open_local
    from encode.sources.tables import TableDataset

    if entry.path:
        found = open_local(Path(entry.path), entry.config)
    else:
        copy = open_hub(name, entry.hub, entry.config, places.source)
        if copy is None:
            return None
        found = copy
    return TableDataset(
        name=name,
        folder=found.folder,
        files=found.files,
        columns=entry.columns,
        where=entry.where,
        media=places.media or (Path(entry.media) if entry.media else None),
        left_out=found.left_out,
    )


def _open_pixmo(name: str, entry: Entry, places: Places) -> Dataset | None:
    from encode.sources.pixmo import PixmoDataset

    return PixmoDataset.open(name, entry.hub, places.source)


def _open_webdataset(name: str, entry: Entry, places: Places) -> Dataset:  # noqa: ARG001
    from encode.sources.webdataset import WebDataset

    return WebDataset.open(entry.path, name=name)


_OPENERS: dict[str, Callable[[str, Entry, Places], Dataset | None]] = {
    "demo": _open_demo,
    "folder": _open_folder,
    "hf": _open_hf,
    "json": _open_json,
    "pixmo": _open_pixmo,
    "webdataset": _open_webdataset,
}
"""Source -> opens an entry under a name; None if it is missing in `Places.source`."""

FROM_SOURCE = ("pixmo", "hf")
"""Sources that `--source` applies to."""
WITH_MEDIA = ("json", "hf")
"""Sources that `--media` applies to."""


# ---- the files of entries


def read_catalogue() -> tuple[dict[str, Entry], dict[str, tuple[str, ...]]]:
    """Return the data sets and the groups of configs/datasets.yaml, with the user's own over them.

    Raises:
        UserError: an entry is invalid, or a group names an unknown data set.
    """
    values = configs.load("datasets")
    entries: dict[str, Entry] = {}
    for name, value in _mapping(values, "datasets").items():
        where = f"{configs.where_is('datasets', name)}: {name}"
        if not isinstance(name, str) or not is_dataset_name(name):
            raise UserError(f"{where}: {DATASET_NAME}")
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected keys and values")
        entries[name] = configs.build(Entry, value, where)
        if name in configs.user_section("datasets"):
            entries[name] = _beside_file(entries[name])
    groups: dict[str, tuple[str, ...]] = {}
    for group, members in _mapping(values, "groups").items():
        where = f"{configs.where_is('groups', group)}: group {group}"
        if not isinstance(members, list):
            raise UserError(f"{where}: expected a list of data sets")
        for member in members:
            if member not in entries:
                hint = nearest(str(member), entries)
                raise UserError(f"{where} names {member!r}, which is no data set there{hint}")
        if group in entries:
            raise UserError(f"{where} has the name of a data set")
        groups[str(group)] = tuple(members)
    return entries, groups


def _beside_file(entry: Entry) -> Entry:
    """Return an entry of the user's file, with paths relative to that file made absolute."""
    file = configs.user_file()
    assert file is not None, "the entry is in it"
    paths = {
        name: str(file.parent / Path(value).expanduser())
        for name in ("path", "media")
        if (value := getattr(entry, name))
    }
    return replace(entry, **paths)  # type: ignore[arg-type]


def _mapping(values: Mapping[str, object], key: str) -> Mapping[object, object]:
    found = values.get(key) or {}
    if not isinstance(found, Mapping):
        raise UserError(f"configs/datasets.yaml: {key}: expected names and their values")
    return found


# ---- what --dataset names


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One data set that `--dataset` names."""

    name: str
    """Its name in the cache."""
    entry: Entry
    """What it is. Paths are absolute, unless they come from configs/datasets.yaml."""
    word: str
    """What `--dataset` accepts for it, from any folder."""


def choose(
    specs: Sequence[str], features: Path | None = None, command: CommandLine = COMMAND
) -> list[Choice]:
    """Return the data sets that `--dataset` arguments name, each once.

    Args:
        specs: see the beginning of this file.
        features: the feature cache. An unknown name that is there is answered with the words that made it.
        command: the user's, for that answer.

    Raises:
        UserError: no such data set, a name is invalid, or two different data sets have one name.
    """
    entries, groups = read_catalogue()
    chosen: dict[str, Choice] = {}
    for spec in specs:
        if spec in groups or spec in entries:
            found = [
                Choice(name=name, entry=entries[name], word=name)
                for name in groups.get(spec, (spec,))
            ]
        else:
            if features is not None and is_dataset_name(spec):
                _refuse_stored(spec, specs, CacheRoot(features), command)
            found = [_choose_spec(spec, entries, groups)]
        for one in found:
            other = chosen.setdefault(one.name, one)
            if other.entry != one.entry:
                raise UserError(
                    f"{other.entry.spec} and {one.entry.spec} would both be the data set {one.name!r}; "
                    f"name one of them: --dataset {shlex.quote(f'{one.name}-2={one.entry.spec}')}"
                )
    return list(chosen.values())


def _choose_spec(
    spec: str,
    entries: Mapping[str, Entry],
    groups: Mapping[str, tuple[str, ...]],
) -> Choice:
    """Return the data set of one `[NAME=]KIND:PLACE`."""
    found = _SPEC.fullmatch(spec)
    if not found or found["kind"] not in SPEC_KINDS:
        why = _unknown(spec, found, [*entries, *groups])
        raise UserError(f"--dataset {shlex.quote(spec)}: {why}")
    name, kind, place = found["name"], found["kind"], found["place"]
    entry = _entry_of(kind, place, spec)
    given = "" if name is None else f"{name}="
    suggested = as_dataset_name(name if name is not None else _default_name(entry)) or kind
    if name is not None and name != suggested:
        raise UserError(
            f"--dataset {shlex.quote(spec)}: {name!r} cannot be the name of a data set: {DATASET_NAME}; "
            f"for example: --dataset {shlex.quote(f'{suggested}={kind}:{place}')}"
        )
    if suggested in entries or suggested in groups:
        section = "datasets" if suggested in entries else "groups"
        raise UserError(
            f"{given}{kind}:{place}: the name {suggested!r} belongs to a data set of "
            f"{configs.where_is(section, suggested)}; give it another: --dataset "
            f"{shlex.quote(f'my-{suggested}={kind}:{place}')}"
        )
    return Choice(name=suggested, entry=entry, word=f"{suggested}={entry.spec}")


def _refuse_stored(name: str, specs: Sequence[str], root: CacheRoot, command: CommandLine) -> None:
    """Raise UserError with the command that reads a data set of the cache again, if its name does not."""
    if name not in dataset_names(root):
        return
    _, word, *others = dataset_words(root, name)
    if (word, others) == (name, []):
        return
    words = tuple(word if spec == name else spec for spec in specs)
    again = command_text(command.program, with_options(merge(command.words, others), dataset=words))
    raise UserError(f"--dataset {name}: it was made by other words: {again}")


def _unknown(spec: str, found: re.Match[str] | None, known: Sequence[str]) -> str:
    """Return why `spec` is not understood, and what would be."""
    path = os.path.expanduser(spec)  # noqa: PTH111 - these two never raise
    if os.path.isdir(path):  # noqa: PTH112
        return f"for a folder of images: --dataset {shlex.quote(f'folder:{spec}')}"
    if os.path.isfile(path):  # noqa: PTH113
        kind = "webdataset" if spec.endswith(".tar") else "json"
        return f"for a file: --dataset {shlex.quote(f'{kind}:{spec}')}"
    if found:
        kinds = ", ".join(SPEC_KINDS.values())
        return f"no kind {found['kind']!r}; there are {kinds}{nearest(found['kind'], SPEC_KINDS)}"
    return f"no such data set; there are {', '.join(known)}{nearest(spec, known)}"


def _entry_of(kind: str, place: str, spec: str) -> Entry:
    """Return the entry of `KIND:PLACE`."""
    if not place.strip():
        raise UserError(f"--dataset {shlex.quote(spec)}: write it as {SPEC_KINDS[kind]}")
    if kind != "hf" or place.startswith(("/", ".", "~")) or _is_here(place):
        try:
            path, config = Path(place).expanduser(), ""
            if kind == "hf" and ":" in path.name and not path.exists():
                before, _, config = str(path).rpartition(":")
                path = Path(before)
            # A folder under two names, one of them a link, is one data set.
            path = path.resolve() if kind == "folder" else path.absolute()
        except (OSError, RuntimeError, ValueError) as error:  # ~nobody, links in a circle
            raise UserError(f"--dataset {shlex.quote(spec)}: {one_line(error)}") from None
        return Entry(source=kind, path=str(path), config=config)  # type: ignore[arg-type]
    hub = _HUB.fullmatch(place.removeprefix("https://huggingface.co/datasets/").rstrip("/"))
    if not hub:
        raise UserError(
            f"--dataset {shlex.quote(spec)}: write it as {SPEC_KINDS[kind]}, such as "
            "hf:HuggingFaceM4/the_cauldron:ai2d"
        )
    return Entry(source="hf", hub=hub[1], config=hub[2] or "")


def _is_here(place: str) -> bool:
    """Return whether `PATH` or `PATH:CONFIG` is a file or folder; the hub is not asked for such a name."""
    return any(os.path.exists(path) for path in (place, place.rpartition(":")[0]) if path)  # noqa: PTH110


def _default_name(entry: Entry) -> str:
    """Return the text from which the name of a data set is made."""
    match entry.source:
        case "folder":
            return Path(entry.path).resolve().name
        case "json":
            return Path(entry.path).stem
        case "webdataset":
            parts = [part for part in Path(entry.path).parts[:-1] if not set(part) & set("*?[{/")]
            return parts[-1] if parts else ""
    place = entry.hub.rpartition("/")[2] or Path(entry.path).resolve().name
    return f"{place}-{entry.config}" if entry.config else place


def open_datasets(
    specs: Sequence[str],
    features: Path,
    source: Path | None = None,
    media: Path | None = None,
    command: CommandLine = COMMAND,
) -> list[Dataset]:
    """Return the data sets that `--dataset` arguments name, each once.

    Args:
        specs: see the beginning of this file.
        features: the feature cache, where data sets that draw their own images keep them.
        source: folder with downloaded data sets. A data set that is missing there is left out and logged.
        media: folder of the media that data sets name.
        command: the user's, for errors that suggest another.

    Raises:
        UserError: no such data set, folder or file, `source` or `media` is not used, or two different data
            sets have one name.
    """
    choices = choose(specs, features, command)
    source, media = (path and path.expanduser().absolute() for path in (source, media))
    if source is not None and not any(one.entry.source in FROM_SOURCE for one in choices):
        raise UserError(f"--source {source}: no data set named by --dataset is read from there")
    if media is not None and not any(one.entry.source in WITH_MEDIA for one in choices):
        raise UserError(f"--media {media}: no data set named by --dataset looks for media there")
    if media is not None and not media.is_dir():
        raise UserError(f"--media {media}: no such folder")
    places = Places(features=features, source=source, media=media)
    opened, missing = list[Dataset](), list[str]()
    for one in choices:
        try:
            dataset = _OPENERS[one.entry.source](one.name, one.entry, places)
        except UserError as error:
            if one.word != one.name or one.name not in configs.user_section("datasets"):
                raise
            where = configs.where_is("datasets", one.name)
            raise UserError(f"{where}: {one.name}: {error}") from None
        if dataset is None:
            missing.append(one.name)
        else:
            opened.append(dataset)
    if source is not None and missing:
        there = {dataset.name for dataset in opened}
        if not any(one.name in there and one.entry.source in FROM_SOURCE for one in choices):
            from encode.sources.hub_files import missing_from

            hubs = {one.name: one.entry.hub for one in choices if one.name in missing}
            raise missing_from(source, hubs)
        for name in missing:
            log.warning("data set %s is not below --source %s: left out", name, source)
    return opened
