"""One small packed batch for tests of the model.

vlm.loss(one_sample(images=1), random_features(count=1))
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention.batch import PackedBatch

VISION = 24
"""Width of the features."""
IMAGE = 39
"""Token id at the places of features; any id that no other token has."""


def one_sample(images: int = 1, tokens: int = 3) -> PackedBatch:
    """Return one sample of 12 tokens: features from the second token on, the last four supervised."""
    ids = torch.arange(40, 52)
    ids[1 : 1 + images * tokens] = IMAGE
    weights = torch.zeros(12)
    weights[8:] = torch.tensor([1.0, 0.5, 0.5, 2.0])
    return PackedBatch.one_sample(ids, weights, IMAGE)


def random_features(count: int = 1, tokens: int = 3) -> Tensor:
    """Return the random features of some images, (count, tokens, VISION)."""
    return torch.randn(count, tokens, VISION, generator=torch.Generator().manual_seed(count))
