"""Packed batches: many samples in one sequence, each as if it were alone.

A *unit* is a run of tokens whose queries see a prefix [p0, p1) in full and their own run causally. A plain
sample is one unit without a prefix. An image with several annotations is a *tree*: one unit for the shared
beginning, then one for each annotation, with that beginning as prefix; the branches do not see each other.
Units stand in the order of their tokens and leave none out; a tree's units follow one another.

Legend: T tokens in the batch, N tokens that are features, S supervised predictions, U units.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One micro-batch: several samples or trees one after another, ready for the model."""

    input_ids: Tensor
    """(T,) int64 token ids; at image slots the id of `<image>`."""
    position_ids: Tensor
    """(T,) int64 positions within the sample; a branch goes on where its prefix ends."""
    image_slots: Tensor
    """(N,) int64 places of `input_ids` that receive features, ascending."""
    loss_positions: Tensor
    """(S,) int64 position whose output predicts the target; one may occur several times."""
    targets: Tensor
    """(S,) int64 token to be predicted."""
    loss_weights: Tensor
    """(S,) float32 weight of each prediction."""
    units: Tensor
    """(U, 4) int64 q_start, q_end, prefix_start, prefix_end; stays on the CPU."""

    @staticmethod
    def one_sample(ids: Tensor, weights: Tensor, image: int) -> PackedBatch:
        """Return one sample as a batch.

        Args:
            ids: (T,) int64 token ids, one `image` for each feature.
            weights: (T,) float32; a token is a target where its weight is not 0.
            image: token id of `<image>`.
        """
        targets = weights.nonzero().squeeze(1)
        return PackedBatch(
            input_ids=ids,
            position_ids=torch.arange(len(ids)),
            image_slots=(ids == image).nonzero().squeeze(1),
            loss_positions=targets - 1,
            targets=ids[targets],
            loss_weights=weights[targets],
            units=torch.tensor([[0, len(ids), 0, 0]]),
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch on `device`; `units` stay where the plan is made."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if f.name != "units"
        }
        return PackedBatch(**moved, units=self.units)
