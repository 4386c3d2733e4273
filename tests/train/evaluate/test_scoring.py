"""Scoring: answers and means worked out by hand.

is_right("colour", expected="red", given="Red.", grid=3)    # True
"""

from __future__ import annotations

import pytest

from train.evaluate import scoring
from train.evaluate.scoring import Answer, is_right, pointed_cells


@pytest.mark.parametrize(
    ("expected", "given", "right"),
    [
        ("red", "Red.", True),
        ("red", "  red ", True),
        ("top left", "top left .", True),
        ("red", "red green", False),
        ("red", "", False),
        ("two", "2", False),
        ("Straße", "STRASSE", True),
    ],
)
def test_exact_match_is_of_normalised_text(expected: str, given: str, right: bool) -> None:
    assert is_right("colour", expected, given, 3) is right


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ('<points coords="1 1 340 660">red ring</points>', True),  # another place in the same cell
        ('<points coords="1 1 334 666">ring', True),
        ('<points coords="1 1 333 660">red ring</points>', False),  # one cell to the left
        ('<points coords="2 1 340 660">red ring</points>', False),  # in another image
        ('<points coords="1 1 340 660 2 10 10">red ring</points>', False),  # one point too many
        ('<points coords="1 1 340">red ring</points>', False),
        ("middle", False),
        ("", False),
    ],
)
def test_points_are_right_in_the_right_cell(given: str, right: bool) -> None:
    expected = '<points coords="1 1 500 500">red ring</points>'
    assert is_right("point", expected, given, 3) is right


def test_the_order_of_points_does_not_matter_and_1000_is_in_the_last_cell() -> None:
    one = pointed_cells('<points coords="1 1 1000 0 2 0 1000">x</points>', 4)
    other = pointed_cells('<points coords="1 1 10 990 2 990 10">x</points>', 4)
    assert one == other == [(1, 0, 3), (1, 3, 0)]
    assert is_right("point", "top left", "Top left.", 3)  # no points: exact match


def test_the_mean_is_over_question_types() -> None:
    def one(task: str, correct: bool) -> Answer:
        return Answer(
            sample="d/1",
            task=task,
            media=(),
            question="?",
            expected="x",
            given="x",
            correct=correct,
            blind="y",
            blind_correct=False,
        )

    answers = [*(one("a", True) for _ in range(9)), one("b", False), one("caption", False)]
    tasks = scoring.by_task(answers)
    assert [(t.name, t.questions, t.exact, t.blind) for t in tasks] == [
        ("a", 9, 1.0, 0.0),
        ("b", 1, 0.0, 0.0),
        ("caption", 1, 0.0, 0.0),
    ]
    assert scoring.headline(tasks) == (0.5, 0.0)
    assert scoring.headline(tasks[2:]) == (None, None)
