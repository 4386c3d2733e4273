"""Turn one row of a PixMo table into conversations.

A row maps columns to values, with texts as the bytes in the Parquet file. An unusable row raises
`BadRowError`, and an unusable part of a row gives an `Unusable`. Their reasons can be counted.

The placeholder of the image comes first, so an `<image>` in a text of the data set stays text (see
`model.language.chat_template`). `encode.records.points` writes points as text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from cache.store.samples import MediaRef, Message
from encode.errors import BadRowError
from encode.records.account import FaultError
from encode.records.points import PERCENT, POINTS_WEIGHT, Points, html, pairs
from encode.records.record import CAPTION_PROMPT, IMAGE_TOKEN

TRANSCRIPT_PROMPT = "Describe this image as you would tell it to somebody."
"""User message of a transcript: what an annotator said, before it was turned into a caption."""
NONE = "There are none."
"""Answer to a pointing question about something that the image does not show."""
Row = Mapping[str, Any]
Size = tuple[int, int]
"""Width and height in pixels."""

_TAG = re.compile(r"\[(USER|ASSISTANT)\]")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """The text of one sample."""

    messages: tuple[Message, ...]
    """The messages; the first begins with the placeholder of the image."""
    task: str
    """caption, transcript, point, count, question or chat."""
    suffix: str = ""
    """End of the sample's id, which differs between the conversations of a row."""


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """A part of a row that is left out while the rest is used."""

    reason: str
    """Why, as a phrase equal for all rows with that problem."""


MAX_URL = 32_768
"""Characters of a URL, at most. No server that is known takes longer ones."""

Reader = Callable[[Row, Size | None], Iterator[Conversation | Unusable]]
"""Reads a row of one data set; the second argument is the size of its image, if known."""


def image(row: Row) -> MediaRef:
    """Return the image of a row, with the sha256 of its bytes if the row has one."""
    url = _text(row, "image_url", strip=False)
    if not url.startswith(("http://", "https://")) or not url.isprintable():
        raise BadRowError("image_url is not an http(s) URL")
    if len(url) > MAX_URL:
        raise BadRowError(f"image_url has more than {MAX_URL:,} characters")
    if row.get("image_sha256") is None:
        return MediaRef(source=url)
    sha256 = _text(row, "image_sha256").lower()
    if not _SHA256.fullmatch(sha256):
        raise BadRowError("image_sha256 is not 64 hex digits")
    return MediaRef(source=url, sha256=sha256)


# ---- one reader a data set


def captions(row: Row, _: Size | None) -> Iterator[Conversation | Unusable]:
    """pixmo-cap: yield the caption and each transcript."""
    texts = [("caption", CAPTION_PROMPT, row["caption"], "")]
    for number, text in enumerate(row["transcripts"] or ()):
        texts.append(("transcript", TRANSCRIPT_PROMPT, text, f".t{number}"))
    for task, prompt, text, suffix in texts:
        try:
            yield _conversation(prompt, _text({task: text}, task), task=task, suffix=suffix)
        except BadRowError as error:
            yield Unusable(reason=f"left out: {error}")


def pointing(row: Row, _: Size | None) -> Iterator[Conversation | Unusable]:
    """pixmo-points: yield the points of a label; the row has them in percent."""
    label, points = _label(row), _pairs(row["points"])
    question = f"Point to {label}."
    if points:
        coords = _html(label, points, (PERCENT, PERCENT))
        yield _conversation(question, coords, task="point", weight=POINTS_WEIGHT)
    elif row["count"] == 0:
        yield _conversation(question, NONE, task="point")
    else:
        raise BadRowError("no points, though the count is not 0")


