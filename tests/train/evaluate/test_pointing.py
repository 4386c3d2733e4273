"""Points: parsed, matched one to one, and scored by hand.

pointed(given, expected, distance=0.05)    # (F1, precision, recall)
"""

from __future__ import annotations

import itertools
import random

import pytest

from train.evaluate.pointing import matched, pointed, points_in, without_points


def text(*points: tuple[int, int], image: int = 1) -> str:
    coords = " ".join(f"{n} {x:03} {y:03}" for n, (x, y) in enumerate(points, 1))
    return f'<points coords="{image} {coords}">ring</points>'


def test_points_of_a_text() -> None:
    assert points_in(text((42, 400), (911, 800))) == [(1, 42, 400), (1, 911, 800)]
    both = f"{text((1, 2))} and {text((3, 4), image=2)} That makes 2."
    assert points_in(both) == [(1, 1, 2), (2, 3, 4)]
    assert without_points(both).split() == ["and", "That", "makes", "2."]
    assert points_in('<points coords="1 1 334 666">ring') == [(1, 334, 666)], (
        "cut off after the points"
    )
    assert points_in('<points coords="1 1 340">ring</points>') == []
    assert points_in("middle") == points_in("") == points_in('<points coords="">x</points>') == []
    assert points_in(f'<points coords="1 1 {"9" * 6000} 2">x</points>') == [(1, 999_999_999, 2)]


@pytest.mark.parametrize(
    ("given", "scores"),
    [
        (text((500, 500)), (2 / 3, 1.0, 0.5)),
        (text((540, 470), (110, 100)), (1.0, 1.0, 1.0)),  # a distance of 0.05 exactly
        (text((541, 470), (110, 100)), (0.5, 0.5, 0.5)),
        (text((100, 100), (500, 500), (900, 900), (900, 901)), (2 / 3, 0.5, 1.0)),
        (text((500, 500), (501, 501)), (0.5, 0.5, 0.5)),  # each right point once
        (text((500, 500), (100, 100), image=2), (0.0, 0.0, 0.0)),  # in another image
        ("middle", (0.0, 0.0, 0.0)),
        ("", (0.0, 0.0, 0.0)),
    ],
)
def test_scores_by_hand(given: str, scores: tuple[float, float, float]) -> None:
    expected = text((100, 100), (500, 500))
    assert pointed(given, expected, distance=0.05) == pytest.approx(scores)


def test_nothing_to_point_at() -> None:
    assert pointed("There are none.", "There are none.", distance=0.05) == (1.0, 1.0, 1.0)
    assert pointed(text((1, 1)), "There are none.", distance=0.05) == (0.0, 0.0, 0.0)


def test_the_matching_is_the_largest() -> None:
    """The first point is near both; taken greedily, it would leave the second one alone."""
    right = [(1, 100, 0), (1, 140, 0)]
    assert matched([(1, 120, 0), (1, 80, 0)], right, 0.03) == 2
    assert matched([(1, 120, 0), (1, 160, 0)], right, 0.03) == 2
    rng = random.Random(0)
    for _ in range(200):
        one, other = (
            [(rng.randint(1, 2), rng.randint(0, 30), rng.randint(0, 30)) for _ in range(count)]
            for count in (rng.randint(1, 4), rng.randint(4, 5))
        )

        def near(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
            return a[0] == b[0] and (a[1] - b[1]) ** 2 + (a[2] - b[2]) ** 2 <= 100

        best = max(
            sum(near(a, b) for a, b in zip(one, chosen, strict=True))
            for chosen in itertools.permutations(other, len(one))
        )
        assert matched(one, other, 0.01) == best


def test_a_model_that_repeats_itself_ends() -> None:
    many = text(*[(500, 500)] * 3000)
    assert pointed(many, text((500, 500)), distance=0.05)[2] == 1.0
