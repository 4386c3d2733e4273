"""One object of a file of records, with its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One object of a file, as `read_lines` yields it."""

    where: str
    """File and number of the line in which the object starts, as in photos/metadata.jsonl:7."""
    value: Mapping[str, Any]
    """Its keys and values."""
    offset: int = -1
    """Where its bytes start in the file; -1 if it is a row of a Parquet file."""
    length: int = 0
    """Number of its bytes."""
