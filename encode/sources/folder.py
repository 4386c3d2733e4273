"""A folder of images and videos as a data set, with the texts in it.

python -m encode.run --dataset folder:photos

Texts are in a `metadata.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet`, at the top or in subfolders. Its paths
are relative to its own folder (`encode.records` has the formats):

    {"file": "a.jpg", "caption": "A cat asleep."}
    {"file_name": "a.jpg", "text": "A cat asleep."}
    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhich animal?"}, ...]}

or beside an image or video of the same name: `a.txt` or `a.caption` with its caption, `a.json` with a record.
An image or video without a text is a sample without text, in a folder without metadata only: it is encoded,
and there is nothing in it to train on. What a file is, its first bytes decide, not its name.

Each file is used, or counted in the account by the reason why it is not.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

from cache.format.gate import open_regular
from cache.store.samples import Sample
from configs import UserError
from configs.text import quoted
from encode.plan.numbering import TextSet
from encode.records.account import Account, FaultError
from encode.records.keys import FILE_KEYS, IMAGE_KEYS, NAME_KEYS, TEXT_KEYS, VIDEO_KEYS
from encode.records.media_files import (
    Kind,
    MediaFiles,
    is_unicode,
    kind_by_suffix,
    look,
    suffix_of,
)
from encode.records.record import MediaName
from encode.records.stream import SUFFIXES, is_table
from encode.records.strict_json import MAX_BYTES, parse
from encode.sources.folder_files import (
    HIDDEN,
    LINKED,
    OUTSIDE,
    UNREADABLE,
    FileList,
    FolderFile,
    walk,
    why_unused,
)
from encode.sources.json_file import RecordFiles, check_content
from model.media.kinds import Recognised

RECORD_SUFFIX = ".json"
"""Suffix of a record beside an image or video."""
CAPTION_SUFFIXES = (".txt", ".caption")
"""Suffixes of a caption beside an image or video."""
MAX_CAPTION_BYTES = 1 << 20
"""Larger files are no captions."""
_MEDIA_KEYS = (*IMAGE_KEYS, *VIDEO_KEYS, *FILE_KEYS, *NAME_KEYS)
_TEXTS = ("", "empty", "text", "JSON text")
"""Formats of a text beside media. Unknown bytes are refused as text."""
_NUMBERS = re.compile(r"[\s\d.,;e+-]*")
"""Labels of object detectors (`0 0.5 0.5 0.2 0.2`) are files beside images, too."""
_ELSEWHERE = {
    "text": "json",
    "JSON text": "json",
    "Parquet table": "hf",
    "Arrow table": "hf",
    "tar archive": "webdataset",
}
"""Format of a file that another kind of data set reads -> that kind."""

UNNAMED = "media without a line of metadata"


@dataclass(frozen=True, kw_only=True)
class FolderDataset:
    """One folder. Each call of `samples` reads it again."""

    name: str
    """Name of the data set in the cache; the name of the folder by default."""
    folder: Path
    """Absolute path without links."""
    leave_out: Path
    """Folder that is not searched: the feature cache, which may be inside."""

    needs_sizes: ClassVar[bool] = False
    """No text here depends on the size of an image."""

    @staticmethod
    def open(path: str, *, name: str, leave_out: Path) -> FolderDataset:
        """Return the data set of the folder at `path`.

        Args:
            path: the folder.
            name: of the data set.
            leave_out: folder that is not searched.

        Raises:
            UserError: no such folder.
        """
        folder = Path(path).expanduser()
        if not path or not folder.is_dir():
            raise UserError(
                f"folder:{path}: no such folder; --dataset folder:PATH takes one"
                f"{_hint_for_file(folder) if path and folder.is_file() else ''}"
            )
        return FolderDataset(name=name, folder=folder.resolve(), leave_out=leave_out.resolve())

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folder."""
        return (self.folder,)

    def samples(
        self,
        sizes: Mapping[str, tuple[int, int]] = {},  # noqa: ARG002 - part of the protocol
        account: Account | None = None,
    ) -> Iterator[Sample]:
        """Yield the samples of the metadata in the order of its lines, then those of other files by path.

        Args:
            sizes: not used.
            account: counts what is used, left out and refused; None: a fault raises UserError at the end.

        Raises:
            UserError: there is nothing to encode, a folder has two files of metadata, or none of the files
                that its metadata names exists.
        """
        if account is None:
            account = Account(name=self.name)
            yield from account.watch(_Reading(self, account).samples())
        else:
            yield from _Reading(self, account).samples()


