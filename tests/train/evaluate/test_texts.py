"""Metrics of texts, on the worked examples of their publications.

anls("CocaCola", ["Coca Cola"])    # 0.89
"""

from __future__ import annotations

import random

import pytest

from train.evaluate.texts import anls, counted, edit_distance, exact, number_in, relaxed


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
    assert exact(given, [expected]) == float(right)
    assert exact(given, ["other", expected]) == float(right)


@pytest.mark.parametrize(
    ("given", "score"),
    [("The Coca", 0.0), ("CocaCola", 0.89), ("Coca cola", 1.0), ("Cola", 0.0), ("Cat", 0.0)],
)
def test_anls_of_the_example_of_the_robust_reading_competition(given: str, score: float) -> None:
    """https://rrc.cvc.uab.es/?ch=11&com=tasks: "What soft drink company name is on the red disk?" """
    assert round(anls(given, ["Coca Cola", "Coca Cola Company"]), 2) == score


@pytest.mark.parametrize(
    ("given", "answer", "score"),
    [
        ("tvlkingheVds", "talkingheads", 1 - 2 / 12),
        ("abcd", "abxy", 0.0),  # a distance of 0.5 is not below the threshold
        ("abcde", "abcxy", 0.6),
        ("TALKING   heads", "talking heads", 1.0),
        ("talkingheads", "talking heads", 1 - 1 / 13),
        ("", "", 1.0),
        ("", "a", 0.0),
    ],
)
def test_anls_by_hand(given: str, answer: str, score: float) -> None:
    assert anls(given, [answer]) == pytest.approx(score)


def test_edit_distance() -> None:
    assert [
        edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "ab"), ("flaw", "lawn"))
    ] == [3, 2, 2]
    rng = random.Random(0)
    for _ in range(50):
        one, other = ("".join(rng.choices("ab", k=rng.randint(0, 7))) for _ in range(2))
        assert edit_distance(one, other) == edit_distance(other, one) <= max(len(one), len(other))
        assert edit_distance(one, other[::-1]) == edit_distance(one[::-1], other)


def test_a_long_text_costs_nothing_if_it_cannot_be_near() -> None:
    assert anls("short", ["x" * 1_000_000]) == 0.0


@pytest.mark.parametrize(
    ("answer", "given", "right"),
    [
        ("100", "95", True),  # ChartQA: within 5 % of the right number
        ("100", "94.9", False),
        ("100", "105", True),
        ("-3", "-3.1", True),
        ("-3", "3", False),
        ("0.57", "57%", True),
        ("12%", "0.12", True),
        ("0", "0", True),
        ("0", "0.0", False),  # no relative error of 0: the texts are compared
        ("14", "fourteen", False),
        ("Yes", " yes ", True),
        ("Inspired", "inspire", False),
        ("nan", "NaN", True),
        ("inf", "1e999", False),
        ("5", "inf", False),
        ("2,000", "2000", False),  # Python's float reads no comma
    ],
)
def test_relaxed_accuracy(answer: str, given: str, right: bool) -> None:
    assert relaxed(given, [answer]) == float(right)
    assert relaxed(given, ["no such answer", answer]) == float(right)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3),
        ("There are three cats.", 3),
        ("That makes 12.", 12),
        ("two dogs and one cat: three", 3),
        ("1,200 people", 1200),
        ("There are none.", 0),
        ("No cats", 0),
        ("the 3rd", 3),
        ("2.5", None),
        ("123.4", None),
        ("twenty-one", None),
        ("x3", None),
        ("someone", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_the_number_of_an_answer(text: str, number: int | None) -> None:
    assert number_in(text) == number


def test_counts() -> None:
    assert counted(3, 3) == (1.0, 1.0, 0.0)
    assert counted(2, 3) == (0.0, 1.0, 1.0)
    assert counted(9, 3) == (0.0, 0.0, 6.0)
    assert counted(None, 3) == (0.0, 0.0, 3.0)
    assert counted(None, 1) == (0.0, 0.0, 1.0)
    assert counted(None, 0) == (0.0, 0.0, 0.0)
