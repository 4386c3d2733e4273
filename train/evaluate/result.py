"""The result of an evaluation: saved as evaluation-<split>.json, printed as a table, rows for card.json.

result = read(folder / "evaluation-val.json")
print(table(result))
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import configs
from cache.errors import command_line
from cache.store.files import write_atomic
from configs import UserError
from configs.console import table_text
from configs.text import visible
from model.io.run_files import read_json
from train.evaluate.intervals import Interval
from train.evaluate.metrics import CAPTIONS
from train.evaluate.scoring import Answer, Score, Task, summarize


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of an evaluation."""

    run: str
    """Folder of the run."""
    stage: int
    """Stage of the run."""
    step: int
    """Steps the model was trained in that stage."""
    split: str
    """`val`, `test` or `train`."""
    space: str
    """Name of the feature space."""
    samples: int
    """Samples the loss was measured on."""
    loss: float
    """Cross-entropy per supervised token, nats."""
    blind_loss: float | None
    """Loss with exchanged images; None without blind figures, as all `blind` fields."""
    mean: Score | None
    """Headline: mean over question types except captions; None without such types."""
    tasks: tuple[Task, ...]
    """Result of each question type, captions last."""
    answers: tuple[Answer, ...]
    """Every question with its answers."""

    @property
    def rows(self) -> list[tuple[str, int, Score]]:
        """Every score that is shown: (question type or '', questions, score), the mean last.

        A further score of a type has no name: the type is that of the row before.
        """
        rows: list[tuple[str, int, Score]] = []
        for task in self.tasks:
            note = " (not in the mean)" if task.name in CAPTIONS else ""
            for number, score in enumerate(task.scores):
                rows.append((f"{task.name}{note}" * (not number), task.questions, score))
        if self.mean is not None:
            rows.append(
                ("mean", sum(t.questions for t in self.tasks if t.name not in CAPTIONS), self.mean)
            )
        return rows


def save(result: Evaluation, folder: Path) -> None:
    """Write a result into the folder of its stage."""
    text = json.dumps(asdict(result), indent=1) + "\n"
    write_atomic(folder / f"evaluation-{result.split}.json", text.encode())


def read(path: Path) -> Evaluation:
    """Read the result that `train.evaluate` saved in a file.

    Raises:
        UserError: the file does not exist, or is of another version.
    """
    split = path.stem.removeprefix("evaluation-")
    of_split = () if split == "val" else ("--split", split)
    again = command_line("train.evaluate", "--run", path.parent.parent, *of_split)
    try:
        values = read_json(path, dict[str, Any], f"make it again: {again}", not_finite=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; make it: {again}") from None
    try:
        return configs.build(Evaluation, values, str(path))
    except UserError as error:
        raise UserError(f"{error}; make it again: {again}") from None


def card_rows(result: Evaluation) -> list[dict[str, Any]]:
    """Return the scores of each data set for card.json: names and numbers, no texts and no paths."""
    of_dataset: dict[str, list[Answer]] = {}
    for answer in result.answers:
        of_dataset.setdefault(answer.sample.split("/", 1)[0], []).append(answer)
    return [
        {
            "data_set": dataset,
            "split": result.split,
            "type": task.name,
            "metric": score.name,
            "n": task.questions,
            **{k: v for k, v in asdict(score).items() if k != "name"},
        }
        for dataset, answers in of_dataset.items()
        for task in summarize(answers)[0]
        for score in task.scores
    ]


# ---- output


def table(result: Evaluation) -> str:
    """Return the result as a table. After ± is half the width of the 95 % interval."""
    rows: list[tuple[str, ...]] = [
        (name, f"{questions:,}" if name else "", score.name, *cells(score))
        for name, questions, score in result.rows
    ]
    losses = (result.loss, result.blind_loss)
    shown = ["" if loss is None else f"{loss:.4f}" for loss in losses]
    rows.append(("loss", f"{result.samples:,}", "nats a token", *shown, ""))
    head = f"{result.run} stage {result.stage} step {result.step}, {result.split} split, space {result.space}"
    columns = ("", "questions", "metric", "score", "blind", "difference")
    return f"{visible(head)}\n{table_text(columns, rows, right='questions')}"


def cells(score: Score) -> tuple[str, str, str]:
    """Return a score, the blind one and their difference, each as `0.93 ± 0.02`; '' for what is unknown."""
    return (
        figure(score.value, score.interval),
        figure(score.blind, score.blind_interval),
        figure(score.gain, score.gain_interval),
    )


def figure(value: float | None, interval: Interval | None) -> str:
    """Return a value with half the width of its interval."""
    if value is None:
        return ""
    return f"{value:.2f}" if interval is None else f"{value:.2f} ± {half_width(interval):.2f}"


def half_width(interval: Interval) -> float:
    """Return half the width of an interval."""
    return (interval[1] - interval[0]) / 2
