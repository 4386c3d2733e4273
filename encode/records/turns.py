"""Conversations: turns of role and text, and the marks that place media in them.

The marks `<image>` and `<video>` in the turns of the user place media. With m marks and n media:

    m = 0    the media come first, in the first turn of the user
    m = n    each mark is the place of one item, in order
    n = 0    the marks are text
    else     a fault

Marks in other turns are text. An image part of a turn (OpenAI's style) is a mark. Media that a turn names by
a key of its own come first in that turn, unless it has marks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cache.format.media_marks import MARK
from cache.store.samples import Message
from configs import nearest
from encode.records.account import FaultError
from encode.records.keys import Fields, show
from encode.records.naming import Kind, Named, media_names, take_named
from encode.records.record import IMAGE_TOKEN, MARKS, MediaName
from encode.records.strict_json import parse

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
}
"""Name of a role in a file -> its name here."""
TOOL_ROLES = frozenset(
    {"tool", "tool_call", "tool_response", "function", "function_call", "observation", "ipython"}
)
MAX_WEIGHT = 1e6

_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")
_VIDEO_PARTS = ("video", "video_url")


@dataclass
class Talk:
    """A conversation as it is read, before its media have places."""

    messages: list[Message] = field(default_factory=list)
    media: list[MediaName] = field(default_factory=list)
    """Media that parts of the turns name, in order."""
    parts: int = 0
    """Parts of the turns that are images or videos, with or without a name."""

    def say(self, role: str, content: str, weight: float = 1.0) -> None:
        """Add a turn."""
        self.messages.append(Message(role=role, content=content, weight=weight))

    def extend(self, other: Talk) -> None:
        """Add the turns of another conversation."""
        self.messages += other.messages
        self.media += other.media
        self.parts += other.parts


def read_turns(fields: Fields, key: str) -> Talk:
    """Take the list of turns at `key`."""
    turns = fields.take(key)
    if isinstance(turns, str) and turns[:1] == "[":  # a list that was stored as JSON
        turns = parse(turns.encode())
    if isinstance(turns, Mapping):
        turns = transposed(turns, key)
    if not isinstance(turns, list | tuple) or not turns:
        raise FaultError("wrong type", f"{key}: expected a list of turns, found {show(turns)}")
    talk = Talk()
    for number, value in enumerate(turns, 1):
        turn = fields.within(key, value, "turns of role and content")
        where = f"{key}: turn {number}"
        role = _role(turn, where)
        named = take_named(turn).all
        talk.media.extend(named)
        content = _content(turn, where, role, talk)
        if named:
            content = _with_media(content, len(named), where, role, talk)
        talk.say(role, content, read_weight(turn, where))
        turn.close()
    return talk


def place(talk: Talk, named: Named) -> tuple[tuple[Message, ...], tuple[MediaName, ...]]:
    """Return the messages of a conversation, with one mark for each of its media, and these media.

    Raises:
        FaultError: the marks and the media do not fit, or there is no turn that can hold the media.
    """
    media = named.all
    if talk.media:
        texts = [name.text for name in talk.media]
        if media and [name.text for name in media] != texts:
            raise FaultError(
                "two keys of media",
                "the parts of the turns and the keys of the line name different media",
            )
        named, media = Named(), tuple(talk.media)
    if not media and not talk.parts:
        return tuple(talk.messages), ()
    marks = [
        mark
        for message in talk.messages
        if message.role == "user"
        for mark in MARK.findall(message.content)
    ]
    if not marks:
        return _media_first(talk.messages, len(media)), media
    if len(marks) != len(media):
        raise _wrong_number(len(marks), len(media), "the turns of the user")
    return tuple(talk.messages), _by_kind(marks, named) or media


def transposed(columns: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the rows of lists of equal length, as which Hugging Face stores a list of objects."""
    lists = {name: column for name, column in columns.items() if column is not None}
    if not all(isinstance(column, list | tuple) for column in lists.values()):
        raise FaultError("wrong type", f"{where}: expected lists of equal length")
    if len({len(column) for column in lists.values()}) != 1:
        raise FaultError("wrong type", f"{where}: expected lists of equal length")
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def read_text(value: Any, where: str, *, number: bool = False) -> str:
    """Return a text as it is written; a number is one if `number`."""
    if number and isinstance(value, int | float) and not isinstance(value, bool):
        return str(getattr(value, "written", value))
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        raise FaultError("empty text", f"{where}: expected text, found none")
    if not isinstance(value, str):
        raise FaultError("wrong type", f"{where}: expected text, found {show(value)}")
    return value


