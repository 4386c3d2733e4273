"""A file of records as a data set: JSON, JSON Lines, CSV, TSV, or Parquet without bytes of media.

python -m encode.run --dataset json:llava.json --media images

`encode.records` has the formats. Paths in the file are relative to `--media DIR`, or else to the file's
folder; absolute paths, and the targets of links, are below one of the two. URLs are downloaded, as PixMo's
are. The bytes of a data: URI stay in the file: the sample names their place there.

A sample's id is its first media item as written, and how many other lines before named that one first:
`a.jpg#0`. Lines that are appended change no id.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from cache.format.embedded.names import data_uri_source, data_uris
from cache.format.gate import check_regular, open_regular
from cache.store.samples import Sample
from configs import UserError, one_line
from encode.plan.numbering import TextMap
from encode.records.account import Account, FaultError
from encode.records.media_files import MediaFiles, look
from encode.records.reading import read_records
from encode.records.record import Line, Record
from encode.records.samples import to_samples
from encode.records.stream import read_lines

_OF_RECORDS = ("", "empty", "text", "JSON text", "Parquet table")
"""Formats that a file of records may have. Bytes of no known format are faults of their lines."""
LONGEST_ID = 512
"""Characters of a name in an id. Longer ones end in a hash."""
FOLDERS_SEARCHED = 1000
"""Folders in which a missing file is looked for, to name the right one in a message."""


class RecordFiles:
    """The files of records of one data set."""

    def __init__(self, dataset: str, media: MediaFiles, account: Account) -> None:
        """Read nothing yet."""
        self._dataset = dataset
        self._media = media
        self._account = account
        self._times_named = TextMap()

    def samples(self, file: Path, base: Path, prefix: str = "") -> Iterator[Sample]:
        """Yield the samples of a file; its faults are counted.

        Args:
            file: a file of records.
            base: folder to which paths in it are relative.
            prefix: beginning of the ids.
        """
        for line in read_lines(file, self._account):
            # In a row of a table, a data: URI has no place that could be named.
            data_uri = partial(_data_uri, file, line) if line.length else None
            try:
                records = read_records(line.value, self._account)
                first = prefix + _first_name(records)
                times = self._times_named.get(first) or 0
                sample_id = f"{first}#{times}"
                samples = self._samples(records, sample_id, base, data_uri)
            except FaultError as fault:
                self._account.fault(line.where, fault)
                continue
            self._times_named[first] = times + 1
            yield from samples

    def of_value(self, value: Mapping[str, Any], base: Path, sample_id: str) -> list[Sample]:
        """Return the samples of one record.

        Raises:
            FaultError: it is no record, or names no media that can be read.
        """
        return self._samples(read_records(value, self._account), sample_id, base, None)

    def _samples(
        self,
        records: tuple[Record, ...],
        sample_id: str,
        base: Path,
        data_uri: Callable[[str], str] | None,
    ) -> list[Sample]:
        resolve = partial(self._media.resolve, base=base, data_uri=data_uri)
        try:
            return list(to_samples(records, id=sample_id, dataset=self._dataset, resolve=resolve))
        except FaultError:
            self._account.take_back()
            raise


def _first_name(records: tuple[Record, ...]) -> str:
    """Return the first media item of a line as written, the beginning of its samples' ids."""
    name = next((media.text for record in records for media in record.media), "")
    if name[:5].lower() == "data:":
        return "data"
    if len(name) <= LONGEST_ID:
        return name
    return name[:LONGEST_ID] + hashlib.sha256(name.encode(errors="replace")).hexdigest()[:16]


def _data_uri(file: Path, line: Line, uri: str) -> str:
    """Return the source of a data: URI of a line."""
    for number, one in enumerate(data_uris(line.value)):
        if one == uri:
            return data_uri_source(str(file), line.offset, line.length, number)
    raise FaultError("damaged data: URI", "data: URI: no comma, or more than its type before it")


