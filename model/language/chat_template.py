"""The chat template: messages to token ids and loss weights.

ChatML, in training, generation, evaluation and export alike:

    <|im_start|>user\\n{content}<|im_end|>\\n<|im_start|>assistant\\n{content}<|im_end|>\\n

Assistant content and its <|im_end|> are supervised, with the weight of the message. Nothing else is.

Text of a user never becomes a control token (see `model.language.tokenizer`), except for the marks `<image>`
and `<video>`, which become placeholders of media by the rules of `cache.format.media_marks`. A placeholder is
one `<image>` token, for videos too.

When a sample is packed, the placeholder of an image becomes one `<image>` token for each of its features.
The placeholder of a video becomes, for each frame in time order, the text "{seconds:.1f} " and one `<image>`
token for each feature of the frame. Each of these texts is tokenised alone, so the tokens of a video do not
depend on the text around it.

A tokenizer from somebody else's folder has that folder's template instead (`model.language.folder_template`).
What is said here of placeholders holds for it, too.

n tokens of a sample with one token a placeholder, m tokens after expansion.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from cache.format.media_marks import split_at_marks
from model.language.folder_template import attached
from model.language.records import FOLDER_TEMPLATE, TEMPLATE_VERSION
from model.language.tokenizer import (
    IM_END,
    IM_START,
    IMAGE_TOKEN,
    ROLES,
    encode_text,
    image_id,
    token_id,
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
"""The template for transformers' tokenizers (Jinja), of messages whose content is text."""

Message = tuple[str, str, float]
"""(role, content, weight). Only the weights of assistant turns are used."""


@dataclass(frozen=True)
class TokenizedSample:
    """The text of one sample as tokens."""

    ids: NDArray[np.int32]
    """(n,) token ids; one `<image>` id for each image or video, expanded when the sample is packed."""
    weights: NDArray[np.float32]
    """(n,) weight of predicting each token; 0: not supervised."""