def read_weight(fields: Fields, where: str) -> float:
    """Take the key `weight`, a factor of the loss; 1 if it is absent."""
    weight = fields.take("weight")
    if weight is None:
        return 1.0
    if (
        isinstance(weight, bool)
        or not isinstance(weight, int | float)
        or not 0 <= weight < MAX_WEIGHT
    ):
        where = f"{where}: weight" if where else "weight"
        message = f"{where}: {show(weight)} is not a factor of the loss (0 to 1e6)"
        raise FaultError("not a weight", message)
    return float(weight)


def _role(turn: Fields, where: str) -> str:
    given = turn.among(("role", "from"))
    if len(given) != 1:
        what = "role and from" if given else "no role"
        raise FaultError("wrong role", f"{where}: {what}; a turn has one role")
    name = turn.take(given[0])
    if isinstance(name, str) and name in ROLES:
        return ROLES[name]
    if isinstance(name, str) and name in TOOL_ROLES:
        raise FaultError(
            "field that changes the meaning", f"{where}: the role {name!r} is not supported"
        )
    hint = nearest(name, list(ROLES)) if isinstance(name, str) else ""
    raise FaultError(
        "wrong role", f"{where}: role {show(name)} is none of {', '.join(ROLES)}{hint}"
    )


def _content(turn: Fields, where: str, role: str, talk: Talk) -> str:
    given = turn.among(("content", "value", "text"))
    if len(given) > 1:
        raise FaultError("two texts", f"{where}: {' and '.join(given)}; use one of them")
    if not given:
        for key in turn.left():  # tool calls have no content: they are named first
            turn.refuse(key)
    key = given[0] if given else "content"
    value = turn.take(key)
    if not isinstance(value, list | tuple):
        return read_text(value, f"{where}: {key}", number=role == "assistant")
    pieces = []
    for item in value:
        if isinstance(item, str):
            pieces.append(item)
            continue
        part = turn.within(key, item, "parts of text and media")
        pieces.append(_part(part, where, role, talk))
        part.close()
    content = "".join(pieces)
    return read_text(content, f"{where}: {key}")


def _with_media(content: str, media: int, where: str, role: str, talk: Talk) -> str:
    """Return the text of a turn that names media by a key, with their marks."""
    if role != "user":
        raise FaultError("media of another role", f"{where}: media in a turn of the {role}")
    talk.parts += media
    marks = len(MARK.findall(content))
    if marks not in (0, media):
        raise _wrong_number(marks, media, where)
    return content if marks else IMAGE_TOKEN * media + content


def _part(part: Fields, where: str, role: str, talk: Talk) -> str:
    """Return the text of one part, or its mark."""
    kind = part.take("type")
    known = (*_TEXT_PARTS, *_IMAGE_PARTS, *_VIDEO_PARTS)
    if kind is None:
        kind = next((name for name in ("text", "image", "video") if name in part), None)
    if kind not in known:
        raise FaultError(
            "unknown part", f"{where}: a part of type {show(kind)}; known are {', '.join(known)}"
        )
    if kind in _TEXT_PARTS:
        text = part.take("text")
        if not isinstance(text, str):
            raise FaultError("wrong type", f"{where}: expected text, found {show(text)}")
        return text
    if role != "user":
        raise FaultError("media of another role", f"{where}: media in a turn of the {role}")
    talk.parts += 1
    is_image = kind in _IMAGE_PARTS
    keys = (*(_IMAGE_PARTS[:2] if is_image else _VIDEO_PARTS), "url", "path")
    given = [key for key in keys if key in part]
    if len(given) > 1:
        raise FaultError("two keys of media", f"{where}: {' and '.join(given)}; use one of them")
    if given:
        value = part.take(given[0])
        if isinstance(value, list | tuple):
            raise FaultError("wrong type", f"{where}: a list of media in one part")
        kind_of: Kind = "image" if is_image else "video"
        talk.media.extend(media_names(value, kind_of, part.path(given[0]), part))
    return MARKS[0] if is_image else MARKS[1]


def _wrong_number(marks: int, media: int, where: str) -> FaultError:
    plural = "mark" if marks == 1 else "marks"
    return FaultError(
        "number of marks",
        f"{where}: {marks} {plural} ({' or '.join(MARKS)}) for {media} media; give one for each, or none",
    )


def _media_first(messages: list[Message], media: int) -> tuple[Message, ...]:
    for number, message in enumerate(messages):
        if message.role == "user":
            first = replace(message, content=IMAGE_TOKEN * media + message.content)
            return (*messages[:number], first, *messages[number + 1 :])
    raise FaultError("no turn of the user", "no turn of the user to put the media into")


def _by_kind(marks: list[str], named: Named) -> tuple[MediaName, ...]:
    """Return the media in the order of their marks, if images and videos are named by keys of their own."""
    images, videos = list(named.images), list(named.videos)
    if not images or not videos or marks.count(MARKS[0]) != len(images):
        return ()
    return tuple((images if mark == MARKS[0] else videos).pop(0) for mark in marks)