class _Reading:
    """One pass over a folder."""

    def __init__(self, dataset: FolderDataset, account: Account) -> None:
        self._name = dataset.name
        self._folder = dataset.folder
        self._account = account
        self._files = FileList(walk(dataset.folder, dataset.leave_out))
        self._metadata = _metadata(dataset.folder, self._files)
        outside = "copy it into the folder"
        if self._metadata:
            word = shlex.quote(f"json:{dataset.folder / self._metadata[0]}")
            outside += f", or name its folder: --dataset {word} --media DIR"
        self._media = MediaFiles([dataset.folder], account, outside=outside)
        self._records = RecordFiles(dataset.name, self._media, account)
        self._texts = {
            path: ""
            for path, problem in self._files
            if not problem and suffix_of(path) in (*CAPTION_SUFFIXES, RECORD_SUFFIX)
        }
        """File that may be a text beside a media file -> why it is none, as far as that is known."""
        self._settled = set(self._metadata)
        """Files whose text is used or is a fault."""
        self._named = TextSet()
        """Sources of the samples' media."""
        self._first_of_suffix: dict[str, str] = {}

    def samples(self) -> Iterator[Sample]:
        """Yield the samples of metadata, then those of the other files; count what is not used."""
        found = False
        for sample in chain(self._of_metadata(), self._of_other_files()):
            found = True
            self._named.update(ref.source for ref in sample.media)
            yield sample
        if not found and (self._account.leave_out or not self._account.faults):
            what = f"{self._folder}: no images, videos or records"
            if self._metadata:
                what = f"{self._folder / self._metadata[0]}: no lines that can be used"
            raise UserError(f"{what} ({self._account.text()})")

    def _of_metadata(self) -> Iterator[Sample]:
        for path in self._metadata:
            check_content(self._folder / path, str(self._folder / path))
        for path in self._metadata:
            parent = path.rpartition("/")[0]
            prefix = f"{parent}/" if parent else ""
            yield from self._records.samples(self._folder / path, self._folder / parent, prefix)
        if self._metadata and not self._account.faults:
            self._media.refuse_if_all_are_missing(
                str(self._folder / self._metadata[0]),
                lambda _: "paths are relative to the folder of that file",
            )

    def _of_other_files(self) -> Iterator[Sample]:
        unused: list[tuple[str, str | Recognised | None]] = []
        for path, problem in self._files:
            source = self._source(path)
            if source in self._named:
                for text in self._beside(path):  # not read
                    self._texts[text] = "beside media that metadata names"
            elif problem:
                unused.append((path, problem))
            elif path not in self._settled:
                found = look(source)
                if not (kind := _kind(found, path)):
                    unused.append((path, found))
                    continue
                self._media.set_kind(source, kind)
                try:
                    yield from self._of_media(path, kind)
                except FaultError as fault:
                    self._account.fault(quoted(source), fault)
                else:
                    if source not in self._named:
                        unused.append((path, UNNAMED))
        for path, why in unused:
            if path not in self._settled and self._source(path) not in self._named:
                self._count(path, why)

    def _of_media(self, path: str, kind: Kind) -> list[Sample]:
        """Return the samples of an image or video that no metadata names.

        Raises:
            FaultError: they cannot be used.
        """
        if not is_unicode(path):
            raise FaultError("name that is not UTF-8", "the name is not UTF-8; rename the file")
        if self._metadata and not self._beside(path):
            return []
        # `./`: a file may be called `data:` or `https:`.
        ref = self._media.resolve(MediaName(text=f"./{path}", kind=kind), self._folder)
        samples = self._with_text(path, kind)
        if samples is not None or self._metadata:
            return samples or []
        return [Sample(id=path, dataset=self._name, messages=(), media=(ref,))]

    # ---- texts beside a media file

    def _with_text(self, path: str, kind: Kind) -> list[Sample] | None:
        """Return the samples of a media file and the texts beside it; None if there is no text."""
        parent, _, name = path.rpartition("/")
        value: dict[str, Any] = {}
        used: list[str] = []
        for text in self._beside(path):
            is_record = suffix_of(text) == RECORD_SUFFIX
            content = look(self._source(text))
            if content and content.format not in _TEXTS:
                continue
            if used if is_record else "txt" in value:
                self._texts[text] = "beside another text"
                continue
            try:
                found = self._record(text, name) if is_record else self._caption(text)
            except FaultError as fault:
                self._account.fault(quoted(self._source(text)), fault)
                self._settled.add(text)
                del self._texts[text]  # other media of this name find no text then
                continue
            if found:
                value = {**found, **value}
                used.append(text)
        if not value:
            return None
        if not any(value.get(key) for key in _MEDIA_KEYS):
            value = {kind: f"./{name}", **value}  # a file may be called `data:` or `https:`
        self._settled.update(used)
        try:
            return self._records.of_value(value, self._folder / parent, path)
        except FaultError as fault:
            self._account.fault(quoted(self._source(used[0])), fault)
            for text in used[1:]:
                self._settled.discard(text)
                self._texts[text] = "beside a text with a fault"
            return []

    def _beside(self, path: str) -> list[str]:
        """Return the texts beside a media file: `a.json`, `a.txt`, `a.jpg.json`, ... for `a.jpg`."""
        suffix = suffix_of(path)
        stem = path[: -len(suffix)] if suffix else path
        starts = dict.fromkeys((stem, path))
        names = (start + s for s in (RECORD_SUFFIX, *CAPTION_SUFFIXES) for start in starts)
        return [name for name in names if name in self._texts and name != path]

    def _caption(self, path: str) -> dict[str, Any]:
        """Return the caption in a file as a record, which is empty if the file is.

        Raises:
            FaultError: it is too large, or not UTF-8.
        """
        data = self._read(path, MAX_CAPTION_BYTES)
        if data is None:
            raise FaultError("too large", f"a caption of more than {MAX_CAPTION_BYTES >> 20} MiB")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise FaultError("not UTF-8") from None
        if text.strip() and not _NUMBERS.fullmatch(text):
            return {"txt": text.strip()}
        self._texts[path] = "numbers, not a caption" if text.strip() else "empty"
        return {}

    def _record(self, path: str, media_name: str) -> dict[str, Any]:
        """Return the record in a file, without its name of the file beside it; empty if it is no record.

        Raises:
            FaultError: it is meant as a record, and cannot be read as JSON.
        """
        data = self._read(path, MAX_BYTES)
        if data is None or not data.strip():
            self._texts[path] = "empty" if data is not None else "too large for a record"
            return {}
        value = parse(data.removeprefix(b"\xef\xbb\xbf"))
        if not isinstance(value, dict) or not _says_text(value):
            return {}
        return {
            key: item
            for key, item in value.items()
            if not (key in _MEDIA_KEYS and _is_called(item, media_name))
        }

    def _read(self, path: str, most: int) -> bytes | None:
        """Return the content of a file, or None if it is larger than `most` bytes."""
        try:
            with open_regular(self._source(path)) as file:
                data = file.read(most + 1)
        except OSError as error:
            raise FaultError("cannot be read", f"cannot be read ({error.strerror})") from None
        return data if len(data) <= most else None

    # ---- files that are not used

    def _count(self, path: str, why: str | Recognised | None) -> None:
        """Count a file that is not used; `why` is the reason, or what the file is."""
        suffix = suffix_of(path)
        if why == UNREADABLE:
            fault = FaultError(UNREADABLE, "the folder cannot be read")
            self._account.fault(quoted(self._source(path)), fault)
            return
        if not isinstance(why, str):
            found = why
            if why := self._texts.get(path, ""):
                why = f"{suffix} ({why})"
            elif kind := _kind_of_data_set(found, self._source(path)):
                first = self._first_of_suffix.setdefault(suffix, self._source(path))
                why = f"{suffix} (records? --dataset {shlex.quote(f'{kind}:{first}')})"
            else:
                why = why_unused(found, path)
        self._account.left_out[why] += 1

    def _source(self, path: str) -> str:
        return f"{self._folder}/{path}"


