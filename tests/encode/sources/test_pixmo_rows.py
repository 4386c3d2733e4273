"""One row of a PixMo table becomes conversations, or a reason why it is unusable.

READERS["pixmo-points"](row, None)      # yields Conversation and Unusable, raises BadRowError
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.format.media_marks import split_at_marks
from cache.store.samples import MediaRef
from encode.errors import BadRowError
from encode.records.points import POINTS_WEIGHT
from encode.records.record import CAPTION_PROMPT
from encode.sources.pixmo_rows import (
    NONE,
    READERS,
    TRANSCRIPT_PROMPT,
    Conversation,
    Unusable,
    image,
)
from train.evaluate.pointing import points_in

SHA = "ab" * 32


def as_read(value: Any) -> Any:
    """Return a row as Parquet gives it: texts are bytes."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, Mapping):
        return {key: as_read(inner) for key, inner in value.items()}
    return [as_read(inner) for inner in value] if isinstance(value, list) else value


def read(
    name: str, size: tuple[int, int] | None = None, **row: Any
) -> list[Conversation | Unusable]:
    return list(READERS[name](as_read(row), size))


def conversation(name: str, size: tuple[int, int] | None = None, **row: Any) -> Conversation:
    (found,) = read(name, size, **row)
    assert isinstance(found, Conversation)
    return found


def turns_of(part: Conversation | Unusable) -> list[tuple[str, str, float]]:
    assert isinstance(part, Conversation)
    return [(m.role, m.content, m.weight) for m in part.messages]


def reason(name: str, size: tuple[int, int] | None = None, **row: Any) -> str:
    with pytest.raises(BadRowError) as refused:
        read(name, size, **row)
    return str(refused.value)


# ---- captions


def test_a_caption_and_each_transcript_give_one_sample_each() -> None:
    found = read("pixmo-cap", caption=" A cat. ", transcripts=["So, a cat.", "Um, grey."])
    assert [turns_of(one) for one in found] == [
        [("user", f"<image>{CAPTION_PROMPT}", 1.0), ("assistant", "A cat.", 1.0)],
        [("user", f"<image>{TRANSCRIPT_PROMPT}", 1.0), ("assistant", "So, a cat.", 1.0)],
        [("user", f"<image>{TRANSCRIPT_PROMPT}", 1.0), ("assistant", "Um, grey.", 1.0)],
    ]
    tasks = [(one.task, one.suffix) for one in found if isinstance(one, Conversation)]
    assert tasks == [("caption", ""), ("transcript", ".t0"), ("transcript", ".t1")]


def test_the_usable_parts_of_a_caption_row_are_kept() -> None:
    found = read("pixmo-cap", caption=None, transcripts=["", "A cat.", b"\xff"])
    assert found[:2] == [
        Unusable(reason="left out: no caption"),
        Unusable(reason="left out: no transcript"),
    ]
    assert turns_of(found[2])[1] == ("assistant", "A cat.", 1.0)
    assert isinstance(found[2], Conversation) and found[2].suffix == ".t1", "its place in the row"
    assert found[3] == Unusable(reason="left out: transcript is not UTF-8")
    assert len(read("pixmo-cap", caption="A cat.", transcripts=None)) == 1


# ---- points


def test_points_in_percent_become_sorted_html() -> None:
    points = [{"x": 91.1, "y": 80.0}, {"x": 90.0, "y": 40.0}, {"x": 4.2, "y": 0.0}]
    found = conversation("pixmo-points", points=points, count=3, label="red\n cars")
    assert turns_of(found) == [
        ("user", "<image>Point to red cars.", 1.0),
        (
            "assistant",
            '<points coords="1 1 042 000 2 900 400 3 911 800">red cars</points>',
            POINTS_WEIGHT,
        ),
    ]
    assert found.task == "point" and POINTS_WEIGHT == 0.2
    assert points_in(turns_of(found)[1][1]) == [(1, 42, 0), (1, 900, 400), (1, 911, 800)]


