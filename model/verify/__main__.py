"""Load everything once, and say what training it takes: parameters, memory, days.

python -m model.verify                                           # CLIP ViT-L/14@336, Qwen3-0.6B
python -m model.verify --random-weights                          # these sizes, nothing downloaded
python -m model.verify --encoder demo --llm random:qwen3-demo    # seconds, on any machine

Memory and days are arithmetic (model/memory.py), not measurements; parameters are counted, and one
image really passes through encoder, connector and language model. Exits with 1 when a GPU is in the
machine but torch cannot use it, or the pieces do not work together.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

import configs
from configs import UserError
from model.attention.batch import PackedBatch
from model.attention.kernels import cuda_kernel
from model.generate import live_features
from model.io.device import pick_device
from model.language.chat_template import tokenize_messages
from model.language.tokenizer import IMAGE_TOKEN, token_id
from model.verify.memory import (
    GIB,
    USABLE,
    Sizes,
    Step,
    sample_flops,
    sizes_of,
    stage_days,
    step_bytes,
)
from model.vision.config import encoder_config
from model.vision.encoder import VisionEncoder, load_encoder
from model.vlm import VLM, build_vlm, parameter_counts

PROG = "python -m model.verify"

GPUS = {
    "24gb": ("RTX 4090", 24, 165.2),
    "40gb": ("A100-40", 40, 312.0),
    "80gb": ("A100-80", 80, 312.0),
}
"""Hardware preset -> a card of that size, its memory in GiB, its dense bfloat16 peak in TFLOP/s (vendor)."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Load everything once, and say what training it takes."""

    encoder: str = "clip-vit-l14-336"
    """An entry of configs/encoders.yaml."""
    llm: str | None = None
    """Hub id, folder, or `random:qwen3-0.6b`; configs/model.yaml's when not given."""
    connector: Literal["linear", "mlp"] | None = None
    """configs/model.yaml's when not given."""
    random_weights: bool = False
    """Untrained weights of the same sizes: nothing is downloaded."""
    weights: str | None = None
    """File or folder of the encoder's weights."""
    device: str = "auto"
    """Where the encoder runs: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    gpus: int = 4
    """For the days: GPUs that train together."""
    mfu: float = 0.35
    """For the days: share of the GPUs' peak that becomes model arithmetic."""
    text_tokens: int = 100
    """For the days: tokens of question and answer in a sample, all taken as supervised."""

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.text_tokens < 1:
            raise ValueError("gpus and text_tokens must be at least 1")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu {self.mfu} is not between 0 and 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report."""
    options = configs.parse(Options, argv, prog=PROG)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    problem = ""
    try:
        device = pick_device(options.device)
        print(describe_device(device))
    except UserError as error:
        if options.device != "auto":
            raise
        device, problem = torch.device("cpu"), str(error)
        print(f"GPU: not usable: {problem}")
    encoder, vlm, passed = load_all(options, device)
    print("\n" + parameter_table(encoder, vlm))
    sizes = sizes_of(
        vlm.language.config,
        language=parameter_counts(vlm)["language"][1],
        connector=parameter_counts(vlm)["connector"][1],
    )
    image = encoder.spec("fp16").tokens("image")
    for number, stage in configs.load("train")["stages"].items():
        print("\n" + stage_report(int(number), stage, sizes, image, options))
    print(
        "\nArithmetic, not measured (model/memory.py): GiB at the worst moment of a step, on each GPU;\n"
        f"days on {options.gpus} GPUs at MFU {options.mfu:g}, if every sample is one image and "
        f"{options.text_tokens} tokens of text, and if every sample fills the window."
    )
    return 1 if problem or not passed else 0


def describe_device(device: torch.device) -> str:
    """One line about where things run here."""
    if device.type != "cuda":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        place = "Metal GPU" if device.type == "mps" else "CPU, no GPU here"
        return f"device: {device} ({place}), {memory:.1f} GiB of memory"
    properties = torch.cuda.get_device_properties(device)
    kernel = cuda_kernel()
    attention = f"attention by {kernel.__module__}" if kernel else "attention by padded SDPA"
    return (
        f"device: {device} ({properties.name}), {properties.total_memory / GIB:.1f} GiB, usable; "
        f"bfloat16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}; {attention}"
    )


def load_all(options: Options, device: torch.device) -> tuple[VisionEncoder, VLM, bool]:
    """Encoder, and connector with language model on the CPU; whether an image passes through all."""
    defaults = configs.load("model")
    source = options.llm or ("random:qwen3-0.6b" if options.random_weights else defaults["llm"])
    encoder = load_encoder(
        encoder_config(options.encoder),
        device=str(device),
        random_weights=options.random_weights,
        weights=options.weights,
    )
    spec = encoder.spec("int8")
    kind = options.connector or defaults["connector"]
    vlm, tokenizer = build_vlm(spec.width, source, kind, seed=0)
    y, x = np.mgrid[0:90, 0:120]
    drawing = Image.fromarray(np.stack([x * 2, y * 2, x + y], axis=2).astype(np.uint8))
    features = live_features(encoder, {"spec": spec.to_json()}, [drawing])
    sample = tokenize_messages(
        tokenizer, [("user", "What is it?", 1.0), ("assistant", "A drawing.", 1.0)], images=1
    )
    image = token_id(tokenizer, IMAGE_TOKEN)
    ids = torch.from_numpy(sample.ids).long()
    repeats = torch.where(ids == image, features.shape[1], 1)
    with torch.inference_mode():
        total, weight = vlm.loss(
            PackedBatch.one_sample(
                ids.repeat_interleave(repeats),
                torch.from_numpy(sample.weights).repeat_interleave(repeats),
                image,
            ),
            features.cpu(),
        )
    mean = float(total / weight)
    rows = vlm.language.get_input_embeddings().weight.shape[0]
    print(
        f"one image, {features.shape[1]} x {features.shape[2]} features, through everything: "
        f"loss {mean:.3f} (guessing among {rows:,} words: {math.log(rows):.3f})"
        + ("" if math.isfinite(mean) else ": NOT finite")
    )
    return encoder, vlm, math.isfinite(mean)


def parameter_table(encoder: VisionEncoder, vlm: VLM) -> str:
    """Parameters of each part, and what of them learns in each stage."""
    stages = configs.load("train")["stages"]
    lines = [f"{'':16}{'parameters':>15}" + "".join(f"{f'stage {k}':>15}" for k in stages)]
    lines.append(f"{'vision encoder':16}{encoder.parameters:15,}" + f"{'frozen':>15}" * len(stages))
    sums = [encoder.parameters, *(0 for _ in stages)]
    for part, key in (("connector", "train_connector"), ("language", "train_llm")):
        total = parameter_counts(vlm)[part][1]
        learns = [total if stage[key] else 0 for stage in stages.values()]
        sums = [a + b for a, b in zip(sums, (total, *learns), strict=True)]
        cells = "".join(f"{n:15,}" if n else f"{'frozen':>15}" for n in learns)
        lines.append(f"{part:16}{total:15,}{cells}")
    lines.append(f"{'all':16}" + "".join(f"{n:15,}" for n in sums))
    lines.append(
        f"of the vision encoder {encoder.parameters_used:,} are computed with, when encoding; "
        "the trainer never loads it"
    )
    return "\n".join(lines)


def stage_report(
    number: int, stage: Mapping[str, Any], sizes: Sizes, image: int, options: Options
) -> str:
    """Memory of one stage on each hardware preset, whether it fits, and how long it takes."""
    columns = (
        "weights",
        "gradients",
        "AdamW",
        "bf16 copies",
        "activations",
        "loss",
        "process",
        "total",
    )
    lines = [
        f"{f'stage {number}: GiB':20}"
        + "".join(f"{c:>{len(c) + 2}}" for c in ("tokens", *columns))
        + f"  {'fits':18}  days: an image, full window"
    ]
    for name, hardware in configs.load("train")["hardware"].items():
        merged = {**stage, **hardware}
        step = step_of(merged, gpu=name in GPUS)
        parts = step_bytes(sizes, step)
        cells = "".join(f"{parts[c] / GIB:{len(c) + 2}.1f}" for c in columns)
        label = f"  {name}{' checkpointing' if step.checkpointing else ''}"
        place, fits = _fits(name, parts["total"])
        days = _days(name, merged, sizes, image, options) if fits and name in GPUS else ""
        verdict = f"{'' if fits else 'NOT '}{place}"
        lines.append(f"{label:20}{step.tokens:8,}{cells}  {verdict:18}  {days}".rstrip())
    return "\n".join(lines)


def step_of(settings: Mapping[str, Any], gpu: bool) -> Step:
    """A stage's and a hardware preset's values as a step; the window is the least a micro-batch holds."""
    return Step(
        tokens=max(settings["max_tokens"], settings["max_sequence_length"]),
        checkpointing=settings["use_gradient_checkpointing"],
        autocast=gpu,
        gpu=gpu,
        train_connector=settings["train_connector"],
        train_llm=settings["train_llm"],
    )


def _fits(name: str, total: int) -> tuple[str, bool]:
    """The card (or this machine) that a hardware preset is for, and whether `total` bytes fit it."""
    if name not in GPUS:
        return "this machine", total < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    card, gib, _ = GPUS[name]
    return card, total <= USABLE * gib * GIB


def _days(
    name: str, settings: Mapping[str, Any], sizes: Sizes, image: int, options: Options
) -> str:
    """Days if every sample is one image and its text, and if every sample fills the window."""
    samples = settings["batch_size_per_gpu"] * settings["gradient_accumulation_steps"]
    window = settings["max_sequence_length"]
    days = [
        stage_days(
            samples * sample_flops(sizes, tokens, options.text_tokens, settings["train_llm"]),
            settings["max_steps"],
            GPUS[name][2],
            options.mfu,
        )
        for tokens in (min(window, image + options.text_tokens), window)
    ]
    return f"{days[0]:.1f}, {days[1]:.1f}"


if __name__ == "__main__":
    configs.command(main)
