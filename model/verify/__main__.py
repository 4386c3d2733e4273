"""Load every part once and report parameters, memory, days and disk space.

python -m model.verify                                           # CLIP ViT-L/14@336, Qwen3-0.6B
python -m model.verify --random-weights                          # these sizes, nothing downloaded
python -m model.verify --encoder demo --llm random:qwen3-demo    # seconds, on any machine

Parameters are counted, and one image passes through encoder, connector and language model. Memory, days
and disk space are estimates (model/verify/memory.py), not measurements. The last lines are verdicts: whether
training fits the GPU, or each usual size of GPU where there is none, and whether features fit the disk.
The exit code is 1 when the machine has a GPU that torch cannot use, or when the parts do not work together.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

import configs
from cache.format.codec import CODECS
from configs import UserError
from configs.console import bytes_text, free_bytes, table_text
from model.attention.batch import PackedBatch
from model.attention.kernels import cuda_kernel
from model.generate import live_features
from model.io.device import hardware_preset, pick_device
from model.language.chat_template import tokenize_messages
from model.language.tokenizer import image_id
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

CARD_GIB = (16, 24, 40, 80)
"""GPU sizes that get a verdict on a machine without a GPU."""

PIXMO_CAP_IMAGES = 717_000
"""Rows of allenai/pixmo-cap, the largest image set of stage 1: the measure for disk space."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Load every part once and report parameters, memory, days and disk space."""

    encoder: str = "clip-vit-l14-336"
    """An entry of configs/encoders.yaml, or hf:FOLDER."""
    llm: str | None = None
    """Hub id, folder, or `random:qwen3-0.6b`; when not given, the one in configs/model.yaml."""
    connector: Literal["linear", "mlp"] | None = None
    """Kind of connector; when not given, the one in configs/model.yaml."""
    random_weights: bool = False
    """Use untrained weights of the same sizes: nothing is downloaded."""
    weights: str | None = None
    """File or folder of the encoder's weights."""
    device: str = "auto"
    """Where the encoder runs: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    features: Path = Path("cache")
    """For the disk space: where the feature cache is or will be."""
    codec: Literal["int8", "int4", "fp16"] = "int8"
    """For the disk space: how rows are stored."""
    gpus: int = 4  # configs/train.yaml counts its batches for 4
    """For the days: GPUs that train together."""
    mfu: float = 0.35
    """For the days: share of the GPUs' peak that becomes model arithmetic."""
    text_tokens: int = 100
    """For the days: tokens of question and answer in a sample; all count as supervised."""

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
    counts = {part: total for part, (_, total) in parameter_counts(vlm).items()}
    sizes = sizes_of(vlm.language.config, **counts)
    image_tokens = encoder.spec(options.codec).tokens("image")
    print("\n" + memory_table(sizes, image_tokens, options))
    print(
        "\nEstimates, not measurements (model/verify/memory.py): GiB at the peak of a step, on each\n"
        f"GPU; days on {options.gpus} GPUs at MFU {options.mfu:g}, if every sample is one image and "
        f"{options.text_tokens} tokens of text,\nand if every sample fills the window."
    )
    print("\n" + "\n".join([*memory_verdicts(device, sizes), disk_verdict(encoder, options)]))
    return 1 if problem or not passed else 0


