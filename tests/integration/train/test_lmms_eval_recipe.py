"""The recipe docs/recipes/lmms_eval.md: its task has the questions asked, its comparison finds errors.

python docs/recipes/lmms_eval_task/make_task.py RUN test OUT

lmms-eval itself is not installed here; the page says what it answered.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from PIL import Image

from cache.store.samples import MediaRef, Sample, read_samples, write_samples
from tests.support import ROOT, trained_runs
from tests.support.trained_runs import turns
from train import run
from train.evaluate.evaluation import evaluate
from train.evaluate.options import Options as EvaluateOptions
from train.evaluate.result import Evaluation

pytestmark = pytest.mark.slow

RECIPE = ROOT / "docs" / "recipes" / "lmms_eval_task"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluation]:
    """A run, and the evaluation of its test split: images, videos, several turns and several images."""
    folder = tmp_path_factory.mktemp("recipe")
    root = trained_runs.make(folder, 40)
    trained_runs.film(folder, 20)
    colors = list(read_samples(root, "colors"))
    media = [sample.media[0] for sample in colors]
    more = [
        Sample(id=f"{n}-{kind}", dataset="more", messages=talk, media=shown, task="more")
        for n in range(40)
        for kind, talk, shown in (
            (
                "pair",
                turns("<image>or <video>? ", "the first"),
                (media[2 * n], media[(2 * n + 2) % 80]),
            ),
            ("chat", turns("Which?", "red", "Sure?", "yes"), (media[2 * n],)),
            ("mark", turns("<image>What is <image>?", "a mark"), (media[2 * n],)),
        )
    ]
    assert all(isinstance(one, MediaRef) for one in media)
    write_samples(root, "more", more)
    words = [*trained_runs.BASE, "--held-out", "0.25", "--max-steps", "30"]
    assert run.main([*words, "--features", str(root.path), "--run", str(folder / "run")]) == 0
    asked = EvaluateOptions(run=str(folder / "run"), split="test", max_new_tokens=8, blind=False)
    return folder / "run", evaluate(asked)


def load(path: Path) -> ModuleType:
    """Import a file of the recipe, as lmms-eval imports the functions of a task."""
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def make_task(folder: Path, out: Path) -> ModuleType:
    """Write the task of a run; return its functions."""
    load(RECIPE / "make_task.py").main(str(folder), "test", out)
    return load(out / "utils.py")


def test_the_task_has_every_question_that_can_be_asked(
    evaluated: tuple[Path, Evaluation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, result = evaluated
    words = [str(RECIPE / "make_task.py"), str(folder), "test", str(tmp_path / "task")]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")
    said = capsys.readouterr().out
    text = (tmp_path / "task" / "nanomolmo2.yaml").read_text()
    settings = yaml.safe_load(text.replace("!function ", ""))
    questions = Path(settings["dataset_kwargs"]["data_files"]["test"])
    docs = [json.loads(line) for line in questions.read_text().splitlines()]
    by_name = {answer.sample: answer for answer in result.answers}
    possible = [name for name in by_name if name.startswith(("colors/", "more/"))]
    assert [doc["id"] for doc in docs] == possible and len(possible) < len(by_name)
    assert f"{len(docs)} questions, {len(by_name) - len(docs)} left out" in said

    task = load(tmp_path / "task" / "utils.py")
    for doc in docs:
        answer = by_name[doc["id"]]
        shown = task.images(doc)
        parts = [part for turn in task.messages(doc) for part in turn["content"]]
        assert [one["url"] for one in parts if one["type"] == "image"] == shown
        for image, source in zip(shown, answer.media, strict=True):
            with Image.open(source) as original:
                assert image.mode == "RGB"
                assert np.array_equal(np.asarray(image), np.asarray(original.convert("RGB")))
        assert answer.question.removeprefix("<image>").split("<video>")[0] in task.prompt(doc)
        assert task.target(doc) == answer.expected
        assert task.score(doc, [answer.given]) == {"exact_match": answer.scores[0]}
        assert task.score(doc, [f" {answer.expected.upper()}."]) == {"exact_match": 1.0}


def test_turns_and_images_are_in_their_places(
    evaluated: tuple[Path, Evaluation], tmp_path: Path
) -> None:
    task = make_task(evaluated[0], tmp_path / "task")
    docs = map(json.loads, (tmp_path / "task" / "questions.jsonl").read_text().splitlines())
    shown = {}
    for doc in docs:
        kind = doc["id"].split("-")[1]
        shown[kind] = [
            (turn["role"], [part.get("text", "an image") for part in turn["content"]])
            for turn in task.messages(doc)
        ]
    assert shown == {
        "colour": [("user", ["an image", "Which colour?"])],
        "caption": [("user", ["an image", "Describe."])],
        "pair": [("user", ["an image", "or ", "an image", "? "])],
        "chat": [
            ("user", ["an image", "Which?"]),
            ("assistant", ["red"]),
            ("user", ["Sure?"]),
        ],
        "mark": [("user", ["an image", "What is <image>?"])],  # the second one is text
    }


def test_an_empty_answer_is_an_error(
    evaluated: tuple[Path, Evaluation], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, result = evaluated
    task, logs = tmp_path / "task", tmp_path / "logs"
    make_task(folder, task)
    logs.mkdir()
    compare = load(RECIPE / "compare.py")
    assert compare.main(str(folder), "test", task, logs) == 1, "nothing is logged"
    lines = map(json.loads, (task / "questions.jsonl").read_text().splitlines())
    given = {answer.sample: answer.given for answer in result.answers}
    answers = [given[line["id"]] for line in lines]
    total = len(answers)

    def compared(answers: list[str]) -> tuple[int, str]:
        (logs / "exported").mkdir(exist_ok=True)
        log = logs / "exported" / "20261126_124518_samples_nanomolmo2.jsonl"
        logged = [{"doc_id": n, "filtered_resps": text} for n, text in enumerate(answers)]
        log.write_text("".join(json.dumps(one) + "\n" for one in reversed(logged)))
        capsys.readouterr()
        return compare.main(str(folder), "test", task, logs), capsys.readouterr().out

    code, text = compared(answers)
    assert code == 0 and f"{total} of {total} answers equal, 0 missing or empty" in text
    spoken = next(n for n, answer in enumerate(answers) if answer)
    code, text = compared([*answers[:spoken], "", *answers[spoken + 1 :]])
    assert code == 1 and f"{total - 1} of {total} answers equal, 1 missing or empty" in text
    code, text = compared([*answers[:spoken], answers[spoken] + "x", *answers[spoken + 1 :]])
    assert code == 1 and f"{total - 1} of {total} answers equal, 0 missing or empty" in text
    code, text = compared(answers[:spoken])
    assert code == 1 and "missing" in text
