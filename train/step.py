"""One optimizer step: the forward pass of a micro-batch, and the totals over micro-batches and processes.

    forward = Forward(vlm=vlm, spec=reader.spec, device=device, autocast=None)
    for step, micro_batches in by_step(loader, first=0, stop=1000):
        local = forward_backward(step, micro_batches, seed, forward, group)
        totals = local.reduce(group, device)    # the same on every process

N feature tokens of a micro-batch, V vision width.
"""

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
from model.tail import StoredRows
from model.vlm import VLM
from nanomolmo2.unpack import unpack
from train.data.loader import MicroBatch
from train.data.sample_list import SampleList
from train.distributed.group import ProcessGroup
from train.distributed.shard import free_weights, is_sharded, sync_gradients
from train.metrics import StepTotals, memory_gib
from train.optim import broken_gradients

SMALL_MODEL = 50_000_000
"""Parameters below which casting to bfloat16 costs more time than bfloat16 saves."""
SAMPLES_NAMED = 5
"""Samples that an error names at most."""


class NonFiniteError(UserError):
    """A loss or a gradient is NaN or infinite. Nothing was updated."""

    def __init__(self, message: str, step: int, samples: list[int]) -> None:
        super().__init__(message)
        self.step = step
        """The step, counted from 0."""
        self.samples = samples
        """Numbers of the samples of this process that may have caused it."""


# ---- forward pass


@dataclass(frozen=True, kw_only=True)
class Forward:
    """The forward pass: the model, and everything else that decides the numbers it computes."""

    vlm: VLM
    """The model, on `device`."""
    spec: FeatureSpec
    """The spec of the space that the rows come from."""
    device: torch.device
    """Where to compute."""
    autocast: torch.dtype | None
    """Lower precision for matrix products; None: the parameters' own dtype."""

    def features(self, micro: MicroBatch) -> Tensor | StoredRows | None:
        """Return the (N, V) feature tokens of a micro-batch, in sequence order; None without media.

        In a space with a tail, return the stored rows instead. `micro` must be on the device.
        """
        if not len(micro.order):
            return None
        spec = self.spec
        rows = {
            array: unpack(codes, spec.codec, spec.tokens(array), spec.width)
            for array, codes in micro.codes.items()
            if len(codes)
        }
        if self.vlm.tail is not None:
            return StoredRows(rows=rows, order=micro.order)
        parts = [some.flatten(0, 1) for some in rows.values()]
        tokens = torch.cat(parts) if len(parts) > 1 else parts[0]
        return tokens.index_select(0, micro.order)

    def loss(self, micro: MicroBatch) -> Tensor:
        """Return the micro-batch's part of the step's loss, a scalar.

        Over the micro-batches of a step, on all processes, the parts add up to
        sum(weight x cross-entropy) / sum(weight), however the step was divided into micro-batches.
        """
        micro = micro.to(self.device)
        with self.precision():
            total, _ = self.vlm.loss(micro.packed, self.features(micro))
        return total / micro.step_weight

    def precision(self) -> AbstractContextManager[object]:
        """Return the autocast context for the forward pass."""
        if self.autocast is None:
            return contextlib.nullcontext()
        # A layer's weights are used once, so casting them once saves nothing. Of a sharded model, the cast
        # copies would stay in memory after the layer's weights have been freed.
        keep = not is_sharded(self.vlm)
        return torch.autocast(self.device.type, dtype=self.autocast, cache_enabled=keep)

    def loss_sums(self, micro_batches: Iterable[MicroBatch]) -> tuple[float, float, int]:
        """Evaluate whole steps without gradients and without dropout.

        Returns:
            The sum of weight x cross-entropy, the weight of the steps, and the number of samples.
        """
        total = weight = 0.0
        samples = 0
        was_training = self.vlm.training
        self.vlm.eval()
        try:
            with torch.no_grad():
                for micro in micro_batches:
                    total += float(self.loss(micro)) * micro.step_weight
                    weight += micro.step_weight if micro.last else 0.0
                    samples += micro.samples
        finally:
            free_weights(self.vlm)
            self.vlm.train(was_training)
        return total, weight, samples


def choose_precision(wanted: str, device: torch.device, vlm: VLM) -> torch.dtype | None:
    """Return the autocast dtype for `--precision`; None for float32.

    `auto` is bfloat16 if the device computes it fast and the model is not small.
    """
    if wanted == "float32":
        return None
    if wanted == "bfloat16":
        return torch.bfloat16
    if sum(p.numel() for p in vlm.parameters()) < SMALL_MODEL:
        return None
    fast = {
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "cpu": torch.cpu._is_amx_tile_supported,
    }
    return torch.bfloat16 if fast.get(device.type, lambda: False)() else None


# ---- one step over micro-batches and processes


