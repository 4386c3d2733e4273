"""Which `<image>` and `<video>` of a sample stand for its media, and which are text.

split_at_marks([("user", "<image> or <video>?")], 2)    # [["", " or ", "?"]]
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.format.media_marks import MARK, split_at_marks


def test_media_are_put_at_their_marks_or_in_front() -> None:
    two = [("user", "a<image>b"), ("assistant", "<video>"), ("user", "<video>c")]
    assert split_at_marks(two, 2) == [["a", "b"], ["<video>"], ["", "c"]]
    assert split_at_marks(two, 1) == [["a", "b"], ["<video>"], ["<video>c"]]  # the second is text
    assert split_at_marks(two, 0) == [["a<image>b"], ["<video>"], ["<video>c"]]
    no_mark = [("system", "s <image>"), ("user", "c"), ("user", "d")]
    assert split_at_marks(no_mark, 2) == [["s <image>"], ["", "", "c"], ["d"]]


def test_media_that_do_not_fit_are_an_error_with_both_counts() -> None:
    with pytest.raises(ValueError, match=r"3 media but 2 marks \(<image> or <video>\)"):
        split_at_marks([("user", "<image>"), ("assistant", "<image>"), ("user", "<video>")], 3)
    with pytest.raises(ValueError, match=r"2 media but 1 mark \("):
        split_at_marks([("user", "<video>")], 2)
    with pytest.raises(ValueError, match="1 media but no user turn"):
        split_at_marks([("assistant", "<image>")], 1)
    assert split_at_marks([], 0) == []


words = st.lists(st.sampled_from(["<image>", "<video>", "a", "<", "image>", "\n", "<Image>"])).map(
    "".join
)
turns = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), words), max_size=5)


@given(turns, st.integers(0, 5))
def test_all_text_and_all_media_are_kept(given_turns: list[tuple[str, str]], media: int) -> None:
    marks = sum(len(MARK.findall(text)) for role, text in given_turns if role == "user")
    try:
        texts = split_at_marks(given_turns, media)
    except ValueError:
        assert media and (0 < marks < media or "user" not in [role for role, _ in given_turns])
        return
    assert sum(len(cut) - 1 for cut in texts) == media
    used = min(marks, media)
    for (role, text), cut in zip(given_turns, texts, strict=True):
        assert role == "user" or cut == [text]
        # What is cut out is marks and nothing else, each the first one left.
        at = 0
        for piece in cut[:-1] if used else []:
            assert text.startswith(piece, at)
            found = MARK.match(text, at + len(piece))
            assert found and not MARK.search(piece)
            at = found.end()
        assert "".join(cut) == text if not used else text.endswith(cut[-1])
