"""PixMo: images named by URL, with captions, points, counts, questions and answers (by Ai2, ODC-BY).

python -m encode.run --dataset pixmo                          # the five of them, text from the hub
python -m encode.run --dataset pixmo-cap --source downloads   # downloads/pixmo-cap/data/*.parquet

Only `train-*` files are read where a repository has several splits (pixmo-count). Files are streamed, a
few hundred rows in memory at a time: pixmo-points has 2.4 million. A sample's id is its file's name and row,
so the same files always give the same samples. Rows that cannot be used are counted by reason and told.

| data set | a sample is | columns |
|---|---|---|
| pixmo-cap | a caption; a transcript | image_url, caption, transcripts |
| pixmo-points | where something is | image_url, image_sha256, points (percent), count, label |
| pixmo-count | how many there are, and where | image_url, image_sha256, points (pixels), count, label |
| pixmo-cap-qa | a conversation | image_url, question (with tags), answer, messages |
| pixmo-ask-model-anything | a question | image_url, image_sha256, question, answer |

pixmo-count's pixels mean something once the image's size is known, so its `samples` are asked for again
after encoding, with sizes; the ids stay the same.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cache.store.samples import Sample
from configs import UserError, nearest
from encode.sources.pixmo_files import hub_files, local_files
from encode.sources.pixmo_rows import READERS, BadRowError, Row, Size, Unusable, image

log = logging.getLogger(__name__)

BATCH_ROWS = 512
"""Rows decoded at a time."""
BUFFER_BYTES = 1 << 20
"""Of each column read ahead: a row group, however large, is not read whole."""
LFS_POINTER = b"version https://git-lfs"

NAMES = tuple(READERS)


# ---- what columns must be


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_list(kind: Any, of: Callable[[Any], bool]) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind)) and of(kind.value_type)


def _is_texts(kind: Any) -> bool:
    return _is_list(kind, _is_text)


def _is_number(kind: Any) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_xy(kind: Any, each: Callable[[Any], bool] = _is_number) -> bool:
    if not pa.types.is_struct(kind):
        return False
    found = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
    return {"x", "y"} <= found.keys() and each(found["x"]) and each(found["y"])


def _is_points(kind: Any) -> bool:
    """`datasets` has written a list of structs both as that and as a struct of lists."""
    return _is_list(kind, _is_xy) or _is_xy(kind, lambda inner: _is_list(inner, _is_number))


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What a column must hold."""

    name: str
    """For messages."""
    fits: Callable[[Any], bool]
    """Whether an Arrow type is of this kind."""


_TEXT = _Kind(name="text", fits=_is_text)
_TEXTS = _Kind(name="lists of text", fits=_is_texts)
_COUNT = _Kind(name="whole numbers", fits=pa.types.is_integer)
_POINTS = _Kind(name="points (x, y)", fits=_is_points)

_POINTED = {
    "image_url": _TEXT,
    "image_sha256": _TEXT,
    "points": _POINTS,
    "count": _COUNT,
    "label": _TEXT,
}
COLUMNS: dict[str, dict[str, _Kind]] = {
    "pixmo-cap": {"image_url": _TEXT, "caption": _TEXT, "transcripts": _TEXTS},
    "pixmo-points": _POINTED,
    "pixmo-count": _POINTED,
    "pixmo-cap-qa": dict.fromkeys(("image_url", "question", "answer"), _TEXT)
    | {"messages": _TEXTS},
    "pixmo-ask-model-anything": dict.fromkeys(
        ("image_url", "image_sha256", "question", "answer"), _TEXT
    ),
}
"""Those that are read; a file may have others."""
OPTIONAL = frozenset({"messages"})
"""Earlier revisions of pixmo-cap-qa lack it."""


def _checked_columns(path: Path, name: str, schema: Any) -> list[str]:
    """The columns of this file to read.

    Raises:
        UserError: one is missing, or of another type.
    """
    there = {column.name: column.type for column in schema}
    taken = []
    for column, kind in COLUMNS[name].items():
        if column not in there:
            if column in OPTIONAL:
                continue
            found = ", ".join(f"{other} ({kind_})" for other, kind_ in there.items()) or "none"
            raise UserError(f"{path}: {name} needs a column {column!r}; there are {found}")
        if not kind.fits(there[column]):
            raise UserError(
                f"{path}: column {column!r} of {name} should be {kind.name}, it is {there[column]}"
            )
        taken.append(column)
    return taken