def by_step(
    micro_batches: Iterable[MicroBatch], first: int, stop: int
) -> Iterator[tuple[int, Iterator[MicroBatch]]]:
    """Yield every step of [first, stop) with this process's micro-batches of it.

    The next micro-batch is requested only after the current one has been used, because the loader then
    reuses its buffer.
    """
    source = iter(micro_batches)

    def of_step(number: int) -> Iterator[MicroBatch]:
        for micro in source:
            assert micro.step == number, "a step without micro-batches"
            yield micro
            if micro.last:
                return

    for number in range(first, stop):
        yield number, of_step(number)


class LocalStep:
    """This process's part of one step: losses, counts and waiting time of its micro-batches."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []  # on the device: reading them here would stop the GPU
        self._sample_numbers: list[tuple[int, ...]] = []
        self._samples = self._tokens = 0
        self._wait_s = 0.0
        self.signal = 0
        """After `reduce`: the signal that some process received, by which all of them end; 0: none."""

    def add(self, micro: MicroBatch, loss: Tensor) -> None:
        """Add a micro-batch and its loss."""
        self._losses.append(loss.detach())
        self._sample_numbers.append(micro.sample_numbers)
        self._samples += micro.samples
        self._tokens += micro.tokens
        self._wait_s += micro.wait_s

    def losses(self) -> list[float]:
        """Return each micro-batch's part of the step's loss."""
        return torch.stack(self._losses).tolist() if self._losses else []

    def reduce(
        self, group: ProcessGroup, device: torch.device, signal: int | None = None
    ) -> StepTotals:
        """Return the totals over all processes. Every process must call it.

        `signal` is the signal that this process has received, if any.
        """
        losses = self.losses()
        loss = math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan
        mine = [loss, self._samples, self._tokens, self._wait_s, memory_gib(device), signal or 0]
        losses, samples, tokens, waits, memories, signals = map(
            list, zip(*group.gather_numbers(mine), strict=True)
        )
        self.signal = round(max(signals))
        return StepTotals(
            loss=math.fsum(losses),
            samples=round(sum(samples)),
            tokens=round(sum(tokens)),
            wait_s=max(waits),
            memory_gib=max(memories),
        )

    def non_finite(self) -> tuple[float | None, list[int]]:
        """Return the first loss that is not finite, and the samples that may have caused it.

        If every loss is finite (only a gradient is not), these are None and all samples of the process.
        """
        losses = self.losses()
        broken = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        causes = [s for i in broken or range(len(losses)) for s in self._sample_numbers[i]]
        return (losses[broken[0]] if broken else None), causes


def forward_backward(
    step: int,
    micro_batches: Iterable[MicroBatch],
    seed: int,
    forward: Forward,
    group: ProcessGroup,
) -> LocalStep:
    """Compute the gradients of a step; return losses and counts of this process's micro-batches.

    Gradients are summed over the processes during the backward pass of the last micro-batch. Every process
    must call it, with equally many micro-batches.
    """
    # Seeded for each step, so that a language model's dropout is the same after a resume.
    torch.manual_seed((seed << 32) + step * group.world_size + group.rank)
    local = LocalStep()
    for micro in micro_batches:
        sync_gradients(forward.vlm, on=micro.last)
        loss = forward.loss(micro)
        loss.backward()
        local.add(micro, loss)
    return local


def refuse_non_finite(
    step: int,
    local: LocalStep,
    totals: StepTotals,
    norm: float,
    model: nn.Module,
    samples: SampleList,
    group: ProcessGroup,
) -> None:
    """Stop before the optimizer uses a loss or gradient that is not finite, so the weights stay valid.

    Every process has equal totals and an equal norm of the summed gradients, so either all stop or none.

    Raises:
        NonFiniteError: a loss or a gradient is NaN or infinite. `train.stage.ending` finds a way out.
    """
    if math.isfinite(norm) and math.isfinite(totals.loss):
        return
    loss, causes = local.non_finite()
    names = [samples.name_of(s) for s in causes[:SAMPLES_NAMED]]
    parts = dict.fromkeys(broken_gradients(model))
    reports, found = zip(
        *group.gather_objects(
            [[None if loss is None else str(loss), names, len(causes)], [*parts]]
        ),
        strict=True,
    )
    if broken := [report for report in reports if report[0] is not None]:
        what = f"the loss is {broken[0][0]}"
    elif where := [*dict.fromkeys(name for names in found for name in names)]:
        what = f"the gradient is not finite in {len(where)} parameters, first {where[0]}"
    else:
        what = f"the norm of the gradient is {norm}"
    message = (
        f"step {step + 1}: {what}; samples {_some_names(broken or reports)}. Nothing was updated"
    )
    raise NonFiniteError(message, step, causes)


def _some_names(reports: Sequence[tuple[object, list[str], int]]) -> str:
    """Return the first names of all processes' (loss, names, number of samples), and how many more."""
    names = [name for _, some, _ in reports for name in some][:SAMPLES_NAMED]
    more = sum(count for _, _, count in reports) - len(names)
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")
