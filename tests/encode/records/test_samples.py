"""Records become samples; several answers to one question are several samples with one choice.

list(to_samples(read_records(value, account), id="a.jpg#0", dataset="photos", resolve=find))
"""

from __future__ import annotations

from typing import Any

import pytest

from cache.store.samples import MediaRef, Sample
from encode.records.account import Account, FaultError
from encode.records.reading import read_records
from encode.records.record import MediaName
from encode.records.samples import to_samples


def find(name: MediaName) -> MediaRef:
    if name.text == "missing":
        raise FaultError("outside")
    kind = "video" if name.text.endswith(".mp4") else "image"
    return MediaRef(source=f"/photos/{name.text}", kind=kind, sha256=name.sha256)


def samples(value: dict[str, Any]) -> list[Sample]:
    records = read_records(value, Account(name="photos"))
    return list(to_samples(records, id="a#0", dataset="photos", resolve=find))


def test_one_answer_is_one_sample() -> None:
    (sample,) = samples({"image": "a.jpg", "question": "What?", "answer": "A cat.", "weight": 0.5})
    assert (sample.id, sample.dataset, sample.choice) == ("a#0", "photos", "")
    assert (sample.weight, sample.task) == (0.5, "question")
    assert sample.media == (MediaRef(source="/photos/a.jpg"),)
    assert [message.content for message in sample.messages] == ["<image>What?", "A cat."]


def test_several_answers_are_samples_with_one_choice() -> None:
    found = samples(
        {"image": "a.jpg", "question": "What?", "answers": ["A cat.", "A pet.", "A cat."]}
    )
    assert [sample.id for sample in found] == ["a#0.a0", "a#0.a1", "a#0.a2"]
    assert {sample.choice for sample in found} == {"a#0"}
    assert [sample.messages[-1].content for sample in found] == ["A cat.", "A pet.", "A cat."]
    assert {sample.messages[0].content for sample in found} == {"<image>What?"}


def test_independent_questions_are_samples_of_their_own() -> None:
    pairs = [{"question": "What?", "answers": ["a", "b"]}, {"question": "Where?", "answer": "c"}]
    found = samples({"image": "a.jpg", "questions": pairs})
    assert [(sample.id, sample.choice) for sample in found] == [
        ("a#0.q0.a0", "a#0.q0"),
        ("a#0.q0.a1", "a#0.q0"),
        ("a#0.q1", ""),
    ]


def test_a_caption_of_a_video_answers_a_question_about_a_video() -> None:
    (sample,) = samples({"file": "a.mp4", "caption": "Describe this image.", "system": "Be brief."})
    assert [(message.role, message.content) for message in sample.messages] == [
        ("system", "Be brief."),
        ("user", "<image>Describe this video."),
        ("assistant", "Describe this image."),
    ]
    (question,) = samples({"file": "a.mp4", "question": "Describe this image.", "answer": "x"})
    assert question.messages[0].content == "<image>Describe this image.", "as it was asked"


def test_a_fault_of_a_medium_passes() -> None:
    with pytest.raises(FaultError, match="outside"):
        samples({"images": ["a.jpg", "missing"], "caption": "x"})
