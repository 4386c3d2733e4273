"""Which metric a question gets, by what the sample says, and how to choose another.

choose_metrics(questions, {"question": "anls"})
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from configs import UserError
from train.evaluate.metrics import METRICS, choose_metrics, parse_metrics, score_answer

POINT = '<points coords="1 1 500 500">ring</points>'


@dataclass(frozen=True)
class One:
    """A question."""

    type: tuple[str, str]
    answers: tuple[str, ...]


@pytest.mark.parametrize(
    ("dataset", "task", "answers", "metric"),
    [
        ("mine", "colour", ["red"], "exact"),
        ("mine", "question", ["red", "crimson"], "exact"),
        ("mine", "question", ["red"] * 10, "vqa"),
        ("mine", "question", [str(n) for n in range(10)], "vqa"),
        ("mine", "count", ["3"], "count"),
        ("films", "video-count", ["three"], "count"),
        ("pixmo-count", "count", [f"{POINT} That makes 1."], "count"),
        ("mine", "count", ["many"], "exact"),
        ("TallyQA(cauldron)", "question", ["12"], "count"),
        ("pixmo-points", "point", [POINT], "points"),
        ("mine", "question", [POINT], "points"),
        ("mine", "point", ["top left"], "exact"),
        ("docvqa", "question", ["a", "b"], "anls"),
        ("st_vqa", "question", ["a"], "anls"),
        ("infographic_vqa_llava", "question", ["a"], "anls"),
        ("chartqa(cauldron,llava_format)", "question", ["a"], "relaxed"),
        ("docvqa", "caption", ["a"] * 5, "exact"),
        ("coco", "caption", ["a"] * 10, "exact"),
    ],
)
def test_defaults(dataset: str, task: str, answers: list[str], metric: str) -> None:
    question = One((dataset, task), tuple(answers))
    assert choose_metrics([question], {}) == {(dataset, task): metric}


def test_one_type_has_one_metric() -> None:
    """A few questions with fewer answers, or without points, do not change the metric of their type."""
    votes = [One(("v", "question"), ("a",) * n) for n in (10, 10, 9, 5)]
    points = [One(("p", "point"), (text,)) for text in (POINT, "There are none.")]
    assert choose_metrics([*votes, *points], {}) == {
        ("v", "question"): "vqa",
        ("p", "point"): "points",
    }
    assert choose_metrics([*votes, One(("v", "question"), ("a",))], {}) == {
        ("v", "question"): "exact"
    }


def test_a_metric_can_be_chosen_by_type_or_data_set() -> None:
    asked = [One((d, t), ("1",)) for d in ("a", "b") for t in ("question", "caption")]

    def chosen(text: str) -> list[str]:
        return list(choose_metrics(asked, parse_metrics(text)).values())

    assert chosen("anls") == ["anls"] * 4
    assert chosen("relaxed, caption=none") == ["relaxed", "none", "relaxed", "none"]
    assert chosen("b=count,question=anls") == ["anls", "exact", "anls", "count"]
    assert chosen("b/question=relaxed,question=anls") == ["anls", "exact", "relaxed", "exact"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "qestion=anls",
            r"--metric qestion: no such question type or data set \(there: d, d/question",
        ),
        (
            "question=vqa",
            r"needs at least 4 answers to a question, and one of d has 1; .*question=exact",
        ),
        ("d=count", r"some answers of d have no number; .*--metric question=exact"),
    ],
)
def test_what_cannot_be_judged_is_refused(text: str, error: str) -> None:
    with pytest.raises(UserError, match=error):
        choose_metrics([One(("d", "question"), ("red",))], parse_metrics(text))


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'anl' is none of exact, vqa, .*anls"):
        parse_metrics("question=anl")
    assert parse_metrics("") == parse_metrics(" , ") == {}


def test_scores_are_named_by_their_metric() -> None:
    answers = {"vqa": ["1"] * 10, "points": [POINT], "count": ["2", "5"]}
    for metric, names in METRICS.items():
        found = score_answer(metric, "1", answers.get(metric, ["1"]), distance=0.05)
        assert len(found) == len(names)
    assert score_answer("count", "four", ["2", "5"], distance=0.05) == (0.0, 1.0, 1.0), (
        "the nearest"
    )
    assert score_answer("count", POINT, ["1"], distance=0.05) == (1.0, 1.0, 0.0), (
        "points are counted"
    )
    assert score_answer("points", POINT, ["none", POINT], distance=0.05) == (1.0, 1.0, 1.0)
