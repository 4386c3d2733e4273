"""What the comparison looks at: images of odd shapes, and each thing that may differ."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.export import compare as comparison
from model.export.compare import (
    Expected,
    MismatchError,
    Question,
    answers_of,
    compare,
    sample_questions,
)
from model.export.folder import write_folder
from model.export.towers import export_tower
from model.io.saved_model import load_final
from model.vision.encoder import load_encoder
from tests.support import tiny_clip

pytestmark = pytest.mark.slow

Case = tuple[Path, list[Question], list[Expected]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A folder, prompts, and what our own model computes for them."""
    place = tmp_path_factory.mktemp("compare")
    eyes = load_encoder(tiny_clip.entry(fit="pad"), device="cpu", random_weights=True)
    tiny_clip.save_trained(place, eyes, "mlp", codec="int8")
    vlm, tokenizer, _ = load_final(place / "stage1/final")
    (place / "out").mkdir()
    write_folder(place / "out", vlm, tokenizer, export_tower(eyes), eyes.spec("int8"))
    questions = sample_questions()
    return place / "out", questions, answers_of(vlm, tokenizer, eyes, "int8", questions)


@pytest.mark.parametrize("installed", [True, False])
def test_images_have_odd_shapes(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not installed:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    questions = sample_questions()
    sizes = {image.size for question in questions for image in question.images}
    assert len(sizes) >= 4 and all(width != height for width, height in sizes)
    assert max(width / height for width, height in sizes) > 4
    assert min(width / height for width, height in sizes) < 1 / 4
    assert {len(question.images) for question in questions} == {0, 1, 2}
    again = sample_questions()
    assert all(
        a.tobytes() == b.tobytes()
        for one, two in zip(questions, again, strict=True)
        for a, b in zip(one.images, two.images, strict=True)
    )


def test_equal_models_are_equal(case: Case) -> None:
    found = compare(*case)
    assert 0 <= found.logits <= 1e-4 and found.levels <= 1.01
    assert found.tokens > 0 and found.prompts == len(case[1])
    assert found.rounded > 1e-4, (
        "int8 changes more than the limit, so features are not rounded here"
    )


def with_first(case: Case, **changes: Any) -> Case:
    """The case with another first expectation."""
    first = dataclasses.replace(case[2][0], **changes)
    return case[0], case[1][:1], [first]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: {"ids": [*e.ids[:-1], 0]}, "prompt 1: its tokens are not those of our own"),
        (lambda e: {"pixels": e.pixels + 0.015}, r"prompt 1: a pixel differs by 0\.015"),
        (lambda e: {"logits": e.logits + 2e-4}, r"prompt 1: a logit differs by 0\.0002"),
        (lambda e: {"logits": e.logits * float("nan")}, "prompt 1: a logit differs by nan"),
        (lambda e: {"answer": [*e.answer[:-1], 5]}, "prompt 1: its greedy answer is "),
    ],
)
def test_each_difference_is_named(
    case: Case, change: Callable[[Expected], dict[str, Any]], message: str
) -> None:
    with pytest.raises(MismatchError, match=message):
        compare(*with_first(case, **change(case[2][0])))


def test_another_size_in_the_processor_is_noticed(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    folder = Path(shutil.copytree(case[0], tmp_path / "out"))
    path = folder / "processor_config.json"
    values = json.loads(path.read_text())
    values["image_processor"]["do_pad"] = False
    path.write_text(json.dumps(values))
    with pytest.raises(MismatchError, match="a pixel differs"):
        compare(folder, *case[1:])


def test_another_class_is_noticed() -> None:
    with pytest.raises(MismatchError, match="transformers loads it as Linear"):
        comparison._check_loaded(torch.nn.Linear(1, 1), {})
