"""Data sets in Parquet or Arrow files that contain the bytes of their images, as on the Hugging Face hub.

python -m encode.run --dataset hf:HuggingFaceM4/the_cauldron:ai2d                # from the hub
python -m encode.run --dataset hf:HuggingFaceM4/the_cauldron:ai2d --source copies    # copies/the_cauldron
python -m encode.run --dataset hf:copies/mine                                    # a folder, or one file

A row is a record, and a column is a key of it: `encode.records` says which texts are read. A column of media
has structs with `bytes` and `path`, or bytes, or lists of either, or base64 text. Reading the samples reads
no bytes of media, and a few hundred rows are in memory. The id of a sample is the name of its file and its
row.

`columns` of an entry in configs/datasets.yaml says what a column is for, where its name does not:

    columns: {image: jpg, question: q, answer: a}     # other columns are not used
    where: ["relevance_ratings >= 4"]                 # a list has a rating for each turn of `texts`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from cache.errors import EmbeddedMediaError
from cache.format.embedded.names import row_source
from cache.format.embedded.scan import Item, Part, TableFile
from cache.store.samples import MediaRef, Sample
from configs import UserError
from encode.records.account import Account, FaultError
from encode.records.keys import IMAGE_KEYS, LIST_KEYS, TURN_KEYS, VIDEO_KEYS
from encode.records.media_files import MediaFiles
from encode.records.reading import read_records
from encode.records.record import MediaName, Record
from encode.records.samples import to_samples
from encode.records.strict_json import parse
from encode.sources.hub_files import why_unreadable
from encode.sources.table_columns import (
    Condition,
    Layout,
    drop_turns,
    find_layout,
    parse_condition,
)

PROBATION = 1000
"""Rows after which a data set is refused if none of them can be used, instead of at its end."""

MEDIA_KEYS = frozenset((*IMAGE_KEYS, *VIDEO_KEYS))
"""Keys whose texts may be media in base64."""

LISTS = frozenset((*TURN_KEYS, *LIST_KEYS, "texts"))
"""Keys whose texts may be JSON."""

_BASE64 = re.compile(
    r"data:|/9j/|iVBORw0KGgo|R0lGOD|UklGR|AAAA[A-Za-z0-9+/]{4}ZnR5c", re.IGNORECASE
)
"""Beginnings of JPEG, PNG, GIF, WebP and MP4 in base64."""


class InsideName(MediaName):
    """A media item inside the table. A text of the data set never becomes one."""


@dataclass(frozen=True, kw_only=True)
class TableDataset:
    """Some tables. Each call of `samples` reads them again."""

    name: str
    """Name of the data set in the cache."""
    folder: Path
    """Folder of the tables. Paths of media in the rows are relative to it."""
    files: tuple[Path, ...]
    """Parquet or Arrow files, in the order of the samples."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Key of a record -> the column that has it. Empty: the names of the columns are the keys."""
    where: tuple[str, ...] = ()
    """Conditions on rows, as `column >= 4`."""
    media: Path | None = None
    """Folder of the media that rows name by path; None: `folder`."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason -> files beside `files` that are not used."""

    needs_sizes: ClassVar[bool] = False
    """No text here depends on the size of an image."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folder of the media that rows name, and the tables, which may contain them."""
        return ((self.media or self.folder).resolve(), *self.files)

    def samples(
        self,
        sizes: Mapping[str, tuple[int, int]] = {},  # noqa: ARG002 - part of the protocol
        account: Account | None = None,
    ) -> Iterator[Sample]:
        """Yield the samples of all rows, file by file.

        Raises:
            UserError: a condition or a name of a column does not fit, or no row can be used.
        """
        account = account or Account(name=self.name)
        account.left_out.update(self.left_out)
        conditions = tuple(map(parse_condition, self.where))
        base = (self.media or self.folder).resolve()
        files = MediaFiles([base], account, outside="name their folder: --media DIR")
        stems = [path.stem for path in self.files]
        found = inside = False

        def resolve(media: MediaName) -> MediaRef:
            nonlocal inside
            if isinstance(media, InsideName):
                inside = True
                return MediaRef(source=media.text, kind=media.kind or "image")
            return files.resolve(media, base)

        for path in self.files:
            name = path.stem
            if stems.count(name) > 1:
                name = path.relative_to(self.folder).with_suffix("").as_posix()
            reader = _Reader(self, path, name, conditions, account)
            for sample in reader.samples(resolve):
                found = True
                yield sample
        account.close()
        if not found:
            raise UserError(f"{self.name}: no row of {self.folder} is usable ({account.text()})")
        if not inside:
            files.refuse_if_all_are_missing(
                str(self.files[0]), lambda _: "name their folder: --media DIR"
            )


