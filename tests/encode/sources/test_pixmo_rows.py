"""What becomes of PixMo's rows: conversations, points on 0 to 1000, and a reason for what is left out."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cache.store.samples import MediaRef
from encode.errors import BadRowError
from encode.sources.folder import CAPTION_PROMPT
from encode.sources.pixmo_rows import (
    EDGE,
    NONE,
    POINTS_WEIGHT,
    READERS,
    TRANSCRIPT_PROMPT,
    Conversation,
    Unusable,
    image,
    thousandths,
)
from model.language.chat_template import split_at_images
from train.evaluate.scoring import points_in

SHA = "ab" * 32


def as_read(value: Any) -> Any:
    """A row as it comes out of Parquet: texts are bytes."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, Mapping):
        return {key: as_read(inner) for key, inner in value.items()}
    return [as_read(inner) for inner in value] if isinstance(value, list) else value


def read(
    name: str, size: tuple[int, int] | None = None, **row: Any
) -> list[Conversation | Unusable]:
    return list(READERS[name](as_read(row), size))


def said(name: str, size: tuple[int, int] | None = None, **row: Any) -> Conversation:
    (found,) = read(name, size, **row)
    assert isinstance(found, Conversation)
    return found


def told(conversation: Conversation | Unusable) -> list[tuple[str, str, float]]:
    assert isinstance(conversation, Conversation)
    return [(m.role, m.content, m.weight) for m in conversation.messages]


def reason(name: str, size: tuple[int, int] | None = None, **row: Any) -> str:
    with pytest.raises(BadRowError) as refused:
        read(name, size, **row)
    return str(refused.value)


# ---- captions


def test_a_caption_and_each_transcript_are_samples_of_their_own() -> None:
    found = read("pixmo-cap", caption=" A cat. ", transcripts=["So, a cat.", "Um, grey."])
    assert [told(one) for one in found] == [
        [("user", f"<image>{CAPTION_PROMPT}", 1.0), ("assistant", "A cat.", 1.0)],
        [("user", f"<image>{TRANSCRIPT_PROMPT}", 1.0), ("assistant", "So, a cat.", 1.0)],
        [("user", f"<image>{TRANSCRIPT_PROMPT}", 1.0), ("assistant", "Um, grey.", 1.0)],
    ]
    tasks = [(one.task, one.suffix) for one in found if isinstance(one, Conversation)]
    assert tasks == [("caption", ""), ("transcript", ".t0"), ("transcript", ".t1")]


def test_what_is_missing_of_a_caption_row_does_not_take_the_rest_along() -> None:
    found = read("pixmo-cap", caption=None, transcripts=["", "A cat.", b"\xff"])
    assert found[:2] == [
        Unusable(reason="left out: no caption"),
        Unusable(reason="left out: no transcript"),
    ]
    assert told(found[2])[1] == ("assistant", "A cat.", 1.0)
    assert isinstance(found[2], Conversation) and found[2].suffix == ".t1", "named by its place"
    assert found[3] == Unusable(reason="left out: transcript is not UTF-8")
    assert len(read("pixmo-cap", caption="A cat.", transcripts=None)) == 1


# ---- points


def test_points_are_percent_in_html_from_left_to_right() -> None:
    points = [{"x": 91.1, "y": 80.0}, {"x": 90.0, "y": 40.0}, {"x": 4.2, "y": 0.0}]
    found = said("pixmo-points", points=points, count=3, label="red\n cars")
    assert told(found) == [
        ("user", "<image>Point to red cars.", 1.0),
        (
            "assistant",
            '<points coords="1 1 042 000 2 900 400 3 911 800">red cars</points>',
            POINTS_WEIGHT,
        ),
    ]
    assert found.task == "point" and POINTS_WEIGHT == 0.2
    assert points_in(told(found)[1][1]) == [(1, 42, 0), (1, 900, 400), (1, 911, 800)]


def test_what_is_not_there_is_answered_with_a_sentence_of_full_weight() -> None:
    found = said("pixmo-points", points=[], count=0, label="unicorns")
    assert told(found)[1] == ("assistant", NONE, 1.0)
    assert found.task == "point"


