"""The tables and verdicts of `model.verify`: what each stage needs on each kind of machine.

    step = step_of(on_hardware(stage, "2x40gb", preset), "2x40gb")
    print(memory_table(sizes, image_tokens, plan))

Every figure is an estimate (memory.py), not a measurement.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

import configs
from configs.console import table_text
from configs.hardware import Card, card_of, gpus_of, on_hardware, one_card
from model.language.model import load_language
from model.verify.memory import (
    GIB,
    USABLE,
    Sizes,
    Step,
    sample_flops,
    sizes_of,
    stage_days,
    state_bytes,
    step_bytes,
)
from model.verify.tail import TailSizes

MODELS = {
    "Qwen3-0.6B": "random:qwen3-0.6b",
    "Qwen3-1.7B": "random:qwen3-1.7b",
    "Qwen2.5-0.5B": "random:qwen2.5-0.5b",
}
"""Language models of the table -> their sizes, without weights."""
RANK = 16
"""Rank of the adapters in `settings_table`."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the columns of days assume."""

    mfu: float
    """Share of the GPUs' peak that becomes model arithmetic."""
    text_tokens: int
    """Tokens of question and answer in a sample."""


# ---- settings


def step_of(settings: Mapping[str, Any], hardware: str) -> Step:
    """Return the step that the settings of a stage on a hardware preset describe.

    A micro-batch holds at least one whole window, so the longer of the two limits counts.
    """
    processes = gpus_of(hardware) or 1
    return Step(
        tokens=max(settings["max_tokens"], settings["max_sequence_length"]),
        checkpointing=settings["use_gradient_checkpointing"],
        gpu=card_of(hardware) is not None,
        train_connector=settings["train_connector"],
        train_llm=settings["train_llm"],
        lora=settings.get("lora", 0),
        load_in_4bit=settings.get("load_in_4bit", False),
        processes=processes,
        parts=processes if settings.get("shard", "none") != "none" else 1,
        offload=settings.get("offload", False),
    )


