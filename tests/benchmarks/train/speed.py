"""How fast is a step from the cache? Several ways to train one model on the same images, in turns (loops.py).

The data: images with 5.6 annotations each, as pixmo-points has, and the same images with one each. The share
of waiting, copying and unpacking is measured beside a step of Qwen3-0.6B's real size, of which only the
connector trains: the step that takes the least time.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache.format import codec
from model.vlm import build_vlm
from tests.benchmarks.bench import Requirements, take_turns
from tests.benchmarks.train.loops import CPU, Live, Loop, Packed, Padded
from tests.benchmarks.train.models import Scale, build, proportions
from tests.gpu.worlds import DIFFERENT, Said, World
from train.data.loader import FeatureLoader, MicroBatch
from train.step import Forward

ANNOTATIONS = (5, 6, 5, 6, 6)
"""Annotations of the images in turn: 5.6 on average."""
TREES = "5.6: trees"
LIVE_TREES = "5.6: trees, encoder in the step"
PACKED = "5.6: packed without trees"
PADDED = "5.6: padded"
LIVE_PADDED = "5.6: padded, encoder in the step"
ONE = "1: packed"
ONE_LIVE = "1: packed, encoder in the step"
ONE_PADDED = "1: padded, encoder in the step"
SAME_LOSS = 1e-4
"""Relative difference of losses: ten times what int8 makes; another image in each row makes 2e-4."""
STEPS = 4
"""Steps of the real size; the first one is not counted."""


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Seconds an image of one pass over the images, by way to train."""

    image_s: Mapping[str, float]


def pointing(number: int) -> Said:
    """Return what is said about an image: as short as pointing, about 60 tokens each."""
    count = ANNOTATIONS[number % len(ANNOTATIONS)]
    x = f"{number % 10}7"
    return [(f"Point to cup {n}.", f'<points coords="1 1 {n}{x} 551"/>') for n in range(count)]


def one_point(number: int) -> Said:
    """Return the first of them."""
    return pointing(number)[:1]


def measure_speed(scale: Scale, folder: Path, requirements: Requirements) -> Speeds:
    """Measure the ways in turns; print a table and the requirements."""
    encoder = scale.load_encoder()
    spec = encoder.spec("int8")
    live = Live(encoder)
    one_of_each = live.features(range(DIFFERENT)).float().numpy()
    rows = [codec.pack(features, spec.codec) for features in one_of_each]
    many, one = (
        World.make(folder / name, spec, "image", scale.images, rows=rows, said=said)
        for name, said in (("many", pointing), ("one", one_point))
    )
    vlm, tokenizer = build(scale, spec.width)
    print(proportions(vlm, encoder), flush=True)
    branches = max(ANNOTATIONS)
    # A way is made at its first turn, so that not all loaders start at once.
    makers: dict[str, Callable[[], Loop]] = {
        TREES: lambda: Packed(vlm, many, tokenizer, branches),
        LIVE_TREES: lambda: Packed(vlm, many, tokenizer, branches, live),
        PACKED: lambda: Packed(vlm, many, tokenizer, 1),
        PADDED: lambda: Padded(vlm, many, tokenizer),
        LIVE_PADDED: lambda: Padded(vlm, many, tokenizer, live),
        ONE: lambda: Packed(vlm, one, tokenizer, 1),
        ONE_LIVE: lambda: Packed(vlm, one, tokenizer, 1, live),
        ONE_PADDED: lambda: Padded(vlm, one, tokenizer, live),
    }
    with contextlib.ExitStack() as stack:
        stack.callback(live.close)
        loops = {name: make() for name, make in makers.items()}
        for loop in loops.values():
            stack.callback(loop.close)
        losses = {name: loop.step() for name, loop in loops.items()}  # before any update
        taken = take_turns({name: loop.step for name, loop in loops.items()}, scale.rounds)
        tokens = {name: loop.tokens for name, loop in loops.items()}
    table(scale, taken, tokens)
    of = {name: statistics.median(seconds) / scale.images for name, seconds in taken.items()}
    for what in ("5.6", "1"):
        values = [loss for name, loss in losses.items() if name.startswith(f"{what}:")]
        spread = (max(values) - min(values)) / max(values)
        requirements.at_most(f"{what} annotations: losses of the ways, apart", spread, SAME_LOSS)
    for ours, theirs, least in (
        (TREES, LIVE_PADDED, 3.0),
        (TREES, PADDED, 3.0),
        (TREES, PACKED, 3.0),
        (TREES, LIVE_TREES, 1.0),
        (ONE, ONE_PADDED, 1.0),
        (ONE, ONE_LIVE, 1.0),
    ):
        name = f"{theirs} / {ours.split(': ')[1]}, time"
        requirements.at_least(name, ratio(taken[theirs], taken[ours]), least)
    return Speeds(image_s=of)


