"""Encode the drawings, train on them, and score: the main run, text alone, codecs, English."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.remote.open import RemoteOptions, cache_root, open_reader
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from model.inference import answer, generation_mode
from model.io.device import native_dtype
from model.io.runs import find_run, read_meta
from model.io.saved_model import load_final, save_final
from model.language.tokenizer import encode_text
from tests.proof.drawings import KIND, NAME
from tests.proof.prepare import ENCODER
from tests.proof.scores import base_rate, by_task, classifier, is_equal, nearest, perplexity
from tests.proof.work import Flags, Line, Work, as_json, folder_bytes
from train.data.features import read_features
from train.data.join import join
from train.evaluate.questions import Question, questions

CONCEPT, KIND_TASK = "concept", "subcategory"
TASKS = {NAME: CONCEPT, KIND: KIND_TASK}
"""Question -> what it asks."""
NEEDED = {KIND_TASK: 0.6, CONCEPT: 0.4}
"""Exact match that is required, as a share of the nearest neighbour's."""
MAIN, ALIGNED = "main", "aligned-fp16"
"""Runs: the main one, and the one with a fitted connector that it starts from."""
LONGEST = 16
"""Tokens of an answer, at most."""
DATASETS = ("train", "validation", "test", "english", "blindfold")
WINDOW = 512
"""Tokens of English that the language model sees at once."""


def encode_flags(work: Work, datasets: Sequence[str], features: Path) -> dict[str, Any]:
    """Return the options that encode record files of the proof in this process, without Ray."""
    return {
        "dataset": tuple(f"{name}=json:{work.folder / 'data' / name}.json" for name in datasets),
        "config": work.folder / "nanomolmo2.yaml",
        "encoder": ENCODER,
        "codec": "fp16",
        "features": features,
        "device": "cpu",
        "workers": 0,
    }


def encode(work: Work) -> dict[str, Any]:
    """Encode every drawing; return the space, and what it cost."""
    features = work.folder / "cache"
    done = work.run("encode.run", encode_flags(work, DATASETS, features))
    encoded, reused = (int(done.found(rf"\b{name}=(\d+)")) for name in ("encoded", "reused"))
    return {
        "space": done.found(r"^space +([^\s:]+)"),
        "encoded": encoded,
        "reused": reused,
        "failed": int(done.found(r"failed=(\d+)")),
        "seconds": done.seconds,
        "disk": folder_bytes(features),
    }


# ---- training


def train(
    work: Work, run: str, stage: int, flags: dict[str, Any], space: str, **more: Any
) -> float:
    """Train one stage of a run of the proof; return its seconds."""
    return work.run("train.run", train_flags(work, run, stage, flags | more, space)).seconds


def train_flags(work: Work, run: str, stage: int, flags: Flags, space: str) -> dict[str, Any]:
    """Return the options that train one stage of a run of the proof."""
    fast = native_dtype(torch.device("cpu")) == torch.bfloat16
    model = (
        {}
        if stage > 1 or flags.keys() & {"from", "resume"}
        else {"llm": work.folder / "models" / "language"}
    )
    return {
        "stage": stage,
        "run": work.folder / run,
        "features": work.folder / "cache",
        "space": space,
        "precision": "bfloat16" if fast else "float32",
        **model,
        **work.recipe["train"],
        **flags,
    }


def train_main(work: Work, space: str) -> dict[str, Any]:
    """Train both stages of the main run; a stage that was interrupted goes on from its last checkpoint."""
    aligned = align(work, space, ALIGNED)
    seconds = {}
    for stage, flags in work.recipe["stages"].items():
        begun = (work.folder / MAIN / f"stage{stage}" / "config.yaml").exists()
        more: dict[str, Any] = {"from": aligned} if stage == 1 else {}
        if begun:
            more = {"resume": True}
        seconds[str(stage)] = train(work, MAIN, stage, {**flags, **more}, space)
    for checkpoints in (work.folder / MAIN).glob("stage*/checkpoints"):
        shutil.rmtree(checkpoints)  # gigabytes, of use only to go on
    return {"seconds": seconds}


def align(work: Work, space: str, run: str) -> Path:
    """Give a new model a connector that is fitted, not random; return the folder of the model.

    It maps the mean token of a training drawing to the mean embedding of the tokens of its name, so that
    this is nearer than any other name's. Such images are already words to the language model: of all that
    was tried, nothing helped as much.
    """
    final = work.folder / run / "stage1" / "final"
    if not final.exists():
        shutil.rmtree(work.folder / run, ignore_errors=True)
        flags = {"connector": "linear", "train_llm": False, "max_steps": 1, "batch_size": 2}
        train(work, run, 1, {**flags, "datasets": "train"}, space)
    if "aligned" in read_meta(final):
        return final
    vlm, tokenizer, meta = load_final(final)
    features, names, _ = features_of(work, "train", space)
    words = vlm.language.get_input_embeddings().weight.detach().numpy()
    known = {name: number for number, name in enumerate(dict.fromkeys(names))}
    places = np.stack([words[encode_text(tokenizer, name)].mean(0) for name in known])
    weight, bias = classifier(features.mean(1), [known[name] for name in names], places)
    with torch.no_grad():
        vlm.connector.weight.copy_(torch.from_numpy(weight.T.copy()))
        vlm.connector.bias.copy_(torch.from_numpy(bias))
    written = ("format", "template", "vision_width", "files")  # by save_final itself
    kept = {key: value for key, value in meta.items() if key not in written}
    save_final(final, vlm, tokenizer, kept | {"aligned": True})
    return final