# ---- the data set


@dataclass(frozen=True, kw_only=True)
class PixmoDataset:
    """One of the five. `samples()` streams its files anew each time."""

    name: str
    """One of NAMES."""
    files: tuple[Path, ...]
    """Parquet, in order."""
    _told: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """What was logged already: a second pass over the same rows says it once."""

    @staticmethod
    def open(name: str, repository: str, source: Path | None) -> PixmoDataset | None:
        """The data set, from below `source` or, without one, from the hub; None when `source` lacks it.

        Raises:
            UserError: there is none of this name, or it cannot be downloaded.
        """
        if name not in NAMES:
            raise UserError(
                f"configs/datasets.yaml: {name} is none of {', '.join(NAMES)}{nearest(name, NAMES)}"
            )
        files = hub_files(name, repository) if source is None else local_files(source, name)
        return PixmoDataset(name=name, files=files) if files else None

    @property
    def needs_sizes(self) -> bool:
        """True of pixmo-count: its points are in pixels."""
        return self.name == "pixmo-count"

    def samples(self, sizes: Mapping[str, Size] = {}) -> Iterator[Sample]:
        """All samples, file by file and row by row.

        Args:
            sizes: source -> width and height of its image, of those that are known.

        Raises:
            UserError: a file is damaged or not what it should be, or no row can be used.
        """
        tally = _Tally()
        used = False
        try:
            for path in self.files:
                stem = path.stem
                for number, row in enumerate(_rows(path, self.name)):
                    for sample in self._of_row(row, f"{stem}#{number}", sizes, tally):
                        used = True
                        yield sample
            if not used:
                why = tally.summary() or "there are none"
                raise UserError(f"{self.name}: no row of {self.files[0].parent} can be used: {why}")
        finally:  # also when the caller has enough
            line = f"{self.name}: {tally.summary()}"
            if tally and line not in self._told:
                self._told.add(line)
                log.warning("%s", line)

    def _of_row(
        self, row: Row, where: str, sizes: Mapping[str, Size], tally: _Tally
    ) -> Iterator[Sample]:
        try:
            media = image(row)
            for said in READERS[self.name](row, sizes.get(media.source)):
                if isinstance(said, Unusable):
                    tally.add(said.reason, where)
                    continue
                yield Sample(
                    id=where + said.suffix,
                    dataset=self.name,
                    messages=said.messages,
                    media=(media,),
                    task=said.task,
                )
        except BadRowError as error:
            tally.add(f"left out: {error}", where)


class _Tally:
    """How many rows had which trouble, and the first of each."""

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._times)

    def add(self, reason: str, where: str) -> None:
        self._times[reason] += 1
        self._first.setdefault(reason, where)

    def summary(self) -> str:
        """One line, most frequent first."""
        return "; ".join(
            f"{reason} ({times:,}, first {self._first[reason]})"
            for reason, times in self._times.most_common()
        )


# ---- Parquet


def _rows(path: Path, name: str) -> Iterator[Row]:
    """The rows of one file in their order: texts as bytes, which need not be UTF-8."""
    try:
        with pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            columns = _checked_columns(path, name, file.schema_arrow)
            for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                yield from _as_bytes(batch).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: {_why_unreadable(path, error)}") from None


def _as_bytes(batch: Any) -> Any:
    """The same batch with every text as bytes, so that one that is not UTF-8 costs its row alone."""
    kinds = {_TEXT: pa.binary(), _TEXTS: pa.list_(pa.binary())}
    fields = [
        next((field.with_type(to) for kind, to in kinds.items() if kind.fits(field.type)), field)
        for field in batch.schema
    ]
    return batch.cast(pa.schema(fields))


def _why_unreadable(path: Path, error: Exception) -> str:
    """What is wrong with a file, in one line."""
    try:
        with path.open("rb") as file:
            pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as failed:
        return f"cannot be read ({failed.strerror})"
    if pointer:
        return "a Git LFS pointer, not the data: fetch it with git lfs pull"
    return f"no intact Parquet file ({' '.join(str(error).split())[:160]}); download it again"
