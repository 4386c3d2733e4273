"""The demo: draw a small world, encode it once, train three stages on it, and ask about it.

python -m train.demo                      # `make demo`: offline, minutes on two cores
python -m train.demo --features other-cache

Every step is one of the product's own commands and is printed before it runs; its options are in
configs/demo.yaml. The features are kept, so another `make demo` encodes nothing and only trains. The last
line is the result on the split `test`, by which nothing was chosen: exact match, mean over the question
types, and the same *blind*, with every drawing and video exchanged for another. A point matches in its shape.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configs
from cache.errors import CacheError
from configs import UserError
from configs.console import table_text
from train.evaluate.result import figure

PROG = "python -m train.demo"
RUN, SECOND = Path("runs/demo"), Path("runs/demo-mlp")
"""Folders of the run, and of a second one that trains another connector on the same features."""
MARK = "demo.json"
"""File that marks a run's folder as made by the demo, which may replace it."""
TYPES = (
    *("count", "colour", "shape", "cell", "point"),
    *("video-count", "video-what", "video-where"),
)
"""The question types of the headline, on images and on videos."""

Flags = Mapping[str, Any]
"""Options of a command, by field name."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run the demo."""

    features: Path = Path("cache")
    """Folder of the feature cache."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The content of configs/demo.yaml. Each mapping has options of the command it is named after."""

    world: Flags
    """Read by encode.sources.demo."""
    encode: Flags
    """encode.run."""
    train: Flags
    """train.run, in every stage."""
    stages: Mapping[int, Flags]
    """train.run, for one stage; they override those of `train`."""
    experiment: Flags
    """train.run, for stage 1 of the second run; they override those of stage 1."""
    evaluate: Flags
    """train.evaluate."""
    live_samples: int
    """Samples whose loss on cached features is compared with the loss on newly encoded ones."""
    prompts: tuple[str, ...]
    """Prompts, each for one held-out drawing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code of the first step that fails."""
    options = configs.parse(Options, argv, prog=PROG, description=__doc__)
    demo = configs.build(Demo, configs.load("demo"), "configs/demo.yaml")
    try:
        show(demo, options.features)
    except subprocess.CalledProcessError as failed:
        print(f"demo: the command above failed with exit code {failed.returncode}", file=sys.stderr)
        return failed.returncode
    return 0


def show(demo: Demo, features: Path) -> None:
    """Run all steps in order."""
    begun = time.monotonic()
    for folder in (RUN, SECOND):
        replace_run(folder)
    where: dict[str, Any] = {"features": features}
    encode = {"dataset": "demo", **demo.encode, **where}
    space = found(r"space +([^\s:]+)", run("encode.run", encode))

    where["space"] = space
    for stage, flags in demo.stages.items():
        run("train.run", {"stage": stage, "run": RUN.name, **where, **demo.train, **flags})
    del where["space"]  # the model has the name of its space
    live = run("encode.check.loss", {"run": RUN.name, **where, "samples": demo.live_samples})
    run("train.evaluate", {"run": RUN.name, **where, **demo.evaluate})
    last_stage = RUN / f"stage{max(demo.stages)}"  # its model answered the questions
    split = str(demo.evaluate["split"])
    result = json.loads((last_stage / f"evaluation-{split}.json").read_text(encoding="utf-8"))
    shown = (answer["media"][0] for answer in result["answers"])
    drawings = dict.fromkeys(path for path in shown if Path(path).suffix == ".png")  # each once
    for prompt, image in zip(demo.prompts, drawings, strict=False):
        run("model.generate", {"run": RUN.name, "image": image, "prompt": prompt})
    shown_in = {"split": split, "output": RUN / "report.html"}
    run("train.report", {"run": RUN.name, **where, **shown_in})

    second = time.monotonic()
    encoded = found(r"encoded=(\d+)", run("encode.run", encode))
    flags = {**demo.train, **demo.stages[1], **demo.experiment}
    run("train.run", {"stage": 1, "run": SECOND.name, **where, "space": space, **flags})
    second_s = time.monotonic() - second

    print(f"\n{split} split, drawings and videos, stage {result['stage']}\n{table(result)}\n")
    print(f"experiment 2: encoded={encoded} seconds={second_s:.0f}")
    print(next(line for line in live if line.startswith("cached loss")))
    right, blind = result["mean"]["value"], result["mean"]["blind"]
    seconds = time.monotonic() - begun
    print(f"demo: exact_match={right:.2f} blind={blind:.2f} seconds={seconds:.0f}")


# ---- commands


def run(module: str, flags: Flags) -> list[str]:
    """Run one of our commands, pass its output on, and return the lines of it.

    Raises:
        CalledProcessError: the command failed, after printing its error.
    """
    words = [module]
    for name, value in flags.items():  # {"max_steps": 5} -> --max-steps 5
        words += ["--" + name.replace("_", "-"), str(value)]
    print(f"\n$ python -m {shlex.join(words)}", flush=True)
    lines: list[str] = []
    with subprocess.Popen(  # -u: unbuffered, so that each line is passed on when it is written
        [sys.executable, "-u", "-m", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return lines


def found(pattern: str, lines: Sequence[str]) -> str:
    """Return group 1 of the first line that starts with a match of the pattern."""
    for line in lines:
        if match := re.match(pattern, line):
            return match[1]
    raise AssertionError(f"no line of the command matches {pattern}")


def replace_run(folder: Path) -> None:
    """Remove the run of an earlier demo, and create its folder again with the demo's mark.

    Raises:
        UserError: the folder exists, and the demo has not made it.
    """
    mark = folder / MARK
    if folder.exists():
        if not mark.exists():
            raise UserError(
                f"{folder}: not made by the demo, which would replace it; rename it: mv {folder} NEW"
            )
        print(f"$ rm -r {folder}", flush=True)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    mark.write_text('{"made by": "python -m train.demo"}\n', encoding="utf-8")


# ---- results


def table(result: Mapping[str, Any]) -> str:
    """Return score, blind score and difference of each question type; captions come last."""

    def row(name: str, questions: str, metric: str, score: Mapping[str, Any]) -> tuple[str, ...]:
        shown = (("value", "interval"), ("blind", "blind_interval"), ("gain", "gain_interval"))
        return name, questions, metric, *(figure(score[of], score[ends]) for of, ends in shown)

    rows = {
        task["name"]: row(task["name"], f"{task['questions']:,}", score["name"], score)
        for task in result["tasks"]
        for score in task["scores"][:1]
    }
    lines = [
        *(rows[name] for name in TYPES),
        row("mean", "", "", result["mean"]),
        ("not in the mean:", "", "", "", "", ""),
        *(cells for name, cells in rows.items() if name not in TYPES),
    ]
    columns = ("", "questions", "metric", "score", "blind", "difference")
    return table_text(columns, lines, right="questions")


if __name__ == "__main__":
    configs.command(main, errors=(CacheError,))