def evaluate(
    work: Work,
    run: str,
    dataset: str,
    *,
    stage: int | None = None,
    blind: bool = False,
    limit: int = 100_000,
) -> list[dict[str, Any]]:
    """Ask a run the questions of a data set; return the answers, with `task` by question.

    The data set is not held out by key: with held_out 0 all of it is in the split `train`, though nobody
    trained on it.
    """
    flags = {
        "run": work.folder / run,
        "stage": stage,
        "features": work.folder / "cache",
        "datasets": dataset,
        "split": "train",
        "max_new_tokens": LONGEST,
        "blind": blind,
        "metric": "exact",
        "limit": limit,
    }
    work.run("train.evaluate", flags)
    finished = stage or max(int(path.name[5:]) for path in (work.folder / run).glob("stage*"))
    saved = work.folder / run / f"stage{finished}" / "evaluation-train.json"
    answers: list[dict[str, Any]] = json.loads(saved.read_text(encoding="utf-8"))["answers"]
    for one in answers:
        one["question"] = one["question"].removeprefix("<image>").strip()
        one["task"] = task_of(one["question"])
    saved.rename(saved.with_name(f"evaluation-{dataset}.json"))
    return answers


def task_of(question: str) -> str:
    """Return what a question asks, with or without the mark of an image."""
    return TASKS[question.removeprefix("<image>").strip()]


def ask(work: Work, space: str, *, fast: bool) -> tuple[list[Question], list[str]]:
    """Ask the main run about every test drawing, from the features of a space.

    `train.evaluate` takes only the space that a run was trained on.

    Args:
        work: the proof.
        space: fp16, or converted from it.
        fast: in bfloat16 where training was; else in float32.
    """
    reader = open_reader(work.folder / "cache", space, RemoteOptions(), datasets=["test"])
    root = cache_root(reader)
    samples = join(root, reader, {"test": None}, split="train", held_out=0.0, min_coverage=0.0)
    vlm, tokenizer, _ = load_final(find_run(str(work.folder / MAIN), None))
    asked = list(questions(root, samples))
    prompts = [(q.prompt, read_features(samples, q.media, reader)) for q in asked]
    fast = fast and native_dtype(torch.device("cpu")) == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=fast):
        return asked, answer(vlm, tokenizer, prompts, max_new_tokens=LONGEST)


# ---- results of the main run


def features_of(work: Work, dataset: str, space: str) -> tuple[Any, list[str], list[str]]:
    """Return the features of a data set's drawings, (D, M, V) float32, their names and subcategories."""
    data = work.folder / "data"
    records = json.loads((data / f"{dataset}.json").read_text(encoding="utf-8"))
    answers: dict[str, dict[str, str]] = {}
    for one in records:
        asked, told = (turn["value"] for turn in one["conversations"])
        task = task_of(asked)
        answers.setdefault(one["image"], {})[task] = told
    keys = [hashlib.sha256((data / image).read_bytes()).hexdigest() for image in answers]
    reader = FeatureReader(CacheRoot(work.folder / "cache").space(space))
    features = np.stack([reader.read("image", key) for key in keys]).astype(np.float32)
    return (
        features,
        [a[CONCEPT] for a in answers.values()],
        [a[KIND_TASK] for a in answers.values()],
    )


def ceilings(work: Work, dataset: str, space: str) -> dict[str, float]:
    """Return how often the nearest training drawing has the right name, and the right subcategory."""
    known, names, kinds = features_of(work, "train", space)
    asked, wanted_names, wanted_kinds = features_of(work, dataset, space)
    found = nearest(known, asked)
    return {
        CONCEPT: float(np.mean([names[i] == w for i, w in zip(found, wanted_names, strict=True)])),
        KIND_TASK: float(
            np.mean([kinds[i] == w for i, w in zip(found, wanted_kinds, strict=True)])
        ),
    }