@pytest.mark.parametrize(
    ("row", "says"),
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
def test_a_row_of_points_that_cannot_be_used_says_why(row: dict[str, Any], says: str) -> None:
    good = {"points": [{"x": 1.0, "y": 2.0}], "count": 1, "label": "cars"}
    assert reason("pixmo-points", **{**good, **row}) == says


def test_a_click_just_over_the_edge_is_on_the_edge() -> None:
    found = said("pixmo-points", points=[{"x": -0.4, "y": 104.9}], count=1, label="x")
    assert points_in(told(found)[1][1]) == [(1, 0, 1000)]


@given(
    share=st.floats(min_value=-EDGE, max_value=1 + EDGE),
    full=st.floats(min_value=1, max_value=1e6) | st.just(100.0),
)
@example(share=0.0, full=100.0)
@example(share=1.0, full=100.0)
def test_any_unit_becomes_an_integer_inside(share: float, full: float) -> None:
    value = share * full
    if not -EDGE <= value / full <= 1 + EDGE:  # rounded beyond the limit by the multiplication
        return
    got = thousandths(value, full)
    assert isinstance(got, int) and 0 <= got <= 1000
    assert abs(got - 1000 * min(1.0, max(0.0, share))) <= 0.5 + 1e-6


@given(share=st.floats(allow_nan=True, allow_infinity=True))
def test_anything_else_is_refused(share: float) -> None:
    if -EDGE <= share <= 1 + EDGE:
        assert 0 <= thousandths(share, 1.0) <= 1000
    else:
        with pytest.raises(BadRowError, match="outside the image"):
            thousandths(share, 1.0)


@given(
    points=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=40),
    shuffled=st.randoms(use_true_random=False),
)
def test_the_answer_does_not_depend_on_the_order_of_the_points(
    points: list[tuple[float, float]], shuffled: Any
) -> None:
    def answer(of: list[tuple[float, float]]) -> str:
        rows = [{"x": x, "y": y} for x, y in of]
        return told(said("pixmo-points", points=rows, count=len(rows), label="x"))[1][1]

    text = answer(points)
    other = list(points)
    shuffled.shuffle(other)
    assert answer(other) == text
    assert len(points_in(text)) == len(points), "two at one place are two"
    assert all(0 <= x <= 1000 and 0 <= y <= 1000 for _, x, y in points_in(text))
    assert re.fullmatch(r'<points coords="1( \d+ \d{3,4} \d{3,4})+">x</points>', text)


# ---- counts


DOGS = {"label": "dogs", "count": 2, "points": {"x": [320.0, 80.0], "y": [120.0, 240.0]}}


def test_without_the_size_of_the_image_the_count_stands_alone() -> None:
    found = said("pixmo-count", **DOGS)
    assert told(found) == [
        ("user", "<image>How many dogs are there?", 1.0),
        ("assistant", "2", 1.0),
    ]
    assert found.task == "count"


def test_with_the_size_pixels_become_points() -> None:
    found = said("pixmo-count", (640, 480), **DOGS)
    asked, answer = told(found)
    assert asked == ("user", "<image>Point to dogs and count them.", 1.0)
    points = '<points coords="1 1 125 500 2 500 250">dogs</points>'
    assert answer == ("assistant", f"{points} That makes 2.", POINTS_WEIGHT)
    assert (found.task, found.suffix) == ("count", said("pixmo-count", **DOGS).suffix)


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
def test_points_that_cannot_be_trusted_leave_the_count(points: Any, why: str) -> None:
    note, found = read("pixmo-count", (640, 480), **{**DOGS, "points": points})
    assert note == Unusable(reason=f"counted without its points: {why}")
    assert found == said("pixmo-count", **DOGS)


def test_none_counted_is_zero_with_and_without_the_size() -> None:
    none = {**DOGS, "count": 0, "points": {"x": [], "y": []}}
    assert told(said("pixmo-count", **none))[1] == ("assistant", "0", 1.0)
    assert said("pixmo-count", (640, 480), **none) == said("pixmo-count", **none)


@pytest.mark.parametrize("count", [None, -1])
def test_a_count_that_is_none_is_refused(count: int | None) -> None:
    assert reason("pixmo-count", **{**DOGS, "count": count}) == "count is not a number of things"


# ---- questions


