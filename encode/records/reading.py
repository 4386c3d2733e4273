"""Read one record in any of the known formats.

    records = read_records({"image": "a.jpg", "conversations": [...]}, account)

docs/FEATURE_CACHE.md lists the formats and their keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cache.store.samples import Message
from encode.records.account import Account, FaultError
from encode.records.keys import (
    ANSWER_KEYS,
    CAPTION_KEYS,
    LIST_KEYS,
    PROMPT_KEYS,
    TEXT_KEYS,
    TURN_KEYS,
    Fields,
    is_empty,
    show,
)
from encode.records.naming import take_media
from encode.records.points import PERCENT, POINTS_WEIGHT, html, pairs
from encode.records.record import CAPTION_PROMPT, Record
from encode.records.turns import Talk, place, read_text, read_turns, read_weight, transposed

ALONE = "image alone"
"""Format of a record that names media and has no text."""


@dataclass(frozen=True)
class Conversation:
    """One conversation of a record, before its media have places."""

    format: str
    task: str
    talk: Talk
    answers: tuple[str, ...] = ()
    """Further answers to the last question."""
    suffix: str = ""


def read_records(value: Mapping[str, Any], account: Account) -> tuple[Record, ...]:
    """Return the conversations of one record.

    Args:
        value: its keys and values. The bytes of embedded media are replaced by a `MediaName`.
        account: counts the record by its format, and the keys that were ignored.

    Raises:
        FaultError: text, media or weight would be lost, or the record is not of a known format. Then
            `account` is unchanged.
    """
    ignored: Counter[str] = Counter()
    fields = Fields(value, "", ignored, account.ignore_keys)
    records = _read(fields)
    fields.has_media = any(record.media for record in records)
    fields.close()
    account.add_line(records[0].format, ignored)
    return records


def _read(fields: Fields) -> tuple[Record, ...]:
    named = take_media(fields)
    weight = read_weight(fields, "")
    reader, key = _reader(fields)
    if reader is None:
        if not named.all:
            _refuse_unknown(fields)
        # Without any text, two words under an unknown key may be the text.
        fields.close(words=1)
        return (Record(format=ALONE, media=named.all, weight=weight),)
    records = []
    system = fields.take("system")
    for conversation in reader(fields, key):
        talk = conversation.talk
        if not is_empty(system):
            _put_system(talk, read_text(system, "system"), fields)
        if conversation.task == "caption" and not named.all:
            raise FaultError("no media", f"{key}: a caption of no image or video")
        messages, media = place(talk, named)
        learned = any(message.role == "assistant" for message in messages)
        records.append(
            Record(
                format=conversation.format + " without an answer" * (not learned),
                messages=messages,
                answers=conversation.answers,
                media=media,
                weight=weight,
                task=conversation.task,
                suffix=conversation.suffix,
            )
        )
    _settle_other_texts(fields, key, records)
    return tuple(records)


Reader = Callable[[Fields, str], Iterator[Conversation]]


def _reader(fields: Fields) -> tuple[Reader | None, str]:
    """Return the reader of a record's text, and the key that it starts with."""
    given = fields.among(TEXT_KEYS)
    given = [key for key in given if not is_empty(fields.peek(key))] or given
    for keys, reader in _READERS:
        for key in keys:
            if key in given:
                return reader, key
    return None, ""


def _turns(fields: Fields, key: str) -> Iterator[Conversation]:
    """LLaVA, ShareGPT: `conversations` of from and value. OpenAI, Hugging Face: `messages`."""
    value = fields.peek(key)
    first = value[0] if isinstance(value, list | tuple) and value else None
    if isinstance(first, Mapping) and "assistant" in first:
        yield from _texts(fields, key)
        return
    name = "messages" if key == "messages" else "LLaVA"
    yield Conversation(name, "chat", read_turns(fields, key))


