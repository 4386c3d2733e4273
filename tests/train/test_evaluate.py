"""Scores against arithmetic by hand, and a model that looks against the same model looking elsewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cache.errors import NotFoundError
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import MediaRef, Message, Sample, read_samples, write_samples
from configs import UserError
from tests.support import trained_runs
from train import run
from train.data.join import join
from train.evaluate import __main__ as evaluate
from train.evaluate import scoring
from train.evaluate.__main__ import Evaluation, Options
from train.evaluate.scoring import Answer, is_right, pointed_cells
from train.metrics import read_metrics


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CacheRoot]:
    """A run that has learned to name colours, and its cache."""
    folder = tmp_path_factory.mktemp("evaluated")
    root = trained_runs.make(folder)
    words = [
        *(
            "--llm",
            "random:qwen3-tiny",
            "--hardware",
            "cpu",
            "--device",
            "cpu",
            "--batch-size",
            "8",
        ),
        *("--learning-rate", "3e-3", "--held-out", "0.25", "--max-steps", "120"),
        *("--features", str(root.path), "--run", str(folder / "run"), "--log-every", "1000"),
    ]
    assert run.main(words) == 0
    return folder / "run", root


@pytest.fixture(scope="module")
def result(trained: tuple[Path, CacheRoot]) -> Evaluation:
    """Its evaluation on what is held out."""
    folder, root = trained
    return evaluate.evaluate(Options(run=str(folder), features=root.path, max_new_tokens=16))


def test_it_sees_and_blind_does_not(result: Evaluation) -> None:
    tasks = {task.name: task for task in result.tasks}
    assert list(tasks) == ["colour", "caption"]  # captions last
    assert tasks["colour"].questions == tasks["caption"].questions == result.samples // 2
    assert tasks["colour"].exact == 1.0
    assert tasks["colour"].blind is not None and tasks["colour"].blind < 0.6
    assert result.mean == tasks["colour"].exact  # captions stand apart
    assert result.blind_mean == tasks["colour"].blind
    assert result.blind_loss is not None and result.blind_loss > result.loss + 0.5


def test_blind_answers_are_about_the_other_image(
    result: Evaluation, trained: tuple[Path, CacheRoot]
) -> None:
    """What is said blindly is the colour of the image in its place, which is never the same one."""
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


def test_only_held_out_images_are_asked_about(
    result: Evaluation, trained: tuple[Path, CacheRoot]
) -> None:
    folder, root = trained
    seen = evaluate.evaluate(
        Options(run=str(folder), features=root.path, split="train", blind=False, max_new_tokens=16)
    )
    held_out, learned = ({m for a in r.answers for m in a.media} for r in (result, seen))
    assert not held_out & learned
    assert len(held_out | learned) == 60
    assert seen.blind_loss is None and seen.tasks[0].blind is None


def test_loss_is_the_trainers_own(result: Evaluation, trained: tuple[Path, CacheRoot]) -> None:
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
    assert re.match(r"colour +\d+ +1\.000 +0\.\d{3}$", shown[2])
    assert shown[-2].startswith("mean without captions") and shown[-1].startswith("loss")
    assert evaluate.main([*words, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["mean"] == result.mean and "answers" not in values
    saved = evaluate.read(folder / "stage1" / "evaluation-val.json")
    assert saved == result  # the same model gives the same answers, and they survive the file


def test_conversations_and_text_are_asked_too(
    trained: tuple[Path, CacheRoot], tmp_path: Path
) -> None:
    """A sample's last answer is asked for, with the turns before it as they stand."""
    folder, root = trained
    media = next(read_samples(root, "colors")).media
    turns = [
        ("user", "Which colour?"),
        ("assistant", "red"),
        ("user", "Sure?"),
        ("assistant", "yes"),
    ]
    chat = tuple(Message(role=role, content=content) for role, content in turns)
    samples = [
        Sample(id="chat", dataset="talk", messages=chat, media=media, task="chat"),
        Sample(id="text", dataset="talk", messages=chat[:2]),
        Sample(id="image only", dataset="talk", messages=chat[:1], media=media),
    ]
    # The text-only sample is on the side its id decides, images on theirs: both sides are asked.
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
            answers |= {a.sample: a for a in evaluate.evaluate(options).answers}
        except UserError as empty:
            assert "split" in str(empty)
    assert sorted(answers) == ["talk/chat", "talk/text"]  # nothing to compare with in the third
    assert (answers["talk/chat"].question, answers["talk/chat"].expected) == ("Sure?", "yes")
    assert answers["talk/text"].task == "talk"  # no type: its data set's name
    assert MediaRef(source=answers["talk/chat"].media[0]) == media[0]


