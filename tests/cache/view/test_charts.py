"""Charts as SVG.

line_chart([Line(label="loss", points=[(1, 2.5), (2, 1.9)], style="a")], title="Loss", log_y=True)
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.view import charts
from cache.view.charts import Line, line_chart
from tests.support.html_page import Page


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_cover_the_range_at_round_values(low: float, span: float) -> None:
    high = low + span
    ticks = charts.nice_ticks(low, high)
    tolerance = 1e-9 * max(abs(low), abs(high), span)
    assert ticks[0] <= low + tolerance and ticks[-1] >= high - tolerance
    assert 2 <= len(ticks) <= 9
    step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
    assert np.diff(ticks) == pytest.approx(step, rel=1e-2)
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(mantissa - round_one) for round_one in (1, 2, 5, 10)) < 1e-2


@given(st.floats(1e-8, 1e3), st.floats(1.01, 1e6))
def test_log_ticks_cover_the_range(low: float, factor: float) -> None:
    ticks = charts.log_ticks(low, low * factor)
    assert ticks[0] <= low * 1.000001 and ticks[-1] >= low * factor * 0.999999
    assert 2 <= len(ticks) <= 20


def test_a_thinned_line_keeps_its_mean_and_its_ends() -> None:
    points = [(float(i), math.sin(i)) for i in range(10_000)]
    thin = charts.thinned(points)
    assert len(thin) == charts.MAX_POINTS
    assert np.mean([y for _, y in thin]) == pytest.approx(np.mean([y for _, y in points]), abs=1e-3)
    assert thin[0][0] < 15 and thin[-1][0] > 9985
    assert charts.thinned(points[:7]) == points[:7]


def test_a_smoothed_line_is_an_exponential_mean_without_bias() -> None:
    assert charts.smoothed([(0, 4.0), (1, 4.0), (2, 4.0)], 5)[-1] == (2, pytest.approx(4.0))
    # With a half-life of one point the weights are 1/4, 1/2, 1.
    assert charts.smoothed([(0, 1.0), (1, 2.0), (2, 4.0)], 1)[-1][1] == pytest.approx(
        (0.25 + 1 + 4) / 1.75
    )


def test_values_that_cannot_be_drawn_are_skipped() -> None:
    line = Line(label="x", points=[(1, float("nan")), (2, 0.0), (3, float("inf"))], style="a")
    assert "Nothing recorded" in line_chart([line], title="T", log_y=True)
    drawn = line_chart([line], title="T")
    assert "nan" not in drawn and "inf" not in drawn
    flat = line_chart([Line(label="x", points=[(1, 2.0), (2, 2.0)], style="a")], title="T")
    assert Page(flat).tags
