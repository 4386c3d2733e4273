"""Which keys are known, and what happens to the others.

    fields = Fields(value, "", ignored)
    text = fields.take("caption")        # None if it is absent or null
    fields.close()                       # every other key is counted in `ignored`, or FaultError names it

A key that is not used is refused if its name or its value says that text, media or weight would be lost. It
is counted if it is harmless: an id, a size, a number, a short word.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from encode.records.account import FaultError
from encode.records.record import MediaName

IMAGE_KEYS = (
    *("image", "images", "image_path", "image_paths", "image_file", "image_files"),
    *("img", "imgs", "img_path", "img_paths"),
)
VIDEO_KEYS = ("video", "videos", "video_path", "video_paths", "video_file", "video_files")
FILE_KEYS = ("file", "files")
NAME_KEYS = ("file_name", "file_names", "filename", "image_name", "video_name")
"""Keys that name media, or the same media once more: a name beside an embedded image."""
URL_KEYS = ("image_url", "image_urls", "video_url", "video_urls", "url")
"""Keys that name media, or where the media came from if another key names them."""
MEDIA_KEYS = (*IMAGE_KEYS, *VIDEO_KEYS, *FILE_KEYS, *NAME_KEYS, *URL_KEYS)

TURN_KEYS = ("conversations", "conversation", "messages")
LIST_KEYS = ("questions", "qa_pairs")
PROMPT_KEYS = ("question", "prompt", "query", "instruction", "problem", "input", "prefix")
ANSWER_KEYS = (
    *("answer", "answers", "response", "responses", "output", "completion", "solution", "suffix"),
)
CAPTION_KEYS = ("caption", "captions", "description", "text", "txt")
TEXT_KEYS = (*TURN_KEYS, "texts", *LIST_KEYS, *PROMPT_KEYS, *ANSWER_KEYS, *CAPTION_KEYS)
KNOWN_KEYS = frozenset((*MEDIA_KEYS, *TEXT_KEYS, "system", "history", "weight", "image_sha256"))

CHANGES = frozenset(
    {"chosen", "function_call", "functions", "logprobs", "loss", "loss_mask", "loss_weight", "mask"}
    | {"reasoning", "reasoning_content", "rejected", "rejected_images", "rejected_messages"}
    | {
        "rejected_response",
        "sample_weight",
        "thinking",
        "tool_call_id",
        "tool_calls",
        "tools",
        "train",
    }
    | {"train_on_input", "train_on_turn", "trainable", "video_end", "video_start"}
)
"""Keys that change what is learned from the others, in ways that this trainer does not have."""

CARRIES = frozenset(
    {
        "alt",
        "alt_text",
        "audio",
        "audio_path",
        "audios",
        "bbox_caption",
        "choices",
        "code",
        "content",
    }
    | {
        "context",
        "cot",
        "dialog",
        "dialogue",
        "document",
        "explanation",
        "hint",
        "lecture",
        "objects",
    }
    | {"options", "paragraph", "passage", "qa", "rationale", "report", "sentence", "sentences"}
    | {
        "summary",
        "target",
        "transcript",
        "transcripts",
        "turns",
        "utterance",
        "utterances",
        "value",
    }
    | {"A", "B", "C", "D", "E", "option_a", "option_b", "option_c", "option_d"}
)
"""Keys whose values are text or media in formats that are not read."""

HARMLESS = frozenset(
    {
        "__key__",
        "__url__",
        "answer_type",
        "author",
        "bbox",
        "categories",
        "category",
        "class",
        "created",
    }
    | {
        "data_source",
        "dataset",
        "dataset_name",
        "date",
        "date_captured",
        "detail",
        "difficulty",
        "domain",
    }
    | {
        "download_time",
        "error_message",
        "exif",
        "format",
        "generator",
        "hash",
        "height",
        "id",
        "ids",
    }
    | {
        "idx",
        "image_classes",
        "index",
        "info",
        "key",
        "keywords",
        "label",
        "labels",
        "lang",
        "language",
    }
    | {
        "length",
        "license",
        "licenses",
        "md5",
        "meta",
        "metadata",
        "model",
        "multiple_choice_answer",
    }
    | {"name", "ocr_tokens", "origin", "original_height", "original_width", "page", "phash"}
    | {
        "question_tokens",
        "question_type",
        "rating",
        "ratings",
        "resolution",
        "score",
        "scores",
        "sha1",
    }
    | {"sha256", "sha512", "similarity", "size", "source", "sources", "split", "status", "subject"}
    | {"subset", "tag", "tags", "task", "task_type", "timestamp", "topic", "topics", "type", "uid"}
    | {"user_id", "uuid", "version", "width"}
)
"""Keys that are counted and not used, whatever their value is, unless it is media."""
_HARMLESS_END = re.compile(
    r".*_(?:id|ids|idx|index|url|urls|hash|sha256|md5|size|width|height|score|scores|rating|ratings|count"
    r"|type|confidence|date|time|timestamp|license|language|split|source|min|max|tokens|length|num)"
    r"|(?:num|is|has|n)_.*"
)
# `image_2` or `short_caption`: media or text under a name of somebody's own.
_MEANS = re.compile(
    r"(?:.*_)?(?:image|images|img|video|videos|caption|captions|question|questions|answer|answers|text"
    r"|texts|conversation|conversations|message|messages|prompt|response|description|instruction"
    r"|history|query|weight)(?:_?\d+)?(?:_.*)?"
)
_MEDIA_NAME = re.compile(
    r"data:|.+\.(?:apng|avif|avi|bmp|gif|heic|heif|jfif|jpe|jpeg|jpg|jxl|m4v|mkv|mov|mp3|mp4|mpeg|mpg|png"
    r"|svg|tif|tiff|wav|webm|webp)(?:[?#].*)?$",
    re.IGNORECASE | re.DOTALL,
)
# Scripts without spaces between words: a character counts as half a word.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
)
WORDS = 4
"""A value of more words under an unknown key is text."""


class Fields:
    """The keys and values of one object. Each is taken, or judged by `close`."""

    def __init__(
        self,
        value: Mapping[str, Any],
        where: str,
        ignored: Counter[str],
        ignore_keys: frozenset[str] = frozenset(),
    ) -> None:
        """Read `value`.

        Args:
            value: the object.
            where: path of keys to it, as in conversations; empty for a whole record.
            ignored: counts the keys that are not used.
            ignore_keys: keys, or paths of keys, that are counted and not used, whatever they mean.
        """
        self.where = where
        self.ignored = ignored
        self.ignore_keys = ignore_keys
        self._left: dict[str, Any] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise FaultError("unknown key", f"{self.path(repr(key))}: a key that is not text")
            if self.path(key) in ignore_keys:
                self.ignore(key)
            else:
                self._left[key] = item

    def path(self, key: str) -> str:
        """Return the path of a key: conversations.from."""
        key = key if len(key) <= 80 else key[:80] + "..."
        return f"{self.where}.{key}" if self.where else key

    def __contains__(self, key: str) -> bool:
        """Return whether the key is given and not null."""
        return self._left.get(key) is not None

    def left(self) -> list[str]:
        """Return the keys that are given, not null and not taken, in their order."""
        return [key for key, item in self._left.items() if item is not None]

    def peek(self, key: str) -> Any:
        """Return the value of a key, which stays; None if it is absent or null."""
        return self._left.get(key)

    def take(self, key: str) -> Any:
        """Return the value of a key, which is used then; None if it is absent or null."""
        return self._left.pop(key, None)

    def ignore(self, key: str) -> None:
        """Count a key as not used."""
        self._left.pop(key, None)
        self.ignored[self.path(key)] += 1

    def within(self, key: str, value: Any, expected: str) -> Fields:
        """Return the fields of an object in the value of `key`."""
        if not isinstance(value, Mapping):
            raise FaultError(
                "wrong type", f"{self.path(key)}: expected {expected}, found {show(value)}"
            )
        return Fields(value, self.path(key), self.ignored, self.ignore_keys)

    def close(self) -> None:
        """Count all keys that were not taken, or raise FaultError for one that would be lost."""
        for key in list(self._left):
            self._judge(key, self._left[key])
            self.ignore(key)

    def refuse(self, key: str) -> None:
        """Raise FaultError if a key that is not used would be lost."""
        self._judge(key, self._left[key])

    def unknown(self) -> list[str]:
        """Return, for each key that is nearly a known one, what to say of it."""
        kinds = {key: _kind(key) for key in self.left()}
        return [
            f"; did you mean {kind[5:]!r} by {self.path(key)!r}?"
            for key, kind in kinds.items()
            if kind.startswith("near ")
        ]

    def _judge(self, key: str, value: Any) -> None:
        if is_empty(value):
            return
        kind = _kind(key)
        shown = repr(self.path(key))
        if kind == "changes":
            raise FaultError(
                "field that changes the meaning",
                f"{shown} changes what is learned, and is not supported",
            )
        if kind == "harmless":
            if not _has_media(value):
                return
        elif kind == "carries":
            pass
        elif kind.startswith("near"):
            near = kind.removeprefix("near ")
            if near == "weight" or not isinstance(value, bool | int | float):
                raise FaultError("unknown key", f"unknown key {shown}; did you mean {near!r}?")
            return
        elif not carries(value):
            return
        raise FaultError("unknown key", f"unknown key {shown}: {show(value)} would be lost")


def is_known(key: str, *, lists: bool = False) -> bool:
    """Return whether a column is read: one whose value may be a list, if `lists`."""
    known = key in KNOWN_KEYS or key.endswith(("_file_name", "_file_names"))
    return known and not (lists and key in ("weight", "system", "text", "txt", "description"))


def is_empty(value: Any) -> bool:
    """Return whether a value says nothing."""
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not value)


def show(value: Any) -> str:
    """Return a value as it is shown in a message."""
    if isinstance(value, MediaName):
        return f"media {value.text[:60]!r}"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:60] + "...")
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    return f"{value!r:.60}"


@lru_cache(maxsize=10_000)
def _kind(key: str) -> str:
    """Return changes, carries, harmless, near KEY, or unknown."""
    if key in CHANGES:
        return "changes"
    if key in CARRIES:
        return "carries"
    if key in HARMLESS:
        return "harmless"
    if key in KNOWN_KEYS:
        return "carries"
    lower = key.lower()
    if lower in KNOWN_KEYS:
        return f"near {lower}"
    if _HARMLESS_END.fullmatch(lower) and not lower.endswith(("_text", "_caption")):
        return "harmless"
    if near := difflib.get_close_matches(lower[:80], sorted(KNOWN_KEYS), n=1, cutoff=0.8):
        return f"near {near[0]}"
    return "carries" if _MEANS.fullmatch(lower) else "unknown"


def carries(value: Any) -> bool:
    """Return whether a value under an unknown key is text or media."""
    if isinstance(value, MediaName | bytes):
        return True
    if isinstance(value, str):
        if _MEDIA_NAME.match(value):
            return True
        return len(value.split()) + len(_UNSPACED.findall(value)) / 2 > WORDS
    if isinstance(value, Mapping):
        return any(map(carries, value.values()))
    if isinstance(value, list | tuple):
        return any(isinstance(item, str) or carries(item) for item in value)
    return False


def _has_media(value: Any) -> bool:
    if isinstance(value, MediaName | bytes):
        return True
    if isinstance(value, Mapping):
        return any(map(_has_media, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_media, value))
    return isinstance(value, str) and value.startswith("data:")
