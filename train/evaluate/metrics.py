"""Choose the metric of each question type, and score an answer by it.

    metrics = choose_metrics(questions, {"question": "anls"})     # {("docs", "question"): "anls"}
    score_answer("anls", given, answers, distance=0.05)           # (0.89,)

| metric | scores, the first one in the mean | default for |
|---|---|---|
| exact | exact match with any of the answers | everything else |
| vqa | VQA accuracy | questions with about ten answers each |
| anls | ANLS | data sets named after DocVQA, ST-VQA, InfographicVQA |
| relaxed | relaxed accuracy | data sets named after ChartQA, PlotQA |
| count | exact, within one, mean absolute error | type `count`, `...-count`; TallyQA, CountBench |
| points | F1, precision, recall | answers with points |
| none | nothing | |

Definitions are in texts.py, vqa.py and pointing.py. No metric here judges captions: they are compared exactly
and are not in the mean (`--metric caption=none` leaves them out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from configs import UserError, nearest
from train.evaluate.pointing import pointed, points_in, without_points
from train.evaluate.texts import anls, counted, exact, number_in, relaxed
from train.evaluate.vqa import LEAST_ANSWERS, vqa_accuracy

CAPTIONS = ("caption", "transcript")
"""Question types that are not in the mean, because they have no single right answer."""
METRICS: dict[str, tuple[str, ...]] = {
    "exact": ("exact match",),
    "vqa": ("VQA accuracy",),
    "anls": ("ANLS",),
    "relaxed": ("relaxed accuracy",),
    "count": ("exact count", "within one", "mean error"),
    "points": ("F1", "precision", "recall"),
    "none": (),
}
"""Metric -> names of its scores; the first one is in the mean."""
MEAN_ERROR = "mean error"
"""The score that is a number of things and not a share."""
VOTES = 8
"""Answers to a question that are people's votes and not spellings. VQAv2, TextVQA and VizWiz have ten."""
NAMED = {
    "anls": ("docvqa", "stvqa", "infographicvqa", "infographicsvqa", "infovqa"),
    "relaxed": ("chartqa", "plotqa"),
    "count": ("tallyqa", "countbench"),
}
"""Metric -> parts of names of data sets that are published with it, letters and digits only."""

Type = tuple[str, str]
"""Data set and question type."""


class Asked(Protocol):
    """What the choice of a metric depends on: a question with its right answers."""

    @property
    def type(self) -> Type:
        """Data set and question type."""

    @property
    def answers(self) -> tuple[str, ...]:
        """The right answers."""


# ---- which metric


def parse_metrics(text: str) -> dict[str, str]:
    """Return name -> metric of `question=anls,charts=relaxed`; the name of a metric alone counts for all: ''.

    Raises:
        ValueError: there is no such metric.
    """
    wanted: dict[str, str] = {}
    for part in filter(None, (one.strip() for one in text.split(","))):
        name, _, metric = part.rpartition("=")
        if metric not in METRICS:
            raise ValueError(
                f"metric {metric!r} is none of {', '.join(METRICS)}{nearest(metric, METRICS)}; write "
                "TYPE=METRIC or DATASET=METRIC, or one metric for all"
            )
        wanted[name.strip()] = metric
    return wanted


def choose_metrics(questions: Sequence[Asked], wanted: Mapping[str, str]) -> dict[Type, str]:
    """Return the metric of every type of question.

    Args:
        questions: all of them.
        wanted: name -> metric, instead of the default. The first of `<data set>/<type>`, type, data set and
            '' that it has counts.

    Raises:
        UserError: `wanted` names something that is not there, or a metric that cannot judge its questions.
    """
    types: dict[Type, list[tuple[str, ...]]] = {}
    for question in questions:
        types.setdefault(question.type, []).append(question.answers)
    known = {"", *(name for one in types for name in (*one, "/".join(one)))}
    for name in wanted:
        if name not in known:
            there = ", ".join(sorted(known - {""}))
            raise UserError(f"--metric {name}: no such question type or data set (there: {there})")
    return {one: _metric(one, answers, wanted) for one, answers in types.items()}


def _metric(one: Type, answers: Sequence[tuple[str, ...]], wanted: Mapping[str, str]) -> str:
    dataset, task = one
    asked = [wanted[name] for name in ("/".join(one), task, dataset, "") if name in wanted]
    if not asked:
        return _default(dataset, task, answers)
    if asked[0] == "vqa" and (fewest := min(map(len, answers))) < LEAST_ANSWERS:
        raise UserError(
            f"--metric {task}=vqa: VQA accuracy needs at least {LEAST_ANSWERS} answers to a question, and "
            f"one of {dataset} has {fewest}; use another metric: --metric {task}=exact"
        )
    if asked[0] == "count" and not _countable(answers):
        raise UserError(
            f"--metric {task}=count: some answers of {dataset} have no number; use another metric: "
            f"--metric {task}=exact"
        )
    return asked[0]


def _default(dataset: str, task: str, answers: Sequence[tuple[str, ...]]) -> str:
    if task in CAPTIONS:
        return "exact"
    plain = "".join(filter(str.isalnum, dataset.casefold()))
    named = {metric for metric, parts in NAMED.items() if any(part in plain for part in parts)}
    kind = task.casefold()
    if (
        "count" in named or kind in ("count", "counting") or kind.endswith("-count")
    ) and _countable(answers):
        return "count"
    if any(points_in(one) for several in answers for one in several):
        return "points"
    numbers = [len(several) for several in answers]
    if np.median(numbers) >= VOTES and min(numbers) >= LEAST_ANSWERS:
        return "vqa"
    return next(iter(sorted(named - {"count"})), "exact")


def _countable(answers: Sequence[tuple[str, ...]]) -> bool:
    return all(count_in(one) is not None for several in answers for one in several)


# ---- one answer


def score_answer(
    metric: str, given: str, answers: Sequence[str], *, distance: float
) -> tuple[float, ...]:
    """Return the scores of an answer, named by METRICS. Of several right answers the best match counts.

    Args:
        metric: a key of METRICS.
        given: the answer.
        answers: the right answers.
        distance: largest distance of a right point, as a share of the image.
    """
    if metric == "vqa":
        return (vqa_accuracy(given, answers),)
    if metric == "count":
        said = count_in(given)
        right = [count for one in answers if (count := count_in(one)) is not None]
        return min((counted(said, one) for one in right), key=lambda found: found[-1])
    if metric == "points":
        return max(pointed(given, one, distance=distance) for one in answers)
    judge = {"exact": exact, "anls": anls, "relaxed": relaxed}.get(metric)
    return () if judge is None else (judge(given, answers),)


def count_in(text: str) -> int | None:
    """Return the count that an answer states, or the number of its points; None if it has neither."""
    number = number_in(without_points(text))
    return number if number is not None else len(points_in(text)) or None