@pytest.mark.parametrize(
    ("question", "turns"),
    [
        ("[USER] What? [ASSISTANT]", ["What?", "Yes."]),
        ("[USER]\nWhat?\n[ASSISTANT]\n", ["What?", "Yes."]),
        ("[USER] What?", ["What?", "Yes."]),
        ("What?", ["What?", "Yes."]),
        (
            "[USER] What? [ASSISTANT] A cat. [USER] Sure? [ASSISTANT]",
            ["What?", "A cat.", "Sure?", "Yes."],
        ),
        (
            "[USER]1[ASSISTANT]2[USER]3[ASSISTANT]4[USER]5[ASSISTANT]",
            ["1", "2", "3", "4", "5", "Yes."],
        ),
    ],
)
def test_tags_become_turns(question: str, turns: list[str]) -> None:
    found = said("pixmo-cap-qa", question=question, answer="Yes.", messages=None)
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
def test_tags_that_make_no_sense_fall_back_on_messages(question: str) -> None:
    row = {"question": question, "answer": "Yes."}
    turns = ["What?", "A cat.", "Sure?", "Yes."]
    found = said("pixmo-cap-qa", **row, messages=turns)
    assert [m.content for m in found.messages] == ["<image>What?", *turns[1:]]
    assert said("pixmo-cap-qa", **row, messages=turns[:3]) == found, "the answer ends it"
    for none in ({}, {"messages": None}, {"messages": []}):
        assert "tags" in reason("pixmo-cap-qa", **row, **none)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": None}, "no question"),
        ({"answer": "  "}, "no answer"),
        ({"answer": b"\xc3("}, "answer is not UTF-8"),
        ({"question": None, "messages": ["What?", ""]}, "no messages"),
        ({"question": None, "messages": [None, "A cat."]}, "no messages"),
    ],
)
def test_half_a_conversation_is_refused(row: dict[str, Any], says: str) -> None:
    good = {"question": "[USER] What? [ASSISTANT]", "answer": "A cat."}
    assert reason("pixmo-cap-qa", **{**good, **row}) == says


def test_a_question_and_its_answer() -> None:
    found = said("pixmo-ask-model-anything", question=" What? ", answer="A [USER] cat.")
    assert told(found) == [("user", "<image>What?", 1.0), ("assistant", "A [USER] cat.", 1.0)]
    assert found.task == "question"
    assert reason("pixmo-ask-model-anything", question="", answer="x") == "no question"


# ---- the image


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8080/a.jpg", "https://x.org/a b.jpg?q=%20&r#s", "https://x.org/ä猫.png "],
)
def test_addresses_are_kept_to_the_letter(url: str) -> None:
    assert image(as_read({"image_url": url})) == MediaRef(source=url)


@pytest.mark.parametrize(
    ("row", "says"),
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
def test_a_row_without_a_usable_image_says_why(row: dict[str, Any], says: str) -> None:
    good = {"image_url": "https://x.org/a.jpg", "image_sha256": SHA}
    with pytest.raises(BadRowError) as refused:
        image(as_read({**good, **row}))
    assert str(refused.value) == says


def test_the_hash_goes_along_where_there_is_one() -> None:
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
def test_a_placeholder_in_somebodys_words_stays_text(name: str, row: dict[str, Any]) -> None:
    for found in read(name, **row):
        texts = split_at_images(told(found), images=1)
        assert [len(cut) - 1 for cut in texts] == [1] + [0] * (len(texts) - 1)
        assert texts[0][0] == "", "the one place is at the very beginning"
        rest = "".join(piece for cut in texts for piece in cut)
        words = "".join(m.content for m in found.messages)  # type: ignore[union-attr]
        assert rest.count("<image>") == words.count("<image>") - 1 > 0


# ---- whatever a row holds

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
def test_any_row_gives_whole_conversations_or_a_reason(
    name: str, row: dict[str, Any], size: tuple[int, int] | None
) -> None:
    try:
        found = list(READERS[name](row, size))
    except BadRowError as error:
        assert str(error)
        return
    assert found or name == "pixmo-cap"
    for one in found:
        if isinstance(one, Unusable):
            assert one.reason
            continue
        assert [m.role for m in one.messages] == ["user", "assistant"] * (len(one.messages) // 2)
        assert one.messages[0].content.startswith("<image>")
        assert all(m.content.removeprefix("<image>").strip() for m in one.messages)
        assert len({other.suffix for other in found if isinstance(other, Conversation)}) == sum(
            isinstance(other, Conversation) for other in found
        )