# ---- rows


class _Reader:
    """Reads one file."""

    def __init__(
        self,
        dataset: TableDataset,
        path: Path,
        name: str,
        conditions: Sequence[Condition],
        account: Account,
    ) -> None:
        self._dataset, self._path, self._name = dataset, path, name
        self._conditions, self._account = conditions, account

    def samples(self, resolve: Callable[[MediaName], MediaRef]) -> Iterator[Sample]:
        """Yield the samples of the file; count faults."""
        account, path = self._account, self._path
        try:
            table = TableFile(path)
        except (pa.ArrowException, OSError, ValueError, EmbeddedMediaError) as error:
            account.fault(str(path), FaultError("damaged file", why_unreadable(path, error)))
            return
        with table:
            layout = find_layout(table, self._dataset.columns, str(path), account.ignore_keys)
            _note_columns(layout, account)
            for condition in self._conditions:
                condition.check(table.schema, str(path))
            columns = [column for column, _ in layout.media.values()]
            judged = {condition.column for condition in self._conditions}
            skip = [name for name in layout.skipped if name not in judged]
            account.ignored.update(dict.fromkeys(skip, table.starts[-1]))
            for block in range(table.blocks):
                try:
                    for part in table.scan(block, columns, skip):
                        yield from self._of_part(part, table.format, layout, resolve)
                except (pa.ArrowException, OSError, ValueError, EmbeddedMediaError) as error:
                    first, end = table.starts[block : block + 2]
                    where = f"{path}: rows {first:,} to {end - 1:,} (row group {block})"
                    account.fault(
                        where, FaultError("damaged row group", why_unreadable(path, error))
                    )

    def _of_part(
        self,
        part: Part,
        table_format: str,
        layout: Layout,
        resolve: Callable[[MediaName], MediaRef],
    ) -> Iterator[Sample]:
        account = self._account
        kept = np.arange(len(part))
        for condition in self._conditions:
            if condition.column in part.rows.schema.names:
                kept = kept[condition.fits(part.rows.column(condition.column))[kept]]
        if excluded := len(part) - len(kept):
            account.left_out["row that `where` excludes"] += excluded
        values = _plain_rows(part.rows, kept)
        for row, value in zip(kept.tolist(), values, strict=True):
            number = part.first + row
            try:
                if value is None:
                    raise FaultError("not UTF-8", "a text that is not UTF-8")
                for name, (_, kind) in layout.media.items():
                    source = _Source(table_format, str(self._path), name, number)
                    value[name] = _names(part.media[name][row], source, kind)
                for name in layout.texts:
                    value[name] = _decoded(value[name], name)
                records = self._records(value, layout, number, table_format)
                samples = self._samples(records, number, resolve)
            except FaultError as error:
                account.fault(f"{self._path}: row {number:,}", error)
                seen = sum(account.lines.values())
                if not seen and sum(account.faults.values()) >= PROBATION:
                    account.close()
            else:
                yield from samples

    def _samples(
        self, records: tuple[Record, ...], number: int, resolve: Callable[[MediaName], MediaRef]
    ) -> list[Sample]:
        name = f"{self._name}#{number}"
        try:
            return list(to_samples(records, id=name, dataset=self._dataset.name, resolve=resolve))
        except FaultError:
            self._account.take_back()
            raise

    def _records(
        self, value: dict[str, Any], layout: Layout, number: int, table_format: str
    ) -> tuple[Record, ...]:
        account = self._account
        for condition in self._conditions:
            mask = condition.turns(value.pop(condition.column, None))
            if mask is None:
                continue
            if dropped := drop_turns(value, mask):
                account.left_out["turn that `where` excludes"] += dropped
            if not any(mask):
                account.left_out["row without a turn that `where` keeps"] += 1
                return ()
        if layout.numbered:
            found = [value.pop(column) for column in layout.numbered]
            value["images"] = [item for item in found if item is not None]
        record: dict[str, Any] = {}
        for column, item in value.items():
            key = "images" if layout.numbered and column == "images" else layout.keys.get(column)
            if item is None:
                continue
            if key is None:
                account.ignored[column] += 1
            else:
                record[key] = item
        for key in record.keys() & MEDIA_KEYS:
            of_key = [column for column, name in layout.keys.items() if name == key]
            if of_key and isinstance(record[key], str | list):
                source = _Source(table_format, str(self._path), of_key[0], number)
                record[key] = _of_base64(record[key], source)
        for key in record.keys() & LISTS:
            item = record[key]
            if isinstance(item, str) and item[:1] in ("[", "{"):
                record[key] = parse(item.encode())
        if isinstance(sidecar := record.get("json"), dict):  # of a tar that the hub has converted
            del record["json"]
            record = {**{k: v for k, v in sidecar.items() if v is not None}, **record}
        return read_records(record, account)


