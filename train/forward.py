"""From stored rows to a loss: unpack on the device, pass through connector and language model.

R distinct rows of a micro-batch in one array, M tokens a row of it, N places of feature tokens, V values a
token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from cache.format.spec import FeatureSpec
from model.quantize import unpack
from model.vlm import VLM
from train.data import MicroBatch

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