def _hint_for_file(file: Path) -> str:
    """Return the end of an error about a file in the place of a folder."""
    found = look(str(file))
    kind, place = _kind_of_data_set(found, str(file)), file
    if not kind and found and found.kind:
        kind, place = "folder", file.parent
    word = shlex.quote(f"{kind}:{place.absolute()}")
    return f"; it is a file: --dataset {word}" if kind else "; it is a file"


def _metadata(folder: Path, files: Iterable[FolderFile]) -> list[str]:
    """Return the files of records, one a folder at most.

    Raises:
        UserError: a folder has several, or one is a link out of the folder.
    """
    of_folder: dict[str, str] = {}
    for path, problem in files:
        parent, _, name = path.rpartition("/")
        if problem in (HIDDEN, LINKED) or not name.lower().startswith("metadata."):
            continue
        if name.lower().removeprefix("metadata") in SUFFIXES:
            if problem:
                word = shlex.quote(f"json:{folder / path}")
                media = shlex.quote(str(folder / parent))
                way = f"copy it into the folder, or: --dataset {word} --media {media}"
                raise UserError(
                    f"{folder / path}: {problem}; {way if problem == OUTSIDE else 'remove it'}"
                )
            other = of_folder.setdefault(parent, path)
            if other != path:
                raise UserError(
                    f"{folder / parent}: {other.rpartition('/')[2]} and {name} are both metadata; keep one "
                    "of them, since they may say the same"
                )
    return list(of_folder.values())


def _kind(found: Recognised | None, name: str) -> Kind | Literal[""]:
    """Return what a file is used as. If its beginning is damaged, that is what its name says.

    The ledger then names it with the reason why it cannot be decoded.
    """
    if found is None or (not found.kind and found.format in ("", "empty", "text")):
        return kind_by_suffix(name)
    return found.kind


def _kind_of_data_set(found: Recognised | None, path: str) -> str:
    """Return the kind of data set that reads a file which may contain records; empty for other files."""
    kind = _ELSEWHERE.get(found.format, "") if found else ""
    if kind != "json" or suffix_of(path) in SUFFIXES:
        return kind
    try:
        with open_regular(path) as file:
            return kind if is_table(file) else ""
    except OSError:
        return ""


def _says_text(value: Mapping[str, Any]) -> bool:
    """Return whether an object has a key of text, or a misspelt one: then it is meant as a record."""
    return any(difflib.get_close_matches(key.lower()[:40], TEXT_KEYS, 1, 0.8) for key in value)


def _is_called(item: Any, name: str) -> bool:
    """Return whether a value is a path that ends in `name`."""
    return isinstance(item, str) and item.replace("\\", "/").rpartition("/")[2] == name