def describe_device(device: torch.device) -> str:
    """Describe the device in one line: name, memory and, on CUDA, the attention kernel."""
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
    """Load all parts and pass one image through them.

    Returns:
        The encoder on `device`, connector and language model on the CPU, and whether the loss is finite.
    """
    defaults = configs.load("model")
    source = options.llm or ("random:qwen3-0.6b" if options.random_weights else defaults["llm"])
    encoder = load_encoder(
        encoder_config(options.encoder),
        device=str(device),
        random_weights=options.random_weights,
        weights=options.weights,
    )
    spec = encoder.spec(options.codec)
    kind = options.connector or defaults["connector"]
    vlm, tokenizer = build_vlm(spec.width, source, kind, seed=0)
    y, x = np.mgrid[0:90, 0:120]
    drawing = Image.fromarray(np.stack([x * 2, y * 2, x + y], axis=2).astype(np.uint8))
    features = live_features(encoder, {"spec": spec.to_json()}, [drawing])
    sample = tokenize_messages(
        tokenizer, [("user", "What is it?", 1.0), ("assistant", "A drawing.", 1.0)], media=1
    )
    image = image_id(tokenizer)
    repeats = np.where(sample.ids == image, features.shape[1], 1)
    ids, weights = (torch.from_numpy(x.repeat(repeats)) for x in (sample.ids, sample.weights))
    with torch.inference_mode():
        batch = PackedBatch.one_sample(ids.long(), weights, image)
        total, weight = vlm.loss(batch, features.cpu())
    mean = float(total / weight)
    rows = vlm.language.get_input_embeddings().weight.shape[0]
    print(
        f"one image, {features.shape[1]} x {features.shape[2]} features, through everything: "
        f"loss {mean:.3f} (guessing among {rows:,} words: {math.log(rows):.3f})"
        + ("" if math.isfinite(mean) else ": NOT finite")
    )
    return encoder, vlm, math.isfinite(mean)


def memory_verdicts(device: torch.device, sizes: Sizes) -> list[str]:
    """Return one verdict for the GPU `device`, or one for each of `CARD_GIB` if it is not a CUDA GPU."""
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        gib = card.total_memory / GIB
        name = f"this GPU ({card.name}, {gib:.1f} GiB)"
        return [memory_verdict(name, gib, hardware_preset(card.total_memory), sizes)]
    cards = {gib: f" ({card})" for card, gib, _ in GPUS.values()}
    return [
        memory_verdict(
            f"a GPU of {gib} GB{cards.get(gib, '')}",
            USABLE * gib,
            hardware_preset(gib * GIB),
            sizes,
        )
        for gib in CARD_GIB
    ]


def memory_verdict(card: str, usable_gib: float, preset: str, sizes: Sizes) -> str:
    """Say in one line whether every stage fits a GPU, and which setting decides.

    Args:
        card: name of the GPU in the line.
        usable_gib: memory that a process can use on it, GiB.
        preset: hardware preset (configs/train.yaml) that the stages run with.
        sizes: of language model and connector.
    """
    train = configs.load("train")
    settings = {n: {**stage, **train["hardware"][preset]} for n, stage in train["stages"].items()}
    bytes_of = {n: step_bytes(sizes, step_of(s, gpu=True)) for n, s in settings.items()}
    worst = max(bytes_of, key=lambda stage: bytes_of[stage]["total"])
    fixed = ("weights", "gradients", "AdamW", "bf16 copies", "process")
    if sum(bytes_of[worst][part] for part in fixed) > usable_gib * GIB:
        decides = "train_llm"  # no window, however short, would help
    else:
        decides = max(("max_tokens", "max_sequence_length"), key=settings[worst].__getitem__)
    fitting = [n for n, parts in bytes_of.items() if parts["total"] <= usable_gib * GIB]
    fits = "Fits" if len(fitting) == len(bytes_of) else "Does NOT fit"
    others = f"; stages that fit: {', '.join(map(str, fitting)) or 'none'}"
    return (
        f"{fits} {card}: an estimated {bytes_of[worst]['total'] / GIB:.1f} GiB in stage {worst}, decided by "
        f"{decides}: {settings[worst][decides]}{'' if fits == 'Fits' else others}"
    )


def disk_verdict(encoder: VisionEncoder, options: Options) -> str:
    """Say in one line whether the features of pixmo-cap's images fit the disk of `options.features`."""
    row_bytes = {}
    for codec in CODECS:
        with contextlib.suppress(UserError):  # a width that is not a multiple of 64 has fp16 only
            row_bytes[codec] = encoder.spec(codec).row_bytes("image")
    sizes = {codec: PIXMO_CAP_IMAGES * nbytes for codec, nbytes in row_bytes.items()}
    free = free_bytes(options.features.expanduser())
    fits = "Fits" if sizes[options.codec] <= free else "Does NOT fit"
    texts = [f"{bytes_text(nbytes)} in {codec}" for codec, nbytes in sizes.items()]
    return (
        f"{fits} the disk of {options.features} ({bytes_text(free)} free) in {options.codec}: the "
        f"{PIXMO_CAP_IMAGES:,} images of pixmo-cap take an estimated {', '.join(texts)}; "
        f"100 GB hold {int(100e9 / row_bytes[options.codec]):,} images in {options.codec}"
    )