def ratio(theirs: list[float], ours: list[float]) -> float:
    """Return how many times as fast ours is: the median over rounds."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def table(scale: Scale, taken: dict[str, list[float]], tokens: dict[str, int]) -> None:
    """Print what each way takes and computes."""
    print(
        f"\n| {scale.images} images | tokens computed | s a step | annotations/s | tokens/s "
        "| time, of ours from the cache |\n|---|---|---|---|---|---|"
    )
    for name, seconds in taken.items():
        one = name.startswith("1:")
        each = scale.images if one else sum(len(pointing(n)) for n in range(scale.images))
        step = statistics.median(seconds)
        times = ratio(seconds, taken[ONE if one else TREES])
        print(
            f"| {name} | {tokens[name]:,} | {step:.2f} | {each / step:.1f} | {tokens[name] / step:,.0f} "
            f"| {times:.2f} |"
        )
    print(flush=True)


# ---- waiting, copying, unpacking


@dataclass(frozen=True, kw_only=True)
class TimedForward(Forward):
    """The forward pass, and what copying and unpacking take of it."""

    seconds: list[float] = field(default_factory=list)

    def features(self, micro: MicroBatch) -> Tensor | None:
        """Time unpacking and ordering."""
        started = time.perf_counter()
        found = super().features(micro)
        self.seconds.append(time.perf_counter() - started)
        return found


def measure_share(scale: Scale, folder: Path, requirements: Requirements) -> None:
    """Measure (data wait + copy + unpack) / step, with a language model of the real size if memory allows."""
    free_gib = available_gib()
    name = scale.real_llm
    if free_gib < scale.real_gib:
        print(
            f"share of a step: {name} needs {scale.real_gib} GiB, {free_gib:.1f} are free: skipped"
        )
        return
    vlm, tokenizer = build_vlm(scale.fed_spec.width, name, "linear", seed=0)
    vlm.freeze(train_connector=True, train_llm=False)
    vlm.train()
    world = World.make(folder / "share", scale.fed_spec, "image", count=STEPS)
    forward = TimedForward(vlm=vlm, spec=scale.fed_spec, device=CPU, autocast=None)
    optimizer = torch.optim.AdamW(vlm.connector.parameters(), lr=1e-5)
    parts: list[tuple[float, float, float, float]] = []
    trees, _ = world.trees(tokenizer, scale.window)
    window = int(trees.length.max())  # one image a step
    schedule, reader = world.schedule(tokenizer, window)
    with FeatureLoader(schedule, reader, max_tokens=window) as loader:
        for _ in range(STEPS):
            parts.append(one_step(loader, forward, optimizer))
    wait, copy, unpack, step = (
        statistics.median(column[1:]) for column in zip(*parts, strict=True)
    )
    print(
        f"{name}, connector, {window} tokens: wait {wait * 1e3:.2f} + copy {copy * 1e3:.2f} + unpack "
        f"{unpack * 1e3:.2f} ms of a step of {step:.2f} s"
    )
    requirements.at_most("(data wait + copy + unpack) / step", (wait + copy + unpack) / step, 0.01)


def one_step(
    loader: FeatureLoader, forward: TimedForward, optimizer: torch.optim.Optimizer
) -> tuple[float, float, float, float]:
    """Take one step; return the seconds of waiting, copying, unpacking, and of all."""
    started = time.perf_counter()
    (micro,) = itertools.islice(loader, 1)
    before = time.perf_counter()
    micro = micro.to(forward.device)
    copied = time.perf_counter() - before
    forward.loss(micro).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return micro.wait_s, copied, forward.seconds[-1], time.perf_counter() - started


def available_gib() -> float:
    """Return the memory that a new process may use, GiB."""
    lines: dict[str, Any] = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines()
    )
    return int(lines["MemAvailable"].split()[0]) / 2**20
