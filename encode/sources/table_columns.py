"""What the columns of a table are for, and which rows and turns are used.

layout = find_layout(table, {}, "train.parquet")        # which columns have media, and the key of each
condition = parse_condition("relevance_ratings >= 4")   # of a number, or of a list with one for each turn
"""

from __future__ import annotations

import operator
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cache.format.embedded.scan import MediaColumn, TableFile, declared_types, media_columns
from configs import UserError, nearest
from encode.records.account import FaultError
from encode.records.keys import IMAGE_KEYS, KNOWN_KEYS, VIDEO_KEYS, means_nothing_in_numbers
from model.media.kinds import HEAD_BYTES, recognise


class Layout(NamedTuple):
    """What the columns of one file are for."""

    media: dict[str, tuple[MediaColumn, str]]
    """Column that contains media -> its form, and image, video or '' if that is not known."""
    texts: frozenset[str]
    """Binary columns whose bytes are text."""
    numbered: tuple[str, ...]
    """Columns `image_1`, `image_2`, ... in this order: the images of a row."""
    keys: dict[str, str]
    """Column -> key of the record. Other columns are not used."""
    skipped: tuple[str, ...]
    """Columns that need not be read: those not used, and numbers that mean nothing here."""


def find_layout(
    table: TableFile,
    columns: Mapping[str, str],
    where: str,
    ignore_keys: Collection[str] = (),
) -> Layout:
    """Return what the columns of a file are for.

    Args:
        table: the file.
        columns: key of a record -> column, as the user says it.
        where: names the file in errors.
        ignore_keys: columns that are not used.

    Raises:
        UserError: `columns` names an unknown key or column, or it is not clear which columns have media.
    """
    names = table.schema.names
    for key, column in columns.items():
        if key not in KNOWN_KEYS:
            known = ", ".join(sorted(KNOWN_KEYS))
            raise UserError(
                f"columns: {key!r} is no key of a record{nearest(key, KNOWN_KEYS)} ({known})"
            )
        if column not in names:
            raise UserError(
                f"{where}: no column {column!r}; there are {', '.join(names)}{nearest(column, names)}"
            )
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where}: two columns are named {twice[0]!r}")
    keys = {column: key for key, column in columns.items()} or {name: name for name in names}
    declared = declared_types(table.schema)
    media: dict[str, tuple[MediaColumn, str]] = {}
    texts = set()
    for form in media_columns(table.schema):
        if form.name not in keys:
            continue
        kind = _kind_of(table, form, declared.get(form.name, ""), keys[form.name])
        if kind == "text":
            texts.add(form.name)
        else:
            media[form.name] = (form, kind)
    numbered = _numbered(media) if not columns else []
    used = [n for n, (_, kind) in media.items() if kind and n not in (*ignore_keys, *numbered)]
    odd = [name for name in used if keys[name] not in (*IMAGE_KEYS, *VIDEO_KEYS)]
    if len(odd) == len(used) == 1 and keys[odd[0]] not in KNOWN_KEYS and not numbered:
        if not {"image", "images", "video", "videos"} & set(names):
            keys[odd[0]] = media[odd[0]][1]
    elif len(odd) > 1:
        raise UserError(
            f"{where}: the columns {', '.join(odd)} have media; leave out all but one: --ignore-keys "
            f"{shlex.quote(','.join(odd[1:]))}, or say what they are for, in an entry of "
            f"nanomolmo2.yaml: columns: {{image: {odd[0]}, ...}}"
        )
    skipped = [
        field.name
        for field in table.schema
        if field.name not in media
        and (
            field.name not in keys
            or (not columns and _is_numbers(field.type) and means_nothing_in_numbers(field.name))
        )
    ]
    return Layout(media, frozenset(texts), tuple(numbered), keys, tuple(skipped))


def _numbered(media: Mapping[str, object]) -> list[str]:
    """Return the columns `image_1`, `image_2`, ... in the order of their numbers."""
    found = {name: _NUMBERED.fullmatch(name) for name in media}
    return [name for _, name in sorted((int(m[1]), name) for name, m in found.items() if m)]


