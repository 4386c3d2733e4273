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
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from encode.records.account import FaultError
from encode.records.record import MediaName


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


IMAGE_KEYS = (
    *("image", "images", "image_path", "image_paths", "image_file", "image_files"),
    *("img", "imgs", "img_path", "img_paths"),
)
VIDEO_KEYS = ("video", "videos", "video_path", "video_paths", "video_file", "video_files")
FILE_KEYS = ("file", "files")
NAME_KEYS = (
    *("file_name", "file_names", "filename", "file_path", "filepath", "path"),
    *("image_name", "image_filename", "img_name", "video_name", "video_filename"),
)
"""Keys that name media, or the same media once more: a name beside an embedded image."""
URL_KEYS = ("image_url", "image_urls", "video_url", "video_urls", "url")
"""Keys that name media, or where the media came from if another key names them."""
MEDIA_KEYS = (*IMAGE_KEYS, *VIDEO_KEYS, *FILE_KEYS, *NAME_KEYS, *URL_KEYS)
NAME_ENDS = ("_file_name", "_file_names")
"""Ends of keys that name media in Hugging Face's image folders."""

TURN_KEYS = ("conversations", "conversation", "messages")
LIST_KEYS = ("questions", "qa_pairs")
PROMPT_KEYS = ("question", "prompt", "query", "instruction", "problem", "input", "prefix")
ANSWER_KEYS = (
    *("answer", "answers", "response", "responses", "output", "completion", "solution", "suffix"),
)
CAPTION_KEYS = ("caption", "captions", "description", "text", "txt")
TEXT_KEYS = (*TURN_KEYS, "texts", *LIST_KEYS, *PROMPT_KEYS, *ANSWER_KEYS, *CAPTION_KEYS)
POINT_KEYS = ("answer_points", "names")
KNOWN_KEYS = frozenset(
    (*MEDIA_KEYS, *TEXT_KEYS, *POINT_KEYS, "system", "history", "weight", "image_sha256")
)
NESTED_KEYS = ("role", "from", "content", "value", "user", "assistant")
"""Keys of turns."""
LISTS = frozenset(
    {key for key in MEDIA_KEYS if key.endswith("s")}
    | {*TURN_KEYS, *LIST_KEYS, "texts", "answers", "responses", "captions", "history"}
)
"""Keys of lists. In a table of text, a cell of such a column may be a list as JSON."""

CHANGES = _words(
    """
    chosen function_call functions loss loss_mask loss_weight mask reasoning reasoning_content rejected
    rejected_images rejected_messages rejected_response rejected_videos sample_weight thinking
    tool_call_id tool_calls tools train train_on_input train_on_turn trainable video_end video_start
    """
)
"""Keys that change what is learned from the others, in ways that this trainer does not have."""

CARRIES = _words(
    """
    A B C D E alt alt_text audio audio_path audios body choices code content context cot dialog dialogue
    document explanation ground_truth gt headline hint lecture objects option_a option_b option_c
    option_d options paragraph passage qa rationale report sentence sentences summary target title
    transcript transcripts turns utterance utterances value
    """
)
"""Keys whose values are text or media in formats that are not read."""

HARMLESS = _words(
    """
    __key__ __url__ answer_type bbox created data_source dataset dataset_name date date_captured detail
    difficulty domain error_message exif format generator hash height id ids idx image_classes index
    info key lang language length license licenses md5 meta metadata model multiple_choice_answer
    ocr_tokens origin original_height original_width phash question_tokens question_type rating ratings
    resolution score scores sha1 sha256 sha512 similarity size source sources split status subset task
    task_type timestamp type uid uuid version width
    """
)
"""Keys that are counted and not used, whatever their value is, unless it is media."""
LABELS = _words(
    """
    author categories category class classes keyword keywords label labels name page species subject
    tag tags topic topics
    """
)
"""Keys that are counted and not used if their values are words, and refused if they are sentences."""