def score_main(work: Work, space: str) -> dict[str, Any]:
    """Score the main run on the test drawings, with its ceilings and the blind figures."""
    answers = evaluate(work, MAIN, "test", blind=True)
    validation = by_task(evaluate(work, MAIN, "validation"))
    top, right, blind = (
        ceilings(work, "test", space),
        by_task(answers),
        by_task(answers, "blind_correct"),
    )
    kinds = [a["expected"] for a in answers if a["task"] == KIND_TASK]
    most_blind = {CONCEPT: 0.02, KIND_TASK: base_rate(kinds)}
    lines = []
    for task in (KIND_TASK, CONCEPT):
        share = right[task] / top[task]
        lines += [
            Line(
                f"{task}: exact match / nearest neighbour",
                f"{share:.2f} ({right[task]:.3f} / {top[task]:.3f})",
                f">= {NEEDED[task]}",
                share >= NEEDED[task],
            ),
            Line(
                f"{task}: blind, other drawings shown",
                f"{blind[task]:.3f}",
                f"<= {most_blind[task]:.3f}",
                blind[task] <= most_blind[task],
            ),
            Line(f"{task}: on validation", f"{validation[task]:.3f}", ""),
        ]
    return {"answers": answers, "ceilings": top, "lines": [as_json(line) for line in lines]}


def text_alone(work: Work, space: str) -> dict[str, Any]:
    """Train on the questions without drawings, and score on them: what text alone gives.

    Without a drawing, every question of a kind is the same prompt, and has the same answer.
    """
    run = "text-alone"
    train(work, run, 1, {"connector": "linear", **work.recipe["text_alone"]}, space)
    vlm, tokenizer, _ = load_final(find_run(str(work.folder / run), None))
    prompts = [([("user", question, 1.0)], None) for question in TASKS]
    told = answer(vlm, tokenizer, prompts, max_new_tokens=LONGEST)
    shutil.rmtree(work.folder / run)
    records = json.loads((work.folder / "data" / "blindfold.json").read_text(encoding="utf-8"))
    right = shares(records, dict(zip(TASKS, told, strict=True)))
    lines = [Line(f"{task}: trained on text alone", f"{right[task]:.3f}", "") for task in right]
    return {"told": told, "lines": [as_json(line) for line in lines]}


def shares(records: Sequence[dict[str, Any]], answers: Mapping[str, str]) -> dict[str, float]:
    """Return by task how often the one answer to each question is right, of LLaVA records."""
    right: dict[str, list[bool]] = {}
    for record in records:
        asked, expected = (turn["value"] for turn in record["conversations"])
        right.setdefault(task_of(asked), []).append(is_equal(expected, answers[asked]))
    return {task: float(np.mean(each)) for task, each in right.items()}


# ---- English


def english(work: Work, without_text: float) -> dict[str, Any]:
    """Measure what training has done to the language model's English.

    `without_text`: perplexity of the short training without text.
    """
    chapters = {
        stage: english_perplexity(work, MAIN if stage else None, stage) for stage in (0, 1, 2)
    }
    addresses = [english_perplexity(work, run, 2, "addresses") for run in (None, MAIN)]

    def line(name: str, figure: float, before: float, required: bool = False) -> Line:
        change = figure / before - 1
        need = "<= +5 %" if required else ""
        return Line(name, f"{figure:.2f} ({change:+.1%})", need, change <= 0.05)

    frozen, mixed = "after stage 1, language model frozen", "after stage 2, text mixed in"
    lines = [
        Line("English: perplexity of held-out chapters, before", f"{chapters[0]:.2f}", ""),
        line(f"English: {frozen}", chapters[1], chapters[0], required=True),
        line(f"English: {mixed}", chapters[2], chapters[0], required=True),
        line("English: a training without text", without_text, chapters[0]),
        Line("English of another kind, before", f"{addresses[0]:.2f}", ""),
        line(f"English of another kind: {mixed}", addresses[1], addresses[0]),
    ]
    return {"lines": [as_json(line) for line in lines]}


def english_perplexity(work: Work, run: str | None, stage: int, kind: str = "chapters") -> float:
    """Return the perplexity of held-out texts under a run's language model; of None, untrained.

    Args:
        work: the proof.
        run: a folder of the proof.
        stage: of the run.
        kind: of the texts: `chapters` of the book that is trained on, or `addresses`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = work.folder / "models" / "language"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    saved = (work.folder / "data" / "texts.json").read_text(encoding="utf-8")
    texts = json.loads(saved)[kind]
    each = work.recipe["perplexity_tokens"] // len(texts)
    ids = [tokenizer(text, return_tensors="pt").input_ids[0][:each] for text in texts]
    if run is None:
        language = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return _perplexity(language, ids)
    vlm, _, _ = load_final(find_run(str(work.folder / run), stage))
    with generation_mode(vlm):
        return _perplexity(vlm.language, ids)


@torch.inference_mode()
def _perplexity(language: Any, texts: Sequence[torch.Tensor]) -> float:
    losses: list[float] = []
    for window in (window for ids in texts for window in ids.split(WINDOW)):
        logits = language(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        losses += torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").tolist()
    return perplexity(losses)
