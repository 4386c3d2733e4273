"""The one chat template: messages in, token ids and loss weights out.

ChatML, the same in training, generation, evaluation and export:

    <|im_start|>user\\n{content}<|im_end|>\\n<|im_start|>assistant\\n{content}<|im_end|>\\n

Assistant content and its <|im_end|> are supervised, with the message's weight; nothing else is.

What a user typed never becomes a control token (see `model.language.tokenizer`). An image's place is the one
exception, and has a rule: a sample knows how many images it has, and the first that many `<image>` marks
in its user turns are their places; further marks, and marks in other turns, are plain text. Without any
mark in the user turns the images stand at the start of the first one. Fewer marks than images (but not
none) is an error.

Once expanded, an image's place is as many `<image>` tokens as it has features. A video's place is, for each
of its frames in time order, the text "{seconds:.1f} " and then the frame's `<image>` tokens. Those texts are
tokenised each by itself, so a video's tokens do not depend on what stands around it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from model.language.tokenizer import IM_END, IM_START, IMAGE_TOKEN, ROLES, encode_text, token_id

TEMPLATE_VERSION = "chatml-1"
"""Changes whenever the same messages would give other ids or weights; tokenised text is stored under it."""

Message = tuple[str, str, float]
"""(role, content, weight); the weight counts for assistant turns only."""


@dataclass(frozen=True)
class TokenizedSample:
    """One sample's text. `n` tokens, an image counting as one."""

    ids: NDArray[np.int32]
    """(n,) token ids with one `<image>` id per image, expanded when packing."""
    weights: NDArray[np.float32]
    """(n,) weight of predicting this token; 0 = not supervised."""


@functools.lru_cache(maxsize=64)
def _marks(tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    """The template's fixed pieces as ids."""
    pieces = {text: [token_id(tokenizer, text)] for text in (IM_START, IM_END, IMAGE_TOKEN)}
    return pieces | {
        text: encode_text(tokenizer, text) for text in ("\n", *(f"{r}\n" for r in ROLES))
    }


def stamp(time_s: float) -> str:
    """What stands before a frame: its time in its video."""
    return f"{max(0.0, time_s):.1f} "  # never "-0.0"


@functools.lru_cache(maxsize=65_536)
def stamp_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    """Token ids of a stamp."""
    return tuple(encode_text(tokenizer, text))


def video_ids(
    tokenizer: PreTrainedTokenizerFast, times_s: Iterable[float], frame_tokens: int
) -> NDArray[np.int32]:
    """What stands at a video's place: each frame's time, then its image tokens."""
    image = (token_id(tokenizer, IMAGE_TOKEN),) * frame_tokens
    ids: list[int] = []
    for time_s in times_s:
        ids += stamp_ids(tokenizer, stamp(time_s))
        ids += image
    return np.array(ids, dtype=np.int32)


def fill_places(
    ids: NDArray[np.int32], image: int, contents: Sequence[NDArray[np.int32]]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Put what stands for each medium at its place.

    Args:
        ids: (n,) tokens with one `<image>` id a medium.
        image: that id.
        contents: what stands at each of those places, in order.

    Returns:
        The (m,) tokens, and (n,) how many of them each of the n became.
    """
    places = np.flatnonzero(ids == image)
    assert len(places) == len(contents), f"{len(places)} places for {len(contents)} media"
    counts = np.ones(len(ids), dtype=np.int64)
    counts[places] = [len(content) for content in contents]
    filled = np.repeat(ids, counts)
    starts = np.cumsum(counts) - counts
    for place, content in zip(places, contents, strict=True):
        filled[starts[place] : starts[place] + len(content)] = content
    return filled, counts


def tokenize_messages(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], images: int
) -> TokenizedSample:
    """Token ids and loss weights of a whole sample; see the module's text for template and rules.

    Raises:
        ValueError: an unknown role, or more images than `<image>` marks.
    """
    ids, weights = _render(tokenizer, messages, images)
    return TokenizedSample(
        ids=np.asarray(ids, dtype=np.int32), weights=np.asarray(weights, dtype=np.float32)
    )


def prompt_ids(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], images: int
) -> list[int]:
    """Token ids of a conversation up to where the assistant begins to speak."""
    ids, _ = _render(tokenizer, messages, images)
    marks = _marks(tokenizer)
    return ids + marks[IM_START] + marks["assistant\n"]


def _render(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], images: int
) -> tuple[list[int], list[float]]:
    marks = _marks(tokenizer)
    ids: list[int] = []
    weights: list[float] = []
    for (role, _, weight), texts in zip(messages, place_images(messages, images), strict=True):
        content: list[int] = []
        for i, text in enumerate(texts):
            content += (marks[IMAGE_TOKEN] if i else []) + encode_text(tokenizer, text)
        head, tail = marks[IM_START] + marks[f"{role}\n"], content + marks[IM_END]
        ids += head + tail + marks["\n"]
        supervised = weight if role == "assistant" else 0.0
        weights += [0.0] * len(head) + [supervised] * len(tail) + [0.0] * len(marks["\n"])
    return ids, weights


def place_images(messages: Sequence[Message], images: int) -> list[list[str]]:
    """Each message's text, cut where an image stands: k + 1 texts for k images in it.

    Raises:
        ValueError: an unknown role, or more images than `<image>` marks.
    """
    for role, _, _ in messages:
        if role not in ROLES:
            raise ValueError(f"role {role!r} is none of {', '.join(ROLES)}")
    users = [i for i, (role, _, _) in enumerate(messages) if role == "user"]
    marks = sum(messages[i][1].count(IMAGE_TOKEN) for i in users)
    texts = [[content] for _, content, _ in messages]
    if images and not marks:
        if not users:
            raise ValueError(f"{images} images but no user turn to hold them")
        texts[users[0]] = [""] * images + texts[users[0]]
        return texts
    if marks < images:
        raise ValueError(f"{images} images but {marks} {IMAGE_TOKEN} marks in the user turns")
    left = images
    for i in users:
        texts[i] = texts[i][0].split(IMAGE_TOKEN, left) if left else texts[i]
        left -= len(texts[i]) - 1
    return texts
