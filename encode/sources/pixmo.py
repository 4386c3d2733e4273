"""PixMo: images named by URL, with captions, points, counts, questions and answers (by Ai2, ODC-BY).

python -m encode.run --dataset pixmo                          # all five, text from the hub
python -m encode.run --dataset pixmo-cap --source downloads   # downloads/pixmo-cap/data/*.parquet

Files are streamed with a few hundred rows in memory: pixmo-points has 2.4 million rows. The id of a sample is
the name of its file and its row, so the same files always give the same samples. Unusable rows are counted
and logged by reason.

| data set | a sample is | columns |
|---|---|---|
| pixmo-cap | a caption; a transcript | image_url, caption, transcripts |
| pixmo-points | where something is | image_url, image_sha256, points (percent), count, label |
| pixmo-count | how many there are, and where | image_url, image_sha256, points (pixels), count, label |
| pixmo-cap-qa | a conversation | image_url, question (with tags), answer, messages |
| pixmo-ask-model-anything | a question | image_url, image_sha256, question, answer |

The points of pixmo-count are in pixels, so they can be used only once the image's size is known. After
encoding, its samples are therefore read again, with sizes and the same ids.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cache.format.gate import check_regular
from cache.store.samples import Sample
from configs import UserError, nearest
from encode.errors import BadRowError
from encode.records.account import Account
from encode.sources.hub_files import open_hub, why_unreadable
from encode.sources.pixmo_rows import READERS, Row, Size, Unusable, image

log = logging.getLogger(__name__)

BATCH_ROWS = 512
"""Number of rows decoded at a time."""
BUFFER_BYTES = 1 << 20
"""Bytes of each column that are read ahead, so that a large row group is not read whole."""

NAMES = tuple(READERS)


# ---- types of columns


def _is_text(type_: Any) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


def _is_list(type_: Any, of: Callable[[Any], bool]) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_)) and of(type_.value_type)


def _is_number(type_: Any) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_))


def _is_xy(type_: Any, each: Callable[[Any], bool] = _is_number) -> bool:
    if not pa.types.is_struct(type_):
        return False
    found = {type_.field(i).name: type_.field(i).type for i in range(type_.num_fields)}
    return {"x", "y"} <= found.keys() and each(found["x"]) and each(found["y"])


def _is_points(type_: Any) -> bool:
    """Accept a list of structs or a struct of lists: versions of `datasets` wrote the one or the other."""
    return _is_list(type_, _is_xy) or _is_xy(type_, lambda inner: _is_list(inner, _is_number))


_TEXT, _TEXTS, _COUNT, _POINTS = "text", "lists of text", "whole numbers", "points (x, y)"
_TYPES: dict[str, Callable[[Any], bool]] = {
    _TEXT: _is_text,
    _TEXTS: lambda type_: _is_list(type_, _is_text),
    _COUNT: pa.types.is_integer,
    _POINTS: _is_points,
}
"""Name of a column type -> whether an Arrow type is accepted."""
_BINARY = {_TEXT: pa.binary(), _TEXTS: pa.list_(pa.binary())}

_OF_COLUMN = {"transcripts": _TEXTS, "messages": _TEXTS, "points": _POINTS, "count": _COUNT}
"""Column -> its type. Other columns are texts."""
_POINTED = ("image_url", "image_sha256", "points", "count", "label")
COLUMNS = {
    "pixmo-cap": ("image_url", "caption", "transcripts"),
    "pixmo-points": _POINTED,
    "pixmo-count": _POINTED,
    "pixmo-cap-qa": ("image_url", "question", "answer", "messages"),
    "pixmo-ask-model-anything": ("image_url", "image_sha256", "question", "answer"),
}
"""Data set -> columns that are read. A file may have other columns."""
OPTIONAL = frozenset({"messages"})
"""Columns that a file may lack: earlier revisions of pixmo-cap-qa have no `messages`."""


def _checked_columns(path: Path, name: str, schema: Any) -> list[str]:
    """Return the columns to read from one file.

    Raises:
        UserError: a column is missing, or has another type.
    """
    found = {column.name: column.type for column in schema}
    columns = []
    for column in COLUMNS[name]:
        wanted = _OF_COLUMN.get(column, _TEXT)
        if column not in found:
            if column in OPTIONAL:
                continue
            there = ", ".join(f"{other} ({type_})" for other, type_ in found.items()) or "none"
            raise UserError(f"{path}: {name} needs a column {column!r}; there are {there}")
        if not _TYPES[wanted](found[column]):
            raise UserError(
                f"{path}: column {column!r} of {name} should be {wanted}, it is {found[column]}"
            )
        columns.append(column)
    return columns


# ---- the data set


@dataclass(frozen=True, kw_only=True)
class PixmoDataset:
    """One of the five data sets. Each call of `samples` streams its files again."""

    name: str
    """One of NAMES."""
    files: tuple[Path, ...]
    """Its Parquet files, sorted."""
    _logged: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """Messages that were logged, so that a second pass over the rows does not repeat them."""

    @staticmethod
    def open(name: str, repository: str, source: Path | None) -> PixmoDataset | None:
        """Return the data set from below `source`, or from the hub; None if it is missing in `source`.

        Raises:
            UserError: no such data set, or it cannot be downloaded.
        """
        if name not in NAMES:
            raise UserError(
                f"configs/datasets.yaml: {name} is none of {', '.join(NAMES)}{nearest(name, NAMES)}"
            )
        found = open_hub(name, repository, "", source)
        return PixmoDataset(name=name, files=found.files) if found else None

    @property
    def needs_sizes(self) -> bool:
        """True for pixmo-count, whose points are in pixels."""
        return self.name == "pixmo-count"

    @property
    def folders(self) -> tuple[Path, ...]:
        """None: all media are URLs."""
        return ()

    def samples(
        self,
        sizes: Mapping[str, Size] = {},
        account: Account | None = None,
    ) -> Iterator[Sample]:
        """Yield all samples, file by file and row by row.

        Args:
            account: counts rows, and by its reason what is not used of them. Without, the reasons are logged.
            sizes: source -> width and height in pixels, of the images whose size is known.

        Raises:
            UserError: a file is damaged, a column is missing or has another type, or no row is usable.
        """
        tally = _Tally(account)
        used = False
        try:
            for path in self.files:
                for number, row in enumerate(_rows(path, self.name)):
                    if account is not None:
                        account.lines["PixMo"] += 1
                    for sample in self._of_row(row, f"{path.stem}#{number}", sizes, tally):
                        used = True
                        yield sample
            if not used:
                why = tally.summary() or "there are none"
                raise UserError(f"{self.name}: no row of {self.files[0].parent} is usable: {why}")
        finally:  # also if the caller stops early
            line = tally.summary()
            if tally and account is None and line not in self._logged:
                self._logged.add(line)
                log.warning("%s: %s", self.name, line)

    def _of_row(
        self, row: Row, where: str, sizes: Mapping[str, Size], tally: _Tally
    ) -> Iterator[Sample]:
        try:
            media = image(row)
            for part in READERS[self.name](row, sizes.get(media.source)):
                if isinstance(part, Unusable):
                    tally.add(part.reason, where)
                    continue
                yield Sample(
                    id=where + part.suffix,
                    dataset=self.name,
                    messages=part.messages,
                    media=(media,),
                    task=part.task,
                )
        except BadRowError as error:
            tally.add(f"left out: {error}", where)


class _Tally(dict[str, tuple[int, str]]):
    """Reason -> number of unusable rows, and the first of them."""

    def __init__(self, account: Account | None):
        super().__init__()
        self._account = account

    def add(self, reason: str, where: str) -> None:
        if self._account is not None:
            self._account.left_out[reason.removeprefix("left out: ")] += 1
        times, first = self.get(reason, (0, where))
        self[reason] = times + 1, first

    def summary(self) -> str:
        """Return one line, most frequent reason first."""
        ordered = sorted(self.items(), key=lambda item: -item[1][0])
        return "; ".join(f"{why} ({times:,}, first {first})" for why, (times, first) in ordered)


# ---- Parquet


def _rows(path: Path, name: str) -> Iterator[Row]:
    """Yield the rows of one file in order, with texts as bytes, which may not be UTF-8."""
    try:
        check_regular(path)  # pyarrow would wait for the writer of a FIFO
        with pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            columns = _checked_columns(path, name, file.schema_arrow)
            for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                yield from _as_bytes(batch).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: {why_unreadable(path, error)}") from None


def _as_bytes(batch: Any) -> Any:
    """Return the batch with texts as bytes, so that invalid UTF-8 makes only its own row unusable."""
    fields = [
        field.with_type(_BINARY.get(_OF_COLUMN.get(field.name, _TEXT), field.type))
        for field in batch.schema
    ]
    return batch.cast(pa.schema(fields))
