"""Placeholders: the tokens of an image or a video, and their number.

Placeholders.of(spec, tokenizer).contents(samples, [3, 0])    # the tokens of two media items
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.language.chat_template import fill_placeholders, timestamp_text, video_token_ids
from model.language.model import load_tokenizer
from model.language.tokenizer import encode_text
from tests.support.feature_caches import SPEC, ask, new_world
from train.data.placeholders import Placeholders, tenths_of


@given(
    st.lists(
        st.floats(0, 1e5)
        | st.integers(0, 10**7).map(lambda n: n / 100)
        | st.integers(0, 10**6).map(lambda n: n * 1001 / 30_000)
        | st.integers(0, 10**6).map(lambda n: n * 0.05)
        | st.sampled_from([-0.0, -0.04]),
        min_size=1,
    )
)
def test_tenths_are_rounded_as_in_the_text(times: list[float]) -> None:
    found = tenths_of(np.array(times))
    assert [f"{t // 10}.{t % 10} " for t in found.tolist()] == [timestamp_text(t) for t in times]


def test_tenths_of_nan_are_minus_one() -> None:
    assert tenths_of(np.array([np.nan, 0.25, 0.35, 99.95])).tolist() == [-1, 2, 3, 1000]


def test_a_video_is_a_time_and_image_tokens_for_each_frame() -> None:
    tokenizer = load_tokenizer("random:qwen3-tiny")
    image = tokenizer.convert_tokens_to_ids("<image>")
    expected = []
    for text in ("0.0 ", "0.5 ", "12.3 "):
        expected += [*encode_text(tokenizer, text), image, image]
    assert video_token_ids(tokenizer, [0.0, 0.5, 12.3456], 2).tolist() == expected


def test_placeholders_are_filled_in_order() -> None:
    ids = np.array([5, 9, 6, 9], np.int32)
    contents = [np.array([9, 9], np.int32), np.array([1, 9, 9], np.int32)]
    filled, counts = fill_placeholders(ids, 9, contents)
    assert filled.tolist() == [5, 9, 9, 6, 1, 9, 9]
    assert counts.tolist() == [1, 2, 1, 3]
    with pytest.raises(AssertionError, match="2 placeholders for 1 media"):
        fill_placeholders(ids, 9, contents[:1])


def test_lengths_equal_those_of_the_contents(tmp_path: Path) -> None:
    world = new_world(tmp_path)
    videos = {f"video {i}": duration for i, duration in enumerate((0.0, 0.2, 3.3, 31.7, 120.0))}
    world.write(d=[ask("1", ["p", *videos, "q"], "<image>" * 7)])
    world.encode(["p", "q"])
    world.encode_videos(videos)
    joined = world.join()
    places = Placeholders.of(SPEC, world.tokenizer)
    contents = places.contents(joined, range(7))
    assert places.lengths(joined).tolist() == [len(c) for c in contents]
    assert len(set(places.lengths(joined).tolist())) == 6
