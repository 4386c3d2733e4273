"""Compare runs: settings that differ, curves, paired scores and cost; a stranger's run gets one line.

python -m train.compare small small-mlp     # tables, and runs/compare.html
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs import UserError
from tests.support import ROOT, trained_runs
from tests.support.html_page import Page, loads_nothing
from train import run
from train.compare import __main__ as compare
from train.compare.differences import MOST_CELLS, between, verdict
from train.compare.runs import find_stages
from train.evaluate import __main__ as evaluate
from train.evaluate.result import Evaluation
from train.evaluate.scoring import Answer, summarize
from train.metrics import METRICS

pytestmark = pytest.mark.slow

HOSTILE = "<b>x</b>\x1b]0;x\x07\u202e\n"
"""A name that would be markup on a page, and acts on a terminal."""


def guide() -> list[list[str]]:
    """Return the commands of the guide: module and words."""
    text = (ROOT / "docs" / "TRAINING_PIPELINE.md").read_text()
    block = re.search(r"## Start small.*?```bash\n(.*?)```", text, re.DOTALL)
    assert block is not None
    lines = block[1].replace("\\\n", " ").splitlines()
    return [shlex.split(line)[2:] for line in lines]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a cache and the runs of the guide, trained by its commands with few steps."""
    place = tmp_path_factory.mktemp("compared")
    trained_runs.make(place, 24)
    smaller = {"1000": "6", "100": "3", "cache": str(place / "cache")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for module, *words in guide():
            words = [smaller.get(word, word) for word in words]
            if module == "train.run":
                assert run.main([*trained_runs.BASE, "--held-out", "0.4", *words]) == 0
            elif module == "train.evaluate":
                evaluate.main([*words, "--device", "cpu", "--max-new-tokens", "4"])
            else:
                assert module == "train.compare"
    return place


@pytest.fixture
def runs(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return runs/ in a copy, below the current folder."""
    shutil.copytree(place / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def changed(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the values of a JSON or YAML file."""
    is_json = path.suffix == ".json"
    values = json.loads(path.read_text()) if is_json else yaml.safe_load(path.read_text())
    values = change(values) or values
    path.write_text(json.dumps(values) if is_json else yaml.safe_dump(values))


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, Page]:
    """Compare; return what is printed, and the page."""
    assert compare.main(words) == 0
    printed = capsys.readouterr().out
    out = Path(re.findall(r"^(\S+): [\d.]+ kB$", printed, re.MULTILINE)[-1])
    return printed, loads_nothing(out.read_text())


def row(printed: str, name: str) -> list[str]:
    """Return the cells of a printed row."""
    (line,) = re.findall(rf"^{re.escape(name)}  +(.*)$", printed, re.MULTILINE)
    return re.split(r" {2,}", line)


# ---- two runs of the guide


def test_the_last_command_of_the_guide_compares_its_runs(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, *words = guide()[-1]
    assert module == "train.compare"
    printed, page = shown(capsys, *words)
    assert (runs / "compare.html").is_file()
    settings = printed.split("\n\n")[0].splitlines()
    assert settings[0] == "settings that differ"
    assert re.split(r" {2,}", settings[1].strip()) == ["small", "small-mlp"]
    assert [line.split() for line in settings[2:]] == [["connector", "linear", "mlp"]]
    assert row(printed, "steps") == ["6 of 6", "6 of 6"]
    assert row(printed, "samples") == ["48", "48"]
    trained = json.loads((runs / "small/stage1/run.json").read_text())["parameters"]
    assert row(printed, "parameters trained")[0] == f"{trained[0]:,}"
    assert row(printed, "parameters")[0] == f"{trained[1]:,}"
    for name in (
        "time of the steps",
        "waiting for data",
        "tokens",
        "tokens/s",
        "peak memory",
        "disk",
    ):
        assert len(row(printed, name)) == 2, name
    held_out = [
        line
        for line in map(json.loads, (runs / "small/stage1" / METRICS).read_text().splitlines())
        if "held_out_loss" in line
    ]
    last = held_out[-1]
    assert row(printed, "held-out loss, last")[0] == f"{last['held_out_loss']:.4f} (step 6)"
    assert "small" in page.text and "Settings that differ" in page.text


def test_the_page_has_a_line_of_each_run_by_step_and_by_samples(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, page = shown(capsys, "small", "small-mlp")
    labels = [tag["aria-label"] for tag in page.all("svg")]
    assert labels == ["Loss by step", "Loss by samples seen"]
    lines = [str(tag["class"]) for tag in page.all("path") if "line" in str(tag.get("class"))]
    assert lines == ["line a", "line a dash", "line b", "line b dash"] * 2
    assert len(page.all("circle")) == 2 * 2 * 2  # two held-out losses of each run, in each chart
    assert not page.scripts


def test_scores_of_equal_answers_differ_by_nothing(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "small", runs / "twin")
    printed, _ = shown(capsys, "small", "twin")
    assert "settings that differ" not in printed
    differences = printed.split("difference from small, same questions")[1].split("\n\n")[0]
    lines = [line for line in differences.splitlines() if "questions)" in line]
    assert printed.count("\nmean of types  ") == 2  # the scores, and their difference
    assert not printed.endswith("\n\n")  # no line about what cannot be compared
    assert lines and all(re.search(r"\+0\.00 ± 0\.\d\d within$", line) for line in lines)


# ---- paired scores


def answer(number: int, score: float, **changes: Any) -> Answer:
    values: dict[str, Any] = {
        "sample": f"d/{number}",
        "task": "colour",
        "media": (f"/{number}.png",),
        "item": str(number),
        "question": "Which?",
        "expected": "red",
        "given": "red",
        "metric": "exact",
        "scores": (score,),
        "correct": score >= 0.5,
    }
    return Answer(**{**values, **changes})


def evaluation(answers: Sequence[Answer], **changes: Any) -> Evaluation:
    tasks, mean = summarize(answers)
    values: dict[str, Any] = {
        "run": "runs/x",
        "stage": 1,
        "step": 6,
        "split": "val",
        "space": "toy",
        "samples": len(answers),
        "loss": 0.5,
        "blind_loss": None,
        "mean": mean,
        "tasks": tasks,
        "answers": tuple(answers),
    }
    return Evaluation(**{**values, **changes})


def test_a_difference_is_beyond_its_interval_only_if_answers_differ_together() -> None:
    """Both runs differ by 0.2. Paired, 20 better answers of 100 are beyond chance, 60 against 40 are not."""
    first = evaluation([answer(i, float(i < 40)) for i in range(100)])
    better = evaluation([answer(i, float(i < 60)) for i in range(100)])
    other = evaluation([answer(i, float(30 <= i < 90)) for i in range(100)])
    clear = between(first, better).tasks[0].scores[0]
    assert clear.gain == pytest.approx(0.2)
    assert verdict(clear).startswith("+0.20 ± 0.08 beyond")
    worse = between(better, first).mean
    assert worse is not None and verdict(worse).startswith("-0.20 ± 0.08 beyond")
    unclear = between(evaluation([answer(i, float(i < 52)) for i in range(100)]), other)
    assert verdict(unclear.tasks[0].scores[0]).endswith("within")


def test_only_equal_questions_are_paired() -> None:
    base = [answer(i, 1.0) for i in range(6)]
    changes: list[dict[str, Any]] = [
        {"question": "Where?"},
        {"expected": "blue"},
        {"others": ("crimson",)},
        {"sample": "e/3"},
        {"metric": "anls"},
    ]
    others = [replace(one, **change) for one, change in zip(base, changes, strict=False)]
    paired = between(evaluation(base), evaluation([*others, answer(5, 0.0)]))
    assert paired.questions == 1 and paired.tasks[0].scores[0].gain == -1.0
    assert between(evaluation(base), evaluation(others)).questions == 0


def test_more_question_types_than_fit_memory_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluation([answer(i, 1.0) for i in range(4)])
    many = [answer(i, 1.0, task=f"type {i}") for i in range(4)]
    monkeypatch.setattr("train.compare.differences.MOST_CELLS", 15)
    assert between(first, first).questions == 4
    with pytest.raises(UserError, match="4 questions of 4 types are more than are compared"):
        between(evaluation(many), evaluation(many))
    assert MOST_CELLS * 8 * 2 < 200e6


# ---- what cannot be compared


def test_losses_of_other_samples_are_drawn_apart(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, file, change in (
        ("small", "config.yaml", lambda v: v.update(held_out=0.1)),
        ("small", "run.json", lambda v: v.update(samples_digest="another", samples={"colors": 7})),
    ):
        shutil.rmtree(runs / "other", ignore_errors=True)
        shutil.copytree(runs / name, runs / "other")
        changed(runs / "other" / "stage1" / file, change)
        printed, page = shown(capsys, "small", "small-mlp", "other")
        what = "held-out samples" if file == "config.yaml" else "training samples"
        line = f"losses of other cannot be compared with those of small: other {what}"
        assert line in printed.splitlines() and line in page.text
        assert [tag["aria-label"] for tag in page.all("svg")] == [
            "Loss by step of small, small-mlp",
            "Loss by samples seen of small, small-mlp",
            "Loss by step of other",
            "Loss by samples seen of other",
        ]
        # A row for each group: no loss is beside one that it cannot be compared with.
        rows = re.findall(r"^training loss, last 20 steps(.*)$", printed, re.MULTILINE)
        assert [len(one.split()) for one in rows] == [2, 1]
    assert row(printed, "samples of colors") == ["48", "48", "7"]


def test_stages_that_differ_are_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "small" / "stage1", runs / "small" / "stage2")
    changed(runs / "small/stage2/config.yaml", lambda v: v.update(stage=2, learning_rate=5e-5))
    (runs / "small/stage2/evaluation-val.json").unlink()
    printed, _ = shown(capsys, "small", "small-mlp")  # both have stage 1
    assert "different" not in printed and "cannot" not in printed
    printed, page = shown(capsys, "runs/small/stage2", "small-mlp")
    (line,) = [line for line in printed.splitlines() if "cannot be compared" in line]
    assert line.startswith("losses and cost of small-mlp/stage1 cannot be compared with those of")
    assert line.endswith("small/stage2: other stage")
    assert row(printed, "learning_rate") == ["5e-05", "0.003"]
    (missing,) = [line for line in printed.splitlines() if "has no scores of val" in line]
    command = shlex.split(missing.split("make them: ")[1])
    assert command[:5] == ["python", "-m", "train.evaluate", "--run", "runs/small/stage2"]
    assert "2 runs, stage 1, 2" in page.text
    with pytest.raises(
        UserError, match=r"run small-mlp: no stage 2, only 1; .*runs/small-mlp/stage1"
    ):
        compare.main(["small", "small-mlp", "--stage", "2"])


def test_another_tokenizer_sets_losses_apart_and_an_equal_one_does_not(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(runs / "small-mlp/stage1/config.yaml", lambda v: v.update(llm="org/larger"))
    printed, _ = shown(capsys, "small", "small-mlp")  # the saved tokenizers are equal
    assert "cannot be compared" not in printed
    assert row(printed, "llm") == ["random:qwen3-tiny", "org/larger"]
    shutil.rmtree(runs / "small-mlp/stage1/final")
    printed, _ = shown(capsys, "small", "small-mlp")
    assert "losses of small-mlp cannot be compared with those of small: other tokenizer" in printed


def test_earlier_stages_are_compared_by_the_card(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def older(card: dict[str, Any]) -> None:
        before = {"stage": 9, "llm": "x", "settings": {"learning_rate": 0.5, "unknown": 1}}
        card["stages"].insert(0, before)

    changed(runs / "small-mlp/stage1/card.json", older)
    printed, _ = shown(capsys, "small", "small-mlp")
    assert row(printed, "stage 9: learning_rate") == ["-", "0.5"]
    assert row(printed, "stage 9: llm") == ["-", "x"]
    assert "unknown" not in printed


# ---- runs that are not whole


def test_an_unfinished_run_is_compared_as_far_as_it_went(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = runs / "small-mlp" / "stage1"
    shutil.rmtree(stage / "final")
    for name in ("card.json", "evaluation-val.json"):
        (stage / name).unlink()
    kept = [x for x in (stage / METRICS).read_text().splitlines() if json.loads(x)["step"] <= 4]
    (stage / METRICS).write_text("\n".join(kept) + '\n{"st')
    printed, page = shown(capsys, "small", "small-mlp")
    assert "small-mlp is not finished: 4 of 6 steps" in printed
    assert "small-mlp has no scores: only a finished stage is evaluated" in printed
    assert row(printed, "steps") == ["6 of 6", "4 of 6"]
    trained = [json.loads(x) for x in (runs / "small/stage1" / METRICS).read_text().splitlines()]
    losses = [x["loss"] for x in trained if "loss" in x]
    equal = row(printed, "training loss after 32 samples")
    assert equal[0] == f"{sum(losses[:4]) / 4:.4f}"
    assert "4 of 6 steps" in page.text
    # A run that has just begun, and one of which only the model was copied.
    (stage / METRICS).unlink()
    (stage / "config.yaml").unlink()
    printed, _ = shown(capsys, "small", "small-mlp")
    assert "small-mlp has no config.yaml: its settings are not known" in printed
    assert "small-mlp has no metrics.jsonl with a step: its curves are not known" in printed
    assert "losses of small-mlp cannot be compared: its samples are not known" in printed
    shutil.copytree(runs / "small/stage1/final", runs.parent / "copied" / "final")
    printed, _ = shown(capsys, "copied/final", "small")
    assert "copied has no metrics.jsonl" in printed


def test_scores_of_another_step_or_split_are_named(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = "stage1/evaluation-val.json"
    changed(runs / "small-mlp" / file, lambda v: v.update(step=3))
    printed, _ = shown(capsys, "small", "small-mlp")
    assert "the scores of small-mlp are those of step 3, not of its last one" in printed
    for name in ("small", "small-mlp"):
        (runs / name / file).rename(runs / name / "stage1" / "evaluation-test.json")
    printed, _ = shown(capsys, "small", "small-mlp")
    assert "scores of the split test" in printed and "difference from small" in printed
    printed, _ = shown(capsys, "small", "small-mlp", "--split", "val")
    assert printed.count("has no scores of val; make them: python -m train.evaluate") == 2
    (runs / "small/stage1/evaluation-test.json").unlink()
    printed, _ = shown(capsys, "small", "small-mlp")
    assert "scores of the split test" in printed and "difference from" not in printed


def test_answers_to_other_questions_are_not_compared(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / "small-mlp/stage1/evaluation-val.json"

    def rename(values: Any, first: int) -> None:
        for one in values["answers"][first:]:
            one["sample"] += "-other"

    changed(path, lambda v: rename(v, 3))
    printed, _ = shown(capsys, "small", "small-mlp")
    assert re.search(
        r"small-mlp and small are compared on 3 questions; \d+ others are not in", printed
    )
    changed(path, lambda v: rename(v, 0))
    printed, _ = shown(capsys, "small", "small-mlp")
    assert "scores of small-mlp and small cannot be compared: no question is in both" in printed


# ---- which runs


def test_runs_are_named_by_what_makes_them_differ(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "small", tmp_path / "theirs" / "small")
    printed, _ = shown(capsys, "small", "theirs/small", "--out", "page.html")
    assert "runs/small" in printed and "theirs/small" in printed
    assert (tmp_path / "page.html").is_file()
    assert find_stages("runs/small/stage1/final").folders == {1: Path("runs/small/stage1")}


def test_a_wrong_command_is_one_line(runs: Path) -> None:
    (runs / "begun" / "stage1").mkdir(parents=True)
    for words, message in (
        (["small"], r"1 runs; give 2 to 8, separated by spaces: python -m train.compare RUN RUN"),
        ([], r"give 2 to 8"),
        (["small"] * 9, r"9 runs; give 2 to 8"),
        (["small", "smal"], r"no run smal .*nearest: small"),
        (["small", "runs/small/stage1"], r"stage1 is given twice"),
        (["small", "runs/../runs/small"], r"given twice"),
        (["small", "begun"], r"runs/begun: no stage of this run has begun; train one: python -m"),
        (["small", "small-mlp", "--split", "vall"], r"'vall' is none of .*nearest: val"),
        (["small", "small-mlp", "--ou", "x"], r"nearest: --out"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            compare.main(words)
        assert "\n" not in str(refused.value)


# ---- a run that somebody else made


def test_text_of_a_stranger_never_becomes_markup_and_acts_on_no_terminal(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = runs / HOSTILE.strip().replace("/", "")
    shutil.copytree(runs / "small", theirs)
    changed(theirs / "stage1/config.yaml", lambda v: v.update(llm=HOSTILE, datasets=HOSTILE))
    changed(theirs / "stage1/run.json", lambda v: v["samples"].update({HOSTILE: 3}))

    def rename(values: dict[str, Any]) -> None:
        for one in (*values["tasks"], *values["answers"]):
            one["name" if "name" in one else "task"] = HOSTILE

    changed(theirs / "stage1/evaluation-val.json", rename)
    printed, page = shown(capsys, str(theirs), "small")
    html = (runs / "compare.html").read_text()
    assert "<b>x" in page.text and "<b>x" not in html
    for text in (printed, html):
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
        assert (
            text.count(r"\x1b]0;x\x07\u202e") >= 3
        )  # in the names of the run, the model and the data


VALUES: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("config.yaml", lambda v: v.update(stage=7)),
    ("config.yaml", lambda v: v.update(betas=3)),
    ("config.yaml", lambda v: v.update(max_steps=[1] * 1000)),
    ("config.yaml", lambda v: v.update(unknown=1)),
    ("run.json", lambda v: v.update(samples={"a": -1, "b": "many"})),
    ("run.json", lambda v: v.update(parameters=[1])),
    ("run.json", lambda v: v.update(parameters=[1, -5])),
    ("card.json", lambda v: v.update(stages={"a": 1})),
    ("card.json", lambda v: v["stages"][0].update(stage=-3)),
    ("card.json", lambda v: v["stages"][0].update(settings={"seed": [[1]]})),
    ("evaluation-val.json", lambda v: v.update(loss=10**400)),
    ("evaluation-val.json", lambda v: v["answers"][0].update(metric=HOSTILE)),
    ("evaluation-val.json", lambda v: v["answers"][0].update(scores=[1.0, 1.0])),
    ("evaluation-val.json", lambda v: v["answers"][0].update(scores=[])),
    ("evaluation-val.json", lambda v: v["answers"][0].update(scores=[float("nan")])),
    ("evaluation-val.json", lambda v: v["answers"][0].update(scores=[1e300])),
    ("evaluation-val.json", lambda v: v["answers"][0].update(blind_scores=[0.5, 0.5])),
    ("evaluation-val.json", lambda v: v["answers"][0].update(sample=[HOSTILE] * 10_000)),
)


@pytest.mark.parametrize(("file", "change"), VALUES, ids=lambda v: v if isinstance(v, str) else "")
def test_values_that_we_do_not_write_are_one_line(
    runs: Path, file: str, change: Callable[[Any], Any]
) -> None:
    changed(runs / "small-mlp/stage1" / file, change)
    with pytest.raises(UserError) as refused:
        compare.main(["small", "small-mlp"])
    error = str(refused.value)
    assert file in error and "\n" not in error and len(error) < 600
    assert not (runs / "compare.html").exists()


@pytest.mark.parametrize("value", ["1e308", "5e-324", "-1e308", "NaN", "Infinity", "0.0"])
def test_losses_that_no_axis_has_are_not_drawn(
    runs: Path, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs / "small-mlp/stage1" / METRICS
    lines = [
        f'{{"step": {1 << 59}, "loss": {value}, "samples": {1 << 60}, "tokens": {1 << 60}}}',
        f'{{"step": 3, "held_out_loss": {value}}}',
        f'{{"step": 1, "loss": {value}, "step_s": 1e12, "wait_s": 1e12, "memory_gib": 1e12}}',
    ]
    path.write_text("\n".join(lines) + "\n")
    printed, _ = shown(capsys, "small", "small-mlp")
    assert "small-mlp" in printed


def test_a_number_of_400_digits_is_shown(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(runs / "small-mlp/stage1/evaluation-val.json", lambda v: v.update(step=10**400))
    assert f"{10**400:,}" in shown(capsys, "small", "small-mlp")[0]


def test_an_answer_says_what_it_was_scored_by() -> None:
    assert answer(1, 1.0, metric="anls").correct
    with pytest.raises(ValueError, match="none of exact"):
        answer(1, 1.0, metric="x")
    with pytest.raises(ValueError, match="1 scores of the metric points, not 3"):
        answer(1, 1.0, metric="points")
