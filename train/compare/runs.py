"""Read what the folder of a stage says of its training. Somebody else may have made it.

    stages = find_stages("first")      # Stages({1: Path("runs/first/stage1")}, fixed=False)
    run = read_run(stages.folders[1], "first", "val")
    run.course.losses[-1]              # Point(step=1000, samples=512000, loss=2.31)

What a folder lacks is empty here. What is damaged, a link or too large is a UserError of one line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

import msgspec

import configs
from cache.store.samples import Split
from configs import UserError
from configs.command_line import command_text
from model.io.run_files import META, Count, read_json, refuse_links
from model.io.runs import find_root, read_meta
from train.config import Options, read_saved
from train.evaluate.result import Evaluation, read
from train.metrics import METRICS, read_metrics
from train.stage.card import CARD, SETTINGS
from train.stage.files import CONFIG, FINAL, RUN, Facts

TOKENIZER = "tokenizer.json"
"""The file of a finished model by which tokenizers are compared."""
MOST_DATA_SETS = 50
"""Data sets of a run that are compared."""

Scalar = str | int | float | bool | None


class _CardStage(TypedDict):
    """What is read of a stage in card.json."""

    stage: Annotated[int, msgspec.Meta(ge=0, le=99)]
    steps: NotRequired[Count]
    samples_per_step: NotRequired[Count]
    llm: NotRequired[Scalar]
    connector: NotRequired[Scalar]
    settings: NotRequired[dict[str, Scalar]]


class _Card(TypedDict):
    stages: list[_CardStage]


class Point(NamedTuple):
    """A loss, and how far the training was."""

    step: int
    samples: int
    """Samples trained on so far."""
    loss: float
    """Nats per supervised token; may be NaN."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """What metrics.jsonl says of a training."""

    losses: tuple[Point, ...]
    """The training loss of each step."""
    held_out: tuple[Point, ...]
    """The held-out loss of each evaluation."""
    seconds: float
    """Duration of all steps, without evaluations and checkpoints."""
    wait_s: float
    """Seconds of waiting for data among these."""
    tokens: int
    """Tokens trained on."""
    memory_gib: float
    """Peak memory of the process with the highest peak."""

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.losses[-1].step if self.losses else 0

    @property
    def samples(self) -> int:
        """Samples trained on, each as often as it was."""
        return self.losses[-1].samples if self.losses else 0


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One stage of a run."""

    label: str
    """Name in tables and charts."""
    folder: Path
    """Its folder."""
    stage: int
    """Its number; 0 if nothing says it."""
    options: Options | None
    """Its resolved options; None without config.yaml."""
    llm: str
    """Its language model; empty if nothing says it."""
    tokenizer: tuple[int, int] | None
    """Size and checksum of its tokenizer; None if it is not finished."""
    samples_digest: str
    """Hash of its list of samples; empty without run.json."""
    data_sets: Mapping[str, int]
    """Data set -> samples with all their features."""
    parameters: tuple[int, int] | None
    """Parameters that are trained, and all of them; None if the run does not say it."""
    earlier: Mapping[str, Scalar] | None
    """`stage 1: learning_rate` -> value, of the stages before; None without card.json."""
    course: Course
    """What was recorded of each step."""
    finished: bool
    """Whether its final model exists."""
    evaluation: Evaluation | None
    """Scores and answers of the split; None if it has not been evaluated."""
    disk_bytes: int
    """Bytes of all its files."""


class Stages(NamedTuple):
    """What a RUN of the command line names."""

    folders: dict[int, Path]
    """Number -> folder of a stage, finished or not; 0 for a folder without a number in its name."""
    fixed: bool
    """Whether it is the path of a stage, which leaves no choice."""


