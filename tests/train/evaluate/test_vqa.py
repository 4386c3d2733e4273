"""VQA accuracy on the examples of visualqa.org and its evaluation script.

vqa_accuracy("2", ["2"] * 3 + ["3"] * 7)    # 0.9
"""

from __future__ import annotations

from itertools import combinations

import pytest

from train.evaluate.vqa import ARTICLES, CONTRACTIONS, simplified, vqa_accuracy


@pytest.mark.parametrize(
    ("agreeing", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_the_accuracies_of_ten_answers(agreeing: int, accuracy: float) -> None:
    """The values that an accuracy over all ten subsets of nine people can have."""
    answers = ["yes"] * agreeing + ["no"] * (10 - agreeing)
    assert vqa_accuracy("Yes", answers) == pytest.approx(accuracy)
    subsets = list(combinations(answers, 9))
    by_definition = [min(sum(a == "yes" for a in subset) / 3, 1.0) for subset in subsets]
    assert vqa_accuracy("Yes", answers) == pytest.approx(sum(by_definition) / len(subsets))


@pytest.mark.parametrize(
    ("text", "simple"),
    [
        ("The dog", "dog"),  # lower case, no articles
        ("a an the", ""),
        ("Two", "2"),  # numbers as digits
        ("none", "0"),
        ("ten apples", "10 apples"),
        ("eleven", "eleven"),
        ("dont", "don't"),  # contractions get their apostrophe
        ("couldn'tve", "couldn't've"),
        ("oclock", "o'clock"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),  # as in the published table
        ("lets", "lets"),
        ("dog's", "dog's"),  # apostrophes and colons stay
        ("10:30", "10:30"),
        ("it-is", "it is"),  # punctuation becomes a space
        ("red/blue", "red blue"),
        ("hi!", "hi"),
        ("a , b", "b"),  # and is removed beside one
        ("1,000", "1000"),  # no space within a number
        ("2.5", "2.5"),  # a decimal point stays
        ("e.g.", "eg"),
        ("blue.", "blue"),
        (" two\nlines\there ", "2 lines here"),
        ('"quoted"', "quoted"),
    ],
)
def test_published_simplification(text: str, simple: str) -> None:
    assert simplified(text) == simple


def test_contractions() -> None:
    assert len(CONTRACTIONS) == 114
    assert all(simplified(short) == word for short, word in CONTRACTIONS.items())
    assert not ARTICLES & CONTRACTIONS.keys()


def test_texts_are_compared_simplified() -> None:
    answers = ["the Dog"] * 4 + ["A dog."] * 3 + ["cat"] * 3
    assert vqa_accuracy("dog", answers) == 1.0
    assert vqa_accuracy("CAT!", answers) == pytest.approx(0.9)