def test_an_absent_thing_is_answered_with_full_weight() -> None:
    found = conversation("pixmo-points", points=[], count=0, label="unicorns")
    assert turns_of(found)[1] == ("assistant", NONE, 1.0)
    assert found.task == "point"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"points": [], "count": 3}, "no points, though the count is not 0"),
        ({"points": None, "count": None}, "no points, though the count is not 0"),
        ({"points": [{"x": 250.0, "y": 1.0}]}, "a point outside the image"),
        ({"points": [{"x": 50.0, "y": -5.1}]}, "a point outside the image"),
        ({"points": [{"x": math.nan, "y": 1.0}]}, "a point outside the image"),
        ({"points": [{"x": math.inf, "y": 1.0}]}, "a point outside the image"),
        ({"points": [{"x": None, "y": 1.0}]}, "a point outside the image"),
        ({"points": [None]}, "points lack an x or a y"),
        ({"points": {"x": [1.0], "y": []}}, "points lack an x or a y"),
        ({"label": None}, "no label"),
        ({"label": " \n"}, "no label"),
        ({"label": b"\xfe"}, "label is not UTF-8"),
    ],
)
def test_an_unusable_row_of_points_has_its_reason(row: dict[str, Any], expected: str) -> None:
    good = {"points": [{"x": 1.0, "y": 2.0}], "count": 1, "label": "cars"}
    assert reason("pixmo-points", **{**good, **row}) == expected


def test_a_point_just_outside_is_moved_to_the_edge() -> None:
    found = conversation("pixmo-points", points=[{"x": -0.4, "y": 104.9}], count=1, label="x")
    assert points_in(turns_of(found)[1][1]) == [(1, 0, 1000)]


@given(
    points=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=40),
    shuffled=st.randoms(use_true_random=False),
)
def test_the_answer_does_not_depend_on_the_order_of_the_points(
    points: list[tuple[float, float]], shuffled: Any
) -> None:
    def answer(of: list[tuple[float, float]]) -> str:
        rows = [{"x": x, "y": y} for x, y in of]
        return turns_of(conversation("pixmo-points", points=rows, count=len(rows), label="x"))[1][1]

    text = answer(points)
    other = list(points)
    shuffled.shuffle(other)
    assert answer(other) == text
    assert len(points_in(text)) == len(points), "two points at one place are kept"
    assert all(0 <= x <= 1000 and 0 <= y <= 1000 for _, x, y in points_in(text))
    assert re.fullmatch(r'<points coords="1( \d+ \d{3,4} \d{3,4})+">x</points>', text)


# ---- counts


DOGS = {"label": "dogs", "count": 2, "points": {"x": [320.0, 80.0], "y": [120.0, 240.0]}}


def test_without_the_size_of_the_image_there_is_only_the_count() -> None:
    found = conversation("pixmo-count", **DOGS)
    assert turns_of(found) == [
        ("user", "<image>How many dogs are there?", 1.0),
        ("assistant", "2", 1.0),
    ]
    assert found.task == "count"


def test_with_the_size_of_the_image_pixels_become_points() -> None:
    found = conversation("pixmo-count", (640, 480), **DOGS)
    asked, answer = turns_of(found)
    assert asked == ("user", "<image>Point to dogs and count them.", 1.0)
    points = '<points coords="1 1 125 500 2 500 250">dogs</points>'
    assert answer == ("assistant", f"{points} That makes 2.", POINTS_WEIGHT)
    assert (found.task, found.suffix) == ("count", conversation("pixmo-count", **DOGS).suffix)


@pytest.mark.parametrize(
    ("points", "why"),
    [
        ({"x": [320.0], "y": [120.0]}, "points and count disagree"),
        ({"x": [], "y": []}, "points and count disagree"),
        ({"x": None, "y": None}, "points and count disagree"),
        (None, "points and count disagree"),
        ({"x": [1.0, 2.0], "y": [1.0]}, "points lack an x or a y"),
        ({"x": [1.0, 2000.0], "y": [1.0, 2.0]}, "a point outside the image"),
        ({"x": [1.0, math.nan], "y": [1.0, 2.0]}, "a point outside the image"),
    ],
)
def test_unusable_points_leave_the_count(points: Any, why: str) -> None:
    note, found = read("pixmo-count", (640, 480), **{**DOGS, "points": points})
    assert note == Unusable(reason=f"counted without its points: {why}")
    assert found == conversation("pixmo-count", **DOGS)