@pytest.mark.parametrize(
    ("expected", "given", "right"),
    [
        ("red", "Red.", True),
        ("red", "  red ", True),
        ("top left", "top left .", True),
        ("red", "red green", False),
        ("red", "", False),
        ("two", "2", False),
        ("Straße", "STRASSE", True),
    ],
)
def test_exact_match_is_of_normalised_text(expected: str, given: str, right: bool) -> None:
    assert is_right("colour", expected, given, 3) is right


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ('<points coords="1 1 340 660">red ring</points>', True),  # another place in the same cell
        ('<points coords="1 1 334 666">ring', True),
        ('<points coords="1 1 333 660">red ring</points>', False),  # one cell to the left
        ('<points coords="2 1 340 660">red ring</points>', False),  # in another image
        ('<points coords="1 1 340 660 2 10 10">red ring</points>', False),  # one point too many
        ('<points coords="1 1 340">red ring</points>', False),
        ("middle", False),
        ("", False),
    ],
)
def test_points_are_right_in_the_right_cell(given: str, right: bool) -> None:
    expected = '<points coords="1 1 500 500">red ring</points>'
    assert is_right("point", expected, given, 3) is right


def test_points_are_a_set_and_reach_the_edge() -> None:
    one = pointed_cells('<points coords="1 1 1000 0 2 0 1000">x</points>', 4)
    other = pointed_cells('<points coords="1 1 10 990 2 990 10">x</points>', 4)
    assert one == other == [(1, 0, 3), (1, 3, 0)]
    assert is_right("point", "top left", "Top left.", 3)  # not written as a point: exact match


def test_mean_is_over_types_not_questions() -> None:
    def one(task: str, correct: bool) -> Answer:
        return Answer(
            sample="d/1",
            task=task,
            media=(),
            question="?",
            expected="x",
            given="x",
            correct=correct,
            blind="y",
            blind_correct=False,
        )

    answers = [*(one("a", True) for _ in range(9)), one("b", False), one("caption", False)]
    tasks = scoring.by_task(answers)
    assert [(t.name, t.questions, t.exact, t.blind) for t in tasks] == [
        ("a", 9, 1.0, 0.0),
        ("b", 1, 0.0, 0.0),
        ("caption", 1, 0.0, 0.0),
    ]
    assert scoring.headline(tasks) == (0.5, 0.0)
    assert scoring.headline(tasks[2:]) == (None, None)


def test_refusals(trained: tuple[Path, CacheRoot], tmp_path: Path) -> None:
    folder, _ = trained
    with pytest.raises(UserError, match="no run nothing"):
        evaluate.main(["--run", "nothing"])
    with pytest.raises(UserError, match=r"stage 2 is not finished"):
        evaluate.main(["--run", str(folder), "--stage", "2"])
    other = trained_runs.make(tmp_path, 8, codec="int8")
    with pytest.raises(NotFoundError, match=r"no space 'toy-fp16-\w+' under"):
        evaluate.main(["--run", str(folder), "--features", str(other.path)])
    with pytest.raises(UserError, match=r"python -m train\.evaluate --run"):
        evaluate.read(tmp_path / "run" / "stage1" / "evaluation-val.json")