def _kind_of(table: TableFile, column: MediaColumn, declared: str, key: str) -> str:
    """Return image, video, text, or '' for other bytes."""
    if declared in ("Image", "Video"):
        return declared.lower()
    found = recognise(table.first_bytes(column, HEAD_BYTES))
    if found.kind:
        return found.kind
    if key in VIDEO_KEYS:
        return "video"
    if key in IMAGE_KEYS:
        return "image"
    # Some programs write texts as bytes. A struct of bytes and path is a file, whatever is in it.
    is_text = found.format.endswith("text") or (not found.format and key in KNOWN_KEYS)
    return "text" if is_text and not column.is_struct and not declared else ""


# ---- conditions

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
_NUMBERED = re.compile(r"(?:image|img|picture|frame)_?(\d{1,4})", re.IGNORECASE)
_CONDITION = re.compile(r"\s*(\S.*?)\s*(==|!=|<=|>=|<|>|=)\s*(\S.*?)\s*", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?")


class Condition(NamedTuple):
    """A column, an operator and a value. Null fulfils no condition."""

    column: str
    operator: str
    value: bool | int | float | str

    def check(self, schema: Any, where: str) -> None:
        """Raise UserError if a file has no such column, or of another type."""
        if self.column not in schema.names:
            raise UserError(
                f"{where}: no column {self.column!r} for the condition {self.text!r}; there are "
                f"{', '.join(schema.names)}{nearest(self.column, schema.names)}"
            )
        type_ = schema.field(self.column).type
        inner = type_.value_type if _is_list(type_) else type_
        text = pa.types.is_string(inner) or pa.types.is_large_string(inner)
        number = pa.types.is_integer(inner) or pa.types.is_floating(inner)
        given = self.value
        if isinstance(given, bool):
            fits = pa.types.is_boolean(inner)
        else:
            fits = text if isinstance(given, str) else number
        if not fits:
            raise UserError(
                f"{where}: {self.column!r} is {type_}, so {self.text!r} cannot be decided"
            )

    @property
    def text(self) -> str:
        """The condition as it is written."""
        return f"{self.column} {self.operator} {self.value}"

    def fits(self, column: Any) -> Any:
        """Return (R,) whether each row fulfils it; of lists, whether the row stays: its turns are judged."""
        if _is_list(column.type):
            return np.ones(len(column), bool)
        return np.array(self._judge(column.to_pylist()), bool)

    def turns(self, value: Any) -> list[bool] | None:
        """Return which items of a list fulfil it; None for another value."""
        return self._judge(value) if isinstance(value, list) else None

    def _judge(self, values: Sequence[Any]) -> list[bool]:
        compare = _OPERATORS[self.operator]
        return [item is not None and bool(compare(item, self.value)) for item in values]


def parse_condition(text: str) -> Condition:
    """Return the condition that a text states.

    Raises:
        UserError: it states none.
    """
    found = _CONDITION.fullmatch(text)
    if not found:
        raise UserError(
            f"where: {text!r} is no condition; write a column, one of {', '.join(_OPERATORS)}, and a value"
        )
    column, sign, value = found.groups()
    if value[0] in "\"'" and value[-1] == value[0] and len(value) > 1:
        return Condition(column, sign, value[1:-1])
    if value in ("true", "false", "True", "False"):
        return Condition(column, sign, value.lower() == "true")
    if _NUMBER.fullmatch(value):
        is_whole = value.lstrip("+-").isdigit() and len(value) < 19
        return Condition(column, sign, int(value) if is_whole else float(value))
    return Condition(column, sign, value)


def drop_turns(value: dict[str, Any], mask: list[bool]) -> int:
    """Remove the turns that a list of ratings excludes; return how many.

    Raises:
        FaultError: no list of turns has that length.
    """
    dropped = mask.count(False)
    if not dropped:
        return 0
    fitting = [
        (key, len(value[key]) // len(mask))
        for key in ("texts", "questions", "qa_pairs", "answers", "conversations", "messages")
        if isinstance(value.get(key), list) and len(value[key]) in (len(mask), 2 * len(mask))
    ]
    if not fitting:
        raise FaultError(
            "ratings without turns", f"{len(mask)} ratings, and no list of as many turns"
        )
    for key, each in fitting:
        value[key] = [item for at, item in enumerate(value[key]) if mask[at // each]]
    return dropped


def _is_numbers(type_: Any) -> bool:
    """Return whether a column has numbers, or lists of numbers."""
    inner = type_.value_type if _is_list(type_) else type_
    types = pa.types
    return bool(types.is_integer(inner) or types.is_floating(inner) or types.is_boolean(inner))


def _is_list(type_: Any) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_))
