"""Points as text, in Molmo2's format html-v2.

`<points coords="1 1 042 400 2 911 800">label</points>` is the number of the image, then number, x and y of
each point. Coordinates are from 0 to 1000 and have at least three digits. Points are sorted from left to
right, so that there is one right answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from encode.records.account import FaultError

POINTS_WEIGHT = 0.2
"""Weight of answers made of coordinates, whose many tokens would outweigh other answers."""
# Molmo2's value.
SCALE = 1000
"""Largest coordinate of an answer."""
PERCENT = 100.0
"""Largest coordinate in pixmo-points and CoSyn-point."""
EDGE = 0.05
"""Points up to this far outside the image, in widths or heights, are moved to its edge."""

Points = Sequence[tuple[Any, Any]]


def thousandths(value: Any, full: float) -> int:
    """Return `value` / `full` in thousandths, as an integer from 0 to 1000.

    Raises:
        FaultError: `value` is not a number, or outside the image by more than EDGE.
    """
    try:
        share = float(value) / full
    except (TypeError, ValueError, OverflowError):
        share = float("nan")
    if not -EDGE <= share <= 1 + EDGE:  # also true for NaN
        raise FaultError("a point outside the image")
    return min(SCALE, max(0, round(SCALE * share)))


def pairs(points: Any) -> Points:
    """Return (x, y) of each point of a struct, a list of structs, or a struct of lists.

    Raises:
        FaultError: a point lacks one of them.
    """
    if points is None:
        return ()
    if isinstance(points, Mapping):
        across, down = points.get("x"), points.get("y")
        if isinstance(across, int | float) and isinstance(down, int | float):
            return ((across, down),)
        lists = [one or () for one in (across, down)]
        if not all(isinstance(one, Sequence) for one in lists) or len(lists[0]) != len(lists[1]):
            raise FaultError("points lack an x or a y")
        return tuple(zip(*lists, strict=True))
    if isinstance(points, str) or not isinstance(points, Sequence):
        raise FaultError("points lack an x or a y")
    if not all(isinstance(point, Mapping) and {"x", "y"} <= point.keys() for point in points):
        raise FaultError("points lack an x or a y")
    return [(point["x"], point["y"]) for point in points]


def html(label: str, points: Points, full: tuple[float, float]) -> str:
    """Return points as an answer; `full` is the width and height of the image in the unit of the points."""
    places = sorted((thousandths(x, full[0]), thousandths(y, full[1])) for x, y in points)
    coords = " ".join(f"{n} {x:03} {y:03}" for n, (x, y) in enumerate(places, 1))
    return f'<points coords="1 {coords}">{label}</points>'