def find_stages(run: str) -> Stages:
    """Return the stages of a run.

    Args:
        run: a name below runs/, or the path of a run. The path of a stage or of its `final` names one stage.

    Raises:
        UserError: there is no such run, or no stage of it has begun.
    """
    place = Path(run)
    if place.name == FINAL and _is_stage(place.parent):
        place = place.parent
    if _is_stage(place):
        return Stages({_number(place): place}, fixed=True)
    root = find_root(run)
    found = {_number(path): path for path in sorted(root.glob("stage[0-9]")) if _is_stage(path)}
    if not found:
        again = command_text("python -m train.run", ["--run", run, "--features", "DIR"])
        raise UserError(f"{root}: no stage of this run has begun; train one: {again}")
    return Stages(found, fixed=False)


def _is_stage(folder: Path) -> bool:
    """Whether a folder has something that only a stage has."""
    return any(os.path.lexists(folder / name) for name in (METRICS, RUN, f"{FINAL}/{META}"))


def _number(folder: Path) -> int:
    found = re.fullmatch(r"stage([0-9])", folder.absolute().name)
    return int(found[1]) if found else 0


def read_run(folder: Path, label: str, split: Split) -> StageRun:
    """Return what the folder of a stage says.

    Args:
        folder: of the stage.
        label: its name in tables and charts.
        split: whose scores are read.

    Raises:
        UserError: a file is damaged, of another version or too large, or is no file.
    """
    refuse_links(folder)
    options = None
    if (folder / CONFIG).is_file():
        options = configs.build(Options, read_saved(folder / CONFIG), str(folder / CONFIG))
    facts: dict[str, Any] = _json(folder / RUN, Facts) or {}
    finished = (folder / FINAL / META).is_file()
    meta = read_meta(folder / FINAL) if finished else {}
    stage = options.stage if options else meta.get("stage", _number(folder))
    written = meta.get("files", {}).get(TOKENIZER)
    evaluation = folder / f"evaluation-{split}.json"
    return StageRun(
        label=label,
        folder=folder,
        stage=stage,
        options=options,
        llm=(options and options.llm) or meta.get("llm", ""),
        tokenizer=(written["bytes"], written["crc32c"]) if written else None,
        samples_digest=facts.get("samples_digest", ""),
        data_sets=dict(sorted(facts.get("samples", {}).items())[:MOST_DATA_SETS]),
        parameters=facts.get("parameters"),
        earlier=_earlier(folder, stage),
        course=_course(read_metrics(folder)),
        finished=finished,
        evaluation=read(evaluation) if evaluation.is_file() else None,
        disk_bytes=_disk_bytes(folder),
    )


def _json(path: Path, kind: Any) -> Any:
    """Return the values of a JSON file of a run; None without the file."""
    try:
        return read_json(path, kind, "copy the run again", not_finite=True)
    except FileNotFoundError:
        return None


def _earlier(folder: Path, stage: int) -> dict[str, Scalar] | None:
    """Return the settings of the stages before, as the card says them; None without a card."""
    card = _json(folder / CARD, _Card)
    if card is None:
        return None
    found: dict[str, Scalar] = {}
    for one in card["stages"]:
        said = {**one.get("settings", {}), **one}
        if one["stage"] != stage:
            for name in ("steps", "samples_per_step", "llm", "connector", *SETTINGS):
                if name in said:
                    found[f"stage {one['stage']}: {name}"] = said[name]
    return found


def _course(lines: Iterable[Mapping[str, Any]]) -> Course:
    losses, held_out = [], []
    samples = tokens = 0
    seconds = wait_s = memory = 0.0
    for line in lines:
        if "loss" in line:
            samples += line.get("samples", 0)
            tokens += line.get("tokens", 0)
            seconds += line.get("step_s", 0.0)
            wait_s += line.get("wait_s", 0.0)
            memory = max(memory, line.get("memory_gib", 0.0))
            losses.append(Point(line["step"], samples, line["loss"]))
        if "held_out_loss" in line:
            held_out.append(Point(line["step"], samples, line["held_out_loss"]))
    return Course(
        losses=tuple(losses),
        held_out=tuple(held_out),
        seconds=seconds,
        wait_s=wait_s,
        tokens=tokens,
        memory_gib=memory,
    )


def _disk_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder; links are not followed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(f"{place}/{name}").st_size
            except FileNotFoundError:  # a training goes on, and removes a checkpoint
                continue
    return total
