"""Texts as numbers: equal to a dict, also where hashes begin with the same 64 bits.

numbers = Numbers()
numbers.add(["/a", "/b", "/a"])     # [0, 1, 0]
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encode.plan import numbering
from encode.plan.numbering import BLOCK, Numbers, TextMap, Texts, TextSet, digests

TEXTS = st.text(st.characters(), max_size=3)
"""Few enough to repeat; lone surrogates are among them."""


@settings(deadline=None)
@given(st.lists(st.lists(TEXTS, max_size=20), max_size=8))
def test_numbers_are_those_of_a_dict(batches: list[list[str]]) -> None:
    numbers, expected = Numbers(), dict[str, int]()
    for batch in batches:
        for text in batch:
            expected.setdefault(text, len(expected))
        assert numbers.add(batch).tolist() == [expected[text] for text in batch]
    assert len(numbers) == len(expected)
    asked = [*expected, "not one of them"]
    found = [expected.get(text, -1) for text in asked]
    assert numbers.find(asked).tolist() == found
    assert [numbers.find_one(text) for text in asked] == found


def test_hashes_that_share_64_bits_are_told_apart() -> None:
    numbers = Numbers()
    twins = np.array([[7, 1], [7, 2], [9, 1]], np.uint64)
    assert numbers.add_digests(twins).tolist() == [0, 1, 2]
    assert numbers.add_digests(np.array([[7, 3], [7, 1]], np.uint64)).tolist() == [3, 0]
    more = np.array([[7, 4], [7, 3], [7, 2], [7, 1], [9, 2]], np.uint64)
    assert numbers.find_digests(more).tolist() == [-1, 3, 1, 0, -1]


@settings(deadline=None)
@given(st.lists(TEXTS, max_size=30), st.integers(0, 3))
def test_texts_are_those_of_a_list(some: list[str], blocks: int) -> None:
    texts, expected = Texts(), list[str]()
    for part in (some, [f"/folder/{i}" for i in range(blocks * BLOCK)], some):
        texts.extend(part)
        expected += part
        assert list(texts) == expected
    assert [texts[i] for i in range(-len(expected), len(expected))] == expected * 2
    assert [text for block in texts.blocks() for text in block] == expected
    with pytest.raises(IndexError):
        texts[len(expected)]


@settings(deadline=None)
@given(st.lists(st.tuples(TEXTS, st.integers(0, 2**31 - 1)), max_size=50))
def test_a_map_is_a_dict(items: list[tuple[str, int]]) -> None:
    before, numbering.AT_ONCE = numbering.AT_ONCE, 3
    try:
        values, expected = TextMap(), dict[str, int]()
        for text, value in items:
            values[text] = expected[text] = value
            assert len(values) == len(expected)
        assert {text: values.get(text) for text in expected} == expected
        assert "not one of them" not in values
    finally:
        numbering.AT_ONCE = before
    texts = TextSet()
    texts.update(text for text, _ in items)
    assert len(texts) == len(expected) and all(text in texts for text in expected)


def test_many_texts_take_little_memory() -> None:
    """A list of these texts takes 104 bytes for each, and a dict 100 more."""
    import tracemalloc

    count = 4 * numbering.AT_ONCE
    tracemalloc.start()
    try:
        texts, numbers = Texts(), Numbers()
        for start in range(0, count, numbering.AT_ONCE):
            part = [
                f"https://h/{i * 2654435761 % 2**32:08x}.jpg"
                for i in range(start, start + numbering.AT_ONCE)
            ]
            numbers.add_digests(digests(part))
            texts.extend(part)
            del part
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(numbers) == count
    assert held / count < 50
