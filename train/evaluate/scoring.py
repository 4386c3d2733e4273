"""Average the scores of answers over each question type, and over the types, with 95 % intervals.

tasks, mean = summarize(answers)
tasks[0].scores[0]      # Score(name="exact match", value=0.93, interval=(0.90, 0.95), blind=0.16, ...)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from configs import one_line
from train.evaluate.intervals import Floats, Interval, interval, resampled_means, share_interval
from train.evaluate.metrics import CAPTIONS, MEAN_ERROR, METRICS

MOST_SCORE = 1e100
"""The largest mean error; the other scores are shares. Sums and squares of scores stay finite."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question with the expected answer and the model's answers."""

    sample: str
    """`<data set>/<id>`."""
    task: str
    """Question type; the data set's name if the sample has none."""
    media: tuple[str, ...]
    """Sources of its images and videos."""
    item: str
    """Key of its first media item; the sample's name if it has none. Intervals are over these."""
    question: str
    """The last user turn."""
    expected: str
    """The last assistant turn of the sample."""
    given: str
    """The model's answer."""
    metric: str
    """A key of METRICS."""
    scores: tuple[float, ...]
    """Scores of `given`, named by METRICS."""
    correct: bool
    """Whether the first score is at least a half."""
    others: tuple[str, ...] = ()
    """Other answers to the question, which are right too."""
    blind: str | None = None
    """The model's answer with exchanged images; None without blind figures."""
    blind_scores: tuple[float, ...] | None = None
    """Scores of `blind`."""
    blind_correct: bool | None = None
    """Whether the first score of `blind` is at least a half."""

    def __post_init__(self) -> None:
        names = METRICS.get(self.metric)
        if names is None:
            raise ValueError(
                f"metric {one_line(self.metric, 40)!r} is none of {', '.join(METRICS)}"
            )
        for scores in (self.scores, self.blind_scores):
            if scores is not None and len(scores) != len(names):
                raise ValueError(
                    f"{len(scores)} scores of the metric {self.metric}, not {len(names)}"
                )
            if not all(abs(score) <= MOST_SCORE for score in scores or ()):  # not of NaN, too
                raise ValueError(f"a score is not finite, or beyond {MOST_SCORE:g}")


@dataclass(frozen=True, kw_only=True)
class Score:
    """A mean over questions, or the mean of such means, with 95 % intervals."""

    name: str
    """What is measured."""
    value: float
    """The mean."""
    interval: Interval | None
    """Its 95 % interval over media items; None of fewer than two."""
    blind: float | None = None
    """The mean with exchanged images; None without blind figures."""
    blind_interval: Interval | None = None
    """Its interval."""
    gain: float | None = None
    """Difference of the two, over the same questions."""
    gain_interval: Interval | None = None
    """Its interval, paired: both means of a draw are of the same media items."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The result on one question type."""

    name: str
    """The question type."""
    metric: str
    """A key of METRICS."""
    questions: int
    """Number of questions."""
    scores: tuple[Score, ...]
    """Its scores; the first one is in the mean."""


# ---- all answers


def summarize(answers: Sequence[Answer]) -> tuple[tuple[Task, ...], Score | None]:
    """Return the result of each question type, and the mean over the types without captions.

    The mean of nothing is None.
    """
    groups: dict[tuple[bool, str, str], list[int]] = {}
    for at, one in enumerate(answers):
        if one.scores:
            groups.setdefault((one.task in CAPTIONS, one.task, one.metric), []).append(at)
    keys = sorted(groups)
    columns = [(key, number) for key in keys for number in range(len(METRICS[key[2]]))]
    if not columns:
        return (), None
    table = np.full((len(answers), 2, len(columns)), np.nan)
    for at, (key, number) in enumerate(columns):
        for row in groups[key]:
            one = answers[row]
            table[row, 0, at] = one.scores[number]
            if one.blind_scores is not None:
                table[row, 1, at] = one.blind_scores[number]
    clusters = np.unique([one.item for one in answers], return_inverse=True)[1].astype(np.int64)
    drawn = resampled_means(table.reshape(len(answers), -1), clusters)
    drawn = drawn.reshape(len(drawn), 2, len(columns))
    found = [
        _score(METRICS[key[2]][number], table[:, :, at], drawn[:, :, at], clusters)
        for at, (key, number) in enumerate(columns)
    ]
    tasks = tuple(
        Task(
            name=key[1],
            metric=key[2],
            questions=len(groups[key]),
            scores=tuple(score for score, (of, _) in zip(found, columns, strict=True) if of == key),
        )
        for key in keys
    )
    counted = [at for at, (key, number) in enumerate(columns) if not key[0] and not number]
    return tasks, _mean([found[at] for at in counted], drawn[:, :, counted])


def _score(name: str, values: Floats, drawn: Floats, clusters: np.ndarray) -> Score:
    """Return one score of one type.

    Args:
        name: what is measured.
        values: (N, 2) scores seeing and blind; NaN where a question is of another type.
        drawn: (B, 2) means of the draws.
        clusters: (N,) media items.
    """

    def of(values: Floats, drawn: Floats, least: float = 0.0) -> tuple[float, Interval | None]:
        if name == MEAN_ERROR:
            return float(np.nanmean(values)), interval(drawn)
        return float(np.nanmean(values)), share_interval(drawn, values, clusters, least)

    value, ends = of(values[:, 0], drawn[:, 0])
    if np.isnan(values[:, 1]).all():
        return Score(name=name, value=value, interval=ends)
    blind, blind_ends = of(values[:, 1], drawn[:, 1])
    gain, gain_ends = of(values[:, 0] - values[:, 1], drawn[:, 0] - drawn[:, 1], -1.0)
    return Score(
        name=name,
        value=value,
        interval=ends,
        blind=blind,
        blind_interval=blind_ends,
        gain=gain,
        gain_interval=gain_ends,
    )


def _mean(found: Sequence[Score], drawn: Floats) -> Score | None:
    """Return the mean over question types; `drawn` (B, 2, T) has the means of the draws of T types."""
    if not found:
        return None
    value = float(np.mean([one.value for one in found]))
    means = drawn.mean(axis=2)  # NaN, and not counted, where a draw lacks a type
    several = all(one.interval is not None for one in found)
    ends = interval(means[:, 0]) if several else None
    blind = [one.blind for one in found if one.blind is not None]
    if len(blind) < len(found):
        return Score(name="mean of types", value=value, interval=ends)
    return Score(
        name="mean of types",
        value=value,
        interval=ends,
        blind=float(np.mean(blind)),
        blind_interval=interval(means[:, 1]) if several else None,
        gain=value - float(np.mean(blind)),
        gain_interval=interval(means[:, 0] - means[:, 1]) if several else None,
    )
