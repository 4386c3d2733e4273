"""Compare the points of an answer with the right ones: precision, recall and F1.

    pointed('<points coords="1 1 34 66">x</points>', expected, distance=0.05)    # (F1, precision, recall)

Deitke et al., "Molmo and PixMo", CVPR 2025: predicted and right points are matched one to one, and each
question has its precision, recall and F1. There, a point is right in the mask of its object. Here, data sets
have points and no masks, so a point is right within a distance of a right point. The matching is a largest
possible one (augmenting paths): as many pairs as the Hungarian algorithm finds with costs 0 and 1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

POINTS = re.compile(r'<points coords="([\d\s]+)">([^<]*)(?:</points>)?')
SCALE = 1000
"""Largest coordinate of an answer."""
MOST_POINTS = 1000
"""Points of one answer that are compared. A model may repeat itself."""
MOST_DIGITS = 9
"""Digits of one number in `coords`."""

Point = tuple[int, int, int]
"""(image, x, y): number of the image from 1; x and y from 0 to 1000."""


def points_in(text: str) -> list[Point]:
    """Return every point of a text in the format html-v2, in order; [] if it has none.

    `<points coords="1 1 900 400 2 911 800">label</points>` has the number of an image, then for each point
    its own number, x and y.
    """
    found: list[Point] = []
    for match in POINTS.finditer(text):
        numbers = [int(word[:MOST_DIGITS]) for word in match[1].split()]
        if len(numbers) % 3 == 1:
            found += [(numbers[0], x, y) for x, y in zip(numbers[2::3], numbers[3::3], strict=True)]
    return found


def without_points(text: str) -> str:
    """Return a text without what marks points, labels included."""
    return POINTS.sub(" ", text)


def pointed(given: str, expected: str, *, distance: float) -> tuple[float, float, float]:
    """Return F1, precision and recall of the points of an answer.

    If neither text has points ("There are none."), all three are 1; if one of them has none, 0.

    Args:
        given: the answer.
        expected: the right answer.
        distance: largest distance of a pair of points, as a share of the image: x in widths, y in heights.
    """
    said, right = points_in(given)[:MOST_POINTS], points_in(expected)[:MOST_POINTS]
    if not said or not right:
        alike = float(not said and not right)
        return alike, alike, alike
    pairs = matched(said, right, distance)
    return 2 * pairs / (len(said) + len(right)), pairs / len(said), pairs / len(right)


def matched(said: Sequence[Point], right: Sequence[Point], distance: float) -> int:
    """Return the largest number of pairs of a given and a right point within a distance, each point once."""
    limit = (distance * SCALE) ** 2
    near = [
        [
            number
            for number, (image, x, y) in enumerate(right)
            if image == at and (x - left) ** 2 + (y - top) ** 2 <= limit
        ]
        for at, left, top in said
    ]
    owner: dict[int, int] = {}  # right point -> given point
    partner_of: dict[int, int] = {}  # given point -> right point

    def give_partner(start: int) -> bool:
        """Give a point a partner if others can move to theirs, along a shortest augmenting path."""
        reached_by: dict[int, int] = {}  # right point -> the given point that reached it
        queue = [start]
        for one in queue:
            for partner in near[one]:
                if partner in reached_by:
                    continue
                reached_by[partner] = one
                if partner in owner:
                    queue.append(owner[partner])
                    continue
                place: int | None = partner
                while place is not None:  # back along the path; only `start` has no partner yet
                    mover = reached_by[place]
                    before = partner_of.get(mover)
                    owner[place], partner_of[mover] = mover, place
                    place = before
                return True
        return False

    return sum(give_partner(number) for number in range(len(said)))
