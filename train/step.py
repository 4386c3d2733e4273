"""One optimizer step as one of several processes sees it: its share of the work, and all shares together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cache.format.spec import FeatureSpec
from configs import UserError
from model.quantize import unpack
from model.vlm import VLM
from train.data.loader import MicroBatch
from train.data.sample_list import Join
from train.distributed import Processes
from train.metrics import memory_gib
from train.optim import broken_gradients

NAMED = 5
"""Samples an error names."""


def by_step(
    micro_batches: Iterable[MicroBatch], first: int, stop: int
) -> Iterator[tuple[int, Iterator[MicroBatch]]]:
    """Every step of [first, stop) with this process's micro-batches of it, which may be none.

    A micro-batch is asked for only when the one before has been used: its buffer is reused.
    """
    source = iter(micro_batches)
    early: list[MicroBatch] = []  # the first of a later step, found where a step has none

    def of_step(number: int) -> Iterator[MicroBatch]:
        while (micro := early.pop() if early else next(source, None)) is not None:
            if micro.step != number:
                early.append(micro)
                return
            yield micro
            if micro.last:
                return

    for number in range(first, stop):
        yield number, of_step(number)


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What all processes together did in a step."""

    loss: float
    """Weighted cross-entropy a supervised token; NaN when a part of it is not finite."""
    samples: int
    """Samples."""
    tokens: int
    """Tokens."""
    wait_s: float
    """Waiting for data, seconds, of the process that waited longest: the others wait for it."""
    memory_gib: float
    """Peak so far, of the largest process."""


class Share:
    """What this process does in a step."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []  # the loss of each micro-batch, left on the device
        self._samples: list[tuple[int, ...]] = []  # and its samples, to name them
        self._counts = [0, 0]
        self._wait_s = 0.0

    def add(self, micro: MicroBatch, loss: Tensor) -> None:
        """A micro-batch is through."""
        self._parts.append(loss.detach())
        self._samples.append(sample_numbers(micro))
        self._counts[0] += micro.samples
        self._counts[1] += micro.tokens
        self._wait_s += micro.wait_s

    def losses(self) -> list[float]:
        """Of each micro-batch: its part of the step's loss."""
        return torch.stack(self._parts).tolist() if self._parts else []

    def total(self, processes: Processes, device: torch.device) -> Totals:
        """Put together with those of all other processes."""
        losses = self.losses()
        loss = math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan
        mine = [loss, *map(float, self._counts), self._wait_s, memory_gib(device)]
        losses, samples, tokens, waits, memories = map(
            list, zip(*processes.gather(mine), strict=True)
        )
        return Totals(
            loss=math.fsum(losses),
            samples=round(sum(samples)),
            tokens=round(sum(tokens)),
            wait_s=max(waits),
            memory_gib=max(memories),
        )

    def suspects(self) -> tuple[float | None, list[int]]:
        """The first loss that is not finite, if any, and the samples that may be to blame."""
        losses = self.losses()
        broken = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        blamed = [s for i in broken or range(len(losses)) for s in self._samples[i]]
        return (losses[broken[0]] if broken else None), blamed


def refuse_non_finite(
    step: int,
    share: Share,
    totals: Totals,
    norm: float,
    model: nn.Module,
    joined: Join,
    processes: Processes,
) -> None:
    """Stop before a broken step is taken: the weights on disk and in memory stay good.

    Every process has the same totals and the same norm of the summed gradients, so all of them stop.

    Raises:
        UserError: a loss or a gradient is NaN or infinite.
    """
    if math.isfinite(norm) and math.isfinite(totals.loss):
        return
    loss, blamed = share.suspects()
    names = [joined.name_of(s) for s in blamed[:NAMED]]
    told = processes.share([None if loss is None else str(loss), names, len(blamed)])
    if broken := [one for one in told if one[0] is not None]:
        what = f"the loss is {broken[0][0]}"
    else:
        where = broken_gradients(model)
        what = f"the norm of the gradient is {norm}"
        if where:
            what = f"the gradient is not finite in {len(where)} parameters, first {where[0]}"
    raise UserError(
        f"step {step + 1}: {what}; samples {_some(broken or told)}. Nothing was updated. Lower "
        "--learning-rate, or check the features (python -m cache.verify --deep); --resume goes on from "
        "the last checkpoint"
    )


def _some(told: Sequence[Sequence[object]]) -> str:
    """The first few samples of all that processes suspect."""
    names = [str(name) for _, few, _ in told if isinstance(few, list) for name in few][:NAMED]
    more = sum(n for _, _, n in told if isinstance(n, int)) - len(names)
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")


def sample_numbers(micro: MicroBatch) -> tuple[int, ...]:
    """Positions in the sample list of everything in a micro-batch."""
    return tuple(sample for tree in micro.placed for _, _, sample in tree.branches)


TINY = 50_000_000
"""Parameters below which casting costs more than bfloat16 saves."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """The model with all that decides the numbers it computes."""

    vlm: VLM
    """On `device`."""
    spec: FeatureSpec
    """Of the space the rows come from."""
    device: torch.device
    """Where to compute."""
    autocast: torch.dtype | None
    """Lower precision of the matrix products; None: everything in the parameters' own."""

    def features(self, micro: MicroBatch) -> Tensor | None:
        """(N, V) of a micro-batch on the device, in the order of their places; None when it has none."""
        if not len(micro.order):
            return None
        spec = self.spec
        parts = [
            unpack(codes, spec.layout, spec.tokens(array), spec.width).flatten(0, 1)
            for array, codes in micro.codes.items()
            if len(codes)
        ]
        tokens = torch.cat(parts) if len(parts) > 1 else parts[0]
        return tokens.index_select(0, micro.order)

    def loss(self, micro: MicroBatch) -> Tensor:
        """The micro-batch's part of the step's loss: over a step's micro-batches it adds up to
        sum(weight x cross-entropy) / sum(weight), however they were cut."""
        micro = micro.to(self.device)
        with self.precision():
            total, _ = self.vlm(micro.packed, self.features(micro))
        return total / micro.step_weight

    def precision(self) -> AbstractContextManager[object]:
        """Autocast, where it is wanted."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, no dropout."""
        before = self.vlm.training
        self.vlm.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.vlm.train(before)

    def mean_loss(self, micro_batches: Iterable[MicroBatch]) -> tuple[float, int]:
        """Loss a supervised token over whole steps, and their samples; nothing is learned."""
        total, weight, samples = self.loss_sums(micro_batches)
        return total / weight, samples

    def loss_sums(self, micro_batches: Iterable[MicroBatch]) -> tuple[float, float, int]:
        """Sum of the losses, weight of the steps they belong to, and samples; nothing is learned."""
        total = weight = 0.0
        samples = 0
        with self.evaluating():
            for micro in micro_batches:
                total += float(self.loss(micro)) * micro.step_weight
                weight += micro.step_weight if micro.last else 0.0
                samples += micro.samples
        return total, weight, samples


def choose_precision(wanted: str, device: torch.device, vlm: VLM) -> torch.dtype | None:
    """The autocast type for `--precision`: bfloat16 where it is fast and the model is not tiny."""
    if wanted == "float32":
        return None
    if wanted == "bfloat16":
        return torch.bfloat16
    if sum(p.numel() for p in vlm.parameters()) < TINY:
        return None
    fast = {
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "cpu": torch.cpu._is_amx_tile_supported,
    }
    return torch.bfloat16 if fast.get(device.type, lambda: False)() else None