def template_version(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the version of a tokenizer's template, one of `model.language.records.VERSIONS`."""
    return TEMPLATE_VERSION if attached(tokenizer) is None else FOLDER_TEMPLATE


def template_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return what identifies a tokenizer's template: tokenised text is stored under it."""
    template = attached(tokenizer)
    return TEMPLATE_VERSION if template is None else template.digest


def template_text(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a tokenizer's template in Jinja's language, for transformers."""
    template = attached(tokenizer)
    return CHAT_TEMPLATE if template is None else template.text


@functools.lru_cache(maxsize=64)
def _template_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    """Return the ids of the template's fixed pieces."""
    pieces = {text: [token_id(tokenizer, text)] for text in (IM_START, IM_END, IMAGE_TOKEN)}
    return pieces | {
        text: encode_text(tokenizer, text) for text in ("\n", *(f"{r}\n" for r in ROLES))
    }


def timestamp_text(time_s: float) -> str:
    """Return the text before a frame of a video: its time."""
    return f"{max(0.0, time_s):.1f} "  # never "-0.0"


@functools.lru_cache(maxsize=65_536)  # tenths of a second of a video of 1.8 hours
def timestamp_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    """Return the token ids of a frame's time."""
    return tuple(encode_text(tokenizer, text))


def video_token_ids(
    tokenizer: PreTrainedTokenizerFast, times_s: Iterable[float], frame_tokens: int
) -> NDArray[np.int32]:
    """Return the (m,) tokens of a video: for each frame its time, then `frame_tokens` image tokens."""
    image = (image_id(tokenizer),) * frame_tokens
    ids: list[int] = []
    for time_s in times_s:
        ids += timestamp_ids(tokenizer, timestamp_text(time_s))
        ids += image
    return np.array(ids, dtype=np.int32)


def fill_placeholders(
    ids: NDArray[np.int32], image: int, contents: Sequence[NDArray[np.int32]]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Replace the placeholder of each image and video by its tokens.

    Args:
        ids: (n,) tokens with one `<image>` id for each image or video.
        image: id of `<image>`.
        contents: the tokens of each image and video, in order.

    Returns:
        The (m,) tokens, and (n,) the number of them that each of the n became.
    """
    placeholders = np.flatnonzero(ids == image)
    assert len(placeholders) == len(contents), (
        f"{len(placeholders)} placeholders for {len(contents)} media"
    )
    counts = np.ones(len(ids), dtype=np.int64)  # (n,) tokens that each token becomes
    counts[placeholders] = [len(content) for content in contents]
    filled = np.repeat(ids, counts)  # (n,) -> (m,)
    starts = np.cumsum(counts) - counts
    for placeholder, content in zip(placeholders, contents, strict=True):
        filled[starts[placeholder] : starts[placeholder] + len(content)] = content
    return filled, counts


def tokenize_messages(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], media: int
) -> TokenizedSample:
    """Return token ids and loss weights of a whole sample that has `media` media.

    Raises:
        ValueError: a role is unknown, the marks do not fit the media, or the template of a folder refuses the
            messages.
    """
    if (template := attached(tokenizer)) is not None:
        return TokenizedSample(*template.tokenize(messages, media))
    ids, weights = _render(tokenizer, messages, media)
    return TokenizedSample(
        ids=np.asarray(ids, dtype=np.int32), weights=np.asarray(weights, dtype=np.float32)
    )


def has_answer(messages: Sequence[Message]) -> bool:
    """Whether a sample has text to learn: an assistant turn that says something, with a weight above 0."""
    return any(
        role == "assistant" and weight > 0 and text.strip() for role, text, weight in messages
    )


def prompt_ids(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], media: int
) -> list[int]:
    """Return the token ids of a conversation, up to the start of the assistant's next turn.

    Raises:
        ValueError: see `tokenize_messages`.
    """
    if (template := attached(tokenizer)) is not None:
        return template.prompt(messages, media)
    ids, _ = _render(tokenizer, messages, media)
    pieces = _template_ids(tokenizer)
    return ids + pieces[IM_START] + pieces["assistant\n"]


def _render(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], media: int
) -> tuple[list[int], list[float]]:
    for role, _, _ in messages:
        if role not in ROLES:
            raise ValueError(f"role {role!r} is none of {', '.join(ROLES)}")
    pieces = _template_ids(tokenizer)
    ids: list[int] = []
    weights: list[float] = []
    turns = split_at_marks([(role, content) for role, content, _ in messages], media)
    for (role, _, weight), texts in zip(messages, turns, strict=True):
        content: list[int] = []
        for i, text in enumerate(texts):
            content += (pieces[IMAGE_TOKEN] if i else []) + encode_text(tokenizer, text)
        head, tail = pieces[IM_START] + pieces[f"{role}\n"], content + pieces[IM_END]
        ids += head + tail + pieces["\n"]
        supervised = weight if role == "assistant" else 0.0
        weights += [0.0] * len(head) + [supervised] * len(tail) + [0.0] * len(pieces["\n"])
    return ids, weights


@dataclass(frozen=True)
class Turn:
    """The place of one turn in the tokens of a sample."""

    role: str
    """`system`, `user` or `assistant`."""
    start: int
    """Its first token."""
    content: int
    """The first token after its role."""
    end: int
    """The first token after it."""


def find_turns(tokenizer: PreTrainedTokenizerFast, ids: NDArray[np.int32]) -> list[Turn]:
    """Return the turns of a tokenised sample of our own template.

    Text never contains the token that begins a turn.
    """
    pieces = _template_ids(tokenizer)
    heads = {role: pieces[IM_START] + pieces[f"{role}\n"] for role in ROLES}
    starts = np.flatnonzero(ids == pieces[IM_START][0]).tolist()
    turns = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        role = next(
            r for r, head in heads.items() if ids[start : start + len(head)].tolist() == head
        )
        turns.append(Turn(role, start, start + len(heads[role]), end))
    return turns


def cut_turns(
    text: TokenizedSample, turns: Sequence[Turn], first: int, end: int, image: int
) -> TokenizedSample:
    """Return turns [first, end) of a sample as a sample of its own, with the context that they need.

    The system turns before them are repeated, and the media before them are put at the start of the first
    user turn. Nothing of the context is supervised.

    Args:
        text: the whole sample.
        turns: its turns, see `find_turns`.
        first: the first turn of the part.
        end: the first turn after the part.
        image: id of `<image>`.
    """
    begin, stop = turns[first].start, turns[end - 1].end
    seen = int((text.ids[:begin] == image).sum())
    user = next((turn for turn in turns[first:end] if turn.role == "user"), None)
    assert user is not None or not seen, "no user turn for the media of earlier turns"
    at = begin if user is None else user.content
    system = [np.arange(turn.start, turn.end) for turn in turns[:first] if turn.role == "system"]
    head = np.concatenate([*system, np.arange(begin, at)])
    ids = [text.ids[head], np.full(seen, image, dtype=np.int32), text.ids[at:stop]]
    weights = [text.weights[head], np.zeros(seen, dtype=np.float32), text.weights[at:stop]]
    return TokenizedSample(ids=np.concatenate(ids), weights=np.concatenate(weights))
