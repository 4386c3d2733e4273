"""Bootstrap intervals against the formulas of cases that have one.

drawn = resampled_means(values, clusters)
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from train.evaluate import intervals
from train.evaluate.intervals import interval, resampled_means, share_interval


def test_the_interval_of_independent_questions_is_that_of_the_normal_distribution() -> None:
    values = (np.arange(400) % 4 == 0).astype(float)[:, None]  # a quarter is right
    low, high = interval(resampled_means(values, np.arange(400))[:, 0]) or (0, 0)
    margin = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert (low, high) == (
        pytest.approx(0.25 - margin, abs=0.006),
        pytest.approx(0.25 + margin, abs=0.006),
    )


def test_equal_answers_about_one_image_count_as_one() -> None:
    """Ten questions an image, all right or all wrong: as uncertain as one question an image."""
    right = (np.arange(100) % 2 == 0).astype(float)
    alone = interval(resampled_means(right[:, None], np.arange(100))[:, 0])
    tenfold = resampled_means(np.repeat(right, 10)[:, None], np.repeat(np.arange(100), 10))
    assert interval(tenfold[:, 0]) == alone
    apart = interval(resampled_means(np.repeat(right, 10)[:, None], np.arange(1000))[:, 0])
    assert alone and apart and apart[1] - apart[0] < 0.4 * (alone[1] - alone[0])


def test_draws_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random((50, 3))
    once = resampled_means(values, np.arange(50) // 2, draws=100)
    assert np.array_equal(once, resampled_means(values, np.arange(50) // 2, draws=100))
    assert not np.array_equal(once, resampled_means(values, np.arange(50) // 2, draws=100, seed=1))
    monkeypatch.setattr(intervals, "AT_ONCE", 60)  # a few draws at once
    parts = resampled_means(values, np.arange(50) // 2, draws=100)
    assert np.allclose(parts, once), "memory is limited without another result"


def test_a_column_counts_only_the_questions_that_have_it() -> None:
    values = np.array([[1.0, np.nan], [0.0, np.nan], [np.nan, 0.5]])
    drawn = resampled_means(values, np.array([0, 1, 2]), draws=500)
    assert set(drawn[:, 1][~np.isnan(drawn[:, 1])]) == {0.5}
    assert np.isnan(drawn[:, 1]).mean() == pytest.approx((2 / 3) ** 3, abs=0.08)
    assert interval(np.array([np.nan])) is interval(np.full(9, 0.5)) is None


def test_all_right_is_no_proof_of_a_share_of_one() -> None:
    values, items = np.ones((60, 1)), np.arange(60) // 2
    drawn = resampled_means(values, items)
    assert share_interval(drawn[:, 0], values[:, 0], items) == (pytest.approx(0.9), 1.0)
    assert share_interval(drawn[:, 0] - 1, values[:, 0] - 1, items) == (0.0, pytest.approx(0.1))
    low, high = share_interval(drawn[:, 0] - 1, values[:, 0] - 1, items, least=-1.0) or (0, 0)
    assert (low, high) == (pytest.approx(-0.1), pytest.approx(0.1)), "a difference has two sides"
    assert share_interval(drawn[:, 0], values[:, 0], np.zeros(60, np.int64)) is None


def test_twenty_thousand_questions_take_seconds() -> None:
    values = np.random.default_rng(0).random((20_000, 20))
    begun = time.monotonic()
    assert resampled_means(values, np.arange(20_000) // 2).shape == (2000, 20)
    assert time.monotonic() - begun < 20
