"""The frames that are sampled of a video, and that a higher limit keeps the views of short videos.

frame_views(1.5, max_frames=128)        # ("t:0", "t:500000", "t:1000000", "t:1500000")
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.format.frame_sampling import frame_views, sample_times


@pytest.mark.parametrize(
    ("duration_s", "limit", "expected"),
    [
        (0.0, 128, [0]),
        (1.5, 128, [0, 500_000, 1_000_000, 1_500_000]),
        (1.7, 128, [0, 500_000, 1_000_000, 1_500_000, 1_700_000]),  # and the last frame
        (100.0, 4, [0, 33_333_333, 66_666_667, 100_000_000]),  # over the limit: equal distances
        (1.5, 4, [0, 500_000, 1_000_000, 1_500_000]),  # exactly at the limit
        (9.0, 1, [0]),
    ],
)
def test_two_frames_a_second_and_the_last_one(
    duration_s: float, limit: int, expected: list[int]
) -> None:
    assert list(sample_times(duration_s, limit)) == expected


@given(st.floats(0, 20_000), st.integers(1, 400))
def test_times_ascend_from_the_first_frame_to_the_last(duration_s: float, limit: int) -> None:
    times = sample_times(duration_s, limit)
    assert 1 <= len(times) <= limit
    assert list(times) == sorted(set(times))
    assert times[0] == 0
    assert times[-1] == (round(duration_s * 1e6) if limit > 1 else 0)
    assert all(later - earlier <= 500_001 for earlier, later in itertools.pairwise(times)) or (
        len(times) == limit
    )


@given(st.floats(0, 63.5), st.integers(128, 400))
def test_a_higher_limit_keeps_the_views_of_videos_below_the_old_one(
    duration_s: float, limit: int
) -> None:
    assert frame_views(duration_s, 128) == frame_views(duration_s, limit)


@pytest.mark.parametrize(("duration_s", "limit"), [(float("nan"), 8), (-1.0, 8), (1.0, 0)])
def test_invalid_arguments_are_refused(duration_s: float, limit: int) -> None:
    with pytest.raises(ValueError, match="frames at"):
        sample_times(duration_s, limit)
