"""What of the proof needs no downloads: figures, files, and steps that ask tiny random models."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs import UserError
from model.inference import answer, generation_mode
from model.vision.config import encoder_config
from model.vision.encoder import VisionEncoder, load_encoder
from model.vlm import build_vlm
from tests.proof import outside, packages, prepare, scores, training
from tests.proof.__main__ import merged, recipe
from tests.proof.drawings import VARIANTS, read_concepts, svg, variant
from tests.proof.packages import PACKAGES, Package
from tests.proof.work import Line, Work, command_words, metrics
from tests.support.trained_runs import answering, drawings

ICONS = {
    "width": 10,
    "height": 20,
    "icons": {"red-apple": {"body": "<path/>"}, "dog": {"body": "<g/>", "height": 10}},
    "aliases": {"apple": {"parent": "red-apple"}},
}


def emoji(code: str, name: str, kind: str, category: str = "Objects", order: int = 0) -> dict:
    return {
        "unified": code,
        "short_name": name,
        "short_names": [name],
        "name": name.upper(),
        "category": category,
        "subcategory": kind,
        "sort_order": order,
    }


def test_a_concept_has_the_drawing_of_each_artist_by_code_or_by_name() -> None:
    listed = [
        emoji("1F436", "dog", "animal-mammal", order=2),
        emoji("1F34E-FE0F", "apple", "food-fruit", order=1),
        emoji("1F600", "grinning", "face-smiling", "Smileys & Emotion"),
    ]
    packages = {
        "twemoji": {"icons": ICONS, "chars": {"1f436": "dog", "1f34e": "apple", "1f600": "grin"}},
        "by-name": {"icons": {"icons": {"red-apple": {}, "Apple_": {}}}, "chars": {}},
    }
    apple, dog = read_concepts(listed, packages)
    assert (apple.name, apple.kind, apple.code) == ("apple", "food fruit", "1f34e")
    assert apple.icons == {"twemoji": "apple", "by-name": "Apple_"}
    assert dog.icons == {"twemoji": "dog"}


def test_an_icon_becomes_a_square_document_with_the_drawing_in_the_middle() -> None:
    assert 'viewBox="-5.0 0.0 20 20"' in svg(ICONS, "apple")
    assert 'viewBox="0.0 0.0 10 10"' in svg(ICONS, "dog")


def test_variants_are_all_different_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    drawn = [variant(Image.fromarray(pixels), i).tobytes() for i in range(len(VARIANTS))]
    assert len(set(drawn)) == len(VARIANTS)
    assert drawn[0] == pixels.tobytes()


def test_the_nearest_drawing_is_found_whatever_all_drawings_share() -> None:
    rng = np.random.default_rng(0)
    train = rng.normal(size=(20, 4, 8)).astype(np.float32) + 100
    test = train[::-1] + rng.normal(size=train.shape).astype(np.float32) * 0.1
    assert scores.nearest(train, test).tolist() == list(range(19, -1, -1))


def test_a_fitted_map_finds_a_linear_one() -> None:
    rng = np.random.default_rng(0)
    given = rng.normal(size=(500, 8)).astype(np.float32)
    wanted = (given @ rng.normal(size=(8, 3)) + 5).astype(np.float32)
    weight, bias = scores.least_squares(given, wanted)
    assert np.abs(given @ weight + bias - wanted).max() < 0.2


def test_a_classifier_finds_classes_that_least_squares_mixes_up() -> None:
    """Features of a class are spread along what tells nothing, as those of artists are."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 40, 2000)
    told = rng.normal(size=(40, 24))[labels]
    noise = rng.normal(size=(2000, 24)) * 2
    given = (np.concatenate([told, noise], axis=1) @ rng.normal(size=(48, 48))).astype(np.float32)
    places = (rng.normal(size=(40, 16)) + 7).astype(np.float32)

    def right(weight: np.ndarray, bias: np.ndarray) -> float:
        centre = places.mean(0)
        found = (given @ weight + bias - centre) @ scores.unit(places - centre).T
        return float(np.mean(found.argmax(1) == labels))

    weight, bias = scores.classifier(given, labels.tolist(), places, steps=100)
    assert right(weight, bias) > 0.95 > right(*scores.least_squares(given, places[labels]))
    mapped, wanted = given @ weight + bias, places[labels]
    assert np.allclose(mapped.mean(0), wanted.mean(0), atol=1e-2)
    spreads = [np.linalg.norm(one - one.mean(0)) for one in (mapped, wanted)]
    assert math.isclose(*spreads, rel_tol=1e-3)
    again = scores.classifier(given, labels.tolist(), places, steps=100)
    assert np.array_equal(weight, again[0]) and np.array_equal(bias, again[1])


