"""What else the row codecs could be at the same bits: one quantiser with every choice open, and a bound.

The first entry of FOUR_BITS and of EIGHT_BITS is our codec, made of the same parts as the alternatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from cache.format.codec import INT4_DIVISORS, INT4_LEVELS, rotation_signs
from tests.benchmarks.activations import Features

NF4 = (
    *(-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0),
)
"""QLoRA's levels: equal shares of normal values, zero among them."""
FIT_ROUNDS = 15


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to quantise."""

    code_bits: int
    levels: tuple[float, ...]
    """In scales, ascending."""
    divisors: tuple[float, ...]
    """Scales tried: the block's largest magnitude over each; the smallest squared error wins."""
    block: int = 64
    """Values that share a scale; 0: a token's."""
    rotation: int = 64
    """Values that are rotated together; 0: none."""
    side: bool = True
    """Whether a scale may be negative, so that the largest magnitude meets the lowest level."""
    least_squares: bool = False
    """Whether the scale is refitted to the codes."""
    mean: Literal["none", "row", "space"] = "none"
    """Which mean token is taken off before: a row's own, which is stored with it, or that of other rows."""
    fitted: bool = False
    """Whether the levels are fitted (Lloyd-Max) to other rows of these features."""

    def bits(self, tokens: int, width: int) -> float:
        """A value's, its shares of scale and mean token included."""
        mean = 16 / tokens if self.mean == "row" else 0.0
        return self.code_bits + 16 / (self.block or width) + mean


INT4 = Variant(
    code_bits=4, levels=INT4_LEVELS, divisors=tuple(map(float, INT4_DIVISORS)), mean="row"
)
EVEN = replace(INT4, levels=tuple(range(-8, 8)), divisors=(7.25, 7.75, 8, 8.25, 8.5, 8.75, 9, 9.25))
PLAIN = replace(EVEN, levels=tuple(range(-7, 8)), divisors=(7,), side=False)
FOUR_BITS: Mapping[str, Variant] = {
    "int4: row's mean off, rotated, 64 a scale, searched": INT4,
    "no mean off": replace(INT4, mean="none"),
    "the mean token of other rows off": replace(INT4, mean="space"),
    "largest value on the lowest level (no search)": replace(INT4, divisors=(127,)),
    "16 scales tried": replace(INT4, divisors=tuple(np.arange(95, 152, 3.75))),
    "scale refitted by least squares": replace(INT4, least_squares=True),
    "levels fitted to these features": replace(INT4, fitted=True),
    "NF4 levels, largest value": replace(INT4, levels=NF4, divisors=(1,), side=False),
    "NF4 levels, searched": replace(
        INT4, levels=NF4, divisors=tuple(np.arange(0.8, 1.16, 0.05)), side=False
    ),
    "even steps, searched, signed scale": EVEN,
    "even steps, -8 to the largest value": replace(EVEN, divisors=(8,)),
    "even steps, 7 to the largest value": PLAIN,
    "blocks of 32": replace(INT4, block=32, rotation=32),
    "blocks of 128": replace(INT4, block=128, rotation=128),
    "blocks of 256": replace(INT4, block=256, rotation=256),
    "rotated over 256, scales for 64": replace(INT4, rotation=256),
    "not rotated": replace(INT4, rotation=0),
    "a scale a token, rotated": replace(INT4, block=0),
    "a scale a token, not rotated": replace(INT4, block=0, rotation=0),
    "no mean off, not rotated, even steps": replace(PLAIN, mean="none", rotation=0),
    "no mean off, rotated, even steps": replace(PLAIN, mean="none"),
    "no mean off, a scale a token, even steps": replace(PLAIN, mean="none", rotation=0, block=0),
}
INT8 = Variant(code_bits=8, levels=tuple(range(-127, 128)), divisors=(127,), side=False, mean="row")
EIGHT_BITS: Mapping[str, Variant] = {
    "int8: row's mean off, rotated, 64 a scale, largest on 127": INT8,
    "no mean off (the first spaces)": replace(INT8, mean="none"),
    "the mean token of other rows off": replace(INT8, mean="space"),
    "scale searched": replace(INT8, divisors=(127, 129, 131, 134, 137, 141)),
    "-128 too, signed scale": replace(
        INT8, levels=tuple(range(-128, 128)), divisors=(128,), side=True
    ),
    "blocks of 32": replace(INT8, block=32, rotation=32),
    "blocks of 128": replace(INT8, block=128, rotation=128),
    "blocks of 256": replace(INT8, block=256, rotation=256),
    "not rotated": replace(INT8, rotation=0),
    "a scale a token, rotated": replace(INT8, block=0),
    "a scale a token, not rotated": replace(INT8, block=0, rotation=0),
}


