"""One packed batch: many samples in one sequence, with the units that keep them apart.

Units and trees are defined in `model.attention.plan`.

T tokens in the batch, N of them features of images and frames, S supervised predictions, U units.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One micro-batch: several samples or trees in one sequence, ready for the model."""

    input_ids: Tensor
    """(T,) int64 token ids; the id of `<image>` where a feature goes."""
    position_ids: Tensor
    """(T,) int64 positions within the sample; a branch continues from the end of its prefix."""
    image_slots: Tensor
    """(N,) int64 indices into `input_ids` of the tokens that features replace, ascending."""
    loss_positions: Tensor
    """(S,) int64 indices of the tokens whose outputs predict the targets; may repeat (branches)."""
    targets: Tensor
    """(S,) int64 token ids to predict."""
    loss_weights: Tensor
    """(S,) float32 weight of each prediction in the loss."""
    units: Tensor
    """(U, 4) int64 start, end, prefix start, prefix end of each unit; always on the CPU."""

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
        """Return the batch on `device`. `units` stay on the CPU, where the attention plan is made."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if f.name != "units"
        }
        return PackedBatch(**moved, units=self.units)