def _texts(fields: Fields, key: str) -> Iterator[Conversation]:
    """the_cauldron, FineVision: `texts` of user and assistant, one conversation."""
    talk = Talk()
    for number, turn in enumerate(_listed(fields, key), 1):
        pair = fields.within(key, turn, "pairs of user and assistant")
        talk.say("user", read_text(pair.take("user"), f"{key}: turn {number}: user"))
        answer = read_text(pair.take("assistant"), f"{key}: turn {number}: assistant", number=True)
        talk.say("assistant", answer)
        pair.close()
    yield Conversation("texts", "chat" if len(talk.messages) > 2 else "question", talk)


def _questions(fields: Fields, key: str) -> Iterator[Conversation]:
    """Questions of one image, which are independent: a list of objects, or lists of equal length."""
    if "answer_points" in fields:
        yield from _points(fields, key)
        return
    value = fields.peek(key)
    if isinstance(value, Mapping):  # a struct of lists, as Hugging Face stores a list of objects
        value = transposed(value, key)
    elif isinstance(value, list | tuple) and any(isinstance(item, str) for item in value):
        columns = {"question": value, "answer": fields.take("answers")}
        value = transposed(columns, f"{key} and answers")
    fields.take(key)
    if not isinstance(value, list | tuple) or not value:
        raise FaultError("wrong type", f"{key}: expected a list of questions, found {show(value)}")
    for number, item in enumerate(value):
        pair = fields.within(key, item, "pairs of question and answer")
        talk, answers = _asked(pair, f"{key} {number + 1}: ")
        pair.close()
        yield Conversation("questions", "question", talk, answers, f".q{number}")


def _points(fields: Fields, key: str) -> Iterator[Conversation]:
    """CoSyn-point: `questions`, their `answer_points` in percent, and the `names` of what is pointed at."""
    questions = fields.take(key)
    columns = {"question": questions, "points": fields.take("answer_points")}
    columns["name"] = fields.take("names") or questions
    for number, row in enumerate(transposed(columns, f"{key}, answer_points and names")):
        where = f"{key} {number + 1}"
        talk = Talk()
        talk.say("user", read_text(row["question"], where))
        label = " ".join(read_text(row["name"], f"{where}: name").split())
        points = pairs(row["points"])
        if not points:
            raise FaultError("no points", f"{where}: no points")
        talk.say("assistant", html(label, points, (PERCENT, PERCENT)), POINTS_WEIGHT)
        yield Conversation("points", "point", talk, (), f".q{number}")


def _pair(fields: Fields, _: str) -> Iterator[Conversation]:
    """A question and its answer or answers, under the usual names; `history` comes before them."""
    talk, answers = _asked(fields, "")
    task = "question" if len(talk.messages) == 2 else "chat"
    yield Conversation("questions", task, talk, answers)


def _caption(fields: Fields, key: str) -> Iterator[Conversation]:
    """A caption, or several of them."""
    first, *others = _answers(fields, key)
    talk = Talk()
    talk.say("user", CAPTION_PROMPT)
    talk.say("assistant", first)
    yield Conversation("captions", "caption", talk, tuple(others))


_READERS: tuple[tuple[tuple[str, ...], Reader], ...] = (
    (TURN_KEYS, _turns),
    (("texts",), _texts),
    (LIST_KEYS, _questions),
    (PROMPT_KEYS + ANSWER_KEYS, _pair),
    (CAPTION_KEYS, _caption),
)