def counting(row: Row, size: Size | None) -> Iterator[Conversation | Unusable]:
    """pixmo-count: yield the count, with points if the size of the image is known.

    The row has points in pixels. If they are unusable, the count is used without them.
    """
    label, count = _label(row), row["count"]
    if count is None or count < 0:
        raise BadRowError("count is not a number of things")
    alone = _conversation(f"How many {label} are there?", str(count), task="count")
    if size is None or count == 0:
        yield alone
        return
    try:
        points = _pairs(row["points"])
        if len(points) != count:
            raise BadRowError("points and count disagree")
        coords = _html(label, points, size)
    except BadRowError as error:
        yield Unusable(reason=f"counted without its points: {error}")
        yield alone
        return
    yield _conversation(
        f"Point to {label} and count them.",
        f"{coords} That makes {count}.",
        task="count",
        weight=POINTS_WEIGHT,
    )


def conversations(row: Row, _: Size | None) -> Iterator[Conversation | Unusable]:
    """pixmo-cap-qa: yield the conversation in the tags of the question, or else in `messages`."""
    try:
        turns = _tagged(_text(row, "question"), _text(row, "answer"))
    except BadRowError:
        if not row.get("messages"):
            raise
        turns = _listed(row)
    yield _conversation(*turns, task="question" if len(turns) == 2 else "chat")


def questions(row: Row, _: Size | None) -> Iterator[Conversation | Unusable]:
    """pixmo-ask-model-anything: yield the question and its answer."""
    yield _conversation(_text(row, "question"), _text(row, "answer"), task="question")


READERS: dict[str, Reader] = {
    "pixmo-cap": captions,
    "pixmo-points": pointing,
    "pixmo-count": counting,
    "pixmo-cap-qa": conversations,
    "pixmo-ask-model-anything": questions,
}
"""Name of a data set -> its reader."""


# ---- texts


def _text(row: Row, column: str, *, strip: bool = True) -> str:
    value = row[column]
    try:
        text = "" if value is None else bytes.decode(value)
    except UnicodeDecodeError:
        raise BadRowError(f"{column} is not UTF-8") from None
    stripped = text.strip()
    if not stripped:
        raise BadRowError(f"no {column}")
    return stripped if strip else text


def _label(row: Row) -> str:
    """Return the label on one line, as it becomes part of sentences and tags."""
    return " ".join(_text(row, "label").split())


def _conversation(
    first: str, *others: str, task: str, suffix: str = "", weight: float = 1.0
) -> Conversation:
    """Return a conversation in which user and assistant alternate; `weight` is that of the answers."""
    sides = cycle((("user", 1.0), ("assistant", weight)))
    messages = tuple(
        Message(role=role, content=text, weight=of_role)
        for (role, of_role), text in zip(sides, (IMAGE_TOKEN + first, *others), strict=False)
    )
    return Conversation(messages=messages, task=task, suffix=suffix)


def _tagged(question: str, answer: str) -> list[str]:
    """Return the turns of `[USER] .. [ASSISTANT] .. [USER] .. [ASSISTANT]` and the answer after them."""
    before, *rest = _TAG.split(question)
    roles, texts = rest[::2], [text.strip() for text in rest[1::2]]
    if not roles:
        return [question, answer]
    if roles[-1] == "ASSISTANT" and not texts[-1]:
        roles, texts = roles[:-1], texts[:-1]
    expected = [("USER", "ASSISTANT")[number % 2] for number in range(len(roles))]
    if before.strip() or roles != expected or len(roles) % 2 == 0 or not all(texts):
        raise BadRowError("the tags in question do not alternate")
    return [*texts, answer]


def _listed(row: Row) -> list[str]:
    """Return the turns of the column `messages`, in which user and assistant alternate."""
    turns = [_text({"messages": turn}, "messages") for turn in row["messages"]]
    if len(turns) % 2:
        turns.append(_text(row, "answer"))
    return turns


# ---- points


def _pairs(points: Any) -> Points:
    try:
        return pairs(points)
    except FaultError as fault:
        raise BadRowError(fault.kind) from None


def _html(label: str, points: Points, full: tuple[float, float]) -> str:
    """Return points as an answer; `full` is the width and height of the image in the unit of the points."""
    try:
        return html(label, points, full)
    except FaultError as fault:
        raise BadRowError(fault.kind) from None
