"""Evaluate a trained model: it names colours that it sees, and fails when the images are exchanged.

python -m train.evaluate --run default --features cache
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cache.errors import NotFoundError
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import MediaRef, Sample, read_samples, write_samples
from configs import UserError
from tests.support import trained_runs
from train import run
from train.data.join import join
from train.evaluate import __main__ as evaluate
from train.evaluate.evaluation import evaluate as evaluation
from train.evaluate.options import Options
from train.evaluate.result import Evaluation, read
from train.evaluate.scoring import Answer
from train.metrics import read_metrics
from train.report import __main__ as report_command
from train.stage.card import CARD

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CacheRoot]:
    """Train a model to name colours; return its run folder and its cache."""
    folder = tmp_path_factory.mktemp("evaluated")
    root = trained_runs.make(folder)
    words = [
        *(*trained_runs.BASE, "--held-out", "0.25", "--max-steps", "120"),
        *("--features", str(root.path), "--run", str(folder / "run")),
    ]
    assert run.main(words) == 0
    return folder / "run", root


@pytest.fixture(scope="module")
def result(trained: tuple[Path, CacheRoot]) -> Evaluation:
    """Evaluate that model on the held-out samples."""
    folder, root = trained
    return evaluation(Options(run=str(folder), features=root.path, max_new_tokens=16))


def test_right_answers_need_the_image(result: Evaluation) -> None:
    tasks = {task.name: task for task in result.tasks}
    assert list(tasks) == ["colour", "caption"]  # captions last
    assert tasks["colour"].questions == tasks["caption"].questions == result.samples // 2
    (score,) = tasks["colour"].scores
    assert score.value == 1.0
    assert score.blind is not None and score.blind < 0.6
    assert score.gain == pytest.approx(1.0 - score.blind)
    assert result.mean is not None and result.mean.value == score.value  # captions do not count
    assert result.mean.blind == score.blind
    assert result.blind_loss is not None and result.blind_loss > result.loss + 0.5


def test_blind_answers_describe_the_exchanged_image(
    result: Evaluation, trained: tuple[Path, CacheRoot]
) -> None:
    """Each blind answer is the colour of the image shown instead, which is always another image."""
    _, root = trained
    reader = FeatureReader(root.space(result.space))
    seen = join(root, reader, {"colors": None}, split="val", held_out=0.25, min_coverage=1.0)
    other = seen.blind(0)
    assert not (seen.rows == other.rows).any()
    assert sorted(seen.rows) == sorted(other.rows)
    colors = list(trained_runs.COLORS)
    names = [seen.name_of(i) for i in range(seen.size)]
    color_of_row = {
        int(seen.rows[m]): colors[int(names[i].split("/")[1].split("-")[0]) % len(colors)]
        for i in range(seen.size)
        for m in seen.media_of(i)
    }
    said = {a.sample: a.blind for a in result.answers if a.task == "colour"}
    for i, name in enumerate(names):
        if name in said:
            assert said[name] == color_of_row[int(other.rows[other.media_of(i)[0]])]


def test_the_cache_is_that_of_the_run(
    trained: tuple[Path, CacheRoot],
    result: Evaluation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run was given a relative path, and is evaluated from another folder."""
    _, root = trained
    monkeypatch.chdir(root.path.parent)
    words = [*trained_runs.BASE, "--max-steps", "2", "--save-every", "1", "--features"]
    copy = tmp_path / "run"
    assert run.main([*words, "cache", "--run", str(copy)]) == 0
    monkeypatch.chdir(tmp_path)
    asked = Options(run=str(copy), max_new_tokens=2, blind=False, limit=4)
    assert evaluation(asked).space == result.space
    report = tmp_path / "report.html"
    assert report_command.main(["--run", str(copy), "--output", str(report), "--images", "1"]) == 0
    assert report.stat().st_size > 10_000

    shutil.copytree(root.path, tmp_path / "moved")
    config = copy / "stage1" / "config.yaml"
    config.write_text(config.read_text().replace(str(root.path), "/gone"))
    with pytest.raises(
        UserError, match=r"in /gone, where there are none any more; .*--features DIR"
    ):
        evaluation(asked)
    with pytest.raises(UserError, match=r"in /gone, where .*--features DIR"):
        report_command.main(["--run", str(copy)])
    assert evaluation(replace(asked, features=str(tmp_path / "moved"))).space == result.space
    # A run that is resumed with the new place remembers it.
    shutil.rmtree(copy / "stage1" / "final")
    assert run.main([*words, str(tmp_path / "moved"), "--run", str(copy), "--resume"]) == 0
    assert evaluation(asked).space == result.space


def test_the_splits_have_no_image_in_common(
    result: Evaluation, trained: tuple[Path, CacheRoot]
) -> None:
    folder, root = trained
    asked = Options(run=str(folder), features=root.path, blind=False, max_new_tokens=16)
    seen, tested = (evaluation(replace(asked, split=side)) for side in ("train", "test"))
    media = [{m for a in r.answers for m in a.media} for r in (result, seen, tested)]
    assert sum(map(len, media)) == len(set().union(*media)) == 60 and all(media)
    assert seen.blind_loss is None and seen.tasks[0].scores[0].blind is None
    assert (folder / "stage1" / "evaluation-test.json").exists()


def test_the_loss_equals_the_held_out_loss_of_training(
    result: Evaluation, trained: tuple[Path, CacheRoot]
) -> None:
    lines = read_metrics(trained[0] / "stage1")
    last = next(line for line in reversed(lines) if "held_out_loss" in line)
    assert last["held_out_samples"] == result.samples
    assert result.loss == pytest.approx(last["held_out_loss"], rel=1e-4)