def test_one_answer_to_a_question_is_right_as_often_as_it_is_expected() -> None:
    name, kind = training.TASKS
    records = [prepare.talk(name, one) for one in ("dog", "cat", "cow", "bee")]
    records += [prepare.talk(kind, one) for one in ("animal", "animal", "bug", "animal")]
    told = {name: "Bee.", kind: "animal"}
    assert training.shares(records, told) == {training.CONCEPT: 0.25, training.KIND_TASK: 0.75}


def test_paired_differences_are_those_of_drawings() -> None:
    seed = {f"{i} concept": True for i in range(100)}
    fp16 = [seed | {f"{i} subcategory": i % 2 == 0 for i in range(100)}]
    mean, half = scores.paired(fp16, fp16)
    assert (mean, half) == (0, 0)
    worse = [fp16[0] | {f"{i} concept": False for i in range(20)}]
    mean, half = scores.paired(worse, fp16)
    assert math.isclose(mean, -0.1)
    assert 0.02 < half < 0.06
    with pytest.raises(AssertionError, match="other questions"):
        scores.paired([{"a concept": True}], [{"b concept": True}])


def test_scores_count_what_they_say() -> None:
    assert scores.is_equal("red apple", " Red apple.\n")
    assert not scores.is_equal("red apple", "apple")
    assert scores.base_rate(["a", "b", "a", "c"]) == 0.5
    assert scores.flops_bound(3.0, 1.0) == 4.0
    assert math.isclose(scores.perplexity([math.log(4)] * 3), 4)
    told = [{"task": "a", "correct": True}, {"task": "a", "correct": False}]
    assert scores.by_task(told) == {"a": 0.5}


def test_a_package_of_another_size_or_content_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Package(
        registry="npm",
        name="x",
        version="1",
        file="x-1.tgz",
        size=3,
        sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        licence="MIT",
        gives="nothing",
        credit="nobody",
    )
    path = tmp_path / package.file
    path.write_bytes(b"abc")
    assert packages.fetch(package, tmp_path) == path  # without a download
    path.write_bytes(b"abd")

    def npm(words: list[str], **_: object) -> object:
        path.write_bytes(b"abd")
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("subprocess.run", npm)
    with pytest.raises(UserError, match="is not the file of 3 bytes"):
        packages.fetch(package, tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="npm is not installed"):
        packages.fetch(package, tmp_path)


def test_every_package_is_pinned_and_has_a_licence() -> None:
    for package in PACKAGES.values():
        assert len(package.sha256) == 64
        assert package.size > 0
        assert package.licence
        assert package.version in package.file


def test_a_step_runs_once_and_another_recipe_is_refused(tmp_path: Path) -> None:
    calls: list[int] = []
    for _ in range(2):
        found = Work(tmp_path, {"a": 1}).step("one", lambda: calls.append(1) or {"x": 2})
        assert found["x"] == 2
    assert calls == [1]
    with pytest.raises(UserError, match="another recipe"):
        Work(tmp_path, {"a": 2})


def test_a_second_call_at_the_same_time_is_refused(tmp_path: Path) -> None:
    work = Work(tmp_path, {})
    with work.alone(), pytest.raises(UserError, match="another call is at work here; wait"):
        work.alone().__enter__()
    with work.alone():
        pass


def test_a_command_that_fails_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = Work(tmp_path, {})
    with pytest.raises(UserError, match=r"exit code 2: python -m cache\.ls --features \S+nothing;"):
        work.run("cache.ls", {"features": tmp_path / "nothing"})
    assert "error:" in capsys.readouterr().out  # the command's own message, passed on
    done = work.run("cache.ls", {"features": tmp_path / "nothing"}, codes=(2,))
    assert done.code == 2
    assert done.found(r"(no cache)") == "no cache"


