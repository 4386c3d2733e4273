"""Pooling in numpy: the mean over windows of patches, as `model.vision` computes it, to the bit.

Both act on values of float16, add them in one fixed order in float32, and multiply by 1 / window^2: every
step is one correctly rounded operation, so no library, thread or device makes a difference.

N patches, M tokens after pooling, V values a token.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def pool(features: npt.NDArray[np.float16], window: int) -> npt.NDArray[np.float32]:
    """Features (..., N, V) on a square grid -> (..., N / window^2, V), in the order of the grid's rows.

    Raises:
        ValueError: the patches are no square grid, or the window does not divide it.
    """
    *lead, patches, width = features.shape
    grid = math.isqrt(patches)
    if grid * grid != patches or window < 1 or grid % window:
        raise ValueError(f"{patches} patches in windows of {window} x {window}")
    side = grid // window
    blocks = features.reshape(-1, side, window, side, window, width).astype(np.float32)
    total = np.zeros((len(blocks), side, side, width), np.float32)
    for row in range(window):
        for column in range(window):
            total += blocks[:, :, row, :, column]
    total *= np.float32(1 / window**2)
    return total.reshape(*lead, side * side, width)