@dataclass(frozen=True, kw_only=True)
class JsonDataset:
    """One file of records. Each call of `samples` reads it again."""

    name: str
    """Name of the data set in the cache."""
    file: Path
    """Absolute path without links."""
    media: Path
    """Folder to which paths in the file are relative, an absolute path without links."""
    media_is_named: bool
    """Whether the user named that folder."""

    needs_sizes: ClassVar[bool] = False
    """No text here depends on the size of an image."""

    @staticmethod
    def open(path: str, *, name: str, media: Path | None = None) -> JsonDataset:
        """Return the data set of the file at `path`.

        Args:
            path: the file.
            name: of the data set.
            media: folder of the media that it names; None: its own folder.

        Raises:
            UserError: there is no such file, it is empty, or it is no file of records.
        """
        file = Path(path).expanduser()
        _check_file(file, path)
        if media is not None and not media.expanduser().is_dir():
            raise UserError(f"json:{path}: no such folder of media: {media}")
        file = file.resolve()
        return JsonDataset(
            name=name,
            file=file,
            media=media.expanduser().resolve() if media is not None else file.parent,
            media_is_named=media is not None,
        )

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folder of its media, and that of the file."""
        return tuple(dict.fromkeys((self.media, self.file.parent)))

    def samples(
        self,
        sizes: Mapping[str, tuple[int, int]] = {},  # noqa: ARG002 - part of the protocol
        account: Account | None = None,
    ) -> Iterator[Sample]:
        """Yield the samples of the lines, in their order.

        Args:
            sizes: not used.
            account: counts what is used, left out and refused; None: a fault raises UserError at the end.

        Raises:
            UserError: there is no line, or none of the files that they name exists.
        """
        if account is None:
            account = Account(name=self.name)
            yield from account.watch(self._samples(account))
        else:
            yield from self._samples(account)

    def _samples(self, account: Account) -> Iterator[Sample]:
        media = MediaFiles(self.folders, account, outside="name its folder: --media DIR")
        found = False
        for sample in RecordFiles(self.name, media, account).samples(self.file, self.media):
            found = True
            yield sample
        if not found and (account.leave_out or not account.faults):
            raise UserError(f"{self.file}: no lines that can be used ({account.text()})")
        if account.faults:
            return  # they are reported
        media.refuse_if_all_are_missing(str(self.file), self._where_else)

    def _where_else(self, path: str) -> str:
        """Return advice about a file that is not where the lines say, once all are missing."""
        if self.media in Path(path).parents:
            inside = Path(path).relative_to(self.media)
            for folder in _nearby(self.file.parent):
                if (folder / inside).is_file():
                    return f"there is {folder / inside}: --media {shlex.quote(str(folder))}"
        which = "another" if self.media_is_named else "the"
        return f"name {which} folder of the media: --media DIR"


def _check_file(file: Path, path: str) -> None:
    """Raise UserError if a file cannot be one of records."""
    if path and file.is_dir():
        raise UserError(
            f"json:{path}: a folder; for a folder of images: --dataset {shlex.quote(f'folder:{path}')}"
        )
    if not path or not file.exists():
        raise UserError(f"json:{path}: no such file; --dataset json:FILE takes one")
    try:
        if check_regular(file).st_size == 0:
            raise UserError(f"json:{path}: the file is empty")
    except OSError as error:
        raise UserError(f"json:{path}: {error.strerror}") from None
    check_content(file, f"json:{path}")


def check_content(file: Path, name: str) -> None:
    """Raise UserError if the first bytes of a file are those of something else than records.

    Args:
        file: an existing file.
        name: how a message names it.
    """
    found = look(str(file))
    if found is None:
        raise UserError(f"{name}: the file cannot be read")
    is_table = found.format == "Parquet table"
    if found.format == "tar archive":
        word = shlex.quote(f"webdataset:{file.resolve()}")
        raise UserError(f"{name}: a tar archive; --dataset {word} reads it")
    if found.format not in _OF_RECORDS or is_table != (file.suffix.lower() == ".parquet"):
        advice = f"; {found.advice}" if found.advice else ""
        raise UserError(f"{name}: {found.what}, not a file of records{advice}")
    if is_table:
        _refuse_bytes(file, name)


def _refuse_bytes(file: Path, name: str) -> None:
    """Raise UserError for a Parquet file that is damaged, or has bytes of media in it."""
    try:
        with open_regular(file) as opened:
            schema = pq.read_schema(opened)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{name}: not Parquet: {one_line(error)}") from None
    for column in schema:
        if "binary" in str(column.type):
            word = shlex.quote(f"hf:{file.resolve()}")
            raise UserError(
                f"{name}: the column {column.name!r} has bytes of media; --dataset {word} reads them"
            )


def _nearby(folder: Path) -> Iterator[Path]:
    """Yield folders in which media may be: those below `folder`, and below the one above it."""
    searched = 0
    for top in (folder, folder.parent):
        pending = [top]
        while pending and searched < FOLDERS_SEARCHED:
            here = pending.pop(0)
            searched += 1
            yield here
            try:
                pending += sorted(p for p in here.iterdir() if p.is_dir() and p.name[0] != ".")
            except OSError:
                continue