def test_steps_are_read_while_a_training_runs(tmp_path: Path) -> None:
    assert metrics(tmp_path) == []
    lines = ['{"step": 1, "loss": 3.0}', '{"held_out": 1}', '{"step": 2, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert metrics(tmp_path) == [{"step": 1, "loss": 3.0}]


def test_options_of_commands() -> None:
    flags = {"max_steps": 5, "blind": False, "dataset": ("a", "b"), "space": None}
    assert command_words("train.run", flags)[3:] == [
        *("--max-steps", "5", "--no-blind"),
        *("--dataset", "a", "b"),
    ]


def test_a_line_without_a_requirement_has_no_verdict() -> None:
    assert Line("a", "1", "", False).verdict == ""
    assert [Line("a", "1", "2", ok).verdict for ok in (True, False)] == ["ok", "short"]


def test_quick_is_the_whole_with_other_sizes() -> None:
    whole, quick = recipe(False), recipe(True)
    assert quick.keys() == whole.keys()
    assert quick["stages"].keys() == whole["stages"].keys()
    assert quick["stages"][1].keys() == whole["stages"][1].keys()
    assert quick["concepts"] < whole["concepts"]
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


def test_held_out_chapters_are_in_no_passage(tmp_path: Path) -> None:
    chapters = [f"chapter{i} " * 600 for i in range(24)]
    addresses = [f"address{i}" for i in range(233)]
    prepare.write_text(tmp_path, [], chapters, addresses, passages=20, weight=0.5)
    learned = (tmp_path / "english.json").read_text()
    texts = json.loads((tmp_path / "texts.json").read_text())
    held_out = set(" ".join(texts["chapters"]).split())
    assert held_out == {"chapter7", "chapter15", "chapter23"}
    assert texts["addresses"] == addresses[: 16 * 14 : 14] and "address" not in learned
    assert not held_out & set(learned.replace('"', " ").split())
    records = json.loads(learned)
    assert len(records) == 20 and {record["weight"] for record in records} == {0.5}
    # As long as the windows in which English is measured, at about 1.3 tokens a word.
    shortest = min(len(record["conversations"][1]["value"].split()) for record in records)
    assert 1.3 * shortest > 0.9 * training.WINDOW


def test_texts_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["chapter_10.txt", "chapter_2.txt", "1790_somebody.txt", "1790_somebody.json"]
    path = tmp_path / "texts.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            data = f"of\n{name}\n\nend".encode()
            member = tarfile.TarInfo(f"package/data/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert packages.texts(path) == [f"of {names[i]}\n\nend" for i in (1, 0, 2)]


# ---- with tiny random models


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    return load_encoder(encoder_config("demo"), device="cpu")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """Make a proof's folder, with texts and a language model."""
    folder = tmp_path_factory.mktemp("proof")
    work = Work(folder, {"perplexity_tokens": 1300})
    (folder / "data").mkdir()
    words = [f"word{i}" for i in range(2000)]
    texts = {"chapters": [" ".join(words)], "addresses": [" ".join(words[i:]) for i in (1, 2)]}
    (folder / "data/texts.json").write_text(json.dumps(texts))
    vlm, tokenizer = build_vlm(8, "random:qwen3-tiny", "linear", seed=1)
    vlm.language.save_pretrained(folder / "models/language")
    tokenizer.save_pretrained(folder / "models/language")
    return work


@pytest.fixture(scope="module")
def drawn(work: Work, encoder: VisionEncoder) -> dict[str, torch.Tensor]:
    """Give the proof a main run whose answers to three drawings differ; return their features."""
    found = drawings(work.folder, encoder)
    answering(work.folder / training.MAIN / "stage2/final", encoder, "fp16", found, stage=2)
    return found


@pytest.mark.slow
def test_live_answers_are_about_each_questions_own_drawing(
    work: Work, drawn: dict[str, torch.Tensor]
) -> None:
    asked = [(colour, text) for text in ("What is this?", "Which?") for colour in reversed(drawn)]

    def question(colour: str, text: str) -> Any:
        media = (SimpleNamespace(source=str(work.folder / f"{colour}.png")),)
        prompt = [("user", f"<image>\n{text}", 1.0)]
        return SimpleNamespace(sample=SimpleNamespace(media=media), prompt=prompt)

    told = outside.live_answers(work, [question(*one) for one in asked])
    vlm, tokenizer, _ = training.load_final(work.folder / training.MAIN / "stage2/final")
    for (colour, text), one in zip(asked, told, strict=True):
        prompt = ([("user", f"<image>\n{text}", 1.0)], [drawn[colour]])
        assert answer(vlm, tokenizer, [prompt], max_new_tokens=training.LONGEST) == [one]
    assert len(set(told)) > 3, "the answers tell nothing about the order"


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("kind", ["chapters", "addresses"])
def test_perplexity_is_that_of_windows_on_their_own(work: Work, kind: str) -> None:
    texts = json.loads((work.folder / "data/texts.json").read_text())[kind]
    vlm, tokenizer, _ = training.load_final(work.folder / training.MAIN / "stage2/final")
    losses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : 1300 // len(texts)]
        for at in range(0, ids.shape[1], training.WINDOW):
            window = ids[:, at : at + training.WINDOW]
            with torch.inference_mode(), generation_mode(vlm):
                logits = vlm.language(input_ids=window).logits[0].double().log_softmax(1)
            losses += [-logits[i, one].item() for i, one in enumerate(window[0, 1:].tolist())]
    found = training.english_perplexity(work, training.MAIN, 2, kind)
    assert found == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    before = training.english_perplexity(work, None, 0, kind)
    assert before != pytest.approx(found, rel=1e-2), "of another model"