def test_a_count_of_zero_has_no_points() -> None:
    none = {**DOGS, "count": 0, "points": {"x": [], "y": []}}
    assert turns_of(conversation("pixmo-count", **none))[1] == ("assistant", "0", 1.0)
    assert conversation("pixmo-count", (640, 480), **none) == conversation("pixmo-count", **none)


@pytest.mark.parametrize("count", [None, -1])
def test_an_invalid_count_is_refused(count: int | None) -> None:
    assert reason("pixmo-count", **{**DOGS, "count": count}) == "count is not a number of things"


# ---- questions


@pytest.mark.parametrize(
    ("question", "turns"),
    [
        ("[USER] What? [ASSISTANT]", ["What?", "Yes."]),
        ("[USER]\nWhat?\n[ASSISTANT]\n", ["What?", "Yes."]),
        ("[USER] What?", ["What?", "Yes."]),
        ("What?", ["What?", "Yes."]),
        ("[USER]1[ASSISTANT]2[USER]3[ASSISTANT]4[USER]5[ASSISTANT]", [*"12345", "Yes."]),
    ],
)
def test_tags_become_turns(question: str, turns: list[str]) -> None:
    found = conversation("pixmo-cap-qa", question=question, answer="Yes.", messages=None)
    assert [m.content for m in found.messages] == [f"<image>{turns[0]}", *turns[1:]]
    roles = ["user", "assistant"] * (len(turns) // 2)
    assert [m.role for m in found.messages] == roles
    assert found.task == ("question" if len(turns) == 2 else "chat")


BROKEN = [
    "Well [USER] What? [ASSISTANT]",
    "[ASSISTANT] What? [USER]",
    "[USER] What? [USER] Which? [ASSISTANT]",
    "[USER] [ASSISTANT]",
    "[USER] What? [ASSISTANT] A cat.",
    "[USER] What? [ASSISTANT] [ASSISTANT]",
]


@pytest.mark.parametrize("question", BROKEN)
def test_broken_tags_fall_back_to_messages(question: str) -> None:
    row = {"question": question, "answer": "Yes."}
    turns = ["What?", "A cat.", "Sure?", "Yes."]
    found = conversation("pixmo-cap-qa", **row, messages=turns)
    assert [m.content for m in found.messages] == ["<image>What?", *turns[1:]]
    assert conversation("pixmo-cap-qa", **row, messages=turns[:3]) == found, (
        "the answer is the last turn"
    )
    for none in ({}, {"messages": None}, {"messages": []}):
        assert "tags" in reason("pixmo-cap-qa", **row, **none)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": None}, "no question"),
        ({"answer": "  "}, "no answer"),
        ({"answer": b"\xc3("}, "answer is not UTF-8"),
        ({"question": None, "messages": ["What?", ""]}, "no messages"),
        ({"question": None, "messages": [None, "A cat."]}, "no messages"),
    ],
)
def test_an_incomplete_conversation_is_refused(row: dict[str, Any], expected: str) -> None:
    good = {"question": "[USER] What? [ASSISTANT]", "answer": "A cat."}
    assert reason("pixmo-cap-qa", **{**good, **row}) == expected


def test_a_question_and_its_answer() -> None:
    found = conversation("pixmo-ask-model-anything", question=" What? ", answer="A [USER] cat.")
    assert turns_of(found) == [("user", "<image>What?", 1.0), ("assistant", "A [USER] cat.", 1.0)]
    assert found.task == "question"
    assert reason("pixmo-ask-model-anything", question="", answer="x") == "no question"


