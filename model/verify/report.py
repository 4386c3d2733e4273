"""Load every part once, and print parameters, memory, days and disk space: `report`."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

import configs
from cache.format.codec import CODECS
from cache.format.spec import FeatureSpec
from configs import UserError, nearest
from configs.console import bytes_text, free_bytes
from configs.hardware import one_card
from model.attention.batch import PackedBatch
from model.attention.kernels import cuda_kernel
from model.generate.live import live_features
from model.io.device import pick_device
from model.language.chat_template import tokenize_messages
from model.language.tokenizer import image_id
from model.verify.memory import GIB, sizes_of
from model.verify.options import Options
from model.verify.tables import (
    RANK,
    Plan,
    memory_table,
    memory_verdicts,
    models_table,
    settings_table,
    tail_text,
)
from model.verify.tail import tail_sizes
from model.vision.config import encoder_config
from model.vision.encoder import VisionEncoder, load_encoder
from model.vision.tail_blocks import spec_with_tail
from model.vlm import VLM, build_vlm, parameter_counts

PIXMO_CAP_IMAGES = 717_000
"""Rows of allenai/pixmo-cap, the largest image set of stage 1: the measure for disk space."""


def report(options: Options) -> int:
    """Print the report; return the exit code of the command."""
    problem = ""
    try:
        device = pick_device(options.device)
        print(describe_device(device))
    except UserError as error:
        if options.device != "auto":
            raise
        device, problem = torch.device("cpu"), str(error)
        print(f"GPU: not usable: {problem}")
    preset = preset_of(options, device)
    encoder, vlm, passed = load_all(options, device)
    print("\n" + parameter_table(encoder, vlm))
    counts = {part: total for part, (_, total) in parameter_counts(vlm).items()}
    spec, trained = space_spec(encoder, options.codec, options), options.train_vision_blocks
    tail = tail_sizes(spec, trained) if trained else None
    sizes = replace(sizes_of(vlm.language.config, **counts), tail=tail)
    print(
        f"adapters (--lora {RANK}) have {sizes.adapters(RANK):,} parameters, and train instead of it"
    )
    if trained:
        print(tail_text(sizes, tail_sizes(spec, trained, "frame"), preset))
    plan = Plan(mfu=options.mfu, text_tokens=options.text_tokens)
    connector = options.connector or configs.load("model")["connector"]
    print("\n" + memory_table(sizes, spec.seen.tokens("image"), plan))
    print("\n" + settings_table(sizes, preset))
    print("\n" + models_table(connector, spec.seen.width, tail))
    print(
        "\nEstimates, not measurements (model/verify/memory.py): GiB at the peak of a step, on each\n"
        f"GPU; in brackets: does not fit. Days on {options.gpus} GPUs, or as many as the preset is for, at "
        f"MFU {options.mfu:g},\nif every sample is one image and {options.text_tokens} tokens of text, and "
        "if every sample fills the window."
    )
    print("\n" + "\n".join([*memory_verdicts(device, sizes), disk_verdict(encoder, options)]))
    return 1 if problem or not passed else 0


def preset_of(options: Options, device: torch.device) -> str:
    """Return the hardware preset of `--hardware`; of `auto` that of the GPU, or `24gb` if there is none.

    Raises:
        UserError: there is no such preset.
    """
    known = configs.load("train")["hardware"]
    if options.hardware == "auto":
        if device.type != "cuda":
            return "24gb"
        return one_card(torch.cuda.get_device_properties(device).total_memory)
    if options.hardware not in known:
        raise UserError(
            f"--hardware {options.hardware}: there are auto, {', '.join(known)}"
            f"{nearest(options.hardware, known)} (configs/train.yaml)"
        )
    return options.hardware


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


def space_spec(encoder: VisionEncoder, codec: str, options: Options) -> FeatureSpec:
    """Return the spec of the space to train on."""
    if not options.train_vision_blocks:
        return encoder.spec(codec)
    return spec_with_tail(encoder, codec, options.train_vision_blocks)


def disk_verdict(encoder: VisionEncoder, options: Options) -> str:
    """Say in one line whether the features of pixmo-cap's images fit the disk of `options.features`."""
    row_bytes = {}
    for codec in CODECS:
        with contextlib.suppress(UserError):  # a width that is not a multiple of 64 has fp16 only
            row_bytes[codec] = space_spec(encoder, codec, options).row_bytes("image")
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
