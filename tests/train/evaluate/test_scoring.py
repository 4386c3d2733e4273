"""Means over questions and question types, worked out by hand, with their intervals.

tasks, mean = summarize(answers)
"""

from __future__ import annotations

from typing import Any

import pytest

from train.evaluate.scoring import Answer, summarize


def answer(task: str, score: float, blind: float | None = 0.0, **changes: Any) -> Answer:
    values: dict[str, Any] = {
        "sample": "d/1",
        "task": task,
        "media": (),
        "item": "a",
        "question": "?",
        "expected": "x",
        "given": "x",
        "metric": "exact",
        "scores": (score,),
        "correct": score >= 0.5,
        "blind": "y",
        "blind_scores": None if blind is None else (blind,),
        "blind_correct": False,
    }
    return Answer(**{**values, **changes})


def test_the_mean_is_over_question_types() -> None:
    answers = [*(answer("a", 1.0) for _ in range(9)), answer("b", 0.0), answer("caption", 0.0)]
    tasks, mean = summarize(answers)
    found = [(t.name, t.questions, t.scores[0].value, t.scores[0].blind) for t in tasks]
    assert found == [("a", 9, 1.0, 0.0), ("b", 1, 0.0, 0.0), ("caption", 1, 0.0, 0.0)]
    assert mean is not None and (mean.value, mean.blind, mean.gain) == (0.5, 0.0, 0.5)
    assert mean.interval is None, "one media item says nothing of others"
    assert summarize(answers[-1:])[1] is None
    assert summarize([]) == ((), None)


def test_types_of_two_metrics_are_two_results_and_none_is_left_out() -> None:
    answers = [
        answer("question", 0.5, metric="anls"),
        answer("question", 1.0, blind=None, metric="exact"),
        answer("chat", 0.0, metric="none", scores=(), blind_scores=()),
    ]
    tasks, mean = summarize(answers)
    assert [(t.name, t.metric, t.scores[0].value) for t in tasks] == [
        ("question", "anls", 0.5),
        ("question", "exact", 1.0),
    ]
    assert mean is not None and mean.value == 0.75 and mean.blind is None


def test_a_metric_of_several_scores_has_them_all_and_the_first_is_in_the_mean() -> None:
    answers = [
        answer("count", 1.0, metric="count", scores=(1.0, 1.0, 0.0), blind_scores=(0.0, 0.0, 4.0)),
        answer("count", 0.0, metric="count", scores=(0.0, 1.0, 1.0), blind_scores=(0.0, 0.0, 2.0)),
    ]
    ((task,), mean) = summarize(answers)
    found = [(s.name, s.value, s.blind, s.gain) for s in task.scores]
    assert found == [
        ("exact count", 0.5, 0.0, 0.5),
        ("within one", 1.0, 0.0, 1.0),
        ("mean error", 0.5, 3.0, -2.5),
    ]
    assert mean is not None and mean.value == 0.5


def test_equal_questions_give_no_interval_of_a_mean() -> None:
    answers = [answer(task, 1.0, 1.0, item=str(n)) for n in range(30) for task in ("a", "b")]
    tasks, mean = summarize(answers)
    assert [t.scores[0].interval for t in tasks] == [(0.9, 1.0)] * 2
    assert [t.scores[0].gain_interval for t in tasks] == [(-0.1, 0.1)] * 2
    assert mean is not None and mean.interval is mean.gain_interval is None


def test_the_interval_of_a_difference_is_paired() -> None:
    """Seeing and blind rise and fall together, so their difference varies less than each of them."""
    answers = [
        answer("a", float(n % 2), float(n % 2 and n % 10 > 1), item=str(n)) for n in range(200)
    ]
    ((task,), mean) = summarize(answers)
    (score,) = task.scores
    assert score.value == 0.5 and score.blind == pytest.approx(0.4)
    assert score.interval and score.blind_interval and score.gain_interval
    wide = [high - low for low, high in (score.interval, score.blind_interval)]
    narrow = score.gain_interval[1] - score.gain_interval[0]
    assert narrow < 0.7 * min(wide)
    assert wide[0] == pytest.approx(2 * 1.96 * (0.25 / 200) ** 0.5, rel=0.1)
    assert mean is not None and mean.interval == score.interval, "one type: its mean is the mean"
