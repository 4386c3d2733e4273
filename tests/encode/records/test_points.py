"""Points of any unit become text with coordinates from 0 to 1000.

html("dogs", pairs({"x": [50.0], "y": [25.0]}), (100.0, 100.0))
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from encode.records.account import FaultError
from encode.records.points import EDGE, html, pairs, thousandths


def test_points_are_sorted_from_left_to_right() -> None:
    for points in (
        {"x": [91.1, 4.2], "y": [80.0, 40.0]},
        [{"x": 91.1, "y": 80}, {"x": 4.2, "y": 40}],
    ):
        text = html("dogs", pairs(points), (100.0, 100.0))
        assert text == '<points coords="1 1 042 400 2 911 800">dogs</points>'


@given(share=st.floats() | st.floats(-EDGE, 1 + EDGE), full=st.floats(1, 1e6) | st.just(100.0))
@example(share=0.0, full=100.0)
@example(share=1.0, full=100.0)
def test_coordinates_in_any_unit_become_integers_from_0_to_1000(share: float, full: float) -> None:
    value = share * full
    if -EDGE <= value / full <= 1 + EDGE:
        got = thousandths(value, full)
        assert isinstance(got, int) and 0 <= got <= 1000
        assert abs(got - 1000 * min(1.0, max(0.0, share))) <= 0.5 + 1e-6
    else:
        with pytest.raises(FaultError, match="outside the image"):
            thousandths(value, full)


@pytest.mark.parametrize("value", [None, "far", float("nan"), 10**400, [1], {}])
def test_what_is_no_coordinate_is_a_fault(value: Any) -> None:
    with pytest.raises(FaultError, match="outside the image"):
        thousandths(value, 100.0)


@pytest.mark.parametrize("points", [{"x": [1], "y": []}, {"x": [1]}, [{"x": 1}], [None], ["x"]])
def test_points_without_an_x_or_a_y_are_faults(points: Any) -> None:
    with pytest.raises(FaultError, match="lack an x or a y"):
        pairs(points)
