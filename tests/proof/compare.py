"""Comparisons: with transformers alone, int8 and int4 with fp16, and cached with live training."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Dinov2Model

import configs
from cache.remote.open import RemoteOptions, open_reader
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from model.io.runs import find_run
from model.io.saved_model import load_final
from model.language.model import load_tokenizer
from tests.proof import reference, training
from tests.proof.drawings import SIDE
from tests.proof.scores import flops_bound, is_equal, paired
from tests.proof.work import Line, Work, as_json, folder_bytes, metrics
from train.config import Options, read_saved
from train.stage import files, setup

CODECS = ("int8", "int4")
EXPERIMENT = "experiment-mlp"
HALF_STEP = 3
"""FLOP of a training step over those of its forward pass: forward, and twice that backward."""


def reference_losses(work: Work, space: str) -> dict[str, Any]:
    """Train a few steps with our commands and with transformers' classes alone, on the same batches."""
    run, recipe = "reference", work.recipe["reference"]
    shutil.rmtree(work.folder / run, ignore_errors=True)
    training.train(work, run, 1, {"connector": "linear", **recipe}, space)
    stage = work.folder / run / "stage1"
    ours = metrics(stage)
    batches = batches_of(work, stage)
    models, encoder = work.folder / "models", work.recipe["encoder"]
    print("\n$ the same steps with transformers' own classes and the tower live", flush=True)
    begun = time.monotonic()
    theirs = reference.losses(
        models / "tower",
        models / "language",
        batches,
        [(step["connector_lr"], step["lr"]) for step in ours],
        block=encoder["blocks"][0],
        pool=encoder["pool_image"],
    )
    seconds = time.monotonic() - begun
    losses = [step["loss"] for step in ours]
    off = max(abs(a - b) / b for a, b in zip(losses, theirs, strict=True))
    shutil.rmtree(work.folder / run)
    line = Line(
        f"reference: losses of {len(losses)} steps, transformers with the tower live",
        f"relative difference {off:.1e}",
        "<= 1e-4",
        off <= 1e-4,
    )
    return {
        "losses": losses,
        "theirs": theirs,
        "ours_s": sum(step["step_s"] for step in ours) / len(ours),
        "live_s": seconds / len(ours),
        "lines": [as_json(line)],
    }


def batches_of(work: Work, stage: Path) -> list[list[reference.Record]]:
    """Return the drawings, questions and answers of every step of a stage, in its order."""
    options = configs_of(stage)
    reader = open_reader(options.features, options.space, RemoteOptions(), datasets=["train"])
    tokenizer = load_tokenizer(str(options.llm))
    schedule = setup.load_data(options, reader, tokenizer, stage).schedule
    folder = work.folder / "data"
    records = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    samples = schedule.trees.samples
    batches = []
    for number in range(options.max_steps):
        members = [int(m) for one in schedule.step(number).slices for m in one.members]
        some = [records[int(samples.index[member])] for member in members]
        batches.append([_triple(folder, record) for record in some])
    return batches


def configs_of(stage: Path) -> Options:
    """Return the options that a stage was trained with."""
    path = stage / files.CONFIG
    return configs.build(Options, read_saved(path), str(path))


def _triple(folder: Path, record: dict[str, Any]) -> reference.Record:
    asked, told = (turn["value"] for turn in record["conversations"])
    return str(folder / record["image"]), asked.removeprefix("<image>\n"), told


# ---- cost


def second_experiment(work: Work, encoded: dict[str, Any]) -> dict[str, Any]:
    """Run the encode job again and train another connector; count what two experiments cost."""
    features, space = work.folder / "cache", encoded["space"]
    shutil.rmtree(work.folder / EXPERIMENT, ignore_errors=True)
    again = work.run("encode.run", training.encode_flags(work, training.DATASETS, features))
    new = int(again.found(r"\bencoded=(\d+)"))
    training.train(work, EXPERIMENT, 1, work.recipe["experiment"], space)
    stage = work.folder / EXPERIMENT / "stage1"
    steps = metrics(stage)
    trained_s = sum(step["step_s"] for step in steps)
    bound, drawings = flop_figures(work, stage, len(steps))
    tower_s = encoded["seconds"] / max(1, encoded["encoded"])
    live = 2 * (trained_s + drawings * tower_s)
    cached = encoded["seconds"] + again.seconds + 2 * trained_s
    pictures = sum(
        folder_bytes(work.folder / "data" / artist)
        for artist in (*work.recipe["artists"], "twemoji")
    )
    shutil.rmtree(work.folder / EXPERIMENT)
    lines = [
        Line("second experiment (mlp): drawings encoded again", f"encoded={new}", "0", new == 0),
        Line(
            "two experiments of this length, wall time",
            f"live {live:.0f} s, cached {cached:.0f} s with encoding: {live / cached:.2f} x",
            "",
        ),
        Line(
            "two such experiments, encoding not counted",
            f"{live / (2 * trained_s):.2f} x; FLOP bound {bound:.2f} x",
            "",
        ),
        Line(
            "disk",
            f"live {pictures / 1e6:.0f} MB of drawings, cached "
            f"{(pictures + encoded['disk']) / 1e6:.0f} MB with features",
            "",
        ),
    ]
    return {"lines": [as_json(line) for line in lines]}