# ---- the image


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8080/a.jpg", "https://x.org/a b.jpg?q=%20&r#s", "https://x.org/ä猫.png "],
)
def test_urls_are_kept_as_spelt(url: str) -> None:
    assert image(as_read({"image_url": url})) == MediaRef(source=url)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"image_url": None}, "no image_url"),
        ({"image_url": ""}, "no image_url"),
        ({"image_url": b"http://\xff"}, "image_url is not UTF-8"),
        ({"image_url": "/etc/passwd"}, "image_url is not an http(s) URL"),
        ({"image_url": "file:///etc/passwd"}, "image_url is not an http(s) URL"),
        ({"image_url": "ftp://x.org/a.jpg"}, "image_url is not an http(s) URL"),
        ({"image_url": "http://x.org/a\nb"}, "image_url is not an http(s) URL"),
        ({"image_url": "http://x.org/a\0"}, "image_url is not an http(s) URL"),
        ({"image_sha256": SHA[1:]}, "image_sha256 is not 64 hex digits"),
        ({"image_sha256": "z" * 64}, "image_sha256 is not 64 hex digits"),
        ({"image_sha256": SHA + "\n0"}, "image_sha256 is not 64 hex digits"),
        ({"image_sha256": ""}, "no image_sha256"),
    ],
)
def test_a_row_without_a_usable_image_has_its_reason(row: dict[str, Any], expected: str) -> None:
    good = {"image_url": "https://x.org/a.jpg", "image_sha256": SHA}
    with pytest.raises(BadRowError) as refused:
        image(as_read({**good, **row}))
    assert str(refused.value) == expected


def test_the_sha256_of_an_image_is_kept() -> None:
    url = "https://x.org/a.jpg"
    known = image(as_read({"image_url": url, "image_sha256": SHA.upper()}))
    assert known == MediaRef(source=url, sha256=SHA)
    assert image(as_read({"image_url": url, "image_sha256": None})).sha256 is None


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("pixmo-cap", {"caption": "an <image> here", "transcripts": ["<image>"]}),
        ("pixmo-points", {"label": "the <image>", "points": [{"x": 1.0, "y": 1.0}], "count": 1}),
        ("pixmo-count", {"label": "<image><image>", "points": None, "count": 1}),
        (
            "pixmo-cap-qa",
            {"question": "[USER] <image>? [ASSISTANT] <image> [USER] <image>", "answer": "<image>"},
        ),
        ("pixmo-ask-model-anything", {"question": "<image> what <image>?", "answer": "<image>"}),
    ],
)
def test_a_placeholder_in_a_text_stays_text(name: str, row: dict[str, Any]) -> None:
    for found in read(name, **row):
        texts = split_at_marks([(role, text) for role, text, _ in turns_of(found)], 1)
        assert [len(cut) - 1 for cut in texts] == [1] + [0] * (len(texts) - 1)
        assert texts[0][0] == "", "the only placeholder is at the beginning"
        rest = "".join(piece for cut in texts for piece in cut)
        words = "".join(m.content for m in found.messages)  # type: ignore[union-attr]
        assert rest.count("<image>") == words.count("<image>") - 1 > 0


# ---- any row

words = st.none() | st.binary(max_size=12) | st.text(max_size=12).map(str.encode)
tagged = st.lists(st.sampled_from([b"[USER]", b"[ASSISTANT]", b"x", b" ", b"<image>"])).map(
    b"".join
)
number = st.none() | st.floats()
pairs = st.none() | st.fixed_dictionaries({"x": number, "y": number})
numbers = st.none() | st.lists(number, max_size=3)
ROWS = st.fixed_dictionaries(
    {
        "caption": words,
        "transcripts": st.none() | st.lists(words, max_size=3),
        "label": words,
        "count": st.none() | st.integers(-2, 3),
        "points": st.none()
        | st.lists(pairs, max_size=3)
        | st.fixed_dictionaries({"x": numbers, "y": numbers}),
        "question": words | tagged,
        "answer": words,
        "messages": st.none() | st.lists(words, max_size=5),
    }
)


@pytest.mark.parametrize("name", READERS)
@given(row=ROWS, size=st.none() | st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_any_row_gives_complete_conversations_or_a_reason(
    name: str, row: dict[str, Any], size: tuple[int, int] | None
) -> None:
    try:
        found = list(READERS[name](row, size))
    except BadRowError as error:
        assert str(error)
        return
    assert found or name == "pixmo-cap"
    assert all(one.reason for one in found if isinstance(one, Unusable))
    made = [one for one in found if isinstance(one, Conversation)]
    assert len({one.suffix for one in made}) == len(made)
    for one in made:
        assert [m.role for m in one.messages] == ["user", "assistant"] * (len(one.messages) // 2)
        assert one.messages[0].content.startswith("<image>")
        assert all(m.content.removeprefix("<image>").strip() for m in one.messages)