def test_command_prints_a_table_or_json(
    trained: tuple[Path, CacheRoot], result: Evaluation, capsys: Any
) -> None:
    folder, root = trained
    words = ["--run", str(folder), "--features", str(root.path), "--max-new-tokens", "16"]
    capsys.readouterr()
    assert evaluate.main(words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"{folder} stage 1 step 120, val split")
    pattern = r"colour +\d+  exact match +1\.00 ± 0\.\d\d  0\.\d\d ± 0\.\d\d  0\.\d\d ± 0\.\d\d$"
    assert re.match(pattern, shown[2])
    assert shown[3].startswith("caption (not in the mean)")
    assert shown[-2].startswith("mean ") and shown[-1].startswith("loss")
    assert evaluate.main([*words, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert result.mean is not None
    assert values["mean"]["value"] == result.mean.value and "answers" not in values
    saved = read(folder / "stage1" / "evaluation-val.json")
    assert saved == result  # equal answers again, also through the file


def test_conversations_and_texts_without_media_are_asked(
    trained: tuple[Path, CacheRoot], tmp_path: Path
) -> None:
    """The model is asked for a sample's last answer; the earlier turns are in the prompt."""
    folder, root = trained
    media = next(read_samples(root, "colors")).media
    chat = trained_runs.turns("Which colour?", "red", "Sure?", "yes")
    samples = [
        Sample(id="chat", dataset="talk", messages=chat, media=media, task="chat"),
        Sample(id="text", dataset="talk", messages=chat[:2]),
        Sample(id="image only", dataset="talk", messages=chat[:1], media=media),
    ]
    # A text-only sample is split by its id, an image by its key, so both splits are evaluated.
    write_samples(root, "talk", samples)
    answers: dict[str, Answer] = {}
    for split in ("train", "val"):
        try:
            options = Options(
                run=str(folder),
                features=root.path,
                datasets="talk",
                split=split,  # type: ignore[arg-type]  # one of the two
                blind=False,
                max_new_tokens=4,
            )
            answers |= {a.sample: a for a in evaluation(options).answers}
        except UserError as empty:
            assert "split" in str(empty)
    assert sorted(answers) == ["talk/chat", "talk/text"]  # the third has no answer to compare with
    assert (answers["talk/chat"].question, answers["talk/chat"].expected) == ("Sure?", "yes")
    assert answers["talk/text"].task == "talk"  # without a task, the name of the data set
    assert MediaRef(source=answers["talk/chat"].media[0]) == media[0]


def test_scores_are_in_the_card_by_data_set_and_split(
    trained: tuple[Path, CacheRoot], tmp_path: Path
) -> None:
    folder = shutil.copytree(trained[0], tmp_path / "run")
    card = folder / "stage1" / CARD
    asked = Options(
        run=str(folder), features=trained[1].path, max_new_tokens=8, metric="caption=none"
    )
    before = json.loads(card.read_text())["stages"][-1].get("scores", [])
    result = evaluation(replace(asked, split="test"))
    evaluation(replace(asked, split="test"))  # replaces its own rows
    rows = json.loads(card.read_text())["stages"][-1]["scores"]
    assert [r for r in rows if r["split"] != "test"] == [r for r in before if r["split"] != "test"]
    (row,) = (r for r in rows if r["split"] == "test")
    (score,) = result.tasks[0].scores
    assert row["interval"] == list(score.interval or ())
    named = ("data_set", "type", "metric", "n", "value", "blind", "gain")
    assert [row[name] for name in named] == [
        *("colors", "colour", "exact match", result.tasks[0].questions),
        *(score.value, score.blind, score.gain),
    ]
    assert str(trained[1].path) not in card.read_text()

    card.unlink()  # a model that was copied without its card
    evaluation(asked)
    (stage,) = json.loads(card.read_text())["stages"]
    assert stage["incomplete"] and [r["split"] for r in stage["scores"]] == ["val"]
    card.write_text("{")
    evaluation(replace(asked, blind=False))
    assert card.read_text() == "{", "a damaged card is left alone, and the evaluation is saved"
    assert read(folder / "stage1" / "evaluation-val.json").blind_loss is None


def test_a_metric_can_be_chosen(trained: tuple[Path, CacheRoot]) -> None:
    folder, root = trained
    asked = Options(
        run=str(folder), features=root.path, max_new_tokens=8, blind=False, split="test"
    )
    result = evaluation(replace(asked, metric="colour=anls"))
    assert [(t.name, t.metric) for t in result.tasks] == [("colour", "anls"), ("caption", "exact")]
    with pytest.raises(
        UserError, match=r"--metric color: no such question type .*colors, .*colour"
    ):
        evaluation(replace(asked, metric="color=anls"))
    with pytest.raises(UserError, match="none of exact, vqa"):
        evaluate.main(["--metric", "colour=bleu"])
    with pytest.raises(UserError, match=r"point_distance 2\.0"):
        evaluate.main(["--point-distance", "2"])


def test_errors_name_what_is_missing(trained: tuple[Path, CacheRoot], tmp_path: Path) -> None:
    folder, _ = trained
    with pytest.raises(UserError, match="no run nothing"):
        evaluate.main(["--run", "nothing"])
    with pytest.raises(UserError, match=r"stage 2 is not finished"):
        evaluate.main(["--run", str(folder), "--stage", "2"])
    other = trained_runs.make(tmp_path, 8, codec="int8")
    with pytest.raises(NotFoundError, match=r"no space 'toy-fp16-\w+' under"):
        evaluate.main(["--run", str(folder), "--features", str(other.path)])
    with pytest.raises(UserError, match=r"python -m train\.evaluate --run"):
        read(tmp_path / "run" / "stage1" / "evaluation-val.json")