def flop_figures(work: Work, stage: Path, steps: int) -> tuple[float, int]:
    """Return the largest possible gain of a step without the tower, and the drawings seen in all steps."""
    options = configs_of(stage)
    reader = open_reader(options.features, options.space, RemoteOptions(), datasets=["train"])
    schedule = setup.load_data(options, reader, load_tokenizer(str(options.llm)), stage).schedule
    slices = [one for number in range(steps) for one in schedule.step(number).slices]
    tokens = sum(one.tokens for one in slices)
    vlm, _, _ = load_final(find_run(str(stage.parent), 1))
    layers = sum(p.numel() for p in vlm.language.base_model.layers.parameters())
    passes = 2 if not options.train_llm else HALF_STEP  # no gradients of frozen weights
    model = 2 * layers * passes * tokens
    tower = Dinov2Model.from_pretrained(work.folder / "models" / "tower")
    block = max(work.recipe["encoder"]["blocks"]) + 1
    used = sum(p.numel() for p in tower.encoder.layer[:block].parameters())
    patches = (SIDE // tower.config.patch_size) ** 2 + 1
    return flops_bound(2.0 * used * patches * len(slices), model), len(slices)


# ---- codecs


def codecs(work: Work, space: str, answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare int8 and int4 with fp16, paired over drawings: the main run's answers, and short trainings.

    Args:
        work: the proof.
        space: the space with fp16.
        answers: those of the main run, from fp16.
    """
    recipe = work.recipe["paired"]
    spaces = {"fp16": space}
    for codec in CODECS:
        flags = {"features": work.folder / "cache", "space": space, "codec": codec}
        work.run("cache.convert", flags)
        names = CacheRoot(work.folder / "cache").space_names()
        spaces[codec] = next(n for n in names if _codec(work, n) == codec)
    right: dict[str, list[dict[str, bool]]] = {codec: [] for codec in spaces}
    perplexity = 0.0
    for seed in recipe["seeds"]:
        for codec, of_codec in spaces.items():
            found = work.step(
                f"paired-{codec}-{seed}", partial(_paired, work, seed, codec, of_codec)
            )
            right[codec].append(found["right"])
            perplexity = found.get("perplexity", perplexity)
    for codec in spaces:
        shutil.rmtree(work.folder / f"aligned-{codec}", ignore_errors=True)
    exact = float(np.mean([list(each.values()) for each in right["fp16"]]))
    lines = [Line("fp16, short trainings: exact match", f"{exact:.3f}", "")]
    kept = [{_question(a): bool(a["correct"]) for a in answers}]
    count = len(recipe["seeds"])
    seeds = f"{count} seed{'s' if count > 1 else ''}"
    for codec in CODECS:
        asked, given = training.ask(work, spaces[codec], fast=True)
        read = [
            {
                f"{q.sample.media[0].source} {training.task_of(q.prompt[-1][1])}": is_equal(
                    q.expected, text
                )
                for q, text in zip(asked, given, strict=True)
            }
        ]
        lines += [
            _paired_line(f"{codec} - fp16: short trainings, {seeds}", right, codec),
            _paired_line(
                f"{codec} - fp16: the main run reads {codec}", {"fp16": kept, codec: read}, codec
            ),
        ]
    return {"perplexity": perplexity, "lines": [as_json(line) for line in lines]}


def _paired_line(name: str, right: Mapping[str, list[dict[str, bool]]], codec: str) -> Line:
    mean, half = paired(right[codec], right["fp16"])
    return Line(name, f"{mean:+.3f} ± {half:.3f}", "interval <= ± 0.020", half <= 0.02)


def _paired(work: Work, seed: int, codec: str, space: str) -> dict[str, Any]:
    run = f"paired-{codec}-{seed}"
    shutil.rmtree(work.folder / run, ignore_errors=True)
    recipe = work.recipe["paired"]
    aligned = training.align(work, space, f"aligned-{codec}")
    training.train(work, run, 1, {"from": aligned, **recipe["train"], "seed": seed}, space)
    answers = training.evaluate(work, run, "test", limit=recipe["questions"])
    found: dict[str, Any] = {"right": {_question(a): a["correct"] for a in answers}}
    if codec == "fp16" and seed == recipe["seeds"][0]:
        found["perplexity"] = training.english_perplexity(work, run, 1)
    shutil.rmtree(work.folder / run)  # 2 GB of weights
    return found


def _question(answer: Mapping[str, Any]) -> str:
    return f"{answer['media'][0]} {answer['task']}"


def _codec(work: Work, space: str) -> str:
    return FeatureReader(CacheRoot(work.folder / "cache").space(space)).spec.codec