def all_settings() -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield every stage and hardware preset, with the settings of that stage on it."""
    train = configs.load("train")
    for number, stage in train["stages"].items():
        for name, preset in train["hardware"].items():
            yield number, name, on_hardware(stage, name, preset)


def card_text(hardware: str) -> str:
    """Return the card or cards of a hardware preset, or "this machine"."""
    card, gpus = card_of(hardware), gpus_of(hardware)
    if card is None:
        return "this machine"
    return f"{gpus} x {card.name}" if gpus else card.name


def fits(hardware: str, total: int) -> bool:
    """Return whether `total` bytes of one process fit a card of a hardware preset, or this machine."""
    card = card_of(hardware)
    if card is None:
        return total < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total <= USABLE * card.gib * GIB


@functools.cache
def known_sizes(source: str, connector: str, vision_width: int) -> Sizes:
    """Return the sizes of an untrained language model with a connector, without its weights."""
    from model.connector import build_connector

    language = load_language(source, device="meta")[0]
    width = language.get_input_embeddings().embedding_dim
    with torch.device("meta"):
        joined = build_connector(connector, vision_width, width)
    counts = (sum(p.numel() for p in part.parameters()) for part in (language, joined))
    return sizes_of(language.config, *counts)


# ---- tables


def memory_table(sizes: Sizes, image_tokens: int, plan: Plan) -> str:
    """Return a table of each stage on each hardware preset: GiB of each part, whether they fit, and days."""
    rows, columns = [], []
    for number, name, settings in all_settings():
        step = step_of(settings, name)
        needed = step_bytes(sizes, step)
        columns = [part.replace(" ", "-") for part in needed]
        card = card_of(name)
        days = ""
        if (fit := fits(name, needed["total"])) and card is not None:
            days = _days(card, settings, sizes, image_tokens, plan)
        rows.append(
            [f"stage {number}", name, f"{step.tokens:,}", how_text(step)]
            + [f"{nbytes / GIB:.1f}" for nbytes in needed.values()]
            + [card_text(name) if fit else f"NOT {card_text(name)}", days]
        )
    header = ["GiB", "hardware", "tokens", "how", *columns, "fits"]
    header.append("days: an image, full window")
    return table_text(header, rows, right=" ".join(["tokens", *columns]))


def how_text(step: Step) -> str:
    """Return what of a step saves memory: `recompute` is checkpointing, `/4` a model divided by four."""
    words = [
        "recompute" if step.checkpointing else "",
        f"LoRA {step.lora}" if step.lora else "",
        "4 bit" if step.load_in_4bit else "",
        f"/{step.parts}" if step.parts > 1 else "",
        "offload" if step.offload else "",
    ]
    return ", ".join(filter(None, words)) or "-"


def models_table(connector: str, vision_width: int, tail: TailSizes | None = None) -> str:
    """Return a table of the usual language models: parameters, and GiB of each stage on each preset."""
    rows, names = [], list(configs.load("train")["hardware"])
    for model, source in MODELS.items():
        sizes = replace(known_sizes(source, connector, vision_width), tail=tail)
        for stage in configs.load("train")["stages"]:
            cells = [model, f"{sizes.language:,}", f"stage {stage}"]
            rows.append([*cells, *(estimate_text(sizes, stage, name) for name in names)])
    return table_text(
        ["GiB", "parameters", "", *names], rows, right=" ".join(["parameters", *names])
    )


def tail_text(sizes: Sizes, frames: TailSizes, hardware: str) -> str:
    """Return lines about the tail: its parameters, and GiB of each stage with images and with frames alone.

    Args:
        sizes: with a tail of images.
        frames: the same blocks, with the tokens of a video frame.
        hardware: preset of configs/train.yaml.
    """
    tail = sizes.tail
    assert tail is not None
    stages = configs.load("train")["stages"]
    said = (
        f"tail: {tail.trained} of {tail.blocks} blocks train (--train-vision-blocks {tail.trained}), "
        f"{tail.trainable:,} of {tail.parameters:,} parameters; all estimates include them"
    )
    for name, one in (("images", tail), ("video frames", frames)):
        larger = replace(sizes, tail=one)
        gib = " / ".join(estimate_text(larger, stage, hardware) for stage in stages)
        said += (
            f"\nGiB in stages {' / '.join(map(str, stages))} on {hardware}, if micro-batches are full of "
            f"{name}, each {one.stored} tokens as stored and {one.seen} behind the tail: {gib}"
        )
    return said


def estimate_text(sizes: Sizes, stage: int, hardware: str) -> str:
    """Return the estimate of a stage on a hardware preset, GiB; in brackets if it does not fit."""
    settings = next(s for n, name, s in all_settings() if (n, name) == (stage, hardware))
    total = step_bytes(sizes, step_of(settings, hardware))["total"]
    text = f"{total / GIB:.1f}"
    return text if fits(hardware, total) else f"({text})"


def settings_table(sizes: Sizes, hardware: str) -> str:
    """Return a table of what single settings change on a hardware preset: GiB of each stage.

    With `--offload` the last column has what the CPU's memory holds instead.
    """
    steps = {n: step_of(s, name) for n, name, s in all_settings() if name == hardware}
    gpu = all(step.gpu for step in steps.values())
    given = {"as the preset says": dict[str, Any]()}
    given |= {
        "--use-gradient-checkpointing": {"checkpointing": True},
        "--no-use-gradient-checkpointing": {"checkpointing": False},
        "--no-train-llm": {"train_llm": False, "lora": 0},
        f"--lora {RANK}": {"lora": RANK},
        "--lora 0": {"lora": 0},
    }
    for count in (2, 4):
        shared = {"processes": count, "parts": count}
        given[f"{count} processes, --shard full"] = shared
    if gpu:
        given["--offload"] = {"offload": True}
        given[f"--lora {RANK} --offload"] = {"lora": RANK, "offload": True}
    rows = []
    for name, changes in given.items():
        changed = [replace(step, **changes) for step in steps.values()]
        if changes and changed == list(steps.values()):
            continue  # the preset has it
        cells = [f"{step_bytes(sizes, step)['total'] / GIB:.1f}" for step in changed]
        held = max(sum(state_bytes(sizes, step).values()) for step in changed)
        rows.append([name, *cells, f"{held / GIB:.1f}" if changed[0].offload else ""])
    stages = [f"stage-{n}" for n in steps]
    header = [f"GiB, {hardware}", *stages, "CPU's"]
    return table_text(header, rows, right=" ".join(header[1:]))


# ---- verdicts


def memory_verdicts(device: torch.device, sizes: Sizes) -> list[str]:
    """Return one verdict for the GPU `device`, or one for each kind of machine if it is not a CUDA GPU."""
    if device.type == "cuda":
        found_card = torch.cuda.get_device_properties(device)
        gib = found_card.total_memory / GIB
        text = f"this GPU ({found_card.name}, {gib:.1f} GiB)"
        return [memory_verdict(text, gib, one_card(found_card.total_memory), sizes)]
    found = []
    for name in configs.load("train")["hardware"]:
        if (card := card_of(name)) is not None:
            gpus = f"{count} GPUs" if (count := gpus_of(name)) else "a GPU"
            text = f"{gpus} of {card.gib} GB ({card_text(name)})"
            found.append(memory_verdict(text, USABLE * card.gib, name, sizes))
    return found


def memory_verdict(card: str, usable_gib: float, preset: str, sizes: Sizes) -> str:
    """Say in one line whether every stage fits a GPU, and which setting decides.

    Args:
        card: name of the GPU in the line.
        usable_gib: memory that a process can use on it, GiB.
        preset: hardware preset (configs/train.yaml) that the stages run with.
        sizes: of language model and connector.
    """
    settings = {n: s for n, name, s in all_settings() if name == preset}
    bytes_of = {n: step_bytes(sizes, step_of(s, preset)) for n, s in settings.items()}
    worst = max(bytes_of, key=lambda stage: bytes_of[stage]["total"])
    fixed = ("weights", "gradients", "AdamW", "bf16 copies", "gathered", "process")
    if sum(bytes_of[worst][part] for part in fixed) > usable_gib * GIB:
        decides = "train_llm"  # no window, however short, would help
    else:
        decides = max(("max_tokens", "max_sequence_length"), key=settings[worst].__getitem__)
    fitting = [n for n, parts in bytes_of.items() if parts["total"] <= usable_gib * GIB]
    fit = "Fits" if len(fitting) == len(bytes_of) else "Does NOT fit"
    others = f"; stages that fit: {', '.join(map(str, fitting)) or 'none'}"
    lora = f" with --lora {rank}" if (rank := settings[worst].get("lora", 0)) else ""
    return (
        f"{fit} {card}{lora}: an estimated {bytes_of[worst]['total'] / GIB:.1f} GiB in stage {worst}, "
        f"decided by {decides}: {settings[worst][decides]}{'' if fit == 'Fits' else others}"
    )


def _days(
    card: Card, settings: Mapping[str, Any], sizes: Sizes, image_tokens: int, plan: Plan
) -> str:
    """Return the days if every sample is one image with its text, and if every sample fills the window."""
    samples = settings["batch_size_per_gpu"] * settings["gradient_accumulation_steps"]
    window = settings["max_sequence_length"]
    whole = settings["train_llm"] and not settings.get("lora", 0)
    of_row = sizes.tail.row_flops() if sizes.tail else 0.0
    days = [
        stage_days(
            samples * (sample_flops(sizes, tokens, plan.text_tokens, whole) + rows * of_row),
            settings["max_steps"],
            card.tflops,
            plan.mfu,
        )
        for tokens, rows in (
            (min(window, image_tokens + plan.text_tokens), 1),
            (window, window // image_tokens),
        )
    ]
    return f"{days[0]:.1f}, {days[1]:.1f}"
