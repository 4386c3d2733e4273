"""Training steps from cached rows and with the live tower, side by side.

A step is the trainer's own: loader, unpacking, forward and backward pass, clipping, AdamW. The live step has
the same text and positions. Its images are decoded ahead by all cores and pass the tower in float16 without
gradients, in batches of 64. Frames of a clip are decoded as JPEG files too, which is cheaper than video.

MFU = floating-point operations of connector and language model (`sample_flops`: neither the tower nor what
checkpointing repeats) / seconds of the step / peak of the card.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.verify.memory import GIB, Sizes, sample_flops, sizes_of
from model.vision.encoder import VisionEncoder, _pool
from model.vlm import VLM, build_vlm, parameter_counts
from tests.gpu.encoding import encoder_of
from tests.gpu.lines import Lines, Scale, peak_tflops, synchronize
from tests.gpu.worlds import Decoder, World, spec_of
from train.config import Options
from train.data.loader import FeatureLoader, MicroBatch
from train.distributed.group import ProcessGroup
from train.optim import build_optimizer, clip_gradients
from train.step import Forward, forward_backward

TOWER_BATCH = 64
WARM_UP = 2
ALONE = ProcessGroup()


@dataclass(frozen=True, kw_only=True)
class LiveForward(Forward):
    """The forward pass with the tower in it."""

    encoder: VisionEncoder
    decoder: Decoder
    array: str

    def features(self, micro: MicroBatch) -> Tensor | None:
        """Decode and encode as many images as the cached step reads rows."""
        pixels = self.decoder.take(len(micro.codes[self.array]))
        window = self.spec.pool(self.array)
        parts = []
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for at in range(0, len(pixels), TOWER_BATCH):
                x = self.encoder.normalize(pixels[at : at + TOWER_BATCH]).to(self.encoder.dtype)
                blocks = torch.cat([b.float() for b in self.encoder.tower(x)], dim=-1)
                parts.append(_pool(blocks, window)[0].half())
        return torch.cat(parts).flatten(0, 1).index_select(0, micro.order)


@dataclass(kw_only=True)
class Variant:
    """One way to train: its steps in seconds, and what they waited for."""

    forward: Forward
    loader: FeatureLoader
    seconds: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    tokens: int = 0
    flops: float = 0.0
    peak: int = 0


def measure_training(lines: Lines, scale: Scale, folder: Path) -> str:
    """Measure memory, then time; return the table of steps."""
    folder.mkdir()
    rows: list[list[str]] = []
    with lines.part("train: speed"):
        encoder = encoder_of(scale)
        vlm, tokenizer = build_vlm(encoder.spec("fp16").width, scale.llm, "linear", seed=0)
        vlm.to(scale.device)
        pool = 2
        layouts = {
            "an image": ("image", 1),
            "an image, pooled": ("image", pool),
            "a clip": ("frame", 1),
        }
        for name, (array, window) in layouts.items():
            with worlds(
                scale, encoder, tokenizer, folder / f"{array}{window}", array, window
            ) as found:
                for train_llm in (False, True):
                    rows += steps(lines, scale, vlm, encoder, name, found, train_llm)
    header = ["one sample is", "trains", "fp16, ms", "int8, ms", "live, ms", "live / int8"]
    header += ["int8: tokens/s", "MFU", "waits", "peak, GiB: int8", "live"]
    return (
        "| "
        + " | ".join(header)
        + " |\n|"
        + "---|" * len(header)
        + "\n"
        + "\n".join("| " + " | ".join(row) + " |" for row in rows)
    )


@contextlib.contextmanager
def worlds(
    scale: Scale, encoder: VisionEncoder, tokenizer: Any, folder: Path, array: str, pool: int
) -> Iterator[dict[str, FeatureLoader]]:
    """Make a cache of each codec, and start the loaders of the three ways to train."""
    folder.mkdir()
    count, frames = (scale.images, 1) if array == "image" else (scale.videos, scale.frames)
    made = {
        name: World.make(folder / name, spec_of(encoder, name, pool), array, count, frames)
        for name in ("fp16", "int8")
    }
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(
                made[source].loader(tokenizer, scale.window, pin=scale.on_gpu)
            )
            for name, source in (("fp16", "fp16"), ("int8", "int8"), ("live", "int8"))
        }


def steps(
    lines: Lines,
    scale: Scale,
    vlm: VLM,
    encoder: VisionEncoder,
    name: str,
    loaders: dict[str, FeatureLoader],
    train_llm: bool,
) -> list[list[str]]:
    """Time the three ways in turns; return the row of the table."""
    vlm.freeze(train_connector=True, train_llm=train_llm)
    vlm.zero_grad(set_to_none=True)
    optimizer = build_optimizer(vlm, Options())
    precision = torch.bfloat16 if scale.on_gpu else None
    array = "frame" if "clip" in name else "image"
    decoder = Decoder(encoder, ahead=2 * TOWER_BATCH if scale.on_gpu else 4)
    variants = {}
    for source, loader in loaders.items():
        common: dict[str, Any] = {
            "vlm": vlm,
            "spec": loader._reader.spec,
            "device": scale.device,
            "autocast": precision,
        }
        forward = Forward(**common)
        if source == "live":
            forward = LiveForward(**common, encoder=encoder, decoder=decoder, array=array)
        variants[source] = Variant(forward=forward, loader=loader)
    vlm.train()
    sizes = sizes_of_vlm(vlm)
    try:
        for number in range(scale.rounds):
            for source in list(variants)[:: -1 if number % 2 else 1]:
                turn(variants[source], scale, optimizer, sizes, train_llm)
    finally:
        decoder.close()
    return [row(lines, scale, name, "all" if train_llm else "connector", variants)]


def turn(
    variant: Variant, scale: Scale, optimizer: torch.optim.Optimizer, sizes: Sizes, train_llm: bool
) -> None:
    """Take some steps of one way; keep the seconds of all but the first."""
    if scale.on_gpu:
        torch.cuda.reset_peak_memory_stats(scale.device)
    warm_up = WARM_UP if scale.on_gpu else 1
    for number in range(warm_up + scale.steps):
        synchronize(scale.device)
        started = time.perf_counter()
        micro = one_step(variant.forward, variant.loader, optimizer, number)
        synchronize(scale.device)
        if number >= warm_up:
            variant.seconds.append(time.perf_counter() - started)
            variant.waits.append(micro.wait_s)
    variant.tokens = micro.tokens
    supervised = len(micro.packed.targets) // micro.samples
    one = sample_flops(sizes, micro.tokens // micro.samples, supervised, train_llm)
    variant.flops = one * micro.samples
    if scale.on_gpu:
        variant.peak = torch.cuda.max_memory_allocated(scale.device)


def one_step(
    forward: Forward,
    loader: FeatureLoader,
    optimizer: torch.optim.Optimizer,
    number: int,
    micro_batches: int = 1,
) -> MicroBatch:
    """Take one optimizer step, as train.run does; return its last micro-batch."""
    for micro in itertools.islice(loader, micro_batches):
        local = forward_backward(number, [micro], 0, forward, ALONE)
        local.reduce(ALONE, forward.device)
    clip_gradients([p for p in forward.vlm.parameters() if p.requires_grad], 1.0)
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return micro


def row(
    lines: Lines, scale: Scale, name: str, trains: str, variants: dict[str, Variant]
) -> list[str]:
    """Print the lines of one layout, and return its row of the table."""
    ms = {source: statistics.median(v.seconds) * 1e3 for source, v in variants.items()}
    int8, live = variants["int8"], variants["live"]
    waits = statistics.median(int8.waits) / statistics.median(int8.seconds)
    peak = peak_tflops(scale.device)
    mfu = f"{int8.flops / (ms['int8'] / 1e3) / peak / 1e12:.0%}" if peak else ""
    if scale.on_gpu:
        label = f"train: {name}, {trains}"
        lines.at_least(f"{label}: live / cached int8", ms["live"] / ms["int8"], 1.0)
        lines.at_most(f"{label}: int8 / fp16", ms["int8"] / ms["fp16"], 1.05)
        lines.at_most(f"{label}: waits for rows, share of a step", waits, 0.05)
    return [
        f"{name}: {int8.tokens:,} tokens a step",
        trains,
        *(f"{ms[source]:.0f}" for source in ("fp16", "int8", "live")),
        f"{ms['live'] / ms['int8']:.2f}",
        f"{int8.tokens / ms['int8'] * 1e3:,.0f}",
        mfu,
        f"{waits:.1%}",
        f"{int8.peak / GIB:.1f}",
        f"{live.peak / GIB:.1f}",
    ]


def sizes_of_vlm(vlm: VLM) -> Sizes:
    """Return the sizes of a model."""
    counts = {part: total for part, (_, total) in parameter_counts(vlm).items()}
    return sizes_of(vlm.language.config, **counts)
