"""Decide when an answer is right, and average over question types.

    is_right("colour", expected="red", given="Red.", grid=3)    # True: exact match of normalised text

An answer that points at places is right if it points at the right cells of a grid.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

CAPTION = "caption"
"""The question type that is reported separately, because a caption has no single right answer."""
POINT = "point"
"""The question type whose answers are points in an image."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question with the expected answer and the model's answers."""

    sample: str
    """`<data set>/<id>`."""
    task: str
    """Question type; the data set's name if the sample has none."""
    media: tuple[str, ...]
    """Sources of its images and videos."""
    question: str
    """The last user turn."""
    expected: str
    """The last assistant turn of the sample."""
    given: str
    """The model's answer."""
    correct: bool
    """Whether `given` is right."""
    others: tuple[str, ...] = ()
    """Other answers to the question, which are right too."""
    blind: str | None = None
    """The model's answer with exchanged images; None without blind figures."""
    blind_correct: bool | None = None
    """Whether `blind` is right."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The result on one question type."""

    name: str
    """The question type."""
    questions: int
    """Number of questions."""
    exact: float
    """Share of right answers."""
    blind: float | None
    """Share of right answers with exchanged images; None without blind figures."""


def is_right(task: str, expected: str, given: str, grid: int) -> bool:
    """Whether an answer is right: exact match of normalised text, or for points equal cells of the grid."""
    if task == POINT and grid and (cells := pointed_cells(expected, grid)):
        return pointed_cells(given, grid) == cells
    return normalized(given) == normalized(expected)


def normalized(text: str) -> str:
    """Return text without differences of case, outer white space and a final period."""
    return unicodedata.normalize("NFC", text).strip().removesuffix(".").strip().casefold()


POINTS = re.compile(r'<points coords="([\d\s]+)">([^<]*)(?:</points>)?')


def points_in(text: str) -> list[tuple[int, int, int]]:
    """Return every point of an html-v2 answer as (image, x, y), x and y from 0 to 1000; [] if it has none.

    `<points coords="1 1 900 400 2 911 800">label</points>` has the number of an image, then for each point
    its own number, x and y.
    """
    found = POINTS.search(text)
    numbers = [int(n) for n in found[1].split()] if found else []
    if len(numbers) % 3 != 1:
        return []
    return [(numbers[0], x, y) for x, y in zip(numbers[2::3], numbers[3::3], strict=True)]


def pointed_cells(text: str, grid: int) -> list[tuple[int, int, int]]:
    """Return the cells that an answer points at, sorted (image, column, row), of a grid x grid grid."""
    return sorted(
        (image, min(x * grid // 1000, grid - 1), min(y * grid // 1000, grid - 1))
        for image, x, y in points_in(text)
    )


def by_task(answers: Sequence[Answer]) -> tuple[Task, ...]:
    """Return the result of each question type, captions last."""
    names = sorted({a.task for a in answers}, key=lambda name: (name == CAPTION, name))
    result = []
    for name in names:
        here = [a for a in answers if a.task == name]
        blind = [a.blind_correct for a in here if a.blind_correct is not None]
        result.append(
            Task(
                name=name,
                questions=len(here),
                exact=sum(a.correct for a in here) / len(here),
                blind=sum(blind) / len(blind) if blind else None,
            )
        )
    return tuple(result)


def headline(tasks: Sequence[Task]) -> tuple[float | None, float | None]:
    """Return exact match and blind exact match, each the mean over question types without captions.

    A mean of nothing is None.
    """
    counted = [task for task in tasks if task.name != CAPTION]
    blind = [task.blind for task in counted if task.blind is not None]
    return mean_of([task.exact for task in counted]), mean_of(blind)


def mean_of(values: Sequence[float]) -> float | None:
    """Return the mean; None of nothing."""
    return sum(values) / len(values) if values else None
