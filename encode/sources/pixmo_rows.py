"""What PixMo's rows say, as conversations: one row in, messages out. No files here.

A row is a mapping of its columns, texts as the bytes that Parquet holds. What cannot be used is a
`BadRowError` (the row) or an `Unusable` (a part of it), each with a reason that can be counted.

The image's mark always comes first, so an `<image>` in somebody's words stays text (see
`model.language.chat_template`). Points are Molmo2's html-v2, from 0 to 1000 in both directions, three
digits at least: `<points coords="1 1 042 400 2 911 800">label</points>`: number of the image, then for
each point its own number, x and y. Points go from left to right, so that there is one right answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from cache.store.samples import MediaRef, Message
from encode.sources.folder import CAPTION_PROMPT, IMAGE_TOKEN

TRANSCRIPT_PROMPT = "Describe this image as you would tell it to somebody."
"""For what an annotator said aloud, before it was made into a caption."""
NONE = "There are none."
POINTS_WEIGHT = 0.2
"""Of answers made of coordinates: many tokens that say little each would drown the rest (Molmo2's value)."""

SCALE = 1000
"""Coordinates go from 0 to this."""
PERCENT = 100.0
EDGE = 0.05
"""A click this far outside (in widths or heights) is moved to the edge; further out it is no point."""

Row = Mapping[str, Any]
Size = tuple[int, int]
"""Width and height in pixels."""
Points = Sequence[tuple[Any, Any]]

_TAG = re.compile(r"\[(USER|ASSISTANT)\]")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BadRowError(Exception):
    """Why a row cannot be used: a few words, the same for every row with that trouble."""


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One sample's worth of a row."""

    messages: tuple[Message, ...]
    """The image's mark first."""
    task: str
    """caption, transcript, point, count, question or chat."""
    suffix: str = ""
    """Tells it from the row's others."""


@dataclass(frozen=True, kw_only=True)
class Unusable:
    """A part of a row that is left out, while the rest is used."""

    reason: str
    """As of `BadRowError`, a whole phrase."""


Reader = Callable[[Row, Size | None], Iterator[Conversation | Unusable]]
"""What one data set makes of a row; the size of the row's image is given when it is known."""


def image(row: Row) -> MediaRef:
    """The image a row is about, with the hash its bytes must have where the row has one."""
    url = _text(row, "image_url", strip=False)
    if not url.startswith(("http://", "https://")) or not url.isprintable():
        raise BadRowError("image_url is no http(s) address")
    if row.get("image_sha256") is None:
        return MediaRef(source=url)
    sha256 = _text(row, "image_sha256").lower()
    if not _SHA256.fullmatch(sha256):
        raise BadRowError("image_sha256 is not 64 hex digits")
    return MediaRef(source=url, sha256=sha256)


# ---- one reader a data set


def captions(row: Row, _: Size | None) -> Iterator[Conversation | Unusable]:
    """pixmo-cap: the caption, and each transcript of what was said aloud."""
    try:
        yield _exchange(CAPTION_PROMPT, _text(row, "caption"), task="caption")
    except BadRowError as error:
        yield Unusable(reason=f"left out: {error}")
    for number, said in enumerate(row["transcripts"] or ()):
        try:
            told = _text({"transcript": said}, "transcript")
        except BadRowError as error:
            yield Unusable(reason=f"left out: {error}")
            continue
        yield _exchange(TRANSCRIPT_PROMPT, told, task="transcript", suffix=f".t{number}")


def pointing(row: Row, _: Size | None) -> Iterator[Conversation | Unusable]:
    """pixmo-points: where all of something is; coordinates come in percent."""
    label, points = _label(row), _pairs(row["points"])
    asked = f"Point to {label}."
    if points:
        yield _exchange(
            asked, _html(label, points, (PERCENT, PERCENT)), task="point", weight=POINTS_WEIGHT
        )
    elif row["count"] == 0:
        yield _exchange(asked, NONE, task="point")
    else:
        raise BadRowError("no points, though the count is not 0")


def counting(row: Row, size: Size | None) -> Iterator[Conversation | Unusable]:
    """pixmo-count: how many there are; pointing at them too, once the image's size is known.

    Coordinates come in pixels. Points that cannot be trusted take nothing from the count.
    """
    label, count = _label(row), row["count"]
    if count is None or count < 0:
        raise BadRowError("count is no number of things")
    alone = _exchange(f"How many {label} are there?", str(count), task="count")
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
    yield _exchange(
        f"Point to {label} and count them.",
        f"{coords} That makes {count}.",
        task="count",
        weight=POINTS_WEIGHT,
    )


def conversations(row: Row, _: Size | None) -> Iterator[Conversation | Unusable]:
    """pixmo-cap-qa: the question carries [USER] and [ASSISTANT] tags; `messages` is the fallback."""
    try:
        turns = _tagged(_text(row, "question"), _text(row, "answer"))
    except BadRowError:
        if not row.get("messages"):
            raise
        turns = _listed(row)
    yield _chat(turns)


def questions(row: Row, _: Size | None) -> Iterator[Conversation | Unusable]:
    """pixmo-ask-model-anything: a question and its answer."""
    yield _exchange(_text(row, "question"), _text(row, "answer"), task="question")


READERS: dict[str, Reader] = {
    "pixmo-cap": captions,
    "pixmo-points": pointing,
    "pixmo-count": counting,
    "pixmo-cap-qa": conversations,
    "pixmo-ask-model-anything": questions,
}
"""By the data set's name."""


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
    """On one line: it stands within sentences and tags."""
    return " ".join(_text(row, "label").split())


def _exchange(
    asked: str, told: str, *, task: str, suffix: str = "", weight: float = 1.0
) -> Conversation:
    """One question, one answer."""
    user = Message(role="user", content=IMAGE_TOKEN + asked)
    assistant = Message(role="assistant", content=told, weight=weight)
    return Conversation(messages=(user, assistant), task=task, suffix=suffix)


def _chat(turns: Sequence[str]) -> Conversation:
    """Turns of user and assistant in alternation."""
    messages = tuple(
        Message(role=role, content=text)
        for role, text in zip(cycle(("user", "assistant")), (IMAGE_TOKEN + turns[0], *turns[1:]))
    )
    return Conversation(messages=messages, task="question" if len(turns) == 2 else "chat")


def _tagged(question: str, answer: str) -> list[str]:
    """The turns of `[USER] .. [ASSISTANT] .. [USER] .. [ASSISTANT]` and the answer that follows."""
    before, *rest = _TAG.split(question)
    roles, texts = rest[::2], [text.strip() for text in rest[1::2]]
    if not roles:
        return [question, answer]
    if roles[-1] == "ASSISTANT" and not texts[-1]:
        roles, texts = roles[:-1], texts[:-1]
    expected = [("USER", "ASSISTANT")[number % 2] for number in range(len(roles))]
    if before.strip() or roles != expected or len(roles) % 2 == 0 or not all(texts):
        raise BadRowError("the tags in question make no conversation")
    return [*texts, answer]


def _listed(row: Row) -> list[str]:
    """The turns of the column `messages`: user and assistant in alternation, as texts."""
    turns = [_text({"messages": turn}, "messages") for turn in row["messages"]]
    if len(turns) % 2:
        turns.append(_text(row, "answer"))
    return turns


# ---- points


def thousandths(value: float | None, full: float) -> int:
    """`value` of `full` as an integer from 0 to 1000.

    Raises:
        BadRowError: not a number, or beyond the edge by more than a click may be.
    """
    share = float("nan") if value is None else value / full
    if not -EDGE <= share <= 1 + EDGE:  # NaN is refused too
        raise BadRowError("a point outside the image")
    return min(SCALE, max(0, round(SCALE * share)))


def _pairs(points: Any) -> Points:
    """(x, y) of each point, whichever way they are nested: a list of structs, or a struct of lists."""
    if points is None:
        return ()
    if isinstance(points, Mapping):
        across, down = points["x"] or (), points["y"] or ()
        if len(across) != len(down):
            raise BadRowError("points lack an x or a y")
        return tuple(zip(across, down, strict=True))
    if None in points:
        raise BadRowError("points lack an x or a y")
    return [(point["x"], point["y"]) for point in points]


def _html(label: str, points: Points, full: tuple[float, float]) -> str:
    """As an answer; `full` is the image's width and height in the points' unit."""
    places = sorted((thousandths(x, full[0]), thousandths(y, full[1])) for x, y in points)
    coords = " ".join(f"{n} {x:03} {y:03}" for n, (x, y) in enumerate(places, 1))
    return f'<points coords="1 {coords}">{label}</points>'