def quantised(variant: Variant, x: Features, others: Features) -> Features:
    """Features (rows, tokens, width) as they come back; what is fitted is fitted on `others`."""
    mean = np.zeros(1, np.float32)
    if variant.mean == "row":
        mean = x.mean(1, keepdims=True).astype(np.float16).astype(np.float32)
    elif variant.mean == "space":
        mean = others.reshape(-1, x.shape[-1]).mean(0)
    if variant.fitted:
        left = others - others.mean(1, keepdims=True)
        variant = replace(variant, levels=fit_levels(variant, _rotated(left, variant.rotation)))
    blocks = _rotated(x - mean, variant.rotation).reshape(-1, variant.block or x.shape[-1])
    back = _unrotated(_nearest(variant, blocks), variant.rotation)
    return back.reshape(x.shape) + mean


def _nearest(variant: Variant, blocks: torch.Tensor) -> torch.Tensor:
    """(N, block) -> what the codes stand for."""
    levels = torch.tensor(variant.levels, dtype=torch.float32)
    scales = _scales(variant, blocks, levels)
    chosen = _levels_of(blocks, scales, levels)
    if variant.least_squares:
        fitted = ((chosen * blocks).sum(1) / (chosen * chosen).sum(1)).nan_to_num(0).half().float()
        chosen, scales = _levels_of(blocks, fitted, levels), fitted
    return chosen * scales[:, None]


def _levels_of(blocks: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    between = (levels[1:] + levels[:-1]) / 2
    in_scales = torch.where(scales[:, None] != 0, blocks / scales[:, None], 0.0)
    return levels[torch.bucketize(in_scales, between)]


def _scales(variant: Variant, blocks: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The best of those tried, (N,)."""
    high, low = blocks.amax(1), blocks.amin(1)
    side = torch.where((high > -low) & variant.side, -1.0, 1.0)
    least = torch.full_like(high, torch.inf)
    best = torch.zeros_like(high)
    for divisor in variant.divisors:
        scales = (torch.maximum(high.abs(), low.abs()) / divisor * side).half().float()
        off = _levels_of(blocks, scales, levels) * scales[:, None] - blocks
        lost = (off * off).sum(1)
        best = torch.where(lost < least, scales, best)
        least = torch.minimum(lost, least)
    return best


def fit_levels(variant: Variant, blocks: torch.Tensor) -> tuple[float, ...]:
    """Lloyd-Max: levels and scales in turns, each the best for the other. `blocks`: rotated values."""
    blocks = blocks.reshape(-1, variant.block)
    levels = torch.tensor(variant.levels, dtype=torch.float32)
    for _ in range(FIT_ROUNDS):
        scales = _scales(variant, blocks, levels)
        kept = scales != 0
        of, steps = blocks[kept], scales[kept, None]
        index = torch.bucketize(of / steps, (levels[1:] + levels[:-1]) / 2).flatten()
        weight = steps.square().expand_as(of).flatten()
        sums = torch.zeros(len(levels)).index_add_(0, index, (of * steps).flatten())
        levels = (sums / torch.zeros(len(levels)).index_add_(0, index, weight)).sort().values
    return tuple(levels.tolist())


def _rotated(x: Features, size: int) -> torch.Tensor:
    """Random-sign Hadamard over `size` values; 0: nothing. Flat."""
    values = torch.from_numpy(np.ascontiguousarray(x)).flatten()
    if not size:
        return values
    signs = torch.from_numpy(np.resize(rotation_signs(), size))
    return ((values.view(-1, size) * signs) @ _hadamard(size)).flatten()


def _unrotated(x: torch.Tensor, size: int) -> Features:
    if size:
        x = (x.reshape(-1, size) @ _hadamard(size)) * np.resize(rotation_signs(), size)
    return x.numpy()


def _hadamard(size: int) -> torch.Tensor:
    """Orthonormal."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def bound_bits(train: Features, test: Features, error: float) -> float:
    """Fewest bits a value at a relative error, if tokens were normal: reverse water-filling over the
    variances of `test` along the principal directions of `train`, every row's mean token taken off and
    every token scaled to unit rms before (neither is counted)."""
    width = test.shape[-1]
    one, other = (
        (x - x.mean(1, keepdims=True)).reshape(-1, width).astype(float) for x in (train, test)
    )
    length = np.sqrt(np.square(other).mean(1, keepdims=True))
    one = one / np.sqrt(np.square(one).mean(1, keepdims=True))
    _, basis = np.linalg.eigh(np.cov(one.T))
    variances = np.square((other / length) @ basis).mean(0)
    # What may be lost of a token in its own units, when the loss is to be `error` of all features.
    wanted = error**2 * np.square(test, dtype=float).mean() / np.square(length).mean() * width
    low, high = 0.0, float(variances.max())
    for _ in range(100):
        water = (low + high) / 2
        low, high = (water, high) if np.minimum(variances, water).sum() < wanted else (low, water)
    return float(np.maximum(0.0, 0.5 * np.log2(variances / water)).sum() / width)