def parameter_table(encoder: VisionEncoder, vlm: VLM) -> str:
    """Return a table of the parameters of each part and of those that train in each stage."""
    stages = configs.load("train")["stages"]
    lines = [f"{'':16}{'parameters':>15}" + "".join(f"{f'stage {k}':>15}" for k in stages)]
    lines.append(f"{'vision encoder':16}{encoder.parameters:15,}" + f"{'frozen':>15}" * len(stages))
    sums = [encoder.parameters, *(0 for _ in stages)]
    for part, key in (("connector", "train_connector"), ("language", "train_llm")):
        total = parameter_counts(vlm)[part][1]
        trainable = [total if stage[key] else 0 for stage in stages.values()]
        sums = [a + b for a, b in zip(sums, (total, *trainable), strict=True)]
        cells = "".join(f"{n:15,}" if n else f"{'frozen':>15}" for n in trainable)
        lines.append(f"{part:16}{total:15,}{cells}")
    lines.append(f"{'all':16}" + "".join(f"{n:15,}" for n in sums))
    lines.append(
        f"encoding uses {encoder.parameters_used:,} of the vision encoder's parameters; "
        "the trainer never loads it"
    )
    return "\n".join(lines)


def memory_table(sizes: Sizes, image_tokens: int, options: Options) -> str:
    """Return a table of each stage on each hardware preset: GiB of each part, whether they fit, and days."""
    train = configs.load("train")
    rows, columns = [], []
    for number, stage in train["stages"].items():
        for name, hardware in train["hardware"].items():
            settings = {**stage, **hardware}
            step = step_of(settings, gpu=name in GPUS)
            needed = step_bytes(sizes, step)
            columns = [part.replace(" ", "-") for part in needed]
            card, fits = _fits(name, needed["total"])
            days = ""
            if fits and name in GPUS:
                days = _days(name, settings, sizes, image_tokens, options)
            rows.append(
                [f"stage {number}", name, f"{step.tokens:,}", "yes" if step.checkpointing else "no"]
                + [f"{nbytes / GIB:.1f}" for nbytes in needed.values()]
                + [card if fits else f"NOT {card}", days]
            )
    header = ["GiB", "hardware", "tokens", "checkpointing", *columns, "fits"]
    header.append("days: an image, full window")
    return table_text(header, rows, right=" ".join(["tokens", *columns]))


def step_of(settings: Mapping[str, Any], gpu: bool) -> Step:
    """Return the step that a stage's and a hardware preset's settings describe.

    A micro-batch holds at least one whole window, so the longer of the two limits counts.
    """
    return Step(
        tokens=max(settings["max_tokens"], settings["max_sequence_length"]),
        checkpointing=settings["use_gradient_checkpointing"],
        gpu=gpu,
        train_connector=settings["train_connector"],
        train_llm=settings["train_llm"],
    )


def _fits(name: str, total: int) -> tuple[str, bool]:
    """Return the card (or "this machine") of a hardware preset, and whether `total` bytes fit it."""
    if name not in GPUS:
        return "this machine", total < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    card, gib, _ = GPUS[name]
    return card, total <= USABLE * gib * GIB


def _days(
    name: str, settings: Mapping[str, Any], sizes: Sizes, image_tokens: int, options: Options
) -> str:
    """Return the days if every sample is one image with its text, and if every sample fills the window."""
    samples = settings["batch_size_per_gpu"] * settings["gradient_accumulation_steps"]
    window = settings["max_sequence_length"]
    days = [
        stage_days(
            samples * sample_flops(sizes, tokens, options.text_tokens, settings["train_llm"]),
            settings["max_steps"],
            GPUS[name][2],
            options.mfu,
        )
        for tokens in (min(window, image_tokens + options.text_tokens), window)
    ]
    return f"{days[0]:.1f}, {days[1]:.1f}"


if __name__ == "__main__":
    configs.command(main)