def _decoded(value: Any, column: str) -> Any:
    """Return a cell of bytes, or of lists of bytes, as text."""
    if isinstance(value, list):
        return [_decoded(item, column) for item in value]
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        raise FaultError("not UTF-8", f"{column}: a text that is not UTF-8") from None


def _note_columns(layout: Layout, account: Account) -> None:
    """Count the file under what its columns are for."""
    for column in layout.media:
        key = "images" if column in layout.numbered else layout.keys[column]
        account.columns[column if key == column else f"{column} as {key}"] += 1


class _Source(NamedTuple):
    """A cell, to name the media in it."""

    format: str
    path: str
    column: str
    row: int

    def name(self, index: int | None, kind: str) -> InsideName:
        return InsideName(text=row_source(*self, index), kind=kind)  # type: ignore[arg-type]


def _names(
    cell: Item | list[Item] | None, source: _Source, kind: str, index: int | None = None
) -> Any:
    """Return the media of one cell as `read_records` takes them."""
    if cell is None:
        return None
    if isinstance(cell, list):
        return [_names(item, source, kind, at) for at, item in enumerate(cell)]
    if cell.has_bytes:
        return source.name(index, kind)
    if not cell.path:
        raise FaultError("media without bytes", f"{source.column}: neither bytes nor a path")
    return MediaName(text=cell.path, kind=kind)  # type: ignore[arg-type]


def _of_base64(value: Any, source: _Source) -> Any:
    """Return names for those texts of a cell that are media in base64."""
    if isinstance(value, str):
        return source.name(None, "") if _BASE64.match(value) else value
    return [
        source.name(index, "") if isinstance(item, str) and _BASE64.match(item) else item
        for index, item in enumerate(value)
    ]


def _plain_rows(rows: Any, kept: Any) -> list[dict[str, Any] | None]:
    """Return the kept rows as Python values; None for one with invalid UTF-8."""
    if not rows.num_columns:
        return [{} for _ in kept]
    if len(kept) < rows.num_rows:
        rows = rows.take(pa.array(kept))
    try:
        found: list[dict[str, Any] | None] = rows.to_pylist()
    except UnicodeDecodeError:
        found = []
        for number in range(rows.num_rows):
            try:
                found += rows.slice(number, 1).to_pylist()
            except UnicodeDecodeError:
                found.append(None)
    return found
