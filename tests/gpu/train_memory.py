"""The largest memory of a training step against `model.verify`'s estimate, and what checkpointing costs.

A step has two micro-batches, as the steps of every stage have several: gradients of the first exist in the
second. Used memory is what torch has reserved at most, and what the driver and libraries take beside it.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from pathlib import Path

import torch

from cache.format.spec import FeatureSpec
from model.verify.memory import GIB, Step, step_bytes
from model.vlm import VLM, build_vlm
from tests.benchmarks.bench import CLIP
from tests.gpu.lines import Lines, Scale, synchronize
from tests.gpu.train_speed import one_step, sizes_of_vlm
from tests.gpu.worlds import World
from tests.support.spaces import SPEC
from train.config import Options
from train.data.loader import FeatureLoader
from train.optim import build_optimizer
from train.step import Forward

SETTINGS = {
    "window, all": ("window", False, True),
    "window, all, checkpointing": ("window", True, True),
    "window, connector": ("window", False, False),
    "36,864, all, checkpointing": ("36,864", True, True),
}
"""Name -> which window, checkpointing, whether the language model trains."""


def measure_memory(lines: Lines, scale: Scale, folder: Path) -> None:
    """Take some steps in each setting; compare the peak with `model.verify`'s estimate, and time them."""
    folder.mkdir()
    encoder_width = 1024 if scale.on_gpu else 128
    seconds = {}
    vlm, tokenizer = build_vlm(encoder_width, scale.llm, "linear", seed=0)
    vlm.to(scale.device)
    sizes = sizes_of_vlm(vlm)
    world = World.make(folder, spec_for_memory(encoder_width), "image", scale.images)
    for name, (which, checkpointing, train_llm) in SETTINGS.items():
        tokens = scale.window if which == "window" or not scale.on_gpu else 36864
        free(scale)
        with world.loader(tokenizer, tokens, pin=scale.on_gpu) as loader:
            took, used, filled = peak_of(scale, vlm, loader, checkpointing, train_llm)
        settings = Step(
            tokens=filled,
            checkpointing=checkpointing,
            gpu=scale.on_gpu,
            train_connector=True,
            train_llm=train_llm,
        )
        parts = step_bytes(sizes, settings)
        label = f"memory: {name.replace('window', f'{scale.window:,} tokens')}"
        seconds[name] = took
        if scale.on_gpu:
            lines.note(f"{label}: peak, GiB", f"{used / GIB:.1f}")
            off = parts["total"] / used - 1
            lines.at_most(f"{label}: estimate is off by", abs(off), 0.15)
            lines.note(f"{label}: estimate, GiB", f"{parts['total'] / GIB:.1f}")
            print({part: round(size / GIB, 2) for part, size in parts.items()}, flush=True)
    if scale.on_gpu:
        slower = seconds["window, all, checkpointing"] / seconds["window, all"]
        lines.note("checkpointing: seconds of a step, times", f"{slower:.2f}")
    free(scale)


def spec_for_memory(width: int) -> FeatureSpec:
    """Return the spec of int8 rows of 576 tokens (4 of them for a tiny width)."""
    return CLIP if width == CLIP.width else dataclasses.replace(SPEC, width=width)


def peak_of(
    scale: Scale, vlm: VLM, loader: FeatureLoader, checkpointing: bool, train_llm: bool
) -> tuple[float, int, int]:
    """Return the seconds of a step, the largest memory of the GPU that this process used, and the tokens."""
    vlm.freeze(train_connector=True, train_llm=train_llm)
    vlm.gradient_checkpointing(checkpointing)
    vlm.train()
    optimizer = build_optimizer(vlm, Options())
    forward = Forward(
        vlm=vlm,
        spec=loader._reader.spec,
        device=scale.device,
        autocast=torch.bfloat16 if scale.on_gpu else None,
    )
    took, used, tokens = [], 0, 0
    for number in range(3 if scale.on_gpu else 2):
        synchronize(scale.device)
        started = time.perf_counter()
        micro = one_step(forward, loader, optimizer, number, micro_batches=2)
        synchronize(scale.device)
        took.append(time.perf_counter() - started)
        tokens = micro.tokens
    if scale.on_gpu:
        free_bytes, total = torch.cuda.mem_get_info(scale.device)
        outside = total - free_bytes - torch.cuda.memory_reserved(scale.device)
        used = torch.cuda.max_memory_reserved(scale.device) + outside
        print(
            f"allocated {torch.cuda.max_memory_allocated(scale.device) / GIB:.2f}, "
            f"reserved {torch.cuda.max_memory_reserved(scale.device) / GIB:.2f}, "
            f"outside torch {outside / GIB:.2f} GiB",
            flush=True,
        )
    return statistics.median(took[1:]), used, tokens


def free(scale: Scale) -> None:
    """Return unused memory to the GPU, and begin to measure afresh."""
    gc.collect()
    if scale.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(scale.device)
