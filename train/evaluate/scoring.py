"""When an answer is right: exact match of normalised text, and for pointing the cell pointed at."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

CAPTION = "caption"
"""The question type that is reported apart: no caption is the only right one."""
POINT = "point"
"""The question type whose answers are places."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One question, what was expected and what was said."""

    sample: str
    """`<data set>/<id>`."""
    task: str
    """Type of question; the data set's name when it has none."""
    media: tuple[str, ...]
    """Sources of its images."""
    question: str
    """The last user turn."""
    expected: str
    """The assistant turn of the sample."""
    given: str
    """The model's answer."""
    correct: bool
    """Whether it counts as right."""
    blind: str | None = None
    """The answer with other images; None when that was not asked for."""
    blind_correct: bool | None = None
    """Whether that one counts as right."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The result on one type of question."""

    name: str
    questions: int
    exact: float
    """Share answered right."""
    blind: float | None
    """The same with other images."""


def is_right(task: str, expected: str, given: str, grid: int) -> bool:
    """Exact match of normalised text; for pointing, the same cells of the grid."""
    if task == POINT and grid and (cells := pointed_cells(expected, grid)):
        return pointed_cells(given, grid) == cells
    return normalized(given) == normalized(expected)


def normalized(text: str) -> str:
    """What exact match compares: case, outer white space, a final period make no difference."""
    return unicodedata.normalize("NFC", text).strip().removesuffix(".").strip().casefold()


POINTS = re.compile(r'<points coords="([\d\s]+)">([^<]*)(?:</points>)?')


def points_in(text: str) -> list[tuple[int, int, int]]:
    """Every point of an html-v2 answer as (image, x, y), x and y from 0 to 1000; [] when it is none.

    `<points coords="1 1 900 400 2 911 800">label</points>`: an image's number, then for each point its own
    number, x and y.
    """
    found = POINTS.search(text)
    numbers = [int(n) for n in found[1].split()] if found else []
    if len(numbers) % 3 != 1:
        return []
    return [(numbers[0], x, y) for x, y in zip(numbers[2::3], numbers[3::3], strict=True)]


def pointed_cells(text: str, grid: int) -> list[tuple[int, int, int]]:
    """The cells pointed at, as sorted (image, column, row), on a grid of `grid` cells a side."""
    return sorted(
        (image, min(x * grid // 1000, grid - 1), min(y * grid // 1000, grid - 1))
        for image, x, y in points_in(text)
    )


def by_task(answers: Sequence[Answer]) -> tuple[Task, ...]:
    """Results a question type, captions last."""
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
    """Means over question types, captions apart, of exact match and of blind; None of nothing."""
    counted = [task for task in tasks if task.name != CAPTION]
    blind = [task.blind for task in counted if task.blind is not None]
    return mean_of([task.exact for task in counted]), mean_of(blind)


def mean_of(values: Sequence[float]) -> float | None:
    """Mean; None of nothing."""
    return sum(values) / len(values) if values else None
