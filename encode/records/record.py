"""The types between a file of records and the samples: what one line or row says, whatever its format.

A record is one JSON object, one row of a CSV or Parquet file, or one group of files of a tar. Reading it
gives one `Record` for each independent conversation in it.

    bytes -> Line -> Record -> cache.store.samples.Sample
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cache.store.samples import Message

IMAGE_TOKEN = "<image>"
"""Placeholder of an image or video in a message."""
# The prompts never change, so that runs can be compared.
CAPTION_PROMPT = "Describe this image."
"""User message of a caption of an image."""
VIDEO_PROMPT = "Describe this video."
"""User message of a caption of a video."""
MARKS = ("<image>", "<video>")
"""Either mark in a turn of the user is the place of the next media item of the record, whatever its kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One object of a file, as `stream.read_lines` yields it."""

    where: str
    """File and number of the line in which the object starts, as in photos/metadata.jsonl:7."""
    value: Mapping[str, Any]
    """Its keys and values."""
    offset: int = -1
    """Where its bytes start in the file; -1 if it is a row of a table."""
    length: int = 0
    """Number of its bytes."""


@dataclass(frozen=True, kw_only=True)
class MediaName:
    """A media item as a record names it."""

    text: str
    """A path or URL as written, or a source as `cache.format.embedded` defines it for embedded bytes."""
    kind: Literal["image", "video", ""] = ""
    """What the key or part that names it says; empty: it says nothing. For a file, its content decides."""
    sha256: str | None = None
    """sha256 of its bytes (64 hex digits), if the record states it."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One conversation of a record."""

    format: str
    """Name of the format it was recognised as, for the account: ours, LLaVA, messages, question, caption,
    image alone, ..."""
    messages: tuple[Message, ...] = ()
    """The conversation. Marks are in the turns of the user, one for each of `media`, in order."""
    answers: tuple[str, ...] = ()
    """Further answers to the last question: each replaces the last turn of `messages`."""
    media: tuple[MediaName, ...] = ()
    """Its media, in the order of their marks."""
    weight: float = 1.0
    """Factor on the loss."""
    task: str = ""
    """caption, question, chat, ..."""
    suffix: str = ""
    """End of the sample's id, which differs between the conversations of one record."""
