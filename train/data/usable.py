"""Leave out samples that cannot be trained on, and cut those that are longer than the window.

    samples = learnable(samples, tokens)
    samples = fit_window(samples, tokens, placeholders, max_tokens=4096, over_long="split")

Whatever is left out is counted and logged, with the first sample by name.

A sample is cut between turns, after an answer and before the next question, into as few parts as fit. A part
is a sample of its own. It begins with the system turns before it; its first user turn begins with the media
before it. Every answer is in one part, so the supervised tokens of all parts are those of the sample. A turn
is never cut: a question with its answer, or several that share a turn, that do not fit with the media before
them are left out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from cache.store.references import VIDEO, edges_of
from configs import UserError
from model.language.chat_template import TokenizedSample, Turn
from train.data.placeholders import Placeholders
from train.data.sample_list import Ints, SampleList
from train.data.tokens import TokenStore

log = logging.getLogger(__name__)

OverLong = Literal["refuse", "split", "leave-out"]
"""What becomes of samples that are longer than the window."""


class NothingToLearnError(UserError):
    """No sample of a list has text to learn, or none of those fits the window."""


def learnable(samples: SampleList, tokens: TokenStore) -> SampleList:
    """Return the samples that have text to learn and whose media fit their messages.

    Raises:
        NothingToLearnError: there is none.
    """
    records = tokens.measure(samples)
    faulty = np.flatnonzero(records["fault"])
    use = records["loss_weight"] * samples.weight > 0
    silent = np.flatnonzero(~use & (records["fault"] == 0))
    if len(faulty):
        first = int(faulty[0])
        log.warning(
            "%s: left out, because %s; first %s: %s",
            _count(len(faulty), "sample"),
            "their media do not fit their messages"
            if tokens.has_own_template
            else "they cannot be written with the folder's chat template",
            samples.name_of(first),
            tokens.fault(samples, first),
        )
    if len(silent):
        log.warning(
            "%s: left out, because there is no answer to learn from; first %s",
            _count(len(silent), "sample"),
            samples.name_of(int(silent[0])),
        )
    if not use.any():
        reasons = [f"{_count(len(silent), 'sample')} without an answer"] if len(silent) else []
        if len(faulty):
            first = int(faulty[0])
            fault = f"first {samples.name_of(first)}: {tokens.fault(samples, first)}"
            which = (
                "whose media do not fit their messages"
                if tokens.has_own_template
                else "that cannot be written with the folder's chat template"
            )
            reasons.append(f"{len(faulty):,} {which}, {fault}")
        raise NothingToLearnError(
            f"{', '.join(samples.names)}: no sample has text to learn from ({'; '.join(reasons)}). Give the "
            "images captions, answers or messages, and run the same encode.run command again"
        )
    return samples if use.all() else samples.take(np.flatnonzero(use))


def fit_window(
    samples: SampleList,
    tokens: TokenStore,
    placeholders: Placeholders,
    *,
    max_tokens: int,
    over_long: OverLong,
) -> SampleList:
    """Return the samples that have at most `max_tokens` tokens in a sequence, and parts of longer ones.

    Args:
        samples: samples with text to learn.
        tokens: their tokenised text.
        placeholders: the tokens that represent images and videos.
        max_tokens: the window, in tokens.
        over_long: what to do with a longer sample.

    Raises:
        UserError: a sample is longer and `over_long` is `refuse`.
        NothingToLearnError: no sample is left.
    """
    media_tokens = placeholders.lengths(samples)
    length = tokens.measure(samples)["used"] + added_tokens(samples, media_tokens)
    long = np.flatnonzero(length > max_tokens)
    if not len(long):
        return samples
    if over_long == "refuse":
        can_cut = tokens.has_own_template
        raise UserError(_refusal(samples, length, media_tokens, max_tokens, can_cut))
    too_long = (
        f"{len(long):,} of {_count(samples.size, 'sample')} are longer than the window of "
        f"{max_tokens:,} tokens"
    )
    if over_long == "leave-out":
        left_out = f"left out (--over-long leave-out), first {samples.name_of(int(long[0]))}"
        log.warning("%s: %s", too_long, left_out)
        result = samples.take(np.flatnonzero(length <= max_tokens))
    else:
        result, parts, lost = _split(samples, tokens, long, media_tokens, max_tokens)
        left_out = ""
        if lost:
            alone = _count(len(lost), "part")
            left_out = f"; {alone} too long alone: left out, first {lost[0]}"
        log.warning("%s: cut between turns into %s%s", too_long, _count(parts, "part"), left_out)
    if not result.size:
        raise NothingToLearnError(
            f"{', '.join(samples.names)}: {too_long}, and nothing is left to train on; raise "
            f"--max-sequence-length (the longest has {int(length.max()):,} tokens)"
        )
    return result


def added_tokens(samples: SampleList, media_tokens: Ints) -> Ints:
    """Return (S,) the tokens that media add to each sample, of which the token store counts one for each.

    `media_tokens` has the (K,) tokens of each media item.
    """
    added: Ints = np.diff(edges_of(media_tokens[samples.media] - 1)[samples.offsets])
    return added


def _split(
    samples: SampleList, tokens: TokenStore, long: Ints, media_tokens: Ints, max_tokens: int
) -> tuple[SampleList, int, list[str]]:
    """Cut the samples at positions `long`.

    Returns:
        The list with parts in place of them, the number of parts, and the names of parts that are left out.
    """
    found: list[tuple[int, int, int, int]] = []  # position, first turn, turn after it, media
    lost: list[str] = []
    for position in long.tolist():
        text = tokens.of(samples, position)
        extra = media_tokens[samples.media_of(position)] - 1
        for first, end, media, fits in cut_sample(text, extra, tokens, max_tokens):
            if fits:
                found.append((position, first, end, media))
            else:
                lost.append(f"{samples.name_of(position)} turns {first + 1}-{end}")
    whole = np.delete(np.arange(samples.size), long)
    count = np.diff(samples.offsets)
    parts = np.array(found, dtype=np.int64).reshape(-1, 4)
    table = np.zeros((len(whole) + len(parts), 4), dtype=np.int64)
    table[: len(whole), 0], table[: len(whole), 3] = whole, count[whole]
    table[len(whole) :] = parts
    table = table[np.lexsort((table[:, 1], table[:, 0]))]
    return samples.take(table[:, 0], table[:, 1:3].astype(np.int32), table[:, 3]), len(parts), lost


def cut_sample(
    text: TokenizedSample, extra: Ints, tokens: TokenStore, max_tokens: int
) -> list[tuple[int, int, int, bool]]:
    """Cut a sample between turns, into as few parts as fit.

    Args:
        text: its tokens.
        extra: (n,) tokens that each of its media adds.
        tokens: the store that the text is from.
        max_tokens: the window, in tokens.

    Returns:
        First turn, turn after the last, number of media, and whether it fits, of each part that has something
        to learn. Parts that do not fit are single exchanges.
    """
    turns = tokens.turns(text)
    edges = [*exchange_starts(turns), len(turns)]

    def measure(first: int, end: int) -> tuple[int, int, bool]:
        """Return tokens, media, and whether there is something to learn, of exchanges [first, end)."""
        record = tokens.record(tokens.cut(text, turns, edges[first], edges[end]))
        media = int(record["images"])
        return int(record["used"] + extra[:media].sum()), media, bool(record["loss_weight"] > 0)

    result: list[tuple[int, int, int, bool]] = []
    first, last = 0, len(edges) - 1
    while first < last:
        end = first + 1
        length, media, learns = measure(first, end)
        fits = length <= max_tokens
        while fits and end < last:
            length, more_media, more_learns = measure(first, end + 1)
            if length > max_tokens:
                break
            end, media, learns = end + 1, more_media, more_learns
        if learns:
            result.append((edges[first], edges[end], media, fits))
        first = end
    return result


def exchange_starts(turns: Sequence[Turn]) -> list[int]:
    """Return the turns at which a sample may be cut, and 0: an answer precedes and a question follows."""
    starts = [0]
    for i in range(1, len(turns)):
        following = next((turn.role for turn in turns[i:] if turn.role != "system"), "")
        if turns[i - 1].role == "assistant" and following == "user":
            starts.append(i)
    return starts


def _refusal(
    samples: SampleList,
    length: npt.NDArray[np.int64],
    media_tokens: Ints,
    max_tokens: int,
    can_cut: bool,
) -> str:
    """Return why a list with too long samples is refused, and the ways out."""
    longest = int(np.argmax(length))
    media = samples.media_of(longest)
    videos = media[samples.kinds[media] == VIDEO]
    images = media[samples.kinds[media] != VIDEO]
    parts = []
    ways = [
        f"Raise --max-sequence-length to {int(length[longest])}",
        *(["cut them between turns (--over-long split)"] if can_cut else []),
        "leave them out (--over-long leave-out)",
    ]
    if len(images) or not len(media):
        each = f" x {int(media_tokens[images[0]]):,}" if len(images) else ""
        parts.append(f"{len(images)}{each} for images")
    if len(videos):
        frames = int(np.diff(samples.starts)[videos].sum())
        parts.append(f"{int(media_tokens[videos].sum()):,} for {frames:,} frames of videos")
        ways.append("take fewer frames (--max-frames, here and in encode.run)")
    text = int(length[longest] - media_tokens[media].sum())
    if len(media) and text < max_tokens:  # else no pooling makes it fit
        options = ["--pool"] * bool(len(images)) + ["--frame-pool"] * bool(len(videos))
        ways.append(f"encode with more pooling than now (encode.run {', '.join(options)})")
    return (
        f"sample {samples.name_of(longest)} is {int(length[longest]):,} tokens long ({', '.join(parts)}, "
        f"{text:,} of text) and the window is {max_tokens:,}; "
        f"{int((length > max_tokens).sum()):,} of {samples.size:,} samples do not fit. "
        f"{', '.join(ways[:-1])}, or {ways[-1]}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