def _asked(fields: Fields, where: str) -> tuple[Talk, tuple[str, ...]]:
    """Take a question with its answers. Return the conversation, and the answers after the first."""
    prompts = [k for k in fields.among(PROMPT_KEYS) if not is_empty(fields.peek(k))]
    answers = fields.among(ANSWER_KEYS)
    answers = [k for k in answers if not is_empty(fields.peek(k))] or answers
    if not prompts or not answers:
        found = (prompts or answers or ["neither"])[0]
        lacks = "an answer" if prompts else "a question"
        near = fields.near_misses()
        raise FaultError(
            "half a pair", f"{where}{found} without {lacks}: question and answer go together{near}"
        )
    if prompts[:2] == ["instruction", "input"]:
        prompts[:2] = ["instruction"]
    for keys in (prompts, answers):
        if len(keys) > 1:
            message = f"{where}has {' and '.join(keys)}; use one of them"
            raise FaultError("two texts", message, key=fields.path(keys[1]))
    if _is_turns(fields.peek(prompts[0])) and _is_turns(fields.peek(answers[0])):  # TRL's
        talk = read_turns(fields, prompts[0])
        talk.extend(read_turns(fields, answers[0]))
        return talk, ()
    talk = Talk()
    _history(fields, talk)
    question = read_text(fields.take(prompts[0]), f"{where}{prompts[0]}")
    more = fields.take("input") if prompts[0] == "instruction" else None
    if not is_empty(more):
        question += "\n" + read_text(more, f"{where}input")
    first, *others = _answers(fields, answers[0], where)
    talk.say("user", question)
    talk.say("assistant", first)
    return talk, tuple(others)


def _is_turns(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in value)
    )


def _answers(fields: Fields, key: str, where: str = "") -> list[str]:
    """Take one answer, or a list of answers: texts, or objects as in VQA."""
    value = fields.take(key)
    if not isinstance(value, list | tuple):
        return [read_text(value, f"{where}{key}", number=True)]
    texts = []
    for item in value:
        text = item
        if isinstance(item, Mapping):
            answer = fields.within(key, item, "answers")
            name = next((k for k in ("answer", "text", "caption") if k in answer), "answer")
            text = answer.take(name)
            answer.close()
        texts.append(read_text(text, f"{where}{key}", number=True))
    if not texts:
        raise FaultError("empty text", f"{where}{key}: an empty list")
    return texts


def _history(fields: Fields, talk: Talk) -> None:
    """Take the turns before a question: [[question, answer], ...]."""
    value = fields.take("history")
    if is_empty(value):
        return
    for pair in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise FaultError("wrong type", "history: expected pairs of question and answer")
        talk.say("user", read_text(pair[0], "history"))
        talk.say("assistant", read_text(pair[1], "history"))


def _listed(fields: Fields, key: str) -> list[Any] | tuple[Any, ...]:
    value = fields.take(key)
    if isinstance(value, Mapping):
        value = transposed(value, key)
    if not isinstance(value, list | tuple) or not value:
        raise FaultError("wrong type", f"{key}: expected a list of turns, found {show(value)}")
    return value


def _put_system(talk: Talk, text: str, fields: Fields) -> None:
    """Put the text of the key `system` first; it may be there already."""
    if talk.messages[0].role != "system":
        talk.messages.insert(0, Message(role="system", content=text))
    elif talk.messages[0].content == text:
        fields.ignore("system")
    else:
        raise FaultError("two texts", "has system and a turn of the system; use one of them")


def _settle_other_texts(fields: Fields, key: str, records: list[Record]) -> None:
    """Count the keys of texts that repeat a turn; refuse those that say something else."""
    said = {message.content.strip() for record in records for message in record.messages}
    said.update(answer.strip() for record in records for answer in record.answers)
    for other in fields.left():
        value = fields.peek(other)
        if other not in TEXT_KEYS or is_empty(value):
            continue
        if not isinstance(value, str) or value.strip() not in said:
            raise FaultError("two texts", f"has {key} and {other}; use one of them", key=other)
        fields.ignore(other)


def _refuse_unknown(fields: Fields) -> None:
    """Raise FaultError for a record that names no media and has no text."""
    fields.has_media = False
    fields.close()
    keys = ", ".join(fields.ignored)[:80] or "none"
    raise FaultError(
        "nothing known", f'names no file (as "image" or "file") and has no text; keys: {keys}'
    )