_LABEL = re.compile(
    r".*_(?:id|idx|index|hash|sha256|md5|size|width|height|score|rating|count|type|confidence|date|time"
    r"|timestamp|license|language|split|source|min|max|token|length|num)s?"
    r"|(?:num|is|has|n)_.*"
)
# `image_2` or `short_caption`: media or text under a name of somebody's own.
_MEANS = re.compile(
    r"(?:.*_)?(?:image|img|video|caption|question|answer|text|conversation|message|prompt|response"
    r"|description|instruction|history|query|weight)s?(?:_?\d+)?(?:_.*)?"
)
_MEDIA_NAME = re.compile(
    r"data:.*|.+\.(?:apng|avif|avi|bmp|gif|heic|heif|jfif|jpe|jpeg|jpg|jxl|m4v|mkv|mov|mp3|mp4|mpeg|mpg|png"
    r"|svg|tif|tiff|wav|webm|webp)(?:[?#].*)?",
    re.IGNORECASE | re.DOTALL,
)
# Scripts without spaces between words, and Korean, whose words are long.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
)
_LETTER = re.compile(r"[^\W\d_]")
WORDS = 4
"""A value of more words under an unknown key is text."""
KEY = 80
"""Characters of a key in a message, at most."""


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
        self.has_media = True
        """Whether the record names media. In one that names none, the name of a file is never harmless."""
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
        if len(key) > KEY:
            key = key[:KEY] + "..."
        if not key.isprintable():
            key = repr(key)
        return f"{self.where}.{key}" if self.where else key

    def __contains__(self, key: str) -> bool:
        """Return whether the key is given and not null."""
        return self._left.get(key) is not None

    def among(self, keys: tuple[str, ...]) -> list[str]:
        """Return those of `keys` that are given, not null and not taken, in the order of `keys`."""
        # Called dozens of times for each record, mostly for keys that it lacks.
        if self._left.keys().isdisjoint(_as_set(keys)):
            return []
        get = self._left.get
        return [key for key in keys if get(key) is not None]

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

    def close(self, words: int = WORDS) -> None:
        """Count all keys that were not taken, or raise FaultError for one that would be lost.

        Args:
            words: a value of more words is text.
        """
        for key in list(self._left):
            self.refuse(key, words)
            self.ignore(key)

    def near_misses(self) -> str:
        """Return, for the keys that are nearly known ones, what to say of them."""
        kinds = {key: _kind(key, bool(self.where)) for key in self.left()}
        return "".join(
            f"; did you mean {kind.removeprefix('near ')!r} by {self.path(key)!r}?"
            for key, kind in kinds.items()
            if kind.startswith("near ")
        )

    def refuse(self, key: str, words: int = WORDS) -> None:
        """Raise FaultError if a key that is not used would be lost."""
        value = self._left[key]
        if is_empty(value):
            return
        kind, shown = _kind(key, bool(self.where)), repr(self.path(key))
        if kind == "changes":
            raise FaultError(
                "field that changes the meaning",
                f"{shown} changes what is learned, in a way that is not supported",
                key=self.path(key),
            )
        if kind in ("harmless", "label"):
            lost = _has_media(value)
            if kind == "label":
                lost = lost or any(_is_text(text, WORDS) for text in _strings(value))
            if not self.has_media:
                lost = lost or any(map(_MEDIA_NAME.fullmatch, _strings(value)))
        elif kind == "unknown":
            lost = carries(value, words)
        else:
            lost = "weight" in f"{kind} {key}".lower() or _says(value)
        if not lost:
            return
        if kind.startswith("near "):
            near = kind.removeprefix("near ")
            raise FaultError("unknown key", f"unknown key {shown}; did you mean {near!r}?")
        path = self.path(key)
        if kind == "known":
            message = f"{shown} is not used beside the other keys; {show(value)} would be lost"
            raise FaultError("key without use", message, key=path)
        raise FaultError(
            "unknown key", f"unknown key {shown}: {show(value)} would be lost", key=path
        )


def is_known(key: str) -> bool:
    """Return whether a column is read."""
    return key in KNOWN_KEYS or key.endswith(NAME_ENDS)


def means_nothing_in_numbers(key: str) -> bool:
    """Return whether a key is counted and not used whenever its value is numbers: nothing would be lost."""
    return _kind(key, False) in ("harmless", "label", "unknown")


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
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    return f"{value!r:.60}"


@lru_cache
def _as_set(keys: tuple[str, ...]) -> frozenset[str]:
    return frozenset(keys)


@lru_cache(maxsize=10_000)
def _kind(key: str, nested: bool) -> str:
    """Return changes, carries, harmless, label, known, near KEY, or unknown; `nested`: in turns and parts."""
    if key in CHANGES:
        return "changes"
    if key in CARRIES:
        return "carries"
    if key in HARMLESS:
        return "harmless"
    if key in LABELS:
        return "label"
    if is_known(key):
        return "known"
    lower = key.lower()
    if lower in KNOWN_KEYS:
        return f"near {lower}"
    if _LABEL.fullmatch(lower):
        return "label"
    known = sorted(KNOWN_KEYS) + [*NESTED_KEYS] * nested
    if near := difflib.get_close_matches(lower[:KEY], known, n=1, cutoff=0.8):
        return f"near {near[0]}"
    return "carries" if _MEANS.fullmatch(lower) else "unknown"


def carries(value: Any, words: int = WORDS) -> bool:
    """Return whether a value under an unknown key is text or media."""
    if isinstance(value, str):
        return _is_text(value, words) or bool(_MEDIA_NAME.fullmatch(value))
    if isinstance(value, Mapping):
        return any(carries(item, words) for item in value.values())
    if isinstance(value, list | tuple):
        return any(isinstance(item, str) or carries(item, words) for item in value)
    return isinstance(value, MediaName | bytes)


def _is_text(value: str, words: int) -> bool:
    found = sum(1 for word in value.split() if _LETTER.search(word))
    return found + len(_UNSPACED.findall(value)) / 2 > words


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the values in lists and objects."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _strings(value: Any) -> Iterator[str]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, str))


def _has_media(value: Any) -> bool:
    """Return whether a value contains the bytes of media."""
    return any(text[:5] == "data:" for text in _strings(value)) or any(
        isinstance(leaf, MediaName | bytes) for leaf in _leaves(value)
    )


def _says(value: Any) -> bool:
    """Return whether a value contains any text or media."""
    return _has_media(value) or any(text.strip() for text in _strings(value))
